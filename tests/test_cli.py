"""The command line."""

import json
import os
import subprocess
import sys

import pytest

from jaxllm import Sweep
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


def test_plan_prints_a_table_and_writes_its_figures(capsys, tmp_path):
    out = tmp_path / "plan.json"
    asked = ["--layout", "tensor:2", "--hardware", "h200:8", "--batch", "4", "--json", str(out)]

    status = main(["plan", "demo", *asked, "--max-model-len", "256"])

    assert status == 0
    assert "layout tensor:2 on h200:2" in capsys.readouterr().out
    stated = json.loads(out.read_text())
    assert (stated["batch"], stated["max_model_len"], stated["fits"]) == (4, 256, True)


def test_sweep_prints_a_row_a_layout_and_writes_what_load_reads(capsys, tmp_path):
    out = tmp_path / "sweep.json"
    asked = ["--layout", "tensor:2", "tensor:5", "--hardware", "h200:8", "--context", "64", "128"]

    status = main(["sweep", "demo", *asked, "--json", str(out)])

    assert status == 0
    printed = capsys.readouterr().out
    assert "tensor:2" in printed
    assert "does not divide" in printed
    assert [row.context for row in Sweep.load(out)] == [64, 128] * 2


def test_a_wrong_layout_is_a_sentence(capsys):
    assert main(["plan", "demo", "--layout", "tensr", "--hardware", "h200"]) == 2
    assert "did you mean 'tensor'?" in capsys.readouterr().err


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
