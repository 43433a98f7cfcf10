"""The known mistakes of porting a model, each as a change to a right PyTorch layer that makes it wrong in the same way.

If a wrong layer equals the right one with such a change, the change is the culprit. A culprit is a function that takes
the right layer in its place, and yields what it tries: a sentence, and a context in which the layer is changed.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

Tries = Iterator[tuple[str, AbstractContextManager]]

EPSILONS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
MAX_DILATION = 32


@dataclasses.dataclass
class Place:
    """A right layer and what is around it.

    Attributes:
        layer: the `torch.nn.Module`.
        siblings: the other layers of its parent, by name.
        arguments: what it is called with, by position.
    """

    layer: Any
    siblings: dict[str, Any]
    arguments: tuple


def epsilon(place: Place) -> Tries:
    """A normalisation has another epsilon."""
    own = getattr(place.layer, "eps", None)
    for value in EPSILONS:
        if own is not None and value != own:
            yield f"its epsilon is {value:g} instead of {own:g}", _attribute(place.layer, "eps", value)


def running_statistics(place: Place) -> Tries:
    """BatchNorm takes the mean for the variance and the other way round, or the statistics of the batch."""
    layer = place.layer
    if getattr(layer, "running_mean", None) is not None:
        mean, variance = layer.running_mean, layer.running_var
        yield "its running mean and variance are swapped", _values((mean, variance), (variance, mean))
        without = [_attribute(layer, name, None) for name in ("running_mean", "running_var")]
        yield "it uses the statistics of the batch instead of the running ones", _all(*without)


def weight_and_bias(place: Place) -> Tries:
    """Weight and bias of a normalisation are swapped, or one of them is left out."""
    weight, bias = (getattr(place.layer, name, None) for name in ("weight", "bias"))
    if weight is not None and bias is not None and weight.shape == bias.shape:
        yield "its weight and bias are swapped", _values((weight, bias), (bias, weight))
        yield "its weight is left out", _values((weight,), (weight * 0 + 1,))
    if bias is not None:
        yield "its bias is left out", _values((bias,), (bias * 0,))


def weight_layout(place: Place) -> Tries:
    """A matrix is transposed, or a kernel lies another way."""
    weight = getattr(place.layer, "weight", None)
    if weight is None:
        return
    if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        yield "its weight is transposed", _values((weight,), (weight.T,))
    if weight.ndim == 4:
        yield "its kernel is flipped, as in a mathematical convolution", _values((weight,), (weight.flip(2, 3),))
        yield "height and width of its kernel are swapped", _values((weight,), (weight.transpose(2, 3),))
        if weight.shape[0] == weight.shape[1]:
            yield "in and out of its kernel are swapped", _values((weight,), (weight.transpose(0, 1),))


def padding(place: Place) -> Tries:
    """A strided convolution pads as TensorFlow's "same" does: less on the left and top."""
    from torch import nn
    from torch.nn import functional

    layer = place.layer
    if not isinstance(layer, nn.Conv2d) or max(layer.stride) == 1:
        return

    def pad_as_same(x):
        sides = []
        for size, kernel, stride in zip(x.shape[2:], layer.kernel_size, layer.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            sides.append((total // 2, total - total // 2))
        padded = functional.pad(x, (*sides[1], *sides[0]))
        return functional.conv2d(padded, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)

    yield 'it pads as "same" of TensorFlow does, less on the left and top', _attribute(layer, "forward", pad_as_same)


def activation(place: Place) -> Tries:
    """Another activation function, or another form of GELU."""
    layer, forms = place.layer, _activations()
    if type(layer).__name__ in ("GELU", "ReLU", "SiLU", "Sigmoid", "Tanh"):
        for name, function in forms.items():
            yield f"it computes {name}", _attribute(layer, "forward", function)
    for attribute in ("act", "act_fn", "activation"):
        own = getattr(layer, attribute, None)
        if callable(own) and attribute not in dict(layer.named_children()):
            for name, function in forms.items():
                if function is not own:
                    yield f"its activation is {name}", _attribute(layer, attribute, function)


def layer_scale(place: Place) -> Tries:
    """A layer scale is left out, or two are swapped."""
    scales = {name: p for name, p in place.layer.named_parameters(recurse=False) if "scale" in name}
    for name, scale in scales.items():
        yield f"its {name} is left out", _values((scale,), (scale * 0 + 1,))
        if scale.ndim == 2 and scale.shape[0] == 2:
            yield f"the two of its {name} are swapped", _values((scale,), (scale.flip(0),))
    two = list(scales.values())
    if len(two) == 2 and two[0].shape == two[1].shape:
        yield f"{' and '.join(scales)} are swapped", _values(two, two[::-1])


def bias_table(place: Place) -> Tries:
    """The table of relative positions lies another way, or is left out."""
    for name, table in place.layer.named_parameters(recurse=False):
        if name in ("rpb", "rel_pos_bias", "relative_position_bias_table") and table.ndim == 3:
            yield "height and width of its bias table are swapped", _values((table,), (table.transpose(1, 2),))
            yield "its bias table is flipped, query minus key", _values((table,), (table.flip(1, 2),))
            yield "its bias table is left out", _values((table,), (table * 0,))


def dilation(place: Place) -> Tries:
    """Another dilation, as where the dilations of two blocks are swapped."""
    own = getattr(place.layer, "dilation", None)
    if isinstance(own, int):
        for other in range(1, MAX_DILATION + 1):
            if other != own:
                yield f"its dilation is {other} instead of {own}", _attribute(place.layer, "dilation", other)


def attention_scale(place: Place) -> Tries:
    """The dot products are scaled otherwise."""
    query, heads = _children(place).get("query"), getattr(place.layer, "num_heads", None)
    if query is None or not heads:
        return
    size = query.weight.shape[0] // heads
    for what, factor in (
        ("the dot products are not scaled", size**0.5),
        ("the dot products are scaled twice", size**-0.5),
        ("the dot products are scaled by all channels instead of one head's", heads**-0.5),
    ):
        yield what, _output(query, lambda x, factor=factor: x * factor)


def projections(place: Place) -> Tries:
    """Query, key and value are taken for one another, or channels are dealt out to heads in another order."""
    layer, children, heads = place.layer, _children(place), getattr(place.layer, "num_heads", None)
    for first, second in (("query", "key"), ("key", "value"), ("query", "value"), ("to_query", "to_key")):
        if first in children and second in children:
            swapped = _attribute(layer, first, children[second]), _attribute(layer, second, children[first])
            yield f"{first} and {second} are swapped", _all(*swapped)
    if heads and {"query", "key", "value"} <= children.keys():

        def deal(x):
            return x.unflatten(-1, (-1, heads)).transpose(-1, -2).flatten(-2)

        dealt = [_output(children[name], deal) for name in ("query", "key", "value")]
        yield "channels go to the heads in turn instead of in runs", _all(*dealt)


def sibling_weights(place: Place) -> Tries:
    """A layer got the weights of the layer beside it."""
    own = list(place.layer.parameters(recurse=False))
    for name, other in place.siblings.items():
        theirs = list(other.parameters(recurse=False))
        if own and [p.shape for p in own] == [p.shape for p in theirs]:
            yield f"it has the weights of {name}", _values(own, theirs)


def attention_norm(place: Place) -> Tries:
    """SwiftFormer's additive attention in the form of the other dialect."""
    own = getattr(place.layer, "attention_norm", None)
    for other in ("softmax", "l2"):
        if own is not None and other != own:
            sentence = f"its attention_norm is {other!r} instead of {own!r}"
            yield sentence, _attribute(place.layer, "attention_norm", other)


def window_padding(place: Place) -> Tries:
    """A map smaller than its window is padded on the wrong side of the norm."""
    layer = place.layer
    if not hasattr(layer, "pad_to_window"):
        return
    pad, bias = layer.pad_to_window, layer.layernorm_before.bias

    def pad_with_bias(x):  # which is what the norm makes of zeros
        return pad(x) + bias * (1 - pad(x * 0 + 1))

    sentence = "it pads to the window before the norm instead of after it"
    yield sentence, _attribute(layer, "pad_to_window", pad_with_bias)


def interpolation(place: Place) -> Tries:
    """Positions are interpolated in another way."""
    from torch.nn import functional

    original = functional.interpolate

    def change(**options):
        def interpolate(*args, **kwargs):
            kwargs |= options
            if kwargs.get("mode") == "nearest":
                kwargs.pop("align_corners", None)
            return original(*args, **kwargs)

        return _attribute(functional, "interpolate", interpolate)

    if hasattr(place.layer, "interpolate_positions"):
        yield "it interpolates with antialias", change(antialias=True)
        yield "it interpolates with aligned corners", change(align_corners=True)
        yield "it interpolates bilinearly", change(mode="bilinear")
        yield "it interpolates bilinearly with antialias", change(mode="bilinear", antialias=True)
        yield "it interpolates to the nearest", change(mode="nearest")


def embeddings(place: Place) -> Tries:
    """Position or class embeddings are left out."""
    for name, parameter in place.layer.named_parameters(recurse=False):
        if name in ("position_embeddings", "cls_token"):
            yield f"its {name} is left out", _values((parameter,), (parameter * 0,))


def softmax_axis(place: Place) -> Tries:
    """Attention is normalised over the queries instead of the keys."""
    import torch
    from torch.nn import functional

    def attend(query, key, value, *args, **kwargs):
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return torch.softmax(scores, dim=-2) @ value

    if {"query", "key", "value"} <= _children(place).keys():
        over_queries = _attribute(functional, "scaled_dot_product_attention", attend)
        yield "its softmax runs over the queries instead of the keys", over_queries


def channel_order(place: Place) -> Tries:
    """The colours of the image are in another order."""
    if place.arguments and getattr(place.arguments[0], "ndim", 0) == 4 and place.arguments[0].shape[1] == 3:
        turned = (place.arguments[0].flip(1), *place.arguments[1:])
        yield "red and blue of the image are swapped", _attribute(place, "arguments", turned)


def residual(place: Place) -> Tries:
    """The last residual connection is left out."""
    if place.arguments and hasattr(place.arguments[0], "shape") and _children(place):
        x = place.arguments[0]

        def without(output):
            first, *more = output if isinstance(output, tuple) else (output,)
            return (first - x, *more) if isinstance(output, tuple) else first - x

        yield "its input is not added to its output", _output(place.layer, without)


CULPRITS: tuple[Callable[[Place], Tries], ...] = (
    epsilon,
    running_statistics,
    weight_and_bias,
    weight_layout,
    padding,
    activation,
    layer_scale,
    bias_table,
    dilation,
    attention_scale,
    projections,
    sibling_weights,
    attention_norm,
    window_padding,
    interpolation,
    embeddings,
    softmax_axis,
    channel_order,
    residual,
)


def _children(place: Place) -> dict[str, Any]:
    return dict(place.layer.named_children())


def _activations() -> dict[str, Callable]:
    import torch
    from torch.nn import functional

    def tanh_gelu(x):
        return functional.gelu(x, approximate="tanh")

    return {
        "GELU in its tanh form": tanh_gelu,
        "GELU in its exact form": functional.gelu,
        "GELU in its sigmoid form": lambda x: x * torch.sigmoid(1.702 * x),
        "ReLU": functional.relu,
        "SiLU": functional.silu,
        "nothing": lambda x: x,
    }


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a layer, or of a module of Python."""
    was_own = name in vars(owner) or any(
        name in getattr(owner, kind, {}) for kind in ("_modules", "_buffers", "_parameters")
    )
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, kept)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def _values(tensors: Sequence[Any], others: Sequence[Any]) -> Iterator[None]:
    """Gives tensors the values of others, which may be views of them."""
    kept = [tensor.detach().clone() for tensor in tensors]
    others = [other.detach().clone() for other in others]
    try:
        for tensor, other in zip(tensors, others, strict=True):
            tensor.data.copy_(other)
        yield
    finally:
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.data.copy_(values)


@contextlib.contextmanager
def _output(layer: Any, change: Callable) -> Iterator[None]:
    """Changes what a layer gives."""
    handle = layer.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _all(*contexts: AbstractContextManager) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
