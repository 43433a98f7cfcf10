"""ViT-MSN in PyTorch. Twin: `tfmodels/vit_msn.py`.

Paper: Assran et al., Masked Siamese Networks for Label-Efficient Learning, ECCV 2022 (arXiv:2204.07141). The encoder is
a pre-norm Vision Transformer (arXiv:2010.11929). Keys and behaviour: the Hugging Face implementation.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from modelspec.configs import BackboneOutput, BaseModelOutput, ImageClassifierOutput, ViTMSNConfig
from ptmodels.gradient_checkpointing import BlockSequence
from ptmodels.layers import Dropout, get_activation
from ptmodels.losses import image_classification_loss
from ptmodels.pretrained import PreTrainedModel


class ViTMSNPatchEmbeddings(nn.Module):
    """Cuts images into patches. Input: (B, C_in, H, W). Output: (B, H // patch_size, W // patch_size, C)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values.to(self.projection.weight.dtype)).permute(0, 2, 3, 1)


class ViTMSNEmbeddings(nn.Module):
    """Patches, class token and positions. Input: (B, C_in, H, W). Output: (B, 1 + N, C)."""

    def __init__(self, config: ViTMSNConfig, use_mask_token: bool = False):
        super().__init__()
        self.image_size = config.image_size
        self.grid_size = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if use_mask_token else None
        self.patch_embeddings = ViTMSNPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches + 1, config.hidden_size))
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, interpolate_pos_encoding: bool
    ) -> torch.Tensor:
        height, width = pixel_values.shape[2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values are {height}x{width}, the model's images {self.image_size}x{self.image_size}; "
                "pass interpolate_pos_encoding=True for other sizes"
            )
        patches = self.patch_embeddings(pixel_values)  # (B, h, w, C)
        positions: torch.Tensor = self.position_embeddings
        if interpolate_pos_encoding:
            positions = self.interpolate_positions(patches.shape[1], patches.shape[2])
        tokens = patches.flatten(1, 2)  # (B, N, C)
        if bool_masked_pos is not None:
            tokens = self.mask_tokens(tokens, bool_masked_pos)
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([cls_token, tokens], dim=1) + positions  # (B, 1 + N, C)
        return self.dropout(tokens)

    def mask_tokens(self, tokens: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """Replaces the tokens (B, N, C) by the mask token where `bool_masked_pos` (B, N) is true."""
        if self.mask_token is None:
            raise ValueError("bool_masked_pos needs a mask token: make the model with use_mask_token=True")
        if tuple(bool_masked_pos.shape) != tuple(tokens.shape[:2]):
            raise ValueError(
                f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}; these images need {tuple(tokens.shape[:2])}"
            )
        return torch.where(bool_masked_pos.bool()[..., None], self.mask_token, tokens)

    def interpolate_positions(self, height: int, width: int) -> torch.Tensor:
        """Returns the positions (1, 1 + height * width, C) of a grid of another size, by bicubic interpolation."""
        grid = self.position_embeddings[:, 1:].unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([self.position_embeddings[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class ViTMSNSelfAttention(nn.Module):
    """Multi-head self-attention. Input: (B, S, C). Output: (B, S, C) and, if eager, probabilities (B, heads, S, S)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.key = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.value = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, x: torch.Tensor, head_mask: torch.Tensor | None, eager: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.split_heads(self.query(x))
        key = self.split_heads(self.key(x))
        value = self.split_heads(self.value(x))
        rate = self.dropout.p if self.training else 0.0
        if not eager and (rate == 0.0 or self.dropout.share is None):  # torch's own would draw for our samples alone
            attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=rate)
            return self.merge_heads(attended), None
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5  # (B, heads, S, S)
        softmax_dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        probabilities = self.dropout(torch.softmax(scores, dim=-1, dtype=softmax_dtype).to(x.dtype))
        if head_mask is not None:
            probabilities = probabilities * head_mask[:, None, None].to(x.dtype)
        return self.merge_heads(probabilities @ value), probabilities

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, S, head_dim)

    def merge_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)  # (B, S, C)


class ViTMSNSelfOutput(nn.Module):
    """The projection after the attention. Input and output: (B, S, C)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(x))


class ViTMSNAttention(nn.Module):
    """Self-attention and its projection. Input: (B, S, C). Output: (B, S, C) and the probabilities."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.attention = ViTMSNSelfAttention(config)
        self.output = ViTMSNSelfOutput(config)

    def forward(
        self, x: torch.Tensor, head_mask: torch.Tensor | None, eager: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, probabilities = self.attention(x, head_mask=head_mask, eager=eager)
        return self.output(attended), probabilities


class ViTMSNIntermediate(nn.Module):
    """The first half of the MLP. Input: (B, S, C). Output: (B, S, intermediate_size)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = get_activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.dense(x))


class ViTMSNOutput(nn.Module):
    """The second half of the MLP. Input: (B, S, intermediate_size). Output: (B, S, C)."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(x))


class ViTMSNLayer(nn.Module):
    """A pre-norm block. Input: (B, S, C). Output: (B, S, C) and the attention probabilities."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.attention = ViTMSNAttention(config)
        self.intermediate = ViTMSNIntermediate(config)
        self.output = ViTMSNOutput(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, x: torch.Tensor, head_mask: torch.Tensor | None, eager: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, probabilities = self.attention(self.layernorm_before(x), head_mask, eager)
        x = x + attended
        return x + self.output(self.intermediate(self.layernorm_after(x))), probabilities


class ViTMSNEncoder(BlockSequence):
    """The blocks. Input: (B, S, C). Output: all hidden states, first the input, and each layer's probabilities."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.layer = nn.ModuleList([ViTMSNLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self, x: torch.Tensor, head_masks: list[torch.Tensor | None], eager: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        hidden_states, attentions = [x], []
        for layer, head_mask in zip(self.layer, head_masks, strict=True):
            x, probabilities = self.run_block(layer, x, head_mask, eager)
            hidden_states.append(x)
            attentions.append(probabilities)
        return hidden_states, attentions


class ViTMSNModel(PreTrainedModel):
    """The bare ViT-MSN encoder; `use_mask_token` adds the token that `bool_masked_pos` puts in."""

    config_class = ViTMSNConfig
    constructor_arguments = ("use_mask_token",)

    def __init__(self, config: ViTMSNConfig, use_mask_token: bool = False):
        super().__init__(config)
        self.use_mask_token = use_mask_token
        self.embeddings = ViTMSNEmbeddings(config, use_mask_token)
        self.encoder = ViTMSNEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.initialize_weights()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, of the config's image size unless positions are interpolated.
            bool_masked_pos: (B, N) booleans, true where a patch is replaced by the mask token.
            head_mask: (heads,) or (layers, heads) factors on the attention probabilities, 0 switches a head off.
            output_attentions: also return each layer's probabilities, computed eagerly.
            output_hidden_states: also return the embeddings and each layer's output, before the final norm.
            interpolate_pos_encoding: take images of any size, with bicubically interpolated positions.
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` (B, 1 + N, C) after the final norm; `hidden_states`, each (B, 1 + N, C); `attentions`,
            each (B, heads, 1 + N, 1 + N).

        Raises:
            ValueError: an input is missing or of another shape, or there is no mask token.
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        pixel_values = self.check_pixel_values(pixel_values)
        x = self.embeddings(pixel_values, bool_masked_pos, bool(interpolate_pos_encoding))
        eager = self.attn_implementation == "eager" or options.output_attentions or head_mask is not None
        hidden_states, attentions = self.encoder(x, self.head_masks(head_mask), eager)
        output = BaseModelOutput(
            last_hidden_state=self.layernorm(hidden_states[-1]),
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
            attentions=tuple(attentions) if options.output_attentions else None,
        )
        return output if options.return_dict else output.to_tuple()

    def head_masks(self, head_mask: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Returns each layer's factors (heads,)."""
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if head_mask is None:
            return [None] * layers
        if tuple(head_mask.shape) not in ((heads,), (layers, heads)):
            raise ValueError(f"head_mask has shape {tuple(head_mask.shape)}; give ({heads},) or ({layers}, {heads})")
        return [head_mask[layer] if head_mask.ndim == 2 else head_mask for layer in range(layers)]


class ViTMSNForImageClassification(PreTrainedModel):
    """ViT-MSN with a linear classifier on the class token."""

    config_class = ViTMSNConfig

    def __init__(self, config: ViTMSNConfig):
        super().__init__(config)
        self.vit = ViTMSNModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.initialize_weights()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Runs the model.

        Args:
            pixel_values: (B, num_channels, H, W) floats, of the config's image size unless positions are interpolated.
            head_mask: (heads,) or (layers, heads) factors on the attention probabilities, 0 switches a head off.
            labels: give a loss; see `ptmodels.losses.image_classification_loss` for their forms.
            output_attentions: also return each layer's probabilities, computed eagerly.
            output_hidden_states: also return the embeddings and each layer's output, before the final norm.
            interpolate_pos_encoding: take images of any size, with bicubically interpolated positions.
            return_dict: False returns a tuple.

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
            pixel_values,
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

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = features[:, 0]  # the class token
        return pooled if pre_logits else self.classifier(pooled)


class ViTMSNBackbone(PreTrainedModel):
    """ViT-MSN for detection and segmentation heads: as maps, the tokens of the layers in `config.out_features`."""

    config_class = ViTMSNConfig

    def __init__(self, config: ViTMSNConfig):
        super().__init__(config)
        self.embeddings = ViTMSNEmbeddings(config)
        self.encoder = ViTMSNEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
            pixel_values: (B, num_channels, H, W) floats, any H and W of a patch or more: positions are interpolated.
            output_attentions: also return each layer's probabilities, computed eagerly.
            output_hidden_states: also return the embeddings and each layer's output, before the final norm.
            return_dict: False returns a tuple.

        Returns:
            `feature_maps`, each (B, C, H // patch_size, W // patch_size), after the final norm and without the class
            token; `hidden_states`, each (B, 1 + N, C); `attentions`, each (B, heads, 1 + N, 1 + N).

        Raises:
            ValueError: `pixel_values` is missing or of another shape.
        """
        options = self.call_options(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        pixel_values = self.check_pixel_values(pixel_values)
        grid = [length // self.config.patch_size for length in pixel_values.shape[2:]]
        x = self.embeddings(pixel_values, None, True)
        eager = self.attn_implementation == "eager" or options.output_attentions
        hidden_states, attentions = self.encoder(x, [None] * self.config.num_hidden_layers, eager)
        tokens = [self.layernorm(hidden_states[index])[:, 1:] for index in self.config.out_indices]
        output = BackboneOutput(
            feature_maps=tuple(x.transpose(1, 2).unflatten(2, grid).contiguous() for x in tokens),
            hidden_states=tuple(hidden_states) if options.output_hidden_states else None,
            attentions=tuple(attentions) if options.output_attentions else None,
        )
        return output if options.return_dict else output.to_tuple()

    def forward_features(  # type: ignore[override]  # of a backbone, features are several maps
        self, pixel_values: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """Returns the feature maps."""
        return self(pixel_values, **options, return_dict=True).feature_maps
