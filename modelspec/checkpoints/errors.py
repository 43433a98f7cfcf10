"""The errors and warnings that reading a checkpoint can give."""


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used: truncated, foreign, or not of the model's keys and shapes."""


class SourceError(OSError):
    """A checkpoint that cannot be reached: no such directory, no network, no such Hub repository."""


class MissingFileError(SourceError):
    """A directory or Hub repository that is there but lacks the file."""


class UnreachableError(MissingFileError):
    """A file that the Hub's cache lacks while the Hub cannot be reached."""


class CheckpointWarning(UserWarning):
    """Something of a checkpoint was left out or newly initialised; the message names the keys."""
