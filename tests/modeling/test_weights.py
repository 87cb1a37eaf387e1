import itertools
import json
import re
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from jaxllm.errors import CheckpointError
from jaxllm.loading import Wishes, load_params, plan_load
from jaxllm.modeling import weights
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.families import llama
from jaxllm.modeling.weights import Checkpoint, Weight, match, read_header, ties_differ
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh
from tests.arrays import no_new_arrays
from tests.tiny import SIZES, sharder, tiny_checkpoint

E, F, H, K, D, V, L = 32, 48, 4, 2, 8, 101, 2
G = H // K
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def hf_tensors(dtype=np.float32, *, bias=False, kv_heads=K, heads=H, vocab=V, seed=0):
    """The tensors of a Llama checkpoint, named and shaped by hand."""
    rng = np.random.default_rng(seed)
    dim = E // heads
    layer = {
        "input_layernorm.weight": (E,),
        "self_attn.q_proj.weight": (heads * dim, E),
        "self_attn.k_proj.weight": (kv_heads * dim, E),
        "self_attn.v_proj.weight": (kv_heads * dim, E),
        "self_attn.o_proj.weight": (E, heads * dim),
        "post_attention_layernorm.weight": (E,),
        "mlp.gate_proj.weight": (F, E),
        "mlp.up_proj.weight": (F, E),
        "mlp.down_proj.weight": (E, F),
    }
    if bias:
        layer |= {
            name.replace(".weight", ".bias"): shape[:1]
            for name, shape in layer.items()
            if "proj" in name
        }
    shapes = {"model.embed_tokens.weight": (vocab, E), "lm_head.weight": (vocab, E)}
    shapes |= {"model.norm.weight": (E,)}
    shapes |= {f"model.layers.{i}.{name}": s for i in range(L) for name, s in layer.items()}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def llama_model(dtype="float32", on=None, **config):
    hf = LlamaConfig(**{**SIZES, **config})
    return abstract_model(llama.config_from_hf(hf), llama.build, dtype, on or sharder())


def tensor_sharder(size):
    layout = preset("tensor", tensor=size)
    return Sharder(layout, make_mesh(layout))


def save(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name)
    return folder


def save_index(folder, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def loaded(folder, model, table=llama.WEIGHTS, ignored=llama.IGNORED_WEIGHTS):
    """Loads a folder, and returns its parameters by path."""
    params = weights.load(match(model, Checkpoint(folder), table, ignored), lambda size: None)
    return {leaf.path: param for leaf, param in zip(model.leaves, params, strict=True)}


def problems_of(folder, model, table=llama.WEIGHTS, ignored=llama.IGNORED_WEIGHTS):
    with pytest.raises(CheckpointError) as caught:
        match(model, Checkpoint(folder), table, ignored)
    return str(caught.value)


# ---------------------------------------------------------------- one file


def write_raw(file, header, data=b"", *, length=None):
    """A safetensors file whose parts need not fit each other."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def test_header_finds_the_bytes_that_safetensors_wrote(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=ml_dtypes.bfloat16),
        "c": np.arange(8, dtype=np.float16).reshape(2, 2, 2),
        "d": np.array([1, -2], np.int64),
        "e": np.array([True, False]),
    }
    file = tmp_path / "some.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})

    found = read_header(file)

    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        view = found[name].view()
        assert isinstance(view, np.memmap)
        assert view.dtype == tensor.dtype
        np.testing.assert_array_equal(view, tensor)


@pytest.mark.parametrize("content", [b"", b"\x08\x00", b"\x00" * 7])
def test_file_too_short_for_a_length_is_refused(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)

    with pytest.raises(CheckpointError, match=f"cut off: it has {len(content)} bytes"):
        read_header(file)


def test_header_longer_than_its_file_is_refused(tmp_path):
    file = write_raw(tmp_path / "model.safetensors", entry(), length=1 << 40)

    with pytest.raises(CheckpointError, match="its header does not fit in them"):
        read_header(file)


def test_header_longer_than_the_format_allows_is_not_read(tmp_path):
    file = write_raw(tmp_path / "model.safetensors", b"{}", length=weights.MAX_HEADER + 1)
    with file.open("r+b") as stream:
        stream.truncate(2 * weights.MAX_HEADER)  # sparse: takes no space on disk

    with pytest.raises(CheckpointError, match="its header does not fit"):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe not text",
        b"{'w': 1}",
        b'{"w": {"dtype": "F32"',
        [],
        "text",
        {"w": 1},
        {"w": {"dtype": "F32"}},
        {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0]}},
        {"w": {"dtype": "F32", "shape": 6, "data_offsets": [0, 24]}},
        {"w": {"dtype": ["F32"], "shape": [6], "data_offsets": [0, 24]}},
        {"w": {"dtype": "F32", "shape": ["2", 3], "data_offsets": [0, 24]}},
        {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": ["0", "24"]}},
        entry(shape=(-2, -3)),
        entry(shape=(2.0, 3)),
    ],
)
def test_damaged_header_is_refused(tmp_path, header):
    file = write_raw(tmp_path / "model.safetensors", header, bytes(24))

    with pytest.raises(CheckpointError, match=r"header of '.*model\.safetensors' is damaged"):
        read_header(file)


@pytest.mark.parametrize("offsets", [(0, 20), (0, 28), (24, 0), (-24, 0)])
def test_offsets_that_do_not_fit_the_shape_are_refused(tmp_path, offsets):
    file = write_raw(tmp_path / "model.safetensors", entry(offsets=offsets), bytes(24))

    with pytest.raises(CheckpointError, match=r"damaged: 'w' is F32\[2, 3\] and has -?\d+ bytes"):
        read_header(file)


def test_unknown_element_type_is_named_with_the_known_ones(tmp_path):
    file = write_raw(tmp_path / "model.safetensors", entry("F8_E4M3", offsets=(0, 6)), bytes(6))

    with pytest.raises(CheckpointError, match=r"'w' in .* has the element type F8_E4M3.*'BF16'"):
        read_header(file)


def test_file_without_its_last_byte_is_refused_by_name(tmp_path):
    folder = save(tmp_path, {"w": np.zeros(6, np.float32)})
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)

    message = f"is cut off: 'w' ends at byte {size} and the file has {size - 1}"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


# ---------------------------------------------------------------- one folder


def test_index_decides_which_files_are_read(tmp_path):
    save(tmp_path, {"a": np.zeros(1, np.float32)}, "model-1.safetensors")
    save(tmp_path, {"b": np.ones(1, np.float32)}, "model-2.safetensors")
    save(tmp_path, {"a": np.ones(1, np.float32)}, "consolidated.safetensors")
    save_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})

    tensors = Checkpoint(tmp_path).tensors

    assert {name: t.file.name for name, t in tensors.items()} == {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
    }


def test_missing_shards_are_all_named(tmp_path):
    save(tmp_path, {"a": np.zeros(1, np.float32)}, "model-1.safetensors")
    save_index(tmp_path, {name: f"model-{i}.safetensors" for i, name in enumerate("bac")})

    message = r"lacks \['model-0.safetensors', 'model-2.safetensors'\], which its index names"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x"])
def test_index_pointing_out_of_its_folder_is_refused(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    save(tmp_path, {"a": np.zeros(1, np.float32)}, "secret.safetensors")
    save_index(folder, {"a": file})

    with pytest.raises(CheckpointError, match=f"points outside its folder: .*{re.escape(file)}"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "\0"]
)
def test_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"index\.json' is not a weight index"):
        Checkpoint(tmp_path)


def test_pickles_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")

    with pytest.raises(
        CheckpointError, match=r"\['pytorch_model.bin'\], which are pickles.*run any"
    ):
        Checkpoint(tmp_path)


def test_folder_without_weights_says_what_is_needed(tmp_path):
    save(tmp_path, {"a": np.zeros(1, np.float32)}, "adapter_model.safetensors")

    with pytest.raises(CheckpointError, match=r"Cannot find any model weights .*\*\.safetensors"):
        Checkpoint(tmp_path)


def test_files_without_an_index_are_read_together(tmp_path):
    save(tmp_path, {"a": np.zeros(1, np.float32)}, "part-1.safetensors")
    save(tmp_path, {"b": np.zeros(1, np.float32)}, "part-2.safetensors")

    assert set(Checkpoint(tmp_path).tensors) == {"a", "b"}


def test_tensor_in_two_files_is_refused_with_both_named(tmp_path):
    save(tmp_path, {"a": np.zeros(1, np.float32)}, "part-1.safetensors")
    save(tmp_path, {"a": np.zeros(1, np.float32)}, "part-2.safetensors")

    with pytest.raises(CheckpointError, match=r"'a' is both in part-1.* and in part-2"):
        Checkpoint(tmp_path)


def test_dtype_of_a_checkpoint_is_that_of_most_float_bytes(tmp_path):
    save(
        tmp_path,
        {
            "ids": np.zeros(100, np.int64),
            "half": np.zeros(9, ml_dtypes.bfloat16),
            "full": np.zeros(6, np.float32),
        },
    )

    assert Checkpoint(tmp_path).dtype() == "F32"


# ---------------------------------------------------------------- fitting the model


def test_missing_extra_and_misshaped_tensors_are_listed_in_one_error(tmp_path):
    tensors = hf_tensors()
    del tensors[Q_PROJ]
    tensors[DOWN] = tensors[DOWN].T.copy()
    tensors["model.layers.2.mlp.down_proj.weight"] = tensors["lm_head.weight"]
    tensors["model.norm.weight"] = np.ones(E, np.int32)
    save(tmp_path, tensors)

    message = problems_of(tmp_path, llama_model())

    assert "(4 problems)" in message
    assert f"{Q_PROJ!r} is missing" in message
    assert f"{DOWN!r} has shape [{F}, {E}] and the config asks for [{E}, {F}]" in message
    assert "'model.norm.weight' has element type I32" in message
    assert "no module or parameter named 'model.layers.2.mlp.down_proj.weight'" in message
    assert message.endswith("Nothing was loaded.")


def test_every_missing_part_of_a_fused_parameter_is_listed(tmp_path):
    save(tmp_path, {n: t for n, t in hf_tensors().items() if "layers.1.self_attn" not in n})

    message = problems_of(tmp_path, llama_model())

    missing = re.findall(r"'model\.layers\.1\.self_attn\.(\w)_proj\.weight' is missing", message)
    assert sorted(missing) == ["k", "o", "q", "v"]


def test_long_list_of_problems_is_cut_and_counted(tmp_path):
    save(tmp_path, {f"strange.{i}": np.zeros(1, np.float32) for i in range(20)})

    message = problems_of(tmp_path, llama_model())

    num_missing = len(hf_tensors())
    assert f"({num_missing + 20} problems)" in message
    assert message.count(";") == 10
    assert "; ...." in message


def test_parameter_without_a_line_in_the_table_is_listed(tmp_path):
    save(tmp_path, hf_tensors())
    table = [line for line in llama.WEIGHTS if line.path != "norm.scale"]

    message = problems_of(tmp_path, llama_model(), table)

    assert "no line of the weight table fills 'norm.scale'" in message
    assert "no module or parameter named 'model.norm.weight'" in message


def test_ignored_patterns_are_not_extra(tmp_path):
    inv_freq = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4) for i in range(L)}
    save(tmp_path, hf_tensors() | inv_freq)

    assert len(loaded(tmp_path, llama_model())) == len(llama_model().leaves)
    assert "inv_freq" in problems_of(tmp_path, llama_model(), ignored=())


def test_biases_the_config_does_not_have_are_extra(tmp_path):
    save(tmp_path, hf_tensors(bias=True))

    message = problems_of(tmp_path, llama_model())

    assert f"({7 * L} problems)" in message
    assert "no module or parameter named 'model.layers.0.self_attn.q_proj.bias'" in message


# ---------------------------------------------------------------- values


def test_fused_parameters_hold_each_tensor_in_its_part(tmp_path):
    tensors = hf_tensors(bias=True)
    save(tmp_path, tensors)

    params = loaded(tmp_path, llama_model(attention_bias=True, mlp_bias=True))

    for i in range(L):
        stored = {
            name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in tensors.items()
        }
        for kind, inputs in (("weight", (E,)), ("bias", ())):
            q = stored[f"self_attn.q_proj.{kind}"].reshape(K, G, D, *inputs)
            k = stored[f"self_attn.k_proj.{kind}"].reshape(K, 1, D, *inputs)
            v = stored[f"self_attn.v_proj.{kind}"].reshape(K, 1, D, *inputs)
            qkv = np.concatenate([q, k, v], axis=1)  # [K, G+2, D, E]
            gate_up = [stored[f"mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
            gate_up = np.stack(gate_up, axis=1)  # [F, 2, E]
            np.testing.assert_array_equal(params[f"layers.{i}.attn.qkv.{kind}"], qkv)
            np.testing.assert_array_equal(params[f"layers.{i}.mlp.gate_up.{kind}"], gate_up)
        o = stored["self_attn.o_proj.weight"].reshape(E, H, D)
        np.testing.assert_array_equal(params[f"layers.{i}.attn.o.weight"], o)
        np.testing.assert_array_equal(
            params[f"layers.{i}.mlp.down.bias"], stored["mlp.down_proj.bias"]
        )
    np.testing.assert_array_equal(params["head.weight"], tensors["lm_head.weight"])
    np.testing.assert_array_equal(params["embed.weight"], tensors["model.embed_tokens.weight"])


def test_sharded_files_give_the_same_parameters_as_one_file(tmp_path):
    tensors = hf_tensors()
    files = [f"model-{i}.safetensors" for i in range(3)]
    placed = {name: files[i % 3] for i, name in enumerate(tensors)}
    many, one = tmp_path / "many", tmp_path / "one"
    many.mkdir()
    one.mkdir()
    for file in files:
        save(many, {n: t for n, t in tensors.items() if placed[n] == file}, file)
    save_index(many, placed)
    save(one, tensors)

    apart, together = loaded(many, llama_model()), loaded(one, llama_model())

    for path, param in together.items():
        np.testing.assert_array_equal(apart[path], param)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_files_of_another_type_are_cast_to_float32_as_numpy_would(tmp_path, stored):
    tensors = hf_tensors(stored)
    save(tmp_path, tensors)

    params = loaded(tmp_path, llama_model())

    expected = tensors["model.embed_tokens.weight"].astype(np.float32)
    assert all(param.dtype == np.float32 for param in params.values())
    np.testing.assert_array_equal(params["embed.weight"], expected)
    gate = tensors["model.layers.1.mlp.gate_proj.weight"].astype(np.float32)
    gate_up = np.asarray(params["layers.1.mlp.gate_up.weight"])
    np.testing.assert_array_equal(gate_up[:, 0], gate)


def test_extreme_values_of_16_bits_survive_the_cast(tmp_path):
    tensors = hf_tensors(ml_dtypes.bfloat16)
    edges = np.array([0x0001, 0x8000, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80], np.uint16)
    tensors["model.norm.weight"][: len(edges)] = edges.view(ml_dtypes.bfloat16)
    save(tmp_path, tensors)

    scale = np.asarray(loaded(tmp_path, llama_model())["norm.scale"])

    # A bfloat16 is the upper half of a float32.
    np.testing.assert_array_equal(scale[: len(edges)].view(np.uint32) >> 16, edges)


def test_float32_files_are_rounded_to_nearest_even(tmp_path):
    tensors = hf_tensors()
    save(tmp_path, tensors)

    params = loaded(tmp_path, llama_model("bfloat16"))

    expected = tensors["lm_head.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["head.weight"]), expected)


def test_transform_is_applied_before_the_shape_is_checked(tmp_path):
    tensors = hf_tensors()
    save(tmp_path, {n: t.T.copy() if "mlp" in n else t for n, t in tensors.items()})
    table = [
        Weight(line.names, line.path, np.transpose) if ".mlp." in line.path else line
        for line in llama.WEIGHTS
    ]

    params = loaded(tmp_path, llama_model(), table)

    np.testing.assert_array_equal(params["layers.1.mlp.down.weight"], tensors[DOWN])
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    gate_up = np.asarray(params["layers.0.mlp.gate_up.weight"])
    np.testing.assert_array_equal(gate_up[:, 1], up)
    assert f"{DOWN!r} has shape [{F}, {E}]" in problems_of(tmp_path, llama_model())


@pytest.mark.parametrize("size", [1, 2])
def test_interleaved_tensor_holds_the_queries_key_and_value_of_each_kv_head(tmp_path, size):
    tensors = hf_tensors(bias=True, vocab=104)
    expected = {}
    for i, kind in itertools.product(range(L), ("weight", "bias")):
        parts = [tensors.pop(f"model.layers.{i}.self_attn.{n}_proj.{kind}") for n in "qkv"]
        heads = [part.reshape(K, -1, D, *part.shape[1:]) for part in parts]
        expected[f"layers.{i}.attn.qkv.{kind}"] = np.concatenate(heads, axis=1)  # [K, G+2, D, ...]
    fused = {f"model.{path}": qkv.reshape(-1, *qkv.shape[3:]) for path, qkv in expected.items()}
    save(tmp_path, tensors | fused)
    table = [
        Weight(f"model.{line.path}", line.path, interleaved=True) if "qkv" in line.path else line
        for line in llama.WEIGHTS
    ]
    config = {"attention_bias": True, "mlp_bias": True, "vocab_size": 104}

    params = loaded(tmp_path, llama_model(on=tensor_sharder(size), **config), table)

    for path, qkv in expected.items():
        assert len(params[path].addressable_shards) == size
        for shard in params[path].addressable_shards:
            np.testing.assert_array_equal(shard.data, qkv[shard.index])
        assert params[path].sharding.is_fully_replicated == (size == 1)


def test_transform_that_a_tensor_is_too_flat_for_is_listed(tmp_path):
    save(tmp_path, hf_tensors() | {DOWN: np.zeros(E * F, np.float32)})
    table = [
        Weight(line.names, line.path, lambda w: w.swapaxes(0, 1)) if "down" in line.path else line
        for line in llama.WEIGHTS
    ]

    assert f"{DOWN!r} has shape [{E * F}]" in problems_of(tmp_path, llama_model(), table)


def test_report_is_told_every_byte(tmp_path):
    save(tmp_path, hf_tensors())
    model, reported = llama_model(), []
    sources = match(model, Checkpoint(tmp_path), llama.WEIGHTS)

    weights.load(sources, reported.append)

    assert len(reported) == len(model.leaves)
    assert sum(reported) == model.num_bytes == sum(t.nbytes for t in hf_tensors().values())


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_shards_equal_slices_of_the_whole(tmp_path, size, transposed):
    sizes = {"kv_heads": 8, "heads": 8, "vocab": 104}
    tensors, table = hf_tensors(**sizes), llama.WEIGHTS
    if transposed:
        tensors = {n: t.T.copy() for n, t in tensors.items()}
        table = [Weight(line.names, line.path, np.transpose) for line in table]
    save(tmp_path, tensors)
    config = {"num_key_value_heads": 8, "num_attention_heads": 8, "vocab_size": 104}
    whole = loaded(tmp_path, llama_model(**config), table)
    on = tensor_sharder(size)

    params = loaded(tmp_path, llama_model(on=on, **config), table)

    split = 0
    for path, param in params.items():
        full = np.asarray(whole[path])
        assert len(param.addressable_shards) == size
        for shard in param.addressable_shards:
            np.testing.assert_array_equal(shard.data, full[shard.index])
        split += not param.sharding.is_fully_replicated
    # Embedding and head, and qkv, o, gate/up and down of each layer; norms are whole everywhere.
    assert split == 2 + 4 * L


def test_any_box_of_a_parameter_is_read_alone(tmp_path):
    save(tmp_path, hf_tensors())
    rng = np.random.default_rng(0)

    for source in match(llama_model(), Checkpoint(tmp_path), llama.WEIGHTS):
        whole = source.read((slice(None),) * len(source.leaf.shape.shape))
        for _ in range(5):
            bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in whole.shape]
            index = tuple(slice(*b) for b in bounds)

            shard = source.read(index)

            assert shard.base is None  # its own bytes, not a view of more
            np.testing.assert_array_equal(shard, whole[index])


def test_bounded_bytes_in_flight_change_nothing(tmp_path, monkeypatch):
    save(tmp_path, hf_tensors())
    expected = loaded(tmp_path, llama_model())
    monkeypatch.setattr(weights, "IN_FLIGHT", 1)

    for path, param in loaded(tmp_path, llama_model()).items():
        np.testing.assert_array_equal(param, expected[path])


# ---------------------------------------------------------------- tied heads


def pair(tmp_path, head, embedding):
    save(tmp_path, {"head": head, "embedding": embedding})
    return ties_differ(Checkpoint(tmp_path), "head", "embedding")


def test_equal_head_is_no_difference(tmp_path):
    table = np.random.default_rng(0).normal(size=(V, E)).astype(np.float32)

    assert not pair(tmp_path, table, table.copy())


def test_equal_head_of_another_type_is_no_difference(tmp_path):
    table = np.random.default_rng(0).normal(size=(V, E)).astype(ml_dtypes.bfloat16)

    assert not pair(tmp_path, table.astype(np.float32), table)


def test_head_that_differs_in_its_last_number_is_found(tmp_path):
    table = np.zeros((3, 1 << 20), np.float32)  # more than is compared at a time
    other = table.copy()
    other[-1, -1] = 1

    assert pair(tmp_path, table, other)


def test_head_of_another_shape_differs(tmp_path):
    assert pair(tmp_path, np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32))


def test_checkpoint_without_a_head_does_not_differ(tmp_path):
    save(tmp_path, {"embedding": np.zeros((2, 3), np.float32)})

    assert not ties_differ(Checkpoint(tmp_path), "head", "embedding")


def tied_checkpoint(folder, change):
    """A checkpoint whose config ties the head and whose file holds one nevertheless."""
    tiny_checkpoint(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(change)
    save(folder, tensors)
    return tensors


def test_tied_head_that_the_file_repeats_is_skipped(tmp_path):
    tied_checkpoint(tmp_path, change=0)

    plan = plan_load(tmp_path, Wishes(), sharder(), "auto")

    assert plan.config.tie_embeddings
    assert "head.weight" not in [leaf.path for leaf in plan.model.leaves]


def test_tied_head_that_differs_is_loaded(tmp_path):
    tensors = tied_checkpoint(tmp_path, change=1)

    plan = plan_load(tmp_path, Wishes(), sharder(), "auto")
    params = load_params(plan, seed=0, show_progress=False)

    assert not plan.config.tie_embeddings
    paths = [leaf.path for leaf in plan.model.leaves]
    head = params[paths.index("head.weight")]
    np.testing.assert_array_equal(head, tensors["lm_head.weight"])


def test_loading_reads_nothing_before_everything_fits(tmp_path):
    tensors = hf_tensors()
    del tensors[Q_PROJ]
    save(tmp_path, tensors)
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)

    with no_new_arrays(), pytest.raises(CheckpointError, match="Nothing was loaded"):
        plan_load(tmp_path, Wishes(), sharder(), "auto")
