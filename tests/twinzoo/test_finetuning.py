"""`twinzoo finetune`: from a folder of images to a checkpoint, also when it is killed, and what it says of trouble."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from image_folders import write_digits

import ptmodels
import tfmodels
from modelspec import ImageProcessor
from modelspec.checkpoints import read_checkpoint
from modelspec.parameter_groups import place_of
from modelspec.training import TrainingState
from parity.certificate import verify
from twinzoo.__main__ import main
from twinzoo.image_folder import training_and_validation

SMALL = {
    "nat-mini": ["depths=[1,1]", "num_heads=[1,2]", "embed_dim=8", "kernel_size=3", "drop_path_rate=0.1"],
    "dinat-mini": [
        *["depths=[2,1]", "num_heads=[1,2]", "embed_dim=8", "kernel_size=3", "dilations=[[1,2],[1]]"],
        "drop_path_rate=0.1",
    ],
    "swiftformer-xs": ["depths=[1,1]", "embed_dims=[8,16]", "downsamples=[true,true]"],
    "vit-msn-small": [
        *["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32"],
        *["patch_size=4", "hidden_dropout_prob=0.1"],
    ],
}


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("images") / "digits")


def command(folder, output, model="swiftformer-xs", **options):
    given = {"epochs": 2, "batch_size": 16, "image_size": 16, "learning_rate": 5e-3, "no_parity": True} | options
    given = {name: value for name, value in given.items() if value is not False}
    arguments = ["finetune", str(folder), "--output", str(output), "--model", model, "--from-scratch"]
    for setting in SMALL[model]:
        arguments += ["--set", setting]
    for name, value in given.items():
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return arguments


@pytest.mark.parametrize(("model", "framework"), [("swiftformer-xs", "tf"), ("nat-mini", "torch")])
def test_a_folder_becomes_a_checkpoint(model, framework, digit_folder, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (
        main(command(digit_folder, tmp_path / "out", model, framework=framework, ema=0.9, json=True, no_parity=False))
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["class_names"] == ["digit 0", "digit 1", "digit 2"] and found["validation_images"] == 12
    assert found["accuracy"] == pytest.approx(found["history"]["val_accuracy"][-1])
    assert found["parity"]["passed"] and found["baseline"] > 0.8
    _, held_out, _ = training_and_validation(digit_folder)
    assert np.sum(found["confusion"], axis=1).tolist() == np.bincount(held_out.labels).tolist()
    assert np.trace(found["confusion"]) == round(12 * found["accuracy"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "parity.json"}
    assert names >= {"curves.png", "confusion_matrix.png", "training"}
    verification = verify(tmp_path / "out")
    assert verification.belongs and verification.passed

    processor = ImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size == {"height": 16, "width": 16}
    images = processor(sorted((digit_folder / "digit 1").iterdir())[:2])["pixel_values"]
    ours, theirs = ptmodels.load(tmp_path / "out"), tfmodels.load(tmp_path / "out")
    assert ours.config.id2label == {0: "digit 0", 1: "digit 1", 2: "digit 2"}
    np.testing.assert_allclose(ours(ptmodels_tensor(images)).logits.detach(), theirs(images).logits, atol=1e-5)

    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| this model | {found['accuracy']:.2%} |" in card and "all agree" in card and "float64 | " in card
    events = EventAccumulator(str(tmp_path / "out" / "training" / "tensorboard")).Reload()
    for tag, name in (("loss/training", "loss"), ("accuracy/held_out", "val_accuracy")):
        written = [(scalar.step, scalar.value) for scalar in events.Scalars(tag)]
        np.testing.assert_allclose(written, list(enumerate(found["history"][name], start=1)), rtol=1e-6)


def ptmodels_tensor(array):
    import torch

    return torch.from_numpy(array)


def run(arguments, **options):
    """Runs the command in a process of its own; returns it."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "twinzoo", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(process, path, since):
    """Waits until a file is newer than `since`, or the process has ended; returns the file's time."""
    while process.poll() is None and not (path.exists() and path.stat().st_mtime > since):
        time.sleep(0.005)
    return path.stat().st_mtime if path.exists() else since


def killed_until_done(arguments, output, kills, seconds):
    """Kills the run at random moments after training has begun, looking at what it left each time, then lets it end.

    Returns the finished epochs after each kill, and the outcome.
    """
    draws, epochs = random.Random(0), []
    path = output / "training" / "state.safetensors"
    for _ in range(kills):
        began = time.time()
        process = run(arguments)
        wait_for(process, output / "training" / "run.json", began)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draws.uniform(*seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        epochs.append(TrainingState.load(path).epoch if path.exists() else 0)  # never half a file
    process = run(arguments)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return epochs, json.loads(out)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "tf"])
def test_a_run_that_is_killed_ten_times_ends_like_one_that_is_not(framework, digit_folder, tmp_path):
    options = {"epochs": 40, "framework": framework, "json": True, "ema": 0.9, "mixup": 0.2}
    process = run(command(digit_folder, tmp_path / "whole", "vit-msn-small", **options))
    begun = wait_for(process, tmp_path / "whole" / "training" / "run.json", 0)
    state = tmp_path / "whole" / "training" / "state.safetensors"
    first = wait_for(process, state, 0) - begun
    whole = json.loads(process.communicate(timeout=300)[0])
    moments = (0.5 * first, first + 0.3 * (state.stat().st_mtime - begun - first))
    arguments = command(digit_folder, tmp_path / "killed", "vit-msn-small", **options)
    epochs, killed = killed_until_done(arguments, tmp_path / "killed", 10, moments)
    assert epochs == sorted(epochs) and any(0 < epoch < 40 for epoch in epochs), epochs
    for name, values in whole["history"].items():
        np.testing.assert_allclose(killed["history"][name], values, rtol=1e-4, err_msg=name)
    assert killed["confusion"] == whole["confusion"]


def test_a_run_goes_on_where_it_was_killed(digit_folder, tmp_path):
    arguments = command(digit_folder, tmp_path / "killed", "vit-msn-small", epochs=12, json=True)
    path = tmp_path / "killed" / "training" / "state.safetensors"
    process = run(arguments)
    while process.poll() is None and not (path.exists() and TrainingState.load(path).epoch >= 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    begun = TrainingState.load(path)
    assert 2 <= begun.epoch < 12
    process = run(arguments)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    history = json.loads(out)["history"]
    assert len(history["loss"]) == 12 and history["loss"][: begun.epoch] == begun.history["loss"]
    assert history["loss"][-1] < history["loss"][0]


def test_trouble_with_the_images_is_one_clear_line(digit_folder, tmp_path, capsys):
    images = write_digits(tmp_path / "images", 30)
    (images / "digit 9").mkdir()
    assert main(command(images, tmp_path / "out")) == 1
    errors = capsys.readouterr().err
    assert errors == f"twinzoo: error: {images / 'digit 9'} holds no images; add some, or remove the folder\n"
    (images / "digit 9").rmdir()
    broken = images / "digit 1" / "broken.png"
    broken.write_bytes(b"not a picture")
    assert main(command(images, tmp_path / "out")) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"twinzoo: error: {broken} cannot be read as an image") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"freeze": "stage9"}, "upto is 'stage9'; the stages are stem, stage1"),
        ({"set": "depth=[1,1]"}, "has no field 'depth'; did you mean 'depths'?"),
        ({"set": "depths=[1,1"}, "--set depths=[1,1: give FIELD=VALUE"),
        ({"epochs": 0}, "Recipe.epochs is 0; allowed is a whole number from 1"),
        ({"batch_size": 6, "accumulation_steps": 4}, "must divide batch_size, 6"),
    ],
)
def test_options_that_cannot_be_leave_nothing(options, reason, digit_folder, tmp_path, capsys):
    assert main(command(digit_folder, tmp_path / "out", "nat-mini", **options)) == 1
    errors = capsys.readouterr().err
    assert reason in errors and errors.startswith("twinzoo: error: ") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_same_place_is_refused(digit_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(digit_folder, out, epochs=1, warmup_epochs=0)) == 0
    assert main(command(digit_folder, out, epochs=1, warmup_epochs=0, weight_decay=0.2)) == 1
    assert "holds a run with weight_decay 0.05, and this one has 0.2; go on with the same" in capsys.readouterr().err
    state = (out / "training" / "state.safetensors").read_bytes()
    assert main(command(digit_folder, out, epochs=1, warmup_epochs=0, weight_decay=0.2, restart=True)) == 0
    assert (out / "training" / "state.safetensors").read_bytes() != state
    ptmodels.load(out).save_pretrained(tmp_path / "mine")
    assert main(command(digit_folder, tmp_path / "mine")) == 1
    assert "mine holds a checkpoint already; choose another output, or replace it" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_trained(digit_folder, tmp_path, capsys):
    import threading

    arguments = command(digit_folder, tmp_path / "out", "vit-msn-small", epochs=12)
    path = tmp_path / "out" / "training" / "state.safetensors"
    process = run(arguments)
    while process.poll() is None and not path.exists():
        time.sleep(0.005)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))  # as if nothing more would fit
    timer = threading.Timer(120, process.kill)
    timer.start()
    out, errors = process.communicate()
    timer.cancel()
    assert process.returncode == 1, errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith("twinzoo: error: ") and "state.safetensors" in line and "Traceback" not in errors
    assert 1 <= TrainingState.load(path).epoch < 12
    assert not list(path.parent.glob("*.tmp"))
    assert main(arguments) == 0  # and goes on
    assert "epoch  1/12" not in capsys.readouterr().out


def test_a_checkpoint_gets_a_new_head_the_same_in_both_halves(swiftformer_config, tmp_path):
    from twinzoo.halves import load_classifier

    config = swiftformer_config.replace(num_labels=3)
    ptmodels.SwiftFormerForImageClassification(config).save_pretrained(tmp_path)
    names = ["cat", "dog", "horse"]
    ours, theirs = (load_classifier(half, tmp_path, class_names=names, seed=5) for half in ("torch", "tf"))
    assert list(ours.config.id2label.values()) == list(theirs.config.id2label.values()) == names
    assert ours.config.label2id == theirs.config.label2id == {"cat": 0, "dog": 1, "horse": 2}
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    found = ours(ptmodels_tensor(images)).logits.detach().numpy()
    np.testing.assert_allclose(theirs(images).logits, found, atol=1e-6)
    theirs.save_pretrained(tmp_path / "new")
    kept = load_classifier("torch", tmp_path / "new", class_names=names, seed=6)
    np.testing.assert_allclose(kept(ptmodels_tensor(images)).logits.detach(), found, atol=1e-6)
    other = load_classifier("torch", tmp_path / "new", class_names=names[::-1], seed=6)
    assert np.abs(other(ptmodels_tensor(images)).logits.detach().numpy() - found).max() > 1e-5


@pytest.mark.parametrize("framework", ["torch", pytest.param("tf", marks=pytest.mark.slow)])
def test_a_checkpoint_is_trained_further_with_a_teacher_and_frozen_stages(framework, digit_folder, tmp_path, capsys):
    assert main(command(digit_folder, tmp_path / "first", epochs=1, warmup_epochs=0)) == 0
    arguments = [
        "finetune",
        str(digit_folder),
        "--model",
        str(tmp_path / "first"),
        "--output",
        str(tmp_path / "second"),
    ]
    arguments += ["--framework", framework, "--epochs", "1", "--warmup-epochs", "0", "--freeze", "stage1"]
    arguments += [
        "--teacher",
        str(tmp_path / "first"),
        "--gradient-checkpointing",
        "--set",
        "drop_path_rate=0.2",
        "--no-parity",
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    before, after = (read_checkpoint(tmp_path / name / "model.safetensors").tensors for name in ("first", "second"))
    kept = {key for key in before if np.array_equal(before[key], after[key])}
    frozen = {key for key in before if place_of(ptmodels.load(tmp_path / "first").config, key).stage <= 1}
    assert frozen <= kept and {"head.weight", "dist_head.weight"} & kept == set()
    assert json.loads((tmp_path / "second" / "config.json").read_text())["drop_path_rate"] == 0.2

    two = write_digits(tmp_path / "two", 20, classes=2)
    assert main([*arguments[:1], str(two), *arguments[2:]]) == 1  # in the same place
    arguments[arguments.index("--output") + 1] = str(tmp_path / "third")
    assert main([*arguments[:1], str(two), *arguments[2:]]) == 1
    assert "the teacher's classes are" in capsys.readouterr().err
