"""`parity.compare`: a Keras CNN and its torch twin, neither of them ours, as the README shows."""

import keras
import numpy as np
import pytest
import torch
from torch import nn

import parity


class Twin(nn.Module):
    def __init__(self, epsilon: float = 1e-3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(8, eps=epsilon),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3),
            nn.GELU(),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 5 * 5, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return self.head(self.features(x))


def cnn(dtype: str = "float32") -> keras.Model:
    keras.utils.set_random_seed(0)
    options = {"dtype": dtype}
    image = keras.Input((14, 14, 3), dtype=dtype)
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="stem", **options)(image)
    x = keras.layers.BatchNormalization(name="norm", **options)(x)
    x = keras.layers.MaxPooling2D(2, name="pool", **options)(x)
    x = keras.layers.Conv2D(16, 3, name="conv", **options)(x)
    x = keras.layers.Activation(lambda x: 0.5 * x * (1 + keras.ops.erf(x / 2**0.5)), name="gelu", **options)(x)
    x = keras.layers.Flatten(name="flat", **options)(x)
    x = keras.layers.Dense(32, activation="relu", name="wide", **options)(x)
    return keras.Model(image, keras.layers.Dense(10, name="logits", **options)(x))


def twin_of(model: keras.Model, **options) -> Twin:
    twin = Twin(**options).to(getattr(torch, model.get_layer("conv").compute_dtype))
    weights = {layer.name: [torch.from_numpy(w) for w in layer.get_weights()] for layer in model.layers}
    with torch.no_grad():
        for module, name in ((twin.features[0], "stem"), (twin.features[4], "conv")):
            module.weight.copy_(weights[name][0].permute(3, 2, 0, 1))
        # maps are flattened channels last in Keras, channels first in torch
        wide = weights["wide"][0].reshape(5, 5, 16, 32).permute(2, 0, 1, 3).flatten(0, 2)
        for module, kernel in ((twin.head[1], wide), (twin.head[3], weights["logits"][0])):
            module.weight.copy_(kernel.T)
        for module, name in ((twin.features[0], "stem"), (twin.features[4], "conv"), (twin.head[1], "wide")):
            module.bias.copy_(weights[name][1])
        twin.head[3].bias.copy_(weights["logits"][1])
    return twin


@pytest.fixture(scope="module")
def images():
    channels_last = np.random.default_rng(0).standard_normal((3, 14, 14, 3), np.float32)
    return channels_last, channels_last.transpose(0, 3, 1, 2)


def test_a_right_pair_passes_and_its_layers_find_each_other(images):
    model = cnn()
    twin = twin_of(model).train()
    comparison = parity.compare(model, twin, images)
    assert comparison.passed and comparison.first_divergence is None, comparison
    assert comparison.names == {
        "stem": "features.0",
        "stem:activation": "features.1",
        "norm": "features.2",
        "pool": "features.3",
        "conv": "features.4",
        "gelu": "features.5",
        "flat": "head.0",
        "wide": "head.1",
        "wide:activation": "head.2",
        "logits": "head.3",
    }
    assert all(row["floor"] > 0 and row["factor"] <= 3 for row in comparison.results if row["half"] == "keras")
    names = {row["name"] for row in comparison.results}
    assert {"output", "free.conv", "forced.conv", "forced.wide:activation"} <= names
    assert "All agree." in repr(comparison) and "10 layers matched" in repr(comparison)
    assert twin.training and all(parameter.dtype == torch.float32 for parameter in twin.parameters())
    assert model.get_layer("stem").activation is keras.activations.relu


def test_the_first_layer_that_differs_is_named(images):
    model = cnn()
    comparison = parity.compare(model, twin_of(model, epsilon=1.01e-3), images)
    assert not comparison.passed and comparison.first_divergence == "norm"
    row = next(row for row in comparison.results if row["name"] == "forced.norm" and row["half"] == "keras")
    assert not row["passed"] and row["failure"] == "rounding" and row["factor"] > 3  # within the fixed bound, though
    assert row["max_rel"] < row["tolerance"]
    assert "the pair first diverges in norm" in repr(comparison) and "times what rounding does" in repr(comparison)
    fixed = parity.compare(model, twin_of(model, epsilon=1.01e-3), images, calibrate=False)
    assert fixed.passed and all(row["floor"] is None for row in fixed.results)


def test_the_table_is_text_in_a_notebook_too(images, monkeypatch):
    model = cnn()
    comparison = parity.compare(model, twin_of(model), images, calibrate=False)
    outside = repr(comparison)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert repr(comparison) == outside and "10 layers matched" in outside


def test_in_float64_a_far_smaller_difference_is_seen(images):
    model = cnn("float64")
    twin = twin_of(model)
    assert parity.compare(model, twin, images).passed
    with torch.no_grad():
        twin.features[4].weight[3, 2, 1, 0] *= 1 + 1e-9
    comparison = parity.compare(model, twin, images)
    assert comparison.first_divergence == "conv"
    assert {row["half"] for row in comparison.results} == {"keras"}


def test_given_names_are_followed_in_either_order_of_the_models(images):
    model = cnn()
    twin = twin_of(model)
    comparison = parity.compare(twin, model, images[::-1], names={"features.4": "conv"})
    assert comparison.passed, comparison
    assert comparison.names["features.4"] == "conv" and comparison.names["features.5"] == "gelu"
    with torch.no_grad():
        twin.features[4].bias += 0.01
    assert parity.compare(twin, model, images[::-1]).first_divergence == "features.4"


def test_two_torch_modules(images):
    twin = twin_of(cnn())
    other = twin_of(cnn())
    assert parity.compare(twin, other, images[1]).passed
    other.features[5] = nn.GELU(approximate="tanh")
    comparison = parity.compare(twin, other, images[1])
    assert comparison.first_divergence == "features"
    failed = [row["name"] for row in comparison.results if row["mode"] == "forced" and not row["passed"]]
    assert failed == ["forced.features", "forced.features.5"]


def test_layouts_of_maps_are_found_out():
    image = keras.Input((8, 8, 8))
    model = keras.Model(image, {"maps": keras.layers.Conv2D(8, 3, padding="same", name="conv")(image)})
    module = nn.Conv2d(8, 8, 3, padding=1)
    kernel, bias = model.get_layer("conv").get_weights()
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
        module.bias.copy_(torch.from_numpy(bias))

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = module

        def forward(self, x):
            return {"maps": self.conv(x)}

    x = np.random.default_rng(0).standard_normal((2, 8, 8, 8), np.float32)  # (B, H, W, C) or (B, C, H, W)?
    assert parity.compare(model, Maps(), (x, x.transpose(0, 3, 1, 2))).passed


def test_nan_is_named_with_the_layer_that_made_it(images):
    model = cnn()
    twin = twin_of(model)
    model.get_layer("conv").kernel.assign(model.get_layer("conv").kernel * float("nan"))
    comparison = parity.compare(model, twin, images)
    assert comparison.first_divergence == "conv"
    failures = {row["name"]: row["failure"] for row in comparison.results if row["half"] == "keras"}
    assert failures["forced.conv"] == "not finite" and failures["forced.wide"] == ""
    assert "not finite: " in repr(comparison)


def test_another_shape_is_a_failure_of_its_own(images):
    model = cnn()
    twin = twin_of(model)
    twin.features[4].padding = (1, 1)
    twin.head[0] = nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten())
    comparison = parity.compare(model, twin, images, names={"conv": "features.4"})
    row = next(row for row in comparison.results if row["name"] == "forced.conv" and row["half"] == "keras")
    assert row["failure"] == "shape" and row["reason"].startswith("shape (3, 5, 5, 16) against (3, 16, 7, 7)")
    assert comparison.first_divergence == "conv"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (lambda m, t: (m, m), {}, TypeError, "both models are Keras'"),
        (
            lambda m, t: (m, "twin"),
            {},
            TypeError,
            "model_b is a str; give a Keras model or layer, or a torch.nn.Module",
        ),
        (lambda m, t: (m, t), {"names": {"cnov": "features.4"}}, ValueError, "'cnov' of the first model: there is no"),
        (lambda m, t: (m, t), {"names": {"conv": "x"}}, ValueError, "'x' of the second model: there is no such layer"),
        (
            lambda m, t: (m, t),
            {"names": {"conv": "features.4", "stem": "features.4"}},
            ValueError,
            "'features.4' of the second model is given twice",
        ),
    ],
)
def test_what_cannot_be_compared_is_told(arguments, options, error, message, images):
    model = cnn()
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)").replace(".", r"\.")):
        parity.compare(*arguments(model, twin_of(model)), images, **options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((np.ones(2),) * 3, "inputs are 3; give one array or dict for both models, or a pair"),
        (np.array(["a"]), "give real numbers, at least one"),
        (np.ones((0, 14, 14, 3)), "give real numbers, at least one"),
    ],
)
def test_bad_inputs_are_told(inputs, message):
    model = cnn()
    with pytest.raises(ValueError, match=message):
        parity.compare(model, twin_of(model), inputs)


def test_a_model_that_fails_is_named(images):
    model = cnn()
    with pytest.raises(parity.ComparisonError, match="model_b failed"):
        parity.compare(model, twin_of(model), images[0])
