import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxllm.errors import ConfigError
from jaxllm.sharding import gpu_topology
from jaxllm.sharding.gpu_topology import (
    CARDS,
    compile_only,
    gpu_devices,
    is_installed,
    target_config,
)
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh

aot = pytest.mark.skipif(not is_installed(), reason="needs the CUDA plugin of JAX: extra `aot`")


def test_an_unknown_card_is_refused_with_the_list():
    with pytest.raises(ConfigError, match=r"card='h20' is not known.*Use one of \['a100', 'b200'"):
        gpu_devices("h20")


def test_no_devices_are_refused():
    with pytest.raises(ConfigError, match="count=0 must be at least 1"):
        gpu_devices("h200", 0)


def test_a_missing_plugin_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(gpu_topology, "PLUGINS", ("jaxllm_has_no_such_plugin",))

    with pytest.raises(ConfigError, match=r"needs the CUDA plugin of JAX.*'jaxllm\[aot\]'"):
        gpu_devices("h200")


def test_only_cards_from_hopper_on_get_instructions_of_one_architecture():
    accelerated = [name for name, card in CARDS.items() if "ACCELERATED" in target_config(card)]

    assert accelerated == ["h100", "h200", "b200"]


def test_a_plugin_that_did_not_load_is_explained(monkeypatch):
    def no_topology(*args, **kwargs):  # what JAX does where it finds no driver
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", no_topology)
    monkeypatch.setattr(gpu_topology, "is_installed", lambda: True)

    with pytest.raises(ConfigError, match=r"did not load.*JAX_PLATFORMS=cpu"):
        gpu_devices("h200")


@aot
@pytest.mark.aot
@pytest.mark.parametrize("card", CARDS)
def test_devices_are_those_of_the_card(card):
    devices = gpu_devices(card, 2)

    assert [device.platform for device in devices] == ["gpu", "gpu"]
    assert devices[0].device_kind == CARDS[card].name
    assert devices[0].compute_capability == ".".join(map(str, CARDS[card].capability))


@aot
@pytest.mark.aot
def test_a_mesh_is_made_of_them():
    mesh = make_mesh(preset("tensor", tensor=8), gpu_devices("h200", 8))

    assert dict(mesh.shape) == {"data": 1, "tensor": 8, "expert": 1}


@aot
@pytest.mark.aot
def test_programs_stay_out_of_the_persistent_cache(tmp_path):
    folder = jax.config.jax_compilation_cache_dir
    there = SingleDeviceSharding(gpu_devices("h200")[0])
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=there)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))

    try:
        for _ in range(2):  # reading it back would warn
            compile_only(jax.jit(jnp.sin).lower(shape))
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)

    assert list(tmp_path.iterdir()) == []
    assert jax.config.jax_enable_compilation_cache
