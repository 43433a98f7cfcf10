"""Fine-tuning by a recipe, with `model.fit`. Twin: `ptmodels/training.py`."""

import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from modelspec.parameter_groups import frozen_keys
from modelspec.training import BatchShare, EvaluationBatches, Recipe, TrainingBatches, TrainingState, matching_state
from tfmodels.distributed import (
    evaluator,
    fit_workers,
    is_first,
    is_multi_worker,
    parts_of_replicas,
    share_value,
    shares_of_replicas,
    uneven_shares_allowed,
)
from tfmodels.optimizers import AdamW, recipe_optimizer
from tfmodels.pretrained import TFPreTrainedModel
from tfmodels.replicas import batches_of_shares, share_of_batch
from tfmodels.weights import assign_weights, checkpoint_variables, read_weights

_MEAN_LOSS = "mean_loss"  # over all replicas


def fine_tune(
    model: TFPreTrainedModel,
    batches: TrainingBatches,
    *,
    validation: EvaluationBatches | None = None,
    state_path: str | os.PathLike | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[TrainingState], None] | None = None,
    compile_options: dict[str, Any] | None = None,
) -> dict[str, list[float]]:
    """Trains a classifier as the recipe of `batches` says, with `model.fit`.

    Afterwards the model has the weights of the last epoch, or with `Recipe.ema` their moving average, which is what
    the figures of validation are of, too. Stages that the recipe freezes stay frozen.

    A model that was made inside of `tfmodels.distributed.joined`, or of a strategy's `scope()`, is trained by that
    strategy: replicas share each batch, and the curves are those of one process. Of several workers, all call this with
    the same arguments; the first one alone writes the state and makes the calls.

    Args:
        model: a `...ForImageClassification` of this package, which takes (B, C, H, W); for `mixed_precision` loaded
            with `dtype="mixed_bfloat16"`.
        batches: what to train on, and the recipe.
        validation: what to measure after each epoch.
        state_path: a file that holds the state after each epoch; if it exists, the training goes on from there.
        on_step: called as `on_step(step, steps, loss)` after each optimizer step, counted from 1 in all epochs, with
            the loss of its (last part of the) batch; of several steps at once, by `steps_per_execution`.
        on_epoch: called with the state after each epoch, when it has been saved.
        compile_options: for `model.compile`: `jit_compile`, `run_eagerly`, `steps_per_execution`.

    Returns:
        The curves, one number per epoch: `loss` and `accuracy` of training (with its dropping, smoothing and mixing),
        `val_loss` and `val_accuracy`, and `learning_rate` of the epoch's last step.

    Raises:
        ValueError: the recipe does not fit the model, or the replicas.
        CheckpointError: the file at `state_path` is damaged, or of another recipe or model.
        OSError: the state cannot be written, or another process was lost; what was saved before is kept.
    """
    recipe, strategy = batches.recipe, model.distribute_strategy
    check_recipe(model, recipe)
    state = matching_state(state_path, recipe, model.checkpoint_shapes())
    with strategy.scope():
        first = is_first()
        _check_all_alike(batches, 0 if state is None else state.epoch)
    if recipe.freeze is not None:
        model.freeze(upto=recipe.freeze)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    sizes = shares_of_replicas(batches, strategy)
    with strategy.scope():
        optimizer = recipe_optimizer(model, recipe, batches.steps_per_epoch)
        _compile(model, optimizer, recipe, compile_options or {})
        optimizer.build(model.trainable_variables)
    _check_steps_per_execution(model, batches.parts_per_epoch)
    history: dict[str, list[float]] = {}
    if state is not None:
        _restore(model, optimizer, state, recipe)
        history = {name: list(values) for name, values in state.history.items()}
    first_epoch = 0 if state is None else state.epoch
    if recipe.distillation:
        model.set_distilled_training(True)
    dataset = _PyDataset(batches, first_epoch, model.data_format)
    held_out = None if validation is None else _PyDataset(validation, None, model.data_format)
    try:
        told = (state_path, on_step, on_epoch) if first else (None, None, None)
        keeper = _Keeper(dataset, history, *told)
        keeper.takes_shares_for_equal = len(set(sizes)) > 1 and not is_multi_worker(strategy)
        averaging = [] if recipe.ema is None else [keras.callbacks.SwapEMAWeights()]
        if strategy.num_replicas_in_sync == 1 and not is_multi_worker(strategy):
            model.fit(
                dataset,
                validation_data=held_out,
                epochs=recipe.epochs,
                initial_epoch=first_epoch,
                shuffle=False,  # or Keras would take the batches in an order of its own
                callbacks=[*averaging, keeper],
                verbose=0,
            )
            return history
        if held_out is not None:
            keeper.measure = _of_averages(averaging, evaluator(model, held_out, recipe.label_smoothing))
        epochs, parts = range(first_epoch, recipe.epochs), batches.parts_per_epoch
        with batches_of_shares(sizes):
            if is_multi_worker(strategy):
                fit_workers(model, dataset.part, epochs, parts, sizes, [*averaging, keeper])
            elif epochs:
                with uneven_shares_allowed(model):
                    model.fit(
                        parts_of_replicas(strategy, dataset.part, epochs, parts, sizes),
                        epochs=recipe.epochs,
                        initial_epoch=first_epoch,
                        steps_per_epoch=parts,
                        shuffle=False,
                        callbacks=[*averaging, keeper],
                        verbose=0,
                    )
    except tf.errors.OpError:
        if dataset.failure is not None:  # TensorFlow tells of it in a text of its own
            raise dataset.failure from None
        raise
    finally:
        if recipe.distillation:
            model.set_distilled_training(False)
    return history


def check_recipe(model: TFPreTrainedModel, recipe: Recipe) -> None:
    """Raises if a model cannot be trained by a recipe.

    Raises:
        ValueError: the model computes in another precision, lacks the stage or the second head that the recipe names.
    """
    mixed = model.dtype_policy.compute_dtype != model.dtype_policy.variable_dtype
    if recipe.mixed_precision and model.dtype_policy.name != "mixed_bfloat16":
        raise ValueError(
            f"Recipe.mixed_precision is True, but the model computes in {model.dtype_policy.compute_dtype}; "
            'load it with dtype="mixed_bfloat16"'
        )
    if mixed and not recipe.mixed_precision:
        raise ValueError(f"the model is {model.dtype_policy.name}, but Recipe.mixed_precision is False")
    if recipe.distillation and not hasattr(model, "set_distilled_training"):
        raise ValueError(f"Recipe.distillation is True; {type(model).__name__} has no second head to train by it")
    if recipe.freeze is not None:
        frozen_keys(model.config, (), recipe.freeze)


def _check_steps_per_execution(model: TFPreTrainedModel, parts: int) -> None:
    strategy, steps = model.distribute_strategy, model.steps_per_execution
    if is_multi_worker(strategy) and steps != 1:
        raise ValueError(f"steps_per_execution is {steps}; several workers take one step at a time")
    if strategy.num_replicas_in_sync > 1 and parts % steps:
        raise ValueError(f"steps_per_execution is {steps}; on replicas it has to divide the {parts} of an epoch")


def _check_all_alike(batches: TrainingBatches, epoch: int) -> None:
    ours = {"recipe": batches.recipe.to_dict(), "images": len(batches.images.labels), "finished epochs": epoch}
    theirs = share_value(ours)
    for name, value in ours.items():
        if value != theirs[name]:
            raise ValueError(
                f"this process has {name} {value}, the first one {theirs[name]}; start all with the same recipe, "
                "images and folder of the state"
            )


def predict_logits(model: TFPreTrainedModel, batches: EvaluationBatches) -> np.ndarray:
    """Returns the logits (N, num_labels) of all images of `batches`, float32 or the model's own dtype."""
    if model.distribute_strategy.num_replicas_in_sync > 1:  # this process alone, and batches that replicas divide not
        ask = teacher_logits(model)
        logits = np.concatenate([ask(images) for images, _ in batches])
    else:
        logits = model.predict(_PyDataset(batches, None, model.data_format), verbose=0).logits
    return logits if logits.dtype in (np.float32, np.float64) else logits.astype(np.float32)


def teacher_logits(model: TFPreTrainedModel) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from pixel values (B, C, H, W) to a model's logits (B, num_labels), as arrays."""
    call = tf.function(lambda pixel_values: model(pixel_values, training=False).logits, reduce_retracing=True)

    def logits(pixel_values: np.ndarray) -> np.ndarray:
        first = model.data_format == "channels_first"
        return call(tf.constant(pixel_values if first else pixel_values.transpose(0, 2, 3, 1))).numpy()

    return logits


def _compile(model: TFPreTrainedModel, optimizer: AdamW, recipe: Recipe, options: dict[str, Any]) -> None:
    replicas, dtype = model.distribute_strategy.num_replicas_in_sync, model.variable_dtype
    if replicas > 1:
        options = {"jit_compile": False} | options  # what XLA compiles cannot meet other replicas everywhere
    smoothing = recipe.label_smoothing
    loss = keras.losses.CategoricalCrossentropy if replicas == 1 else _LossOfShare
    metrics = [_Accuracy(name="accuracy", dtype=dtype)]
    if replicas > 1:
        # Keras' own mean of the losses takes all shares for equal
        metrics.append(
            keras.metrics.CategoricalCrossentropy(_MEAN_LOSS, dtype, from_logits=True, label_smoothing=smoothing)
        )
    model.compile(
        optimizer,
        loss=loss(from_logits=True, label_smoothing=smoothing, dtype=dtype),
        metrics=metrics,
        **options,
    )


class _LossOfShare(keras.losses.CategoricalCrossentropy):
    """What a replica's share adds to the mean over the batch.

    Keras' own mean divides by the number of replicas, which it takes through float32: a third is 1e-8 off.
    """

    def __init__(self, **options):
        super().__init__(reduction="sum", **options)

    def __call__(self, y_true, y_pred, sample_weight=None):
        total = super().__call__(y_true, y_pred, sample_weight)
        count = keras.ops.cast(keras.ops.prod(keras.ops.stack(keras.ops.shape(y_true)[:-1])), total.dtype)
        return total / count * share_of_batch(total.dtype)


class _Accuracy(keras.metrics.CategoricalAccuracy):
    """Accuracy by labels; in distilled training, of the heads' average."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        if len(y_true.shape) == 3:
            y_true, y_pred = y_true[:, 0], keras.ops.mean(y_pred, axis=1)
        super().update_state(y_true, y_pred, sample_weight)


class _PyDataset(keras.utils.PyDataset):
    """Batches as Keras takes them; an epoch's own where they are drawn."""

    def __init__(self, batches, epoch: int | None, data_format: str):
        super().__init__()
        self.batches, self.epoch, self.data_format = batches, epoch, data_format
        self.failure: Exception | None = None

    def __len__(self) -> int:
        return len(self.batches) if self.epoch is None else self.batches.parts_per_epoch

    def __getitem__(self, index: int):
        if self.epoch is None:
            return self._laid_out(self.batches[index])
        return self.part(self.epoch, index)

    def part(self, epoch: int, index: int, share: BatchShare | None = None):
        """Returns a part of a batch of any epoch, or a share of it."""
        try:
            return self._laid_out(self.batches.part(epoch, index, share))
        except Exception as error:
            self.failure = error
            raise

    def _laid_out(self, batch):
        images, targets = batch
        return images if self.data_format == "channels_first" else images.transpose(0, 2, 3, 1), targets


class _Keeper(keras.callbacks.Callback):
    """Begins each epoch with its own batches and seed, keeps the curves and the state, and tells of progress."""

    def __init__(self, dataset: _PyDataset, history, state_path, on_step, on_epoch):
        super().__init__()
        self.dataset, self.batches, self.history, self.state_path = dataset, dataset.batches, history, state_path
        self.on_step, self.on_epoch = on_step, on_epoch
        self.measure: Callable[[], dict[str, float]] | None = None  # where `fit` does not validate
        self.takes_shares_for_equal = False  # as Keras' logs of a step do

    def on_epoch_begin(self, epoch, logs=None):
        self.dataset.epoch = epoch  # its own `on_epoch_end` is called before the first epoch, too
        _seed_layers(self.model, self.batches.recipe.seed, epoch)
        self.before = epoch * self.batches.steps_per_epoch
        self.parts, self.summed = 0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        if self.on_step is None:
            return
        recipe = self.batches.recipe
        parts = min(batch + 1, self.batches.parts_per_epoch)  # several at once may claim more than there were
        summed = float(self._mean_loss(logs)) * parts  # Keras tells the mean over the epoch up to here
        done = parts // recipe.accumulation_steps
        if done > self.parts // recipe.accumulation_steps:
            steps = recipe.epochs * self.batches.steps_per_epoch
            self.on_step(self.before + done, steps, (summed - self.summed) / (parts - self.parts))
        self.parts, self.summed = parts, summed

    def _mean_loss(self, logs):
        if self.takes_shares_for_equal:
            return self.model.get_metrics_result()[_MEAN_LOSS]
        return logs.get(_MEAN_LOSS, logs["loss"])

    def on_epoch_end(self, epoch, logs=None):
        recipe, per_epoch = self.batches.recipe, self.batches.steps_per_epoch
        found = {name: float(value) for name, value in logs.items()}
        if _MEAN_LOSS in found:
            found["loss"] = found.pop(_MEAN_LOSS)
        if self.measure is not None:
            found |= {f"val_{name}": value for name, value in self.measure().items()}
        found["learning_rate"] = recipe.learning_rate_at((epoch + 1) * per_epoch - 1, per_epoch)
        for name, value in found.items():
            self.history.setdefault(name, []).append(value)
        if self.state_path is None and self.on_epoch is None:
            return
        state = _state(self.model, recipe, epoch + 1, (epoch + 1) * per_epoch, self.history)
        if self.state_path is not None:
            state.save(self.state_path)
        if self.on_epoch is not None:
            self.on_epoch(state)


def _of_averages(averaging: list[keras.callbacks.SwapEMAWeights], measure: Callable) -> Callable[[], dict[str, float]]:
    """Returns `measure` with the averages of the weights in their place, if there are any."""

    def measured() -> dict[str, float]:
        for callback in averaging:
            callback.on_test_begin()
        found = measure()
        for callback in averaging:
            callback.on_test_end()
        return found

    return measured


def _seed_layers(model, seed: int, epoch: int) -> None:
    """Gives all layers that draw a new seed, whatever they drew before."""
    for number, layer in enumerate(model._flatten_layers()):
        generator = getattr(layer, "seed_generator", None)
        if generator is not None:
            drawn = np.random.SeedSequence([seed, epoch, number]).generate_state(2)
            generator.state.assign(drawn.astype(generator.state.dtype))


def _moments(model, optimizer) -> dict[str, dict[str, tuple]]:
    """Group of a state -> checkpoint key -> the optimizer's variable and the entry whose layout it has."""
    entries = {key: entry for key, entry in checkpoint_variables(model).items() if entry.variable.trainable}
    sources = {"first_moments": optimizer._momentums, "second_moments": optimizer._velocities}
    if optimizer.use_ema:
        sources["averages"] = optimizer._model_variables_moving_average
    return {
        group: {key: (values[optimizer._get_variable_index(entry.variable)], entry) for key, entry in entries.items()}
        for group, values in sources.items()
    }


def _state(model, recipe: Recipe, epoch: int, step: int, history) -> TrainingState:
    groups = {
        group: {key: entry.to_checkpoint(keras.ops.convert_to_numpy(value)) for key, (value, entry) in values.items()}
        for group, values in _moments(model, model.optimizer).items()
    }
    history = {name: list(values) for name, values in history.items()}
    return TrainingState(epoch, step, recipe, history, read_weights(model), **{"averages": {}, **groups})


def _restore(model, optimizer, state: TrainingState, recipe: Recipe) -> None:
    assign_weights(model, state.weights)
    for group, values in _moments(model, optimizer).items():
        saved = getattr(state, group)
        for key, (variable, entry) in values.items():
            variable.assign(entry.to_keras(saved[key]).astype(variable.dtype))
    optimizer._iterations.assign(state.step * recipe.accumulation_steps)
