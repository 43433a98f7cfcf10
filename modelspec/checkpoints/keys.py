"""Every key and shape of every family's checkpoint, without a framework.

Source: the published files of the reference implementations; `tests/golden/keys` holds them for all 20 variants.
"""

from collections.abc import Iterator

from modelspec.configs.base import ModelConfig

Shape = tuple[int, ...]
ARCHITECTURES = ("Model", "ForImageClassification", "Backbone")


def parameter_shapes(
    config: ModelConfig, architecture: str = "ForImageClassification", *, use_mask_token: bool = False
) -> dict[str, Shape]:
    """Returns checkpoint key -> shape, in the reference's layouts (PyTorch's), in the order of the model.

    Args:
        config: a config of one of the four families.
        architecture: `"Model"` (no prefix), `"ForImageClassification"` (prefix and head) or `"Backbone"`, which
            has norms of its own in NAT and DiNAT, and the keys of `"Model"` in the others.
        use_mask_token: ViT-MSN's bare model may hold a mask token.

    Raises:
        ValueError: the architecture is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}; allowed are {', '.join(ARCHITECTURES)}")
    if config.model_type == "swiftformer":
        body, head = _swiftformer(config), _swiftformer_head(config)
    elif config.model_type == "vit_msn":
        body, head = _vit_msn(config, use_mask_token), _linear("classifier", config.hidden_size, config.num_labels)
    else:
        body = _neighborhood(config, architecture)
        head = _linear("classifier", config.hidden_size, config.num_labels)
    if architecture != "ForImageClassification":
        return dict(body)
    return {f"{config.base_model_prefix}.{key}": shape for key, shape in body} | dict(head)


def num_parameters(shapes: dict[str, Shape]) -> int:
    """Counts the trainable elements of `parameter_shapes`: all but the statistics of BatchNorm."""
    total = 0
    for key, shape in shapes.items():
        if key.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked"):
            count = 1
            for size in shape:
                count *= size
            total += count
    return total


Entries = Iterator[tuple[str, Shape]]


def _linear(name: str, in_features: int, out_features: int, bias: bool = True) -> Entries:
    if out_features == 0:
        return
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def _conv(name: str, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> Entries:
    yield f"{name}.weight", (out_channels, in_channels, kernel_size, kernel_size)
    if bias:
        yield f"{name}.bias", (out_channels,)


def _layer_norm(name: str, size: int) -> Entries:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _batch_norm(name: str, size: int) -> Entries:
    yield from _layer_norm(name, size)
    yield f"{name}.running_mean", (size,)
    yield f"{name}.running_var", (size,)
    yield f"{name}.num_batches_tracked", ()


def _swiftformer(config: ModelConfig) -> Entries:
    width = config.embed_dims[0]
    yield from _conv("patch_embed.patch_embedding.0", config.num_channels, width // 2, 3)
    yield from _batch_norm("patch_embed.patch_embedding.1", width // 2)
    yield from _conv("patch_embed.patch_embedding.3", width // 2, width, 3)
    yield from _batch_norm("patch_embed.patch_embedding.4", width)
    entry = 0
    for stage, (depth, dim) in enumerate(zip(config.depths, config.embed_dims, strict=True)):
        for block in range(depth):
            name = f"encoder.network.{entry}.blocks.{block}"
            if block < depth - 1:
                yield from _conv_block(name, dim, int(config.mlp_ratio * dim))
            else:
                yield from _swiftformer_encoder_block(name, dim, int(config.mlp_ratio * dim), config.use_layer_scale)
        entry += 1
        if config.has_downsampling(stage):
            next_dim = config.embed_dims[stage + 1]
            yield from _conv(f"encoder.network.{entry}.proj", dim, next_dim, config.down_patch_size)
            yield from _batch_norm(f"encoder.network.{entry}.norm", next_dim)
            entry += 1


def _conv_block(name: str, dim: int, hidden: int) -> Entries:
    yield f"{name}.layer_scale", (dim, 1, 1)
    yield from _conv(f"{name}.depth_wise_conv", 1, dim, 3)
    yield from _batch_norm(f"{name}.norm", dim)
    yield from _conv(f"{name}.point_wise_conv1", dim, hidden, 1)
    yield from _conv(f"{name}.point_wise_conv2", hidden, dim, 1)


def _swiftformer_encoder_block(name: str, dim: int, hidden: int, use_layer_scale: bool) -> Entries:
    if use_layer_scale:
        yield f"{name}.layer_scale_1", (dim, 1, 1)
        yield f"{name}.layer_scale_2", (dim, 1, 1)
    yield from _conv_block(f"{name}.local_representation", dim, dim)
    yield f"{name}.attn.w_g", (dim, 1)
    for layer in ("to_query", "to_key", "proj", "final"):
        yield from _linear(f"{name}.attn.{layer}", dim, dim)
    yield from _batch_norm(f"{name}.linear.norm1", dim)
    yield from _conv(f"{name}.linear.fc1", dim, hidden, 1)
    yield from _conv(f"{name}.linear.fc2", hidden, dim, 1)


def _swiftformer_head(config: ModelConfig) -> Entries:
    yield from _batch_norm("norm", config.embed_dims[-1])
    yield from _linear("head", config.embed_dims[-1], config.num_labels)
    yield from _linear("dist_head", config.embed_dims[-1], config.num_labels)


def _vit_msn(config: ModelConfig, use_mask_token: bool) -> Entries:
    dim = config.hidden_size
    yield "embeddings.cls_token", (1, 1, dim)
    yield "embeddings.position_embeddings", (1, config.num_patches + 1, dim)
    if use_mask_token:
        yield "embeddings.mask_token", (1, 1, dim)
    yield from _conv("embeddings.patch_embeddings.projection", config.num_channels, dim, config.patch_size)
    for layer in range(config.num_hidden_layers):
        name = f"encoder.layer.{layer}"
        for projection in ("query", "key", "value"):
            yield from _linear(f"{name}.attention.attention.{projection}", dim, dim, config.qkv_bias)
        yield from _linear(f"{name}.attention.output.dense", dim, dim)
        yield from _linear(f"{name}.intermediate.dense", dim, config.intermediate_size)
        yield from _linear(f"{name}.output.dense", config.intermediate_size, dim)
        yield from _layer_norm(f"{name}.layernorm_before", dim)
        yield from _layer_norm(f"{name}.layernorm_after", dim)
    yield from _layer_norm("layernorm", dim)


def _neighborhood(config: ModelConfig, architecture: str) -> Entries:
    dim = config.embed_dim
    yield from _conv("embeddings.patch_embeddings.projection.0", config.num_channels, dim // 2, 3)
    yield from _conv("embeddings.patch_embeddings.projection.1", dim // 2, dim, 3)
    yield from _layer_norm("embeddings.norm", dim)
    for stage, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        dim = config.embed_dim * 2**stage
        for block in range(depth):
            yield from _neighborhood_block(f"encoder.levels.{stage}.layers.{block}", config, dim, heads)
        if stage + 1 < len(config.depths):
            yield from _conv(f"encoder.levels.{stage}.downsample.reduction", dim, 2 * dim, 3, bias=False)
            yield from _layer_norm(f"encoder.levels.{stage}.downsample.norm", 2 * dim)
    if architecture == "Backbone":
        channels = dict(zip(config.stage_names, [config.embed_dim, *_stage_dims(config)], strict=True))
        for stage in config.out_features:
            yield from _layer_norm(f"hidden_states_norms.{stage}", channels[stage])
    else:
        yield from _layer_norm("layernorm", dim)


def _stage_dims(config: ModelConfig) -> list[int]:
    return [config.embed_dim * 2**stage for stage in range(len(config.depths))]


def _neighborhood_block(name: str, config: ModelConfig, dim: int, heads: int) -> Entries:
    window = 2 * config.kernel_size - 1
    if config.layer_scale_init_value > 0:
        yield f"{name}.layer_scale_parameters", (2, dim)
    yield from _layer_norm(f"{name}.layernorm_before", dim)
    yield f"{name}.attention.self.rpb", (heads, window, window)
    for projection in ("query", "key", "value"):
        yield from _linear(f"{name}.attention.self.{projection}", dim, dim, config.qkv_bias)
    yield from _linear(f"{name}.attention.output.dense", dim, dim)
    yield from _layer_norm(f"{name}.layernorm_after", dim)
    yield from _linear(f"{name}.intermediate.dense", dim, int(config.mlp_ratio * dim))
    yield from _linear(f"{name}.output.dense", int(config.mlp_ratio * dim), dim)
