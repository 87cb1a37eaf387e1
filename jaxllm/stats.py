"""What an engine has done so far, as one value to print, to compare and to index."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxllm.engine import Engine


@dataclass(frozen=True, slots=True, eq=False)
class Stats(Mapping[str, Any]):
    """Counts since the start. `stats.num_steps` and `stats["num_steps"]` are the same."""

    num_steps: int
    num_tokens: int
    """Tokens computed, prefill and decode."""

    num_padded_tokens: int
    """Tokens of the programs' shapes that were padding."""

    num_ahead: int
    """Steps that were launched before the results of the step before were known."""

    host_seconds: float
    """On the host: planning, packing, applying; beside the device where steps overlap."""

    step_seconds: float
    """Launching, and waiting for results; compilation in the step counts."""

    compile_seconds: Mapping[str, float]
    """Tracing and compiling, by program, in the order in which they were done."""

    num_programs: int
    """Programs compiled, or loaded from the compile cache."""

    program_hits: int
    """Steps that found their program compiled."""

    program_misses: int
    """Steps that waited for their program."""

    program_stand_ins: int
    """Steps that a larger program served while theirs was being compiled."""

    compile_cache_hits: int
    """Programs that came out of the persistent cache."""

    compile_cache_misses: int
    """Programs that the persistent cache had not."""

    num_preemptions: int
    prefix_tokens_queried: int
    prefix_tokens_hit: int
    """Tokens of prompts whose keys and values were in the cache."""

    num_pages: int
    num_pages_held: int
    """Pages in use by unfinished requests."""

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return any(field.name == name for field in fields(self))

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def __repr__(self) -> str:
        """Lines of a name and a value."""
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {_text(value)}" for name, value in self.items())


def stats_of(engines: Sequence[Engine]) -> Stats:
    """Returns what engines have done so far, summed over them."""
    found = [_stats(engine) for engine in engines]
    compiled = {name: took for one in found for name, took in one.compile_seconds.items()}
    names = [name for name in found[0] if name != "compile_seconds"]
    return Stats(
        **{name: sum(one[name] for one in found) for name in names}, compile_seconds=compiled
    )


def _stats(engine: Engine) -> Stats:
    scheduler, counted, programs = engine.scheduler, engine.stats, engine.runner.programs
    return Stats(
        num_steps=counted.num_steps,
        num_tokens=counted.num_tokens,
        num_padded_tokens=counted.num_padded_tokens,
        num_ahead=counted.num_ahead,
        host_seconds=counted.host_seconds,
        step_seconds=counted.step_seconds,
        compile_seconds={str(key): seconds for key, seconds in list(programs.seconds.items())},
        num_programs=len(programs),
        program_hits=programs.counts.num_hits,
        program_misses=programs.counts.num_misses,
        program_stand_ins=programs.counts.num_stand_ins,
        compile_cache_hits=programs.counts.num_disk_hits,
        compile_cache_misses=programs.counts.num_disk_misses,
        num_preemptions=scheduler.num_preemptions,
        prefix_tokens_queried=scheduler.prefixes.num_queried,
        prefix_tokens_hit=scheduler.prefixes.num_hit,
        num_pages=scheduler.num_pages - 1,
        num_pages_held=scheduler.num_pages_held,
    )


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{sum(value.values()):.2f} in {len(value)}"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
