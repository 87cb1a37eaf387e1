"""LLM inference in JAX: vLLM's offline API, in your own process."""

import os

# transformers reads configs and tokenizers here; that it finds no PyTorch is no news.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from jaxllm.errors import (
    CheckpointError,
    ConfigError,
    JaxLLMError,
    NonFiniteError,
    RequestError,
    UnsupportedModelError,
)
from jaxllm.llm import LLM
from jaxllm.outputs import CompletionOutput, Logprob, RequestOutput
from jaxllm.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "JaxLLMError",
    "Logprob",
    "NonFiniteError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "UnsupportedModelError",
    "__version__",
]
