"""AdamW as torch defines it, with a learning rate of its own for each parameter, and the schedule of a recipe."""

import math
from collections.abc import Sequence

import keras
from keras import ops

from modelspec.parameter_groups import has_weight_decay, learning_rate_scale
from modelspec.training import Recipe
from tfmodels.replicas import sum_over_replicas
from tfmodels.weights import checkpoint_variables


@keras.saving.register_keras_serializable(package="twinzoo")
class AdamW(keras.optimizers.AdamW):
    """AdamW whose steps are those of `torch.optim.AdamW` with a parameter group for each variable.

    Keras adds epsilon before the correction of the second moment's bias, torch and the paper after it. With gradient
    accumulation, the schedule counts steps, and the moving average takes part once for each; Keras' own optimizers
    do both for every part of a step. Under a distribution strategy, gradients are summed over the replicas before
    anything is done with them; Keras' own optimizers clip those of each replica.

    Args:
        learning_rate: a number or a schedule.
        learning_rate_scales: factor on the learning rate of each trainable variable, in the model's order; None: 1.
        decayed: whether weight decay applies to each of them; None: to all.
        **kwargs: those of `keras.optimizers.AdamW`; `amsgrad` is not offered.

    Raises:
        ValueError: there are more or fewer variables than scales.
    """

    def __init__(
        self,
        learning_rate=1e-3,
        *,
        learning_rate_scales: Sequence[float] | None = None,
        decayed: Sequence[bool] | None = None,
        name: str = "adamw",
        **kwargs,
    ):
        super().__init__(learning_rate, name=name, **kwargs)
        self.learning_rate_scales = None if learning_rate_scales is None else [float(s) for s in learning_rate_scales]
        self.decayed = None if decayed is None else [bool(entry) for entry in decayed]

    def build(self, variables):
        for name in ("learning_rate_scales", "decayed"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != len(variables):
                raise ValueError(f"{name} has {len(entries)} entries; there are {len(variables)} trainable variables")
        super().build(variables)

    def update_step(self, gradient, variable, learning_rate):
        dtype = variable.dtype
        index = self._get_variable_index(variable)
        if self.learning_rate_scales is not None:
            learning_rate = learning_rate * _exactly(self.learning_rate_scales[index], learning_rate.dtype)
        learning_rate = ops.cast(learning_rate, dtype)
        gradient = ops.cast(gradient, dtype)
        step = ops.cast(self.iterations + 1, "float64")  # in float32, 1 - beta_2 has four digits
        unbias_1, unbias_2 = (
            ops.cast(1.0 - ops.power(_exactly(beta, "float64"), step), dtype) for beta in (self.beta_1, self.beta_2)
        )
        first, second = self._momentums[index], self._velocities[index]
        if self.weight_decay and (self.decayed is None or self.decayed[index]):
            self.assign_sub(variable, variable * (learning_rate * _exactly(self.weight_decay, dtype)))
        self.assign_add(first, (gradient - first) * _exactly(1 - self.beta_1, dtype))
        self.assign_add(second, (ops.square(gradient) - second) * _exactly(1 - self.beta_2, dtype))
        scale = ops.sqrt(second / unbias_2) + _exactly(self.epsilon, dtype)
        self.assign_sub(variable, first * (learning_rate / unbias_1) / scale)

    def _backend_apply_gradients(self, grads, trainable_variables):
        # summed here, every replica takes the same step on its copy of the variables, and nothing below meets others,
        # which it could not inside of a condition
        super()._backend_apply_gradients(sum_over_replicas(grads), trainable_variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            self.update_step(gradient, variable, learning_rate)

    def _backend_increment_gradient_accumulators(self, grads, acc_grads):
        for gradient, accumulated in zip(grads, acc_grads, strict=True):
            self.assign_add(accumulated, gradient)

    def _apply_weight_decay(self, variables):
        """Does nothing: `update_step` knows each variable's learning rate."""

    def _get_current_learning_rate(self):
        schedule = self._learning_rate
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            return schedule(self.iterations)
        return super()._get_current_learning_rate()

    def _update_model_variables_moving_average(self, trainable_variables):
        def update():
            super(AdamW, self)._update_model_variables_moving_average(trainable_variables)

        if not self.gradient_accumulation_steps:
            update()
            return
        is_step = ops.equal((self._iterations + 1) % self.gradient_accumulation_steps, 0)
        ops.cond(is_step, update, lambda: None)

    def get_config(self) -> dict:
        return super().get_config() | {"learning_rate_scales": self.learning_rate_scales, "decayed": self.decayed}


@keras.saving.register_keras_serializable(package="twinzoo")
class RecipeSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """The values of `Recipe.learning_rate_at`, computed in float64; Keras' `CosineDecay` takes its own through float32.

    Args:
        recipe: a recipe, or its fields.
        steps_per_epoch: optimizer steps.
    """

    def __init__(self, recipe: Recipe | dict, steps_per_epoch: int):
        super().__init__()
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe)
        self.steps_per_epoch = steps_per_epoch

    def __call__(self, step):
        warmup = self.recipe.warmup_steps(self.steps_per_epoch)
        peak, least = (_exactly(rate, "float64") for rate in (self.recipe.learning_rate, self.recipe.min_learning_rate))
        step = ops.cast(step, "float64")
        rising = peak * (step + 1) / (warmup + 1)
        fraction = ops.minimum((step - warmup) / (self.recipe.epochs * self.steps_per_epoch - warmup), 1.0)
        falling = least + (peak - least) * (0.5 * (1.0 + ops.cos(_exactly(math.pi, "float64") * fraction)))
        return ops.cast(ops.where(step < warmup, rising, falling), keras.config.floatx())

    def get_config(self) -> dict:
        return {"recipe": self.recipe.to_dict(), "steps_per_epoch": self.steps_per_epoch}


def recipe_optimizer(model, recipe: Recipe, steps_per_epoch: int) -> AdamW:
    """Returns the optimizer of a recipe for the weights of a model that are trainable now.

    Args:
        model: one of this package.
        recipe: says how; its groups of parameters are those of `modelspec.parameter_groups`.
        steps_per_epoch: optimizer steps.
    """
    keys = {id(entry.variable): (key, entry.shape) for key, entry in checkpoint_variables(model).items()}
    trained = [keys[id(variable)] for variable in model.trainable_variables]
    return AdamW(
        RecipeSchedule(recipe, steps_per_epoch),
        learning_rate_scales=[learning_rate_scale(model.config, key, recipe.layer_decay) for key, _ in trained],
        decayed=[has_weight_decay(key, shape) for key, shape in trained],
        weight_decay=recipe.weight_decay,
        beta_1=recipe.beta_1,
        beta_2=recipe.beta_2,
        epsilon=recipe.epsilon,
        global_clipnorm=recipe.clip_norm,
        use_ema=recipe.ema is not None,
        ema_momentum=0.99 if recipe.ema is None else recipe.ema,
        gradient_accumulation_steps=None if recipe.accumulation_steps == 1 else recipe.accumulation_steps,
    )


def _exactly(value: float, dtype):
    """A Python number as a tensor; `ops.cast` would take it through float32."""
    return ops.convert_to_tensor(value, dtype)
