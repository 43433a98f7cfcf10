"""Fine-tuning on a folder of images: from the folder to a checkpoint with everything that tells what it is worth.

The checkpoint's folder gets, besides the checkpoint: `training/` (the state to go on from, the curves, TensorBoard's
logs), `curves.png`, `confusion_matrix.png`, `parity.json` and the model card, `README.md`.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelspec import ImageProcessor, get_config, load_config
from modelspec.atomic_file import atomic_file, write_text
from modelspec.checkpoints import CheckpointError
from modelspec.extras import how_to_install
from modelspec.training import EvaluationBatches, Recipe, TrainingBatches, TrainingState
from parity.errors import ComparisonError
from twinzoo.halves import fresh_classifier, import_half, load_classifier, load_processor, predict_logits
from twinzoo.image_folder import ImageFolder, training_and_validation, without_broken_images
from twinzoo.model_card import ParityFigures, model_card
from twinzoo.processes import Processes, joined
from twinzoo.tensorboard_log import TensorBoardLog

TRAINING_FOLDER, STATE_FILE, RUN_FILE, HISTORY_FILE = "training", "state.safetensors", "run.json", "history.json"
_LARGEST_BASELINE = 20_000  # images that logistic regression is fitted to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is fine-tuned on what; a run that is interrupted goes on only as the same one.

    Attributes:
        folder: of images, one folder per class, or with folders `train` and `val` of such.
        model: a checkpoint (folder, file, Hub id), or with `from_scratch` the name of a published variant.
        recipe: says how.
        framework: `"tf"` or `"torch"`.
        from_scratch: begin with fresh weights.
        image_size: side in pixels; the checkpoint's by default.
        overrides: config fields that differ from the checkpoint's or the variant's.
        teacher: a checkpoint that `Recipe.distillation` learns from.
        skip_broken: leave out images that cannot be read, instead of refusing the folder.
    """

    folder: str
    model: str
    recipe: Recipe
    framework: str = "torch"
    from_scratch: bool = False
    image_size: int | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher: str | None = None
    skip_broken: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of a fine-tuning.

    Attributes:
        folder: of the checkpoint.
        class_names: of the head, in order.
        training_images, validation_images: how many there were.
        accuracy: share of the held-out images that are classified right, of the weights that were saved; None
            without such images.
        baseline: the same of logistic regression on thumbnails; None where it was not fitted.
        confusion: (n, n) counts of the held-out images: row true class, column predicted.
        history: the curves.
        parity: what comparing the halves on the result gave; None where it could not be done.
        notes: what whoever started it should know, one sentence each.
    """

    folder: str
    class_names: list[str]
    training_images: int
    validation_images: int
    accuracy: float | None
    baseline: float | None
    confusion: np.ndarray
    history: dict[str, list[float]]
    parity: ParityFigures | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for JSON."""
        plain = dataclasses.asdict(self)
        return plain | {"confusion": self.confusion.tolist()}


class Listener:
    """Is told how a fine-tuning goes; this one does nothing."""

    def stage(self, what: str) -> None:
        """Another part of the work begins."""

    def step(self, done: int, total: int, loss: float | None = None) -> None:
        """A part of the present work is done."""

    def epoch(self, epoch: int, epochs: int, figures: Mapping[str, float]) -> None:
        """An epoch is finished, and its state saved."""

    def note(self, text: str) -> None:
        """Something that one should know."""


def fine_tune_folder(
    run: Run,
    output: str | os.PathLike,
    *,
    restart: bool = False,
    parity: bool = True,
    listener: Listener | None = None,
    strategy: str | None = None,
    replicas: int | None = None,
) -> Outcome | None:
    """Fine-tunes a classifier on a folder of images, and writes the checkpoint and all that belongs to it.

    Called again with the same arguments after an interruption, it goes on after the last finished epoch.

    Args:
        run: what to do.
        output: the folder of the checkpoint, which is made if need be.
        restart: forget what an earlier run left in `output`.
        parity: compare the halves on the result.
        listener: is told how it goes.
        strategy: how several processes train together, one of `twinzoo.processes.STRATEGIES`; all of them call this.
        replicas: of the strategy `"mirrored"`: how many devices; all GPUs by default.

    Returns:
        What came out, and None in processes that only help.

    Raises:
        FolderError: the images cannot be used.
        CheckpointError: `output` holds another run, or a checkpoint that no run here has made.
        SourceError, ValueError: the model cannot be had, or an option is not allowed.
        OSError: something cannot be written; what was trained and saved before is kept.
    """
    output, notes = Path(output).expanduser(), list[str]()
    with joined(run.framework, strategy, replicas=replicas) as processes:
        listener = listener if listener is not None and processes.first else Listener()

        def note(text: str) -> None:
            notes.append(text)
            listener.note(text)

        training, validation = processes.share(lambda: _read_images(run, listener, note))
        listener.stage("making the model")
        described = _describe(run, training)
        if processes.first and not restart:
            _check_free(output, described)
        model, processor = _make_model(run, training.class_names)
        import_half(run.framework)[1].check_recipe(model, run.recipe)
        teacher = _make_teacher(run, training.class_names, processor, processes)
        num_labels = len(training.class_names)
        batches = TrainingBatches(training, run.recipe, num_labels, processor, teacher)
        used = batches.part_size * run.recipe.accumulation_steps
        if used < run.recipe.batch_size:
            note(
                f"batches have {used} images, fewer than {run.recipe.batch_size}: there are {len(training)} to train on"
            )
        held_out = None
        if len(validation):
            held_out = EvaluationBatches(validation, num_labels, processor, run.recipe.batch_size)
        else:
            note("no image is held out: nothing is measured")

        state_path = output / TRAINING_FOLDER / STATE_FILE
        if processes.first:
            if restart:
                shutil.rmtree(state_path.parent, ignore_errors=True)
            state_path.parent.mkdir(parents=True, exist_ok=True)
            write_text(state_path.parent / RUN_FILE, json.dumps(described, indent=2) + "\n")
        processes.wait()  # for the state, which may be gone now, and for whoever was slow
        history = _train(run, processes.place(model), batches, held_out, state_path, listener)
    if not processes.first:
        processes.finish()
        return None

    listener.stage("writing the checkpoint")
    model.save_pretrained(output, image_processor=processor)
    confusion = np.zeros((num_labels, num_labels), np.int64)
    if held_out is not None:
        predicted = predict_logits(run.framework, model, held_out).argmax(-1)
        np.add.at(confusion, (validation.labels, predicted), 1)
    accuracy = float(np.trace(confusion) / confusion.sum()) if held_out is not None else None
    listener.stage("logistic regression, to compare with")
    baseline = _baseline(training, validation)
    listener.stage("comparing the halves on the result")
    figures = _check_parity(output, note) if parity else None
    outcome = Outcome(
        str(output),
        training.class_names,
        len(training),
        len(validation),
        accuracy,
        baseline,
        confusion,
        history,
        figures,
        notes,
    )
    listener.stage("drawing")
    _draw(output, outcome, note)
    write_text(output / "README.md", model_card(run, outcome, model.config, processor))
    processes.finish()
    return outcome


def _read_images(run: Run, listener: Listener, note: Callable[[str], None]) -> list[ImageFolder]:
    """Returns what is trained on and what is held out."""
    listener.stage("reading images")
    training, validation, warnings = training_and_validation(run.folder)
    parts = []
    for folder in (training, validation):
        found, broken = without_broken_images(folder, skip=run.skip_broken, on_step=listener.step)
        parts.append(found)
        for reason in broken:
            note(f"left out: {reason}")
    for warning in warnings:
        note(warning)
    return parts


def _describe(run: Run, training: ImageFolder) -> dict[str, Any]:
    """What an earlier run must have been, to be this one."""
    described = dataclasses.asdict(run) | {"folder": str(Path(run.folder).expanduser().absolute())}
    described |= {"recipe": run.recipe.to_dict(), "overrides": dict(run.overrides)}
    described |= {"classes": training.class_names, "images": len(training)}
    return json.loads(json.dumps(described))


def _check_free(output: Path, described: dict[str, Any]) -> None:
    """Makes sure that `output` is free, or holds this very run."""
    path = output / TRAINING_FOLDER / RUN_FILE
    if not path.exists():
        if (output / "config.json").exists():
            raise CheckpointError(
                f"{output} holds a checkpoint already; choose another output, or replace it: --restart"
            )
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; begin anew with --restart") from error
    differing = [name for name in described if earlier.get(name) != described[name]]
    if not differing:
        return
    name = differing[0]
    ours, theirs = described[name], earlier.get(name)
    if name == "recipe":
        name = next(field for field in ours if (theirs or {}).get(field) != ours[field])
        ours, theirs = ours[name], (theirs or {}).get(name)
    raise CheckpointError(
        f"{output} holds a run with {name} {_brief(theirs)}, and this one has {_brief(ours)}; "
        "go on with the same options, begin anew with --restart, or choose another output"
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _make_model(run: Run, class_names: list[str]) -> tuple[Any, Any]:
    overrides = dict(run.overrides)
    config = get_config(run.model) if run.from_scratch else load_config(run.model)
    if run.image_size is not None and "image_size" in {field.name for field in dataclasses.fields(config)}:
        overrides.setdefault("image_size", run.image_size)
    dtype = {}
    if run.framework == "tf":
        dtype = {"dtype": "mixed_bfloat16" if run.recipe.mixed_precision else "float32"}
    if run.from_scratch:
        model = fresh_classifier(run.framework, run.model, class_names, overrides, run.recipe.seed, **dtype)
    else:
        model = load_classifier(
            run.framework, run.model, class_names=class_names, seed=run.recipe.seed, **overrides, **dtype
        )
    return model, load_processor(run.model, run.image_size)


def _make_teacher(
    run: Run, class_names: list[str], processor: ImageProcessor, processes: Processes
) -> Callable[[np.ndarray], np.ndarray] | None:
    if (run.teacher is not None) != run.recipe.distillation:
        raise ValueError("distillation needs a teacher, and a teacher is for distillation: give both or neither")
    if run.teacher is None:
        return None
    theirs = load_processor(run.teacher)
    for name in ("image_mean", "image_std", "rescale_factor"):
        if getattr(theirs, name) != getattr(processor, name):
            raise ValueError(
                f"the teacher's {name} is {getattr(theirs, name)}, the student's {getattr(processor, name)}; "
                "they see the same pixel values"
            )
    teacher = load_classifier(run.framework, run.teacher)
    names = list(teacher.config.id2label.values())
    if names != class_names:
        raise ValueError(f"the teacher's classes are {_brief(names)}; those of the images are {_brief(class_names)}")
    _, training = import_half(run.framework)
    return training.teacher_logits(processes.place(teacher))


def _train(
    run: Run,
    model: Any,
    batches: TrainingBatches,
    held_out: EvaluationBatches | None,
    state_path: Path,
    listener: Listener,
) -> dict[str, list[float]]:
    _, training = import_half(run.framework)
    log = TensorBoardLog(state_path.parent / "tensorboard")
    listener.stage("training")

    def on_epoch(state: TrainingState) -> None:
        figures = {name: values[-1] for name, values in state.history.items()}
        log.write(state.history)
        write_text(state_path.parent / HISTORY_FILE, json.dumps(state.history, indent=2) + "\n")
        listener.epoch(state.epoch, run.recipe.epochs, figures)

    return training.fine_tune(
        model, batches, validation=held_out, state_path=state_path, on_step=listener.step, on_epoch=on_epoch
    )


def _baseline(training: ImageFolder, validation: ImageFolder) -> float | None:
    """Accuracy of logistic regression on gray thumbnails of 8x8; None where it is not fitted."""
    if not len(validation) or len(training) > _LARGEST_BASELINE or len(training.class_names) < 2:
        return None
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        return None
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    fitted.fit(_thumbnails(training), training.labels)
    return float(fitted.score(_thumbnails(validation), validation.labels))


def _thumbnails(folder: ImageFolder) -> np.ndarray:
    from PIL import Image

    images = (Image.fromarray(folder.image(index)).convert("L") for index in range(len(folder)))
    return np.stack([np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float64).ravel() for image in images])


def _check_parity(output: Path, note: Callable[[str], None]) -> ParityFigures | None:
    try:
        from parity.checking import check

        return ParityFigures.of(check((), checkpoint=output))
    except (ImportError, ComparisonError) as error:
        note(f"the halves were not compared: {error}")
    return None


def _draw(output: Path, outcome: Outcome, note: Callable[[str], None]) -> None:
    try:
        from twinzoo.plots import plot_confusion_matrix, plot_curves
    except ImportError as error:
        note(f"nothing is drawn: {error}; {how_to_install('plot')}")
        return
    figures = {"curves.png": plot_curves(outcome.history)}
    if outcome.confusion.sum():
        figures["confusion_matrix.png"] = plot_confusion_matrix(outcome.confusion, outcome.class_names)
    for name, figure in figures.items():
        with atomic_file(output / name) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
