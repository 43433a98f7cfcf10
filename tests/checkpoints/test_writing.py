"""A folder that is written is replaced as a whole, whatever happens meanwhile."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import modelspec.atomic_folder as atomic_folder_module
from modelspec import CheckpointError, ImageProcessor, SwiftFormerConfig
from modelspec.atomic_folder import atomic_folder, recover
from modelspec.checkpoints import RawTensor, open_checkpoint, parameter_shapes, read_checkpoint, resolve_weights
from modelspec.checkpoints.writing import parse_size, write_checkpoint


def owns(name: str) -> bool:
    return name.startswith("ours")


def fill(folder, **files) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def contents(folder) -> dict:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(params=["exchange", "no exchange", "own working directory"])
def way(request, monkeypatch, tmp_path):
    """A folder to write, in each of the ways in which it can be replaced."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if request.param == "no exchange":
        monkeypatch.setattr("modelspec.atomic_folder._rename_exchange", lambda *_: False)
    elif request.param == "own working directory":
        monkeypatch.chdir(folder)
    return folder


def test_new_files_replace_old_ones_and_the_users_stay(way, tmp_path):
    fill(way, ours1="old", ours2="old", theirs="kept")
    (way / "sub").mkdir()
    fill(way / "sub", deep="kept")
    (way / "link").symlink_to("theirs")
    with atomic_folder(way, owns) as folder:
        fill(folder, ours1="new", ours3="new")
        fill(way, late="kept")
        assert contents(way)["ours1"] == "old"
    assert contents(way) == {"ours1": "new", "ours3": "new", "theirs": "kept", "late": "kept", "link": "kept"}
    assert (way / "sub" / "deep").read_text() == "kept" and (way / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_that_appear_at_the_last_moment_are_kept(tmp_path, monkeypatch):
    fill(tmp_path, ours1="old")

    def late(first, second):
        fill(first, late="kept")
        return exchange(first, second)

    exchange = atomic_folder_module._rename_exchange
    monkeypatch.setattr(atomic_folder_module, "_rename_exchange", late)
    with atomic_folder(tmp_path, owns) as folder:
        fill(folder, ours1="new")
    assert contents(tmp_path) == {"ours1": "new", "late": "kept"}


def test_a_failure_changes_nothing_and_leaves_nothing(way, tmp_path):
    fill(way, ours1="old", theirs="kept")
    with pytest.raises(OSError, match="full"), atomic_folder(way, owns) as folder:
        fill(folder, ours1="new")
        raise OSError("the disk is full")
    assert contents(way) == {"ours1": "old", "theirs": "kept"}
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "made" / "now", owns):
        raise OSError("the disk is full")
    assert not (tmp_path / "made" / "now").exists()


def test_what_was_complete_but_not_moved_is_finished_by_the_next_reader(tmp_path, monkeypatch):
    fill(tmp_path, ours1="old", ours2="old", theirs="kept")
    monkeypatch.chdir(tmp_path)
    steps = []

    def dies(source, target):
        if steps:
            raise KeyboardInterrupt
        steps.append(rename(source, target))

    rename = os.replace
    monkeypatch.setattr("modelspec.atomic_folder.os.replace", dies)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path, owns) as folder:
        fill(folder, ours1="new", ours3="new")
    monkeypatch.undo()
    recover(tmp_path)
    assert contents(tmp_path) == {"ours1": "new", "ours3": "new", "theirs": "kept"}
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def tensors_of(config) -> dict[str, np.ndarray]:
    shapes = parameter_shapes(config)
    return {
        key: np.full(shape, config.num_labels, np.int64 if key.endswith("tracked") else np.float32)
        for key, shape in shapes.items()
    }


def write(folder, labels: int, shard: int | str) -> None:
    config = SwiftFormerConfig(depths=[1, 1], embed_dims=[8, 12], downsamples=[True, True], num_labels=labels)
    tensors = tensors_of(config)
    sizes = {key: value.nbytes for key, value in tensors.items()}
    raw = {key: RawTensor(str(value.dtype), value.shape, value.tobytes()) for key, value in tensors.items()}
    write_checkpoint(folder, config.to_json_string(), sizes, raw.__getitem__, max_shard_size=shard)


def check(folder) -> int:
    """Loads the folder; returns the number of labels that its config and all of its weights were written for."""
    opened = open_checkpoint(SwiftFormerConfig, folder)
    tensors, report = opened.match(parameter_shapes(opened.config))
    assert not report.missing and not report.unexpected
    assert {float(value.flat[0]) for value in tensors.values()} == {float(opened.config.num_labels)}
    return opened.config.num_labels


def test_large_weights_are_cut_into_shards_with_an_index(tmp_path):
    write(tmp_path, 5, "4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for key, name in index["weight_map"].items():
        assert key in load_file(tmp_path / name)
    assert check(tmp_path) == 5
    write(tmp_path, 6, "1GB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert check(tmp_path) == 6


def test_sizes_are_read(tmp_path):
    assert [parse_size(size) for size in (7, "5GB", "1.5 KiB", "200mb")] == [7, 5 * 10**9, 1536, 200 * 10**6]
    for bad in (0, -1, True, "5", "big", "0MB", None):
        with pytest.raises(ValueError, match="max_shard_size is"):
            parse_size(bad)


def test_the_processor_goes_into_the_folder(tmp_path):
    config = SwiftFormerConfig()
    write_checkpoint(tmp_path, config.to_json_string(), {}, dict().__getitem__, processor=ImageProcessor(size=31))
    assert ImageProcessor.from_pretrained(tmp_path).size == {"height": 31, "width": 31}
    write(tmp_path, 5, "1GB")
    assert ImageProcessor.from_pretrained(tmp_path).size == {"height": 31, "width": 31}  # it stays


def test_shards_and_index_must_fit_together(tmp_path):
    write(tmp_path / "a", 5, "4KB")
    write(tmp_path / "b", 6, "4KB")
    index = tmp_path / "a" / "model.safetensors.index.json"
    original = index.read_text()
    first = json.loads(original)["weight_map"]["norm.weight"]
    os.replace(tmp_path / "b" / first, tmp_path / "a" / first)
    with pytest.raises(CheckpointError, match="another save"):
        read_checkpoint(index)
    for bad in ("../b/" + first, "/etc/passwd", "no-such-file.safetensors", "", 3):
        changed = json.loads(original)
        changed["weight_map"]["norm.weight"] = bad
        index.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="model.safetensors.index.json"):
            read_checkpoint(index)
    for text in ("", "[]", "{}", '{"weight_map": {}}', "[" * 100000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="model.safetensors.index.json"):
            read_checkpoint(index)


def test_an_index_of_others_must_say_where_its_keys_are(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.zeros(2, np.float32)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert read_checkpoint(index).tensors.keys() == {"a", "b"}
    for wrong in ({"a": "one.safetensors", "b": "one.safetensors"}, {"a": "one.safetensors", "c": "two.safetensors"}):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match="index.json and one.safetensors|and two.safetensors disagree about"):
            read_checkpoint(index)


_LOOP = """
import itertools, sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_writing import write
import modelspec.atomic_folder as atomic_folder
if {inside!r}:
    atomic_folder._can_exchange = lambda directory: False
for turn in itertools.count():
    write(Path({folder!r}), 3 + turn % 7, ["1GB", "4KB", "9KB"][turn % 3])
    print(turn, flush=True)
"""


@pytest.mark.parametrize("inside", [False, True])
def test_a_killed_save_leaves_the_old_or_the_new(inside, tmp_path):
    _kill(tmp_path, 10, inside)


@pytest.mark.slow
def test_a_hundred_killed_saves_leave_the_old_or_the_new(tmp_path):
    for inside in (False, True):
        _kill(tmp_path / str(inside), 100, inside)


def _kill(folder, times: int, inside: bool) -> None:
    chance = random.Random(0)
    folder.mkdir(exist_ok=True)
    target = folder / "checkpoint"
    write(target, 3, "1GB")
    fill(target, theirs="kept")
    program = _LOOP.format(path=[os.path.dirname(__file__), *sys.path], folder=str(target), inside=inside)
    seen = set()
    for _ in range(times):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        seen.add(check(target))
        assert (target / "theirs").read_text() == "kept"
    assert len(seen) > 1
    write(target, 4, "4KB")
    assert check(target) == 4
    assert [path.name for path in folder.iterdir()] == ["checkpoint"]  # no remains
    assert not list(target.glob(".sav*"))


def test_a_full_disk_leaves_the_old(tmp_path):
    write(tmp_path / "checkpoint", 5, "1GB")
    program = f"""
import resource, signal, sys
sys.path[:0] = {[os.path.dirname(__file__), *sys.path]!r}
from pathlib import Path
from test_writing import write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    write(Path({str(tmp_path / "checkpoint")!r}), 6, "1GB")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout, done.stdout + done.stderr
    assert check(tmp_path / "checkpoint") == 5
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_weights_are_found_in_the_order_of_trust(tmp_path):
    names = ("tf_model.h5", "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors")
    for name in names:
        fill(tmp_path, **{name: ""})
        assert resolve_weights(tmp_path) == str(tmp_path / name)
    assert resolve_weights(tmp_path / "tf_model.h5") == str(tmp_path / "tf_model.h5")
