"""What replicas do together is what one device does alone; and what is no strategy is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras_layers import PARTS, compute

from tfmodels.distributed import joined
from twinzoo.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def on_replicas(tmp_path_factory):
    file = tmp_path_factory.mktemp("replicas") / "found.npz"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    program = Path(__file__).with_name("keras_layers.py")
    process = subprocess.run([sys.executable, program, file], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return dict(np.load(file))


@pytest.fixture(scope="module")
def alone():
    keras.config.set_floatx("float64")
    try:
        return compute((5,))
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")  # Keras keeps the one that it made of the default


def test_normalization_and_what_is_dropped_are_of_the_whole_batch(on_replicas, alone):
    for number in range(PARTS):
        for kind in ("outputs", "gradients of images"):
            name = f"{kind} {number}"
            np.testing.assert_allclose(on_replicas[name], alone[name], rtol=0, atol=1e-12, err_msg=name)
    lost = np.array([alone[f"outputs {number}"] == 0 for number in range(PARTS)])
    assert lost.all(axis=(2, 3, 4)).any() and not lost.all(axis=(2, 3, 4)).all()  # of samples
    assert lost.any(axis=(2, 3, 4)).all() and len(np.unique(lost.sum(axis=(2, 3, 4)))) > 2  # of elements


@pytest.mark.parametrize("kind", ["weights", "first moments", "second moments", "averages"])
def test_steps_clip_accumulate_and_average_what_is_summed(kind, on_replicas, alone):
    names = [name.partition(",")[0] for name in alone if name.startswith(kind)]
    assert len(names) >= 4
    for name in names:
        first, second = (on_replicas[f"{name}, replica {replica}"] for replica in range(2))
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, alone[f"{name}, replica 0"], rtol=0, atol=1e-12, err_msg=name)


WORKERS = {"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker", "index": 0}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("", "multiworker needs the environment variable TF_CONFIG"),
        ("{", "TF_CONFIG is {; give it like"),
        ('{"cluster": {}}', "give it like"),
        (json.dumps({**WORKERS, "task": {"type": "worker", "index": 2}}), "says that this is worker 2; there is no"),
        (json.dumps({**WORKERS, "task": {"type": "ps", "index": 0}}), "says that this is ps 0; there is no"),
        (json.dumps({**WORKERS, "cluster": {"worker": ["here"]}}), "TF_CONFIG lists 'here'; give the HOST:PORT"),
    ],
)
def test_wrong_workers_are_said(config, said, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=said), joined("multiworker"):
        pass


def test_strategies_that_cannot_be_had_are_said():
    with pytest.raises(ValueError, match="strategy is 'ddp'; allowed are mirrored, multiworker"), joined("ddp"):
        pass
    with pytest.raises(ValueError, match="replicas is 0; allowed is from 1"), joined("mirrored", replicas=0):
        pass
    with pytest.raises(ValueError, match="an option of mirrored, not of multiworker"):
        with joined("multiworker", replicas=2):
            pass
    with joined("mirrored", replicas=1):
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--framework", "torch", "--strategy", "mirrored"], "allowed with framework torch are ddp, fsdp"),
        (["--framework", "tf", "--strategy", "fsdp"], "allowed with framework tf are mirrored, multiworker"),
        (["--framework", "tf", "--strategy", "mirrored", "--worker-index", "0"], "--workers and --worker-index go"),
        (
            ["--framework", "tf", "--strategy", "mirrored", "--workers", "a:1", "--worker-index", "0"],
            "--workers are those of --strategy multiworker",
        ),
        (["--framework", "tf", "--replicas", "2"], "replicas is 2; it is an option of strategy mirrored"),
    ],
)
def test_options_of_another_strategy_are_refused(options, said, tmp_path, capsys):
    arguments = ["finetune", str(tmp_path), "--output", str(tmp_path / "out"), "--model", "swiftformer-xs", *options]
    assert main(arguments) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
