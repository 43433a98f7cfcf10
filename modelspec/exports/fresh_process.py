"""Running artefacts in fresh processes of their runtimes, without the packages that they must not need."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.exports import run_artefact

OURS = ("modelspec", "neighborhood", "tfmodels", "ptmodels", "parity", "twinzoo")
_RUNTIMES_LACK = (*OURS, "torch", "tensorflow", "keras")
# kind of artefact -> the packages that running it must not need
ABSENT = {
    "saved_model": (*OURS, "torch", "keras"),
    "keras_file": ("ptmodels", "parity", "twinzoo", "torch"),
    "program": (*OURS, "tensorflow", "keras"),
    "onnx": _RUNTIMES_LACK,
    "litert": _RUNTIMES_LACK,
}

Arrays = dict[str, np.ndarray]


def write_job(
    kind: str,
    artefact: Path,
    inputs: Arrays,
    folder: Path,
    *,
    name: str | None = None,
    absent: Sequence[str] | None = None,
    library: Path | None = None,
) -> dict[str, Any]:
    """Saves the inputs of an artefact and returns what `run_jobs` is told.

    Args:
        kind: a key of `ABSENT`.
        artefact: the file or folder.
        inputs: case -> images; see `modelspec.exports.run_artefact`.
        folder: for temporary files.
        name: of the artefact, in messages and files; its kind by default.
        absent: packages that it must not need; those of its kind by default.
        library: of native operations of TensorFlow, which is loaded before.
    """
    stem = folder / (name or kind).replace(" ", "-")
    np.savez(f"{stem}-inputs.npz", **inputs)  # type: ignore[arg-type] # to mypy, any of them might be allow_pickle
    return {
        "kind": kind,
        "name": name or kind,
        "artefact": os.fspath(artefact),
        "absent": list(ABSENT[kind] if absent is None else absent),
        "library": None if library is None else os.fspath(library),
        "inputs": f"{stem}-inputs.npz",
        "outputs": f"{stem}-outputs.npz",
    }


def run_jobs(jobs: Mapping[str, Sequence[dict[str, Any]]], folder: Path) -> None:
    """Does jobs, in one fresh process for each key, side by side. A job's outputs lie in its `outputs` afterwards.

    Args:
        jobs: name of a process -> its jobs.
        folder: for temporary files.

    Raises:
        RuntimeError: an artefact did not run, or needed what it must not; the message is one line.
    """
    root = str(Path(run_artefact.__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": "-1",  # the live models run on the CPU
    }
    with contextlib.ExitStack() as stack:
        processes = []
        for name, its_jobs in jobs.items():
            path = folder / f"{name}.json"
            path.write_text(json.dumps(list(its_jobs)), "utf-8")
            command = [sys.executable, "-P", run_artefact.__file__, str(path)]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            processes.append(stack.enter_context(process))
            stack.callback(processes[-1].kill)
        for process in processes:
            said, logged = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"a fresh process failed: {_reason(process.returncode, said, logged)}")


def _reason(status: int, said: str, logged: str) -> str:
    """The last line that it said; of a process that had no time to say anything, how it ended as well."""
    last_said, last_logged = ([line for line in text.split("\n") if line.strip()][-1:] for text in (said, logged))
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    return ": ".join(last_said or [ended, *last_logged])


def outputs_of(job: Mapping[str, Any]) -> Arrays:
    """Returns what came of a job that was done, by case; see `modelspec.exports.run_artefact`."""
    with np.load(job["outputs"]) as outputs:
        return dict(outputs)
