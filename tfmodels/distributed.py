"""One training on several devices or machines, on TensorFlow's engines: mirrored replicas, in one process or several.

A batch is cut into shares, one per replica, and everything else is as in one process: losses, gradients and batch
normalization are of the whole batch, samples lose what they would lose there, the state is written once.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from modelspec.training import BatchShare, TrainingBatches
from tfmodels.replicas import share_of_batch

STRATEGIES = ("mirrored", "multiworker")


class ProcessLostError(ConnectionError):
    """Another process of the training has died, or does not answer."""


@contextlib.contextmanager
def joined(strategy: str | None, *, replicas: int | None = None) -> Iterator[None]:
    """Inside, models are made for a strategy, and trained by it.

    Several workers have to enter before TensorFlow computes anything, and make the same models in the same order.

    Args:
        strategy: `"mirrored"`: the devices of this process; `"multiworker"`: the processes that the environment
            variable `TF_CONFIG` lists, with all the devices of each; None: nothing is done.
        replicas: of `"mirrored"`: how many devices; all GPUs by default. Where there is none, the CPU is parted.

    Raises:
        ValueError: a bad name or number, or `TF_CONFIG` is missing or wrong.
        ProcessLostError: inside, another process was lost.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; allowed are {', '.join(STRATEGIES)}")
    if strategy is None:
        yield
        return
    if replicas is not None and strategy != "mirrored":
        raise ValueError(f"replicas is {replicas}; it is an option of mirrored, not of {strategy}")
    made = _mirrored(replicas) if strategy == "mirrored" else _multi_worker()
    with losses_told(), made.scope():
        yield


@contextlib.contextmanager
def losses_told() -> Iterator[None]:
    """Turns what TensorFlow raises when a process is lost into a `ProcessLostError`."""
    try:
        yield
    except tf.errors.OpError as error:
        lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
        if isinstance(error, lost) or "collective" in error.message.lower():
            reason = next((line for line in error.message.splitlines() if "task:" in line or "onnect" in line), "")
            raise ProcessLostError(
                f"another process of this training has died or does not answer ({reason.strip()}); "
                "the state after the last finished epoch is kept: start again to go on from there"
            ) from error
        raise


def _mirrored(replicas: int | None) -> tf.distribute.Strategy:
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
    workers, index = _listed_workers()
    for address in workers:
        host, _, port = str(address).rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"TF_CONFIG lists {address!r}; give the HOST:PORT of each process")
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": workers}),
        task_type="worker",
        task_id=index,
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
        rpc_layer="grpc",
    )
    return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)


def _listed_workers() -> tuple[list[str], int]:
    """Returns the addresses of `TF_CONFIG` and which of them this process is; a chief comes first."""
    example = '{"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, "task": {"type": "worker", "index": 0}}'
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        raise ValueError(f"multiworker needs the environment variable TF_CONFIG in each process, such as {example}")
    try:
        found = json.loads(text)
        cluster = {"chief": [], "worker": [], **found["cluster"]}
        kind, index = found["task"]["type"], int(found["task"]["index"])
        workers = [*cluster["chief"], *cluster["worker"]]
        before = 0 if kind == "chief" else len(cluster["chief"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"TF_CONFIG is {text}; give it like {example}") from error
    if kind not in ("chief", "worker") or not 0 <= index < len(cluster[kind]):
        raise ValueError(f"TF_CONFIG says that this is {kind} {index}; there is no such one in its cluster")
    return workers, before + index


def is_first() -> bool:
    """Whether this process is the one that writes: the first, or the only one."""
    strategy = tf.distribute.get_strategy()
    if not is_multi_worker(strategy):
        return True
    resolver = strategy.cluster_resolver
    chief = "chief" if "chief" in resolver.cluster_spec().jobs else "worker"
    return resolver.task_type == chief and resolver.task_id == 0


def share_value(value: Any) -> Any:
    """Returns the first process's value, which JSON can hold, in all processes of this strategy.

    Processes that come early wait, however long it takes.
    """
    strategy = tf.distribute.get_strategy()
    if not is_multi_worker(strategy):
        return value
    sent = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8).astype(np.int32)
    (size,) = _summed(strategy, np.array([len(sent)], np.int32))
    received = _summed(strategy, sent if is_first() else np.zeros(size, np.int32))
    return json.loads(received.astype(np.uint8).tobytes())


def _summed(strategy: tf.distribute.Strategy, array: np.ndarray) -> np.ndarray:
    """Returns the sum of arrays over all processes."""
    first, *others = _local_replicas(strategy)
    values = _values(strategy, {first: array, **{rank: np.zeros_like(array) for rank in others}})
    return strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None).numpy()


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy trains in the processes of a cluster, be there one or several."""
    cluster = strategy.cluster_resolver
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and bool(cluster.cluster_spec().jobs)


def shares_of_replicas(batches: TrainingBatches, strategy: tf.distribute.Strategy) -> tuple[int, ...]:
    """Returns how many samples each replica has of a part of a batch.

    Raises:
        ValueError: there are more replicas than samples.
    """
    replicas, recipe = strategy.num_replicas_in_sync, batches.recipe
    if batches.part_size < replicas:
        raise ValueError(
            f"parts of {batches.part_size} images cannot be shared by {replicas} replicas; give fewer replicas, "
            f"larger batches (Recipe.batch_size is {recipe.batch_size}) or fewer parts "
            f"(accumulation_steps is {recipe.accumulation_steps})"
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
    names: list[str] = []

    def step_of_replica(*data):
        metrics = model.train_step(data)
        names[:] = metrics
        return tf.stack([tf.cast(value, "float64") for value in metrics.values()]) * share_of_batch("float64")

    def step(*data):
        values = strategy.run(step_of_replica, args=data)
        return strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None)

    step = step if model.run_eagerly else tf.function(step, jit_compile=model.jit_compile)
    told = keras.callbacks.CallbackList(callbacks, model=model, epochs=epochs.stop, steps=parts)
    told.on_train_begin()
    logs: dict[str, float] | None = None
    for epoch in epochs:
        model.reset_metrics()
        told.on_epoch_begin(epoch)
        for part, data in enumerate(_parts_ahead(strategy, read, epoch, parts, sizes)):
            told.on_train_batch_begin(part)
            values = step(*data).numpy().tolist()
            logs = dict(zip(names, values, strict=True))
            told.on_train_batch_end(part, logs)
        told.on_epoch_end(epoch, logs)
    model.optimizer.finalize_variable_values(model.trainable_weights)
    told.on_train_end(logs)


def _parts_ahead(
    strategy: tf.distribute.Strategy, read: ReadPart, epoch: int, parts: int, sizes: Sequence[int]
) -> Iterator[list[Any]]:
    """Yields the parts of an epoch, as values of the replicas; while one is trained on, the next is read."""
    from concurrent.futures import ThreadPoolExecutor

    ranks = _local_replicas(strategy)

    def shares(part: int) -> dict[int, Part]:
        return {rank: read(epoch, part, BatchShare(tuple(sizes), rank)) for rank in ranks}

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(shares, 0)
        for part in range(parts):
            found = coming.result()
            if part + 1 < parts:
                coming = reader.submit(shares, part + 1)
            yield [_values(strategy, {rank: arrays[which] for rank, arrays in found.items()}) for which in range(2)]


def _local_replicas(strategy: tf.distribute.Strategy) -> list[int]:
    """Returns the numbers of the replicas of this process."""
    found: list[int] = []

    def note(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        found.append(context.replica_id_in_sync_group)
        return tf.constant(0)

    strategy.experimental_distribute_values_from_function(note)
    return found


def _values(strategy: tf.distribute.Strategy, arrays: Mapping[int, np.ndarray]) -> Any:
    """Returns arrays as a value of the replicas of this process, by their numbers."""
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(arrays[context.replica_id_in_sync_group])
    )


def evaluator(model: keras.Model, batches: Sequence[Part], label_smoothing: float) -> Callable[[], dict[str, float]]:
    """Returns a function that measures `loss` and `accuracy` of a model; replicas take turns with the batches.

    Args:
        model: whose strategy counts. All workers call the function at once.
        batches: pixel values and labels, as the model takes them; all are measured.
        label_smoothing: of the loss.
    """
    strategy = model.distribute_strategy
    replicas = strategy.num_replicas_in_sync

    def sums_of_replica(images, labels, counts):
        logits = tf.cast(model(images, training=False).logits, labels.dtype)
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
        total, last, ranks = np.zeros(3), len(batches) - 1, _local_replicas(strategy)
        for begin in range(0, len(batches), replicas):
            # where there is no batch left for a replica, it repeats one, which does not count
            found = {rank: batches[min(begin + rank, last)] for rank in ranks}
            data = [_values(strategy, {rank: arrays[which] for rank, arrays in found.items()}) for which in range(2)]
            counts = _values(strategy, {rank: np.asarray(begin + rank <= last, np.float64) for rank in ranks})
            total += sums(*data, counts).numpy()
        return {"loss": float(total[0] / total[2]), "accuracy": float(total[1] / total[2])}

    return measure
