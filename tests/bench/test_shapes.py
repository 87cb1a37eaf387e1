"""The built-in shapes are the models that they are named after."""

from pathlib import Path

import pytest

from jaxllm.bench.shapes import SHAPES, model_folder, write_config
from jaxllm.errors import ConfigError
from jaxllm.modeling import registry
from jaxllm.modeling.abstract import abstract_model
from tests.tiny import sharder

PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "opt-125m": 125_239_296,
    "qwen3-0.6b": 596_049_920,
    "llama-3.1-8b": 8_030_261_248,
}
"""As the hub counts them."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_the_published_model(name, tmp_path):
    write_config(name, tmp_path)

    hf = registry.read_hf_config(tmp_path)
    _, family = registry.family_of(hf)
    model = abstract_model(registry.model_config(hf, family), family.build, "bfloat16", sharder())
    assert sum(leaf.shape.size for leaf in model.leaves) == PARAMETERS[name]


def test_a_shape_is_a_folder_of_one_file_for_as_long_as_it_is_needed():
    with model_folder("opt-125m") as folder:
        kept = Path(folder)
        assert [path.name for path in kept.iterdir()] == ["config.json"]

    assert not kept.exists()


def test_other_names_are_passed_on():
    with model_folder("some/model") as name:
        assert name == "some/model"


def test_a_misspelt_shape_is_a_sentence():
    message = r"'smolm2-135m' is neither a folder nor one of the shapes .*mean 'smollm2-135m'"
    with pytest.raises(ConfigError, match=message), model_folder("smolm2-135m"):
        pass
