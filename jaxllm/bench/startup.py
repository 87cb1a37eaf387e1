"""From nothing to a first token, in processes of their own: imports, constructor, first token.

Cold: the caches of compiled programs are empty. Warm: they are as the last cold start
left them. Files of the operating system's cache are warm in both.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxllm.bench.report import Chart
from jaxllm.bench.setting import counted
from jaxllm.bench.shapes import model_folder
from jaxllm.bench.summary import Summary, summary
from jaxllm.bench.workload import Sizes, at_least
from jaxllm.errors import ConfigError, JaxLLMError

CHILD = "jaxllm.bench.startup_child"


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds of one process."""

    imports: float
    """From its birth until jaxllm is imported."""

    construct: float
    """Of `LLM(...)`."""

    first_token: float
    """Of the first call, compilation included."""

    compile: float
    """Of that, making programs or reading them from the cache."""

    @property
    def total(self) -> float:
        """From birth to first token."""
        return self.imports + self.construct + self.first_token

    def to_json(self) -> dict[str, float]:
        """Returns the fields, and their sum."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "total": self.total
        }


@dataclass(frozen=True, slots=True, repr=False)
class StartupResult:
    """Starts of a model, by kind."""

    model: str
    input_len: int
    cold: tuple[Startup, ...]
    warm: tuple[Startup, ...]

    def by_kind(self) -> dict[str, tuple[Startup, ...]]:
        """Returns the starts that there are, under `cold` and `warm`."""
        return {name: runs for name in ("cold", "warm") if (runs := getattr(self, name))}

    def rows(self) -> list[tuple[str, str]]:
        """Returns the lines of the table."""
        rows = [("model", self.model), ("prompt", f"{self.input_len} tokens")]
        for kind, runs in self.by_kind().items():
            rows.append((f"{kind}, s to first token", str(_of(runs, "total"))))
            for name in ("imports", "construct", "first_token", "compile"):
                word = {"first_token": "first call", "compile": "of it compiling"}.get(name, name)
                rows.append((f"  {word}", str(_of(runs, name))))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Returns every figure, under the names that `vllm bench startup` has."""
        found: dict[str, Any] = {"model": self.model, "input_len": self.input_len}
        for kind, runs in self.by_kind().items():
            total, compiling = _of(runs, "total"), _of(runs, "compile")
            found |= {
                f"avg_{kind}_startup_time": total.mean,
                f"{kind}_startup_times": list(total.values),
                f"{kind}_startup_percentiles": total.percentiles,
                f"avg_{kind}_compilation_time": compiling.mean,
                f"{kind}_compilation_times": list(compiling.values),
                f"{kind}_compilation_percentiles": compiling.percentiles,
                f"{kind}_starts": [run.to_json() for run in runs],
            }
        return found

    def chart(self) -> Chart:
        """Returns the seconds of each start."""
        return Chart(
            f"{self.model}, birth of the process to first token",
            "start",
            "seconds",
            {
                kind: [(i, run.total) for i, run in enumerate(runs, 1)]
                for kind, runs in self.by_kind().items()
            },
        )

    def __repr__(self) -> str:
        """The medians, and of what."""
        medians = (
            f"{kind} {_of(runs, 'total').percentile(50):.3g} s"
            for kind, runs in self.by_kind().items()
        )
        return f"StartupResult({self.model!r}, {', '.join(medians)})"


def _of(runs: tuple[Startup, ...], name: str) -> Summary:
    return summary([getattr(run, name) for run in runs])


def measure_startup(
    model: str,
    *,
    input_len: int = 32,
    num_iters_cold: int = 3,
    num_iters_warmup: int = 0,
    num_iters_warm: int = 3,
    llm_options: Mapping[str, Any] | None = None,
) -> StartupResult:
    """Starts a process again and again, first with empty caches and then with full ones.

    Args:
        model: A name in `SHAPES`, a folder with a config.json, or a hub id.
        input_len: Tokens of the prompt.
        num_iters_cold: Starts with empty caches of compiled programs.
        num_iters_warmup: Starts that fill the caches, not measured; needed only where there
            is no cold one.
        num_iters_warm: Starts with full caches.
        llm_options: Keywords of `LLM`; by default random weights and no tokenizer.

    Raises:
        ConfigError: A number makes no sense, or the model does not fit.
        JaxLLMError: A process ended without a result.
    """
    at_least("num-iters-cold", num_iters_cold, 0)
    at_least("num-iters-warmup", num_iters_warmup, 0)
    at_least("num-iters-warm", num_iters_warm, 0)
    if num_iters_cold + num_iters_warm == 0:
        raise ConfigError(
            "--num-iters-cold 0 and --num-iters-warm 0 leave nothing to measure. Give 1 or more "
            "of one of them."
        )
    if num_iters_warm and not num_iters_cold + num_iters_warmup:
        raise ConfigError(
            f"--num-iters-warm {num_iters_warm} has no start before it that fills the caches. "
            "Give --num-iters-warmup 1."
        )
    sizes = Sizes(1, input_len, output_len=1)
    given = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": sizes.longest,
        **(llm_options or {}),
    }
    with model_folder(model) as folder, tempfile.TemporaryDirectory() as caches:
        spec = {"model": folder, "llm_options": given, "input_len": input_len}

        def start(cache: str) -> Startup:
            return _start(spec, Path(caches) / cache)

        cold = tuple(start(f"cold{i}") for i in counted(num_iters_cold, "Cold starts"))
        full = f"cold{num_iters_cold - 1}" if cold else "warm"
        for _ in counted(num_iters_warmup, "Warm-up"):
            start(full)
        warm = tuple(start(full) for _ in counted(num_iters_warm, "Warm starts"))
    return StartupResult(model, input_len, cold, warm)


def _start(spec: dict[str, Any], cache: Path) -> Startup:
    """Runs one process; its compiled programs come from a folder and go there."""
    cache.mkdir(exist_ok=True)
    env = {**os.environ, "JAXLLM_CACHE_ROOT": str(cache)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would be used in place of ours
    born = time.time()
    command = [sys.executable, "-m", CHILD, json.dumps({**spec, "born": born})]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        tail = done.stderr.strip()[-2000:]
        raise JaxLLMError(
            f"A process that was to start {spec['model']!r} ended with status {done.returncode} "
            f"and no result. Its last words: {tail}"
        ) from None
    if "error" in said:
        raise ConfigError(said["error"])
    return Startup(**said)
