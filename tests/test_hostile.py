"""Checkpoints that mean harm: refused with a sentence, or harmless; nothing of theirs runs."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm import LLM, CheckpointError, ConfigError, RequestError, SamplingParams
from jaxllm import chat as chat_module
from jaxllm.demo.tokenizer import train_tokenizer
from jaxllm.errors import JaxLLMError, UnsupportedModelError
from tests.arrays import no_new_arrays
from tests.tiny import tiny_checkpoint

SMALL = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 1 << 20,
    "use_tqdm_on_load": False,
}
GREEDY = SamplingParams(temperature=0, max_tokens=2)
CODE = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with a tokenizer, in which all is well."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=300)
    train_tokenizer(["ab abc"], vocab_size=258, max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy, to spoil."""
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def trap(tmp_path):
    """A file that is there afterwards if anything of the checkpoint was run."""
    path = tmp_path / "was_run"
    yield path
    assert not path.exists(), "code of the checkpoint was run"


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def load(folder, **options):
    """Loads, answers once, and closes; both tokenizer and weights are used."""
    with LLM(folder, **{**SMALL, **options}) as llm:
        return llm.generate("ab", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def refusal(folder, **options):
    """The sentence of a load that must fail; nothing is left on the devices."""
    with no_new_arrays(), pytest.raises(JaxLLMError) as caught:
        load(folder, **options)
    return str(caught.value)


# ---------------------------------------------------------------- code


class Bomb:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bomb_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "was_run")))

    assert (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-1-of-2.bin"])
def test_pickled_weights_are_refused_unopened(folder, trap, name):
    (folder / name).write_bytes(pickle.dumps(Bomb(trap)))
    (folder / "model.safetensors").unlink()

    for load_format in ("auto", "safetensors"):
        message = refusal(folder, load_format=load_format)

        assert f"['{name}'], which are pickles: opening one can run any code" in message


def test_pickle_beside_safetensors_is_not_opened(folder, whole, trap):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(trap)))

    assert load(folder) == load(whole)


def test_pickle_named_safetensors_is_refused(folder, trap):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(trap)))

    assert "is no safetensors file, or is cut off" in refusal(folder)


@pytest.mark.parametrize("trust", [False, True])
def test_config_of_its_own_code_is_refused_even_where_trusted(folder, trap, trust):
    (folder / "configuration_own.py").write_text(CODE.format(str(trap)))
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    change(folder / "config.json", model_type="own", auto_map=auto_map)

    message = refusal(folder, trust_remote_code=trust)

    assert "auto_map names code of the repository, which jaxllm never runs" in message


@pytest.mark.filterwarnings("ignore:config.json has keys that LlamaConfig does not declare")
def test_known_model_with_code_beside_it_is_run_by_our_own(folder, whole, trap):
    (folder / "modeling_own.py").write_text(CODE.format(str(trap)))
    names = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    change(folder / "config.json", auto_map=names)

    assert load(folder, trust_remote_code=True) == load(whole)


@pytest.mark.parametrize("trust", [False, True])
def test_tokenizer_of_its_own_code_is_never_run(folder, trap, trust):
    (folder / "tokenization_own.py").write_text(CODE.format(str(trap)))
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    )

    message = refusal(folder, trust_remote_code=trust)

    assert "has no tokenizer that transformers can read" in message
    assert "skip_tokenizer_init=True" in message


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "sub/../../x"])
def test_weight_index_that_leaves_its_folder_is_refused(folder, tmp_path, file):
    shutil.copy(folder / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    assert "points outside its folder" in refusal(folder)


def test_weights_that_are_links_are_followed_as_in_the_hubs_cache(folder, whole, tmp_path):
    blob = (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(blob)

    assert load(folder) == load(whole)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_to_nowhere_are_refused(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("/no/such/file")

    message = refusal(folder)

    assert "Cannot find any model weights" in message or "has no config.json" in message


# ---------------------------------------------------------------- sizes


def raw(header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(shape, offsets):
    return {"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        raw(b"{}", length=2**63),
        raw(b"{}", length=2**64 - 1),
        raw(entry([2**40, 2**40], [0, 2**82])),
        raw(entry([2**62], [0, 2**64])),
        raw(entry([10**30], [0, 4])),
        raw(entry([1], [-(2**63), 4 - 2**63])),
        raw(b"[" * 100_000),
        raw(b'{"a":' * 100_000),
    ],
)
def test_absurd_header_of_a_weight_file_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)

    message = refusal(folder)

    assert "model.safetensors" in message
    assert "Download" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_nested_json_without_an_end_is_refused(folder, name):
    (folder / name).write_text('{"a":' * 100_000)

    message = refusal(folder)

    assert name in message
    assert "Download the file again" in message


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 10**12},
        {"vocab_size": 2**31 - 1},
        {"vocab_size": 0},
        {"vocab_size": -300},
        {"hidden_size": 10**12},
        {"hidden_size": 2**31 - 4},
        {"intermediate_size": 10**12},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**12},
        {"num_key_value_heads": 10**12},
        {"head_dim": 10**12},
        {"head_dim": -8},
        {"max_position_embeddings": 10**12},
        {"max_position_embeddings": 0},
        {"vocab_size": 10**400},
        {"vocab_size": "many"},
        {"vocab_size": 1e300},
    ],
)
def test_absurd_size_in_the_config_is_refused_before_anything_is_allocated(
    folder, fields, load_format
):
    change(folder / "config.json", **fields)

    message = refusal(folder, load_format=load_format, skip_tokenizer_init=True)

    assert len(message) < 3000


# ---------------------------------------------------------------- chat templates

TEMPLATES = {
    "endless": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "wide range": "{% for i in range(10**12) %}{% endfor %}",
    "huge text": "{{ 'a' * 10**12 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "open": "{{ open('/etc/passwd').read() }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "init": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "attribute": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_that_means_harm_ends_in_a_sentence(folder, monkeypatch, name):
    monkeypatch.setattr(chat_module, "MAX_SECONDS", 0.3)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])

    with LLM(folder, **SMALL) as llm:
        with pytest.raises(RequestError) as caught:
            llm.chat([{"role": "user", "content": "hello"}], GREEDY, use_tqdm=False)

        assert "root:" not in str(caught.value)
        assert llm.generate("ab", GREEDY, use_tqdm=False)[0].finished


def test_tensors_that_no_float_could_be_are_refused(folder):
    header = {
        "model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
        "__metadata__": {"format": "pt", "a": "b" * 10_000},
    }
    (folder / "model.safetensors").write_bytes(raw(header) + bytes(32))

    assert "does not fit its config.json" in refusal(folder)


def test_weights_for_two_models_at_once_are_refused(folder):
    save_file({"model.norm.weight": np.ones(8, np.float32)}, folder / "extra.safetensors")
    (folder / "model.safetensors").rename(folder / "first.safetensors")

    assert "is both in extra.safetensors and in first.safetensors" in refusal(folder)


def test_refusals_are_of_the_classes_that_callers_catch(folder):
    kinds = (CheckpointError, ConfigError, RequestError, UnsupportedModelError)

    assert all(issubclass(kind, ValueError) for kind in kinds)
