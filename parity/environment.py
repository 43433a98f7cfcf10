"""What a report is made on: versions, machine, threads; and how it computes."""

import contextlib
import datetime
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

_DISTRIBUTIONS = ("twinzoo", "numpy", "Pillow", "keras", "tensorflow", "torch")


def describe_environment() -> dict[str, Any]:
    """Returns versions, machine and thread counts; to be called when both frameworks are imported."""
    import tensorflow as tf
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name.lower()] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name.lower()] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "device": "cpu",
        },
        # TensorFlow says 0 where it takes every core
        "threads": {
            "torch": torch.get_num_threads(),
            "tensorflow": tf.config.threading.get_intra_op_parallelism_threads(),
        },
    }


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Keeps the frameworks that are imported from computing float32 products in TF32, where a GPU would."""
    torch: Any = sys.modules.get("torch")
    tf: Any = sys.modules.get("tensorflow")
    kept = []
    if torch is not None:
        kept = [(place, place.allow_tf32) for place in (torch.backends.cuda.matmul, torch.backends.cudnn)]
    in_tensorflow = tf is not None and tf.config.experimental.tensor_float_32_execution_enabled()
    try:
        for place, _ in kept:
            place.allow_tf32 = False
        if in_tensorflow:
            tf.config.experimental.enable_tensor_float_32_execution(False)
        yield
    finally:
        for place, value in kept:
            place.allow_tf32 = value
        if in_tensorflow:
            tf.config.experimental.enable_tensor_float_32_execution(True)
