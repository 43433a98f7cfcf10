"""Rounding floors: right halves stay below them, wrong epsilons do not, and what is measured is what rounding does."""

import dataclasses

import numpy as np
import pytest
from golden_copy import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelspec.agreement import EXPLAINED_FACTOR
from modelspec.checkpoints import probing_weights
from parity import check, checking, halves, rounding

FAMILIES = ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"]


@given(hnp.arrays(np.float64, 20, elements=st.floats(-1e30, 1e30)), st.integers(0, 2**32))
def test_numbers_move_by_half_a_unit_at_most(array, seed):
    array = array.astype(np.float32).astype(np.float64)
    moved = rounding.moved(array, "float32", np.random.default_rng(seed))
    assert (np.abs(moved - array) <= np.spacing(np.abs(array.astype(np.float32))).astype(np.float64)).all()
    assert (moved[array == 0] == 0).all()


@pytest.fixture
def drawn(monkeypatch):
    """Checks of a checkpoint take drawn weights instead, of the check's seed."""
    original = checking.checkpoint_subject

    def subject(source, seed, *names):
        found = original(source, seed, *names)
        return dataclasses.replace(found, weights=lambda: probing_weights(found.config, seed))

    monkeypatch.setattr(checking, "checkpoint_subject", subject)


def calibrated(name: str, seed: int = 0, dtypes=("float64", "float32")):
    return check(checkpoint=GOLDEN / name, calibrate=True, seed=seed, dtypes=dtypes)


def test_right_halves_are_explained_by_rounding():
    report = calibrated("vit_msn_tiny", dtypes=["float32"])
    assert report.passed
    assert all(0 <= row.agreement.factor <= EXPLAINED_FACTOR for row in report.results)
    assert max(row.agreement.factor for row in report.results) > 0.5  # a floor, and no ceiling


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_right_halves_are_with_any_weights(name, drawn):
    for seed in range(5):
        report = calibrated(name, seed)
        assert report.passed, [(row.name, row.dtype) for row in report.results if not row.agreement.passed]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_an_epsilon_of_1e_5_for_1e_6_is_caught_in_float32(seed, monkeypatch, drawn):
    """Everywhere where its effect, measured in float64, exceeds what rounding explains."""
    layers = ["vit.encoder.layer.0", "vit.encoder.layer.1", "vit.encoder.layer.2"]
    norms = [f"forced.{layer}.{norm}" for layer in layers for norm in ("layernorm_before", "layernorm_after")]

    def build(config, weights, dtype):
        model = halves.build_keras(config, weights, dtype)
        for layer in model.vit.encoder.layer:
            layer.layernorm_before.epsilon = layer.layernorm_after.epsilon = 1e-5
        return model

    monkeypatch.setitem(halves.BUILD, "keras", build)
    report = calibrated("vit_msn_tiny", seed)
    rows = {(row.name, row.dtype): row.agreement for row in report.results if row.half == "keras"}
    caught = 0
    for norm in norms:
        effect, judged = rows[norm, "float64"].max_rel, rows[norm, "float32"]
        assert effect > 1e-7
        if effect > (EXPLAINED_FACTOR + 1) * judged.floor:
            assert not judged.passed and judged.failure in ("rounding", "value"), norm
            caught += 1
    assert caught >= 4
    assert rows[norms[0], "float32"].max_rel < 1e-4  # where the fixed bounds of whole models would let it pass
