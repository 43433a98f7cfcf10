"""Which implementation of neighborhood attention a framework takes: the C++ kernels or its own operations."""

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Iterator

from neighborhood import native

IMPLEMENTATIONS = ("auto", "native", "composed")

_auto_means = contextvars.ContextVar("auto_means", default="auto")


@contextlib.contextmanager
def prefer(implementation: str) -> Iterator[None]:
    """Within the context, `auto` stands for `implementation`: exports take "composed", which runs anywhere.

    >>> with prefer("composed"):
    ...     choose("auto", lambda: None)
    'composed'
    """
    check_implementation(implementation)
    token = _auto_means.set(implementation)
    try:
        yield
    finally:
        _auto_means.reset(token)


def check_implementation(implementation: str) -> None:
    """Raises ValueError unless `implementation` is one of IMPLEMENTATIONS."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")


def choose(implementation: str, obstacle) -> str:
    """Returns "native" or "composed".

    Args:
        implementation: "native" or "composed" for that one; "auto" for native where nothing speaks against it.
        obstacle: called to say why native cannot be had for this call, or None.

    Raises:
        ValueError: another name.
        RuntimeError: "native" is asked for and cannot be had.
    """
    check_implementation(implementation)
    if implementation == "auto":
        implementation = _auto_means.get()
    if implementation == "composed":
        return "composed"
    missing = native.why_unavailable()
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
