"""What `from_pretrained` does before there is a model: the config and the weights that go together."""

import dataclasses
import os
from typing import Any

from modelspec.checkpoints.checkpoint import Checkpoint
from modelspec.checkpoints.dialects import L2_DIALECTS
from modelspec.checkpoints.errors import SourceError
from modelspec.checkpoints.identify import infer_config
from modelspec.checkpoints.matching import LoadReport, match_checkpoint
from modelspec.checkpoints.reading import read_checkpoint
from modelspec.checkpoints.source import resolve_weights
from modelspec.configs.base import ModelConfig


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that has been read, the config of the model to be, and how far the two may differ."""

    config: ModelConfig
    checkpoint: Checkpoint
    replace_head: bool
    resize: bool

    def match(self, expected: dict[str, tuple[int, ...]]) -> tuple[dict, LoadReport]:
        """Returns the arrays for the keys and shapes `expected`, and the report; see `match_checkpoint`."""
        return match_checkpoint(
            self.config,
            expected,
            self.checkpoint.tensors,
            self.checkpoint.path,
            replace_head=self.replace_head,
            resize=self.resize,
            dialect=self.checkpoint.dialect,
        )


def open_checkpoint(
    config_class: type[ModelConfig],
    source: str | os.PathLike,
    *,
    config: ModelConfig | None = None,
    revision: str | None = None,
    ignore_mismatched_sizes: bool = False,
    **overrides: Any,
) -> OpenedCheckpoint:
    """Reads the config and the weights that `source` names.

    Without a `config.json` the config is that of the published variant whose shapes the file has.

    Args:
        config_class: the family's.
        source: see `resolve_weights`.
        config: instead of the source's.
        revision: branch, tag or commit of a Hub repository.
        ignore_mismatched_sizes: accept a head of another size than the config says.
        **overrides: config fields. Labels allow another head; `kernel_size` or `image_size` resize the tables of
            positions.

    Raises:
        SourceError: the source cannot be found or reached.
        CheckpointError: a file is truncated, damaged or foreign.
        ValueError, TypeError: a bad config.
    """
    given = config is not None
    if not given:
        try:
            config = config_class.from_pretrained(source, revision=revision)
        except SourceError:
            if not os.path.isfile(os.path.expanduser(source)):
                raise
    checkpoint = read_checkpoint(resolve_weights(source, revision))
    if config is None:
        config = infer_config(config_class, checkpoint.tensors, checkpoint.path)
    if checkpoint.dialect in L2_DIALECTS and not given and not config.states("attention_norm"):
        overrides = {"attention_norm": "l2"} | overrides
    asked_for = given or not {"num_labels", "id2label", "label2id"}.isdisjoint(overrides)
    return OpenedCheckpoint(
        config.replace(**overrides),
        checkpoint,
        replace_head=ignore_mismatched_sizes or asked_for,
        resize=given or not {"kernel_size", "image_size"}.isdisjoint(overrides),
    )
