"""Contenders in processes of their own: what one keeps, or runs out of, is nothing to the others."""

import contextlib
import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import Clock, keep_memory, seconds_of


class ContenderError(RuntimeError):
    """A contender cannot be made or run."""


class Contender:
    """Something that is timed, in a process that is forked from this one.

    This one must not have computed anything yet: threads are not forked with it.

    Args:
        make: returns what is run, a function of no arguments.

    Attributes:
        output: what the first run returned; its type must be one that can be pickled.
        preparation: seconds that making it and the first run took.
        peak: the most bytes that its process has held since the first run, beyond what it held before it made the
            contender: weights, buffers, what is kept for a backward pass. None before it is timed.

    Raises:
        ContenderError: it cannot be made, or its first run fails.
    """

    def __init__(self, make: Callable[[], Callable]):
        self._pipe, there = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(target=_serve, args=(make, there))
        self._process.start()
        there.close()
        self.output, self.preparation = self._receive()
        self.peak: int | None = None

    def seconds(self, clock: Clock) -> float:
        """Times it, see `benchmarks.timing.seconds_of`.

        Raises:
            ContenderError: a run fails.
        """
        with contextlib.suppress(OSError):  # it has ended, as what is received says
            self._pipe.send(clock)
        seconds, self.peak = self._receive()
        return seconds

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)  # processes forked later hold this end too, so that closing it says nothing
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            answer = "its process ended; perhaps it asked for more memory than there is"
        if isinstance(answer, str):
            self.close()
            raise ContenderError(answer)
        return answer


def _serve(make: Callable[[], Callable], pipe) -> None:
    """Sends (output, seconds) and then, whenever a clock comes, (seconds, bytes); or a text on what went wrong."""
    keep_memory()
    before = _resident()["VmRSS"]
    try:
        begin = time.perf_counter()
        run = make()
        output = run()  # the first call compiles
        pipe.send((output, time.perf_counter() - begin))
        _release_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        while (clock := pipe.recv()) is not None:
            seconds = seconds_of(run, clock)
            peak = _resident()["VmHWM"] - before
            _release_memory()
            pipe.send((seconds, peak))
    except Exception as error:
        pipe.send((str(error).strip() or type(error).__name__).splitlines()[0])


def _release_memory() -> None:
    """Gives back what was freed: contenders wait for their turns beside each other."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident() -> dict[str, int]:
    """Returns the fields of this process's status that are sizes, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}
