"""One batch of prompts, again and again: how long a user waits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.bench.report import Chart
from jaxllm.bench.setting import Setting, counted, engine_rows, loaded, setting_of
from jaxllm.bench.summary import Summary, number, summary
from jaxllm.bench.trace import Trace, run
from jaxllm.bench.workload import Sizes, Workload, at_least


@dataclass(frozen=True, slots=True, repr=False)
class LatencyResult:
    """What each iteration took."""

    setting: Setting
    workload: Workload
    """Of an iteration; each has prompts of its own, of the same lengths."""

    traces: tuple[Trace, ...]

    @property
    def latencies(self) -> Summary:
        """Seconds from the call to the last token of the batch."""
        return summary([trace.seconds for trace in self.traces])

    @property
    def first_token(self) -> Summary:
        """Seconds to the first token, of every request."""
        return summary([time for trace in self.traces for time in trace.first_token])

    @property
    def time_per_token(self) -> Summary:
        """Seconds from each token to the next, of every request."""
        return summary([time for trace in self.traces for time in trace.time_per_token])

    @property
    def output_tokens_per_second(self) -> float:
        """Of the whole batch, prompts included in the time."""
        return self.workload.num_output_tokens / self.latencies.mean

    @property
    def roofline_share(self) -> float:
        """The least time that the machine needs for a batch, as a share of the median latency."""
        return self.setting.roofline_share(self.workload, self.latencies.percentile(50))

    def rows(self) -> list[tuple[str, str]]:
        """Returns the lines of the table."""
        lens = f"{self.workload.input_lens[0]} tokens in, {self.workload.output_lens[0]} out"
        return [
            *self.setting.rows(),
            ("batch", f"{len(self.workload)} prompts, {lens}; {len(self.traces)} iterations"),
            ("latency, s", str(self.latencies)),
            ("time to first token, ms", str(self.first_token.scaled(1e3))),
            ("time per output token, ms", str(self.time_per_token.scaled(1e3))),
            ("output tokens/s", number(self.output_tokens_per_second)),
            ("roofline", f"{self.roofline_share:.1%} of what the machine allows"),
            *engine_rows(list(self.traces)),
        ]

    def to_json(self) -> dict[str, Any]:
        """Returns every figure; the first three are what `vllm bench latency` writes."""
        return {
            "avg_latency": self.latencies.mean,
            "latencies": list(self.latencies.values),
            "percentiles": self.latencies.percentiles,
            "first_token_seconds": self.first_token.to_json(),
            "seconds_per_output_token": self.time_per_token.to_json(),
            "output_tokens_per_second": self.output_tokens_per_second,
            "roofline_share": self.roofline_share,
            "batch_size": len(self.workload),
            "input_len": self.workload.input_lens[0],
            "output_len": self.workload.output_lens[0],
            "iterations": [trace.counts.to_json() for trace in self.traces],
            **self.setting.to_json(),
        }

    def chart(self) -> Chart:
        """Returns latency and time to first token of each iteration."""
        last = [max(trace.first_token) for trace in self.traces]
        lines = {"last token": self.latencies.values, "first token of every prompt": last}
        return Chart(
            f"{self.setting.model}, {self.setting.dtype}, batch of {len(self.workload)}",
            "iteration",
            "seconds since the call",
            {name: list(enumerate(values, 1)) for name, values in lines.items()},
        )

    def __repr__(self) -> str:
        """The figure that matters, and of what."""
        return (
            f"LatencyResult({self.setting.model!r}, {self.setting.dtype}, "
            f"batch of {len(self.workload)}, p50 {self.latencies.percentile(50):.3g} s, "
            f"{self.output_tokens_per_second:.3g} output tokens/s)"
        )


def measure_latency(
    model: str,
    *,
    input_len: int = 32,
    output_len: int = 128,
    batch_size: int = 8,
    num_iters: int = 10,
    num_iters_warmup: int = 2,
    llm_options: Mapping[str, Any] | None = None,
) -> LatencyResult:
    """Runs one batch again and again.

    Args:
        model: A name in `SHAPES`, a folder with a config.json, or a hub id.
        input_len: Tokens of each prompt.
        output_len: Tokens to generate for each.
        batch_size: Prompts.
        num_iters: Measured iterations, each with other prompts.
        num_iters_warmup: Iterations before; the first compiles.
        llm_options: Keywords of `LLM`; by default random weights, no tokenizer and no
            prefix cache, and room for these lengths.

    Raises:
        ConfigError: A number makes no sense, or the model does not fit.
    """
    sizes = Sizes(at_least("batch-size", batch_size, 1), input_len, output_len)
    at_least("num-iters", num_iters, 1)
    at_least("num-iters-warmup", num_iters_warmup, 0)
    options = {"max_model_len": sizes.longest, **(llm_options or {})}
    with loaded(model, options) as llm:
        vocab_size = llm._plan.config.vocab_size
        for i in counted(num_iters_warmup, "Warm-up"):
            run(llm, sizes.draw(vocab_size, seed=num_iters + i))
        workloads = [sizes.draw(vocab_size, seed) for seed in range(num_iters)]
        traces = tuple(run(llm, workloads[i]) for i in counted(num_iters, "Iterations"))
    return LatencyResult(setting_of(model, llm), workloads[0], traces)
