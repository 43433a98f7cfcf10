"""Frozen stages keep every bit in training, and both halves freeze the same."""

import keras
import numpy as np
import pytest
import torch

import ptmodels.auto
import tfmodels.auto
from modelspec import parameter_groups
from modelspec.agreement import compare_all
from modelspec.checkpoints import probing_weights
from tfmodels.weights import checkpoint_variables, read_weights


def models(config):
    weights = probing_weights(config)
    return [
        auto.model_class(config.model_type).from_weights(config.replace(), weights, dtype="float64")
        for auto in (ptmodels.auto, tfmodels.auto)
    ]


def state(model):
    return {key: value.numpy().copy() for key, value in model.state_dict().items()}


def changed(before, after):
    return {key for key in before if not np.array_equal(before[key], after[key])}


def test_both_halves_train_what_is_left(config):
    images, labels = np.random.default_rng(0).standard_normal((4, 3, 32, 32)), np.array([0, 1, 2, 3])
    ours, theirs = models(config)
    before = state(ours)
    frozen = parameter_groups.frozen_keys(config, before, "stage1")
    for model in (ours, theirs):
        model.freeze(upto="stage1")
    parameters = dict(ours.named_parameters())
    trained = {key for key, parameter in parameters.items() if parameter.requires_grad}
    assert trained == set(parameters) - frozen
    assert trained == {key for key, entry in checkpoint_variables(theirs).items() if entry.variable.trainable}

    optimizer = torch.optim.SGD(ours.train().parameters(), 2**-4)
    ours(torch.from_numpy(images), labels=torch.from_numpy(labels)).loss.backward()
    optimizer.step()
    theirs.compile(keras.optimizers.SGD(2**-4), run_eagerly=True)
    theirs.train_on_batch(images, labels)
    for after in (state(ours), read_weights(theirs)):
        moved = changed(before, after)
        assert not moved & frozen
        assert "running_mean" not in str(frozen) or any("running_mean" in key for key in moved)
        assert all(key in moved for key in trained if key.endswith("classifier.weight"))
    agreements = compare_all(read_weights(theirs), state(ours), 1e-10)
    assert not {key: value for key, value in agreements.items() if not value.passed}


def test_unfreezing_trains_all_again(swiftformer_config):
    ours, theirs = models(swiftformer_config)
    for model in (ours, theirs):
        model.freeze("stage1")
        model.freeze("stem")  # nothing is thawed by it
    count = sum(parameter.requires_grad for parameter in ours.parameters())
    assert count == len(theirs.trainable_variables) < len(list(ours.parameters()))
    norm = ours.swiftformer.patch_embed.patch_embedding[1]
    assert ours.train() is ours and not norm.training and ours.norm.training
    for model in (ours, theirs):
        model.unfreeze()
    assert norm.training and all(parameter.requires_grad for parameter in ours.parameters())
    assert len(theirs.trainable_variables) == len(list(ours.parameters()))


def test_a_stage_that_there_is_not_is_named(nat_config):
    for model in models(nat_config):
        with pytest.raises(ValueError, match="upto is 'stage3'; the stages are stem, stage1, stage2, head"):
            model.freeze("stage3")
