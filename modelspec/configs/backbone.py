"""What the configurations of families with a backbone share: which stages it returns."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from modelspec.configs.base import ModelConfig, config_class
from modelspec.configs.stages import resolve_out_features


class OutStages:
    """`out_features` or `out_indices`: None means the last stage, also after the stages have changed."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return None
        features, indices = config.__dict__["out_features"], config.__dict__["out_indices"]
        if config._constructed and features is None:
            features, indices = resolve_out_features(config.stage_names)
        return list(features) if self.name == "out_features" else list(indices)

    def __set__(self, config: Any, value: Sequence | None) -> None:
        if config._constructed:
            config._choose_stages(**{"out_features": None, "out_indices": None, self.name: value})
        else:
            config.__dict__[self.name] = value


@config_class
class BackboneConfig(ModelConfig):
    """A configuration whose model can be a backbone.

    Attributes:
        out_features, out_indices: the stages that a backbone returns, see `stages.resolve_out_features`.
    """

    writes_default_stages: ClassVar[bool] = False  # whether a file names the stages that are the default

    out_features: OutStages = OutStages()
    out_indices: OutStages = OutStages()

    @property
    def stage_names(self) -> list[str]:
        """`["stem", "stage1", ...]`."""
        return list(self.channels)

    @property
    def channels(self) -> dict[str, int]:
        """The width of the map that each stage gives a backbone, by stage name."""
        raise NotImplementedError

    def validate(self) -> None:
        super().validate()
        self._choose_stages(self.__dict__["out_features"], self.__dict__["out_indices"])

    def replace(self, **changes: Any) -> Self:
        if "out_features" in changes or "out_indices" in changes:
            changes = {"out_features": None, "out_indices": None, **changes}
        return super().replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        if self.__dict__["out_features"] is None and not self.writes_default_stages:
            for name in {"out_features", "out_indices"} - self._file_keys:
                del out[name]
        return out

    def _choose_stages(self, out_features: list[str] | None, out_indices: Sequence[int] | None) -> None:
        try:
            features, indices = resolve_out_features(self.stage_names, out_features, out_indices)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}.{error}") from None
        is_default = indices == [len(self.stage_names) - 1]
        self.__dict__.update(out_features=None if is_default else features, out_indices=None if is_default else indices)
