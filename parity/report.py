"""What a check found, as plain data: one row per comparison, the models, the environment."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from modelspec.agreement import Result
from parity.blocks import MODEL, OWN_CODE


@dataclasses.dataclass(frozen=True)
class Row(Result):
    """One array of one half, compared with what PyTorch computes in float64.

    Attributes:
        half: whose array it is, `"keras"` or `"torch"`; in float64 always `"keras"`.
        mode: of a layer, `"free"` or `"forced"` (see `parity.blocks`); else None.
        order: of a layer, its place in the order of computing; else None.
        block: of a layer, the block that it is or is part of; else None.
    """

    half: str
    mode: str | None = None
    order: int | None = None
    block: str | None = None

    @property
    def kind(self) -> str:
        """What arrays of this sort are called: `"logits"`, `"hidden_states"`, `"adam-parameters"`, ..."""
        return self.name.partition(".")[0]

    @property
    def index(self) -> int:
        """The number in the name, 0 where there is none."""
        number = self.name.partition(".")[2]
        return int(number) if number.isdecimal() else 0

    @property
    def layer(self) -> str | None:
        """The path of the layer, with `OWN_CODE` if only that was judged; None if the row is of no layer."""
        return None if self.mode is None else self.name.partition(".")[2]

    @property
    def is_sub_layer(self) -> bool:
        """Whether the row is of a layer within a block, or of the own code of one."""
        return self.mode is not None and self.layer != self.block

    def to_dict(self) -> dict:
        """Returns the row as plain values, for JSON."""
        return {**super().to_dict(), "half": self.half, "mode": self.mode, "order": self.order, "block": self.block}


_KINDS = (
    "weights",
    "eager",
    "graph",
    "native",
    "composed",
    "forced",
    "free",
    "hidden_states",
    "attentions",
    "logits",
    "loss",
)


def _order_of_divergence(row: Row) -> tuple:
    kind = _KINDS.index(row.kind) if row.kind in _KINDS else len(_KINDS)  # gradients and training come last
    return kind, row.dtype != "float64", row.index if row.order is None else row.order


def in_causal_order(rows: Iterable[Row]) -> list[Row]:
    """Returns rows of layers in the order of computing."""
    return sorted(rows, key=lambda row: row.order or 0)


@dataclasses.dataclass(frozen=True)
class WorstArray:
    """Where in an array the largest differences are.

    Attributes:
        row: which array.
        shape: its shape.
        what: which part of it the map shows, in words.
        heat: |difference| over the scale, (height, width), at most 64 x 64.
    """

    row: Row
    shape: tuple[int, ...]
    what: str
    heat: np.ndarray = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict:
        """Returns it as plain values, for JSON."""
        heat = [[float(f"{value:.3g}") if np.isfinite(value) else None for value in line] for line in self.heat]
        row = {name: getattr(self.row, name) for name in ("name", "dtype", "half")}
        return {**row, "shape": list(self.shape), "what": self.what, "heat": heat}


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """All comparisons of one model, and what they were made with.

    Attributes:
        model: the variant, or the checkpoint's name.
        extent: how much of it was compared, for example `"whole"`.
        parameters: number of parameters of what was compared.
        image: the photograph and its preprocessing, in words.
        weights: where the weights come from, in words.
        trained: whether they come from a checkpoint.
        sha256: of the weights as they were compared.
        notes: what was left out or replaced, one sentence each.
        results: the comparisons.
        worst: the array with the largest difference, if layers were compared.
    """

    model: str
    extent: str
    parameters: int
    image: str
    weights: str
    trained: bool
    notes: tuple[str, ...]
    results: tuple[Row, ...]
    sha256: str = ""
    worst: WorstArray | None = None

    @property
    def first_divergence(self) -> Row | None:
        """The earliest array that failed, in the order of computing: a layer if one failed, then others.

        Of layers, those that were given right inputs go first, and float64 before float32: float64 decides.
        """
        failures = [result for result in self.results if not result.agreement.passed]
        if any(row.mode == "forced" and row.is_sub_layer for row in failures):  # they say more than whole blocks
            failures = [row for row in failures if row.mode != "forced" or row.is_sub_layer or _is_leaf(row, failures)]
        return min(failures, key=_order_of_divergence, default=None)

    @property
    def diverging_blocks(self) -> list[str]:
        """The blocks that differ although they were given right inputs, in causal order; of float64 if it was run."""
        forced = [row for row in self.results if row.mode == "forced" and not row.agreement.passed]
        if any(row.dtype == "float64" for row in forced):
            forced = [row for row in forced if row.dtype == "float64"]
        return list(dict.fromkeys(row.block or "" for row in in_causal_order(forced)))

    def explain_divergence(self) -> str | None:
        """Says where the model first diverges, in one sentence; None if it does not."""
        row = self.first_divergence
        if row is None:
            return None
        where = describe_place(row) if row.mode else f"at {row.name}"
        size = (
            row.agreement.reason or f"{row.agreement.max_rel:.1e} of the scale, allowed {row.agreement.tolerance:.0e}"
        )
        others = [block for block in self.diverging_blocks if block != row.block] if row.mode == "forced" else []
        more = f"; so do, by themselves, {', '.join(others)}" if others else ""
        return f"{self.model} first diverges {where} ({row.dtype}, {row.half}: {size}){more}"


def describe_place(row: Row) -> str:
    """Says in words which layer a row is of, for example "in block encoder.layer.1, at its output.dense"."""
    layer, block = row.layer or "", row.block
    own = layer.endswith(OWN_CODE)
    layer = layer.removesuffix(OWN_CODE)
    if layer == MODEL and own:
        return "in the model's own code"
    if layer == block:
        return f"in the own code of {block}" if own else f"in {block}"
    part = layer.removeprefix(f"{block}.")
    return f"in {block}, {'in the own code of its' if own else 'at its'} {part}"


def _is_leaf(row: Row, failures: list[Row]) -> bool:
    """Whether none of a block's parts is among the failures."""
    return not any(other.block == row.block and other.is_sub_layer and other.mode == "forced" for other in failures)


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `parity.check`.

    Attributes:
        environment: versions, machine, threads, seed, weights, image, and one entry per model.
        models: what was found, model by model.
        skipped: variants that were asked for as a group and cannot be compared -> the reason.
        seconds: how long it took.
    """

    environment: dict[str, Any]
    models: tuple[ModelReport, ...]
    skipped: dict[str, str]
    seconds: float

    @property
    def results(self) -> list[Row]:
        """The comparisons of all models."""
        return [result for model in self.models for result in model.results]

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it agreed."""
        return bool(self.results) and all(result.agreement.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"passed", "environment", "results"}` as plain values, for JSON."""
        plain = ("extent", "parameters", "image", "weights", "trained", "sha256", "notes")
        models = {}
        for model in self.models:
            models[model.model] = {name: getattr(model, name) for name in plain}
            models[model.model]["notes"] = list(model.notes)
            models[model.model]["first_divergence"] = _divergence_to_dict(model)
            models[model.model]["diverging_blocks"] = model.diverging_blocks
            models[model.model]["worst"] = None if model.worst is None else model.worst.to_dict()
        return {
            "passed": self.passed,
            "environment": {
                **self.environment,
                "models": models,
                "skipped": self.skipped,
                "seconds": round(self.seconds, 3),
            },
            "results": [result.to_dict() for result in self.results],
        }


def _divergence_to_dict(model: ModelReport) -> dict[str, Any] | None:
    row = model.first_divergence
    if row is None:
        return None
    plain = {name: getattr(row, name) for name in ("name", "block", "mode", "dtype", "half")}
    return {**plain, "reason": row.agreement.reason, "sentence": model.explain_divergence()}
