"""Measuring classifiers on folders, and the commands `twinzoo list`, `classify` and `evaluate`."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import ptmodels
from modelspec import ImageProcessor, get_config, get_variant, list_models
from modelspec.checkpoints import initial_weights, parameter_shapes, probing_weights
from modelspec.configs import EvaluationTransform
from ptmodels.auto import model_class
from twinzoo.__main__ import main
from twinzoo.evaluating import (
    EvaluationCrop,
    evaluate_folder,
    halves_agreement,
    label_numbers,
    label_probabilities,
    published_variant,
    resize_and_crop,
    top_k_accuracy,
)
from twinzoo.image_folder import FolderError, ImageFolder

NAMES = ["zebra", "yak", "tabby, tabby cat", "Tiger Shark, Galeocerdo Cuvieri", "walrus", "ant", "bee"]  # not sorted
FOLDERS = {"Zebra": 0, "YAK": 1, "tabby_cat": 2, "galeocerdo cuvieri": 3, "walrus": 4, "ant": 5, "bee": 6}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Paths of temporary folders are long, and lines would be folded."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def photographs():
    """28 of scikit-learn's digits, (8, 8, 3) uint8."""
    from sklearn.datasets import load_digits

    return [np.repeat(np.uint8(image * 15.9375)[:, :, None], 3, axis=2) for image in load_digits().images[:28]]


@pytest.fixture
def checkpoint(config, tmp_path):
    """A classifier of seven labels of each family, saved."""
    return save(config, tmp_path / "model")


@pytest.fixture
def swift(swiftformer_config, tmp_path):
    return save(swiftformer_config, tmp_path / "swift")


def save(config, folder, names=NAMES):
    config = config.replace(id2label=dict(enumerate(names)))
    model = model_class(config.model_type).from_weights(config, probing_weights(config, 0))
    model.save_pretrained(folder, image_processor=ImageProcessor(size=32))
    return folder


def logits_of(source, images) -> np.ndarray:
    model = ptmodels.load(source)
    with torch.no_grad():
        return model(**ImageProcessor(size=32)(images, return_tensors="pt")).logits.numpy()


def sort_into(folder, images, labels, names=tuple(FOLDERS)):
    """Writes each image into the folder of its label; every folder gets one."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / names[label] / f"{number:02d}.png")
    return folder


def class_folders(*names) -> ImageFolder:
    from pathlib import Path

    return ImageFolder(Path("photos"), sorted(names), [], np.zeros(0, np.int64))


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# Labels


def test_folders_are_matched_by_name_synonym_case_and_underscore():
    folder = class_folders(*FOLDERS)
    numbers, notes = label_numbers(folder, dict(enumerate(NAMES)))
    assert dict(zip(folder.class_names, numbers.tolist(), strict=True)) == FOLDERS and notes == []
    assert label_numbers(class_folders("bee", "yak"), dict(enumerate(NAMES)))[0].tolist() == [6, 1]


def test_a_whole_label_goes_before_a_synonym_of_another():
    numbers, _ = label_numbers(class_folders("maillot"), {0: "maillot, tank suit", 1: "maillot", 2: "ant"})
    assert numbers.tolist() == [1]


def test_folders_without_any_name_are_taken_in_sorted_order():
    numbers, notes = label_numbers(class_folders("n02", "n01", "n03"), {0: "ant", 1: "bee", 2: "cow"})
    assert numbers.tolist() == [0, 1, 2]
    assert notes == ["no class folder bears the name of a label; they are taken for the labels in sorted order"]


@pytest.mark.parametrize(
    ("folders", "labels", "message"),
    [
        (("ant", "walrusses"), NAMES, "photos/walrusses bears the name of none of the 7 labels; close to it: walrus"),
        (("ant", "qqqq"), NAMES, "photos/qqqq bears the name of none of the 7 labels (zebra, yak, tabby, tabby cat, "),
        (("n01", "n02"), NAMES, "photos/n01 bears the name of none"),
        (("crane",), ["crane", "ant", "crane"], "photos/crane may be of several labels, 0 (crane) and 2 (crane)"),
        (("tabby", "tabby cat"), NAMES, "photos/tabby cat and tabby are both of label 2 (tabby, tabby cat)"),
    ],
)
def test_folders_without_one_label_are_named(folders, labels, message):
    with pytest.raises(FolderError) as caught:
        label_numbers(class_folders(*folders), dict(enumerate(labels)))
    assert message in str(caught.value)


# Figures


def test_top_k_counts_rows_whose_label_is_among_the_k_first():
    logits = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 1, 1, 0]])
    labels = np.array([0, 2, 1])
    assert top_k_accuracy(logits, labels, 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(logits, labels, 2) == 1.0
    assert top_k_accuracy(logits, np.array([3, 0, 2]), 3) == pytest.approx(1 / 3)


def test_halves_are_compared_by_first_class_and_by_rms():
    reference = np.array([[3.0, -3.0], [3.0, -3.0], [-3.0, 3.0]])
    actual = reference + np.array([[0.3, 0.0], [-3.5, 3.5], [0.0, 0.0]])
    assert halves_agreement(reference, reference) == (1.0, 0.0)
    assert halves_agreement(actual, reference) == pytest.approx((2 / 3, 3.5 / 3))


def test_probabilities_are_of_one_label_or_of_each(swiftformer_config):
    logits = np.array([[1000.0, 1000.0, 0.0]], np.float32)
    np.testing.assert_allclose(label_probabilities(logits, swiftformer_config), [[0.5, 0.5, 0]])
    several = swiftformer_config.replace(problem_type="multi_label_classification")
    np.testing.assert_allclose(label_probabilities(logits / 1000, several), [[0.731058579, 0.731058579, 0.5]])


# The transform that published figures are of


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (32, 49), (32, 32)])
def test_the_crop_is_the_middle(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    cropped = resize_and_crop(image, EvaluationTransform(resize=32, crop=28, interpolation="bicubic"))
    top, left = (height - 28) // 2, {49: 10, 64: 18, 32: 2}[width]  # half of 21 is 10, as Python rounds
    np.testing.assert_array_equal(cropped, image[top : top + 28, left : left + 28])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_shorter_side_is_resized_before_the_crop(interpolation):
    ramp = np.linspace(0, 250, 300).round().astype(np.uint8)
    image = np.repeat(np.tile(ramp, (200, 1))[:, :, None], 3, axis=2)  # 200 x 300, from left to right
    transform = EvaluationTransform(resize=64, crop=56, interpolation=interpolation)
    cropped = resize_and_crop(image, transform)
    assert cropped.shape == (56, 56, 3) and cropped.dtype == np.uint8
    expected = 250 * ((np.arange(20, 76) + 0.5) / 96)  # 64 x 96, of which columns 20 to 75 are the middle
    np.testing.assert_allclose(cropped[28, :, 0], expected, atol=1.5)
    upright = resize_and_crop(image.transpose(1, 0, 2), transform)
    np.testing.assert_allclose(upright[:, 28, 0], expected, atol=1.5)


def test_the_fraction_of_the_longer_side_is_cut_off():
    image = np.random.default_rng(0).integers(0, 256, (67, 101, 3), np.uint8)
    cropped = resize_and_crop(image, EvaluationTransform(resize=32, crop=32, interpolation="bilinear"))
    whole = np.asarray(Image.fromarray(image).resize((48, 32), Image.Resampling.BILINEAR))  # 32 * 101 / 67 = 48.2
    np.testing.assert_array_equal(cropped, whole[:, 8:40])


def test_the_crop_is_normalised_as_the_processor_does_it():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    processor = ImageProcessor(size=24, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.4, 0.3])
    crop = EvaluationCrop(processor, EvaluationTransform(resize=32, crop=28, interpolation="bicubic"))
    found = crop([image, image])["pixel_values"]
    assert found.shape == (2, 3, 28, 28) and found.dtype == np.float32
    wanted = (image[2:30, 2:30] / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.4, 0.3]
    np.testing.assert_allclose(found[1], wanted.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


# Which variant a source is


@pytest.mark.parametrize("name", ["nat-mini", "dinat-mini", "dinat-large-in22k-in1k-384", "vit-msn-base-4"])
def test_a_variant_is_known_by_its_name_its_hub_id_and_its_config(name, tmp_path):
    variant, config = get_variant(name), get_config(name)
    assert published_variant(name, config) == variant
    assert published_variant(variant.hub_id, config) == variant
    assert published_variant(tmp_path, config) == variant
    assert published_variant(tmp_path, config.replace(num_labels=10)) is None


def test_another_architecture_is_no_published_variant(tmp_path):
    assert published_variant(tmp_path, get_config("nat-mini", embed_dim=32, num_heads=[1, 2, 4, 8])) is None
    assert published_variant("someone/nat-mini", get_config("nat-mini", depths=[1, 1, 1, 1])) is None


def test_a_published_variant_is_measured_with_its_own_transform_too(tmp_path, monkeypatch, capsys):
    labels = ["tench", *(f"thing {number}" for number in range(1, 1000))]
    config = get_config("swiftformer-xs", id2label=dict(enumerate(labels)))
    weights = initial_weights(config, parameter_shapes(config), 0)
    model = ptmodels.SwiftFormerForImageClassification.from_weights(config, weights)
    processor = ImageProcessor(**get_variant("swiftformer-xs").image_processor)
    model.save_pretrained(tmp_path / "model", image_processor=processor)
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    folder = sort_into(tmp_path / "photos", [image], [0], ["tench"])
    seen = []

    def predict(framework, model, batches):
        seen.append(batches[0][0])
        return np.eye(1000)[[3 * len(seen) - 3]]  # right for the first transform, among the first five for the second

    monkeypatch.setattr("twinzoo.evaluating.predict_logits", predict)
    status, out, err = run(capsys, "evaluate", folder, "--model", tmp_path / "model")
    assert status == 0
    np.testing.assert_array_equal(seen[0], processor(image)["pixel_values"])
    middle = np.asarray(Image.fromarray(image).resize((426, 256), Image.Resampling.BICUBIC))[16:240, 101:325]
    np.testing.assert_array_equal(seen[1], processor(middle, do_resize=False)["pixel_values"])
    lines = [line.split() for line in out.splitlines()]
    assert lines[2][0] == "processor:" and lines[2][-2:] == ["100.00%", "100.00%"]
    assert lines[3][0] == "evaluation:" and lines[3][-2:] == ["0.00%", "100.00%"]
    assert lines[4] == ["published", "75.70%"]
    assert "not confirmed: original repository's table" in out and "replaced in July 2023" in out
    assert "the config is that of swiftformer-xs" in err and "these images are of 1" in err


# Commands


def test_images_are_counted_right_in_both_halves(checkpoint, photographs, tmp_path, capsys):
    logits = logits_of(checkpoint, photographs)
    order = np.argsort(-logits, axis=-1)
    labels = np.where(np.arange(28) < 21, order[:, 0], order[:, 1])  # a quarter is sorted by the second guess
    labels[26:] = order[26, 4], order[27, 6]  # of which one by the fifth, and one by the last
    folder = sort_into(tmp_path / "photos", photographs, labels)
    status, out, err = run(
        capsys, "evaluate", folder, "--model", checkpoint, "--framework", "both", "--batch-size", "8", "--json"
    )
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["images"] == 28 and found["num_labels"] == 7 and found["published"] is None
    assert [row["framework"] for row in found["measurements"]] == ["tf", "torch"]
    for row in found["measurements"]:
        assert (row["top1"], row["top5"]) == (pytest.approx(21 / 28), pytest.approx(27 / 28)), row["framework"]
    assert found["same_top1"] == 1.0 and 0 < found["logit_difference"] < 1e-4


def test_top5_is_left_out_where_it_says_nothing(swiftformer_config, photographs, tmp_path, capsys):
    source = save(swiftformer_config, tmp_path / "model", names=["a", "b", "c", "d", "e"])
    folder = sort_into(tmp_path / "photos", photographs[:2], [0, 1], ["a", "b"])
    status, out, _ = run(capsys, "evaluate", folder, "--model", source)
    assert status == 0 and "top-1" in out and "top-5" not in out
    assert evaluate_folder(source, folder, ["torch"]).measurements[0].top5 is None


def test_of_train_and_val_the_second_is_measured(swift, photographs, tmp_path):
    sort_into(tmp_path / "photos" / "train", photographs[:6], [0, 1, 2, 0, 1, 2])
    sort_into(tmp_path / "photos" / "val", photographs[6:9], [0, 1, 2])
    found = evaluate_folder(swift, tmp_path / "photos", ["torch"])
    assert found.images == 3 and found.folder.endswith("val")


def test_progress_is_told_to_the_end(swift, photographs, tmp_path):
    folder, told = sort_into(tmp_path / "photos", photographs[:9], [0, 1, 2] * 3), {}
    evaluate_folder(
        swift, folder, ["torch"], batch_size=4, on_step=lambda done, total, what: told.update({what: (done, total)})
    )
    assert told == {"reading": (9, 9), "PyTorch, processor": (9, 9)}


def test_classify_gives_the_most_probable_labels(swift, photographs, tmp_path, capsys):
    paths = sorted(sort_into(tmp_path, photographs[:17], [0] * 17, ["a"]).glob("a/*.png"))  # more than one batch
    logits = logits_of(swift, photographs[:17]).astype(np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for framework in ("tf", "torch"):
        status, out, err = run(
            capsys, "classify", *paths, "--model", swift, "--framework", framework, "--top", 3, "--json"
        )
        assert (status, err) == (0, "")
        found = json.loads(out)["images"]
        assert [row["image"] for row in found] == [str(path) for path in paths]
        for row, probabilities in zip(found, wanted, strict=True):
            first = np.argsort(-probabilities)[:3]
            assert [entry["label"] for entry in row["labels"]] == [NAMES[number] for number in first]
            got = [entry["probability"] for entry in row["labels"]]
            np.testing.assert_allclose(got, probabilities[first], rtol=1e-3)


def test_a_broken_image_is_named_and_the_others_are_done(swift, photographs, tmp_path, capsys):
    good = [tmp_path / f"{number}.png" for number in range(2)]
    for path, image in zip(good, photographs, strict=False):
        Image.fromarray(image).save(path)
    bad = tmp_path / "bad.png"
    bad.write_bytes(good[0].read_bytes()[:60])
    arguments = ["classify", good[0], bad, tmp_path / "none.png", good[1], "--model", swift]
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert [line for line in out.splitlines() if line.endswith(".png")] == [str(path) for path in good]
    assert out.count("%") == 10
    lines = err.splitlines()
    assert len(lines) == 2 and str(bad) in lines[0] and "none.png" in lines[1] and "no such file" in lines[1]
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 1 and [row["image"] for row in json.loads(out)["broken"]] == [str(bad), str(tmp_path / "none.png")]


def test_a_checkpoint_without_trained_head_is_refused(vit_msn_config, photographs, tmp_path, capsys):
    ptmodels.ViTMSNModel(vit_msn_config).save_pretrained(tmp_path / "bare", image_processor=ImageProcessor(size=32))
    folder = sort_into(tmp_path / "photos", photographs[:2], [0, 1], ["LABEL_0", "LABEL_1"])
    for command, what in (("classify", next(folder.glob("*/*.png"))), ("evaluate", folder)):
        status, out, err = run(capsys, command, what, "--model", tmp_path / "bare")
        assert (status, out) == (1, "") and "holds no trained classifier" in err and err.count("\n") == 1


def test_mistakes_are_one_line(swift, photographs, tmp_path, capsys):
    folder = sort_into(tmp_path / "photos", photographs[:3], [0, 1, 2])
    (folder / "ufo").mkdir()
    Image.fromarray(photographs[3]).save(folder / "ufo" / "a.png")
    for arguments, message in (
        ([folder, "--model", swift], "photos/ufo bears the name of none of the 7 labels"),
        ([tmp_path / "none", "--model", swift], "none is no folder"),
        ([folder, "--model", tmp_path / "nothing"], "nothing' is neither"),
    ):
        status, out, err = run(capsys, "evaluate", *arguments)
        assert (status, out) == (1, "") and message in err and err.count("\n") == 1, err
    assert run(capsys, "evaluate", folder, "--model", swift, "--batch-size", "0")[0] == 2
    (folder / "ufo" / "a.png").rename(folder / "YAK" / "a.png")
    (folder / "ufo").rmdir()
    (folder / "YAK" / "bad.png").write_bytes(b"nothing")
    status, _, err = run(capsys, "evaluate", folder, "--model", swift)
    assert status == 1 and "bad.png cannot be read" in err and err.count("\n") == 1
    status, out, err = run(capsys, "evaluate", folder, "--model", swift, "--skip-broken")
    assert status == 0 and "4 images of 3 classes" in out and "left out: " in err and "bad.png" in err


def test_list_prints_all_variants_a_pattern_or_json(capsys):
    status, out, _ = run(capsys, "list")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert status == 0 and set(list_models()) < rows.keys()
    assert rows["nat-mini"] == ["20.0M", "81.8", "224", "shi-labs/nat-mini-in1k-224"]
    assert rows["dinat-large-11x11-in22k-in1k-384"][1:3] == ["87.5?", "384"]
    assert rows["nat-tiny"][-1] == "shi-labs/nat-tiny-in1k-224?" and rows["vit-msn-small"][1] == "-"
    assert "? not confirmed" in out
    status, out, _ = run(capsys, "list", "swiftformer-l*", "--json")
    assert status == 0 and json.loads(out) == [
        json.loads(json.dumps(dataclasses.asdict(get_variant(name)))) for name in ("swiftformer-l1", "swiftformer-l3")
    ]
    _, out, _ = run(capsys, "list", "dinat-m")
    assert "dinat-mini" in out and "dinat-base" not in out and "?" not in out
    status, out, err = run(capsys, "list", "resnet*")
    assert (status, out) == (1, "") and "no published variant matches 'resnet*'" in err


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_list_fits_into_the_terminal_and_leaves_nothing_out(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(capsys, "list")
    assert max(len(line.rstrip()) for line in out.splitlines()) <= columns
    assert "\u2026" not in out
    for name in ("swiftformer-xs", "vit-msn-large-7", "303.5M", "in1k-384"):
        assert name in out
