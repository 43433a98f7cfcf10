"""What goes wrong in the harness itself."""

import contextlib
from collections.abc import Iterator


class ComparisonError(RuntimeError):
    """A comparison could not be made: a half failed to run, or there was nothing to compare."""


@contextlib.contextmanager
def naming_failures(what: str) -> Iterator[None]:
    """Turns any failure within into a ComparisonError that says what failed, and why in one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ComparisonError(f"{what}: {reason}") from error
