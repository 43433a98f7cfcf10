"""Reading the tensors of a file that `torch.save` wrote, without torch and without running anything in it.

Such a file is a pickle, a program for a small machine that can call any function. This machine knows the instructions
that tensors need, and the only things it makes are tensors, dictionaries, lists, numbers and text; whatever else a
training run may have left in the file (arguments, random states) becomes a blank if it is of a few known kinds, and is
an error otherwise.

Format: https://pytorch.org/docs/stable/notes/serialization.html; the older one, before torch 1.6, from torch's source.
"""

import collections
import dataclasses
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from modelspec.checkpoints.checkpoint import Checkpoint, main_dtype, widen_bfloat16
from modelspec.checkpoints.errors import CheckpointError

# torch's name of a storage -> (dtype, what NumPy reads it as)
_STORAGES = {
    "DoubleStorage": ("float64", "<f8"),
    "FloatStorage": ("float32", "<f4"),
    "HalfStorage": ("float16", "<f2"),
    "BFloat16Storage": ("bfloat16", "<u2"),
    "LongStorage": ("int64", "<i8"),
    "IntStorage": ("int32", "<i4"),
    "ShortStorage": ("int16", "<i2"),
    "CharStorage": ("int8", "i1"),
    "ByteStorage": ("uint8", "u1"),
    "BoolStorage": ("bool", "?"),
}
# of a training run's arguments and random states; nothing of theirs is needed or made
_BLANKS = {
    *{("argparse", "Namespace"), ("pathlib", "PosixPath"), ("torch", "device"), ("_codecs", "encode")},
    *{("numpy", "dtype"), ("numpy", "ndarray"), ("numpy._core.multiarray", "scalar")},
    *{("numpy.core.multiarray", "scalar"), ("numpy.core.multiarray", "_reconstruct")},
    *{("numpy._core.multiarray", "_reconstruct"), ("torch._utils", "_rebuild_device_tensor_from_numpy")},
    *{("torch", f"{name}") for name in ("float16", "bfloat16", "float32", "float64", "int64")},
}
_MAGIC = 0x1950A86A20F9469CFC6C  # of the older format
_GROUPS = ("model", "state_dict", "target_encoder")  # where a training run keeps the weights, first to last


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    kind: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Blank:
    """Stands for something that is not needed."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor's storage, offset, shape or strides are none")
    if len(shape) != len(strides) or len(shape) > 16:
        raise ValueError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError("a parameter is no tensor")
    return tensor


def _size(*sizes: Any) -> tuple:
    return tuple(sizes[0]) if sizes else ()


_CALLABLES: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): _size,
    **dict.fromkeys(_BLANKS, _Blank),
}

_INSTRUCTIONS = """
    PROTO FRAME MARK STOP POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ BINPERSID PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
""".split()
_CODES = [getattr(pickle, name)[0] for name in _INSTRUCTIONS]


class _Machine(pickle._Unpickler):  # Python's own, in Python: the one in C lets a file of ten bytes claim gigabytes
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLABLES:
            return _CALLABLES[module, name]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return name
        raise CheckpointError(f"it asks for {module}.{name}, which is no part of a checkpoint and may be harmful")

    def persistent_load(self, identity: Any) -> _Storage:
        kind, storage, key = identity[:3]
        if kind != "storage" or storage not in _STORAGES or not isinstance(key, str):
            raise ValueError("it refers to something that is no storage")
        return _Storage(key, storage)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    @staticmethod
    def _call(function: Any, arguments: Any) -> Any:
        if not any(function is known for known in _CALLABLES.values()) or not isinstance(arguments, tuple):
            raise ValueError("it calls what cannot be called")
        if function is collections.OrderedDict and arguments:  # of pairs, in old files
            pairs = arguments[0]
            if len(arguments) > 1 or not isinstance(pairs, list) or not all(_is_text(key) for key, _ in pairs):
                raise ValueError("it has an ordered dictionary of something else than pairs")
        return function(*arguments)

    def _build(self) -> None:
        self.stack.pop()  # the state: a dictionary's `_metadata`, a blank's contents
        if not isinstance(self.stack[-1], collections.OrderedDict | _Blank):
            raise ValueError("it sets the state of something that has none")

    def _set_items(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        target = self.stack[-1]
        for key, value in pairs:
            if not _is_text(key):  # of others, deeply nested ones could exhaust the stack
                raise ValueError("it has a dictionary with a key that is neither text nor number")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([(key, value)])

    def _set_many(self) -> None:
        items = self.pop_mark()
        self._set_items(zip(items[::2], items[1::2], strict=True))

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(zip(items[::2], items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: pickle._Unpickler.dispatch[code] for code in _CODES
    } | {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_many,
        pickle.DICT[0]: _dict,
    }


def _is_text(key: object) -> bool:
    return isinstance(key, str | int)


def read_torch(path: str | Path) -> Checkpoint:
    """Reads every tensor of the state dictionary in `path`; nothing in the file is executed.

    Of a training run's file, the group `model`, `state_dict` or `target_encoder` is taken, in this order; MSN's
    `prototypes` come along.

    Raises:
        CheckpointError: the file is truncated, damaged, no file of torch's, or holds something else than tensors.
    """
    try:
        with open(path, "rb") as file:
            length = file.seek(0, 2)
            file.seek(0)
            if file.read(4) != b"PK\x03\x04":
                file.seek(0)
                return _read_old(path, file, length)
            return _read_zip(path, file, length)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no readable file of torch: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error) or "the instructions make no sense"
        raise CheckpointError(f"{path} is no readable file of torch: {type(error).__name__}: {reason:.200}") from error


def _read_zip(path: str | Path, file: IO[bytes], length: int) -> Checkpoint:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(set(names)) != len(names):
            raise CheckpointError("two members of the archive have the same name")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise CheckpointError(f"its member {member.filename!r} is compressed, which torch never does")
        if sum(member.file_size for member in members) > length:
            raise CheckpointError("its members are larger than the file")
        programs = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(programs) != 1:
            raise CheckpointError("it is a zip archive without one data.pkl")
        folder = programs[0].removesuffix("data.pkl")
        order = folder + "byteorder"
        if order in names and archive.read(order) != b"little":
            raise CheckpointError("its bytes are in big-endian order; save it on a little-endian machine")
        with archive.open(programs[0]) as program:
            found = _Machine(program).load()
            if program.read(1):
                raise CheckpointError("its pickle goes on after its end")

        def storage(key: str) -> bytes:
            if f"{folder}data/{key}" not in names:
                raise CheckpointError(f"it lacks the storage {key!r}")
            return archive.read(f"{folder}data/{key}")

        return _checkpoint(path, found, storage, length)


def _read_old(path: str | Path, file: IO[bytes], length: int) -> Checkpoint:
    if _Machine(file).load() != _MAGIC:
        raise CheckpointError("it does not begin as one")
    for _ in range(2):
        _Machine(file).load()  # the protocol's version and facts about the machine
    found = _Machine(file).load()
    keys = _Machine(file).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("it has no list of storages")
    storages, sizes = {}, _storage_bytes(found)
    for key in keys:
        elements = int.from_bytes(file.read(8), "little")
        if key not in sizes:
            raise CheckpointError(f"no tensor uses its storage {key!r}, so that nobody knows its size")
        storages[key] = file.read(elements * sizes[key])
        if len(storages[key]) != elements * sizes[key]:
            raise CheckpointError(f"it ends within its storage {key!r}")
    if file.read(1):
        raise CheckpointError("it goes on after its last storage")
    return _checkpoint(path, found, storages.__getitem__, length)


def _storage_bytes(found: Any) -> dict[str, int]:
    """Storage key -> bytes per element, of every tensor that `found` refers to."""
    sizes, seen, waiting = {}, set(), [found]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, _Tensor):
            sizes[entry.storage.key] = np.dtype(_STORAGES[entry.storage.kind][1]).itemsize
        elif isinstance(entry, dict | list | tuple) and id(entry) not in seen:
            seen.add(id(entry))
            waiting.extend(entry.values() if isinstance(entry, dict) else entry)
    return sizes


def _checkpoint(path: str | Path, found: Any, storage: Callable[[str], bytes], length: int) -> Checkpoint:
    tensors, storages, copied = {}, {}, 0
    elements: dict[str, int] = {}
    for name, tensor in _state_dictionary(found).items():
        dtype, stored = _STORAGES[tensor.storage.kind]
        if tensor.storage.key not in storages:
            storages[tensor.storage.key] = bytearray(storage(tensor.storage.key))  # makes writable arrays
        data = storages[tensor.storage.key]
        available, count = len(data) // np.dtype(stored).itemsize, math.prod(tensor.shape)
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        if count and tensor.offset + reach >= available:
            raise CheckpointError(f"{name} of shape {tensor.shape} reaches beyond its storage of {available} elements")
        array = np.frombuffer(data, stored)
        if count == 0:
            array = np.empty(tensor.shape, stored)
        elif tensor.strides == _row_major(tensor.shape) or count == 1:
            array = array[tensor.offset : tensor.offset + count].reshape(tensor.shape)
        else:
            if _overlaps(tensor.shape, tensor.strides):
                raise CheckpointError(f"{name} repeats some of its elements, as nothing that was saved does")
            copied += count * array.itemsize
            if copied > length:
                raise CheckpointError(f"{name} and others share their elements: they are larger than the file")
            strides = [stride * array.itemsize for stride in tensor.strides]
            array = np.lib.stride_tricks.as_strided(array[tensor.offset :], tensor.shape, strides).copy()
        if dtype == "bfloat16":
            copied += 4 * count
            if copied > 2 * length:
                raise CheckpointError(f"{name} and others share their elements: they are larger than the file")
            array = widen_bfloat16(array)
        elements[dtype] = elements.get(dtype, 0) + count
        tensors[name] = array
    return Checkpoint(str(path), tensors, main_dtype(elements), {}, format="torch")


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether some elements have the same place."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _state_dictionary(found: Any) -> dict[str, _Tensor]:
    if not isinstance(found, dict):
        raise CheckpointError(f"it holds a {type(found).__name__.strip('_').lower()}, not a dictionary of tensors")
    chosen = found
    for group in _GROUPS:
        if isinstance(found.get(group), dict):
            chosen = found[group]
            break
    tensors = {name: value for name, value in chosen.items() if isinstance(value, _Tensor) and isinstance(name, str)}
    if isinstance(found.get("prototypes"), _Tensor):
        tensors["prototypes"] = found["prototypes"]
    if not tensors:
        listed = ", ".join(str(name) for name in list(found)[:10]) or "nothing"
        raise CheckpointError(f"it holds no dictionary of tensors, but {listed:.200}")
    return tensors
