"""One small computation by hand, on one device or on replicas, with all that replicas do together.

    keras_layers.py FILE

writes FILE.npz with what two parts of the CPU come to, which share five samples as three and two.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

from tfmodels.distributed import joined
from tfmodels.layers import BatchNormalization, Dense, Dropout, DropPath
from tfmodels.optimizers import AdamW
from tfmodels.replicas import batches_of_shares, replica_id, sum_over_replicas

PARTS, SAMPLES = 4, 5


def compute(sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Takes two steps of two parts each, on as many replicas as there are shares; returns all that came of it."""
    strategy = tf.distribute.get_strategy()
    with strategy.scope():
        keras.utils.set_random_seed(0)
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("float64")
        norm, dense, drop, path = BatchNormalization(3, 1e-5), Dense(3, 2), Dropout(0.4), DropPath(0.5)
        keras.config.set_dtype_policy(policy)
        dense.kernel.assign(np.random.default_rng(1).standard_normal((3, 2)))
        variables = [*norm.trainable_variables, *dense.trainable_variables]
        optimizer = AdamW(
            2.0**-3,
            global_clipnorm=0.25,
            use_ema=True,
            ema_momentum=0.5,
            gradient_accumulation_steps=2,
            epsilon=1e-4,
        )
        optimizer.build(variables)
    ends = [0, *np.cumsum(sizes)]

    @tf.function
    def step(images):
        def on_replica():
            rank = replica_id()
            own = images[tf.gather(tf.constant(ends), rank) : tf.gather(tf.constant(ends), rank + 1)]
            with tf.GradientTape() as tape:
                tape.watch(own)
                kept = path(drop(norm(own, training=True), training=True), training=True)
                logits = dense(keras.ops.mean(kept, axis=(1, 2)))
                loss = keras.ops.sum(keras.ops.square(logits - 1.0)) / SAMPLES
            *gradients, of_images = tape.gradient(loss, [*(variable.value for variable in variables), own])
            optimizer.apply(gradients, variables)
            places = [tf.gather(tf.constant(ends), rank), SAMPLES - tf.gather(tf.constant(ends), rank + 1)]
            return sum_over_replicas([tf.pad(values, [places, *[[0, 0]] * 3]) for values in (kept, of_images)])

        return [strategy.experimental_local_results(value)[0] for value in strategy.run(on_replica)]

    found = {}
    images = np.random.default_rng(0).standard_normal((PARTS, SAMPLES, 4, 4, 3)) * 2 + 3
    with batches_of_shares(sizes):
        for number in range(PARTS):
            outputs, gradients = step(tf.constant(images[number]))
            found |= {f"outputs {number}": outputs.numpy(), f"gradients of images {number}": gradients.numpy()}
    for kind, kept in {
        "weights": [*norm.variables, *dense.variables],
        "first moments": optimizer._momentums,
        "second moments": optimizer._velocities,
        "averages": optimizer._model_variables_moving_average,
    }.items():
        for number, variable in enumerate(kept):
            for replica, value in enumerate(strategy.experimental_local_results(variable.value)):
                found[f"{kind} {number}, replica {replica}"] = value.numpy()
    return found


def main(file):
    keras.config.set_floatx("float64")
    with joined("mirrored", replicas=2):
        np.savez(file, **compute((3, 2)))


if __name__ == "__main__":
    main(sys.argv[1])
