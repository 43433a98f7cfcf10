"""What the replicas of a model do together under a distribution strategy: sums, statistics, and what is drawn.

Each replica computes its share of a batch. Whatever depends on the whole batch comes from here, so that replicas
together compute what one process would.
"""

import contextlib
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf
from keras import ops

from modelspec.training import BatchShare

# Not local to a thread: strategies trace each replica in a thread of its own.
_shares: list[tuple[int, ...]] = []


def num_replicas() -> int:
    """Returns how many replicas compute at once where this is called: 1 without a strategy, and outside its `run`."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def replica_id():
    """Returns the number of this replica, from 0: an integer, or a tensor of one."""
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def sum_over_replicas(values: Sequence) -> list:
    """Returns the sums over all replicas of tensors; gradients flow through them, to all replicas."""
    values = list(values)
    if num_replicas() == 1 or not values:
        return values
    return list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values))


def moments_of_all_replicas(x, axes: tuple[int, ...]):
    """Returns the mean, the biased variance, and the number of elements behind each of them, over all replicas.

    Args:
        x: (B, ..., features), the share of this replica; shares may differ in B.
        axes: what is averaged over.

    Returns:
        Mean and variance, of the shape of `x` without `axes`, and a scalar of the same dtype.
    """
    elements = ops.cast(ops.prod(ops.stack([ops.shape(x)[axis] for axis in axes])), x.dtype)
    total, count = sum_over_replicas([ops.sum(x, axis=axes), elements])
    mean = total / count
    # not from the sum of squares, which loses digits where the mean is large
    (squared,) = sum_over_replicas([ops.sum(ops.square(x - mean), axis=axes)])
    return mean, squared / count, count


@contextlib.contextmanager
def batches_of_shares(sizes: Sequence[int]) -> Iterator[None]:
    """Says how many samples each replica has of a batch, for what is traced inside; without it they have as many.

    Args:
        sizes: of each replica, in their order.
    """
    _shares.append(tuple(sizes))
    try:
        yield
    finally:
        _shares.pop()


def share_of_batch(dtype):
    """Returns which part of the samples of a batch this replica has, as a scalar tensor."""
    if not _shares or tf.distribute.in_cross_replica_context():
        return ops.convert_to_tensor(1.0 / num_replicas(), dtype)
    parts = ops.convert_to_tensor([size / sum(_shares[-1]) for size in _shares[-1]], dtype)
    return tf.gather(parts, replica_id())


def draw_uniform(shape: Sequence, dtype: str, seed_generator: keras.random.SeedGenerator):
    """Draws from 0 to 1, for each sample what one process would draw for it.

    Args:
        shape: (B, ...) of this replica; sizes may be tensors.
        dtype: of what is drawn.
        seed_generator: in the same state on all replicas.
    """
    if num_replicas() == 1:
        return keras.random.uniform(shape, dtype=dtype, seed=seed_generator)
    count, *rest = shape
    begin = count * replica_id()
    if _shares:
        begins = [BatchShare(_shares[-1], rank).begin for rank in range(len(_shares[-1]))]
        begin = tf.gather(tf.constant(begins), replica_id())
    # what is drawn for a sample depends on the samples before it, and not on how many come after
    return keras.random.uniform((begin + count, *rest), dtype=dtype, seed=seed_generator)[begin:]
