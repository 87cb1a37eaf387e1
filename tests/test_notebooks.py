"""The notebooks, each from top to bottom in a kernel of its own."""

from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
PLOTS = {"sharding_sweep.ipynb": 2}
"""How many pictures a notebook shows."""


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def test_there_are_notebooks_to_run():
    assert "sharding_sweep.ipynb" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_without_outputs(name):
    notebook = read(name)

    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    notebook = read(name)
    client = NotebookClient(
        notebook,
        km=KernelManager(kernel_name="python3"),
        timeout=300,
        resources={"metadata": {"path": str(tmp_path)}},
    )

    with client.setup_kernel(cleanup_kc=True):
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)  # one that raises is an error here

    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == PLOTS.get(name, 0)
    assert all(output.output_type != "error" for output in shown)
