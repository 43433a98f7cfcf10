"""ViT-MSN: the vision transformer of Masked Siamese Networks (Assran et al., ECCV 2022, arXiv:2204.07141)."""

from typing import Any, ClassVar

from modelspec.configs.backbone import BackboneConfig
from modelspec.configs.base import (
    ACTIVATION,
    FLAG,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    Rule,
    config_class,
    setting,
    whole,
)

_SIDE = Rule("one int, 1 or more: images and patches are square", whole(1).convert)


@config_class
class ViTMSNConfig(BackboneConfig):
    """Configuration of ViT-MSN.

    Attributes:
        hidden_size: width of the tokens.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block; divides `hidden_size`.
        intermediate_size: hidden width of the MLP.
        hidden_act: activation of the MLP; a name or a function.
        hidden_dropout_prob, attention_probs_dropout_prob: dropout rates.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: epsilon of every LayerNorm.
        image_size, patch_size: sides in pixels. Pairs are refused: the position table is a square grid.
        num_channels: channels of the image.
        qkv_bias: biases on query, key and value.
    """

    model_type: ClassVar[str] = "vit_msn"
    base_model_prefix: ClassVar[str] = "vit"

    hidden_size: int = setting(whole(1), default=768)
    num_hidden_layers: int = setting(whole(1), default=12)
    num_attention_heads: int = setting(whole(1), default=12)
    intermediate_size: int = setting(whole(1), default=3072)
    hidden_act: Any = setting(ACTIVATION, default="gelu")
    hidden_dropout_prob: float = setting(RATE, default=0.0)
    attention_probs_dropout_prob: float = setting(RATE, default=0.0)
    initializer_range: float = setting(NOT_NEGATIVE, default=0.02)
    layer_norm_eps: float = setting(POSITIVE, default=1e-6)
    image_size: int = setting(_SIDE, default=224)
    patch_size: int = setting(_SIDE, default=16)
    num_channels: int = setting(whole(1), default=3)
    qkv_bias: bool = setting(FLAG, default=True)

    @property
    def channels(self) -> dict[str, int]:
        """The width of the map of each layer, by stage name: a layer is a stage, as in the reference's backbones."""
        return dict.fromkeys(["stem", *(f"stage{i + 1}" for i in range(self.num_hidden_layers))], self.hidden_size)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Per layer: its `module` in the bare model, `num_chs`, its width, and `reduction`, its stride in pixels."""
        return [
            {"module": f"encoder.layer.{layer}", "num_chs": self.hidden_size, "reduction": self.patch_size}
            for layer in range(self.num_hidden_layers)
        ]

    @property
    def num_patches(self) -> int:
        """Tokens of an image of `image_size`, the class token not counted. A remainder of the division is cut off."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    def validate(self) -> None:
        super().validate()
        if self.hidden_size % self.num_attention_heads:
            self._refuse(
                "num_attention_heads",
                f"is {self.num_attention_heads}, which does not divide hidden_size {self.hidden_size}",
            )
        if self.patch_size > self.image_size:
            self._refuse(
                "patch_size", f"is {self.patch_size}; it must be at most image_size, which is {self.image_size}"
            )
