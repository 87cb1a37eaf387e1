"""`LLM.save`: a folder that `LLM` loads again, whole or not at all."""

import copy
import fnmatch
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.hub import WITHOUT_WEIGHTS
from jaxllm.loading import Plan
from jaxllm.modeling import checkpoint, manifest
from jaxllm.modeling.fitting import unfit
from jaxllm.peers import Peers

NOT_COPIED = ("config.json", "generation_config.json", manifest.NAME, "*.index.json")
"""Files beside a tokenizer's that are written anew, or are of weights."""


def save(
    folder: str | Path,
    plan: Plan,
    params: Sequence[jax.Array],
    *,
    tokenizer_folder: Path,
    peers: Peers,
) -> None:
    """Writes a model as it is on its devices.

    All of it goes to a folder beside, which gets its name when it is whole.

    Args:
        folder: A new folder, or an empty one, that all processes of the model see.
        plan: Of the model.
        params: Of the same.
        tokenizer_folder: Where the tokenizer's files are.
        peers: The processes of the model, all of which call this.

    Raises:
        CheckpointError: There is something at `folder` already, or a process does not see what
            the first one writes.
        ConfigError: The model is of this process alone, in a job of several, which Orbax
            cannot write.
        DistributedError: The processes do not do the same, or one is gone.
    """
    if jax.process_count() > 1 and params[0].is_fully_addressable:
        raise ConfigError(
            f"save: this model is of process {jax.process_index()} alone, in a job of "
            f"{jax.process_count()}, and such arrays cannot be written. Save it from a script "
            "that does not call jaxllm.distributed.initialize."
        )
    target = Path(folder).expanduser().absolute()
    partial = target.with_name(f".{target.name}.incomplete")
    try:
        problem = _begin(target, partial, plan, tokenizer_folder) if peers.is_first else ""
        _raise_any(peers.gather(f"save to {target}", problem))
        problem = "" if partial.is_dir() else _unseen(partial)
        _raise_any(peers.gather("see the folder", problem))
        checksums = checkpoint.save(partial, plan.model, params, peers)
        if peers.is_first:
            about = _manifest(partial, plan, checksums)
            (partial / manifest.NAME).write_text(about.to_json(), encoding="utf-8")
            partial.replace(target)
        peers.gather("end of save", "")
    except BaseException:
        if peers.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _begin(target: Path, partial: Path, plan: Plan, tokenizer_folder: Path) -> str:
    """Writes the small files; returns what hinders it."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        kind = "is not empty" if target.is_dir() else "is a file"
        return (
            f"{str(target)!r} {kind}, and a save never mixes with other files. Give a folder that "
            "does not exist, or delete what is there."
        )
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    try:
        partial.mkdir(parents=True)
        _write_configs(partial, plan, tokenizer_folder)
    except OSError as error:
        return f"{str(target)!r} cannot be written: {error}. Give a folder that can be."
    return ""


def _unseen(partial: Path) -> str:
    return (
        f"Process {jax.process_index()} does not see {str(partial)!r}, which the first process of "
        "the model made. Save to a folder that all hosts share."
    )


def _raise_any(problems: Sequence[str]) -> None:
    for problem in filter(None, problems):
        raise CheckpointError(problem)


def _write_configs(folder: Path, plan: Plan, tokenizer_folder: Path) -> None:
    config = copy.deepcopy(plan.hf_config)
    config.tie_word_embeddings = plan.config.tie_embeddings
    config.dtype = plan.engine.dtype
    config.to_json_file(folder / "config.json")
    generation = plan.folder / "generation_config.json"
    for file in [generation, *sorted(tokenizer_folder.iterdir())]:
        is_wanted = any(fnmatch.fnmatch(file.name, pattern) for pattern in WITHOUT_WEIGHTS)
        is_other = file != generation and any(fnmatch.fnmatch(file.name, p) for p in NOT_COPIED)
        if file.is_file() and is_wanted and not is_other:
            shutil.copyfile(file, folder / file.name)


def _manifest(folder: Path, plan: Plan, checksums: dict[str, int]) -> manifest.Manifest:
    fields = manifest.config_fields(unfit(plan.config))
    return manifest.Manifest(
        format_version=manifest.FORMAT_VERSION,
        jaxllm_version=vars(sys.modules["jaxllm"])["__version__"],
        architecture=plan.architecture,
        dtype=plan.engine.dtype,
        config=fields,
        config_hash=manifest.hash_of(fields),
        parameters={
            path: {**entry, "checksum": checksums[path]}
            for path, entry in manifest.entries(plan.model).items()
        },
        folder=folder,
    )
