"""Damaged and hostile files: one clear error that names the file, or what the bytes say; nothing else happens.

The files are read in a process of their own with a limit on its memory, so that a crash or a hunger for memory shows.
"""

import collections
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import foreign
import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from modelspec import CheckpointError, SwiftFormerConfig
from modelspec.checkpoints import RawTensor, probing_weights, read_checkpoint
from modelspec.checkpoints.writing import write_checkpoint

CONFIG = SwiftFormerConfig(depths=[1, 1], embed_dims=[8, 12], downsamples=[True, True], num_labels=3)
FORMATS = ("ours", "sharded", "safetensors", "torch", "old torch", "h5")


def write(kind: str, folder) -> str:
    """Writes the small model in a format; returns the file to read."""
    tensors = probing_weights(CONFIG, 0)
    if kind in ("ours", "sharded"):
        raw = {key: RawTensor(str(value.dtype), value.shape, value.tobytes()) for key, value in tensors.items()}
        sizes = {key: value.nbytes for key, value in tensors.items()}
        size = "4KB" if kind == "sharded" else "1GB"
        write_checkpoint(folder, CONFIG.to_json_string(), sizes, raw.__getitem__, max_shard_size=size)
        return "model.safetensors.index.json" if kind == "sharded" else "model.safetensors"
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return "model.safetensors"
    if kind == "h5":
        foreign.write_tensorflow(folder / "tf_model.h5", tensors)
        return "tf_model.h5"
    state = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    torch.save(state, folder / "model.bin", _use_new_zipfile_serialization=kind == "torch")
    return "model.bin"


def damage(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Returns a damaged copy, and how it was damaged."""
    data = bytearray(data)
    how = chance.choice(["truncated", "bits", "bits", "header", "header", "number", "cut out", "doubled", "zeros"])
    if how == "truncated":
        del data[chance.randrange(len(data)) :]
    elif how == "bits":
        for _ in range(chance.choice([1, 1, 1, 3, 20])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "header":
        place = chance.randrange(min(len(data), chance.choice([16, 256, 4096])))
        data[place] = chance.randrange(256)
    elif how == "number":  # a size or an offset that is far too large
        place = chance.randrange(min(len(data), chance.choice([16, 4096, len(data)])))
        value = chance.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
        data[place : place + 8] = struct.pack("<Q", value)
    elif how == "cut out":
        place = chance.randrange(len(data))
        del data[place : place + chance.randrange(1, 64)]
    elif how == "doubled":
        place = chance.randrange(len(data))
        data[place:place] = data[place : place + chance.randrange(1, 64)]
    else:
        place = chance.randrange(len(data))
        data[place : place + chance.randrange(1, 64)] = bytes(chance.randrange(1, 64))
    return bytes(data), how


_READER = """
import os, resource, sys
sys.path[:0] = {path!r}
limit = 3 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
import numpy as np, h5py, safetensors
from modelspec.checkpoints import CheckpointError, read_checkpoint
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event in {events!r} else None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for line in sys.stdin:
    path = line.strip()
    opened.clear()
    try:
        found = read_checkpoint(path)
        answer = "read " + str(sum(value.nbytes for value in found.tensors.values()))
    except CheckpointError as error:
        answer = ("error " if os.path.dirname(path) in str(error) else "nameless ") + str(error).replace(chr(10), " ")
    folder = os.path.dirname(path)
    names = [os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name) for name in opened]
    stray = [name for name in names if not name.startswith(folder) and not name.endswith((".py", ".pyc", ".so"))]
    print(len(stray), answer[:400], flush=True)
print("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
"""
_EVENTS = ("open", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "shutil.rmtree")


class Reader:
    """Reads files in another process."""

    def __init__(self):
        program = _READER.format(path=[*sys.path], events=_EVENTS)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, path) -> str:
        """Returns what happened: "read BYTES" or "error REASON"."""
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the process ended with {self.process.wait()} while it read {path}"
        stray, _, answer = line.strip().partition(" ")
        assert stray == "0", f"{path}: something outside its folder was touched"
        assert answer.startswith(("read ", "error ")), answer
        return answer

    def close(self) -> int:
        """Returns by how many kilobytes the process has grown at most."""
        self.process.stdin.close()
        return int(self.process.stdout.readline().split()[1])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()


@pytest.fixture
def reader():
    reader = Reader()
    yield reader
    reader.end()


def break_files(kind: str, count: int, folder, reader) -> None:
    name = write(kind, folder)
    files = [path for path in sorted(folder.iterdir()) if path.name != "config.json"]
    whole = {path: path.read_bytes() for path in files}
    original = read_checkpoint(folder / name)
    chance = random.Random(f"{kind} {count}")
    outcomes = collections.Counter()
    for _ in range(count):
        path = chance.choice(files)
        data, how = damage(whole[path], chance)
        path.write_bytes(data)
        answer = reader.read(folder / name)
        outcomes[answer.partition(" ")[0]] += 1
        if answer.startswith("read"):
            assert int(answer.split()[1]) < 2 * sum(len(data) for data in whole.values())
            if kind in ("ours", "sharded"):  # our sums find everything but a change that means nothing
                found = read_checkpoint(folder / name)
                assert found.tensors.keys() == original.tensors.keys(), how
                for key, value in original.tensors.items():
                    np.testing.assert_array_equal(found.tensors[key], value, err_msg=f"{how} {key}")
        path.write_bytes(whole[path])
    assert outcomes["error"] > count / 4, outcomes
    assert reader.close() < 200_000  # kilobytes; the files have 50


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_errors_or_what_the_bytes_say(kind, tmp_path, reader):
    break_files(kind, 100, tmp_path, reader)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_ten_thousand_damaged_files(kind, tmp_path, reader):
    break_files(kind, 1700, tmp_path, reader)


# Hostile files


class Reduced:
    """Is pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def pack(program: bytes, members: dict | None = None, compression=zipfile.ZIP_STORED) -> bytes:
    """Returns a file of torch's with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in (members or {}).items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def tensor_program(storage: str, offset: int, shape: tuple, strides: tuple) -> bytes:
    """A state dictionary with one tensor, in instructions."""
    return b"".join(
        [
            b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n",
            storage.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ",
            *[pickle.dumps(entry, 2)[2:-1] for entry in (offset, shape, strides, False)],
            b"ccollections\nOrderedDict\n)RtRs.",
        ]
    )


OTHER_STORAGE = tensor_program("FloatStorage", 0, (4,), (1,)).replace(b"\x00\x000X", b"\x00\x001X")
HOSTILE = {
    "runs a command": (pickle.dumps({"model": Reduced(os.system, "touch PWNED")}, 2), "posix.system"),
    "runs code": (pickle.dumps({"model": Reduced(eval, "open('PWNED', 'w')")}, 2), "eval"),
    "imports": (b"\x80\x02cantigravity\nfly\n.", "antigravity.fly"),
    "asks for a method": (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "OrderedDict.fromkeys"),
    "sets the state of a class": (b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "state"),
    "calls a number": (b"\x80\x02K\x01)R.", "called"),
    "claims gigabytes of text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.", "torch"),
    "claims gigabytes to fill": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.", "torch"),
    "claims a place far away": (b"\x80\x02}r\xff\xff\xff\xff.", "no dictionary of tensors"),
    "nests deeply, as a key": (b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"K\x01u.", "neither text nor number"),
    "nests deeply": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "list"),
    "doubles itself, as a storage": (
        b"\x80\x02]" + b"q\x000(h\x00h\x00l" * 40 + b"q\x00h\x00h\x00\x87Q.",
        "no storage",
    ),
    "is a set": (pickle.dumps({1, 2}, 4), "torch"),
    "has no tensors": (pickle.dumps({"epoch": 3}, 2), "no dictionary of tensors, but epoch"),
    "reaches beyond its storage": (tensor_program("FloatStorage", 0, (5,), (1,)), "reaches beyond its storage"),
    "starts beyond its storage": (tensor_program("FloatStorage", 9, (1,), (1,)), "reaches beyond its storage"),
    "overflows": (tensor_program("FloatStorage", 0, (2**40, 2**40), (2**40, 1)), "reaches beyond its storage"),
    "repeats an element": (tensor_program("FloatStorage", 0, (2**40,), (0,)), "repeats some of its elements"),
    "has overlapping rows": (tensor_program("FloatStorage", 0, (2, 2), (1, 1)), "repeats some of its elements"),
    "has negative sizes": (tensor_program("FloatStorage", 0, (-1,), (1,)), "offset, shape or strides"),
    "has strides too many": (tensor_program("FloatStorage", 0, (1,), (1, 1)), "1 sizes and 2 strides"),
    "has no such storage": (
        tensor_program("FloatStorage", 0, (4,), (1,)).replace(b"\x00\x000X", b"\x00\x001X"),
        "lacks",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name, tmp_path, reader):
    program, message = HOSTILE[name]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pack(program, {"data/0": bytes(16)}))
    answer = reader.read(path)
    assert answer.startswith("error") and message in answer, answer
    assert [entry.name for entry in tmp_path.iterdir()] == ["pytorch_model.bin"]
    assert reader.close() < 200_000


def test_the_program_that_the_hostile_ones_are_made_of_reads(tmp_path):
    program = tensor_program("FloatStorage", 1, (3,), (1,))
    (tmp_path / "a.bin").write_bytes(pack(program, {"data/0": np.float32([1, 2, 3, 4]).tobytes()}))
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "a.bin").tensors["w"], [2, 3, 4])


def test_archives_that_grow_are_refused(tmp_path, reader):
    path = tmp_path / "pytorch_model.bin"
    bomb = pack(tensor_program("FloatStorage", 0, (1,), (1,)), {"data/0": bytes(2**27)}, zipfile.ZIP_DEFLATED)
    path.write_bytes(bomb)
    assert "compressed, which torch never does" in reader.read(path)
    whole = bytearray(pack(tensor_program("FloatStorage", 0, (4,), (1,)), {"data/0": bytes(16)}))
    place = whole.rindex(b"PK\x01\x02")  # the directory's entry of the storage claims more than there is
    whole[place + 20 : place + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    path.write_bytes(whole)
    assert "larger than the file" in reader.read(path)
    path.write_bytes(pack(b"\x80\x02}.").replace(b"archive/data.pkl", b"nothing/data.bin"))
    assert "without one data.pkl" in reader.read(path)
    whole = pack(tensor_program("FloatStorage", 0, (1,), (1,)), {"data/0": bytes(4), "data/1": bytes(8)})
    path.write_bytes(whole.replace(b"archive/data/1", b"archive/data/0"))
    assert "two members of the archive have the same name" in reader.read(path)
    assert reader.close() < 200_000


def test_h5_files_that_point_elsewhere_are_refused(tmp_path, reader):
    secret = tmp_path / "secret"
    secret.mkdir()
    foreign.write_tensorflow(secret / "other.h5", probing_weights(CONFIG, 0))
    (secret / "raw").write_bytes(bytes(64))
    folder = tmp_path / "given"
    folder.mkdir()

    def check(make, message):
        with h5py.File(folder / "tf_model.h5", "w") as file:
            make(file)
        answer = reader.read(folder / "tf_model.h5")
        assert answer.startswith("error") and message in answer, answer

    name = "head/scope/head/kernel:0"
    check(lambda file: file.__setitem__("head", h5py.ExternalLink(str(secret / "other.h5"), "/head")), "link")
    check(lambda file: file.__setitem__("head", h5py.SoftLink("/nowhere")), "link")
    elsewhere = [(str(secret / "raw"), 0, 64)]
    check(lambda file: file.create_dataset(name, (16,), "f4", external=elsewhere), "not stored in one piece")
    layout = h5py.VirtualLayout((16,), "f4")
    layout[:] = h5py.VirtualSource(str(secret / "other.h5"), "norm/x", (16,))
    check(lambda file: file.create_virtual_dataset(name, layout), "not stored in one piece")
    check(lambda file: file.create_dataset(name, (2**32,), "f4"), "not stored in one piece")
    packed = {"shape": (2**28,), "dtype": "f4", "compression": "gzip", "chunks": (2**20,)}
    check(lambda file: file.create_dataset(name, **packed), "not stored in one piece")
    check(lambda file: file.__setitem__(name, "text"), "does not fit the file")
    check(lambda file: file.create_group("a/" * 5000 + "w"), "")

    def circle(file):
        file["a/b"] = np.zeros(3)
        file["a/a"] = file["a"]

    check(circle, "reached in several ways")

    def doubling(file):
        group = file
        for _ in range(40):
            inner = group.create_group("a")
            group["b"] = inner
            group = inner

    check(doubling, "reached in several ways")

    def twice(file):
        file["a/b/c"] = np.zeros(3)
        file["a/b/d"] = file["a/b/c"]

    check(twice, "overlap")


@pytest.mark.parametrize("header", [b"\xff" * 8, struct.pack("<Q", 2**40), struct.pack("<Q", 2**63), bytes(8)])
def test_safetensors_headers_of_impossible_length_are_errors(header, tmp_path, reader):
    (tmp_path / "model.safetensors").write_bytes(header + b"{}" + bytes(100))
    assert reader.read(tmp_path / "model.safetensors").startswith("error")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [16], "data_offsets": [0, 2**62]},
        {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]},
        {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]},
    ],
)
def test_safetensors_entries_that_lie_are_errors(entry, tmp_path, reader):
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert reader.read(tmp_path / "model.safetensors").startswith("error")


@pytest.mark.parametrize("kind", ["safetensors", "h5", "old torch"])
def test_a_flipped_bit_without_a_sum_is_what_the_bytes_say(kind, tmp_path):
    name = write(kind, tmp_path)
    whole = (tmp_path / name).read_bytes()
    expected = read_checkpoint(tmp_path / name).tensors
    key, value = max(expected.items(), key=lambda item: item[1].size)
    stored = np.ascontiguousarray(value.transpose(2, 3, 1, 0)) if kind == "h5" else value
    place = whole.index(stored.tobytes())  # of its first element, whose highest bit is the sign
    (tmp_path / name).write_bytes(whole[: place + 3] + bytes([whole[place + 3] ^ 0x80]) + whole[place + 4 :])
    found = read_checkpoint(tmp_path / name).tensors
    assert found[key].flat[0] == -value.flat[0]
    value = np.array(value)
    value.flat[0] *= -1
    for name, array in (expected | {key: value}).items():
        np.testing.assert_array_equal(found[name], array)


def test_a_file_with_our_sum_notices_any_flipped_bit(tmp_path):
    name = write("ours", tmp_path)
    whole = (tmp_path / name).read_bytes()
    for place in (len(whole) - 1, len(whole) // 2):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="damaged: its weights are not those of its sha256"):
            read_checkpoint(tmp_path / name)
