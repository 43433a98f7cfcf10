"""Checkpoints without a framework: finding, reading, translating, matching, drawing and writing them.

The one canonical form on disk, for both frameworks: `config.json` and `model.safetensors` with the reference's PyTorch
names and layouts and metadata `{"format": "pt"}`.
"""

from modelspec.checkpoints.checkpoint import Checkpoint
from modelspec.checkpoints.conversion import Description, convert, describe
from modelspec.checkpoints.drawn_weights import initial_weights, probing_weights
from modelspec.checkpoints.errors import CheckpointError, CheckpointWarning, SourceError
from modelspec.checkpoints.identify import matching_variants
from modelspec.checkpoints.keys import num_parameters, parameter_shapes
from modelspec.checkpoints.loading import OpenedCheckpoint, open_checkpoint
from modelspec.checkpoints.matching import LoadReport, match_checkpoint
from modelspec.checkpoints.reading import read_checkpoint
from modelspec.checkpoints.safetensors_file import RawTensor, read_safetensors
from modelspec.checkpoints.source import resolve_file, resolve_weights
from modelspec.checkpoints.writing import MAX_SHARD_SIZE, write_checkpoint

__all__ = [
    "MAX_SHARD_SIZE",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "Description",
    "LoadReport",
    "OpenedCheckpoint",
    "RawTensor",
    "SourceError",
    "convert",
    "describe",
    "initial_weights",
    "match_checkpoint",
    "matching_variants",
    "num_parameters",
    "open_checkpoint",
    "parameter_shapes",
    "probing_weights",
    "read_checkpoint",
    "read_safetensors",
    "resolve_file",
    "resolve_weights",
    "write_checkpoint",
]
