"""Small models of all families learn scikit-learn's digits from a folder of images, in both frameworks.

Each takes some minutes, from nothing: all are slow, and CI runs one of them by name.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelspec.training import TrainingState
from twinzoo.__main__ import main

ROOT = Path(__file__).parents[2]
NEIGHBORHOOD = ("depths=[4,1]", "num_heads=[2,4]", "embed_dim=48", "drop_path_rate=0.1")
SMALL = {
    "swiftformer-xs": ("depths=[2,2,2]", "embed_dims=[24,32,48]", "downsamples=[true,true,true]"),
    "nat-mini": (*NEIGHBORHOOD, "kernel_size=3"),
    "dinat-mini": (*NEIGHBORHOOD, "kernel_size=3", "dilations=[[1,2,1,2],[1]]"),
    "vit-msn-small": (
        *("hidden_size=64", "num_hidden_layers=4", "num_attention_heads=4", "intermediate_size=128", "patch_size=4"),
    ),
}
LEAST = {"swiftformer-xs": 0.97, "nat-mini": 0.97, "dinat-mini": 0.97, "vit-msn-small": 0.95}
FROM_NOTHING = ("--epochs", "40", "--learning-rate", "3e-3", "--crop-scale", "0.6", "--ema", "0.98", "--mixup", "0.2")
OPTIONS = {
    "swiftformer-xs": ("--epochs", "10", "--learning-rate", "2e-3"),
    "nat-mini": FROM_NOTHING,
    "dinat-mini": FROM_NOTHING,
    "vit-msn-small": ("--epochs", "40", "--learning-rate", "2e-3", "--crop-scale", "0.7"),
}


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "digits"
    assert main(["digits", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "tf"])
@pytest.mark.parametrize("model", SMALL)
def test_digits_are_learnt(model, framework, digits_folder, tmp_path):
    arguments = ["finetune", str(digits_folder), "--output", str(tmp_path / "out"), "--model", model, "--from-scratch"]
    arguments += ["--framework", framework, "--image-size", "32", "--json", *OPTIONS[model]]
    for setting in SMALL[model]:
        arguments += ["--set", setting]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-m", "twinzoo", *arguments], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    print(
        f"\n{model} {framework}: {found['accuracy']:.2%} in {found['seconds']:.0f} s, "
        f"logistic regression {found['baseline']:.2%}"
    )
    assert found["training_images"] == 1438 and found["validation_images"] == 359
    assert found["accuracy"] >= LEAST[model]
    assert 0.9 < found["baseline"] < 1
    assert found["parity"]["passed"]
    assert TrainingState.load(tmp_path / "out" / "training" / "state.safetensors").epoch == int(OPTIONS[model][1])
    assert (
        subprocess.run([sys.executable, "-m", "parity", "verify", str(tmp_path / "out")], env=environment).returncode
        == 0
    )
