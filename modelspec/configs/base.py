"""What every model configuration does: checked fields, class labels, and the Hub's `config.json`.

A family's configuration is a dataclass whose fields carry a `Rule`. The rule runs at construction and at every later
assignment; conditions between fields are in `validate`, which runs at construction and before saving.
"""

import copy
import dataclasses
import difflib
import functools
import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, dataclass_transform

from modelspec.atomic_file import write_text

CONFIG_FILE = "config.json"
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "selu", "silu")
DTYPES = ("float16", "bfloat16", "float32", "float64")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_CLASSES: dict[str, type["ModelConfig"]] = {}


class Rule(NamedTuple):
    """What a field may hold: `convert(value)` gives the value to store, or raises if it is not `allowed` (words)."""

    allowed: str
    convert: Callable[[Any], Any]


def whole(minimum: int, maximum: float = math.inf) -> Rule:
    """An int of at least `minimum` and at most `maximum`; a bool is not one."""

    def convert(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not minimum <= int(value) <= maximum:
            raise ValueError
        return int(value)

    return Rule(f"an int, {minimum} or more" if maximum == math.inf else f"an int from {minimum} to {maximum}", convert)


def real(allowed: str, accept: Callable[[float], bool]) -> Rule:
    """A finite number for which `accept` holds, stored as a float; `allowed` says the condition in words."""

    def convert(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError
        value = float(value)
        if not math.isfinite(value) or not accept(value):
            raise ValueError
        return value

    return Rule(allowed, convert)


def one_of(*names: str) -> Rule:
    """One of the strings `names`."""

    def convert(value: Any) -> Any:
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return value

    return Rule("one of " + ", ".join(map(repr, names)), convert)


def optional(rule: Rule) -> Rule:
    """None, or what `rule` allows."""
    return Rule(f"None or {rule.allowed}", lambda value: None if value is None else rule.convert(value))


def list_of(rule: Rule) -> Rule:
    """A non-empty list or tuple, stored as a list, every entry of which obeys `rule`."""

    def convert(value: Any) -> Any:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError
        return [rule.convert(entry) for entry in value]

    return Rule(f"a non-empty list, each entry {rule.allowed}", convert)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _activation(value: Any) -> Any:
    if not callable(value) and not (isinstance(value, str) and value in ACTIVATIONS):
        raise ValueError
    return value


def _id2label(value: Any) -> dict[int, str]:
    labels = {int(index): _text(label) for index, label in value.items() if not isinstance(index, bool | float)}
    if len(labels) != len(value) or sorted(labels) != list(range(len(labels))):
        raise ValueError
    return dict(sorted(labels.items()))


def _label2id(value: Any) -> dict[str, int]:
    return {_text(label): whole(0).convert(index) for label, index in value.items()}


FLAG = Rule("True or False", _flag)
RATE = real("a number from 0 up to but not including 1", lambda value: 0 <= value < 1)
POSITIVE = real("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = real("a number, 0 or more", lambda value: value >= 0)
ACTIVATION = Rule(one_of(*ACTIVATIONS).allowed + ", or a function", _activation)
_ID2LABEL = Rule("a mapping from the class indices 0, 1, ... n - 1 to names", _id2label)
_LABEL2ID = Rule("a mapping from class names to indices", _label2id)
_MADE: Any = None  # default of labels, for which the constructor makes some
_ARCHITECTURES = optional(list_of(Rule("a class name", _text)))


def setting(rule: Rule, *, default: Any, omit_default: bool = False) -> Any:
    """A dataclass field that `rule` guards; with `omit_default` the default is not written to `config.json`."""
    metadata = {"rule": rule, "default": default, "omit_default": omit_default}
    if isinstance(default, list):
        return dataclasses.field(default_factory=functools.partial(copy.deepcopy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, field_specifiers=(setting, dataclasses.field))
def config_class(cls: type) -> type:
    """Makes `cls` a keyword-only dataclass whose constructor also takes the aliases of `attribute_map`."""
    made: Any = dataclasses.dataclass(kw_only=True)(cls)
    generated = made.__init__

    @functools.wraps(generated)
    def __init__(self: Any, **values: Any) -> None:
        values, derived = self._resolve(values)
        generated(self, **values)
        for name, value in derived.items():
            if value != getattr(self, name):
                raise ValueError(
                    f"{type(self).__name__}.{name} is {value!r} but the other fields make it {getattr(self, name)!r}; "
                    "it is computed, leave it out"
                )

    made.__init__ = __init__
    return made


class NumLabels:
    """The number of classes, which is the length of `id2label`. Assigning another number makes new labels LABEL_i."""

    def __get__(self, config: Any, owner: type | None = None) -> int:
        # on the class, where dataclass asks for the default, None
        return None if config is None else len(config.id2label)  # type: ignore[return-value]

    def __set__(self, config: Any, value: int | None) -> None:
        if not config._constructed:
            return  # the constructor has turned the number into labels already
        value = config._checked("num_labels", value, whole(0))
        if value != len(config.id2label):
            config.id2label = _default_labels(value)


@config_class
class ModelConfig:
    """What the configurations of all families share; make one of a family (`NatConfig`, ...) instead of this.

    Attributes:
        num_labels: number of classes; 0 leaves the classifier out. Alone it makes the labels `LABEL_0`, `LABEL_1`, ...
        id2label: class index to name. Rules over `num_labels`; the two must agree.
        label2id: name to class index; made from `id2label` unless given.
        problem_type: the loss: None (decided when labels are first seen) or one of `PROBLEM_TYPES`.
        return_dict, output_hidden_states, output_attentions: defaults of a call's arguments of the same name.
        architectures: the classes that the weights beside the file belong to.
        dtype: name of the weights' dtype. `torch_dtype` is another name of it, and stays the name in the file.
        extra: unknown keys of a `config.json`; read as attributes and written back.

    Raises:
        TypeError: a keyword that is no field.
        ValueError: a value that is not allowed; the message names class, field, value and what is allowed.
    """

    model_type: ClassVar[str] = ""
    base_model_prefix: ClassVar[str] = ""
    head_keys: ClassVar[tuple[str, ...]] = ("classifier",)
    num_labels_keys: ClassVar[tuple[str, ...]] = ("classifier",)
    attribute_map: ClassVar[dict[str, str]] = {"torch_dtype": "dtype"}
    derived: ClassVar[tuple[str, ...]] = ()
    _constructed: ClassVar[bool] = False

    num_labels: NumLabels = NumLabels()
    id2label: dict[int, str] = dataclasses.field(default=_MADE, repr=False, metadata={"rule": _ID2LABEL})
    label2id: dict[str, int] = dataclasses.field(default=_MADE, repr=False, metadata={"rule": _LABEL2ID})
    problem_type: str | None = setting(optional(one_of(*PROBLEM_TYPES)), default=None, omit_default=True)
    return_dict: bool = setting(FLAG, default=True, omit_default=True)
    output_hidden_states: bool = setting(FLAG, default=False, omit_default=True)
    output_attentions: bool = setting(FLAG, default=False, omit_default=True)
    architectures: list[str] | None = setting(_ARCHITECTURES, default=None, omit_default=True)
    dtype: str | None = setting(optional(one_of(*DTYPES)), default=None, omit_default=True)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, init=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.attribute_map = {**ModelConfig.attribute_map, **cls.attribute_map}
        if cls.model_type:
            _CLASSES[cls.model_type] = cls

    def __post_init__(self) -> None:
        # Kept outside the fields: how a file spelled things does not make two configurations differ.
        self.__dict__.update(_constructed=True, _file_keys=frozenset(), _dtype_key="dtype")
        self.validate()

    def validate(self) -> None:
        """Checks every field again and the conditions between fields.

        Raises:
            ValueError: naming the field, the value and what is allowed.
        """
        for field in dataclasses.fields(self):
            if "rule" in field.metadata:
                self._checked(field.name, getattr(self, field.name), field.metadata["rule"])
        for label, index in self.label2id.items():
            if self.id2label.get(index) != label:
                self._refuse("label2id", f"gives {label!r} the index {index}, which id2label does not; leave it out")

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with `changes` made together, so that fields which depend on each other can change.

        `num_labels` without labels makes new labels, unless the number is the one there already.

        Raises:
            TypeError, ValueError: as the constructor does.
        """
        labels = ("num_labels", "id2label", "label2id")
        changes = {name: value for name, value in changes.items() if name not in labels or value is not None}
        if changes.get("num_labels", self.num_labels) != self.num_labels or not changes.keys().isdisjoint(labels[1:]):
            changes = {"id2label": None, "label2id": None, **changes}
        names = {field.name for field in dataclasses.fields(self) if field.init}
        values: dict[str, Any] = {name: copy.deepcopy(self.__dict__.get(name)) for name in names}
        given = {self.attribute_map.get(name, name) for name in changes}
        replaced = type(self)(**{name: values[name] for name in names - given}, **changes)
        replaced.__dict__.update(
            extra=copy.deepcopy(self.extra), _file_keys=self._file_keys, _dtype_key=self._dtype_key
        )
        return replaced

    def states(self, name: str) -> bool:
        """Whether the file that this was read from has the field `name`; False if it was read from none."""
        return name in self._file_keys

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Makes a configuration of the contents of a `config.json`; unknown keys are kept in `extra`.

        Values that are computed (`derived`) are ignored: published files hold wrong ones.

        Raises:
            ValueError: `data` is of another `model_type`, or holds a value that is not allowed.
        """
        found = data.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(f"{cls.__name__} reads model_type {cls.model_type!r}, but this is {found!r}")
        settings: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in data.items():
            target = cls.attribute_map.get(key, key)
            if key == "model_type" or target in cls.derived:
                continue
            known = target in cls._init_names() and not (key == "torch_dtype" and "dtype" in data)
            (settings if known else extra)[key] = value
        config = cls(**copy.deepcopy(settings))
        config.__dict__.update(
            extra=copy.deepcopy(extra),
            _file_keys=frozenset(cls.attribute_map.get(key, key) for key in settings),
            _dtype_key="torch_dtype" if "torch_dtype" in settings else "dtype",
        )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns what `config.json` holds. Keys of `id2label` are ints here and become strings in JSON.

        Raises:
            ValueError: a field holds a function.
        """
        out = copy.deepcopy(self.extra)
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.metadata.get("default")
            if field.name in ("extra", "num_labels", "id2label", "label2id"):
                continue
            if field.metadata.get("omit_default") and value == default and field.name not in self._file_keys:
                continue
            if callable(value):
                name = getattr(value, "__qualname__", repr(value))
                self._refuse(field.name, f"is the function {name!r}, which no file can hold; give one of {ACTIVATIONS}")
            out[self._dtype_key if field.name == "dtype" else field.name] = copy.deepcopy(value)
        if self.id2label != _default_labels(2) or "id2label" in self._file_keys:
            out.update(id2label=dict(self.id2label), label2id=dict(self.label2id))
        out.update({name: getattr(self, name) for name in self.derived}, model_type=self.model_type)
        return out

    def to_json_string(self) -> str:
        """Returns the text of `config.json`: sorted keys, two spaces, a final newline. Raises as `to_dict` does."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, *, revision: str | None = None, **overrides: Any) -> Self:
        """Reads `config.json` and returns it with `overrides` made (see `replace`).

        Args:
            source: a directory, a JSON file, or a Hub id such as `"MBZUAI/swiftformer-xs"`.
            revision: branch, tag or commit of the Hub repository.

        Raises:
            OSError: the file cannot be had.
            ValueError: it is no JSON object, of another `model_type`, or holds a value that is not allowed.
            TypeError: an override that is no field.
        """
        path = _config_path(source, revision)
        return cls.from_dict(_read_object(path)).replace(**overrides)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes `config.json` into `directory`, which is made if needed. The old file stays whole if this fails.

        Raises:
            ValueError: a field is not valid or holds a function.
            OSError: the file cannot be written.
        """
        self.validate()
        text = self.to_json_string()
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_text(Path(directory) / CONFIG_FILE, text)

    def __setattr__(self, name: str, value: Any) -> None:
        name = self.attribute_map.get(name, name)
        field = self.__dataclass_fields__.get(name)
        if field is not None and "rule" in field.metadata:
            value = self._checked(name, value, field.metadata["rule"])
        elif name in self.__dict__.get("extra", {}):
            self.extra[name] = value
            return
        elif field is None and not hasattr(type(self), name) and self._close_names(name):
            # Trainers hang attributes of their own on a config; a name so like a field's is a slip
            raise AttributeError(self._unknown(name))
        super().__setattr__(name, value)
        if name == "id2label" and self._constructed:
            self.label2id = {label: index for index, label in value.items()}

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no attribute. The instance may be empty still (copy, pickle), hence __dict__.
        if name in type(self).attribute_map:
            return getattr(self, type(self).attribute_map[name])
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(self._unknown(name))

    @classmethod
    def _init_names(cls) -> set[str]:
        return {field.name for field in dataclasses.fields(cls) if field.init}

    @classmethod
    def _resolve(cls, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Replaces aliases, checks the names, settles the labels; returns the fields and the computed values given."""
        fields: dict[str, Any] = {}
        derived: dict[str, Any] = {}
        for name, value in values.items():
            target = cls.attribute_map.get(name, name)
            if target not in cls._init_names() and target not in cls.derived:
                raise TypeError(cls._unknown(name))
            into = derived if target in cls.derived else fields
            if target in into and into[target] != value:
                raise ValueError(f"{cls.__name__}.{target} is given twice, as {into[target]!r} and {value!r}")
            into[target] = value
        num_labels, id2label, label2id = (fields.get(name) for name in ("num_labels", "id2label", "label2id"))
        if num_labels is not None:
            num_labels = cls._checked("num_labels", num_labels, whole(0))
        if label2id is not None:
            label2id = cls._checked("label2id", label2id, _LABEL2ID)
        if id2label is not None:
            id2label = cls._checked("id2label", id2label, _ID2LABEL)
        elif label2id is not None:
            inverse = {index: label for label, index in label2id.items()}
            id2label = cls._checked("id2label", inverse, _ID2LABEL)
        else:
            id2label = _default_labels(2 if num_labels is None else num_labels)
        if num_labels not in (None, len(id2label)):
            raise ValueError(
                f"{cls.__name__}.num_labels is {num_labels} but id2label has {len(id2label)} entries; give one of them"
            )
        if label2id is None:
            label2id = {label: index for index, label in id2label.items()}
        return {**fields, "num_labels": num_labels, "id2label": id2label, "label2id": label2id}, derived

    @classmethod
    def _unknown(cls, name: str) -> str:
        close = cls._close_names(name)
        return f"{cls.__name__} has no field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")

    @classmethod
    def _close_names(cls, name: str) -> list[str]:
        return difflib.get_close_matches(name, sorted(cls._init_names() | set(cls.attribute_map)), n=1)

    @classmethod
    def _checked(cls, name: str, value: Any, rule: Rule) -> Any:
        try:
            return rule.convert(value)
        except (AttributeError, OverflowError, TypeError, ValueError):
            raise ValueError(f"{cls.__name__}.{name} is {value!r}; it must be {rule.allowed}") from None

    @classmethod
    def _refuse(cls, name: str, reason: str) -> None:
        raise ValueError(f"{cls.__name__}.{name} {reason}")

    def _require_length(self, name: str, other: str) -> None:
        """Raises ValueError unless the lists `name` and `other` have an entry for every stage each."""
        got, wanted = len(getattr(self, name)), len(getattr(self, other))
        if got != wanted:
            self._refuse(name, f"has {got} entries but {other} has {wanted}; give one entry per stage")


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """Makes the configuration of the class that `data["model_type"]` names.

    Raises:
        ValueError: `model_type` is missing or unknown (the message lists the known ones), or a value is not allowed.
    """
    return _class_of(data, "the configuration").from_dict(data)


def load_config(source: str | os.PathLike, *, revision: str | None = None, **overrides: Any) -> ModelConfig:
    """Reads a `config.json` of any family; arguments and errors as `ModelConfig.from_pretrained`."""
    path = _config_path(source, revision)
    data = _read_object(path)
    return _class_of(data, path).from_dict(data).replace(**overrides)


def _class_of(data: Mapping[str, Any], where: str) -> type[ModelConfig]:
    allowed = ", ".join(sorted(_CLASSES))
    if "model_type" not in data:
        raise ValueError(f"{where} has no model_type; it must be one of {allowed}")
    found = data["model_type"]
    if not isinstance(found, str) or found not in _CLASSES:
        raise ValueError(f"{where} has the model_type {found!r}; it must be one of {allowed}")
    return _CLASSES[found]


def _config_path(source: str | os.PathLike, revision: str | None) -> str:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".json":
        return str(path)
    from modelspec.checkpoints.source import resolve_file

    return resolve_file(source, CONFIG_FILE, revision=revision)


def _read_object(path: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: byte {error.start} is not UTF-8") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}; a configuration is an object")
    return data


def _default_labels(count: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(count)}
