"""The benchmarks of whole models run: their smallest cases, with what needs neither transformers nor a compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(module, path, *options):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--rounds", "1", "--json", str(path), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(path.read_text())


@pytest.mark.slow
def test_both_halves_and_other_operators_compute_the_same_logits(tmp_path):
    contenders = ["torch", "keras", "torch dense", "torch gather", "keras dense", "keras gather"]
    options = ["--models", "nat-mini", "--parts", "batch1", "--only", *contenders, "torch operator alone"]
    (report,) = run("models", tmp_path / "models.json", *options)
    (result,) = report["results"]
    assert not result["failed"] and set(result["contenders"]) == {*contenders, "torch operator alone"}
    assert 5.3 < result["gflop"] < 5.5  # the paper: 2.7 G multiply-adds
    assert all(figures["seconds"] > 0 for figures in result["contenders"].values())


def test_layers_are_measured_in_time_and_memory(tmp_path):
    report = run("claims", tmp_path / "claims.json", "--claims", "layers", "--cases", "1")
    ours, peer = report["results"]
    assert (ours["contender"], peer["contender"]) == ("neighborhood", "shifted windows")
    assert 0 < ours["bytes"] < peer["bytes"] and ours["seconds"] > 0
