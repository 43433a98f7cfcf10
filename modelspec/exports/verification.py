"""An export is compared with the live model, in a fresh process, before it is handed over."""

import dataclasses
import math
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.agreement import Agreement, compare, root_mean_square
from modelspec.configs import ModelConfig
from modelspec.exports.fresh_process import Arrays, outputs_of, run_jobs, write_job
from modelspec.exports.photographs import default_size, photographs_as_pixels, read_photographs
from modelspec.exports.served_labels import compare_labels_and_scores
from modelspec.images import ImageProcessor


class ExportError(ValueError):
    """An artefact differs from the live model by more than its bound, or does not run. Nothing was written."""


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """How far an artefact is from the live model.

    Attributes:
        path: where it is.
        kind: `"saved_model"`, `"onnx"`, `"litert"` or `"program"`.
        half: `"keras"` or `"torch"`: of the live model.
        differences: case (a signature, if there are several, and the images) -> largest difference, as a part of the
            rms of what the live model gave.
        bound: the largest that was allowed.
        unbounded: the same as `differences`, of cases in which any was allowed.
    """

    path: str
    kind: str
    half: str
    differences: dict[str, float]
    bound: float
    unbounded: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def largest(self) -> float:
        """The largest of `differences`."""
        return max(self.differences.values())

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.kind} of {self.half}, in a fresh process at most {self.largest:.1e} of the rms away "
            f"from the live model (bound {self.bound:.0e})"
        )


def pixel_cases(
    config: ModelConfig,
    image_processor: ImageProcessor | None,
    image_size: tuple[int, int] | None,
    *,
    any_size: bool,
    smallest: int = 1,
) -> Arrays:
    """Returns the photographs as `pixel_values` (B, C, H, W) float32: all in one batch, and one of another size.

    Args:
        config: of the model.
        image_processor: the model's, or that of a published variant of its family.
        image_size: (height, width); `modelspec.exports.photographs.default_size` by default.
        any_size: whether the artefact takes another size, too.
        smallest: side of the smallest image that it takes, in pixels.
    """
    pixels = photographs_as_pixels(config, image_processor, image_size)
    cases = {_name(pixels): pixels}
    if any_size:
        height, width = (max(size, smallest) for size in _other_size(*pixels.shape[2:]))
        other = photographs_as_pixels(config, image_processor, (height, width))[:1]
        cases[_name(other)] = other
    return cases


def file_cases(config: ModelConfig, image_processor: ImageProcessor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the photographs as files (B,) of bytes, and as `pixel_values` (B, C, H, W) float32, by case.

    They are as they are, of several sizes in one batch; to an image processor that does not resize, which wants one
    size in a batch, they come resized and encoded again: in the size that the model is for, and one in another.

    Args:
        config: of the model.
        image_processor: what makes pixels of files.
    """
    if image_processor.do_resize:
        batches = {"photographs": read_photographs()}
    else:
        size = default_size(config, image_processor)
        other = _other_size(*size)
        batches = {
            "4x{}x{}".format(*size): read_photographs(size),
            "1x{}x{}".format(*other): read_photographs(other)[:1],
        }
    # to convert is the graph's nature, which decodes all files to RGB
    options: dict[str, Any] = {"do_convert_rgb": True, "data_format": "channels_first"}
    return {case: (np.array(files), image_processor(files, **options).pixel_values) for case, files in batches.items()}


def _other_size(height: int, width: int) -> tuple[int, int]:
    return 5 * height // 4 + 1, 3 * width // 4 + 1


def _name(pixels: np.ndarray) -> str:
    return "{}x{}x{}".format(len(pixels), *pixels.shape[2:])


def compare_with_live(
    kind: str,
    path: str | os.PathLike,
    half: str,
    inputs: Arrays,
    expected: Arrays,
    bound: float,
    *,
    artefact: str | os.PathLike,
    library: Path | None = None,
    unbounded: Collection[str] = (),
    config: ModelConfig | None = None,
    top_k: int = 0,
) -> ExportReport:
    """Runs an artefact in a fresh process and compares what it gives with what the live model gave.

    Args:
        kind: of the artefact.
        path: what it will be called.
        half: of the live model.
        inputs: case -> images; see `modelspec.exports.run_artefact`.
        expected: case -> what the live model gave.
        bound: the largest difference that is allowed, as a part of the rms.
        artefact: where it is now.
        library: of native operations that it needs.
        unbounded: cases in which any finite difference is allowed, and is told.
        config: of the live model, if the artefact serves labels.
        top_k: how many.

    Raises:
        ExportError: it differs by more, or does not run.
    """
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        job = write_job(kind, Path(artefact), inputs, Path(folder), library=library)
        try:
            run_jobs({kind: [job]}, Path(folder))
        except RuntimeError as error:
            raise ExportError(f"the {kind} of {half} does not run, and nothing was written: {error}") from error
        actual = outputs_of(job)
    bounds = {case: math.inf if case in unbounded else bound for case in inputs}
    found = {
        case: compare(actual[case], expected[case], root_mean_square(expected[case]), bounds[case]) for case in inputs
    }
    if config is not None:
        found |= {
            f"{case} {output}": row
            for case in inputs
            if case.startswith("serving_bytes ") and found[case].passed
            for output, row in _labels_and_scores(actual, case, config, top_k, bound).items()
        }
    _refuse(kind, half, found, bound)
    told = {case: found.pop(case).max_rel for case in unbounded}
    differences = {case: row.max_rel for case, row in found.items() if not case.endswith(" labels")}  # all or nothing
    return ExportReport(os.fspath(path), kind, half, differences, bound, told)


def _labels_and_scores(
    actual: Arrays, case: str, config: ModelConfig, top_k: int, bound: float
) -> dict[str, Agreement]:
    labels, scores = actual[f"{case} labels"], actual[f"{case} scores"]
    return compare_labels_and_scores(labels, scores, actual[case], config, top_k, bound)


def _refuse(kind: str, half: str, found: Mapping[str, Agreement], bound: float) -> None:
    failed = {case: row for case, row in found.items() if not row.passed}
    if failed:
        told = "; ".join(f"{case}: {row.reason or f'{row.max_rel:.1e} of the rms'}" for case, row in failed.items())
        raise ExportError(
            f"the {kind} of {half} differs from the live model, and nothing was written: {told} (bound {bound:.0e})"
        )


def metadata_of(report: ExportReport, config: ModelConfig, **more: Any) -> dict[str, Any]:
    """Returns what an artefact is told about itself; see `modelspec.exports.read_metadata`."""
    return {
        "format": report.kind,
        "half": report.half,
        "model_type": config.model_type,
        "labels": [config.id2label[number] for number in sorted(config.id2label)],
        "differences": report.differences,
        "bound": report.bound,
        **more,
    }
