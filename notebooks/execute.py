"""Runs notebooks from top to bottom, each in a fresh kernel and an empty folder; as a command, stores their outputs.

python notebooks/execute.py                     # all of them, in place
python notebooks/execute.py 1-quickstart.ipynb  # this one
"""

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat
from PIL import Image
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent
SECONDS_PER_CELL = 300
_PNG = "image/png"
_WARNING = re.compile(r"^WARNING|Warning: ", re.MULTILINE)


def find_notebooks() -> list[Path]:
    """Returns the notebooks of this folder, in the order of their numbers."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> nbformat.NotebookNode:
    """Runs a notebook and returns it with its outputs; the file is left as it is.

    The kernel works in an empty folder, which is gone afterwards, and imports this checkout.

    Args:
        path: the file.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        ValueError: a cell wrote to standard error, as warnings and progress bars do, or a warning to standard output,
            as TensorFlow does in notebooks; the message names it.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as settings:
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        environment |= {
            "IPYTHONDIR": settings,  # nobody's start-up files
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")])),
        }
        client = nbclient.NotebookClient(
            notebook,
            timeout=SECONDS_PER_CELL,
            kernel_name="python3",
            coalesce_streams=True,
            # sockets that are files: a port could be taken between its choice and its use
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{settings}/socket"}}),
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)
    complaint = find_complaint(notebook)
    if complaint is not None:
        raise ValueError(f"{path.name}: {complaint}")
    return notebook


def find_complaint(notebook: nbformat.NotebookNode) -> str | None:
    """Returns the first text on standard error, or warning on standard output, and its cell; None if there is none."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and (output.name == "stderr" or _WARNING.search(output.text)):
                return f"cell {number} wrote to {output.name}:\n{output.text}"
    return None


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Takes out of a notebook what differs from run to run or from machine to machine, and shrinks its figures."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if _PNG in output.get("data", {}):
                output.data[_PNG] = base64.b64encode(shrink(base64.b64decode(output.data[_PNG]))).decode("ascii")


def shrink(png: bytes) -> bytes:
    """Returns a PNG with at most 192 colours, or the given one if that is no smaller."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(192, kmeans=3)
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return min(written.getvalue(), png, key=len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help="files of this folder; default all")
    names = parser.parse_args().names
    for path in [FOLDER / name for name in names] or find_notebooks():
        start = time.perf_counter()
        notebook = execute(path)
        tidy(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
