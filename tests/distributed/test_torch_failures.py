"""A process that is killed ends the whole training at once; what it leaves goes on with any number of processes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from image_folders import write_digits

from modelspec.training import TrainingState
from twinzoo.__main__ import main

EPOCHS = 16


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("images") / "digits")


def command(folder, output, strategy=None):
    arguments = ["finetune", str(folder), "--output", str(output), "--model", "dinat-mini", "--from-scratch"]
    for setting in ("depths=[2,1]", "num_heads=[1,2]", "embed_dim=8", "kernel_size=3", "dilations=[[1,2],[1]]"):
        arguments += ["--set", setting]
    arguments += ["--set", "drop_path_rate=0.2"]
    arguments += ["--epochs", str(EPOCHS), "--batch-size", "16", "--image-size", "16", "--learning-rate", "5e-3"]
    arguments += ["--ema", "0.9", "--mixup", "0.2", "--no-parity", "--json"]
    return arguments + ([] if strategy is None else ["--strategy", strategy])


def start(arguments, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "twinzoo", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def process_of_rank(launcher, rank):
    """Returns the id of a process that torchrun has started."""
    for task in Path(f"/proc/{launcher.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
    raise LookupError(rank)


def interrupted(folder, output, strategy, rank, number, processes=2, epochs=2):
    """Sends a signal to one process of a training; returns the seconds until the end, and what was said."""
    launcher = start(command(folder, output, strategy), processes)
    state = output / "training" / "state.safetensors"
    try:
        while launcher.poll() is None and not (state.exists() and TrainingState.load(state).epoch >= epochs):
            time.sleep(0.01)
        assert launcher.poll() is None, launcher.communicate()
        os.kill(process_of_rank(launcher, rank), number)
        began = time.monotonic()
        _, errors = launcher.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            launcher.kill()
    assert launcher.returncode != 0
    return time.monotonic() - began, errors


def history_of(launcher):
    out, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    return json.loads(out)["history"]


def assert_same_curves(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(digit_folder, tmp_path_factory):
    """The curves of one process that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(digit_folder, output)) == 0
    return json.loads((output / "training" / "history.json").read_text())


def test_a_killed_process_ends_all_and_another_number_goes_on(digit_folder, uninterrupted, tmp_path):
    output = tmp_path / "out"
    seconds, errors = interrupted(digit_folder, output, "ddp", rank=1, number=signal.SIGKILL)
    assert seconds < 60
    assert "twinzoo: error: another process of this training has " in errors and "start again" in errors, errors
    assert "rank      : 1" in errors and "SIGKILL" in errors  # torchrun's word on whose fault it was
    state = TrainingState.load(output / "training" / "state.safetensors")  # whole
    assert 2 <= state.epoch < EPOCHS
    assert not list(output.rglob("*.tmp")) and not (output / "model.safetensors").exists()
    assert main(command(digit_folder, output)) == 0
    found = json.loads((output / "training" / "history.json").read_text())
    assert found["loss"][: state.epoch] == state.history["loss"]
    assert_same_curves(found, uninterrupted)
    assert (output / "README.md").exists() and (output / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_first_process_may_be_killed_and_two_or_three_go_on(strategy, digit_folder, uninterrupted, tmp_path):
    output = tmp_path / "out"
    seconds, errors = interrupted(digit_folder, output, strategy, rank=0, number=signal.SIGKILL)
    assert seconds < 60 and "twinzoo: error: another process of this training has " in errors
    for processes, other in ((2, strategy), (3, strategy), (3, {"ddp": "fsdp", "fsdp": "ddp"}[strategy])):
        again = tmp_path / f"{processes}-{other}"
        shutil.copytree(output, again)
        assert_same_curves(history_of(start(command(digit_folder, again, other), processes)), uninterrupted)
        assert (again / "README.md").exists() and (again / "model.safetensors").exists()


@pytest.mark.slow
def test_a_process_that_hangs_is_not_waited_for(digit_folder, tmp_path):
    output = tmp_path / "out"
    seconds, errors = interrupted(digit_folder, output, "ddp", rank=1, number=signal.SIGSTOP)
    assert seconds < 120 and "does not answer" in errors
    assert TrainingState.load(output / "training" / "state.safetensors").epoch >= 2


def test_a_strategy_without_processes_says_how_to_start(digit_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(command(digit_folder, tmp_path / "out", "ddp")) == 1
    errors = capsys.readouterr().err
    assert "torchrun --standalone --nproc-per-node 2 -m twinzoo finetune ... --strategy ddp" in errors
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(digit_folder, tmp_path / "out")) == 1
    assert "there are 2 processes; give a strategy, ddp or fsdp, to train together" in capsys.readouterr().err
    assert main([*command(digit_folder, tmp_path / "out", "fsdp"), "--framework", "tf"]) == 1
    assert "strategy is 'fsdp'; allowed with framework tf are " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
