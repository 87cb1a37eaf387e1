"""Hardware: names, numbers of one's own, and what is refused."""

from types import SimpleNamespace

import jax
import pytest

from jaxllm import Hardware, hardware
from jaxllm.devices import resolve_dtype
from jaxllm.errors import ConfigError
from jaxllm.hardware import HARDWARE, NCCL_SECONDS, here, parse, this_cpu
from jaxllm.sharding.gpu_topology import CARDS

NUMBERS = {
    "name": "mine",
    "platform": "gpu",
    "memory_bytes": 1 << 36,
    "memory_bandwidth": 1e12,
    "matmul": {"bfloat16": 1e14},
    "link_bandwidth": 1e11,
}


def test_a_name_and_a_number_are_so_many_of_a_card():
    found = parse("h200:8")

    assert (found.name, found.count, found.target) == ("h200", 8, "h200")
    assert found.rate("bfloat16") == 989.5e12
    assert str(found) == "8 x h200"


def test_a_name_alone_is_as_many_as_a_layout_needs():
    assert parse("a100").name == "a100-80"
    assert parse("A100-40").count is None


@pytest.mark.parametrize("name", HARDWARE)
def test_every_card_of_the_table_has_a_source_and_a_target(name):
    found = HARDWARE[name]

    assert "NVIDIA" in found.source
    assert found.target in CARDS
    assert found.memory_bytes <= CARDS[found.target].memory_bytes
    assert found.memory_bandwidth == pytest.approx(CARDS[found.target].memory_bandwidth, rel=0.25)
    assert found.link_seconds == NCCL_SECONDS
    # What "auto" chooses has a rate, and float32 too.
    chosen = resolve_dtype("auto", "bfloat16", found)
    assert found.rate(chosen) >= found.rate("float32") > 0


@pytest.mark.parametrize("name", HARDWARE)
def test_rates_are_those_of_cores_clocks_and_buses(name):
    found = HARDWARE[name]
    assert found.target
    card = CARDS[found.target]
    lanes = card.num_cores * card.lanes_per_core

    assert found.rate("float32") == pytest.approx(2 * lanes * card.clock_ghz * 1e9, rel=0.01)
    if name != "a100-40":  # compiled for as the one of 80 GB, whose memory is faster
        assert found.memory_bandwidth == pytest.approx(card.memory_bandwidth, rel=0.01)


def test_numbers_of_ones_own_are_a_dict_or_a_value():
    found = parse(NUMBERS)

    assert found == Hardware(**NUMBERS)
    assert hash(found) == hash(Hardware(**NUMBERS))
    assert parse(found) is found
    assert parse(found.to_dict()) == found
    assert found.source == "given by the user"


def test_a_dict_may_differ_from_a_known_one():
    found = parse({"like": "h200:4", "link_seconds": 1e-5, "matmul": {"bfloat16": 7e14}})

    assert (found.count, found.link_seconds) == (4, 1e-5)
    assert (found.rate("bfloat16"), found.rate("float32")) == (7e14, 67e12)
    assert found.source.endswith("; by the user: link_seconds, matmul")


REFUSED = {
    "unknown": ("h201", r"hardware='h201' is not known; did you mean 'h200'\?.*'h200:8'"),
    "count": ("h200:many", "has 'many' for the number of devices. Write h200:8, say"),
    "no devices": ("h200:0", "has '0' for the number of devices"),
    "type": (8, r"hardware=8 is none\. Use a name such as 'h200:8'"),
    "field": ({"like": "h200", "memory": 1}, r"no 'memory'; did you mean 'memory_bytes'\?"),
    "missing": ({"name": "x", "platform": "gpu"}, r"without \['memory_bytes', 'memory_bandwidth'"),
    "number": ({**NUMBERS, "link_bandwidth": -1}, "link_bandwidth=-1, and it must be a number"),
    "rate": ({**NUMBERS, "matmul": {"int8": "fast"}}, r"matmul\['int8'\]='fast'"),
    "platform": ({**NUMBERS, "platform": "tpu"}, "platform='tpu'. Use 'cpu' or 'gpu'"),
    "zero": ({**NUMBERS, "count": 0}, "count=0. Use the number of devices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_what_to_type(case):
    given, sentence = REFUSED[case]

    with pytest.raises(ConfigError, match=sentence):
        parse(given)


def test_a_rate_that_is_not_known_is_asked_for():
    with pytest.raises(ConfigError, match=r"no rate for float32; it has \['bfloat16'\]"):
        parse(NUMBERS).rate("float32")


def test_a_cpu_is_measured_and_its_devices_share_it():
    found = parse("cpu:8")
    each = found.among(8)

    assert found.count == 8
    assert "measured" in found.source
    assert each.rate("float32") == pytest.approx(found.rate("float32") / 8)
    assert each.memory_bandwidth == pytest.approx(found.memory_bandwidth / 8)
    assert each.memory_bytes == found.memory_bytes // 8
    assert each.among(8) == each
    assert this_cpu(8) == found  # measured once


def test_cards_do_not_share():
    assert parse("h200:8").among(8) == parse("h200:8")


def test_without_a_name_it_is_what_this_machine_has():
    assert parse(None) == this_cpu(len(jax.devices()))


@pytest.mark.parametrize(
    ("kind", "name"), [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-80")]
)
def test_a_card_that_is_here_is_found_by_its_kind(monkeypatch, kind, name):
    card = SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=lambda: {})
    monkeypatch.setattr(hardware.jax, "devices", lambda *args: [card] * 2)

    assert (here().name, here().count) == (name, 2)


def test_a_card_of_unknown_kind_is_named(monkeypatch):
    card = SimpleNamespace(platform="gpu", device_kind="NVIDIA X1")
    monkeypatch.setattr(hardware.jax, "devices", lambda *args: [card])

    with pytest.raises(ConfigError, match="1 x 'NVIDIA X1', of which no numbers are known"):
        here()
