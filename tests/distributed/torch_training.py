"""One small training, the same in one process and in several; as a program, what `torchrun` starts.

    torchrun ... tests/distributed/torch_training.py FOLDER CASE...

makes the trainings whose arguments the cases are, in JSON, and writes FOLDER/NUMBER-RANK.npz for each.
"""

import json
import sys
from pathlib import Path

import numpy as np
import small_training
import torch
from small_training import random_images, small_config

import ptmodels.auto
import ptmodels.training
from modelspec.checkpoints import probing_weights
from ptmodels.distributed import joined


def trained(family, strategy=None, *, config=None, count=43, differ=False, **options):
    """Trains a small model, float64, as the caller or together with the other processes.

    Args:
        family, config: of the model.
        strategy: how.
        count: of images.
        differ: each process has another seed.
        options: of `small_training.train`.

    Returns:
        The model, the curves, and the last state, where there is one.
    """
    made = small_config(family, **(config or {}))
    model = ptmodels.auto.model_class(family).from_weights(made, probing_weights(made), dtype="float64")
    if differ:
        options["recipe"] = {**options.get("recipe", {}), "seed": torch.distributed.get_rank()}
    with joined(strategy):
        return model, *small_training.train(ptmodels.training.fine_tune, model, random_images(count), **options)


def train(family, strategy=None, **options) -> dict[str, np.ndarray]:
    """Trains as `trained` does; returns all that is left, by name."""
    model, curves, state = trained(family, strategy, **options)
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    return small_training.all_arrays(weights, curves, state)


def main(folder, *cases):
    torch.set_num_threads(1)
    with joined("ddp"):
        for number, case in enumerate(cases):
            try:
                arrays = train(**json.loads(case))
            except ValueError as error:
                arrays = {"error": np.array(str(error))}
            np.savez(Path(folder) / f"{number}-{torch.distributed.get_rank()}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
