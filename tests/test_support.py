"""`supports`: the answer of a load, without the load."""

import json
import shutil

import pytest

import jaxllm
from jaxllm import LLM, JaxLLMError, Support, supports
from jaxllm.modeling import families, registry


@pytest.fixture
def config(tmp_path, checkpoints):
    """Makes a folder that has a changed config.json and no weights."""

    def make(*removed, **fields):
        folder = tmp_path / "model"
        folder.mkdir()
        shutil.copy(checkpoints() / "config.json", folder)
        stated = {**json.loads((folder / "config.json").read_text()), **fields}
        stated = {k: v for k, v in stated.items() if k not in removed}
        (folder / "config.json").write_text(json.dumps(stated))
        return folder

    return make


def test_model_that_can_be_loaded_is_supported_and_weights_are_not_asked_for(config):
    found = supports(config())

    assert found
    assert found == Support(True, "LlamaForCausalLM, by family llama")


def test_demo_is_supported():
    assert supports("demo")


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["T5"]},
        {"architectures": []},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
        {"quantization_config": {"quant_method": "awq"}},
        {"hidden_act": "softsign"},
        {"num_hidden_layers": 10**12},
        {"num_attention_heads": 0},
    ],
)
def test_reason_is_the_sentence_that_loading_ends_with(config, fields):
    folder = config(**fields)

    found = supports(folder)

    assert not found
    with pytest.raises(JaxLLMError) as caught:
        LLM(folder, skip_tokenizer_init=True)
    assert found.reason == str(caught.value)


def test_overrides_count(config):
    folder = config("architectures")

    assert not supports(folder)
    assert supports(folder, hf_overrides={"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("name", ["/no/such/folder", "org/absent", "org/my model"])
def test_model_that_is_not_there_is_not_supported_with_the_reason(name):
    assert name in supports(name).reason


def test_family_that_cannot_be_imported_is_told_apart_from_an_unknown_one(
    config, tmp_path, monkeypatch
):
    (tmp_path / "raises.py").write_text("import no_such_library")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setitem(registry.ARCHITECTURES, "LlamaForCausalLM", "raises")

    found = supports(config())

    assert not found
    assert "The model is supported, but its code failed to be inspected" in found.reason
    assert "No module named 'no_such_library'" in found.reason


@pytest.mark.parametrize("name", jaxllm.__all__)
def test_public_names_can_be_imported(name):
    assert hasattr(jaxllm, name)
