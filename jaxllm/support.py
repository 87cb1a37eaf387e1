"""`supports(model)`: whether a model can be loaded, told from its config.json alone."""

from dataclasses import dataclass
from pathlib import Path

from jaxllm.errors import JaxLLMError
from jaxllm.hub import config_folder
from jaxllm.modeling import registry


@dataclass(frozen=True, slots=True)
class Support:
    """The answer, which is true or false in an `if`, and why."""

    supported: bool
    reason: str
    """What would load it; or the sentence that loading would end with."""

    def __bool__(self) -> bool:
        """Whether the model can be loaded."""
        return self.supported


def supports(
    model: str | Path,
    *,
    hf_overrides: registry.Overrides | None = None,
    revision: str | None = None,
    hf_token: str | bool | None = None,
) -> Support:
    """Returns whether jaxllm can load a model, with the reason; reads no weights.

    Args:
        model: A hub id, a folder, or "demo".
        hf_overrides: As for `LLM`.
        revision: Branch, tag or commit of a hub id.
        hf_token: Of the hub; True for the stored login.

    Example:
        >>> supports("demo")
        Support(supported=True, reason='LlamaForCausalLM, by family llama')
    """
    try:
        folder = config_folder(model, revision, hf_token)
        hf = registry.read_hf_config(folder, hf_overrides)
        name, family = registry.family_of(hf)
        config = registry.model_config(hf, family)
    except JaxLLMError as error:
        return Support(False, str(error))
    return Support(True, f"{name}, by family {config.family}")
