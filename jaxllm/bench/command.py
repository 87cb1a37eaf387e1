"""`jaxllm bench`: its grammar, in the words of `vllm bench`, and what runs it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxllm.bench.latency import measure_latency
from jaxllm.bench.report import Result, check_files, table, write_json, write_plot
from jaxllm.bench.shapes import SHAPES
from jaxllm.bench.startup import measure_startup
from jaxllm.bench.throughput import measure_throughput


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a command line."""

    names: tuple[str, ...]
    kind: Callable[[str], Any]
    default: Any
    help: str

    @property
    def key(self) -> str:
        """The keyword that it becomes: its first name."""
        return self.names[0].removeprefix("--").replace("-", "_")


def _option(names: str, kind: Callable[[str], Any], default: Any, help: str) -> Option:
    return Option(tuple(names.split()), kind, default, help)


LLM_OPTIONS = (
    _option("--dtype", str, None, "auto (the default), float32, bfloat16 or float16"),
    _option("--load-format", str, None, "dummy (the default) for random weights, or auto"),
    _option("--seed", int, None, "of the random weights"),
    _option("--max-model-len", int, None, "most tokens of a sequence; by default the longest here"),
    _option("--max-num-seqs", int, None, "most sequences in one step"),
    _option("--max-num-batched-tokens", int, None, "most tokens in one step"),
    _option("--block-size", int, None, "tokens in a page of the cache"),
    _option("--gpu-memory-utilization", float, None, "share of the memory to use"),
    _option("--kv-cache-memory-bytes", int, None, "size of the cache"),
    _option("--async-scheduling", bool, None, "launch steps ahead of results; the default"),
    _option("--enable-prefix-caching", bool, None, "find past prompts again; not the default here"),
)
"""Keywords of `LLM`; those that are not given are left to it, or to the benchmark."""

RANGE = "lengths are uniform from 1 - r to 1 + r times the given ones"

COMMANDS: dict[str, tuple[Callable[..., Result], str, tuple[Option, ...]]] = {
    "latency": (
        measure_latency,
        "one batch, again and again",
        (
            _option("--input-len", int, 32, "tokens of each prompt"),
            _option("--output-len", int, 128, "tokens to generate for each"),
            _option("--batch-size", int, 8, "prompts"),
            _option("--num-iters", int, 10, "iterations that are measured"),
            _option("--num-iters-warmup", int, 2, "iterations before; the first compiles"),
        ),
    ),
    "throughput": (
        measure_throughput,
        "many prompts in one call",
        (
            _option("--num-prompts", int, 64, "prompts"),
            _option("--input-len --random-input-len", int, 128, "tokens of each prompt"),
            _option("--output-len --random-output-len", int, 64, "tokens to generate for each"),
            _option("--range-ratio --random-range-ratio", float, 0.0, RANGE),
            _option("--num-warmups", int, 1, "whole calls before; the first compiles"),
        ),
    ),
    "startup": (
        measure_startup,
        "from the birth of a process to a first token",
        (
            _option("--input-len", int, 32, "tokens of the prompt"),
            _option("--num-iters-cold", int, 3, "starts with no compiled program"),
            _option("--num-iters-warmup", int, 0, "starts that fill the caches, not measured"),
            _option("--num-iters-warm", int, 3, "starts with the programs that the last one left"),
        ),
    ),
}


def add_commands(bench: argparse.ArgumentParser) -> None:
    """Adds the benchmarks to the parser of `jaxllm bench`."""
    commands = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (_, what, options) in COMMANDS.items():
        parser = commands.add_parser(
            name,
            help=what,
            description=f"{what}, on random weights".capitalize(),
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        shapes = ", ".join(SHAPES)
        parser.add_argument(
            "--model",
            default="smollm2-135m",
            help=f"a shape ({shapes}), a folder with a config.json, or a hub id",
        )
        for option in options:
            parser.add_argument(
                *option.names, type=option.kind, default=option.default, help=option.help
            )
        engine = parser.add_argument_group("engine")
        for option in LLM_OPTIONS:
            how: dict[str, Any] = {"type": option.kind}
            if option.kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            engine.add_argument(*option.names, default=argparse.SUPPRESS, help=option.help, **how)
        parser.add_argument("--output-json", help="a file for every figure")
        parser.add_argument("--plot", help="a file for a plot: .png, .pdf or .svg")


def run(args: argparse.Namespace) -> str:
    """Runs the benchmark of a command line, writes its files, and returns its table.

    Raises:
        ConfigError: An option makes no sense; nothing has run.
    """
    check_files(args.output_json, args.plot)
    measure, _, options = COMMANDS[args.benchmark]
    given = {option.key: getattr(args, option.key) for option in options}
    llm = {o.key: getattr(args, o.key) for o in LLM_OPTIONS if hasattr(args, o.key)}
    result = measure(args.model, **given, llm_options=llm)
    if args.output_json:
        write_json(result, args.output_json)
    if args.plot:
        write_plot(result.chart(), args.plot)
    return table(f"jaxllm bench {args.benchmark}", result.rows())
