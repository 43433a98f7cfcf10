"""A copy of a model for inference, without batch normalization where a convolution can take it over.

Twin: `ptmodels/folding.py`.
"""

import copy

import keras

from modelspec import batch_norm_folding
from tfmodels.pretrained import TFPreTrainedModel
from tfmodels.weights import read_weights


def fold_batch_norm(model: TFPreTrainedModel) -> TFPreTrainedModel:
    """Returns a copy of `model` with its batch normalizations merged into the convolutions beside them.

    It gives what `model` gives in inference, but for rounding, with fewer operations. It cannot be trained, nor saved
    as a checkpoint. Only SwiftFormer has batch normalizations; of the others it is a plain copy.
    """
    weights = read_weights(model)
    weights, norms = batch_norm_folding.fold_batch_norm(weights, getattr(model.config, "batch_norm_eps", 0.0))
    arguments = {name: getattr(model, name) for name in ("data_format", "attn_implementation")}
    arguments |= {name: getattr(model, name) for name in model.constructor_arguments}
    folded = type(model).from_weights(copy.deepcopy(model.config), weights, dtype=model.dtype_policy, **arguments)
    for path in norms:
        _remove(folded, path)
    folded.trainable = False
    return folded


def _remove(model: TFPreTrainedModel, path: str) -> None:
    *parents, name = path.split(".")
    layer, holder = model, model
    for part in parents:
        layer = layer[int(part)] if part.isdecimal() else getattr(layer, part)
        holder = layer if isinstance(layer, keras.layers.Layer) else holder
    holder._tracker.unlock()  # Keras' own way of changing what is built
    norm = layer[int(name)] if name.isdecimal() else getattr(layer, name)
    holder._tracker.untrack(norm)
    identity = keras.layers.Identity(dtype=norm.dtype_policy)
    if name.isdecimal():
        layer[int(name)] = identity
    else:
        setattr(layer, name, identity)
    holder._tracker.lock()
