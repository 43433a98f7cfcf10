"""A copy of a model for inference, without batch normalization where a convolution can take it over.

Twin: `tfmodels/folding.py`.
"""

import copy

import torch
from torch import nn

from modelspec import batch_norm_folding
from ptmodels.pretrained import PreTrainedModel


def fold_batch_norm(model: PreTrainedModel) -> PreTrainedModel:
    """Returns an evaluation copy of `model` with batch normalizations merged into the convolutions beside them.

    It gives what `model` gives in evaluation, but for rounding, with fewer operations. It cannot be trained, nor saved
    as a checkpoint. Only SwiftFormer has batch normalizations; of the others it is a plain copy.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    state = folded.state_dict()
    found = {key: value.double().cpu().numpy() for key, value in state.items() if value.is_floating_point()}
    weights, norms = batch_norm_folding.fold_batch_norm(found, getattr(model.config, "batch_norm_eps", 0.0))
    folded.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=False)
    for path in norms:
        parent, _, name = path.rpartition(".")
        setattr(folded.get_submodule(parent), name, nn.Identity())
    return folded
