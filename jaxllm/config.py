"""How an engine runs: everything that is not the model itself. No JAX here."""

from dataclasses import dataclass

from jaxllm.errors import ConfigError

DECODE_STEPS = (32, 8)
"""How many decode steps one launch may have, beside a single one."""

LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
"""Of the model's own distribution, or of the one that was sampled from; or their logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How one engine runs.

    Values that the engine works out for itself, such as the number of pages
    that fit, are not fields here; `cache.memory.plan_memory` returns them.
    """

    max_model_len: int
    """Most tokens of one sequence, prompt and output together."""

    max_num_seqs: int = 64
    """Most sequences in one step."""

    max_num_batched_tokens: int = 2048
    """Most tokens, prefill and decode together, in one step."""

    page_size: int = 16
    """Tokens in one page of the KV cache; a power of two."""

    dtype: str = "float32"
    """Element type of parameters, activations and cache."""

    enable_prefix_caching: bool = True
    """Whether full pages are kept and found again by later prompts."""

    enable_chunked_prefill: bool = True
    """Whether a prompt may be computed over several steps."""

    max_logprobs: int = 20
    """Most alternatives a request may ask for at each position."""

    logprobs_mode: str = "raw_logprobs"
    """One of `LOGPROBS_MODES`: what is returned as the log-probability of a sampled token."""

    min_rows: int = 2
    """Rows of the smallest decode program. With one, XLA makes products as large as the weights,
    save on CPU in float32 and outside of loops, where it reads them twice as fast."""

    min_width: int = 8
    """Pages of the narrowest page table, where a sequence may have so many."""

    max_decode_steps: int = 1
    """Most tokens that a row may generate in one launch (N); a launch has 1, or one of
    `DECODE_STEPS` up to this."""

    async_scheduling: bool = True
    """Whether a step is planned and launched while the one before it is computed."""

    block_q: int = 64
    """Tokens in a query block of a prefill chunk."""

    def __post_init__(self) -> None:
        """Checks what the fields alone can say."""
        counts = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
        for name in (*counts, "block_q", "min_rows", "min_width", "max_decode_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise ConfigError(
                f"logprobs_mode={self.logprobs_mode!r} is not one of {list(LOGPROBS_MODES)}."
            )
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ConfigError(
                f"block_size={self.page_size} is not a power of two. Use 16, or 8, 32, 64."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be greater than or "
                f"equal to max_num_seqs ({self.max_num_seqs}). Raise the first or lower the second."
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is smaller than "
                f"max_model_len ({self.max_model_len}) and chunked prefill is off. "
                "Raise the first, or set enable_chunked_prefill=True."
            )

    @property
    def pages_per_seq(self) -> int:
        """Pages that a sequence of `max_model_len` tokens fills."""
        return -(-self.max_model_len // self.page_size)
