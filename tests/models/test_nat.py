"""NAT and DiNAT beyond what they share with the other families: windows, padding, dilations, backbones."""

import numpy as np
import pytest
from halves import HALVES

from modelspec import DinatConfig, NatConfig
from modelspec.agreement import FLOAT64_BOUND, compare_all
from modelspec.checkpoints import probing_weights
from ptmodels.auto import model_class as torch_class
from tfmodels.auto import model_class as keras_class

BASE = {"depths": [2, 1, 1, 1], "embed_dim": 16, "num_heads": [1, 2, 4, 8], "num_labels": 5}


def both(config, images, architecture="ForImageClassification", **options):
    """Runs the same weights through both halves, in float64."""
    weights = probing_weights(config, architecture=architecture)
    outputs = []
    for half, model_class in zip(HALVES, (torch_class, keras_class), strict=True):
        model = model_class(config.model_type, architecture).from_weights(config, weights, dtype="float64")
        outputs.append(half.run(model, pixel_values=images, **options))
    return outputs


def assert_halves_agree(outputs):
    reference, actual = outputs
    assert reference
    assert not {k: v for k, v in compare_all(actual, reference, FLOAT64_BOUND).items() if not v.passed}


@pytest.mark.parametrize("kernel_size", [3, 5, 9, 11, 13])
def test_every_kernel_size_on_maps_larger_and_smaller_than_it(kernel_size):
    images = np.random.default_rng(0).standard_normal((1, 3, 67, 90))
    config = NatConfig(**BASE, kernel_size=kernel_size)
    assert_halves_agree(both(config, images, output_hidden_states=True, output_attentions=True))


def test_the_dilations_of_a_segmentation_backbone():
    """As OneFormer's DiNAT-large: kernel 11, irregular dilations that do not divide the maps."""
    config = DinatConfig(
        depths=[3, 4, 6, 5],
        embed_dim=12,
        num_heads=[1, 2, 4, 8],
        kernel_size=11,
        mlp_ratio=2.0,
        layer_scale_init_value=1e-5,
        dilations=[[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    images = np.random.default_rng(0).standard_normal((1, 3, 130, 171))
    outputs = both(config, images, "Backbone", output_hidden_states=True)
    assert_halves_agree(outputs)
    shapes = [outputs[0][f"feature_maps.{i}"].shape[1:] for i in range(4)]
    assert shapes == [(12, 33, 43), (24, 17, 22), (48, 9, 11), (96, 5, 6)]


def test_nat_is_dinat_without_dilation():
    images = np.random.default_rng(0).standard_normal((1, 3, 64, 64))
    nat = NatConfig(**BASE, kernel_size=3)
    dinat = DinatConfig(**BASE, kernel_size=3, dilations=[[1, 1], [1], [1], [1]])
    weights = probing_weights(nat)
    logits = []
    for config in (nat, dinat):
        own = {key.replace("nat.", f"{config.model_type}.", 1): value for key, value in weights.items()}
        model = torch_class(config.model_type).from_weights(config, own, dtype="float64")
        logits.append(HALVES[0].run(model, pixel_values=images)["logits"])
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
def test_pooling_and_heads_can_be_left_out(half):
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    config = NatConfig(**BASE, kernel_size=3)
    model_class = torch_class if half.name == "torch" else keras_class
    bare = model_class("nat", "Model")(config, add_pooling_layer=False)
    assert set(half.run(bare, pixel_values=images)) == {"last_hidden_state"}
    headless = model_class("nat")(config.replace(num_labels=0))
    pooled = half.run(headless, pixel_values=images)["logits"]
    assert pooled.shape == (2, 128)


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
def test_tuples_have_no_reshaped_states(half):
    images = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    model = half.create("nat-mini", config_overrides={**BASE, "kernel_size": 3})
    tensors = images if half.name == "keras" else __import__("torch").from_numpy(images)
    outputs = model(tensors, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert len(outputs) == 3 and len(outputs[1]) == 5 and len(outputs[2]) == 4


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
def test_a_backbone_gives_the_stages_that_are_asked_for(half):
    images = np.random.default_rng(0).standard_normal((1, 3, 64, 96)).astype(np.float32)
    config = DinatConfig(**BASE, kernel_size=3, dilations=[[1, 2], [1], [1], [1]], out_indices=[0, -2])
    model = (torch_class if half.name == "torch" else keras_class)("dinat", "Backbone")(config)
    assert model.channels == [16, 64] and config.out_features == ["stem", "stage3"]
    outputs = half.run(model, pixel_values=images)
    assert {name: array.shape for name, array in outputs.items()} == {
        "feature_maps.0": (1, 16, 16, 24),
        "feature_maps.1": (1, 64, 4, 6),
    }


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
def test_dropout_has_the_rates_and_places_of_the_reference(half):
    config = NatConfig(**BASE, kernel_size=3, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    model_class = (torch_class if half.name == "torch" else keras_class)("nat", "Model")
    model = model_class(config)
    layer = model.encoder.levels[0].layers[0]
    places = (model.embeddings, layer.attention.self, layer.attention.output, layer.output)
    rates = [getattr(place.dropout, "p" if half.name == "torch" else "rate") for place in places]
    assert rates == [0.25, 0.5, 0.5, 0.25]
