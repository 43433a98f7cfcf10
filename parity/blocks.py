"""Layer by layer: every named layer of one half against the same layer of the reference, in two ways.

`free`: both run by themselves from the image, so a difference is carried on to all that follows. `forced`: each layer
is given the recorded input of the reference, so that what differs is what the layer itself does.

A *block* is a layer of a list, such as `encoder.layer.3`, or a layer beside such lists, such as `embeddings`; what lies
inside a block is a *sub-layer*, what holds blocks a *container*. What a layer's own code does between its sub-layers (a
residual, a reshape, the attention itself) is seen in what it gives them, and called its *own code*.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from modelspec.agreement import SCALE_FLOOR, Agreement, compare, failed, root_mean_square
from parity.taps import Call, Tap

OWN_CODE = " (own code)"
MODEL = "model"  # the name of the own code of the model itself
Arrays = list[np.ndarray]


def blocks(tap: Tap) -> list[str]:
    """Returns the paths of the blocks of a model; those of containers and sub-layers are not among them."""

    def is_container(path: str) -> bool:
        below = tap.children(path)
        return any(other.rpartition(".")[2].isdecimal() and tap.children(other) for other in below)

    found: list[str] = []
    for path in tap.layers:
        inside = any(path.startswith(f"{block}.") for block in found)
        if not inside and not is_container(path):
            found.append(path)
    return found


def block_of(layer: str, among: Sequence[str]) -> str:
    """Returns the block that a layer is part of; the layer itself if it is part of none."""
    layer = layer.removesuffix(OWN_CODE)
    return next((block for block in among if layer == block or layer.startswith(f"{block}.")), layer)


class RecordingTooLarge(RuntimeError):
    """A recording would take more memory than it may."""


class Recording:
    """What went into each layer of the reference and what came out; an observer.

    Args:
        layers: the layers to record.
        max_bytes: above which RecordingTooLarge is raised.

    Attributes:
        inputs, outputs: by call.
        parents: layer -> the layer that calls it, "" if the model itself does.
        order: of the moments, as (call, whether it is the end), in causal order.
    """

    def __init__(self, layers: Sequence[str], max_bytes: float = float("inf")):
        self.layers = frozenset(layers)
        self.max_bytes = max_bytes
        self.inputs: dict[Call, Arrays] = {}
        self.parents: dict[str, str] = {}
        self.outputs: dict[Call, Arrays] = {}
        self.order: list[tuple[Call, bool]] = []
        self._size = 0

    def entering(self, call: Call, parent: str, arrays: Arrays) -> None:
        self.parents[call[0]] = parent
        self._record(self.inputs, call, arrays)

    def leaving(self, call: Call, arrays: Arrays) -> None:
        self._record(self.outputs, call, arrays)

    def _record(self, where: dict[Call, Arrays], call: Call, arrays: Arrays) -> None:
        if call[0] not in self.layers:
            return
        where[call] = [array.copy() for array in arrays]  # layers may work in place
        self.order.append((call, where is self.outputs))
        self._size += sum(array.nbytes for array in arrays)
        if self._size > self.max_bytes:
            raise RecordingTooLarge

    def scale_floor(self) -> float:
        """Returns the smallest scale: a part of the rms over all that layers gave."""
        flat = [array for arrays in self.outputs.values() for array in arrays]
        elements = sum(array.size for array in flat)
        squares = sum(root_mean_square(array) ** 2 * array.size for array in flat)
        return SCALE_FLOOR * (squares / elements) ** 0.5 if elements and np.isfinite(squares) else 0.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """How one layer agreed, at its worst.

    Attributes:
        layer: its path, in the reference; with `OWN_CODE` for what its own code does.
        agreement: the worst of its calls and arrays.
        order: the causal index of the first moment that failed, or else of the last.
    """

    layer: str
    agreement: Agreement
    order: int


class Comparing:
    """Compares the layers of a running model with a recording; an observer.

    Args:
        recording: of the reference.
        layers: which of the recorded layers to compare, by the reference's names.
        dtype: of the running model; another dtype of an output is a failure. None allows any.
        tolerance: of `modelspec.agreement.compare`.
        forced: whether they are given the recorded inputs, and their outputs are replaced by the recorded ones.
        split: whether what a layer with sub-layers does itself is judged, instead of all that it does.
        names: the running model's name of each layer -> the reference's; None if they are equal.
        unit: what a difference counts at least, as a part of the largest number of its array.

    Attributes:
        worst: the worst array's layer, and |actual - reference| of it when called; None before anything was compared.
    """

    def __init__(
        self,
        recording: Recording,
        layers: Collection[str],
        dtype: str | None,
        tolerance: float,
        *,
        forced: bool = False,
        split: bool = False,
        names: Mapping[str, str] | None = None,
        unit: float = 0.0,
    ):
        self.recording = recording
        self.unit = unit
        self.layers = frozenset(layers)
        self.dtype = dtype
        self.tolerance = tolerance
        self.forced = forced
        self.split = split
        self.names = names
        self.worst: tuple[str, Callable[[], np.ndarray]] | None = None
        self._worst_badness = -1.0
        self._findings: dict[str, Finding] = {}
        self._floor = recording.scale_floor()
        self._positions = {moment: index for index, moment in enumerate(recording.order)}
        self._called = self.recording.outputs.keys()
        self._seen: set[Call] = set()
        self._layouts = Layouts()

    def entering(self, call: Call, parent: str, arrays: Arrays) -> Arrays | None:
        known = self._translated(call)
        if known is None or not self.forced:
            return None
        owner = f"{self.recording.parents[known[0]] or MODEL}{OWN_CODE}" if self.split else None
        return self._compare(known, False, owner, arrays)

    def leaving(self, call: Call, arrays: Arrays) -> Arrays | None:
        known = self._translated(call)
        if known is None:
            return None
        has_parts = any(other.startswith(f"{known[0]}.") for other in self.layers)
        owner = known[0] + OWN_CODE if self.split and has_parts else known[0]
        self._seen.add(known)
        return self._compare(known, True, owner, arrays)

    def findings(self) -> list[Finding]:
        """Returns what was found, in causal order; a recorded call that the running model did not make is a failure."""
        for call in self.recording.outputs:
            if call[0] in self.layers and call not in self._seen:
                outcome = failed(self.tolerance, "missing", "only the reference calls this layer")
                self._note(call[0], outcome, self._positions[call, True])
        return sorted(self._findings.values(), key=lambda finding: finding.order)

    def _translated(self, call: Call) -> Call | None:
        """The call by the reference's name; None if the layer is not compared."""
        if self.names is not None:
            if call[0] not in self.names:
                return None
            call = self.names[call[0]], call[1]
        # what the reference skips (a dropout at rest) has no counterpart; it shows in what the next layer is given
        return call if call[0] in self.layers and (call[0], 0) in self._called else None

    def _compare(self, call: Call, is_output: bool, owner: str | None, arrays: Arrays) -> Arrays | None:
        references = (self.recording.outputs if is_output else self.recording.inputs).get(call)
        position = self._positions.get((call, is_output), len(self._positions))
        reason = ""
        if references is None:
            reason = f"the reference calls it {sum(other[0] == call[0] for other in self.recording.outputs)} times"
        elif len(references) != len(arrays):
            reason = f"{len(arrays)} arrays against {len(references)}"
        if references is None or reason:
            if owner is not None:
                self._note(owner, failed(self.tolerance, "missing", reason), position)
            return None
        expected = [self._layouts.find(*pair) for pair in zip(references, arrays, strict=True)]
        if owner is not None:
            for array, (wanted, back) in zip(arrays, expected, strict=True):
                agreement = self._judge(array, wanted)
                self._note(owner, agreement, position)
                if agreement.failure not in ("shape", "dtype") and badness(agreement) > self._worst_badness:
                    self._worst_badness = badness(agreement)
                    self.worst = owner, _Difference(array, wanted, back)
        if not self.forced or any(
            array.shape != wanted.shape for array, (wanted, _) in zip(arrays, expected, strict=True)
        ):
            return None
        return [wanted for wanted, _ in expected]

    def _judge(self, array: np.ndarray, expected: np.ndarray) -> Agreement:
        if self.dtype is not None and array.dtype != self.dtype:
            return failed(self.tolerance, "dtype", f"dtype {array.dtype} in a {self.dtype} model")
        scale = max(root_mean_square(expected), self._floor)
        agreement = compare(array, expected, scale, self.tolerance)
        return at_least(agreement, expected, scale, self.unit) if self.unit else agreement

    def _note(self, owner: str, agreement: Agreement, position: int) -> None:
        known = self._findings.get(owner)
        if known is None:
            self._findings[owner] = Finding(owner, agreement, position)
            return
        order = known.order
        if known.agreement.passed:  # the first that failed, else the last
            order = position if not agreement.passed else max(position, order)
        worst = agreement if badness(agreement) > badness(known.agreement) else known.agreement
        self._findings[owner] = Finding(owner, worst, order)


Laid = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]


class Layouts:
    """Finds out how the axes of two arrays correspond: channels may lie first or last.

    Where shapes cannot tell, the nearest numbers do; and where these are far apart, the last that were near.
    """

    def __init__(self) -> None:
        self._last: dict[int, str] = {}  # rank -> what was clear last
        self._map_shape: tuple[int, ...] | None = None

    def find(self, reference: np.ndarray, actual: np.ndarray) -> Laid:
        """Returns the reference with its axes in the order of `actual`, and a function that undoes that."""
        fitting = {name: laid for name, laid in self._candidates(reference, actual) if laid[0].shape == actual.shape}
        chosen = next(iter(fitting), None)
        if chosen is None:
            return reference, lambda array: array
        if len(fitting) > 1:
            with np.errstate(invalid="ignore"):
                distances = {name: float(np.abs(laid[0] - actual).mean()) for name, laid in fitting.items()}
            nearest = min(fitting, key=lambda name: (not distances[name] >= 0, distances[name]))
            if distances[nearest] <= _NEAR * float(np.abs(reference).mean()):
                chosen = self._last[reference.ndim] = nearest
            else:
                chosen = next(name for name in (self._last.get(reference.ndim), chosen) if name in fitting)
        elif reference.ndim >= 3:
            self._last[reference.ndim] = chosen
        expected, back = fitting[chosen]
        return np.ascontiguousarray(expected), back

    def _candidates(self, reference: np.ndarray, actual: np.ndarray) -> Iterator[tuple[str, Laid]]:
        yield "same", (reference, lambda array: array)
        if reference.ndim >= 3:
            for name, axes in (("channels last", (1, -1)), ("channels first", (-1, 1))):
                yield name, (np.moveaxis(reference, *axes), functools.partial(_moved_back, axes=axes))
        without_ones = [[size for size in array.shape if size != 1] for array in (reference, actual)]
        if reference.shape != actual.shape and without_ones[0] == without_ones[1]:  # pooled maps of one pixel
            yield "reshaped", (reference.reshape(actual.shape), lambda array: array.reshape(reference.shape))
        if reference.ndim >= 4:
            self._map_shape = reference.shape
        elif reference.ndim == 2 and self._map_shape and reference.size == int(np.prod(self._map_shape)):
            maps = np.moveaxis(reference.reshape(self._map_shape), 1, -1)
            yield "flattened channels last", (maps.reshape(reference.shape), _unflattened(maps.shape))


_NEAR = 1e-2  # mean difference, as a part of the mean size: numbers in another order differ by more than their size


def in_layout_of(reference: np.ndarray, actual: np.ndarray) -> Laid:
    """Finds out how the axes of two arrays correspond, by these two alone; see `Layouts.find`."""
    return Layouts().find(reference, actual)


def _moved_back(array: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    return np.moveaxis(array, axes[1], axes[0])


def _unflattened(shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.moveaxis(array.reshape(shape), -1, 1).reshape(len(array), -1)


@dataclasses.dataclass(frozen=True)
class _Difference:
    """A difference that is computed when it is asked for."""

    actual: np.ndarray
    expected: np.ndarray
    back: Callable[[np.ndarray], np.ndarray]

    def __call__(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.abs(self.back(self.actual.astype(np.float64) - self.expected))


def at_least(agreement: Agreement, reference: np.ndarray, scale: float, unit: float) -> Agreement:
    """Lets a difference count as much as `unit` of the reference's largest number."""
    least = unit * float(np.abs(reference).max(initial=0.0)) / scale if scale > 0 else 0.0
    return dataclasses.replace(agreement, max_rel=least) if agreement.max_rel < least else agreement


def badness(agreement: Agreement) -> float:
    """Returns a number by which agreements are ordered: what could not be compared is worst."""
    if agreement.max_rel != agreement.max_rel:
        return float("inf")
    return agreement.max_rel
