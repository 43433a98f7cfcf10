"""NAT (Hassani et al., CVPR 2023, arXiv:2204.07143) and DiNAT (Hassani and Shi, 2022, arXiv:2209.15001).

NAT is DiNAT with every dilation 1. Defaults are those of the reference implementation's code, not of its older page.
"""

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
    setting,
    whole,
)
from modelspec.configs.stages import rising_rates


def _odd(value: Any) -> int:
    value = whole(3).convert(value)
    if value % 2 == 0:
        raise ValueError
    return value


@config_class
class NeighborhoodConfig(BackboneConfig):
    """What NAT and DiNAT share: a hierarchy of stages, each half the size and twice the width of the one before.

    Attributes:
        patch_size: always 4, the stem's two strides of 2.
        num_channels: channels of the image.
        embed_dim: width of the first stage; stage i has embed_dim * 2**i.
        depths: blocks per stage.
        num_heads: heads per stage (also as `num_attention_heads`); each divides the stage's width.
        kernel_size: side of the neighborhood in tokens, odd.
        mlp_ratio: hidden width of the MLP over the stage's width.
        qkv_bias: biases on query, key and value.
        hidden_dropout_prob, attention_probs_dropout_prob: dropout rates.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        hidden_act: activation of the MLP; a name or a function.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: epsilon of the blocks' and the final LayerNorm (the others are fixed at 1e-5).
        layer_scale_init_value: initial value of the layer scale; 0 means that there is none.
    """

    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    derived: ClassVar[tuple[str, ...]] = ("num_layers", "hidden_size", "stage_names")
    head_keys: ClassVar[tuple[str, ...]] = ("classifier", "hidden_states_norms")
    writes_default_stages: ClassVar[bool] = True

    patch_size: int = setting(Rule("4, the only one there is", whole(4, 4).convert), default=4)
    num_channels: int = setting(whole(1), default=3)
    embed_dim: int = setting(whole(2), default=64)
    depths: list[int] = setting(list_of(whole(1)), default=[3, 4, 6, 5])
    num_heads: list[int] = setting(list_of(whole(1)), default=[2, 4, 8, 16])
    kernel_size: int = setting(Rule("an odd int, 3 or more", _odd), default=7)
    mlp_ratio: float = setting(POSITIVE, default=3.0)
    qkv_bias: bool = setting(FLAG, default=True)
    hidden_dropout_prob: float = setting(RATE, default=0.0)
    attention_probs_dropout_prob: float = setting(RATE, default=0.0)
    drop_path_rate: float = setting(RATE, default=0.1)
    hidden_act: Any = setting(ACTIVATION, default="gelu")
    initializer_range: float = setting(NOT_NEGATIVE, default=0.02)
    layer_norm_eps: float = setting(POSITIVE, default=1e-5)
    layer_scale_init_value: float = setting(NOT_NEGATIVE, default=0.0)

    @property
    def num_layers(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def hidden_size(self) -> int:
        """Width of the last stage. Published DiNAT files say 512 whatever the model, so it is computed."""
        return self.embed_dim * 2 ** (self.num_layers - 1)

    @property
    def drop_paths(self) -> list[list[float]]:
        """The drop path rate of every block, per stage: linear from 0 at the very first to the configured rate."""
        return rising_rates(self.drop_path_rate, self.depths)

    @property
    def channels(self) -> dict[str, int]:
        """The width of the map that each stage gives a backbone, before the downsampling; by stage name."""
        stages = {f"stage{stage + 1}": self.embed_dim * 2**stage for stage in range(self.num_layers)}
        return {"stem": self.embed_dim, **stages}

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Per stage: its `module` in the bare model, `num_chs`, its width, and `reduction`, its stride in pixels."""
        return [
            {"module": f"encoder.levels.{stage}", "num_chs": self.embed_dim * 2**stage, "reduction": 4 * 2**stage}
            for stage in range(self.num_layers)
        ]

    def validate(self) -> None:
        super().validate()
        self._require_length("num_heads", "depths")
        for stage, heads in enumerate(self.num_heads):
            dim = self.embed_dim * 2**stage
            if dim % heads:
                self._refuse("num_heads", f"has {heads} for stage {stage + 1}, which does not divide its width {dim}")
            if int(self.mlp_ratio * dim) < 1:
                self._refuse("mlp_ratio", f"is {self.mlp_ratio}, which leaves the width {dim} no hidden unit")


@config_class
class NatConfig(NeighborhoodConfig):
    """Configuration of NAT; all its fields are those of `NeighborhoodConfig`."""

    model_type: ClassVar[str] = "nat"
    base_model_prefix: ClassVar[str] = "nat"

    @property
    def dilations(self) -> list[list[int]]:
        """1 for every block, so that both families' models can be written once."""
        return [[1] * depth for depth in self.depths]


@config_class
class DinatConfig(NeighborhoodConfig):
    """Configuration of DiNAT: the fields of `NeighborhoodConfig`, and one more.

    Attributes:
        dilations: for every stage and block, the step between neighbors in tokens: any ints of 1 or more.
    """

    model_type: ClassVar[str] = "dinat"
    base_model_prefix: ClassVar[str] = "dinat"

    dilations: list[list[int]] = setting(
        list_of(list_of(whole(1))), default=[[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]
    )

    def validate(self) -> None:
        super().validate()
        self._require_length("dilations", "depths")
        for stage, (dilations, depth) in enumerate(zip(self.dilations, self.depths, strict=True)):
            if len(dilations) != depth:
                self._refuse(
                    "dilations",
                    f"has {len(dilations)} entries for stage {stage + 1}, whose depth is {depth}; "
                    "give one entry per block",
                )
