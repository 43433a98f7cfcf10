"""Backbones of all families: the maps of the stages that are asked for, from the weights of a classifier."""

import numpy as np
import pytest
from halves import HALVES

from modelspec.agreement import FLOAT64_BOUND, compare_all
from modelspec.checkpoints import CheckpointWarning, probing_weights
from ptmodels.auto import model_class as torch_class
from tfmodels.auto import model_class as keras_class

CLASSES = {"torch": torch_class, "keras": keras_class}


@pytest.fixture(params=HALVES, ids=lambda half: half.name)
def half(request):
    return request.param


def images(height=48, width=64):
    return np.random.default_rng(0).standard_normal((2, 3, height, width))


def all_stages(config):
    return config.replace(out_features=config.stage_names)


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (45, 71)])
def test_the_halves_agree_on_every_stage(config, size):
    config = all_stages(config)
    weights = probing_weights(config, architecture="Backbone")
    options = {"output_hidden_states": True}
    if config.model_type != "swiftformer":
        options["output_attentions"] = True
    outputs = []
    for half in HALVES:
        model = CLASSES[half.name](config.model_type, "Backbone").from_weights(config, weights, dtype="float64")
        outputs.append(half.run(model, pixel_values=images(*size), **options))
    reference, actual = outputs
    assert sum(name.startswith("feature_maps") for name in actual) == len(config.stage_names)
    assert not {k: v for k, v in compare_all(actual, reference, FLOAT64_BOUND).items() if not v.passed}


def test_maps_have_the_channels_and_strides_that_are_said(half, config):
    config = all_stages(config)
    model = CLASSES[half.name](config.model_type, "Backbone")(config)
    maps = half.run(model, pixel_values=images(64, 96).astype(np.float32))
    strides = [stage["reduction"] for stage in config.feature_info]
    shapes = [maps[f"feature_maps.{index}"].shape for index in range(len(config.stage_names))]
    assert [shape[1] for shape in shapes] == model.channels == list(config.channels.values())
    assert [(64 // shape[2], 96 // shape[3]) for shape in shapes[1:]] == [(stride, stride) for stride in strides]


def test_the_default_is_the_last_stage_and_files_name_no_default(half, config, tmp_path):
    model = CLASSES[half.name](config.model_type, "Backbone")(config)
    assert list(half.run(model, pixel_values=images().astype(np.float32))) == ["feature_maps.0"]
    assert config.out_features == [config.stage_names[-1]]
    assert ("out_features" in config.to_dict()) == (config.model_type in ("nat", "dinat"))
    chosen = config.replace(out_indices=[0, -1])
    model = CLASSES[half.name](config.model_type, "Backbone")(chosen)
    model.save_pretrained(tmp_path)
    again = CLASSES[half.name](config.model_type, "Backbone").from_pretrained(tmp_path)
    assert again.config.out_features == ["stem", config.stage_names[-1]]
    ours, theirs = (half.run(m, pixel_values=images().astype(np.float32)) for m in (model, again))
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, atol=1e-6)


def test_bad_stages_are_refused(config):
    name = type(config).__name__
    with pytest.raises(ValueError, match=f"{name}.out_features has the unknown names .'stage99'."):
        config.replace(out_features=["stage99"])
    with pytest.raises(ValueError, match="out_indices has"):
        config.replace(out_indices=[99])


def test_a_backbone_loads_from_a_classifiers_checkpoint(half, config, tmp_path):
    weights = probing_weights(config)
    classifier = CLASSES[half.name](config.model_type).from_weights(config, weights)
    classifier.save_pretrained(tmp_path)
    with pytest.warns(CheckpointWarning):
        backbone = CLASSES[half.name](config.model_type, "Backbone").from_pretrained(tmp_path)
    pixel_values = images(32, 32).astype(np.float32)
    ours = half.run(backbone, pixel_values=pixel_values, output_hidden_states=True)
    if half.name == "torch":
        classifier.eval()
    theirs = half.run(classifier, pixel_values=pixel_values, output_hidden_states=True)
    np.testing.assert_allclose(ours["hidden_states.0"], theirs["hidden_states.0"], atol=1e-6)
    last = max(name for name in theirs if name.startswith("hidden_states"))
    np.testing.assert_allclose(ours[last], theirs[last], atol=1e-5)


def test_features_are_the_maps(half, config):
    model = CLASSES[half.name](config.model_type, "Backbone")(all_stages(config))
    pixel_values = images(32, 32).astype(np.float32)
    if half.name == "torch":
        import torch

        pixel_values = torch.from_numpy(pixel_values)
        model.eval()
    features = model.forward_features(pixel_values)
    assert len(features) == len(config.stage_names)
    with pytest.raises(ValueError, match="Backbone has no classification head"):
        model.forward_head(features)
