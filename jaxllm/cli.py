"""The command `jaxllm`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.errors import JaxLLMError

DEMO_NOTE = (
    "The demo model is tiny and was trained on the Python standard library's sources: "
    "it imitates code and knows nothing."
)


def parser() -> argparse.ArgumentParser:
    """Returns the command line's grammar."""
    from jaxllm.bench.command import add_commands

    top = argparse.ArgumentParser(prog="jaxllm", description="LLM inference in JAX.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("prompt", help="the text to continue")
    generate.add_argument(
        "--model", default="demo", help="hub id or folder; by default the model that ships along"
    )
    generate.add_argument("--max-tokens", type=int, default=64, help="most tokens to generate")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument("--seed", type=int, help="makes sampling repeatable")
    generate.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    generate.add_argument("--max-model-len", type=int, help="most tokens of a sequence")
    generate.set_defaults(run=run_generate)

    chat = commands.add_parser("chat", help="talk with a model in the terminal")
    chat.add_argument("--model", required=True, help="hub id or folder, with a chat template")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--chat-template", help="Jinja text or a file, in place of the model's")
    chat.add_argument("--max-tokens", type=int, help="most tokens of an answer; no bound")
    chat.add_argument("--temperature", type=float, help="by default what the model's author says")
    chat.add_argument("--seed", type=int, help="makes sampling repeatable")
    chat.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    chat.add_argument("--max-model-len", type=int, help="most tokens of a conversation")
    chat.set_defaults(run=run_chat)

    bench = commands.add_parser("bench", help="measure latency, throughput or start")
    add_commands(bench)
    bench.set_defaults(run=run_bench)

    _add_planners(commands)

    models = commands.add_parser("models", help="list the architectures that can be loaded")
    models.set_defaults(run=run_models)
    return top


def _add_planners(commands: Any) -> None:
    """Adds what needs no weights and no GPU."""
    plan = commands.add_parser("plan", help="what a model needs under a layout; loads nothing")
    plan.add_argument("model", help="hub id or folder; its config.json is read")
    plan.add_argument("--layout", help="tensor, tensor:4, data_tensor:2x4, ... or a JSON file")
    plan.add_argument("--batch", type=int, default=8, help="sequences over all engines")
    plan.add_argument("--context", type=int, help="tokens of each")
    plan.add_argument("--compile", action="store_true", help="compile its programs, and count")
    _add_planning(plan)
    plan.set_defaults(run=run_plan)

    sweep = commands.add_parser("sweep", help="compare layouts, a row each")
    sweep.add_argument("model", help="hub id or folder; its config.json is read")
    sweep.add_argument("--layout", nargs="+", help="several; by default all of tensor x data")
    sweep.add_argument(
        "--batch", type=int, nargs="+", default=[8], help="sequences; one or several"
    )
    sweep.add_argument("--context", type=int, nargs="+", help="tokens of each; one or several")
    sweep.add_argument("--level", default="plan", help="plan, compile or measure")
    _add_planning(sweep)
    sweep.set_defaults(run=run_sweep)


def _add_planning(command: argparse.ArgumentParser) -> None:
    """Adds what plan and sweep have in common."""
    command.add_argument("--hardware", help="h200:8, say; by default what is here")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    command.add_argument("--max-model-len", type=_length, help="most tokens of a sequence, or auto")
    command.add_argument("--max-num-seqs", type=int, help="most sequences in a step")
    command.add_argument("--max-num-batched-tokens", type=int, help="most tokens in a step")
    command.add_argument("--json", metavar="FILE", help="write the figures, too")


def _length(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _planning(args: argparse.Namespace) -> dict[str, Any]:
    names = ("hardware", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    return {name: getattr(args, name) for name in names}


def run_plan(args: argparse.Namespace) -> None:
    """Prints the plan of a layout."""
    from jaxllm.plan import plan

    asked = {"batch": args.batch, "context": args.context, "compile": args.compile}
    found = plan(args.model, layout=args.layout, **asked, **_planning(args))
    print(found)
    if args.json:
        Path(args.json).write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")


def run_sweep(args: argparse.Namespace) -> None:
    """Prints a row for each layout, batch and context."""
    from jaxllm.sweep import sweep

    asked = {"batch": args.batch, "context": args.context, "level": args.level}
    found = sweep(args.model, args.layout, **asked, **_planning(args))
    print(found)
    if args.json:
        found.save(args.json)


def run_generate(args: argparse.Namespace) -> None:
    """Prints the prompt and its continuation."""
    from jaxllm.llm import LLM  # JAX takes a second to import; --help need not wait
    from jaxllm.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens
    )
    with LLM(args.model, dtype=args.dtype, max_model_len=args.max_model_len) as llm:
        output = llm.generate(args.prompt, params)[0].outputs[0]
    if args.model == "demo":
        print(DEMO_NOTE, file=sys.stderr)
    print(args.prompt + output.text)


def run_chat(args: argparse.Namespace) -> None:
    """Talks with a model until the user leaves."""
    from jaxllm.llm import LLM
    from jaxllm.terminal_chat import TerminalChat

    given = {"temperature": args.temperature, "seed": args.seed}
    settings = {
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "chat_template": args.chat_template,
    }
    with LLM(args.model, **settings) as llm:
        params = llm.get_default_sampling_params()
        params.max_tokens = args.max_tokens
        for name, value in given.items():
            if value is not None:
                setattr(params, name, value)
        # Checked again as a whole: a value of the command line may not fit.
        chat = TerminalChat(llm, params.clone(), write=_write, system=args.system)
        chat.run(lambda: input("> "))


def _write(text: str) -> None:
    print(text, end="", flush=True)


def run_bench(args: argparse.Namespace) -> None:
    """Runs a benchmark and prints its table."""
    from jaxllm.bench import command

    print(command.run(args))


def run_models(args: argparse.Namespace) -> None:
    """Prints the registry: architecture, family, and what the family is."""
    from jaxllm.modeling.registry import ARCHITECTURES, describe

    del args
    wide, narrow = (max(map(len, names)) for names in zip(*ARCHITECTURES.items(), strict=True))
    for name, family in sorted(ARCHITECTURES.items()):
        print(f"{name:{wide}}  {family:{narrow}}  {describe(family)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns its exit status.

    An error that jaxllm raises on purpose is a sentence for the user, so it is
    printed without a traceback.
    """
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except JaxLLMError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxllm: interrupted", file=sys.stderr)
        return 130
    return 0
