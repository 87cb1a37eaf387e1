"""The scripts in `examples/` run, and are vLLM's but for the import."""

import runpy
from pathlib import Path

import pytest

FOUND = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
EXAMPLES = [path for path in FOUND if path.stem != "ray_batch"]  # which test_ray.py runs


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(script, capsys):
    runpy.run_path(str(script))["main"]("demo")

    said = capsys.readouterr().out
    assert said.count("Output:") + said.count("ext: ") >= 4


def test_with_prefix_caching_the_answers_are_the_same(capsys):
    script = next(path for path in EXAMPLES if path.stem == "prefix_caching")
    runpy.run_path(str(script))["main"]("demo")

    said = capsys.readouterr().out
    assert "Generated answers are the same: True" in said
    assert "Tokens found in the cache: [0" not in said


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_names_nothing_that_vllm_lacks(script):
    lines = [line for line in script.read_text().splitlines() if "jaxllm" in line]

    assert all(line.startswith("from jaxllm import") for line in lines)
    names = {name.strip() for line in lines for name in line.split("import")[1].split(",")}
    assert names <= {"LLM", "SamplingParams"}
