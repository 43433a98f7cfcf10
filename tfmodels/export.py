"""Taking a model away: a SavedModel that runs where there is only TensorFlow."""

import os
import tempfile
from pathlib import Path

import keras
import tensorflow as tf

from neighborhood.choice import prefer
from tfmodels.pretrained import TFPreTrainedModel


def export_saved_model(model: TFPreTrainedModel, directory: str | os.PathLike) -> None:
    """Writes `model` as a SavedModel with the signature `serving_default`.

    The signature takes `pixel_values`, preprocessed images of any batch and size, (B, C, H, W) or (B, H, W, C) as the
    model's `data_format` says, float32 (float64 for a float64 model), and returns `logits` (B, num_labels) of the same
    dtype. ViT-MSN interpolates its positions to the size of the images. It needs TensorFlow alone:

        served = tf.saved_model.load(directory)
        logits = served.signatures["serving_default"](pixel_values=images)["logits"]

    The folder is written beside `directory` and then takes its name, so a failed export leaves nothing, or the old one.

    Args:
        model: a model with a classification head.
        directory: a new or empty folder, or an earlier SavedModel, which is replaced.

    Raises:
        ValueError: the model has no classification head, or `directory` holds something else than a SavedModel.
    """
    directory = Path(directory)
    if "ForImageClassification" not in type(model).__name__:
        raise ValueError(f"{type(model).__name__} has no logits to serve; export the ForImageClassification class")
    if directory.exists() and not _replaceable(directory):
        raise ValueError(f"{directory} holds files that are no SavedModel; give a new or empty folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
        written = Path(temporary) / "written"
        servable = _servable(model)
        with prefer("composed"):  # native operations would need their library
            tf.saved_model.save(servable, str(written), signatures={"serving_default": servable.serve})
        if directory.exists():
            directory.rename(Path(temporary) / "old")
        written.rename(directory)


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and ((directory / "saved_model.pb").is_file() or not any(directory.iterdir()))


def _servable(model: TFPreTrainedModel) -> tf.Module:
    dtype = "float64" if model.variable_dtype == "float64" else "float32"
    channels = model.config.num_channels
    shape = (None, channels, None, None) if model.data_format == "channels_first" else (None, None, None, channels)
    any_size = {} if model.takes_any_size else {"interpolate_pos_encoding": True}

    @tf.function(input_signature=[tf.TensorSpec(shape, dtype, name="pixel_values")])
    def serve(pixel_values):
        outputs = model(pixel_values, output_hidden_states=False, return_dict=True, training=False, **any_size)
        return {"logits": keras.ops.cast(outputs["logits"], dtype)}

    module = tf.Module()
    module.weights = [weight.value for weight in model.weights]
    module.serve = serve
    return module
