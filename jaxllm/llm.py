"""`LLM`: the blocking public API, and the only place that knows vLLM's keywords."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from jaxllm import compile_cache
from jaxllm.devices import reserve_memory
from jaxllm.engine import Engine
from jaxllm.errors import ConfigError, JaxLLMError, RequestError
from jaxllm.hub import local_folder
from jaxllm.keywords import ExplainsKeywords
from jaxllm.loading import DEFAULTS, LoadFormat, Plan, Wishes, eos_token_ids, load_params, plan_load
from jaxllm.logs import configure
from jaxllm.outputs import CompletionOutput, Logprob, RequestOutput
from jaxllm.programs import ProgramBuilder
from jaxllm.prompts import Prompt, parse_prompts
from jaxllm.runner import ModelRunner
from jaxllm.sampling_params import SamplingParams, as_integer
from jaxllm.sequence import Request
from jaxllm.sequence import Sequence as TokenSequence
from jaxllm.sharding import layouts
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.mesh import make_mesh
from jaxllm.tokenizer import Detokenizer, load_tokenizer

logger = logging.getLogger("jaxllm")

Prompts = str | dict[str, Any] | Sequence[int] | Sequence[str | dict[str, Any] | Sequence[int]]
Progress = bool | Callable[..., Any]


class LLM(metaclass=ExplainsKeywords):
    """A language model, loaded and ready to generate; all in this process.

    Args:
        model: A hub id, a local folder, or "demo" for the small model that ships
            with jaxllm.
        tokenizer: Another hub id or folder for the tokenizer; the model's by default.
        skip_tokenizer_init: Load no tokenizer: prompts are token ids, texts are "".
        dtype: "auto", "float32", "bfloat16" or "float16" ("half"). "auto" is
            float32 on CPU, and on a GPU the checkpoint's 16-bit type that the card has.
        seed: Of the generator that draws the seed of each unseeded request.
        revision: Branch, tag or commit of a hub id.
        tokenizer_revision: The same for `tokenizer`.
        hf_token: Of the hub; True for the stored login.
        load_format: "auto", "safetensors", or "dummy" for random weights.
        max_model_len: Most tokens of a sequence. By default what the model was
            made for; "auto" or -1: the most that fits.
        max_num_seqs: Most sequences in one step; by default 64 on CPU, 256 on a GPU.
        max_num_batched_tokens: Most tokens in one step; by default 2048 on CPU,
            8192 on a GPU.
        gpu_memory_utilization: Share of each device's memory for weights, work
            and cache; 0.92 by default. On CPU it is a share of the machine's
            memory, and by default the cache takes 1 GiB: more where one sequence of
            `max_model_len` needs it, less where `max_num_seqs` of them do not.
        kv_cache_memory_bytes: Bytes of the cache on each device, instead.
        block_size: Tokens in a page of the cache; a power of two.
        enable_prefix_caching: Keep the pages of past prompts and find them again.
        enable_chunked_prefill: Compute long prompts over several steps.
        max_logprobs: Most alternatives that `SamplingParams.logprobs` may ask for.
        use_tqdm_on_load: Show a progress bar while weights are read.

    Raises:
        CheckpointError: `model` is no checkpoint, or is damaged.
        UnsupportedModelError: Its architecture is not implemented.
        ConfigError: An argument is wrong, or the model does not fit with it.
        TypeError: An unknown keyword, with the nearest known one.

    Example:
        >>> with LLM("demo") as llm:
        ...     print(llm.generate("def main():")[0].outputs[0].text)
    """

    def __init__(  # noqa: PLR0913
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        seed: int = 0,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        hf_token: str | bool | None = None,
        load_format: LoadFormat = "auto",
        max_model_len: int | str | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float | None = None,
        kv_cache_memory_bytes: int | None = None,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        max_logprobs: int = 20,
        use_tqdm_on_load: bool = True,
    ) -> None:
        configure()
        compile_cache.enable()
        start = time.perf_counter()
        self._engine: Engine | None = None
        self._random = _generator(seed)
        wishes = Wishes(
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=block_size,
            memory_fraction=gpu_memory_utilization,
            cache_bytes=kv_cache_memory_bytes,
            enable_prefix_caching=enable_prefix_caching,
            enable_chunked_prefill=enable_chunked_prefill,
            max_logprobs=max_logprobs,
        )
        # The backend keeps the first share it starts with, so it is checked before.
        reserve_memory(gpu_memory_utilization or DEFAULTS["gpu"]["memory_fraction"])
        folder = local_folder(model, revision, hf_token)
        layout = layouts.preset("replicated")
        sharder = Sharder(layout, make_mesh(layout))
        plan = plan_load(folder, wishes, sharder, load_format)
        self._tokenizer = (
            None
            if skip_tokenizer_init
            else load_tokenizer(
                folder
                if tokenizer is None
                else local_folder(tokenizer, tokenizer_revision, hf_token)
            )
        )
        self._plan = plan
        self._eos = eos_token_ids(plan, self._tokenizer)
        self._name = str(model)
        self._num_requests = 0
        params = load_params(plan, seed=int(seed or 0) & 0x7FFFFFFF, show_progress=use_tqdm_on_load)
        builder = ProgramBuilder(plan.model, plan.engine, sharder, plan.memory.num_pages)
        self._engine = Engine(ModelRunner(builder, params))
        logger.info("%s", _summary(self._name, plan, sharder, time.perf_counter() - start))

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = True,
    ) -> list[RequestOutput]:
        """Generates a completion of each prompt, and returns when all are done.

        Prompts of any number and length may be passed at once; the engine batches
        them as memory allows. An interrupt (Ctrl-C) ends the call and frees all it
        held; the engine stays usable.

        Args:
            prompts: Text, or token ids, which are used as they are; a dict with
                `prompt` or `prompt_token_ids`; or a list of these.
            sampling_params: One for all prompts, or one for each; by default
                `SamplingParams()`: temperature 1, 16 tokens.
            use_tqdm: Whether to show progress, or what to call in place of `tqdm`.

        Returns:
            One output a prompt, in the order of `prompts`.

        Raises:
            RequestError: A prompt or its parameters cannot be run. Nothing was.
        """
        engine = self._live_engine()
        requests = self._requests(parse_prompts(prompts), sampling_params)
        done: dict[str, Request] = {}
        if engine.in_call:
            engine.recover()  # the last call's own recovery was interrupted
        engine.in_call = frozenset(request.request_id for request in requests)
        try:
            for request in requests:
                engine.add_request(request)
            with _ProgressBar(requests, use_tqdm) as bar:
                while len(done) < len(requests):
                    for request in engine.step():
                        done[request.request_id] = request
                        bar.finish(request)
        except BaseException:
            # Wherever in a step it fell: give back what this call holds, then start clean.
            engine.recover()
            raise
        engine.in_call = frozenset()
        return [self._output(request) for request in requests]

    def _requests(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        """Checks and tokenizes everything, before anything is queued."""
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            params = [sampling_params] * len(prompts)
        else:
            params = _params_list(sampling_params)
        if len(prompts) != len(params):
            raise RequestError(
                f"The lengths of prompts ({len(prompts)}) and params ({len(params)}) "
                "must be the same. Pass one SamplingParams for all, or one for each."
            )
        pairs = zip(prompts, params, strict=True)
        return [self._request(prompt, params) for prompt, params in pairs]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        token_ids = prompt.token_ids
        if token_ids is None:
            if self._tokenizer is None:
                raise RequestError(
                    "The prompt is text and skip_tokenizer_init=True. Pass token ids, or load the "
                    "tokenizer."
                )
            token_ids = self._tokenizer.encode(prompt.text)
        self._check(token_ids, params)
        seed = params.seed
        if seed is None:
            seed = int(self._random.integers(2**64, dtype=np.uint64))
        request_id = str(self._num_requests)
        self._num_requests += 1
        seq = TokenSequence(
            request_id=request_id,
            index=0,
            prompt_token_ids=token_ids,
            params=params,
            seed=seed & (2**64 - 1),
            arrival=0,
            eos_token_id=getattr(self._tokenizer, "eos_token_id", None),
            eos_token_ids=self._eos,
            cache_salt=prompt.cache_salt,
        )
        return Request(request_id, prompt.text, token_ids, params, [seq])

    def _check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises RequestError where a request does not fit this model."""
        longest, vocab_size = self._plan.engine.max_model_len, self._plan.config.vocab_size
        if not token_ids:
            raise RequestError(
                "The decoder prompt cannot be empty: its text gives no tokens. Give it some."
            )
        if len(token_ids) >= longest:
            raise RequestError(
                f"This model's maximum context length is {longest} tokens. However, your prompt "
                f"contains {len(token_ids)} input tokens, and at least 1 is needed for the output. "
                "Shorten the prompt, or raise max_model_len if the model allows it."
            )
        strange = [t for t in token_ids if not 0 <= t < vocab_size]
        if strange:
            raise RequestError(
                f"Token id {strange[0]} is out of vocabulary: ids go from 0 to {vocab_size - 1}."
            )
        strange = [t for t in params.stop_token_ids if t >= vocab_size]
        if strange:
            raise RequestError(
                f"stop_token_ids contain out-of-vocab token ids {strange}. "
                f"Vocabulary size: {vocab_size}."
            )
        most = self._plan.engine.max_logprobs
        if params.logprobs is not None and params.logprobs > most:
            raise RequestError(
                f"Requested sample logprobs of {params.logprobs}, which is greater than max "
                f"allowed: {most}. Pass max_logprobs={params.logprobs} to LLM."
            )

    # ---------------------------------------------------------------- outputs

    def _output(self, request: Request) -> RequestOutput:
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[self._completion(seq) for seq in request.sequences],
            finished=True,
            num_cached_tokens=request.sequences[0].num_cached,
        )

    def _completion(self, seq: TokenSequence) -> CompletionOutput:
        output = CompletionOutput(
            index=seq.index,
            text=self._text(seq),
            token_ids=seq.output_token_ids,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            seed=seq.seed,
        )
        if seq.params.logprobs is not None:
            output.logprobs = [
                self._logprobs(token, *found)
                for token, found in zip(seq.output_token_ids, seq.logprobs, strict=True)
            ]
            output.cumulative_logprob = sum(found[0] for found in seq.logprobs)
        return output

    def _text(self, seq: TokenSequence) -> str:
        if self._tokenizer is None or not seq.params.detokenize:
            return ""
        tokens = seq.output_token_ids
        if seq.finish_reason == "stop":
            tokens = tokens[:-1]  # the stop token stays in the ids and not in the text
        detokenizer = Detokenizer(
            self._tokenizer,
            seq.prompt_token_ids,
            skip_special_tokens=seq.params.skip_special_tokens,
        )
        detokenizer.extend(tokens)
        detokenizer.finish()
        return detokenizer.text

    def _logprobs(
        self, token: int, chosen: float, rank: int, top_ids: list[int], top: list[float]
    ) -> dict[int, Logprob]:
        """The token itself first, then the likeliest in order; a token comes once."""
        found = {token: Logprob(chosen, rank, self._decoded(token))}
        for i, (other, value) in enumerate(zip(top_ids, top, strict=True), start=1):
            found.setdefault(other, Logprob(value, i, self._decoded(other)))
        return found

    def _decoded(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token])

    # ---------------------------------------------------------------- the rest

    def get_tokenizer(self) -> Any:
        """Returns the tokenizer; None with `skip_tokenizer_init`."""
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence."""
        return self._plan.engine.max_model_len

    def stats(self) -> dict[str, Any]:
        """Returns counts since the start: steps, tokens, padding, times, cache use."""
        engine = self._live_engine()
        scheduler, counted = engine.scheduler, engine.stats
        return {
            "num_steps": counted.num_steps,
            "num_tokens": counted.num_tokens,
            "num_padded_tokens": counted.num_padded_tokens,
            "host_seconds": counted.host_seconds,
            "step_seconds": counted.step_seconds,
            "compile_seconds": dict(counted.compile_seconds),
            "num_preemptions": scheduler.num_preemptions,
            "prefix_tokens_queried": scheduler.prefixes.num_queried,
            "prefix_tokens_hit": scheduler.prefixes.num_hit,
            "num_pages": scheduler.num_pages - 1,
            "num_pages_held": scheduler.pool.num_held,
        }

    def close(self) -> None:
        """Frees weights and cache. On a GPU JAX's allocator keeps the memory for itself."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.runner.close()

    def _live_engine(self) -> Engine:
        if self._engine is None:
            raise JaxLLMError(f"This LLM ({self._name}) is closed. Make a new one.")
        return self._engine

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # After a failed __init__ there may be no engine; at exit, no JAX to free with.
        if getattr(self, "_engine", None) is not None and not _is_exiting():
            self.close()

    def __repr__(self) -> str:
        state = "closed, " if self._engine is None else ""
        config = self._plan.config
        return (
            f"LLM({self._name!r}, {state}{self._plan.architecture}, {config.num_layers} layers, "
            f"{self._plan.engine.dtype}, max_model_len={self.max_model_len})"
        )


def _params_list(given: Any) -> list[SamplingParams]:
    """Returns the parameters of each prompt, or says what was given in their place."""
    strange = given
    if isinstance(given, Iterable) and not isinstance(given, (str, Mapping, type)):
        given = list(given)
        strange = next((p for p in given if not isinstance(p, SamplingParams)), None)
        if all(isinstance(p, SamplingParams) for p in given):
            return given
    what = "the class itself" if strange is SamplingParams else type(strange).__name__
    raise RequestError(
        f"sampling_params must be a SamplingParams, or a list with one for each prompt; got {what}."
    )


def _generator(seed: int | None) -> np.random.Generator:
    if seed is not None and (as_integer(seed) is None or seed < 0):
        raise ConfigError(f"seed={seed!r} must be an integer of at least 0.")
    return np.random.default_rng(seed)


def _is_exiting() -> bool:
    return not threading.main_thread().is_alive()


def _summary(name: str, plan: Plan, sharder: Sharder, seconds: float) -> str:
    device = sharder.mesh.devices.flat[0]
    engine = plan.engine
    return (
        f"{name}: {plan.architecture}, {plan.model.num_bytes / 2**30:.2f} GiB of {engine.dtype} on "
        f"{sharder.mesh.size} x {device.device_kind}; up to {engine.max_num_seqs} sequences and "
        f"{engine.max_num_batched_tokens} tokens a step; ready in {seconds:.1f} s\n"
        f"jaxllm: {plan.memory.summary()}"
    )


class _ProgressBar:
    """Requests done, with tokens in and out per second."""

    def __init__(self, requests: Iterable[Request], use_tqdm: Progress) -> None:
        requests = list(requests)
        make = use_tqdm if callable(use_tqdm) else tqdm
        self._bar = (
            make(
                total=sum(len(r.sequences) for r in requests),
                desc="Processed prompts",
                dynamic_ncols=True,
                postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
            )
            if use_tqdm and requests
            else None
        )
        self._start = time.perf_counter()
        self._num_in = self._num_out = 0

    def finish(self, request: Request) -> None:
        """Counts a finished request."""
        if self._bar is None:
            return
        count = len(request.sequences)
        self._num_in += count * len(request.prompt_token_ids)
        self._num_out += sum(len(seq.output_token_ids) for seq in request.sequences)
        seconds = time.perf_counter() - self._start
        self._bar.set_postfix_str(
            f"est. speed input: {self._num_in / seconds:.2f} toks/s, "
            f"output: {self._num_out / seconds:.2f} toks/s",
            refresh=False,
        )
        self._bar.update(count)

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
