"""A shifted-window attention layer in PyTorch: the peer of a neighborhood attention layer of its width and window.

Source: Liu et al., Swin Transformer, ICCV 2021 (arXiv:2103.14030), with torch's fused attention inside the windows.
"""

import torch
from torch import nn
from torch.nn import functional


class ShiftedWindowAttention(nn.Module):
    """Attention inside windows that do not overlap, of a map that is rolled by half a window. Input: (B, H, W, C).

    Args:
        dim: channels.
        num_heads: attention heads.
        height, width: of the maps; multiples of `window`.
        window: rows and columns of a window.
        shift: how far maps are rolled; 0 for the unshifted layers in between.
    """

    def __init__(self, dim: int, num_heads: int, height: int, width: int, window: int = 7, shift: int | None = None):
        super().__init__()
        if height % window or width % window:
            raise ValueError(f"the map is {height}x{width}; give multiples of window {window}")
        self.num_heads, self.window = num_heads, window
        self.shift = window // 2 if shift is None else shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, num_heads))
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        positions = torch.stack([rows.flatten(), columns.flatten()])
        distances = positions[:, :, None] - positions[:, None] + window - 1  # (2, N, N)
        self.register_buffer("entries", distances[0] * (2 * window - 1) + distances[1])
        self.register_buffer("mask", self._mask(height, width) if self.shift else None)

    def _mask(self, height: int, width: int) -> torch.Tensor:
        """(windows, 1, N, N): what the roll put beside each other does not see each other."""
        regions = torch.zeros(1, height, width, 1)
        parts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for number, (row, column) in enumerate((row, column) for row in parts for column in parts):
            regions[:, row, column] = number
        regions = self._partition(regions)[:, :, 0]
        return torch.where(regions[:, None] == regions[:, :, None], 0.0, -torch.inf)[:, None]

    def _partition(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        x = x.view(batch, height // self.window, self.window, width // self.window, self.window, dim)
        return x.transpose(2, 3).reshape(-1, self.window**2, dim)  # (B * windows, N, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        qkv = self.qkv(self._partition(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.rel_pos_bias[self.entries].permute(2, 0, 1)[None]  # (1, heads, N, N)
        if self.mask is not None:
            bias = (bias + self.mask).repeat(batch, 1, 1, 1)  # (B * windows, heads, N, N)
        x = functional.scaled_dot_product_attention(*qkv, attn_mask=bias)
        x = self.proj(x.transpose(1, 2).flatten(2))
        x = x.view(batch, height // self.window, width // self.window, self.window, self.window, dim)
        x = x.transpose(2, 3).reshape(batch, height, width, dim)
        return torch.roll(x, (self.shift, self.shift), dims=(1, 2)) if self.shift else x
