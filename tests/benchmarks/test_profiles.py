"""The profiles of whole models: self times, and that both halves' profilers name what runs."""

from collections import Counter

import pytest
import tensorflow as tf
import torch

from benchmarks import profiles

SECOND = 10**12  # in the profiler's picoseconds


def test_time_within_an_operation_is_that_of_the_inner_one():
    events = [
        (0, -10 * SECOND, "While"),
        (1 * SECOND, -4 * SECOND, "MatMul"),
        (2 * SECOND, -1 * SECOND, None),  # a function of C++ takes nothing from the operation that calls it
        (5 * SECOND, -2 * SECOND, "MatMul"),
        (10 * SECOND, -3 * SECOND, "Relu"),
    ]
    times = Counter()
    profiles._add_self_times(events, times)
    assert times == {"While": 4, "MatMul": 6, "Relu": 3}


@pytest.mark.parametrize(
    "name, operation",
    [
        ("nat/level_0/qkv/MatMul:_FusedMatMul", "FusedMatMul"),
        ("a/b:Softmax", "Softmax"),
        ("ExecutorState::Process", None),
        ("Softmax", None),
        ("", None),
    ],
)
def test_operations_are_told_from_functions(name, operation):
    assert profiles._operation(name) == operation


def test_both_profilers_name_the_product_as_what_takes_most():
    matrix = torch.rand(300, 300)
    assert profiles.profile_torch(lambda: torch.relu(matrix @ matrix)).most_common(1)[0][0] == "mm"
    function = tf.function(lambda x: tf.nn.relu(x @ x), autograph=False)
    array = tf.constant(matrix.numpy())
    function(array)
    times = profiles.profile_keras(lambda: function(array))
    assert "MatMul" in times.most_common(1)[0][0] and 0 < times.total() < 60


@pytest.mark.parametrize("half", profiles.PROFILE)
def test_a_table_shows_shares(half, capsys):
    from rich.console import Console

    profiles.show(Console(width=100), "a model", half, Counter({"matmul": 3.0, "gelu": 1.0}), 1)
    shown = capsys.readouterr().out
    assert f"a model, {half}: 400.0 ms a call" in shown
    assert shown.split("\n")[2].split() == ["matmul", "300.00", "75"] and "gelu" not in shown
