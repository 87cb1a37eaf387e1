"""Makes requests of prompts and parameters, and refuses what this model cannot run.

Everything that can be wrong with a request is found here, before anything is
queued: a call either runs whole, or says why not.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm import interrupts
from jaxllm.chat import doubled_bos
from jaxllm.errors import RequestError
from jaxllm.logit_rules import LogitRules, ThinkingBudget, rules_of
from jaxllm.prompts import Prompt
from jaxllm.sampling_params import SamplingParams
from jaxllm.scoring import Scoring
from jaxllm.sequence import Request
from jaxllm.sequence import Sequence as TokenSequence
from jaxllm.text_stream import TextStream
from jaxllm.tokenizer import bad_word_ids, encode, truncate_tokens

logger = logging.getLogger("jaxllm")

SEED_MASK = 2**64 - 1
THINKING = ("<think>", "</think>")
"""Tokens between which `thinking_token_budget` counts."""


@dataclass(slots=True)
class RequestBuilder:
    """What requests of one model are made from."""

    tokenizer: Any
    """None with `skip_tokenizer_init`."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    """Most alternatives a request may ask for; -1: as many as there are."""

    eos_token_ids: tuple[int, ...]
    """Tokens that end a text: the tokenizer's, then the configs'."""

    random: np.random.Generator
    """Draws the seed of each request that has none."""

    num_built: int = 0
    warned_bos: bool = False

    def generation(
        self,
        prompts: Sequence[Prompt | RequestError],
        params: Sequence[SamplingParams],
        *,
        tokenization: Mapping[str, Any] | None = None,
        streams: bool = False,
        keep_errors: bool = False,
    ) -> list[Request]:
        """Returns a request that generates for each prompt.

        Args:
            prompts: As parsed; an error in place of one that could not be.
            params: One for each prompt.
            tokenization: `tokenization_kwargs` of the caller.
            streams: Whether the text is wanted as it grows.
            keep_errors: Return a request with its `error` set in place of raising it.

        Raises:
            RequestError: A prompt or its parameters cannot be run.
        """
        with interrupts.noticed():
            return self._generations(prompts, params, tokenization, streams, keep_errors)

    def _generations(
        self,
        prompts: Sequence[Prompt | RequestError],
        params: Sequence[SamplingParams],
        tokenization: Mapping | None,
        streams: bool,
        keep_errors: bool,
    ) -> list[Request]:
        requests = []
        for prompt, one in zip(prompts, params, strict=True):
            interrupts.check()
            try:
                if isinstance(prompt, RequestError):
                    raise prompt
                requests.append(self._generation(prompt, one, tokenization, streams))
            except RequestError as error:
                if not keep_errors:
                    raise
                text, ids = None, []
                if isinstance(prompt, Prompt):
                    text, ids = prompt.text, prompt.token_ids or []
                requests.append(Request(self._new_id(), text, ids, one, error=error))
        return requests

    def _generation(
        self, prompt: Prompt, params: SamplingParams, tokenization: Mapping | None, streams: bool
    ) -> Request:
        params = params.clone()  # checked again, as its fields may have been changed since
        token_ids = self._tokens(prompt, tokenization, room=1)
        self._check_prompt(token_ids, self.max_model_len - 1)
        params.check(self.vocab_size, self.max_logprobs)
        rules = self._rules(token_ids, params)
        request = Request(self._new_id(), prompt.text, token_ids, params)
        seeds = self._seeds(params)
        for i, seed in enumerate(seeds):
            seq = self._sequence(request, i, seed, prompt.cache_salt)
            seq.rules = rules
            seq.num_logprobs = self._num_logprobs(params)
            seq.reads_prefix_cache = not params.skip_reading_prefix_cache
            if params.stop or streams:
                seq.text = self._text_stream(token_ids, params)
            request.sequences.append(seq)
        if params.prompt_logprobs is not None:
            request.sequences[0].scoring = Scoring(
                np.asarray(token_ids[1:], np.int32), 0, self._count(params.prompt_logprobs)
            )
        return request

    def scoring(self, context: Prompt, completion: Prompt) -> Request:
        """Returns a request that scores a completion behind its context and generates nothing.

        Raises:
            RequestError: One of them is empty or has strange tokens, or both are too long.
        """
        before = self._tokens(context, None)
        without_bos = {"add_special_tokens": False}
        after = self._tokens(completion, without_bos)
        if not after:
            raise RequestError("The completion to score is empty: its text gives no tokens.")
        self._check_prompt(before, self.max_model_len)
        self._check_prompt(before + after, self.max_model_len)
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        whole = before + after
        # The last token is only a target: nothing has to be computed from it.
        request = Request(self._new_id(), context.text, whole[:-1], params)
        seq = self._sequence(request, 0, 0, context.cache_salt)
        seq.generates = False
        seq.scoring = Scoring(np.asarray(whole[1:], np.int32), len(before) - 1, 0)
        request.sequences.append(seq)
        return request

    # ------------------------------------------------------------ parts

    def _new_id(self) -> str:
        self.num_built += 1
        return str(self.num_built - 1)

    def _sequence(self, request: Request, index: int, seed: int, salt: str | None) -> TokenSequence:
        return TokenSequence(
            request_id=request.request_id,
            index=index,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            seed=seed,
            arrival=0,
            eos_token_id=getattr(self.tokenizer, "eos_token_id", None),
            eos_token_ids=self.eos_token_ids,
            cache_salt=salt,
        )

    def _seeds(self, params: SamplingParams) -> list[int]:
        """Returns a 64-bit seed for each completion: counted up from the caller's, or drawn."""
        if params.seed is not None:
            return [(params.seed + i) & SEED_MASK for i in range(params.n)]
        return [int(self.random.integers(2**64, dtype=np.uint64)) for _ in range(params.n)]

    def _tokens(
        self, prompt: Prompt, tokenization: Mapping[str, Any] | None, room: int = 0
    ) -> list[int]:
        """Returns the token ids of a prompt; a truncated one leaves `room` tokens free."""
        if prompt.token_ids is not None:
            return truncate_tokens(prompt.token_ids, tokenization, self.max_model_len, room)
        text = prompt.text or ""
        if self.tokenizer is None:
            raise RequestError(
                "The prompt is text and skip_tokenizer_init=True. Pass token ids, or load the "
                "tokenizer."
            )
        token_ids = encode(self.tokenizer, text, tokenization, self.max_model_len, room)
        if not self.warned_bos and doubled_bos(self.tokenizer, token_ids):
            self.warned_bos = True
            logger.warning(
                "A prompt begins with two BOS tokens: its text has one and the tokenizer adds one. "
                "Use chat(), which does not, or pass "
                "tokenization_kwargs={'add_special_tokens': False}."
            )
        return token_ids

    def _check_prompt(self, token_ids: Sequence[int], most: int) -> None:
        """Raises RequestError where a prompt does not fit this model."""
        if not token_ids:
            raise RequestError(
                "The decoder prompt cannot be empty: its text gives no tokens. Give it some."
            )
        if len(token_ids) > most:
            output = (
                "" if most == self.max_model_len else ", and at least 1 is needed for the output"
            )
            raise RequestError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, "
                f"your prompt contains {len(token_ids)} input tokens{output}. "
                "Shorten the prompt, or raise max_model_len if the model allows it."
            )
        strange = _first(t for t in token_ids if not 0 <= t < self.vocab_size)
        if strange is not None:
            raise RequestError(
                f"Token id {strange} is out of vocabulary: ids go from 0 to {self.vocab_size - 1}."
            )

    def _rules(self, token_ids: Sequence[int], params: SamplingParams) -> LogitRules:
        # Below min_tokens the end of a sequence is banned even where it would not end it.
        stops = tuple(dict.fromkeys((*self.eos_token_ids, *params.stop_token_ids)))
        return rules_of(
            params,
            prompt_len=len(token_ids),
            stop_ids=stops,
            bad_words=self._bad_words(params),
            thinking=self._thinking(params),
            vocab_size=self.vocab_size,
        )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        self._need_tokenizer("bad_words")
        return bad_word_ids(self.tokenizer, params.bad_words, self.vocab_size)

    def _thinking(self, params: SamplingParams) -> ThinkingBudget | None:
        if params.thinking_token_budget is None:
            return None
        self._need_tokenizer("thinking_token_budget")
        vocabulary = self.tokenizer.get_vocab()
        if any(token not in vocabulary for token in THINKING):
            raise RequestError(
                f"thinking_token_budget={params.thinking_token_budget} needs a model whose "
                f"tokenizer has the tokens {THINKING[0]} and {THINKING[1]}, and this one has not. "
                "Leave it out."
            )
        start, end = (vocabulary[token] for token in THINKING)
        return ThinkingBudget(start, end, params.thinking_token_budget)

    def _text_stream(self, token_ids: list[int], params: SamplingParams) -> TextStream | None:
        if params.stop:
            self._need_tokenizer("stop")
        if self.tokenizer is None or not params.detokenize:
            return None
        return TextStream(self.tokenizer, token_ids, params)

    def _need_tokenizer(self, name: str) -> None:
        if self.tokenizer is None:
            raise RequestError(
                f"{name} needs a tokenizer and skip_tokenizer_init=True. Load it, or leave out "
                f"{name}."
            )

    def _num_logprobs(self, params: SamplingParams) -> int | None:
        if params.logprob_token_ids:
            return 0  # the named tokens are returned in place of the likeliest
        return None if params.logprobs is None else self._count(params.logprobs)

    def _count(self, asked: int) -> int:
        return self.vocab_size if asked == -1 else min(asked, self.vocab_size)


def _first(items: Iterable[int]) -> int | None:
    return next(iter(items), None)
