"""Processes that train together, under DDP and FSDP, leave what one process with the same batches leaves."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_training import DROPPING, ONE_EPOCH, assert_follows, assert_same, in_one_process
from torch_training import train

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("torch_training.py")
# Of all cases the options are those of `small_training.RECIPE`: layer decay, clipping, mixup, averages, accumulation,
# freezing, and parts of five images, of which one process has three and the other two.
CASES = {
    "swiftformer, ddp": {"family": "swiftformer", "strategy": "ddp"},
    "swiftformer, fsdp": {"family": "swiftformer", "strategy": "fsdp", "keep": [2, "begun"]},
    "dinat, ddp": {"family": "dinat", "strategy": "ddp"},
    "dinat, fsdp": {"family": "dinat", "strategy": "fsdp"},
    "going on, ddp": {"family": "dinat", "strategy": "ddp", "state_path": "after-two-epochs"},
    "going on, fsdp": {"family": "dinat", "strategy": "fsdp", "state_path": "after-two-epochs"},
    "dropping, ddp": {"family": "vit_msn", "strategy": "ddp", "config": DROPPING["vit_msn"], "recipe": ONE_EPOCH},
    "dropping, fsdp": {"family": "nat", "strategy": "fsdp", "config": DROPPING["nat"], "recipe": ONE_EPOCH},
    "recomputing, ddp": {
        "family": "swiftformer",
        "strategy": "ddp",
        "config": DROPPING["swiftformer"],
        "recipe": {**ONE_EPOCH, "gradient_checkpointing": True},
    },
    "recomputing, fsdp": {
        "family": "swiftformer",
        "strategy": "fsdp",
        "config": DROPPING["swiftformer"],
        "recipe": {**ONE_EPOCH, "gradient_checkpointing": True},
    },
    "taught, fsdp": {"family": "swiftformer", "strategy": "fsdp", "teacher": 7, "recipe": ONE_EPOCH},
    "no share": {"family": "nat", "strategy": "ddp", "recipe": {"batch_size": 1, "accumulation_steps": 1}},
    "other seeds": {"family": "nat", "strategy": "fsdp", "differ": True},
}


def launch(processes, folder, cases):
    """Runs cases in several processes; returns per case what each process found."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(PROGRAM)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, *command, str(folder), *map(json.dumps, cases)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return [
        [dict(np.load(folder / f"{number}-{rank}.npz")) for rank in range(processes)] for number in range(len(cases))
    ]


@functools.cache
def of_one_process(case):
    """What one process leaves, of a case in JSON."""
    return train(**json.loads(case))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes ran, with the state of `after-two-epochs`, which one process wrote."""
    folder = tmp_path_factory.mktemp("processes")
    train("dinat", keep=(2, folder / "after-two-epochs"), recipe={})
    return folder


@pytest.fixture(scope="module")
def of_two_processes(folder):
    (folder / "again").write_bytes((folder / "after-two-epochs").read_bytes())
    cases = [dict(case) for case in CASES.values()]
    cases[list(CASES).index("going on, fsdp")]["state_path"] = "again"  # each goes on in a file of its own
    return dict(zip(CASES, launch(2, folder, cases), strict=True))


CURVES = [name for name in CASES if name not in ("no share", "other seeds")]


@pytest.mark.parametrize("name", CURVES)
def test_two_processes_follow_the_curve_of_one(name, of_two_processes):
    wanted = of_one_process(in_one_process(CASES[name]))
    assert_follows(CASES[name], of_two_processes[name], wanted, going_on_after=2 if name.startswith("going on") else 0)


def test_dropping_changes_the_curve(of_two_processes):
    """Else the cases that drop would say nothing."""
    for family in ("vit_msn", "nat", "swiftformer"):
        dropping, plain = (
            of_one_process(json.dumps({"family": family, "config": config, "recipe": ONE_EPOCH}))
            for config in (DROPPING[family], {})
        )
        assert np.abs(dropping["curves/losses"] - plain["curves/losses"]).max() > 1e-3


def test_one_process_goes_on_with_what_two_began(folder, of_two_processes):
    arrays = train("swiftformer", state_path=folder / "begun")
    assert_same("swiftformer", arrays, of_one_process(in_one_process(CASES["swiftformer, fsdp"])), going_on_after=2)


def test_processes_that_cannot_train_together_say_why(of_two_processes):
    for arrays in of_two_processes["no share"]:
        assert str(arrays["error"]).startswith("parts of 1 images cannot be shared by 2 processes; give fewer")
    for arrays in of_two_processes["other seeds"]:
        assert str(arrays["error"]).startswith("process 1 has recipe ") and "start all with the same" in str(
            arrays["error"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swiftformer, ddp", "dinat, fsdp"])
def test_three_processes_begin_and_go_on(name, tmp_path):
    begin = {**CASES[name], "keep": [2, "begun"]}
    (arrays, *_), (later, *_) = launch(3, tmp_path, [begin, {**CASES[name], "state_path": "begun"}])
    wanted = of_one_process(in_one_process(CASES[name]))
    family = CASES[name]["family"]
    assert_same(family, arrays, wanted)
    assert_same(family, later, wanted, going_on_after=2)
