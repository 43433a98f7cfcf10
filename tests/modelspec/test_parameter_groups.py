"""What training decays, slows down and freezes, by checkpoint key."""

import pytest

from modelspec import parameter_groups as groups
from modelspec.checkpoints.keys import parameter_shapes
from modelspec.configs import DinatConfig, NatConfig, SwiftFormerConfig, ViTMSNConfig, get_config, list_models


def places(config, architecture="ForImageClassification"):
    return {key: groups.place_of(config, key) for key in parameter_shapes(config, architecture)}


@pytest.mark.parametrize("name", list_models())
def test_every_key_has_a_place_and_depth_grows_along_the_model(name):
    config = get_config(name)
    found = list(places(config).values())
    assert found == sorted(found)  # checkpoints list parameters from the stem to the head
    assert {place.layer for place in found} == set(range(groups.num_layers(config) + 2))
    assert {place.stage for place in found} == set(range(len(groups.stage_names(config))))
    bare = places(config, "Model")
    assert all(places(config)[f"{config.base_model_prefix}.{key}"] == place for key, place in bare.items())


def test_downsampling_belongs_to_the_next_stage():
    config = SwiftFormerConfig(depths=[2, 1, 1], embed_dims=[16, 24, 24], downsamples=[True, False, False])
    found = {key: groups.place_of(config, key) for key in parameter_shapes(config, "Model")}
    assert found["encoder.network.0.blocks.1.attn.w_g"] == (1, 2)
    assert found["encoder.network.1.proj.weight"] == (2, 3) == found["encoder.network.2.blocks.0.layer_scale_1"]
    assert found["encoder.network.3.blocks.0.attn.w_g"] == (3, 4)  # nothing between the last two
    config = NatConfig(depths=[1, 2], num_heads=[2, 4])
    assert groups.place_of(config, "nat.encoder.levels.0.downsample.reduction.weight") == (2, 2)
    assert groups.place_of(config, "nat.encoder.levels.1.layers.1.layernorm_after.bias") == (2, 3)
    assert groups.place_of(config, "nat.layernorm.weight") == groups.place_of(config, "classifier.weight") == (3, 4)


def test_only_weights_of_products_decay():
    config = DinatConfig(depths=[1, 1], num_heads=[2, 4], dilations=[[1], [1]], layer_scale_init_value=1e-5)
    shapes = parameter_shapes(config)
    decayed = [key for key, shape in shapes.items() if groups.has_weight_decay(key, shape)]
    assert "classifier.weight" in decayed and "dinat.embeddings.patch_embeddings.projection.0.weight" in decayed
    kinds = {key.rpartition(".")[2] for key in set(shapes) - set(decayed)}
    assert kinds == {"weight", "bias", "rpb", "layer_scale_parameters"}
    assert all("norm" in key for key in set(shapes) - set(decayed) if key.endswith("weight"))
    config = ViTMSNConfig(num_hidden_layers=1)
    shapes = parameter_shapes(config, "Model")
    exempt = {key for key, shape in shapes.items() if not groups.has_weight_decay(key, shape)}
    assert {"embeddings.cls_token", "embeddings.position_embeddings"} < exempt
    shapes = parameter_shapes(SwiftFormerConfig(), "Model")
    exempt = {key.rpartition(".")[2] for key, shape in shapes.items() if not groups.has_weight_decay(key, shape)}
    assert "layer_scale_1" in exempt and "w_g" not in exempt and "num_batches_tracked" in exempt


def test_learning_rates_fall_towards_the_stem():
    config = ViTMSNConfig(num_hidden_layers=3)
    keys = {"classifier.weight": 1, "vit.layernorm.bias": 1, "vit.encoder.layer.2.layernorm_before.bias": 0.5}
    keys |= {"vit.encoder.layer.0.output.dense.weight": 0.125, "vit.embeddings.cls_token": 0.0625}
    for key, scale in keys.items():
        assert groups.learning_rate_scale(config, key.replace("vit.", f"{config.base_model_prefix}."), 0.5) == scale
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"layer_decay is {bad}; it must be above 0 and at most 1"):
            groups.learning_rate_scale(config, "classifier.weight", bad)


def test_freezing_takes_all_up_to_a_stage():
    config = SwiftFormerConfig()
    keys = parameter_shapes(config)
    frozen = groups.frozen_keys(config, keys, "stage1")
    assert {groups.place_of(config, key).stage for key in frozen} == {0, 1}
    assert "swiftformer.patch_embed.patch_embedding.1.running_mean" in frozen
    assert groups.frozen_keys(config, keys, "head") == set(keys)
    with pytest.raises(ValueError, match="upto is 'stage9'; the stages are stem, stage1, stage2, stage3, stage4, head"):
        groups.frozen_keys(config, keys, "stage9")


BAD_KEYS = [
    "encoder.levels.9.layers.0.x",
    "encoder.levels.0.layers.99.x",
    "encoder.levels.0.layers.x",
    "encoder.x",
    "x",
]


@pytest.mark.parametrize("key", BAD_KEYS)
@pytest.mark.parametrize(
    "config", [NatConfig(), SwiftFormerConfig(), ViTMSNConfig()], ids=lambda config: config.model_type
)
def test_unknown_keys_are_named(config, key):
    if config.model_type != "nat":
        key = key.replace("levels.9", "network.99").replace("levels.0", "network.99").replace("layers", "blocks")
    if config.model_type == "vit_msn":
        key = key.replace("network.99.blocks", "layer.99")
    with pytest.raises(ValueError, match=f"'{key}' is no parameter of"):
        groups.place_of(config, key)
