"""The command line: `twinzoo info` and `twinzoo convert`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import ptmodels
from modelspec import ImageProcessor, get_config, load_config
from modelspec.checkpoints import convert, describe, parameter_shapes, probing_weights, read_checkpoint
from twinzoo.__main__ import main


def save_original(path, tensors: dict) -> None:
    """Writes DiNAT's weights as its authors did, but for the names that are the same in both."""
    blocks = {}
    for key, value in tensors.items():
        key = key.removeprefix("dinat.").removeprefix("encoder.").replace("layers.", "blocks.")
        for ours, theirs in {
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "embeddings.norm": "patch_embed.norm",
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            "attention.self.rpb": "attn.rpb",
            "attention.output.dense": "attn.proj",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
            "classifier": "head",
        }.items():
            key = key.replace(ours, theirs)
        blocks["norm" + key.removeprefix("layernorm") if key.startswith("layernorm") else key] = value
    for key in [key for key in blocks if "attention.self.query" in key]:
        parts = [blocks.pop(key.replace("query", name)) for name in ("query", "key", "value")]
        blocks[key.replace("attention.self.query", "attn.qkv")] = np.concatenate(parts)
    torch.save({key: torch.from_numpy(value) for key, value in blocks.items()}, path)


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_an_original_file_is_named_and_converted(tmp_path, capsys):
    config = get_config("dinat-mini")
    tensors = probing_weights(config, 0)
    path = tmp_path / "dinat_mini_in1k_224.pth"
    save_original(path, tensors)
    status, out, _ = run(capsys, "info", path, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["dialect"] == "nat" and found["format"] == "torch" and found["family"] is None
    assert found["variants"] == ["nat-mini", "dinat-mini"] and found["parameters"] == 19_984_174
    assert found["num_labels"] == 1000 and found["missing"] == found["unexpected"] == []
    status, _, err = run(capsys, "convert", path, tmp_path / "new")
    assert status == 1 and "may be of nat-mini, dinat-mini: say which one" in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    status, out, _ = run(capsys, "convert", path, tmp_path / "new", "--model", "dinat-mini", "--max-shard-size", "20MB")
    assert status == 0 and "nat" in out
    written = read_checkpoint(tmp_path / "new" / "model.safetensors.index.json")
    assert written.tensors.keys() == parameter_shapes(config).keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(written.tensors[key], value)
    assert load_config(tmp_path / "new").dilations == config.dilations
    assert ImageProcessor.from_pretrained(tmp_path / "new").resample == 3
    assert type(ptmodels.load(tmp_path / "new")) is ptmodels.DinatForImageClassification


def test_info_tells_what_is_missing_and_what_is_too_much(golden, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(golden("vit_msn_tiny") / "model.safetensors")
    tensors["extra.weight"] = np.zeros(3, np.float32)
    tensors["vit.layernorm.weight"] = np.zeros(3, np.float32)
    del tensors["vit.layernorm.bias"]
    (tmp_path / "config.json").write_text((golden("vit_msn_tiny") / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    found = describe(tmp_path)
    assert found.missing == ["vit.layernorm.bias"] and found.unexpected == ["extra.weight"]
    assert [key for key, _, _ in found.mismatched] == ["vit.layernorm.weight"]
    status, out, _ = run(capsys, "info", tmp_path)
    assert status == 0 and "extra.weight" in out and "vit.layernorm.weight (3,) -> " in out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_dtype_is_converted_and_then_kept(dtype, golden, tmp_path):
    convert(golden("swiftformer_tiny"), tmp_path / "a", dtype=dtype)
    convert(tmp_path / "a", tmp_path / "b")
    first, second = (read_checkpoint(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.dtype == second.dtype == dtype == load_config(tmp_path / "b").dtype
    model = ptmodels.SwiftFormerForImageClassification.from_pretrained(golden("swiftformer_tiny"))
    for key, value in model.to(getattr(torch, dtype)).state_dict().items():
        np.testing.assert_array_equal(first.tensors[key], value.double().numpy())
        np.testing.assert_array_equal(second.tensors[key], first.tensors[key])


def test_tables_are_resized_and_options_reach_the_config(golden, tmp_path, capsys):
    status, out, _ = run(capsys, "convert", golden("dinat_tiny"), tmp_path / "a", "--kernel-size", 7, "--json")
    assert status == 0 and len(json.loads(out)["resized"]) > 1
    assert load_config(tmp_path / "a").kernel_size == 7
    status, *_ = run(capsys, "convert", golden("vit_msn_tiny"), tmp_path / "b", "--image-size", 48)
    assert status == 0 and load_config(tmp_path / "b").image_size == 48
    status, *_ = run(capsys, "convert", golden("swiftformer_tiny"), tmp_path / "c", "--attention-norm", "l2")
    assert status == 0 and load_config(tmp_path / "c").attention_norm == "l2"
    ptmodels.load(tmp_path / "a")
    ptmodels.load(tmp_path / "b")


def test_backbones_and_bare_models_stay_what_they_are(golden, tmp_path):
    convert(golden("dinat_tiny_backbone"), tmp_path / "a")
    assert load_config(tmp_path / "a").architectures == ["DinatBackbone"]
    ptmodels.DinatBackbone.from_pretrained(tmp_path / "a")
    convert(golden("vit_msn_masktoken"), tmp_path / "b")
    assert load_config(tmp_path / "b").architectures == ["ViTMSNModel"]
    assert "embeddings.mask_token" in read_checkpoint(tmp_path / "b" / "model.safetensors").tensors


def test_mistakes_are_one_line(golden, tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(b"PK\x03\x04 nothing")
    for arguments, message in (
        (["info", tmp_path / "bad.pth"], "bad.pth is no readable file of torch"),
        (["info", tmp_path / "no such"], "neither a file or directory here nor a Hub id"),
        (["convert", golden("nat_tiny"), tmp_path / "x", "--dtype", "int8"], "dtype is 'int8'; allowed are"),
        (["convert", golden("nat_tiny"), tmp_path / "x", "--kernel-size", "4"], "kernel_size is 4"),
        (["convert", golden("nat_tiny"), tmp_path / "x", "--max-shard-size", "much"], "max_shard_size is 'much'"),
        (["convert", golden("nat_tiny"), tmp_path / "x", "--model", "nat-huge"], "no variant 'nat-huge'"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (1, "") and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "x").exists()
    assert run(capsys, "frobnicate")[0] == 2
    assert run(capsys)[0] == 2


def test_help_is_quick_and_imports_nothing_heavy():
    program = "import sys, twinzoo.__main__ as m; m.main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "convert" in done.stdout
    for heavy in ("'torch'", "'tensorflow'", "'keras'", "'numpy'", "'h5py'"):
        assert heavy not in done.stdout
