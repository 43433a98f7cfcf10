"""What a report was made on: versions, machine, threads."""

import datetime
import os
import platform
from importlib import metadata
from typing import Any

_DISTRIBUTIONS = ("twinzoo", "numpy", "Pillow", "keras", "tensorflow", "torch")


def describe_environment() -> dict[str, Any]:
    """Returns versions, machine and thread counts; to be called when both frameworks are imported."""
    import tensorflow as tf
    import torch

    versions = {"python": platform.python_version()}
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
