"""The Keras 3 on TensorFlow half of twinzoo. Names are those that code written for transformers uses."""

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
from tfmodels.auto import create_model, load
from tfmodels.dinat import TFDinatBackbone, TFDinatForImageClassification, TFDinatModel
from tfmodels.nat import TFNatBackbone, TFNatForImageClassification, TFNatModel
from tfmodels.swiftformer import TFSwiftFormerBackbone, TFSwiftFormerForImageClassification, TFSwiftFormerModel
from tfmodels.vit_msn import TFViTMSNBackbone, TFViTMSNForImageClassification, TFViTMSNModel

__all__ = [
    "AutoImageProcessor",
    "CheckpointError",
    "CheckpointWarning",
    "DinatConfig",
    "NatConfig",
    "SourceError",
    "SwiftFormerConfig",
    "ViTMSNConfig",
    "TFDinatBackbone",
    "TFDinatForImageClassification",
    "TFDinatModel",
    "TFNatBackbone",
    "TFNatForImageClassification",
    "TFNatModel",
    "TFSwiftFormerBackbone",
    "TFSwiftFormerForImageClassification",
    "TFSwiftFormerModel",
    "TFViTMSNBackbone",
    "TFViTMSNForImageClassification",
    "TFViTMSNModel",
    "create_model",
    "load",
]
