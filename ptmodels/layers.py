"""Layers that the families share. Twin: `tfmodels/layers.py`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from modelspec.training import BatchShare
from neighborhood.attention_layer import check_layer, describe_input
from neighborhood.windows import PerAxis
from ptmodels.ops import neighborhood_attention_qkvpacked
from ptmodels.synchronized_batch_norm import SynchronizedNormalization, batch_statistics


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """The same at once for channels-last maps, as (B, H, W, C): torch's fast kernel is for contiguous tensors alone."""
    as_it_is = x.ndim != 4 or torch.compiler.is_compiling() or x.is_contiguous()
    if as_it_is or not x.is_contiguous(memory_format=torch.channels_last):
        return functional.gelu(x)
    return functional.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
    "selu": functional.selu,
    "silu": functional.silu,
}


def get_activation(activation: str | Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function that a config's `hidden_act` names; a function is returned as it is."""
    return activation if callable(activation) else ACTIVATIONS[activation]


def resize_map(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Crops (B, H, W, C) on the right and below, or pads it there with zeros, to (B, height, width, C)."""
    if not torch.compiler.is_exporting():
        missing = (width - x.shape[2], height - x.shape[1])
        return x if missing == (0, 0) else functional.pad(x, (0, 0, 0, missing[0], 0, missing[1]))
    # an exported program would be for one answer to the question whether anything is missing
    rows, columns = (
        torch.arange(wanted, device=x.device).clamp(max=length)
        for wanted, length in zip((height, width), x.shape[1:3], strict=True)
    )
    return functional.pad(x, (0, 0, 0, 1, 0, 1)).index_select(1, rows).index_select(2, columns)


class SharesBatch(nn.Module):
    """A layer that treats samples together, or draws for each; with a `share`, as if it had the whole batch.

    See `ptmodels.distributed.share_batch`.
    """

    share: BatchShare | None = None

    def draw_kept(self, x: torch.Tensor, shape: Sequence[int], probability: float) -> torch.Tensor:
        """Returns ones, each with a probability, and zeros, of a shape (B, ...) and the dtype of `x`.

        With a share they are those that one process would draw for its samples.

        Raises:
            ValueError: the samples are not as many as the share's.
        """
        if self.share is None:
            return x.new_empty(shape).bernoulli_(probability)
        if shape[0] != self.share.size:
            raise ValueError(
                f"there are {shape[0]} samples; this process's share of {self.share.total} is {self.share.size}"
            )
        # torch draws in the order of memory, which need not be that of the axes: images may be channels-last
        layout = [0, *sorted(range(1, len(shape)), key=x.stride, reverse=True)]
        sizes = (self.share.total, *shape[1:])
        whole = torch.empty_permuted(sizes, layout, dtype=x.dtype, device=x.device).bernoulli_(probability)
        return whole[self.share.begin : self.share.stop]


class BatchNorm2d(SharesBatch, nn.BatchNorm2d):
    """torch's, and with a share over the samples of all processes: output, gradients and running statistics.

    Input and output: (B, C, H, W).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.share is None or not self.training:
            return super().forward(x)
        mean, variance, count = batch_statistics(x, self.share)
        tracked: Any = self  # for torch, there may be no statistics
        with torch.no_grad():
            tracked.num_batches_tracked.add_(1)
            tracked.running_mean.lerp_(mean.to(tracked.running_mean.dtype), tracked.momentum)
            unbiased = variance * (count / (count - 1))
            tracked.running_var.lerp_(unbiased.to(tracked.running_var.dtype), tracked.momentum)
        return SynchronizedNormalization.apply(x, self.weight, self.bias, mean, variance, count, self.eps)


class Dropout(SharesBatch, nn.Dropout):
    """torch's, and with a share this process's part of what is drawn for the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.share is None or not self.training or self.p == 0.0:
            return super().forward(x)
        return x * self.draw_kept(x, x.shape, 1.0 - self.p).div_(1.0 - self.p)


class DropPath(SharesBatch):
    """Stochastic depth: in training, zeroes whole samples with probability `rate` and scales the others up.

    Input and output: (B, ...). Source: Huang et al., Deep Networks with Stochastic Depth, 2016.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return x
        return x * (self.draw_mask(x) / (1.0 - self.rate))

    def draw_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Returns which samples stay, as ones and zeros of shape (B, 1, ...)."""
        return self.draw_kept(x, (x.shape[0],) + (1,) * (x.ndim - 1), 1.0 - self.rate)


class NeighborhoodAttention(nn.Module):
    """Multi-head self-attention of each position to a window of its neighbours, with projections; see its subclasses.

    Input and output: (B, *spatial, embed_dim). With `output_attentions`, also the probabilities (B, *spatial, heads,
    keys), as they were applied. Parameters have the names and shapes of NATTEN's modules: `qkv`, `proj` and, of
    releases before 0.20, `rpb`.

    Args:
        embed_dim: channels.
        num_heads: attention heads; they divide the channels.
        kernel_size: keys per query along each axis; a number, or one per axis.
        dilation: distance between neighbouring keys; a number, or one per axis.
        rel_pos_bias: whether the logits get a learned bias, by the distance from query to key.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_scale: factor on the dot products; head_dim**-0.5 by default.
        attn_drop, proj_drop: dropout rates, of the probabilities and of the output.
        implementation: of `ptmodels.ops.neighborhood_attention`.

    Raises:
        ValueError: a bad argument, or an input that does not fit.
    """

    axes: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        dilation: PerAxis = 1,
        *,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        implementation: str = "auto",
    ):
        super().__init__()
        rates = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        sizes = check_layer(self.axes, embed_dim, num_heads, kernel_size, dilation, rates, implementation)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.kernel_size, self.dilation = sizes
        self.qk_scale = qk_scale
        self.implementation = implementation
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            table = torch.empty(num_heads, *(2 * size - 1 for size in self.kernel_size))
            self.rpb = nn.Parameter(nn.init.trunc_normal_(table, std=0.02, a=-2.0, b=2.0))
        self.attn_drop = Dropout(attn_drop)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = Dropout(proj_drop)

    def forward(
        self, x: torch.Tensor, output_attentions: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if x.ndim != self.axes + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; give {describe_input(self.axes, self.embed_dim)}")
        *sizes, _ = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        dropout = self.attn_drop if self.training and self.attn_drop.p > 0 else None
        attended = neighborhood_attention_qkvpacked(
            *(qkv, self.kernel_size, self.dilation),
            rel_pos_bias=self.rpb,
            scale=self.qk_scale,
            dropout=dropout,
            return_probabilities=output_attentions,
            implementation=self.implementation,
        )
        output, attentions = attended if isinstance(attended, tuple) else (attended, None)
        output = self.proj_drop(self.proj(output.reshape(*sizes, self.embed_dim)))
        return output if attentions is None else (output, attentions)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, num_heads={self.num_heads}"


class NeighborhoodAttention1D(NeighborhoodAttention):
    """Neighborhood attention along a line. Input and output: (B, length, embed_dim)."""

    axes = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """Neighborhood attention on a map. Input and output: (B, height, width, embed_dim)."""

    axes = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """Neighborhood attention in a volume. Input and output: (B, depth, height, width, embed_dim)."""

    axes = 3
