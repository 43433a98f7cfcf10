"""One small training, the same in one process and in several; as a program, what `torchrun` starts.

    torchrun ... tests/distributed/torch_training.py FOLDER CASE...

makes the trainings whose arguments the cases are, in JSON, and writes FOLDER/NUMBER-RANK.npz for each.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import ptmodels.auto
import ptmodels.training
from modelspec import DinatConfig, NatConfig, SwiftFormerConfig, ViTMSNConfig
from modelspec.checkpoints import probing_weights
from modelspec.training import ArrayImages, EvaluationBatches, Recipe, TrainingBatches, TrainingState
from ptmodels.distributed import joined

WINDOWS = {"depths": [2, 1], "num_heads": [2, 4], "embed_dim": 16, "kernel_size": 3, "num_labels": 10}
CONFIGS = {
    "swiftformer": lambda **given: SwiftFormerConfig(
        **{"depths": [2, 1], "embed_dims": [16, 24], "downsamples": [True, True], "num_labels": 10, **given}
    ),
    "dinat": lambda **given: DinatConfig(
        **{**WINDOWS, "dilations": [[1, 2], [1]], "layer_scale_init_value": 0.5, "drop_path_rate": 0.0, **given}
    ),
    "nat": lambda **given: NatConfig(**{**WINDOWS, "drop_path_rate": 0.0, **given}),
    "vit_msn": lambda **given: ViTMSNConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        **{"image_size": 32, "patch_size": 8, "num_labels": 10, **given},
    ),
}
# 20 steps; no option is left at a value that changes nothing; parts of 5 are no two equal shares
RECIPE = {
    "epsilon": 1e-6,
    "epochs": 5,
    "batch_size": 10,
    "learning_rate": 3e-3,
    "min_learning_rate": 1e-4,
    "warmup_epochs": 0.5,
    "weight_decay": 0.1,
    "layer_decay": 0.7,
    "clip_norm": 0.5,
    "label_smoothing": 0.1,
    "mixup": 0.3,
    "ema": 0.8,
    "accumulation_steps": 2,
    "freeze": "stem",
    "seed": 3,
}


def train(
    family,
    strategy=None,
    *,
    recipe=None,
    config=None,
    state_path=None,
    keep=None,
    count=43,
    teacher=None,
    differ=False,
):
    """Trains a small model, float64, as the caller or together with the other processes.

    Args:
        family, config: of the model.
        strategy: how.
        recipe: what differs from `RECIPE`.
        state_path: what to go on from.
        keep: (epoch, path): the state after the epoch is copied to the path.
        count: of images.
        teacher: what it says of every image.
        differ: each process has another seed.

    Returns:
        The model, the curves as arrays, and the last state, where there is one.
    """
    made = CONFIGS[family](**(config or {}))
    model = ptmodels.auto.model_class(family).from_weights(made, probing_weights(made), dtype="float64")
    draws = np.random.default_rng(0)
    data = ArrayImages(draws.standard_normal((count, 3, 32, 32)), draws.integers(0, 10, count))
    taught = None if teacher is None else lambda pixel_values: np.eye(10)[np.full(len(pixel_values), teacher)]
    options = {**RECIPE, "distillation": teacher is not None, **(recipe or {})}
    if differ:
        options["seed"] = torch.distributed.get_rank()
    losses, states = [], [None]

    def on_epoch(state):
        states.append(state)
        if keep is not None and state.epoch == keep[0]:
            state.save(keep[1])

    with joined(strategy):
        history = ptmodels.training.fine_tune(
            model,
            TrainingBatches(data, Recipe(**options), 10, teacher=taught),
            validation=EvaluationBatches(ArrayImages(data.images[:7], data.labels[:7]), 10, batch_size=3),
            on_step=lambda step, steps, loss: losses.append(loss),
            on_epoch=on_epoch,
            state_path=state_path,
        )
    return model, {"losses": np.array(losses), **{name: np.array(value) for name, value in history.items()}}, states[-1]


def found(model, curves, state: TrainingState | None) -> dict[str, np.ndarray]:
    """All that a training leaves, in one dictionary."""
    arrays = {f"curves/{name}": values for name, values in curves.items()}
    arrays |= {f"model/{key}": value.numpy() for key, value in model.state_dict().items()}
    if state is not None:
        for group in ("weights", "first_moments", "second_moments", "averages"):
            arrays |= {f"{group}/{key}": value for key, value in getattr(state, group).items()}
    return arrays


def main(folder, *cases):
    torch.set_num_threads(1)
    with joined("ddp"):
        for number, case in enumerate(cases):
            try:
                arrays = found(*train(**json.loads(case)))
            except ValueError as error:
                arrays = {"error": np.array(str(error))}
            np.savez(Path(folder) / f"{number}-{torch.distributed.get_rank()}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
