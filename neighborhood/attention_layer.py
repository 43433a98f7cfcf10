"""What a layer of neighborhood attention asks of its constructor's arguments, in either half."""

from neighborhood.choice import check_implementation
from neighborhood.windows import PerAxis, per_axis


def check_layer(
    axes: int,
    embed_dim: int,
    num_heads: int,
    kernel_size: PerAxis,
    dilation: PerAxis,
    rates: dict[str, float],
    implementation: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns kernel size and dilation, one entry per axis.

    Raises:
        ValueError: an argument that is not allowed, by name; `rates` are the dropout rates.
    """
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(f"embed_dim is {embed_dim} and num_heads {num_heads}; heads must divide the channels")
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} is {rate}; it must be at least 0 and less than 1")
    check_implementation(implementation)
    return per_axis("kernel_size", kernel_size, axes), per_axis("dilation", dilation, axes)


def describe_input(axes: int, embed_dim: int) -> str:
    """Returns how an input is laid out, for messages."""
    names = ["length"] if axes == 1 else ["depth", "height", "width"][-axes:]
    return f"(batch, {', '.join(names)}, {embed_dim})"
