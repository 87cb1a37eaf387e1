"""The worked example of CONTRIBUTING.md, followed to the letter: it loads and it is right."""

import re
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("torch")

from transformers import StableLmConfig, StableLmForCausalLM

from jaxllm import LLM, UnsupportedModelError
from jaxllm.modeling import registry
from tests.parity import Variant, assert_same, references, write

pytestmark = pytest.mark.torch

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"
NAME = "jaxllm.modeling.families.stablelm"

VARIANTS = {
    "plain": {},
    "biases-half-rotated-tied": {
        "use_qkv_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "every-head-its-own": {"num_key_value_heads": 4, "vocab_size": 97},
}


@pytest.fixture(autouse=True)
def followed(monkeypatch):
    """Adds the file and the line, as the page says."""
    text = PAGE.read_text()
    (code,) = re.findall(r"```python\n(\"\"\"StableLM.*?)```", text, re.DOTALL)
    line = re.search(r'`"(\w+)": "(\w+)",` in the registry', text)
    module = types.ModuleType(NAME)
    exec(compile(code, "stablelm.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setitem(registry.ARCHITECTURES, line[1], line[2])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_example_gives_what_transformers_gives(name, tmp_path):
    variant = Variant(name, StableLmForCausalLM, StableLmConfig, VARIANTS[name])
    model = write(variant, tmp_path)

    assert_same(tmp_path, references(model))


@pytest.mark.parametrize("option", ["use_parallel_residual", "qk_layernorm"])
def test_what_the_example_leaves_out_is_refused(option, tmp_path):
    write(Variant(option, StableLmForCausalLM, StableLmConfig, {option: True}), tmp_path)

    with pytest.raises(UnsupportedModelError, match=f"{option}=True"):
        LLM(tmp_path, skip_tokenizer_init=True)
