"""The levels of the forward pass: outputs, hidden states, and every layer, free-running and forced."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from modelspec.agreement import (
    BOUNDS,
    EXPLAINED_FACTOR,
    FORCED_BOUNDS,
    Agreement,
    balanced,
    compare_all,
    failed,
    scales,
    top_k_agreement,
)
from parity.blocks import Comparing, Recording, RecordingTooLarge, at_least, badness, block_of, blocks
from parity.report import Row, WorstArray
from parity.rounding import MANTISSA_BITS, OTHER_ORDER, OWN_RUNS, OWN_UNITS, RUNS, Moving, moved_weights, share_weights
from parity.taps import Runnable, Tap

MAX_RECORDING = 4e9  # bytes
MAX_HEAT = 64  # numbers along each side of a heat map
MODES = ("free", "block", "forced")

Arrays = dict[str, np.ndarray]
Run = tuple[str, str]  # (half, dtype)


@dataclasses.dataclass
class Reference:
    """What PyTorch computes in float64, and how far rounding moves it.

    Attributes:
        tap: the model.
        calls: level -> options of its forward pass.
        outputs: level -> the arrays by name.
        layer_options: of the forward pass in which layers are looked at: attention in the form that users get.
        recording: of its layers; None if they are not compared.
        blocks: the paths of its blocks.
        floors: dtype -> name of a row -> `max_rel` that rounding explains; empty if it was not measured.
        notes: what was left out, one sentence each.
    """

    tap: Tap
    calls: dict[str, dict[str, Any]]
    outputs: dict[str, Arrays]
    layer_options: dict[str, Any]
    recording: Recording | None
    blocks: list[str]
    floors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def recorded(reference: Reference) -> Recording:
    """Returns the recording of a reference whose layers are compared."""
    assert reference.recording is not None
    return reference.recording


def record(
    tap: Tap,
    calls: dict[str, dict[str, Any]],
    layer_options: dict[str, Any] | None,
    layers: Sequence[str] | None = None,
) -> Reference:
    """Runs the reference.

    Args:
        tap: of a float64 model.
        calls: level -> options of its forward pass.
        layer_options: of the forward pass in which layers are looked at; None if they are not.
        layers: which ones; all by default. The outermost that are no containers count as blocks.

    Raises:
        MemoryError: even the blocks alone are too much to keep.
    """
    of_model = blocks(tap)
    if layers is None:
        layers = list(tap.layers)
    layers = [layer for layer in layers if block_of(layer, of_model) in of_model]
    of_model = [layer for layer in layers if not any(layer.startswith(f"{other}.") for other in layers)]
    outputs = {level: tap.run(**options) for level, options in calls.items()}
    reference = Reference(tap, calls, outputs, layer_options or {}, None, of_model)
    if layer_options is None:
        return reference
    try:
        reference.recording = Recording(layers, MAX_RECORDING)
        tap.run(reference.recording, **layer_options)
    except RecordingTooLarge:
        reference.notes.append("Only whole blocks are compared: recording all layers would take too much memory.")
        reference.recording = Recording([layer for layer in layers if layer in of_model])
        tap.run(reference.recording, **layer_options)
    return reference


def measure_floors(
    reference: Reference,
    dtypes: Sequence[str],
    own: Callable[[str], Tap],
    seed: int,
    on_run: Callable[[int, int], None] | None = None,
) -> None:
    """Measures what rounding does to the reference; see `parity.rounding`.

    Args:
        reference: which gets the floors.
        dtypes: to measure.
        own: makes the same model in another dtype, which is a draw too: long sums round more than their terms do.
        seed: of the draws.
        on_run: called as `on_run(number, total)` before each.
    """
    for dtype in dtypes:
        floors: dict[str, float] = {}
        for number in range(RUNS):
            if on_run is not None:
                on_run(number, RUNS)
            generator = np.random.default_rng((seed, number))
            with moved_weights(reference.tap, dtype, generator):
                for name, agreement in _moved_runs(reference, dtype, generator):
                    floors[name] = max(floors.get(name, 0.0), badness(agreement))
        narrower = "float32" if dtype == "float64" else dtype
        ratio = 2.0 ** (MANTISSA_BITS[narrower] - MANTISSA_BITS[dtype])  # rounding is proportional to its unit
        narrow = own(narrower)
        for number in range(OWN_RUNS):
            for row in _own_run(reference, narrow, narrower, np.random.default_rng((seed, RUNS + number))):
                if row.agreement.max_rel == row.agreement.max_rel:
                    floors[row.name] = max(floors.get(row.name, 0.0), OTHER_ORDER * ratio * row.agreement.max_rel)
        reference.floors[dtype] = floors


def _own_run(reference: Reference, narrow: Tap, dtype: str, generator: np.random.Generator) -> list[Row]:
    """Compares the model in another dtype with itself in float64, both with the same weights, moved a little."""
    with moved_weights(reference.tap, dtype, generator, OWN_UNITS):
        share_weights(reference.tap, narrow)
        layers = None if reference.recording is None else list(reference.recording.layers)
        options = None if reference.recording is None else reference.layer_options
        moved_reference = record(reference.tap, reference.calls, options, layers)
        return compare_pass("", narrow, ("torch", dtype), moved_reference, strict=False)[0]


def _moved_runs(reference: Reference, dtype: str, generator: np.random.Generator) -> Iterator[tuple[str, Agreement]]:
    unit = 2.0 ** (1 - MANTISSA_BITS[dtype])  # even right results are a unit in the last place apart
    for level, options in reference.calls.items():
        nothing = Comparing(Recording([]), [], None, math.inf)
        found = reference.tap.run(Moving(nothing, dtype, generator), **options)
        scale = scales(reference.outputs[level])
        for name, agreement in _compare_outputs(level, found, reference.outputs[level], math.inf).items():
            yield name, at_least(agreement, reference.outputs[level][name], scale[name], unit)
    for mode in MODES:
        comparing = _comparing(reference, mode, None, math.inf, unit=unit)
        if comparing is not None:
            reference.tap.run(Moving(comparing, dtype, generator), **reference.layer_options)
            for finding in comparing.findings():
                yield _row_name(mode, finding.layer), finding.agreement


def compare_pass(
    model: str,
    tap: Runnable,
    run: Run,
    reference: Reference,
    *,
    names: Mapping[str, str] | None = None,
    strict: bool = True,
) -> tuple[list[Row], dict[str, Arrays], WorstArray | None]:
    """Compares one run of one half with the reference.

    Args:
        model: what to call it.
        tap: of the half's model.
        run: its half and dtype.
        reference: what to compare with.
        names: the model's name of each layer -> the reference's; None if they are equal.
        strict: whether arrays of another dtype than the run's are failures.

    Returns:
        The rows, the arrays by level for `judge_balance`, and the layer with the largest difference.
    """
    dtype, worst = run[1], None
    outputs = {level: tap.run(**options) for level, options in reference.calls.items()}
    rows = compare_outputs(model, outputs, run, reference, strict=strict)
    for mode in MODES:
        comparing = _comparing(reference, mode, dtype if strict else None, dtype, names)
        if comparing is not None:
            tap.run(comparing, **reference.layer_options)
            of_mode = _layer_rows(model, run, mode, comparing, reference)
            rows += of_mode
            worst = worst_of(worst, _worst(comparing, of_mode, mode))
    return rows, outputs, worst


def compare_outputs(
    model: str, outputs: Mapping[str, Arrays], run: Run, reference: Reference, *, strict: bool = True
) -> list[Row]:
    """Compares what the calls of the reference gave, `outputs` by level; as `compare_pass` otherwise."""
    half, dtype = run
    rows = []
    for level, actual in outputs.items():
        for name, agreement in _compare_outputs(level, actual, reference.outputs[level], BOUNDS[dtype]).items():
            if strict and name in actual and actual[name].dtype != dtype:
                agreement = failed(agreement.tolerance, "dtype", f"dtype {actual[name].dtype} in a {dtype} model")
            if name == "logits" and agreement.failure not in ("shape", "missing"):
                agreement = _with_top_k(agreement, actual[name], reference.outputs[level][name])
            rows.append(Row(model, level, name, dtype, _judge_rounding(agreement, reference, dtype, name), half))
    return rows


def _comparing(
    reference: Reference,
    mode: str,
    dtype: str | None,
    bound: str | float,
    names: Mapping[str, str] | None = None,
    unit: float = 0.0,
) -> Comparing | None:
    """Returns the observer of a mode; None if there is nothing to see in it."""
    recording = reference.recording
    if recording is None:
        return None
    forced = mode != "free"
    bounds = FORCED_BOUNDS if forced else BOUNDS
    tolerance = bounds[bound] if isinstance(bound, str) else bound
    layers: Collection[str] = recording.layers
    if mode == "block":  # those without parts are seen in the forced mode
        layers = [block for block in reference.blocks if any(layer.startswith(f"{block}.") for layer in layers)]
        if not layers:
            return None
    return Comparing(recording, layers, dtype, tolerance, forced=forced, split=mode == "forced", names=names, unit=unit)


def _layer_rows(model: str, run: Run, mode: str, comparing: Comparing, reference: Reference) -> list[Row]:
    half, dtype = run
    rows = []
    for finding in comparing.findings():
        name = _row_name(mode, finding.layer)
        agreement = _judge_rounding(finding.agreement, reference, dtype, name)
        mode_name, block = name.partition(".")[0], block_of(finding.layer, reference.blocks)
        rows.append(Row(model, "layers", name, dtype, agreement, half, mode_name, finding.order, block))
    return rows


def _row_name(mode: str, layer: str) -> str:
    return f"{'free' if mode == 'free' else 'forced'}.{layer}"


def _judge_rounding(agreement: Agreement, reference: Reference, dtype: str, name: str) -> Agreement:
    """Adds the rounding floor, if it was measured, and fails what it does not explain."""
    floor = reference.floors.get(dtype, {}).get(name)
    if floor is None or math.isnan(agreement.max_rel):
        return agreement
    agreement = dataclasses.replace(agreement, floor=floor)
    if agreement.passed and agreement.factor is not None and agreement.factor > EXPLAINED_FACTOR:
        reason = f"{agreement.factor:.1f} times what rounding does"
        return dataclasses.replace(agreement, passed=False, failure="rounding", reason=reason)
    return agreement


def _with_top_k(agreement: Agreement, actual: np.ndarray, reference: np.ndarray) -> Agreement:
    if actual.ndim != 2 or not (np.isfinite(actual).all() and np.isfinite(reference).all()):
        return agreement
    classes = reference.shape[1]
    return dataclasses.replace(
        agreement,
        top1=top_k_agreement(actual, reference, 1),
        top5=top_k_agreement(actual, reference, 5) if classes > 5 else None,
    )


def _compare_outputs(level: str, actual: Arrays, reference: Arrays, tolerance: float) -> dict[str, Agreement]:
    """Compares what a model gave at a level, kind by kind, since arrays of one kind share a scale."""
    agreements: dict[str, Agreement] = {}
    kinds = dict.fromkeys(name.partition(".")[0] for name in [*reference, *actual])
    for kind in sorted(kinds, key=lambda kind: kind == "loss"):
        if level == "layers" and kind not in ("hidden_states", "attentions"):
            continue  # outputs have a level of their own
        ours, theirs = (
            {name: array for name, array in arrays.items() if name.partition(".")[0] == kind}
            for arrays in (actual, reference)
        )
        agreements |= compare_all(ours, theirs, tolerance)
    return agreements


def judge_balance(rows: list[Row], outputs: Mapping[Run, Mapping[str, Arrays]], kinds: Sequence[str]) -> list[Row]:
    """Fails float32 rows that are within their bound, but much further from the reference than the other half's."""
    of_half = {(row.half, row.level, row.name): row.agreement for row in rows if row.dtype == "float32"}
    judged = []
    for row in rows:
        other = "torch" if row.half == "keras" else "keras"
        theirs = of_half.get((other, row.level, row.name))
        if row.dtype == "float32" and row.kind in kinds and theirs is not None:
            array = outputs.get((row.half, "float32"), {}).get(row.level, {}).get(row.name)
            size = 0 if array is None else array.size
            row = dataclasses.replace(row, agreement=_balanced(row.agreement, theirs, size, other))
        judged.append(row)
    return judged


def _balanced(mine: Agreement, theirs: Agreement, size: int, other_half: str) -> Agreement:
    if not mine.passed or not theirs.max_rel < mine.max_rel or balanced(mine, theirs, size):
        return mine
    ratio = f"{mine.max_rel / theirs.max_rel:.1f} times as far" if theirs.max_rel > 0 else "far"
    reason = f"{ratio} from the reference as {other_half} in float32"
    return dataclasses.replace(mine, passed=False, failure="balance", reason=reason)


def excuse_imbalance(rows: list[Row], again: list[Row], half: str) -> tuple[list[Row], list[str]]:
    """Passes rows that only the order in which oneDNN sums makes less exact than the other half's.

    Depending on the processor and on shapes, oneDNN adds the terms of a convolution or of a matrix product up one after
    the other, which rounds several times as much as sums in blocks do. A model that is balanced without oneDNN leaks no
    precision itself.

    Args:
        rows: judged by `judge_balance`.
        again: the same rows with the half computing without oneDNN, judged likewise.
        half: whose rows to judge again.

    Returns:
        The rows, and a note for the report if any was excused.
    """
    passed = {(row.half, row.level, row.name, row.dtype) for row in again if row.agreement.passed}
    judged, excused = [], []
    for row in rows:
        key = (row.half, row.level, row.name, row.dtype)
        if row.half == half and row.agreement.failure == "balance" and key in passed:
            excused.append(row.name)
            row = dataclasses.replace(
                row, agreement=dataclasses.replace(row.agreement, passed=True, failure="", reason="")
            )
        judged.append(row)
    names = ", ".join(dict.fromkeys(excused))
    other = "keras" if half == "torch" else "torch"
    note = f"{names}: {half} is further from the reference than {other} for the way oneDNN sums; without it, it is not."
    return judged, [note] if excused else []


def worst_of(first: WorstArray | None, second: WorstArray | None) -> WorstArray | None:
    """Returns the one of two arrays that is further beyond its bound, or nearer to it."""
    return max(
        (array for array in (first, second) if array is not None), key=lambda array: _rank(array.row), default=None
    )


def _worst(comparing: Comparing, rows: list[Row], mode: str) -> WorstArray | None:
    if comparing.worst is None:
        return None
    layer, difference = comparing.worst
    row = next(row for row in rows if row.name == _row_name(mode, layer))
    array = difference()
    scale = row.agreement.max_abs / row.agreement.max_rel if row.agreement.max_rel else 1.0
    heat, what = heat_map(array / scale if math.isfinite(scale) else array)
    return WorstArray(row, array.shape, what, heat)


def _rank(row: Row) -> float:
    return badness(row.agreement) / row.agreement.tolerance


def heat_map(array: np.ndarray) -> tuple[np.ndarray, str]:
    """Returns at most 64 x 64 numbers that show where an array is large, and in words what they are.

    Args:
        array: (B, C, H, W), (B, H, W, C), (B, N, C), (B, C) or of another shape, not negative.
    """
    axes = [axis for axis, size in enumerate(array.shape) if size > 1]
    array = array.reshape([array.shape[axis] for axis in axes] or [1])
    if array.ndim > 2:
        kept = sorted(np.argsort(array.shape)[-2:])
        array = array.max(axis=tuple(axis for axis in range(array.ndim) if axis not in kept))
        what = f"the largest along the other axes; down: axis {axes[kept[0]]}, across: axis {axes[kept[1]]}"
    elif array.ndim == 2:
        what = f"down: axis {axes[0]}, across: axis {axes[1]}"
    else:
        side = math.ceil(array.size**0.5)
        array = np.pad(array, (0, side * math.ceil(array.size / side) - array.size)).reshape(-1, side)
        what = f"axis {axes[0] if axes else 0}, line by line"
    for axis in (0, 1):
        step = math.ceil(array.shape[axis] / MAX_HEAT)
        array = np.maximum.reduceat(array, np.arange(0, array.shape[axis], step), axis=axis)
    return array, what
