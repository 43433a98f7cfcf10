"""What a frozen model says of an image, as one vector: for linear probes and nearest neighbours.

Twin: `ptmodels/features.py`.
"""

import numpy as np
from keras import ops

from modelspec.feature_kinds import CLS_BEFORE_NORM, chosen_kind
from tfmodels.pretrained import TFPreTrainedModel


def extract_features(model: TFPreTrainedModel, pixel_values, kind: str | None = None) -> np.ndarray:
    """Returns one vector for each image; the model runs in inference mode.

    Args:
        model: a bare model or a `...ForImageClassification`, which differ where the head has a norm (SwiftFormer).
        pixel_values: (B, num_channels, H, W) floats, or (B, H, W, num_channels) (`data_format`), a tensor or an array.
        kind: one of `modelspec.feature_kinds.feature_kinds(model.config)`; the first of them by default.

    Returns:
        (B, C) in the model's compute dtype, but float32 where that has 16 bits.

    Raises:
        ValueError: the family has no such kind, or the model is a backbone, which gives maps.
    """
    features = compute_features(model, pixel_values, chosen_kind(model.config, kind))
    return ops.convert_to_numpy(features if features.dtype == "float64" else ops.cast(features, "float32"))


def compute_features(model: TFPreTrainedModel, pixel_values, kind: str, **options):
    """Returns one vector for each image as a tensor, also inside a graph; `options` are those of the model's call."""
    if kind == CLS_BEFORE_NORM:
        return _class_token(_body_outputs(model, pixel_values, **options))
    return _pool(model, model.forward_features(pixel_values, training=False, **options))


def compute_logits_and_features(model: TFPreTrainedModel, pixel_values, kind: str, **options):
    """Returns what `compute_features` does, and a classifier's logits (B, num_labels) before it, in one pass."""
    if kind == CLS_BEFORE_NORM:
        outputs = _body_outputs(model, pixel_values, **options)
        return model.forward_head(outputs.last_hidden_state), _class_token(outputs)
    features = model.forward_features(pixel_values, training=False, **options)
    return model.forward_head(features), _pool(model, features)


def _body_outputs(model: TFPreTrainedModel, pixel_values, **options):
    body = model.get_body()
    # the body of a classifier takes channels-last images, whatever the classifier takes
    images = pixel_values if body is model else model.images_to_channels_last(pixel_values)
    return body(images, output_hidden_states=True, return_dict=True, training=False, **options)


def _class_token(outputs):
    return outputs.hidden_states[-1][:, 0]


def _pool(model: TFPreTrainedModel, features):
    if isinstance(features, tuple):
        raise ValueError(f"{type(model).__name__} gives maps; use a bare model or a ForImageClassification model")
    if model.get_body() is not model:
        return model.forward_head(features, pre_logits=True)
    if model.config.model_type == "vit_msn":
        return features[:, 0]
    channels_first = model.config.model_type == "swiftformer" and model.data_format == "channels_first"
    return ops.mean(features, axis=(2, 3) if channels_first else (1, 2))
