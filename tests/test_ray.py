"""The example of batches over Ray, with real Ray: two actors on this machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm import LLM

EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_batch.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what Ray imports
def test_actors_of_ray_give_the_texts_of_one_model():
    pytest.importorskip("ray.data", reason="needs the `ray` extra")
    command = [sys.executable, str(EXAMPLE), "demo", "2", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr

    from examples import ray_batch

    with LLM("demo") as llm:
        outputs = llm.generate(ray_batch.prompts, ray_batch.sampling_params, use_tqdm=False)
    said = [line for line in done.stdout.splitlines() if line.startswith(("Prompt:", "Output:"))]
    want = [(f"Prompt: {o.prompt!r}", f"Output: {o.outputs[0].text!r}") for o in outputs]
    assert said == [line for pair in want for line in pair]
