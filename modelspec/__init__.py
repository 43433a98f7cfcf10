"""All that both halves share and that needs no framework: configs, the catalog, images, checkpoints, comparing."""

from modelspec.checkpoints import CheckpointError, CheckpointWarning, SourceError
from modelspec.configs import (
    DinatConfig,
    NatConfig,
    SwiftFormerConfig,
    ViTMSNConfig,
    get_config,
    get_variant,
    list_models,
    load_config,
)
from modelspec.images import AutoImageProcessor, ImageProcessor

__all__ = [
    "AutoImageProcessor",
    "CheckpointError",
    "CheckpointWarning",
    "DinatConfig",
    "ImageProcessor",
    "NatConfig",
    "SourceError",
    "SwiftFormerConfig",
    "ViTMSNConfig",
    "get_config",
    "get_variant",
    "list_models",
    "load_config",
]
