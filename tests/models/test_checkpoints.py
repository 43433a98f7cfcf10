"""One checkpoint for both halves: keys, shapes, bits, heads, and files that cannot be used."""

import json
import shutil

import numpy as np
import pytest
import torch
from halves import HALVES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import ptmodels
import ptmodels.auto
import tfmodels
import tfmodels.auto
from modelspec import (
    CheckpointError,
    CheckpointWarning,
    SourceError,
    SwiftFormerConfig,
    get_config,
    get_variant,
    list_models,
)
from modelspec.checkpoints import probing_weights
from tfmodels.weights import read_weights

VARIANTS = list_models()


@pytest.fixture(params=HALVES, ids=lambda half: half.name)
def half(request):
    return request.param


@pytest.fixture
def checkpoint(golden, tmp_path):
    """A writable copy of the recorded SwiftFormer with a head for seven labels."""
    return shutil.copytree(golden("swiftformer_tiny"), tmp_path / "checkpoint")


def weights_of(model) -> dict[str, np.ndarray]:
    if isinstance(model, torch.nn.Module):
        return {key: value.detach().numpy() for key, value in model.state_dict().items()}
    return read_weights(model)


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_are_twenty_variants():
    assert len(VARIANTS) == 20


LARGE = [pytest.param(name, marks=pytest.mark.slow) if "large" in name or "base" in name else name for name in VARIANTS]


@pytest.mark.parametrize("name", LARGE)
def test_weights_survive_torch_keras_torch_bit_for_bit(name, golden, tmp_path):
    config = get_config(name)
    published = json.loads((golden("keys") / f"{get_variant(name).hub_id.split('/')[1]}.json").read_text())
    architecture = "ForImageClassification" if {"head.weight", "classifier.weight"} & set(published) else "Model"
    weights = probing_weights(config, architecture=architecture)
    first = ptmodels.auto.model_class(config.model_type, architecture).from_weights(config, weights)
    assert {key: list(shape) for key, shape in first.checkpoint_shapes().items()} == published
    assert first.num_parameters() == get_variant(name).parameter_count
    first.save_pretrained(tmp_path / "torch")
    del first
    second = tfmodels.load(tmp_path / "torch")
    assert {key: list(shape) for key, shape in second.checkpoint_shapes().items()} == published
    assert second.num_parameters() == get_variant(name).parameter_count
    second.save_pretrained(tmp_path / "keras")
    del second
    third = weights_of(ptmodels.load(tmp_path / "keras"))
    assert third.keys() == weights.keys()
    for key, value in weights.items():
        assert third[key].dtype == value.dtype and np.array_equal(third[key], value), key
    assert (tmp_path / "keras" / "config.json").read_bytes() == (tmp_path / "torch" / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["swiftformer-xs", "vit-msn-small"])
def test_create_model_draws_the_same_numbers_in_both_halves(name):
    torch_weights = weights_of(ptmodels.create_model(name, seed=0))
    keras_weights = weights_of(tfmodels.create_model(name, seed=0))
    assert torch_weights.keys() == keras_weights.keys()
    assert all(np.array_equal(value, keras_weights[key]) for key, value in torch_weights.items())
    other = weights_of(ptmodels.create_model(name, seed=1))
    assert not np.array_equal(other["classifier.weight" if "vit" in name else "head.weight"], 0)
    assert sum(not np.array_equal(value, other[key]) for key, value in torch_weights.items()) > 20


def test_a_head_is_left_out_of_a_bare_model_and_named(half, golden):
    with pytest.warns(CheckpointWarning, match="left out: classifier.bias, classifier.weight"):
        model, report = half.model("ViTMSNModel", golden("vit_msn_tiny"), output_loading_info=True)
    assert report.unexpected == ["classifier.bias", "classifier.weight"] and not report.missing
    original = load_file(golden("vit_msn_tiny") / "model.safetensors")
    for key, value in weights_of(model).items():
        assert np.array_equal(value, original[f"vit.{key}"])


def test_a_bare_file_fills_the_body_under_a_head_and_the_head_is_named(half, golden):
    with pytest.warns(CheckpointWarning, match="newly initialised: classifier.weight, classifier.bias"):
        model, report = half.model(
            "ViTMSNForImageClassification", golden("vit_msn_masktoken"), num_labels=5, output_loading_info=True
        )
    assert report.missing == ["classifier.weight", "classifier.bias"] and not report.mismatched
    weights = weights_of(model)
    original = load_file(golden("vit_msn_masktoken") / "model.safetensors")
    assert np.array_equal(weights["vit.layernorm.weight"], original["layernorm.weight"])
    assert weights["classifier.weight"].shape == (5, 32) and weights["classifier.weight"].std() > 0


def test_another_number_of_labels_skips_the_head_and_says_so(half, checkpoint):
    with pytest.warns(CheckpointWarning, match=r"head.weight \(7, 40\) \(the model has \(3, 40\)\)"):
        model, report = half.model(
            "SwiftFormerForImageClassification", checkpoint, num_labels=3, output_loading_info=True
        )
    skipped = {"head.weight", "head.bias", "dist_head.weight", "dist_head.bias"}
    assert {key for key, _, _ in report.mismatched} == skipped
    original = load_file(checkpoint / "model.safetensors")
    for key, value in weights_of(model).items():
        if key not in skipped:
            assert np.array_equal(value, original[key])
    assert model.config.num_labels == 3 and model.config.id2label[2] == "LABEL_2"


def test_new_labels_and_a_config_of_ones_own_ask_for_a_new_head_too(half, checkpoint):
    labels = {0: "cat", 1: "dog"}
    config = SwiftFormerConfig.from_pretrained(checkpoint).replace(id2label=labels)
    for asked in ({"id2label": labels}, {"config": config}):
        with pytest.warns(CheckpointWarning, match="head.weight"):
            model = half.model("SwiftFormerForImageClassification", checkpoint, **asked)
        assert model.config.id2label == labels and model.config.label2id == {"cat": 0, "dog": 1}
        assert weights_of(model)["head.weight"].shape == (2, 40)


def test_a_new_head_follows_the_seed_of_the_framework(checkpoint):
    import keras

    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        keras.utils.set_random_seed(seed)
        with pytest.warns(CheckpointWarning):
            models = [half.model("SwiftFormerForImageClassification", checkpoint, num_labels=3) for half in HALVES]
        heads.append([weights_of(model)["head.weight"] for model in models])
    for first, second, third in zip(*heads, strict=True):
        assert np.array_equal(first, second) and not np.array_equal(first, third)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_are_written_and_read(half, golden, tmp_path, dtype):
    model = half.model("ViTMSNForImageClassification", golden("vit_msn_tiny"), torch_dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    for other in HALVES:
        kept = other.model("ViTMSNForImageClassification", tmp_path, dtype="auto")
        assert str(kept.dtype).removeprefix("torch.") == dtype or kept.dtype_policy.name == dtype
        widened = weights_of(other.model("ViTMSNForImageClassification", tmp_path))
        original = load_file(golden("vit_msn_tiny") / "model.safetensors")
        for key, value in original.items():
            rounded = torch.from_numpy(value).to(getattr(torch, dtype)).float().numpy()
            assert np.array_equal(widened[key], rounded), key


def test_a_file_says_that_its_layouts_are_those_of_pytorch(half, golden, tmp_path):
    half.model("ViTMSNForImageClassification", golden("vit_msn_tiny")).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt" and len(file.metadata()["sha256"]) == 64
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ViTMSNForImageClassification"]


def test_a_single_file_is_a_source(half, golden):
    model = half.model("ViTMSNForImageClassification", golden("vit_msn_tiny") / "model.safetensors")
    assert model.config.num_labels == 7


def test_load_picks_the_class(golden):
    assert type(ptmodels.load(golden("swiftformer_tiny"))) is ptmodels.SwiftFormerForImageClassification
    with pytest.warns(CheckpointWarning, match="mask_token"):
        assert type(tfmodels.load(golden("vit_msn_masktoken"))) is tfmodels.TFViTMSNModel
    assert type(tfmodels.load(golden("dinat_tiny"))) is tfmodels.TFDinatForImageClassification
    for half, name in ((ptmodels, "NatBackbone"), (tfmodels, "TFNatBackbone")):
        assert type(half.load(golden("nat_tiny_backbone"))) is getattr(half, name)
        with pytest.raises(ValueError, match="no ForSegmentation of 'nat'"):
            half.auto.model_class("nat", "ForSegmentation")


# Files that cannot be used: one error that names the file, and nothing changed


def spoil(checkpoint, how):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    key = "swiftformer.encoder.network.0.blocks.0.norm.weight"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no safetensors":
        path.write_bytes(b"PK\x03\x04" + bytes(1000))
    elif how == "foreign":
        save_file({"transformer.h.0.weight": np.zeros((2, 2), np.float32)}, path)
    elif how == "wrong shape":
        save_file(tensors | {key: np.zeros(5, np.float32)}, path)
    elif how == "wrong dtype":
        save_file(tensors | {key: tensors[key].astype(np.int32)}, path)
    elif how == "incomplete":
        save_file({name: value for name, value in tensors.items() if name != key}, path)
    elif how == "no weights":
        path.unlink()
        (checkpoint / "tf_model.h5").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors is no readable safetensors file"),
        ("empty", "model.safetensors is no readable safetensors file"),
        ("no safetensors", "model.safetensors is no readable safetensors file"),
        ("foreign", "model.safetensors is no swiftformer checkpoint.*transformer.h.0.weight"),
        ("wrong shape", r"blocks.0.norm.weight has shape \(5,\), the model needs \(16,\)"),
        ("wrong dtype", "blocks.0.norm.weight has dtype int32, the model needs floating-point numbers"),
        ("incomplete", "it lacks swiftformer.encoder.network.0.blocks.0.norm.weight"),
        ("no weights", "holds no model.safetensors; it holds config.json"),
    ],
)
def test_a_spoilt_weight_file_is_one_clear_error(half, checkpoint, how, message):
    spoil(checkpoint, how)
    before = files_of(checkpoint)
    error = SourceError if how == "no weights" else CheckpointError
    with pytest.raises(error, match=message) as caught:
        half.model("SwiftFormerForImageClassification", checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert files_of(checkpoint) == before


def test_a_head_of_another_size_than_the_config_says_is_an_error_unless_asked_for(half, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"head.weight has shape \(7, 40\), the model needs \(2, 40\)"):
        half.model("SwiftFormerForImageClassification", checkpoint)
    with pytest.warns(CheckpointWarning, match="head.weight"):
        half.model("SwiftFormerForImageClassification", checkpoint, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "swiftformer", ', "config.json is not JSON.*line 1"),
        ('{"model_type": "resnet"}', "'resnet'"),
        ('{"model_type": "swiftformer", "depths": [1, 2]}', "SwiftFormerConfig.depths has 2 entries"),
        ('{"model_type": "swiftformer", "batch_norm_eps": "small"}', "SwiftFormerConfig.batch_norm_eps is 'small'"),
    ],
)
def test_a_broken_config_is_one_clear_error(half, checkpoint, text, message):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        half.model("SwiftFormerForImageClassification", checkpoint)


@pytest.mark.parametrize(
    "failing",
    [
        "modelspec.checkpoints.writing.write_safetensors",
        "modelspec.atomic_folder.os.fsync",
        "modelspec.atomic_folder._rename_exchange",
    ],
)
def test_a_failed_save_leaves_the_old_files(half, checkpoint, monkeypatch, failing):
    model = half.model("SwiftFormerForImageClassification", checkpoint)
    before = files_of(checkpoint)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(checkpoint)
    assert files_of(checkpoint) == before


def test_a_config_that_no_file_can_hold_is_refused_before_anything_is_written(half, golden, tmp_path):
    activation = torch.nn.functional.relu if half.name == "torch" else (lambda x: x)
    model = half.model("ViTMSNForImageClassification", golden("vit_msn_tiny"), hidden_act=activation)
    with pytest.raises(ValueError, match="hidden_act is the function"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# The Hub, without a network


def test_an_unknown_name_without_a_network_is_one_clear_error(half, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="'MBZUAI/swiftformer-s' is no file or directory here.*cache holds no"):
        half.model("SwiftFormerForImageClassification", "MBZUAI/swiftformer-s")
    with pytest.raises(SourceError, match="neither a file or directory here nor a Hub id"):
        half.model("SwiftFormerForImageClassification", "./no/such/folder")


@pytest.mark.parametrize("kind", ["whole", "shards", "bin"])
def test_the_cache_of_the_hub_is_honoured(half, kind, checkpoint, monkeypatch, tmp_path):
    if kind == "shards":
        half.model("SwiftFormerForImageClassification", checkpoint).save_pretrained(checkpoint, max_shard_size="99KB")
        assert not (checkpoint / "model.safetensors").exists()
    elif kind == "bin":
        torch.save(
            {key: torch.from_numpy(value) for key, value in load_file(checkpoint / "model.safetensors").items()},
            checkpoint / "pytorch_model.bin",
        )
        (checkpoint / "model.safetensors").unlink()
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--MBZUAI--swiftformer-xs"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for source in ("MBZUAI/swiftformer-xs", "swiftformer-xs"):
        model = half.model("SwiftFormerForImageClassification", source)
        assert model.config.embed_dims == [16, 24, 24, 40]
        processor = ptmodels.AutoImageProcessor.from_pretrained(source)
        assert processor.size == {"height": 64, "width": 64}
