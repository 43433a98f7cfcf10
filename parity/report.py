"""What a check found, as plain data: one row per comparison, the models, the environment."""

import dataclasses
from typing import Any

from modelspec.agreement import Result


@dataclasses.dataclass(frozen=True)
class Comparison(Result):
    """One array of one half, compared with what PyTorch computes in float64.

    Attributes:
        half: whose array it is, `"keras"` or `"torch"`; in float64 always `"keras"`.
    """

    half: str

    @property
    def kind(self) -> str:
        """What arrays of this sort are called: `"logits"`, `"hidden_states"`, `"adam-parameters"`, ..."""
        return self.name.partition(".")[0]

    @property
    def index(self) -> int:
        """The number in the name, 0 where there is none."""
        number = self.name.partition(".")[2]
        return int(number) if number.isdecimal() else 0

    def to_dict(self) -> dict:
        """Returns the row as plain values, for JSON."""
        return {**super().to_dict(), "half": self.half}


_KINDS = ("weights", "native", "composed", "hidden_states", "attentions", "logits", "loss", "gradients")


def _order_of_divergence(row: Comparison) -> tuple:
    kind = _KINDS.index(row.kind) if row.kind in _KINDS else len(_KINDS)  # training comes last
    return kind, row.dtype != "float64", row.index


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
        notes: what was left out or replaced, one sentence each.
        results: the comparisons.
    """

    model: str
    extent: str
    parameters: int
    image: str
    weights: str
    trained: bool
    notes: tuple[str, ...]
    results: tuple[Comparison, ...]

    @property
    def first_divergence(self) -> Comparison | None:
        """The earliest array that failed, in the order of computing: a hidden state if one failed, then others.

        A float64 row goes before a float32 row of a lower index: float64 decides.
        """
        failed = [result for result in self.results if not result.agreement.passed]
        return min(failed, key=_order_of_divergence, default=None)


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
    def results(self) -> list[Comparison]:
        """The comparisons of all models."""
        return [result for model in self.models for result in model.results]

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it agreed."""
        return bool(self.results) and all(result.agreement.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"passed", "environment", "results"}` as plain values, for JSON."""
        models = {}
        for model in self.models:
            models[model.model] = {
                name: getattr(model, name) for name in ("extent", "parameters", "image", "weights", "trained", "notes")
            }
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
