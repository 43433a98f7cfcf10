"""What a frozen model says of an image, as one vector: for linear probes and nearest neighbours.

Twin: `tfmodels/features.py`.
"""

from typing import Any

import numpy as np
import torch

from modelspec.feature_kinds import CLS_BEFORE_NORM, chosen_kind
from ptmodels.pretrained import PreTrainedModel


def extract_features(model: PreTrainedModel, pixel_values: Any, kind: str | None = None) -> np.ndarray:
    """Returns one vector for each image; the model is put into evaluation mode.

    Args:
        model: a bare model or a `...ForImageClassification`, which differ where the head has a norm (SwiftFormer).
        pixel_values: (B, num_channels, H, W) floats, a tensor or an array.
        kind: one of `modelspec.feature_kinds.feature_kinds(model.config)`; the first of them by default.

    Returns:
        (B, C) in the model's dtype, but float32 where that has 16 bits.

    Raises:
        ValueError: the family has no such kind, or the model is a backbone, which gives maps.
    """
    kind = chosen_kind(model.config, kind)
    model.eval()
    with torch.inference_mode():
        images = torch.as_tensor(pixel_values).to(model.device)
        if kind == CLS_BEFORE_NORM:
            outputs = model.get_body()(images, output_hidden_states=True, return_dict=True)
            features = outputs.hidden_states[-1][:, 0]
        else:
            features = _pooled(model, images)
    return features.to(torch.promote_types(features.dtype, torch.float32)).cpu().numpy()


def _pooled(model: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
    features = model.forward_features(images)
    if isinstance(features, tuple):
        raise ValueError(f"{type(model).__name__} gives maps; use a bare model or a ForImageClassification model")
    if model.get_body() is not model:
        return model.forward_head(features, pre_logits=True)
    if model.config.model_type == "vit_msn":
        return features[:, 0]
    return features.mean(dim=(2, 3) if model.config.model_type == "swiftformer" else (1, 2))
