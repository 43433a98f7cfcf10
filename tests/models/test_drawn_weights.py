"""Weights drawn in NumPy, and models constructed from their framework's own seed."""

import keras
import numpy as np
import pytest
import torch

import ptmodels.auto
import tfmodels.auto
from modelspec import get_config
from modelspec.checkpoints import initial_weights, parameter_shapes, probing_weights
from tfmodels.weights import read_weights


def test_initialisation_is_that_of_the_reference():
    config = get_config("swiftformer-xs")
    weights = initial_weights(config, parameter_shapes(config), seed=0)
    for key, value in weights.items():
        name = key.rpartition(".")[2]
        if name in ("bias", "running_mean", "num_batches_tracked"):
            assert not value.any(), key
        elif name in ("running_var", "layer_scale") or (name == "weight" and value.ndim == 1):
            assert (value == 1).all(), key
        elif name in ("layer_scale_1", "layer_scale_2"):
            assert (value == np.float32(1e-5)).all(), key
        elif name == "w_g":
            assert 0.7 < value.std() < 1.3, key
    matrices = np.concatenate([v.ravel() for k, v in weights.items() if v.ndim > 1 and k.endswith("weight")])
    assert matrices.std() == pytest.approx(0.02, rel=0.01) and abs(matrices.mean()) < 1e-4


def test_vit_msn_and_dinat_follow_their_own_fields():
    config = get_config("vit-msn-small", initializer_range=0.5)
    weights = initial_weights(config, parameter_shapes(config), seed=0)
    assert not weights["vit.embeddings.position_embeddings"].any() and not weights["vit.embeddings.cls_token"].any()
    assert weights["vit.encoder.layer.0.intermediate.dense.weight"].std() == pytest.approx(0.5, rel=0.02)
    config = get_config("nat-small")
    weights = initial_weights(config, parameter_shapes(config), seed=0)
    assert not weights["nat.encoder.levels.0.layers.0.attention.self.rpb"].any()
    assert (weights["nat.encoder.levels.0.layers.0.layer_scale_parameters"] == np.float32(1e-5)).all()


def test_a_key_draws_the_same_whatever_stands_around_it():
    config = get_config("swiftformer-xs")
    shapes = parameter_shapes(config)
    whole = initial_weights(config, shapes, seed=3)
    some = initial_weights(config, dict(list(reversed(shapes.items()))[:20]), seed=3)
    assert all(np.array_equal(value, whole[key]) for key, value in some.items())
    bare = initial_weights(config, parameter_shapes(config, "Model"), seed=3)
    assert all(np.array_equal(value, whole[f"swiftformer.{key}"]) for key, value in bare.items())


@pytest.mark.parametrize("seed", [-1, 1.5, True, None])
def test_a_bad_seed_is_refused(seed):
    config = get_config("swiftformer-xs")
    with pytest.raises(ValueError, match="give an integer >= 0"):
        initial_weights(config, parameter_shapes(config), seed)


@pytest.mark.parametrize("name", ["swiftformer-xs", "vit-msn-small", "nat-small", "dinat-mini"])
def test_probing_weights_make_every_parameter_matter(name):
    for key, value in probing_weights(get_config(name)).items():
        assert value.dtype == (np.int64 if key.endswith("num_batches_tracked") else np.float32)
        assert value.any(), key
        assert value.size < 2 or np.ptp(value) > 0.05, key
        if "layer_scale" in key:
            assert value.min() >= 0.2 and value.max() <= 1
        if key.endswith("running_var"):
            assert value.min() >= 0.5 and value.max() <= 2


def test_constructing_follows_the_seed_of_the_framework(config):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        keras.utils.set_random_seed(seed)
        ours = ptmodels.auto.model_class(config.model_type)(config)
        theirs = tfmodels.auto.model_class(config.model_type)(config)
        drawn.append([{k: v.numpy() for k, v in ours.state_dict().items()}, read_weights(theirs)])
    for first, second, third in zip(*drawn, strict=True):
        assert all(np.array_equal(value, second[key]) for key, value in first.items())
        assert not all(np.array_equal(value, third[key]) for key, value in first.items())
