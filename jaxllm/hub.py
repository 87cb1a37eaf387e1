"""From a model's name to a local folder: a hub id and a folder go one way."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)

from jaxllm.errors import CheckpointError

# What a model needs: configs, tokenizers, chat templates, weights. Never code or pickles.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
WITHOUT_WEIGHTS = [pattern for pattern in PATTERNS if pattern != "*.safetensors"]
"""For a tokenizer, or a model of random weights."""

IGNORED = ["original/**", "consolidated*"]
IGNORED += [f"{at}{name}/**" for name in ("onnx", "openvino") for at in ("", "**/")]

CONFIG_ERRORS = (ValueError, KeyError, TypeError, ArithmeticError, StrictDataclassError)
"""What reading a config.json raises whose values make no sense; the last is the hub's own."""

JSON_ERRORS = (UnicodeDecodeError, json.JSONDecodeError, RecursionError)
"""What reading a file raises that is no JSON; the last where it is nested without an end."""

DEMO = Path(__file__).parent / "demo" / "model"


def local_folder(
    model: str | Path,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None = None,
    patterns: Sequence[str] = PATTERNS,
) -> Path:
    """Returns the folder of a checkpoint, downloaded first if it is a hub id.

    `HF_HUB_OFFLINE`, `HF_HOME` and the rest of the hub's settings apply as they do
    everywhere else.

    Args:
        model: A folder, a hub id, or "demo" for the model that ships with jaxllm.
        revision: Branch, tag or commit of a hub id.
        token: Of the hub; True for the stored login.
        cache_dir: Where downloads are kept; the hub's own place by default.
        patterns: Of the files to download.

    Raises:
        CheckpointError: It is neither, or the hub refuses; with the hub's reason.
    """
    if str(model) == "demo":
        return DEMO
    folder = Path(os.path.expanduser(model))  # pathlib's raises where there is no such user
    if folder.is_dir():
        return folder
    name = str(model)
    looks_local = name.startswith((".", "~", "/")) or name.count("/") > 1 or folder.exists()
    if looks_local:
        kind = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"Invalid repository ID or local directory specified: {name!r} {kind}. "
            "Give a folder with config.json and *.safetensors, or a hub id such as "
            "'Qwen/Qwen3-0.6B'."
        )
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=list(patterns),
                ignore_patterns=IGNORED,
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"Access to {name!r} is restricted: ask for it on its page, then pass hf_token= or "
            f"log in with `hf auth login`. The hub says: {error}"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"Invalid repository ID or local directory specified: {name!r} (revision "
            f"{revision or 'main'!r}). Check the spelling, or pass hf_token= if it is private. "
            f"The hub says: {error}"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is not in the local cache and the hub cannot be reached: {error} "
            "Give a local folder, or unset HF_HUB_OFFLINE where there is a network."
        ) from error


def config_folder(model: str | Path, revision: str | None, token: str | bool | None) -> Path:
    """Returns a folder that holds the config.json of a model, and perhaps no more.

    Args:
        model: As for `local_folder`.
        revision: Of a hub id.
        token: Of the hub.

    Raises:
        CheckpointError: As `local_folder`.
    """
    return local_folder(model, revision, token, patterns=["config.json"])
