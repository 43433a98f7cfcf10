"""Comparing the two halves: which arrays, against what, within which bound.

The reference is always what PyTorch computes in float64. In float64 Keras must equal it up to rounding; in float32 each
half must lie near it, and neither much further away than the other.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modelspec.checkpoints import num_parameters, parameter_shapes
from modelspec.checkpoints.checkpoint import digest_arrays
from modelspec.configs import get_variant, list_models
from parity import halves
from parity.certificate import digest_config, write_certificate
from parity.choices import DEFAULT_LEVELS, DTYPES, LEVELS, WIDE_LEVELS
from parity.environment import describe_environment, exact_arithmetic
from parity.errors import ComparisonError, naming_failures
from parity.halves import Arrays, import_frameworks
from parity.layers import (
    Reference,
    Run,
    compare_outputs,
    compare_pass,
    excuse_imbalance,
    judge_balance,
    measure_floors,
    record,
    worst_of,
)
from parity.levels import FORWARD_KINDS, FURTHER_LEVELS, Task, compare_recorded, forward_calls
from parity.onednn import outputs_without_onednn
from parity.photograph import Photograph, pixel_values, read_photograph
from parity.recorded_runs import RecordedRun, read_run, require_same_weights, write_run
from parity.report import ModelReport, Report, Row, WorstArray
from parity.subjects import Subject, checkpoint_subject, drawn_subject
from parity.variants import missing_halves, smallest_of_families, split_by_family

OnStep = Callable[[int, int, str], None]
OnModel = Callable[[ModelReport], None]


def check(
    models: Sequence[str] = (),
    *,
    every_model: bool = False,
    checkpoint: str | os.PathLike | None = None,
    reduced: bool = False,
    levels: Sequence[str] = DEFAULT_LEVELS,
    dtypes: Sequence[str] = DTYPES,
    image: str | os.PathLike | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    calibrate: bool = False,
    save: str | os.PathLike | None = None,
    against: str | os.PathLike | None = None,
    keep_result: bool = True,
    on_step: OnStep | None = None,
    on_model: OnModel | None = None,
) -> Report:
    """Runs models in both halves, on one photograph and with the same weights, and compares what they give.

    Args:
        models: names of published variants (`modelspec.list_models`).
        every_model: compare all published variants instead, but for those of families that a half lacks.
        checkpoint: compare with the weights of this directory, file or Hub id instead of drawn ones. `models` may then
            be empty, or the one variant that the checkpoint must be of.
        reduced: compare reduced variants (`parity.variants.reduced`).
        levels: `"outputs"` are the logits and the loss for class 0, in one call as users make it; `"layers"` are all
            layers, free-running and given the reference's inputs (see `parity.blocks`), the hidden states and, where a
            model has them, the attention probabilities; `"gradients"` those of the loss; `"training"` ten steps of
            each optimizer, in float64 (see `parity.training`); `"preprocessing"` of images inside the frameworks
            against Pillow; `"weights"` a round trip through files of both halves; `"op"` neighborhood attention alone,
            of NAT and DiNAT; `"export"` each artefact, run in a fresh process, against the live model. Of all models
            at all levels, outputs and weights are compared of each, the other levels of the smallest of each family.
        dtypes: `"float64"` and `"float32"`; the reference is computed in float64 in any case.
        image: an image file; by default scikit-image's cat or, where that is not installed, a photograph of our own.
        size: (height, width) fed to the models instead of their processor's; ViT-MSN then interpolates its positions.
        seed: of drawn weights.
        calibrate: measure what rounding does to each array (see `parity.rounding`), and fail what it does not explain.
        save: write what the reference gives to this file (see `parity.recorded_runs`); of one model.
        against: compare outputs, hidden states and attentions with this recorded run instead, on its images.
        keep_result: write `parity.json` into the checkpoint's folder, if it is one here.
        on_step: called as `on_step(done, total, what)` before each part of the work.
        on_model: called with the report of each model when it is done.

    Raises:
        ValueError: an argument is not allowed, a variant is unknown, the image or the checkpoint cannot be used.
        OSError: the checkpoint cannot be found or reached.
        ImportError: TensorFlow or PyTorch is not installed.
        ComparisonError: a half failed to run, or nothing was compared.
    """
    started = time.perf_counter()
    on_step = on_step or (lambda done, total, what: None)
    _require("levels", levels, LEVELS)
    _require("dtypes", dtypes, DTYPES)
    names = _names(models, every_model, checkpoint, reduced)
    recorded = None if against is None else read_run(against)
    _require_one_model(names, checkpoint, save, against, image, size)
    photograph = read_photograph(image)
    subjects = [checkpoint_subject(checkpoint, seed, *names)] if checkpoint is not None else []

    on_step(0, 1, "importing TensorFlow and PyTorch")
    import_frameworks()
    skipped: dict[str, str] = {}
    if every_model:
        names, skipped = split_by_family(names)
    if checkpoint is None:
        subjects = [drawn_subject(name, seed, reduce=reduced) for name in names]
    for subject in subjects:
        lacking = missing_halves(subject.config.model_type)
        if lacking:
            raise ComparisonError(f"{subject.name}: {' and '.join(lacking)} cannot do {subject.config.model_type} yet")

    runs = _runs(dtypes)
    in_depth = {subject.name for subject in subjects}
    if every_model and set(levels) == set(LEVELS):
        in_depth = set(smallest_of_families(names))
    reports = []
    for number, subject in enumerate(subjects):

        def on_run(index: int, what: str, number: int = number, name: str = subject.name) -> None:
            on_step(number * len(runs) + index, len(subjects) * len(runs), f"{name}: {what}")

        chosen = [level for level in LEVELS if level in (levels if subject.name in in_depth else WIDE_LEVELS)]
        with exact_arithmetic():
            if recorded is None:
                compared = _check_one(subject, photograph, size, chosen, runs, seed, calibrate, save, on_run)
            else:
                compared = _check_recorded(subject, recorded, chosen, runs, on_run)
        reports.append(compared)
        if on_model is not None:
            on_model(compared)
    environment = {
        **describe_environment(),
        "reference": "torch float64" if against is None else os.fspath(against),
        "levels": [level for level in LEVELS if level in levels],
        "dtypes": [dtype for dtype in DTYPES if dtype in dtypes],
        "seed": seed,
        "calibrated": calibrate,
        "weights": "drawn" if checkpoint is None else os.fspath(checkpoint),
        "image": {"name": photograph.name, "height_width": list(photograph.pixels.shape[:2])},
    }
    report = Report(environment, tuple(reports), skipped, time.perf_counter() - started)
    if not report.results:
        raise ComparisonError("nothing was compared: both halves have none of the models")
    if keep_result and checkpoint is not None and Path(checkpoint).expanduser().is_dir():
        config = digest_config(subjects[0].config)
        write_certificate(Path(checkpoint).expanduser(), report.to_dict(), reports[0].sha256, config)
    return report


def _require_one_model(names: list[str], checkpoint: Any, save: Any, against: Any, image: Any, size: Any) -> None:
    for option, value in (("save", save), ("against", against)):
        if value is not None and len(names) != 1 and checkpoint is None:
            raise ValueError(f"{option}: a recorded run is of one model; {len(names)} are asked for")
    if against is not None and (save is not None or image is not None or size is not None):
        raise ValueError("against: a recorded run brings its own images; give no image, no size, and nothing to save")


def _require(what: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = [value for value in given if value not in allowed]
    if unknown or not given or isinstance(given, str):
        raise ValueError(f"{what} are {given!r}; give some of {', '.join(allowed)}")


def _names(models: Sequence[str], every_model: bool, checkpoint: Any, reduced: bool) -> list[str]:
    if every_model and (models or checkpoint is not None):
        raise ValueError("all models are asked for: name neither a model nor a checkpoint besides")
    if checkpoint is not None and (len(models) > 1 or reduced):
        raise ValueError("a checkpoint is one whole model: name at most one variant, and do not reduce it")
    if not (models or every_model or checkpoint is not None):
        raise ValueError("nothing to compare: name a model, a checkpoint, or ask for all models")
    return list_models() if every_model else list(dict.fromkeys(get_variant(name).name for name in models))


def _runs(dtypes: Sequence[str]) -> list[Run]:
    """The (half, dtype) pairs to run, the reference first."""
    runs = [("torch", "float64")]
    if "float64" in dtypes:
        runs.append(("keras", "float64"))
    if "float32" in dtypes:
        runs += [("torch", "float32"), ("keras", "float32")]
    return runs


def _check_one(
    subject: Subject,
    photograph: Photograph,
    size: tuple[int, int] | None,
    levels: Sequence[str],
    runs: list[Run],
    seed: int,
    calibrate: bool,
    save: str | os.PathLike | None,
    on_run: Callable[[int, str], None],
) -> ModelReport:
    on_run(0, "weights")
    weights = subject.weights()
    images, described = pixel_values(photograph, subject.processor, size)
    task = Task(subject, weights, images, photograph, tuple(runs), seed)
    calls, layer_options, notes = forward_calls(subject.config, images.shape[2:], size is not None, levels)
    results: list[Row] = []
    worst = None
    if calls:
        results, worst, reference = _forward(task, calls, layer_options, calibrate, on_run)
        notes += reference.notes
        if save is not None:
            _save_run(save, task, {name: a for arrays in reference.outputs.values() for name, a in arrays.items()})
            notes.append(f"The reference's outputs were written to {os.fspath(save)}.")
    elif save is not None:
        raise ValueError("save: there is something to save at the levels outputs and layers only")
    for level in levels:
        if level not in FURTHER_LEVELS:
            continue
        on_run(len(runs), level)
        with naming_failures(f"{subject.name}: the comparison of its {level} failed"):
            rows, more = FURTHER_LEVELS[level](task)
        results += rows
        notes += more
    return ModelReport(
        model=subject.name,
        extent=subject.extent,
        parameters=num_parameters(parameter_shapes(subject.config)),
        image=described,
        weights=subject.weights_from,
        trained=subject.trained,
        notes=(*subject.notes, *notes),
        results=tuple(results),
        sha256=digest_arrays(weights),
        worst=worst,
    )


def _forward(
    task: Task,
    calls: dict[str, dict[str, Any]],
    layer_options: dict[str, Any] | None,
    calibrate: bool,
    on_run: Callable[[int, str], None],
) -> tuple[list[Row], WorstArray | None, Reference]:
    """Compares what the forward pass computes; returns the rows, the worst layer's array, and the reference."""
    name, config = task.subject.name, task.subject.config
    tap = functools.partial(halves.tap, config=config, weights=task.weights, pixel_values=task.images)
    first, *others = task.runs
    on_run(0, " ".join(first))
    with naming_failures(f"{name}: the torch half failed in float64"):
        reference = record(tap(first[0], dtype=first[1]), calls, layer_options)
    for level, options in calls.items():
        _require_kinds(name, options, reference.outputs[level])
    if calibrate:

        def on_draw(number: int, total: int) -> None:
            on_run(0, f"rounding, draw {number + 1} of {total}")

        with naming_failures(f"{name}: the measurement of rounding failed"):
            measure_floors(reference, task.dtypes, lambda dtype: tap("torch", dtype=dtype), task.seed, on_draw)
    rows, outputs, worst = [], {}, None
    for index, (half, dtype) in enumerate(others, 1):
        on_run(index, f"{half} {dtype}")
        with naming_failures(f"{name}: the {half} half failed in {dtype}"):
            found, outputs[half, dtype], mine = compare_pass(name, tap(half, dtype=dtype), (half, dtype), reference)
        rows += found
        worst = worst_of(worst, mine)
    rows = judge_balance(rows, outputs, FORWARD_KINDS)
    for half in dict.fromkeys(row.half for row in rows if row.agreement.failure == "balance"):
        on_run(len(task.runs) - 1, f"{half} float32 without oneDNN")
        run = (half, "float32")
        with naming_failures(f"{name}: the {half} half failed in float32 without oneDNN"):
            of_half = outputs_without_onednn(half, config, task.weights, task.images, calls)
        again = compare_outputs(name, of_half, run, reference) + [row for row in rows if row.half != half]
        rows, excused = excuse_imbalance(rows, judge_balance(again, outputs | {run: of_half}, FORWARD_KINDS), half)
        reference.notes += excused
    halves.forget_models()
    return rows, worst, reference


def _save_run(path: str | os.PathLike, task: Task, outputs: Arrays) -> None:
    about = {
        "model": task.subject.name,
        "sha256": digest_arrays(task.weights),
        "dtype": "float64",
        "versions": {"torch": describe_environment()["versions"]["torch"]},
    }
    write_run(path, task.images, outputs, about)


def _check_recorded(
    subject: Subject,
    recorded: RecordedRun,
    levels: Sequence[str],
    runs: list[Run],
    on_run: Callable[[int, str], None],
) -> ModelReport:
    """Compares both halves with a recorded run."""
    if not set(levels) <= {"outputs", "layers"}:
        raise ValueError("against: a recorded run has the levels outputs and layers; give no others")
    on_run(0, "weights")
    weights = subject.weights()
    notes = require_same_weights(recorded, subject.name, digest_arrays(weights))
    results = []
    for index, (half, dtype) in enumerate(runs):
        on_run(index, f"{half} {dtype}")
        for case, (images, wanted) in recorded.cases.items():
            with naming_failures(f"{subject.name}: the {half} half failed in {dtype}"):
                tap = halves.tap(half, subject.config, weights, dtype, images)
                rows = compare_recorded(subject.name, case, tap, images.shape[2:], (half, dtype), wanted, levels)
            results += rows
    halves.forget_models()
    if not results:
        raise ComparisonError(f"nothing was compared: {recorded.path} has no arrays of the level {levels[0]}")
    sizes = ", ".join("x".join(map(str, images.shape)) for images, _ in recorded.cases.values())
    return ModelReport(
        model=subject.name,
        extent=subject.extent,
        parameters=num_parameters(parameter_shapes(subject.config)),
        image=f"pixel_values of {recorded.path}, {sizes}",
        weights=subject.weights_from,
        trained=subject.trained,
        notes=(*subject.notes, *notes),
        results=tuple(results),
        sha256=digest_arrays(weights),
    )


def _require_kinds(model: str, options: dict[str, Any], reference: Arrays) -> None:
    """Raises ComparisonError if the reference lacks arrays that were asked for: what is absent cannot disagree."""
    asked_by = {"labels": "loss", "output_hidden_states": "hidden_states", "output_attentions": "attentions"}
    given = {name.partition(".")[0] for name in reference}
    for kind in ("logits", *(kind for option, kind in asked_by.items() if option in options)):
        if kind not in given:
            raise ComparisonError(f"{model}: the torch half gave no {kind}, so there is nothing to compare")
