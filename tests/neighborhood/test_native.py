"""The C++ kernels on NumPy arrays: their definition, on every instruction set; bad input; threads and forks."""

import concurrent.futures
import ctypes
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from definition import BOUND, assert_close, attention_and_gradients, draw, precision
from hypothesis import given, settings
from hypothesis import strategies as st

from neighborhood import native, reference

DTYPES = native.DTYPES


def available_instruction_sets() -> list[str]:
    found, best = [], native.instruction_set()
    for name in ("avx512", "avx2", "baseline"):
        try:
            native.set_instruction_set(name)
            found.append(name)
        except ValueError:
            pass
    native.set_instruction_set(best)
    return found


@pytest.fixture(params=available_instruction_sets())
def instruction_set(request):
    best = native.instruction_set()
    native.set_instruction_set(request.param)
    yield request.param
    native.set_instruction_set(best)


def run(query, key, value, grad_output, table, kernel_size, dilation, scale=None, threads=1):
    """The output and all gradients, by the kernels."""
    output, logsumexp = np.full_like(query, np.nan), np.full(query.shape[:-1], np.nan)
    options = (table, kernel_size, dilation, scale)
    native.forward(query, key, value, *options, output=output, logsumexp=logsumexp, threads=threads)
    grads = [np.full_like(x, np.nan) for x in (query, key, value)]
    grad_table = None if table is None else np.full_like(table, np.nan)
    native.backward(
        *(query, key, value, *options, logsumexp, grad_output),
        **dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True)),
        grad_rel_pos_bias=grad_table,
        threads=threads,
    )
    return [output, *grads, *([] if table is None else [grad_table])]


def check(shape, kernel_size, dilation, biased, dtype, seed=0, scale=None, threads=1, distribution="normal"):
    arrays = draw(seed, shape, kernel_size, biased, dtype, distribution)
    expected = attention_and_gradients(*arrays, kernel_size, dilation, scale)
    assert_close(run(*arrays, kernel_size, dilation, scale, threads), expected, BOUND[dtype])


@st.composite
def problems(draw):
    """Shape, kernel size and dilation of one to three axes that fit."""
    sizes, axes = [], draw(st.integers(1, 3))
    for axis in range(axes):
        kernel_size, dilation = draw(st.integers(1, 9 if axes < 3 else 4)), draw(st.integers(1, 3))
        most = 40 if axis == 1 else 12 if axes < 3 else 6
        sizes.append((kernel_size * dilation + draw(st.integers(0, most)), kernel_size, dilation))
    spatial, kernel_size, dilation = zip(*sizes, strict=True)
    heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    return (draw(st.integers(1, 2)), *spatial, heads, head_dim), kernel_size, dilation


@settings(max_examples=40)
@given(problem=problems(), biased=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_kernels_equal_the_definition(problem, biased, dtype, seed):
    check(*problem, biased, precision(problem, dtype), seed, threads=1 + seed % 3, distribution="uniform")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "kernel_size", "dilation"),
    [
        ((1, 13, 37, 2, 32), (7, 7), (1, 1)),  # tiles inside and at both borders
        ((1, 7, 7, 3, 32), (7, 7), (1, 1)),  # the window is the map
        ((2, 16, 17, 1, 24), (4, 6), (3, 2)),  # even windows, groups of unequal length
        ((1, 14, 33, 1, 64), (13, 13), (1, 2)),
        ((1, 61, 8, 1, 16), (5, 3), (1, 2)),  # several bands of the backward
        ((1, 5, 70, 1, 5), (1, 2), (2, 1)),
        ((1, 6, 5, 1, 129), (3, 5), (2, 1)),
        ((3, 50, 2, 8), (9,), (4,)),
        ((1, 4, 4, 1, 1), (1, 1), (4, 1)),
        ((2, 15, 14, 2, 32), (7, 7), (2, 2)),  # the window is the map of some dilation groups
        ((1, 13, 13, 1, 40), (13, 13), (1, 1)),
        ((1, 9, 400, 1, 32), (7, 13), (1, 1)),  # several strips
        ((1, 4, 620, 1, 20), (3, 21), (1, 2)),
        ((2, 5, 6, 19, 2, 16), (3, 4, 5), (1, 1, 1)),
        ((1, 7, 6, 9, 2, 20), (3, 3, 3), (2, 1, 3)),
        ((2, 3, 4, 5, 2, 9), (3, 4, 5), (1, 1, 1)),
        ((1, 30, 4, 5, 1, 16), (3, 4, 2), (1, 1, 1)),  # several bands of planes
        ((1, 10, 200, 5, 20), (3, 5), (1, 1)),  # heads in step, and one more; several strips
    ],
)
def test_every_instruction_set_equals_the_definition(instruction_set, shape, kernel_size, dilation, dtype):
    for biased in (False, True):
        check(shape, kernel_size, dilation, biased, dtype, scale=0.3 if biased else None, threads=2)


def test_the_bias_gradient_of_many_lanes_at_borders_rounds_little(instruction_set):
    kernel_size, dilation = (3, 31), (1, 2)
    arrays = draw(0, (1, 9, 620, 1, 20), kernel_size, True, "float32")
    expected = attention_and_gradients(*arrays, kernel_size, dilation, 0.3)
    assert_close(run(*arrays, kernel_size, dilation, 0.3)[-1:], expected[-1:], BOUND["float32"], ("rel_pos_bias",))


def test_windows_longer_than_two_strips(instruction_set):
    for seed in range(2):  # working memory holds what the call before left
        check((1, 2, 97, 1, 600), (1, 70), (1, 1), True, "float64", seed)  # the last strip has one query


def test_a_large_window_works_too():
    check((1, 40, 45, 1, 3), (31, 40), (1, 1), True, "float64")


def test_large_logits_neither_overflow_nor_vanish():
    query, key, value, *_ = draw(0, (1, 8, 20, 1, 8), (3, 3), False)
    for factor in (1e4, 1e150):
        expected = reference.neighborhood_attention(factor * query, key, value, 3)
        assert_close([native.neighborhood_attention(factor * query, key, value, 3)], [expected], 1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "rel_pos_bias"])
def test_values_that_are_not_finite_stay_in_their_windows(instruction_set, where, bad):
    query, key, value, _, table = draw(1, (1, 9, 21, 1, 20), (3, 5), True)
    tensors = {"query": query, "key": key, "value": value, "rel_pos_bias": table}
    tensors[where][(0, 4, 10, 0, 3) if where != "rel_pos_bias" else (0, 1, 8)] = bad
    with np.errstate(invalid="ignore"):
        expected = reference.neighborhood_attention(**tensors, kernel_size=(3, 5))
        actual = native.neighborhood_attention(**tensors, kernel_size=(3, 5))
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    np.testing.assert_allclose(actual[np.isfinite(expected)], expected[np.isfinite(expected)], atol=1e-12)
    assert np.isfinite(expected).any()


@pytest.mark.parametrize("where", ["query", "key", "rel_pos_bias"])
def test_the_log_sum_exp_is_nan_where_a_logit_is(instruction_set, where):
    query, key, value, _, table = draw(1, (1, 9, 21, 1, 20), (3, 5), True)
    tensors = {"query": query, "key": key, "value": value, "rel_pos_bias": table}
    tensors[where][(0, 4, 10, 0, 3) if where != "rel_pos_bias" else (0, 1, 8)] = np.nan
    output, logsumexp = np.empty_like(query), np.empty(query.shape[:-1])
    native.forward(*tensors.values(), (3, 5), 1, None, output=output, logsumexp=logsumexp)
    np.testing.assert_array_equal(np.isnan(logsumexp), np.isnan(output).all(-1))
    assert np.isnan(logsumexp).any() and not np.isnan(logsumexp).all()


def test_an_empty_batch_is_no_error():
    arrays = draw(0, (0, 5, 6, 2, 4), (3, 3), True)
    output, *grads = run(*arrays, (3, 3), (1, 1))
    assert output.shape == (0, 5, 6, 2, 4) and grads[0].shape == (0, 5, 6, 2, 4)
    assert (grads[-1] == 0).all()


@pytest.mark.parametrize("shape", [(2, 50, 40, 3, 20), (1, 120, 110, 5, 32)])
def test_more_threads_give_the_same_bits(shape):
    arrays = draw(0, shape, (7, 5), True, "float32")
    expected = run(*arrays, (7, 5), (1, 2))
    for threads in (2, 3, 8):
        for ours, theirs in zip(run(*arrays, (7, 5), (1, 2), threads=threads), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_concurrent_calls_give_the_same_bits():
    problems = [(draw(seed, (1, 20 + seed, 33, 2, 16), (5, 5), True, "float32"), (5, 5), (1, 1)) for seed in range(4)]
    expected = [run(*arrays, *sizes, threads=2) for arrays, *sizes in problems]
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        futures = [(i % 4, executor.submit(run, *problems[i % 4][0], *problems[i % 4][1:], None, 2)) for i in range(64)]
        for i, future in futures:
            for ours, theirs in zip(future.result(), expected[i], strict=True):
                np.testing.assert_array_equal(ours, theirs)


def _run_in_child(arrays, queue):
    results = run(*arrays, (5, 5), (1, 1), threads=2)
    queue.put((results, len(os.listdir("/proc/self/task"))))


def test_a_fork_after_use_works():
    arrays = draw(0, (1, 30, 33, 2, 16), (5, 5), True, "float32")
    expected = run(*arrays, (5, 5), (1, 1), threads=2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_run_in_child, args=(arrays, queue))
    process.start()
    results, threads = queue.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
    assert threads >= 2  # the child has helpers of its own
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


def test_the_environment_sets_threads_and_instruction_set():
    code = "from neighborhood import native as n; print(n.get_threads(), n.instruction_set())"
    environment = {"NEIGHBORHOOD_THREADS": "3", "NEIGHBORHOOD_INSTRUCTION_SET": "baseline"}
    assert in_new_process(code, **environment).stdout.split() == ["3", "baseline"]
    assert in_new_process(code, NEIGHBORHOOD_THREADS="0").stdout.split()[0] == str(len(os.sched_getaffinity(0)))


def test_an_unknown_instruction_set_is_named():
    with pytest.raises(ValueError, match="the instruction set is 'sse9'; this machine has .*baseline"):
        native.set_instruction_set("sse9")
    code = "import numpy as np; from neighborhood import native as n; x = np.zeros((1, 3, 3, 1, 1));"
    process = in_new_process(code + "n.neighborhood_attention(x, x, x, 3)", NEIGHBORHOOD_INSTRUCTION_SET="sse9")
    assert process.returncode == 1 and "ValueError: the instruction set is 'sse9'" in process.stderr


def test_what_does_not_go_together_is_named():
    x = np.zeros((1, 5, 6, 2, 4))
    call = native.neighborhood_attention
    with pytest.raises(ValueError, match="key has shape .* it must have"):
        call(x, x[:, :4], x, 3)
    with pytest.raises(ValueError, match="value has shape .* dtype float32"):
        call(x, x, x.astype(np.float32), 3)
    with pytest.raises(ValueError, match="query is int32; the kernels take float32, float64, float16, bfloat16"):
        call(*[x.astype(np.int32)] * 3, 3)
    with pytest.raises(ValueError, match="one to three spatial axes"):
        call(*[np.zeros((1, 3, 3, 3, 3, 1, 1))] * 3, 3)
    with pytest.raises(ValueError, match="kernel_size is .*or 2 of them"):
        call(x, x, x, [3] * 9)
    with pytest.raises(ValueError, match="kernel_size 3 times dilation 2 is 6, more than the 5 positions"):
        call(x, x, x, 3, 2)
    with pytest.raises(ValueError, match=r"rel_pos_bias has shape \(2, 3, 3\)"):
        call(x, x, x, 3, rel_pos_bias=np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="output is not contiguous"):
        native.forward(x, x, x, None, 3, 1, None, output=np.zeros((1, 5, 6, 4, 2)).swapaxes(-1, -2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 5, 5, 5, 1, 4, 2, 0, 3, 1, 1, 1), "kernel_size is 0 along the height"),
        ((1, 5, 5, 5, 1, 4, 2, 3, -3, 1, 1, 1), "kernel_size is -3 along the width"),
        ((1, 5, 5, 5, 1, 4, 7, 3, 3, 1, 1, 1), "more than the 5 positions of the depth"),
        ((1, 5, 5, 5, 1, 4, 2, 3, 3, 1, 1, 0), "dilation is 0 along the width"),
        ((1, 5, 5, 5, 1, 4, 2, 3, 3, 1, 1, 2**62), "more than the 5 positions of the width"),
        ((-1, 5, 5, 5, 1, 4, 2, 3, 3, 1, 1, 1), "a size is negative"),
        ((2**40, 1, 2**40, 5, 1, 4, 1, 3, 3, 1, 1, 1), "too many elements"),
        ((1, 2**12, 2**12, 2**12, 0, 1, 2**12, 2**12, 2**12, 1, 1, 1), "the window is too large"),
        ((1, 1, 1, 2**21, 0, 1, 1, 1, 2**21, 1, 1, 1), "the window is too large"),
        ((1, 1, 5, 5, 2, 4, 1, 3, 3, 1, 1, 1, 7), "token_stride is 7; with 2 heads of 4 channels it must be 8 or more"),
        ((1, 1, 5, 5, 1, 4, 1, 3, 3, 1, 1, 1, -1), "token_stride is -1"),
        ((1, 1, 5, 5, 1, 4, 1, 3, 3, 1, 1, 1, 2**43), "too many elements between the first token and the last"),
        ((1, 1, 5, 5, 1, 4, 1, 3, 3, 1, 1, 1), "a tensor that is needed is null"),
    ],
)
def test_the_library_itself_refuses_bad_sizes(sizes, message):
    shape = native._Shape(*sizes)
    problem = native.load().neighborhood_forward(0, ctypes.byref(shape), *[None] * 6, 1.0, 1, None)
    assert message in problem.decode()
    problem = native.load().neighborhood_backward(0, ctypes.byref(shape), *[None] * 10, 1.0, 1, None)
    assert message in problem.decode()


def test_the_library_itself_refuses_other_types():
    shape = native._Shape(1, 1, 5, 5, 1, 4, 1, 3, 3, 1, 1, 1)
    for number in (-1, 4, 2**31 - 1):
        problem = native.load().neighborhood_forward(number, ctypes.byref(shape), *[None] * 6, 1.0, 1, None)
        assert problem.decode() == f"the type is {number}; it must be 0 to 3"


def test_memory_that_cannot_be_had_is_an_error():
    side = 2**15  # a window of 2^30 keys, for three rows of queries at once
    shape = native._Shape(2**8, 1, side, side, 2**7, 1, 1, side, side, 1, 1, 1)
    somewhere = ctypes.create_string_buffer(8)  # is not read: the memory comes first
    pointers = [ctypes.cast(somewhere, ctypes.c_void_p)] * 10
    forward, backward = native.load().neighborhood_forward, native.load().neighborhood_backward
    problem = forward(0, ctypes.byref(shape), *pointers[:3], None, *pointers[:2], 1.0, 1, None)
    assert problem.decode().startswith("out of memory")
    problem = backward(0, ctypes.byref(shape), *pointers[:3], None, *pointers[:6], 1.0, 1, None)
    assert problem.decode().startswith("out of memory")


def test_a_library_that_was_not_built_is_named(monkeypatch, tmp_path):
    native.load.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libneighborhood.so")
    try:
        assert "was not built, for lack of a C++ compiler" in native.why_unavailable()
        (tmp_path / "libneighborhood.so").write_bytes(b"no library")
        assert "cannot be loaded" in native.why_unavailable()
        with pytest.raises(native.NativeUnavailableError):
            native.neighborhood_attention(*[np.zeros((1, 3, 3, 1, 1))] * 3, 3)
    finally:
        native.load.cache_clear()
