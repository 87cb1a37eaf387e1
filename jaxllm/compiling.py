"""The real programs of a plan, compiled for its devices, and what is counted in them.

For a GPU that is not here this happens in a process of its own: the compiler can end the
process that it runs in, and needs JAX_PLATFORMS=cpu in its environment from the start.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

import jax

from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.flops import flops
from jaxllm.hardware import Hardware
from jaxllm.hlo import Array, Module
from jaxllm.inspection import Wanted, inspect_program
from jaxllm.modeling.abstract import abstract_model
from jaxllm.planner import Planner
from jaxllm.program_report import Collective
from jaxllm.programs import ProgramBuilder
from jaxllm.roofline import EngineShape, Roofline, Work, roofline, sent_bytes
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.gpu_topology import gpu_devices
from jaxllm.sharding.layouts import Layout
from jaxllm.sharding.mesh import make_mesh

LAYER = "_run_layer"
"""What the paths of a layer's instructions hold."""

MODEL = (LAYER, "_take", "dot_general", "/mul")
"""What the paths of the model's transfers hold: layers, embedding, head, the last gather."""

SAMPLED_NUMBERS = 8
"""Numbers a row and device that sampling may exchange; more is no longer a token's."""

WORKER = ["-c", "from jaxllm.compiling import serve; serve()"]
"""What Python is given to compile in a process of its own."""

MARK = "jaxllm-compiled "
"""How a line of the worker begins that is an answer."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Equal transfers of a step."""

    opcode: str
    array: str
    """What one device has afterwards, in the type that a GPU would send."""

    devices: int
    count: int
    """In a step."""

    in_layers: bool
    link_bytes: float
    """That a device sends, over all `count`."""


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled program, in figures of one step of one device."""

    kind: str
    """"decode" or "prefill"."""

    name: str
    """With its sizes, which are padded to a bucket."""

    tokens: int
    """That it computes, padding included."""

    seconds: float
    """Tracing and compiling."""

    temp_bytes: int
    temp_bound: int
    flops: float
    memory_bytes: float
    sent: tuple[Sent, ...]
    num_layers: int
    textbook: tuple[tuple[str, int], ...]
    """By opcode, how many transfers of a step the layout's rules ask for."""

    def counts(self, *, in_layers: bool | None = None) -> dict[str, int]:
        """Returns transfers of a step by opcode."""
        found: Counter[str] = Counter()
        for one in self.sent:
            if in_layers is None or one.in_layers == in_layers:
                found[one.opcode] += one.count
        return dict(found)

    @property
    def excess(self) -> dict[str, int]:
        """By opcode, transfers of a step beyond the textbook's."""
        asked = dict(self.textbook)
        over = {name: count - asked.get(name, 0) for name, count in self.counts().items()}
        return {name: count for name, count in over.items() if count > 0}

    @property
    def work(self) -> Work:
        """What a step does."""
        link = sum(one.link_bytes for one in self.sent)
        return Work(self.flops, self.memory_bytes, link, sum(one.count for one in self.sent))

    def roofline(self, hardware: Hardware, dtype: str) -> Roofline:
        """Returns the least time of what was compiled."""
        return roofline(self.work, hardware, dtype)

    @classmethod
    def of_dict(cls, given: Mapping[str, Any]) -> "Program":
        """Returns the program of `dataclasses.asdict`, or of JSON of it."""
        sent = tuple(Sent(**one) for one in given["sent"])
        textbook = tuple((name, count) for name, count in given["textbook"])
        return cls(**{**given, "sent": sent, "textbook": textbook})


def compile_here(planner: Planner, layout: Layout, batch: int, context: int) -> list[Program]:
    """Compiles the two programs that serve a batch, in this process.

    Args:
        planner: Of the model.
        layout: Of all engines; one of them is compiled.
        batch: Sequences of one engine.
        context: Tokens of each.

    Raises:
        ConfigError: The devices cannot be had, or the model does not fit on them.
    """
    shaped = planner.shaped(layout)
    shape, hardware = shaped.shape, planner.hardware
    count = shape.layout.num_devices
    if hardware.platform == "cpu":
        devices = jax.devices("cpu")
    elif hardware.target is None:
        raise ConfigError(
            f"hardware {hardware.name!r} names no target, so nothing can be compiled for it. "
            "Add 'target': 'h200', say: the card whose instructions it has."
        )
    else:
        devices = gpu_devices(hardware.target, count)
    sharder = Sharder(shape.layout, make_mesh(shape.layout, devices))
    model = abstract_model(shape.config, shaped.build, shape.engine.dtype, sharder)
    try:
        num_pages = planner.memory(shape, layout.num_replicas).num_pages
    except ConfigError:  # the plan says so; the programs of a cache that would fit are the same
        num_pages = 2 + shape.engine.pages_per_seq
    builder = ProgramBuilder(model, shape.engine, sharder, num_pages)
    tokens = min(batch * context, shape.engine.max_num_batched_tokens)
    prefill = Wanted(program="prefill", batch=batch, tokens=tokens, context=context)
    decode = Wanted(program="decode", batch=batch, context=context)
    return [_compiled(builder, shape, wanted) for wanted in (prefill, decode)]


def _compiled(builder: ProgramBuilder, shape: EngineShape, wanted: Wanted) -> Program:
    found = inspect_program(builder, shape.config, "", wanted)
    steps, bucket = found.key.steps, found.key.bucket
    on_cpu = builder.sharder.mesh.devices.flat[0].platform == "cpu"
    sent: Counter[Sent] = Counter()
    few = bucket.rows * shape.layout.num_devices * SAMPLED_NUMBERS
    for one in found.report.collectives:
        if not _is_of_sampling(one, few):
            sent[_sent(one, shape, on_cpu=on_cpu)] += one.runs
    textbook: Counter[str] = Counter()
    for transfer in shape.transfers():
        if transfer.where != "sampler":
            textbook[transfer.opcode] += transfer.count
    return Program(
        kind=wanted.program,
        name=str(found.key),
        tokens=bucket.tokens,
        seconds=found.compile_seconds,
        temp_bytes=found.temp_bytes,
        temp_bound=found.temp_bound,
        flops=flops(Module(found.hlo)) / steps,
        memory_bytes=found.bytes_accessed,
        sent=tuple(
            replace(one, count=count // steps, link_bytes=one.link_bytes * count / steps)
            for one, count in sent.items()
        ),
        num_layers=shape.config.num_layers,
        textbook=tuple(textbook.items()),
    )


def _is_of_sampling(one: Collective, few: int) -> bool:
    """Whether a transfer is of a few numbers a row, and none of the model's own."""
    numbers = sum(array.size for array in one.arrays)
    return numbers <= few and not any(part in one.source for part in MODEL) and bool(one.source)


def _sent(one: Collective, shape: EngineShape, *, on_cpu: bool) -> Sent:
    """Returns a transfer as a GPU would do it."""
    arrays = one.arrays
    if on_cpu:
        arrays = tuple(_narrowed(array, one.source, shape) for array in arrays)
    devices = one.devices or shape.layout.num_devices
    size = sum(array.num_bytes for array in arrays)
    if one.opcode == "reduce-scatter":
        size *= devices  # what it has afterwards is its share
    return Sent(
        opcode=one.opcode,
        array=", ".join(map(str, arrays)),
        devices=devices,
        count=0,
        # XLA:GPU makes a reduce-scatter of a sum without saying which.
        in_layers=LAYER in one.source or not one.source,
        link_bytes=sent_bytes(one.opcode, size, devices),
    )


def _narrowed(array: Array, source: str, shape: EngineShape) -> Array:
    """Returns the array in the type that it has before XLA:CPU widens it.

    XLA:CPU multiplies and sums 16-bit numbers as float32, and prints that. What is float32 by
    design is a norm's sum, a number a token, and what a bias is still to be added to.
    """
    config, dtype = shape.config, shape.engine.dtype
    is_stream = LAYER in source or "_take" in source or source.endswith("/mul")
    has_biases = config.o_bias or config.mlp_bias
    if dtype == "float32" or array.dtype != "f32" or not is_stream or len(array.shape) < 2:
        return array
    if has_biases and source.endswith("dot_general"):
        return array
    return replace(array, dtype={"bfloat16": "bf16", "float16": "f16"}[dtype])


class Compiler:
    """Compiles for a planner's devices: here for a CPU, else in a process of its own.

    The process is started when it is needed, serves several layouts, and is started anew
    where the compiler ended it.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._process: subprocess.Popen[str] | None = None

    def programs(self, layout: Layout, batch: int, context: int) -> list[Program]:
        """Returns what `compile_here` does.

        Raises:
            ConfigError: As there; or the compiler ended its process, with its last words.
        """
        if self._planner.hardware.platform == "cpu":
            return compile_here(self._planner, layout, batch, context)
        job = {
            "planner": self._planner.to_dict(),
            "layout": layout.to_dict(),
            "batch": batch,
            "context": context,
        }
        answer = json.loads(self._ask(json.dumps(job)))
        if "error" in answer:
            raise ConfigError(answer["error"])
        return [Program.of_dict(one) for one in answer["programs"]]

    def _ask(self, job: str) -> str:
        if self._process is not None and self._process.poll() is not None:
            self._close()
        process = self._process
        if process is None:
            process = self._process = subprocess.Popen(
                [sys.executable, *WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                # Flags for this process's devices are none of a process that has no device.
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            )
        if process.stdin is None or process.stdout is None:
            raise AssertionError("the process was started with pipes")
        said: list[str] = []
        try:
            process.stdin.write(job + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(MARK):
                    return line.removeprefix(MARK)
                said = [*said[-20:], line.rstrip()]
        except BrokenPipeError:
            pass
        status = process.wait()
        self._close()
        last = " | ".join(line for line in said[-3:] if line)
        raise ConfigError(f"The compiler ended its process (exit status {status}). It said: {last}")

    def _close(self) -> None:
        """Ends the process, if there is one, and closes its pipes."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


def serve() -> None:
    """Reads jobs from stdin, a line each, and writes an answer a line."""
    for line in sys.stdin:
        job = json.loads(line)
        try:
            planner, layout = Planner.of_dict(job["planner"]), Layout.from_dict(job["layout"])
            programs = compile_here(planner, layout, job["batch"], job["context"])
            answer = {"programs": [asdict(program) for program in programs]}
        except (JaxLLMError, jax.errors.JaxRuntimeError) as error:
            answer = {"error": str(error)}
        sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
        sys.stdout.flush()
