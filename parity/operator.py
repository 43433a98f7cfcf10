"""Neighborhood attention alone: the kernels and the composed operator of both halves against the NumPy definition."""

from collections.abc import Iterator

import numpy as np

from modelspec.agreement import OPERATOR_BOUNDS, Agreement, compare
from modelspec.configs import ModelConfig

IMPLEMENTATIONS = ("native", "composed")
_MAX_HEADS = 2  # more are the same


def cases(config: ModelConfig, image_size: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Returns the operations that a NAT or DiNAT does on images of a size: name -> (shape of the query, dilation)."""
    found = {}
    for stage, (heads, dilations) in enumerate(zip(config.num_heads, config.dilations, strict=True)):
        head_dim = config.embed_dim * 2**stage // heads
        for dilation in dict.fromkeys(dilations):
            sizes = [max(-(-length // (4 * 2**stage)), config.kernel_size * dilation) for length in image_size]
            name = f"{sizes[0]}x{sizes[1]} kernel {config.kernel_size} dilation {dilation}"
            found[name] = (1, *sizes, min(heads, _MAX_HEADS), head_dim), dilation
    return found


def compare_operator(
    config: ModelConfig, image_size: tuple[int, int], dtype: str, seed: int
) -> Iterator[tuple[str, str, str, Agreement]]:
    """Yields (half, implementation, case, agreement): differences are measured against the rms.

    Args:
        config: of a NAT or DiNAT.
        image_size: height and width, which decide the sizes of the maps.
        dtype: `"float64"` or `"float32"`, of the operands; the definition is computed in float64.
        seed: of the operands, which are normal.
    """
    import torch

    import ptmodels.ops
    import tfmodels.ops
    from neighborhood import native, reference

    absent = native.why_unavailable()
    implementations = [name for name in IMPLEMENTATIONS if name == "composed" or absent is None]
    for name, (shape, dilation) in cases(config, image_size).items():
        generator = np.random.default_rng(seed)
        query, key, value = generator.standard_normal((3, *shape)).astype(dtype)
        width = 2 * config.kernel_size - 1
        bias = generator.standard_normal((shape[-2], width, width)).astype(dtype)
        query64, key64, value64, bias64 = (array.astype(np.float64) for array in (query, key, value, bias))
        window = config.kernel_size, dilation
        expected = reference.neighborhood_attention(query64, key64, value64, *window, rel_pos_bias=bias64)
        scale = float(np.sqrt(np.mean(np.square(expected))))
        for implementation in implementations:
            q, k, v, table = (torch.from_numpy(array) for array in (query, key, value, bias))
            found = {
                "torch": ptmodels.ops.neighborhood_attention(
                    q, k, v, *window, rel_pos_bias=table, implementation=implementation
                ).numpy(),
                "keras": tfmodels.ops.neighborhood_attention(
                    query, key, value, *window, rel_pos_bias=bias, implementation=implementation
                ).numpy(),
            }
            for half, actual in found.items():
                yield half, implementation, name, compare(actual, expected, scale, OPERATOR_BOUNDS[dtype])
