"""Checkpoints of the families: fused and transposed tensors, older names, the way back."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.errors import CheckpointError
from jaxllm.loading import Wishes, load_params, plan_load
from jaxllm.modeling import registry
from jaxllm.modeling.registry import ARCHITECTURES
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh
from tests.tiny import sharder, tiny_checkpoint, tiny_model

FAMILIES = sorted(set(ARCHITECTURES.values()))
E, H, D = 32, 4, 8


def loaded(folder, on=None):
    """The parameters of a checkpoint by path."""
    plan = plan_load(folder, Wishes(), on or sharder(), "auto")
    params = load_params(plan, seed=0, show_progress=False)
    return {leaf.path: param for leaf, param in zip(plan.model.leaves, params, strict=True)}


def change(folder, rename):
    """Writes a checkpoint's tensors anew, under the names that `rename` gives."""
    file = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_checkpoint_gives_back_its_parameters(family, tmp_path):
    _, model, params = tiny_model(family)
    written = {leaf.path: param for leaf, param in zip(model.leaves, params, strict=True)}

    found = loaded(tiny_checkpoint(tmp_path, family))

    assert found.keys() == written.keys()
    for path, param in written.items():
        np.testing.assert_array_equal(found[path], param)


def test_one_tensor_fills_queries_keys_and_values(tmp_path):
    tensors = load_file(tiny_checkpoint(tmp_path, "gpt2") / "model.safetensors")

    params = loaded(tmp_path)

    fused = tensors["transformer.h.1.attn.c_attn.weight"]  # [in, q and k and v]
    assert fused.shape == (E, 3 * E)
    parts = [fused[:, i * E : (i + 1) * E].T.reshape(H, D, E) for i in range(3)]
    np.testing.assert_array_equal(params["layers.1.attn.qkv.weight"], np.stack(parts, axis=1))
    bias = tensors["transformer.h.1.attn.c_attn.bias"].reshape(3, H, D).swapaxes(0, 1)
    np.testing.assert_array_equal(params["layers.1.attn.qkv.bias"], bias)
    out = tensors["transformer.h.0.attn.c_proj.weight"]
    np.testing.assert_array_equal(params["layers.0.attn.o.weight"], out.T.reshape(E, H, D))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_shards_of_any_family_are_slices_of_the_whole(family, tmp_path):
    layout = preset("tensor", tensor=2)
    folder = tiny_checkpoint(tmp_path, family, vocab_size=104)

    whole, split = loaded(folder), loaded(folder, Sharder(layout, make_mesh(layout)))

    for path, param in split.items():
        for shard in param.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole[path])[shard.index])
    assert not split["layers.0.attn.qkv.weight"].sharding.is_fully_replicated


@pytest.mark.parametrize("family", FAMILIES)
def test_names_may_lack_their_first_part(family, tmp_path):
    folder = tiny_checkpoint(tmp_path, family, tie_word_embeddings=True)
    expected = loaded(folder)
    change(folder, lambda name: name.partition(".")[2])

    found = loaded(folder)

    for path, param in expected.items():
        np.testing.assert_array_equal(found[path], param)


def test_tensor_under_both_names_is_left_over(tmp_path):
    folder = tiny_checkpoint(tmp_path, "gpt2")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"]}, folder / "more.safetensors"
    )
    (folder / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"no module or parameter named 'ln_f\.bias'"):
        loaded(folder)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_masks_among_the_weights_are_ignored(prefix, tmp_path):
    folder = tiny_checkpoint(tmp_path, "gpt2")
    expected = loaded(folder)
    change(folder, lambda name: prefix + name.removeprefix("transformer."))
    masks = {
        f"{prefix}h.{i}.attn.{name}": np.ones((1, 1, 4, 4), np.uint8)
        for i in range(2)
        for name in ("bias", "masked_bias")
    }
    save_file(masks | load_file(folder / "model.safetensors"), folder / "model.safetensors")

    assert loaded(folder).keys() == expected.keys()


def test_fused_tensor_of_a_wrong_shape_is_listed(tmp_path):
    folder = tiny_checkpoint(tmp_path, "gpt2")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.0.attn.c_attn.weight"
    tensors[name] = tensors[name][:, : 2 * E].copy()
    save_file(tensors, folder / "model.safetensors")

    message = rf"'{name}' has shape \[{2 * E}, {E}\] and the config asks for \[{3 * E}, {E}\]"
    with pytest.raises(CheckpointError, match=message):
        loaded(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_transforms_undo_themselves(family):
    matrix = np.arange(12).reshape(3, 4)

    for line in registry.family(family).WEIGHTS:
        if line.transform is not None:
            np.testing.assert_array_equal(line.transform(line.transform(matrix)), matrix)
