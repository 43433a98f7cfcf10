"""A report as one HTML file that needs nothing else: no network, no server; without script it shows what failed."""

import base64
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from modelspec.atomic_file import write_text
from parity.error_growth import draw_error_growth
from parity.heat_map import draw_heat_map
from parity.saved_report import Row, SavedModel, SavedReport, describe, number, read_report, worst

_FIGURES = ("order", "max_abs", "max_rel", "mean_abs", "used", "cosine", "tolerance", "floor", "factor")
_ALWAYS = ("max_abs", "max_rel", "used", "tolerance")
_TEXTS = ("name", "reason", "block", "mode")


def write_html(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Writes a report as a self-contained page to `path`, atomically.

    Args:
        path: the file.
        report: the dictionary of `Report.to_dict()`, or one that was read from its JSON; fields that earlier versions
            did not write may be absent.

    Raises:
        ValueError: it is no such dictionary; the message names the entry.
        OSError: the file cannot be written.
    """
    write_text(path, render_html(report))


def render_html(report: Mapping[str, Any]) -> str:
    """Returns the page that `write_html` writes."""
    saved = read_report(report)
    loader = PackageLoader("parity", "templates")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "share": _share, "duration": _duration}
    environment.globals |= {"anchor": _anchor, "describe": describe}
    style, script = (loader.get_source(environment, name)[0] for name in ("report.css", "report.js"))
    models = [_model(model) for model in saved.models]
    used = {name for model in models for level in model["levels"] for name in level["columns"]}
    return environment.get_template("report.html").render(
        report=saved,
        models=models,
        dtypes=list(dict.fromkeys(row.dtype for row in saved.rows)),
        environment=_flat(saved.environment),
        skipped=_by_reason(saved.skipped),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        columns=[name for name in _FIGURES if name in used],
        data=_embedded(saved, models),
    )


def _model(model: SavedModel) -> dict[str, Any]:
    levels = [_level(model.name, level, rows) for level, rows in model.levels().items()]
    return {
        "name": model.name,
        "anchor": _anchor(model.name),
        "facts": list(_facts(model.facts)),
        "passed": bool(model.rows) and not model.failed,
        "count": len(model.rows),
        "failed": model.failed,
        "worst": _worst_by_dtype(model.rows),
        "first": model.first_failed,
        "divergence": model.divergence,
        "levels": levels,
        "growth": draw_error_growth(model.rows, model.first_failed),
        "heat": _heat(model),
    }


def _facts(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    parameters = facts.get("parameters")
    if isinstance(parameters, int):
        facts = {**facts, "parameters": f"{parameters / 1e6:.1f} M"}
    for name in ("extent", "parameters", "image", "weights", "sha256"):
        if facts.get(name):
            yield name, _text(facts[name])
    yield from (("note", _text(note)) for note in facts.get("notes") or ())


def _level(model: str, level: str, rows: Sequence[Row]) -> dict[str, Any]:
    """One table: its columns, and a line for each kind, half and dtype."""
    columns = [name for name in _FIGURES if name in _ALWAYS or any(getattr(row, name) is not None for row in rows)]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.half, row.dtype), []).append(row)
    return {
        "level": level,
        "anchor": _anchor(model, level),
        "columns": columns,
        "groups": [_group(key, of_group) for key, of_group in groups.items()],
        "count": len(rows),
        "failed": [row for row in rows if not row.passed],
    }


def _group(key: tuple[str, str, str], rows: list[Row]) -> dict[str, Any]:
    """The worst of each figure, of a kind, half and dtype."""
    kind, half, dtype = key
    figures = {name: worst([getattr(row, name) for row in rows]) for name in ("max_abs", "max_rel", "used")}
    factors = [row.factor for row in rows if row.factor is not None]
    means = [row.mean_abs for row in rows if row.mean_abs is not None]
    cosines = [row.cosine for row in rows if row.cosine is not None]
    return {
        "kind": kind,
        "half": half,
        "dtype": dtype,
        "rows": rows,
        "failed": sum(not row.passed for row in rows),
        **figures,
        "order": None,
        "floor": None,
        "factor": max(factors, default=None),
        "mean_abs": max(means, default=None),
        "cosine": min(cosines) if len(cosines) == len(rows) else None,
        "tolerance": max((row.tolerance for row in rows if row.tolerance is not None), default=None),
    }


def _worst_by_dtype(rows: Iterable[Row]) -> dict[str, Row]:
    """Dtype -> the row of the largest `max_rel`; one that is not finite is larger than any."""
    found: dict[str, Row] = {}
    for row in rows:
        held = found.get(row.dtype)
        if held is None or (held.max_rel is not None and (row.max_rel is None or row.max_rel > held.max_rel)):
            found[row.dtype] = row
    return found


def _heat(model: SavedModel) -> dict[str, Any] | None:
    tensor = model.facts.get("worst") or {}
    if not tensor.get("heat"):
        return None
    drawing = draw_heat_map(tensor["heat"], f"environment.models.{model.name}.worst.heat")
    name = " ".join(str(tensor[field]) for field in ("name", "dtype", "half") if tensor.get(field))
    shape = "x".join(str(size) for size in tensor.get("shape") or ())
    return {**drawing, "name": name, "shape": shape, "what": tensor.get("what") or ""}


def _embedded(report: SavedReport, models: list[dict[str, Any]]) -> Markup:
    """All rows as JSON for the page's script: a list per column, or one value where all rows share it."""
    data = [
        {
            "name": model["name"],
            "levels": [
                {
                    "name": level["level"],
                    "columns": level["columns"],
                    "groups": [
                        {name: group[name] for name in ("kind", "half", "dtype")} | _columns(group["rows"])
                        for group in level["groups"]
                    ],
                }
                for level in model["levels"]
            ],
        }
        for model in models
    ]
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":  # so that no text can end the element it stands in
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _columns(rows: list[Row]) -> dict[str, Any]:
    columns = {name: [getattr(row, name) for row in rows] for name in (*_TEXTS, "passed")}
    for name in _FIGURES:
        if name != "used":  # the script divides
            columns[name] = [_rounded(getattr(row, name)) for row in rows]
    shared = {name: all(value == values[0] for value in values) for name, values in columns.items()}
    return {"count": len(rows)} | {
        name: values[0] if shared[name] else values
        for name, values in columns.items()
        if not (shared[name] and values[0] in (None, ""))
    }


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.7g}")


def _anchor(*parts: str) -> str:
    """Returns the place in the page of a model, a level or a row: `model/level/name/dtype/half`, as in the script."""
    return "/".join(quote(part, safe="!'()*") for part in parts if part)


def _share(value: float | None) -> str:
    """Returns a part of the tolerance in percent, as far as it tells anything."""
    if value is None:
        return "n/a"
    if value in (0.0, 1.0):
        return f"{value:.0%}"
    if value < 0.001:
        return "< 0.1%"
    return f"{value:.1%}" if value < 10 else f"{value:.1e} x"


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes} min {seconds - 60 * minutes:.0f} s" if minutes else f"{seconds:.1f} s"


def _flat(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (label, text) of whatever the environment holds; what is nested becomes "name value, name value"."""
    return [(name.replace("_", " "), _text(value)) for name, value in environment.items()]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_text(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        numeric = value and all(isinstance(entry, int) for entry in value)
        return ("x" if numeric else ", ").join(_text(entry) for entry in value)
    return "not known" if value is None else str(value)


def _by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    ordered = sorted(skipped.items(), key=lambda entry: str(entry[1]))
    return {
        str(reason): [name for name, _ in of_reason]
        for reason, of_reason in itertools.groupby(ordered, key=lambda entry: entry[1])
    }
