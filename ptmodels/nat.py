"""NAT in PyTorch, and the body of DiNAT, of which NAT is the case without dilation. Twin: `tfmodels/nat.py`.

Papers: Hassani et al., Neighborhood Attention Transformer, CVPR 2023 (arXiv:2204.07143); Hassani and Shi, Dilated
Neighborhood Attention Transformer, 2022 (arXiv:2209.15001). Keys and behaviour: the Hugging Face implementation.
Maps are (B, H, W, C) throughout.
"""

from typing import Any, TypeVar

import torch
from torch import nn

from modelspec.configs import BackboneOutput, ImageClassifierOutputWithReshapedStates, ModelOutputWithReshapedStates
from modelspec.configs.nat import NatConfig, NeighborhoodConfig
from modelspec.configs.outputs import ModelOutput
from ptmodels.gradient_checkpointing import BlockSequence
from ptmodels.layers import Dropout, DropPath, get_activation, resize_map
from ptmodels.losses import image_classification_loss
from ptmodels.ops import neighborhood_attention
from ptmodels.pretrained import PreTrainedModel

Output = TypeVar("Output", bound=ModelOutput)
FIXED_EPS = 1e-5  # of the norms that `layer_norm_eps` does not reach


class NatPatchEmbeddings(nn.Module):
    """Two strided convolutions. Input: (B, C_in, H, W). Output: (B, ceil(H/4), ceil(W/4), C)."""

    def __init__(self, config: NeighborhoodConfig):
        super().__init__()
        dim = config.embed_dim
        self.projection = nn.ModuleList(
            [
                nn.Conv2d(config.num_channels, dim // 2, kernel_size=3, stride=2, padding=1),
                nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1),
            ]
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = pixel_values.to(self.projection[0].weight.dtype)  # type: ignore[arg-type]  # for torch, whatever a module has may be a module
        for convolution in self.projection:
            x = convolution(x)
        return x.permute(0, 2, 3, 1)


class NatEmbeddings(nn.Module):
    """The stem: patches, normalised. Input: (B, C_in, H, W). Output: (B, ceil(H/4), ceil(W/4), C)."""

    def __init__(self, config: NeighborhoodConfig):
        super().__init__()
        self.patch_embeddings = NatPatchEmbeddings(config)
        self.norm = nn.LayerNorm(config.embed_dim, eps=FIXED_EPS)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.norm(self.patch_embeddings(pixel_values)))


class NatDownsampler(nn.Module):
    """Halves the map and doubles its width. Input: (B, H, W, C). Output: (B, ceil(H/2), ceil(W/2), 2 C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=FIXED_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NatSelfAttention(nn.Module):
    """Neighborhood attention of several heads. Input and output: (B, H, W, C); probabilities (B, heads, H, W, keys)."""

    def __init__(self, config: NeighborhoodConfig, dim: int, num_heads: int, dilation: int):
        super().__init__()
        self.num_heads = num_heads
        self.kernel_size = config.kernel_size
        self.dilation = dilation
        self.query = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.key = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.value = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * config.kernel_size - 1, 2 * config.kernel_size - 1))
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, x: torch.Tensor, output_attentions: bool = False, implementation: str = "auto"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended = neighborhood_attention(
            self.split_heads(self.query(x)),
            self.split_heads(self.key(x)),
            self.split_heads(self.value(x)),
            self.kernel_size,
            self.dilation,
            rel_pos_bias=self.rpb,
            dropout=self.dropout if self.training and self.dropout.p > 0.0 else None,
            return_probabilities=output_attentions,
            implementation=implementation,
        )
        output, probabilities = attended if isinstance(attended, tuple) else (attended, None)
        if probabilities is not None:
            probabilities = probabilities.permute(0, 3, 1, 2, 4)
        return output.flatten(-2), probabilities

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, H, W, heads, head_dim)


class NatSelfOutput(nn.Module):
    """The projection after the attention. Input and output: (B, H, W, C)."""

    def __init__(self, config: NeighborhoodConfig, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.dropout = Dropout(config.attention_probs_dropout_prob)  # not hidden_dropout_prob, as in the reference

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(x))


class NatAttention(nn.Module):
    """Self-attention and its projection. Input and output: (B, H, W, C); probabilities (B, heads, H, W, keys)."""

    def __init__(self, config: NeighborhoodConfig, dim: int, num_heads: int, dilation: int):
        super().__init__()
        self.self = NatSelfAttention(config, dim, num_heads, dilation)
        self.output = NatSelfOutput(config, dim)

    def forward(
        self, x: torch.Tensor, output_attentions: bool = False, implementation: str = "auto"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, probabilities = self.self(x, output_attentions=output_attentions, implementation=implementation)
        return self.output(x), probabilities


class NatIntermediate(nn.Module):
    """The widening half of the MLP. Input: (B, H, W, C). Output: (B, H, W, mlp_ratio C)."""

    def __init__(self, config: NeighborhoodConfig, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, int(config.mlp_ratio * dim))
        self.act = get_activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.dense(x))


class NatOutput(nn.Module):
    """The narrowing half of the MLP. Input: (B, H, W, mlp_ratio C). Output: (B, H, W, C)."""

    def __init__(self, config: NeighborhoodConfig, dim: int):
        super().__init__()
        self.dense = nn.Linear(int(config.mlp_ratio * dim), dim)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(x))


class NatLayer(nn.Module):
    """A block: attention and MLP, each after a norm and with a residual. Input and output: (B, H, W, C).

    A map smaller than the window is padded with zeros, right and below, between norm and attention; the padding is
    attended to, as in the reference.
    """

    def __init__(self, config: NeighborhoodConfig, dim: int, num_heads: int, dilation: int, drop_path: float):
        super().__init__()
        self.window = config.kernel_size * dilation
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = NatAttention(config, dim, num_heads, dilation)
        self.drop_path = DropPath(drop_path)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.intermediate = NatIntermediate(config, dim)
        self.output = NatOutput(config, dim)
        self.layer_scale_parameters = None
        if config.layer_scale_init_value > 0:
            self.layer_scale_parameters = nn.Parameter(torch.full((2, dim), float(config.layer_scale_init_value)))

    def forward(
        self, x: torch.Tensor, output_attentions: bool = False, implementation: str = "auto"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        height, width = x.shape[1:3]
        hidden = self.pad_to_window(self.layernorm_before(x))
        hidden, probabilities = self.attention(
            hidden, output_attentions=output_attentions, implementation=implementation
        )
        hidden = resize_map(hidden, height, width)
        if self.layer_scale_parameters is not None:
            hidden = self.layer_scale_parameters[0] * hidden
        x = x + self.drop_path(hidden)
        hidden = self.output(self.intermediate(self.layernorm_after(x)))
        if self.layer_scale_parameters is not None:
            hidden = self.layer_scale_parameters[1] * hidden
        return x + self.drop_path(hidden), probabilities

    def pad_to_window(self, x: torch.Tensor) -> torch.Tensor:
        """Pads (B, H, W, C) on the right and below up to the window."""
        height, width = (torch.sym_max(self.window, length) for length in x.shape[1:3])
        return resize_map(x, height, width)


class NatStage(BlockSequence):
    """Blocks and a downsampling, except after the last. Input: (B, H, W, C).

    Output: the map before and after the downsampling, and the probabilities of the last block.
    """

    def __init__(self, config: NeighborhoodConfig, stage: int):
        super().__init__()
        dim = config.embed_dim * 2**stage
        self.layers = nn.ModuleList(
            [
                NatLayer(config, dim, config.num_heads[stage], dilation, drop_path)
                for dilation, drop_path in zip(config.dilations[stage], config.drop_paths[stage], strict=True)
            ]
        )
        self.downsample = NatDownsampler(dim) if stage + 1 < config.num_layers else None

    def forward(
        self, x: torch.Tensor, output_attentions: bool = False, implementation: str = "auto"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        options = {"implementation": implementation}
        for layer in self.layers[:-1]:
            x, _ = self.run_block(layer, x, **options)
        x, probabilities = self.run_block(self.layers[-1], x, output_attentions=output_attentions, **options)
        return x, x if self.downsample is None else self.downsample(x), probabilities


class NatEncoder(nn.Module):
    """All stages. Input: (B, H, W, C).

    Output: the maps before the downsamplings and those after them, the input first in both; the probabilities of each
    stage's last block.
    """

    def __init__(self, config: NeighborhoodConfig):
        super().__init__()
        self.levels = nn.ModuleList([NatStage(config, stage) for stage in range(config.num_layers)])

    def forward(
        self, x: torch.Tensor, output_attentions: bool = False, implementation: str = "auto"
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
        before, after = [x], [x]
        attentions: list = []
        for level in self.levels:
            outputs = level(after[-1], output_attentions=output_attentions, implementation=implementation)
            for collected, output in zip((before, after, attentions), outputs, strict=True):
                collected.append(output)
        return before, after, attentions


class NatModel(PreTrainedModel):
    """The bare NAT."""

    config_class: type[NeighborhoodConfig] = NatConfig
    constructor_arguments = ("add_pooling_layer",)

    def __init__(self, config: NeighborhoodConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.add_pooling_layer = add_pooling_layer
        self.embeddings = NatEmbeddings(config)
        self.encoder = NatEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.initialize_weights()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutputWithReshapedStates | tuple:
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, any H and W.
            output_attentions: also return the probabilities of each stage's last block.
            output_hidden_states: also return the stem's output and that of every stage, after its downsampling.
            return_dict: False returns a tuple, without `reshaped_hidden_states`.

        Returns:
            `last_hidden_state` (B, ceil(H/32), ceil(W/32), C_last) after the final norm; `pooler_output` (B, C_last),
            its mean; `hidden_states`, each (B, H', W', C), and the same as (B, C, H', W') in `reshaped_hidden_states`;
            `attentions`, each (B, heads, H', W', kernel_size**2), of padded maps where these are smaller than windows.

        Raises:
            ValueError: `pixel_values` is missing or not (B, num_channels, H, W).
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        _, hidden_states, attentions = self.encode(pixel_values, options.output_attentions)
        last_hidden_state = self.layernorm(hidden_states[-1])
        output = ModelOutputWithReshapedStates(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state.mean(dim=(1, 2)) if self.add_pooling_layer else None,
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
            attentions=tuple(attentions) if options.output_attentions else None,
        )
        if not options.return_dict:
            return output.to_tuple()
        return with_reshaped_states(output)

    def encode(
        self: "NatModel | NatBackbone", pixel_values: torch.Tensor | None, output_attentions: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
        """Runs stem and stages; returns what `NatEncoder` does."""
        implementation = "composed" if self.attn_implementation == "eager" else "auto"
        x = self.embeddings(self.check_pixel_values(pixel_values))
        return self.encoder(x, output_attentions=output_attentions, implementation=implementation)


class NatForImageClassification(PreTrainedModel):
    """NAT with a linear classifier on the mean of the last map."""

    config_class: type[NeighborhoodConfig] = NatConfig
    body_class = NatModel

    def __init__(self, config: NeighborhoodConfig):
        super().__init__(config)
        setattr(self, config.base_model_prefix, self.body_class(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.initialize_weights()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithReshapedStates | tuple:
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, any H and W.
            labels: give a loss; see `ptmodels.losses.image_classification_loss` for their forms.
            output_attentions: also return the probabilities of each stage's last block.
            output_hidden_states: also return the stem's output and that of every stage, after its downsampling.
            return_dict: False returns a tuple, without `reshaped_hidden_states`.

        Returns:
            `loss`, a scalar, if labels are given; `logits` (B, num_labels); the others as of the bare model.

        Raises:
            ValueError: `pixel_values` is missing or not (B, num_channels, H, W).
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        outputs = self.get_body()(
            pixel_values, options.output_attentions, options.output_hidden_states, return_dict=True
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

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = features.mean(dim=(1, 2))  # (B, C_last)
        return pooled if pre_logits else self.classifier(pooled)


class NatBackbone(PreTrainedModel):
    """NAT for detection and segmentation heads: normalised maps of the stages that `config.out_features` names."""

    config_class: type[NeighborhoodConfig] = NatConfig

    def __init__(self, config: NeighborhoodConfig):
        super().__init__(config)
        self.embeddings = NatEmbeddings(config)
        self.encoder = NatEncoder(config)
        self.hidden_states_norms = nn.ModuleDict(
            {name: nn.LayerNorm(config.channels[name], eps=FIXED_EPS) for name in config.out_features}
        )
        self.initialize_weights()

    @property
    def channels(self) -> list[int]:
        """The width of each feature map."""
        return [self.config.channels[name] for name in self.config.out_features]

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple:
        """Runs the backbone.

        Args:
            pixel_values: (B, num_channels, H, W) floats, any H and W.
            output_attentions: also return the probabilities of each stage's last block.
            output_hidden_states: also return the stem's output and that of every stage, before its downsampling.
            return_dict: False returns a tuple.

        Returns:
            `feature_maps`, each (B, C, H', W'), stage i having 1 / (4 * 2**(i - 1)) of the image's size, rounded up;
            `hidden_states`, each (B, H', W', C), of all stages and without norm; `attentions` as of the bare model.

        Raises:
            ValueError: `pixel_values` is missing or not (B, num_channels, H, W).
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        hidden_states, _, attentions = self.encode(pixel_values, options.output_attentions)
        chosen = zip(self.config.out_features, self.config.out_indices, strict=True)
        maps = [self.hidden_states_norms[name](hidden_states[index]) for name, index in chosen]
        output = BackboneOutput(
            feature_maps=tuple(x.permute(0, 3, 1, 2).contiguous() for x in maps),
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
            attentions=tuple(attentions) if options.output_attentions else None,
        )
        return output if options.return_dict else output.to_tuple()

    def forward_features(  # type: ignore[override]  # of a backbone, features are several maps
        self, pixel_values: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """Returns the feature maps."""
        return self(pixel_values, **options, return_dict=True).feature_maps

    encode = NatModel.encode


def with_reshaped_states(output: Output) -> Output:
    """Adds `reshaped_hidden_states`, each (B, C, H, W), where there are hidden states."""
    if output.hidden_states is not None:
        output.reshaped_hidden_states = tuple(x.permute(0, 3, 1, 2) for x in output.hidden_states)
    return output
