"""SwiftFormer (Shaker et al., ICCV 2023, arXiv:2303.15446)."""

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
    list_of,
    one_of,
    setting,
    whole,
)
from modelspec.configs.stages import rising_rates


def _ratio(value: Any) -> float:
    value = POSITIVE.convert(value)
    return int(value) if value.is_integer() else value


@config_class
class SwiftFormerConfig(BackboneConfig):
    """Configuration of SwiftFormer: convolutional stages that each end in one block of additive attention.

    Attributes:
        image_size: side in pixels of the images it was trained on; the maths does not use it.
        num_channels: channels of the image.
        depths: blocks per stage, the attention block included.
        embed_dims: width per stage.
        mlp_ratio: hidden width over width; an int when whole, as transformers 5 demands of its files.
        downsamples: whether the map is reduced after each stage; so it is where the width changes. The last is unused.
        hidden_act: activation of the attention blocks' MLP (the others are fixed); a name or a function.
        down_patch_size, down_stride, down_pad: kernel, stride and padding of the reduction.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        drop_mlp_rate, drop_conv_encoder_rate: dropout rates in the MLP and on the residual of convolution blocks.
        use_layer_scale: layer scale on the attention blocks' two residuals.
        layer_scale_init_value: its initial value.
        batch_norm_eps: epsilon of every BatchNorm.
        attention_norm: how token weights are normalised: `"softmax"`, over an axis of size 1, as the Hub's checkpoints
            were trained; or `"l2"`, over the tokens, as the original repository does since July 2023.
    """

    model_type: ClassVar[str] = "swiftformer"
    base_model_prefix: ClassVar[str] = "swiftformer"
    head_keys: ClassVar[tuple[str, ...]] = ("norm", "head", "dist_head")
    num_labels_keys: ClassVar[tuple[str, ...]] = ("head", "dist_head")

    image_size: int = setting(whole(1), default=224)
    num_channels: int = setting(whole(1), default=3)
    depths: list[int] = setting(list_of(whole(1)), default=[3, 3, 6, 4])
    embed_dims: list[int] = setting(list_of(whole(2)), default=[48, 56, 112, 220])
    mlp_ratio: int | float = setting(Rule(POSITIVE.allowed, _ratio), default=4)
    downsamples: list[bool] = setting(list_of(FLAG), default=[True, True, True, True])
    hidden_act: Any = setting(ACTIVATION, default="gelu")
    down_patch_size: int = setting(whole(1), default=3)
    down_stride: int = setting(whole(1), default=2)
    down_pad: int = setting(whole(0), default=1)
    drop_path_rate: float = setting(RATE, default=0.0)
    drop_mlp_rate: float = setting(RATE, default=0.0)
    drop_conv_encoder_rate: float = setting(RATE, default=0.0)
    use_layer_scale: bool = setting(FLAG, default=True)
    layer_scale_init_value: float = setting(NOT_NEGATIVE, default=1e-5)
    batch_norm_eps: float = setting(POSITIVE, default=1e-5)
    attention_norm: str = setting(one_of("softmax", "l2"), default="softmax", omit_default=True)

    @property
    def drop_paths(self) -> list[list[float]]:
        """The drop path rate of every block, per stage: linear from 0 at the very first to the configured rate."""
        return rising_rates(self.drop_path_rate, self.depths)

    @property
    def channels(self) -> dict[str, int]:
        """The width of the map that each stage gives a backbone, before the downsampling; by stage name."""
        return {"stem": self.embed_dims[0], **{f"stage{i + 1}": dim for i, dim in enumerate(self.embed_dims)}}

    @property
    def stage_positions(self) -> list[int]:
        """Where the stem and the stages are among the encoder's hidden states, which hold the downsamplings too."""
        return [0, *(int(stage["module"].rpartition(".")[2]) + 1 for stage in self.feature_info)]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Per stage: its `module` in the bare model, `num_chs`, its width, and `reduction`, its stride in pixels."""
        info, index, reduction = [], 0, 4
        for stage, dim in enumerate(self.embed_dims):
            info.append({"module": f"encoder.network.{index}", "num_chs": dim, "reduction": reduction})
            if self.has_downsampling(stage):
                index, reduction = index + 1, reduction * self.down_stride
            index += 1
        return info

    def has_downsampling(self, stage: int) -> bool:
        """Whether a downsampling follows the stage of that index: if it is asked for, or if the width changes."""
        if stage + 1 >= len(self.depths):
            return False
        return self.downsamples[stage] or self.embed_dims[stage] != self.embed_dims[stage + 1]

    def validate(self) -> None:
        super().validate()
        self._require_length("depths", "embed_dims")
        self._require_length("downsamples", "embed_dims")
        if int(self.mlp_ratio * min(self.embed_dims)) < 1:
            self._refuse(
                "mlp_ratio", f"is {self.mlp_ratio}, which leaves the width {min(self.embed_dims)} no hidden unit"
            )
