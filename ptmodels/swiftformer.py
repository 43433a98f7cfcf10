"""SwiftFormer in PyTorch. Twin: `tfmodels/swiftformer.py`.

Paper: Shaker et al., SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision
Applications, ICCV 2023 (arXiv:2303.15446). Keys and behaviour: the Hugging Face implementation.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from modelspec.configs import (
    BackboneOutput,
    BaseModelOutputWithNoAttention,
    ImageClassifierOutputWithNoAttention,
    SwiftFormerConfig,
)
from ptmodels.gradient_checkpointing import BlockSequence
from ptmodels.layers import BatchNorm2d, Dropout, DropPath, get_activation
from ptmodels.losses import image_classification_loss
from ptmodels.pretrained import PreTrainedModel


class SwiftFormerPatchEmbedding(nn.Module):
    """Two strided convolutions. Input: (B, C_in, H, W). Output: (B, C, ceil(H/4), ceil(W/4))."""

    def __init__(self, config: SwiftFormerConfig):
        super().__init__()
        dim = config.embed_dims[0]
        self.patch_embedding = nn.ModuleList(
            [
                nn.Conv2d(config.num_channels, dim // 2, kernel_size=3, stride=2, padding=1),
                BatchNorm2d(dim // 2, eps=config.batch_norm_eps),
                nn.ReLU(),
                nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1),
                BatchNorm2d(dim, eps=config.batch_norm_eps),
                nn.ReLU(),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.patch_embedding[0].weight.dtype)  # type: ignore[arg-type]  # for torch, whatever a module has may be a module
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions keep it, and tokens are a view then
        for layer in self.patch_embedding:
            x = layer(x)
        return x


class SwiftFormerEmbeddings(nn.Module):
    """The downsampling between two stages. Input: (B, C, H, W). Output: (B, C_next, ceil(H/2), ceil(W/2))."""

    def __init__(self, config: SwiftFormerConfig, in_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(
            in_dim, dim, kernel_size=config.down_patch_size, stride=config.down_stride, padding=config.down_pad
        )
        self.norm = BatchNorm2d(dim, eps=config.batch_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))


class SwiftFormerConvEncoder(nn.Module):
    """Depth-wise 3x3 and two point-wise convolutions with a residual. Input and output: (B, C, H, W).

    The rate is an element-wise dropout of the branch, as in the reference, where it is named drop path.
    """

    def __init__(self, config: SwiftFormerConfig, dim: int):
        super().__init__()
        hidden_dim = int(config.mlp_ratio * dim)
        self.depth_wise_conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm = BatchNorm2d(dim, eps=config.batch_norm_eps)
        self.point_wise_conv1 = nn.Conv2d(dim, hidden_dim, kernel_size=1)
        self.act = get_activation("gelu")
        self.point_wise_conv2 = nn.Conv2d(hidden_dim, dim, kernel_size=1)
        self.drop_path = Dropout(config.drop_conv_encoder_rate)
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.norm(self.depth_wise_conv(x))
        branch = self.act(self.point_wise_conv1(branch))  # (B, hidden_dim, H, W)
        branch = self.point_wise_conv2(branch)  # (B, C, H, W)
        return x + self.drop_path(self.layer_scale * branch)


class SwiftFormerMlp(nn.Module):
    """Norm and two 1x1 convolutions. Input and output: (B, C, H, W)."""

    def __init__(self, config: SwiftFormerConfig, dim: int):
        super().__init__()
        hidden_dim = int(config.mlp_ratio * dim)
        self.norm1 = BatchNorm2d(dim, eps=config.batch_norm_eps)
        self.fc1 = nn.Conv2d(dim, hidden_dim, kernel_size=1)
        self.act = get_activation(config.hidden_act)
        self.fc2 = nn.Conv2d(hidden_dim, dim, kernel_size=1)
        self.drop = Dropout(config.drop_mlp_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.act(self.fc1(self.norm1(x))))  # (B, hidden_dim, H, W)
        return self.drop(self.fc2(x))  # (B, C, H, W)


class SwiftFormerEfficientAdditiveAttention(nn.Module):
    """Efficient additive attention, linear in the number of tokens (equations 4 to 6). Input and output: (B, N, C).

    `attention_norm="softmax"` is what the Hub's checkpoints were trained with: the softmax runs over an axis of size
    one, so all token weights are 1 and `w_g` has no effect. `"l2"` normalises over the tokens, as the original
    repository does since July 2023.
    """

    def __init__(self, config: SwiftFormerConfig, dim: int):
        super().__init__()
        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(dim, dim)
        self.w_g = nn.Parameter(torch.zeros(dim, 1))
        self.proj = nn.Linear(dim, dim)
        self.final = nn.Linear(dim, dim)
        self.attention_norm = config.attention_norm
        self.scale = dim**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = functional.normalize(self.to_query(x), dim=-1, eps=1e-12)
        key = functional.normalize(self.to_key(x), dim=-1, eps=1e-12)
        weights = (query @ self.w_g) * self.scale  # (B, N, 1)
        if self.attention_norm == "softmax":
            weights = torch.softmax(weights, dim=-1)
        else:
            weights = functional.normalize(weights, dim=1, eps=1e-12)
        global_query = torch.sum(weights * query, dim=1, keepdim=True)  # (B, 1, C)
        return self.final(self.proj(global_query * key) + query)  # (B, N, C)


class SwiftFormerLocalRepresentation(nn.Module):
    """Depth-wise 3x3 and two point-wise convolutions of equal width. Input and output: (B, C, H, W)."""

    def __init__(self, config: SwiftFormerConfig, dim: int):
        super().__init__()
        self.depth_wise_conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm = BatchNorm2d(dim, eps=config.batch_norm_eps)
        self.point_wise_conv1 = nn.Conv2d(dim, dim, kernel_size=1)
        self.act = get_activation("gelu")
        self.point_wise_conv2 = nn.Conv2d(dim, dim, kernel_size=1)
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.norm(self.depth_wise_conv(x))
        branch = self.point_wise_conv2(self.act(self.point_wise_conv1(branch)))
        return x + self.layer_scale * branch


class SwiftFormerEncoderBlock(nn.Module):
    """Local representation, additive attention and MLP: the last block of a stage. Input and output: (B, C, H, W)."""

    def __init__(self, config: SwiftFormerConfig, dim: int, drop_path: float):
        super().__init__()
        self.local_representation = SwiftFormerLocalRepresentation(config, dim)
        self.attn = SwiftFormerEfficientAdditiveAttention(config, dim)
        self.linear = SwiftFormerMlp(config, dim)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = None
        self.layer_scale_2 = None
        if config.use_layer_scale:
            self.layer_scale_1 = nn.Parameter(torch.full((dim, 1, 1), float(config.layer_scale_init_value)))
            self.layer_scale_2 = nn.Parameter(torch.full((dim, 1, 1), float(config.layer_scale_init_value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.local_representation(x)
        tokens = self.attn(x.flatten(2).transpose(1, 2))  # (B, H*W, C)
        attended = tokens.transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        if self.layer_scale_1 is not None:
            attended = self.layer_scale_1 * attended
        x = x + self.drop_path(attended)
        hidden = self.linear(x)
        if self.layer_scale_2 is not None:
            hidden = self.layer_scale_2 * hidden
        return x + self.drop_path(hidden)


class SwiftFormerStage(BlockSequence):
    """`depth - 1` convolutional blocks, then one encoder block. Input and output: (B, C, H, W)."""

    def __init__(self, config: SwiftFormerConfig, dim: int, drop_paths: list[float]):
        super().__init__()
        blocks = [SwiftFormerConvEncoder(config, dim) for _ in drop_paths[:-1]]
        self.blocks = nn.ModuleList([*blocks, SwiftFormerEncoderBlock(config, dim, drop_paths[-1])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


class SwiftFormerEncoder(nn.Module):
    """Stages with downsamplings between them. Input: (B, C, H, W). Output: every entry's output, first the input."""

    def __init__(self, config: SwiftFormerConfig):
        super().__init__()
        dims = config.embed_dims
        network: list[nn.Module] = []
        for stage, drop_paths in enumerate(config.drop_paths):
            network.append(SwiftFormerStage(config, dims[stage], drop_paths))
            if config.has_downsampling(stage):
                network.append(SwiftFormerEmbeddings(config, dims[stage], dims[stage + 1]))
        self.network = nn.ModuleList(network)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        hidden_states = [x]
        for entry in self.network:
            hidden_states.append(entry(hidden_states[-1]))
        return hidden_states


class SwiftFormerModel(PreTrainedModel):
    """The bare SwiftFormer."""

    config_class = SwiftFormerConfig

    def __init__(self, config: SwiftFormerConfig):
        super().__init__(config)
        self.patch_embed = SwiftFormerPatchEmbedding(config)
        self.encoder = SwiftFormerEncoder(config)
        self.initialize_weights()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithNoAttention | tuple:
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, any H and W.
            output_hidden_states: also return the embedding's output and that of every stage and downsampling.
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` (B, C_last, ceil(H/32), ceil(W/32)); `hidden_states`, each (B, C, H', W').

        Raises:
            ValueError: `pixel_values` is missing or not (B, num_channels, H, W).
        """
        options = self.call_options(output_hidden_states=output_hidden_states, return_dict=return_dict)
        hidden_states = self.encoder(self.patch_embed(self.check_pixel_values(pixel_values)))
        output = BaseModelOutputWithNoAttention(
            last_hidden_state=hidden_states[-1].contiguous(),
            hidden_states=tuple(x.contiguous() for x in hidden_states) if options.output_hidden_states else None,
        )
        return output if options.return_dict else output.to_tuple()


class SwiftFormerForImageClassification(PreTrainedModel):
    """SwiftFormer with its two classification heads, whose logits are averaged.

    For training by a teacher, `set_distilled_training` leaves them apart.
    """

    config_class = SwiftFormerConfig

    def __init__(self, config: SwiftFormerConfig):
        super().__init__(config)
        dim = config.embed_dims[-1]
        self.distilled_training = False
        self.swiftformer = SwiftFormerModel(config)
        self.norm = BatchNorm2d(dim, eps=config.batch_norm_eps)
        self.head = nn.Linear(dim, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.dist_head = nn.Linear(dim, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.initialize_weights()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple:
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, any H and W.
            labels: give a loss; see `ptmodels.losses.image_classification_loss` for their forms.
            output_hidden_states: also return the embedding's output and that of every stage and downsampling.
            return_dict: False returns a tuple.

        Returns:
            `loss`, a scalar, if labels are given; `logits` (B, num_labels), (B, 2, num_labels) in distilled training;
            `hidden_states`, each (B, C, H', W').

        Raises:
            ValueError: `pixel_values` is missing or not (B, num_channels, H, W).
        """
        options = self.call_options(output_hidden_states=output_hidden_states, return_dict=return_dict)
        outputs = self.swiftformer(pixel_values, options.output_hidden_states, return_dict=True)
        pooled = self.forward_head(outputs.last_hidden_state, pre_logits=True)
        heads = self.head(pooled), self.dist_head(pooled)
        logits = (heads[0] + heads[1]) / 2
        output = ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else image_classification_loss(self.config, labels, logits),
            logits=torch.stack(heads, dim=1) if self.training and self.distilled_training else logits,
            hidden_states=outputs.hidden_states,
        )
        return output if options.return_dict else output.to_tuple()

    def set_distilled_training(self, enable: bool = True) -> None:
        """Lets training see the logits of both heads, (B, 2, num_labels): the second one learns from a teacher.

        In inference they are averaged all the same.
        """
        self.distilled_training = enable

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = self.norm(features).mean(dim=(2, 3))  # (B, C_last)
        return pooled if pre_logits else (self.head(pooled) + self.dist_head(pooled)) / 2


class SwiftFormerBackbone(PreTrainedModel):
    """SwiftFormer for detection and segmentation heads: the maps of the stages that `config.out_features` names."""

    config_class = SwiftFormerConfig

    def __init__(self, config: SwiftFormerConfig):
        super().__init__(config)
        self.patch_embed = SwiftFormerPatchEmbedding(config)
        self.encoder = SwiftFormerEncoder(config)
        self.initialize_weights()

    @property
    def channels(self) -> list[int]:
        """The width of each feature map."""
        return [self.config.channels[name] for name in self.config.out_features]

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple:
        """Runs the backbone.

        Args:
            pixel_values: (B, num_channels, H, W) floats, any H and W.
            output_hidden_states: also return the embedding's output and that of every stage and downsampling.
            return_dict: False returns a tuple.

        Returns:
            `feature_maps`, each (B, C, H', W'), before the downsampling; `hidden_states`, each (B, C, H', W').

        Raises:
            ValueError: `pixel_values` is missing or not (B, num_channels, H, W).
        """
        options = self.call_options(output_hidden_states=output_hidden_states, return_dict=return_dict)
        hidden_states = self.encoder(self.patch_embed(self.check_pixel_values(pixel_values)))
        stages = [hidden_states[index] for index in self.config.stage_positions]
        output = BackboneOutput(
            feature_maps=tuple(stages[index].contiguous() for index in self.config.out_indices),
            hidden_states=tuple(x.contiguous() for x in hidden_states) if options.output_hidden_states else None,
        )
        return output if options.return_dict else output.to_tuple()

    def forward_features(  # type: ignore[override]  # of a backbone, features are several maps
        self, pixel_values: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """Returns the feature maps."""
        return self(pixel_values, **options, return_dict=True).feature_maps
