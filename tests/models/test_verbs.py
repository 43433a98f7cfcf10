"""The verbs that every model has: forward_features, forward_head, reset_classifier, feature_info."""

import keras
import numpy as np
import pytest
import torch
from families import slow_but_for
from halves import HALVES, to_numpy

from modelspec.checkpoints import parameter_shapes, probing_weights
from ptmodels.auto import model_class as torch_class
from tfmodels.auto import model_class as keras_class


@pytest.fixture(params=HALVES, ids=lambda half: half.name)
def half(request):
    return request.param


def make(half, config, architecture="ForImageClassification"):
    """A model in evaluation mode, and images for it."""
    model_class = torch_class if half.name == "torch" else keras_class
    weights = probing_weights(config, architecture=architecture)
    model = model_class(config.model_type, architecture).from_weights(config, weights)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    if half.name == "torch":
        return model.eval(), torch.from_numpy(images)
    return model, images


def test_head_of_features_is_the_model(half, config):
    model, images = make(half, config)
    features = model.forward_features(images)
    np.testing.assert_allclose(to_numpy(model.forward_head(features)), to_numpy(model(images).logits), atol=1e-6)
    pooled = model.forward_head(features, pre_logits=True)
    assert tuple(pooled.shape) == (2, model.feature_info[-1]["num_chs"])


def test_features_are_the_bare_models(half, config):
    model, images = make(half, config)
    bare, _ = make(half, config, "Model")
    weights = probing_weights(config)
    prefix = f"{config.base_model_prefix}."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    bare = type(bare).from_weights(config, own)
    if half.name == "torch":
        bare.eval()
    np.testing.assert_allclose(
        to_numpy(model.forward_features(images)), to_numpy(bare(images).last_hidden_state), atol=1e-6
    )
    np.testing.assert_array_equal(to_numpy(bare.forward_features(images)), to_numpy(bare(images).last_hidden_state))
    with pytest.raises(ValueError, match="Model has no classification head"):
        bare.forward_head(bare.forward_features(images))
    with pytest.raises(ValueError, match="Model has no classification head"):
        bare.reset_classifier(3)


def test_features_information_is_that_of_the_modules(half, config):
    model, images = make(half, config, "Model")
    named = dict(model.named_modules()) if half.name == "torch" else None
    assert model.feature_info
    for stage in model.feature_info:
        if named is not None:
            assert stage["module"] in named
        assert stage["reduction"] >= 4
    features = model.forward_features(images)
    last = model.feature_info[-1]
    assert last["num_chs"] in features.shape
    if config.model_type != "vit_msn":
        assert 32 // last["reduction"] in features.shape


def test_a_new_classifier_has_new_labels_and_weights(half, config, tmp_path):
    model, images = make(half, config)
    before = to_numpy(model.forward_head(model.forward_features(images), pre_logits=True))
    model.reset_classifier(3)
    assert to_numpy(model(images).logits).shape == (2, 3)
    assert model.config.num_labels == 3 and model.config.id2label[2] == "LABEL_2"
    shapes = {key: tuple(shape) for key, shape in model.checkpoint_shapes().items()}
    assert shapes == parameter_shapes(model.config)
    np.testing.assert_array_equal(to_numpy(model.forward_head(model.forward_features(images), pre_logits=True)), before)
    head = config.num_labels_keys[0]
    weights = {key: value for key, value in shapes.items() if key.startswith(f"{head}.")}
    assert weights
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    np.testing.assert_allclose(to_numpy(again(images).logits), to_numpy(model(images).logits), atol=1e-6)
    model.reset_classifier(0)
    np.testing.assert_array_equal(to_numpy(model(images).logits), before)
    with pytest.raises(ValueError, match="num_labels is -1"):
        model.reset_classifier(-1)


@slow_but_for("swiftformer")
def test_a_new_classifier_learns(config, digits):
    keras.utils.set_random_seed(0)
    model = keras_class(config.model_type)(config)
    model.compile("sgd")
    model.fit(digits[0][:20], digits[1][:20], verbose=0)
    model.reset_classifier(10)
    model.compile(keras.optimizers.AdamW(2e-3))
    losses = model.fit(digits[0], digits[1], epochs=3, batch_size=25, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert len(model.trainable_variables) == len({id(v) for v in model.trainable_variables})
