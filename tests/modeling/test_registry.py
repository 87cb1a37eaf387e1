import dataclasses
import json
import re
import shutil
import types

import pytest
from transformers import LlamaConfig

from jaxllm import LLM, SamplingParams
from jaxllm.cli import main
from jaxllm.errors import (
    CheckpointError,
    ConfigError,
    FamilyImportError,
    UnsupportedModelError,
)
from jaxllm.loading import Wishes, plan_load
from jaxllm.modeling import families, registry
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.families import llama
from jaxllm.modeling.registry import ARCHITECTURES, describe
from jaxllm.modeling.weights import Weight
from tests.tiny import CONFIGS, SIZES, sharder

FAMILIES = sorted(set(ARCHITECTURES.values()))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path, checkpoints):
    """A copy of a checkpoint, to spoil."""
    return shutil.copytree(checkpoints(), tmp_path / "model")


def change(folder, *removed, **fields):
    """Edits config.json, and returns the folder."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in removed}))
    return folder


def read(folder):
    hf = registry.read_hf_config(folder)
    _, family = registry.family_of(hf)
    return registry.model_config(hf, family)


# ---------------------------------------------------------------- config.json


def test_folder_without_a_config_is_no_model(tmp_path):
    message = "Invalid repository ID or local directory specified: .* has no config.json"
    with pytest.raises(CheckpointError, match=message):
        registry.read_hf_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": }', b"\xff\xfe\x00", b"<html>"])
def test_config_that_is_not_json_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"config\.json' is not valid JSON.*Download"):
        read(folder)


@pytest.mark.parametrize("content", ["[]", "null", '"llama"'])
def test_config_that_is_no_object_is_refused(folder, content):
    (folder / "config.json").write_text(content)

    with pytest.raises(CheckpointError, match=r"config\.json' is not a JSON object"):
        read(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "multiple of the number of attention heads"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "high_freq_factor"),
    ],
)
def test_config_with_senseless_values_is_refused_with_the_reason(folder, fields, said):
    with pytest.raises(
        UnsupportedModelError, match=rf"(?s)config.json of .*cannot be read.*{said}"
    ):
        read(change(folder, **fields))


def test_config_without_architectures_lists_those_that_can_be_named(folder):
    message = "no top-level 'architectures'.*hf_overrides=.*one of .*'LlamaForCausalLM'"
    with pytest.raises(UnsupportedModelError, match=message):
        read(change(folder, "architectures"))
    with pytest.raises(UnsupportedModelError, match=message):
        read(change(folder, architectures=[]))


def test_unknown_architecture_names_the_nearest_and_all(folder):
    change(folder, architectures=["LlamaForCausalLm"])

    with pytest.raises(UnsupportedModelError) as caught:
        read(folder)

    message = str(caught.value)
    assert "['LlamaForCausalLm'] are not supported for now" in message
    assert "did you mean 'LlamaForCausalLM'?" in message
    assert all(repr(name) in message for name in ARCHITECTURES)


def test_unknown_architecture_far_from_all_names_no_nearest(folder):
    change(folder, architectures=["T5"])

    with pytest.raises(UnsupportedModelError, match=r"\['T5'\] are not supported for now\."):
        read(folder)


def test_first_known_architecture_is_taken(folder):
    hf = registry.read_hf_config(change(folder, architectures=["T5", "LlamaForCausalLM"]))

    assert registry.family_of(hf) == ("LlamaForCausalLM", llama)


@pytest.mark.parametrize("model_type", ["lama", ""])
def test_unknown_model_type_is_refused(folder, model_type):
    with pytest.raises(UnsupportedModelError, match=r"config\.json of .* cannot be read"):
        read(change(folder, model_type=model_type))


def test_config_that_needs_code_is_refused_and_no_code_is_run(folder):
    (folder / "configuration_own.py").write_text("raise SystemExit('this was run')")
    change(folder, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})

    with pytest.raises(
        UnsupportedModelError, match=r"auto_map names code.*which jaxllm never runs"
    ):
        read(folder)


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "compressed-tensors"])
def test_quantized_checkpoint_is_refused_by_its_method(folder, method):
    change(folder, quantization_config={"quant_method": method, "bits": 4})

    with pytest.raises(UnsupportedModelError, match=f"quant_method='{method}'.*unquantized"):
        read(folder)


def test_quantization_config_that_is_no_object_is_refused(folder):
    with pytest.raises(UnsupportedModelError, match="is quantized"):
        read(change(folder, quantization_config="awq"))


def test_null_quantization_config_means_unquantized(folder):
    expected = read(folder)

    assert read(change(folder, quantization_config=None)) == expected


# ---------------------------------------------------------------- fields


def test_declared_field_that_no_one_handles_is_refused_unless_at_its_default():
    narrow = types.SimpleNamespace(
        HANDLED_FIELDS=llama.HANDLED_FIELDS - {"attention_bias", "mlp_bias"},
        config_from_hf=llama.config_from_hf,
    )
    sizes = {**SIZES, "architectures": ["LlamaForCausalLM"]}

    assert registry.model_config(LlamaConfig(**sizes, attention_bias=False), narrow)
    message = (
        r"sets attention_bias=True \(default False\), mlp_bias=True \(default False\), which "
        "jaxllm's LlamaConfig does not implement; ignoring it would give wrong text"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        registry.model_config(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True), narrow)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_declared_field_is_handled_neutral_or_refused(name):
    config_class, fixed = CONFIGS[name]
    module = registry.family(name)
    known = module.HANDLED_FIELDS | registry.NEUTRAL_FIELDS
    hf = config_class(**{**SIZES, **fixed})

    for field in set(config_class().to_dict()) - known:
        changed = config_class(**{**SIZES, **fixed})
        vars(changed)[field] = "changed"  # whatever type the class would insist on

        with pytest.raises(UnsupportedModelError, match=f"{field}='changed'"):
            registry.model_config(changed, module)

    assert registry.model_config(hf, module)


def test_unknown_activation_is_refused_before_anything_is_loaded(folder):
    with pytest.raises(UnsupportedModelError, match=r"hidden_act='softsign'.*'silu'"):
        plan_load(change(folder, hidden_act="softsign"), Wishes(), sharder(), "auto")


def test_undeclared_keys_give_one_warning_that_lists_them(folder):
    expected = read(folder)
    change(folder, zeta_scale=2.0, alpha_scale=3.0)

    with pytest.warns(UserWarning, match="does not declare") as caught:
        config = read(folder)

    assert [str(w.message) for w in caught] == [
        "config.json has keys that LlamaConfig does not declare; they are ignored: "
        "['alpha_scale', 'zeta_scale']"
    ]
    assert config == expected


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_both_spellings_of_a_config_are_one_model(folder, scaling):
    change(folder, "dtype", "rope_parameters")
    change(folder, torch_dtype="bfloat16", rope_theta=5e5, rope_scaling=scaling)
    old = read(folder)
    change(folder, "torch_dtype", "rope_theta", "rope_scaling")
    rope = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    change(folder, dtype="bfloat16", rope_parameters=rope)

    new = read(folder)

    assert old == new
    assert new.rope.theta == 5e5
    assert new.rope.kind == (scaling or {"rope_type": "default"})["rope_type"]


def test_old_key_type_names_the_rope_too(folder):
    change(folder, "rope_parameters")
    change(folder, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0})

    rope = read(folder).rope

    assert (rope.kind, rope.factor) == ("linear", 4.0)


# ---------------------------------------------------------------- overrides

OPTIONS = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 18, "max_num_seqs": 2}


@pytest.mark.parametrize("architectures", [None, [], ["CerebrasGPTModel"]])
def test_override_names_the_architecture_that_a_checkpoint_does_not(
    tmp_path, checkpoints, architectures
):
    folder = shutil.copytree(checkpoints("gpt2"), tmp_path / "model")
    change(folder, architectures=architectures)
    params = SamplingParams(temperature=0, max_tokens=4)

    with pytest.raises(UnsupportedModelError, match="hf_overrides"):
        LLM(folder, **OPTIONS)
    with LLM(folder, **OPTIONS, hf_overrides={"architectures": ["GPT2LMHeadModel"]}) as llm:
        assert "GPT2LMHeadModel" in repr(llm)
        found = llm.generate([[1, 2]], params, use_tqdm=False)
    with LLM(checkpoints("gpt2"), **OPTIONS) as llm:
        expected = llm.generate([[1, 2]], params, use_tqdm=False)

    assert found[0].outputs[0].token_ids == expected[0].outputs[0].token_ids


def test_nested_override_changes_one_value_and_leaves_its_neighbours(folder):
    change(folder, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})

    with LLM(folder, **OPTIONS, hf_overrides={"rope_parameters": {"factor": 2.0}}) as llm:
        rope = llm._plan.config.rope

        assert llm.max_model_len == 256
        assert (rope.kind, rope.factor, rope.theta) == ("linear", 2.0, 5e5)


def test_function_over_the_config_is_an_override(folder):
    def shorten(config):
        config.max_position_embeddings = 64
        return config

    with LLM(folder, **OPTIONS, hf_overrides=shorten) as llm:
        assert llm.max_model_len == 64


def test_overrides_may_name_the_model_type_of_an_unknown_one(folder):
    change(folder, model_type="lama")

    with LLM(folder, **OPTIONS, hf_overrides={"model_type": "llama"}) as llm:
        assert llm.max_model_len == 128


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("gpt2", "hf_overrides must be a dict of values or a function; got 'gpt2'"),
        (lambda config: None, "hf_overrides returned NoneType, and must return the config"),
        (lambda config: {}, "hf_overrides returned dict"),
    ],
)
def test_overrides_that_are_none_are_refused(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        LLM(folder, **OPTIONS, hf_overrides=overrides)


# ---------------------------------------------------------------- families


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Llama's family is a module that cannot be imported."""
    (tmp_path / "broken.py").write_text("import no_such_library")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setitem(ARCHITECTURES, "LlamaForCausalLM", "broken")


def test_family_that_fails_to_import_breaks_its_own_models_with_the_cause(broken, checkpoints):
    message = (
        "The model is supported, but its code failed to be inspected: importing "
        r"jaxllm\.modeling\.families\.broken raised ModuleNotFoundError: .*'no_such_library'"
    )
    with pytest.raises(FamilyImportError, match=message) as caught:
        LLM(checkpoints(), **OPTIONS)

    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with LLM(checkpoints("qwen2"), **OPTIONS) as llm:
        assert "Qwen2ForCausalLM" in repr(llm)


def test_list_of_models_has_a_line_for_each_and_the_reason_of_a_broken_one(broken, capsys):
    assert main(["models"]) == 0

    lines = {
        line.split()[0]: line.split(maxsplit=2) for line in capsys.readouterr().out.split("\n")[:-1]
    }
    assert list(lines) == sorted(ARCHITECTURES)
    assert lines["Qwen2ForCausalLM"][1:] == ["qwen2", describe("qwen2")]
    assert describe("qwen2").startswith("Qwen2: ")
    name, reason = lines["LlamaForCausalLM"][1:]
    assert name == "broken"
    assert "No module named 'no_such_library'" in reason


@pytest.mark.parametrize("name", FAMILIES)
def test_family_describes_itself_in_a_line(name):
    assert 10 < len(describe(name)) < 100
    assert describe(name).endswith(".")


def test_every_family_has_a_tiny_config():
    assert set(FAMILIES) <= set(CONFIGS)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_module_has_the_five_names(name):
    module = registry.family(name)

    assert callable(module.build)
    assert callable(module.config_from_hf)
    assert module.WEIGHTS
    assert all(isinstance(line, Weight) for line in module.WEIGHTS)
    assert isinstance(module.HANDLED_FIELDS, frozenset)
    assert all(isinstance(pattern, str) for pattern in module.IGNORED_WEIGHTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_handled_fields_are_declared_by_the_config_class(name):
    config_class, _ = CONFIGS[name]

    declared = config_class().to_dict()
    assert [f for f in registry.family(name).HANDLED_FIELDS if f not in declared] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_table_names_each_parameter_and_tensor_once(name):
    table = registry.family(name).WEIGHTS
    paths = [line.path for line in table]
    tensors = [tensor for line in table for tensor in line.names]

    assert len(set(paths)) == len(paths)
    assert len(set(tensors)) == len(tensors)
    assert all(("{i}" in line.path) == all("{i}" in n for n in line.names) for line in table)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_line_of_the_weight_table_fills_a_parameter_of_some_config(name):
    config_class, fixed = CONFIGS[name]
    module = registry.family(name)
    plain = module.config_from_hf(config_class(**{**SIZES, **fixed}))
    switches = [f.name for f in dataclasses.fields(plain) if f.type is bool]
    found = set()

    for value in (False, True):
        config = dataclasses.replace(plain, **dict.fromkeys(switches, value))
        model = abstract_model(config, module.build, "float32", sharder())
        found |= {re.sub(r"\.\d+\.", ".{i}.", leaf.path) for leaf in model.leaves}

    assert {line.path for line in module.WEIGHTS} <= found


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_plans_a_load_of_its_tiny_checkpoint(architecture, checkpoints):
    family = ARCHITECTURES[architecture]

    plan = plan_load(checkpoints(family), Wishes(), sharder(), "auto")

    assert plan.family is registry.family(family)
    assert len(plan.sources) == len(plan.model.leaves)
