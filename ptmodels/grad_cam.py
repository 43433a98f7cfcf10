"""Which parts of an image argue for a class: Grad-CAM. Twin: `tfmodels/grad_cam.py`.

Paper: Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017
(arXiv:1610.02391), equations 1 and 2.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ptmodels.pretrained import PreTrainedModel


def grad_cam(model: PreTrainedModel, pixel_values: Any, label: int | None = None) -> np.ndarray:
    """Returns how much each part of an image argues for a class.

    The channels of a map, weighted by the mean gradient of the class's logit with respect to them, summed, and negative
    sums set to 0. The map is what the classification head averages (SwiftFormer, NAT, DiNAT); of ViT-MSN, whose head
    reads the class token alone, the patches as the last layer's attention reads them, after its norm.

    The model runs in inference mode, whatever its mode is, and is left as it was.

    Args:
        model: a `...ForImageClassification`.
        pixel_values: (1, num_channels, H, W) floats, a tensor or an array.
        label: index of the class; the predicted one by default.

    Returns:
        (H', W') float64 from 0 to 1, the largest being 1; all 0 if nothing argues for the class. SwiftFormer, NAT and
        DiNAT: ceil(H / stride) rows; ViT-MSN: H // patch_size.

    Raises:
        ValueError: the model has no classifier, there is not one image, or no such class.
    """
    return grad_cam_and_logits(model, pixel_values, label)[0]


def grad_cam_and_logits(
    model: PreTrainedModel, pixel_values: Any, label: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `grad_cam`, and also returns the logits (num_labels,) float64."""
    if model.get_body() is model or model.config.num_labels == 0:
        raise ValueError(f"{type(model).__name__} has no classifier; use a ForImageClassification model with labels")
    classes = model.config.num_labels
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"label is {label}; the model has {classes} classes, 0 to {classes - 1}")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False):
            images = pixel_values if isinstance(pixel_values, torch.Tensor) else torch.tensor(pixel_values)
            images = images.to(model.device)
            if len(images) != 1:
                raise ValueError(f"pixel_values are {len(images)} images; give one")
            with torch.no_grad():
                features, head = _features_and_head(model, images)
            with torch.enable_grad():
                features.requires_grad_()
                logits = head(features)
                index = int(logits[0].argmax()) if label is None else label
                (gradient,) = torch.autograd.grad(logits[0, index], features)
    finally:
        for module, mode in modes.items():
            module.training = mode
    maps, gradients = (_as_map(model, x, tuple(images.shape[2:])) for x in (features, gradient))
    heat = np.maximum(maps @ gradients.mean(axis=(0, 1)), 0.0)
    return heat / (heat.max() or 1.0), logits[0].detach().cpu().double().numpy()


def _features_and_head(
    model: PreTrainedModel, images: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Returns the features to explain, and the function that makes logits of them."""
    if model.config.model_type != "vit_msn":
        return model.forward_features(images), model.forward_head
    body: Any = model.get_body()
    layer = body.encoder.layer[-1]
    before = body(images, output_hidden_states=True, return_dict=True).hidden_states[-2]

    # After the last layer only the class token has a gradient, and before its norm the gradient of a token is at right
    # angles to it: the norm undoes any scale.
    def head(tokens: torch.Tensor) -> torch.Tensor:
        attended, _ = layer.attention(tokens, head_mask=None, eager=model.attn_implementation == "eager")
        x = before + attended
        x = x + layer.output(layer.intermediate(layer.layernorm_after(x)))
        return model.forward_head(body.layernorm(x))

    return layer.layernorm_before(before), head


def _as_map(model: PreTrainedModel, features: torch.Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Returns features, or gradients, of an image of that height and width as (H', W', C) float64."""
    array = features[0].detach().cpu().double().numpy()
    if model.config.model_type == "vit_msn":
        rows, columns = (length // model.config.patch_size for length in size)
        return array[1:].reshape(rows, columns, -1)
    return array.transpose(1, 2, 0) if model.config.model_type == "swiftformer" else array
