"""A second start compiles nothing, and a folder of the user's is left alone."""

import subprocess
import sys

import pytest

SCRIPT = """
import jax
{before}
from jax import monitoring
hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name))
from jaxllm import LLM
with LLM({folder!r}, skip_tokenizer_init=True, max_num_seqs=2, max_num_batched_tokens=16) as llm:
    llm.generate([1, 2, 3], use_tqdm=False)
print(hits.count("/jax/compilation_cache/cache_misses"), jax.config.jax_compilation_cache_dir)
"""


def start(folder, root, before=""):
    script = SCRIPT.format(folder=str(folder), before=before)
    env = {"JAX_PLATFORMS": "cpu", "JAXLLM_CACHE_ROOT": str(root), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    misses, used = done.stdout.split()
    return int(misses), used


@pytest.mark.slow
def test_second_start_compiles_nothing(checkpoints, tmp_path):
    folder = checkpoints("llama")

    first, used = start(folder, tmp_path)
    second, _ = start(folder, tmp_path)

    assert used == str(tmp_path / "xla")
    assert first > 0
    assert second == 0


@pytest.mark.slow
def test_folder_of_the_user_is_left_alone(checkpoints, tmp_path):
    mine = tmp_path / "mine"

    _, used = start(
        checkpoints("llama"),
        tmp_path,
        f"jax.config.update('jax_compilation_cache_dir', {str(mine)!r})",
    )

    assert used == str(mine)
