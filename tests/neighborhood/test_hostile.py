"""Arguments of all kinds, through NumPy and both halves: a result of the right shape, or an error of Python's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import HALVES

from neighborhood import native

DTYPES = ("float32", "float64", "float16", "int32", "bool", "complex64", "uint16", "<U3")
small = st.integers(-2, 9)
numbers = st.one_of(
    small,
    st.sampled_from([2**31, -(2**63), 2**64, 10**30, 2.5, float("nan"), float("inf"), True, None, "3", b"3", [], {}]),
    st.lists(small, max_size=4),
    st.tuples(small, small),
)
shapes = st.one_of(st.lists(st.integers(0, 9), max_size=7), st.just([1, 6, 7, 2, 4]), st.just([2, 5, 2, 3]))


@st.composite
def calls(draw):
    """Three arrays, a table or none, a kernel size, a dilation and a scale; half of the time the arrays are alike."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
    arrays = []
    for _ in range(3):
        if draw(st.integers(0, 5)) == 0:
            dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
        arrays.append(np.ones(shape).astype(dtype))
    table = np.ones(draw(shapes)) if draw(st.integers(0, 3)) == 0 else None
    if draw(st.booleans()):
        arrays = [np.ones((1, 6, 7, 2, 4), np.float32)] * 3
    return arrays, table, draw(numbers), draw(st.one_of(st.just(1), numbers)), draw(st.one_of(st.none(), numbers))


@settings(max_examples=400)
@given(call=calls())
def test_the_kernels_take_it_or_say_why_not(call):
    arrays, table, kernel_size, dilation, scale = call
    try:
        output = native.neighborhood_attention(*arrays, kernel_size, dilation, rel_pos_bias=table, scale=scale)
    except (ValueError, TypeError, MemoryError, native.ctypes.ArgumentError) as error:
        assert str(error)
    else:
        assert output.shape == arrays[0].shape and output.dtype == arrays[0].dtype


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
@settings(max_examples=100)
@given(call=calls())
def test_both_halves_take_it_or_say_why_not(half, call):
    arrays, table, kernel_size, dilation, scale = call
    try:
        output = half.operation(*arrays, kernel_size, dilation, table=table, scale=scale, implementation="native")
    except Exception as error:
        assert str(error) and not isinstance(error, (AttributeError, AssertionError, IndexError, KeyError)), repr(error)
    else:
        assert output.shape == arrays[0].shape
