"""What a folder of `LLM.save` holds, so that it is loaded as what it is or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.hub import JSON_ERRORS
from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.forms import bare_shape

if TYPE_CHECKING:
    from jaxllm.modeling.abstract import AbstractModel

FORMAT_VERSION = 1
"""Raised where an older jaxllm would misread what a newer one writes."""

NAME = "jaxllm.json"
"""Of the manifest, which is written last: a folder that has one is whole."""

PARAMS = "params"
"""Of the folder of arrays."""

Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The facts that a save is checked by."""

    format_version: int
    jaxllm_version: str
    architecture: str
    dtype: str
    config: dict[str, Any]
    """The fields of the `ModelConfig` that are not at their defaults; no layout's, no length's."""

    config_hash: str
    parameters: Entries
    """By path: shape and dtype of the bare form, and a checksum of its values."""

    folder: Path
    """Where it was found."""

    def to_json(self) -> str:
        """Returns what `read_manifest` reads."""
        fields = dataclasses.fields(self)
        stated = {f.name: getattr(self, f.name) for f in fields if f.name != "folder"}
        return json.dumps(stated, indent=1) + "\n"

    def check_config(self, architecture: str, config: ModelConfig) -> None:
        """Compares with what config.json says now.

        Args:
            architecture: Of config.json.
            config: Of the same, for no layout and no length.

        Raises:
            CheckpointError: They differ; each difference is named.
        """
        now = {"architecture": architecture, **flat(config_fields(config))}
        then = {"architecture": self.architecture, **flat(self.config)}
        differ = [
            f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
            for name in sorted({*now, *then})
            if now.get(name) != then.get(name)
        ]
        if not differ and self.config_hash != hash_of(config_fields(config)):
            differ = [f"the hash of the config was {self.config_hash}"]
        if differ:
            raise CheckpointError(
                f"{str(self.folder)!r} was saved for another model than its config.json (with "
                f"hf_overrides, if any) describes: {'; '.join(differ)}. Undo the change, or load "
                "the original checkpoint with it and save that."
            )

    def dtype_for(self, asked: str) -> str:
        """Returns the element type to load in: the saved one.

        Args:
            asked: `dtype` of the caller; "auto" takes what there is.

        Raises:
            ConfigError: Another was asked for.
        """
        short = {"half": "float16", "float": "float32"}
        if asked not in ("auto", self.dtype) and short.get(asked) != self.dtype:
            raise ConfigError(
                f"dtype={asked!r} was asked for, and {str(self.folder)!r} was saved in "
                f"{self.dtype}. Leave dtype out, or load the original checkpoint with "
                f"dtype={asked!r} and save that."
            )
        return self.dtype

    def check_parameters(self, model: AbstractModel) -> None:
        """Compares names, shapes and types with the model's.

        Raises:
            CheckpointError: They differ; each difference is named.
        """
        now, then = entries(model), self.parameters
        differ = [
            f"{path} was {_shown(then.get(path))} and is {_shown(now.get(path))}"
            for path in sorted({*now, *then})
            if _shown(now.get(path)) != _shown(then.get(path))
        ]
        if differ:
            more = f"; and {len(differ) - 10} more" if len(differ) > 10 else ""
            raise CheckpointError(
                f"{str(self.folder)!r} was saved by jaxllm {self.jaxllm_version} with other "
                f"parameters: {'; '.join(differ[:10])}{more}. Load the original checkpoint and "
                "save it again."
            )


def _shown(entry: Mapping[str, Any] | None) -> str:
    return f"{entry['dtype']}{list(entry['shape'])}" if entry else "not there"


def entries(model: AbstractModel) -> Entries:
    """Returns the shape and dtype of each parameter, without copies and padding."""
    return {
        leaf.path: {"shape": list(bare_shape(leaf)), "dtype": leaf.shape.dtype.name}
        for leaf in model.leaves
    }


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns what JSON makes of the fields that are not at their defaults.

    So a field that a later version adds does not make a config another one.
    """
    return json.loads(json.dumps(_changed(config)))


def _changed(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    fields = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return {f.name: _changed(held) for f, held in fields if held != f.default}


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested fields under dotted names."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def hash_of(fields: Mapping[str, Any]) -> str:
    """Returns a name for a config: the SHA-256 of its fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the manifest of a folder; None for an ordinary checkpoint.

    Raises:
        CheckpointError: A save was cut off, a newer jaxllm made it, or the file is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        if (folder / PARAMS).is_dir():
            raise CheckpointError(
                f"{str(folder)!r} has {PARAMS}/ and no {NAME}: its save was cut off, or not all "
                "of it was copied. Save or copy it again."
            )
        return None
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        version = stated["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{str(folder)!r} has format {version}, saved by jaxllm "
                f"{stated.get('jaxllm_version')}, and this jaxllm reads up to {FORMAT_VERSION}. "
                "Upgrade jaxllm."
            )
        manifest = Manifest(**stated, folder=folder)
        if any(set(e) != {"shape", "dtype", "checksum"} for e in manifest.parameters.values()):
            raise KeyError("checksum")
    except (*JSON_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged ({error!r}). Save or copy the folder again."
        ) from error
    return manifest
