"""Looking into a running model: every named layer of a PyTorch or a Keras model, each time that it is called.

An observer is told what goes into a layer and what comes out, as NumPy arrays, and may put other arrays in their
place. Layers are named by their attribute paths, which are equal in the two halves of a family; the layers of a Keras
functional or sequential model by their own names.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Call = tuple[str, int]  # a layer and how often it was called before


class Observer(Protocol):
    """What is told of the calls of layers. A returned list takes the place of the arrays, None leaves them."""

    def entering(self, call: Call, parent: str, arrays: list[np.ndarray]) -> Sequence[np.ndarray] | None:
        """Before a call; `parent` is the layer that makes it, "" the model itself."""

    def leaving(self, call: Call, arrays: list[np.ndarray]) -> Sequence[np.ndarray] | None:
        """After a call."""


class Runnable(Protocol):
    """What can be run under the eyes of an observer; see `Tap.run`."""

    def run(self, observer: Observer | None = None, **options: Any) -> dict[str, np.ndarray]: ...


class Tap:
    """A model, a way to call it, and the names of its layers.

    Args:
        model: a `torch.nn.Module` or a Keras layer.
        run: calls the model once and returns what it gives.

    Attributes:
        layers: path -> layer, in the order of the attributes, without the model itself.
    """

    half: str

    def __init__(self, model: Any, run: Callable[..., Any]):
        self.model = model
        self._run = run
        self.layers: dict[str, Any] = dict(self._name_layers())

    def run(self, observer: Observer | None = None, **options: Any) -> dict[str, np.ndarray]:
        """Calls the model, with options if its `run` takes any, watched by the observer.

        Returns:
            Its outputs by name; see `by_name`.
        """
        with self._prepared(), contextlib.ExitStack() as stack:
            if observer is not None:
                stack.enter_context(self._watched(_Calls(observer, self)))
            return by_name(self._run(**options), self.to_numpy)

    def children(self, path: str) -> list[str]:
        """The paths of all layers within a layer."""
        return [other for other in self.layers if other.startswith(f"{path}." if path else "")]

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is a tensor of real floating-point numbers."""
        raise NotImplementedError

    def to_numpy(self, tensor: Any) -> np.ndarray:
        raise NotImplementedError

    def like(self, array: np.ndarray, tensor: Any) -> Any:
        """A tensor with the numbers of `array` and the dtype of `tensor`."""
        raise NotImplementedError

    def _name_layers(self) -> Iterator[tuple[str, Any]]:
        raise NotImplementedError

    def _watched(self, calls: "_Calls") -> contextlib.AbstractContextManager:
        raise NotImplementedError

    def _prepared(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class TorchTap(Tap):
    """A tap on a `torch.nn.Module`, through its hooks."""

    half = "torch"

    def is_tensor(self, value):
        import torch

        return isinstance(value, torch.Tensor) and value.is_floating_point()

    def to_numpy(self, tensor):
        import torch

        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def like(self, array, tensor):
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(tensor, copy=True)  # layers may work in place

    def _name_layers(self):
        return ((path, module) for path, module in self.model.named_modules() if path)

    def _prepared(self):
        import torch

        return torch.no_grad()

    @contextlib.contextmanager
    def _watched(self, calls):
        handles = []

        def watch(path, module):
            def before(_, args, kwargs):
                return calls.enter(path, args, kwargs)

            def after(_, args, kwargs, output):
                return calls.leave(output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))

        try:
            for path, module in self.layers.items():
                watch(path, module)
            yield
        finally:
            for handle in handles:
                handle.remove()


class KerasTap(Tap):
    """A tap on a Keras layer or model, through `Layer.__call__`.

    The activation that Keras' own layers may hold counts as a layer after them, `name:activation`, as it is in torch.
    """

    half = "keras"

    def is_tensor(self, value):
        import keras

        return keras.ops.is_tensor(value) and keras.backend.is_float_dtype(keras.backend.standardize_dtype(value.dtype))

    def to_numpy(self, tensor):
        import keras

        array = keras.ops.convert_to_numpy(tensor)
        return array if array.dtype.kind == "f" else array.astype(np.float32)  # bfloat16 is none of NumPy's own

    def like(self, array, tensor):
        import keras

        return keras.ops.convert_to_tensor(array, dtype=keras.backend.standardize_dtype(tensor.dtype))

    def _name_layers(self):
        return _keras_layers(self.model, "", {id(self.model)})

    @contextlib.contextmanager
    def _watched(self, calls):
        import keras

        paths = {id(layer): path for path, layer in self.layers.items()}
        fused = {path: layer for path, layer in self.layers.items() if isinstance(layer, FusedActivation)}
        held = {paths[id(activation.layer)] for activation in fused.values()}
        original = keras.layers.Layer.__call__

        def call(layer, *args, **kwargs):
            path = paths.get(id(layer))
            if path is None:
                return original(layer, *args, **kwargs)
            args, kwargs = calls.enter(path, args, kwargs)
            output = original(layer, *args, **kwargs)
            return output if path in held else calls.leave(output)  # such a layer was left before its activation

        def watch(path, activation):
            def apply(x):
                x = calls.leave(x)
                (x,), _ = calls.enter(path, (x,), {})
                return calls.leave(activation(x))

            return apply

        keras.layers.Layer.__call__ = call
        try:
            for path, activation in fused.items():
                activation.layer.activation = watch(path, activation.function)
            yield
        finally:
            keras.layers.Layer.__call__ = original
            for activation in fused.values():
                activation.layer.activation = activation.function


class FusedActivation:
    """The activation that a Keras layer holds.

    Attributes:
        layer: which has it.
        function: what it computes.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.function = layer.activation


class _Calls:
    """Counts calls, keeps the stack of running layers, and takes tensors out of arguments and puts others in."""

    def __init__(self, observer: Observer, tap: Tap):
        self.observer = observer
        self.tap = tap
        self.counts: collections.Counter = collections.Counter()
        self.running: list[Call] = []

    def enter(self, path: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        call = path, self.counts[path]
        self.counts[path] += 1
        parent = self.running[-1][0] if self.running else ""
        self.running.append(call)
        return self._replaced((args, kwargs), lambda arrays: self.observer.entering(call, parent, arrays))

    def leave(self, output: Any) -> Any:
        call = self.running.pop()
        return self._replaced(output, lambda arrays: self.observer.leaving(call, arrays))

    def _replaced(self, tree: Any, tell: Callable) -> Any:
        tensors = list(_tensors(tree, self.tap))
        others = tell([self.tap.to_numpy(tensor) for tensor in tensors])
        if others is None:
            return tree
        new = [self.tap.like(array, tensor) for array, tensor in zip(others, tensors, strict=True)]
        return _rebuilt(tree, iter(new), self.tap)


def _tensors(tree: Any, tap: Tap) -> Iterator[Any]:
    if tap.is_tensor(tree):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value, tap)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value, tap)


def _rebuilt(tree: Any, tensors: Iterator[Any], tap: Tap) -> Any:
    if tap.is_tensor(tree):
        return next(tensors)
    kind: Any = type(tree)
    if isinstance(tree, Mapping):
        return kind({name: _rebuilt(value, tensors, tap) for name, value in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*(_rebuilt(value, tensors, tap) for value in tree))
    if isinstance(tree, (list, tuple)):
        return kind(_rebuilt(value, tensors, tap) for value in tree)
    return tree


def _keras_layers(layer: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    for name, child in _keras_children(layer):
        if id(child) not in seen:
            seen.add(id(child))
            yield prefix + name, child
            if _has_fused_activation(child):
                yield f"{prefix}{name}:activation", FusedActivation(child)
            yield from _keras_layers(child, f"{prefix}{name}.", seen)


def _keras_children(layer: Any) -> Iterator[tuple[str, Any]]:
    import keras

    if isinstance(layer, keras.Model) and (isinstance(layer, keras.Sequential) or hasattr(layer, "operations")):
        yield from ((child.name, child) for child in layer.layers if not isinstance(child, keras.layers.InputLayer))
        return
    for name, value in vars(layer).items():
        if name.startswith("_"):
            continue
        if isinstance(value, keras.layers.Layer):
            yield name, value
        elif isinstance(value, (list, tuple, dict)):
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{name}.{index}", entry) for index, entry in entries if isinstance(entry, keras.layers.Layer))
    yield from ((child.name, child) for child in layer._layers)  # what is held under a private name


def _has_fused_activation(layer: Any) -> bool:
    import keras

    of_keras = (keras.layers.Dense, keras.layers.EinsumDense, *(getattr(keras.layers, name) for name in _CONVOLUTIONS))
    return isinstance(layer, of_keras) and layer.activation not in (None, keras.activations.linear)


_CONVOLUTIONS = [
    *(f"Conv{axes}D{transposed}" for axes in (1, 2, 3) for transposed in ("", "Transpose")),
    *(f"{kind}Conv{axes}D" for axes in (1, 2) for kind in ("Depthwise", "Separable")),
]


def by_name(output: Any, to_numpy: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    """Returns what a model gave by name: `logits`, `hidden_states.0`; `output` or `output.0` where it has no names."""
    if not isinstance(output, Mapping):
        output = {"output": output}
    arrays = {}
    for name, value in output.items():
        if isinstance(value, (list, tuple)):
            arrays.update({f"{name}.{index}": to_numpy(entry) for index, entry in enumerate(value)})
        else:
            arrays[name] = to_numpy(value)
    return arrays
