"""Folders of images: what is found, what is held out, and what is said of what is wrong."""

import numpy as np
import pytest
from image_folders import write_digits
from PIL import Image

from twinzoo.image_folder import (
    FolderError,
    hold_out,
    read_image_folder,
    training_and_validation,
    without_broken_images,
)


def folder_of(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((4, 5, 3), number, np.uint8)).save(root / name / f"{number:03d}.png")
    return root


def test_classes_are_sorted_folders_and_images_lie_at_any_depth(tmp_path):
    root = folder_of(tmp_path / "all", {"b": 2, "a": 1, "b/deeper": 3, ".hidden": 2})
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / ".DS_Store.png").write_text("hidden")
    folder = read_image_folder(root)
    assert folder.class_names == ["a", "b"]
    np.testing.assert_array_equal(folder.labels, [0, 1, 1, 1, 1, 1])
    assert folder.image(0).shape == (4, 5, 3) and folder.image(0).dtype == np.uint8
    assert {path.name for path in folder.paths[1:]} == {"000.png", "001.png", "002.png"}


def test_a_fifth_of_each_class_is_held_out_by_seed(tmp_path):
    folder = read_image_folder(folder_of(tmp_path, {"a": 50, "b": 10, "c": 2, "d": 1}))
    training, validation = hold_out(folder, 0.2, 0)
    assert np.bincount(training.labels).tolist() == [40, 8, 1, 1]
    assert np.bincount(validation.labels, minlength=4).tolist() == [10, 2, 1, 0]
    assert not set(training.paths) & set(validation.paths)
    assert set(training.paths) | set(validation.paths) == set(folder.paths)
    assert hold_out(folder, 0.2, 0)[1].paths == validation.paths != hold_out(folder, 0.2, 1)[1].paths
    _, _, warnings = training_and_validation(tmp_path)
    assert warnings == ["no image is held out of 1 class (d): not measured"]


def test_folders_for_training_and_validation_are_taken(tmp_path):
    folder_of(tmp_path / "train", {"a": 3, "b": 3, "c": 3})
    folder_of(tmp_path / "val", {"c": 2, "a": 1})
    training, validation, warnings = training_and_validation(tmp_path)
    assert len(training) == 9 and validation.class_names == ["a", "b", "c"]
    assert validation.labels.tolist() == [0, 2, 2]
    assert warnings == ["no image is held out of 1 class (b): not measured"]
    folder_of(tmp_path / "val", {"z": 1})
    with pytest.raises(FolderError, match=r"val/z is a class that .*train does not have"):
        training_and_validation(tmp_path)


def test_what_is_no_folder_of_classes_is_named(tmp_path):
    with pytest.raises(FolderError, match="nowhere is no folder"):
        read_image_folder(tmp_path / "nowhere")
    with pytest.raises(FolderError, match="holds no folders; give a folder that holds a folder of images for each"):
        read_image_folder(tmp_path)
    folder_of(tmp_path, {"a": 2, "b": 0, "c": 0})
    with pytest.raises(FolderError, match=r"/b holds no images \(nor do 1 others\); add some, or remove the folder"):
        read_image_folder(tmp_path)


def test_broken_images_are_counted_and_the_first_is_named(tmp_path):
    folder = read_image_folder(write_digits(tmp_path))
    folder.paths[3].write_bytes(folder.paths[3].read_bytes()[:40])
    folder.paths[20].write_bytes(b"")
    steps = []
    with pytest.raises(FolderError, match=rf"2 of 60 images cannot be read; the first: {folder.paths[3]} .*--skip-bro"):
        without_broken_images(folder, on_step=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (60, 60)
    left, reasons = without_broken_images(folder, skip=True)
    assert len(left) == 58 and len(reasons) == 2 and str(folder.paths[20]) in reasons[1]
    for path in (tmp_path / "digit 1").iterdir():
        path.write_bytes(b"")
    with pytest.raises(FolderError, match="digit 1 holds no image that can be read"):
        without_broken_images(read_image_folder(tmp_path), skip=True)
