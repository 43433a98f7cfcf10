"""Checkpoints without a framework: finding, reading, matching and drawing them.

The one canonical form on disk, for both frameworks: `config.json` and `model.safetensors` with the reference's PyTorch
names and layouts and metadata `{"format": "pt"}`.
"""

from modelspec.checkpoints.drawn_weights import initial_weights, probing_weights
from modelspec.checkpoints.errors import CheckpointError, CheckpointWarning, SourceError
from modelspec.checkpoints.keys import num_parameters, parameter_shapes
from modelspec.checkpoints.matching import LoadReport, match_checkpoint
from modelspec.checkpoints.safetensors_file import Checkpoint, read_safetensors
from modelspec.checkpoints.source import resolve_file, resolve_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "LoadReport",
    "SourceError",
    "initial_weights",
    "match_checkpoint",
    "num_parameters",
    "parameter_shapes",
    "probing_weights",
    "read_safetensors",
    "resolve_file",
    "resolve_weights",
]
