"""`ptmodels.ops` and `tfmodels.ops`: both halves, both implementations, against the definition."""

import concurrent.futures

import numpy as np
import pytest
from definition import BOUND, ROUNDING, assert_close, attention_and_gradients, draw, precision
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import HALVES

from neighborhood import choice, native, reference

IMPLEMENTATIONS = ("native", "composed")


@pytest.fixture(params=HALVES, ids=lambda half: half.name)
def half(request):
    return request.param


@st.composite
def problems(draw):
    """Shape, kernel size and dilation of one to three axes that fit."""
    axes = draw(st.integers(1, 3))
    sizes = []
    for _ in range(axes):
        kernel_size, dilation = draw(st.integers(1, 3 if axes == 3 else 7)), draw(st.integers(1, 3))
        sizes.append((kernel_size * dilation + draw(st.integers(0, 3 if axes == 3 else 12)), kernel_size, dilation))
    spatial, kernel_size, dilation = zip(*sizes, strict=True)
    return (draw(st.integers(1, 2)), *spatial, draw(st.integers(1, 2)), draw(st.integers(1, 9))), kernel_size, dilation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
@settings(max_examples=12)
@given(problem=problems(), biased=st.booleans(), dtype=st.sampled_from(["float32", "float64"]), seed=st.integers(0, 99))
def test_values_and_gradients_equal_the_definition(half, implementation, problem, biased, dtype, seed):
    shape, kernel_size, dilation = problem
    dtype = precision(problem, dtype)
    arrays = draw(seed, shape, kernel_size, biased, dtype, "uniform")
    actual = half.with_gradients(
        *arrays, kernel_size=kernel_size, dilation=dilation, scale=0.3, implementation=implementation
    )
    expected = attention_and_gradients(*arrays, kernel_size, dilation, 0.3)
    assert_close(actual, expected, BOUND[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "kernel_size", "dilation"),
    [
        ((2, 16, 19, 2, 32), (7, 7), (1, 1)),
        ((1, 17, 23, 2, 24), (7, 5), (2, 3)),
        ((1, 12, 13, 1, 8), (6, 4), (1, 2)),
        ((1, 30, 2, 16), (13,), (2,)),
    ],
)
def test_published_windows_in_both_precisions(half, implementation, shape, kernel_size, dilation, dtype):
    arrays = draw(0, shape, kernel_size, True, dtype)
    actual = half.with_gradients(*arrays, kernel_size=kernel_size, dilation=dilation, implementation=implementation)
    assert_close(actual, attention_and_gradients(*arrays, kernel_size, dilation), BOUND[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_need_not_be_contiguous(half, implementation):
    *arrays, _, table = draw(0, (2, 8, 9, 3, 5), (3, 5), True)
    expected = half.operation(*arrays, 3, table=None, implementation=implementation)
    swapped = [np.ascontiguousarray(x.transpose(0, 3, 2, 1, 4)).transpose(0, 3, 2, 1, 4) for x in arrays]
    assert not swapped[0].flags.c_contiguous
    np.testing.assert_array_equal(half.operation(*swapped, 3, table=None, implementation=implementation), expected)


def test_probabilities_are_returned_and_dropped(half):
    *arrays, _, table = draw(0, (2, 8, 9, 3, 5), (3, 5), True)
    output, probabilities = half.operation(*arrays, (3, 5), (2, 1), table=table, return_probabilities=True)
    expected = reference.attention_probabilities(*arrays[:2], (3, 5), (2, 1), rel_pos_bias=table)
    np.testing.assert_allclose(probabilities, expected, atol=1e-13)
    dropped = half.operation(*arrays, (3, 5), (2, 1), table=table, dropout=lambda x: 2.0 * x)
    np.testing.assert_allclose(dropped, 2.0 * output, atol=1e-13)
    reference_output = reference.neighborhood_attention(*arrays, (3, 5), (2, 1), rel_pos_bias=table)
    np.testing.assert_allclose(output, reference_output, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_of_16_bits_go_through_float32(half, implementation, dtype):
    arrays = draw(0, (1, 9, 23, 2, 8), (5, 5), True, dtype)
    actual = half.with_gradients(*arrays, kernel_size=5, dilation=1, implementation=implementation)
    assert {x.dtype.name for x in actual} == {dtype}
    expected = attention_and_gradients(*arrays, (5, 5), (1, 1))
    # composed operations round on the way too, probabilities and sums of products
    assert_close(actual, expected, BOUND[dtype] if implementation == "native" else 20 * ROUNDING[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_batch_is_no_error(half, implementation):
    arrays = draw(0, (0, 5, 6, 2, 4), (3, 3), True)
    output, *grads = half.with_gradients(*arrays, kernel_size=3, dilation=1, implementation=implementation)
    assert output.shape == (0, 5, 6, 2, 4)
    assert (grads[-1] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "rel_pos_bias"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_stays_in_its_windows(half, implementation, where, bad):
    query, key, value, _, table = draw(1, (1, 9, 31, 1, 20), (4, 5), True)
    tensors = {"query": query, "key": key, "value": value, "rel_pos_bias": table}
    tensors[where][(0, 4, 10, 0, 3) if where != "rel_pos_bias" else (0, 2, 8)] = bad
    with np.errstate(invalid="ignore"):
        expected = reference.neighborhood_attention(**tensors, kernel_size=(4, 5), dilation=(1, 3))
    actual = half.operation(query, key, value, (4, 5), (1, 3), table=table, implementation=implementation)
    assert not np.isfinite(expected).all() or where != "value"
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_concurrent_calls_give_the_same_bits(half):
    *arrays, _, table = draw(0, (2, 20, 22, 2, 16), (5, 5), True, "float32")
    expected = half.operation(*arrays, 5, table=table, implementation="native")
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        futures = [executor.submit(half.operation, *arrays, 5, table=table, implementation="native") for _ in range(32)]
        for future in futures:
            np.testing.assert_array_equal(future.result(), expected)


def test_what_does_not_go_together_is_named(half):
    x = np.zeros((1, 5, 6, 2, 4))
    for implementation in IMPLEMENTATIONS:
        options = {"implementation": implementation}
        with pytest.raises(ValueError, match="query has shape .* and key"):
            half.operation(x, x[:, :4], x, 3, **options)
        with pytest.raises(ValueError, match="query has shape .* and value"):
            half.operation(x, x, x[..., :2], 3, **options)
        with pytest.raises(ValueError, match="one to three spatial axes"):
            half.operation(x[0, 0], x[0, 0], x[0, 0], 3, **options)
        for bad in (0, -1, 2.5, [3] * 9, "3"):
            with pytest.raises(ValueError, match="kernel_size is .* give an integer of 1 or more, or 2 of them"):
                half.operation(x, x, x, bad, **options)
            with pytest.raises(ValueError, match="dilation is .* give an integer of 1 or more, or 2 of them"):
                half.operation(x, x, x, 3, bad, **options)
        with pytest.raises(ValueError, match="kernel_size 3 times dilation 2 is 6, more than the 5 positions"):
            half.operation(x, x, x, 3, 2, **options)
        with pytest.raises(ValueError, match=r"rel_pos_bias has shape \(2, 3, 3\); .* need \(2, 5, 5\)"):
            half.operation(x, x, x, 3, table=np.zeros((2, 3, 3)), **options)
        with pytest.raises(TypeError, match="query is .*float64 and key .*float32; they must be equal"):
            half.operation(x, x.astype(np.float32), x, 3, **options)
        with pytest.raises(TypeError, match="query is .*int64; give a floating dtype"):
            half.operation(*[x.astype(np.int64)] * 3, 3, **options)


def test_an_implementation_that_cannot_be_had_says_why(half):
    x = np.zeros((1, 5, 6, 2, 4))
    with pytest.raises(ValueError, match="implementation is 'fast'; it must be one of auto, native, composed"):
        half.operation(x, x, x, 3, implementation="fast")
    with pytest.raises(RuntimeError, match="cannot be had: the kernels keep no probabilities"):
        half.operation(x, x, x, 3, implementation="native", return_probabilities=True)


def test_without_kernels_auto_warns_once_and_native_raises(half, monkeypatch, tmp_path):
    from tfmodels import ops

    arrays = draw(0, (1, 5, 6, 2, 4), (3, 3), False)[:3]
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libneighborhood.so")
    caches = (native.load, ops.load, choice._warn_once)
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without its C.. kernels, many times slower: .* was not built"):
            output = half.operation(*arrays, 3)
        np.testing.assert_allclose(output, reference.neighborhood_attention(*arrays, 3), atol=1e-12)
        half.operation(*arrays, 3)  # a second warning would be an error
        with pytest.raises(RuntimeError, match="implementation='native' cannot be had: .* was not built"):
            half.operation(*arrays, 3, implementation="native")
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_preference_rules_auto(half):
    arrays = draw(0, (1, 9, 9, 2, 4), (3, 3), False, "float32")[:3]
    with choice.prefer("composed"):
        preferred = half.operation(*arrays, 3)
    np.testing.assert_array_equal(preferred, half.operation(*arrays, 3, implementation="composed"))
    assert not np.array_equal(preferred, half.operation(*arrays, 3))  # other roundings
    with pytest.raises(ValueError, match="implementation is 'quick'"), choice.prefer("quick"):
        pass
