"""jaxllm imports without PyTorch, and whoever wants PyTorch has it."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

NOT_IMPORTED = """
import sys
from jaxllm import LLM, SamplingParams
with LLM("demo", max_num_seqs=1, max_num_batched_tokens=16, use_tqdm_on_load=False) as llm:
    llm.generate("def", SamplingParams(max_tokens=1), use_tqdm=False)
print("torch" in sys.modules)
"""

STILL_WORKS = """
import jaxllm
from transformers import LlamaConfig, LlamaForCausalLM, modeling_rope_utils
print(type(modeling_rope_utils.torch).__name__)
import torch
config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=2, rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                                                             "rope_theta": 1e4})
print(LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape)
print(modeling_rope_utils.torch.Tensor is torch.Tensor, torch.nn.Linear(2, 3).weight.shape)
"""

FIRST = """
import torch
import jaxllm
from transformers import modeling_rope_utils
print(modeling_rope_utils.torch is torch)
"""


def run(script):
    env = {"JAX_PLATFORMS": "cpu", "PATH": "", "JAXLLM_LOGGING_LEVEL": "WARNING"}
    env["JAXLLM_CACHE_ROOT"] = os.environ["JAXLLM_CACHE_ROOT"]
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_model_is_loaded_and_run_without_torch():
    assert run(NOT_IMPORTED) == ["False"]


@pytest.mark.slow
def test_models_of_transformers_work_beside_jaxllm():
    found = run(STILL_WORKS)

    assert found == ["_WhenUsed", "torch.Size([1, 3, 11])", "True torch.Size([3, 2])"]


@pytest.mark.slow
def test_torch_that_is_there_already_is_used():
    assert run(FIRST) == ["True"]
