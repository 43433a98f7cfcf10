"""What all models share: making, loading and saving them, inputs and training. Twin: `ptmodels/pretrained.py`."""

import collections
import contextlib
import os
from typing import Any, Literal, Self, overload

import keras
import numpy as np
import optree
from keras import ops

from modelspec.checkpoints import MAX_SHARD_SIZE, RawTensor, initial_weights, open_checkpoint, write_checkpoint
from modelspec.checkpoints.keys import num_parameters
from modelspec.checkpoints.matching import LoadReport
from modelspec.configs import ModelConfig, config_from_dict
from modelspec.configs.outputs import ModelOutput
from modelspec.images.processor import ImageBatch, ImageProcessor
from tfmodels.freezing import Freezing
from tfmodels.gradient_checkpointing import GradientCheckpointing
from tfmodels.layers import Dense
from tfmodels.losses import image_classification_loss, labels_of, logits_of
from tfmodels.weights import assign_weights, checkpoint_variables, read_weights

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
DATA_FORMATS = ("channels_first", "channels_last")
CallOptions = collections.namedtuple("CallOptions", "output_hidden_states output_attentions return_dict")


class TFPreTrainedModel(Freezing, GradientCheckpointing, keras.Model):
    """Base of every model: a config, seeded weights, checkpoints, and Keras training with the model's own loss.

    Constructing a model draws the reference's initialisation from Keras' own seed (`keras.utils.set_random_seed`).

    Args:
        config: the model's config.
        data_format: how images and feature maps lie in inputs and outputs: `"channels_first"` (B, C, H, W), as
            documented, or `"channels_last"` (B, H, W, C). Inside, models always work channels-last.
        attn_implementation: `"sdpa"` (Keras' `dot_product_attention`) or `"eager"` (matmul, softmax, matmul).
        **kwargs: `name`, `dtype` (a Keras dtype policy, for example `"mixed_bfloat16"`), `trainable`.
    """

    config_class: type[ModelConfig]
    main_input_name = "pixel_values"
    constructor_arguments: tuple[str, ...] = ()
    takes_any_size = True  # without interpolate_pos_encoding
    maps_follow_data_format = False  # or last_hidden_state lies the same way whatever data_format says

    def __init__(
        self, config: ModelConfig, *, data_format: str = "channels_first", attn_implementation: str = "sdpa", **kwargs
    ):
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(config).__name__}"
            )
        if data_format not in DATA_FORMATS:
            raise ValueError(f"data_format is {data_format!r}; allowed are {', '.join(DATA_FORMATS)}")
        super().__init__(**kwargs)
        self.config = config
        self.data_format = data_format
        self.set_attn_implementation(attn_implementation)

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Chooses `"sdpa"` (Keras' `dot_product_attention`) or `"eager"` (matmul, softmax, matmul).

        Raises:
            ValueError: another name.
        """
        if attn_implementation not in ATTENTION_IMPLEMENTATIONS:
            allowed = ", ".join(ATTENTION_IMPLEMENTATIONS)
            raise ValueError(f"attn_implementation is {attn_implementation!r}; allowed are {allowed}")
        self.attn_implementation = attn_implementation
        body = getattr(self, self.config.base_model_prefix, None)
        if body is not None:
            body.set_attn_implementation(attn_implementation)

    @contextlib.contextmanager
    def building(self):
        """Inside, layers are made under this model's dtype policy; on leaving, its weights are drawn."""
        previous = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.dtype_policy)
        try:
            with _drawing_deferred():
                yield
        finally:
            keras.config.set_dtype_policy(previous)
        channels, size = self.config.num_channels, None if self.takes_any_size else self.config.image_size
        first = self.data_format == "channels_first"
        self.build((None, channels, size, size) if first else (None, size, size, channels))
        self.initialize_weights()

    def build(self, input_shape):
        """Makes nothing, the constructor has built every layer; Keras notes the shape, for `model.export`."""
        self.built = True

    @property
    def output(self):
        """The symbolic outputs of the call that gave most of them.

        Keras counts the outputs of a model in `keras.Model(inputs, outputs)` by those of its first call, and would not
        find the hidden states of a later one.
        """
        if not self._inbound_nodes:
            return super().output
        return max((node.output_tensors for node in self._inbound_nodes), key=len)

    def num_parameters(self) -> int:
        """Counts the elements of all weights but the statistics of batch normalization."""
        return num_parameters(self.checkpoint_shapes())

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns checkpoint key -> shape of every weight, in the checkpoint's layouts."""
        return {key: entry.shape for key, entry in checkpoint_variables(self).items()}

    def initialize_weights(self) -> None:
        """Draws the reference's initialisation from Keras' own seed; inside `_drawing_deferred` nothing is drawn."""
        if _deferred:
            return
        assign_weights(self, initial_weights(self.config, self.checkpoint_shapes(), _framework_seed()))

    def get_body(self) -> "TFPreTrainedModel":
        """Returns the bare model: the one that a classifier holds, or this one."""
        body: Any = getattr(self, self.config.base_model_prefix, self)
        return body

    @property
    def feature_info(self) -> list[dict]:
        """Per stage (ViT-MSN: per layer): its `module` in the bare model, `num_chs` and `reduction`, as timm has it."""
        return self.config.feature_info

    def forward_features(self, pixel_values, **options):
        """Returns the bare model's `last_hidden_state` of `pixel_values`; `options` are those of its call.

        Maps lie as in the bare model's output: NAT's and DiNAT's (B, H, W, C), SwiftFormer's as `data_format` says.
        """
        if self.get_body() is self:
            return self(pixel_values, **options, return_dict=True).last_hidden_state
        pixel_values = self.images_to_channels_last(pixel_values)
        features = self.get_body()(pixel_values, **options, return_dict=True).last_hidden_state
        return self.from_channels_last(features) if self.maps_follow_data_format else features

    def forward_head(self, features, pre_logits: bool = False):
        """Returns the logits (B, num_labels) of what `forward_features` gave.

        Args:
            features: a `last_hidden_state`.
            pre_logits: return what the classifier is given instead, (B, C).

        Raises:
            ValueError: the model has no classification head.
        """
        raise ValueError(f"{type(self).__name__} has no classification head; use the ForImageClassification class")

    def reset_classifier(self, num_labels: int) -> None:
        """Replaces the classifier by a new one, drawn from Keras' own seed; the labels become LABEL_0, LABEL_1, ...

        A compiled model has to be compiled again, since its optimizer knows the old weights.

        Args:
            num_labels: number of classes; 0 leaves the classifier out.

        Raises:
            ValueError: the model has no classification head, or `num_labels` is negative.
        """
        if self.get_body() is self:
            raise ValueError(f"{type(self).__name__} has no classification head; use the ForImageClassification class")
        self.config.num_labels = num_labels
        width = self.feature_info[-1]["num_chs"]
        previous = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.dtype_policy)
        self._tracker.unlock()  # Keras' own way of adding weights to what is built
        try:
            for name in self.config.num_labels_keys:
                self._tracker.untrack(getattr(self, name))
                setattr(self, name, Dense(width, num_labels) if num_labels > 0 else keras.layers.Identity())
        finally:
            self._tracker.lock()
            keras.config.set_dtype_policy(previous)
        self.train_function = self.test_function = self.predict_function = None
        shapes = self.checkpoint_shapes().items()
        heads = {key: shape for key, shape in shapes if key.partition(".")[0] in self.config.num_labels_keys}
        assign_weights(self, initial_weights(self.config, heads, _framework_seed()))

    def images_to_channels_last(self, pixel_values):
        """Returns the images as (B, H, W, C) in the compute dtype.

        Raises:
            ValueError: they are missing or not of the shape that `data_format` names.
        """
        channels = self.config.num_channels
        first = self.data_format == "channels_first"
        expected = f"(B, {channels}, H, W)" if first else f"(B, H, W, {channels})"
        if pixel_values is None:
            raise ValueError(f"{type(self).__name__} needs pixel_values {expected}")
        pixel_values = ops.cast(pixel_values, self.compute_dtype)
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1 if first else 3] not in (channels, None):
            raise ValueError(
                f"pixel_values has shape {shape}; {type(self).__name__} takes {expected} "
                f"with data_format={self.data_format!r}"
            )
        return ops.transpose(pixel_values, (0, 2, 3, 1)) if first else pixel_values

    def from_channels_last(self, feature_map):
        """Returns a (B, H, W, C) feature map as `data_format` wants it; None stays None."""
        if feature_map is None or self.data_format == "channels_last":
            return feature_map
        return ops.transpose(feature_map, (0, 3, 1, 2))

    def call_options(self, **given) -> CallOptions:
        """Fills what a call left open (None) from the config."""
        return CallOptions(
            *(
                getattr(self.config, name) if given.get(name) is None else bool(given[name])
                for name in CallOptions._fields
            )
        )

    # Checkpoints

    @classmethod
    def from_weights(cls, config: ModelConfig, tensors: dict[str, np.ndarray], *, dtype=None, **kwargs) -> Self:
        """Makes a model from a config and all its weights, without drawing any.

        Args:
            config: the model's config.
            tensors: checkpoint key -> array in the checkpoint's layout, complete.
            dtype: a dtype or Keras dtype policy; Keras' global policy by default.
            **kwargs: further constructor arguments.
        """
        with _drawing_deferred():
            model = cls(config, dtype=_policy(dtype), **kwargs)
        assign_weights(model, tensors)
        return model

    @overload
    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        config: ModelConfig | None = ...,
        num_labels: int | None = ...,
        dtype: Any = ...,
        torch_dtype: Any = ...,
        revision: str | None = ...,
        ignore_mismatched_sizes: bool = ...,
        data_format: str = ...,
        attn_implementation: str = ...,
        output_loading_info: Literal[False] = ...,
        **kwargs: Any,
    ) -> Self: ...
    @overload
    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        config: ModelConfig | None = ...,
        num_labels: int | None = ...,
        dtype: Any = ...,
        torch_dtype: Any = ...,
        revision: str | None = ...,
        ignore_mismatched_sizes: bool = ...,
        data_format: str = ...,
        attn_implementation: str = ...,
        output_loading_info: Literal[True],
        **kwargs: Any,
    ) -> tuple[Self, LoadReport]: ...
    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        config: ModelConfig | None = None,
        num_labels: int | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        revision: str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        data_format: str = "channels_first",
        attn_implementation: str = "sdpa",
        **kwargs: Any,
    ) -> Any:
        """Loads a checkpoint.

        A head that the file lacks, or one for another number of labels than asked for, is newly initialised from
        Keras' own seed, and a `CheckpointWarning` says so.

        Args:
            source: a directory with `config.json` and weights, a file of weights, a Hub id, or the name of a published
                variant. Weights are `model.safetensors`, `pytorch_model.bin`, either of them in several files,
                `tf_model.h5`, or files of the original repositories (see `modelspec.checkpoints.dialects`).
            config: use this config instead of the source's, also for the size of the head.
            num_labels: size of the head; the source's by default.
            dtype: a dtype or Keras dtype policy; Keras' global policy by default, `"auto"` for the file's own.
            torch_dtype: another name of `dtype`.
            revision: branch, tag or commit of a Hub repository.
            ignore_mismatched_sizes: accept a head of another size than the source's own config says.
            output_loading_info: also return the `LoadReport` of missing, unexpected and mismatched keys.
            data_format: see the class.
            attn_implementation: see the class.
            **kwargs: config fields to override (`id2label`, ...; `kernel_size` or `image_size` resize the tables of
                positions), and further constructor arguments (`use_mask_token`, `name`).

        Raises:
            SourceError: the source cannot be found or reached.
            CheckpointError: the file is truncated, foreign, or does not fit the config.
            ValueError: a bad config.
        """
        names = (*cls.constructor_arguments, "name", "trainable")
        constructor = {name: kwargs.pop(name) for name in names if name in kwargs}
        constructor |= {"data_format": data_format, "attn_implementation": attn_implementation}
        if num_labels is not None:
            kwargs["num_labels"] = num_labels
        opened = open_checkpoint(
            cls.config_class,
            source,
            config=config,
            revision=revision,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **kwargs,
        )
        config, checkpoint = opened.config, opened.checkpoint
        dtype = dtype if dtype is not None else torch_dtype
        with _drawing_deferred():
            model = cls(config, dtype=_policy(checkpoint.dtype if dtype == "auto" else dtype), **constructor)
        expected = model.checkpoint_shapes()
        tensors, report = opened.match(expected)
        fresh = {key: expected[key] for key in report.newly_initialised}
        if fresh:
            tensors.update(initial_weights(config, fresh, _framework_seed()))
        assign_weights(model, tensors)
        report.warn(checkpoint.path)
        return (model, report) if output_loading_info else model

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        *,
        image_processor: ImageProcessor | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        """Writes `config.json` (with the labels) and `model.safetensors` into `directory`, which is made if need be.

        The folder is replaced as a whole, other files in it are kept; see `modelspec.checkpoints.write_checkpoint`.
        What is written has PyTorch's names and layouts: it loads into both halves and into transformers.

        Args:
            directory: the folder.
            image_processor: written as `preprocessor_config.json`.
            max_shard_size: limit of a file's tensors, in bytes or as `"5GB"`; beyond it there are several files and
                `model.safetensors.index.json`.
        """
        config = self.config.replace(architectures=[type(self).__name__.removeprefix("TF")], dtype=self.variable_dtype)
        tensors = read_weights(self)

        def raw(key: str) -> RawTensor:
            return RawTensor(tensors[key].dtype.name, tensors[key].shape, tensors[key].tobytes())

        sizes = {key: value.nbytes for key, value in tensors.items()}
        text = config.to_json_string()  # a config that cannot be written fails before any file is touched
        write_checkpoint(directory, text, sizes, raw, processor=image_processor, max_shard_size=max_shard_size)

    # Keras' own saving

    def get_config(self) -> dict:
        return {
            "config": self.config.to_dict(),
            "data_format": self.data_format,
            "attn_implementation": self.attn_implementation,
            "name": self.name,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        } | {name: getattr(self, name) for name in self.constructor_arguments}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None):
        config = dict(config)
        model_config = config_from_dict(config.pop("config"))
        dtype = keras.dtype_policies.deserialize(config.pop("dtype"))
        return cls(model_config, dtype=dtype, **config)

    # Training

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss given to `compile`, or the model's own (see `config.problem_type`), on the logits."""
        y = labels_of(x, y)
        logits = logits_of(self, y_pred)
        if self._compile_loss is not None:
            return super().compute_loss(x, y, logits, sample_weight, training)
        if y is None:
            raise ValueError("no labels were given: pass y, or an input named 'labels'")
        return sum(self.losses, image_classification_loss(self.config, y, logits, sample_weight))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """The metrics given to `compile`, on the logits."""
        return super().compute_metrics(x, labels_of(x, y), logits_of(self, y_pred), sample_weight)

    def predict_step(self, data):
        """Runs the model on images alone: labels in the data would add a loss, which is no prediction."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        if isinstance(x, dict):
            x = {name: value for name, value in x.items() if name != "labels"}
        return self(x, training=False)


_deferred: list[bool] = []


@contextlib.contextmanager
def _drawing_deferred():
    """Inside, models are made without drawing weights, since the caller will assign them."""
    _deferred.append(True)
    try:
        yield
    finally:
        _deferred.pop()


def _framework_seed() -> int:
    # a generator of its own: Keras' global one heeds `keras.utils.set_random_seed` after its first use since 3.13 only
    return int(keras.random.randint((), 0, 2**31 - 1, seed=keras.random.SeedGenerator()))


def _policy(dtype):
    """Keras' policy for a dtype given as a name, a NumPy, TensorFlow or torch dtype, or a policy."""
    if dtype is None or isinstance(dtype, keras.dtype_policies.DTypePolicy):
        return dtype
    name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    allowed = ("float64", "float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
    if name not in allowed:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(allowed)} and auto")
    return keras.dtype_policies.DTypePolicy(name)


def _register_mapping(mapping_class: type[dict]) -> None:
    # Keras looks into nested inputs and outputs through this registry; to it, other subclasses of dict are leaves
    def flatten(mapping: Any) -> tuple:
        return list(mapping.values()), list(mapping.keys()), list(mapping.keys())

    def unflatten(keys: Any, values: Any) -> Any:
        return mapping_class(zip(keys, values, strict=True))

    optree.register_pytree_node(mapping_class, flatten, unflatten, namespace="keras")


_MAPPING_CLASSES: tuple[type[dict], ...] = (ImageBatch, *ModelOutput.__subclasses__())
for _mapping_class in _MAPPING_CLASSES:
    _register_mapping(_mapping_class)
