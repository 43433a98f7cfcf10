"""Neighborhood attention and its gradients by their definition, for tests to compare with."""

import numpy as np

from neighborhood.windows import bias_positions, key_positions

# The largest error allowed, as a part of the rms; types of 16 bits are computed in float32, and then rounded.
BOUND = {"float64": 1e-12, "float32": 5e-6, "float16": 5e-6, "bfloat16": 5e-6}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # a part of the number itself


def draw(seed, shape, kernel_size, biased, dtype="float64", distribution="normal"):
    """Returns query, key, value, the gradient of the output (all of `shape`) and the bias or None.

    Of unit variance, "normal" or "uniform". Among many normal problems are some with an element over ten times the rms,
    where any float32 arithmetic is off by more than BOUND; uniform ones have none.
    """
    generator = np.random.default_rng(seed)
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401 - names it to NumPy
    if distribution == "uniform":
        tensors = generator.uniform(-(3**0.5), 3**0.5, (4, *shape)).astype(dtype)
    else:
        tensors = generator.standard_normal((4, *shape)).astype(dtype)
    table = generator.standard_normal((shape[-2], *(2 * k - 1 for k in kernel_size))).astype(dtype)
    return *tensors, table if biased else None


def attention_and_gradients(query, key, value, grad_output, table, kernel_size, dilation, scale=None):
    """Returns the output and the gradients of query, key, value and, with a bias, of it; all in float64."""
    spatial, (heads, head_dim) = query.shape[1:-2], query.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    keys = _flat(key_positions, spatial, kernel_size, dilation, spatial)  # (tokens, keys)
    entries = _flat(bias_positions, spatial, kernel_size, dilation, [2 * k - 1 for k in kernel_size])
    flat = [x.astype(np.float64).reshape(x.shape[0], -1, heads, head_dim) for x in (query, key, value, grad_output)]
    query_, key_, value_, grad = flat
    logits = scale * np.einsum("bnhd,bnkhd->bnhk", query_, key_[:, keys])
    if table is not None:
        logits += np.moveaxis(table.astype(np.float64).reshape(heads, -1)[:, entries], 0, 1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    output = np.einsum("bnhk,bnkhd->bnhd", weights, value_[:, keys])
    slopes = np.einsum("bnhd,bnkhd->bnhk", grad, value_[:, keys])
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True))
    grad_key, grad_value = np.zeros_like(key_), np.zeros_like(value_)
    for b in range(len(query_)):
        np.add.at(grad_key[b], keys, scale * np.einsum("nhk,nhd->nkhd", slopes[b], query_[b]))
        np.add.at(grad_value[b], keys, np.einsum("nhk,nhd->nkhd", weights[b], grad[b]))
    grad_query = scale * np.einsum("bnhk,bnkhd->bnhd", slopes, key_[:, keys])
    results = [x.reshape(query.shape) for x in (output, grad_query, grad_key, grad_value)]
    if table is not None:
        grad_table = np.zeros((heads, table[0].size))
        for head in range(heads):
            np.add.at(grad_table[head], entries, slopes[:, :, head].sum(0))
        results.append(grad_table.reshape(table.shape))
    return results


def _flat(positions, spatial, kernel_size, dilation, sizes):
    """(tokens, keys) indices into a flattened array of `sizes`."""
    per_axis = [positions(*axis) for axis in zip(spatial, kernel_size, dilation, strict=True)]
    axes = len(spatial)
    grids = []
    for axis, index in enumerate(per_axis):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = index.shape
        grids.append(index.reshape(shape))
    flat = np.ravel_multi_index(np.broadcast_arrays(*grids), tuple(sizes))
    return flat.reshape(int(np.prod(spatial)), -1)


def precision(problem, dtype: str) -> str:
    """Returns the dtype to run a drawn problem in.

    Of a few elements all may cancel, and their rms be far below what was rounded: these are float64's.
    """
    return dtype if np.prod(problem[0]) >= 500 else "float64"


def assert_close(actual, expected, bound, names=("output", "query", "key", "value", "rel_pos_bias")):
    """Asserts that arrays differ by no more than `bound` of the rms of what is expected, beyond their rounding."""
    assert len(actual) == len(expected)
    for name, ours, theirs in zip(names, actual, expected, strict=False):
        rms = np.sqrt(np.mean(np.square(theirs))) or 1.0
        rounding = ROUNDING.get(ours.dtype.name, 0.0) * np.abs(theirs)
        error = (np.abs(np.asarray(ours, np.float64) - theirs) - rounding).max() / rms
        assert error <= bound, f"{name} is off by {error:.1e} of its rms; the bound is {bound:.0e}"
