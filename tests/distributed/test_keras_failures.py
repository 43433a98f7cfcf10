"""A worker that is killed ends the training on all; what is left goes on, on any number of replicas, in either half."""

import json
import subprocess
import time

import pytest
from small_training import assert_same
from test_keras_engines import float64_keras, launch, of_one_process, started  # noqa: F401

from modelspec.training import TrainingState

# a larger epsilon, or the halves' rounding noise of gradients that are zero grows over 20 steps
CASE = {"family": "swiftformer", "recipe": {"mixup": 0.0, "epsilon": 1e-4}}
EPOCH_OF_SECOND = 4 * 2 * 2  # images that the second of two workers reads: two of each part, without mixup's partners


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a training in whose third epoch the second worker was killed; what the first one said."""
    folder = tmp_path_factory.mktemp("killed")
    case = {**CASE, "state_path": "state", "die": [1, 2 * EPOCH_OF_SECOND + 7]}
    with started("multiworker", 2, folder, [case]) as (first, second):
        assert second.wait(timeout=300) == -9
        began = time.monotonic()
        try:
            _, errors = first.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            pytest.fail("the first worker still waits after a minute")
        print(f"the first worker ended after {time.monotonic() - began:.0f} s")
        assert first.returncode == 1
    return folder, errors.decode()


@pytest.mark.slow
def test_a_killed_worker_ends_the_training_and_leaves_the_last_epoch(killed):
    folder, errors = killed
    assert "ProcessLostError: another process of this training has died or does not answer" in errors
    assert "the state after the last finished epoch is kept: start again to go on from there" in errors
    assert [path.name for path in folder.iterdir()] == ["state"]
    assert TrainingState.load(folder / "state").epoch == 2


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "processes"), [("multiworker", 2), ("multiworker", 3), ("mirrored", 3)])
def test_any_number_of_replicas_goes_on(strategy, processes, killed, tmp_path):
    (tmp_path / "state").write_bytes((killed[0] / "state").read_bytes())
    ((arrays, *_),) = launch(strategy, processes, tmp_path, [{**CASE, "state_path": "state"}])
    assert_same(CASE["family"], arrays, of_one_process(json.dumps(CASE)), going_on_after=2)


@pytest.mark.slow
def test_one_process_of_either_half_goes_on(killed, tmp_path):
    import keras_training
    import torch_training

    wanted = of_one_process(json.dumps(CASE))
    for half in (keras_training, torch_training):
        path = tmp_path / half.__name__
        path.write_bytes((killed[0] / "state").read_bytes())
        assert_same(CASE["family"], half.train(**CASE, state_path=path), wanted, going_on_after=2)
