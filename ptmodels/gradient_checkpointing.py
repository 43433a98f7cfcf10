"""Recomputing blocks in the backward pass, to save memory. Twin: `tfmodels/gradient_checkpointing.py`.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016 (arXiv:1604.06174), with blocks as segments.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

ALLOWED = {"use_reentrant": False, "every_n_layers": 1, "offload": False}


class GradientCheckpointing(nn.Module):
    """What models have for it; goes before `nn.Module` among the bases."""

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Makes training keep only what goes into each block, and compute the rest a second time for the gradients.

        Gradients, random masks and the statistics of batch normalization are those of training without it; under
        `torch.compile` too, with backends that use AOT Autograd, as the default does and `"eager"` does not. Inference
        is not affected. It is not saved with the model.

        Args:
            gradient_checkpointing_kwargs, every_n_layers, offload: what transformers' `Trainer` gives; there is no
                choice, and `use_reentrant` is False.

        Raises:
            ValueError: something else is asked for.
        """
        given = {**(gradient_checkpointing_kwargs or {}), "every_n_layers": every_n_layers, "offload": offload}
        for name, value in given.items():
            if name not in ALLOWED or value != ALLOWED[name]:
                allowed = ", ".join(f"{name}={value}" for name, value in ALLOWED.items())
                raise ValueError(f"{name} is {value!r}; gradient checkpointing has {allowed} alone")
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Ends what `gradient_checkpointing_enable` began."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in training."""
        return any(sequence.gradient_checkpointing for sequence in self._block_sequences())

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for sequence in self._block_sequences():
            sequence.gradient_checkpointing = value

    def _block_sequences(self) -> list["BlockSequence"]:
        return [module for module in self.modules() if isinstance(module, BlockSequence)]


class BlockSequence(nn.Module):
    """A module that runs blocks by `run_block`, which may have them recomputed."""

    gradient_checkpointing = False

    def run_block(self, block: nn.Module, *inputs: Any, **options: Any) -> Any:
        """Returns `block(*inputs, **options)`.

        Args:
            block: a module; it may drop out at random and have running statistics.
            *inputs: its inputs.
            **options: further arguments by name.
        """
        if not self.training or not self.gradient_checkpointing:
            return block(*inputs, **options)

        def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
            return contextlib.nullcontext(), _CopiedBuffers(block)

        if not torch.compiler.is_compiling():  # the compiler takes no contexts, and repeats no updates by itself
            options["context_fn"] = contexts
        return checkpoint(block, *inputs, use_reentrant=False, **options)


class _CopiedBuffers:
    """Inside, a module has copies of its buffers, which it may update; can be entered again."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.buffers: list[tuple[nn.Module, str, torch.Tensor]] = []

    def __enter__(self) -> None:
        for module in self.module.modules():
            self.buffers.extend((module, name, buffer) for name, buffer in module.named_buffers(recurse=False))
        for module, name, buffer in self.buffers:
            setattr(module, name, buffer.clone())

    def __exit__(self, *exception: object) -> None:
        while self.buffers:
            setattr(*self.buffers.pop())
