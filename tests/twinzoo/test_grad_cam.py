"""Grad-CAM: both halves' maps are those of the paper, and its picture shows them."""

import numpy as np
import pytest
import tensorflow as tf
import torch
from skimage import data

import ptmodels.auto
import tfmodels.auto
from modelspec import ImageProcessor
from modelspec.checkpoints import probing_weights
from ptmodels.grad_cam import grad_cam as torch_grad_cam
from tfmodels.grad_cam import grad_cam as keras_grad_cam
from tfmodels.weights import read_weights
from twinzoo.plots import plot_grad_cam

IMAGE = data.chelsea()[:120, 100:260]


def make(config, **kwargs):
    """A float64 classifier of each half, torch's in inference mode."""
    weights = probing_weights(config)
    ours = ptmodels.auto.model_class(config.model_type).from_weights(config.replace(), weights, dtype="float64")
    keras_class = tfmodels.auto.model_class(config.model_type)
    return ours.eval(), keras_class.from_weights(config.replace(), weights, dtype="float64", **kwargs)


@pytest.fixture
def images(config):
    """(1, 3, H, W) float64; not square, of a size that the strides do not divide, where the family takes such."""
    size = (32, 32) if config.model_type == "vit_msn" else (44, 76)
    return ImageProcessor(size=size)(IMAGE)["pixel_values"].astype(np.float64)


def paper(model, images, label):
    """Equations 1 and 2, by backward hooks on the whole model."""
    found = {}
    body = model.get_body()
    layer = {
        "swiftformer": lambda: body.encoder.network[-1],
        "vit_msn": lambda: body.encoder.layer[-1].layernorm_before,
    }.get(model.config.model_type, lambda: body.layernorm)()

    def keep(module, arguments, output):
        output.retain_grad()
        found["map"] = output

    hook = layer.register_forward_hook(keep)
    model(torch.from_numpy(images)).logits[0, label].backward()
    hook.remove()
    features, gradient = (x.detach().numpy()[0] for x in (found["map"], found["map"].grad))
    if model.config.model_type == "vit_msn":
        features, gradient = (x[1:].reshape(4, 4, -1) for x in (features, gradient))
    elif model.config.model_type == "swiftformer":
        features, gradient = (np.moveaxis(x, 0, -1) for x in (features, gradient))
    heat = np.maximum((features * gradient.mean((0, 1))).sum(-1), 0)
    return heat / heat.max() if heat.any() else heat


def test_both_halves_maps_are_the_papers(config, images):
    ours, theirs = make(config)
    lit = 0
    for label in range(10):
        heat = torch_grad_cam(ours, images, label)
        assert heat.shape == {"vit_msn": (4, 4)}.get(config.model_type, (6, 10)) and heat.dtype == np.float64
        np.testing.assert_allclose(heat, paper(ours, images, label), rtol=0, atol=1e-10)
        np.testing.assert_allclose(keras_grad_cam(theirs, images, label), heat, rtol=0, atol=1e-10)
        assert heat.min() >= 0 and heat.max() in (0, 1)
        lit += heat.any() and not heat.all()
    assert lit >= 3  # or neither the sign nor the place of the sums would matter


def test_the_predicted_class_is_the_default(nat_config):
    ours, theirs = make(nat_config)
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    label = int(ours(torch.from_numpy(images)).logits.argmax())
    for model, grad_cam in ((ours, torch_grad_cam), (theirs, keras_grad_cam)):
        np.testing.assert_array_equal(grad_cam(model, images), grad_cam(model, images, label))


def test_images_may_lie_channels_last(config, images):
    _, first = make(config)
    _, last = make(config, data_format="channels_last")
    heat = keras_grad_cam(last, np.moveaxis(images, 1, -1), 3)
    np.testing.assert_allclose(heat, keras_grad_cam(first, images, 3), rtol=0, atol=1e-10)


def test_torchs_model_is_left_as_it_was(config, images):
    ours, _ = make(config)
    expected = torch_grad_cam(ours, images, 3)
    ours.train().get_body().eval()
    ours.requires_grad_(False)
    next(ours.parameters()).requires_grad_()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    modes = [module.training for module in ours.modules()]
    with torch.inference_mode():
        np.testing.assert_array_equal(torch_grad_cam(ours, images, 3), expected)
    with pytest.raises(ValueError):
        torch_grad_cam(ours, images[:, :1])
    assert modes == [module.training for module in ours.modules()]
    assert [parameter.requires_grad for parameter in ours.parameters()] == [
        index == 0 for index, _ in enumerate(ours.parameters())
    ]
    assert all(parameter.grad is None for parameter in ours.parameters())
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


def test_kerass_model_is_left_as_it_was(swiftformer_config):
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    _, theirs = make(swiftformer_config)
    before = {key: value.copy() for key, value in read_weights(theirs).items()}
    trainable = [layer.trainable for layer in theirs._flatten_layers()]
    keras_grad_cam(theirs, images)
    assert trainable == [layer.trainable for layer in theirs._flatten_layers()]
    after = read_weights(theirs)
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_class_that_nothing_argues_for_has_no_map(nat_config):
    ours, theirs = make(nat_config)
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    features = ours.forward_features(torch.from_numpy(images)).detach()[0]
    against = -features.mean((0, 1))
    assert (features @ against).max() < 0
    with torch.no_grad():
        ours.classifier.weight[4] = against
    weights = {key: value.numpy() for key, value in ours.state_dict().items()}
    theirs = type(theirs).from_weights(nat_config, weights, dtype="float64")
    for model, grad_cam in ((ours, torch_grad_cam), (theirs, keras_grad_cam)):
        np.testing.assert_array_equal(grad_cam(model, images, 4), np.zeros((4, 4)))
        figure = plot_grad_cam(IMAGE, model, images, 4)
        assert figure.axes[1].get_title() == "Grad-CAM: nothing argues for it"


# The picture


def test_the_map_lies_over_the_photograph(config, images):
    ours, theirs = make(config)
    heat = torch_grad_cam(ours, images, 9)
    # middles of the map's cells, of which the last ones may stand out of the image
    stride, size = ours.feature_info[-1]["reduction"], images.shape[2:]
    middles = [(np.arange(n) + 0.5) * stride / length for n, length in zip(heat.shape, size, strict=True)]
    places = [np.int64(m[m < 1] * length) for m, length in zip(middles, IMAGE.shape[:2], strict=True)]
    inside = heat[: len(places[0]), : len(places[1])]
    for model in (ours, theirs):
        figure = plot_grad_cam(IMAGE, model, images, 9)
        photograph, overlay = figure.axes[:2]
        np.testing.assert_allclose(photograph.images[0].get_array(), IMAGE / 255.0)
        fine = overlay.images[1].get_array()
        assert fine.shape == IMAGE.shape[:2] and 0 <= fine.min() <= fine.max() <= 100
        assert np.corrcoef(fine[np.ix_(*places)].ravel(), inside.ravel())[0, 1] > 0.99


def test_nothing_of_the_picture_is_cut_off(nat_config):
    nat_config.id2label = {index: rf"a $\no$ {index}, " + 20 * "very " + "long" for index in range(10)}
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    figure = plot_grad_cam(IMAGE, make(nat_config)[0], images, 9)
    figure.draw_without_rendering()
    ends = figure.get_tightbbox().get_points()
    assert (ends[0] >= 0).all() and (ends[1] <= figure.get_size_inches()).all()
    assert figure.get_suptitle().startswith(r"a $\no$ 9, very very") and "…, " in figure.get_suptitle()


def test_the_title_gives_what_the_model_predicts(swiftformer_config):
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    model, _ = make(swiftformer_config)
    logits = model(torch.from_numpy(images)).logits[0].detach()
    label = int(logits.argmax())
    for problem, value in (
        ("single_label_classification", f"LABEL_{label}, {100 * float(logits.softmax(-1)[label]):.1f} %"),
        ("multi_label_classification", f"LABEL_{label}, {100 * float(logits.sigmoid()[label]):.1f} %"),
        ("regression", f"LABEL_{label}: {float(logits[label]):.4g}"),
    ):
        model.config.problem_type = problem
        assert plot_grad_cam(IMAGE, model, images).get_suptitle() == value


def test_images_of_either_halfs_tensors_will_do(nat_config):
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32))
    for model in make(nat_config):
        expected = plot_grad_cam(IMAGE, model, images).axes[1].images[1].get_array()
        for wrap in (torch.tensor, tf.constant):
            heat = plot_grad_cam(IMAGE, model, wrap(images)).axes[1].images[1].get_array()
            np.testing.assert_array_equal(heat, expected)


def test_a_channels_last_model_gives_the_same_picture(swiftformer_config):
    images = np.random.default_rng(0).standard_normal((1, 3, 44, 76))
    _, first = make(swiftformer_config)
    _, last = make(swiftformer_config, data_format="channels_last")
    expected = plot_grad_cam(IMAGE, first, images, 9).axes[1].images[1].get_array()
    heat = plot_grad_cam(IMAGE, last, np.moveaxis(images, 1, -1), 9).axes[1].images[1].get_array()
    np.testing.assert_allclose(heat, expected, atol=1e-3)  # of 100, float32


def test_what_cannot_be_explained_is_named(nat_config):
    images = np.zeros((1, 3, 32, 32))
    with pytest.raises(ValueError, match="model is a Linear; give a ForImageClassification model of ptmodels or"):
        plot_grad_cam(IMAGE, torch.nn.Linear(1, 1), images)
    for model in make(nat_config):
        with pytest.raises(ValueError, match="label is 10; the model has 10 classes, 0 to 9"):
            plot_grad_cam(IMAGE, model, images, 10)
        with pytest.raises(ValueError, match="label is -1; the model has 10 classes, 0 to 9"):
            plot_grad_cam(IMAGE, model, images, -1)
        with pytest.raises(ValueError, match="pixel_values are 2 images; give one"):
            plot_grad_cam(IMAGE, model, np.zeros((2, 3, 32, 32)))
        with pytest.raises(ValueError, match="NatModel has no classifier; use a ForImageClassification model"):
            plot_grad_cam(IMAGE, model.get_body(), images)
        model.reset_classifier(0)
        with pytest.raises(ValueError, match="has no classifier; use a ForImageClassification model with labels"):
            plot_grad_cam(IMAGE, model, images)
