"""Halves that are not equally exact in float32: what a model loses fails, what oneDNN's order of sums does is said."""

import os
from pathlib import Path

import leaking_keras
import numpy as np
import pytest
from golden_copy import GOLDEN

from modelspec.checkpoints import read_checkpoint
from modelspec.configs import load_config
from parity import check, halves, onednn

TINY = GOLDEN / "vit_msn_tiny"


def compared():
    return check(checkpoint=TINY, levels=["layers"], dtypes=["float32"], keep_result=False)


def plant_in_torch(monkeypatch, leaks):
    """Makes the torch half less exact in float32 wherever `leaks()`."""
    import torch

    def build(config, weights, dtype):
        model = halves.build_torch(config, weights, dtype)

        def lose(module, inputs, output):
            if dtype != "float32" or not leaks():
                return output
            signs = torch.ones_like(output)
            signs.view(-1)[::2] = -1
            return output + leaking_keras.LEAK * output.square().mean().sqrt() * signs

        model.get_submodule("vit.embeddings.patch_embeddings.projection").register_forward_hook(lose)
        return model

    monkeypatch.setitem(halves.BUILD, "torch", build)


def plant_in_keras(monkeypatch, tmp_path, when):
    """Makes the Keras half less exact, here and in fresh processes."""
    (tmp_path / "sitecustomize.py").write_text("import leaking_keras\n\nleaking_keras.plant()\n")
    path = [str(tmp_path), str(Path(leaking_keras.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv(leaking_keras.WHEN, when)
    monkeypatch.setitem(halves.BUILD, "keras", leaking_keras.build)


def imbalanced(report) -> set[tuple[str, str]]:
    return {(row.half, row.name) for row in report.results if row.agreement.failure == "balance"}


def max_rel(report, half: str) -> float:
    rows = {(row.half, row.name): row.agreement for row in report.results if row.level == "layers"}
    return rows[half, "hidden_states.0"].max_rel


def notes(report) -> list[str]:
    return [note for note in report.models[0].notes if "oneDNN" in note]


def test_a_torch_half_that_loses_precision_fails_with_and_without_onednn(monkeypatch):
    plant_in_torch(monkeypatch, lambda: True)
    report = compared()
    assert ("torch", "hidden_states.0") in imbalanced(report)
    assert not notes(report)


@pytest.mark.parametrize("enabled", [True, False])
def test_what_onednn_alone_loses_in_torch_is_excused_and_noted(enabled, monkeypatch):
    import torch

    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    plant_in_torch(monkeypatch, lambda: torch.backends.mkldnn.enabled)
    report = compared()
    assert not imbalanced(report)
    assert (max_rel(report, "torch") > 1e-5) == enabled  # the figure stays what the model gives
    assert any("hidden_states.0" in note and "torch is further" in note for note in notes(report)) == enabled
    assert torch.backends.mkldnn.enabled == enabled


def test_a_keras_half_that_loses_precision_fails_with_and_without_onednn(monkeypatch, tmp_path):
    plant_in_keras(monkeypatch, tmp_path, "always")
    report = compared()
    assert ("keras", "hidden_states.0") in imbalanced(report)
    assert not notes(report)


def test_what_onednn_alone_loses_in_keras_is_excused_and_noted(monkeypatch, tmp_path):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    plant_in_keras(monkeypatch, tmp_path, "onednn")
    report = compared()
    assert not imbalanced(report)
    assert max_rel(report, "keras") > 1e-5
    assert any("hidden_states.0" in note and "keras is further" in note for note in notes(report))


def test_the_fresh_process_gives_what_this_one_gives():
    config, weights = load_config(TINY), read_checkpoint(TINY / "model.safetensors").tensors
    images = np.random.default_rng(0).normal(size=(2, 3, config.image_size, config.image_size)).astype("float32")
    calls = {"outputs": {"labels": np.array([0, 1])}, "layers": {"output_hidden_states": True}}
    found = onednn.outputs_without_onednn("keras", config, weights, images, calls)
    tap = halves.tap("keras", config, weights, "float32", images)
    for level, options in calls.items():
        wanted = tap.run(**options)
        assert found[level].keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[level][name].dtype == array.dtype
            np.testing.assert_allclose(found[level][name], array, rtol=1e-4, atol=1e-5)


def test_a_fresh_process_that_fails_says_why():
    config, weights = load_config(TINY), read_checkpoint(TINY / "model.safetensors").tensors
    images = np.zeros((1, 3, config.image_size, config.image_size), "float32")
    weights["vit.layernorm.weight"] = np.zeros(3, "float32")
    with pytest.raises(RuntimeError, match=r"in a fresh process: .*shape=\(3,\)"):
        onednn.outputs_without_onednn("keras", config, weights, images, {"outputs": {}})
