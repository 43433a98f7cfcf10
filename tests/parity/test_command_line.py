"""`parity` as its users call it: exit status, table, JSON, and one clear line where nothing can be compared."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_copy import GOLDEN
from PIL import Image

from parity import checking, halves, onednn, taps
from parity.__main__ import main

SWIFTFORMER = str(GOLDEN / "swiftformer_tiny")
VIT_MSN = str(GOLDEN / "vit_msn_tiny")


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def replace_keras(monkeypatch, build):
    """Lets `build` make the Keras models, of (config, weights, dtype)."""
    monkeypatch.setitem(halves.BUILD, "keras", build)


def replace_outputs(monkeypatch, change):
    """Lets `change` spoil what Keras models give, by name; of (dtype, arrays)."""
    run = taps.KerasTap.run

    def spoiled(self, observer=None, **options):
        arrays = run(self, observer, **options)
        change(self.model.compute_dtype, arrays)
        return arrays

    monkeypatch.setattr(taps.KerasTap, "run", spoiled)


def test_a_reduced_variant_agrees_and_the_json_says_with_what(capsys, tmp_path):
    path = tmp_path / "report.json"
    assert main(["check", "swiftformer-xs", "--reduced", "--seed", "3", "--json", str(path)]) == 0
    shown = capsys.readouterr()
    assert "swiftformer-xs  reduced to 2+2+2+2 of 3+3+6+4 blocks" in shown.out
    assert "scikit-image's cat, 300x451, resized to 224x224 (bilinear)" in shown.out
    assert "random, drawn with seed 3; not trained" in shown.out
    assert re.search(r"All \d+ comparisons of 1 model passed", shown.out)
    assert re.search(r"forced \(\d+ layers\)", shown.out) and re.search(r"free \(\d+ layers\)", shown.out)
    assert "\x1b" not in shown.out  # no colours where no terminal is
    assert shown.err == ""

    report = json.loads(path.read_text())
    assert list(report) == ["passed", "environment", "results"]
    assert report["passed"] is True
    environment = report["environment"]
    assert {"versions", "machine", "threads", "seed", "weights", "image"} <= set(environment)
    assert environment["seed"] == 3 and environment["weights"] == "drawn"
    assert environment["models"]["swiftformer-xs"]["trained"] is False
    assert all(environment["versions"][name] for name in ("python", "numpy", "keras", "tensorflow", "torch"))
    required = ["model", "level", "name", "dtype", "max_abs", "max_rel", "cosine", "tolerance", "passed"]
    assert all([key for key in row if key in required] == required for row in report["results"])
    rows = {(row["level"], row["name"], row["dtype"], row["half"]) for row in report["results"]}
    assert len(rows) == len(report["results"])
    rows = {(row["level"], row["name"], row["dtype"], row["half"]) for row in report["results"] if not row["mode"]}
    names = [("outputs", "logits"), ("outputs", "loss"), *(("layers", f"hidden_states.{n}") for n in range(8))]
    runs = [("float64", "keras"), ("float32", "keras"), ("float32", "torch")]
    assert rows == {(*name, *run) for name in names for run in runs}


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_its_width(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["check", "--checkpoint", VIT_MSN]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    header = next(line for line in lines if line.startswith("name"))
    assert header.split() == ["name", "dtype", "half", "max_abs", "max_rel", "cosine", "bound", "verdict"]
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    assert any(line.startswith("attentions.0-2 ") for line in lines)


def test_verbose_gives_every_array_a_row(capsys):
    assert main(["check", "--checkpoint", VIT_MSN, "-v", "--level", "layers", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    shown = re.findall(r"^((?:hidden|att)\S+) +float64 +keras .* pass", out, re.MULTILINE)
    assert shown == [*(f"hidden_states.{n}" for n in range(4)), *(f"attentions.{n}" for n in range(3))]
    assert "vit.encoder.layer.2" in out and "attention.attention.query" in out


def test_a_perturbed_weight_diverges_in_its_layer(capsys, monkeypatch, tmp_path):
    key = "swiftformer.encoder.network.2.blocks.0.local_representation.norm.weight"

    def build(config, weights, dtype):
        return halves.build_keras(config, {**weights, key: weights[key] * np.float32(1 + 1e-6)}, dtype)

    replace_keras(monkeypatch, build)
    path = tmp_path / "report.json"
    assert main(["check", "--checkpoint", SWIFTFORMER, "--dtype", "float64", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    place = "swiftformer.encoder.network.2.blocks.0, at its local_representation.norm"
    assert f"swiftformer_tiny first diverges in {place} (float64" in out
    assert re.search(r"hidden_states\.2 .* pass", out) and re.search(r"hidden_states\.3 .* FAIL", out)
    assert re.search(r"network\.2\.blocks\.0  \S+ / \S+  FAIL", out)
    report = json.loads(path.read_text())
    assert report["passed"] is False
    passed = {row["name"]: row["passed"] for row in report["results"]}
    assert passed["hidden_states.2"] and not passed["hidden_states.3"] and not passed["logits"]
    model = report["environment"]["models"]["swiftformer_tiny"]
    assert model["diverging_blocks"] == ["swiftformer.encoder.network.2.blocks.0"]
    assert model["first_divergence"]["name"] == f"forced.{key.removesuffix('.weight')}"
    assert model["worst"]["heat"]


def test_another_epsilon_diverges_at_the_first_norm(capsys, monkeypatch):
    def build(config, *rest):
        return halves.build_keras(config.replace(batch_norm_eps=1.001e-5), *rest)

    replace_keras(monkeypatch, build)
    assert main(["check", "--checkpoint", SWIFTFORMER]) == 1
    assert "first diverges in swiftformer.patch_embed, at its patch_embedding.1 (float64" in capsys.readouterr().out


def test_float32_fails_where_one_half_is_much_less_exact(capsys, monkeypatch):
    def change(dtype, arrays):
        if dtype == "float32" and "hidden_states.5" in arrays:
            arrays["hidden_states.5"] = arrays["hidden_states.5"] * np.float32(1 + 1.5e-5)

    replace_outputs(monkeypatch, change)
    # a fresh process, without oneDNN, would not have the change
    monkeypatch.setattr(onednn, "_in_fresh_process", functools.partial(onednn._run, "keras"))
    assert main(["check", "--checkpoint", SWIFTFORMER, "--level", "layers"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"hidden_states\.5 float32 keras: [\d.]+ times as far from the reference as torch", out)
    assert "first diverges at hidden_states.5 (float32, keras" in out
    assert re.search(r"\b1 of \d+ comparisons of 1 model FAILED", out)


def test_an_array_that_one_half_lacks_or_spoils_fails(capsys, monkeypatch, tmp_path):
    def change(dtype, arrays):
        if "hidden_states.7" in arrays:
            del arrays["hidden_states.7"]
            arrays["hidden_states.4"] = np.full_like(arrays["hidden_states.4"], np.nan)
            arrays["hidden_states.3"] = arrays["hidden_states.3"].astype(np.float32)

    replace_outputs(monkeypatch, change)
    path = tmp_path / "report.json"
    arguments = ["check", "--checkpoint", SWIFTFORMER, "--level", "layers", "--dtype", "float64", "--json", str(path)]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "hidden_states.7 float64 keras: only one side has it" in out
    assert "hidden_states.4 float64 keras: not finite" in out
    assert "hidden_states.3 float64 keras: dtype float32 in a float64 model" in out
    assert "Worst max_rel: nan in float64" in out
    rows = {row["name"]: row for row in json.loads(path.read_text())["results"]}
    assert rows["hidden_states.4"]["max_rel"] is None and rows["hidden_states.4"]["passed"] is False
    kinds = [rows[f"hidden_states.{index}"]["failure"] for index in (3, 4, 7)]
    assert kinds == ["dtype", "not finite", "missing"]


def test_float32_alone_is_judged_by_float64_all_the_same(capsys, tmp_path):
    path = tmp_path / "report.json"
    arguments = ["check", "--checkpoint", SWIFTFORMER, "--level", "outputs", "--dtype", "float32"]
    assert main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {(row["dtype"], row["half"]) for row in report["results"]} == {("float32", "torch"), ("float32", "keras")}
    assert all(row["max_rel"] > 0 for row in report["results"] if row["name"] == "logits")
    assert report["environment"]["reference"] == "torch float64"


def test_a_checkpoint_without_a_head_gets_a_drawn_one_and_says_so(capsys):
    folder = GOLDEN / "vit_msn_masktoken"
    assert main(["check", "--checkpoint", str(folder), "--level", "outputs", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    assert "Weights from" in out and "trained" not in out and "under a random head" in " ".join(out.split())
    assert "drawn with seed 0: classifier.weight, classifier.bias." in " ".join(out.split())


def test_another_size_interpolates_positions_and_large_attentions_are_left_out(capsys):
    arguments = ["check", "--checkpoint", VIT_MSN, "--size", "200x240", "--dtype", "float64"]
    assert main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "resized to 200x240" in out
    assert "Positions are interpolated" in out
    assert "Attentions are left out: with 751 tokens they are too large." in out


def test_an_image_of_ones_own(capsys, tmp_path):
    path = tmp_path / "gray.png"
    Image.fromarray(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)).save(path)
    arguments = ["check", "--checkpoint", SWIFTFORMER, "--level", "outputs", "--dtype", "float64"]
    assert main([*arguments, "--image", str(path)]) == 0
    assert "gray.png, 48x64, resized to 64x64 (bicubic)" in capsys.readouterr().out


def test_all_takes_the_families_that_both_halves_have_reduced(capsys, monkeypatch):
    monkeypatch.setattr(checking, "list_models", lambda: ["swiftformer-xs", "vit-msn-small", "other-tiny"])
    both = (["swiftformer-xs", "vit-msn-small"], {"other-tiny": "ptmodels has no such family"})
    monkeypatch.setattr(checking, "split_by_family", lambda names: both)
    assert main(["check", "--all", "--level", "outputs", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    assert "swiftformer-xs  reduced to 2+2+2+2 of 3+3+6+4 blocks" in out
    assert "vit-msn-small  reduced to 2 of 12 layers" in out
    assert "Skipped other-tiny: ptmodels has no such family" in out


def test_nothing_compared_is_no_success(capsys, monkeypatch):
    monkeypatch.setattr(checking, "split_by_family", lambda names: ([], dict.fromkeys(names, "no such family")))
    assert main(["check", "--all"]) == 2
    assert capsys.readouterr().err == "parity: error: nothing was compared: both halves have none of the models\n"


def broken_image(folder: Path) -> str:
    path = folder / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of use")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "arguments are required: COMMAND"),
        (["check"], "nothing to compare: name a model"),
        (["check", "swiftformer-xl"], "there is no variant 'swiftformer-xl'; close to it: swiftformer-"),
        (["check", "swiftformer-xs", "--all"], "name neither a model nor a checkpoint besides"),
        (["check", "swiftformer-xs", "--level", "inputs"], "'inputs' is unknown; allowed are outputs, layers"),
        (["check", "swiftformer-xs", "--dtype", "float64,float8"], "'float8' is unknown"),
        (["check", "swiftformer-xs", "--seed", "-1"], "'-1' is no seed"),
        (["check", "swiftformer-xs", "--size", "224"], "'224' is no size; give height x width"),
        (["check", "swiftformer-xs", "--reduced", "--full"], "not allowed with argument"),
        (["check", "swiftformer-xs", "--image", "/nowhere/cat.png"], "/nowhere/cat.png cannot be read as an image"),
        (["check", "swiftformer-xs", "--image", broken_image], "broken.png cannot be read as an image"),
        (["check", "swiftformer-xs", "--json", "/nowhere/report.json"], "there is no directory /nowhere"),
        (["check", "--checkpoint", "/nowhere"], "'/nowhere' is neither a file or directory here nor a Hub id"),
        (["check", "--checkpoint", SWIFTFORMER, "--reduced"], "a checkpoint is one whole model"),
        (["check", "vit-msn-small", "--checkpoint", SWIFTFORMER], "is no vit-msn-small"),
        (["check", "--checkpoint", VIT_MSN, "--size", "1x1"], "the torch half failed in float64"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_status_2(arguments, reason, capsys, tmp_path):
    arguments = [argument(tmp_path) if callable(argument) else argument for argument in arguments]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert reason in shown.err
    assert shown.err.startswith("parity") and shown.err.count("\n") == 1


def test_a_truncated_checkpoint_is_named(capsys, tmp_path):
    (tmp_path / "config.json").write_bytes((GOLDEN / "swiftformer_tiny" / "config.json").read_bytes())
    whole = (GOLDEN / "swiftformer_tiny" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(["check", "--checkpoint", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/model.safetensors is no readable safetensors file" in error and error.count("\n") == 1


def test_help_imports_no_framework():
    code = (
        "import sys; from parity.__main__ import main; status = main(['check', '--help']);"
        "heavy = {'tensorflow', 'keras', 'torch', 'skimage', 'tfmodels', 'ptmodels'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(status)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "exit status: 0 all agree; 1 something diverged; 2 could not compare" in process.stdout


def test_a_process_shows_its_report_and_nothing_else():
    arguments = ["check", "--checkpoint", SWIFTFORMER, "--level", "outputs", "--dtype", "float64"]
    process = subprocess.run([sys.executable, "-m", "parity", *arguments], capture_output=True, text=True)
    assert process.returncode == 0
    assert process.stderr == ""  # neither TensorFlow's log nor a progress bar
    assert "All 2 comparisons of 1 model passed" in process.stdout
