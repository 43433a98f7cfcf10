"""Making and loading a model by name: the class is picked from the config. Twin: `ptmodels/auto.py`."""

import os
from typing import Any, Literal, overload

from modelspec.checkpoints import LoadReport, initial_weights, parameter_shapes
from modelspec.configs import get_config, load_config
from tfmodels.dinat import TFDinatBackbone, TFDinatForImageClassification, TFDinatModel
from tfmodels.nat import TFNatBackbone, TFNatForImageClassification, TFNatModel
from tfmodels.pretrained import TFPreTrainedModel
from tfmodels.swiftformer import TFSwiftFormerBackbone, TFSwiftFormerForImageClassification, TFSwiftFormerModel
from tfmodels.vit_msn import TFViTMSNBackbone, TFViTMSNForImageClassification, TFViTMSNModel

_CLASSES: dict[str, dict[str, type[TFPreTrainedModel]]] = {
    "nat": {"Model": TFNatModel, "ForImageClassification": TFNatForImageClassification, "Backbone": TFNatBackbone},
    "dinat": {
        "Model": TFDinatModel,
        "ForImageClassification": TFDinatForImageClassification,
        "Backbone": TFDinatBackbone,
    },
    "swiftformer": {
        "Model": TFSwiftFormerModel,
        "ForImageClassification": TFSwiftFormerForImageClassification,
        "Backbone": TFSwiftFormerBackbone,
    },
    "vit_msn": {
        "Model": TFViTMSNModel,
        "ForImageClassification": TFViTMSNForImageClassification,
        "Backbone": TFViTMSNBackbone,
    },
}


def model_class(model_type: str, architecture: str = "ForImageClassification") -> type[TFPreTrainedModel]:
    """Returns the class of a family, for example `model_class("swiftformer", "Model")`.

    Raises:
        ValueError: this half has no such family or architecture.
    """
    try:
        return _CLASSES[model_type][architecture]
    except KeyError:
        available = ", ".join(f"{family} ({', '.join(classes)})" for family, classes in _CLASSES.items())
        raise ValueError(f"there is no {architecture} of {model_type!r}; there are {available}") from None


def create_model(
    name: str,
    *,
    num_labels: int | None = None,
    seed: int = 0,
    architecture: str = "ForImageClassification",
    config_overrides: dict | None = None,
    **kwargs: Any,
) -> TFPreTrainedModel:
    """Makes a published variant with fresh weights, the same numbers in both frameworks for the same seed.

    Args:
        name: a variant, see `modelspec.list_models`.
        num_labels: size of the head; the published one by default.
        seed: of the initialisation, which is the reference's, drawn in NumPy.
        architecture: `"ForImageClassification"` or `"Model"`.
        config_overrides: config fields that differ from the published ones.
        **kwargs: arguments of the class's `from_weights`: `dtype`, `attn_implementation`, `use_mask_token`,
            `data_format`.

    Raises:
        ValueError: the variant or a value is unknown.

    >>> model = create_model("swiftformer-xs", num_labels=10)
    >>> model.num_parameters()
    3037780
    """
    config = get_config(name, **(config_overrides or {}))
    if num_labels is not None:
        config.num_labels = num_labels
    cls = model_class(config.model_type, architecture)
    shapes = parameter_shapes(config, architecture, use_mask_token=bool(kwargs.get("use_mask_token")))
    return cls.from_weights(config, initial_weights(config, shapes, seed), **kwargs)


@overload
def load(
    source: str | os.PathLike, *, revision: str | None = ..., output_loading_info: Literal[False] = ..., **kwargs: Any
) -> TFPreTrainedModel: ...
@overload
def load(
    source: str | os.PathLike, *, revision: str | None = ..., output_loading_info: Literal[True], **kwargs: Any
) -> tuple[TFPreTrainedModel, LoadReport]: ...
def load(source: str | os.PathLike, *, revision: str | None = None, **kwargs: Any) -> Any:
    """Loads a checkpoint into the class that its `config.json` names (`architectures`), else the one with a head.

    Args:
        source: see `from_pretrained`.
        revision: branch, tag or commit of a Hub repository.
        **kwargs: see `from_pretrained`.
    """
    config = load_config(source, revision=revision)
    architecture = "ForImageClassification"
    if "num_labels" not in kwargs:
        named = config.architectures or []
        for other in ("Model", "Backbone"):
            if named and all(name.endswith(other) for name in named):
                architecture = other
    cls = model_class(config.model_type, architecture)
    return cls.from_pretrained(source, revision=revision, **kwargs)
