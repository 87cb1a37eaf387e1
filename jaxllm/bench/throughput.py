"""Many prompts at once: how much gets done."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.bench.report import Chart
from jaxllm.bench.setting import Setting, counted, engine_rows, loaded, setting_of
from jaxllm.bench.summary import Summary, number, summary
from jaxllm.bench.trace import Trace, run
from jaxllm.bench.workload import Sizes, Workload, at_least


@dataclass(frozen=True, slots=True, repr=False)
class ThroughputResult:
    """What one call over all prompts took."""

    setting: Setting
    workload: Workload
    trace: Trace

    @property
    def requests_per_second(self) -> float:
        """Prompts that were finished."""
        return len(self.workload) / self.trace.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of prompts and outputs together."""
        total = self.workload.num_input_tokens + self.workload.num_output_tokens
        return total / self.trace.seconds

    @property
    def output_tokens_per_second(self) -> float:
        """Tokens that were generated."""
        return self.workload.num_output_tokens / self.trace.seconds

    @property
    def first_token(self) -> Summary:
        """Seconds from the call to the first token of each prompt, its wait included."""
        return summary(self.trace.first_token)

    @property
    def time_per_token(self) -> Summary:
        """Seconds from each token to the next, of each prompt."""
        return summary(self.trace.time_per_token)

    @property
    def roofline_share(self) -> float:
        """The least time that the machine needs, as a share of the time it took."""
        return self.setting.roofline_share(self.workload, self.trace.seconds)

    def rows(self) -> list[tuple[str, str]]:
        """Returns the lines of the table."""
        work, trace = self.workload, self.trace
        lens = f"{work.num_input_tokens:,} tokens in, {work.num_output_tokens:,} out"
        return [
            *self.setting.rows(),
            ("work", f"{len(work)} prompts, {lens}; {number(trace.seconds)} s"),
            ("requests/s", number(self.requests_per_second)),
            ("tokens/s", number(self.tokens_per_second)),
            ("output tokens/s", number(self.output_tokens_per_second)),
            ("time to first token, ms", str(self.first_token.scaled(1e3))),
            ("time per output token, ms", str(self.time_per_token.scaled(1e3))),
            ("roofline", f"{self.roofline_share:.1%} of what the machine allows"),
            *engine_rows([trace]),
        ]

    def to_json(self) -> dict[str, Any]:
        """Returns every figure; the first five are what `vllm bench throughput` writes."""
        work = self.workload
        return {
            "elapsed_time": self.trace.seconds,
            "num_requests": len(work),
            "total_num_tokens": work.num_input_tokens + work.num_output_tokens,
            "requests_per_second": self.requests_per_second,
            "tokens_per_second": self.tokens_per_second,
            "output_tokens_per_second": self.output_tokens_per_second,
            "num_input_tokens": work.num_input_tokens,
            "num_output_tokens": work.num_output_tokens,
            "first_token_seconds": self.first_token.to_json(),
            "seconds_per_output_token": self.time_per_token.to_json(),
            "roofline_share": self.roofline_share,
            "engine": self.trace.counts.to_json(),
            **self.setting.to_json(),
        }

    def chart(self) -> Chart:
        """Returns how many prompts have a first token, and how many are done, over time."""
        times = {"has its first token": self.trace.first_token, "is done": self.trace.finished}
        return Chart(
            f"{self.setting.model}, {self.setting.dtype}, {len(self.workload)} prompts",
            "seconds since the call",
            "prompts",
            {
                name: [(0.0, 0.0), *((time, i) for i, time in enumerate(sorted(values), 1))]
                for name, values in times.items()
            },
        )

    def __repr__(self) -> str:
        """The figure that matters, and of what."""
        return (
            f"ThroughputResult({self.setting.model!r}, {self.setting.dtype}, "
            f"{len(self.workload)} prompts, {self.output_tokens_per_second:.3g} output tokens/s)"
        )


def measure_throughput(
    model: str,
    *,
    num_prompts: int = 64,
    input_len: int = 128,
    output_len: int = 64,
    range_ratio: float = 0.0,
    num_warmups: int = 1,
    llm_options: Mapping[str, Any] | None = None,
) -> ThroughputResult:
    """Runs many prompts in one call.

    Args:
        model: A name in `SHAPES`, a folder with a config.json, or a hub id.
        num_prompts: Prompts.
        input_len: Tokens of a prompt, in the middle.
        output_len: Tokens to generate for each, in the middle.
        range_ratio: Lengths are uniform from `1 - range_ratio` to `1 + range_ratio` times that.
        num_warmups: Calls before, with other prompts of the same lengths; the first compiles.
        llm_options: As for `measure_latency`.

    Raises:
        ConfigError: A number makes no sense, or the model does not fit.
    """
    count = at_least("num-prompts", num_prompts, 1)
    sizes = Sizes(count, input_len, output_len, range_ratio)
    at_least("num-warmups", num_warmups, 0)
    options = {"max_model_len": sizes.longest, **(llm_options or {})}
    with loaded(model, options) as llm:
        vocab_size = llm._plan.config.vocab_size
        for i in counted(num_warmups, "Warm-up"):
            run(llm, sizes.draw(vocab_size, seed=1 + i))
        workload = sizes.draw(vocab_size, seed=0)
        trace = run(llm, workload)
    return ThroughputResult(setting_of(model, llm), workload, trace)
