"""Writing a model as a SavedModel, ONNX or LiteRT; `tfmodels/export.py` compares what comes of it.

Twin: `ptmodels/artefacts.py`.
"""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from modelspec.exports import INPUT, onnx_file
from modelspec.images import ImageProcessor
from neighborhood.choice import prefer
from tfmodels import ops
from tfmodels.layers import plain_products
from tfmodels.pretrained import TFPreTrainedModel
from tfmodels.serving import image_shape, make_servable

_OPSET = 18  # the newest that tf2onnx writes
# LiteRT's operations that keep float32 where matrix products and convolutions with weights are in 8 bits: in 8 bits,
# masks leave nothing of the scores, small divisors become zero, and norms lose most
_IN_FLOAT32 = (
    *(
        "ABS",
        "ADD",
        "BATCH_MATMUL",
        "BROADCAST_TO",
        "CONCATENATION",
        "DIV",
        "EXP",
        "GATHER",
        "GELU",
        "LESS",
        "LOGISTIC",
    ),
    *("MAXIMUM", "MEAN", "MUL", "NEG", "PAD", "PADV2", "POW", "RELU", "RESHAPE", "RSQRT", "SELECT_V2", "SOFTMAX"),
    *("SQRT", "SQUARE", "SQUARED_DIFFERENCE", "STRIDED_SLICE", "SUB", "SUM", "TANH", "TRANSPOSE"),
)


def write_saved_model(
    model: TFPreTrainedModel,
    directory: str | os.PathLike,
    *,
    image_processor: ImageProcessor | None = None,
    top_k: int | None = None,
    native: bool = False,
) -> None:
    """Writes a SavedModel for images of any batch and size; arguments are those of `export_saved_model`."""
    if native:
        ops.load()
    with prefer("native" if native else "composed"):
        module, signatures = make_servable(model, image_processor=image_processor, top_k=top_k)
        tf.saved_model.save(module, os.fspath(directory), signatures=signatures)


def write_onnx(model: TFPreTrainedModel, path: str | os.PathLike, image_size: tuple[int, int] | None = None) -> None:
    """Writes ONNX for one size, (height, width) in pixels, or for any."""
    height, width = image_size or (None, None)
    _, signatures = make_servable(model, (None, height, width))
    shape = image_shape(model, ("batch", height or "height", width or "width"))
    onnx_file.write_onnx(path, _to_onnx(signatures["serving_default"]), shape, model.config.num_labels)


def write_litert(
    model: TFPreTrainedModel,
    path: str | os.PathLike,
    image_size: tuple[int, int],
    *,
    quantization: str | None = None,
    calibration: np.ndarray | None = None,
) -> None:
    """Writes LiteRT for one image of one size; arguments are those of `export_litert`.

    Args:
        model: as there.
        path: the file.
        image_size: (height, width) in pixels.
        quantization: as there.
        calibration: of int8, preprocessed images (N, C, H, W), or as the model's `data_format` says.
    """
    module, signatures = make_servable(model, (1, *image_size))
    del signatures["features"]
    with prefer("composed"), plain_products(), tempfile.TemporaryDirectory(prefix="litert-") as folder:
        tf.saved_model.save(module, folder, signatures=signatures)
        # from the functions themselves, models of Keras silently become NaN
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if quantization is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if quantization == "float16":
            converter.target_spec.supported_types = [tf.float16]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TensorFlow's own interpreter, which calibrates, will be dropped
            content = converter.convert() if calibration is None else _in_8_bits(converter, calibration)
        Path(path).write_bytes(content)


def _in_8_bits(converter: tf.lite.TFLiteConverter, calibration: np.ndarray) -> bytes:
    """Converts with matrix products and convolutions in 8 bits."""

    def images():
        return ({INPUT: image[None]} for image in calibration)

    converter.representative_dataset = images
    options = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=list(_IN_FLOAT32))
    quantizer = tf.lite.experimental.QuantizationDebugger(
        converter=converter, debug_dataset=images, debug_options=options
    )
    return quantizer.get_nondebug_quantized_model()


def _to_onnx(serve: tf.types.experimental.PolymorphicFunction):
    """Returns an `onnx.ModelProto`. Of operations that it does not know, tf2onnx says nothing: check it."""
    import tf2onnx

    with _tf2onnx_set_up(), prefer("composed"), plain_products():
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
