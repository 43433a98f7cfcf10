"""Features of frozen models, logistic regression on them, and `twinzoo probe`."""

import json

import keras
import numpy as np
import pytest
import torch
from PIL import Image

import ptmodels
import ptmodels.features
import tfmodels
import tfmodels.features
from modelspec import CheckpointWarning, ImageProcessor
from modelspec.agreement import FLOAT64_BOUND, root_mean_square
from modelspec.checkpoints import probing_weights
from modelspec.feature_kinds import chosen_kind, feature_kinds
from ptmodels.auto import model_class
from ptmodels.features import extract_features as torch_features
from tfmodels.auto import model_class as keras_class
from tfmodels.features import extract_features as keras_features
from twinzoo.__main__ import main
from twinzoo.probing import (
    centred_and_normalised,
    draw_shots,
    fit_logistic_regression,
    probe_features,
    probe_folder,
)

head_is_left_out = pytest.mark.filterwarnings("ignore::modelspec.CheckpointWarning")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Paths of temporary folders are long, and lines would be folded."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def checkpoint(config, tmp_path):
    """A classifier of each family, saved."""
    return save(config, tmp_path / "model")


@pytest.fixture
def vit(vit_msn_config, tmp_path):
    return save(vit_msn_config, tmp_path / "vit")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """30 of scikit-learn's digits of each of four classes."""
    return write_digits(tmp_path_factory.mktemp("photos"), classes=4, count=30)


def save(config, folder):
    model = model_class(config.model_type).from_weights(config, probing_weights(config, 0))
    model.save_pretrained(folder, image_processor=ImageProcessor(size=32))
    return folder


def write_digits(folder, classes, count):
    from sklearn.datasets import load_digits

    data = load_digits()
    for label in range(classes):
        (folder / str(label)).mkdir()
        for number, image in enumerate(data.images[data.target == label][:count]):
            Image.fromarray(np.uint8(image * 15.9375)).save(folder / str(label) / f"{number:03d}.png")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# Features


@head_is_left_out
@pytest.mark.parametrize("architecture", ["Model", "ForImageClassification"])
def test_features_of_the_halves_are_the_same_in_float64(config, checkpoint, digits, architecture):
    images = digits[0][:3].astype(np.float64)
    ours = keras_class(config.model_type, architecture).from_pretrained(checkpoint, dtype="float64")
    theirs = model_class(config.model_type, architecture).from_pretrained(checkpoint, dtype="float64")
    for kind in feature_kinds(config):
        found, wanted = keras_features(ours, images, kind), torch_features(theirs, images, kind)
        assert found.dtype == wanted.dtype == np.float64
        assert found.shape == wanted.shape == (3, config.feature_info[-1]["num_chs"])
        assert np.abs(found - wanted).max() <= FLOAT64_BOUND * root_mean_square(wanted), kind


def test_the_token_before_the_norm_becomes_the_one_after_it_by_the_norm(vit, digits):
    model = ptmodels.ViTMSNForImageClassification.from_pretrained(vit)
    before, after = (torch_features(model, digits[0][:3], kind) for kind in ("cls-before-norm", "cls"))
    assert not np.allclose(before, after, rtol=0.1)
    normed = model.vit.layernorm(torch.from_numpy(before)).detach().numpy()
    np.testing.assert_allclose(normed, after, atol=1e-5)
    np.testing.assert_array_equal(torch_features(model, digits[0][:3]), before)


def test_pooled_features_are_what_the_classifier_is_given(config, checkpoint, digits):
    images = digits[0][:3]
    model = model_class(config.model_type).from_pretrained(checkpoint)
    pooled = torch.from_numpy(torch_features(model, images, "pooled"))
    heads = [getattr(model, name)(pooled).detach().numpy() for name in config.num_labels_keys]
    with torch.no_grad():
        np.testing.assert_allclose(np.mean(heads, axis=0), model(torch.from_numpy(images)).logits, rtol=1e-5, atol=1e-5)


def test_dropping_is_switched_off_and_16_bits_become_32(vit_msn_config, vit, digits):
    config = vit_msn_config.replace(hidden_dropout_prob=0.5)
    model = ptmodels.ViTMSNForImageClassification.from_pretrained(vit, config=config, dtype="bfloat16").train()
    first, second = (torch_features(model, digits[0][:2]) for _ in range(2))
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, second)


@head_is_left_out
@pytest.mark.parametrize("config", ["nat", "swiftformer", "vit_msn"], indirect=True)
def test_channels_last_images_give_the_same_features(config, checkpoint, digits):
    images = digits[0][:2]
    for architecture in ("Model", "ForImageClassification"):
        cls = keras_class(config.model_type, architecture)
        first = keras_features(cls.from_pretrained(checkpoint), images)
        last = cls.from_pretrained(checkpoint, data_format="channels_last")
        np.testing.assert_allclose(keras_features(last, images.transpose(0, 2, 3, 1)), first, rtol=1e-5, atol=1e-6)


def test_other_kinds_are_refused_by_name(swiftformer_config, vit_msn_config):
    with pytest.raises(ValueError, match="there are no 'cls' features of swiftformer; there are pooled"):
        chosen_kind(swiftformer_config, "cls")
    with pytest.raises(ValueError, match="of vit_msn; there are cls-before-norm, cls, pooled"):
        chosen_kind(vit_msn_config, "mean")
    assert chosen_kind(vit_msn_config) == "cls-before-norm"
    assert chosen_kind(swiftformer_config) == "pooled"


def test_backbones_give_maps_and_are_refused(nat_config):
    images = np.zeros((1, 3, 32, 32), np.float32)
    for model, extract in ((tfmodels.TFNatBackbone, keras_features), (ptmodels.NatBackbone, torch_features)):
        with pytest.raises(ValueError, match="NatBackbone gives maps"):
            extract(model(nat_config), images)


# Logistic regression


def test_rows_are_centred_and_normalised_each_for_itself():
    rows = centred_and_normalised(np.array([[1, 2, 3], [40, 20, 30], [7, 7, 7]], np.float32))
    assert rows.dtype == np.float64
    np.testing.assert_allclose(rows, [[-(0.5**0.5), 0, 0.5**0.5], [0.5**0.5, -(0.5**0.5), 0], [0, 0, 0]], atol=1e-15)


def test_draws_take_so_many_of_each_class_and_grow():
    labels = np.repeat([0, 1, 2], [10, 10, 3])[np.random.default_rng(0).permutation(23)]
    one, five = draw_shots(labels, 1, (7, 0)), draw_shots(labels, 5, (7, 0))
    assert np.bincount(labels[one]).tolist() == [1, 1, 1]
    assert np.bincount(labels[five]).tolist() == [5, 5, 3]
    assert set(one) < set(five) and len(set(five)) == 13
    np.testing.assert_array_equal(draw_shots(labels, 5, (7, 0)), five)
    assert set(draw_shots(labels, 5, (7, 1))) != set(five) != set(draw_shots(labels, 5, (8, 0)))


@pytest.mark.parametrize("classes", [2, 3, 200])
def test_the_fit_is_at_the_minimum_of_msns_function(classes):
    draws, c = np.random.default_rng(0), 100.0
    labels = np.arange(3 * classes) % classes
    features = centred_and_normalised(draws.normal(size=(classes, 8))[labels] + draws.normal(size=(len(labels), 8)))
    model, converged = fit_logistic_regression(features, labels, c)
    weights = np.concatenate([-model.coef_, model.coef_]) / 2 if classes == 2 else model.coef_  # (classes, 8)
    scores = np.exp(features @ weights.T)
    wrong = scores / scores.sum(axis=1, keepdims=True) - np.eye(classes)[labels]
    gradient = c * wrong.T @ features + weights
    assert converged
    assert np.abs(gradient).max() < 1e-3 * np.abs(weights).max()


def test_known_features_give_known_accuracies():
    labels = np.arange(60) % 3
    features = np.eye(4)[labels] + 0.01 * np.random.default_rng(0).normal(size=(60, 4))
    held_out = labels.copy()
    held_out[:15] = (held_out[:15] + 1) % 3  # a quarter is labelled wrong
    results, notes = probe_features(features, labels, features, held_out, shots=(1, 4), splits=2)
    assert [row.shots for row in results] == [1, 4, "all"] and notes == []
    assert [row.accuracies for row in results] == [[0.75, 0.75], [0.75, 0.75], [0.75]]
    assert [row.spread for row in results] == [0.0, 0.0, None]


def test_a_fit_that_does_not_end_is_told(monkeypatch):
    monkeypatch.setattr("twinzoo.probing._MOST_ITERATIONS", 1)
    features, labels = np.random.default_rng(0).normal(size=(20, 5)), np.arange(20) % 2
    _, notes = probe_features(features, labels, features, labels, shots=(2,), splits=1)
    assert notes == ["2 of 2 logistic regressions stopped after 1 steps; a smaller C helps"]


# Probing a folder


def test_both_halves_reach_the_same_accuracy_on_the_same_images(checkpoint, photos):
    # The fits are float64 and go on to the minimum, so that the float32 features' last bits change no class.
    found = [
        probe_folder(checkpoint, photos, framework, shots=(1, 5), splits=2, seed=3) for framework in ("tf", "torch")
    ]
    assert found[0].results == found[1].results
    accuracies = [accuracy for row in found[0].results for accuracy in row.accuracies]
    assert len(set(accuracies)) > 2, "they tell nothing: all are the same"
    assert found[0].results[-1].mean > 0.5
    assert (found[0].training_images, found[0].held_out_images) == (96, 24)


def test_a_checkpoint_without_head_is_probed_silently(vit_msn_config, vit, photos, tmp_path, capsys, recwarn):
    bare = ptmodels.ViTMSNForImageClassification.from_pretrained(vit).vit
    bare.save_pretrained(tmp_path / "bare", image_processor=ImageProcessor(size=32))
    options = ["--shots", "1", "--splits", "1", "--json"]
    outputs = []
    for source, framework in ((vit, "torch"), (tmp_path / "bare", "torch"), (tmp_path / "bare", "tf")):
        status, out, err = run(capsys, "probe", photos, "--model", source, "--framework", framework, *options)
        assert (status, err) == (0, "")
        outputs.append(json.loads(out)["results"])
    assert outputs[0] == outputs[1] == outputs[2]
    assert not [warning for warning in recwarn if issubclass(warning.category, CheckpointWarning)]


def test_the_command_prints_a_row_for_each_number_of_shots(vit, photos, capsys):
    status, out, err = run(capsys, "probe", photos, "--model", vit, "--shots", "5,2", "--features", "cls")
    lines = out.splitlines()
    assert (status, err) == (0, "") and "cls features, 32 wide, of PyTorch" in lines[0]
    assert [line.split()[0] for line in lines[2:5]] == ["2", "5", "all"]
    assert [line.split()[-1] for line in lines[2:5]] == ["3", "3", "1"]
    assert "24 held-out images of 4 classes" in lines[5]


def test_seeds_draw_other_images(vit, photos):
    found = [probe_folder(vit, photos, "torch", shots=(1,), splits=2, seed=seed).results for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found[0][0].accuracies[0] != found[0][0].accuracies[1]


def test_a_class_with_few_images_is_told_once(vit, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    folder = write_digits(tmp_path / "few", classes=3, count=4)  # one of four is held out
    status, _, err = run(capsys, "probe", folder, "--model", vit, "--shots", "1,5,9", "--splits", "1")
    assert status == 0
    assert err == "note: fewer than 9 images to draw from, all of which are taken: 0 (3), 1 (3), 2 (3)\n"


def test_mistakes_are_one_line(vit, swiftformer_config, photos, tmp_path, capsys):
    save(swiftformer_config, tmp_path / "swift")
    one = tmp_path / "one" / "only"
    one.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(one / "a.png")
    for arguments, message in (
        ([photos, "--model", tmp_path / "swift", "--features", "cls"], "features of swiftformer; there are pooled"),
        ([tmp_path / "none", "--model", vit], "none is no folder"),
        ([one.parent, "--model", vit], "holds one class, only"),
        ([photos, "--model", tmp_path / "nothing"], "nothing' is neither"),
        ([photos, "--model", vit, "--seed", "-1"], "the seed is -1"),
        ([photos, "--model", vit, "--c", "0"], "C is 0.0"),
    ):
        status, out, err = run(capsys, "probe", *arguments)
        assert (status, out) == (1, "") and message in err and err.count("\n") == 1, err
    assert run(capsys, "probe", photos, "--model", vit, "--shots", "0")[0] == 2
    (photos / "3" / "bad.png").write_bytes(b"nothing")
    try:
        status, _, err = run(capsys, "probe", photos, "--model", vit, "--shots", "1")
        assert status == 1 and "bad.png cannot be read" in err
        status, _, err = run(capsys, "probe", photos, "--model", vit, "--shots", "1", "--skip-broken")
        assert status == 0 and err.startswith("note: left out: ") and "bad.png" in err
    finally:
        (photos / "3" / "bad.png").unlink()


def test_keras_models_are_not_trained_by_being_probed(swiftformer_config, digits):
    model = tfmodels.TFSwiftFormerForImageClassification(swiftformer_config)
    before = [keras.ops.convert_to_numpy(weight).copy() for weight in model.weights]
    keras_features(model, digits[0][:4])
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), old)
