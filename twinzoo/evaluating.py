"""How good a checkpoint is on a folder of images: labels of its classes, accuracy, and whether the halves agree."""

import dataclasses
import difflib
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modelspec import ImageProcessor, get_config, get_variant, load_config
from modelspec.agreement import compare, root_mean_square, top_k_agreement
from modelspec.checkpoints import CheckpointWarning, matching_variants, parameter_shapes
from modelspec.configs import EvaluationTransform, ModelConfig, Variant
from modelspec.images import ImageBatch
from modelspec.training import EvaluationBatches, LabelledImages
from twinzoo.halves import import_half, load_processor, predict_logits
from twinzoo.image_folder import (
    TRAINING_NAMES,
    VALIDATION_NAMES,
    FolderError,
    ImageFolder,
    read_image_folder,
    without_broken_images,
)

OnStep = Callable[[int, int, str], None]
FRAMEWORK_NAMES = {"tf": "Keras", "torch": "PyTorch"}
_FEWEST_CLASSES_OF_TOP5 = 6
_IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one half reached with one transform.

    Attributes:
        transform: of the images, in words.
        framework: `"tf"` or `"torch"`.
        top1, top5: share of the images whose label is the first, or among the first five; `top5` is None where the
            model has under six classes.
    """

    transform: str
    framework: str
    top1: float
    top5: float | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What measuring a checkpoint on a folder gave.

    Attributes:
        model: the source, as it was named.
        folder: where the class folders are.
        images, classes: how many there are.
        num_labels: classes of the model.
        measurements: one for each transform and framework.
        same_top1: share of the images and transforms for which both halves have the same first class; None of one half.
        logit_difference: largest difference of the halves' logits, over the rms of PyTorch's; None of one half.
        variant: the published one that this is, or that has this architecture.
        notes: what whoever asked should know, one sentence each.
    """

    model: str
    folder: str
    images: int
    classes: int
    num_labels: int
    measurements: list[Measurement]
    same_top1: float | None
    logit_difference: float | None
    variant: Variant | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for JSON; accuracies from 0 to 1, also the published one."""
        found = {name: value for name, value in vars(self).items() if name not in ("measurements", "variant")}
        found["measurements"] = [dataclasses.asdict(measurement) for measurement in self.measurements]
        found["published"] = None
        if self.variant is not None:
            found["published"] = {
                "variant": self.variant.name,
                "top1": None if self.variant.top1 is None else round(self.variant.top1 / 100, 6),
                "confirmed": self.variant.top1_confirmed,
                "source": self.variant.top1_source,
            }
        return found


def evaluate_folder(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    frameworks: Sequence[str],
    *,
    batch_size: int = 32,
    skip_broken: bool = False,
    on_step: OnStep | None = None,
) -> Evaluation:
    """Measures a classifier on all images of a folder.

    A published variant is measured twice: with its image processor, and with the transform that its published accuracy
    was measured with.

    Args:
        source: a folder, a file, a Hub id, or the name of a published variant.
        directory: of class folders (see `label_numbers`); of folders such as `train` and `val`, the second is taken.
        frameworks: `"tf"`, `"torch"` or both.
        batch_size: images at a time.
        skip_broken: leave out images that cannot be read.
        on_step: called as `on_step(done, total, what)`.

    Raises:
        FolderError: the folder cannot be used, an image in it cannot be read, or a class has no label.
        SourceError, CheckpointError, ImportError, ValueError: the checkpoint cannot be used.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; give 1 or more")
    config, processor = load_config(source), load_processor(source)
    folder = read_image_folder(_validation_part(directory))
    numbers, notes = label_numbers(folder, config.id2label)
    model = load_trained_classifier(frameworks[0], source)  # may fail, and sooner than the images are read
    folder, broken = without_broken_images(folder, skip=skip_broken, on_step=named_step(on_step, "reading"))
    labels = numbers[folder.labels]
    images = dataclasses.replace(folder, labels=labels)
    variant = published_variant(source, config)
    transforms: dict[str, Any] = {_processor_words(processor): processor}
    if variant is not None:
        crop = EvaluationCrop(processor, variant.evaluation)
        transforms[str(crop)] = crop
    logits: dict[str, list[np.ndarray]] = {}
    measurements = []
    for framework in frameworks:
        if model is None:
            model = load_trained_classifier(framework, source)
        for words, transform in transforms.items():
            step = named_step(on_step, f"{FRAMEWORK_NAMES[framework]}, {words.partition(':')[0]}")
            batches = WatchedBatches(images, config.num_labels, transform, batch_size, step)
            found = predict_logits(framework, model, batches)
            if not np.isfinite(found).all():
                raise ValueError(f"{source} gives logits that are not finite in {FRAMEWORK_NAMES[framework]}")
            logits.setdefault(framework, []).append(found)
            top5 = top_k_accuracy(found, labels, 5) if config.num_labels >= _FEWEST_CLASSES_OF_TOP5 else None
            measurements.append(Measurement(words, framework, top_k_accuracy(found, labels, 1), top5))
        model = None
    same, difference = None, None
    if len(frameworks) > 1:
        same, difference = halves_agreement(*(np.concatenate(logits[name]) for name in ("tf", "torch")))
    order = list(transforms)
    return Evaluation(
        model=str(source),
        folder=str(folder.root),
        images=len(folder),
        classes=len(folder.class_names),
        num_labels=config.num_labels,
        measurements=sorted(measurements, key=lambda measurement: order.index(measurement.transform)),
        same_top1=same,
        logit_difference=difference,
        variant=variant,
        notes=[
            *notes,
            *(f"left out: {reason}" for reason in broken),
            *_doubts(source, variant, len(folder.class_names)),
        ],
    )


class EvaluationCrop:
    """An image processor that resizes and crops as the published accuracies were measured, and not to a square.

    The shorter side is resized to `transform.resize` pixels and the longer one in proportion, its fraction cut off;
    of that, the middle `transform.crop` x `transform.crop` pixels are taken, and rescaled and normalised as the
    processor does it. As torchvision's and timm's `Resize` and `CenterCrop` do with Pillow's images.

    Args:
        processor: the checkpoint's; all but its resizing counts.
        transform: a published variant's.
    """

    def __init__(self, processor: ImageProcessor, transform: EvaluationTransform):
        self.processor, self.transform = processor, transform

    def __call__(self, images: Sequence[np.ndarray]) -> ImageBatch:
        """Returns `{"pixel_values": (B, C, crop, crop) float32}` of images (H, W, 3) uint8."""
        return self.processor([resize_and_crop(image, self.transform) for image in images], do_resize=False)

    def __str__(self) -> str:
        sides = f"shorter side {self.transform.resize}, middle {self.transform.crop}"
        return f"evaluation: {sides}, {self.transform.interpolation}"


def resize_and_crop(image: np.ndarray, transform: EvaluationTransform) -> np.ndarray:
    """Returns the middle of a resized image, (crop, crop, 3) uint8, as `EvaluationCrop` says.

    Args:
        image: (H, W, 3) uint8.
        transform: its `crop` is at most its `resize`.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    size = [transform.resize * length // shorter for length in (width, height)]
    resized = Image.fromarray(image).resize(size, Image.Resampling[transform.interpolation.upper()])
    left, top = (round((length - transform.crop) / 2) for length in size)
    return np.asarray(resized)[top : top + transform.crop, left : left + transform.crop]


def label_numbers(folder: ImageFolder, id2label: Mapping[int, str]) -> tuple[np.ndarray, list[str]]:
    """Finds the label of each class folder.

    A folder bears the name of its label, or one of the synonyms that commas separate in labels of ImageNet; case does
    not matter, and an underscore is a space. Where no folder does, and there are as many as labels, they are the
    labels in sorted order.

    Args:
        folder: its `class_names` count.
        id2label: of the checkpoint's config.

    Returns:
        (classes,) int64, the label of each class, and notes.

    Raises:
        FolderError: a folder has no label, or may have several, or two have the same; the message names it.
    """
    whole, synonyms = defaultdict(set), defaultdict(set)
    for number, label in id2label.items():
        whole[_plain(label)].add(number)
        for synonym in label.split(","):
            synonyms[_plain(synonym)].add(number)
    names = [_plain(name) for name in folder.class_names]
    found = [whole.get(name) or synonyms.get(name) or set() for name in names]
    if not any(found) and len(found) == len(id2label):
        note = "no class folder bears the name of a label; they are taken for the labels in sorted order"
        return np.arange(len(found)), [note]
    taken: dict[int, str] = {}
    for name, numbers in zip(folder.class_names, found, strict=True):
        path = folder.root / name
        if not numbers:
            raise FolderError(f"{path} bears the name of none of the {len(id2label)} labels{_hint(name, id2label)}")
        if len(numbers) > 1:
            several = " and ".join(f"{number} ({id2label[number]})" for number in sorted(numbers))
            raise FolderError(f"{path} may be of several labels, {several}; rename it, or leave it out")
        (number,) = numbers
        if number in taken:
            raise FolderError(f"{path} and {taken[number]} are both of label {number} ({id2label[number]}); join them")
        taken[number] = name
    return np.array(list(taken), np.int64), []


def published_variant(source: str | os.PathLike, config: ModelConfig) -> Variant | None:
    """Returns the published variant that a source is.

    One that is named is it. A checkpoint on the disk is taken for one if it has its architecture and 1000 labels: that
    its weights are the published ones, a config cannot tell.

    Args:
        source: a folder, a file, a Hub id, or the name of a variant.
        config: the source's.
    """
    if not Path(source).expanduser().exists():
        try:
            return get_variant(str(source))
        except ValueError:
            pass
    if config.num_labels != _IMAGENET_CLASSES:
        return None
    dilations = getattr(config, "dilations", None)  # which leave no trace in the weights
    names = [
        name
        for name in matching_variants(parameter_shapes(config, "Model"), config.model_type)
        if getattr(get_config(name), "dilations", None) == dilations
    ]
    return get_variant(names[0]) if len(names) == 1 else None


def load_trained_classifier(framework: str, source: str | os.PathLike) -> Any:
    """Loads a checkpoint whose head is trained into a classifier of one half.

    Args:
        framework: `"tf"` or `"torch"`.
        source: a folder, a file, a Hub id, or the name of a published variant.

    Raises:
        ValueError: it holds no head, as the published files of ViT-MSN.
        SourceError, CheckpointError, ImportError: it cannot be loaded.
    """
    auto, _ = import_half(framework)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        model, report = auto.model_class(load_config(source).model_type).from_pretrained(
            source, output_loading_info=True
        )
    heads = model.config.num_labels_keys
    if model.config.num_labels == 0 or any(key.partition(".")[0] in heads for key in report.newly_initialised):
        raise ValueError(
            f"{source} holds no trained classifier; fine-tune it (twinzoo finetune), or measure its features (twinzoo "
            "probe)"
        )
    return model


def label_probabilities(logits: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Returns (B, num_labels) float64: softmax of the logits, or sigmoid where an image has several labels."""
    logits = np.asarray(logits, np.float64)
    if config.problem_type == "multi_label_classification":
        return 1 / (1 + np.exp(-logits))
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the share of the rows of `logits` (N, classes) among whose `k` largest is that of `labels` (N,).

    Of equal logits the one of the lower label comes first.
    """
    first = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    return float((first == labels[:, None]).any(axis=-1).mean())


def halves_agreement(actual: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Returns the share of rows with the same largest logit, and the largest difference over the reference's rms.

    Args:
        actual, reference: (N, classes) of the two halves.
    """
    difference = compare(actual, reference, root_mean_square(reference), math.inf).max_rel
    return top_k_agreement(actual, reference, 1), difference


def named_step(on_step: OnStep | None, what: str) -> Callable[[int, int], None] | None:
    """Returns what is told `(done, total)` and tells `on_step` what of as well; None without it."""
    return None if on_step is None else lambda done, total: on_step(done, total, what)


class WatchedBatches(EvaluationBatches):
    """Evaluation batches that tell how far reading has come, as `on_step(images done, images)`."""

    def __init__(
        self,
        images: LabelledImages,
        num_labels: int,
        processor: Callable[[Any], Any] | None,
        batch_size: int,
        on_step: Callable[[int, int], None] | None,
    ):
        super().__init__(images, num_labels, processor, batch_size)
        self.on_step = on_step

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        batch = super().__getitem__(index)
        if self.on_step is not None:
            count = len(self.images.labels)
            self.on_step(min(count, (index + 1) * self.batch_size), count)
        return batch


def _validation_part(directory: str | os.PathLike) -> Path:
    root = Path(directory).expanduser()
    parts = [
        next((root / name for name in names if (root / name).is_dir()), None)
        for names in (TRAINING_NAMES, VALIDATION_NAMES)
    ]
    return root if parts[0] is None or parts[1] is None else parts[1]


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _hint(name: str, id2label: Mapping[int, str]) -> str:
    words = {_plain(synonym): synonym.strip() for label in id2label.values() for synonym in label.split(",")}
    close = difflib.get_close_matches(_plain(name), words, n=1)
    if close:
        return f"; close to it: {words[close[0]]}"
    first = ", ".join(list(id2label.values())[:3])
    return f" ({first}{', ...' if len(id2label) > 3 else ''})"


def _processor_words(processor: ImageProcessor) -> str:
    if not processor.do_resize:
        return "processor: as they are"
    filters = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
    return f"processor: {processor.size['height']} x {processor.size['width']}, {filters[processor.resample]}"


def _doubts(source: str | os.PathLike, variant: Variant | None, classes: int) -> list[str]:
    if variant is None or variant.top1 is None:
        return []
    doubts = []
    if Path(source).expanduser().exists():
        doubts.append(f"the config is that of {variant.name}; whether the weights are, it cannot tell")
    if classes != _IMAGENET_CLASSES:
        doubts.append(f"the published accuracy is of ImageNet's 1000 classes, these images are of {classes}")
    return doubts
