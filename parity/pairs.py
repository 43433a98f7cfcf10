"""Comparing any Keras model with any torch module: `parity.compare`."""

import contextlib
import copy
import dataclasses
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from modelspec.agreement import BOUNDS
from parity.blocks import OWN_CODE, in_layout_of
from parity.environment import exact_arithmetic
from parity.errors import naming_failures
from parity.layers import Reference, compare_pass, measure_floors, record, worst_of
from parity.matching import match_layers
from parity.report import ModelReport, Row
from parity.rounding import MANTISSA_BITS
from parity.taps import KerasTap, Observer, Tap, TorchTap


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """The outcome of `parity.compare`. Its `repr` is a table.

    Attributes:
        report: all rows, and where the models first diverge.
        names: layer of the first model -> layer of the second, of those that were compared.
    """

    report: ModelReport
    names: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether everything agreed."""
        return all(row.agreement.passed for row in self.report.results)

    @property
    def first_divergence(self) -> str | None:
        """The block that first differs, as the first model calls it; None if none does, or only the outputs do."""
        row = self.report.first_divergence
        return None if row is None else row.block

    @property
    def results(self) -> list[dict]:
        """The rows, as in the JSON of `parity check`."""
        return [row.to_dict() for row in self.report.results]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return {"passed": self.passed, "first_divergence": self.first_divergence, "results": self.results}

    def __repr__(self) -> str:
        from rich.console import Console

        from parity.reporting import print_model

        text = io.StringIO()
        # in a notebook, rich would show each line by itself and leave the text empty
        console = Console(file=text, width=100, highlight=False, color_system=None, force_jupyter=False)
        sentence = self.report.explain_divergence()
        console.print("All agree." if sentence is None else sentence, soft_wrap=True)
        print_model(console, self.report)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).rstrip()


def compare(
    model_a: Any,
    model_b: Any,
    inputs: Any,
    *,
    names: Mapping[str, str] | None = None,
    calibrate: bool = True,
    seed: int = 0,
) -> Comparison:
    """Compares two models that ought to be the same, one of them a `torch.nn.Module`, layer by layer.

    The reference is a copy of the torch module in float64 (of `model_b` if both are torch's), in evaluation mode on the
    CPU. Each model is compared with it in its own dtype: its outputs, every layer run freely, and every layer given the
    reference's inputs. Neither model is changed.

    Args:
        model_a, model_b: a Keras model or layer and a torch module, or two torch modules.
        inputs: what both are called with: an array, or a dict of named arrays; or a pair of these, one for each model,
            where layouts differ.
        names: layer of `model_a` -> layer of `model_b`. Layers that it does not name are matched by equal names, and
            else by kind, size and order. Which axis holds the channels is found out.
        calibrate: measure what rounding does (see `parity.rounding`) and fail what it does not explain; else only the
            bounds of `modelspec.agreement` hold.
        seed: of the rounding's draws.

    Raises:
        TypeError: a model is neither framework's, or both are Keras'.
        ValueError: `names` or `inputs` cannot be used.
        ComparisonError: a model failed to run.

    Returns:
        The outcome: `.passed`, `.first_divergence`, `.results`; printed, it is a table.
    """
    models = model_a, model_b
    halves = [_half(model, name) for model, name in zip(models, ("model_a", "model_b"), strict=True)]
    if halves == ["keras", "keras"]:
        raise TypeError("both models are Keras'; one must be a torch.nn.Module, whose float64 copy is the reference")
    given = _pair(inputs)
    at = 1 if halves[1] == "torch" else 0  # of the reference
    with contextlib.ExitStack() as stack, exact_arithmetic():
        taps = []
        for model, half, arrays, name in zip(models, halves, given, ("model_a", "model_b"), strict=True):
            taps.append(stack.enter_context(_tapped(model, half, arrays)))
            with naming_failures(f"{name} failed"):
                taps[-1].run()
        matched = match_layers(taps[0], taps[1], names)
        to_reference = matched if at else {second: first for first, second in matched.items()}
        runs = [(taps[1 - at], to_reference)]
        if _dtype(taps[at]) != "float64":
            runs.append((taps[at], {name: name for name in to_reference.values()}))
        dtypes = list(dict.fromkeys(_dtype(tap) for tap, _ in runs))
        with naming_failures(f"{('model_a', 'model_b')[at]} failed in another dtype"):
            reference = _reference(
                models[at], given[at], list(to_reference.values()), dtypes if calibrate else [], seed
            )
        rows, worst = [], None
        for tap, its_names in runs:
            aligned = _AlignedOutputs(tap, reference.outputs["outputs"])
            run = tap.half, _dtype(tap)
            found, _, its_worst = compare_pass("the pair", aligned, run, reference, names=its_names, strict=False)
            rows += found
            worst = worst_of(worst, its_worst)
    back = {second: first for first, second in matched.items()} if at else {}
    report = ModelReport(
        model="the pair",
        extent=f"{len(matched)} layers matched, inputs {', '.join(str(array.shape) for array in given[0].values())}",
        parameters=sum(parameter.numel() for parameter in models[at].parameters()),
        image="",
        weights="",
        trained=False,
        notes=(*reference.notes, *_notes(taps, matched)),
        results=tuple(_renamed(row, back) for row in rows),
        worst=worst,
    )
    return Comparison(report, matched)


def _reference(model: Any, inputs: dict[str, np.ndarray], layers: list[str], dtypes: list[str], seed: int) -> Reference:
    """Runs a copy of a torch module in float64, and measures what rounding does to it in the dtypes."""
    import torch

    def copied(dtype: str) -> Any:
        return _tapped(copy.deepcopy(model).cpu().to(getattr(torch, dtype)), "torch", inputs)

    with contextlib.ExitStack() as stack:
        reference = record(stack.enter_context(copied("float64")), {"outputs": {}}, {}, layers)
        measure_floors(reference, dtypes, lambda dtype: stack.enter_context(copied(dtype)), seed)
    return reference


class _AlignedOutputs:
    """A tap whose outputs have the names and the layout of the reference's."""

    def __init__(self, tap: Tap, wanted: dict[str, np.ndarray]):
        self.tap = tap
        self.wanted = wanted

    def run(self, observer: Observer | None = None, **options: Any) -> dict[str, np.ndarray]:
        found = self.tap.run(observer, **options)
        if found.keys() != self.wanted.keys() and len(found) == len(self.wanted):
            found = dict(zip(self.wanted, found.values(), strict=True))
        return {
            name: in_layout_of(self.wanted[name], array)[1](array) if name in self.wanted else array
            for name, array in found.items()
        }


def _half(model: Any, name: str) -> str:
    roots = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(model).__mro__}
    if "torch.Module" in roots:
        return "torch"
    if "keras.Layer" in roots:
        return "keras"
    raise TypeError(f"{name} is a {type(model).__name__}; give a Keras model or layer, or a torch.nn.Module")


def _pair(inputs: Any) -> list[dict[str, np.ndarray]]:
    """Returns each model's inputs by name, "" where there is one without a name."""
    pair = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs, inputs]
    if len(pair) != 2:
        raise ValueError(f"inputs are {len(pair)}; give one array or dict for both models, or a pair of them")
    named = [dict(entry) if isinstance(entry, Mapping) else {"": entry} for entry in pair]
    found = [{name: np.asarray(array) for name, array in entry.items()} for entry in named]
    for entry in found:
        for name, array in entry.items():
            if array.dtype.kind not in "fiub" or array.size == 0:
                what = f"inputs[{name!r}]" if name else "inputs"
                raise ValueError(f"{what}: {array.dtype} of shape {array.shape}; give real numbers, at least one")
    return found


@contextlib.contextmanager
def _tapped(model: Any, half: str, inputs: dict[str, np.ndarray]) -> Iterator[Tap]:
    """Taps a model that is called with these inputs, in evaluation mode."""
    if half == "keras":
        with _keras_tap(model, inputs) as tap:
            yield tap
        return
    import torch

    modes = {module: module.training for module in model.modules()}
    weight = next((value for value in model.parameters() if value.is_floating_point()), torch.zeros(()))
    tensors = {}
    for name, array in inputs.items():
        tensor = torch.from_numpy(np.array(array)).to(weight.device)
        tensors[name] = tensor.to(weight.dtype) if tensor.is_floating_point() else tensor
    model.eval()
    try:
        yield TorchTap(model, lambda: model(tensors[""]) if "" in tensors else model(**tensors))
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _keras_tap(model: Any, inputs: dict[str, np.ndarray]) -> Iterator[Tap]:
    import keras

    dtype = _keras_dtype(model)
    tensors = {
        name: keras.ops.convert_to_tensor(array.astype(dtype) if array.dtype.kind == "f" else array)
        for name, array in inputs.items()
    }

    def run() -> Any:
        if "" in tensors:
            return model(tensors[""])
        return model(tensors) if hasattr(model, "operations") else model(**tensors)

    if not model.built:
        run()  # makes layers that are made on the first call
    yield KerasTap(model, run)


def _dtype(tap: Tap) -> str:
    """The dtype that a model computes in."""
    if tap.half == "keras":
        dtype = _keras_dtype(tap.model)
    else:
        weight = next((value for value in tap.model.parameters() if value.is_floating_point()), None)
        dtype = "float32" if weight is None else str(weight.dtype).removeprefix("torch.")
    if dtype not in BOUNDS:
        raise ValueError(f"a model computes in {dtype}; allowed are {', '.join(BOUNDS)}")
    return dtype


def _keras_dtype(model: Any) -> str:
    """The narrowest dtype that a layer with weights computes in; a functional model has its layers' own."""
    leaves = [layer for layer in model._flatten_layers() if not layer._layers and layer.weights]
    dtypes = {layer.compute_dtype for layer in leaves} or {model.compute_dtype}
    return min(dtypes, key=lambda dtype: MANTISSA_BITS.get(dtype, 0))


def _notes(taps: list[Tap], matched: dict[str, str]) -> list[str]:
    """Says which layers have no counterpart."""
    notes = []
    for number, (tap, known) in enumerate(zip(taps, (list(matched), list(matched.values())), strict=True)):
        alone = [name for name in tap.layers if name not in known and not tap.children(name)]
        if alone:
            some = ", ".join(alone[:6]) + (f" and {len(alone) - 6} more" if len(alone) > 6 else "")
            notes.append(f"Without a counterpart, of the {('first', 'second')[number]} model: {some}.")
    return notes


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    """Calls the layers of a row by the names of the first model."""
    if row.layer is None or row.block is None:
        return row
    own = OWN_CODE if row.layer.endswith(OWN_CODE) else ""
    layer = row.layer.removesuffix(OWN_CODE)
    name = f"{row.mode}.{names.get(layer, layer)}{own}"
    return dataclasses.replace(row, name=name, block=names.get(row.block, row.block))
