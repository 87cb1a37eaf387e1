"""From what the caller of `LLM` says about devices to a sharder for each engine."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxllm.errors import ConfigError
from jaxllm.sampling_params import as_integer
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import LAYOUTS, REPLICAS, Layout, preset
from jaxllm.sharding.mesh import make_mesh

LayoutLike = str | Path | Mapping[str, Any] | Layout
"""A preset's name, a JSON file, a dict, or the layout itself."""

DEFAULTS = {
    # (several devices a model, several engines)
    (False, False): "replicated",
    (True, False): "tensor",
    (False, True): "data",
    (True, True): "data_tensor",
}
"""The preset where the caller gives sizes only."""


def choose_layout(
    given: LayoutLike | None = None, tensor: int | None = None, data: int | None = None
) -> Layout:
    """Returns the layout that the keywords of `LLM` mean.

    Args:
        given: The layout; None for the usual one of these sizes.
        tensor: Devices of one model; by default what the layout has, or 1.
        data: Engines side by side; the same.

    Raises:
        ConfigError: A size is no size, there is no such layout, or it has other sizes.
    """
    tensor = _size("tensor_parallel_size", tensor)
    data = _size("data_parallel_size", data)
    if given is None:
        given = DEFAULTS[(tensor or 1) > 1, (data or 1) > 1]
    if isinstance(given, str) and (given in LAYOUTS or not given.endswith(".json")):
        return preset(given, tensor=tensor or 1, data=data or 1)
    layout = _loaded(given)
    for name, size, own in (
        ("tensor_parallel_size", tensor, layout.num_devices // layout.num_replicas),
        ("data_parallel_size", data, layout.num_replicas),
    ):
        # A layout of one engine may be repeated.
        repeats = name == "data_parallel_size" and own == 1
        if size is not None and size != own and not repeats:
            raise ConfigError(
                f"{name}={size} and the mesh of layout {layout.name!r} has {own}. Leave out "
                f"{name}, or give the layout another mesh."
            )
    if data is not None and data > 1 and layout.num_replicas == 1:
        layout = replace(layout, mesh_shape={REPLICAS: data, **_without_replicas(layout)})
    return layout


def _size(name: str, given: Any) -> int | None:
    size = as_integer(given)
    if given is not None and (size is None or size < 1):
        raise ConfigError(f"{name}={given!r} must be a whole number of at least 1.")
    return size


def _loaded(given: LayoutLike) -> Layout:
    if isinstance(given, Layout):
        return given
    if isinstance(given, Mapping):
        return Layout.from_dict(given)
    if isinstance(given, (str, Path)):
        return Layout.from_json(given)
    raise ConfigError(
        f"layout={given!r} is none. Use the name of a preset ({sorted(LAYOUTS)}), of a JSON "
        "file, a dict with 'mesh' and 'rules', or a Layout."
    )


def _without_replicas(layout: Layout) -> dict[str, int]:
    return {name: size for name, size in layout.mesh_shape if name != REPLICAS}


def find_devices(given: Sequence[int | jax.Device] | None, layout: Layout) -> list[jax.Device]:
    """Returns the devices of a layout, of all engines.

    Args:
        given: Their ids, or they themselves, in the order of the mesh; None for the first
            ones that JAX has.
        layout: Of all engines.

    Raises:
        ConfigError: There is no such device, one comes twice, or their number is wrong.
    """
    needed = layout.num_devices
    if given is None:
        have = jax.devices()
        if len(have) < needed:
            raise ConfigError(
                f"World size ({needed}) is larger than the number of available devices "
                f"({len(have)}): {_world(layout)}. Use sizes whose product is {len(have)} or less."
            )
        return have[:needed]
    if isinstance(given, (str, int)) or not isinstance(given, Sequence):
        raise ConfigError(f"devices={given!r} must be a list of ids, such as [0, 1].")
    known = {device.id: device for device in jax.devices()}
    found = [_device(one, known) for one in given]
    if len(set(found)) != len(found):
        raise ConfigError(f"devices={_ids(found)} names one twice. Name each once.")
    if len(found) != needed:
        raise ConfigError(
            f"devices={_ids(found)} are {len(found)}, and layout {layout.name!r} needs {needed} "
            f"({_world(layout)}). Pass tensor_parallel_size={len(found)} to share the model, "
            f"data_parallel_size={len(found)} for as many engines, or {needed} devices."
        )
    return found


def _device(given: Any, known: Mapping[int, jax.Device]) -> jax.Device:
    if isinstance(given, jax.Device):
        return given
    number = as_integer(given)
    if number is None or number not in known:
        raise ConfigError(f"devices names {given!r}, and JAX has {sorted(known)}. Name those.")
    return known[number]


def _ids(devices: Sequence[jax.Device]) -> list[int]:
    return [device.id for device in devices]


def _world(layout: Layout) -> str:
    return " x ".join(f"{name} {size}" for name, size in layout.mesh_shape if size > 1) or "one"


def sharders(
    layout: LayoutLike | None = None,
    tensor: int | None = None,
    data: int | None = None,
    devices: Sequence[int | jax.Device] | None = None,
) -> list[Sharder]:
    """Returns a sharder for each engine, each on devices of its own.

    Args:
        layout: As for `choose_layout`, and so are `tensor` and `data`.
        tensor: Devices of one model.
        data: Engines side by side.
        devices: As for `find_devices`.

    Raises:
        ConfigError: One of them cannot be had.
    """
    chosen = choose_layout(layout, tensor, data)
    found, one = find_devices(devices, chosen), chosen.replica()
    size = one.num_devices
    return [Sharder(one, make_mesh(one, found[i : i + size])) for i in range(0, len(found), size)]


def one_sharder(
    layout: LayoutLike,
    tensor: int | None,
    devices: Sequence[int | jax.Device] | None,
    have: Sequence[jax.Device],
) -> Sharder:
    """Returns the sharder that a model on some devices goes to.

    Args:
        layout: As for `choose_layout`.
        tensor: Devices of one model.
        devices: As for `find_devices`; by default those that it has, then others.
        have: Those that it has.

    Raises:
        ConfigError: As `sharders`; or the layout has several engines.
    """
    chosen = choose_layout(layout, tensor)
    if chosen.num_replicas > 1:
        raise ConfigError(
            f"Layout {chosen.name!r} has {chosen.num_replicas} engines side by side, and reshard "
            f"moves one. Give the mesh axis {REPLICAS!r} the size 1, or make another LLM."
        )
    if devices is None:
        others = [device for device in jax.devices() if device not in have]
        if chosen.num_devices <= len(have) + len(others):
            devices = [*have, *others][: chosen.num_devices]
    return sharders(chosen, devices=devices)[0]
