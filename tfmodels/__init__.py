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
from tfmodels.swiftformer import TFSwiftFormerForImageClassification, TFSwiftFormerModel
from tfmodels.vit_msn import TFViTMSNForImageClassification, TFViTMSNModel

__all__ = [
    "AutoImageProcessor",
    "CheckpointError",
    "CheckpointWarning",
    "DinatConfig",
    "NatConfig",
    "SourceError",
    "SwiftFormerConfig",
    "ViTMSNConfig",
    "TFSwiftFormerForImageClassification",
    "TFSwiftFormerModel",
    "TFViTMSNForImageClassification",
    "TFViTMSNModel",
    "create_model",
    "load",
]
