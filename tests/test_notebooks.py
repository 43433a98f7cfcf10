"""The notebooks run from top to bottom without a warning, in ten minutes, and are stored as they should be."""

import os
import tempfile
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 500_000  # bytes
LONGEST = 600  # seconds, of all notebooks together


@pytest.fixture
def written(tmp_path):
    """Writes a notebook of one cell for each source and returns its path."""

    def write(*sources):
        path = tmp_path / "some.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
        return path

    return write


@pytest.fixture(scope="module")
def seconds():
    """Notebook -> how long it took, of those that were run."""
    return {}


def ids(path: Path) -> str:
    return path.stem


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_a_notebook_runs(path, seconds):
    from execute import execute

    start = time.perf_counter()
    notebook = execute(path)
    seconds[path.stem] = time.perf_counter() - start
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.notebook
def test_all_notebooks_run_in_ten_minutes(seconds):
    if len(seconds) < len(NOTEBOOKS):
        pytest.skip("not all notebooks were run, or some failed")
    assert sum(seconds.values()) < LONGEST, {name: round(taken) for name, taken in seconds.items()}


@pytest.mark.notebook
@pytest.mark.parametrize(
    "complaint",
    [
        "import warnings; warnings.warn('do not')",
        "import os; os.write(2, b'from C\\n')",
        "print('WARNING:tensorflow:do not')",
    ],
)
def test_a_complaint_fails(written, complaint):
    from execute import execute

    with pytest.raises(ValueError, match="some.ipynb: cell 1 wrote to std"):
        execute(written("1 + 1", complaint))


@pytest.mark.notebook
def test_an_error_fails(written):
    from execute import execute
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(written("1 / 0"))


@pytest.mark.notebook
def test_a_notebook_runs_in_an_empty_folder_with_this_checkout(written):
    from execute import execute

    sources = "import os, parity; print(os.listdir(), parity.__file__)", "open('left behind', 'w').close()"
    notebook = execute(written(*sources))
    assert notebook.cells[0].outputs[0].text == f"[] {ROOT / 'parity' / '__init__.py'}\n"
    assert not Path("left behind").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_a_stored_notebook_is_clean(path):
    assert path.stat().st_size < LARGEST
    text = path.read_text(encoding="utf-8")
    for place in (str(ROOT), tempfile.gettempdir(), str(Path.home()), os.sep + "ipykernel_"):
        assert place + os.sep not in text, f"{path.name} names {place}"
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run top to bottom, and stored"
    for cell in code:
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"


def test_there_are_notebooks():
    titles = ("quickstart", "fine-tune", "export-and-serve", "neighborhood-attention", "prove-your-port")
    assert [path.stem for path in NOTEBOOKS] == [f"{number}-{title}" for number, title in enumerate(titles, start=1)]
