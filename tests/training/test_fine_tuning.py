"""Both halves train by the recipe to the same numbers, go on after an interruption, and into each other."""

import keras
import numpy as np
import pytest
import torch
from small_training import RECIPE, random_images

import ptmodels.auto
import ptmodels.training
import tfmodels.auto
import tfmodels.training
from modelspec import CheckpointError
from modelspec.agreement import compare_all
from modelspec.checkpoints import probing_weights
from modelspec.training import ArrayImages, EvaluationBatches, Recipe, TrainingBatches, TrainingState
from tfmodels.weights import read_weights

HALVES = {"torch": (ptmodels.auto, ptmodels.training), "keras": (tfmodels.auto, tfmodels.training)}
EVERYTHING = {**RECIPE, "epochs": 2, "batch_size": 8}


@pytest.fixture(autouse=True)
def float64_keras():
    """Keras keeps learning rates and losses in its default float."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


class Stop(Exception):
    """What interrupts a training."""


def train(half, config, recipe, *, stop_after=None, **options):
    """Returns the model, the loss of every step and the curves; `stop_after` interrupts after so many epochs."""
    auto, training = HALVES[half]
    model = auto.model_class(config.model_type).from_weights(
        config.replace(), probing_weights(config), dtype=options.pop("dtype", "float64")
    )
    data = options.pop("data", None) or random_images(20)
    teacher = options.pop("teacher", None)
    losses = []

    def on_epoch(state):
        if state.epoch == stop_after:
            raise Stop

    history = training.fine_tune(
        model,
        TrainingBatches(data, recipe, 10, teacher=teacher),
        validation=EvaluationBatches(ArrayImages(data.images[:5], data.labels[:5]), 10, batch_size=3),
        on_step=lambda step, steps, loss: losses.append(loss),
        on_epoch=on_epoch,
        **options,
    )
    return model, losses, history


def weights(model):
    if isinstance(model, torch.nn.Module):
        return {key: value.numpy() for key, value in model.state_dict().items()}
    return read_weights(model)


def assert_same(ours, theirs, bound=1e-10):
    failed = {key: found for key, found in compare_all(weights(ours), weights(theirs), bound).items()}
    assert not {key: found.max_rel for key, found in failed.items() if not found.passed}


def test_both_halves_take_the_same_steps(config):
    recipe = Recipe(**EVERYTHING)
    ours, theirs = (train(half, config, recipe) for half in HALVES)
    assert len(ours[1]) == 4 == len(set(ours[1]))
    np.testing.assert_allclose(theirs[1], ours[1], rtol=0, atol=1e-11)
    assert ours[2].keys() == theirs[2].keys() == {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"}
    for name, values in ours[2].items():
        np.testing.assert_allclose(theirs[2][name], values, rtol=0, atol=1e-11, err_msg=name)
    assert_same(theirs[0], ours[0])


@pytest.mark.parametrize("first", HALVES)
def test_an_interrupted_training_goes_on_in_either_half(first, swiftformer_config, tmp_path):
    recipe = Recipe(**{**EVERYTHING, "epochs": 3})
    whole = train("torch", swiftformer_config, recipe)
    with pytest.raises(Stop):
        train(first, swiftformer_config, recipe, stop_after=1, state_path=tmp_path / "state")
    begun = (tmp_path / "state").read_bytes()
    for half in HALVES:
        (tmp_path / "state").write_bytes(begun)
        model, losses, history = train(half, swiftformer_config, recipe, state_path=tmp_path / "state")
        np.testing.assert_allclose(losses, whole[1][2:], rtol=0, atol=1e-11)
        for name, values in whole[2].items():
            np.testing.assert_allclose(history[name], values, rtol=0, atol=1e-11, err_msg=name)
        assert_same(model, whole[0])
        assert TrainingState.load(tmp_path / "state").epoch == 3
    again, losses, history = train("torch", swiftformer_config, recipe, state_path=tmp_path / "state")
    assert not losses and len(history["loss"]) == 3  # there was nothing left to do
    assert_same(again, whole[0])


@pytest.mark.parametrize("half", HALVES)
def test_dropping_is_drawn_anew_in_each_epoch_and_the_same_after_an_interruption(half, vit_msn_config, tmp_path):
    config = vit_msn_config.replace(hidden_dropout_prob=0.3)
    recipe = Recipe(epochs=3, batch_size=10, learning_rate=1e-12, warmup_epochs=0)
    one = ArrayImages(np.repeat(random_images(20).images[:1], 20, axis=0), [3] * 20)  # whatever the order is
    _, losses, history = train(half, config, recipe, data=one)
    assert len(set(np.round(history["loss"], 6))) == 3  # other elements dropped, the same weights
    with pytest.raises(Stop):
        train(half, config, recipe, data=one, stop_after=1, state_path=tmp_path / "state")
    torch.manual_seed(99)
    keras.utils.set_random_seed(99)
    assert train(half, config, recipe, data=one, state_path=tmp_path / "state")[1] == losses[2:]


def test_a_teacher_teaches_the_second_head_alike(swiftformer_config):
    def teacher(pixel_values):
        return np.eye(10)[np.full(len(pixel_values), 7)]

    recipe = Recipe(epochs=1, batch_size=10, learning_rate=1e-2, warmup_epochs=0, epsilon=1e-6, distillation=True)
    ours, theirs = (train(half, swiftformer_config, recipe, teacher=teacher) for half in HALVES)
    np.testing.assert_allclose(theirs[1], ours[1], rtol=0, atol=1e-11)
    np.testing.assert_allclose(theirs[2]["accuracy"], ours[2]["accuracy"])
    assert_same(theirs[0], ours[0])
    before = torch.from_numpy(probing_weights(swiftformer_config)["dist_head.bias"])
    moved = ours[0].dist_head.bias.detach() - before
    assert moved[7] > 0.01 and (moved[:7] < 0).all()  # towards what the teacher says, and nothing else
    assert not ours[0].distilled_training and not theirs[0].distilled_training


@pytest.mark.parametrize("half", HALVES)
def test_the_average_is_what_is_left_and_measured(half, vit_msn_config):
    recipe = Recipe(epochs=1, batch_size=10, learning_rate=1e-2, warmup_epochs=0, epsilon=1e-6)
    states = []

    def keep(state):
        states.append(state)

    auto, training = HALVES[half]
    for ema in (None, 0.5):
        model = auto.model_class("vit_msn").from_weights(
            vit_msn_config.replace(), probing_weights(vit_msn_config), dtype="float64"
        )
        batches = TrainingBatches(random_images(20), Recipe(**{**recipe.to_dict(), "ema": ema}), 10)
        training.fine_tune(model, batches, on_epoch=keep)
    for key, average in states[1].averages.items():
        np.testing.assert_allclose(states[1].weights[key], states[0].weights[key], rtol=0, atol=1e-12)
        assert np.abs(average - states[0].weights[key]).max() > 1e-9 or key.endswith("key.bias")
        np.testing.assert_allclose(weights(model)[key], average, rtol=0, atol=1e-15)


@pytest.mark.parametrize("half", HALVES)
def test_a_state_that_does_not_belong_is_refused(half, vit_msn_config, nat_config, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Stop):
        train(half, vit_msn_config, Recipe(epochs=2, batch_size=10), stop_after=1, state_path=path)
    for config, recipe, reason in (
        (vit_msn_config, Recipe(epochs=2, batch_size=10, weight_decay=0.5), "begun with weight_decay=0.05, but now"),
        (nat_config, Recipe(epochs=2, batch_size=10), "the state of another model"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            train(half, config, recipe, state_path=path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"nothing of the kind" * 9):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="state"):
            train(half, vit_msn_config, Recipe(epochs=2, batch_size=10), state_path=path)


def test_what_does_not_fit_the_model_is_named(nat_config, swiftformer_config):
    with pytest.raises(ValueError, match="NatForImageClassification has no second head"):
        train("torch", nat_config, Recipe(distillation=True), teacher=lambda pixel_values: pixel_values)
    with pytest.raises(ValueError, match='load it with dtype="mixed_bfloat16"'):
        train("keras", swiftformer_config, Recipe(mixed_precision=True))
    with pytest.raises(ValueError, match="upto is 'stage9'; the stages are"):
        train("torch", swiftformer_config, Recipe(freeze="stage9"))


@pytest.mark.parametrize("half", HALVES)
def test_what_cannot_be_read_meanwhile_is_told_as_it_is(half, vit_msn_config):
    class Vanishing(ArrayImages):
        def image(self, index):
            if index == 17:
                raise ValueError("17.png cannot be read as an image: there is no such file")
            return super().image(index)

    auto, training = HALVES[half]
    model = auto.model_class("vit_msn").from_weights(vit_msn_config.replace(), probing_weights(vit_msn_config))
    data = random_images(20)
    vanishing = Vanishing(data.images.astype(np.float32), data.labels)
    with pytest.raises(ValueError, match="^17.png cannot be read as an image: there is no such file$"):
        training.fine_tune(model, TrainingBatches(vanishing, Recipe(epochs=2, batch_size=4), 10))


MODES = {
    "jit_compile": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 4},
    "run_eagerly": {"run_eagerly": True},
    "mixed_bfloat16": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_keras_trains_in_all_its_modes(mode, config):
    keras.config.set_floatx("float32")
    mixed = mode == "mixed_bfloat16"
    recipe = Recipe(epochs=2, batch_size=4, mixed_precision=mixed)
    dtype = "mixed_bfloat16" if mixed else "float32"
    model, losses, history = train("keras", config, recipe, dtype=dtype, compile_options=MODES[mode])
    assert model.jit_compile == (mode == "jit_compile")
    ours = train("torch", config, Recipe(epochs=2, batch_size=4, mixed_precision=mixed), dtype="float32")
    bound = 2e-2 if mixed else 1e-3
    np.testing.assert_allclose(history["loss"], ours[2]["loss"], rtol=bound)
    if mode != "steps_per_execution":
        np.testing.assert_allclose(losses, ours[1], rtol=bound)
    assert ours[2]["loss"][1] < ours[2]["loss"][0]
