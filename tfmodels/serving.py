"""What a SavedModel answers: its signatures."""

from collections.abc import Callable

import keras
import tensorflow as tf

from modelspec.exports import INPUT, OUTPUT
from modelspec.feature_kinds import feature_kinds
from modelspec.images import ImageProcessor
from tfmodels.encoded_images import decode_image
from tfmodels.features import compute_logits_and_features
from tfmodels.preprocessing import ImagePreprocessor
from tfmodels.pretrained import TFPreTrainedModel

_TOP_LABELS = 5


def make_servable(
    model: TFPreTrainedModel,
    sizes: tuple[int | None, int | None, int | None] = (None, None, None),
    image_processor: ImageProcessor | None = None,
    top_k: int | None = None,
) -> tuple[tf.Module, dict[str, Callable]]:
    """Returns a classifier's weights in a module, for `tf.saved_model.save`, and its signatures by name.

    Args:
        model: a classifier.
        sizes: batch, height and width of the images of `serving_default` and `features`; None is any.
        image_processor: of `serving_bytes`, which is left out without it.
        top_k: labels that `serving_bytes` gives for each image; five by default, or all if there are fewer.

    Raises:
        ValueError: `top_k` is not among 1 to the number of labels.
    """
    config = model.config
    top_k = check_top_k(model, top_k)
    dtype = "float64" if model.variable_dtype == "float64" else "float32"
    own_size = model.takes_any_size or sizes[1:] == (config.image_size, config.image_size)
    options = {} if own_size else {"interpolate_pos_encoding": True}
    kind = feature_kinds(config)[0]

    @tf.function(input_signature=[tf.TensorSpec(image_shape(model, sizes), dtype, name=INPUT)])
    def predict(pixel_values):  # once in the file, whichever signature asks
        logits, features = compute_logits_and_features(model, pixel_values, kind, **options)
        return keras.ops.cast(logits, dtype), keras.ops.cast(features, dtype)

    @tf.function(input_signature=predict.input_signature)
    def serve(pixel_values):
        return {OUTPUT: predict(pixel_values)[0]}

    @tf.function(input_signature=predict.input_signature)
    def features(pixel_values):
        return {"features": predict(pixel_values)[1]}

    module = tf.Module()
    module.weights = [weight.value for weight in model.weights]
    signatures = {"serving_default": serve, "features": features}
    if image_processor is not None:
        read = _reader(image_processor, model)
        labels = [config.id2label[number] for number in range(config.num_labels)]

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
        def serve_bytes(image_bytes):
            logits = predict(tf.cast(read(image_bytes), dtype))[0]
            numbers = tf.math.top_k(logits, top_k).indices  # of the scores, some of which may be 1.0 or 0.0 alike
            scores = tf.gather(_scores(logits, config.problem_type), numbers, batch_dims=1)
            return {"labels": tf.gather(tf.constant(labels), numbers), "scores": scores, OUTPUT: logits}

        signatures["serving_bytes"] = serve_bytes
    return module, signatures


def check_top_k(model: TFPreTrainedModel, top_k: int | None) -> int:
    """Returns how many labels `serving_bytes` gives for each image; five by default, or all if there are fewer.

    Raises:
        ValueError: it is not among 1 to the number of labels.
    """
    num_labels = model.config.num_labels
    top_k = min(_TOP_LABELS, num_labels) if top_k is None else top_k
    if not 1 <= top_k <= num_labels:
        raise ValueError(f"top_k is {top_k}; allowed are 1 to {num_labels}, the number of labels")
    return top_k


def _reader(image_processor: ImageProcessor, model: TFPreTrainedModel) -> Callable:
    """Returns a function from files (B,) to `pixel_values`, for a graph."""
    preprocessor = ImagePreprocessor(image_processor, data_format=model.data_format)
    size = image_processor.size if image_processor.do_resize else {"height": None, "width": None}
    pixels = tf.TensorSpec(image_shape(model, (None, size["height"], size["width"]))[1:], "float32")
    return lambda files: tf.map_fn(lambda file: preprocessor(decode_image(file)), files, fn_output_signature=pixels)


def _scores(logits, problem_type: str | None):
    """Probabilities: softmax, or sigmoid where an image has several labels; of a regression the values themselves."""
    if problem_type == "multi_label_classification":
        return tf.sigmoid(logits)
    return logits if problem_type == "regression" else tf.nn.softmax(logits)


def image_shape(model: TFPreTrainedModel, sizes: tuple) -> tuple:
    """Returns the shape of images of these sizes, batch, height and width, as the model's `data_format` says."""
    batch, height, width = sizes
    channels = model.config.num_channels
    return (batch, channels, height, width) if model.data_format == "channels_first" else (*sizes, channels)
