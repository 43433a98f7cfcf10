"""How arrays are compared."""

import json
import math

import numpy as np
import pytest

from modelspec.agreement import Agreement, Result, balanced, compare, compare_all, scales
from modelspec.zero_gradients import has_zero_gradient


def test_the_scale_is_the_rms_but_at_least_a_part_of_all():
    arrays = {"large": np.full(9, 3.0), "zero": np.zeros(9), "tiny": np.full(2, 1e-9)}
    overall = math.sqrt(81 / 20)
    assert scales(arrays) == pytest.approx({"large": 3.0, "zero": 1e-3 * overall, "tiny": 1e-3 * overall})
    assert scales({}) == {}


def test_a_difference_is_measured_against_the_scale():
    reference = np.array([3.0, 4.0])
    agreement = compare(reference + [0.0, 1e-3], reference, scale=2.0, tolerance=5.1e-4)
    assert agreement.max_abs == pytest.approx(1e-3) and agreement.max_rel == pytest.approx(5e-4)
    assert agreement.passed and agreement.cosine == pytest.approx(1.0)
    assert not compare(reference + [0.0, 1e-3], reference, scale=2.0, tolerance=4.9e-4).passed


def test_both_exactly_zero_passes_and_anything_against_zero_fails():
    zero = np.zeros(3)
    assert compare(zero, zero, scale=0.0, tolerance=0.0).passed
    assert compare(zero, zero, scale=0.0, tolerance=0.0).cosine == 1.0
    assert not compare(zero + 1e-300, zero, scale=0.0, tolerance=1.0).passed


@pytest.mark.parametrize(
    ("actual", "reason"),
    [
        (np.array([1.0, np.nan]), "not finite: 1 of 2 numbers, 0 of the reference's"),
        (np.array([np.inf, -np.inf]), "not finite: 2 of 2 numbers, 0 of the reference's"),
        (np.ones((2, 1)), "shape (2, 1) against (2,)"),
        (np.ones(3), "shape (3,) against (2,)"),
    ],
)
def test_what_cannot_be_compared_fails_with_a_reason(actual, reason):
    agreement = compare(actual, np.ones(2), scale=1.0, tolerance=1e9)
    assert not agreement.passed and agreement.reason == reason
    assert agreement.failure == reason.partition(" (")[0].partition(":")[0]


def test_nan_on_both_sides_and_nothing_at_all_fail():
    assert not compare(np.array([np.nan]), np.array([np.nan]), 1.0, 1.0).passed
    assert not compare(np.zeros(0), np.zeros(0), 1.0, 1.0).passed


def test_a_name_of_one_side_only_fails():
    agreements = compare_all({"a": np.ones(2), "c": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)}, 1e-9)
    assert [name for name, agreement in agreements.items() if agreement.passed] == ["a"]
    assert list(agreements) == ["a", "b", "c"]


def test_two_halves_are_balanced_within_a_factor_of_four():
    def off(max_rel):
        return Agreement(max_rel, max_rel, 1.0, 1e-4, True)

    assert balanced(off(1e-5), off(4e-5), 256) and not balanced(off(1e-5), off(4.1e-5), 256)
    assert not balanced(off(4.1e-5), off(1e-5), 256)
    assert balanced(off(1e-5), off(4.1e-5), 255)  # small arrays jump
    assert balanced(off(0.0), off(1e-6), 256)  # and so do tiny errors
    assert not balanced(off(0.0), off(2e-6), 256)


def test_a_row_is_json_even_when_it_failed():
    failed = compare(np.array([np.nan]), np.ones(1), 1.0, 1.0)
    row = Result("swiftformer-xs", "layers", "hidden_states.0", "float64", failed).to_dict()
    assert json.loads(json.dumps(row, allow_nan=False))["max_abs"] is None
    assert {"model", "level", "name", "dtype", "max_abs", "max_rel", "cosine", "tolerance", "passed"} <= set(row)


def test_gradients_that_are_zero_by_construction(swiftformer_config, vit_msn_config):
    assert has_zero_gradient(vit_msn_config, "vit.encoder.layer.0.attention.attention.key.bias", training=False)
    assert not has_zero_gradient(vit_msn_config, "vit.encoder.layer.0.attention.attention.query.bias", training=True)
    w_g = "swiftformer.encoder.network.0.blocks.1.attn.w_g"
    assert has_zero_gradient(swiftformer_config, w_g, training=False)
    assert not has_zero_gradient(swiftformer_config.replace(attention_norm="l2"), w_g, training=False)
    for name in (
        "patch_embed.patch_embedding.0",
        "encoder.network.0.blocks.0.depth_wise_conv",
        "encoder.network.1.proj",
    ):
        assert has_zero_gradient(swiftformer_config, f"swiftformer.{name}.bias", training=True)
        assert not has_zero_gradient(swiftformer_config, f"swiftformer.{name}.bias", training=False)
    assert not has_zero_gradient(swiftformer_config, "swiftformer.encoder.network.0.blocks.1.attn.proj.bias", True)
