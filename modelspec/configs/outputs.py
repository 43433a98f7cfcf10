"""What a model's call returns: named arrays, read by attribute, key or position."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self


class ModelOutput(dict):
    """A dict whose possible keys are the class's `fields`, always stored in that order.

    A field that is None is not stored: it is a missing key, a None attribute, and takes no position. A subclass
    needs to do no more than name its `fields`.

    Args:
        values: a mapping or (name, value) pairs; tf.nest and torch's gather rebuild an output that way.
        named: the same as keywords.

    Raises:
        TypeError: a name that is no field.

    >>> output = ImageClassifierOutput(hidden_states=(1, 2), logits=0.5)
    >>> output.logits, output["logits"], output[0], output.loss, list(output)
    (0.5, 0.5, 0.5, None, ['logits', 'hidden_states'])
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **named: Any):
        super().__init__()
        self.update(values, **named)

    def to_tuple(self) -> tuple:
        """Returns the stored values in the order of `fields`."""
        return tuple(self.values())

    def update(  # type: ignore[override]  # of a dict, keys could be anything
        self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **named: Any
    ) -> None:
        """Sets several fields; None removes one."""
        merged = {**self, **dict(values), **named}
        unknown = [name for name in merged if name not in self.fields]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no fields {unknown}; its fields are {list(self.fields)}")
        self.clear()
        for name in self.fields:
            if merged.get(name) is not None:
                super().__setitem__(name, merged[name])

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Returns the field; sets it to `default` first if it is absent."""
        if name not in self:
            self[name] = default
        return self.get(name)

    def copy(self) -> Self:
        """Returns a shallow copy of the same class."""
        return type(self)(self)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, int | slice):
            return self.to_tuple()[key]
        return super().__getitem__(key)

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def __ior__(self, values: Any) -> Self:
        self.update(values)
        return self

    def __or__(self, values: Any) -> Self:
        return type(self)({**self, **values})

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; its fields are {list(self.fields)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.fields:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}; its fields are {list(self.fields)}")
        self[name] = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"


class BaseModelOutput(ModelOutput):
    """Output of a model without a head: features after the final norm, and what was asked for of the layers."""

    fields = ("last_hidden_state", "hidden_states", "attentions")


class BaseModelOutputWithNoAttention(ModelOutput):
    """`BaseModelOutput` of a model whose attention has no weights to show."""

    fields = ("last_hidden_state", "hidden_states")


class ImageClassifierOutput(ModelOutput):
    """Output of a classifier: scalar `loss` if labels were given, `logits` (B, num_labels), and layers if asked."""

    fields = ("loss", "logits", "hidden_states", "attentions")


class ImageClassifierOutputWithNoAttention(ModelOutput):
    """`ImageClassifierOutput` of a model whose attention has no weights to show."""

    fields = ("loss", "logits", "hidden_states")


class ModelOutputWithReshapedStates(ModelOutput):
    """Output of a bare NAT or DiNAT: maps are (B, H, W, C), those of `reshaped_hidden_states` (B, C, H, W)."""

    fields = ("last_hidden_state", "pooler_output", "hidden_states", "attentions", "reshaped_hidden_states")


class ImageClassifierOutputWithReshapedStates(ModelOutput):
    """`ImageClassifierOutput` of NAT and DiNAT, whose hidden states are (B, H, W, C), and (B, C, H, W) reshaped."""

    fields = ("loss", "logits", "hidden_states", "attentions", "reshaped_hidden_states")


class BackboneOutput(ModelOutput):
    """Output of a backbone: `feature_maps`, each (B, C, H, W), of the chosen stages, and what was asked for."""

    fields = ("feature_maps", "hidden_states", "attentions")
