"""Taking a model away: a SavedModel that runs where there is only TensorFlow, ONNX and LiteRT.

What is written is compared with the live model, in a fresh process, before it takes its name. Twin:
`ptmodels/export.py`.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from modelspec.agreement import BOUNDS, EXPORT_BOUND, QUANTIZED_BOUNDS, SAVED_MODEL_BOUND
from modelspec.atomic_file import atomic_file, new_folder
from modelspec.exports import ExportReport, add_metadata, check_exportable, check_image_size, require_logits
from modelspec.exports.verification import Arrays, compare_with_live, file_cases, metadata_of, pixel_cases
from modelspec.feature_kinds import feature_kinds
from modelspec.images import ImageProcessor
from neighborhood import native as kernels
from tfmodels.artefacts import write_litert, write_onnx, write_saved_model
from tfmodels.features import compute_features
from tfmodels.folding import fold_batch_norm as folded
from tfmodels.pretrained import TFPreTrainedModel
from tfmodels.serving import check_top_k


def export_saved_model(
    model: TFPreTrainedModel,
    directory: str | os.PathLike,
    *,
    image_processor: ImageProcessor | None = None,
    top_k: int | None = None,
    fold_batch_norm: bool = False,
    native: bool = False,
    verbose: bool = True,
) -> ExportReport:
    """Writes `model` as a SavedModel with the signatures `serving_default`, `features` and `serving_bytes`.

    `serving_default` takes `pixel_values`, preprocessed images of any batch and size, (B, C, H, W) or (B, H, W, C) as
    the model's `data_format` says, float32 (float64 for a float64 model), and returns `logits` (B, num_labels) of the
    same dtype; `features` takes the same and returns `features` (B, C), the first of
    `modelspec.feature_kinds.feature_kinds`. ViT-MSN interpolates its positions to the size of the images.

    `serving_bytes` takes `image_bytes` (B,), the bytes of JPEG, PNG, GIF or BMP files of any sizes (of one in a batch,
    if `image_processor` does not resize), decodes and preprocesses them as it does, and returns `labels` and `scores`
    (B, top_k), the most probable first, and `logits` (B, num_labels). All need TensorFlow alone:

        served = tf.saved_model.load(directory)
        logits = served.signatures["serving_default"](pixel_values=images)["logits"]
        labels = served.signatures["serving_bytes"](image_bytes=[open("photo.jpg", "rb").read()])["labels"]

    The folder is written beside `directory`, loaded in a fresh process, compared with `model` on photographs, and then
    takes its name; so a failed export leaves nothing, or the old one. `read_metadata` of `modelspec.exports` tells the
    differences that were found.

    Args:
        model: a model with a classification head.
        directory: a new or empty folder, or an earlier SavedModel, which is replaced.
        image_processor: of `serving_bytes`; without it, that signature is left out.
        top_k: labels that `serving_bytes` gives for each image; five by default, or all if there are fewer.
        fold_batch_norm: merge batch normalizations into the convolutions beside them (SwiftFormer).
        native: keep the native neighborhood attention (NAT, DiNAT), which is faster and needs this package:
            `tfmodels.ops.load()` before the SavedModel is loaded.
        verbose: print the largest difference.

    Returns:
        How far the SavedModel is from the live model.

    Raises:
        ExportError: it is further than its bound: 1e-5 of the rms in float32.
        ValueError: the model has no classification head, `directory` holds something else than a SavedModel, or a bad
            argument.
        neighborhood.native.NativeUnavailableError: `native`, and the kernels cannot be loaded.
    """
    directory = Path(directory)
    require_logits(model)
    top_k = check_top_k(model, top_k)
    if directory.exists() and not _replaceable(directory):
        raise ValueError(f"{directory} holds files that are no SavedModel; give a new or empty folder")
    inputs = {
        f"{signature} {case}": pixels
        for signature in ("serving_default", "features")
        for case, pixels in pixel_cases(model.config, image_processor, None, any_size=True).items()
    }
    expected = {case: _live(model, pixels, case.split()[0]) for case, pixels in inputs.items()}
    inputs = {case: _laid_out(model, pixels) for case, pixels in inputs.items()}
    if image_processor is not None:
        for case, (files, pixels) in file_cases(model.config, image_processor).items():
            inputs[f"serving_bytes {case}"], expected[f"serving_bytes {case}"] = files, _live(model, pixels)
    with (
        new_folder(directory.parent),
        tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary,
    ):
        written = Path(temporary) / "written"
        exported = folded(model) if fold_batch_norm else model
        write_saved_model(exported, written, image_processor=image_processor, top_k=top_k, native=native)
        library = kernels.TENSORFLOW_LIBRARY if native else None
        bound = _bound(model, SAVED_MODEL_BOUND)
        options: dict[str, Any] = {"library": library, "config": model.config, "top_k": top_k}
        report = compare_with_live(
            "saved_model", directory, "keras", inputs, expected, bound, artefact=written, **options
        )
        add_metadata(written, "saved_model", _metadata(report, model, image_processor, native=native))
        if directory.exists():
            directory.rename(Path(temporary) / "old")
        written.rename(directory)
    return _told(report, verbose)


def export_onnx(
    model: TFPreTrainedModel,
    path: str | os.PathLike,
    *,
    image_size: int | Sequence[int] | None = None,
    image_processor: ImageProcessor | None = None,
    fold_batch_norm: bool = False,
    verbose: bool = True,
) -> ExportReport:
    """Writes `model` as ONNX, input and output as of the SavedModel's `serving_default`; compared as there.

        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(["logits"], {"pixel_values": images})

    NAT and DiNAT take minutes to convert for any size.

    Args:
        model: a model with a classification head, in float32.
        path: the file, usually `*.onnx`; it is replaced when the new one is whole.
        image_size: pixels, a number or (height, width), if it is to be for one size only.
        image_processor: the model's, which the metadata tell, and which prepares the photographs for the comparison.
        fold_batch_norm: merge batch normalizations into the convolutions beside them (SwiftFormer).
        verbose: print the largest difference.

    Returns:
        How far the file is from the live model.

    Raises:
        ExportError: it is further than its bound, 2e-5 of the rms.
        ValueError: the model has no classification head or holds what ONNX does not define, or a bad argument.
        ImportError: onnx, onnxruntime or tf2onnx is not installed.
    """
    check_exportable(model, path, "onnx", "onnxruntime", "tf2onnx", dtypes=("float32",))
    size = check_image_size(image_size)
    with new_folder(Path(path).parent), atomic_file(path) as temporary:
        write_onnx(folded(model) if fold_batch_norm else model, temporary, size)
        cases = pixel_cases(model.config, image_processor, size, any_size=size is None)
        report = _compare("onnx", path, model, cases, temporary)
        add_metadata(temporary, "onnx", _metadata(report, model, image_processor))
    return _told(report, verbose)


def export_litert(
    model: TFPreTrainedModel,
    path: str | os.PathLike,
    *,
    image_size: int | Sequence[int] | None = None,
    image_processor: ImageProcessor | None = None,
    quantization: str | None = None,
    calibration_images: Iterable[Any] | None = None,
    fold_batch_norm: bool = False,
    verbose: bool = True,
) -> ExportReport:
    """Writes `model` for LiteRT: one image of one size at a time, float32 in and out, as the SavedModel; compared so.

        runner = ai_edge_litert.interpreter.Interpreter(path).get_signature_runner("serving_default")
        logits = runner(pixel_values=image)["logits"]

    What is to be quantized is first converted and compared in float32, since the bounds of fewer bits would hide a
    graph that is wrong. The metadata tell those differences under `float32`, and how far an int8 file is from the live
    model on the photographs, where it may be as far as it likes, under `unbounded_differences`.

    Args:
        model: a model with a classification head, in float32.
        path: the file, usually `*.tflite`; it is replaced when the new one is whole.
        image_size: pixels, a number or (height, width); that of `image_processor` by default.
        image_processor: the model's, which the metadata tell, and which prepares the photographs for the comparison and
            the calibration.
        quantization: None for float32, `"float16"` for weights of half the size, `"int8"` for matrix products and
            convolutions in 8 bits; norms, softmax and attention keep float32.
        calibration_images: for `"int8"`, some hundred images as the model will see them: files, arrays, or what else
            `image_processor` takes.
        fold_batch_norm: merge batch normalizations into the convolutions beside them (SwiftFormer).
        verbose: print the largest difference.

    Returns:
        How far the file is from the live model.

    Raises:
        ExportError: it is further than its bound, as a part of the rms: 2e-5, of float16 3e-2, of int8 3e-1, this on
            the calibration images; or it was further than 2e-5 before it was quantized.
        ValueError: the model has no classification head, or a bad argument.
        ImportError: ai-edge-litert is not installed.
    """
    check_exportable(model, path, "ai_edge_litert", dtypes=("float32",))
    if quantization not in (None, *QUANTIZED_BOUNDS):
        raise ValueError(f"quantization is {quantization!r}; allowed are None, {', '.join(QUANTIZED_BOUNDS)}")
    if image_size is None and image_processor is not None and image_processor.do_resize:
        image_size = (image_processor.size["height"], image_processor.size["width"])
    size = check_image_size(image_size)
    if size is None:
        raise ValueError("image_size is None; LiteRT needs one size, as a number or as (height, width)")
    calibration = _calibration(model, quantization, calibration_images, image_processor, size)
    with new_folder(Path(path).parent), atomic_file(path) as temporary:
        exported = folded(model) if fold_batch_norm else model
        photographs = pixel_cases(model.config, image_processor, size, any_size=False)
        more: dict[str, Any] = {"quantization": quantization}
        bound, cases = EXPORT_BOUND, photographs
        unbounded: tuple[str, ...] = ()
        if quantization is not None:
            write_litert(exported, temporary, size)
            cases = {f"float32 {case}": pixels for case, pixels in photographs.items()}
            whole = _compare("litert", path, model, cases, temporary)
            more["float32"] = {"differences": whole.differences, "bound": whole.bound}
            bound, cases = QUANTIZED_BOUNDS[quantization], photographs
        if calibration is not None:  # of other images, 8 bits promise nothing
            cases = {f"calibration {len(calibration)}x{size[0]}x{size[1]}": calibration, **photographs}
            unbounded = tuple(photographs)
        laid_out = None if calibration is None else _laid_out(model, calibration)
        write_litert(exported, temporary, size, quantization=quantization, calibration=laid_out)
        report = _compare("litert", path, model, cases, temporary, bound, unbounded)
        if unbounded:
            more["unbounded_differences"] = report.unbounded
        add_metadata(temporary, "litert", _metadata(report, model, image_processor, **more))
    return _told(report, verbose)


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and ((directory / "saved_model.pb").is_file() or not any(directory.iterdir()))


def _calibration(
    model: TFPreTrainedModel,
    quantization: str | None,
    images: Iterable[Any] | None,
    image_processor: ImageProcessor | None,
    size: tuple[int, int],
) -> np.ndarray | None:
    if (quantization == "int8") != (images is not None):
        raise ValueError(
            f"quantization={quantization!r} with calibration_images={images!r}; int8 needs them, and only it"
        )
    if images is None:
        return None
    if image_processor is None:
        raise ValueError("image_processor is None; calibration_images need one")
    return image_processor(list(images), size=size, do_resize=True, data_format="channels_first").pixel_values


def _live(model: TFPreTrainedModel, pixels: np.ndarray, signature: str = "serving_default") -> np.ndarray:
    """Returns what the live model gives for (B, C, H, W) images, outside of any graph."""
    config = model.config
    own_size = model.takes_any_size or pixels.shape[2:] == (config.image_size, config.image_size)
    options = {} if own_size else {"interpolate_pos_encoding": True}
    images = _laid_out(model, pixels)
    if signature == "features":
        found = compute_features(model, images, feature_kinds(config)[0], **options)
    else:
        found = model(images, output_hidden_states=False, return_dict=True, training=False, **options)["logits"]
    return keras.ops.convert_to_numpy(found if found.dtype == "float64" else keras.ops.cast(found, "float32"))


def _laid_out(model: TFPreTrainedModel, pixels: np.ndarray) -> np.ndarray:
    """Turns (B, C, H, W) images into what the model takes."""
    pixels = pixels.astype("float64" if model.variable_dtype == "float64" else "float32", copy=False)
    return pixels if model.data_format == "channels_first" else np.ascontiguousarray(np.moveaxis(pixels, 1, -1))


def _bound(model: TFPreTrainedModel, float32_bound: float) -> float:
    return float32_bound if model.compute_dtype == "float32" else BOUNDS[model.compute_dtype]


def _compare(
    kind: str,
    path: str | os.PathLike,
    model: TFPreTrainedModel,
    cases: Arrays,
    artefact: Path,
    bound: float = EXPORT_BOUND,
    unbounded: Sequence[str] = (),
) -> ExportReport:
    expected = {case: _live(model, pixels) for case, pixels in cases.items()}
    inputs = {case: _laid_out(model, pixels) for case, pixels in cases.items()}
    return compare_with_live(kind, path, "keras", inputs, expected, bound, artefact=artefact, unbounded=unbounded)


def _metadata(
    report: ExportReport, model: TFPreTrainedModel, image_processor: ImageProcessor | None, **more: Any
) -> dict[str, Any]:
    preprocessing = None if image_processor is None else image_processor.to_dict()
    return metadata_of(report, model.config, data_format=model.data_format, preprocessing=preprocessing, **more)


def _told(report: ExportReport, verbose: bool) -> ExportReport:
    if verbose:
        print(report)
    return report
