"""Random prompts of the asked sizes."""

import pytest

from jaxllm.bench.workload import Sizes
from jaxllm.errors import ConfigError


def test_without_a_range_all_prompts_have_the_given_lengths():
    workload = Sizes(3, input_len=5, output_len=7).draw(vocab_size=100, seed=0)

    assert workload.input_lens == (5, 5, 5)
    assert workload.output_lens == (7, 7, 7)
    assert (workload.num_input_tokens, workload.num_output_tokens) == (15, 21)
    assert repr(workload) == "Workload(3 prompts, 15 tokens in, 21 out)"


def test_a_range_gives_every_length_between_its_bounds_and_no_other():
    sizes = Sizes(400, input_len=8, output_len=4, range_ratio=0.5)

    workload = sizes.draw(vocab_size=100, seed=0)

    assert set(workload.input_lens) == set(range(4, 13))
    assert set(workload.output_lens) == set(range(2, 7))
    assert sizes.longest == 12 + 6


def test_another_seed_changes_tokens_and_no_lengths():
    sizes = Sizes(10, input_len=8, output_len=4, range_ratio=0.5)

    one, other, again = (sizes.draw(vocab_size=100, seed=seed) for seed in (0, 1, 0))

    assert one == again
    assert one.prompts != other.prompts
    assert one.input_lens == other.input_lens
    assert one.output_lens == other.output_lens
    assert all(0 <= token < 100 for prompt in one.prompts for token in prompt)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"input_len": 0}, "--input-len 0 must be at least 1"),
        ({"output_len": 0}, "--output-len 0 must be at least 1"),
        ({"range_ratio": 1.0}, "--random-range-ratio 1.0 must be at least 0 and less than 1"),
    ],
)
def test_a_wrong_size_is_a_sentence(sizes, message):
    with pytest.raises(ConfigError, match=message):
        Sizes(**{"count": 1, "input_len": 1, "output_len": 1, **sizes})
