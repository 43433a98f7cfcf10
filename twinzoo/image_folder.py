"""Folders of images, one folder per class: finding, checking, splitting and reading them."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.images import read_image

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TRAINING_NAMES, VALIDATION_NAMES = ("train", "training"), ("val", "valid", "validation", "test")
_KEPT_BYTES = 2**30  # decoded images that stay in memory, of one folder


class FolderError(ValueError):
    """A folder cannot be used, or a file in it; the message names it."""


@dataclasses.dataclass(eq=False)
class ImageFolder:
    """Images with their classes, read when they are asked for, and kept in memory up to a limit.

    Attributes:
        root: the folder.
        class_names: of all classes, sorted.
        paths: of the images.
        labels: (N,) int64, the class of each.
    """

    root: Path
    class_names: list[str]
    paths: list[Path]
    labels: np.ndarray
    _kept: dict[Path, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> np.ndarray:
        """Returns an image, (H, W, 3) uint8.

        Raises:
            FolderError: the file cannot be read as an image.
        """
        path = self.paths[index]
        found = self._kept.get(path)
        if found is None:
            try:
                found = read_image(path, name=str(path))
            except ValueError as error:
                raise FolderError(str(error)) from error
            if found.nbytes * len(self.paths) <= _KEPT_BYTES:
                self._kept[path] = found
        return found

    def subset(self, chosen: Sequence[int] | np.ndarray) -> "ImageFolder":
        """Returns some of the images, by number; what is in memory is shared."""
        paths = [self.paths[index] for index in chosen]
        return ImageFolder(self.root, self.class_names, paths, self.labels[np.asarray(chosen, np.int64)], self._kept)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` takes, which JSON can hold: the list of the files, without their pixels."""
        names = [str(path.relative_to(self.root)) for path in self.paths]
        return {
            "root": str(self.root),
            "class_names": self.class_names,
            "paths": names,
            "labels": self.labels.tolist(),
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "ImageFolder":
        """Makes the folder that `to_dict` has described; no file is opened."""
        root = Path(found["root"])
        paths = [root / name for name in found["paths"]]
        return cls(root, found["class_names"], paths, np.array(found["labels"], np.int64))

    def classes_without_images(self) -> list[str]:
        """Returns the names of the classes of which no image is here."""
        present = set(self.labels.tolist())
        return [name for label, name in enumerate(self.class_names) if label not in present]


def read_image_folder(directory: str | os.PathLike) -> ImageFolder:
    """Finds the images of a folder of class folders; images lie in them at any depth.

    Hidden files, and files whose suffix is not one of `IMAGE_SUFFIXES`, are passed over.

    Raises:
        FolderError: it is no folder, has no class folders, or one of them holds no images.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise FolderError(f"{root} is no folder; give a folder that holds a folder of images for each class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise FolderError(f"{root} holds no folders; give a folder that holds a folder of images for each class")
    paths, labels, empty = [], [], []
    for label, name in enumerate(classes):
        found = sorted(_images_in(root / name))
        paths += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if empty:
        more = f" (nor do {len(empty) - 1} others)" if len(empty) > 1 else ""
        raise FolderError(f"{root / empty[0]} holds no images{more}; add some, or remove the folder")
    return ImageFolder(root, classes, paths, np.array(labels, np.int64))


def training_and_validation(directory: str | os.PathLike, seed: int = 0) -> tuple[ImageFolder, ImageFolder, list[str]]:
    """Returns what to train on and what to measure on.

    If `directory` holds folders for both (`train` and `val`, also `validation` or `test`), these are taken; else a
    fifth of each class is held out.

    Args:
        directory: of class folders, or of the two.
        seed: of what is held out.

    Returns:
        The two folders, with the same classes, and warnings: classes that cannot be measured.

    Raises:
        FolderError: a folder cannot be used, or only validation has a class.
    """
    root = Path(directory).expanduser()
    parts = [
        next((root / name for name in names if (root / name).is_dir()), None)
        for names in (TRAINING_NAMES, VALIDATION_NAMES)
    ]
    if parts[0] is None or parts[1] is None:
        training, validation = hold_out(read_image_folder(root), 0.2, seed)
    else:
        training, validation = _read_part(parts[0]), _read_part(parts[1])
        unknown = [name for name in validation.class_names if name not in training.class_names]
        if unknown:
            raise FolderError(f"{validation.root / unknown[0]} is a class that {training.root} does not have")
        numbers = np.array([training.class_names.index(name) for name in validation.class_names])
        validation = ImageFolder(validation.root, training.class_names, validation.paths, numbers[validation.labels])
    lacking = training.classes_without_images()
    if lacking:
        raise FolderError(f"{training.root / lacking[0]} holds no images; add some, or remove the folder")
    missing = validation.classes_without_images()
    if not missing:
        return training, validation, []
    names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    return training, validation, [f"no image is held out of {_count(len(missing), 'class')} ({names}): not measured"]


def hold_out(folder: ImageFolder, part: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """Splits a folder in two, class by class, by chance; a class with one image keeps it in the first.

    Args:
        folder: what to split.
        part: of each class that goes into the second, between 0 and 1; rounded, at least one image of two.
        seed: of the chance.
    """
    draws = np.random.default_rng(seed)
    kept, held = [], []
    for label in range(len(folder.class_names)):
        members = draws.permutation(np.flatnonzero(folder.labels == label))
        count = min(max(1, round(part * len(members))), len(members) - 1)
        held += sorted(members[:count].tolist())
        kept += sorted(members[count:].tolist())
    return folder.subset(kept), folder.subset(held)


def without_broken_images(
    folder: ImageFolder, *, skip: bool = False, on_step: Callable[[int, int], None] | None = None
) -> tuple[ImageFolder, list[str]]:
    """Reads every image once.

    Args:
        folder: what to read.
        skip: leave out what cannot be read, instead of raising.
        on_step: called as `on_step(done, total)`.

    Returns:
        The folder without broken images, and what is wrong with these.

    Raises:
        FolderError: an image cannot be read and `skip` is False, or nothing is left of a class.
    """

    def reason(index: int) -> str | None:
        try:
            folder.image(index)
        except FolderError as error:
            return str(error)
        return None

    reasons = []
    with ThreadPoolExecutor(os.cpu_count()) as readers:
        for index, found in enumerate(readers.map(reason, range(len(folder)))):
            reasons.append(found)
            if on_step is not None:
                on_step(index + 1, len(folder))
    broken = [found for found in reasons if found is not None]
    if not broken:
        return folder, []
    if not skip:
        count = f"{len(broken)} of {len(folder)} images cannot be read; the first: " if len(broken) > 1 else ""
        raise FolderError(f"{count}{broken[0]}; remove what is broken, or skip it with --skip-broken")
    before = set(folder.classes_without_images())
    left = folder.subset([index for index, found in enumerate(reasons) if found is None])
    lost = [name for name in left.classes_without_images() if name not in before]
    if lost:
        raise FolderError(f"{folder.root / lost[0]} holds no image that can be read")
    return left, broken


def _read_part(root: Path) -> ImageFolder:
    """Of validation, classes may be empty; of training, `training_and_validation` says so."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(_images_in(root / name))
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise FolderError(f"{root} holds no images in class folders")
    return ImageFolder(root, classes, paths, np.array(labels, np.int64))


def _images_in(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            yield path


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}" if number != 1 else f"1 {noun}"
