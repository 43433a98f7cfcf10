"""Writing a model as a `torch.export` program or as ONNX; `ptmodels/export.py` compares what comes of it.

Twin: `tfmodels/artefacts.py`.
"""

import contextlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from modelspec.configs import ModelConfig
from modelspec.exports import INPUT, OUTPUT, onnx_file
from modelspec.exports.metadata import NAME
from neighborhood.choice import prefer
from ptmodels.composed_attention import sharing_tiles
from ptmodels.pretrained import PreTrainedModel


def write_program(
    model: PreTrainedModel, path: str | os.PathLike, image_size: tuple[int, int] | None = None
) -> torch.export.ExportedProgram:
    """Writes a program for one size, (height, width) in pixels, or for any; returns it."""
    program = make_program(model, image_size)
    save_program(program, path)
    return program


def save_program(
    program: torch.export.ExportedProgram, path: str | os.PathLike, metadata: Mapping[str, Any] | None = None
) -> None:
    """Saves a program, with what it says of itself, if that is given; see `modelspec.exports.read_metadata`."""
    extra = {} if metadata is None else {NAME: json.dumps(metadata, indent=1)}
    with _quiet(), open(path, "wb") as file:
        torch.export.save(program, file, extra_files=extra)


def write_onnx(model: PreTrainedModel, path: str | os.PathLike, image_size: tuple[int, int] | None = None) -> None:
    """Writes ONNX for one size, (height, width) in pixels, or for any."""
    program = make_program(model, image_size)
    with _quiet():
        exported = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False)
    assert exported is not None  # it is None where it writes a file itself
    sizes = image_size or ("height", "width")
    onnx_file.write_onnx(
        path, exported.model_proto, ("batch", model.config.num_channels, *sizes), model.config.num_labels
    )


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


def make_program(model: PreTrainedModel, image_size: tuple[int, int] | None = None) -> torch.export.ExportedProgram:
    """Traces a model, in evaluation mode, for images of one size, (height, width) in pixels, or of any."""
    config, options = model.config, {}
    if interpolates(model) and image_size != (config.image_size, config.image_size):
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


def interpolates(model: PreTrainedModel) -> bool:
    """Returns whether a model has to be told to take images of another size than its own."""
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
