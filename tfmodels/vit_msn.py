"""ViT-MSN in Keras. Twin: `ptmodels/vit_msn.py`.

Paper: Assran et al., Masked Siamese Networks for Label-Efficient Learning, ECCV 2022 (arXiv:2204.07141). The encoder is
a pre-norm Vision Transformer (arXiv:2010.11929). Keys and behaviour: the Hugging Face implementation.
"""

import keras
from keras import ops

from modelspec.configs import BackboneOutput, BaseModelOutput, ImageClassifierOutput, ViTMSNConfig
from tfmodels.call_inputs import unpack_inputs
from tfmodels.gradient_checkpointing import BlockSequence
from tfmodels.interpolation import resize_bicubic
from tfmodels.layers import Conv2D, Dense, Dropout, LayerNormalization, LayerWithOutput, get_activation
from tfmodels.losses import image_classification_loss
from tfmodels.pretrained import TFPreTrainedModel
from tfmodels.shape_checks import assert_image_size


class ViTMSNPatchEmbeddings(keras.layers.Layer):
    """Cuts images into patches. Input: (B, H, W, C_in). Output: (B, H // patch_size, W // patch_size, C)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.projection = Conv2D(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, strides=config.patch_size
        )
        self.built = True

    def call(self, pixel_values):
        return self.projection(pixel_values)


class ViTMSNEmbeddings(keras.layers.Layer):
    """Patches, class token and positions. Input: (B, H, W, C_in). Output: (B, 1 + N, C)."""

    def __init__(self, config: ViTMSNConfig, use_mask_token: bool = False):
        super().__init__()
        self.image_size = config.image_size
        self.grid_size = config.image_size // config.patch_size
        shape = (1, 1, config.hidden_size)
        self.cls_token = self.add_weight(shape=shape, initializer="zeros", name="cls_token")
        self.mask_token = None
        if use_mask_token:
            self.mask_token = self.add_weight(shape=shape, initializer="zeros", name="mask_token")
        self.patch_embeddings = ViTMSNPatchEmbeddings(config)
        self.position_embeddings = self.add_weight(
            shape=(1, config.num_patches + 1, config.hidden_size), initializer="zeros", name="position_embeddings"
        )
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.built = True

    def call(self, pixel_values, bool_masked_pos=None, interpolate_pos_encoding=False):
        if not interpolate_pos_encoding:
            pixel_values = assert_image_size(pixel_values, self.image_size)
        patches = self.patch_embeddings(pixel_values)  # (B, h, w, C)
        batch, height, width, dim = ops.shape(patches)
        positions = ops.convert_to_tensor(self.position_embeddings)
        if interpolate_pos_encoding:
            positions = self.interpolate_positions(height, width)
        tokens = ops.reshape(patches, (batch, height * width, dim))  # (B, N, C)
        if bool_masked_pos is not None:
            tokens = self.mask_tokens(tokens, bool_masked_pos)
        cls_token = ops.broadcast_to(ops.cast(self.cls_token, tokens.dtype), (batch, 1, dim))
        tokens = ops.concatenate([cls_token, tokens], axis=1) + ops.cast(positions, tokens.dtype)  # (B, 1 + N, C)
        return self.dropout(tokens)

    def mask_tokens(self, tokens, bool_masked_pos):
        """Replaces the tokens (B, N, C) by the mask token where `bool_masked_pos` (B, N) is true."""
        if self.mask_token is None:
            raise ValueError("bool_masked_pos needs a mask token: make the model with use_mask_token=True")
        got, needed = tuple(bool_masked_pos.shape), tuple(tokens.shape[:2])
        if len(got) != 2 or any(a != b for a, b in zip(got, needed, strict=True) if None not in (a, b)):
            raise ValueError(f"bool_masked_pos has shape {got}; these images need {needed}")
        masked = ops.expand_dims(ops.cast(bool_masked_pos, "bool"), -1)
        return ops.where(masked, ops.cast(self.mask_token, tokens.dtype), tokens)

    def interpolate_positions(self, height, width):
        """Returns the positions (1, 1 + height * width, C) of a grid of another size, by bicubic interpolation."""
        table = ops.convert_to_tensor(self.position_embeddings)
        dim = table.shape[-1]
        grid = ops.reshape(table[:, 1:], (self.grid_size, self.grid_size, dim))
        grid = ops.reshape(resize_bicubic(grid, height, width), (1, height * width, dim))
        return ops.concatenate([table[:, :1], grid], axis=1)


class ViTMSNSelfAttention(keras.layers.Layer):
    """Multi-head self-attention. Input: (B, S, C). Output: (B, S, C) and, if eager, probabilities (B, heads, S, S)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = Dense(dim, dim, use_bias=config.qkv_bias)
        self.key = Dense(dim, dim, use_bias=config.qkv_bias)
        self.value = Dense(dim, dim, use_bias=config.qkv_bias)
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.built = True

    def call(self, x, head_mask=None, eager=False, training=None):
        query = self.split_heads(self.query(x))
        key = self.split_heads(self.key(x))
        value = self.split_heads(self.value(x))
        dtype = keras.backend.standardize_dtype(query.dtype)
        # Keras' fused attention has no dropout, and a float32 step that float64 must not pass
        if not eager and dtype != "float64" and not (training and self.dropout.rate > 0.0):
            return self.merge_heads(ops.dot_product_attention(query, key, value)), None
        scores = ops.einsum("bqhd,bkhd->bhqk", query, key) * (query.shape[-1] ** -0.5)  # (B, heads, S, S)
        softmax_dtype = "float32" if dtype in ("float16", "bfloat16") else dtype
        probabilities = ops.softmax(ops.cast(scores, softmax_dtype), axis=-1)
        probabilities = self.dropout(ops.cast(probabilities, dtype))
        if head_mask is not None:
            probabilities = probabilities * ops.cast(head_mask, dtype)[:, None, None]
        attended = self.merge_heads(ops.einsum("bhqk,bkhd->bqhd", probabilities, value))
        return attended, probabilities if eager else None  # kept for all layers, they could fill the memory

    def split_heads(self, x):
        batch, length, dim = ops.shape(x)
        return ops.reshape(x, (batch, length, self.num_heads, dim // self.num_heads))  # (B, S, heads, head_dim)

    def merge_heads(self, x):
        batch, length, heads, head_dim = ops.shape(x)
        return ops.reshape(x, (batch, length, heads * head_dim))  # (B, S, C)


class ViTMSNSelfOutput(keras.layers.Layer):
    """The projection after the attention. Input and output: (B, S, C)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.dense = Dense(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.built = True

    def call(self, x):
        return self.dropout(self.dense(x))


class ViTMSNAttention(LayerWithOutput):
    """Self-attention and its projection. Input: (B, S, C). Output: (B, S, C) and the probabilities."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.attention = ViTMSNSelfAttention(config)
        self.output = ViTMSNSelfOutput(config)
        self.built = True

    def call(self, x, head_mask=None, eager=False):
        attended, probabilities = self.attention(x, head_mask=head_mask, eager=eager)
        return self.output(attended), probabilities


class ViTMSNIntermediate(keras.layers.Layer):
    """The first half of the MLP. Input: (B, S, C). Output: (B, S, intermediate_size)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.dense = Dense(config.hidden_size, config.intermediate_size)
        self.act = get_activation(config.hidden_act)
        self.built = True

    def call(self, x):
        return self.act(self.dense(x))


class ViTMSNOutput(keras.layers.Layer):
    """The second half of the MLP. Input: (B, S, intermediate_size). Output: (B, S, C)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.dense = Dense(config.intermediate_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.built = True

    def call(self, x):
        return self.dropout(self.dense(x))


class ViTMSNLayer(LayerWithOutput):
    """A pre-norm block. Input: (B, S, C). Output: (B, S, C) and the attention probabilities."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.attention = ViTMSNAttention(config)
        self.intermediate = ViTMSNIntermediate(config)
        self.output = ViTMSNOutput(config)
        self.layernorm_before = LayerNormalization(config.hidden_size, epsilon=config.layer_norm_eps)
        self.layernorm_after = LayerNormalization(config.hidden_size, epsilon=config.layer_norm_eps)
        self.built = True

    def call(self, x, head_mask=None, eager=False):
        attended, probabilities = self.attention(self.layernorm_before(x), head_mask=head_mask, eager=eager)
        x = x + attended
        return x + self.output(self.intermediate(self.layernorm_after(x))), probabilities


class ViTMSNEncoder(BlockSequence):
    """The blocks. Input: (B, S, C). Output: all hidden states, first the input, and each layer's probabilities."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.layer = [ViTMSNLayer(config) for _ in range(config.num_hidden_layers)]
        self.built = True

    def call(self, x, head_masks=None, eager=False, training=None):
        hidden_states, attentions = [x], []
        for layer, head_mask in zip(self.layer, head_masks, strict=True):
            x, probabilities = self.run_block(layer, x, training=training, head_mask=head_mask, eager=eager)
            hidden_states.append(x)
            attentions.append(probabilities)
        return hidden_states, attentions


@keras.saving.register_keras_serializable(package="twinzoo")
class TFViTMSNModel(TFPreTrainedModel):
    """The bare ViT-MSN encoder; `use_mask_token` adds the token that `bool_masked_pos` puts in."""

    config_class = ViTMSNConfig
    takes_any_size = False
    constructor_arguments = ("use_mask_token",)

    def __init__(self, config: ViTMSNConfig, use_mask_token: bool = False, **kwargs):
        super().__init__(config, **kwargs)
        self.use_mask_token = use_mask_token
        with self.building():
            self.embeddings = ViTMSNEmbeddings(config, use_mask_token)
            self.encoder = ViTMSNEncoder(config)
            self.layernorm = LayerNormalization(config.hidden_size, epsilon=config.layer_norm_eps)

    @unpack_inputs
    def call(
        self,
        pixel_values=None,
        bool_masked_pos=None,
        head_mask=None,
        output_attentions=None,
        output_hidden_states=None,
        interpolate_pos_encoding=None,
        return_dict=None,
        training=False,
    ):
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, or (B, H, W, num_channels) (`data_format`), of the config's
                image size unless positions are interpolated.
            bool_masked_pos: (B, N) booleans, true where a patch is replaced by the mask token.
            head_mask: (heads,) or (layers, heads) factors on the attention probabilities, 0 switches a head off.
            output_attentions: also return each layer's probabilities, computed eagerly.
            output_hidden_states: also return the embeddings and each layer's output, before the final norm.
            interpolate_pos_encoding: take images of any size, with bicubically interpolated positions.
            return_dict: False returns a tuple.
            training: whether to drop out.

        Returns:
            `last_hidden_state` (B, 1 + N, C) after the final norm; `hidden_states`, each (B, 1 + N, C); `attentions`,
            each (B, heads, 1 + N, 1 + N).

        Raises:
            ValueError: an input is missing or of another shape, or there is no mask token.
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        pixel_values = self.images_to_channels_last(pixel_values)
        x = self.embeddings(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=bool(interpolate_pos_encoding)
        )
        eager = self.attn_implementation == "eager" or options.output_attentions or head_mask is not None
        hidden_states, attentions = self.encoder(x, head_masks=self.head_masks(head_mask), eager=eager)
        output = BaseModelOutput(
            last_hidden_state=self.layernorm(hidden_states[-1]),
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
            attentions=tuple(attentions) if options.output_attentions else None,
        )
        return output if options.return_dict else output.to_tuple()

    def head_masks(self, head_mask):
        """Returns each layer's factors (heads,)."""
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if head_mask is None:
            return [None] * layers
        if tuple(head_mask.shape) not in ((heads,), (layers, heads)):
            raise ValueError(f"head_mask has shape {tuple(head_mask.shape)}; give ({heads},) or ({layers}, {heads})")
        return [head_mask[layer] if len(head_mask.shape) == 2 else head_mask for layer in range(layers)]


@keras.saving.register_keras_serializable(package="twinzoo")
class TFViTMSNForImageClassification(TFPreTrainedModel):
    """ViT-MSN with a linear classifier on the class token."""

    config_class = ViTMSNConfig
    takes_any_size = False

    def __init__(self, config: ViTMSNConfig, **kwargs):
        super().__init__(config, **kwargs)
        with self.building():
            self.vit = TFViTMSNModel(config, data_format="channels_last", attn_implementation=self.attn_implementation)
            self.classifier = (
                Dense(config.hidden_size, config.num_labels) if config.num_labels > 0 else keras.layers.Identity()
            )

    @unpack_inputs
    def call(
        self,
        pixel_values=None,
        head_mask=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        interpolate_pos_encoding=None,
        return_dict=None,
        training=False,
    ):
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, or (B, H, W, num_channels) (`data_format`), of the config's
                image size unless positions are interpolated.
            head_mask: (heads,) or (layers, heads) factors on the attention probabilities, 0 switches a head off.
            labels: give a loss; see `tfmodels.losses.image_classification_loss` for their forms.
            output_attentions: also return each layer's probabilities, computed eagerly.
            output_hidden_states: also return the embeddings and each layer's output, before the final norm.
            interpolate_pos_encoding: take images of any size, with bicubically interpolated positions.
            return_dict: False returns a tuple.
            training: whether to drop out.

        Returns:
            `loss`, a scalar, if labels are given; `logits` (B, num_labels); `hidden_states`, each (B, 1 + N, C);
            `attentions`, each (B, heads, 1 + N, 1 + N).

        Raises:
            ValueError: an input is missing or of another shape.
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        outputs = self.vit(
            self.images_to_channels_last(pixel_values),
            head_mask=head_mask,
            output_attentions=options.output_attentions,
            output_hidden_states=options.output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
        )
        logits = self.forward_head(outputs.last_hidden_state)
        output = ImageClassifierOutput(
            loss=None if labels is None else image_classification_loss(self.config, labels, logits),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if options.return_dict else output.to_tuple()

    def forward_head(self, features, pre_logits=False):
        pooled = features[:, 0]  # the class token
        return pooled if pre_logits else self.classifier(pooled)


@keras.saving.register_keras_serializable(package="twinzoo")
class TFViTMSNBackbone(TFPreTrainedModel):
    """ViT-MSN for detection and segmentation heads: as maps, the tokens of the layers in `config.out_features`."""

    config_class = ViTMSNConfig

    def __init__(self, config: ViTMSNConfig, **kwargs):
        super().__init__(config, **kwargs)
        with self.building():
            self.embeddings = ViTMSNEmbeddings(config)
            self.encoder = ViTMSNEncoder(config)
            self.layernorm = LayerNormalization(config.hidden_size, epsilon=config.layer_norm_eps)

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
            pixel_values: (B, num_channels, H, W) floats, or (B, H, W, num_channels) (`data_format`), any H and W of a
                patch or more: positions are interpolated.
            output_attentions: also return each layer's probabilities, computed eagerly.
            output_hidden_states: also return the embeddings and each layer's output, before the final norm.
            return_dict: False returns a tuple.
            training: whether to drop out.

        Returns:
            `feature_maps`, each (B, C, H // patch_size, W // patch_size) or channels-last (`data_format`), after the
            final norm and without the class token; `hidden_states`, each (B, 1 + N, C); `attentions`, each (B, heads,
            1 + N, 1 + N).

        Raises:
            ValueError: `pixel_values` is missing or of another shape.
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        pixel_values = self.images_to_channels_last(pixel_values)
        height, width = (length // self.config.patch_size for length in ops.shape(pixel_values)[1:3])
        x = self.embeddings(pixel_values, interpolate_pos_encoding=True)
        eager = self.attn_implementation == "eager" or options.output_attentions
        hidden_states, attentions = self.encoder(x, head_masks=[None] * self.config.num_hidden_layers, eager=eager)
        maps = []
        for index in self.config.out_indices:
            tokens = self.layernorm(hidden_states[index])[:, 1:]
            batch, _, dim = ops.shape(tokens)
            maps.append(self.from_channels_last(ops.reshape(tokens, (batch, height, width, dim))))
        output = BackboneOutput(
            feature_maps=tuple(maps),
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
            attentions=tuple(attentions) if options.output_attentions else None,
        )
        return output if options.return_dict else output.to_tuple()

    def forward_features(self, pixel_values, **options):
        """Returns the feature maps."""
        return self(pixel_values, **options, return_dict=True).feature_maps
