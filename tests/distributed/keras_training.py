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
import small_training
import tensorflow as tf
from small_training import random_images, small_config

import tfmodels.auto
import tfmodels.training
from modelspec.checkpoints import probing_weights
from modelspec.training import ArrayImages
from neighborhood.choice import prefer
from tfmodels.distributed import joined
from tfmodels.weights import read_weights


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


def train(family, *, config=None, count=43, die=None, **options) -> dict[str, np.ndarray]:
    """Trains a small model, float64, in whatever strategy this is called; returns all that is left.

    Args:
        family, config: of the model.
        count: of images.
        die: (worker, images): the worker is killed when it has read so many images.
        options: of `small_training.train`.
    """
    made = small_config(family, **(config or {}))
    model = tfmodels.auto.model_class(family).from_weights(made, probing_weights(made), dtype="float64")
    data = random_images(count)
    if die is not None and die[0] == worker():
        data = KillingImages(data.images, data.labels, die[1])
    curves, state = small_training.train(tfmodels.training.fine_tune, model, data, **options)
    return small_training.all_arrays(read_weights(model), curves, state)


def fit_by_hand(family, optimizer, batch_size=8, **config):
    """What users write themselves: the model's own loss, `compile` and `fit`; returns the losses and the weights."""
    keras.utils.set_random_seed(0)  # each layer that drops draws a seed of its own
    made = small_config(family, **config)
    model = tfmodels.auto.model_class(family).from_weights(made, probing_weights(made), dtype="float64")
    data = random_images(24)
    model.compile(keras.optimizers.get(optimizer), metrics=["accuracy"])
    pairs = tf.data.Dataset.from_tensor_slices((data.images, data.labels)).batch(batch_size, drop_remainder=True)
    history = model.fit(pairs, epochs=2, shuffle=False, verbose=0).history
    return small_training.all_arrays(read_weights(model), history, None)


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
                    arrays = fit_by_hand(**case) if "optimizer" in case else train(**case)
            except ValueError as error:
                arrays = {"error": np.array(str(error))}
            np.savez(Path(folder) / f"{number}-{worker()}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
