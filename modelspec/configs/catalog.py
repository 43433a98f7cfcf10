"""The 20 published variants: how each is built, where its weights are, and what is known about them.

Sources: the Hub's `config.json` files (NAT: the original repository), the original repositories' tables and licences.
"""

import difflib
import fnmatch
from dataclasses import dataclass
from typing import Any

from modelspec.configs.base import ModelConfig
from modelspec.configs.nat import DinatConfig, NatConfig
from modelspec.configs.swiftformer import SwiftFormerConfig
from modelspec.configs.vit_msn import ViTMSNConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BILINEAR = 2
BICUBIC = 3


@dataclass(frozen=True, kw_only=True)
class EvaluationTransform:
    """The transform an accuracy was measured with: shorter side to `resize` pixels, then the middle `crop` pixels.

    `interpolation` is `"bilinear"` or `"bicubic"`. The image processor does something else: it resizes to a square.
    """

    resize: int
    crop: int
    interpolation: str


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is known about one published checkpoint.

    Attributes:
        name: the name here, for example `"nat-mini"`.
        hub_id: its Hub repository; `hub_id_confirmed` is False where the name only follows the pattern of the others.
        model_type: `"nat"`, `"dinat"`, `"swiftformer"` or `"vit_msn"`.
        parameter_count: with the head of 1000 classes; ViT-MSN is published, and counted, without a head.
        licence_card: SPDX id on the model card; None where nobody has looked.
        licence_origin: SPDX id of the repository that the weights come from. Where the two differ, ask a lawyer.
        top1: documented ImageNet-1k accuracy in percent; None for ViT-MSN, whose files hold no trained head.
        top1_source: who says so, and any doubt.
        top1_confirmed: False where sources disagree or it is not sure that the figure belongs to these weights.
        evaluation: the transform `top1` was measured with.
        image_size: side in pixels, and `resample` the Pillow filter (2 bilinear, 3 bicubic), of the image processor.
    """

    name: str
    hub_id: str
    hub_id_confirmed: bool = True
    model_type: str
    parameter_count: int
    licence_card: str | None
    licence_origin: str
    top1: float | None
    top1_source: str
    top1_confirmed: bool
    evaluation: EvaluationTransform
    image_size: int = 224
    resample: int

    @property
    def family(self) -> str:
        """The same as `model_type`."""
        return self.model_type

    @property
    def image_processor(self) -> dict[str, Any]:
        """Arguments of the image processor: `size`, `resample`, `image_mean`, `image_std`."""
        return {
            "size": self.image_size,
            "resample": self.resample,
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
        }


_DEPTHS_MINI = (3, 4, 6, 5)
_DEPTHS = (3, 4, 18, 5)
_NAT_README = "original repository's table (SHI-Labs/Neighborhood-Attention-Transformer)"
_VARIANTS: dict[str, tuple[Variant, type[ModelConfig], dict[str, Any]]] = {}
_ALIASES: dict[str, str] = {}


def _add(variant: Variant, config_class: type[ModelConfig], settings: dict[str, Any], *aliases: str) -> None:
    _VARIANTS[variant.name] = variant, config_class, settings
    for alias in (variant.name, variant.hub_id, variant.hub_id.split("/")[1], *aliases):
        _ALIASES[alias.lower()] = variant.name


def _dilations(depths: tuple[int, ...], steps: tuple[int, ...]) -> list[list[int]]:
    """Every second block of a stage takes the stage's step, the others 1."""
    return [[step if block % 2 else 1 for block in range(depth)] for depth, step in zip(depths, steps, strict=True)]


def _add_neighborhood(
    name: str,
    hub_name: str,
    config_class: type[ModelConfig],
    count: int,
    top1: float,
    width: int,
    depths: tuple[int, ...],
    mlp_ratio: float,
    scale: float = 0.0,
    *,
    image_size: int = 224,
    kernel_size: int = 7,
    steps: tuple[int, ...] = (8, 4, 2, 1),
    hub_id_confirmed: bool = True,
    doubt: str | None = None,
    aliases: tuple[str, ...] = (),
) -> None:
    """Adds a NAT or DiNAT: `steps` are the stages' dilations (DiNAT only), `doubt` says why `top1` is not sure."""
    settings = {
        "embed_dim": width,
        "depths": list(depths),
        "num_heads": [width // 32 * 2**stage for stage in range(4)],
        "kernel_size": kernel_size,
        "mlp_ratio": mlp_ratio,
        "layer_scale_init_value": scale,
    }
    if config_class is DinatConfig:
        settings["dilations"] = _dilations(depths, steps)
    variant = Variant(
        name=name,
        hub_id=f"shi-labs/{hub_name}",
        hub_id_confirmed=hub_id_confirmed,
        model_type=config_class.model_type,
        parameter_count=count,
        licence_card=None,
        licence_origin="MIT",
        top1=top1,
        top1_source=_NAT_README + (f"; {doubt}" if doubt else ""),
        top1_confirmed=doubt is None,
        evaluation=EvaluationTransform(
            resize=256 if image_size == 224 else image_size, crop=image_size, interpolation="bicubic"
        ),
        image_size=image_size,
        resample=BICUBIC,
    )
    _add(variant, config_class, settings, *aliases)


def _add_swiftformer(size: str, depths: list[int], widths: list[int], count: int, top1: float) -> None:
    variant = Variant(
        name=f"swiftformer-{size}",
        hub_id=f"MBZUAI/swiftformer-{size}",
        model_type="swiftformer",
        parameter_count=count,
        licence_card=None,
        licence_origin="Apache-2.0",
        top1=top1,
        top1_source=(
            "original repository's table (Amshaker/SwiftFormer); its weights were replaced in July 2023 and the Hub's "
            "are presumably the ones before"
        ),
        top1_confirmed=False,
        evaluation=EvaluationTransform(resize=256, crop=224, interpolation="bicubic"),
        resample=BILINEAR,
    )
    _add(variant, SwiftFormerConfig, {"depths": depths, "embed_dims": widths})


def _add_vit_msn(size: str, count: int, width: int, layers: int, heads: int, patch_size: int) -> None:
    variant = Variant(
        name=f"vit-msn-{size}",
        hub_id=f"facebook/vit-msn-{size}",
        model_type="vit_msn",
        parameter_count=count,
        licence_card="Apache-2.0",
        licence_origin="CC-BY-NC-4.0",
        top1=None,
        top1_source="none: the published file has no trained head, and no table gives a figure per file",
        top1_confirmed=False,
        evaluation=EvaluationTransform(resize=256, crop=224, interpolation="bilinear"),
        resample=BILINEAR,
    )
    settings = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch_size,
        "hidden_dropout_prob": 0.1 if layers == 24 else 0.0,
    }
    _add(variant, ViTMSNConfig, settings)


def _add_all() -> None:
    for config_class in (NatConfig, DinatConfig):
        family = config_class.model_type
        is_nat = config_class is NatConfig
        small_count, small_scale = (50_743_297, 1e-5) if is_nat else (50_719_681, 0.0)
        for size, count, top1, width, depths, mlp_ratio, scale, confirmed in (
            ("mini", 19_984_174, 81.8, 64, _DEPTHS_MINI, 3.0, 0.0, True),
            ("tiny", 27_901_582, 83.2 if is_nat else 82.7, 64, _DEPTHS, 3.0, 0.0, not is_nat),
            ("small", small_count, 83.7 if is_nat else 83.8, 96, _DEPTHS, 2.0, small_scale, not is_nat),
            ("base", 89_769_652, 84.3 if is_nat else 84.4, 128, _DEPTHS, 2.0, 1e-5, True),
        ):
            name = f"{family}-{size}"
            hub_name = f"{name}-in1k-224"
            _add_neighborhood(
                name, hub_name, config_class, count, top1, width, depths, mlp_ratio, scale, hub_id_confirmed=confirmed
            )
    large: tuple[tuple[str, int, float, float, dict[str, Any]], ...] = (
        ("dinat-large-in22k-in1k-224", 200_943_514, 86.6, 86.5, {}),
        ("dinat-large-in22k-in1k-384", 200_943_514, 87.4, 87.2, {"image_size": 384, "steps": (13, 6, 3, 1)}),
        (
            "dinat-large-11x11-in22k-in1k-384",
            201_144_250,
            87.5,
            87.3,
            {"image_size": 384, "kernel_size": 11, "aliases": ("dinat-large-11x11",)},
        ),
    )
    for name, count, top1, other, rest in large:
        doubt = f"another table says {other}"
        _add_neighborhood(name, name, DinatConfig, count, top1, 192, _DEPTHS, 2.0, doubt=doubt, **rest)
    _add_swiftformer("xs", [3, 3, 6, 4], [48, 56, 112, 220], 3_475_360, 75.7)
    _add_swiftformer("s", [3, 3, 9, 6], [48, 64, 168, 224], 6_092_128, 78.5)
    _add_swiftformer("l1", [4, 3, 10, 5], [48, 96, 192, 384], 12_057_920, 80.9)
    _add_swiftformer("l3", [4, 4, 12, 6], [64, 128, 320, 512], 28_494_736, 83.0)
    _add_vit_msn("small", 21_665_664, 384, 12, 6, 16)
    _add_vit_msn("base", 85_798_656, 768, 12, 12, 16)
    _add_vit_msn("large", 303_301_632, 1024, 24, 16, 16)
    _add_vit_msn("base-4", 87_503_616, 768, 12, 12, 4)
    _add_vit_msn("large-7", 303_513_600, 1024, 24, 16, 7)


_add_all()


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of the variants that match a shell pattern, by family and size.

    >>> list_models("nat-*")
    ['nat-mini', 'nat-tiny', 'nat-small', 'nat-base']
    """
    return [name for name in _VARIANTS if fnmatch.fnmatchcase(name, pattern.lower())]


def get_variant(name: str) -> Variant:
    """Returns what is known about a variant.

    Args:
        name: as in `list_models`, or its Hub id with or without the owner; case does not matter.

    Raises:
        ValueError: there is no such variant; the message names similar ones.
    """
    return _VARIANTS[_canonical(name)][0]


def get_config(name: str, **overrides: Any) -> ModelConfig:
    """Returns a new configuration of a variant: 1000 classes named LABEL_i, as published otherwise.

    Args:
        name: as for `get_variant`.
        overrides: fields to change, for example `num_labels=10`.

    Raises:
        ValueError: there is no such variant, or an override is not allowed.
        TypeError: an override is no field.
    """
    _, config_class, settings = _VARIANTS[_canonical(name)]
    return config_class(num_labels=1000, **settings).replace(**overrides)


def _canonical(name: str) -> str:
    key = str(name).lower()
    if key in _ALIASES:
        return _ALIASES[key]
    near = difflib.get_close_matches(key.rsplit("/", 1)[-1], _ALIASES, n=12, cutoff=0.5)
    begun = [full for full in _VARIANTS if full.startswith(key)]
    close = list(dict.fromkeys([*begun, *(_ALIASES[alias] for alias in near)]))[:5]
    raise ValueError(
        f"there is no variant {name!r}; " + (f"close to it: {', '.join(close)}" if close else "see list_models()")
    )
