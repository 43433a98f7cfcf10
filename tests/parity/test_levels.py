"""The levels beside outputs and layers: gradients, training, weights and the operator, with bugs planted in each."""

import json

import numpy as np
import pytest
from golden_copy import GOLDEN

from modelspec import get_config
from modelspec.checkpoints import read_safetensors
from parity import gradients, operator, round_trip, training
from parity.__main__ import main

DEEP = "gradients,training,weights,op"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(training, "STEPS", 2)
    monkeypatch.setenv("COLUMNS", "100")


def check(capsys, tmp_path, name, level, *more) -> tuple[int, list[dict], str]:
    path = tmp_path / "report.json"
    status = main(["check", "--checkpoint", str(GOLDEN / name), "--level", level, "--json", str(path), *more])
    shown = capsys.readouterr()
    assert shown.err == ""
    return status, json.loads(path.read_text())["results"], shown.out


def failed(rows) -> set[str]:
    return {row["name"] for row in rows if not row["passed"]}


FAMILIES = ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_ten_steps_of_every_optimizer_agree(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "STEPS", 10)
    status, rows, out = check(capsys, tmp_path, name, "training")
    assert status == 0, out
    assert {row["name"].partition("-")[0] for row in rows} == {"sgd", "adam", "adamw"}


@pytest.mark.parametrize(("name", "optimizer"), zip(FAMILIES, ["adam", "adamw", "sgd", "adamw"], strict=True))
def test_every_level_passes_and_covers_every_parameter(name, optimizer, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "OPTIMIZERS", (optimizer,))
    status, rows, out = check(capsys, tmp_path, name, DEEP)
    assert status == 0, out
    levels = {level: [row for row in rows if row["level"] == level] for level in DEEP.split(",")}
    keys = read_safetensors(GOLDEN / name / "model.safetensors").tensors.keys()
    parameters = {key for key in keys if key.rpartition(".")[2] not in ("running_mean", "running_var")}
    parameters = {key for key in parameters if not key.endswith("num_batches_tracked")}
    names = {row["name"] for row in rows}
    assert names >= {f"weights.{key}" for key in keys}
    assert names >= {f"gradients.{key}" for key in (*parameters, "pixel_values")}
    assert names >= {f"{optimizer}-parameters.{key}" for key in keys} | {f"{optimizer}-loss.loss"}
    assert names >= {f"{optimizer}-first_moments.{key}" for key in parameters}
    assert bool(levels["op"]) == name.endswith("nat_tiny")
    assert {row["dtype"] for row in levels["training"]} == {"float64"}
    assert f"{optimizer}-parameters ({len(keys)})" in out


def test_a_wrong_gradient_is_named(capsys, tmp_path, monkeypatch):
    right = gradients.GRADIENTS["keras"]
    key = "vit.encoder.layer.1.intermediate.dense.weight"

    def wrong(*arguments):
        found = right(*arguments)
        found[key] = found[key] * (1 + 1e-6)
        found["vit.encoder.layer.0.attention.attention.key.bias"] += 1e-3  # zero by construction
        return found

    monkeypatch.setitem(gradients.GRADIENTS, "keras", wrong)
    status, rows, out = check(capsys, tmp_path, "vit_msn_tiny", "gradients", "--dtype", "float64")
    assert status == 1
    names = {f"gradients.{key}", "gradients.vit.encoder.layer.0.attention.attention.key.bias"}
    assert failed(rows) == names
    assert {row["reason"] for row in rows if not row["passed"]} == {
        "",
        "it is zero by construction, but computed otherwise",
    }
    assert "intermediate.dense.weight" in out and f"gradients ({len(rows) - 2})" in out


@pytest.mark.parametrize(
    ("what", "optimizer", "kind"),
    [
        ("EPSILON", "adam", "parameters"),
        ("WEIGHT_DECAY", "adamw", "parameters"),
        ("MOMENTUM", "sgd", "first_moments"),
        ("BETA_2", "adam", "second_moments"),
    ],
)
def test_another_optimizer_diverges(what, optimizer, kind, capsys, tmp_path, monkeypatch):
    steps = training.keras_steps
    monkeypatch.setattr(training, "OPTIMIZERS", (optimizer,))

    def other(*arguments):
        value = getattr(training, what)
        for step in range(training.STEPS):
            setattr(training, what, value * (1 - 2.0**-7))
            if step == 0:
                found = steps(*arguments)
            try:
                result = next(found)
            finally:
                setattr(training, what, value)
            yield result

    monkeypatch.setattr(training, "keras_steps", other)
    status, rows, _ = check(capsys, tmp_path, "vit_msn_tiny", "training")
    assert status == 1
    assert f"{optimizer}-{kind}" in {name.partition(".")[0] for name in failed(rows)}


def test_other_dropped_samples_and_statistics_diverge(capsys, tmp_path, monkeypatch):
    original, made = training._masks, []

    def masks():
        made.append(None)
        generator = original()
        if len(made) % 2:  # for one half only
            next(generator)
        return generator

    monkeypatch.setattr(training, "_masks", masks)
    monkeypatch.setattr(training, "OPTIMIZERS", ("sgd",))
    status, rows, _ = check(capsys, tmp_path, "swiftformer_tiny", "training")
    assert status == 1
    names = failed(rows)
    assert "sgd-parameters.swiftformer.encoder.network.2.blocks.0.norm.running_var" in names or "sgd-loss.loss" in names


def test_a_lost_bit_is_named(capsys, tmp_path, monkeypatch):
    import tfmodels.weights

    right = tfmodels.weights.read_weights

    def wrong(model):
        found = right(model)
        found["norm.bias"] = np.nextafter(found["norm.bias"], np.float32(9))
        found["head.bias"] = found["head.bias"].astype(np.float64)
        return found

    monkeypatch.setattr(tfmodels.weights, "read_weights", wrong)
    status, rows, out = check(capsys, tmp_path, "swiftformer_tiny", "weights")
    assert status == 1
    assert failed(rows) == {"weights.norm.bias", "weights.head.bias"}
    assert "dtype float64 against float32" in out


def test_a_shifted_window_is_named(capsys, tmp_path, monkeypatch):
    import ptmodels.ops

    right = ptmodels.ops.neighborhood_attention

    def wrong(query, key, value, kernel_size, dilation, **options):
        return right(query, key, value.roll(1, 2) if dilation == 2 else value, kernel_size, dilation, **options)

    monkeypatch.setattr(ptmodels.ops, "neighborhood_attention", wrong)
    status, rows, _ = check(capsys, tmp_path, "dinat_tiny", "op")
    assert status == 1
    assert failed(rows) and all("dilation 2" in name for name in failed(rows))


def test_the_operations_of_a_model_are_those_of_its_maps():
    found = operator.cases(get_config("dinat-mini"), (224, 200))
    assert found["56x50 kernel 7 dilation 1"] == ((1, 56, 50, 2, 32), 1)
    assert found["56x56 kernel 7 dilation 8"] == ((1, 56, 56, 2, 32), 8)  # padded
    assert len(found) == 7


def test_what_one_side_lacks_is_no_equality():
    agreements = round_trip.compare_bits({"a": np.ones(2)}, {"b": np.ones(2)})
    assert not agreements["a"].passed and not agreements["b"].passed
