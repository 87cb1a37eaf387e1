"""What a plan is made from: a model's config, a caller's wishes, a kind of device.

No weights, no devices. The steps are those of a load (`loading.plan_load`), by the same
functions; what differs is where the config and the memory come from.
"""

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from jax.sharding import Mesh

from jaxllm.cache.memory import MemoryPlan
from jaxllm.devices import Room
from jaxllm.errors import ConfigError
from jaxllm.hardware import Hardware, parse
from jaxllm.hub import config_folder
from jaxllm.loading import Wishes, fit_cache, memory_fraction, resolve, stated_dtype
from jaxllm.modeling import registry
from jaxllm.modeling.abstract import AbstractModel, Build, abstract_model
from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.fitting import fit
from jaxllm.roofline import EngineShape
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.choice import LayoutLike, choose_layout
from jaxllm.sharding.layouts import LAYOUTS, REPLICAS, Layout, preset
from jaxllm.sharding.mesh import abstract_mesh

Model = str | Path | Mapping[str, Any] | Any
"""A hub id, a folder, "demo"; or what config.json holds: a dict, or a config of transformers."""


@dataclass(frozen=True, slots=True)
class Shaped:
    """A model under a layout, and what was done to make it fit."""

    shape: EngineShape
    build: Build
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Planner:
    """A model and how it is to run; layouts come one by one."""

    name: str
    hf: Any
    """Its config, as Hugging Face has it."""

    wishes: Wishes
    hardware: Hardware

    def shaped(self, layout: Layout) -> Shaped:
        """Returns one engine of a layout.

        Raises:
            UnsupportedModelError: The architecture is not implemented.
            ConfigError: A wish cannot be had, or the model cannot be split so.
        """
        _, family = registry.family_of(self.hf)
        config = registry.model_config(self.hf, family)
        one = layout.replica()
        fitted = fit(config, family.build, one)
        stored = stated_dtype(self.hf)
        config, engine = resolve(
            self.wishes, fitted.config, self.hf, stored, self.hardware, one.num_devices
        )
        # No shape depends on the length, so lengths share a model.
        model = _model(fitted.config, family.build, engine.dtype, one)
        return Shaped(EngineShape(config, engine, model, one), family.build, fitted.notes)

    def room(self, num_devices: int) -> Room:
        """Returns the memory of each of so many devices."""
        hardware = self.hardware
        share = memory_fraction(self.wishes, hardware.platform)
        sharing = num_devices if hardware.is_shared else 1
        return Room(
            name=hardware.name,
            platform=hardware.platform,
            most=hardware.memory_bytes // sharing,
            limit=int(hardware.memory_bytes * share) // sharing,
        )

    def memory(self, shape: EngineShape, num_engines: int = 1) -> MemoryPlan:
        """Returns what each device's memory is used for, with so many engines side by side.

        Raises:
            ConfigError: The model does not fit.
        """
        parts = (shape.config, shape.engine, shape.model, shape.layout)
        room = self.room(num_engines * shape.layout.num_devices)
        return fit_cache(self.wishes, *parts, room)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `of_dict` takes; JSON can hold it."""
        return {
            "name": self.name,
            "config": config_dict(self.hf),
            "wishes": asdict(self.wishes),
            "hardware": self.hardware.to_dict(),
        }

    @classmethod
    def of_dict(cls, given: Mapping[str, Any]) -> "Planner":
        """Returns the planner of `to_dict`."""
        hf = read_config(given["config"])
        return cls(given["name"], hf, Wishes(**given["wishes"]), parse(given["hardware"]))


@functools.lru_cache(maxsize=8)
def _model(config: ModelConfig, build: Build, dtype: str, layout: Layout) -> AbstractModel:
    # Of a hundred layers it takes seconds, and batches and contexts share it.
    sharder = Sharder(layout, cast("Mesh", abstract_mesh(layout)))
    return abstract_model(config, build, dtype, sharder)


def read_config(
    model: Model,
    overrides: registry.Overrides | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Any:
    """Returns the Hugging Face config of a model; reads no weights.

    Args:
        model: As `Model` says.
        overrides: `hf_overrides` of the caller.
        revision: Of a hub id.
        token: Of the hub.

    Raises:
        CheckpointError: There is no config.json.
        UnsupportedModelError: transformers does not know it.
    """
    if isinstance(model, (str, Path)):
        return registry.read_hf_config(config_folder(model, revision, token), overrides)
    stated = dict(model) if isinstance(model, Mapping) else config_dict(model)
    with tempfile.TemporaryDirectory(prefix="jaxllm-config-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(stated))
        return registry.read_hf_config(Path(folder), overrides)


def config_dict(hf: Any) -> dict[str, Any]:
    """Returns what config.json of a config of transformers would hold.

    Raises:
        ConfigError: It is none.
    """
    if not callable(getattr(hf, "to_json_string", None)):
        raise ConfigError(
            f"model={hf!r} is none. Use a hub id, a folder with config.json, what such a file "
            "holds as a dict, or a config object of transformers."
        )
    return json.loads(hf.to_json_string())


def model_name(model: Model, hf: Any) -> str:
    """Returns what to call a model in a table."""
    if isinstance(model, (str, Path)):
        return str(model)
    return (hf.architectures or ["a model"])[0]


def layout_for(
    given: LayoutLike | None, hardware: Hardware, tensor: int | None = None, data: int | None = None
) -> Layout:
    """Returns the layout that a caller means, over the devices of some hardware.

    Args:
        given: As for `LLM`; or a preset with its sizes, "tensor:4", and where engines are
            repeated engines x devices of each, "data_tensor:2x4". Without sizes a preset
            takes all devices there are.
        hardware: On which.
        tensor: `tensor_parallel_size` of the caller.
        data: `data_parallel_size`.

    Raises:
        ConfigError: There is no such layout, or it needs other devices.
    """
    count = hardware.count
    if isinstance(given, str) and given.partition(":")[0] in LAYOUTS:
        name, _, sizes = given.partition(":")
        if sizes:
            layout = _sized(name, sizes)
        elif tensor is None and data is None:
            layout = _over_all(name, count or 1)
        else:
            layout = choose_layout(name, tensor, data)
    elif given is None and tensor is None and data is None and (count or 1) > 1:
        layout = preset("tensor", tensor=count or 1)
    else:
        layout = choose_layout(given, tensor, data)
    if count is not None and layout.num_devices > count:
        raise ConfigError(
            f"Layout {label(layout)!r} needs {layout.num_devices} devices and hardware "
            f"{hardware.name}:{count} has {count}. Use hardware="
            f"'{hardware.name}:{layout.num_devices}', or sizes whose product is {count} or less."
        )
    return layout


def _sized(name: str, sizes: str) -> Layout:
    numbers = sizes.split("x")
    if not all(number.isdecimal() and int(number) for number in numbers) or len(numbers) > 2:
        raise ConfigError(
            f"layout='{name}:{sizes}' has sizes {sizes!r}. Write {name}:4 for 4 devices, or "
            f"data_tensor:2x4 for 2 engines on 4 devices each."
        )
    first, last = int(numbers[0]), int(numbers[-1])
    if len(numbers) == 2:
        return preset(name, data=first, tensor=last)
    return preset(name, data=last) if name == "data" else preset(name, tensor=last)


def _over_all(name: str, count: int) -> Layout:
    """Returns a preset over all devices, of which it says itself how to use them."""
    if name == "data_tensor":
        raise ConfigError(
            "layout='data_tensor' does not say how many engines on how many devices each. Write "
            "data_tensor:2x4 for 2 engines on 4 devices each."
        )
    if name == "replicated":
        return preset(name)
    return preset(name, data=count) if name == "data" else preset(name, tensor=count)


def label(layout: Layout) -> str:
    """Returns the name and the sizes of a layout, as `layout_for` takes them."""
    engines, devices = layout.num_replicas, layout.num_devices // layout.num_replicas
    if layout.name == "data" and devices == 1:
        return f"data:{engines}"
    sizes = f"{engines}x{devices}" if REPLICAS in layout.mesh and engines > 1 else f"{devices}"
    return layout.name if sizes == "1" else f"{layout.name}:{sizes}"


def every_mixture(hardware: Hardware) -> list[Layout]:
    """Returns tensor parallelism, data parallelism and all between that use every device."""
    count = hardware.count or 1
    names = {count: "tensor", 1: "data"} if count > 1 else {1: "replicated"}
    sizes = [n for n in range(count, 0, -1) if count % n == 0]
    return [preset(names.get(n, "data_tensor"), tensor=n, data=count // n) for n in sizes]
