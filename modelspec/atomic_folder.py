"""Replacing several files of a folder so that a reader finds all of the old ones or all of the new ones.

The new files are written and synced in a complete sibling of the folder, into which the user's own files are linked,
and the two exchange their names at once (`renameat2` of Linux). Where that cannot be (another system, a folder that is
somebody's working directory or a mount point), the new files are collected in a folder inside, which one rename
declares complete; what is left is moving them into place, and whoever finds it undone (`recover`) does it.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_PREPARING, _COMPLETE, _NAMES = ".saving-", ".saved-", "names.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EBUSY, errno.EPERM, errno.EACCES, errno.EXDEV, errno.ENOTSUP)


@contextlib.contextmanager
def atomic_folder(directory: str | os.PathLike, owns: Callable[[str], bool]) -> Iterator[Path]:
    """Yields an empty folder for new files; on success they replace the old ones of `directory`, all at once.

    Files of `directory` that `owns` does not claim are kept, also those that appear meanwhile. On failure nothing of
    `directory` has changed. It is made if need be.

    Args:
        directory: the folder.
        owns: whether a file of this name belongs to what is written: such an old one goes if there is no new one.

    Raises:
        OSError: something cannot be written.
    """
    directory = Path(directory).expanduser()
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    recover(directory)
    beside, inside = (directory.parent, f".{directory.name}{_PREPARING}"), (directory, _PREPARING)
    for parent, prefix in (beside, inside):
        _remove_abandoned(parent, prefix)
    exchanges = _can_exchange(directory)
    parent, prefix = beside if exchanges else inside
    prepared = Path(tempfile.mkdtemp(prefix=f"{prefix}{_process()}", dir=parent))
    done = False
    try:
        yield prepared
        _sync_all(prepared)
        if not exchanges or not _exchange(directory, prepared, owns):
            _move_in(directory, prepared, owns)
        done = True
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
        if new and not done:
            with contextlib.suppress(OSError):
                directory.rmdir()


def recover(directory: str | os.PathLike) -> None:
    """Finishes a replacement of files of `directory` that was complete but not carried out, if there is one.

    Raises:
        OSError: there is one, and files cannot be moved here.
    """
    directory = Path(directory)
    for entry in sorted(directory.glob(f"{_COMPLETE}*")):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            _finish(directory, entry)


def _can_exchange(directory: Path) -> bool:
    """Whether the folder may get another inode: nobody of this process works in it, and its parent can be written."""
    working = Path.cwd().resolve()
    if working == directory or directory in working.parents or os.path.ismount(directory):
        return False
    return os.access(directory.parent, os.W_OK)


def _exchange(directory: Path, prepared: Path, owns: Callable[[str], bool]) -> bool:
    """Links the user's files into `prepared` and lets the two exchange their names; False where that cannot be."""
    shutil.copystat(directory, prepared)
    owner = directory.stat()
    with contextlib.suppress(OSError):
        os.chown(prepared, owner.st_uid, owner.st_gid)
    linked = []
    try:
        for entry in directory.iterdir():
            if not owns(entry.name) and not (prepared / entry.name).exists():
                linked.append(prepared / entry.name)
                _link(entry, prepared / entry.name)
        _sync(prepared)
        if not _rename_exchange(directory, prepared):
            raise OSError(errno.ENOSYS, "names cannot be exchanged here")
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        for entry in linked:
            _remove(entry)
        return False
    _sync(directory.parent)
    for entry in list(prepared.iterdir()):  # now the old folder: what the user put there meanwhile moves too
        if not owns(entry.name) and not (directory / entry.name).exists():
            os.replace(entry, directory / entry.name)
    return True


def _link(entry: Path, to: Path) -> None:
    if entry.is_symlink():
        os.symlink(os.readlink(entry), to)
    elif entry.is_dir():
        shutil.copytree(entry, to, symlinks=True, copy_function=os.link)
    else:
        os.link(entry, to)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def _rename_exchange(first: Path, second: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), str(first))


def _move_in(directory: Path, prepared: Path, owns: Callable[[str], bool]) -> None:
    """Declares the new files complete, inside `directory`, and moves them into place."""
    names = sorted(entry.name for entry in prepared.iterdir())
    old = sorted(entry.name for entry in directory.iterdir() if owns(entry.name) and entry.name not in names)
    (prepared / _NAMES).write_text(json.dumps({"new": names, "old": old}), encoding="utf-8")
    _sync_all(prepared)
    inside = directory / f"{_COMPLETE}{prepared.name.rpartition('-')[2]}"
    if prepared.parent != directory:
        moved = directory / f"{_PREPARING}{_process()}{inside.name.removeprefix(_COMPLETE)}"
        shutil.copytree(prepared, moved)
        _sync_all(moved)
        prepared = moved
    os.rename(prepared, inside)
    _sync(directory)
    _finish(directory, inside)


def _finish(directory: Path, complete: Path) -> None:
    if not (complete / _NAMES).exists():  # all is moved
        complete.rmdir()
        return
    names = json.loads((complete / _NAMES).read_text(encoding="utf-8"))
    for name in names["old"]:
        (directory / Path(name).name).unlink(missing_ok=True)
    for name in names["new"]:
        with contextlib.suppress(FileNotFoundError):  # moved before
            os.replace(complete / Path(name).name, directory / Path(name).name)
    _sync(directory)
    (complete / _NAMES).unlink(missing_ok=True)
    complete.rmdir()


def _process() -> str:
    """Names this process, in the name of a folder."""
    return f"{socket.gethostname().replace('-', '_')}-{os.getpid()}-"


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes what saves of this machine's ended processes left."""
    host = _process().partition("-")[0]
    for entry in parent.glob(f"{prefix}{host}-*"):
        process = entry.name.removeprefix(f"{prefix}{host}-").partition("-")[0]
        if process.isdigit() and not _lives(int(process)):
            shutil.rmtree(entry, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_all(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_file():
            _sync(entry)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
