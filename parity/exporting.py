"""What users take away, against the live models: every exported artefact in a fresh process of its runtime alone."""

import copy
import dataclasses
import gc
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.agreement import EXPORT_BOUND, Agreement, compare, root_mean_square
from modelspec.configs import ModelConfig
from modelspec.exports import missing_packages
from modelspec.exports.fresh_process import outputs_of, run_jobs, write_job
from modelspec.extras import how_to_install
from parity.halves import Arrays

_FEW_BLOCKS = 5


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A way of taking a model away.

    Attributes:
        half: `"keras"` or `"torch"`.
        name: of the artefact, a key of `modelspec.exports.fresh_process.ABSENT`.
        suffix: of its file.
        process: artefacts with the same one run in the same fresh process.
        needs: packages, besides the half's framework, without which it is left out.
        any_size: whether it takes images of any size: `"always"`, `"never"`, or `"short"`, that is, of NAT and DiNAT
            only where these have few blocks, since every block adds many seconds to such an export.
    """

    half: str
    name: str
    suffix: str
    process: str
    needs: tuple[str, ...] = ()
    any_size: str = "always"


ARTEFACTS = (
    Artefact("keras", "saved_model", "", "tensorflow"),
    Artefact("keras", "keras_file", ".keras", "tensorflow"),
    Artefact("keras", "onnx", ".onnx", "runtimes", ("onnx", "tf2onnx", "onnxruntime"), "short"),
    Artefact("keras", "litert", ".tflite", "runtimes", ("ai_edge_litert",), "never"),
    Artefact("torch", "program", ".pt2", "torch", (), "short"),
    Artefact("torch", "onnx", ".onnx", "runtimes", ("onnx", "onnxscript", "onnxruntime"), "short"),
)


def notes(config: ModelConfig, image_size: tuple[int, int]) -> list[str]:
    """Returns sentences on what `compare_exports` leaves out: for want of packages, of time, of pixels."""
    found = [
        f"Left out: {artefact.name} of {artefact.half}, which needs {' and '.join(missing)}; "
        f"{how_to_install('export')}."
        for artefact in ARTEFACTS
        if (missing := missing_packages(*artefact.needs))
    ]
    size = f"{image_size[0]}x{image_size[1]}"
    fixed = [f"{artefact.name} of {artefact.half}" for artefact in _present() if not _takes_any_size(artefact, config)]
    if fixed:
        found.append(f"Exported for images of {size} alone: {', '.join(fixed)}.")
    smallest = _smallest_image(config)
    if min(image_size) < smallest and _is_short(config):
        found.append(f"Torch's exports for any size take {smallest} pixels and more: not compared at {size}.")
    return found


def _present() -> list[Artefact]:
    return [artefact for artefact in ARTEFACTS if not missing_packages(*artefact.needs)]


def compare_exports(
    config: ModelConfig, weights: Arrays, pixel_values: np.ndarray
) -> Iterator[tuple[str, str, str, Agreement]]:
    """Yields (half, artefact, case, agreement) of logits in float32; differences are measured against the rms.

    The cases are the image, a batch of three, and, for what takes any size, an image of another; they are named by
    their shapes. `notes` says what is left out.

    Args:
        config: of a classifier.
        weights: checkpoint key -> array, complete.
        pixel_values: (1, C, H, W) float32.

    Raises:
        RuntimeError: an artefact could not be made, or did not run; the message is one line.
    """
    cases = _cases(config, pixel_values)
    jobs, expected = {}, {}
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        for half, make in LIVE.items():
            model, logits = make(config, weights, cases)
            for artefact in (artefact for artefact in _present() if artefact.half == half):
                expected[artefact] = {case: logits[case] for case in _admitted(artefact, config, cases)}
                inputs = {case: cases[case] for case in expected[artefact]}
                name = f"{artefact.name} of {half}"
                path = Path(folder) / f"{half}-{artefact.name}{artefact.suffix}"
                jobs[artefact] = write_job(artefact.name, path, inputs, Path(folder), name=name)
                _export(artefact, model, jobs[artefact]["artefact"], pixel_values.shape[2:])
            del model
        _forget()
        processes: dict[str, list[dict[str, Any]]] = {artefact.process: [] for artefact in jobs}
        for artefact, job in jobs.items():
            processes[artefact.process].append(job)
        run_jobs(processes, Path(folder))
        for artefact, references in expected.items():
            logits = outputs_of(jobs[artefact])
            for case, reference in references.items():
                agreement = compare(logits[case], reference, root_mean_square(reference), EXPORT_BOUND)
                yield artefact.half, artefact.name, case, agreement


def _cases(config: ModelConfig, pixel_values: np.ndarray) -> Arrays:
    """Returns images by case: the image, a batch of it and its mirror images, and another size."""
    batch = np.concatenate([pixel_values, pixel_values[..., ::-1], pixel_values[..., ::-1, :]])
    height, width = pixel_values.shape[2:]
    sizes = 3 * height // 4 + 1, 5 * width // 8 + 1
    if min(sizes) <= 2 * config.feature_info[-1]["reduction"]:
        sizes = 5 * height // 2 + 1, 9 * width // 4 + 1
    rows, columns = (np.arange(size) % length for size, length in zip(sizes, (height, width), strict=True))
    other = pixel_values[:, :, rows][..., columns]  # a part of the image, or the image repeated
    found = [np.ascontiguousarray(images) for images in (pixel_values, batch, other)]
    return {"{}x{}x{}".format(len(images), *images.shape[2:]): images for images in found}


def _positions(config: ModelConfig, images: np.ndarray) -> dict[str, bool]:
    other = config.model_type == "vit_msn" and images.shape[2:] != (config.image_size, config.image_size)
    return {"interpolate_pos_encoding": True} if other else {}


def live_keras(config: ModelConfig, weights: Arrays, cases: Arrays) -> tuple[Any, Arrays]:
    """Returns the Keras model in float32, and its logits by case."""
    import keras

    from tfmodels.auto import model_class

    with keras.device("cpu:0"):
        model = model_class(config.model_type).from_weights(copy.deepcopy(config), weights, dtype="float32")
        logits = {
            case: keras.ops.convert_to_numpy(model(images, training=False, **_positions(config, images)).logits)
            for case, images in cases.items()
        }
    return model, logits


def live_torch(config: ModelConfig, weights: Arrays, cases: Arrays) -> tuple[Any, Arrays]:
    """Returns the PyTorch model in float32, and its logits by case."""
    import torch

    from ptmodels.auto import model_class

    model = model_class(config.model_type).from_weights(copy.deepcopy(config), weights, dtype="float32").eval()
    with torch.no_grad():
        logits = {
            case: model(torch.from_numpy(images), **_positions(config, images)).logits.numpy()
            for case, images in cases.items()
        }
    return model, logits


LIVE = {"keras": live_keras, "torch": live_torch}


def _admitted(artefact: Artefact, config: ModelConfig, cases: Arrays) -> list[str]:
    """Returns the cases whose images the artefact takes."""
    sizes = {case: images.shape[2:] for case, images in cases.items()}
    own_size = next(iter(sizes.values()))
    if not _takes_any_size(artefact, config):
        return [case for case, size in sizes.items() if size == own_size]
    smallest = _smallest_image(config) if artefact.half == "torch" else 1
    return [case for case, size in sizes.items() if min(size) >= smallest]


def _takes_any_size(artefact: Artefact, config: ModelConfig) -> bool:
    return artefact.any_size == "always" or (artefact.any_size == "short" and _is_short(config))


def _is_short(config: ModelConfig) -> bool:
    return config.model_type not in ("nat", "dinat") or sum(config.depths) <= _FEW_BLOCKS


def _smallest_image(config: ModelConfig) -> int:
    from ptmodels.artefacts import smallest_image

    return smallest_image(config)


def _export(artefact: Artefact, model: Any, path: str, image_size: tuple[int, int]) -> None:
    options = {} if _takes_any_size(artefact, model.config) else {"image_size": image_size}
    try:
        if artefact.name == "keras_file":
            model.save(path)
            return
        package = {"keras": "tfmodels", "torch": "ptmodels"}[artefact.half]
        artefacts = importlib.import_module(f"{package}.artefacts")
        getattr(artefacts, f"write_{artefact.name}")(model, path, **options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"{artefact.name} of {artefact.half} could not be exported: {reason}") from error


def _forget() -> None:
    import keras

    keras.backend.clear_session()
    gc.collect()
