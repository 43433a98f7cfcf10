"""The image processor as a module, with the same bits. Twin: `tfmodels/preprocessing.py`."""

import os
from typing import Any

import torch
from torch import nn

from modelspec.images import ImageProcessor
from modelspec.images.byte_images import check_images, choose_format, snapshot
from modelspec.images.reading import LUMA_WEIGHTS
from modelspec.images.resampling import NEAREST, cached_positions, cached_weights, height_comes_first

_PIECE = 2**21  # float64 numbers held at once: beyond 32 MB the allocator asks the system for fresh pages every time


class ImagePreprocessor(nn.Module):
    """Turns images into pixel values as `modelspec.ImageProcessor` does, bit for bit, on the images' device.

    Input: one image (C, H, W) or a batch of one size (B, C, H, W), uint8, of 1 or 3 channels; a single image comes out
    without the batch axis too. Output: (C, h, w) or (B, C, h, w) float32, or channels last if `data_format` says so.
    As for arrays given to the reference, gray becomes RGB, or RGB gray, unless `do_convert_rgb` is False.

    Args:
        processor: what to do; it is copied.
        data_format: `"channels_first"` or `"channels_last"`, of the output; None for the processor's.
        input_data_format: the same of the input; None for the processor's, and `"channels_first"` if that is None.

    Raises:
        ValueError: a bad argument, or images of another dtype or shape.
    """

    def __init__(
        self, processor: ImageProcessor, *, data_format: str | None = None, input_data_format: str | None = None
    ):
        super().__init__()
        self.processor = snapshot(processor)
        self.data_format = choose_format("data_format", data_format, processor.data_format)
        self.input_data_format = choose_format(
            "input_data_format", input_data_format, processor.input_data_format, "channels_first"
        )
        self.byte_table = self.processor.byte_table()  # (C, 256)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, revision: str | None = None, **overrides: Any
    ) -> "ImagePreprocessor":
        """Reads a `preprocessor_config.json`; arguments and errors are those of `ImageProcessor.from_pretrained`."""
        return cls(ImageProcessor.from_pretrained(source, revision=revision, **overrides))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not isinstance(images, torch.Tensor):
            raise ValueError(f"images are a {type(images).__name__}; give a torch.Tensor")
        dtype = str(images.dtype).removeprefix("torch.")
        check_images(dtype, images.shape, self.input_data_format, self.processor)
        batch = images if images.ndim == 4 else images[None]
        if self.input_data_format == "channels_last":
            batch = batch.movedim(-1, 1)  # (B, C, H, W)
        batch = convert_channels(batch, self.processor.num_channels)
        if self.processor.do_resize:
            size = self.processor.size
            batch = resize(batch, size["height"], size["width"], self.processor.resample)
        values = self._look_up(batch)
        if self.data_format == "channels_last":
            values = values.movedim(1, -1).contiguous()
        return values if images.ndim == 4 else values[0]

    def _look_up(self, batch: torch.Tensor) -> torch.Tensor:
        """Rescales and normalises (B, C, H, W) uint8 to float32."""
        table = torch.from_numpy(self.byte_table).to(batch.device).reshape(-1)
        offsets = torch.arange(batch.shape[1], dtype=torch.int32, device=batch.device) * 256
        entries = batch.to(torch.int32) + offsets.reshape(-1, 1, 1)
        return table.index_select(0, entries.reshape(-1)).reshape(batch.shape)


def convert_channels(images: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Turns (B, C, H, W) uint8 of gray into RGB, or of RGB into gray as Pillow does, if `num_channels` wants it."""
    if images.shape[1] == num_channels:
        return images
    if num_channels == 3:
        return images.expand(-1, 3, -1, -1)
    red, green, blue = (images[:, i : i + 1].to(torch.int32) * weight for i, weight in enumerate(LUMA_WEIGHTS))
    return ((red + green + blue + 2**15) // 2**16).to(torch.uint8)


def resize(images: torch.Tensor, height: int, width: int, resample: int) -> torch.Tensor:
    """Resizes (B, C, H, W) uint8 as Pillow does; see `modelspec.images.resampling`."""
    first = height_comes_first(images.shape[2], images.shape[3], height, width)
    for axis in (2, 3) if first else (3, 2):
        images = _resize_axis(images, axis, (height, width)[axis - 2], resample)
    return images


def _resize_axis(images: torch.Tensor, axis: int, out_size: int, resample: int) -> torch.Tensor:
    in_size, device = images.shape[axis], images.device
    if in_size == out_size:
        return images
    if resample == NEAREST:
        return images.index_select(axis, torch.tensor(cached_positions(in_size, out_size), device=device))
    positions, weights = (torch.tensor(array, device=device) for array in cached_weights(in_size, out_size, resample))
    moved = images.movedim(axis, 0)  # (in_size, ...)
    rows = moved.reshape(in_size, moved[0].numel())
    pieces = [_weighted(piece, positions, weights) for piece in rows.split(max(1, _PIECE // positions.numel()), dim=1)]
    return torch.cat(pieces, dim=1)[:out_size].reshape(out_size, *moved.shape[1:]).movedim(0, axis)


def _weighted(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiplies (in_size, M) uint8 by a band matrix in blocks. Returns (8 N, M) uint8."""
    read = rows.index_select(0, positions.reshape(-1)).to(weights.dtype)
    sums = torch.bmm(weights, read.reshape(*positions.shape, rows.shape[1]))  # (N, 8, M)
    return sums.add_(0.5).clamp_(0, 255).to(torch.uint8).flatten(0, 1)  # cut off: rounded half up
