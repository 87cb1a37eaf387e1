"""The host's nouns: a sequence of tokens being generated, and the plan of a step."""

import dataclasses
from dataclasses import dataclass, field

from jaxllm.logit_rules import NO_RULES, LogitRules
from jaxllm.sampling_params import SamplingParams
from jaxllm.scoring import SampledLogprob, Scoring
from jaxllm.text_stream import TextStream

MAX_STOP_IDS = 8
"""Stop tokens a row can carry into a decode loop; with more, it runs one step a launch."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of tokens. The scheduler alone changes what is below `output_token_ids`."""

    request_id: str
    index: int
    """Which completion of its request."""

    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """Of its random numbers; 64 bits."""

    arrival: int
    """Counts requests up; the older is never preempted for the younger."""

    eos_token_id: int | None = None
    """The tokenizer's end of a sequence: ends it unless `ignore_eos`, and is no stop reason."""

    eos_token_ids: tuple[int, ...] = ()
    """All tokens that end it unless `ignore_eos`: the tokenizer's and the configs'."""

    cache_salt: str | None = None
    """Separates prefix-cache domains."""

    rules: LogitRules = NO_RULES
    """What is done to its logits."""

    text: TextStream | None = None
    """Its text as it grows, where stop strings or a stream need it."""

    scoring: Scoring | None = None
    """Tokens of the prompt to score, if any."""

    generates: bool = True
    """Whether tokens are to be sampled; a sequence that is only scored ends with its prompt."""

    num_logprobs: int | None = None
    """Likeliest alternatives to return for each output; None: no log-probabilities."""

    reads_prefix_cache: bool = True
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledLogprob] = field(default_factory=list)
    """One for each output, where they were asked for."""

    pages: list[int] = field(default_factory=list)
    """In order; this sequence holds one reference to each."""

    num_computed: int = 0
    """Tokens whose keys and values are in the cache, once the launches in flight are done."""

    num_expected: int = 0
    """Tokens that launches in flight will bring, unless one of them ends it."""

    num_in_flight: int = 0
    """Launches that compute it and whose results are not known yet."""

    num_cached: int = 0
    """Tokens found in the prefix cache when it was first admitted."""

    row: int = -1
    """Its row of the device state while it runs; -1 while it waits."""

    prefix_node: int = 0
    """The prefix cache's name for its last full page; 0 before the first."""

    num_registered: int = 0
    """Full pages it has given to, or taken from, the prefix cache."""

    is_counted: bool = False
    """Whether the device holds the counts of its tokens, which penalties follow."""

    num_preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens known or expected, and not yet computed; 1 for a sequence that decodes."""
        return self.num_tokens + self.num_expected - self.num_computed

    @property
    def is_finished(self) -> bool:
        """Whether it will generate no more."""
        return self.finish_reason is not None

    def tokens(self, start: int, stop: int) -> list[int]:
        """Returns tokens [start, stop) of prompt and output together."""
        split = len(self.prompt_token_ids)
        if stop <= split:
            return self.prompt_token_ids[start:stop]
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - split]

    def stop_ids(self) -> tuple[int, ...]:
        """Returns every token that ends it."""
        eos = () if self.params.ignore_eos else self.eos_token_ids
        return tuple(dict.fromkeys((*eos, *self.params.stop_token_ids)))

    def needs_host(self) -> bool:
        """Whether the host must see each token before the next: to stop, to rule, to show it."""
        return (
            self.text is not None
            or self.rules.needs_host
            or self.params.repetition_detection is not None
            or len(self.stop_ids()) > MAX_STOP_IDS
        )

    def cacheable(self) -> int:
        """Returns how many of its tokens may be taken from the prefix cache."""
        if not self.reads_prefix_cache:
            return 0
        return self.num_tokens if self.scoring is None else self.scoring.start

    def remaining(self, max_model_len: int) -> int:
        """Returns how many tokens it may generate beyond those that are known."""
        if not self.generates:
            return 0
        room = max_model_len - self.num_tokens
        if self.params.max_tokens is None:
            return room
        return min(room, self.params.max_tokens - len(self.output_token_ids))


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One sequence's share of a step."""

    seq: Sequence
    start: int
    """Position of the first token of it that this step computes."""

    num_tokens: int
    """Tokens that it computes. The last one known may be on the device alone."""

    limit: int
    """Tokens that may come out; 0 where these are not its last, or none is to be sampled."""

    @property
    def samples(self) -> bool:
        """Whether a token comes out."""
        return self.limit > 0

    @property
    def stop(self) -> int:
        """One past the position of the last token that it computes, look-ahead apart."""
        return self.start + self.num_tokens

    def scored(self) -> range:
        """Returns the positions of this step whose next token is scored."""
        scoring = self.seq.scoring
        if scoring is None:
            return range(0)
        stop = min(self.stop, len(scoring.targets))
        return range(max(self.start, scoring.start), max(stop, self.start, scoring.start))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one launch of the model will do."""

    rows: tuple[PlannedRow, ...]
    """Rows with one token first, then chunks."""

    num_decodes: int
    """How many rows have one token."""

    lookahead: int = 1
    """Tokens that a row may generate in this launch (N)."""

    needs_sync: bool = False
    """Whether the next step cannot be planned before the results of this one are known."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed, over all rows."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def chunks(self) -> tuple[PlannedRow, ...]:
        """Rows with more than one token."""
        return self.rows[self.num_decodes :]


@dataclass(slots=True, eq=False)
class Request:
    """What a caller asked for, and the sequences that answer it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    error: Exception | None = None
    """Why it could not be run, or not to its end."""

    @property
    def is_finished(self) -> bool:
        """Whether all its sequences are."""
        return all(seq.is_finished for seq in self.sequences)
