"""How much memory a contender takes, each in a process of its own."""

import multiprocessing
import multiprocessing.connection
from collections.abc import Callable
from pathlib import Path


def peak_memory(make: Callable[[], Callable]) -> int | None:
    """Returns the most bytes that a process holds while it runs a contender, beyond what it held before making it.

    The process is forked from this one, which must not have computed anything yet: threads are not forked with it. It
    counts weights, buffers, and what is kept for the backward pass; not what is only needed to make the contender.

    Args:
        make: returns what is run.

    Returns:
        The bytes, or None where the contender cannot be made or run.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_tell, args=(make, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:  # it failed, and the timing says why
        return None
    finally:
        here.close()
        process.join()


def _tell(make: Callable[[], Callable], there: multiprocessing.connection.Connection) -> None:
    before = _resident()["VmRSS"]
    try:
        run = make()
        run()  # the first call compiles
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        for _ in range(2):
            run()
    except Exception:
        there.close()
        return
    there.send(_resident()["VmHWM"] - before)


def _resident() -> dict[str, int]:
    """Returns the fields of this process's status that are sizes, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}
