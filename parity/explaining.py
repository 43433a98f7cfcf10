"""Why a block diverges: known mistakes are tried one by one on the right layer, until it is wrong in the same way."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from modelspec.agreement import FORCED_BOUNDS, scales
from modelspec.configs import get_variant
from parity import halves
from parity.blocks import MODEL, OWN_CODE, Layouts, in_layout_of
from parity.culprits import CULPRITS, Place
from parity.environment import exact_arithmetic
from parity.errors import ComparisonError
from parity.layers import Reference, compare_pass, record, recorded
from parity.levels import forward_calls
from parity.photograph import Photograph, pixel_values, read_photograph
from parity.report import Row, describe_place, in_causal_order
from parity.subjects import Subject, checkpoint_subject, drawn_subject
from parity.taps import Call, Tap

UNKNOWN = "unknown culprit"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What makes one layer differ.

    Attributes:
        block: the block that differs.
        place: the layer, in words.
        max_rel: how much it differs, given right inputs.
        culprit: the name of the function in `parity.culprits`, or `UNKNOWN`.
        sentence: what makes the difference vanish, in words; "" if nothing does.
        tried: how many changes were tried.
    """

    block: str
    place: str
    max_rel: float
    culprit: str
    sentence: str
    tried: int


def explain(
    model: str | None = None,
    *,
    checkpoint: str | os.PathLike | None = None,
    reduced: bool = False,
    image: str | os.PathLike | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
) -> list[Explanation]:
    """Explains why the Keras half of a model differs, layer by layer, in float64.

    Args:
        model, checkpoint, reduced, image, size, seed: as of `parity.check`; one model.

    Returns:
        An explanation for each layer that differs although it is given right inputs, in the order of computing; an
        empty list if none does.

    Raises:
        ValueError, OSError, ImportError, ComparisonError: as `parity.check`.
    """
    if model is None and checkpoint is None:
        raise ValueError("nothing to explain: name a model or a checkpoint")
    if checkpoint is not None and reduced:
        raise ValueError("a checkpoint is one whole model: do not reduce it")
    photograph = read_photograph(image)
    if checkpoint is not None:
        names = [] if model is None else [get_variant(model).name]
        subject = checkpoint_subject(checkpoint, seed, *names)
    else:
        assert model is not None
        subject = drawn_subject(model, seed, reduce=reduced)
    halves.import_frameworks()
    with exact_arithmetic():
        return explain_subject(subject, photograph, size)


def explain_subject(subject: Subject, photograph: Photograph, size: tuple[int, int] | None = None) -> list[Explanation]:
    """Explains why the Keras half of a subject differs; see `explain`."""
    weights = subject.weights()
    images, _ = pixel_values(photograph, subject.processor, size)
    _, options, _ = forward_calls(subject.config, images.shape[2:], size is not None, ["layers"])
    tap = functools.partial(halves.tap, config=subject.config, weights=weights, dtype="float64", pixel_values=images)
    try:
        reference = record(tap("torch"), {}, options)
        keras = tap("keras")
        rows, _, _ = compare_pass(subject.name, keras, ("keras", "float64"), reference)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ComparisonError(f"{subject.name}: a half failed in float64: {reason}") from error
    return explain_rows(rows, reference, keras)


def explain_rows(rows: Sequence[Row], reference: Reference, actual: Tap) -> list[Explanation]:
    """Explains each layer that differs although it was given right inputs.

    Args:
        rows: of the pass of `actual`, in float64.
        reference: what it was compared with.
        actual: the half that differs.
    """
    failed = [row for row in rows if row.mode == "forced" and not row.agreement.passed]
    parts = {row.block for row in failed if row.is_sub_layer}
    failed = [row for row in failed if row.is_sub_layer or row.block not in parts]
    return [_explain(row, reference, actual) for row in in_causal_order(failed)]


def _explain(row: Row, reference: Reference, actual: Tap) -> Explanation:
    layer = (row.layer or "").removesuffix(OWN_CODE)
    if layer == MODEL or layer not in recorded(reference).layers:
        layer = ""  # a container: the whole model shows what it does
    found = functools.partial(Explanation, row.block or "", describe_place(row), row.agreement.max_rel)
    wrong = _wrong_outputs(layer, reference, actual)
    right = _Replay(layer, reference)
    tried = 0
    for culprit in CULPRITS:
        for sentence, change in culprit(right.place):
            tried += 1
            # a change may not fit the layer's shapes, which is to say that it is not the culprit
            with contextlib.suppress(RuntimeError, ValueError, TypeError), change:
                if right.gives(wrong):
                    return found(culprit.__name__, sentence, tried)
    return found(UNKNOWN, "", tried)


def _wrong_outputs(layer: str, reference: Reference, actual: Tap) -> list[np.ndarray]:
    """What the other half's layer gives for the reference's inputs, in the reference's layout."""
    if layer:
        only = _Only(layer, reference)
        actual.run(only, **reference.layer_options)
        return only.outputs
    wanted = reference.tap.run(**reference.layer_options)
    found = actual.run(**reference.layer_options)
    return [in_layout_of(array, found[name])[1](found[name]) for name, array in wanted.items() if name in found]


class _Only:
    """Lets one layer run freely and forces all others, and keeps what it makes of right inputs; an observer."""

    def __init__(self, layer: str, reference: Reference):
        self.layer = layer
        self.recording = recorded(reference)
        self.layouts = Layouts()
        self.outputs: list[np.ndarray] = []

    def entering(self, call: Call, parent: str, arrays: list[np.ndarray]) -> list[np.ndarray] | None:
        return self._recorded(self.recording.inputs.get(call), call, arrays)

    def leaving(self, call: Call, arrays: list[np.ndarray]) -> list[np.ndarray] | None:
        if call == (self.layer, 0):
            pairs = zip(self.recording.outputs[call], arrays, strict=False)
            self.outputs = [self.layouts.find(*pair)[1](pair[1]) for pair in pairs]
        return self._recorded(self.recording.outputs.get(call), call, arrays)

    def _recorded(
        self, recorded: list[np.ndarray] | None, call: Call, arrays: list[np.ndarray]
    ) -> list[np.ndarray] | None:
        if recorded is None or len(recorded) != len(arrays) or call[0].startswith(f"{self.layer}."):
            return None
        laid_out = [self.layouts.find(*pair)[0] for pair in zip(recorded, arrays, strict=True)]
        fits = all(array.shape == other.shape for array, other in zip(arrays, laid_out, strict=True))
        return laid_out if fits else None


class _Replay:
    """The right layer, called again and again with what it was called with first."""

    def __init__(self, layer: str, reference: Reference):
        self.tap = reference.tap
        module = self.tap.layers[layer] if layer else self.tap.model
        parent, _, own = layer.rpartition(".")
        holder = self.tap.layers[parent] if parent else self.tap.model
        siblings = {name: child for name, child in holder.named_children() if layer and name != own}
        args, self.keywords = self._first_call(module, reference.layer_options)
        self.place = Place(module, siblings, args)

    def _first_call(self, module: Any, options: dict[str, Any]) -> tuple[tuple, dict]:
        calls: list[tuple[tuple, dict]] = []

        def keep(_: Any, args: tuple, kwargs: dict) -> None:
            calls.append((args, kwargs))

        hook = module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.tap.run(**options)
        finally:
            hook.remove()
        return calls[0]

    def gives(self, wrong: list[np.ndarray]) -> bool:
        """Whether the layer, as it is now, gives these arrays."""
        import torch

        with torch.no_grad():
            found = list(_arrays(self.place.layer(*self.place.arguments, **self.keywords), self.tap))
        if len(found) != len(wrong) or not found:
            return False
        scale = scales({str(index): np.nan_to_num(array) for index, array in enumerate(found)})
        return all(
            _equal(array, other, FORCED_BOUNDS["float64"] * scale[str(index)])
            for index, (array, other) in enumerate(zip(found, wrong, strict=True))
        )


def _equal(array: np.ndarray, other: np.ndarray, bound: float) -> bool:
    """Whether arrays differ by no more than a bound; NaN equals NaN."""
    if array.shape != other.shape or not np.array_equal(np.isnan(array), np.isnan(other)):
        return False
    return bool(np.nanmax(np.abs(array - other), initial=0.0) <= bound)


def _arrays(output: Any, tap: Tap) -> Iterator[np.ndarray]:
    if tap.is_tensor(output):
        yield tap.to_numpy(output)
    elif isinstance(output, dict):
        yield from _arrays(tuple(output.values()), tap)
    elif isinstance(output, (list, tuple)):
        for entry in output:
            yield from _arrays(entry, tap)
