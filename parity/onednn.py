"""What a half gives where its framework computes on CPUs without oneDNN, which sums in an order of its own.

Torch is asked to at run time. TensorFlow reads `TF_ENABLE_ONEDNN_OPTS` once, as it starts: its half runs in a fresh
process, in which this module is the program.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.configs import ModelConfig
from modelspec.configs.base import config_from_dict
from parity import halves
from parity.errors import ComparisonError, naming_failures
from parity.halves import Arrays

Calls = dict[str, dict[str, Any]]  # level -> options of the forward pass

_PROGRAM = "parity.onednn"
_ROOT = Path(__file__).parents[1]


def outputs_without_onednn(
    half: str, config: ModelConfig, weights: Arrays, pixel_values: np.ndarray, calls: Calls
) -> dict[str, Arrays]:
    """Runs a half in float32, on the CPU and without oneDNN.

    Args:
        half: `"torch"` or `"keras"`.
        config: of a classifier.
        weights: checkpoint key -> array, complete.
        pixel_values: (B, C, H, W) float32.
        calls: level -> options of its forward pass: truth values and arrays of integers.

    Returns:
        Level -> the model's outputs by name.

    Raises:
        RuntimeError: the fresh process failed; the message is its last line.
    """
    if half == "keras":
        return _in_fresh_process(config, weights, pixel_values, calls)
    with _torch_without_onednn():
        return _run(half, config, weights, pixel_values, calls)


def _run(half: str, config: ModelConfig, weights: Arrays, images: np.ndarray, calls: Calls) -> dict[str, Arrays]:
    tap = halves.tap(half, config, weights, "float32", images)
    return {level: tap.run(**options) for level, options in calls.items()}


@contextlib.contextmanager
def _torch_without_onednn() -> Iterator[None]:
    import torch

    onednn: Any = torch.backends.mkldnn
    kept = onednn.enabled
    onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = kept


def _in_fresh_process(config: ModelConfig, weights: Arrays, images: np.ndarray, calls: Calls) -> dict[str, Arrays]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(_ROOT)])),
        "TF_ENABLE_ONEDNN_OPTS": "0",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = {"config": config.to_dict(), "calls": calls}
        (folder / "task.json").write_text(json.dumps(task, default=np.ndarray.tolist), "utf-8")
        _write(folder / "weights.npz", weights)
        _write(folder / "images.npz", {"pixel_values": images})
        command = [sys.executable, "-P", "-m", _PROGRAM, name]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode != 0:
            said = [line for line in ended.stderr.splitlines() if line.strip()]
            raise RuntimeError(said[-1] if said else f"a fresh process ended with status {ended.returncode}")
        return {level: _read(folder / f"{level}.npz") for level in calls}


def _main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text("utf-8"))
    calls = {
        level: {option: np.array(value) if isinstance(value, list) else value for option, value in options.items()}
        for level, options in task["calls"].items()
    }
    images = _read(folder / "images.npz")["pixel_values"]
    halves.import_frameworks()
    found = _run("keras", config_from_dict(task["config"]), _read(folder / "weights.npz"), images, calls)
    for level, outputs in found.items():
        _write(folder / f"{level}.npz", outputs)


def _write(path: Path, arrays: Arrays) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # an array could be named `allow_pickle`; ours are not


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    try:
        with naming_failures("in a fresh process"):
            _main(Path(sys.argv[1]))
    except ComparisonError as failure:
        sys.exit(str(failure))  # its last line
