"""Showing a report: tables for people, JSON for programs. Text is ASCII, so that any terminal and any file takes it."""

import json
import math
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from modelspec.atomic_file import write_text
from parity.certificate import Verification
from parity.culprits import CULPRITS
from parity.explaining import Explanation
from parity.report import ModelReport, Report, Row, in_causal_order

_NARROW = 96  # columns; below it the table's columns stand closer


def print_opening(console: Console, reference: str = "PyTorch in float64") -> None:
    """Prints what the numbers below it mean."""
    console.print(Text(f"Reference: {reference}. max_rel = max_abs / scale of the array.", "dim"))
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
        if text:
            _print_labelled(console, label, text)
    console.print()
    console.print(_table(report, every_array, console.width))
    for result in report.results:
        if result.agreement.reason and result.mode is None:
            console.print(Text(f"{result.name} {result.dtype} {result.half}: {result.agreement.reason}", "red"))
    shares = []
    for name in ("top1", "top5"):
        found = [getattr(row.agreement, name) for row in report.results if getattr(row.agreement, name) is not None]
        shares += [f"{name} {min(found):.0%}"] if found else []
    if shares:
        console.print(Text(f"Same classes as the reference: {', '.join(shares)}.", "dim"))
    layers_failed = any(row.mode is not None and not row.agreement.passed for row in report.results)
    if layers_failed or (every_array and any(row.mode is not None for row in report.results)):
        console.print(block_tree(report, every_array=every_array))
    console.print()


def print_summary(console: Console, report: Report) -> None:
    """Prints what was skipped, where each model first diverges, and the closing line."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        _print_labelled(console, "Skipped", f"{', '.join(names)}: {reason}")
    for model in report.models:
        sentence = model.explain_divergence()
        if sentence is not None:
            console.print(Text(sentence, "bold red"), soft_wrap=True)
    count, failed = len(report.results), sum(not result.agreement.passed for result in report.results)
    of = f"{count} comparisons of {len(report.models)} model{'s' if len(report.models) > 1 else ''}"
    outcome = (f"{failed} of {of} FAILED", "bold red") if failed else (f"All {of} passed", "bold green")
    verdict = Text.assemble(outcome, f" in {report.seconds:.1f} s.")
    worst = Text(f"Worst max_rel: {', '.join(_worst(report))}.")
    separator = " " if len(verdict) + len(worst) < console.width else "\n"
    console.print(Text(separator).join([verdict, worst]))


def block_tree(report: ModelReport, *, every_array: bool = False) -> Tree:
    """Returns the blocks in the order of computing, each with what it does by itself and what reaches it.

    A block that differs by itself is unfolded into its parts. Colours go from green, far below the bound, to red.

    Args:
        report: of a model whose layers were compared.
        every_array: unfold all blocks.
    """
    rows = [row for row in report.results if row.mode is not None]
    tree = Tree(
        Text("blocks: max_rel given right inputs (forced) / from the image on (free)", "dim"), guide_style="dim"
    )
    for dtype, half in dict.fromkeys((row.dtype, row.half) for row in rows):
        of_run = in_causal_order(row for row in rows if (row.dtype, row.half) == (dtype, half))
        if not every_array and all(row.agreement.passed for row in of_run):
            continue
        branch = tree.add(Text(f"{dtype} {half}", "bold"))
        for block in dict.fromkeys(row.block or "" for row in of_run):
            of_block = [row for row in of_run if row.block == block]
            whole = [row for row in of_block if row.layer == block]
            parts = [row for row in of_block if row.mode == "forced" and row.is_sub_layer]
            failed = [row for row in parts if not row.agreement.passed]
            if not whole and not failed and not every_array:
                continue  # a container whose own code is right
            leaf = branch.add(_block_line(block, whole, of_block))
            for row in parts if every_array else failed:
                part = (row.layer or "").removeprefix(f"{block}.").removeprefix(block).strip()
                leaf.add(_block_line(part, [row], [row]))
            if failed and not every_array and len(parts) > len(failed):
                leaf.add(Text(f"{len(parts) - len(failed)} other parts agree", "dim"))
    return tree


def _block_line(name: str, rows: list[Row], parts: list[Row]) -> Text:
    line = Text(name)
    for row in sorted(rows, key=lambda row: row.mode != "forced"):
        line.append("  " if row.mode == "forced" or len(rows) == 1 else " / ")
        line.append(_number(row.agreement.max_rel), _heat(row))
    failed = [row for row in parts if not row.agreement.passed and row.mode == "forced"]
    if failed:
        reason = next((row.agreement.reason for row in rows if row.agreement.reason), "")
        line.append(f"  FAIL{f': {reason}' if reason else ''}", "bold red")
    elif any(not row.agreement.passed for row in rows):
        line.append("  follows", "yellow")
    return line


def _heat(row: Row) -> str:
    """The colour of a difference: by the decades between it and its bound."""
    if not row.agreement.passed:
        return "red"
    if row.agreement.max_rel == 0:
        return "green"
    decades = math.log10(row.agreement.tolerance / row.agreement.max_rel)
    return "green" if decades > 2 else "green_yellow" if decades > 1 else "yellow" if decades > 0.3 else "dark_orange"


def print_explanations(console: Console, model: str, found: Sequence[Explanation]) -> None:
    """Prints what makes each layer differ."""
    if not found:
        console.print(Text(f"{model}: no layer differs, in float64 and given right inputs.", "bold green"))
        return
    for explanation in found:
        size = f"differs by {explanation.max_rel:.1e} of the scale, in float64 and given right inputs."
        console.print(Text.assemble((f"{model}, {explanation.place}", "bold"), f": {size}"), soft_wrap=True)
        if explanation.sentence:
            culprit = Text.assemble(("  Culprit: ", "dim"), (explanation.sentence, "bold yellow"))
            console.print(
                culprit.append(f" ({explanation.culprit}); with that the difference vanishes."), soft_wrap=True
            )
        else:
            tried = f" ({explanation.tried} changes of {len(CULPRITS)} kinds were tried)"
            console.print(Text.assemble(("  Unknown culprit", "bold yellow"), f"{tried}."), soft_wrap=True)


def print_verification(console: Console, folder: str, found: Verification) -> None:
    """Prints what a folder's `parity.json` is worth."""
    environment = found.found["environment"]
    made = f"made on {environment['date'][:10]} with " + ", ".join(
        f"{name} {environment['versions'][name]}" for name in ("keras", "tensorflow", "torch")
    )
    if not found.belongs:
        what = " and ".join(found.changed)
        text = f"{folder}: parity.json does not belong to these files: other {what} were checked. Check again."
        console.print(Text(text, "bold red"), soft_wrap=True)
        return
    count, failed = len(found.found["results"]), sum(not row["passed"] for row in found.found["results"])
    outcome = f"all {count} comparisons passed" if found.passed else f"{failed} of {count} comparisons FAILED"
    console.print(Text(f"{folder}: parity.json belongs to these files, {made}."), soft_wrap=True)
    levels = ", ".join(environment["levels"])
    console.print(Text(f"At the levels {levels}, {outcome}.", "bold green" if found.passed else "bold red"))


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
            yield f"{_number(_worst_of(values))} in {dtype}"


def _worst_of(values: Iterable[float]) -> float:
    """The largest value; NaN if there is one, which would get lost in max()."""
    values = list(values)
    return next((value for value in values if value != value), max(values))


def _table(report: ModelReport, every_array: bool, columns: int) -> Table:
    narrow = columns < _NARROW
    width = max(columns - (54 if narrow else 70), 20)  # of names
    padding = 0 if narrow else (0, 2, 0, 0)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding, header_style="dim")
    table.add_column("name", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("half", no_wrap=True)
    for name in ("max_abs", "max_rel", "cosine", "bound"):
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
                _number(_worst_of(agreement.max_abs for agreement in agreements)),
                _number(_worst_of(agreement.max_rel for agreement in agreements)),
                f"{-_worst_of(-agreement.cosine for agreement in agreements):.6f}",
                f"{agreements[0].tolerance:.0e}",
                Text("pass", "green") if passed else Text("FAIL", "bold red"),
            )
        table.add_section()
    return table


def _groups(rows: list[Row], every_array: bool) -> Iterator[tuple[str, list[Row]]]:
    """Yields (name, rows): several arrays of one kind share a row of the table if all of them passed.

    Of parameters, of which there are hundreds, those that passed share one even if others failed. Layers that failed
    have one for each way of comparing: a tree shows them.
    """
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        if of_kind[0].mode is not None:
            for verdict in (True, False):
                group = [row for row in of_kind if row.agreement.passed == verdict]
                if group:
                    yield f"{kind} ({len(group)} layer{'s' if len(group) > 1 else ''})", group
            continue
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
