import pytest

from jaxllm.hlo import Array, Module

# A loop that writes into a donated cache, then copies it and transposes a weight.
TEXT = """HloModule jit_f, is_scheduled=true

%fused_scatter (p.0: f32[8,2], p.1: s32[1], p.2: f32[1,2]) -> f32[8,2] {
  %p.0 = f32[8,2]{1,0} parameter(0)
  %p.1 = s32[1]{0} parameter(1)
  %p.2 = f32[1,2]{1,0} parameter(2)
  ROOT %scatter.1 = f32[8,2]{1,0} scatter(%p.0, %p.1, %p.2), to_apply=%second
}

%fused_pair (p.3: f32[4,3]) -> (f32[3,4], f32[]) {
  %p.3 = f32[4,3]{1,0} parameter(0)
  %transpose.1 = f32[3,4]{1,0} transpose(%p.3), dimensions={1,0}
  %zero = f32[] constant(0)
  ROOT %tuple.1 = (f32[3,4]{1,0}, f32[]) tuple(%transpose.1, %zero)
}

%body (arg: (s32[], f32[8,2], s32[1], f32[1,2])) -> (s32[], f32[8,2], s32[1], f32[1,2]) {
  %arg = (s32[], f32[8,2]{1,0}, s32[1]{0}, /*index=3*/f32[1,2]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %cache.1 = f32[8,2]{1,0} get-tuple-element(%arg), index=1
  %slots = s32[1]{0} get-tuple-element(%arg), index=2
  %new = f32[1,2]{1,0} get-tuple-element(%arg), index=3
  %written = f32[8,2]{1,0} fusion(%cache.1, %slots, %new), kind=kInput, calls=%fused_scatter
  ROOT %tuple.2 = (s32[], f32[8,2]{1,0}, s32[1]{0}, f32[1,2]{1,0}) tuple(%i, %written, %slots, %new)
}

ENTRY %main (weight: f32[4,3], cache: f32[8,2], slots: s32[1], new: f32[1,2]) -> f32[8,2] {
  %weight = f32[4,3]{1,0} parameter(0), metadata={op_name="params[0]"}
  %cache = f32[8,2]{1,0} parameter(1), metadata={op_name="cache"}
  %slots.1 = s32[1]{0} parameter(2)
  %new.1 = f32[1,2]{1,0} parameter(3)
  %pair = (f32[3,4]{1,0}, f32[]) fusion(%weight), kind=kLoop, calls=%fused_pair
  %start = s32[] constant(0)
  %tuple.3 = (s32[], f32[8,2], s32[1], f32[1,2]) tuple(%start, %cache, %slots.1, %new.1)
  %while.1 = (s32[], f32[8,2], s32[1], f32[1,2]) while(%tuple.3), condition=%always, body=%body
  %done = f32[8,2]{1,0} get-tuple-element(%while.1), index=1
  ROOT %copy.1 = f32[8,2]{1,0} copy(%done)
}

%always (arg.1: (s32[], f32[8,2], s32[1], f32[1,2])) -> pred[] {
  %arg.1 = (s32[], f32[8,2]{1,0}, s32[1]{0}, f32[1,2]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}
"""


@pytest.fixture(scope="module")
def module():
    return Module(TEXT)


def test_only_what_is_outside_fusions_runs(module):
    assert {computation for computation, _ in module.running} == {"main", "body", "always"}


def test_a_value_is_followed_through_loops_and_updates_in_place(module):
    origin = module.origin("main", "done")

    assert origin is not None
    assert origin.source == "cache"


def test_a_copy_has_no_origin(module):
    assert module.origin("main", "copy.1") is None


def test_an_update_in_place_names_the_operand_it_overwrites(module):
    written = module.computations["body"]["written"]

    assert module.updated_operand(written) == "cache.1"


def test_a_fusion_of_several_results_says_what_makes_each(module):
    pair = module.computations["main"]["pair"]

    made = [(str(array), maker.opcode) for array, maker in module.results(pair)]

    assert made == [("f32[3,4]", "transpose"), ("f32[]", "constant")]


@pytest.mark.parametrize(
    ("dtype", "num_bytes"), [("bf16", 24), ("f32", 48), ("s4", 6), ("pred", 12), ("f8e4m3fn", 12)]
)
def test_bytes_follow_the_type(dtype, num_bytes):
    assert Array(dtype, (3, 4)).num_bytes == num_bytes


def test_a_library_s_call_may_write_over_its_operands():
    module = Module("""HloModule jit_g

ENTRY %main (x: f32[4], cache: f32[8]) -> (f32[4], f32[8]) {
  %x = f32[4]{0} parameter(0)
  %cache = f32[8]{0} parameter(1), metadata={op_name="cache"}
  ROOT %call = (f32[4]{0}, f32[8]{0}) custom-call(%x, %cache), custom_call_target="mine", \
output_to_operand_aliasing={{1}: (1, {})}, api_version=API_VERSION_TYPED_FFI, metadata={op_name="f"}
}
""")
    call = module.computations["main"]["call"]

    assert call.overwrites == {1: 1}
    assert [module.updated_operand(call, part) for part in (0, 1)] == [None, "cache"]
    assert module.origin("main", "call", 1).source == "cache"
    assert module.origin("main", "call", 0) is None
