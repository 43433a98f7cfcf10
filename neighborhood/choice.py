"""Which implementation of neighborhood attention a framework takes: the C++ kernels or its own operations."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

IMPLEMENTATIONS = ("auto", "native", "composed")

_auto_means = "auto"  # of the whole process: torch.compile can follow neither context nor thread variables


@contextlib.contextmanager
def prefer(implementation: str) -> Iterator[None]:
    """Within the context, in all threads, `auto` stands for `implementation`; exports take "composed".

    >>> with prefer("composed"):
    ...     choose("auto", None, lambda: None)
    'composed'
    """
    global _auto_means
    check_implementation(implementation)
    before, _auto_means = _auto_means, implementation
    try:
        yield
    finally:
        _auto_means = before


def check_implementation(implementation: str) -> None:
    """Raises ValueError unless `implementation` is one of IMPLEMENTATIONS."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")


def choose(implementation: str, missing: str | None, obstacle: Callable[[], str | None]) -> str:
    """Returns "native" or "composed".

    Args:
        implementation: "native" or "composed" for that one; "auto" for native where nothing speaks against it.
        missing: why the kernels cannot be had at all, or None; "auto" warns of it, once.
        obstacle: called to say why they cannot be had for this call, or None.

    Raises:
        ValueError: another name.
        RuntimeError: "native" is asked for and cannot be had.
    """
    check_implementation(implementation)
    if implementation == "auto":
        implementation = _auto_means
    if implementation == "composed":
        return "composed"
    reason = missing or obstacle()
    if reason is None:
        return "native"
    if implementation == "native":
        raise RuntimeError(f"implementation='native' cannot be had: {reason}")
    if missing:
        _warn_once(missing)
    return "composed"


@functools.cache
def _warn_once(missing: str) -> None:
    warnings.warn(f"neighborhood attention runs without its C++ kernels, many times slower: {missing}", stacklevel=4)
