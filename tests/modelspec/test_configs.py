"""Configurations: fields and their checks, class labels, stages, and the Hub's config.json."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelspec.configs import (
    DinatConfig,
    NatConfig,
    SwiftFormerConfig,
    ViTMSNConfig,
    config_from_dict,
    load_config,
    resolve_out_features,
)

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*/config.json"))
CLASSES = [NatConfig, DinatConfig, SwiftFormerConfig, ViTMSNConfig]
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def square(x):
    return x * x


class TestFields:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: SwiftFormerConfig(depths=[1, 1, 1]),
                "SwiftFormerConfig.depths has 3 entries but embed_dims has 4",
            ),
            (lambda: SwiftFormerConfig(downsamples=[True]), "downsamples has 1 entries"),
            (lambda: SwiftFormerConfig(downsamples=[1, 1, 1, 1]), "downsamples is .*True or False"),
            (
                lambda: SwiftFormerConfig(attention_norm="l1"),
                "attention_norm is 'l1'; it must be one of 'softmax', 'l2'",
            ),
            (lambda: SwiftFormerConfig(mlp_ratio=0), "mlp_ratio is 0"),
            (lambda: NatConfig(num_heads=[2, 4, 8]), "num_heads has 3 entries but depths has 4"),
            (lambda: NatConfig(embed_dim=63), "num_heads has 2 for stage 1, which does not divide its width 63"),
            (lambda: NatConfig(patch_size=8), "patch_size is 8; it must be 4"),
            (lambda: NatConfig(kernel_size=4), "kernel_size is 4; it must be an odd int"),
            (lambda: NatConfig(embed_dim=True), "embed_dim is True; it must be an int"),
            (lambda: NatConfig(drop_path_rate=1.0), "drop_path_rate is 1.0; .*not including 1"),
            (lambda: NatConfig(layer_norm_eps=0.0), "layer_norm_eps is 0.0; it must be a number above 0"),
            (lambda: NatConfig(mlp_ratio=float("nan")), "mlp_ratio is nan"),
            (lambda: NatConfig(qkv_bias=1), "qkv_bias is 1; it must be True or False"),
            (lambda: NatConfig(depths=[]), "depths is .*non-empty list"),
            (lambda: NatConfig(hidden_act="gleu"), "hidden_act is 'gleu'; it must be one of 'gelu', "),
            (lambda: NatConfig(num_layers=3), "num_layers is 3 but the other fields make it 4"),
            (lambda: NatConfig(dtype="float8"), "dtype is 'float8'"),
            (lambda: DinatConfig(depths=[3, 4, 6, 4]), "dilations has 5 entries for stage 4, whose depth is 4"),
            (lambda: DinatConfig(dilations=[[1]]), "dilations has 1 entries but depths has 4"),
            (lambda: DinatConfig(depths=[1] * 4, dilations=[[0], [1], [1], [1]]), "dilations is"),
            (lambda: ViTMSNConfig(image_size=(224, 224)), "image_size is .*one int"),
            (lambda: ViTMSNConfig(patch_size=[16, 16]), "patch_size is .*one int"),
            (lambda: ViTMSNConfig(patch_size=256), "patch_size is 256; it must be at most image_size"),
            (lambda: ViTMSNConfig(num_attention_heads=5), "num_attention_heads is 5, which does not divide"),
            (lambda: ViTMSNConfig(problem_type="ranking"), "problem_type is 'ranking'"),
        ],
    )
    def test_bad_values_are_named_with_what_is_allowed(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize("config_class", CLASSES)
    def test_a_typo_is_a_type_error(self, config_class):
        with pytest.raises(TypeError, match="has no field 'hiden_act'; did you mean 'hidden_act'"):
            config_class(hiden_act="relu")
        config = config_class()
        with pytest.raises(AttributeError, match="hiden_act"):
            config.hiden_act = "relu"
        with pytest.raises(AttributeError, match="hiden_act"):
            _ = config.hiden_act

    def test_a_refused_assignment_leaves_the_old_value(self):
        config = NatConfig()
        with pytest.raises(ValueError, match="NatConfig.mlp_ratio is -1"):
            config.mlp_ratio = -1
        assert config.mlp_ratio == 3.0

    def test_instances_share_no_lists(self):
        first = DinatConfig()
        first.depths.append(1)
        first.dilations[0][0] = 9
        assert DinatConfig().depths == [3, 4, 6, 5] and DinatConfig().dilations[0][0] == 1
        with pytest.raises(ValueError, match="num_heads has 4"):
            first.validate()

    def test_aliases_read_write_and_construct(self):
        config = NatConfig(num_attention_heads=[1, 2, 4, 8], num_hidden_layers=4)
        assert config.num_heads == config.num_attention_heads == [1, 2, 4, 8]
        assert config.num_hidden_layers == config.num_layers == 4
        config.num_attention_heads = [2, 2, 2, 2]
        assert config.num_heads == [2, 2, 2, 2]
        with pytest.raises(ValueError, match="num_heads is given twice"):
            NatConfig(num_heads=[2, 4, 8, 16], num_attention_heads=[1, 1, 1, 1])

    def test_computed_values(self):
        assert NatConfig(embed_dim=96, num_heads=[3, 6, 12, 24]).hidden_size == 768
        assert NatConfig(depths=[2, 1, 1, 1]).dilations == [[1, 1], [1], [1], [1]]
        assert (ViTMSNConfig().num_patches, ViTMSNConfig().head_dim) == (196, 64)
        assert ViTMSNConfig(image_size=30, patch_size=8).num_patches == 9

    def test_one_block_with_drop_path_is_allowed(self):
        config = SwiftFormerConfig(depths=[1], embed_dims=[8], downsamples=[True], drop_path_rate=0.5)
        assert sum(config.depths) == 1

    def test_whole_mlp_ratio_of_swiftformer_is_an_int(self):
        assert type(SwiftFormerConfig(mlp_ratio=4.0).mlp_ratio) is int
        assert SwiftFormerConfig(mlp_ratio=2.5).mlp_ratio == 2.5

    def test_activation_function_is_kept_but_not_written(self, tmp_path):
        config = NatConfig(hidden_act=square)
        assert copy.deepcopy(config).replace(embed_dim=32).hidden_act is square
        for write in (config.to_dict, config.to_json_string, lambda: config.save_pretrained(tmp_path / "new")):
            with pytest.raises(ValueError, match="NatConfig.hidden_act is the function 'square'"):
                write()
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("config_class", CLASSES)
    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
    def test_copies_are_equal(self, config_class, duplicate):
        config = config_class(num_labels=3)
        assert duplicate(config) == config
        assert config != config_class()


class TestLabels:
    def test_default_and_number_alone(self):
        assert NatConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
        assert NatConfig(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
        assert NatConfig(num_labels=0).id2label == {}

    def test_names_rule(self):
        config = NatConfig(id2label={"1": "dog", "0": "cat"})
        assert config.num_labels == 2 and config.id2label == {0: "cat", 1: "dog"}
        assert config.label2id == {"cat": 0, "dog": 1}
        assert NatConfig(label2id={"cat": 0}).id2label == {0: "cat"}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels is 3 but id2label has 1 entries"),
            ({"num_labels": -1}, "num_labels is -1"),
            ({"num_labels": True}, "num_labels is True"),
            ({"id2label": {1: "a"}}, "id2label is .*class indices 0, 1"),
            ({"id2label": ["a"]}, "id2label is"),
            ({"id2label": {0: "a"}, "label2id": {"b": 0}}, "label2id gives 'b' the index 0"),
        ],
    )
    def test_contradictions_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            NatConfig(**settings)

    def test_assignment_regenerates(self):
        config = NatConfig(id2label={0: "cat"})
        config.num_labels = 1
        assert config.id2label == {0: "cat"}
        config.num_labels = 2
        assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
        config.id2label = {0: "x"}
        assert config.label2id == {"x": 0} and config.num_labels == 1
        with pytest.raises(ValueError, match="num_labels is -1"):
            config.num_labels = -1

    def test_replace_changes_names_with_the_number(self):
        config = NatConfig(id2label={0: "cat"})
        assert config.replace(num_labels=None, embed_dim=32).id2label == {0: "cat"}
        assert config.replace(num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
        assert config.replace(id2label={0: "a", 1: "b"}).label2id == {"a": 0, "b": 1}

    def test_a_name_may_come_twice(self):
        config = NatConfig(id2label={0: "crane", 1: "crane"})
        assert config.num_labels == 2 and NatConfig.from_dict(config.to_dict()) == config


class TestStages:
    @pytest.mark.parametrize(
        ("features", "indices", "expected"),
        [
            (None, None, (["stage4"], [4])),
            (["stem", "stage2"], None, (["stem", "stage2"], [0, 2])),
            (None, [1, -1], (["stage1", "stage4"], [1, 4])),
            (None, (0,), (["stem"], [0])),
            (["stage4"], [-1], (["stage4"], [4])),
        ],
    )
    def test_choices(self, features, indices, expected):
        assert resolve_out_features(STAGES, features, indices) == expected

    @pytest.mark.parametrize(
        ("features", "indices", "message"),
        [
            (["stage9"], None, "unknown names"),
            (("stem",), None, "must be a list"),
            ("stem", None, "must be a list"),
            (["stem", "stem"], None, "twice"),
            (["stage2", "stage1"], None, "order"),
            ([], None, "empty"),
            (None, [-1, 2], "order"),
            (None, [4, -1], "twice"),
            (None, [5], "from -5 to 4"),
            (None, [True], "list of ints"),
            (None, 1, "list of ints"),
            (["stem"], [1], "different stages"),
        ],
    )
    def test_broken_rules(self, features, indices, message):
        with pytest.raises(ValueError, match=message):
            resolve_out_features(STAGES, features, indices)
        with pytest.raises(ValueError, match=message):
            NatConfig(out_features=features, out_indices=indices)

    @given(st.sets(st.integers(0, 4), min_size=1), st.data())
    def test_names_and_indices_of_one_choice_agree(self, chosen, data):
        indices = sorted(chosen)
        signed = [index - 5 * data.draw(st.booleans()) for index in indices]
        assert resolve_out_features(STAGES, out_indices=signed) == ([STAGES[i] for i in indices], indices)
        assert resolve_out_features(STAGES, [STAGES[i] for i in indices], signed)[1] == indices

    def test_config_keeps_both_in_step(self):
        config = NatConfig(out_features=["stage1", "stage2"])
        assert config.out_indices == [1, 2]
        config.out_indices = [0, -1]
        assert config.out_features == ["stem", "stage4"]
        with pytest.raises(ValueError, match="NatConfig.out_features has the unknown names"):
            config.out_features = ["stage5"]
        assert config.out_indices == [0, 4]
        assert config.replace(out_features=["stage3"]).out_indices == [3]
        config.out_features = None
        assert config.out_features == ["stage4"]

    def test_default_follows_the_number_of_stages(self):
        config = NatConfig.from_dict(NatConfig().to_dict())
        assert config.replace(depths=[1, 1], num_heads=[2, 2]).out_features == ["stage2"]


class TestFiles:
    @pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
    def test_recorded_files_survive_a_round_trip(self, path, tmp_path):
        recorded = json.loads(path.read_text())
        config = load_config(path)
        assert json.loads(config.to_json_string()) == recorded
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == recorded
        assert type(config).from_pretrained(str(path.parent)) == config

    @pytest.mark.parametrize("config_class", CLASSES)
    def test_own_files_survive_a_round_trip(self, config_class, tmp_path):
        config = config_class(num_labels=3, problem_type="regression", return_dict=False, dtype="float16")
        config.save_pretrained(tmp_path / "deep" / "folder")
        assert config_class.from_pretrained(tmp_path / "deep" / "folder") == config
        assert os.listdir(tmp_path / "deep" / "folder") == ["config.json"]
        written = json.loads(config.to_json_string())
        assert written["dtype"] == "float16" and list(written["id2label"]) == ["0", "1", "2"]
        assert "num_labels" not in written and "attention_norm" not in written

    def test_defaults_that_are_not_written(self):
        written = SwiftFormerConfig().to_dict()
        assert written.keys().isdisjoint({"id2label", "label2id", "num_labels", "attention_norm", "dtype", "extra"})
        assert SwiftFormerConfig(attention_norm="l2").to_dict()["attention_norm"] == "l2"

    def test_unknown_keys_are_kept_and_read_as_attributes(self):
        data = {"model_type": "vit_msn", "transformers_version": "4.1", "future": {"a": [1]}, "return_dict": True}
        config = ViTMSNConfig.from_dict(data)
        data["future"]["a"].append(2)
        assert config.future == {"a": [1]} and config.extra == {"transformers_version": "4.1", "future": {"a": [1]}}
        assert config.to_dict()["return_dict"] is True
        config.future = 3
        assert config.replace(num_labels=4).to_dict()["future"] == 3

    def test_torch_dtype_keeps_its_name(self):
        config = NatConfig.from_dict({"torch_dtype": "bfloat16"})
        assert config.dtype == config.torch_dtype == "bfloat16"
        assert config.to_dict()["torch_dtype"] == "bfloat16" and "dtype" not in config.to_dict()
        assert NatConfig(torch_dtype="float64").to_dict()["dtype"] == "float64"

    def test_wrong_hidden_size_of_a_file_is_ignored(self):
        config = config_from_dict(
            {"model_type": "nat", "embed_dim": 96, "num_heads": [3, 6, 12, 24], "hidden_size": 512}
        )
        assert config.hidden_size == config.to_dict()["hidden_size"] == 768

    def test_overrides(self, tmp_path):
        NatConfig(num_labels=3).save_pretrained(tmp_path)
        config = load_config(tmp_path, num_labels=5, depths=[1, 1], num_heads=[2, 2])
        assert config.num_labels == 5 and config.out_features == ["stage2"]
        with pytest.raises(TypeError, match="no field 'depth'"):
            NatConfig.from_pretrained(tmp_path, depth=1)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"model_type": "nat",\n "depths": [1,}', "config.json is not JSON: .* at line 2, column 1"),
            ("[1]", "config.json holds a JSON list"),
            ("{}", "config.json has no model_type; it must be one of dinat, nat, swiftformer, vit_msn"),
            ('{"model_type": "swin"}', "model_type 'swin'; it must be one of dinat, nat"),
            ('{"model_type": "nat", "depths": 3}', "NatConfig.depths is 3"),
        ],
    )
    def test_broken_files_are_named(self, tmp_path, text, message):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path)

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
        with pytest.raises(ValueError, match="config.json is not JSON: byte 7"):
            load_config(tmp_path)

    def test_another_familys_file_is_refused(self, tmp_path):
        NatConfig().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="DinatConfig reads model_type 'dinat', but this is 'nat'"):
            DinatConfig.from_pretrained(tmp_path)

    def test_missing_file_is_an_os_error(self, tmp_path):
        with pytest.raises(OSError, match="config.json"):
            load_config(tmp_path)

    def test_failed_save_leaves_the_old_file(self, tmp_path, monkeypatch):
        NatConfig(num_labels=3).save_pretrained(tmp_path)

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            NatConfig(num_labels=4).save_pretrained(tmp_path)
        assert os.listdir(tmp_path) == ["config.json"] and load_config(tmp_path).num_labels == 3


@pytest.mark.oracle
@pytest.mark.parametrize("config_class", [DinatConfig, SwiftFormerConfig, ViTMSNConfig])
def test_transformers_accepts_our_file(config_class, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = config_class(
        num_labels=3, dtype="float32", **({"mlp_ratio": 4.0} if config_class is SwiftFormerConfig else {})
    )
    config.save_pretrained(tmp_path)
    theirs = getattr(transformers, config_class.__name__).from_pretrained(tmp_path)
    assert theirs.num_labels == 3 and theirs.id2label == config.id2label
    for name, value in config.to_dict().items():
        got = getattr(theirs, name)
        got = str(got).removeprefix("torch.") if name == "dtype" else got
        assert (list(got) if isinstance(got, tuple) else got) == value, name
    theirs.save_pretrained(tmp_path / "theirs")
    back = config_class.from_pretrained(tmp_path / "theirs")
    assert back.replace() == back and back.id2label == config.id2label and back.hidden_act == config.hidden_act


class TestSwiftFormerStages:
    def test_drop_path_rises_from_the_first_block_to_the_last(self):
        config = SwiftFormerConfig(depths=[2, 3], embed_dims=[8, 8], downsamples=[True, True], drop_path_rate=0.4)
        assert [len(rates) for rates in config.drop_paths] == [2, 3]
        assert sum(config.drop_paths, []) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])

    def test_a_single_block_drops_nothing(self):
        config = SwiftFormerConfig(depths=[1], embed_dims=[8], downsamples=[True], drop_path_rate=0.4)
        assert config.drop_paths == [[0.0]]

    def test_a_downsampling_follows_where_it_is_asked_for_or_the_width_changes(self):
        config = SwiftFormerConfig(
            depths=[1, 1, 1, 1], embed_dims=[8, 8, 8, 16], downsamples=[False, True, False, True]
        )
        assert [config.has_downsampling(stage) for stage in range(4)] == [False, True, True, False]
