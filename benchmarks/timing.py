"""How contenders are timed: in rounds in which each runs for a moment, so that a clock that swings meets all alike."""

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

MATRIX = 1536
ROUNDS_OF_SLOW = 3  # of what takes longer than SLOW seconds
SLOW = 0.5
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

Clock = Callable[[], float]


def threads_in_words(threads: int) -> str:
    """Returns `1 thread`, `2 threads` and so on."""
    return f"{threads} thread" + "s" * (threads != 1)


def keep_memory() -> None:
    """Has malloc keep what a run frees for the next one, whatever this process has freed before.

    By itself it gives back all beyond twice the largest block that it has seen freed. Then who once loaded a large file
    keeps its memory, and who did not asks the system for it in every call: a quarter of a small model's time.
    """
    malloc = ctypes.CDLL(None)
    malloc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that is allowed
    malloc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def seconds_of(run: Callable, clock: Clock = time.perf_counter) -> float:
    """The mean over as many calls as fit into a tenth of a second, after one that fills the caches.

    Args:
        run: what is timed.
        clock: `time.process_time` for one thread on a machine that others use too.
    """
    time.sleep(0.02)  # threads of the contender before look out for work for a while, on this one's cores
    begin = clock()
    run()
    first = clock() - begin
    if first > SLOW:  # caches hold a small part of what such a call goes through
        return first
    calls = max(1, int(0.1 / max(first, 1e-6)))
    begin = clock()
    for _ in range(calls):
        run()
    return (clock() - begin) / calls


def alternate(
    contenders: Mapping[str, Any],
    rounds: int,
    clock: Clock = time.perf_counter,
    measure: Callable[[Any, Clock], float] = seconds_of,
) -> dict[str, list[float]]:
    """Returns the seconds of each contender in each round, by `measure`; slow ones take part in the first only.

    Each round has an order of its own, as what a contender meets depends on the one before it.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for number in range(rounds):
        for name, run in order.sample(list(contenders.items()), len(contenders)):
            if number >= ROUNDS_OF_SLOW and statistics.median(times[name]) > SLOW:
                continue
            times[name].append(measure(run, clock))
    return times
