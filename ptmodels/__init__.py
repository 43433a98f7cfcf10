"""The PyTorch half of twinzoo. Names are those that code written for transformers uses."""

from modelspec import (
    AutoImageProcessor,
    CheckpointError,
    CheckpointWarning,
    DinatConfig,
    NatConfig,
    SourceError,
    SwiftFormerConfig,
    ViTMSNConfig,
)
from ptmodels.auto import create_model, load
from ptmodels.dinat import DinatBackbone, DinatForImageClassification, DinatModel
from ptmodels.nat import NatBackbone, NatForImageClassification, NatModel
from ptmodels.swiftformer import SwiftFormerBackbone, SwiftFormerForImageClassification, SwiftFormerModel
from ptmodels.vit_msn import ViTMSNBackbone, ViTMSNForImageClassification, ViTMSNModel

__all__ = [
    "AutoImageProcessor",
    "CheckpointError",
    "CheckpointWarning",
    "DinatConfig",
    "NatConfig",
    "SourceError",
    "SwiftFormerConfig",
    "ViTMSNConfig",
    "DinatBackbone",
    "DinatForImageClassification",
    "DinatModel",
    "NatBackbone",
    "NatForImageClassification",
    "NatModel",
    "SwiftFormerBackbone",
    "SwiftFormerForImageClassification",
    "SwiftFormerModel",
    "ViTMSNBackbone",
    "ViTMSNForImageClassification",
    "ViTMSNModel",
    "create_model",
    "load",
]
