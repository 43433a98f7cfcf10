"""Taking a model away: a program that runs where there is only torch, and ONNX. Twin: `tfmodels/export.py`."""

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from modelspec.atomic_file import atomic_file
from modelspec.configs import ModelConfig
from modelspec.exports import INPUT, OUTPUT, check_exportable, check_image_size, write_onnx
from neighborhood.choice import prefer
from ptmodels.composed_attention import sharing_tiles
from ptmodels.pretrained import PreTrainedModel


def export_program(
    model: PreTrainedModel, path: str | os.PathLike, *, image_size: int | Sequence[int] | None = None
) -> None:
    """Writes `model`, in evaluation mode, as a `torch.export` program, which needs torch alone.

    It takes `pixel_values`, preprocessed images (B, C, H, W) of the model's floating dtype, and returns `logits`
    (B, num_labels). ViT-MSN interpolates its positions to the size of the images:

        program = torch.export.load(path).module()
        with torch.no_grad():
            logits = program(pixel_values=images)["logits"]

    A program for any size takes images of which the last map has two rows and two columns or more
    (`smallest_image`) and refuses smaller ones; those of NAT and DiNAT take some minutes to export and to load, and one
    for a single size seconds. Loading unpickles: load no file of strangers.

    Args:
        model: a model with a classification head.
        path: the file, usually `*.pt2`; it is replaced when the new one is whole.
        image_size: pixels, a number or (height, width), if the program is to be for one size only.

    Raises:
        ValueError: the model has no classification head, or a bad argument.
    """
    check_exportable(model, path)
    program = _program(model, check_image_size(image_size))
    with atomic_file(path) as temporary, _quiet(), open(temporary, "wb") as file:
        torch.export.save(program, file)


def export_onnx(
    model: PreTrainedModel, path: str | os.PathLike, *, image_size: int | Sequence[int] | None = None
) -> None:
    """Writes `model`, in evaluation mode, as ONNX, input and output as of `export_program`.

        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(["logits"], {"pixel_values": images})

    For any size, `smallest_image` is the limit here too, which ONNX cannot check.

    Args:
        model: a model with a classification head, in float32.
        path: the file, usually `*.onnx`; it is replaced when the new one is whole.
        image_size: pixels, a number or (height, width), if it is to be for one size only; see `export_program`.

    Raises:
        ValueError: the model has no classification head, or a bad argument.
        ImportError: onnx or onnxscript is not installed.
    """
    check_exportable(model, path, "onnx", "onnxscript", dtypes=("float32",))
    image_size = check_image_size(image_size)
    program = _program(model, image_size)
    with _quiet():
        exported = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False)
    sizes = image_size or ("height", "width")
    write_onnx(path, exported.model_proto, ("batch", model.config.num_channels, *sizes), model.config.num_labels)


def smallest_image(config: ModelConfig) -> int:
    """Returns the fewest pixels along an axis of an image that an export for any size takes."""
    reduction = config.feature_info[-1]["reduction"]
    return 2 * reduction if config.model_type == "vit_msn" else reduction + 1


class _Logits(nn.Module):
    """The model with one argument and one result."""

    def __init__(self, model: PreTrainedModel, options: dict[str, bool]):
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.model(pixel_values, output_hidden_states=False, return_dict=True, **self.options)
        return {OUTPUT: output.logits}


def _program(model: PreTrainedModel, image_size: tuple[int, int] | None) -> torch.export.ExportedProgram:
    config, options = model.config, {}
    if _interpolates(model) and image_size != (config.image_size, config.image_size):
        options["interpolate_pos_encoding"] = True
    open_axes = (0,) if image_size else (0, 2, 3)
    # sizes that differ from each other and from 1: what they had in common would be fixed
    height, width = image_size or (3 * smallest_image(config), 4 * smallest_image(config) + 5)
    images = torch.zeros(2, config.num_channels, height, width, dtype=model.dtype, device=model.device)
    shapes = {INPUT: {axis: torch.export.Dim.DYNAMIC for axis in open_axes}}
    training = model.training
    model.eval()
    try:
        with prefer("composed"), sharing_tiles(), torch.no_grad(), _quiet():
            program = torch.export.export(_Logits(model, options), (), {INPUT: images}, dynamic_shapes=shapes)
    finally:
        model.train(training)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where in which file of this machine it comes from
    return program


def _interpolates(model: PreTrainedModel) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, the exporters' remarks on themselves are dropped; what fails raises."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
