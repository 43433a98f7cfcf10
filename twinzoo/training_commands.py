"""The commands `twinzoo finetune` and `twinzoo digits`."""

import argparse
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twinzoo.processes import STRATEGIES, only_helps

_NOT_OFFERED = ("distillation",)  # follows from --teacher
_FROM_SCRATCH = {"learning_rate": 1e-3}  # where it differs from what suits a pretrained model
_HELP = {
    "epochs": "passes through the training images",
    "batch_size": "images per optimizer step",
    "learning_rate": "peak; default 1e-4, or 1e-3 from scratch",
    "min_learning_rate": "where the cosine ends",
    "warmup_epochs": "epochs in which the learning rate rises",
    "weight_decay": "of weights, not of norms, biases, bias tables and layer scales",
    "layer_decay": "factor on the learning rate per layer further from the head",
    "clip_norm": "limit of the norm of all gradients together",
    "label_smoothing": "part of the target that all classes share",
    "mixup": "alpha of mixup; 0: none",
    "crop_scale": "least part of the area that random crops keep; 1: no crops",
    "flip": "probability of a mirror image",
    "ema": "decay of the moving average of the weights",
    "accumulation_steps": "parts that a batch is cut into",
    "gradient_checkpointing": "compute blocks twice to save memory",
    "mixed_precision": "compute in bfloat16",
    "freeze": "last stage that is not trained: stem, stage1, ...",
    "seed": "of order, augmentation, dropping and fresh weights",
}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands to those of `twinzoo`."""
    finetune = commands.add_parser(
        "finetune",
        complete=_add_recipe,
        help="train a classifier on a folder of images",
        description="Train a classifier on a folder that holds a folder of images for each class (a fifth of each class"
        " is held out), or folders train and val of such. Run again after an interruption, it goes on after the last"
        " finished epoch.",
    )
    finetune.set_defaults(run=_finetune)
    finetune.add_argument("folder", metavar="DIR", help="the images")
    finetune.add_argument("--output", metavar="OUT", required=True, help="the folder of the checkpoint")
    finetune.add_argument("--model", metavar="SOURCE", required=True, help="folder, file, Hub id or published variant")
    finetune.add_argument("--framework", choices=("tf", "torch"), default="torch", help="default: torch")
    finetune.add_argument(
        "--strategy",
        choices=[strategy for strategies in STRATEGIES.values() for strategy in strategies],
        help="train on several devices: ddp and fsdp in the processes that torchrun starts, mirrored on those of this"
        " process, multiworker in the processes that --workers or TF_CONFIG lists",
    )
    finetune.add_argument("--replicas", type=int, metavar="N", help="of mirrored: devices (default: all GPUs)")
    finetune.add_argument(
        "--workers", metavar="HOST:PORT,...", help="of multiworker: all processes; the first one writes"
    )
    finetune.add_argument("--worker-index", type=int, metavar="N", help="of multiworker: which this one is, from 0")
    finetune.add_argument("--from-scratch", action="store_true", help="fresh weights; SOURCE is a published variant")
    finetune.add_argument("--image-size", type=int, metavar="N", help="side in pixels; default: the model's")
    finetune.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="config field that differs, value in JSON"
    )
    finetune.add_argument("--teacher", metavar="SOURCE", help="checkpoint that SwiftFormer's second head learns from")
    finetune.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    finetune.add_argument("--restart", action="store_true", help="forget what an earlier run left in OUT")
    finetune.add_argument("--no-parity", action="store_true", help="do not compare the halves on the result")
    finetune.add_argument("--json", action="store_true", help="print the outcome as JSON, and nothing else")
    digits = commands.add_parser(
        "digits",
        help="write scikit-learn's handwritten digits as a folder of images",
        description="Write scikit-learn's 1797 handwritten digits, 8x8 pixels, as PNG files in a folder per class: "
        "something small and real to try the other commands on.",
    )
    digits.set_defaults(run=_digits)
    digits.add_argument("folder", metavar="DIR", help="the folder to write; it must not exist")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    from modelspec.training import Recipe

    group = parser.add_argument_group("recipe")
    for field in dataclasses.fields(Recipe):
        if field.name not in _NOT_OFFERED:
            _add_option(group, field)


def _add_option(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    option, text = f"--{field.name.replace('_', '-')}", _HELP.get(field.name, "of AdamW")
    if field.type is bool or field.default is False:
        group.add_argument(option, action="store_true", help=text)
        return
    kind = {"freeze": str, "ema": float, "clip_norm": float}.get(field.name, type(field.default))
    shown = "" if field.default is None or "default" in text else f" (default: {field.default})"
    metavar = {str: "STAGE", int: "N", float: "X"}[kind]
    group.add_argument(option, type=kind, metavar=metavar, help=text + shown)


def _finetune(arguments: argparse.Namespace) -> int:
    """Train a classifier on a folder of images."""
    from modelspec.training import Recipe
    from twinzoo.finetuning import Run, fine_tune_folder

    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(Recipe)
        if getattr(arguments, field.name, None) is not None
    }
    defaults = _FROM_SCRATCH if arguments.from_scratch else {"learning_rate": 1e-4}
    recipe = Recipe(**{**defaults, **given, "distillation": arguments.teacher is not None})
    run = Run(
        folder=arguments.folder,
        model=arguments.model,
        recipe=recipe,
        framework=arguments.framework,
        from_scratch=arguments.from_scratch,
        image_size=arguments.image_size,
        overrides=dict(_setting(text) for text in arguments.set),
        teacher=arguments.teacher,
        skip_broken=arguments.skip_broken,
    )
    started = time.perf_counter()
    _list_workers(arguments)
    helps = only_helps(arguments.strategy)
    with _listening(quiet=arguments.json or helps) as listener:
        outcome = fine_tune_folder(
            run,
            arguments.output,
            restart=arguments.restart,
            parity=not arguments.no_parity,
            listener=listener,
            strategy=arguments.strategy,
            replicas=arguments.replicas,
        )
    if outcome is None:
        return 0
    if arguments.json:
        print(json.dumps({**outcome.to_dict(), "seconds": round(time.perf_counter() - started, 1)}, indent=2))
    else:
        _print_outcome(outcome, time.perf_counter() - started)
    return 0 if outcome.parity is None or outcome.parity.passed else 1


def _list_workers(arguments: argparse.Namespace) -> None:
    """Tells TensorFlow of the workers, in the way that it knows."""
    workers, index = arguments.workers, arguments.worker_index
    if workers is None and index is None:
        return
    if workers is None or index is None:
        raise ValueError("--workers and --worker-index go together: the addresses of all, and which this one is")
    if arguments.strategy != "multiworker":
        raise ValueError("--workers are those of --strategy multiworker")
    listed = {"cluster": {"worker": workers.split(",")}, "task": {"type": "worker", "index": index}}
    os.environ["TF_CONFIG"] = json.dumps(listed)


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        if separator and value and value[0] not in '[{"-0123456789':
            return name, value  # a bare word
        raise ValueError(f"--set {text}: give FIELD=VALUE with a value in JSON, such as depths=[2,2,2,2]") from error


@contextlib.contextmanager
def _listening(quiet: bool) -> Iterator[Any]:
    """A listener that shows a progress bar on standard error if that is a terminal, and prints a line per epoch."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    from twinzoo.finetuning import Listener

    errors, console = Console(stderr=True, highlight=False), Console(highlight=False, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal or quiet)
    task = progress.add_task("", total=None)

    class Shown(Listener):
        def stage(self, what: str) -> None:
            progress.reset(task, description=what, total=None)

        def step(self, done: int, total: int, loss: float | None = None) -> None:
            progress.update(task, completed=done, total=total)

        def epoch(self, epoch: int, epochs: int, figures: Mapping[str, float]) -> None:
            line = f"epoch {epoch:>{len(str(epochs))}}/{epochs}  loss {figures['loss']:.4f}, {figures['accuracy']:.1%}"
            if "val_accuracy" in figures:
                line += f"   held out {figures['val_loss']:.4f}, {figures['val_accuracy']:.1%}"
            progress.console.print(line) if progress.live.is_started else console.print(line)

        def note(self, text: str) -> None:
            errors.print(Text(f"note: {text}", "yellow"), soft_wrap=True)

    with progress:
        yield Shown()


def _print_outcome(outcome: Any, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if outcome.validation_images:
        table.add_row("accuracy", f"{outcome.accuracy:.2%} of {outcome.validation_images} images held out")
    if outcome.baseline is not None:
        table.add_row("to compare", f"{outcome.baseline:.2%} by logistic regression on gray thumbnails of 8x8")
    if outcome.parity is not None:
        worst = ", ".join(f"{run} {value:.1e}" for run, value in outcome.parity.worst.items())
        verdict = "agree" if outcome.parity.passed else f"DIFFER: {outcome.parity.sentence}"
        table.add_row("halves", f"{verdict} in {outcome.parity.comparisons} comparisons; worst {worst}")
    table.add_row("written", f"{outcome.folder} in {seconds:.0f} s")
    Console(highlight=False).print(table)


def _digits(arguments: argparse.Namespace) -> int:
    """Write scikit-learn's digits as PNG files."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = Path(arguments.folder).expanduser()
    if folder.exists():
        raise ValueError(f"{folder} exists already; give a folder that does not")
    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(np.round(image * (255 / 16)))).save(path)
    print(f"{len(data.target)} images of {len(data.target_names)} classes in {folder}")
    return 0
