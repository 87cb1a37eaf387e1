"""A real Jupyter kernel: build, interrupt in the middle of a long call, close, build again."""

import asyncio
import threading
import time

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from jaxllm import LLM, SamplingParams

PROMPT = "def main("
OPTIONS = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 24}

BUILD = f"""
from pathlib import Path
from jaxllm import LLM, SamplingParams
llm = LLM("demo", **{OPTIONS})
def answer():
    return llm.generate({PROMPT!r}, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
answer()
"""
# Hours of work, of which a second or two are done.
LONG = f"""
Path("started").touch()
llm.generate([{PROMPT!r}] * 20_000, SamplingParams(temperature=1, max_tokens=200, ignore_eos=True))
"""
AGAIN = "answer()"
REBUILD = f"""
llm.close()
llm = LLM("demo", **{OPTIONS})
answer()
"""
HELD = "llm.stats()['num_pages_held']"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A notebook's kernel, whose files are all in a temporary folder; cells run one by one."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    client = NotebookClient(
        nbformat.v4.new_notebook(),
        km=KernelManager(kernel_name="python3"),
        timeout=300,
        allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    with client.setup_kernel(cleanup_kc=True):
        yield client


def run(kernel, source):
    """Runs a cell and returns what it shows: its value, or its error, or else all it printed."""
    cell = nbformat.v4.new_code_cell(source)
    kernel.nb.cells.append(cell)
    kernel.execute_cell(cell, len(kernel.nb.cells) - 1)
    kinds = {output.output_type: output for output in cell.outputs}
    if "error" in kinds:
        return kinds["error"].ename
    if "execute_result" in kinds:
        return kinds["execute_result"].data["text/plain"]
    # IPython cannot format some tracebacks, and prints them instead.
    return "".join(output.get("text", "") for output in cell.outputs)


def interrupt_once_started(kernel, folder):
    """Interrupts the kernel as a notebook's button does, a second after the cell began."""
    while not (folder / "started").exists():
        time.sleep(0.05)
    time.sleep(1)
    kernel.km.interrupt_kernel()
    asyncio.get_event_loop().close()  # Jupyter's, made for this thread


@pytest.mark.slow
def test_interrupted_cell_can_be_followed_by_any_other(kernel, tmp_path):
    with LLM("demo", use_tqdm_on_load=False, **OPTIONS) as llm:
        params = SamplingParams(temperature=0, max_tokens=8)
        expected = repr(llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text)
    button = threading.Thread(target=interrupt_once_started, args=(kernel, tmp_path))

    assert run(kernel, BUILD) == expected
    button.start()
    assert "KeyboardInterrupt" in run(kernel, LONG)
    button.join()
    assert run(kernel, HELD) == "0"
    assert run(kernel, AGAIN) == expected
    assert run(kernel, REBUILD) == expected
    assert run(kernel, BUILD) == expected  # over the old one, as a cell that is run again
