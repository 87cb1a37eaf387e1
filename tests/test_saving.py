"""`llm.save` and back: the same numbers under any layout, or an error that says what is wrong."""

import asyncio
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxllm
from jaxllm import LLM, CheckpointError, ConfigError, SamplingParams
from jaxllm.modeling import checkpoint, manifest
from jaxllm.modeling.fitting import unfit
from jaxllm.modeling.forms import to_bare
from tests.layouts import EIGHT_HEADS
from tests.tiny import CONFIGS, random_prompts

SMALL = {
    "skip_tokenizer_init": True,
    "max_model_len": 48,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 1 << 20,
    "use_tqdm_on_load": False,
}
PROMPTS = random_prompts(3, 20, seed=3, shortest=3)
GREEDY = SamplingParams(temperature=0, max_tokens=6)
LAYOUTS = {
    "one": {},
    "eight": {"tensor_parallel_size": 8},
    "2d": {"tensor_parallel_size": 8, "layout": "tensor_2d"},
    "others": {"tensor_parallel_size": 2, "devices": [5, 2]},
}


def tokens(llm):
    return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def bare(llm):
    """Every parameter without copies and padding, by path."""
    runner = llm._engine.runner
    leaves = runner.builder.model.leaves
    return {
        leaf.path: np.asarray(to_bare(leaf, x))
        for leaf, x in zip(leaves, runner.params, strict=True)
    }


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("llama", **EIGHT_HEADS)


@pytest.fixture(scope="module")
def expected(folder):
    with LLM(folder, **SMALL) as llm:
        return tokens(llm), bare(llm)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """By layout: a folder saved from it."""
    found = {}
    for name, how in LAYOUTS.items():
        found[name] = tmp_path_factory.mktemp("saved") / name
        with LLM(folder, **how, **SMALL) as llm:
            llm.save(found[name])
    return found


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(saved["one"], tmp_path / "copy")


def change(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("new", LAYOUTS)
@pytest.mark.parametrize("old", LAYOUTS)
def test_any_layout_loads_what_any_other_saved(saved, expected, old, new):
    with LLM(saved[old], **LAYOUTS[new], **SMALL) as llm:
        found, shapes = bare(llm), llm._engine.runner.builder.model.shapes
        for param, shape in zip(llm._engine.runner.params, shapes, strict=True):
            assert param.sharding.is_equivalent_to(shape.sharding, param.ndim)

    assert found.keys() == expected[1].keys()
    for path, value in expected[1].items():
        np.testing.assert_array_equal(found[path], value)


@pytest.mark.parametrize("new", ["one", "eight"])
def test_tokens_are_those_of_the_original(saved, expected, new):
    with LLM(saved["2d"], **LAYOUTS[new], **SMALL) as llm:
        assert tokens(llm) == expected[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_comes_back(checkpoints, tmp_path, family):
    with LLM(checkpoints(family), **SMALL) as llm:
        llm.save(tmp_path / "saved")
        wanted, values = unfit(llm._plan.config), bare(llm)

    with LLM(tmp_path / "saved", **SMALL) as llm:
        assert unfit(llm._plan.config) == wanted
        assert llm._plan.manifest is not None
        for path, value in bare(llm).items():
            np.testing.assert_array_equal(value, values[path])


def test_cast_is_kept_and_is_the_default(folder, tmp_path):
    with LLM(folder, dtype="bfloat16", **SMALL) as llm:
        llm.save(tmp_path / "saved")
        values = bare(llm)

    for dtype in ("auto", "bfloat16"):
        with LLM(tmp_path / "saved", dtype=dtype, **SMALL) as llm:
            assert llm._plan.engine.dtype == "bfloat16"
            for path, value in bare(llm).items():
                np.testing.assert_array_equal(value, values[path])


def test_resharded_model_saves_what_it_is(folder, expected, tmp_path):
    with LLM(folder, **SMALL) as llm:
        llm.reshard("tensor", tensor_parallel_size=8)
        llm.save(tmp_path / "saved")
        llm.save(tmp_path / "again")

    with LLM(tmp_path / "saved", **SMALL) as llm:
        assert tokens(llm) == expected[0]
        llm.save(tmp_path / "third")
    names = [sorted(p.name for p in (tmp_path / x).iterdir()) for x in ("saved", "third")]
    assert names[0] == names[1]


def test_overrides_are_saved_with_the_config(folder, tmp_path):
    overrides = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    with LLM(folder, hf_overrides=overrides, **SMALL) as llm:
        llm.save(tmp_path / "saved")
        wanted = tokens(llm)

    with LLM(tmp_path / "saved", **SMALL) as llm:
        assert llm._plan.config.rope.theta == 500.0
        assert tokens(llm) == wanted


def test_tokenizer_and_generation_config_go_with_it(tmp_path):
    with LLM("demo", max_model_len=64, kv_cache_memory_bytes=1 << 22) as llm:
        llm.save(tmp_path / "saved")
        wanted = llm.generate("def main", GREEDY, use_tqdm=False)[0].outputs[0].text
        defaults = llm.get_default_sampling_params()
        files = {p.name for p in llm._plan.folder.iterdir()}

    assert files - {p.name for p in (tmp_path / "saved").iterdir()} <= {
        "model.safetensors",
        "README.md",
    }
    with LLM(tmp_path / "saved", max_model_len=64, kv_cache_memory_bytes=1 << 22) as llm:
        assert llm.generate("def main", GREEDY, use_tqdm=False)[0].outputs[0].text == wanted
        assert repr(llm.get_default_sampling_params()) == repr(defaults)


def test_saves_where_an_event_loop_runs(folder, tmp_path):
    async def cell():
        with LLM(folder, **SMALL) as llm:
            llm.save(tmp_path / "saved")
        LLM(tmp_path / "saved", **SMALL).close()

    asyncio.run(cell())


def test_manifest_states_what_is_there(saved, expected):
    about = json.loads((saved["eight"] / "jaxllm.json").read_text())

    assert about["format_version"] == 1
    assert about["jaxllm_version"] == jaxllm.__version__
    assert (about["architecture"], about["dtype"]) == ("LlamaForCausalLM", "float32")
    assert about["config_hash"] == manifest.hash_of(about["config"])
    assert about["config"]["num_kv_heads"] == 2
    shapes = {path: list(value.shape) for path, value in expected[1].items()}
    assert {path: e["shape"] for path, e in about["parameters"].items()} == shapes


def test_orbax_is_imported_only_when_it_is_needed():
    script = "import sys, jaxllm.cli; print('orbax.checkpoint' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------- checksums


def checksum_of(value, spec=None):
    """The checksum on a mesh of 2 x 4 devices."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), devices=jax.devices()[:8])
    return checkpoint.checksum(jax.device_put(value, NamedSharding(mesh, spec or P())))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_changed_or_exchanged_value_changes_the_checksum(dtype):
    value = np.random.default_rng(0).normal(size=(6, 7)).astype(jax.numpy.dtype(dtype))
    sums = {checksum_of(value)}
    for i in range(6):
        for j in range(7):
            other = value.copy()
            other[i, j] += 1
            sums.add(checksum_of(other))
    other = value.copy()
    other[0, 0], other[5, 6] = value[5, 6], value[0, 0]
    sums.add(checksum_of(other))

    assert len(sums) == 44


@pytest.mark.parametrize("at_once", [1 << 20, 32])
@pytest.mark.parametrize(
    ("shape", "specs"),
    [
        ((24,), [P("a"), P(("b", "a"))]),
        ((7, 16), [P(None, "a"), P(None, ("a", "b"))]),  # rows that come out uneven
        ((8, 16), [P("a"), P(None, "b"), P("b", "a"), P(("a", "b"))]),
        ((8, 3, 4, 8), [P("a"), P("b", None, None, "a"), P(None, None, ("b",)), P(("b", "a"))]),
    ],
)
def test_checksum_is_that_of_the_values_wherever_they_lie(monkeypatch, shape, specs, at_once):
    monkeypatch.setattr(checkpoint, "SUMMED_AT_ONCE", at_once)
    checkpoint._sums.cache_clear()
    value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    places = np.arange(value.size, dtype=np.uint64)
    factors = ((places * 2654435761 << np.uint64(1)) | np.uint64(1)) % 2**32
    want = int(np.sum(value.view(np.uint32).ravel().astype(np.uint64) * factors % 2**32) % 2**32)

    assert {checksum_of(value, spec) for spec in (P(), *specs)} == {want}


# ---------------------------------------------------------------- what is refused


def test_folder_with_files_is_not_saved_into(folder, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    with LLM(folder, **SMALL) as llm:
        with pytest.raises(CheckpointError, match=r"own' is not empty, and a save"):
            llm.save(tmp_path / "own")
        with pytest.raises(CheckpointError, match=r"notes.txt' is a file"):
            llm.save(tmp_path / "own" / "notes.txt")
        assert [p.name for p in tmp_path.iterdir()] == ["own"]
        (tmp_path / "own" / "notes.txt").unlink()
        llm.save(tmp_path / "own")  # which is empty now

    LLM(tmp_path / "own", **SMALL).close()


def test_place_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with LLM(folder, **SMALL) as llm:
        with pytest.raises(CheckpointError, match=r"file/saved' cannot be written: .*Give a fol"):
            llm.save(tmp_path / "file" / "saved")
        llm.save(tmp_path / "saved")

    assert {path.name for path in tmp_path.iterdir()} == {"file", "saved"}


def test_missing_manifest_is_a_save_that_was_cut_off(damaged):
    (damaged / "jaxllm.json").unlink()

    with pytest.raises(CheckpointError, match=r"has params/ and no jaxllm.json: its save was cut"):
        LLM(damaged, **SMALL)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format_version": 1}', '{"format_version": "one"}', '{"a": 1}']
)
def test_manifest_that_makes_no_sense_is_named(damaged, text):
    (damaged / "jaxllm.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"jaxllm.json' is damaged \("):
        LLM(damaged, **SMALL)


def test_newer_format_asks_for_a_newer_jaxllm(damaged):
    change(damaged, "jaxllm.json", format_version=2, jaxllm_version="9.0", new_field=1)

    with pytest.raises(CheckpointError, match=r"format 2, saved by jaxllm 9.0, .* Upgrade jaxllm"):
        LLM(damaged, **SMALL)


@pytest.mark.parametrize("dtype", ["bfloat16", "half"])
def test_other_dtype_is_refused(saved, dtype):
    words = rf"dtype='{dtype}' was asked for, and .* was saved in float32. Leave dtype out"

    with pytest.raises(ConfigError, match=words):
        LLM(saved["one"], dtype=dtype, **SMALL)


@pytest.mark.parametrize("dtype", ["float32", "float"])
def test_same_dtype_may_be_said(saved, dtype):
    LLM(saved["one"], dtype=dtype, **SMALL).close()


def test_other_config_names_each_difference(damaged):
    change(damaged, "config.json", rms_norm_eps=0.5, intermediate_size=96)

    words = (
        r"another model than its config.json.*: mlp_dim was 48 and is 96; norm_eps was .* is 0.5"
    )
    with pytest.raises(CheckpointError, match=words):
        LLM(damaged, **SMALL)


def test_other_architecture_is_named(damaged):
    change(damaged, "jaxllm.json", architecture="MistralForCausalLM")

    words = r"architecture was 'MistralForCausalLM' and is 'LlamaForCausalLM'"
    with pytest.raises(CheckpointError, match=words):
        LLM(damaged, **SMALL)


def test_other_hash_is_an_error_even_if_all_fields_agree(damaged):
    change(damaged, "jaxllm.json", config_hash="0" * 64)

    with pytest.raises(CheckpointError, match="the hash of the config was 0000"):
        LLM(damaged, **SMALL)


def test_other_parameters_are_named(damaged):
    parameters = json.loads((damaged / "jaxllm.json").read_text())["parameters"]
    parameters["embed.extra"] = parameters.pop("embed.weight")
    change(damaged, "jaxllm.json", parameters=parameters)

    words = (
        r"with other parameters: embed.extra was float32\[101, 32\] and is not there; "
        r"embed.weight was not there and is float32\[101, 32\]"
    )
    with pytest.raises(CheckpointError, match=words):
        LLM(damaged, **SMALL)


def arrays_of(folder):
    """The file with the values, which is the largest."""
    files = [p for p in (folder / "params").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_flipped_bit_is_found(damaged):
    file = arrays_of(damaged)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)

    with pytest.raises(CheckpointError, match="' is damaged: its values are not those that were"):
        LLM(damaged, **SMALL)


@pytest.mark.parametrize("spoil", ["cut", "gone"])
def test_file_that_is_cut_off_or_gone_is_an_error(damaged, spoil):
    file = arrays_of(damaged)
    if spoil == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    with pytest.raises(CheckpointError, match=r"The arrays in '.*params' cannot be read: \w"):
        LLM(damaged, **SMALL)


# ---------------------------------------------------------------- cut off


@pytest.mark.parametrize("where", ["arrays", "manifest", "rename"])
def test_save_that_is_cut_off_leaves_nothing(folder, tmp_path, monkeypatch, where):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    owner, name = {
        "arrays": (checkpoint, "checksum"),
        "manifest": (manifest.Manifest, "to_json"),
        "rename": (type(tmp_path), "replace"),
    }[where]
    with LLM(folder, **SMALL) as llm:
        monkeypatch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.save(tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []
        monkeypatch.undo()
        llm.save(tmp_path / "saved")

    LLM(tmp_path / "saved", **SMALL).close()


def test_killed_save_has_no_name_and_no_manifest_and_does_not_hinder(folder, tmp_path):
    left = tmp_path / ".saved.incomplete"
    (left / "params").mkdir(parents=True)
    (left / "params" / "half").write_text("a file")
    shutil.copy(folder / "config.json", left)
    with pytest.raises(CheckpointError, match="its save was cut off"):
        LLM(left, **SMALL)

    with LLM(folder, **SMALL) as llm:
        llm.save(tmp_path / "saved")

    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_head_that_the_config_calls_tied_is_saved_as_it_is(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("llama", **EIGHT_HEADS), tmp_path / "original")
    change(folder, "config.json", tie_word_embeddings=True)
    with LLM(folder, **SMALL) as llm:
        assert not llm._plan.config.tie_embeddings
        llm.save(tmp_path / "saved")
        values = bare(llm)

    with LLM(tmp_path / "saved", **SMALL) as llm:
        np.testing.assert_array_equal(bare(llm)["head.weight"], values["head.weight"])
