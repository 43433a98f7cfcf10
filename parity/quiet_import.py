"""Importing TensorFlow without its log lines."""

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


def import_tensorflow(*, start: bool = True) -> ModuleType:
    """Imports TensorFlow and lets it look for devices; what its C++ code logs meanwhile is dropped.

    `TF_CPP_MIN_LOG_LEVEL` is set to hide information and warnings later on too, unless the user has set it to 0: then
    nothing is touched. TensorFlow 2.21 says its first lines before it reads that variable, hence standard error is
    turned away. If the import fails, what was said is passed on.

    Args:
        start: make the devices ready; if not, it can still be said how they are parted, and what processes there are.
    """
    if "tensorflow" in sys.modules or os.environ.setdefault(_LEVEL, "2") == "0":
        return importlib.import_module("tensorflow")
    with standard_error_held_back():
        tensorflow = importlib.import_module("tensorflow")
        if start:
            tensorflow.config.list_logical_devices()
        else:
            tensorflow.config.list_physical_devices()
    return tensorflow


@contextlib.contextmanager
def standard_error_held_back() -> Iterator[None]:
    """Inside, what is written to file descriptor 2 is collected; it is shown only if an exception leaves."""
    sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # a process without standard error has nothing to hold back
        yield
        return
    try:
        with tempfile.TemporaryFile() as collected:
            os.dup2(collected.fileno(), 2)
            try:
                yield
            except BaseException:
                collected.seek(0)
                os.write(terminal, collected.read())
                raise
            finally:
                sys.stderr.flush()
                os.dup2(terminal, 2)
    finally:
        os.close(terminal)
