"""What is compared at each level, as rows of a report."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modelspec.agreement import BOUNDS, FLOAT32_GOLDEN_BOUND, compare_all
from modelspec.configs import ModelConfig
from parity import exporting, gradients, operator, preprocessing, round_trip, training
from parity.layers import Arrays, Run
from parity.photograph import Photograph
from parity.report import Row
from parity.subjects import Subject
from parity.taps import Tap

FORWARD_KINDS = ("logits", "loss", "hidden_states", "attentions")

# Attention over n tokens is n x n numbers per head and layer: 12 heads over 3137 tokens are 900 MB in float64.
MAX_ATTENTION_TOKENS = 600


@dataclasses.dataclass(frozen=True)
class Task:
    """One model to compare, ready to run.

    Attributes:
        subject: the model.
        weights: checkpoint key -> array.
        images: (1, C, H, W) float32.
        photograph: what they were made of.
        runs: the (half, dtype) pairs to run, the reference first.
        seed: of what is drawn.
    """

    subject: Subject
    weights: Arrays
    images: np.ndarray
    photograph: Photograph
    runs: tuple[Run, ...]
    seed: int

    @property
    def dtypes(self) -> list[str]:
        """The dtypes that are compared."""
        return list(dict.fromkeys(dtype for _, dtype in self.runs[1:]))


Rows = tuple[list[Row], list[str]]  # and notes on what was left out


def forward_calls(
    config: ModelConfig, image_size: tuple[int, int], resized: bool, levels: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None, list[str]]:
    """Returns the options of each level's forward pass, those of the pass that layers are looked at in, and notes.

    The levels have a pass each, since asking for attention probabilities makes a model compute them another way.
    """
    common: dict[str, Any] = {}
    attentions: dict[str, Any] = {}
    notes = []
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
    calls: dict[str, dict[str, Any]] = {}
    if "outputs" in levels:
        calls["outputs"] = dict(common)
        if config.num_labels > 1 and config.problem_type in (None, "single_label_classification"):
            calls["outputs"]["labels"] = np.zeros(1, np.int64)
    if "layers" in levels:
        calls["layers"] = {**common, **attentions, "output_hidden_states": True}
    return calls, common if "layers" in levels else None, notes


def _positions(config: ModelConfig, image_size: tuple[int, int]) -> dict[str, bool]:
    """Returns the option that lets a ViT-MSN take images of another size than it was made for."""
    other = config.model_type == "vit_msn" and tuple(image_size) != (config.image_size, config.image_size)
    return {"interpolate_pos_encoding": True} if other else {}


def compare_recorded(
    model: str, case: str, tap: Tap, image_size: tuple[int, int], run: Run, wanted: Arrays, levels: Sequence[str]
) -> list[Row]:
    """Compares what a model gives with the recorded arrays of one case.

    Args:
        model: what to call it.
        case: the name of the case, which precedes the arrays' in the rows; "" if there is only one.
        tap: of the model, with the recorded images.
        image_size: their height and width.
        run: its half and dtype.
        wanted: the recorded arrays by name.
        levels: "outputs" for the logits, "layers" for hidden states and attentions.
    """
    half, dtype = run
    options: dict[str, Any] = {"output_hidden_states": any(name.startswith("hidden_states") for name in wanted)}
    if any(name.startswith("attentions") for name in wanted):
        options["output_attentions"] = True
    found = tap.run(**options | _positions(tap.model.config, image_size))
    rows = []
    for kind in FORWARD_KINDS:
        of_kind = {name: array for name, array in wanted.items() if name.partition(".")[0] == kind}
        level = "outputs" if kind == "logits" else "layers"
        if not of_kind or level not in levels:
            continue
        narrow = next(iter(of_kind.values())).dtype != np.float64
        bound = max(BOUNDS[dtype], FLOAT32_GOLDEN_BOUND if narrow else 0.0)
        actual = {name: array for name, array in found.items() if name.partition(".")[0] == kind}
        for name, agreement in compare_all(actual, of_kind, bound).items():
            rows.append(Row(model, level, f"{case}.{name}" if case else name, dtype, agreement, half))
    return rows


def _gradients(task: Task) -> Rows:
    config = task.subject.config
    options = _positions(config, task.images.shape[2:]) | {"labels": np.zeros(1, np.int64)}
    found = {
        (half, dtype): gradients.GRADIENTS[half](config, task.weights, task.images, dtype, options)
        for half, dtype in task.runs
    }
    reference = found.pop(task.runs[0])
    return [
        Row(task.subject.name, "gradients", f"gradients.{key}", dtype, agreement, half)
        for (half, dtype), actual in found.items()
        for key, agreement in gradients.compare_gradients(config, actual, reference, dtype).items()
    ], []


def _training(task: Task) -> Rows:
    if ("keras", "float64") not in task.runs:
        return [], ["Training is compared in float64 only."]
    images, labels = training.training_batch(task.images)
    config = training.without_dropout(task.subject.config)
    options = _positions(config, images.shape[2:])
    rows = []
    for optimizer in training.OPTIMIZERS:
        steps = training.compare_steps(config, task.weights, images, labels, optimizer, options)
        for kind, agreements in steps.items():
            rows += [
                Row(task.subject.name, "training", f"{optimizer}-{kind}.{key}", "float64", agreement, "keras")
                for key, agreement in agreements.items()
            ]
    return rows, []


def _preprocessing(task: Task) -> Rows:
    return [
        Row(task.subject.name, "preprocessing", name, "float32", agreement, half)
        for half, name, agreement in preprocessing.compare_preprocessing(
            task.subject.processor, task.photograph, task.seed
        )
    ], []


def _weights(task: Task) -> Rows:
    return [
        Row(task.subject.name, "weights", f"weights.{key}", "float32", agreement, half)
        for half, actual in round_trip.round_trip(task.subject.config, task.weights).items()
        for key, agreement in round_trip.compare_bits(actual, task.weights).items()
    ], []


def _operator(task: Task) -> Rows:
    config, size = task.subject.config, task.images.shape[2:]
    if config.model_type not in ("nat", "dinat"):
        return [], []
    return [
        Row(task.subject.name, "op", f"{implementation}.{name}", dtype, agreement, half)
        for dtype in task.dtypes
        for half, implementation, name, agreement in operator.compare_operator(config, size, dtype, task.seed)
    ], []


def _export(task: Task) -> Rows:
    config, size = task.subject.config, task.images.shape[2:]
    return [
        Row(task.subject.name, "export", f"{artefact}.{case}", "float32", agreement, half)
        for half, artefact, case, agreement in exporting.compare_exports(config, task.weights, task.images)
    ], exporting.notes(config, size)


FURTHER_LEVELS: dict[str, Callable[[Task], Rows]] = {
    "gradients": _gradients,
    "training": _training,
    "preprocessing": _preprocessing,
    "weights": _weights,
    "op": _operator,
    "export": _export,
}
