"""What exporting a model has in common in both halves: checks, ONNX files, and the comparison with the live model."""

from modelspec.exports.checks import (
    INPUT,
    OUTPUT,
    check_exportable,
    check_image_size,
    missing_packages,
    require_logits,
)
from modelspec.exports.metadata import add_metadata, read_metadata
from modelspec.exports.verification import ExportError, ExportReport

__all__ = [
    "INPUT",
    "OUTPUT",
    "ExportError",
    "ExportReport",
    "add_metadata",
    "check_exportable",
    "check_image_size",
    "missing_packages",
    "read_metadata",
    "require_logits",
]
