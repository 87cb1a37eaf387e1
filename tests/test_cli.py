"""The command line."""

import os
import subprocess
import sys

import pytest

from jaxllm.cli import main


def test_generate_prints_the_prompt_and_its_continuation(capsys):
    status = main(["generate", "def main(", "--max-tokens", "8"])

    out, err = capsys.readouterr()
    assert status == 0
    assert out.startswith("def main(")
    assert len(out) > len("def main(\n")
    assert "tiny" in err


def test_generate_is_repeatable_with_a_seed(capsys):
    said = []
    for _ in range(2):
        main(["generate", "x = ", "--max-tokens", "8", "--temperature", "1", "--seed", "5"])
        said.append(capsys.readouterr().out)

    assert said[0] == said[1]


def test_a_wrong_model_is_a_sentence_and_no_traceback(capsys):
    status = main(["generate", "x", "--model", "./no/such/folder"])

    assert status == 2
    assert capsys.readouterr().err.startswith(
        "jaxllm: Invalid repository ID or local directory specified: './no/such/folder'"
    )


def test_models_lists_the_registry(capsys):
    assert main(["models"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_unknown_command_shows_the_usage(capsys):
    with pytest.raises(SystemExit):
        main(["generat"])
    assert "invalid choice: 'generat'" in capsys.readouterr().err


@pytest.mark.slow
def test_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "jaxllm", "generate", "import ", "--max-tokens", "4"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    assert done.stdout.startswith("import ")
