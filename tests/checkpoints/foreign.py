"""Writes canonical checkpoints as others write them: the authors' names, timm's, the former TensorFlow classes'."""

import re

import h5py
import numpy as np


def bare(tensors: dict, prefix: str) -> dict:
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items()}


def joined(tensors: dict, places: tuple[str, str, str], together: str) -> dict:
    """Stacks the rows of query, key and value, whose names end as `places`, under `together`."""
    result = {}
    for key, value in tensors.items():
        found = re.fullmatch(rf"(.*){re.escape(places[0])}\.(weight|bias)", key)
        if found:
            parts = [tensors[f"{found[1]}{place}.{found[2]}"] for place in places]
            result[f"{found[1]}{together}.{found[2]}"] = np.concatenate(parts)
        elif not any(f"{place}." in key for place in places[1:]):
            result[key] = value
    return result


def renamed(tensors: dict, rules: dict[str, str]) -> dict:
    result = {}
    for key, value in tensors.items():
        for old, new in rules.items():
            key = re.sub(old, new, key)
        result[key] = value
    return result


def as_nat(tensors: dict, prefix: str) -> dict:
    places = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
    tensors = joined(bare(tensors, prefix), places, "attn.qkv")
    for key in [key for key in tensors if key.endswith("layer_scale_parameters")]:
        block = key.removesuffix("layer_scale_parameters")
        tensors[f"{block}gamma1"], tensors[f"{block}gamma2"] = tensors.pop(key)
    return renamed(
        tensors,
        {
            r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
            r"^embeddings\.norm": "patch_embed.norm",
            r"^encoder\.": "",
            r"\.layers\.": ".blocks.",
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            r"attention\.self\.rpb": "attn.rpb",
            r"attention\.output\.dense": "attn.proj",
            r"intermediate\.dense": "mlp.fc1",
            r"output\.dense": "mlp.fc2",
            r"^layernorm": "norm",
            r"^classifier": "head",
        },
    )


def as_swiftformer(tensors: dict) -> dict:
    return renamed(
        bare(tensors, "swiftformer"),
        {
            r"^patch_embed\.patch_embedding": "patch_embed",
            r"^encoder\.network\.(\d+)\.blocks\.": r"network.\1.",
            r"^encoder\.": "",
            "point_wise_conv": "pwconv",
            "depth_wise_conv": "dwconv",
            r"attn\.proj": "attn.Proj",
        },
    )


def as_timm(tensors: dict) -> dict:
    result = {}
    for key, value in as_swiftformer(tensors).items():
        found = re.fullmatch(r"network\.(\d+)\.(.*)", key)
        if found and int(found[1]) % 2:
            key = f"stages.{(int(found[1]) + 1) // 2}.downsample.{found[2]}"
        elif found:
            key = f"stages.{int(found[1]) // 2}.blocks.{found[2]}"
        key = re.sub(r"(layer_scale(_\d)?)$", r"\1.gamma", key)
        key = re.sub(r"^patch_embed\.", "stem.", key.replace("attn.Proj", "attn.proj"))
        result[re.sub(r"^dist_head", "head_dist", key)] = value
    return result


def as_msn(tensors: dict) -> dict:
    """Of a bare model: what the authors' file has under `target_encoder`, with a projection head."""
    places = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
    tensors = renamed(
        joined(bare(tensors, "vit"), places, "attn.qkv"),
        {
            r"^embeddings\.cls_token": "cls_token",
            r"^embeddings\.position_embeddings": "pos_embed",
            r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
            r"^encoder\.layer": "blocks",
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            r"attention\.output\.dense": "attn.proj",
            r"intermediate\.dense": "mlp.fc1",
            r"output\.dense": "mlp.fc2",
            r"^layernorm": "norm",
        },
    )
    width = tensors["norm.weight"].shape[0]
    head = {"fc.fc1.weight": np.ones((8, width), np.float32), "fc.bn1.running_mean": np.zeros(8, np.float32)}
    return {f"module.{key}": value for key, value in (tensors | head).items()}


_KERAS = {"running_mean": "moving_mean", "running_var": "moving_variance"}


def write_tensorflow(path, tensors: dict) -> None:
    """Writes what TFSwiftFormerForImageClassification wrote as `tf_model.h5`."""
    with h5py.File(path, "w") as file:
        for key, value in tensors.items():
            layer, _, name = key.rpartition(".")
            if name == "num_batches_tracked":
                continue
            is_norm = f"{layer}.running_mean" in tensors
            if name == "weight":
                name = "gamma" if is_norm else "kernel"
                value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
            elif name == "bias" and is_norm:
                name = "beta"
            elif name.startswith("layer_scale"):
                value = value[:, 0, 0]
            scope = re.sub(r"\.(\d+)", r"_._\1", layer.replace("patch_embedding.", "patch_embedding/"))
            scope = scope.replace(".", "/").replace("_/_", "_._")
            name = f"{scope}/{_KERAS.get(name, name)}:0"
            file[f"{layer.partition('.')[0]}/tf_swift_former_for_image_classification/{name}"] = value
        file.attrs["backend"] = "tensorflow"
