"""Taking a model away: a SavedModel that runs where there is only TensorFlow, ONNX and LiteRT.

Twin: `ptmodels/export.py`.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import tensorflow as tf

from modelspec.atomic_file import atomic_file
from modelspec.exports import INPUT, OUTPUT, check_exportable, check_image_size, require_logits, write_onnx
from neighborhood.choice import prefer
from tfmodels.pretrained import TFPreTrainedModel

_OPSET = 18  # the newest that tf2onnx writes


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
    require_logits(model)
    if directory.exists() and not _replaceable(directory):
        raise ValueError(f"{directory} holds files that are no SavedModel; give a new or empty folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
        written = Path(temporary) / "written"
        servable = _servable(model, (None, None, None))
        with prefer("composed"):  # native operations would need their library
            tf.saved_model.save(servable, str(written), signatures={"serving_default": servable.serve})
        if directory.exists():
            directory.rename(Path(temporary) / "old")
        written.rename(directory)


def export_onnx(
    model: TFPreTrainedModel, path: str | os.PathLike, *, image_size: int | Sequence[int] | None = None
) -> None:
    """Writes `model` as ONNX, input and output as of `export_saved_model`.

        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(["logits"], {"pixel_values": images})

    NAT and DiNAT take minutes to convert, for any size several times as many as for a single one.

    Args:
        model: a model with a classification head, in float32.
        path: the file, usually `*.onnx`; it is replaced when the new one is whole.
        image_size: pixels, a number or (height, width), if it is to be for one size only.

    Raises:
        ValueError: the model has no classification head or holds what ONNX does not define, or a bad argument.
        ImportError: onnx or tf2onnx is not installed.
    """
    check_exportable(model, path, "onnx", "tf2onnx", dtypes=("float32",))
    height, width = check_image_size(image_size) or (None, None)
    servable = _servable(model, (None, height, width))
    shape = _shape(model, ("batch", height or "height", width or "width"))
    write_onnx(path, _to_onnx(servable.serve), shape, model.config.num_labels)


def export_litert(model: TFPreTrainedModel, path: str | os.PathLike, *, image_size: int | Sequence[int]) -> None:
    """Writes `model` for LiteRT, in float32: one image of one size at a time, input and output as of the SavedModel.

        runner = ai_edge_litert.interpreter.Interpreter(path).get_signature_runner("serving_default")
        logits = runner(pixel_values=image)["logits"]

    Args:
        model: a model with a classification head, in float32.
        path: the file, usually `*.tflite`; it is replaced when the new one is whole.
        image_size: pixels, a number or (height, width).

    Raises:
        ValueError: the model has no classification head, or a bad argument.
    """
    check_exportable(model, path, dtypes=("float32",))
    if image_size is None:
        raise ValueError("image_size is None; LiteRT needs one size, as a number or as (height, width)")
    servable = _servable(model, (1, *check_image_size(image_size)))
    with prefer("composed"), atomic_file(path) as temporary:
        function = servable.serve.get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], servable)
        temporary.write_bytes(converter.convert())


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and ((directory / "saved_model.pb").is_file() or not any(directory.iterdir()))


def _servable(model: TFPreTrainedModel, sizes: tuple[int | None, int | None, int | None]) -> tf.Module:
    """Returns a module whose `serve` takes images of these sizes, batch, height and width; None is any."""
    dtype = "float64" if model.variable_dtype == "float64" else "float32"
    own_size = model.takes_any_size or sizes[1:] == (model.config.image_size, model.config.image_size)
    options = {} if own_size else {"interpolate_pos_encoding": True}

    @tf.function(input_signature=[tf.TensorSpec(_shape(model, sizes), dtype, name=INPUT)])
    def serve(pixel_values):
        outputs = model(pixel_values, output_hidden_states=False, return_dict=True, training=False, **options)
        return {OUTPUT: keras.ops.cast(outputs["logits"], dtype)}

    module = tf.Module()
    module.weights = [weight.value for weight in model.weights]
    module.serve = serve
    return module


def _shape(model: TFPreTrainedModel, sizes: tuple) -> tuple:
    batch, height, width = sizes
    channels = model.config.num_channels
    return (batch, channels, height, width) if model.data_format == "channels_first" else (*sizes, channels)


def _to_onnx(serve: tf.types.experimental.PolymorphicFunction):
    """Returns an `onnx.ModelProto`. Of operations that it does not know, tf2onnx says nothing: check it."""
    import tf2onnx

    with _tf2onnx_set_up(), prefer("composed"):
        return tf2onnx.convert.from_function(serve, serve.input_signature, opset=_OPSET)[0]


@contextlib.contextmanager
def _tf2onnx_set_up() -> Iterator[None]:
    """Within the context, tf2onnx is silent and does not copy the graph, weights and all, before each optimization."""
    logger, variable = logging.getLogger("tf2onnx"), "TF2ONNX_CATCH_ERRORS"
    level, value = logger.level, os.environ.get(variable)
    logger.setLevel(logging.CRITICAL)
    os.environ[variable] = "FALSE"  # it copied to be able to pass over optimizations that fail
    try:
        yield
    finally:
        logger.setLevel(level)
        if value is None:
            del os.environ[variable]
        else:
            os.environ[variable] = value
