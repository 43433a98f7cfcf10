"""The recipe's values are checked, its schedule is what it says, and batches are a function of seed and epoch."""

import dataclasses

import numpy as np
import pytest

from modelspec import ImageProcessor
from modelspec.training import ArrayImages, EvaluationBatches, Recipe, TrainingBatches
from modelspec.training.batches import augment


def numbered_images(count=20, classes=5):
    """Images of one number each, so that one sees which is where."""
    values = np.arange(count, dtype=np.float64)
    return ArrayImages(np.broadcast_to(values[:, None, None, None], (count, 3, 2, 2)), np.arange(count) % classes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 2.5),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("layer_decay", 1.5),
        ("label_smoothing", 1.0),
        ("ema", 1.0),
        ("clip_norm", 0),
        ("flip", -0.1),
        ("mixed_precision", 1),
        ("freeze", 3),
        ("accumulation_steps", 5),
        ("warmup_epochs", 10),
        ("min_learning_rate", 1.0),
        ("seed", -1),
    ],
)
def test_a_value_that_is_not_allowed_is_named(field, value):
    with pytest.raises(ValueError, match=rf"Recipe\.{field} is {value}"):
        Recipe(**{field: value})


def test_a_recipe_survives_its_dictionary():
    recipe = Recipe(epochs=3, ema=0.99, freeze="stage1", clip_norm=1)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match="no field 'epoch'; there are epochs"):
        Recipe.from_dict({"epoch": 3})


def test_the_learning_rate_rises_and_falls():
    recipe = Recipe(epochs=5, learning_rate=0.5, min_learning_rate=0.1, warmup_epochs=0.5)
    rates = [recipe.learning_rate_at(step, 8) for step in range(40)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4] == 0.5 and rates[22] == pytest.approx(0.3)  # the peak, and half of the way down
    assert all(later < earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))
    assert rates[-1] > 0.1 and recipe.learning_rate_at(40, 8) == pytest.approx(0.1)


def test_an_epoch_takes_each_image_at_most_once_and_every_epoch_another_order():
    batches = TrainingBatches(numbered_images(), Recipe(batch_size=6, accumulation_steps=2), 5)
    assert (batches.steps_per_epoch, batches.parts_per_epoch, batches.part_size) == (3, 6, 3)
    epochs = []
    for epoch in range(2):
        parts = [batches.part(epoch, index) for index in range(6)]
        seen = np.concatenate([images[:, 0, 0, 0] for images, _ in parts]).astype(int)
        assert len(set(seen)) == 18
        targets = np.concatenate([targets for _, targets in parts])
        np.testing.assert_array_equal(targets.argmax(1), seen % 5)
        assert set(targets.sum(1)) == {1.0}
        epochs.append(seen.tolist())
    assert epochs[0] != epochs[1]
    again = TrainingBatches(numbered_images(), Recipe(batch_size=6, accumulation_steps=2), 5).part(1, 4)
    np.testing.assert_array_equal(again[0], batches.part(1, 4)[0])
    other = TrainingBatches(numbered_images(), Recipe(batch_size=6, accumulation_steps=2, seed=1), 5).part(1, 4)
    assert not np.array_equal(again[0], other[0])


def test_a_small_set_makes_one_batch():
    batches = TrainingBatches(numbered_images(7), Recipe(batch_size=32, accumulation_steps=2), 5)
    assert (batches.steps_per_epoch, batches.part_size) == (1, 3)
    with pytest.raises(ValueError, match="there are 1 images to train on; a batch of 2 parts needs 2"):
        TrainingBatches(numbered_images(1), Recipe(accumulation_steps=2), 5)


def test_mixup_mixes_images_and_targets_alike():
    recipe = Recipe(batch_size=8, mixup=1.0)
    plain = TrainingBatches(numbered_images(8, 8), dataclasses.replace(recipe, mixup=0.0), 8)
    mixed = TrainingBatches(numbered_images(8, 8), recipe, 8)
    for epoch in range(3):
        images, targets = mixed.part(epoch, 0)
        np.testing.assert_allclose(targets.sum(1), 1)
        np.testing.assert_allclose(images[:, 0, 0, 0], targets @ np.arange(8))  # the images are their classes
        assert not np.allclose(images, plain.part(epoch, 0)[0])


def test_augmentation_crops_and_mirrors_within_bounds():
    image = np.arange(30 * 40 * 3, dtype=np.int64).reshape(30, 40, 3)
    draws = np.random.default_rng(0)
    areas, mirrored = [], 0
    for _ in range(300):
        crop = augment(image, Recipe(crop_scale=0.5, flip=0.25), draws)
        height, width, _ = crop.shape
        areas.append(height * width / 1200)
        assert abs(crop[0, 1, 0] - crop[0, 0, 0]) == 3 and crop[1, 0, 0] - crop[0, 0, 0] == 120  # a part of the image
        mirrored += crop[0, 0, 0] > crop[0, 1, 0]
    assert 0.4 < min(areas) < 0.56 and max(areas) > 0.95
    assert 50 < mirrored < 100
    assert augment(image, Recipe(), draws) is image


def test_a_teacher_adds_its_classes():
    def teacher(pixel_values):
        return np.eye(5)[np.full(len(pixel_values), 3)]

    batches = TrainingBatches(numbered_images(), Recipe(batch_size=4, distillation=True), 5, teacher=teacher)
    images, targets = batches.part(0, 0)
    assert targets.shape == (4, 2, 5)
    np.testing.assert_array_equal(targets.argmax(-1), np.stack([images[:, 0, 0, 0] % 5, np.full(4, 3)], 1))
    with pytest.raises(ValueError, match="Recipe.distillation is False, but one is given as teacher"):
        TrainingBatches(numbered_images(), Recipe(), 5, teacher=teacher)


def test_evaluation_goes_through_all_images_in_order():
    batches = EvaluationBatches(numbered_images(7), 5, batch_size=3)
    assert [len(targets) for _, targets in batches] == [3, 3, 1] and len(batches) == 3
    np.testing.assert_array_equal(np.concatenate([images[:, 0, 0, 0] for images, _ in batches]), np.arange(7))


def test_a_processor_gets_the_augmented_images():
    images = ArrayImages([np.full((8, 6, 3), 10 * index, np.uint8) for index in range(4)], [0, 1, 2, 3])
    processor = ImageProcessor(size=4, image_mean=0.0, image_std=1.0, do_rescale=False)
    found, targets = TrainingBatches(images, Recipe(batch_size=4, crop_scale=0.5), 4, processor).part(0, 0)
    assert found.shape == (4, 3, 4, 4) and found.dtype == np.float32
    np.testing.assert_array_equal(found[:, 0, 0, 0], 10 * targets.argmax(1))


def test_labels_that_the_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match="labels go from 0 to 4; the model has 3"):
        TrainingBatches(numbered_images(), Recipe(), 3)
    with pytest.raises(ValueError, match="give integers"):
        ArrayImages([np.zeros((2, 2, 3))], [0.5])
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        ArrayImages([np.zeros((2, 2, 3))] * 2, [0])
