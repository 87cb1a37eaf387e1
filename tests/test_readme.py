"""What the README promises is what the tree does."""

import re
from pathlib import Path

import pytest

from jaxllm.modeling.registry import ARCHITECTURES
from jaxllm.readme import models_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def shell_blocks():
    return [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]


def test_the_first_block_generates_and_the_second_tests():
    first, second = shell_blocks()[:2]

    assert "jaxllm generate" in first
    assert "pytest" in second
    assert "\n" not in first + second


def test_ci_calls_the_test_command_word_for_word():
    assert shell_blocks()[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_table_of_models_is_that_of_the_registry():
    assert models_table() in README


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_in_the_table(name):
    assert f"`{name}`" in README


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#]+)", text)
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert missing == []
