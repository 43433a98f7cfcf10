"""Replicas that train together, mirrored or in several workers, leave what one process with the same batches leaves."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras_training import fit_by_hand, train
from small_training import DROPPING, ONE_EPOCH, assert_follows, assert_same, in_one_process

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("keras_training.py")


@pytest.fixture(autouse=True)
def float64_keras():
    """Keras keeps learning rates and losses in its default float."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")  # Keras keeps the one that it made of the default


@contextlib.contextmanager
def started(strategy, processes, folder, cases):
    """Starts cases on so many replicas; gives the processes."""
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(processes)]
        for listening in bound:
            listening.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{listening.getsockname()[1]}" for listening in bound]
    running = []
    for index in range(processes if strategy == "multiworker" else 1):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        if strategy == "multiworker":
            cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment["TF_CONFIG"] = json.dumps(cluster)
        command = [sys.executable, str(PROGRAM), str(folder), strategy, str(processes), *map(json.dumps, cases)]
        running.append(
            subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        )
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def launch(strategy, processes, folder, cases):
    """Runs cases on so many replicas; returns per case what each process found."""
    with started(strategy, processes, folder, cases) as running:
        for process in running:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors.decode()
    numbers = range(len(cases))
    return [[dict(np.load(folder / f"{number}-{rank}.npz")) for rank in range(len(running))] for number in numbers]


@functools.cache
def of_one_process(case):
    """What one process leaves, of a case in JSON."""
    case = json.loads(case)
    return fit_by_hand(**case) if "optimizer" in case else train(**case)


# The options are those of `small_training.RECIPE`: layer decay, clipping, mixup, averages, accumulation, freezing, and
# parts of five images, of which one replica has three and the other two.
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["mirrored", "multiworker"])
@pytest.mark.parametrize("family", ["swiftformer", "dinat"])
def test_two_replicas_follow_the_curve_of_one(family, strategy, tmp_path):
    case = {"family": family, "implementation": "native"}  # where there is any, which DiNAT has
    small = {"family": "nat", "recipe": {"batch_size": 1, "accumulation_steps": 1}}
    arrays, refused = launch(strategy, 2, tmp_path, [case, small])
    assert len(arrays) == (2 if strategy == "multiworker" else 1)
    assert_follows(case, arrays, of_one_process(in_one_process(case)))
    for found_of_process in refused:
        assert str(found_of_process["error"]).startswith("parts of 1 images cannot be shared by 2 replicas; give fewer")


OTHERS = {
    "vit_msn, dropping": {"family": "vit_msn", "config": DROPPING["vit_msn"], "recipe": ONE_EPOCH},
    "nat, dropping": {"family": "nat", "config": DROPPING["nat"], "recipe": ONE_EPOCH},
    "swiftformer, recomputing": {
        "family": "swiftformer",
        "config": DROPPING["swiftformer"],
        "recipe": {**ONE_EPOCH, "gradient_checkpointing": True},
    },
    "swiftformer, taught": {"family": "swiftformer", "teacher": 7, "recipe": ONE_EPOCH},
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["mirrored", "multiworker"])
def test_dropping_recomputing_and_teaching_are_those_of_one(strategy, tmp_path):
    for case, arrays in zip(OTHERS.values(), launch(strategy, 2, tmp_path, OTHERS.values()), strict=True):
        assert_follows(case, arrays, of_one_process(in_one_process(case)))


@pytest.mark.slow
def test_dropping_changes_the_curve():
    """Else the cases that drop would say nothing."""
    for family in DROPPING:
        dropping, plain = (
            of_one_process(json.dumps({"family": family, "config": config, "recipe": ONE_EPOCH}))
            for config in (DROPPING[family], {})
        )
        assert np.abs(dropping["curves/losses"] - plain["curves/losses"]).max() > 1e-3


@pytest.mark.slow
def test_what_users_compile_and_fit_themselves_is_that_of_one_process(tmp_path):
    """Own loss, batch normalization, and random masks, under a strategy's scope; Keras' own optimizer."""
    case = {"family": "swiftformer", "optimizer": "sgd", **DROPPING["swiftformer"]}
    ((arrays,),) = launch("mirrored", 2, tmp_path, [case])
    assert_same("swiftformer", arrays, of_one_process(json.dumps(case)))
