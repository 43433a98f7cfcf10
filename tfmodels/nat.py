"""NAT in Keras, and the body of DiNAT, of which NAT is the case without dilation. Twin: `ptmodels/nat.py`.

Papers: Hassani et al., Neighborhood Attention Transformer, CVPR 2023 (arXiv:2204.07143); Hassani and Shi, Dilated
Neighborhood Attention Transformer, 2022 (arXiv:2209.15001). Keys and behaviour: the Hugging Face implementation.
Maps are (B, H, W, C) throughout.
"""

import keras
from keras import ops

from modelspec.configs import BackboneOutput, ImageClassifierOutputWithReshapedStates, ModelOutputWithReshapedStates
from modelspec.configs.nat import NatConfig, NeighborhoodConfig
from tfmodels.call_inputs import unpack_inputs
from tfmodels.composed_attention import sharing_tiles
from tfmodels.gradient_checkpointing import BlockSequence
from tfmodels.layers import Conv2D, Dense, Dropout, DropPath, LayerNormalization, LayerWithOutput, get_activation
from tfmodels.losses import image_classification_loss
from tfmodels.ops import neighborhood_attention
from tfmodels.pretrained import TFPreTrainedModel

FIXED_EPS = 1e-5  # of the norms that `layer_norm_eps` does not reach


class NatPatchEmbeddings(keras.layers.Layer):
    """Two strided convolutions. Input: (B, H, W, C_in). Output: (B, ceil(H/4), ceil(W/4), C)."""

    def __init__(self, config: NeighborhoodConfig):
        super().__init__()
        dim = config.embed_dim
        self.projection = [
            Conv2D(config.num_channels, dim // 2, kernel_size=3, strides=2, padding=1),
            Conv2D(dim // 2, dim, kernel_size=3, strides=2, padding=1),
        ]
        self.built = True

    def call(self, x):
        for convolution in self.projection:
            x = convolution(x)
        return x


class NatEmbeddings(keras.layers.Layer):
    """The stem: patches, normalised. Input: (B, H, W, C_in). Output: (B, ceil(H/4), ceil(W/4), C)."""

    def __init__(self, config: NeighborhoodConfig):
        super().__init__()
        self.patch_embeddings = NatPatchEmbeddings(config)
        self.norm = LayerNormalization(config.embed_dim, epsilon=FIXED_EPS)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.built = True

    def call(self, pixel_values):
        return self.dropout(self.norm(self.patch_embeddings(pixel_values)))


class NatDownsampler(keras.layers.Layer):
    """Halves the map and doubles its width. Input: (B, H, W, C). Output: (B, ceil(H/2), ceil(W/2), 2 C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = Conv2D(dim, 2 * dim, kernel_size=3, strides=2, padding=1, use_bias=False)
        self.norm = LayerNormalization(2 * dim, epsilon=FIXED_EPS)
        self.built = True

    def call(self, x):
        return self.norm(self.reduction(x))


class NatSelfAttention(keras.layers.Layer):
    """Neighborhood attention of several heads. Input and output: (B, H, W, C); probabilities (B, heads, H, W, keys)."""

    def __init__(self, config: NeighborhoodConfig, dim: int, num_heads: int, dilation: int):
        super().__init__()
        self.num_heads = num_heads
        self.kernel_size = config.kernel_size
        self.dilation = dilation
        self.query = Dense(dim, dim, use_bias=config.qkv_bias)
        self.key = Dense(dim, dim, use_bias=config.qkv_bias)
        self.value = Dense(dim, dim, use_bias=config.qkv_bias)
        shape = (num_heads, 2 * config.kernel_size - 1, 2 * config.kernel_size - 1)
        self.rpb = self.add_weight(shape=shape, initializer="zeros", name="rpb")
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.built = True

    def call(self, x, output_attentions=False, implementation="auto", training=None):
        output = neighborhood_attention(
            self.split_heads(self.query(x)),
            self.split_heads(self.key(x)),
            self.split_heads(self.value(x)),
            self.kernel_size,
            self.dilation,
            rel_pos_bias=self.rpb,
            dropout=self.dropout if training and self.dropout.rate > 0.0 else None,
            return_probabilities=output_attentions,
            implementation=implementation,
        )
        output, probabilities = output if output_attentions else (output, None)
        if probabilities is not None:
            probabilities = ops.transpose(probabilities, (0, 3, 1, 2, 4))
        return ops.reshape(output, ops.shape(x)), probabilities

    def split_heads(self, x):
        *sizes, dim = ops.shape(x)
        return ops.reshape(x, (*sizes, self.num_heads, dim // self.num_heads))  # (B, H, W, heads, head_dim)


class NatSelfOutput(keras.layers.Layer):
    """The projection after the attention. Input and output: (B, H, W, C)."""

    def __init__(self, config: NeighborhoodConfig, dim: int):
        super().__init__()
        self.dense = Dense(dim, dim)
        # not hidden_dropout_prob, as in the reference
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.built = True

    def call(self, x):
        return self.dropout(self.dense(x))


class NatAttention(LayerWithOutput):
    """Self-attention and its projection. Input and output: (B, H, W, C); probabilities (B, heads, H, W, keys)."""

    def __init__(self, config: NeighborhoodConfig, dim: int, num_heads: int, dilation: int):
        super().__init__()
        self.self = NatSelfAttention(config, dim, num_heads, dilation)
        self.output = NatSelfOutput(config, dim)
        self.built = True

    def call(self, x, output_attentions=False, implementation="auto"):
        x, probabilities = self.self(x, output_attentions=output_attentions, implementation=implementation)
        return self.output(x), probabilities


class NatIntermediate(keras.layers.Layer):
    """The widening half of the MLP. Input: (B, H, W, C). Output: (B, H, W, mlp_ratio C)."""

    def __init__(self, config: NeighborhoodConfig, dim: int):
        super().__init__()
        self.dense = Dense(dim, int(config.mlp_ratio * dim))
        self.act = get_activation(config.hidden_act)
        self.built = True

    def call(self, x):
        return self.act(self.dense(x))


class NatOutput(keras.layers.Layer):
    """The narrowing half of the MLP. Input: (B, H, W, mlp_ratio C). Output: (B, H, W, C)."""

    def __init__(self, config: NeighborhoodConfig, dim: int):
        super().__init__()
        self.dense = Dense(int(config.mlp_ratio * dim), dim)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.built = True

    def call(self, x):
        return self.dropout(self.dense(x))


class NatLayer(LayerWithOutput):
    """A block: attention and MLP, each after a norm and with a residual. Input and output: (B, H, W, C).

    A map smaller than the window is padded with zeros, right and below, between norm and attention; the padding is
    attended to, as in the reference.
    """

    def __init__(self, config: NeighborhoodConfig, dim: int, num_heads: int, dilation: int, drop_path: float):
        super().__init__()
        self.window = config.kernel_size * dilation
        self.layernorm_before = LayerNormalization(dim, epsilon=config.layer_norm_eps)
        self.attention = NatAttention(config, dim, num_heads, dilation)
        self.drop_path = DropPath(drop_path)
        self.layernorm_after = LayerNormalization(dim, epsilon=config.layer_norm_eps)
        self.intermediate = NatIntermediate(config, dim)
        self.output = NatOutput(config, dim)
        self.layer_scale_parameters = None
        if config.layer_scale_init_value > 0:
            self.layer_scale_parameters = self.add_weight(
                shape=(2, dim), initializer="zeros", name="layer_scale_parameters"
            )
        self.built = True

    def call(self, x, output_attentions=False, implementation="auto"):
        _, height, width, _ = ops.shape(x)
        hidden = self.pad_to_window(self.layernorm_before(x))
        hidden, probabilities = self.attention(
            hidden, output_attentions=output_attentions, implementation=implementation
        )
        hidden = hidden[:, :height, :width]
        scale = self.layer_scale_parameters
        if scale is not None:
            hidden = scale[0] * hidden
        x = x + self.drop_path(hidden)
        hidden = self.output(self.intermediate(self.layernorm_after(x)))
        if scale is not None:
            hidden = scale[1] * hidden
        return x + self.drop_path(hidden), probabilities

    def pad_to_window(self, x):
        """Pads (B, H, W, C) on the right and below up to the window."""
        sizes = list(ops.shape(x))
        for axis in (1, 2):
            known = isinstance(sizes[axis], int)
            if known and sizes[axis] >= self.window:
                continue
            missing = self.window - sizes[axis] if known else ops.maximum(self.window - sizes[axis], 0)
            x = ops.concatenate([x, ops.zeros((*sizes[:axis], missing, *sizes[axis + 1 :]), x.dtype)], axis=axis)
            sizes[axis] = sizes[axis] + missing
        return x


class NatStage(BlockSequence):
    """Blocks and a downsampling, except after the last. Input: (B, H, W, C).

    Output: the map before and after the downsampling, and the probabilities of the last block.
    """

    def __init__(self, config: NeighborhoodConfig, stage: int):
        super().__init__()
        dim = config.embed_dim * 2**stage
        self.layers = [
            NatLayer(config, dim, config.num_heads[stage], dilation, drop_path)
            for dilation, drop_path in zip(config.dilations[stage], config.drop_paths[stage], strict=True)
        ]
        self.downsample = NatDownsampler(dim) if stage + 1 < config.num_layers else None
        self.built = True

    def call(self, x, output_attentions=False, implementation="auto", training=None):
        options = {"implementation": implementation, "training": training}
        with sharing_tiles():  # the maps of a stage have one size, also where the graph does not know it
            for layer in self.layers[:-1]:
                x, _ = self.run_block(layer, x, **options)
            x, probabilities = self.run_block(self.layers[-1], x, output_attentions=output_attentions, **options)
        return x, x if self.downsample is None else self.downsample(x), probabilities


class NatEncoder(keras.layers.Layer):
    """All stages. Input: (B, H, W, C).

    Output: the maps before the downsamplings and those after them, the input first in both; the probabilities of each
    stage's last block.
    """

    def __init__(self, config: NeighborhoodConfig):
        super().__init__()
        self.levels = [NatStage(config, stage) for stage in range(config.num_layers)]
        self.built = True

    def call(self, x, output_attentions=False, implementation="auto"):
        before, after = [x], [x]
        attentions: list = []
        for level in self.levels:
            outputs = level(after[-1], output_attentions=output_attentions, implementation=implementation)
            for collected, output in zip((before, after, attentions), outputs, strict=True):
                collected.append(output)
        return before, after, attentions


@keras.saving.register_keras_serializable(package="twinzoo")
class TFNatModel(TFPreTrainedModel):
    """The bare NAT."""

    config_class: type[NeighborhoodConfig] = NatConfig
    constructor_arguments = ("add_pooling_layer",)

    def __init__(self, config: NeighborhoodConfig, add_pooling_layer: bool = True, **kwargs):
        super().__init__(config, **kwargs)
        self.add_pooling_layer = add_pooling_layer
        with self.building():
            self.embeddings = NatEmbeddings(config)
            self.encoder = NatEncoder(config)
            self.layernorm = LayerNormalization(config.hidden_size, epsilon=config.layer_norm_eps)

    @unpack_inputs
    def call(
        self, pixel_values=None, output_attentions=None, output_hidden_states=None, return_dict=None, training=False
    ):
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, or (B, H, W, num_channels) (`data_format`), any H and W.
            output_attentions: also return the probabilities of each stage's last block.
            output_hidden_states: also return the stem's output and that of every stage, after its downsampling.
            return_dict: False returns a tuple, without `reshaped_hidden_states`.
            training: whether to drop out.

        Returns:
            `last_hidden_state` (B, ceil(H/32), ceil(W/32), C_last) after the final norm; `pooler_output` (B, C_last),
            its mean; `hidden_states`, each (B, H', W', C), and the same as (B, C, H', W') in `reshaped_hidden_states`;
            `attentions`, each (B, heads, H', W', kernel_size**2), of padded maps where these are smaller than windows.

        Raises:
            ValueError: `pixel_values` is missing or of another shape.
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        _, hidden_states, attentions = self.encode(pixel_values, options.output_attentions)
        last_hidden_state = self.layernorm(hidden_states[-1])
        output = ModelOutputWithReshapedStates(
            last_hidden_state=last_hidden_state,
            pooler_output=ops.mean(last_hidden_state, axis=(1, 2)) if self.add_pooling_layer else None,
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
            attentions=tuple(attentions) if options.output_attentions else None,
        )
        if not options.return_dict:
            return output.to_tuple()
        return with_reshaped_states(output)

    def encode(self, pixel_values, output_attentions: bool):
        """Runs stem and stages; returns what `NatEncoder` does."""
        implementation = "composed" if self.attn_implementation == "eager" else "auto"
        x = self.embeddings(self.images_to_channels_last(pixel_values))
        return self.encoder(x, output_attentions=output_attentions, implementation=implementation)


@keras.saving.register_keras_serializable(package="twinzoo")
class TFNatForImageClassification(TFPreTrainedModel):
    """NAT with a linear classifier on the mean of the last map."""

    config_class: type[NeighborhoodConfig] = NatConfig
    body_class = TFNatModel

    def __init__(self, config: NeighborhoodConfig, **kwargs):
        super().__init__(config, **kwargs)
        with self.building():
            body = self.body_class(config, data_format="channels_last", attn_implementation=self.attn_implementation)
            setattr(self, config.base_model_prefix, body)
            self.classifier = (
                Dense(config.hidden_size, config.num_labels) if config.num_labels > 0 else keras.layers.Identity()
            )

    @unpack_inputs
    def call(
        self,
        pixel_values=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        training=False,
    ):
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, or (B, H, W, num_channels) (`data_format`), any H and W.
            labels: give a loss; see `tfmodels.losses.image_classification_loss` for their forms.
            output_attentions: also return the probabilities of each stage's last block.
            output_hidden_states: also return the stem's output and that of every stage, after its downsampling.
            return_dict: False returns a tuple, without `reshaped_hidden_states`.
            training: whether to drop out.

        Returns:
            `loss`, a scalar, if labels are given; `logits` (B, num_labels); the others as of the bare model.

        Raises:
            ValueError: `pixel_values` is missing or of another shape.
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        outputs = self.get_body()(
            self.images_to_channels_last(pixel_values),
            output_attentions=options.output_attentions,
            output_hidden_states=options.output_hidden_states,
            return_dict=True,
        )
        logits = self.forward_head(outputs.last_hidden_state)
        output = ImageClassifierOutputWithReshapedStates(
            loss=None if labels is None else image_classification_loss(self.config, labels, logits),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if not options.return_dict:
            return output.to_tuple()
        return with_reshaped_states(output)

    def forward_head(self, features, pre_logits=False):
        pooled = ops.mean(features, axis=(1, 2))  # (B, C_last)
        return pooled if pre_logits else self.classifier(pooled)


@keras.saving.register_keras_serializable(package="twinzoo")
class TFNatBackbone(TFPreTrainedModel):
    """NAT for detection and segmentation heads: normalised maps of the stages that `config.out_features` names."""

    config_class: type[NeighborhoodConfig] = NatConfig

    def __init__(self, config: NeighborhoodConfig, **kwargs):
        super().__init__(config, **kwargs)
        with self.building():
            self.embeddings = NatEmbeddings(config)
            self.encoder = NatEncoder(config)
            self.hidden_states_norms = {
                name: LayerNormalization(config.channels[name], epsilon=FIXED_EPS) for name in config.out_features
            }

    @property
    def channels(self) -> list[int]:
        """The width of each feature map."""
        return [self.config.channels[name] for name in self.config.out_features]

    @unpack_inputs
    def call(
        self, pixel_values=None, output_attentions=None, output_hidden_states=None, return_dict=None, training=False
    ):
        """Runs the backbone.

        Args:
            pixel_values: (B, num_channels, H, W) floats, or (B, H, W, num_channels) (`data_format`), any H and W.
            output_attentions: also return the probabilities of each stage's last block.
            output_hidden_states: also return the stem's output and that of every stage, before its downsampling.
            return_dict: False returns a tuple.
            training: whether to drop out.

        Returns:
            `feature_maps`, each (B, C, H', W'), or (B, H', W', C) (`data_format`), stage i having 1 / (4 * 2**(i - 1))
            of the image's size, rounded up; `hidden_states`, each (B, H', W', C), of all stages and without norm;
            `attentions` as of the bare model.

        Raises:
            ValueError: `pixel_values` is missing or of another shape.
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        hidden_states, _, attentions = self.encode(pixel_values, options.output_attentions)
        chosen = zip(self.config.out_features, self.config.out_indices, strict=True)
        maps = [self.hidden_states_norms[name](hidden_states[index]) for name, index in chosen]
        output = BackboneOutput(
            feature_maps=tuple(self.from_channels_last(x) for x in maps),
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
            attentions=tuple(attentions) if options.output_attentions else None,
        )
        return output if options.return_dict else output.to_tuple()

    def forward_features(self, pixel_values, **options):
        """Returns the feature maps."""
        return self(pixel_values, **options, return_dict=True).feature_maps

    encode = TFNatModel.encode


def with_reshaped_states(output):
    """Adds `reshaped_hidden_states`, each (B, C, H, W), where there are hidden states."""
    if output.hidden_states is not None:
        output.reshaped_hidden_states = tuple(ops.transpose(x, (0, 3, 1, 2)) for x in output.hidden_states)
    return output
