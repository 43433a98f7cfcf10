"""One small training, the same in one process and on several replicas; as a program, what a strategy needs.

    keras_training.py FOLDER STRATEGY REPLICAS CASE...

makes the trainings whose arguments the cases are, in JSON, and writes FOLDER/NUMBER-WORKER.npz for each. STRATEGY is
`mirrored` on REPLICAS parts of the CPU, or `multiworker` in the processes of TF_CONFIG.
"""

import json
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tfmodels.auto
import tfmodels.training
from modelspec import DinatConfig, NatConfig, SwiftFormerConfig, ViTMSNConfig
from modelspec.checkpoints import probing_weights
from modelspec.training import ArrayImages, EvaluationBatches, Recipe, TrainingBatches, TrainingState
from neighborhood.choice import prefer
from tfmodels.distributed import joined
from tfmodels.weights import read_weights

WINDOWS = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 8, "kernel_size": 3, "num_labels": 10}
CONFIGS = {
    "swiftformer": lambda **given: SwiftFormerConfig(
        **{"depths": [1, 1], "embed_dims": [8, 12], "downsamples": [True, True], "num_labels": 10, **given}
    ),
    "dinat": lambda **given: DinatConfig(
        **{**WINDOWS, "dilations": [[2], [1]], "layer_scale_init_value": 0.5, "drop_path_rate": 0.0, **given}
    ),
    "nat": lambda **given: NatConfig(**{**WINDOWS, "drop_path_rate": 0.0, **given}),
    "vit_msn": lambda **given: ViTMSNConfig(
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
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


class KillingImages(ArrayImages):
    """Images of which one ends the process that reads it, without a word."""

    def __init__(self, images, labels, reads):
        super().__init__(images, labels)
        self.reads = reads

    def image(self, index):
        self.reads -= 1
        if self.reads < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(index)


def train(family, *, recipe=None, config=None, state_path=None, keep=None, count=43, teacher=None, die=None):
    """Trains a small model, float64, in whatever strategy this is called.

    Args:
        family, config: of the model.
        recipe: what differs from `RECIPE`.
        state_path: what to go on from, and where the state is written.
        keep: (epoch, path): the state after the epoch is copied to the path.
        count: of images.
        teacher: what it says of every image.
        die: (worker, images): the worker is killed when it has read so many images.

    Returns:
        The model, the curves as arrays, and the last state, where there is one.
    """
    made = CONFIGS[family](**(config or {}))
    model = tfmodels.auto.model_class(family).from_weights(made, probing_weights(made), dtype="float64")
    draws = np.random.default_rng(0)
    data = ArrayImages(draws.standard_normal((count, 3, 32, 32)), draws.integers(0, 10, count))
    if die is not None and die[0] == worker():
        data = KillingImages(data.images, data.labels, die[1])
    taught = None if teacher is None else lambda pixel_values: np.eye(10)[np.full(len(pixel_values), teacher)]
    options = {**RECIPE, "distillation": teacher is not None, **(recipe or {})}
    losses, states = [], [None]

    def on_epoch(state):
        states.append(state)
        if keep is not None and state.epoch == keep[0]:
            state.save(keep[1])

    history = tfmodels.training.fine_tune(
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
    arrays |= {f"model/{key}": value for key, value in read_weights(model).items()}
    if state is not None:
        for group in ("weights", "first_moments", "second_moments", "averages"):
            arrays |= {f"{group}/{key}": value for key, value in getattr(state, group).items()}
    return arrays


def fit_by_hand(family, optimizer, batch_size=8, **config):
    """What users write themselves: the model's own loss, `compile` and `fit`; returns the losses and the weights."""
    keras.utils.set_random_seed(0)  # each layer that drops draws a seed of its own
    made = CONFIGS[family](**config)
    model = tfmodels.auto.model_class(family).from_weights(made, probing_weights(made), dtype="float64")
    draws = np.random.default_rng(0)
    images, labels = draws.standard_normal((24, 3, 32, 32)), draws.integers(0, 10, 24)
    model.compile(keras.optimizers.get(optimizer), metrics=["accuracy"])
    pairs = tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch_size, drop_remainder=True)
    history = model.fit(pairs, epochs=2, shuffle=False, verbose=0).history
    return {f"curves/{name}": np.array(values) for name, values in history.items()} | {
        f"model/{key}": value for key, value in read_weights(model).items()
    }


def worker() -> int:
    """Which process this is."""
    return json.loads(os.environ["TF_CONFIG"])["task"]["index"] if "TF_CONFIG" in os.environ else 0


def main(folder, strategy, replicas, *cases):
    tf.config.threading.set_intra_op_parallelism_threads(1)
    keras.config.set_floatx("float64")
    with joined(strategy, replicas=int(replicas) if strategy == "mirrored" else None):
        for number, case in enumerate(cases):
            case = json.loads(case)
            try:
                with prefer(case.pop("implementation", "auto")):
                    arrays = fit_by_hand(**case) if "optimizer" in case else found(*train(**case))
            except ValueError as error:
                arrays = {"error": np.array(str(error))}
            np.savez(Path(folder) / f"{number}-{worker()}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
