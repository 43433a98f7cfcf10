"""What the features of a frozen model are worth: logistic regression on few images of each class.

The protocol is that of MSN's low-shot evaluation (Assran et al., ECCV 2022, arXiv:2204.07141, and `logistic_eval.py`
of its repository) with two differences: scikit-learn minimises the same function until it is at its minimum, and images
come through the checkpoint's own image processor, which resizes to a square where MSN took the middle.
"""

import dataclasses
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from modelspec import load_config
from modelspec.feature_kinds import chosen_kind
from modelspec.training import EvaluationBatches
from twinzoo.evaluating import FRAMEWORK_NAMES, OnStep, WatchedBatches, named_step
from twinzoo.halves import import_half, load_classifier, load_processor
from twinzoo.image_folder import FolderError, ImageFolder, training_and_validation, without_broken_images

ALL = "all"
MSN_C = 4000.0  # MSN's default is a penalty of 0.00025/2 for the squared weights, beside the sum of the losses
_MOST_ITERATIONS = 5000


@dataclasses.dataclass(frozen=True)
class Shots:
    """What was reached with so many images of each class.

    Attributes:
        shots: how many; `"all"` for every image there is to train on.
        accuracies: share of the held-out images that are classified right, for each draw of the images.
    """

    shots: int | str
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """The mean over the draws."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """The standard deviation over the draws; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclasses.dataclass(frozen=True)
class Probe:
    """What probing a checkpoint on a folder gave.

    Attributes:
        model: the source, as it was named.
        framework: `"tf"` or `"torch"`.
        features: the kind of features, and `width` how many there are.
        classes, training_images, held_out_images: how many there are.
        c: the inverse of the penalty.
        seed: of the draws, and of what is held out.
        results: one for each number of images of each class.
        notes: what whoever asked should know, one sentence each.
    """

    model: str
    framework: str
    features: str
    width: int
    classes: int
    training_images: int
    held_out_images: int
    c: float
    seed: int
    results: list[Shots]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for JSON; accuracies from 0 to 1."""
        results = [dataclasses.asdict(row) | {"mean": row.mean, "spread": row.spread} for row in self.results]
        return vars(self) | {"results": results}


def probe_folder(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    framework: str,
    *,
    kind: str | None = None,
    shots: Sequence[int] = (1, 2, 5),
    splits: int = 3,
    seed: int = 0,
    c: float = MSN_C,
    batch_size: int = 32,
    skip_broken: bool = False,
    on_step: OnStep | None = None,
) -> Probe:
    """Measures the features of a checkpoint, with or without a head, on a folder of images.

    The features are computed once for each image, as the image processor gives it.

    Args:
        source: a folder, a file, a Hub id, or the name of a published variant.
        directory: see `training_and_validation`.
        framework: `"tf"` or `"torch"`.
        kind: of the features, see `modelspec.feature_kinds`; the family's default by default.
        shots, splits, seed, c: see `probe_features`; the seed is also that of what is held out.
        batch_size: images at a time.
        skip_broken: leave out images that cannot be read.
        on_step: called as `on_step(done, total, what)`.

    Raises:
        FolderError: the folder cannot be used, or nothing of it can be held out.
        SourceError, CheckpointError, ImportError, ValueError: the checkpoint or an option cannot be used.
    """
    _check(shots, splits, c, batch_size)
    if seed < 0:
        raise ValueError(f"the seed is {seed}; give 0 or more")
    training, held_out, notes = training_and_validation(directory, seed)
    if len(training.class_names) < 2:
        raise FolderError(f"{training.root} holds one class, {training.class_names[0]}; there is nothing to tell apart")
    if not len(held_out):
        raise FolderError(f"{training.root} has one image of each class: nothing can be held out to measure on")
    kind = chosen_kind(load_config(source), kind)
    processor, model = load_processor(source), load_classifier(framework, source)
    notes, folders = list(notes), []
    for folder in (training, held_out):
        whole, broken = without_broken_images(folder, skip=skip_broken, on_step=named_step(on_step, "reading"))
        notes += [f"left out: {reason}" for reason in broken]
        folders.append(whole)
    training, held_out = folders
    features = []
    for folder, what in ((training, "to train on"), (held_out, "held out")):
        step = named_step(on_step, f"{FRAMEWORK_NAMES[framework]}, images {what}")
        batches = WatchedBatches(folder, len(folder.class_names), processor, batch_size, step)
        features.append(extract_all(framework, model, batches, kind))
    results, more = probe_features(
        *(features[0], training.labels, features[1], held_out.labels),
        shots=shots,
        splits=splits,
        seed=seed,
        c=c,
        on_step=named_step(on_step, "logistic regression"),
    )
    return Probe(
        model=str(source),
        framework=framework,
        features=kind,
        width=features[0].shape[1],
        classes=len(training.class_names),
        training_images=len(training),
        held_out_images=len(held_out),
        c=c,
        seed=seed,
        results=results,
        notes=[*notes, *_lacking(training, max(shots, default=0)), *more],
    )


def extract_all(framework: str, model: Any, batches: EvaluationBatches, kind: str | None = None) -> np.ndarray:
    """Returns the features (N, C) of all images; `kind` as of `extract_features`, which see."""
    extract = _features_module(framework).extract_features
    return np.concatenate([extract(model, batches[index][0], kind) for index in range(len(batches))])


def probe_features(
    training: np.ndarray,
    training_labels: np.ndarray,
    held_out: np.ndarray,
    held_out_labels: np.ndarray,
    *,
    shots: Sequence[int] = (1, 2, 5),
    splits: int = 3,
    seed: int = 0,
    c: float = MSN_C,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[list[Shots], list[str]]:
    """Fits logistic regression to features of few images of each class, and of all, and measures it on others.

    Args:
        training: (N, C) features, which `centred_and_normalised` is applied to.
        training_labels: (N,) integers.
        held_out: (M, C), what is measured on.
        held_out_labels: (M,) integers.
        shots: images of each class; of a class with fewer, all are taken.
        splits: draws of these images, each of its own seed.
        seed: of the draws: the same one draws the same images, whatever the features are.
        c: weight of the sum of the losses against half the squared weights; MSN's lambda is 1 / c.
        on_step: called as `on_step(fits done, fits)`.

    Returns:
        A row for each number of images, then one for all of them; and notes.

    Raises:
        ValueError: an option is not allowed.
        ImportError: scikit-learn is not installed.
    """
    _check(shots, splits, c)
    training, held_out = centred_and_normalised(training), centred_and_normalised(held_out)
    draws: dict[int | str, list[np.ndarray]] = {
        count: [draw_shots(training_labels, count, (seed, split)) for split in range(splits)] for count in shots
    }
    draws[ALL] = [np.arange(len(training_labels))]
    fits, done, unfinished = sum(map(len, draws.values())), 0, 0
    results = []
    for count, chosen_of in draws.items():
        accuracies = []
        for chosen in chosen_of:
            model, converged = fit_logistic_regression(training[chosen], training_labels[chosen], c)
            accuracies.append(float((model.predict(held_out) == held_out_labels).mean()))
            done, unfinished = done + 1, unfinished + (not converged)
            if on_step is not None:
                on_step(done, fits)
        results.append(Shots(count, accuracies))
    notes = []
    if unfinished:
        notes = [
            f"{unfinished} of {fits} logistic regressions stopped after {_MOST_ITERATIONS} steps; a smaller C helps"
        ]
    return results, notes


def centred_and_normalised(features: np.ndarray) -> np.ndarray:
    """Returns features (N, C) as float64, each row minus its own mean and divided by its own Euclidean norm.

    So does MSN's evaluation: nothing is learnt of other images. A row without any differences becomes zeros.
    """
    rows = np.asarray(features, np.float64)
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def draw_shots(labels: np.ndarray, count: int, seed: int | Sequence[int]) -> np.ndarray:
    """Draws images of each class, which hold those that the same seed draws for a smaller count.

    Args:
        labels: (N,) integers.
        count: of each class; all where it has fewer.
        seed: of the draw, whatever the labels are made of.

    Returns:
        Their numbers, sorted.
    """
    draws = np.random.default_rng(seed)
    chosen = [draws.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def fit_logistic_regression(features: np.ndarray, labels: np.ndarray, c: float = MSN_C) -> tuple[Any, bool]:
    """Fits multinomial logistic regression without an intercept.

    Minimised is c times the sum of the cross entropies, plus half the sum of the squared weights.

    Args:
        features: (N, C) float64.
        labels: (N,) integers, of two classes or more.
        c: above 0.

    Returns:
        scikit-learn's classifier, and whether the minimum was found.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("twinzoo probe needs scikit-learn: pip install scikit-learn") from error
    classes = len(np.unique(labels))
    # For two classes scikit-learn has one vector of weights, whose square counts twice as much as those of two.
    weight = 2 * c if classes == 2 else c
    # A gradient is the smaller the more classes there are: at its own 1e-4 scikit-learn takes no step for 1000.
    model = LogisticRegression(C=weight, fit_intercept=False, tol=1e-6 / classes, max_iter=_MOST_ITERATIONS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    return model, not any(issubclass(entry.category, ConvergenceWarning) for entry in said)


def _features_module(framework: str) -> ModuleType:
    import_half(framework)
    if framework == "tf":
        import tfmodels.features

        return tfmodels.features
    import ptmodels.features

    return ptmodels.features


def _lacking(training: ImageFolder, most: int) -> list[str]:
    counts = np.bincount(training.labels, minlength=len(training.class_names))
    few = [f"{training.class_names[label]} ({counts[label]})" for label in np.flatnonzero(counts < most)]
    if not few:
        return []
    names = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
    return [f"fewer than {most} images to draw from, all of which are taken: {names}"]


def _check(shots: Sequence[int], splits: int, c: float, batch_size: int = 1) -> None:
    for name, value in (("number of shots", min(shots, default=1)), ("number of splits", splits)):
        if value < 1:
            raise ValueError(f"the {name} is {value}; give 1 or more")
    if not 0 < c < np.inf:
        raise ValueError(f"C is {c}; give a number above 0")
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; give 1 or more")
