"""`LLM.save`: a folder that `LLM` loads again, whole or not at all."""

import copy
import fnmatch
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from jaxllm.errors import CheckpointError
from jaxllm.hub import WITHOUT_WEIGHTS
from jaxllm.loading import Plan
from jaxllm.modeling import checkpoint, manifest
from jaxllm.modeling.fitting import unfit

NOT_COPIED = ("config.json", "generation_config.json", manifest.NAME, "*.index.json")
"""Files beside a tokenizer's that are written anew, or are of weights."""


def save(
    folder: str | Path,
    plan: Plan,
    params: Sequence[jax.Array],
    *,
    tokenizer_folder: Path,
) -> None:
    """Writes a model as it is on its devices.

    All of it goes to a folder beside, which gets its name when it is whole. With several
    processes all of them call this, with a path that all of them see.

    Args:
        folder: A new folder, or an empty one.
        plan: Of the model.
        params: Of the same.
        tokenizer_folder: Where the tokenizer's files are.

    Raises:
        CheckpointError: There is something at `folder` already.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        kind = "is not empty" if target.is_dir() else "is a file"
        raise CheckpointError(
            f"{str(target)!r} {kind}, and a save never mixes with other files. Give a folder that "
            "does not exist, or delete what is there."
        )
    partial = target.with_name(f".{target.name}.incomplete")
    is_first = jax.process_index() == 0
    try:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
            partial.mkdir(parents=True)
            _write_configs(partial, plan, tokenizer_folder)
        _wait("begin")
        checksums = checkpoint.save(partial, plan.model, params)
        if is_first:
            about = _manifest(partial, plan, checksums)
            (partial / manifest.NAME).write_text(about.to_json(), encoding="utf-8")
            partial.replace(target)
        _wait("end")
    except BaseException:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jaxllm save {name}")


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
