"""Showing a report: tables for people, JSON for programs. Text is ASCII, so that any terminal and any file takes it."""

import json
import os
import textwrap
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelspec.atomic_file import write_text
from parity.report import Comparison, ModelReport, Report

_NARROW = 96  # columns; below it the table's columns stand closer


def print_opening(console: Console) -> None:
    """Prints what the numbers below it mean."""
    console.print(Text("Reference: PyTorch in float64. max_rel = max_abs / scale of the array.", "dim"))
    console.print()


def print_model(console: Console, report: ModelReport, *, every_array: bool = False) -> None:
    """Prints one model: what was compared, the table, and why rows failed.

    Args:
        console: where to.
        report: the model.
        every_array: give each array a row; else arrays of a kind that all agree share one, with the worst of each.
    """
    heading = Text.assemble((report.model, "bold"), f"  {report.extent}, {_millions(report.parameters)} parameters")
    console.print(heading)
    for label, text in (("Image", report.image), ("Weights", report.weights), *(("Note", n) for n in report.notes)):
        _print_labelled(console, label, text)
    console.print()
    console.print(_table(report, every_array, console.width))
    for result in report.results:
        if result.agreement.reason:
            console.print(Text(f"{result.name} {result.dtype} {result.half}: {result.agreement.reason}", "red"))
    console.print()


def print_summary(console: Console, report: Report) -> None:
    """Prints what was skipped, where each model first diverges, and the closing line."""
    by_reason = {}
    for name, reason in report.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        _print_labelled(console, "Skipped", f"{', '.join(names)}: {reason}")
    for model in report.models:
        first = model.first_divergence
        if first is not None:
            text = f"{model.model} first diverges at {first.name} ({first.dtype}, {first.half})"
            console.print(Text(text, "bold red"))
    count, failed = len(report.results), sum(not result.agreement.passed for result in report.results)
    of = f"{count} comparisons of {len(report.models)} model{'s' if len(report.models) > 1 else ''}"
    outcome = (f"{failed} of {of} FAILED", "bold red") if failed else (f"All {of} passed", "bold green")
    verdict = Text.assemble(outcome, f" in {report.seconds:.1f} s.")
    worst = Text(f"Worst max_rel: {', '.join(_worst(report))}.")
    separator = " " if len(verdict) + len(worst) < console.width else "\n"
    console.print(Text(separator).join([verdict, worst]))


def write_json(path: str | os.PathLike, report: Report) -> None:
    """Writes the report to `path`, atomically."""
    write_text(path, json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")


def _print_labelled(console: Console, label: str, text: str) -> None:
    first = f"{label:8}"
    lines = textwrap.wrap(text, console.width - len(first), break_on_hyphens=False) or [""]
    for line in lines:
        console.print(Text.assemble((first if line is lines[0] else " " * len(first), "dim"), line), soft_wrap=True)


def _worst(report: Report) -> Iterator[str]:
    for dtype in ("float64", "float32"):
        values = [result.agreement.max_rel for result in report.results if result.dtype == dtype]
        if values:
            # a NaN is the worst there is, and would get lost in max()
            worst = next((value for value in values if value != value), max(values))
            yield f"{_number(worst)} in {dtype}"


def _table(report: ModelReport, every_array: bool, columns: int) -> Table:
    narrow = columns < _NARROW
    width = max(columns - (54 if narrow else 70), 20)  # of names
    padding = 0 if narrow else (0, 2, 0, 0)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding, header_style="dim")
    table.add_column("name", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("half", no_wrap=True)
    for name in ("max_abs", "max_rel", "cosine", "tolerance"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for dtype, half in dict.fromkeys((result.dtype, result.half) for result in report.results):
        rows = [result for result in report.results if (result.dtype, result.half) == (dtype, half)]
        for name, group in _groups(rows, every_array):
            agreements = [result.agreement for result in group]
            passed = agreements[0].passed
            table.add_row(
                Text(_shortened(name, width), "" if passed else "red"),
                dtype,
                half,
                _number(max(agreement.max_abs for agreement in agreements)),
                _number(max(agreement.max_rel for agreement in agreements)),
                f"{min(agreement.cosine for agreement in agreements):.6f}",
                f"{agreements[0].tolerance:.0e}",
                Text("pass", "green") if passed else Text("FAIL", "bold red"),
            )
        table.add_section()
    return table


def _groups(rows: list[Comparison], every_array: bool) -> Iterator[tuple[str, list[Comparison]]]:
    """Yields (name, rows): several arrays of one kind share a row of the table if all of them passed.

    Of parameters, of which there are hundreds, those that passed share one even if others failed.
    """
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        numbered = any(row.index for row in of_kind)
        passed = [row for row in of_kind if row.agreement.passed]
        shared = [] if every_array or (numbered and len(passed) < len(of_kind)) else passed
        if len(shared) > 1:
            yield f"{kind}.{shared[0].index}-{shared[-1].index}" if numbered else f"{kind} ({len(shared)})", shared
        yield from ((row.name, [row]) for row in of_kind if len(shared) < 2 or not row.agreement.passed)


def _shortened(name: str, width: int) -> str:
    """Returns the name with its middle left out, if it is too long; the end tells most."""
    if len(name) <= width:
        return name
    kind = name.partition(".")[0] + "..."
    return kind + name[len(kind) - width :]


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
