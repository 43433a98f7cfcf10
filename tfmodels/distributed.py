"""One training on several devices or machines, on TensorFlow's engines: `MirroredStrategy`, `MultiWorkerMirroredStrategy`.

A batch is cut into shares, one per replica, and everything else is as in one process: losses, gradients and batch
normalization are of the whole batch, samples lose what they would lose there, the state is written once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from modelspec.training import BatchShare, TrainingBatches
from tfmodels.replicas import share_of_batch

STRATEGIES = ("mirrored", "multiworker")


class ProcessLostError(ConnectionError):
    """Another process of the training has died, or does not answer."""


def make_strategy(strategy: str, *, replicas: int | None = None) -> tf.distribute.Strategy:
    """Makes a strategy; several workers have to do so before TensorFlow computes anything.

    Args:
        strategy: `"mirrored"`: the devices of this process; `"multiworker"`: the processes that the environment
            variable `TF_CONFIG` lists, with all the devices of each.
        replicas: of `"mirrored"`: how many devices; all GPUs by default. Where there is none, the CPU is parted.

    Raises:
        ValueError: a bad name or number, or `TF_CONFIG` is missing or wrong.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; allowed are {', '.join(STRATEGIES)}")
    if strategy == "multiworker":
        return _multi_worker()
    gpus = tf.config.list_physical_devices("GPU")
    wanted = max(len(gpus), 1) if replicas is None else replicas
    if wanted < 1 or (gpus and wanted > len(gpus)):
        raise ValueError(f"replicas is {wanted}; allowed is from 1" + (f" to {len(gpus)}, the GPUs" if gpus else ""))
    if not gpus:
        cpu = tf.config.list_physical_devices("CPU")[0]
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted)
        except RuntimeError as error:
            if len(tf.config.list_logical_devices("CPU")) < wanted:
                raise ValueError(f"the CPU cannot be parted for {wanted} replicas any more: {error}") from error
    kind = "GPU" if gpus else "CPU"
    return tf.distribute.MirroredStrategy([f"{kind}:{number}" for number in range(wanted)])


def _multi_worker() -> tf.distribute.Strategy:
    return tf.distribute.MultiWorkerMirroredStrategy()


def is_first(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes: the chief, or the only one."""
    if not is_multi_worker(strategy):
        return True
    resolver = strategy.cluster_resolver
    if resolver.task_type == "chief":
        return True
    return resolver.task_type == "worker" and resolver.task_id == 0 and "chief" not in resolver.cluster_spec().jobs


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy trains in several processes, or could."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def shares_of_replicas(batches: TrainingBatches, strategy: tf.distribute.Strategy) -> tuple[int, ...]:
    """Returns how many samples each replica has of a part of a batch.

    Raises:
        ValueError: there are more replicas than samples.
    """
    replicas = strategy.num_replicas_in_sync
    if batches.part_size < replicas:
        raise ValueError(
            f"{replicas} replicas share batches of {batches.part_size} images; give each one image or more "
            f"(Recipe.batch_size is {batches.recipe.batch_size}, accumulation_steps {batches.recipe.accumulation_steps})"
        )
    return BatchShare.of(batches.part_size, replicas, 0).sizes


Part = tuple[np.ndarray, np.ndarray]
ReadPart = Callable[[int, int, BatchShare | None], Part]


def parts_of_replicas(
    strategy: tf.distribute.Strategy, read: ReadPart, epochs: range, parts: int, sizes: Sequence[int]
) -> Any:
    """Returns what `model.fit` takes under `MirroredStrategy`: the parts of all epochs, each cut into shares.

    Args:
        strategy: whose replicas lie in this process.
        read: gives pixel values and targets of (epoch, part), or of a share of it.
        epochs: that are still to do.
        parts: per epoch.
        sizes: samples of each replica.
    """
    images, targets = read(epochs.start, 0, None)
    signature = tuple(tf.TensorSpec((None, *array.shape[1:]), array.dtype) for array in (images, targets))
    ends = np.cumsum(sizes)[:-1]

    def generate():
        for epoch in epochs:
            for part in range(parts):
                yield from zip(*(np.split(array, ends) for array in read(epoch, part, None)), strict=True)

    return strategy.distribute_datasets_from_function(
        lambda context: tf.data.Dataset.from_generator(generate, output_signature=signature).prefetch(len(sizes))
    )


@contextlib.contextmanager
def uneven_shares_allowed(model: keras.Model) -> Iterator[None]:
    """Inside, `model.fit` takes shares that differ in size.

    To see the shapes of its data, `fit` adds the shares of a first batch up. A model and metrics that have all their
    variables need nothing of that.
    """
    model._maybe_symbolic_build = lambda iterator=None, data_batch=None: None
    try:
        yield
    finally:
        del model._maybe_symbolic_build


def fit_workers(
    model: keras.Model,
    read: ReadPart,
    epochs: range,
    parts: int,
    sizes: Sequence[int],
    callbacks: Sequence[keras.callbacks.Callback],
) -> None:
    """Does what `model.fit` does, under `MultiWorkerMirroredStrategy`, where Keras' own fails (as of 3.15).

    Metrics have to be means over samples. All workers call it at once.

    Args:
        model: compiled.
        read, parts, sizes: as of `parts_of_replicas`.
        epochs: to do.
        callbacks: are called as `fit` calls them, with the metrics over all workers.
    """
    strategy = model.distribute_strategy

    def step_of_replica(data):
        weight = share_of_batch("float64")
        metrics = model.train_step(data)
        return tf.stack([tf.cast(value, "float64") * weight for value in metrics.values()]), list(metrics)

    names: list[str] = []

    def step(data):
        def run(data):
            values, found = step_of_replica(data)
            names[:] = found
            return values

        return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(run, args=(data,)), axis=None)

    step = step if model.run_eagerly else tf.function(step, jit_compile=model.jit_compile)
    told = keras.callbacks.CallbackList(callbacks, model=model, epochs=epochs.stop, steps=parts)
    told.on_train_begin()
    for epoch in epochs:
        model.reset_metrics()
        told.on_epoch_begin(epoch)
        logs: dict[str, float] = {}
        for part in range(parts):
            told.on_train_batch_begin(part)
            values = step(_of_replicas(strategy, lambda rank: read(epoch, part, BatchShare(sizes, rank))))
            logs = dict(zip(names, values.numpy().tolist(), strict=True))
            told.on_train_batch_end(part, logs)
        told.on_epoch_end(epoch, logs)
    model.optimizer.finalize_variable_values(model.trainable_weights)
    told.on_train_end(logs if epochs else None)


def _of_replicas(strategy: tf.distribute.Strategy, read: Callable[[int], Part]) -> tuple[Any, Any]:
    """Returns pixel values and targets, each a value per replica of this process."""
    found: dict[int, Part] = {}

    def value(which: int) -> Any:
        def of(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
            rank = context.replica_id_in_sync_group
            if rank not in found:
                found[rank] = read(rank)
            return tf.constant(found[rank][which])

        return strategy.experimental_distribute_values_from_function(of)

    return value(0), value(1)


def evaluator(
    model: keras.Model, batches: Sequence[Part], label_smoothing: float
) -> Callable[[], dict[str, float]]:
    """Returns a function that measures `loss` and `accuracy` of a model; replicas take turns with the batches.

    Args:
        model: whose strategy counts. All workers call the function at once.
        batches: pixel values and labels, as the model takes them; all are measured.
        label_smoothing: of the loss.
    """
    strategy = model.distribute_strategy
    replicas = strategy.num_replicas_in_sync

    def sums_of_replica(images, labels, counts):
        logits = model(images, training=False).logits
        logits = tf.cast(logits, labels.dtype)
        losses = keras.losses.categorical_crossentropy(
            labels, logits, from_logits=True, label_smoothing=label_smoothing
        )
        right = tf.argmax(logits, -1) == tf.argmax(labels, -1)
        sums = [tf.reduce_sum(tf.cast(values, "float64")) for values in (losses, right, tf.ones_like(losses))]
        return tf.stack(sums) * counts

    @tf.function(reduce_retracing=True)
    def sums(images, labels, counts):
        values = strategy.run(sums_of_replica, args=(images, labels, counts))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None)

    def measure() -> dict[str, float]:
        total = np.zeros(3)
        for first in range(0, len(batches), replicas):
            # where there is no batch left for a replica, it repeats one, which does not count
            values = _of_replicas(strategy, lambda rank: batches[min(first + rank, len(batches) - 1)])
            counts = strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(
                    float(first + context.replica_id_in_sync_group < len(batches)), "float64"
                )
            )
            total += sums(*values, counts).numpy()
        return {"loss": float(total[0] / total[2]), "accuracy": float(total[1] / total[2])}

    return measure
