"""`LLM`: the blocking public API, and the only place that knows vLLM's keywords."""

import html
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxllm import compile_cache, vllm_keywords
from jaxllm.cache.memory import GIB
from jaxllm.chat import parse_conversations, render
from jaxllm.devices import release_freed_memory
from jaxllm.engine import Engine
from jaxllm.errors import ConfigError, JaxLLMError, RequestError
from jaxllm.flags import NO_FLAGS, flags_of_params
from jaxllm.generation_defaults import default_sampling_params
from jaxllm.hub import PATTERNS, WITHOUT_WEIGHTS, local_folder
from jaxllm.inspection import Inspection, Wanted, inspect_program
from jaxllm.keywords import ExplainsKeywords
from jaxllm.layout_report import LayoutReport, layout_report
from jaxllm.loading import (
    LoadFormat,
    Plan,
    Wishes,
    eos_token_ids,
    generation_config_of,
    load_params,
    plan_load,
    plan_reshard,
    reserve_device_memory,
)
from jaxllm.logs import configure
from jaxllm.modeling.registry import Overrides
from jaxllm.outputs import CompletionScore, RequestOutput
from jaxllm.peers import peers_of
from jaxllm.program_cache import asked_guard
from jaxllm.programs import ProgramBuilder
from jaxllm.progress import Progress, ProgressBar
from jaxllm.prompts import parse_each, parse_prompts
from jaxllm.replicas import Replicas, as_one, engines_of, make_engines
from jaxllm.report import Report, report_of
from jaxllm.request_builder import RequestBuilder
from jaxllm.results import Results, delta
from jaxllm.sampling_params import (
    DEFAULT_MAX_TOKENS,
    DefaultInt,
    RequestOutputKind,
    SamplingParams,
    as_integer,
)
from jaxllm.saving import save
from jaxllm.sequence import Request
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.choice import LayoutLike, one_sharder, sharders
from jaxllm.stats import Stats, stats_of
from jaxllm.tokenizer import encode, load_tokenizer
from jaxllm.warm_up import Background, program_keys, warm_up

logger = logging.getLogger("jaxllm")

Prompts = str | dict[str, Any] | Sequence[int] | Sequence[str | dict[str, Any] | Sequence[int]]
Params = SamplingParams | Sequence[SamplingParams] | None
OnError = Literal["raise", "return"]
WarmUp = Literal["lazy", "background", "full"]


def _is_exiting(
    is_finalizing: Callable[[], bool] = sys.is_finalizing,
    main_thread: Callable[[], threading.Thread] = threading.main_thread,
) -> bool:
    # Bound early: while Python ends, modules lose what is in them.
    return is_finalizing() or not main_thread().is_alive()


class LLM(metaclass=ExplainsKeywords):
    """A language model, loaded and ready to generate; all in this process.

    Args:
        model: A hub id, a local folder, one that `save` wrote, or "demo" for the small
            model that ships with jaxllm.
        tokenizer: Another hub id or folder for the tokenizer; the model's by default.
        tokenizer_mode: "auto" or "hf", or "slow" for the tokenizer in pure Python.
        skip_tokenizer_init: Load no tokenizer: prompts are token ids, texts are "".
        tensor_parallel_size: Devices that share one copy of the model; 1 by default.
        data_parallel_size: Copies of the model, each on devices of its own, that work on
            one list of prompts; 1 by default.
        layout: What is split over which devices: a preset ("replicated", "tensor",
            "tensor_replicated_vocab", "tensor_2d", "sequence", "data", "data_tensor"), a
            `Layout`, a dict of one, or a JSON file. By default what the two sizes say.
        devices: Ids, or devices of JAX, as many as the sizes ask for; the first by default.
        dtype: "auto", "float32", "bfloat16" or "float16" ("half"). "auto" is
            float32 on CPU, and on a GPU the checkpoint's 16-bit type that the card has.
        seed: Of the generator that draws the seed of each unseeded request.
        revision: Branch, tag or commit of a hub id.
        tokenizer_revision: The same for `tokenizer`.
        hf_token: Of the hub; True for the stored login.
        hf_overrides: Replaces fields of config.json, nested ones too; or a function from
            the config to the one to use.
        trust_remote_code: Taken and not used: no code of a checkpoint is ever run.
        download_dir: Where the hub's files are kept; by default the hub's own cache.
        load_format: "auto", "safetensors", or "dummy" for random weights.
        max_model_len: Most tokens of a sequence. By default what the model was
            made for; "auto" or -1: the most that fits.
        max_num_seqs: Most sequences in one step; by default 64 on CPU, 256 on a GPU.
        max_num_batched_tokens: Most tokens in one step; by default 2048 on CPU,
            8192 on a GPU.
        gpu_memory_utilization: Share of each device's memory for weights, work
            and cache; 0.92 by default. On CPU it is a share of the machine's
            memory, and by default the cache takes 1 GiB, or more where one sequence of
            `max_model_len` needs it; it never takes more than `max_num_seqs` of them do.
        kv_cache_memory_bytes: Bytes of the cache on each device, instead.
        num_gpu_blocks_override: Pages of the cache, instead.
        block_size: Tokens in a page of the cache, a power of two; 16 by default, on CPU 32 where
            attention is a compiled kernel (`report()` says so), and 64 where it is plain XLA.
        enable_prefix_caching: Keep the pages of past prompts and find them again; the default.
        enable_chunked_prefill: Compute long prompts over several steps; the default.
        max_logprobs: Most alternatives that `SamplingParams.logprobs` may ask for; -1: all.
        logprobs_mode: "raw_logprobs" of the model's own distribution, or
            "processed_logprobs" of the one sampled from; or "raw_logits",
            "processed_logits".
        async_scheduling: Plan and launch a step while the one before it is computed; the
            default. The tokens are the same without.
        generation_config: "auto" takes the defaults of `generate` from the model's
            generation_config.json, "vllm" takes neutral ones; or a folder that has one.
        override_generation_config: Values that replace those defaults.
        chat_template: Default of `chat`: Jinja text, a file, or a name of the tokenizer's.
        enforce_eager: Taken and not used: programs are compiled as they are needed.
        warmup: When programs are compiled. "lazy": each when a step needs it. "background":
            a thread compiles them too, the likeliest first, and while the one that a step needs
            is not ready a larger one serves; after `reshard` it goes on for the layout there.
            "full": all that greedy and default requests can need, before the constructor
            returns; what is compiled later is warned of, or an error with
            JAXLLM_RECOMPILE=error.
        use_tqdm_on_load: Show progress bars while weights are read and programs compiled.

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
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int | None = None,
        data_parallel_size: int | None = None,
        layout: LayoutLike | None = None,
        devices: Sequence[int | jax.Device] | None = None,
        dtype: str = "auto",
        seed: int = 0,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        hf_token: str | bool | None = None,
        hf_overrides: Overrides | None = None,
        trust_remote_code: bool = False,
        download_dir: str | Path | None = None,
        load_format: LoadFormat = "auto",
        max_model_len: int | str | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float | None = None,
        kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None,
        block_size: int | None = None,
        enable_prefix_caching: bool | None = None,
        enable_chunked_prefill: bool | None = None,
        max_logprobs: int = 20,
        logprobs_mode: str = "raw_logprobs",
        async_scheduling: bool | None = None,
        generation_config: str | Path = "auto",
        override_generation_config: Mapping[str, Any] | None = None,
        chat_template: str | Path | None = None,
        warmup: WarmUp = "lazy",
        use_tqdm_on_load: bool = True,
        enforce_eager: bool = False,
    ) -> None:
        del trust_remote_code, enforce_eager
        configure()
        compile_cache.enable()
        start = time.perf_counter()
        self._engine: Engine | Replicas | None = None
        self._backgrounds: list[Background] = []
        self._warmup = _checked_warmup(warmup)
        random = _generator(seed)
        wishes = Wishes(
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=block_size,
            memory_fraction=gpu_memory_utilization,
            cache_bytes=kv_cache_memory_bytes,
            num_pages=num_gpu_blocks_override,
            enable_prefix_caching=enable_prefix_caching is not False,
            enable_chunked_prefill=enable_chunked_prefill is not False,
            max_logprobs=max_logprobs,
            logprobs_mode=logprobs_mode,
            async_scheduling=async_scheduling is not False,
        )
        # The backend keeps the first share it starts with, so it is checked before.
        reserve_device_memory(wishes)
        wanted = WITHOUT_WEIGHTS if load_format == "dummy" else PATTERNS
        folder = local_folder(model, revision, hf_token, download_dir, wanted)
        sharder, *others = sharders(layout, tensor_parallel_size, data_parallel_size, devices)
        if self._warmup == "background":  # what is ready when differs between processes
            peers = peers_of(*(one.mesh for one in (sharder, *others)))
            peers.refuse("warmup='background'", "Use 'full', or 'lazy'.")
        plan = plan_load(folder, wishes, sharder, load_format, hf_overrides, others)
        self._defaults = default_sampling_params(
            generation_config_of(folder, generation_config), override_generation_config or {}
        )
        self._tokenizer, self._tokenizer_folder = None, folder
        if not skip_tokenizer_init:
            if tokenizer is not None:
                place = (tokenizer, tokenizer_revision, hf_token, download_dir)
                self._tokenizer_folder = local_folder(*place, WITHOUT_WEIGHTS)
            self._tokenizer = load_tokenizer(self._tokenizer_folder, tokenizer_mode)
        self._chat_template = None if chat_template is None else str(chat_template)
        self._plan, self._plans = plan, {sharder: plan}
        self._name = str(model)
        self._num_devices = len(plan.devices) * (1 + len(others))
        self._builder = RequestBuilder(
            tokenizer=self._tokenizer,
            vocab_size=plan.config.vocab_size,
            max_model_len=plan.engine.max_model_len,
            max_logprobs=max_logprobs,
            eos_token_ids=eos_token_ids(plan, self._tokenizer),
            random=random,
        )
        self._results = Results(self._tokenizer)
        self._enqueued: list[Request] = []
        self._warned_length = False
        params = load_params(plan, seed=int(seed or 0) & 0x7FFFFFFF, show_progress=use_tqdm_on_load)
        builder = ProgramBuilder(plan.model, plan.engine, sharder, plan.memory.num_pages)
        self._engine = as_one(make_engines(builder, params, others))
        release_freed_memory()  # of loading
        self._compile_ahead(show_progress=use_tqdm_on_load)
        where = [sharder, *others]
        logger.info("%s", _summary(self._name, plan, where, time.perf_counter() - start))
        for note in plan.notes:
            logger.warning("%s.", note)

    @classmethod
    def _translate_keywords(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Drops vLLM's keywords that mean nothing here, and renames those of old."""
        configure()  # what it says is said before __init__
        return vllm_keywords.translate(kwargs)

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        *,
        use_tqdm: Progress = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Generates a completion of each prompt, and returns when all are done.

        Prompts of any number and length may be passed at once; the engine batches
        them as memory allows. An interrupt (Ctrl-C) ends the call and frees all it
        held; the engine stays usable.

        Args:
            prompts: Text, or token ids, which are used as they are; a dict with
                `prompt` or `prompt_token_ids`; or a list of these.
            sampling_params: One for all prompts, or one for each; by default those of
                the model's `generation_config.json`, `get_default_sampling_params()`.
            use_tqdm: Whether to show progress, or what to call in place of `tqdm`.
            lora_request: Adapters are not implemented: None.
            priority: Taken and not used: requests are served in order of arrival.
            tokenization_kwargs: For the tokenizer: `truncate_prompt_tokens`, `max_length`,
                `truncation`, `truncation_side`, `add_special_tokens`.
            on_error: "raise" refuses the whole call, before anything runs, if one
                request of it cannot be run. "return" gives that request an output
                with its `error`, and runs the others.

        Returns:
            One output a prompt, in the order of `prompts`.

        Raises:
            RequestError: A prompt or its parameters cannot be run. Nothing was.
            NonFiniteError: The model's logits became NaN or infinite.
        """
        del priority
        _no_adapter(lora_request)
        requests = self._requests(
            prompts, sampling_params, tokenization_kwargs, on_error=_checked(on_error)
        )
        return self._run(requests, use_tqdm, on_error)

    def chat(  # noqa: PLR0913
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: Progress = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of a list of them.

        Args:
            messages: `[{"role": "user", "content": "Hello"}]`, or a list of such lists.
            sampling_params: As for `generate`.
            use_tqdm: As for `generate`.
            lora_request: As for `generate`.
            priority: As for `generate`.
            chat_template: Jinja text, a file, or a name of the tokenizer's; by default
                the tokenizer's own.
            chat_template_content_format: "string", "openai" or "auto": how lists of
                content parts reach the template.
            add_generation_prompt: Whether to open the assistant's turn.
            continue_final_message: Whether to go on with the last message instead; then
                `add_generation_prompt` must be False.
            tools: Descriptions of functions, for the template.
            chat_template_kwargs: More variables for the template.
            tokenization_kwargs: As for `generate`.
            on_error: As for `generate`.

        Returns:
            One output a conversation; `prompt` is the text that the template gave.

        Raises:
            RequestError: As `generate`; or there is no template, or it refuses.
        """
        rendered = self.render(
            messages,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(
            [rendered] if isinstance(rendered, dict) else rendered,
            sampling_params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
            on_error=on_error,
        )

    def render(
        self,
        messages: Any,
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Returns what `chat` would send: text and token ids, nothing is run.

        Args:
            messages: As for `chat`, and so are the others.
            chat_template: Of `chat`.
            chat_template_content_format: Of `chat`.
            add_generation_prompt: Of `chat`.
            continue_final_message: Of `chat`.
            tools: Of `chat`.
            chat_template_kwargs: Of `chat`.

        Returns:
            `{"prompt": text, "prompt_token_ids": ids}`, which `generate` takes as it is;
            a list of them for a list of conversations.

        Raises:
            RequestError: There is no template, or it refuses the messages.
        """
        if self._tokenizer is None:
            raise RequestError(
                "A chat needs the tokenizer's template and skip_tokenizer_init=True. Load the "
                "tokenizer, or make the prompt yourself and pass its token ids to generate."
            )
        conversations, is_one = parse_conversations(messages)
        rendered = []
        for conversation in conversations:
            text = render(
                self._tokenizer,
                conversation,
                chat_template=chat_template,
                default_template=self._chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                content_format=chat_template_content_format,
            )
            # The template has written the special tokens, BOS among them.
            ids = encode(self._tokenizer, text, {"add_special_tokens": False}, self.max_model_len)
            rendered.append({"prompt": text, "prompt_token_ids": ids})
        return rendered[0] if is_one else rendered

    def stream(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        *,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[RequestOutput]:
        """Generates, and hands out what there is of each request after every step.

        Leaving the loop early ends the requests. Other calls may be made between two
        outputs; the streamed requests go on beside them.

        Args:
            prompts: As for `generate`; `render` makes one of a conversation.
            sampling_params: As for `generate`. With `output_kind` DELTA each output has
                only what is new, with FINAL_ONLY there is one for each prompt.
            tokenization_kwargs: As for `generate`.
            on_error: As for `generate`.

        Yields:
            Outputs; those of several prompts are told apart by `request_id`. The text of
            each is a beginning of the next one's, and the last has `finished` set.

        Raises:
            RequestError: As `generate`, at once and not in the loop.

        Example:
            >>> for output in llm.stream("Once upon a time", SamplingParams(max_tokens=64)):
            ...     print(output.outputs[0].text)
        """
        requests = self._requests(
            prompts,
            sampling_params,
            tokenization_kwargs,
            on_error=_checked(on_error),
            streams=True,
        )
        return self._stream(requests, on_error)

    def enqueue(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        use_tqdm: Progress = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Queues prompts and runs nothing yet; `wait_for_completion` does.

        Args:
            prompts: As for `generate`, and so are the others.
            sampling_params: Of `generate`.
            lora_request: Of `generate`.
            priority: Of `generate`.
            use_tqdm: Taken and not used: queueing is quick.
            tokenization_kwargs: Of `generate`.

        Returns:
            The id of each request, in order.

        Raises:
            RequestError: As `generate`; nothing was queued.
        """
        del priority, use_tqdm
        _no_adapter(lora_request)
        self._live_engine()
        requests = self._requests(prompts, sampling_params, tokenization_kwargs, on_error="raise")
        self._enqueued += requests
        return [request.request_id for request in requests]

    def enqueue_chat(self, messages: Any, sampling_params: Params = None, **chat: Any) -> list[str]:
        """Queues conversations, as `enqueue` does prompts.

        Args:
            messages: As for `chat`.
            sampling_params: As for `generate`.
            chat: Keywords of `render`.

        Returns:
            The id of each request, in order.
        """
        rendered = self.render(messages, **chat)
        return self.enqueue([rendered] if isinstance(rendered, dict) else rendered, sampling_params)

    def wait_for_completion(
        self, output_type: type | None = None, *, use_tqdm: Progress = True
    ) -> list[RequestOutput]:
        """Runs what `enqueue` has queued, and returns when all of it is done.

        Args:
            output_type: What the caller expects; `RequestOutput` is all there is.
            use_tqdm: As for `generate`.

        Returns:
            One output a request, in the order they were queued.

        Raises:
            RequestError: `output_type` is another.
        """
        if output_type is not None and not issubclass(RequestOutput, output_type):
            raise RequestError(
                f"output_type={output_type.__name__} was asked for, and this model's requests "
                "give RequestOutput. Leave it out."
            )
        requests, self._enqueued = self._enqueued, []
        return self._run(requests, use_tqdm, "raise")

    def score_completions(
        self,
        prompts: Prompts,
        completions: Prompts,
        *,
        use_tqdm: Progress = True,
    ) -> list[CompletionScore]:
        """Returns the log-probability of each token of given completions; samples nothing.

        What evaluation harnesses need. The logits of a few positions exist at a time,
        so length times vocabulary is no matter; contexts that several completions
        share are computed once.

        Args:
            prompts: A context for each completion, or one for all: text, token ids, or
                a dict as for `generate`.
            completions: What follows each context: text, which is tokenized without
                special tokens, or token ids, which is exact.
            use_tqdm: As for `generate`.

        Returns:
            For each completion its token ids, log-probabilities (of the model's own
            distribution) and ranks, as NumPy arrays.

        Raises:
            RequestError: One of them is empty or too long, or the lengths differ.

        Example:
            >>> scores = llm.score_completions("The sky is", [" blue", " green"])
            >>> best = max(scores, key=lambda score: score.total)
        """
        contexts, ends = parse_prompts(prompts), parse_prompts(completions)
        if len(contexts) == 1:
            contexts *= len(ends)
        if len(contexts) != len(ends):
            raise RequestError(
                f"The lengths of prompts ({len(contexts)}) and completions ({len(ends)}) must be "
                "the same. Pass one context for all, or one for each completion."
            )
        requests = [self._builder.scoring(*pair) for pair in zip(contexts, ends, strict=True)]
        self._drive(requests, use_tqdm, "raise")
        return [self._results.score(request) for request in requests]

    # ---------------------------------------------------------------- how calls run

    def _requests(
        self,
        prompts: Any,
        sampling_params: Any,
        tokenization: Mapping[str, Any] | None,
        *,
        on_error: OnError,
        streams: bool = False,
    ) -> list[Request]:
        """Checks and tokenizes everything, before anything is queued."""
        keep = on_error == "return"
        parsed = parse_each(prompts) if keep else parse_prompts(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            params = [sampling_params] * len(parsed)
        else:
            params = _params_list(sampling_params)
        if len(parsed) != len(params):
            raise RequestError(
                f"The lengths of prompts ({len(parsed)}) and params ({len(params)}) "
                "must be the same. Pass one SamplingParams for all, or one for each."
            )
        return self._builder.generation(
            parsed, params, tokenization=tokenization, streams=streams, keep_errors=keep
        )

    def _run(
        self, requests: list[Request], use_tqdm: Progress, on_error: OnError
    ) -> list[RequestOutput]:
        self._drive(requests, use_tqdm, on_error)
        self._warn_of_default_length(requests)
        return [self._results.output(request) for request in requests]

    def _drive(self, requests: list[Request], use_tqdm: Progress, on_error: OnError) -> None:
        """Runs steps until all of these requests are done."""
        engine = self._live_engine()
        waiting = {request.request_id for request in requests if not request.is_finished}
        with engine.call(requests), ProgressBar(requests, use_tqdm) as bar:
            while waiting:
                for request in engine.step():
                    if request.request_id not in waiting:
                        continue
                    if request.error is not None and on_error == "raise":
                        raise request.error
                    waiting.remove(request.request_id)
                    bar.finish(request)

    def _stream(self, requests: list[Request], on_error: OnError) -> Iterator[RequestOutput]:
        engine, live = self._live_engine(), list(requests)
        shown: dict[str, int] = {}
        sent: dict[str, dict[int, tuple[int, int]]] = {r.request_id: {} for r in requests}
        try:
            while live:
                self._live_engine()  # it may have been closed since the last output
                if not all(request.is_finished for request in live):
                    with engine.call(live):
                        engine.step()
                for request in list(live):
                    if request.error is not None and on_error == "raise":
                        raise request.error
                    # Another call may finish it between two outputs: asked once, at its turn.
                    is_last = request.is_finished
                    if is_last:
                        live.remove(request)
                    count = sum(len(seq.output_token_ids) for seq in request.sequences)
                    is_new = is_last or count != shown.get(request.request_id, 0)
                    shown[request.request_id] = count
                    kind = request.params.output_kind
                    if is_new and (is_last or kind != RequestOutputKind.FINAL_ONLY):
                        output = self._results.output(request)
                        if kind == RequestOutputKind.DELTA:
                            output = delta(output, sent[request.request_id])
                        yield output
        finally:
            engine.abort_later(r.request_id for r in live if not r.is_finished)

    def _warn_of_default_length(self, requests: list[Request]) -> None:
        """Says once that a completion was cut at a length nobody chose."""
        cut = any(
            isinstance(request.params.max_tokens, DefaultInt)
            and any(seq.finish_reason == "length" for seq in request.sequences)
            for request in requests
        )
        if cut and not self._warned_length:
            self._warned_length = True
            logger.warning(
                "A completion ended at the default max_tokens=%d. Pass "
                "SamplingParams(max_tokens=...) for longer ones; None goes on to max_model_len.",
                DEFAULT_MAX_TOKENS,
            )

    # ---------------------------------------------------------------- the rest

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the parameters of calls that give none: the model author's, if there are."""
        return self._defaults.clone()

    def get_tokenizer(self) -> Any:
        """Returns the tokenizer; None with `skip_tokenizer_init`."""
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence."""
        return self._plan.engine.max_model_len

    def stats(self) -> Stats:
        """Returns counts since the start: steps, tokens, padding, times, programs, cache use."""
        return stats_of(engines_of(self._live_engine()))

    def report(self) -> Report:
        """Returns what the model runs on and with: machine, versions, memory, programs, settings.

        Each setting of JAX and XLA that matters is there, with who set it and why.
        """
        tables = [one.runner.programs for one in engines_of(self._live_engine())]
        return report_of(self._name, self._plan, tables, self._warmup)

    def _compile_ahead(self, *, show_progress: bool) -> None:
        """Compiles now what greedy and default requests need, or starts a thread that does."""
        if self._warmup == "lazy":
            return
        tables = [one.runner.programs for one in engines_of(self._live_engine())]
        flags = dict.fromkeys((flags_of_params([self._defaults]), NO_FLAGS))
        keys = program_keys(self._plan.engine, list(flags))
        if self._warmup == "background":
            self._backgrounds = [Background(table, keys) for table in tables]
            return
        try:
            warm_up(tables, keys, show_progress=show_progress)
        except BaseException:
            self.close()
            raise
        for table in tables:
            table.guard = asked_guard()

    def inspect(
        self,
        program: str,
        *,
        batch: int | None = None,
        tokens: int | None = None,
        steps: int = 1,
        context: int | None = None,
    ) -> Inspection:
        """Compiles one of this model's programs anew and tells what became of it.

        The arguments are those of `jaxllm.inspect`, which needs no loaded model. Nothing
        runs, and the engine's own programs stay as they are.

        Raises:
            ConfigError: There is no such program.
        """
        builder = engines_of(self._live_engine())[0].runner.builder
        wanted = Wanted(program=program, batch=batch, tokens=tokens, steps=steps, context=context)
        return inspect_program(builder, self._plan.config, self._name, wanted)

    # ---------------------------------------------------------------- where the model is

    def layout(self) -> LayoutReport:
        """Returns where each parameter is: a table and a picture, as text and in notebooks.

        Example:
            >>> print(llm.layout())
            >>> llm.layout()["layers.0.attn.qkv.weight"].num_bytes
        """
        engines = engines_of(self._live_engine())
        return layout_report([engine.runner.builder for engine in engines])

    def reshard(
        self,
        layout: LayoutLike,
        *,
        tensor_parallel_size: int | None = None,
        devices: Sequence[int | jax.Device] | None = None,
    ) -> None:
        """Moves the model to another layout, device to device; nothing is read again.

        The cache is made anew and past prompts are forgotten; unfinished requests go on,
        computed again. Programs that were compiled for a layout are kept for the next time; with
        `warmup="background"` a thread compiles those that are not there yet.
        After an error or an interrupt the model is where it was.

        Args:
            layout: As for `LLM`.
            tensor_parallel_size: As for `LLM`.
            devices: As for `LLM`; by default those that the model has, then others.

        Raises:
            ConfigError: The model does not fit that layout, or has copies; nothing was moved.
        """
        engine, *others = engines_of(self._live_engine())
        if others:
            raise ConfigError(
                f"This LLM has {1 + len(others)} engines side by side (data_parallel_size), and "
                "reshard moves one. Make another LLM."
            )
        runner = engine.runner
        have = list(runner.builder.sharder.mesh.devices.flat)
        sharder = one_sharder(layout, tensor_parallel_size, devices, have)
        for peers in (runner.peers, peers_of(sharder.mesh)):
            peers.refuse("reshard", "Make another LLM.")
        plan = self._plans.get(sharder) or plan_reshard(self._plan, sharder, runner.held_bytes())
        builder = ProgramBuilder(plan.model, plan.engine, sharder, plan.memory.num_pages)
        is_known = sharder in self._plans
        try:
            self._stop_backgrounds()
            engine.reshard(builder)
        finally:
            if runner.builder.sharder == sharder:
                self._plans[sharder] = self._plan = plan
                self._num_devices = len(plan.devices)
            if self._warmup == "background":  # wherever the model is
                self._compile_ahead(show_progress=False)
        for note in () if is_known else plan.notes:
            logger.warning("%s.", note)

    def save(self, path: str | Path) -> None:
        """Writes the model as it is, for `LLM(path)`: converted, cast, in pieces.

        That loads faster than the original, into any layout and on any number of devices.

        Args:
            path: A new folder, or an empty one; with several processes, the same in all of
                them, which all of them see and call this for.

        Raises:
            CheckpointError: There is something at `path` already, or one of the model's
                processes does not see the folder.
            ConfigError: The model is of this process alone, in a job of several.
            DistributedError: The processes do not do the same, or one is gone.
        """
        runner = engines_of(self._live_engine())[0].runner
        files = self._tokenizer_folder
        save(path, self._plan, runner.params, tokenizer_folder=files, peers=runner.peers)

    def close(self) -> None:
        """Frees weights and cache; a closed LLM only says that it is.

        The next model in this process has the memory. Other programs have not: on a GPU
        JAX's allocator keeps what it took until the process ends.
        """
        engine, self._engine = self._engine, None
        if engine is None:
            return
        self._stop_backgrounds()
        for one in engines_of(engine):
            one.runner.close()
        if isinstance(engine, Replicas):
            engine.close()
        memory = self._plan.memory
        kept = self._plan.devices[0].platform != "cpu"
        logger.info(
            "closed %s: freed %.2f GiB of weights and %.2f GiB of cache%s",
            self._name,
            memory.weights / GIB,
            memory.cache_bytes / GIB,
            "; JAX's allocator keeps them for this process" if kept else "",
        )

    def _stop_backgrounds(self) -> None:
        """Lets the threads end after the program that each is at."""
        for background in self._backgrounds:
            background.close()

    def _live_engine(self) -> Engine | Replicas:
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

    def __del__(self, is_exiting: Callable[[], bool] = _is_exiting) -> None:
        # After a failed __init__ there may be no engine; at exit, no JAX to free with.
        if getattr(self, "_engine", None) is not None and not is_exiting():
            self.close()

    def __repr__(self) -> str:
        state = "closed, " if self._engine is None else ""
        config = self._plan.config
        return (
            f"LLM({self._name!r}, {state}{self._plan.architecture}, {config.num_layers} layers, "
            f"{self._plan.engine.dtype}, max_model_len={self.max_model_len})"
        )

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: a small table."""
        plan = self._plan
        rows = {
            "model": self._name,
            "architecture": plan.architecture,
            "parameters": f"{sum(leaf.shape.size for leaf in plan.model.leaves):,}",
            "dtype": plan.engine.dtype,
            "device": f"{self._num_devices} x {plan.devices[0].device_kind}",
            "max_model_len": f"{plan.engine.max_model_len:,}",
            "cache": f"{plan.memory.num_tokens:,} tokens",
            "state": "closed" if self._engine is None else "ready",
        }
        cells = (
            f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items()
        )
        return f"<table>{''.join(cells)}</table>"


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


def _no_adapter(lora_request: Any) -> None:
    if lora_request is not None:
        raise RequestError(
            "Got lora_request but LoRA is not enabled! Here adapters are not implemented: merge "
            "the adapter into the model's weights, or leave it out."
        )


def _checked(on_error: Any) -> OnError:
    if on_error not in ("raise", "return"):
        raise RequestError(f"on_error={on_error!r} must be 'raise' or 'return'.")
    return on_error


def _checked_warmup(warmup: Any) -> WarmUp:
    if warmup not in get_args(WarmUp):
        raise ConfigError(f"warmup={warmup!r} is not one of {list(get_args(WarmUp))}.")
    if warmup == "full":
        asked_guard()  # what is wrong with it is said now and not minutes later
    return warmup


def _generator(seed: int | None) -> np.random.Generator:
    if seed is not None and (as_integer(seed) is None or seed < 0):
        raise ConfigError(f"seed={seed!r} must be an integer of at least 0.")
    return np.random.default_rng(seed)


def _summary(name: str, plan: Plan, where: Sequence[Sharder], seconds: float) -> str:
    device, engine = plan.devices[0], plan.engine
    times = f"{len(where)} engines, each on " if len(where) > 1 else ""
    return (
        f"{name}: {plan.architecture}, {plan.model.num_bytes / GIB:.2f} GiB of {engine.dtype} on "
        f"{times}{where[0].mesh.size} x {device.device_kind}; up to {engine.max_num_seqs} "
        f"sequences and {engine.max_num_batched_tokens} tokens a step; ready in {seconds:.1f} s\n"
        f"jaxllm: {plan.memory.summary()}"
    )
