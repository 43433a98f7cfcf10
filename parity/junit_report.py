"""A report as JUnit XML, which CI systems show: a suite for each model, a case for each comparison."""

import os
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from modelspec.atomic_file import write_text
from parity.saved_report import Row, SavedModel, SavedReport, number, read_report


def write_junit(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Writes a report as JUnit XML to `path`, atomically.

    Args:
        path: the file.
        report: the dictionary of `Report.to_dict()`, or one that was read from its JSON.

    Raises:
        ValueError: it is no such dictionary; the message names the entry.
        OSError: the file cannot be written.
    """
    root = _suites(read_report(report))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    write_text(path, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')


def _suites(report: SavedReport) -> ElementTree.Element:
    counts = {"tests": len(report.rows), "failures": len(report.failed), "errors": 0, "time": report.seconds or 0}
    root = ElementTree.Element("testsuites", _texts({"name": "parity", **counts}))
    for model in report.models:
        root.append(_suite(model, report.environment))
    return root


def _suite(model: SavedModel, environment: Mapping[str, Any]) -> ElementTree.Element:
    counts = {"tests": len(model.rows), "failures": len(model.failed), "errors": 0, "skipped": 0}
    when = {"timestamp": environment["date"]} if environment.get("date") else {}
    suite = ElementTree.Element("testsuite", _texts({"name": model.name, **counts, **when}))
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in [*_flat("", environment), *_flat("", {k: v for k, v in model.facts.items() if k != "worst"})]:
        ElementTree.SubElement(properties, "property", {"name": name, "value": value})
    suite.extend(_case(row) for row in model.rows)
    return suite


def _case(row: Row) -> ElementTree.Element:
    names = {"classname": f"{row.model}.{row.level}", "name": f"{row.name} {row.dtype} {row.half}".strip()}
    case = ElementTree.Element("testcase", {**names, "time": "0"})
    if not row.passed:
        figures = f"max_rel {number(row.max_rel)} of the scale, allowed {number(row.tolerance)}"
        message = f"{row.reason}: {figures}" if row.reason else figures
        failure = ElementTree.SubElement(case, "failure", {"type": "difference", "message": message})
        failure.text = f"max_abs {number(row.max_abs)}, {message}"
    return case


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns ("versions.torch", "2.13.0") for nested values."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(f"{prefix}{name}.", value)
        elif value not in (None, "", []):
            found.append((prefix + name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}
