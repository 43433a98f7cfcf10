"""What may be exported, to which sizes, and what that needs."""

import importlib.util
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelspec.extras import how_to_install

INPUT, OUTPUT = "pixel_values", "logits"  # of every artefact


def check_exportable(model: Any, path: str | os.PathLike, *packages: str, dtypes: Sequence[str] = ()) -> None:
    """Refuses what cannot be exported, before any work.

    Args:
        model: of either half.
        path: the file to write.
        packages: what the export needs besides the framework.
        dtypes: those of weights and computing that the format is for; all by default.

    Raises:
        ValueError: the model has no classification head or another dtype, or `path` is a folder.
        ImportError: a package is missing; the message says how to get it.
    """
    require_logits(model)
    for dtype in (getattr(model, "variable_dtype", model.dtype), getattr(model, "compute_dtype", model.dtype)):
        dtype = str(dtype).removeprefix("torch.")
        if dtypes and dtype not in dtypes:
            raise ValueError(f"{type(model).__name__} is in {dtype}; allowed here are {', '.join(dtypes)}")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    missing = missing_packages(*packages)
    if missing:
        raise ImportError(f"this export needs {' and '.join(missing)}: {how_to_install('export')}")


def require_logits(model: Any) -> None:
    """Raises ValueError if the model has no classification head."""
    name = type(model).__name__
    if "ForImageClassification" not in name:
        raise ValueError(f"{name} has no logits to serve; export the ForImageClassification class")
    if model.config.num_labels == 0:
        raise ValueError(f"{name} has no logits to serve, with num_labels=0; give it a classifier (reset_classifier)")


def missing_packages(*packages: str) -> list[str]:
    """Returns those that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def check_image_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Returns (height, width), from a number of pixels or a pair of them; None, for any size, stays None.

    Raises:
        ValueError: it is something else.
    """
    if image_size is None:
        return None
    try:
        height, width = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
        sizes = operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        sizes = (0, 0)
    if min(sizes) < 1:
        raise ValueError(f"image_size is {image_size!r}; give pixels, as a number or as (height, width)")
    return sizes
