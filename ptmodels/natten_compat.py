"""The two functions that transformers' NAT and DiNAT import from natten, for natten releases that no longer have them.

    from ptmodels.natten_compat import natten2dav, natten2dqkrpb

Or, for code that cannot be changed, before it is imported:

    import ptmodels.natten_compat
    ptmodels.natten_compat.install()

Names, arguments and layouts are those of natten 0.14.6 to 0.17.4. They run on any device and have gradients of every
order.
"""

import importlib.machinery
import sys
import types
from typing import Any

from torch import Tensor

from neighborhood.arguments import check_arguments
from neighborhood.windows import PerAxis
from ptmodels import composed_attention


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: PerAxis, dilation: PerAxis) -> Tensor:
    """Returns each query's products with its keys, plus the bias.

    Args:
        query, key: (B, heads, height, width, head_dim); the query is scaled already.
        rpb: (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), or None.
        kernel_size, dilation: a number, or one per axis.

    Returns:
        (B, heads, height, width, kernel_size**2) logits, the keys of a window row by row.

    Raises:
        ValueError: arguments that do not go together, or a window that does not fit.
    """
    query, key = _heads_last(query), _heads_last(key)
    bias_shape = None if rpb is None else rpb.shape
    sizes = check_arguments(query.shape, key.shape, key.shape, kernel_size, dilation, bias_shape)
    return _heads_first(composed_attention.window_logits(query, key, *sizes, rel_pos_bias=rpb))


def natten2dav(attn: Tensor, value: Tensor, kernel_size: PerAxis, dilation: PerAxis) -> Tensor:
    """Returns the sums of each query's values, weighted by its probabilities.

    Args:
        attn: (B, heads, height, width, kernel_size**2).
        value: (B, heads, height, width, head_dim).
        kernel_size, dilation: a number, or one per axis.

    Returns:
        (B, heads, height, width, head_dim).

    Raises:
        ValueError: arguments that do not go together, or a window that does not fit.
    """
    attn, value = _heads_last(attn), _heads_last(value)
    kernel_size, dilation = check_arguments(value.shape, value.shape, value.shape, kernel_size, dilation)
    needed = (*value.shape[:-1], kernel_size[0] * kernel_size[1])
    if tuple(attn.shape) != needed:
        raise ValueError(f"attn has shape {tuple(attn.shape)} with its heads last; it must have {needed}")
    return _heads_first(composed_attention.attend(attn, value, kernel_size, dilation))


def install() -> None:
    """Makes the two functions importable as `natten.functional`'s, unless natten has them.

    A natten that is installed keeps all it has; otherwise a module `natten` that holds only these two is made up.
    """
    try:
        import natten
        import natten.functional
    except ImportError:
        natten = _made_up_module("natten")
        natten.functional = _made_up_module("natten.functional")
    for function in (natten2dqkrpb, natten2dav):
        if not hasattr(natten.functional, function.__name__):
            setattr(natten.functional, function.__name__, function)


def _made_up_module(name: str) -> Any:
    module: Any = types.ModuleType(name, "Stands in for natten: only what ptmodels.natten_compat offers.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    sys.modules[name] = module
    return module


def _heads_last(x: Tensor) -> Tensor:
    if x.ndim != 5:
        raise ValueError(f"a tensor has shape {tuple(x.shape)}; give (B, heads, height, width, channels)")
    return x.permute(0, 2, 3, 1, 4)


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4)
