"""LLM inference in JAX: vLLM's offline API, in your own process."""

import os

# transformers reads configs and tokenizers here; that it finds no PyTorch is no news.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from jaxllm import distributed
from jaxllm.errors import (
    CheckpointError,
    ConfigError,
    DistributedError,
    FamilyImportError,
    JaxLLMError,
    NativeBuildError,
    NonFiniteError,
    RecompileError,
    RequestError,
    UnsupportedModelError,
)
from jaxllm.hardware import Hardware
from jaxllm.inspection import Inspection, inspect
from jaxllm.llm import LLM
from jaxllm.logs import set_verbosity
from jaxllm.outputs import (
    CompletionOutput,
    CompletionScore,
    FlatLogprobs,
    Logprob,
    RequestOutput,
)
from jaxllm.plan import LayoutPlan, plan
from jaxllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
)
from jaxllm.sharding.layouts import Layout
from jaxllm.support import Support, supports
from jaxllm.sweep import Sweep, SweepRow, sweep

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "CompletionScore",
    "ConfigError",
    "DistributedError",
    "FamilyImportError",
    "FlatLogprobs",
    "Hardware",
    "Inspection",
    "JaxLLMError",
    "Layout",
    "LayoutPlan",
    "Logprob",
    "NativeBuildError",
    "NonFiniteError",
    "RecompileError",
    "RepetitionDetectionParams",
    "RequestError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Support",
    "Sweep",
    "SweepRow",
    "UnsupportedModelError",
    "__version__",
    "distributed",
    "inspect",
    "plan",
    "set_verbosity",
    "supports",
    "sweep",
]
