"""The batches that training sees: their order and all that is drawn come from NumPy, so that both halves see the same.

A batch is a function of seed, epoch and number: a run that goes on after an interruption needs no state of a generator.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from modelspec.training.batch_share import BatchShare
from modelspec.training.recipe import Recipe

ORDER, IMAGES, MIXING = range(3)  # what is drawn; each has its own stream
_ASPECT = math.log(4 / 3)


class LabelledImages(Protocol):
    """Images with their classes: what a folder or a pair of arrays is to training.

    Attributes:
        labels: (N,) integers, the class of each image.
    """

    labels: np.ndarray

    def image(self, index: int) -> np.ndarray:
        """Returns one image: (H, W, C) uint8, or what goes into the model as it is."""
        ...


class ArrayImages:
    """Images that lie in memory.

    Args:
        images: a sequence of (H, W, C) uint8, or an array (N, C, H, W) of pixel values.
        labels: (N,) integers.

    Raises:
        ValueError: their numbers differ, or labels are no integers.
    """

    def __init__(self, images: Sequence[np.ndarray] | np.ndarray, labels: Sequence[int] | np.ndarray):
        self.images, self.labels = images, np.asarray(labels)
        if self.labels.ndim != 1 or self.labels.dtype.kind not in "iu":
            raise ValueError(f"labels are {self.labels.dtype} {self.labels.shape}; give integers (N,)")
        if len(images) != len(self.labels):
            raise ValueError(f"there are {len(images)} images but {len(self.labels)} labels")

    def image(self, index: int) -> np.ndarray:
        return self.images[index]


class TrainingBatches:
    """The batches of a training, drawn from a recipe.

    The images of an epoch are drawn anew; those that fill no batch are left out of it. A set smaller than the recipe's
    batch makes one batch.

    Args:
        images: what to train on.
        recipe: says how.
        num_labels: width of the targets.
        processor: turns (H, W, C) uint8 into pixel values; None where images are pixel values already.
        teacher: for distillation, gives the logits (B, num_labels) of pixel values (B, C, H, W), as arrays.

    Attributes:
        steps_per_epoch: optimizer steps.
        parts_per_epoch: parts of batches, `accumulation_steps` for each step.
        part_size: images per part.

    Raises:
        ValueError: there are no images, a label is not below `num_labels`, or a teacher is missing or not asked for.
    """

    def __init__(
        self,
        images: LabelledImages,
        recipe: Recipe,
        num_labels: int,
        processor: Callable[[Any], Any] | None = None,
        teacher: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        count, parts = len(images.labels), recipe.accumulation_steps
        if count < parts:
            raise ValueError(f"there are {count} images to train on; a batch of {parts} parts needs {parts}")
        _check_labels(images.labels, num_labels)
        if recipe.distillation != (teacher is not None):
            given = "none" if teacher is None else "one"
            raise ValueError(f"Recipe.distillation is {recipe.distillation}, but {given} is given as teacher")
        self.images, self.recipe, self.num_labels = images, recipe, num_labels
        self.processor, self.teacher = processor, teacher
        self.part_size = min(recipe.batch_size, count) // parts
        self.steps_per_epoch = count // (self.part_size * parts)
        self.parts_per_epoch = self.steps_per_epoch * parts

    def part(self, epoch: int, index: int, share: BatchShare | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns one part of a batch, or a process's share of it: the same numbers, without reading all of it.

        Args:
            epoch: counted from 0.
            index: of the part, from 0 to `parts_per_epoch - 1`.
            share: of `part_size` samples, not empty.

        Returns:
            Pixel values (B, C, H, W) float32 (or of the dtype they came in), and targets (B, num_labels) of the same
            dtype, whose rows sum to 1; with a teacher (B, 2, num_labels): the labels, and the teacher's class.
        """
        order = self._draws(ORDER, epoch).permutation(len(self.images.labels))
        chosen = order[index * self.part_size : (index + 1) * self.part_size]
        mine = np.arange(len(chosen)) if share is None else np.arange(share.begin, share.stop)
        if self.recipe.mixup > 0:
            draws = self._draws(MIXING, epoch, index)
            weight = draws.beta(self.recipe.mixup, self.recipe.mixup)
            partners = draws.permutation(len(chosen))[mine]
            needed, places = np.unique([mine, partners], return_inverse=True)
            first, second = places.reshape(2, -1)
            pixel_values, targets = self._labelled(chosen[needed], epoch)
            weight = pixel_values.dtype.type(weight)
            pixel_values, targets = (
                weight * array[first] + (1 - weight) * array[second] for array in (pixel_values, targets)
            )
        else:
            pixel_values, targets = self._labelled(chosen[mine], epoch)
        if self.teacher is not None:
            taught = np.asarray(self.teacher(pixel_values)).argmax(-1)
            targets = np.stack([targets, np.eye(self.num_labels, dtype=targets.dtype)[taught]], axis=1)
        return pixel_values, targets

    def _labelled(self, chosen: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        images = []
        for index in chosen:
            image = self.images.image(int(index))
            images.append(augment(image, self.recipe, self._draws(IMAGES, epoch, int(index))))
        pixel_values = np.stack(images) if self.processor is None else self.processor(images)["pixel_values"]
        return pixel_values, np.eye(self.num_labels, dtype=pixel_values.dtype)[self.images.labels[chosen]]

    def _draws(self, what: int, epoch: int, index: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.recipe.seed, what, epoch, index])


class EvaluationBatches:
    """All images once, in their order, as they are.

    Args:
        images, num_labels, processor: as of `TrainingBatches`.
        batch_size: the last batch may be smaller.
    """

    def __init__(
        self,
        images: LabelledImages,
        num_labels: int,
        processor: Callable[[Any], Any] | None = None,
        batch_size: int = 32,
    ):
        _check_labels(images.labels, num_labels)
        self.images, self.num_labels, self.processor, self.batch_size = images, num_labels, processor, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.images.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns pixel values (B, C, H, W) and targets (B, num_labels)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._samples(self._numbers(index))

    def shares(self, processes: int, rank: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yields a process's share of each batch, and how many of its samples count: all of them, or none.

        A process whose share is empty gets the batch's first sample, which does not count, so that all processes do
        the same number of forward passes.
        """
        for index in range(len(self)):
            numbers = self._numbers(index)
            share = BatchShare.of(len(numbers), processes, rank)
            yield *self._samples(numbers[share.begin : share.stop] if share.size else numbers[:1]), share.size

    def _numbers(self, index: int) -> range:
        return range(len(self.images.labels))[index * self.batch_size : (index + 1) * self.batch_size]

    def _samples(self, chosen: range) -> tuple[np.ndarray, np.ndarray]:
        images = [self.images.image(number) for number in chosen]
        pixel_values = np.stack(images) if self.processor is None else self.processor(images)["pixel_values"]
        return pixel_values, np.eye(self.num_labels, dtype=pixel_values.dtype)[self.images.labels[chosen]]


def augment(image: np.ndarray, recipe: Recipe, draws: np.random.Generator) -> np.ndarray:
    """Returns a random crop of an image, mirrored or not, as the recipe says; the processor resizes it.

    A crop has between `crop_scale` of the area and all of it, and sides that are up to 4/3 as long as in the image's
    own proportions (Szegedy et al., 2015).

    Args:
        image: (H, W, C), if the recipe augments; else anything.
        recipe: its `crop_scale` and `flip` count.
        draws: where the chances come from.
    """
    if recipe.crop_scale < 1:
        area, aspect = draws.uniform(recipe.crop_scale, 1), math.exp(draws.uniform(-_ASPECT, _ASPECT))
        sides = []
        for length, factor in zip(image.shape[:2], (math.sqrt(aspect), 1 / math.sqrt(aspect)), strict=True):
            size = min(length, max(1, round(length * math.sqrt(area) * factor)))
            begin = int(draws.integers(0, length - size + 1))
            sides.append(slice(begin, begin + size))
        image = image[tuple(sides)]
    if recipe.flip > 0 and draws.random() < recipe.flip:
        image = image[:, ::-1]
    return image


def _check_labels(labels: np.ndarray, num_labels: int) -> None:
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_labels):
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}; the model has {num_labels}, from 0")
