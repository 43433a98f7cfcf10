"""The level of exports: every artefact gives the live model's logits in a fresh process, and bugs in one are named."""

from pathlib import Path

import numpy as np
import pytest

from modelspec import load_config
from modelspec.agreement import EXPORT_BOUND
from modelspec.checkpoints import read_safetensors
from modelspec.exports.fresh_process import ABSENT
from parity import exporting
from parity.exporting import ARTEFACTS, compare_exports, notes

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"]
ALL = [(artefact.half, artefact.name) for artefact in ARTEFACTS]


def subject(name: str, size: int):
    config = load_config(GOLDEN / name)
    weights = read_safetensors(GOLDEN / name / "model.safetensors").tensors
    return config, weights, np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)


def restrict(monkeypatch, *chosen: tuple[str, str]) -> None:
    artefacts = tuple(artefact for artefact in ARTEFACTS if (artefact.half, artefact.name) in chosen)
    monkeypatch.setattr(exporting, "ARTEFACTS", artefacts)


def failed(results) -> set[tuple[str, str]]:
    return {(half, artefact) for half, artefact, _, agreement in results if not agreement.passed}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_artefact_gives_the_logits_of_the_live_model(name):
    config, weights, images = subject(name, 64)
    results = list(compare_exports(config, weights, images))
    assert not failed(results)
    cases = {artefact: [row[2] for row in results if row[:2] == artefact] for artefact in ALL}
    one, three, other = cases["keras", "saved_model"]
    assert (one, three) == ("1x64x64", "3x64x64") and other.startswith("1x")
    for artefact in ALL:
        assert cases[artefact] == ([one, three] if artefact[1] == "litert" else [one, three, other])


@pytest.mark.parametrize(
    ("name", "artefacts"),
    [
        ("nat_tiny", [("keras", "litert")]),
        pytest.param("dinat_tiny", [("torch", "program")], marks=pytest.mark.slow),
        ("swiftformer_tiny", [("keras", "onnx")]),
        ("vit_msn_tiny", [("torch", "onnx")]),
    ],
)
def test_some_artefacts_of_each_family(name, artefacts, monkeypatch):
    monkeypatch.setattr(exporting, "_FEW_BLOCKS", 0)
    restrict(monkeypatch, *artefacts)
    results = list(compare_exports(*subject(name, 64)))
    assert {row[:2] for row in results} == set(artefacts)
    assert not failed(results)
    assert {row[3].tolerance for row in results} == {EXPORT_BOUND}


def test_a_bug_in_one_artefact_is_named(monkeypatch):
    """A GELU of another form in torch's program, a weight that changed in the ONNX of Keras."""
    artefacts = {("keras", "onnx"), ("keras", "litert"), ("torch", "program")}
    restrict(monkeypatch, *artefacts)
    right = exporting._export

    def export(artefact, model, path, image_size):
        layers = []
        if (artefact.half, artefact.name) == ("torch", "program"):
            from ptmodels.layers import ACTIVATIONS

            layers = [layer for layer in model.modules() if hasattr(layer, "act")]
            for layer in layers:
                layer.act = ACTIVATIONS["gelu_new"]
        right(artefact, model, path, image_size)
        for layer in layers:
            layer.act = ACTIVATIONS["gelu"]
        if (artefact.half, artefact.name) == ("keras", "onnx"):
            import onnx

            graph = onnx.load(path)
            weight = next(entry for entry in graph.graph.initializer if list(entry.dims) == [32, 32])
            values = onnx.numpy_helper.to_array(weight).copy()
            values[3, 4] += 1e-2
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
            onnx.save(graph, path)

    monkeypatch.setattr(exporting, "_export", export)
    results = list(compare_exports(*subject("vit_msn_tiny", 32)))
    assert failed(results) == {("torch", "program"), ("keras", "onnx")}
    assert {row[:2] for row in results} == artefacts


def test_what_does_not_run_is_named(monkeypatch):
    restrict(monkeypatch, ("torch", "program"))
    monkeypatch.setattr(exporting, "_export", lambda artefact, model, path, size: Path(path).write_bytes(b"no program"))
    with pytest.raises(RuntimeError, match="a fresh process failed: program of torch: ") as caught:
        list(compare_exports(*subject("vit_msn_tiny", 32)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("absent", "reason"), [("torch", "No module named 'torch'"), ("json", "it needed json")])
def test_an_artefact_that_needs_what_it_must_not_is_named(absent, reason, monkeypatch):
    restrict(monkeypatch, ("torch", "program"))
    monkeypatch.setitem(ABSENT, "program", (absent,))
    with pytest.raises(RuntimeError, match=f"program of torch: .*{reason}"):
        list(compare_exports(*subject("vit_msn_tiny", 32)))


def test_what_cannot_be_exported_is_named(monkeypatch):
    restrict(monkeypatch, ("keras", "litert"))
    monkeypatch.setattr("tensorflow.lite.TFLiteConverter.from_saved_model", lambda folder: 1 / 0)
    with pytest.raises(RuntimeError, match="litert of keras could not be exported: division by zero"):
        list(compare_exports(*subject("vit_msn_tiny", 32)))


def test_missing_packages_leave_artefacts_out_with_a_note(monkeypatch):
    monkeypatch.setattr(exporting, "missing_packages", lambda *needs: [name for name in needs if name == "tf2onnx"])
    restrict(monkeypatch, ("keras", "litert"), ("keras", "onnx"))
    config, *rest = subject("vit_msn_tiny", 32)
    assert {row[1] for row in compare_exports(config, *rest)} == {"litert"}
    [note] = [note for note in notes(config, (32, 32)) if note.startswith("Left out: onnx of keras, ")]
    assert "which needs tf2onnx; pip install '.[export]' in twinzoo's checkout" in note


def test_notes_say_what_is_not_compared():
    vit_msn, swiftformer = load_config(GOLDEN / "vit_msn_tiny"), load_config(GOLDEN / "swiftformer_tiny")
    assert notes(vit_msn, (32, 32)) == ["Exported for images of 32x32 alone: litert of keras."]
    assert "33 pixels and more" in notes(swiftformer, (32, 40))[1]
    long = load_config(GOLDEN / "nat_tiny").replace(depths=[2, 2, 2])
    alone = "litert of keras, program of torch, onnx of torch."
    assert notes(long, (64, 64)) == [f"Exported for images of 64x64 alone: onnx of keras, {alone}"]
