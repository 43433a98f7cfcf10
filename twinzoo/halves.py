"""The two halves behind one face: importing one, making and loading its classifiers, and asking them."""

import os
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from modelspec import ImageProcessor, get_variant, list_models, load_config
from modelspec.checkpoints import CheckpointWarning, initial_weights
from modelspec.extras import how_to_install
from modelspec.training import EvaluationBatches
from parity.quiet_import import import_tensorflow

FRAMEWORKS = ("tf", "torch")


def import_half(framework: str, *, start: bool = True) -> tuple[ModuleType, ModuleType]:
    """Imports one half, and only that; returns its `auto` and its `training`.

    Args:
        framework: `"tf"` or `"torch"`.
        start: make TensorFlow's devices ready, if this is its first import.

    Raises:
        ImportError: the framework is not installed; the message says how to get it.
        ValueError: another name.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework is {framework!r}; allowed are {', '.join(FRAMEWORKS)}")
    try:
        if framework == "tf":
            import_tensorflow(start=start)
            import tfmodels.auto
            import tfmodels.training

            return tfmodels.auto, tfmodels.training
        import ptmodels.auto
        import ptmodels.training

        return ptmodels.auto, ptmodels.training
    except ModuleNotFoundError as error:
        raise ImportError(f"--framework {framework} needs {error.name}: {how_to_install(framework)}") from error


def load_classifier(
    framework: str,
    source: str | os.PathLike,
    *,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Loads a checkpoint into a classifier of one half, ready for inference.

    Args:
        framework: `"tf"` or `"torch"`.
        source: a folder, a file, a Hub id, or the name of a published variant.
        class_names: of the head; if the checkpoint's are others, it gets a new head, the same one in both halves.
        seed: of a new head.
        **options: of `from_pretrained`.

    Raises:
        SourceError, CheckpointError, ValueError: it cannot be loaded.
    """
    auto, _ = import_half(framework)
    cls = auto.model_class(load_config(source).model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # what is said of a head that is replaced here
        model, report = cls.from_pretrained(source, output_loading_info=True, **options)
    if class_names is None:
        return model
    fresh = set(report.newly_initialised)
    if list(model.config.id2label.values()) != list(class_names):
        model.reset_classifier(len(class_names))
        model.config.id2label = dict(enumerate(class_names))
        heads = model.config.num_labels_keys
        fresh |= {key for key in model.checkpoint_shapes() if key.partition(".")[0] in heads}
    shapes = model.checkpoint_shapes()
    _assign(framework, model, initial_weights(model.config, {key: shapes[key] for key in sorted(fresh)}, seed))
    return model


def _assign(framework: str, model: Any, weights: Mapping[str, np.ndarray]) -> None:
    if framework == "tf":
        from tfmodels.weights import assign_weights

        assign_weights(model, dict(weights))
    else:
        import torch

        model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=False)


def fresh_classifier(
    framework: str, name: str, class_names: list[str], overrides: Mapping[str, Any], seed: int, **options: Any
) -> Any:
    """Makes a published variant with fresh weights, the same ones in both halves.

    Args:
        framework: `"tf"` or `"torch"`.
        name: of the variant.
        class_names: of the head.
        overrides: config fields that differ from the published ones.
        seed: of the weights.
        **options: of `from_weights`, such as `dtype`.

    Raises:
        ValueError: a name or a value is not allowed.
    """
    auto, _ = import_half(framework)
    labels = dict(enumerate(class_names))
    return auto.create_model(name, seed=seed, config_overrides={**overrides, "id2label": labels}, **options)


def load_processor(source: str | os.PathLike, image_size: int | None = None) -> ImageProcessor:
    """Returns the image processor of a checkpoint or of a published variant.

    Args:
        source: as of `load_classifier`.
        image_size: side in pixels instead of its own.

    Raises:
        SourceError, ValueError: there is none, or it is not allowed.
    """
    changed: dict[str, Any] = {} if image_size is None else {"size": image_size}
    if str(source) in list_models():
        return ImageProcessor(**{**get_variant(str(source)).image_processor, **changed})
    return ImageProcessor.from_pretrained(source, **changed)


def predict_logits(framework: str, model: Any, batches: EvaluationBatches) -> np.ndarray:
    """Returns the logits (N, num_labels) of all images."""
    _, training = import_half(framework)
    return training.predict_logits(model, batches)
