"""Comparing the two halves: which arrays, against what, within which bound.

The reference is always what PyTorch computes in float64. In float64 Keras must equal it up to rounding; in float32 each
half must lie near it, and neither much further away than the other.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modelspec.agreement import BOUNDS, Agreement, balanced, compare_all
from modelspec.checkpoints import num_parameters, parameter_shapes
from modelspec.configs import ModelConfig, get_variant, list_models
from parity import gradients, operator, round_trip, training
from parity.environment import describe_environment
from parity.halves import HALVES, Arrays, import_frameworks
from parity.photograph import Photograph, pixel_values, read_photograph
from parity.report import Comparison, ModelReport, Report
from parity.subjects import Subject, checkpoint_subject, drawn_subject
from parity.variants import missing_halves, split_by_family

LEVELS = ("outputs", "layers", "gradients", "training", "weights", "op")
DEFAULT_LEVELS = ("outputs", "layers")
DTYPES = ("float64", "float32")

# Attention over n tokens is n x n numbers per head and layer: 12 heads over 3137 tokens are 900 MB in float64.
MAX_ATTENTION_TOKENS = 600

OnStep = Callable[[int, int, str], None]
OnModel = Callable[[ModelReport], None]


class ComparisonError(RuntimeError):
    """A comparison could not be made: a half failed to run, or there was nothing to compare."""


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
        levels: `"outputs"` are the logits and the loss for class 0, in one call as users make it; `"layers"` are the
            hidden states and, where a model has them, the attention probabilities; `"gradients"` those of the loss;
            `"training"` ten steps of each optimizer, in float64 (see `parity.training`); `"weights"` a round trip
            through files of both halves; `"op"` neighborhood attention alone, of NAT and DiNAT.
        dtypes: `"float64"` and `"float32"`; the reference is computed in float64 in any case.
        image: an image file; scikit-image's cat by default.
        size: (height, width) fed to the models instead of their processor's; ViT-MSN then interpolates its positions.
        seed: of drawn weights.
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
    photograph = read_photograph(image)
    subjects = [checkpoint_subject(checkpoint, seed, *names)] if checkpoint is not None else []

    on_step(0, 1, "importing TensorFlow and PyTorch")
    import_frameworks()
    skipped = {}
    if every_model:
        names, skipped = split_by_family(names)
    if checkpoint is None:
        subjects = [drawn_subject(name, seed, reduce=reduced) for name in names]
    for subject in subjects:
        lacking = missing_halves(subject.config.model_type)
        if lacking:
            raise ComparisonError(f"{subject.name}: {' and '.join(lacking)} cannot do {subject.config.model_type} yet")

    runs = _runs(dtypes)
    reports = []
    for number, subject in enumerate(subjects):

        def on_run(index: int, what: str, number: int = number, name: str = subject.name) -> None:
            on_step(number * len(runs) + index, len(subjects) * len(runs), f"{name}: {what}")

        report = _check_one(subject, photograph, size, levels, runs, seed, on_run)
        reports.append(report)
        if on_model is not None:
            on_model(report)
    environment = {
        **describe_environment(),
        "reference": "torch float64",
        "levels": [level for level in LEVELS if level in levels],
        "dtypes": [dtype for dtype in DTYPES if dtype in dtypes],
        "seed": seed,
        "weights": "drawn" if checkpoint is None else os.fspath(checkpoint),
        "image": {"name": photograph.name, "height_width": list(photograph.pixels.shape[:2])},
    }
    report = Report(environment, tuple(reports), skipped, time.perf_counter() - started)
    if not report.results:
        raise ComparisonError("nothing was compared: both halves have none of the models")
    return report


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


def _runs(dtypes: Sequence[str]) -> list[tuple[str, str]]:
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
    runs: list[tuple[str, str]],
    seed: int,
    on_run: Callable[[int, str], None],
) -> ModelReport:
    on_run(0, "weights")
    weights = subject.weights()
    images, described = pixel_values(photograph, subject.processor, size)
    calls, notes = _calls(subject.config, images.shape[2:], size is not None, levels)
    arrays = {}
    for index, (half, dtype) in enumerate(runs):
        on_run(index, f"{half} {dtype}")
        try:
            arrays[half, dtype] = HALVES[half](subject.config, weights, images, dtype, list(calls.values()))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ComparisonError(f"{subject.name}: the {half} half failed in {dtype}: {reason}") from error
    results = []
    for position, (level, options) in enumerate(calls.items()):
        _require_kinds(subject.name, options, arrays["torch", "float64"][position])
        of_level = {run: _of_level(level, per_call[position]) for run, per_call in arrays.items()}
        results += _compare(subject.name, level, of_level)
    further = {"gradients": _gradients, "training": _training, "weights": _weights, "op": _operator}
    for level, compare_level in further.items():
        if level in levels:
            on_run(len(runs), level)
            try:
                results += compare_level(subject, weights, images, runs, seed)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ComparisonError(f"{subject.name}: the comparison of its {level} failed: {reason}") from error
    return ModelReport(
        model=subject.name,
        extent=subject.extent,
        parameters=num_parameters(parameter_shapes(subject.config)),
        image=described,
        weights=subject.weights_from,
        trained=subject.trained,
        notes=(*subject.notes, *notes),
        results=tuple(results),
    )


def _gradients(subject: Subject, weights: Arrays, images: np.ndarray, runs, seed: int) -> list[Comparison]:
    options = _positions(subject.config, images.shape[2:]) | {"labels": np.zeros(1, np.int64)}
    found = {
        (half, dtype): gradients.GRADIENTS[half](subject.config, weights, images, dtype, options)
        for half, dtype in runs
    }
    reference = found.pop(("torch", "float64"))
    return [
        Comparison(subject.name, "gradients", f"gradients.{key}", dtype, agreement, half)
        for (half, dtype), actual in found.items()
        for key, agreement in gradients.compare_gradients(subject.config, actual, reference, dtype).items()
    ]


def _training(subject: Subject, weights: Arrays, images: np.ndarray, runs, seed: int) -> list[Comparison]:
    if ("keras", "float64") not in runs:
        return []
    images, labels = training.training_batch(images)
    config = training.without_dropout(subject.config)
    options = _positions(config, images.shape[2:])
    results = []
    for optimizer in training.OPTIMIZERS:
        for kind, agreements in training.compare_steps(config, weights, images, labels, optimizer, options).items():
            results += [
                Comparison(subject.name, "training", f"{optimizer}-{kind}.{key}", "float64", agreement, "keras")
                for key, agreement in agreements.items()
            ]
    return results


def _weights(subject: Subject, weights: Arrays, images: np.ndarray, runs, seed: int) -> list[Comparison]:
    return [
        Comparison(subject.name, "weights", f"weights.{key}", "float32", agreement, half)
        for half, actual in round_trip.round_trip(subject.config, weights).items()
        for key, agreement in round_trip.compare_bits(actual, weights).items()
    ]


def _operator(subject: Subject, weights: Arrays, images: np.ndarray, runs, seed: int) -> list[Comparison]:
    if subject.config.model_type not in ("nat", "dinat"):
        return []
    return [
        Comparison(subject.name, "op", f"{implementation}.{name}", dtype, agreement, half)
        for dtype in dict.fromkeys(dtype for _, dtype in runs)
        for half, implementation, name, agreement in operator.compare_operator(
            subject.config, images.shape[2:], dtype, seed
        )
    ]


def _positions(config: ModelConfig, image_size: tuple[int, int]) -> dict[str, bool]:
    """Returns the option that lets a ViT-MSN take images of another size than it was made for."""
    other = config.model_type == "vit_msn" and tuple(image_size) != (config.image_size, config.image_size)
    return {"interpolate_pos_encoding": True} if other else {}


def _calls(
    config: ModelConfig, image_size: tuple[int, int], resized: bool, levels: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the arguments of each level's forward pass, and notes on what is left out.

    The levels have a pass each, since asking for attention probabilities makes a model compute them another way.
    """
    common, notes, attentions = {}, [], {}
    if config.model_type == "vit_msn":
        if resized or tuple(image_size) != (config.image_size, config.image_size):
            common["interpolate_pos_encoding"] = True
            notes.append(f"Positions are interpolated: the model was made for {config.image_size}x{config.image_size}.")
        tokens = 1 + (image_size[0] // config.patch_size) * (image_size[1] // config.patch_size)
        if tokens <= MAX_ATTENTION_TOKENS:
            attentions = {"output_attentions": True}
        elif "layers" in levels:
            notes.append(f"Attentions are left out: with {tokens} tokens they are too large.")
    elif config.model_type in ("nat", "dinat"):
        attentions = {"output_attentions": True}
    calls = {}
    if "outputs" in levels:
        calls["outputs"] = dict(common)
        if config.num_labels > 1 and config.problem_type in (None, "single_label_classification"):
            calls["outputs"]["labels"] = np.zeros(1, np.int64)
    if "layers" in levels:
        calls["layers"] = {**common, **attentions, "output_hidden_states": True}
    return calls, notes


def _require_kinds(model: str, options: dict[str, Any], reference: Arrays) -> None:
    """Raises ComparisonError if the reference lacks arrays that were asked for: what is absent cannot disagree."""
    asked_by = {"labels": "loss", "output_hidden_states": "hidden_states", "output_attentions": "attentions"}
    given = {name.partition(".")[0] for name in reference}
    for kind in ("logits", *(kind for option, kind in asked_by.items() if option in options)):
        if kind not in given:
            raise ComparisonError(f"{model}: the torch half gave no {kind}, so there is nothing to compare")


_KINDS = {"outputs": ("logits", "loss"), "layers": ("hidden_states", "attentions")}


def _of_level(level: str, arrays: Arrays) -> dict[str, Arrays]:
    """Sorts one pass' arrays by kind."""
    return {
        kind: {name: array for name, array in arrays.items() if name.partition(".")[0] == kind}
        for kind in _KINDS[level]
    }


def _compare(model: str, level: str, arrays: dict[tuple[str, str], dict[str, Arrays]]) -> list[Comparison]:
    """Compares one level's arrays, given by (half, dtype) and kind."""
    results = []
    for (half, dtype), actual in arrays.items():
        if (half, dtype) == ("torch", "float64"):
            continue
        for kind, reference in arrays["torch", "float64"].items():
            agreements = compare_all(actual[kind], reference, BOUNDS[dtype])
            other = "torch" if half == "keras" else "keras"
            if dtype == "float32":
                others = compare_all(arrays[other, dtype][kind], reference, BOUNDS[dtype])
                agreements = {
                    name: _judge_balance(agreement, others.get(name), np.size(reference.get(name, ())), other)
                    for name, agreement in agreements.items()
                }
            results += [
                Comparison(model, level, name, dtype, agreement, half) for name, agreement in agreements.items()
            ]
    return results


def _judge_balance(mine: Agreement, other: Agreement | None, size: int, other_half: str) -> Agreement:
    """Fails an agreement that is within its bound but much further from the reference than the other half's."""
    if not mine.passed or other is None or not other.max_rel < mine.max_rel or balanced(mine, other, size):
        return mine
    ratio = f"{mine.max_rel / other.max_rel:.1f} times as far" if other.max_rel > 0 else "far"
    return dataclasses.replace(mine, passed=False, reason=f"{ratio} from the reference as {other_half} in float32")
