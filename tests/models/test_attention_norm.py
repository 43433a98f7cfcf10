"""Both forms of SwiftFormer's additive attention, against the equations written in NumPy (no recorded truth has l2)."""

import keras
import numpy as np
import pytest
import torch

import ptmodels.swiftformer
import tfmodels.swiftformer
from modelspec import SwiftFormerConfig
from tfmodels.weights import assign_weights, checkpoint_variables

DIM = 6


def additive_attention(x, weights, attention_norm):
    """Equations 4 to 6 of the paper on tokens (B, N, C); `weights` has torch's layouts."""

    def linear(name, value):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def unit(value, axis):
        return value / np.maximum(np.sqrt(np.sum(value**2, axis=axis, keepdims=True)), 1e-12)

    query, key = unit(linear("to_query", x), -1), unit(linear("to_key", x), -1)
    alpha = query @ weights["w_g"] / np.sqrt(DIM)  # (B, N, 1)
    alpha = np.ones_like(alpha) if attention_norm == "softmax" else unit(alpha, 1)
    global_query = np.sum(alpha * query, axis=1, keepdims=True)
    return linear("final", linear("proj", global_query * key) + query)


def halves(attention_norm):
    config = SwiftFormerConfig(attention_norm=attention_norm)
    ours = ptmodels.swiftformer.SwiftFormerEfficientAdditiveAttention(config, DIM).double()
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        theirs = tfmodels.swiftformer.SwiftFormerEfficientAdditiveAttention(config, DIM)
    finally:
        keras.config.set_dtype_policy(previous)
    generator = np.random.default_rng(0)
    weights = {key: generator.standard_normal(tuple(value.shape)) for key, value in ours.state_dict().items()}
    ours.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    assert checkpoint_variables(theirs).keys() == weights.keys()
    assign_weights(theirs, weights)
    return ours, theirs, weights


@pytest.mark.parametrize("attention_norm", ["softmax", "l2"])
def test_both_halves_follow_the_equations(attention_norm):
    ours, theirs, weights = halves(attention_norm)
    x = np.random.default_rng(1).standard_normal((2, 5, DIM))
    expected = additive_attention(x, weights, attention_norm)
    np.testing.assert_allclose(ours(torch.from_numpy(x)).detach().numpy(), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(theirs(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("attention_norm", "matters"), [("softmax", False), ("l2", True)])
def test_w_g_matters_under_l2_only(attention_norm, matters):
    ours, theirs, weights = halves(attention_norm)
    x = np.random.default_rng(1).standard_normal((2, 5, DIM))
    before = ours(torch.from_numpy(x)).detach().numpy(), np.asarray(theirs(x))
    with torch.no_grad():
        ours.w_g.copy_(ours.w_g.flip(0))
    assign_weights(theirs, {"w_g": weights["w_g"][::-1]})
    after = ours(torch.from_numpy(x)).detach().numpy(), np.asarray(theirs(x))
    for old, new in zip(before, after, strict=True):
        assert np.allclose(old, new, rtol=0, atol=1e-13) != matters
