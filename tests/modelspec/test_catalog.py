"""The catalog against the recorded keys and shapes of every published file."""

import json
import math
from pathlib import Path

import pytest

from modelspec.checkpoints.keys import num_parameters, parameter_shapes
from modelspec.configs import DinatConfig, get_config, get_variant, list_models

KEYS = Path(__file__).parents[1] / "golden" / "keys"


def test_all_published_variants_are_there():
    assert len(list_models()) == 20
    assert {get_variant(name).hub_id.split("/")[1] for name in list_models()} == {path.stem for path in KEYS.iterdir()}
    assert len(list_models("dinat-*")) == 7 and list_models("swiftformer-l?") == ["swiftformer-l1", "swiftformer-l3"]


@pytest.mark.parametrize("name", list_models())
def test_config_gives_the_published_keys_and_parameter_count(name):
    variant, config = get_variant(name), get_config(name)
    recorded = json.loads((KEYS / f"{variant.hub_id.split('/')[1]}.json").read_text())
    architecture = "Model" if config.model_type == "vit_msn" else "ForImageClassification"
    shapes = parameter_shapes(config, architecture)
    assert {key: list(shape) for key, shape in shapes.items()} == recorded
    assert num_parameters(shapes) == variant.parameter_count
    assert type(config).model_type == variant.model_type == variant.family


@pytest.mark.parametrize("name", ["nat-mini", "nat-mini-in1k-224", "shi-labs/nat-mini-in1k-224", "NAT-Mini"])
def test_a_variant_answers_to_its_names(name):
    assert get_variant(name).name == "nat-mini"
    assert get_config(name).depths == [3, 4, 6, 5]


def test_unknown_name_lists_similar_ones():
    with pytest.raises(ValueError, match="'swiftfomer-xs'; close to it: swiftformer-xs"):
        get_config("swiftfomer-xs")
    with pytest.raises(ValueError, match="dinat-large-in22k-in1k-224, dinat-large-in22k-in1k-384"):
        get_variant("dinat-large")
    with pytest.raises(ValueError, match="list_models"):
        get_variant("zzz")


def test_configs_are_new_and_take_overrides():
    first = get_config("dinat-mini")
    first.dilations[0][1] = 5
    assert get_config("dinat-mini").dilations == DinatConfig().dilations
    assert first.num_labels == 1000 and first.id2label[999] == "LABEL_999"
    smaller = get_config("dinat-mini", num_labels=3, drop_path_rate=0.0)
    assert smaller.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"} and smaller.drop_path_rate == 0
    with pytest.raises(TypeError, match="drop_path"):
        get_config("dinat-mini", drop_path=0.1)


def test_dilations_differ_between_the_large_variants():
    assert get_config("dinat-large-in22k-in1k-384").dilations[0] == [1, 13, 1]
    assert get_config("dinat-large-in22k-in1k-384").dilations[2] == [1, 3] * 9
    eleven = get_config("dinat-large-11x11")
    assert eleven.kernel_size == 11 and eleven.dilations[:2] == [[1, 8, 1], [1, 4, 1, 4]]


def test_large_vit_msn_has_the_dropout_of_its_published_config():
    assert [get_config(f"vit-msn-{size}").hidden_dropout_prob for size in ("base", "large", "large-7")] == [0, 0.1, 0.1]


@pytest.mark.parametrize("name", list_models())
def test_variant_facts_are_complete(name):
    variant = get_variant(name)
    preset = variant.image_processor
    assert preset["size"] == (384 if "384" in name else 224)
    assert preset["resample"] == (3 if variant.family in ("nat", "dinat") else 2)
    assert variant.evaluation.crop == preset["size"] <= variant.evaluation.resize
    assert variant.top1_source and variant.licence_origin
    assert variant.top1 is None or math.isclose(variant.top1, 82, abs_tol=7)
    preset["image_mean"].clear()
    assert len(variant.image_processor["image_mean"]) == 3


def test_doubts_are_stated():
    assert not get_variant("dinat-large-in22k-in1k-224").top1_confirmed
    assert get_variant("dinat-mini").top1_confirmed
    msn = get_variant("vit-msn-base")
    assert msn.licence_card != msn.licence_origin and msn.top1 is None
