import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig

from jaxllm.errors import UnsupportedModelError
from jaxllm.modeling.config import RopeConfig, with_length
from jaxllm.modeling.families import llama
from jaxllm.modeling.families.common import derived_max_position, rope_from_hf
from jaxllm.modeling.layers.rope import KINDS, rope_tables, rotate
from tests.tiny import SIZES

HEAD_DIM = 64
ORIGINAL, LONGEST = 8192, 131072
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": np.linspace(1, 2, HEAD_DIM // 2).tolist(),
    "long_factor": np.geomspace(1, 60, HEAD_DIM // 2).tolist(),
}
CASES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "default, large theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": LLAMA3,
    "llama3, other steps": {**LLAMA3, "factor": 32.0, "high_freq_factor": 8.0},
    "yarn": YARN,
    "yarn, not rounded": {**YARN, "truncate": False},
    "yarn, other bounds": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, factor below one": {**YARN, "factor": 0.5},
    "yarn, factor stated": {**YARN, "attention_factor": 1.25},
    "yarn, two scales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "factor": 40.0},
    "yarn, one scale": {**YARN, "mscale": 0.7},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": LONGROPE,
    "longrope, factor stated": {**LONGROPE, "factor": 32.0},
    "longrope, scale stated": {**LONGROPE, "attention_factor": 1.19},
    "proportional": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "proportional, divided": {"rope_type": "proportional", "rope_theta": 1e6, "factor": 8.0},
}


def hf_config(parameters, **fields):
    sizes = {**SIZES, "head_dim": HEAD_DIM, "max_position_embeddings": LONGEST}
    return LlamaConfig(**{**sizes, "rope_parameters": dict(parameters), **fields})


def frequencies(parameters, length=0, **fields):
    rope = dataclasses.replace(rope_from_hf(hf_config(parameters, **fields)), length=length)
    return KINDS[rope.kind](rope, HEAD_DIM)


def closed_form(p, length=0):
    """Frequencies and scale in float64, from the papers' formulas."""
    theta, factor = p["rope_theta"], p.get("factor", 1.0)
    inv_freq = theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    context = p.get("original_max_position_embeddings")
    if p["rope_type"] == "linear":
        return inv_freq / factor, 1.0
    if p["rope_type"] == "llama3":
        low, high = p["low_freq_factor"], p["high_freq_factor"]
        turns = context * inv_freq / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return inv_freq * (keep + (1 - keep) / factor), 1.0
    if p["rope_type"] == "yarn":
        # The dimension that turns `n` times within the original context.
        at = [
            HEAD_DIM * math.log(context / (n * 2 * math.pi)) / (2 * math.log(theta))
            for n in (p.get("beta_fast", 32), p.get("beta_slow", 1))
        ]
        if p.get("truncate", True):
            at = [math.floor(at[0]), math.ceil(at[1])]
        low, high = max(at[0], 0), min(at[1], HEAD_DIM - 1)
        keep = 1 - np.clip((np.arange(HEAD_DIM // 2) - low) / (high - low), 0, 1)
        return inv_freq * (keep + (1 - keep) / factor), yarn_scale(p)
    if p["rope_type"] == "dynamic":
        stretch = max(1, factor * length / LONGEST - factor + 1) ** (HEAD_DIM / (HEAD_DIM - 2))
        return (theta * stretch) ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM), 1.0
    if p["rope_type"] == "longrope":
        factors = np.array(p["long_factor" if length > context else "short_factor"])
        scale = math.sqrt(1 + math.log(p.get("factor", LONGEST / context)) / math.log(context))
        return inv_freq / factors, p.get("attention_factor", scale)
    if p["rope_type"] == "proportional":
        turning = p.get("partial_rotary_factor", 1.0) * HEAD_DIM / 2
        return inv_freq * (np.arange(HEAD_DIM // 2) < turning) / factor, 1.0
    return inv_freq, 1.0


def yarn_scale(p):
    if "attention_factor" in p:
        return p["attention_factor"]
    log = 0.1 * math.log(max(p["factor"], 1.0))
    if "mscale" in p and "mscale_all_dim" in p:
        return (p["mscale"] * log + 1) / (p["mscale_all_dim"] * log + 1)
    return log + 1


def test_every_kind_has_a_case():
    assert {case["rope_type"] for case in CASES.values()} == set(KINDS)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_the_closed_form(name):
    inv_freq, scale = frequencies(CASES[name])

    expected, expected_scale = closed_form(CASES[name])
    assert inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq, expected, rtol=2e-6)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@pytest.mark.parametrize("length", [100, ORIGINAL, ORIGINAL + 1, LONGEST, LONGEST + 1, 400000])
def test_frequencies_are_those_of_the_longest_sequence(name, length):
    inv_freq, scale = frequencies(CASES[name], length)

    expected, expected_scale = closed_form(CASES[name], length)
    np.testing.assert_allclose(inv_freq, expected, rtol=2e-6)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


@pytest.mark.parametrize("length", [0, 100, LONGEST])
def test_dynamic_within_the_original_context_is_the_default(length):
    ours, _ = frequencies(CASES["dynamic"], length)

    np.testing.assert_array_equal(ours, frequencies(CASES["default"])[0])


@pytest.mark.torch
@pytest.mark.parametrize("length", [0, ORIGINAL + 1, 400000])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name, length):
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = hf_config(CASES[name])
    default = LlamaRotaryEmbedding.compute_default_rope_parameters
    make = ROPE_INIT_FUNCTIONS.get(CASES[name]["rope_type"])
    expected, expected_scale = make(hf, seq_len=length or None) if make else default(hf)

    inv_freq, scale = frequencies(CASES[name], length)

    # Two units in the last place: torch's pow and NumPy's round differently.
    np.testing.assert_array_max_ulp(inv_freq, expected.numpy(), maxulp=2)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths():
    given = {**YARN, "factor": None, "original_max_position_embeddings": 32768}

    assert rope_from_hf(hf_config(given)).factor == 131072 / 32768


@pytest.mark.torch
@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn, two scales"])
def test_tables_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = hf_config(CASES[name])
    positions = np.array([0, 1, 7, 100, 4095], np.int32)
    with torch.no_grad():
        module = LlamaRotaryEmbedding(hf)
        expected = module(torch.zeros(1, 1, 1), torch.from_numpy(positions)[None].long())

    tables = rope_tables(rope_from_hf(hf), HEAD_DIM, jnp.asarray(positions))

    for ours, theirs in zip(tables, expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs[0, :, : HEAD_DIM // 2].numpy(), atol=3e-4)


def test_tables_are_cosines_and_sines_of_position_times_frequency():
    positions = np.arange(50, dtype=np.int32)
    inv_freq, scale = closed_form(CASES["yarn"])

    cos, sin = rope_tables(rope_from_hf(hf_config(YARN)), HEAD_DIM, jnp.asarray(positions))

    angles = positions[:, None] * inv_freq
    np.testing.assert_allclose(cos, np.cos(angles) * scale, atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles) * scale, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_turns_pairs_that_lie_half_a_head_apart(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 2, 3, 8)), dtype)
    angles = rng.normal(size=(5, 4))

    turned = jax.jit(rotate)(
        x, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    )

    value = np.asarray(x, np.float64)
    pairs = (value[..., :4] + 1j * value[..., 4:]) * np.exp(1j * angles)[:, None, None, :]
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    assert turned.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(np.asarray(turned, np.float64), expected, rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("kind", ["axial", "spiral"])
def test_unknown_rope_type_is_refused_with_those_there_are(kind):
    hf = hf_config(CASES["default"])
    hf.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}

    with pytest.raises(UnsupportedModelError, match=f"rope_type='{kind}'.*'default', 'dynamic'"):
        rope_from_hf(hf)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_unknown_rope_keys_are_refused_for_every_kind(kind):
    case = next(case for case in CASES.values() if case["rope_type"] == kind)
    hf = hf_config(case)
    hf.rope_parameters = {**case, "mrope_section": [8, 12, 12], "gamma": 1.0}

    message = r"has \['gamma', 'mrope_section'\], which jaxllm does not read"
    with pytest.raises(UnsupportedModelError, match=message):
        rope_from_hf(hf)


def test_rotating_a_part_is_refused_by_families_that_rotate_all():
    hf = hf_config(CASES["default"])
    hf.rope_parameters = {**CASES["default"], "partial_rotary_factor": 0.5}

    assert rope_from_hf(hf, partial=True).rotary_dim(HEAD_DIM) == HEAD_DIM // 2
    message = r"has \['partial_rotary_factor'\], which jaxllm does not read"
    with pytest.raises(UnsupportedModelError, match=message):
        rope_from_hf(hf)


def test_longrope_needs_a_factor_for_each_pair():
    hf = hf_config(LONGROPE)
    hf.rope_parameters = {**LONGROPE, "long_factor": [1.0] * 31}

    message = r"has \{'long_factor': 31\} numbers, and a head here rotates 32 pairs"
    with pytest.raises(UnsupportedModelError, match=message):
        rope_from_hf(hf)


def test_keys_that_are_null_are_not_given():
    hf = hf_config(CASES["default"])
    hf.rope_parameters = {**CASES["default"], "mrope_section": None, "factor": None}

    assert rope_from_hf(hf) == rope_from_hf(hf_config(CASES["default"]))


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("default", 1000),
        ("linear", 2500),
        ("dynamic", 4000),
        ("llama3", 1000),
        ("yarn", 1000),
        ("longrope", 1000),
        ("proportional", 1000),
    ],
)
def test_only_linear_and_dynamic_scaling_lengthen_the_stated_context(name, longest):
    hf = hf_config(CASES[name], max_position_embeddings=1000)

    assert derived_max_position(hf) == longest


@pytest.mark.parametrize(("name", "length"), [("default", LONGEST), ("longrope", ORIGINAL)])
def test_longrope_stays_within_its_short_factors_unless_more_is_asked(name, length):
    config = llama.config_from_hf(hf_config(CASES[name]))

    assert config.max_position == LONGEST
    assert config.default_length == length
    assert with_length(config, 77).rope == dataclasses.replace(config.rope, length=77)


def test_length_changes_nothing_where_nothing_is_rotated():
    config = dataclasses.replace(llama.config_from_hf(hf_config(CASES["default"])), rope=None)

    assert with_length(config, 77) == config


def test_dimensions_beyond_the_rotated_part_are_left_as_they_are():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 8)), jnp.float32)
    tables = rope_tables(RopeConfig(partial=0.5), 8, jnp.arange(5))

    turned = rotate(x, *tables)

    assert tables[0].shape == (5, 2)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], rotate(x[..., :4], *tables))
