"""What goes wrong in the harness itself."""


class ComparisonError(RuntimeError):
    """A comparison could not be made: a half failed to run, or there was nothing to compare."""
