"""Percentiles and how numbers look."""

import json

import pytest

from jaxllm.bench.summary import number, summary


def test_percentiles_are_exact_on_known_values():
    found = summary(range(101))

    assert found.percentiles == {"10": 10, "25": 25, "50": 50, "75": 75, "90": 90, "99": 99}
    assert found.mean == 50


def test_percentiles_lie_between_neighbours():
    assert summary([4.0, 2.0]).percentile(75) == 3.5


def test_a_summary_of_nothing_is_no_error():
    assert str(summary([])) == "-"
    assert json.loads(json.dumps(summary([]).to_json())) == {
        "mean": None,
        "percentiles": {},
        "values": [],
    }


def test_a_summary_shows_its_mean_and_the_usual_percentiles():
    found = summary([0.001] * 3).scaled(1e3)

    assert str(found) == "1.00   (p50 1.00, p90 1.00, p99 1.00)"
    assert repr(found) == "Summary(3 values, p50 1.00)"


@pytest.mark.parametrize(
    ("value", "shown"), [(12345.6, "12,346"), (12.34, "12.3"), (1.234, "1.23"), (0.0123, "0.012")]
)
def test_a_number_has_the_decimals_that_say_something(value, shown):
    assert number(value) == shown
