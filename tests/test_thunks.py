import pytest

from jaxllm import thunks

# As XLA of jax 0.10.2 writes them: a loop of one graph between two graphs.
DUMP = """000: kCommandBuffer [source       | next=003 (1)] 
    001: kCopy         [source | sink] kCopy
    002: kCustomKernel [source | sink] loop_select_fusion_1 grid: [1, 1, 1]
003: kWhile         [prev=000 (1) | next=000 (1)]   
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink] 
        005: kCustomKernel       [source       | next=006 (1)] gemm_fusion_dot_38 grid: [256, 1, 1]
        006: kDynamicSliceFusion [prev=005 (1) | sink        ] params=1, results=1
            007: kCopy [source | sink] kCopy
        008: kCublasLtMatmul     [prev=005 (1) | sink        ] kCublasLtMatmul
000: kCommandBuffer [prev=003 (1) | sink        ] 
    009: kCustomKernel [source       | sink        ] input_scatter_fusion_4 grid: [1, 1, 1]

"""

# A loop inside the loop over steps, as a search by bisection is.
NESTED = """019: kWhile         [prev=000 (1) | next=000 (1)]   
condition:
    020: kCustomKernel [source | sink] loop_compare_fusion_3 grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=040 (1)] 
        021: kCopy         [source        | next=022 (1) ] kCopy
    040: kWhile         [prev=000 (1) | next=000 (1)]       
condition:
        041: kCustomKernel [source | sink] loop_compare_fusion_3 grid: [1, 1, 1]
      body:
        000: kCommandBuffer [source | sink] 
            042: kCustomKernel       [source       | next=045 (2)] loop_and_fusion grid: [256, 1, 1]
    000: kCommandBuffer [prev=040 (1) | next=068 (1)] 
        061: kCustomKernel [prev=061 (5) | sink        ] input_scatter_fusion_2 grid: [512, 1, 1]
"""


# A copy beside kernels, as of jax 0.11.2.
ASYNC = """000: kCommandBuffer [source | sink] 
    060: kAsyncStart   [prev=057 (3)  | sink        ] stream=computation_stream[0], async_id=60
        062: kDynamicSliceFusion [source | sink] params=1, results=1
            061: kCopy [source | sink] kCopy
    063: kAsyncDone    [source        | sink        ] async_id=60
    064: kCustomKernel [prev=057 (5)  | next=065 (1)] input_reduce_fusion_3 grid: [1, 1, 1]
"""


def test_graphs_and_loops_stand_in_order():
    assert [thunk.kind for thunk in thunks.parse(DUMP)] == [
        "kCommandBuffer",
        "kWhile",
        "kCommandBuffer",
    ]


def test_the_body_of_a_loop_is_one_graph():
    (loop,) = thunks.loops(thunks.parse(DUMP))

    assert thunks.is_one_graph(loop.part("body"))
    assert [thunk.name for thunk in loop.part("condition")] == ["loop_compare_fusion"]
    assert thunks.outside_graphs(loop.part("body")) == []


def test_what_is_launched_is_what_holds_nothing_else():
    (loop,) = thunks.loops(thunks.parse(DUMP))

    assert [thunk.name for thunk in loop.launches()] == [
        "gemm_fusion_dot_38",
        "kCopy",
        "kCublasLtMatmul",
    ]


def test_to_start_a_copy_and_to_wait_for_it_is_one_launch():
    (graph,) = thunks.parse(ASYNC)

    assert [thunk.name for thunk in graph.launches()] == ["kCopy", "input_reduce_fusion_3"]


def test_a_loop_within_breaks_the_graph_of_the_one_around_it():
    outer, inner = thunks.loops(thunks.parse(NESTED))

    assert not thunks.is_one_graph(outer.part("body"))
    assert thunks.is_one_graph(inner.part("body"))
    assert [thunk.kind for thunk in outer.part("body")] == [
        "kCommandBuffer",
        "kWhile",
        "kCommandBuffer",
    ]
    assert [thunk.kind for thunk in thunks.outside_graphs(outer.part("body"))] == ["kWhile"]
    assert len(outer.part("condition")) == len(inner.part("condition")) == 1


def test_a_kernel_outside_of_graphs_is_named():
    alone = "001: kCustomKernel [source | sink] lonely grid: [1, 1, 1]\n"

    found = thunks.outside_graphs(thunks.parse(DUMP + alone))

    assert [(thunk.kind, thunk.name) for thunk in found] == [
        ("kWhile", ""),
        ("kCustomKernel", "lonely"),
    ]


def test_a_folder_without_a_dump_has_none(tmp_path):
    assert thunks.read(tmp_path) is None


def test_a_dump_is_found_by_its_name(tmp_path):
    name = "module_0001.jit_program.thunk_sequence_after_thunk_passes.txt"
    (tmp_path / name).write_text(DUMP)

    assert thunks.read(tmp_path) == thunks.parse(DUMP)


def test_the_dumps_of_two_programs_are_refused(tmp_path):
    for number in (1, 2):
        (tmp_path / f"module_{number}.thunk_sequence_after_thunk_passes.txt").write_text(DUMP)

    with pytest.raises(ValueError, match="has the thunks of 2 programs; use one each"):
        thunks.read(tmp_path)
