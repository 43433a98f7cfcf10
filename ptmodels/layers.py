"""Layers that the families share. Twin: `tfmodels/layers.py`."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
    "selu": functional.selu,
    "silu": functional.silu,
}


def get_activation(activation: str | Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function that a config's `hidden_act` names; a function is returned as it is."""
    return activation if callable(activation) else ACTIVATIONS[activation]


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes whole samples with probability `rate` and scales the others up.

    Input and output: (B, ...). Source: Huang et al., Deep Networks with Stochastic Depth, 2016.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)
