"""A report as plain data, as `Report.to_dict()` gives it or a JSON file holds it, made ready for showing.

Reports of earlier versions lack fields: what may be absent is None or empty here.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from parity.choices import LEVELS

# XML 1.0 allows no other characters, and UTF-8 no lone surrogates
_NOT_ALLOWED = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TEXT_FIELDS = ("model", "level", "name", "dtype")
_NUMBER_FIELDS = ("max_abs", "max_rel", "mean_abs", "cosine", "tolerance", "floor", "factor")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; a number that is None was not finite or is not known."""

    model: str
    level: str
    name: str
    dtype: str
    half: str
    kind: str
    passed: bool
    reason: str
    mode: str
    block: str
    order: int | None
    max_abs: float | None
    max_rel: float | None
    mean_abs: float | None
    cosine: float | None
    tolerance: float | None
    floor: float | None
    factor: float | None

    @property
    def used(self) -> float | None:
        """`max_rel` as a part of the tolerance; None where there is no such number."""
        if self.max_rel is None or self.tolerance is None:
            return None
        if self.max_rel == 0.0:
            return 0.0
        return self.max_rel / self.tolerance if self.tolerance > 0 else None


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """One model: what the environment says of it, and its rows."""

    name: str
    facts: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.passed)

    @property
    def first_failed(self) -> Row | None:
        """The row that the report names as the first divergence, else the first that failed."""
        named = self.facts.get("first_divergence") or {}
        key = tuple(named.get(field) for field in ("name", "dtype", "half"))
        same = (row for row in self.failed if (row.name, row.dtype, row.half) == key)
        return next(same, next(iter(self.failed), None))

    @property
    def divergence(self) -> str:
        """A sentence on the first divergence, "" if there is none."""
        named = self.facts.get("first_divergence") or {}
        row = self.first_failed
        if named.get("sentence"):
            return named["sentence"]
        return f"{describe(row)} is the first row that failed." if row else ""

    def levels(self) -> dict[str, list[Row]]:
        """Level -> its rows, in the order of `LEVELS`."""
        found = dict.fromkeys(row.level for row in self.rows)
        known = [level for level in LEVELS if level in found]
        unknown = [level for level in found if level not in LEVELS]
        return {level: [row for row in self.rows if row.level == level] for level in [*known, *unknown]}


@dataclasses.dataclass(frozen=True)
class SavedReport:
    """A report of any age; text holds only characters that XML allows."""

    passed: bool
    environment: dict[str, Any]
    models: tuple[SavedModel, ...]
    skipped: dict[str, str]
    seconds: float | None

    @property
    def rows(self) -> list[Row]:
        return [row for model in self.models for row in model.rows]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]


def read_report(report: Mapping[str, Any]) -> SavedReport:
    """Reads the dictionary of `Report.to_dict()`.

    Args:
        report: `{"passed", "environment", "results"}`.

    Raises:
        ValueError: it is no such dictionary; the message names the entry.
    """
    _require(isinstance(report, Mapping), "a report", report, "a dictionary with passed, environment and results")
    results: Any = report.get("results")
    environment: Any = report.get("environment") or {}
    _require(isinstance(results, list | tuple), "results", results, "a list of rows")
    _require(isinstance(environment, Mapping), "environment", environment, "a dictionary")
    environment = _allowed(environment)
    models = environment.pop("models", None) or {}
    _require(isinstance(models, Mapping), "environment.models", models, "a dictionary, name to facts")
    skipped = environment.pop("skipped", None) or {}
    _require(isinstance(skipped, Mapping), "environment.skipped", skipped, "a dictionary, name to reason")
    seconds = _number(environment.pop("seconds", None), "environment.seconds")
    by_model: dict[str, list[Row]] = {name: [] for name in models}
    for index, row in enumerate(results):
        row = _row(row, f"results[{index}]")
        by_model.setdefault(row.model, []).append(row)
    saved = tuple(SavedModel(name, _facts(models.get(name), name), tuple(rows)) for name, rows in by_model.items())
    agreed = any(by_model.values()) and all(row.passed for rows in by_model.values() for row in rows)
    return SavedReport(agreed and report.get("passed", True) is True, environment, saved, dict(skipped), seconds)


def describe(row: Row) -> str:
    """Returns name, dtype and half."""
    return " ".join(part for part in (row.name, row.dtype, row.half) if part)


def number(value: float | None) -> str:
    """Returns a figure as text; what is not finite is "n/a"."""
    if value is None:
        return "n/a"
    return "0" if value == 0 else f"{value:.2e}"


def worst(values: list[float | None]) -> float | None:
    """Returns the largest, or None if one of them is not finite: that is the worst there is."""
    finite = [value for value in values if value is not None]
    return max(finite) if len(finite) == len(values) else None


def _row(row: Any, where: str) -> Row:
    _require(isinstance(row, Mapping), where, row, "a dictionary")
    row = _allowed(row)
    for field in _TEXT_FIELDS:
        _require(isinstance(row.get(field), str), f"{where}.{field}", row.get(field), "text")
    _require(isinstance(row.get("passed"), bool), f"{where}.passed", row.get("passed"), "true or false")
    order = row.get("order")
    _require(order is None or type(order) is int, f"{where}.order", order, "an integer or null")
    numbers: dict[str, Any] = {field: _number(row.get(field), f"{where}.{field}") for field in _NUMBER_FIELDS}
    for field, value in numbers.items():
        _require(field == "cosine" or value is None or value >= 0, f"{where}.{field}", value, "0 or more")
    for field in ("half", "kind", "reason", "mode", "block"):
        text = row.get(field)
        _require(text is None or isinstance(text, str), f"{where}.{field}", text, "text or null")
    return Row(
        **{field: row[field] for field in _TEXT_FIELDS},
        half=row.get("half") or "",
        kind=row.get("kind") or row["name"].partition(".")[0],
        passed=row["passed"],
        reason=row.get("reason") or "",
        mode=row.get("mode") or "",
        block=row.get("block") or "",
        order=order,
        **numbers,
    )


def _facts(facts: Any, name: str) -> dict[str, Any]:
    where = f"environment.models.{name}"
    facts = facts if facts is not None else {}
    _require(isinstance(facts, Mapping), where, facts, "a dictionary")
    for field in ("first_divergence", "worst"):
        value = facts.get(field)
        _require(value is None or isinstance(value, Mapping), f"{where}.{field}", value, "a dictionary or null")
    return dict(facts)


def _number(value: Any, where: str) -> float | None:
    numeric = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    _require(numeric, where, value, "a number or null")
    return float(value) if value is not None and math.isfinite(value) else None


def _allowed(value: Any) -> Any:
    """Returns plain data with what XML does not allow in its texts replaced."""
    if isinstance(value, str):
        return _NOT_ALLOWED.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, Mapping):
        return {_allowed(str(key)): _allowed(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_allowed(entry) for entry in value]
    return value


def _require(holds: bool, where: str, got: Any, wanted: str) -> None:
    if not holds:
        shown = repr(got)
        raise ValueError(f"{where} is {shown if len(shown) < 80 else shown[:77] + '...'}; it must be {wanted}")
