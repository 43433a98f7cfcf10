"""The commands `twinzoo list`, `classify`, `evaluate` and `probe`."""

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from twinzoo.tables import indented, standard_output, table_of

DONE, FAILED = 0, 1
_CLASSIFIED_TOGETHER = 16
_SOURCE = "folder, file, Hub id or published variant"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands to those of `twinzoo`."""
    listing = commands.add_parser("list", help="list the published variants", description=_list.__doc__)
    listing.set_defaults(run=_list)
    listing.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help='such as "dinat-*"; default: all')
    listing.add_argument("--json", action="store_true", help="print JSON, with all that is known of each")

    classify = commands.add_parser("classify", help="say what images show", description=_classify.__doc__)
    classify.set_defaults(run=_classify)
    classify.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    _add_model(classify, ("tf", "torch"))
    classify.add_argument("--top", type=_whole, default=5, metavar="N", help="labels for each image (default: 5)")
    classify.add_argument("--json", action="store_true", help="print JSON, and nothing else")

    evaluate = commands.add_parser(
        "evaluate", help="measure a classifier on a folder of images", description=_evaluate.__doc__
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("folder", metavar="DIR", help="holds a folder of images for each class")
    _add_model(evaluate, ("tf", "torch", "both"))
    _add_reading(evaluate)

    probe = commands.add_parser(
        "probe", help="measure the features of a model on few images of each class", description=_probe.__doc__
    )
    probe.set_defaults(run=_probe)
    probe.add_argument("folder", metavar="DIR", help="class folders, of which a fifth is held out; or train and val")
    _add_model(probe, ("tf", "torch"))
    probe.add_argument(
        "--features",
        choices=("cls-before-norm", "cls", "pooled"),
        help="class token before or after the last norm (ViT-MSN, where the first is the default), or what a "
        "classifier is given (the default of the others)",
    )
    probe.add_argument(
        "--shots", type=_shots, default=(1, 2, 5), metavar="N,...", help="images of each class (default: 1,2,5)"
    )
    probe.add_argument("--splits", type=_whole, default=3, metavar="N", help="draws of these images (default: 3)")
    probe.add_argument("--seed", type=int, default=0, metavar="N", help="of draws and of what is held out (default: 0)")
    probe.add_argument("--c", type=float, default=4000.0, metavar="X", help="inverse of the penalty (default: 4000)")
    _add_reading(probe)


def _add_model(command: argparse.ArgumentParser, frameworks: Sequence[str]) -> None:
    command.add_argument("--model", metavar="SOURCE", required=True, help=_SOURCE)
    command.add_argument("--framework", choices=frameworks, default="torch", help="default: torch")


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch-size", type=_whole, default=32, metavar="N", help="images at a time (default: 32)")
    command.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    command.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give 1 or more")
    return int(text)


def _shots(text: str) -> tuple[int, ...]:
    return tuple(sorted({_whole(part.strip()) for part in text.split(",")}))


def _list(arguments: argparse.Namespace) -> int:
    """List the published variants: parameters, documented top-1 accuracy on ImageNet, side of the images, Hub id."""
    from modelspec.configs import get_variant, list_models

    names = list_models(arguments.pattern) or list_models(f"{arguments.pattern}*")
    if not names:
        raise ValueError(f"no published variant matches {arguments.pattern!r}; see twinzoo list")
    variants = [get_variant(name) for name in names]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(variant) for variant in variants], indent=2))
        return DONE
    _print_variants(variants)
    return DONE


def _print_variants(variants: Sequence[Any]) -> None:
    table = table_of("name", "params>", "top-1>", "size>", "Hub id")
    console = standard_output()
    ids = [f"{variant.hub_id}{'' if variant.hub_id_confirmed else '?'}" for variant in variants]
    longest = [max(map(len, texts)) for texts in ([variant.name for variant in variants], ids)]
    widths = _shared_width(console.width - len("  200.9M  86.6?   384  "), longest)
    for variant, hub_id in zip(variants, ids, strict=True):
        accuracy = "-" if variant.top1 is None else f"{variant.top1:.1f}{' ' if variant.top1_confirmed else '?'}"
        table.add_row(
            _wrapped(variant.name, widths[0]),
            f"{variant.parameter_count / 1e6:.1f}M",
            accuracy,
            str(variant.image_size),
            _wrapped(hub_id, widths[1]),
        )
    console.print(table)
    if any(not (variant.hub_id_confirmed and (variant.top1_confirmed or variant.top1 is None)) for variant in variants):
        console.print(
            "? not confirmed: sources disagree, or it is not sure that the figure is of these weights, or the id right",
            style="dim",
        )
    if any(variant.top1 is None for variant in variants):
        console.print("- published without a classifier", style="dim")


def _shared_width(room: int, longest: Sequence[int]) -> tuple[int, int]:
    """Shares the room between two columns: the second gets what the first leaves, at least half."""
    first = min(longest[0], max(room - longest[1], room // 2, 12))
    return first, max(room - first, 12)


def _wrapped(name: str, width: int) -> str:
    """Breaks a name after slashes and hyphens."""
    lines = [""]
    for piece in re.findall("[^-/]+[-/]?", name):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _classify(arguments: argparse.Namespace) -> int:
    """Say what images show: the most probable labels of each. An image that cannot be read is named, and the others are
    done; the exit status is 1 then."""
    from modelspec.images import read_image
    from modelspec.training import ArrayImages, EvaluationBatches
    from twinzoo.evaluating import label_probabilities, load_trained_classifier
    from twinzoo.halves import load_processor, predict_logits

    processor = load_processor(arguments.model)
    model = load_trained_classifier(arguments.framework, arguments.model)
    labels, found, broken = model.config.id2label, [], []
    for begin in range(0, len(arguments.images), _CLASSIFIED_TOGETHER):
        paths, images = [], []
        for path in arguments.images[begin : begin + _CLASSIFIED_TOGETHER]:
            try:
                images.append(read_image(path, name=path))
                paths.append(path)
            except ValueError as error:
                broken.append({"image": path, "error": str(error)})
                print(f"twinzoo: error: {' '.join(str(error).split())}", file=sys.stderr)
        if not images:
            continue
        batches = EvaluationBatches(
            ArrayImages(images, [0] * len(images)), len(labels), processor, _CLASSIFIED_TOGETHER
        )
        logits = predict_logits(arguments.framework, model, batches)
        for path, row in zip(paths, label_probabilities(logits, model.config), strict=True):
            first = (-row).argsort(kind="stable")[: arguments.top].tolist()
            guesses = [{"label": labels[number], "probability": float(row[number])} for number in first]
            found.append({"image": path, "labels": guesses})
            if not arguments.json:
                _print_guesses(path, guesses)
    if arguments.json:
        print(json.dumps({"model": arguments.model, "images": found, "broken": broken}, indent=2))
    return FAILED if broken else DONE


def _print_guesses(path: str, guesses: Sequence[dict]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = standard_output()
    block = "=" if console.options.ascii_only else "\u2501"
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=6, justify="right")
    table.add_column(width=20)
    table.add_column()
    for rank, guess in enumerate(guesses):
        bar = block * round(20 * guess["probability"])
        style = "bold" if rank == 0 else ""
        table.add_row(f"{guess['probability']:.1%}", Text(bar, "green"), Text(guess["label"], style))
    console.print(Text(path, "bold cyan"), soft_wrap=True)
    console.print(indented(table))


def _evaluate(arguments: argparse.Namespace) -> int:
    """Measure a classifier on a folder that holds a folder of images for each class, named as the labels are: top-1 and
    top-5 accuracy. A published variant is also measured with the transform that its published accuracy is of."""
    from twinzoo.evaluating import evaluate_folder

    frameworks = ("tf", "torch") if arguments.framework == "both" else (arguments.framework,)
    with _progress(quiet=arguments.json) as on_step:
        found = evaluate_folder(
            arguments.model,
            arguments.folder,
            frameworks,
            batch_size=arguments.batch_size,
            skip_broken=arguments.skip_broken,
            on_step=on_step,
        )
    _print_found(found, arguments.json, _print_evaluation)
    return DONE


def _print_found(found: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    _print_notes(found.notes)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)


def _print_evaluation(found: Any) -> None:
    from twinzoo.evaluating import FRAMEWORK_NAMES

    console = standard_output()
    _print_heading(console, found.model, f"{found.images:,} images of {found.classes} classes in {found.folder}")
    has_top5 = any(row.top5 is not None for row in found.measurements)
    table = table_of("transform", "half", "top-1>", *(["top-5>"] if has_top5 else []))
    before = None
    for row in found.measurements:
        top5 = [f"{row.top5:.2%}"] if row.top5 is not None else []
        words = row.transform if row.transform != before else ""
        table.add_row(words, FRAMEWORK_NAMES[row.framework], f"[bold]{row.top1:.2%}[/bold]", *top5)
        before = row.transform
    variant = found.variant
    if variant is not None and variant.top1 is not None:
        table.add_row("[dim]published[/dim]", "", f"[dim]{variant.top1:.2f}%[/dim]")
    console.print(table)
    if found.same_top1 is not None:
        console.print(
            f"The halves have the same first class for {found.same_top1:.2%} of the images; "
            f"their logits differ by at most {found.logit_difference:.1e} of their rms."
        )
    if variant is not None and variant.top1 is not None:
        doubt = "" if variant.top1_confirmed else ", not confirmed"
        console.print(f"Published{doubt}: {variant.top1_source}.", style="dim")


def _probe(arguments: argparse.Namespace) -> int:
    """Measure the features of a model, with or without a classifier: logistic regression is fitted to those of few
    images of each class, and of all, and measured on images that are held out, as MSN was evaluated."""
    from twinzoo.probing import probe_folder

    with _progress(quiet=arguments.json) as on_step:
        found = probe_folder(
            arguments.model,
            arguments.folder,
            arguments.framework,
            kind=arguments.features,
            shots=arguments.shots,
            splits=arguments.splits,
            seed=arguments.seed,
            c=arguments.c,
            batch_size=arguments.batch_size,
            skip_broken=arguments.skip_broken,
            on_step=on_step,
        )
    _print_found(found, arguments.json, _print_probe)
    return DONE


def _print_probe(found: Any) -> None:
    from twinzoo.evaluating import FRAMEWORK_NAMES

    console = standard_output()
    _print_heading(
        console, found.model, f"{found.features} features, {found.width} wide, of {FRAMEWORK_NAMES[found.framework]}"
    )
    table = table_of("images of each class", "accuracy>", "spread>", "draws>")
    for row in found.results:
        count = f"all {found.training_images:,} images" if row.shots == "all" else str(row.shots)
        spread = "" if row.spread is None else f"{row.spread:.2%}"
        table.add_row(count, f"[bold]{row.mean:.2%}[/bold]", spread, str(len(row.accuracies)))
    console.print(table)
    console.print(
        f"Mean and standard deviation over the draws, on {found.held_out_images:,} held-out images of {found.classes} "
        "classes.",
        style="dim",
    )


def _print_heading(console: Any, name: str, text: str) -> None:
    from rich.text import Text

    console.print(Text.assemble((name, "bold cyan"), "  ", text))


def _print_notes(notes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    for note in notes:
        console.print(Text(f"note: {note}", "yellow"), soft_wrap=True)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Yields `on_step(done, total, what)`, a progress bar on standard error if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left, {task.description}"))
    progress = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
    task = progress.add_task("", total=None)

    def on_step(done: int, total: int, what: str) -> None:
        if progress.tasks[0].description != what:
            progress.reset(task)
        progress.update(task, completed=done, total=total, description=what)

    with progress:
        yield on_step
