"""Second derivatives are the same in both halves, as penalties on gradients need; those of Keras' own layers differ."""

import numpy as np
import pytest
import tensorflow as tf
import torch
from families import FAMILIES

from modelspec.agreement import FLOAT64_BOUND, compare_all
from modelspec.checkpoints import probing_weights
from ptmodels.auto import model_class as torch_class
from tfmodels.auto import model_class as keras_class
from tfmodels.weights import checkpoint_variables

IMAGES, LABELS = np.random.default_rng(0).standard_normal((3, 3, 32, 32)), np.array([0, 1, 2])
RATES = ("drop_path_rate", "drop_mlp_rate", "drop_conv_encoder_rate")


def torch_gradients_of_penalty(config, weights, training):
    # torch's fused attention has no second derivatives
    options = {"attn_implementation": "eager"} if config.model_type == "vit_msn" else {}
    model = torch_class(config.model_type).from_weights(config, weights, dtype="float64", **options).train(training)
    images = torch.from_numpy(IMAGES).requires_grad_()
    loss = model(images, labels=torch.from_numpy(LABELS)).loss
    (first,) = torch.autograd.grad(loss, images, create_graph=True)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(first.square().sum(), [images, *parameters.values()], materialize_grads=True)
    return {key: value.numpy() for key, value in zip(["pixel_values", *parameters], found, strict=True)}


def keras_gradients_of_penalty(config, weights, training, compiled):
    model = keras_class(config.model_type).from_weights(config, weights, dtype="float64")
    entries = {k: entry for k, entry in checkpoint_variables(model).items() if entry.variable.trainable}

    def gradients(images):
        variables = [entry.variable.value for entry in entries.values()]
        with tf.GradientTape() as outer:
            outer.watch(images)
            with tf.GradientTape() as inner:
                inner.watch(images)
                loss = model(images, labels=LABELS, training=training).loss
            penalty = tf.reduce_sum(tf.square(inner.gradient(loss, images)))
        return outer.gradient(penalty, [images, *variables], unconnected_gradients=tf.UnconnectedGradients.ZERO)

    images, *others = (tf.function(gradients) if compiled else gradients)(tf.constant(IMAGES))
    named = zip(entries.items(), others, strict=True)
    return {"pixel_values": images.numpy()} | {key: entry.to_checkpoint(value.numpy()) for (key, entry), value in named}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("config", FAMILIES, indirect=True)
def test_gradients_of_a_gradient_penalty(config, training, compiled):
    config = config.replace(**{rate: 0.0 for rate in RATES if hasattr(config, rate)})
    weights = probing_weights(config)
    wanted = torch_gradients_of_penalty(config, weights, training)
    found = keras_gradients_of_penalty(config, weights, training, compiled)
    largest = max(np.abs(value).max() for value in wanted.values())
    of_zero = [key for key, value in wanted.items() if np.abs(value).max() < 1e-12 * largest]
    assert all(np.abs(found[key]).max() < 1e-10 * largest for key in of_zero)
    found, wanted = ({k: v for k, v in side.items() if k not in of_zero} for side in (found, wanted))
    assert len(wanted) > len(of_zero) + 10
    failed = {key: entry for key, entry in compare_all(found, wanted, FLOAT64_BOUND).items() if not entry.passed}
    assert not failed
