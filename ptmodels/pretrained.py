"""What all models share: making, loading and saving them. Twin: `tfmodels/pretrained.py`."""

import collections
import os
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from torch import nn

from modelspec.checkpoints import MAX_SHARD_SIZE, RawTensor, initial_weights, open_checkpoint, write_checkpoint
from modelspec.checkpoints.matching import LoadReport
from modelspec.configs import ModelConfig
from modelspec.configs.outputs import ModelOutput
from modelspec.images import ImageProcessor
from ptmodels.freezing import Freezing
from ptmodels.gradient_checkpointing import GradientCheckpointing

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
CallOptions = collections.namedtuple("CallOptions", "output_hidden_states output_attentions return_dict")


class PreTrainedModel(Freezing, GradientCheckpointing, nn.Module):
    """Base of every model: a config, seeded weights, checkpoints.

    Constructing a model draws the reference's initialisation from torch's own seed (`torch.manual_seed`).
    """

    config_class: type[ModelConfig]
    main_input_name = "pixel_values"

    def __init__(self, config: ModelConfig):
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(config).__name__}"
            )
        super().__init__()
        self.config = config
        self.attn_implementation = "sdpa"

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Chooses `"sdpa"` (torch's fused attention) or `"eager"` (matmul, softmax, matmul).

        Raises:
            ValueError: another name.
        """
        if attn_implementation not in ATTENTION_IMPLEMENTATIONS:
            allowed = ", ".join(ATTENTION_IMPLEMENTATIONS)
            raise ValueError(f"attn_implementation is {attn_implementation!r}; allowed are {allowed}")
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.attn_implementation = attn_implementation

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts the elements of all parameters.

        Args:
            only_trainable: leave frozen parameters out.
            exclude_embeddings: leave lookup tables (`nn.Embedding`) out, as transformers' `Trainer` asks.
        """
        tables = [module for module in self.modules() if isinstance(module, nn.Embedding)] if exclude_embeddings else []
        excluded = {id(table.weight) for table in tables}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if id(parameter) not in excluded and (parameter.requires_grad or not only_trainable)
        )

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns checkpoint key -> shape of every parameter and buffer."""
        return {key: tuple(value.shape) for key, value in self.state_dict().items()}

    def initialize_weights(self) -> None:
        """Draws the reference's initialisation from torch's own seed; a model on the meta device is left alone."""
        if self.device.type == "meta":
            return
        if getattr(self, self.config.base_model_prefix, None) is not None:
            # the body has drawn its own
            shapes = {key: shape for key, shape in self.checkpoint_shapes().items() if self._is_head(key)}
        else:
            shapes = self.checkpoint_shapes()
        drawn = initial_weights(self.config, shapes, _framework_seed())
        self.load_state_dict({key: torch.from_numpy(value) for key, value in drawn.items()}, strict=False)

    def _is_head(self, key: str) -> bool:
        return key.split(".")[0] in self.config.head_keys

    def get_body(self) -> "PreTrainedModel":
        """Returns the bare model: the one that a classifier holds, or this one."""
        return getattr(self, self.config.base_model_prefix, self)

    @property
    def feature_info(self) -> list[dict]:
        """Per stage (ViT-MSN: per layer): its `module` in the bare model, `num_chs` and `reduction`, as timm has it."""
        return self.config.feature_info

    def forward_features(self, pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
        """Returns the bare model's `last_hidden_state` of `pixel_values`; `options` are those of its call."""
        return self.get_body()(pixel_values, **options, return_dict=True).last_hidden_state

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Returns the logits (B, num_labels) of what `forward_features` gave.

        Args:
            features: a `last_hidden_state`.
            pre_logits: return what the classifier is given instead, (B, C).

        Raises:
            ValueError: the model has no classification head.
        """
        raise ValueError(f"{type(self).__name__} has no classification head; use the ForImageClassification class")

    def reset_classifier(self, num_labels: int) -> None:
        """Replaces the classifier by a new one, drawn from torch's own seed; the labels become LABEL_0, LABEL_1, ...

        Args:
            num_labels: number of classes; 0 leaves the classifier out.

        Raises:
            ValueError: the model has no classification head, or `num_labels` is negative.
        """
        if self.get_body() is self:
            raise ValueError(f"{type(self).__name__} has no classification head; use the ForImageClassification class")
        self.config.num_labels = num_labels
        width, device, dtype = self.feature_info[-1]["num_chs"], self.device, self.dtype
        for name in self.config.num_labels_keys:
            head = nn.Linear(width, num_labels, device=device, dtype=dtype) if num_labels > 0 else nn.Identity()
            setattr(self, name, head)
        heads = {
            key: shape
            for key, shape in self.checkpoint_shapes().items()
            if key.partition(".")[0] in self.config.num_labels_keys
        }
        drawn = initial_weights(self.config, heads, _framework_seed())
        self.load_state_dict({key: torch.from_numpy(value) for key, value in drawn.items()}, strict=False)

    def check_pixel_values(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Returns the images, if they are some; the first layer casts them to its dtype.

        Raises:
            ValueError: they are missing or not (B, num_channels, H, W).
        """
        if pixel_values is None:
            raise ValueError(f"{type(self).__name__} needs pixel_values")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; "
                f"{type(self).__name__} takes (B, {self.config.num_channels}, H, W)"
            )
        return pixel_values

    def call_options(self, **given: bool | None) -> CallOptions:
        """Fills what a call left open (None) from the config."""
        return CallOptions(
            *(
                getattr(self.config, name) if given.get(name) is None else bool(given[name])
                for name in CallOptions._fields
            )
        )

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        tensors: dict[str, np.ndarray],
        *,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str = "sdpa",
        **kwargs: Any,
    ) -> Self:
        """Makes a model from a config and all its weights, without drawing any.

        Args:
            config: the model's config.
            tensors: checkpoint key -> NumPy array, complete.
            dtype: floating dtype of the model, as a `torch.dtype` or its name; float32 by default.
            attn_implementation: see `set_attn_implementation`.
            **kwargs: further constructor arguments.
        """
        wanted = _torch_dtype(dtype)
        with torch.device("meta"):
            model = cls(config, **kwargs)
        state = {}
        for key, value in tensors.items():
            tensor = torch.from_numpy(value)
            # a copy, since the arrays stay the caller's
            state[key] = tensor.to(wanted, copy=True) if tensor.is_floating_point() else tensor.clone()
        model.load_state_dict(state, assign=True)
        model.set_attn_implementation(attn_implementation)
        return model

    @overload
    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        config: ModelConfig | None = ...,
        num_labels: int | None = ...,
        dtype: str | torch.dtype | None = ...,
        torch_dtype: str | torch.dtype | None = ...,
        attn_implementation: str = ...,
        revision: str | None = ...,
        ignore_mismatched_sizes: bool = ...,
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
        dtype: str | torch.dtype | None = ...,
        torch_dtype: str | torch.dtype | None = ...,
        attn_implementation: str = ...,
        revision: str | None = ...,
        ignore_mismatched_sizes: bool = ...,
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
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        attn_implementation: str = "sdpa",
        revision: str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a checkpoint, in evaluation mode.

        A head that the file lacks, or one for another number of labels than asked for, is newly initialised from
        torch's own seed, and a `CheckpointWarning` says so.

        Args:
            source: a directory with `config.json` and weights, a file of weights, a Hub id, or the name of a published
                variant. Weights are `model.safetensors`, `pytorch_model.bin`, either of them in several files,
                `tf_model.h5`, or files of the original repositories (see `modelspec.checkpoints.dialects`).
            config: use this config instead of the source's, also for the size of the head.
            num_labels: size of the head; the source's by default.
            dtype: floating dtype of the model; float32 by default, `"auto"` for the file's own.
            torch_dtype: another name of `dtype`.
            attn_implementation: `"sdpa"` or `"eager"`.
            revision: branch, tag or commit of a Hub repository.
            ignore_mismatched_sizes: accept a head of another size than the source's own config says.
            output_loading_info: also return the `LoadReport` of missing, unexpected and mismatched keys.
            **kwargs: config fields to override (`id2label`, ...; `kernel_size` or `image_size` resize the tables of
                positions), and further constructor arguments (`use_mask_token`).

        Raises:
            SourceError: the source cannot be found or reached.
            CheckpointError: the file is truncated, foreign, or does not fit the config.
            ValueError: a bad config.
        """
        constructor = {name: kwargs.pop(name) for name in cls.constructor_arguments if name in kwargs}
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
        with torch.device("meta"):
            expected = cls(config, **constructor).checkpoint_shapes()
        tensors, report = opened.match(expected)
        fresh = {key: expected[key] for key in report.newly_initialised}
        if fresh:
            tensors.update(initial_weights(config, fresh, _framework_seed()))
        model = cls.from_weights(
            config,
            tensors,
            dtype=checkpoint.dtype if dtype == "auto" else dtype,
            attn_implementation=attn_implementation,
            **constructor,
        )
        report.warn(checkpoint.path)
        model.eval()
        return (model, report) if output_loading_info else model

    constructor_arguments: tuple[str, ...] = ()

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """Returns checkpoint key -> contiguous tensor on the CPU, in the layouts of the canonical form."""
        return {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        *,
        image_processor: ImageProcessor | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        """Writes `config.json` (with the labels) and `model.safetensors` into `directory`, which is made if need be.

        The folder is replaced as a whole, other files in it are kept; see `modelspec.checkpoints.write_checkpoint`.
        What is written loads into both halves and into transformers.

        Args:
            directory: the folder.
            image_processor: written as `preprocessor_config.json`.
            max_shard_size: limit of a file's tensors, in bytes or as `"5GB"`; beyond it there are several files and
                `model.safetensors.index.json`.
        """
        config = self.config.replace(architectures=[type(self).__name__], dtype=str(self.dtype).removeprefix("torch."))
        tensors = self.state_dict()

        def raw(key: str) -> RawTensor:
            value = tensors[key].detach().cpu().contiguous()
            data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
            return RawTensor(str(value.dtype).removeprefix("torch."), tuple(value.shape), data)

        sizes = {key: value.numel() * value.element_size() for key, value in tensors.items()}
        text = config.to_json_string()  # a config that cannot be written fails before any file is touched
        write_checkpoint(directory, text, sizes, raw, processor=image_processor, max_shard_size=max_shard_size)


def _framework_seed() -> int:
    return int(torch.randint(0, 2**31 - 1, (), device="cpu"))


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; allowed are float64, float32, float16, bfloat16 and auto")
    return getattr(torch, name)


def _register_output(output_class: type[ModelOutput]) -> None:
    # torch.export, torch.compile and data parallelism look into outputs through this registry
    torch.utils._pytree.register_pytree_node(
        output_class,
        lambda output: (list(output.values()), list(output.keys())),
        lambda values, keys: output_class(zip(keys, values, strict=True)),
        serialized_type_name=f"twinzoo.{output_class.__name__}",
    )


for _output_class in ModelOutput.__subclasses__():
    _register_output(_output_class)
