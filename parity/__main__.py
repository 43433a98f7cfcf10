"""The command line: `python -m parity`, installed as `parity`."""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from parity.choices import DEFAULT_LEVELS, DTYPES, LEVELS
from parity.errors import ComparisonError

PASSED, DIVERGED, NOT_COMPARED = 0, 1, 2

_DESCRIPTION = "Run the Keras and the PyTorch model on one photograph, with the same weights, and compare them."
_EPILOG = """\
examples:
  parity check swiftformer-xs vit-msn-small    two variants, whole
  parity check --all                           every variant, two blocks per stage
  parity check --all --level all               all of it, in depth for one variant per family
  parity check --checkpoint DIR --image FILE   your weights, your photograph; leaves parity.json in DIR

The reference is what PyTorch computes in float64. In float64 Keras must equal it to
1e-10 of the scale of the array; in float32 both halves must lie within 1e-4, and neither
more than 4 times as far away as the other.

exit status: 0 all agree; 1 something diverged; 2 could not compare
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print the usage as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(NOT_COMPARED, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 (all agree), 1 (something diverged) or 2 (could not compare).

    Args:
        argv: the arguments; those of the process by default.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted")
    except SystemExit:  # rich gives up so when standard output is closed, as by `| head`
        return NOT_COMPARED
    except (ComparisonError, ImportError, OSError, ValueError) as error:
        return _fail(" ".join(str(error).split()) or type(error).__name__)
    except Exception as error:  # a defect of ours; left to Python it would end with status 1, as if models diverged
        return _fail(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _check(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from parity.checking import check
    from parity.report import ModelReport
    from parity.reporting import print_model, print_opening, print_summary, write_json

    for option in ("json", "html", "junit"):
        path = getattr(arguments, option)
        if path is not None and not path.absolute().parent.is_dir():
            return _fail(f"--{option}: there is no directory {path.absolute().parent}")
    console = Console(highlight=False, soft_wrap=False)
    with _progress() as (on_step, paused):
        printed: list[str] = []

        def on_model(report: ModelReport) -> None:
            with paused():
                if not printed:
                    print_opening(console, arguments.against or "PyTorch in float64")
                printed.append(report.model)
                print_model(console, report, every_array=arguments.verbose)

        report = check(
            arguments.models,
            every_model=arguments.all,
            checkpoint=arguments.checkpoint,
            reduced=arguments.reduced or (arguments.all and not arguments.full),
            levels=_chosen(arguments.level, LEVELS, DEFAULT_LEVELS),
            dtypes=_chosen(arguments.dtype, DTYPES, DTYPES),
            image=arguments.image,
            size=arguments.size,
            seed=arguments.seed,
            calibrate=arguments.calibrate,
            save=arguments.save,
            against=arguments.against,
            keep_result=not arguments.no_result,
            on_step=on_step,
            on_model=on_model,
        )
    print_summary(console, report)
    if arguments.json is not None:
        write_json(arguments.json, report)
    if arguments.html is not None:
        from parity.html_report import write_html

        write_html(arguments.html, report.to_dict())
    if arguments.junit is not None:
        from parity.junit_report import write_junit

        write_junit(arguments.junit, report.to_dict())
    return PASSED if report.passed else DIVERGED


def _explain(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from parity.explaining import explain
    from parity.reporting import print_explanations

    with _progress() as (on_step, _):
        on_step(0, 1, "comparing, then trying known culprits")
        found = explain(
            arguments.model,
            checkpoint=arguments.checkpoint,
            reduced=arguments.reduced,
            image=arguments.image,
            size=arguments.size,
            seed=arguments.seed,
        )
    print_explanations(Console(highlight=False), arguments.model or arguments.checkpoint, found)
    return DIVERGED if found else PASSED


def _verify(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from parity.certificate import verify
    from parity.reporting import print_verification

    found = verify(arguments.folder)
    print_verification(Console(highlight=False), arguments.folder, found)
    return PASSED if found.belongs and found.passed else DIVERGED


def _fail(message: str) -> int:
    print(f"parity: error: {message}", file=sys.stderr)
    return NOT_COMPARED


@contextlib.contextmanager
def _progress() -> Iterator[tuple]:
    """A progress bar on standard error if that is a terminal; yields `on_step` and a context that takes it away."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left, {task.description}"))
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("", total=1)

    def on_step(done: int, total: int, what: str) -> None:
        progress.update(task, completed=done, total=total, description=what, refresh=True)

    @contextlib.contextmanager
    def paused() -> Iterator[None]:
        progress.stop()
        yield
        progress.start()

    with progress:
        yield on_step, paused


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="parity", description="Prove that the Keras and the PyTorch half are the same.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    check = commands.add_parser(
        "check",
        help=_DESCRIPTION[0].lower() + _DESCRIPTION[1:-1],
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(run=_check)
    check.add_argument("models", metavar="MODEL", nargs="*", help="a published variant, such as swiftformer-xs")
    check.add_argument("--all", action="store_true", help="all variants of the families that both halves have, reduced")
    extent = check.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="whole variants (what named ones are anyway)")
    extent.add_argument("--reduced", action="store_true", help="at most two blocks per stage (what --all does anyway)")
    check.add_argument(
        "--level",
        action="append",
        type=_list_of((*LEVELS, "all")),
        metavar="LEVEL",
        help=f"{', '.join(LEVELS)}, or all; default {' and '.join(DEFAULT_LEVELS)}",
    )
    check.add_argument(
        "--dtype", action="append", type=_list_of(DTYPES), metavar="DTYPE", help=f"{' or '.join(DTYPES)}; default both"
    )
    _add_inputs(check)
    check.add_argument("--calibrate", action="store_true", help="measure rounding, and fail what it does not explain")
    check.add_argument("--save", metavar="FILE", help="write what the reference gives to this .npz file")
    check.add_argument("--against", metavar="FILE", help="compare with what was saved, on its images")
    check.add_argument("--no-result", action="store_true", help="leave no parity.json in the checkpoint's folder")
    check.add_argument("--json", metavar="FILE", type=Path, help="write the report to this file")
    check.add_argument("--html", metavar="FILE", type=Path, help="write it as a page for people")
    check.add_argument("--junit", metavar="FILE", type=Path, help="write it as JUnit XML, for CI systems")
    check.add_argument("-v", "--verbose", action="store_true", help="a row for every array")
    why = "Find the layers that differ, and which known mistake makes each difference vanish."
    explain = commands.add_parser("explain", help=why[0].lower() + why[1:-1], description=why)
    explain.set_defaults(run=_explain)
    explain.add_argument("model", metavar="MODEL", nargs="?", help="a published variant, such as swiftformer-xs")
    explain.add_argument("--reduced", action="store_true", help="at most two blocks per stage")
    _add_inputs(explain)
    whether = "Tell whether the parity.json of a folder still belongs to its files, and whether the check passed."
    verify = commands.add_parser("verify", help=whether[0].lower() + whether[1:-1], description=whether)
    verify.set_defaults(run=_verify)
    verify.add_argument("folder", metavar="DIR", help="a checkpoint that was checked")
    return parser


def _add_inputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", metavar="DIR", help="the weights of this checkpoint instead of random ones")
    command.add_argument(
        "--image",
        metavar="FILE",
        help="the photograph; default scikit-image's cat, or twinzoo's coffee where scikit-image is not installed",
    )
    command.add_argument("--size", metavar="HxW", type=_size, help="feed this size instead of the model's")
    command.add_argument("--seed", metavar="N", type=_seed, default=0, help="of random weights; default 0")


def _list_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        values = text.split(",")
        unknown = [value for value in values if value not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; allowed are {', '.join(allowed)}")
        return values

    return parse


def _chosen(given: Sequence[Sequence[str]] | None, everything: Sequence[str], default: Sequence[str]) -> list[str]:
    chosen = [value for values in given or [default] for value in values]
    return [value for value in everything if value in chosen or "all" in chosen]


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give height x width in pixels, such as 224x320")
    return int(match[1]), int(match[2])


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give an integer, 0 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
