"""LLM inference in JAX: vLLM's offline API, in your own process."""

__version__ = "0.1.0"
