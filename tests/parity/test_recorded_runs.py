"""Runs that are saved and compared later, `parity.json`, `parity verify` and `parity explain` on the command line."""

import json
import shutil

import numpy as np
import pytest
from golden_copy import GOLDEN

from modelspec.checkpoints import read_safetensors
from parity import halves
from parity.__main__ import main
from parity.recorded_runs import read_run


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "vit_msn_tiny", tmp_path / "mine", ignore=shutil.ignore_patterns("parity.json"))


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def check(*arguments) -> int:
    return main(["check", *map(str, arguments)])


def change_weights(folder, key="classifier.bias") -> None:
    from safetensors.numpy import save_file

    tensors = dict(read_safetensors(folder / "model.safetensors").tensors)
    tensors[key] = tensors[key] + np.float32(0.1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_saved_run_is_compared_later(folder, tmp_path, capsys):
    run = tmp_path / "run.npz"
    assert check("--checkpoint", folder, "--save", run) == 0
    recorded = read_run(run)
    images, arrays = recorded.cases[""]
    assert images.shape == (1, 3, 32, 32) and arrays["logits"].dtype == np.float64
    assert {"logits", "hidden_states.3", "attentions.2"} <= arrays.keys()
    assert f"written to {run}" in " ".join(capsys.readouterr().out.split())

    report = tmp_path / "report.json"
    assert check("--checkpoint", folder, "--against", run, "--json", report) == 0
    rows = json.loads(report.read_text())["results"]
    assert {(row["half"], row["dtype"]) for row in rows} == {
        *(("torch", "float64"), ("keras", "float64"), ("torch", "float32"), ("keras", "float32"))
    }
    assert all(row["max_rel"] == 0 for row in rows if (row["half"], row["dtype"]) == ("torch", "float64"))
    assert f"Reference: {run}." in capsys.readouterr().out

    with np.load(run) as archive:
        changed = dict(archive)
    changed["model.hidden_states.2"] = changed["model.hidden_states.2"] * (1 + 1e-9)
    np.savez(run, **changed)
    assert check("--checkpoint", folder, "--against", run, "--json", report, "--dtype", "float64") == 1
    rows = json.loads(report.read_text())["results"]
    assert {row["name"] for row in rows if not row["passed"]} == {"hidden_states.2"}

    change_weights(folder)
    assert check("--checkpoint", folder, "--against", run) == 2
    assert "was made with other weights (of mine) than mine's" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vit_msn_tiny", "nat_tiny"])
def test_the_recorded_outputs_of_the_reference_implementations_are_read_too(name, capsys, tmp_path):
    path = tmp_path / "report.json"
    arguments = ["--checkpoint", GOLDEN / name, "--against", GOLDEN / name / "io.npz", "--json", path]
    assert check(*arguments, "--dtype", "float64") == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["results"]}
    expected = {"vit_msn_tiny": "interp_odd.logits", "nat_tiny": "oblong.hidden_states.3"}[name]
    assert expected in rows and rows[expected]["tolerance"] == 2e-5 and rows[expected]["max_rel"] > 1e-9
    assert "does not say which weights" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_saved_or_read_is_told(folder, tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 and then nothing of use")
    np.savez(tmp_path / "empty.npz", pixel_values=np.ones((1, 3, 32, 32)))
    cases = {
        ("--checkpoint", folder, "--against", broken): "broken.npz cannot be read as a recorded run",
        ("--checkpoint", folder, "--against", tmp_path / "no.npz"): "no.npz cannot be read as a recorded run",
        ("--checkpoint", folder, "--against", tmp_path / "empty.npz"): "so there is nothing to compare",
        ("--all", "--save", tmp_path / "all.npz"): "a recorded run is of one model; 20 are asked for",
        ("--checkpoint", folder, "--against", broken, "--size", "64x64"): "cannot be read",
        ("--checkpoint", folder, "--level", "weights", "--save", tmp_path / "w.npz"): "levels outputs and layers only",
        ("--checkpoint", folder, "--against", GOLDEN / "vit_msn_tiny" / "io.npz", "--size", "64x64"): "its own images",
    }
    for arguments, message in cases.items():
        assert check(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "all.npz").exists() and not (tmp_path / "w.npz").exists()


def test_a_checked_folder_keeps_the_result_and_verify_tells_what_it_is_worth(folder, capsys):
    assert main(["verify", str(folder)]) == 2
    assert "has no parity.json" in capsys.readouterr().err
    assert check("--checkpoint", folder, "--level", "outputs", "--no-result") == 0
    assert not (folder / "parity.json").exists()
    assert check("--checkpoint", folder, "--level", "outputs", "--dtype", "float64") == 0
    kept = json.loads((folder / "parity.json").read_text())
    assert kept["passed"] and kept["environment"]["versions"]["torch"] and len(kept["sha256"]["weights"]) == 64
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "parity.json belongs to these files" in out and "all 2 comparisons passed" in out

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-5}))
    assert main(["verify", str(folder)]) == 1
    assert "other config were checked" in " ".join(capsys.readouterr().out.split())
    (folder / "config.json").write_text(json.dumps(config))
    change_weights(folder)
    assert main(["verify", str(folder)]) == 1
    assert "other weights were checked" in " ".join(capsys.readouterr().out.split())
    (folder / "parity.json").write_text("{}")
    assert main(["verify", str(folder)]) == 2
    assert "is no result of parity check" in capsys.readouterr().err


def test_a_failed_check_is_kept_and_verified_as_failed(folder, capsys, monkeypatch):
    def build(config, weights, dtype):
        return halves.build_keras(config.replace(layer_norm_eps=1e-5), weights, dtype)

    monkeypatch.setitem(halves.BUILD, "keras", build)
    assert check("--checkpoint", folder, "--level", "outputs") == 1
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    assert "comparisons FAILED" in capsys.readouterr().out


def test_explain_names_the_culprit_and_its_exit_status_says_whether_there_is_one(folder, capsys, monkeypatch):
    assert main(["explain", "--checkpoint", str(folder)]) == 0
    assert "no layer differs" in capsys.readouterr().out

    def build(config, weights, dtype):
        return halves.build_keras(config.replace(hidden_act="gelu_new"), weights, dtype)

    monkeypatch.setitem(halves.BUILD, "keras", build)
    assert main(["explain", "--checkpoint", str(folder)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("Culprit: its activation is GELU in its tanh form (activation)") == 3
    assert "in vit.encoder.layer.0, in the own code of its intermediate" in out
    assert main(["explain"]) == 2
    assert "name a model or a checkpoint" in capsys.readouterr().err
