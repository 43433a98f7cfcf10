"""What a fine-tuning does, in numbers: both halves train by it, and train the same."""

import dataclasses
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of a fine-tuning. The optimizer is AdamW as torch defines it, with a cosine after a linear warm-up.

    Attributes:
        epochs: how often the training images are gone through.
        batch_size: images per optimizer step; all of them, also where `accumulation_steps` cuts them up.
        learning_rate: the peak, of the head; `layer_decay` lowers it for the layers before.
        min_learning_rate: where the cosine ends.
        warmup_epochs: length of the linear rise from about 0; may be a fraction.
        weight_decay: decoupled, on weights of products only (see `modelspec.parameter_groups`).
        layer_decay: factor on the learning rate per layer further from the head (Bao et al., BEiT, 2021); 1: none.
        beta_1, beta_2, epsilon: of AdamW.
        clip_norm: limit of the L2 norm of all gradients together; None: none.
        label_smoothing: part of the target that all classes share.
        mixup: alpha of the Beta distribution that says how two images are mixed (Zhang et al., 2018); 0: none.
        crop_scale: least part of the area that a random crop keeps; 1: no crops.
        flip: probability of a mirror image.
        ema: decay of the moving average of the weights that is evaluated and saved; None: none.
        accumulation_steps: cuts a batch into so many parts whose gradients are averaged; it divides `batch_size`.
        gradient_checkpointing: computes blocks again in the backward pass instead of keeping what they computed.
        mixed_precision: computes in bfloat16; weights, losses and the optimizer stay in float32.
        freeze: the last stage that is not trained, for example `"stage2"`; None: all are trained.
        distillation: trains SwiftFormer's second head on what a teacher says (Touvron et al., DeiT, 2021), hard.
        seed: of the order of the images, of augmentation, mixup and dropping.

    Raises:
        ValueError: a value is not allowed; the message names the field.
    """

    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    crop_scale: float = 1.0
    flip: float = 0.0
    ema: float | None = None
    accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: bool = False
    freeze: str | None = None
    distillation: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulation_steps", 1), ("seed", 0)):
            _require(name, getattr(self, name), _is_whole(getattr(self, name), least), f"a whole number from {least}")
        for name in ("learning_rate", "epsilon"):
            _require(name, getattr(self, name), _is_number(getattr(self, name)) and getattr(self, name) > 0, "above 0")
        for name in ("min_learning_rate", "warmup_epochs", "weight_decay", "mixup"):
            _require(name, getattr(self, name), _is_number(getattr(self, name)), "0 or above")
        for name in ("beta_1", "beta_2", "label_smoothing"):
            value = getattr(self, name)
            _require(name, value, _is_number(value) and value < 1, "from 0 to below 1")
        _require("flip", self.flip, _is_number(self.flip) and self.flip <= 1, "from 0 to 1")
        for name in ("layer_decay", "crop_scale"):
            value = getattr(self, name)
            _require(name, value, _is_number(value) and 0 < value <= 1, "above 0 and at most 1")
        if self.clip_norm is not None:
            _require("clip_norm", self.clip_norm, _is_number(self.clip_norm) and self.clip_norm > 0, "above 0, or None")
        if self.ema is not None:
            _require("ema", self.ema, _is_number(self.ema) and 0 < self.ema < 1, "above 0 and below 1, or None")
        for name in ("gradient_checkpointing", "mixed_precision", "distillation"):
            _require(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        _require("freeze", self.freeze, self.freeze is None or isinstance(self.freeze, str), "a stage's name, or None")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"Recipe.min_learning_rate is {self.min_learning_rate}, above learning_rate, {self.learning_rate}"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"Recipe.warmup_epochs is {self.warmup_epochs}; it must be below epochs, {self.epochs}")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"Recipe.accumulation_steps is {self.accumulation_steps}; it must divide batch_size, {self.batch_size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Makes a recipe of what `to_dict` gave.

        Raises:
            ValueError: a field is unknown, or its value not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"Recipe has no field {unknown[0]!r}; there are {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, as JSON can hold them."""
        return dataclasses.asdict(self)

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Returns how many steps the learning rate rises."""
        return round(self.warmup_epochs * steps_per_epoch)

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Returns the head's learning rate at a step, counted from 0.

        Linear from one part of `warmup_steps + 1` of the peak, then half a cosine that would reach `min_learning_rate`
        one step after the last.
        """
        warmup, total = self.warmup_steps(steps_per_epoch), self.epochs * steps_per_epoch
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        fraction = min((step - warmup) / (total - warmup), 1.0)
        cosine = 0.5 * (1.0 + math.cos(math.pi * fraction))
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * cosine


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, not negative."""
    # numbers.Real has no order for type checkers, and float() does not take every integer
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf  # type: ignore[operator]


def _require(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"Recipe.{name} is {value!r}; allowed is {allowed}")
