"""The errors and warnings that reading a checkpoint can give."""


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used: truncated, foreign, or not of the model's keys and shapes."""


class SourceError(OSError):
    """A checkpoint that cannot be reached: no such directory, no network, no such Hub repository."""


class CheckpointWarning(UserWarning):
    """Something of a checkpoint was left out or newly initialised; the message names the keys."""
