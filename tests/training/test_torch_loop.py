"""A plain torch loop trains the models, and step by step they stay with the Keras half."""

import copy
import pickle

import keras
import numpy as np
import pytest
import torch

import ptmodels.auto
import tfmodels.auto
from modelspec.agreement import FLOAT64_BOUND, compare_all
from modelspec.checkpoints import probing_weights
from tfmodels.weights import read_weights


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(config):
    return ptmodels.auto.model_class(config.model_type)(config)


def train(model, images, labels, epochs=3, **autocast):
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    model.train()
    for _ in range(epochs):
        for batch in torch.arange(len(images)).split(25):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
                loss = model(images[batch], labels=labels[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", [{}, {"dtype": "bfloat16"}], ids=["float32", "autocast"])
def test_the_loss_falls(config, digits, precision):
    losses = train(make(config), *map(torch.from_numpy, digits), **precision)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_steps_in_float64_equal_those_of_keras(config):
    """SGD with momentum, all weights, statistics of the batches included, after each of four steps."""
    config = config.replace(num_labels=5)
    weights = probing_weights(config)
    generator = np.random.default_rng(0)
    images, labels = generator.standard_normal((4, 3, 32, 32)), np.array([0, 1, 2, 3])
    # Keras keeps hyperparameters in its default float; these are exact in float32 as well
    learning_rate, momentum = 2.0**-7, 0.875
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    try:
        theirs = tfmodels.auto.model_class(config.model_type).from_weights(config.replace(), weights, dtype="float64")
        theirs.compile(keras.optimizers.SGD(learning_rate, momentum=momentum))
        ours = ptmodels.auto.model_class(config.model_type).from_weights(config.replace(), weights, dtype="float64")
        optimizer = torch.optim.SGD(ours.train().parameters(), learning_rate, momentum=momentum)
        for _ in range(4):
            theirs.reset_metrics()  # else the loss is the mean of all steps, before Keras 3.15
            keras_loss = theirs.train_on_batch(images, labels)
            loss = ours(torch.from_numpy(images), labels=torch.from_numpy(labels)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert float(np.ravel(keras_loss)[0]) == pytest.approx(loss.item(), rel=1e-12)
            reference = {key: value.numpy() for key, value in ours.state_dict().items()}
            agreements = compare_all(read_weights(theirs), reference, FLOAT64_BOUND)
            assert not {key: value for key, value in agreements.items() if not value.passed}
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def test_models_and_outputs_can_be_copied_and_pickled(config, digits):
    model = make(config).eval()
    images = torch.from_numpy(digits[0][:2])
    with torch.no_grad():
        output = model(images, output_hidden_states=True)
        torch.testing.assert_close(copy.deepcopy(model)(images).logits, output.logits, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(output))
    assert type(again) is type(output) and torch.equal(again.hidden_states[0], output.hidden_states[0])


def test_a_graph_is_exported_with_its_output_class(config, digits):
    model = make(config).eval()
    images = torch.from_numpy(digits[0][:2])
    exported = torch.export.export(model, (), {"pixel_values": images})
    output = exported.module()(pixel_values=images)
    assert type(output) is type(model(images))
    torch.testing.assert_close(output.logits, model(images).logits)


def test_eval_mode_drops_nothing(config, digits):
    rate = {"drop_path_rate": 0.5} if config.model_type == "swiftformer" else {"hidden_dropout_prob": 0.5}
    model = make(config.replace(**rate)).eval()
    images = torch.from_numpy(digits[0][:4])
    torch.testing.assert_close(model(images).logits, model(images).logits, rtol=0, atol=0)
