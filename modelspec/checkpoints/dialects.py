"""Whose names the keys of a checkpoint are in, and their translation into the reference's.

| dialect | from |
|---|---|
| `transformers` | the Hub's files, and ours |
| `transformers-tf` | the former TFSwiftFormer's `tf_model.h5`: Keras' names and layouts |
| `nat` | the authors' NAT and DiNAT: joint qkv, layer scales in two |
| `swiftformer` | the authors' SwiftFormer |
| `timm` | timm's SwiftFormer |
| `msn` | the authors' MSN: `module.` before every key, joint qkv, a projection head and prototypes |
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from modelspec.checkpoints.checkpoint import Checkpoint

Tensors = dict[str, np.ndarray]
DIALECTS = ("transformers", "transformers-tf", "nat", "swiftformer", "timm", "msn")
L2_DIALECTS = ("swiftformer", "timm")  # their weights were trained with SwiftFormer's `attention_norm` "l2"

_MARKS = {
    "transformers-tf": r".*/.*:0|.*\.kernel:0",
    "nat": r"(.*\.)?levels\.\d+\.blocks\.\d+\.attn\..*",
    "swiftformer": r"(.*\.)?network\.\d+\.\d+\.(dwconv|local_representation)\..*",
    "timm": r"(.*\.)?stages\.\d+\.blocks\.\d+\.(dwconv|local_representation)\..*",
    "msn": r"(.*\.)?blocks\.\d+\.attn\.qkv\.weight",
}


def dialect_of(keys: list[str]) -> str:
    """Returns whose names `keys` are, one of DIALECTS; `transformers` if nothing speaks for another."""
    for name, mark in _MARKS.items():
        if any(re.fullmatch(mark, key) for key in keys):
            return name
    return "transformers"


def translate(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint under the reference's names and in its layouts; what is unknown keeps its name."""
    dialect = dialect_of(list(checkpoint.tensors))
    tensors = {_without_wrapper(key): value for key, value in checkpoint.tensors.items()}
    if len(tensors) != len(checkpoint.tensors):
        tensors = checkpoint.tensors
    pretraining = {}
    if dialect == "msn":
        pretraining = {key: tensors.pop(key) for key in list(tensors) if key == "prototypes" or key.startswith("fc.")}
    return dataclasses.replace(
        checkpoint, tensors=_TRANSLATIONS[dialect](tensors), dialect=dialect, pretraining=pretraining
    )


def _without_wrapper(key: str) -> str:
    return key.removeprefix("module.").removeprefix("backbone.")


def _renamed(tensors: Tensors, *rules: tuple[str, str | Callable[[re.Match], str]]) -> Tensors:
    renamed = {}
    for key, value in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _split_qkv(tensors: Tensors, joint: str, separate: str) -> Tensors:
    """Cuts each `joint` weight and bias into thirds, named `separate` with query, key and value."""
    split = {}
    for key, value in tensors.items():
        found = re.fullmatch(f"(.*){joint}\\.(weight|bias)", key)
        if not found or value.ndim == 0 or value.shape[0] % 3:
            split[key] = value
            continue
        for name, part in zip(("query", "key", "value"), np.split(value, 3), strict=True):
            split[f"{found[1]}{separate.format(name)}.{found[2]}"] = part
    return split


def _from_nat(tensors: Tensors) -> Tensors:
    tensors = _split_qkv(tensors, r"attn\.qkv", "attention.self.{}")
    tensors = _renamed(
        tensors,
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", "embeddings.norm."),
        (r"^levels\.(\d+)\.blocks\.(\d+)\.", r"encoder.levels.\1.layers.\2."),
        (r"^levels\.", "encoder.levels."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.rpb$", ".attention.self.rpb"),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^norm\.", "layernorm."),
        (r"^head\.", "classifier."),
        (r"^norm(\d+)\.", lambda found: f"hidden_states_norms.stage{int(found[1]) + 1}."),
    )
    for key in [key for key in tensors if key.endswith(".gamma1")]:
        block = key.removesuffix("gamma1")
        if f"{block}gamma2" in tensors and tensors[key].shape == tensors[f"{block}gamma2"].shape:
            gammas = tensors.pop(key), tensors.pop(f"{block}gamma2")
            tensors[f"{block}layer_scale_parameters"] = np.stack(gammas)
    return tensors


_CONVOLUTIONS = ((r"\.dwconv\.", ".depth_wise_conv."), (r"\.pwconv([12])\.", r".point_wise_conv\1."))


def _from_swiftformer(tensors: Tensors) -> Tensors:
    return _renamed(
        tensors,
        *_CONVOLUTIONS,
        (r"\.attn\.Proj\.", ".attn.proj."),
        (r"^patch_embed\.(\d)", r"patch_embed.patch_embedding.\1"),
        (r"^network\.(\d+)\.(\d+)\.", r"encoder.network.\1.blocks.\2."),
        (r"^network\.(\d+)\.", r"encoder.network.\1."),
    )


def _from_timm(tensors: Tensors) -> Tensors:
    return _renamed(
        tensors,
        *_CONVOLUTIONS,
        (r"^stem\.", "patch_embed.patch_embedding."),
        # timm's stages begin with the downsampling; the reference's network has it as an entry of its own
        (r"^stages\.(\d+)\.downsample\.", lambda found: f"encoder.network.{2 * int(found[1]) - 1}."),
        (r"^stages\.(\d+)\.blocks\.", lambda found: f"encoder.network.{2 * int(found[1])}.blocks."),
        (r"\.gamma$", ""),
        (r"^head_dist\.", "dist_head."),
    )


def _from_msn(tensors: Tensors) -> Tensors:
    tensors = _split_qkv(tensors, r"attn\.qkv", "attention.attention.{}")
    return _renamed(
        tensors,
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^norm\.", "layernorm."),
    )


_KERAS_NAMES = {
    **{"kernel": "weight", "gamma": "weight", "beta": "bias"},
    **{"moving_mean": "running_mean", "moving_variance": "running_var"},
}


def _from_keras(tensors: Tensors) -> Tensors:
    translated = {}
    for key, value in tensors.items():
        path, _, name = key.replace("_._", ".").removesuffix(":0").rpartition(".")
        if name == "kernel":
            value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else None)
        elif name.startswith("layer_scale") and value.ndim == 1:
            value = value[:, None, None]
        translated[f"{path}.{_KERAS_NAMES.get(name, name)}"] = np.ascontiguousarray(value)
        if name == "moving_mean":
            translated[f"{path}.num_batches_tracked"] = np.zeros((), np.int64)  # Keras does not count them
    return translated


_TRANSLATIONS: dict[str, Callable[[Tensors], Tensors]] = {
    "transformers": dict,
    "transformers-tf": _from_keras,
    "nat": _from_nat,
    "swiftformer": _from_swiftformer,
    "timm": _from_timm,
    "msn": _from_msn,
}
