"""Model configurations without a framework: one dataclass per family, the published variants, the outputs."""

from modelspec.configs.base import ModelConfig, config_from_dict, load_config
from modelspec.configs.catalog import EvaluationTransform, Variant, get_config, get_variant, list_models
from modelspec.configs.nat import DinatConfig, NatConfig
from modelspec.configs.outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithNoAttention,
    ImageClassifierOutput,
    ImageClassifierOutputWithNoAttention,
    ImageClassifierOutputWithReshapedStates,
    ModelOutput,
    ModelOutputWithReshapedStates,
)
from modelspec.configs.stages import resolve_out_features
from modelspec.configs.swiftformer import SwiftFormerConfig
from modelspec.configs.vit_msn import ViTMSNConfig

__all__ = [
    "BackboneOutput",
    "BaseModelOutput",
    "BaseModelOutputWithNoAttention",
    "DinatConfig",
    "EvaluationTransform",
    "ImageClassifierOutput",
    "ImageClassifierOutputWithNoAttention",
    "ImageClassifierOutputWithReshapedStates",
    "ModelConfig",
    "ModelOutput",
    "ModelOutputWithReshapedStates",
    "NatConfig",
    "SwiftFormerConfig",
    "Variant",
    "ViTMSNConfig",
    "config_from_dict",
    "get_config",
    "get_variant",
    "list_models",
    "load_config",
    "resolve_out_features",
]
