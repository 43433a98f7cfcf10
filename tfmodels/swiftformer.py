"""SwiftFormer in Keras. Twin: `ptmodels/swiftformer.py`.

Paper: Shaker et al., SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision
Applications, ICCV 2023 (arXiv:2303.15446). Keys and behaviour: the Hugging Face implementation.
"""

import keras
from keras import ops

from modelspec.configs import (
    BackboneOutput,
    BaseModelOutputWithNoAttention,
    ImageClassifierOutputWithNoAttention,
    SwiftFormerConfig,
)
from tfmodels.call_inputs import unpack_inputs
from tfmodels.gradient_checkpointing import BlockSequence
from tfmodels.layers import (
    BatchNormalization,
    Conv2D,
    Dense,
    DepthwiseConv2D,
    Dropout,
    DropPath,
    get_activation,
    l2_normalize,
)
from tfmodels.losses import image_classification_loss
from tfmodels.pretrained import TFPreTrainedModel


class SwiftFormerPatchEmbedding(keras.layers.Layer):
    """Two strided convolutions. Input: (B, H, W, C_in). Output: (B, ceil(H/4), ceil(W/4), C)."""

    def __init__(self, config: SwiftFormerConfig):
        super().__init__()
        dim = config.embed_dims[0]
        self.patch_embedding = [
            Conv2D(config.num_channels, dim // 2, kernel_size=3, strides=2, padding=1),
            BatchNormalization(dim // 2, epsilon=config.batch_norm_eps),
            keras.layers.ReLU(),
            Conv2D(dim // 2, dim, kernel_size=3, strides=2, padding=1),
            BatchNormalization(dim, epsilon=config.batch_norm_eps),
            keras.layers.ReLU(),
        ]
        self.built = True

    def call(self, x):
        for layer in self.patch_embedding:
            x = layer(x)
        return x


class SwiftFormerEmbeddings(keras.layers.Layer):
    """The downsampling between two stages. Input: (B, H, W, C). Output: (B, ceil(H/2), ceil(W/2), C_next)."""

    def __init__(self, config: SwiftFormerConfig, in_dim: int, dim: int):
        super().__init__()
        self.proj = Conv2D(
            in_dim, dim, kernel_size=config.down_patch_size, strides=config.down_stride, padding=config.down_pad
        )
        self.norm = BatchNormalization(dim, epsilon=config.batch_norm_eps)
        self.built = True

    def call(self, x):
        return self.norm(self.proj(x))


class SwiftFormerConvEncoder(keras.layers.Layer):
    """Depth-wise 3x3 and two point-wise convolutions with a residual. Input and output: (B, H, W, C).

    The rate is an element-wise dropout of the branch, as in the reference, where it is named drop path.
    """

    def __init__(self, config: SwiftFormerConfig, dim: int):
        super().__init__()
        hidden_dim = int(config.mlp_ratio * dim)
        self.depth_wise_conv = DepthwiseConv2D(dim, kernel_size=3, padding=1)
        self.norm = BatchNormalization(dim, epsilon=config.batch_norm_eps)
        self.point_wise_conv1 = Conv2D(dim, hidden_dim, kernel_size=1)
        self.act = get_activation("gelu")
        self.point_wise_conv2 = Conv2D(hidden_dim, dim, kernel_size=1)
        self.drop_path = Dropout(config.drop_conv_encoder_rate)
        self.layer_scale = self.add_weight(shape=(dim, 1, 1), initializer="ones", name="layer_scale")
        self.built = True

    def call(self, x):
        branch = self.norm(self.depth_wise_conv(x))
        branch = self.act(self.point_wise_conv1(branch))  # (B, H, W, hidden_dim)
        branch = self.point_wise_conv2(branch)  # (B, H, W, C)
        return x + self.drop_path(ops.reshape(self.layer_scale, (-1,)) * branch)


class SwiftFormerMlp(keras.layers.Layer):
    """Norm and two 1x1 convolutions. Input and output: (B, H, W, C)."""

    def __init__(self, config: SwiftFormerConfig, dim: int):
        super().__init__()
        hidden_dim = int(config.mlp_ratio * dim)
        self.norm1 = BatchNormalization(dim, epsilon=config.batch_norm_eps)
        self.fc1 = Conv2D(dim, hidden_dim, kernel_size=1)
        self.act = get_activation(config.hidden_act)
        self.fc2 = Conv2D(hidden_dim, dim, kernel_size=1)
        self.drop = Dropout(config.drop_mlp_rate)
        self.built = True

    def call(self, x):
        x = self.drop(self.act(self.fc1(self.norm1(x))))  # (B, H, W, hidden_dim)
        return self.drop(self.fc2(x))  # (B, H, W, C)


class SwiftFormerEfficientAdditiveAttention(keras.layers.Layer):
    """Efficient additive attention, linear in the number of tokens (equations 4 to 6). Input and output: (B, N, C).

    `attention_norm="softmax"` is what the Hub's checkpoints were trained with: the softmax runs over an axis of size
    one, so all token weights are 1 and `w_g` has no effect. `"l2"` normalises over the tokens, as the original
    repository does since July 2023.
    """

    def __init__(self, config: SwiftFormerConfig, dim: int):
        super().__init__()
        self.to_query = Dense(dim, dim)
        self.to_key = Dense(dim, dim)
        self.w_g = self.add_weight(shape=(dim, 1), initializer="zeros", name="w_g")
        self.proj = Dense(dim, dim)
        self.final = Dense(dim, dim)
        self.attention_norm = config.attention_norm
        self.scale = dim**-0.5
        self.built = True

    def call(self, x):
        query = l2_normalize(self.to_query(x), axis=-1)
        key = l2_normalize(self.to_key(x), axis=-1)
        weights = ops.matmul(query, self.w_g) * self.scale  # (B, N, 1)
        if self.attention_norm == "softmax":
            weights = _softmax_of_one(weights)
        else:
            weights = l2_normalize(weights, axis=1)
        global_query = ops.sum(weights * query, axis=1, keepdims=True)  # (B, 1, C)
        return self.final(self.proj(global_query * key) + query)  # (B, N, C)


def _softmax_of_one(x):
    # keras.ops.softmax warns of an axis of size one; x - x keeps w_g connected, with the gradient 0 that it has
    return ops.exp(x - x)


class SwiftFormerLocalRepresentation(keras.layers.Layer):
    """Depth-wise 3x3 and two point-wise convolutions of equal width. Input and output: (B, H, W, C)."""

    def __init__(self, config: SwiftFormerConfig, dim: int):
        super().__init__()
        self.depth_wise_conv = DepthwiseConv2D(dim, kernel_size=3, padding=1)
        self.norm = BatchNormalization(dim, epsilon=config.batch_norm_eps)
        self.point_wise_conv1 = Conv2D(dim, dim, kernel_size=1)
        self.act = get_activation("gelu")
        self.point_wise_conv2 = Conv2D(dim, dim, kernel_size=1)
        self.layer_scale = self.add_weight(shape=(dim, 1, 1), initializer="ones", name="layer_scale")
        self.built = True

    def call(self, x):
        branch = self.norm(self.depth_wise_conv(x))
        branch = self.point_wise_conv2(self.act(self.point_wise_conv1(branch)))
        return x + ops.reshape(self.layer_scale, (-1,)) * branch


class SwiftFormerEncoderBlock(keras.layers.Layer):
    """Local representation, additive attention and MLP: the last block of a stage. Input and output: (B, H, W, C)."""

    def __init__(self, config: SwiftFormerConfig, dim: int, drop_path: float):
        super().__init__()
        self.local_representation = SwiftFormerLocalRepresentation(config, dim)
        self.attn = SwiftFormerEfficientAdditiveAttention(config, dim)
        self.linear = SwiftFormerMlp(config, dim)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = None
        self.layer_scale_2 = None
        if config.use_layer_scale:
            self.layer_scale_1 = self.add_weight(shape=(dim, 1, 1), initializer="zeros", name="layer_scale_1")
            self.layer_scale_2 = self.add_weight(shape=(dim, 1, 1), initializer="zeros", name="layer_scale_2")
        self.built = True

    def call(self, x):
        x = self.local_representation(x)
        shape = ops.shape(x)
        tokens = self.attn(ops.reshape(x, (shape[0], shape[1] * shape[2], shape[3])))  # (B, H*W, C)
        attended = ops.reshape(tokens, shape)  # (B, H, W, C)
        if self.layer_scale_1 is not None:
            attended = ops.reshape(self.layer_scale_1, (-1,)) * attended
        x = x + self.drop_path(attended)
        hidden = self.linear(x)
        if self.layer_scale_2 is not None:
            hidden = ops.reshape(self.layer_scale_2, (-1,)) * hidden
        return x + self.drop_path(hidden)


class SwiftFormerStage(BlockSequence):
    """`depth - 1` convolutional blocks, then one encoder block. Input and output: (B, H, W, C)."""

    def __init__(self, config: SwiftFormerConfig, dim: int, drop_paths: list[float]):
        super().__init__()
        blocks = [SwiftFormerConvEncoder(config, dim) for _ in drop_paths[:-1]]
        self.blocks = [*blocks, SwiftFormerEncoderBlock(config, dim, drop_paths[-1])]
        self.built = True

    def call(self, x, training=None):
        for block in self.blocks:
            x = self.run_block(block, x, training=training)
        return x


class SwiftFormerEncoder(keras.layers.Layer):
    """Stages with downsamplings between them. Input: (B, H, W, C). Output: every entry's output, first the input."""

    def __init__(self, config: SwiftFormerConfig):
        super().__init__()
        dims, network = config.embed_dims, []
        for stage, drop_paths in enumerate(config.drop_paths):
            network.append(SwiftFormerStage(config, dims[stage], drop_paths))
            if config.has_downsampling(stage):
                network.append(SwiftFormerEmbeddings(config, dims[stage], dims[stage + 1]))
        self.network = network
        self.built = True

    def call(self, x):
        hidden_states = [x]
        for entry in self.network:
            hidden_states.append(entry(hidden_states[-1]))
        return hidden_states


@keras.saving.register_keras_serializable(package="twinzoo")
class TFSwiftFormerModel(TFPreTrainedModel):
    """The bare SwiftFormer."""

    config_class = SwiftFormerConfig

    def __init__(self, config: SwiftFormerConfig, **kwargs):
        super().__init__(config, **kwargs)
        with self.building():
            self.patch_embed = SwiftFormerPatchEmbedding(config)
            self.encoder = SwiftFormerEncoder(config)

    @unpack_inputs
    def call(self, pixel_values=None, output_hidden_states=None, return_dict=None, training=False):
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, any H and W, or (B, H, W, num_channels) (`data_format`).
            output_hidden_states: also return the embedding's output and that of every stage and downsampling.
            return_dict: False returns a tuple.
            training: whether to drop paths and to use and update the statistics of the batch.

        Returns:
            `last_hidden_state` (B, C_last, ceil(H/32), ceil(W/32)); `hidden_states`, each (B, C, H', W').

        Raises:
            ValueError: `pixel_values` is missing or of another shape.
        """
        options = self.call_options(output_hidden_states=output_hidden_states, return_dict=return_dict)
        hidden_states = self.encoder(self.patch_embed(self.images_to_channels_last(pixel_values)))
        hidden_states = [self.from_channels_last(hidden_state) for hidden_state in hidden_states]
        output = BaseModelOutputWithNoAttention(
            last_hidden_state=hidden_states[-1],
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
        )
        return output if options.return_dict else output.to_tuple()


@keras.saving.register_keras_serializable(package="twinzoo")
class TFSwiftFormerForImageClassification(TFPreTrainedModel):
    """SwiftFormer with its two classification heads, whose logits are averaged.

    For training by a teacher, `set_distilled_training` leaves them apart.
    """

    config_class = SwiftFormerConfig
    maps_follow_data_format = True

    def __init__(self, config: SwiftFormerConfig, **kwargs):
        super().__init__(config, **kwargs)
        dim = config.embed_dims[-1]
        self.distilled_training = False
        with self.building():
            self.swiftformer = TFSwiftFormerModel(config, data_format="channels_last")
            self.norm = BatchNormalization(dim, epsilon=config.batch_norm_eps)
            self.head = Dense(dim, config.num_labels) if config.num_labels > 0 else keras.layers.Identity()
            self.dist_head = Dense(dim, config.num_labels) if config.num_labels > 0 else keras.layers.Identity()

    @unpack_inputs
    def call(self, pixel_values=None, labels=None, output_hidden_states=None, return_dict=None, training=False):
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, any H and W, or (B, H, W, num_channels) (`data_format`).
            labels: give a loss; see `tfmodels.losses.image_classification_loss` for their forms.
            output_hidden_states: also return the embedding's output and that of every stage and downsampling.
            return_dict: False returns a tuple.
            training: whether to drop paths and to use and update the statistics of the batch.

        Returns:
            `loss`, a scalar, if labels are given; `logits` (B, num_labels), (B, 2, num_labels) in distilled training;
            `hidden_states`, each (B, C, H', W').

        Raises:
            ValueError: `pixel_values` is missing or of another shape.
        """
        options = self.call_options(output_hidden_states=output_hidden_states, return_dict=return_dict)
        outputs = self.swiftformer(
            self.images_to_channels_last(pixel_values),
            output_hidden_states=options.output_hidden_states,
            return_dict=True,
        )
        pooled = self.forward_head(self.from_channels_last(outputs.last_hidden_state), pre_logits=True)
        heads = self.head(pooled), self.dist_head(pooled)
        logits = (heads[0] + heads[1]) / 2
        hidden_states = outputs.hidden_states
        if hidden_states is not None:
            hidden_states = tuple(self.from_channels_last(hidden_state) for hidden_state in hidden_states)
        output = ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else image_classification_loss(self.config, labels, logits),
            logits=ops.stack(heads, axis=1) if training and self.distilled_training else logits,
            hidden_states=hidden_states,
        )
        return output if options.return_dict else output.to_tuple()

    def set_distilled_training(self, enable: bool = True) -> None:
        """Lets training see the logits of both heads, (B, 2, num_labels): the second one learns from a teacher.

        In inference they are averaged all the same. A compiled model has to be compiled again.
        """
        self.distilled_training = enable

    def forward_head(self, features, pre_logits=False):
        if self.data_format == "channels_first":
            features = ops.transpose(features, (0, 2, 3, 1))
        pooled = ops.mean(self.norm(features), axis=(1, 2))  # (B, C_last)
        return pooled if pre_logits else (self.head(pooled) + self.dist_head(pooled)) / 2


@keras.saving.register_keras_serializable(package="twinzoo")
class TFSwiftFormerBackbone(TFPreTrainedModel):
    """SwiftFormer for detection and segmentation heads: the maps of the stages that `config.out_features` names."""

    config_class = SwiftFormerConfig

    def __init__(self, config: SwiftFormerConfig, **kwargs):
        super().__init__(config, **kwargs)
        with self.building():
            self.patch_embed = SwiftFormerPatchEmbedding(config)
            self.encoder = SwiftFormerEncoder(config)

    @property
    def channels(self) -> list[int]:
        """The width of each feature map."""
        return [self.config.channels[name] for name in self.config.out_features]

    @unpack_inputs
    def call(self, pixel_values=None, output_hidden_states=None, return_dict=None, training=False):
        """Runs the backbone.

        Args:
            pixel_values: (B, num_channels, H, W) floats, any H and W, or (B, H, W, num_channels) (`data_format`).
            output_hidden_states: also return the embedding's output and that of every stage and downsampling.
            return_dict: False returns a tuple.
            training: whether to drop paths and to use and update the statistics of the batch.

        Returns:
            `feature_maps`, each (B, C, H', W'), before the downsampling; `hidden_states`, each (B, C, H', W'); or
            (B, H', W', C) (`data_format`).

        Raises:
            ValueError: `pixel_values` is missing or of another shape.
        """
        options = self.call_options(output_hidden_states=output_hidden_states, return_dict=return_dict)
        hidden_states = self.encoder(self.patch_embed(self.images_to_channels_last(pixel_values)))
        hidden_states = [self.from_channels_last(hidden_state) for hidden_state in hidden_states]
        stages = [hidden_states[index] for index in self.config.stage_positions]
        output = BackboneOutput(
            feature_maps=tuple(stages[index] for index in self.config.out_indices),
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
        )
        return output if options.return_dict else output.to_tuple()

    def forward_features(self, pixel_values, **options):
        """Returns the feature maps."""
        return self(pixel_values, **options, return_dict=True).feature_maps
