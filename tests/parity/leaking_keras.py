"""A Keras half that is less exact in float32, here and in fresh processes that find this folder in their path."""

import os

from parity import halves

LEAK = 3e-5  # of the scale of an output: more than four times what a half rounds, less than the bound
WHEN = "TWINZOO_TEST_LEAK"  # "always", or "onednn" for where TensorFlow computes with it


def leaks() -> bool:
    with_onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
    return os.environ.get(WHEN) == "always" or (os.environ.get(WHEN) == "onednn" and with_onednn)


def build(config, weights, dtype):
    import keras

    model = halves.build_keras(config, weights, dtype)
    if dtype == "float32" and leaks():
        projection = model.vit.embeddings.patch_embeddings.projection
        call = projection.call

        def lossy(inputs):
            output = call(inputs)
            signs = keras.ops.ones_like(output) - 2 * (keras.ops.arange(output.shape[-1], dtype="float32") % 2)
            return output + LEAK * keras.ops.sqrt(keras.ops.mean(keras.ops.square(output))) * signs

        projection.call = lossy
    return model


def plant() -> None:
    halves.BUILD["keras"] = build
