"""Taking a model away: a program that runs where there is only torch, and ONNX.

What is written is compared with the live model, in a fresh process, before it takes its name. Twin:
`tfmodels/export.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelspec.agreement import BOUNDS, EXPORT_BOUND
from modelspec.atomic_file import atomic_file, new_folder
from modelspec.exports import ExportReport, add_metadata, check_exportable, check_image_size
from modelspec.exports.verification import Arrays, compare_with_live, metadata_of, pixel_cases
from modelspec.images import ImageProcessor
from ptmodels.artefacts import interpolates, save_program, smallest_image, write_onnx, write_program
from ptmodels.folding import fold_batch_norm as folded
from ptmodels.pretrained import PreTrainedModel


def export_program(
    model: PreTrainedModel,
    path: str | os.PathLike,
    *,
    image_size: int | Sequence[int] | None = None,
    image_processor: ImageProcessor | None = None,
    fold_batch_norm: bool = False,
    verbose: bool = True,
) -> ExportReport:
    """Writes `model`, in evaluation mode, as a `torch.export` program, which needs torch alone.

    It takes `pixel_values`, preprocessed images (B, C, H, W) of the model's floating dtype, and returns `logits`
    (B, num_labels). ViT-MSN interpolates its positions to the size of the images:

        program = torch.export.load(path).module()
        with torch.no_grad():
            logits = program(pixel_values=images)["logits"]

    A program for any size takes images of which the last map has two rows and two columns or more
    (`smallest_image`) and refuses smaller ones; those of NAT and DiNAT take some minutes to export and to load, longer
    than one for a single size. Loading unpickles: load no file of strangers.

    The file is written under another name, loaded in a fresh process, compared with `model` on photographs, and then
    takes its name; so a failed export leaves nothing, or the old file. `read_metadata` of `modelspec.exports` tells the
    differences that were found.

    Args:
        model: a model with a classification head.
        path: the file, usually `*.pt2`; it is replaced when the new one is whole.
        image_size: pixels, a number or (height, width), if the program is to be for one size only.
        image_processor: the model's, which the metadata tell, and which prepares the photographs for the comparison.
        fold_batch_norm: merge batch normalizations into the convolutions beside them (SwiftFormer).
        verbose: print the largest difference.

    Returns:
        How far the program is from the live model.

    Raises:
        ExportError: it is further than its bound: 2e-5 of the rms in float32.
        ValueError: the model has no classification head, or a bad argument.
    """
    check_exportable(model, path)
    size = check_image_size(image_size)
    with new_folder(Path(path).parent), atomic_file(path) as temporary:
        program = write_program(folded(model) if fold_batch_norm else model, temporary, size)
        report = _compare("program", path, model, _cases(model, size, image_processor), temporary)
        save_program(program, temporary, _metadata(report, model, image_processor))
    return _told(report, verbose)


def export_onnx(
    model: PreTrainedModel,
    path: str | os.PathLike,
    *,
    image_size: int | Sequence[int] | None = None,
    image_processor: ImageProcessor | None = None,
    fold_batch_norm: bool = False,
    verbose: bool = True,
) -> ExportReport:
    """Writes `model`, in evaluation mode, as ONNX, input and output as of `export_program`; compared as there.

        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(["logits"], {"pixel_values": images})

    For any size, `smallest_image` is the limit here too, which ONNX cannot check.

    Args:
        model: a model with a classification head, in float32.
        path: the file, usually `*.onnx`; it is replaced when the new one is whole.
        image_size: pixels, a number or (height, width), if it is to be for one size only; see `export_program`.
        image_processor: the model's, which the metadata tell, and which prepares the photographs for the comparison.
        fold_batch_norm: merge batch normalizations into the convolutions beside them (SwiftFormer).
        verbose: print the largest difference.

    Returns:
        How far the file is from the live model.

    Raises:
        ExportError: it is further than its bound, 2e-5 of the rms.
        ValueError: the model has no classification head, or a bad argument.
        ImportError: onnx, onnxruntime or onnxscript is not installed.
    """
    check_exportable(model, path, "onnx", "onnxruntime", "onnxscript", dtypes=("float32",))
    size = check_image_size(image_size)
    with new_folder(Path(path).parent), atomic_file(path) as temporary:
        write_onnx(folded(model) if fold_batch_norm else model, temporary, size)
        report = _compare("onnx", path, model, _cases(model, size, image_processor), temporary)
        add_metadata(temporary, "onnx", _metadata(report, model, image_processor))
    return _told(report, verbose)


def _cases(model: PreTrainedModel, size: tuple[int, int] | None, image_processor: ImageProcessor | None) -> Arrays:
    smallest = smallest_image(model.config)
    return pixel_cases(model.config, image_processor, size, any_size=size is None, smallest=smallest)


def _compare(kind: str, path: str | os.PathLike, model: PreTrainedModel, cases: Arrays, artefact: Path) -> ExportReport:
    expected = {case: _live(model, pixels) for case, pixels in cases.items()}
    bound = EXPORT_BOUND if model.dtype == torch.float32 else BOUNDS[str(model.dtype).removeprefix("torch.")]
    return compare_with_live(kind, path, "torch", cases, expected, bound, artefact=artefact)


def _live(model: PreTrainedModel, pixels: np.ndarray) -> np.ndarray:
    """Returns what the live model gives in evaluation mode for (B, C, H, W) images."""
    other = pixels.shape[2:] != (getattr(model.config, "image_size", None),) * 2
    options = {"interpolate_pos_encoding": True} if interpolates(model) and other else {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            images = torch.from_numpy(pixels).to(model.device, model.dtype)
            logits = model(images, output_hidden_states=False, return_dict=True, **options).logits
    finally:
        model.train(training)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu().numpy()


def _metadata(report: ExportReport, model: PreTrainedModel, image_processor: ImageProcessor | None) -> dict[str, Any]:
    preprocessing = None if image_processor is None else image_processor.to_dict()
    return metadata_of(report, model.config, data_format="channels_first", preprocessing=preprocessing)


def _told(report: ExportReport, verbose: bool) -> ExportReport:
    if verbose:
        print(report)
    return report
