"""What was measured on what: the same for every benchmark of one loaded model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from tqdm.auto import tqdm

from jaxllm.bench.roofline import ModelWork, model_work
from jaxllm.bench.shapes import model_folder
from jaxllm.bench.trace import Trace
from jaxllm.bench.workload import Workload
from jaxllm.llm import LLM
from jaxllm.logs import shows_progress
from jaxllm.machine import Machine, measure_machine


@dataclass(frozen=True, slots=True)
class Setting:
    """A model on a machine."""

    model: str
    dtype: str
    work: ModelWork
    machine: Machine

    def roofline_share(self, workload: Workload, seconds: float) -> float:
        """Returns the least time that this machine needs, as a share of the time it took."""
        return self.work.floor_seconds(workload, self.machine) / seconds

    def rows(self) -> list[tuple[str, str]]:
        """Returns the lines of the table that say what was measured."""
        return [("model", f"{self.model}, {self.dtype}"), ("machine", str(self.machine))]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields."""
        machine = self.machine.to_json()
        return {
            "model": self.model,
            "dtype": self.dtype,
            "jax": jax.__version__,
            "machine": machine,
        }


@contextmanager
def loaded(model: str, llm_options: Mapping[str, Any]) -> Iterator[LLM]:
    """A model with random weights, unless the options say otherwise.

    Args:
        model: A name in `SHAPES`, a folder with a config.json, or a hub id.
        llm_options: Keywords of `LLM`.
    """
    given = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False}
    with model_folder(model) as folder, LLM(folder, **(given | dict(llm_options))) as llm:
        yield llm


def setting_of(model: str, closed: LLM) -> Setting:
    """Returns what was measured, and measures the machine.

    Args:
        model: Its name for a reader.
        closed: The model after its work: its memory is needed.
    """
    plan = closed._plan
    machine = measure_machine(plan.engine.dtype, num_devices=len(plan.devices))
    return Setting(model, plan.engine.dtype, model_work(plan), machine)


def counted(num: int, what: str) -> Iterable[int]:
    """Returns `range(num)`, with a progress bar where one is wanted."""
    return tqdm(range(num), desc=what, leave=False, disable=not shows_progress())


def engine_rows(traces: list[Trace]) -> list[tuple[str, str]]:
    """Returns the lines of the table that the engine's own counts give."""
    steps = sum(t.counts.num_steps for t in traces)
    ahead = sum(t.counts.num_ahead for t in traces)
    host = sum(t.counts.host_seconds for t in traces)
    tokens = sum(t.counts.num_tokens for t in traces)
    padded = sum(t.counts.num_padded_tokens for t in traces)
    compiled = sum(t.counts.num_compiled for t in traces)
    rows = [
        ("steps", f"{steps:,}, of which {ahead:,} were launched ahead"),
        ("host, ms a step", f"{1e3 * host / max(1, steps):.3f}"),
        ("padding waste", f"{padded / max(1, tokens + padded):.1%} of the programs' tokens"),
    ]
    if compiled:
        seconds = sum(t.counts.compile_seconds for t in traces)
        note = f"{compiled} programs, {seconds:.1f} s, counted above: warm up more"
        rows.append(("compiled meanwhile", note))
    return rows
