"""Fine-tuning by a recipe. Twin: `tfmodels/training.py`."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from modelspec.parameter_groups import frozen_keys, has_weight_decay, learning_rate_scale
from modelspec.training import BatchShare, EvaluationBatches, Recipe, TrainingBatches, TrainingState, matching_state
from ptmodels.distributed import Engine, engine_of, losses_told, wait_for_all
from ptmodels.pretrained import PreTrainedModel

OnStep = Callable[[int, int, float], None]


def fine_tune(
    model: PreTrainedModel,
    batches: TrainingBatches,
    *,
    validation: EvaluationBatches | None = None,
    state_path: str | os.PathLike | None = None,
    on_step: OnStep | None = None,
    on_epoch: Callable[[TrainingState], None] | None = None,
) -> dict[str, list[float]]:
    """Trains a classifier as the recipe of `batches` says, where the model is.

    Afterwards the model has the weights of the last epoch, or with `Recipe.ema` their moving average, which is what
    the figures of validation are of, too. Stages that the recipe freezes stay frozen. The model is in evaluation mode.

    Inside of `ptmodels.distributed.joined`, all processes call this with the same arguments and share each batch; the
    curves are those of one process. The first process alone writes the state and makes the calls. After an error
    under `"fsdp"` the model has no weights.

    Args:
        model: a `...ForImageClassification` of this package.
        batches: what to train on, and the recipe.
        validation: what to measure after each epoch.
        state_path: a file that holds the state after each epoch; if it exists, the training goes on from there.
        on_step: called as `on_step(step, steps, loss)` after each optimizer step, counted from 1 in all epochs, with
            the loss of its (last part of the) batch.
        on_epoch: called with the state after each epoch, when it has been saved.

    Returns:
        The curves, one number per epoch: `loss` and `accuracy` of training (with its dropping, smoothing and mixing),
        `val_loss` and `val_accuracy`, and `learning_rate` of the epoch's last step.

    Raises:
        ValueError: the recipe does not fit the model, or the processes.
        CheckpointError: the file at `state_path` is damaged, or of another recipe or model.
        OSError: the state cannot be written, or another process was lost; what was saved before is kept.
    """
    recipe = batches.recipe
    check_recipe(model, recipe)
    state = matching_state(state_path, recipe, model.checkpoint_shapes())
    if recipe.freeze is not None:
        model.freeze(upto=recipe.freeze)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.distillation:
        model.set_distilled_training(True)  # type: ignore[operator]  # which `check_recipe` has seen
    try:
        with losses_told(), engine_of(model) as engine:
            history = _train(engine, batches, validation, state, state_path, on_step, on_epoch)
    finally:
        if recipe.distillation:
            model.set_distilled_training(False)  # type: ignore[operator]
    model.eval()
    return history


def _train(
    engine: Engine,
    batches: TrainingBatches,
    validation: EvaluationBatches | None,
    state: TrainingState | None,
    state_path: str | os.PathLike | None,
    on_step: OnStep | None,
    on_epoch: Callable[[TrainingState], None] | None,
) -> dict[str, list[float]]:
    """Does what is left to do after a state, and returns the curves."""
    recipe, per_epoch = batches.recipe, batches.steps_per_epoch
    engine.prepare(batches, state)
    steps = _Steps(engine, recipe, per_epoch)
    history: dict[str, list[float]] = {}
    if state is not None:
        steps.restore(state)
        history = {name: list(values) for name, values in state.history.items()}
    for epoch in range(0 if state is None else state.epoch, recipe.epochs):
        found = _train_epoch(engine, batches, epoch, steps, on_step)
        if validation is not None:
            with steps.averages_swapped_in():
                measured = _measure(engine, validation, recipe)
            found |= {f"val_{name}": value for name, value in measured.items()}
        found["learning_rate"] = recipe.learning_rate_at((epoch + 1) * per_epoch - 1, per_epoch)
        for name, value in found.items():
            history.setdefault(name, []).append(value)
        reached = steps.state(epoch + 1, history)
        if engine.rank == 0:
            if state_path is not None:
                reached.save(state_path)
            if on_epoch is not None:
                on_epoch(reached)
        wait_for_all()
    steps.swap_averages()
    engine.finish()
    return history


def check_recipe(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raises if a model cannot be trained by a recipe.

    Raises:
        ValueError: the model lacks the stage or the second head that the recipe names.
    """
    if recipe.distillation and not hasattr(model, "set_distilled_training"):
        raise ValueError(f"Recipe.distillation is True; {type(model).__name__} has no second head to train by it")
    if recipe.freeze is not None:
        frozen_keys(model.config, (), recipe.freeze)


def recipe_optimizer(
    model: PreTrainedModel, recipe: Recipe, steps_per_epoch: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """Returns the optimizer of a recipe for the parameters of a model that are trained now, and its schedule.

    Args:
        model: one of this package.
        recipe: says how; its groups of parameters are those of `modelspec.parameter_groups`.
        steps_per_epoch: optimizer steps.
    """
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    return _optimizer(model, trained, recipe, steps_per_epoch)


def _optimizer(
    model: PreTrainedModel, trained: Mapping[str, torch.nn.Parameter], recipe: Recipe, steps_per_epoch: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for key, parameter in trained.items():
        scale = learning_rate_scale(model.config, key, recipe.layer_decay)
        decay = recipe.weight_decay if has_weight_decay(key, parameter.shape) else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": recipe.learning_rate * scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
        betas=(recipe.beta_1, recipe.beta_2),
        eps=recipe.epsilon,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.learning_rate_at(step, steps_per_epoch) / recipe.learning_rate
    )
    return optimizer, schedule


def evaluate(model: PreTrainedModel, batches: EvaluationBatches, recipe: Recipe | None = None) -> dict[str, float]:
    """Returns `loss` (smoothed as the recipe says) and `accuracy` of a model, in evaluation mode."""
    return _measure(Engine(model), batches, recipe)


def _measure(engine: Engine, batches: EvaluationBatches, recipe: Recipe | None) -> dict[str, float]:
    smoothing = 0.0 if recipe is None else recipe.label_smoothing
    model = engine.model.eval()
    total, right, count = 0.0, 0.0, 0.0
    # what is put together inside of inference mode would be of no use to training afterwards
    without_gradients = torch.inference_mode() if engine.processes == 1 else torch.no_grad()
    with without_gradients, _precision(model, recipe):
        for pixel_values, labels, counted in batches.shares(engine.processes, engine.rank):
            logits = model(torch.from_numpy(pixel_values).to(model.device)).logits[:counted]
            targets = torch.from_numpy(labels).to(logits.device)[:counted]
            if counted:
                total += float(_loss(logits, targets, smoothing)) * counted
            right += _right(logits, targets)
            count += counted
    total, right, count = engine.sum(total, right, count)
    return {"loss": total / count, "accuracy": right / count}


def predict_logits(model: PreTrainedModel, batches: EvaluationBatches) -> np.ndarray:
    """Returns the logits (N, num_labels) of all images of `batches`, float32 or the model's own dtype."""
    model.eval()
    with torch.inference_mode():
        parts = [model(torch.from_numpy(images).to(model.device)).logits.cpu().numpy() for images, _ in batches]
    return np.concatenate(parts)


def teacher_logits(model: PreTrainedModel) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from pixel values (B, C, H, W) to a model's logits (B, num_labels), as arrays."""

    def logits(pixel_values: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(pixel_values).to(model.device)).logits.cpu().numpy()

    model.eval()
    return logits


def _train_epoch(
    engine: Engine, batches: TrainingBatches, epoch: int, steps: "_Steps", on_step: OnStep | None
) -> dict[str, float]:
    recipe, share = batches.recipe, engine.share(batches.part_size)
    model = engine.model.train()
    torch.manual_seed(int(np.random.SeedSequence([recipe.seed, epoch]).generate_state(1)[0]))
    # gradients are averaged over processes, whose shares may differ
    weight = 1.0 if share is None else share.size * engine.processes / share.total
    total, right, count = 0.0, 0.0, 0.0
    for number, (pixel_values, targets) in enumerate(_ahead(batches, epoch, share)):
        images, wanted = (torch.from_numpy(array).to(model.device) for array in (pixel_values, targets))
        last = (number + 1) % recipe.accumulation_steps == 0
        with engine.accumulates(last):
            with _precision(model, recipe):
                logits = engine.forward(images).logits
            loss = _loss(logits, wanted, recipe.label_smoothing)
            (loss * (weight / recipe.accumulation_steps)).backward()
        own = float(loss.detach()) * len(images)
        part_total, part_right, part_count = engine.sum(own, _right(logits, wanted), len(images))
        total, right, count = total + part_total, right + part_right, count + part_count
        if last:
            steps.take()
            if on_step is not None and engine.rank == 0:
                done = epoch * batches.steps_per_epoch + (number + 1) // recipe.accumulation_steps
                on_step(done, recipe.epochs * batches.steps_per_epoch, part_total / part_count)
    return {"loss": total / count, "accuracy": right / count}


def _ahead(batches: TrainingBatches, epoch: int, share: BatchShare | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the parts of an epoch; while one is trained on, the next is read."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(batches.part, epoch, 0, share)
        for index in range(batches.parts_per_epoch):
            part = coming.result()
            if index + 1 < batches.parts_per_epoch:
                coming = reader.submit(batches.part, epoch, index + 1, share)
            yield part


def _precision(model: PreTrainedModel, recipe: Recipe | None) -> contextlib.AbstractContextManager:
    mixed = recipe is not None and recipe.mixed_precision
    return torch.autocast(model.device.type, torch.bfloat16) if mixed else contextlib.nullcontext()


def _loss(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Of (B, num_labels), or the mean of both heads' of (B, 2, num_labels)."""
    logits, targets = (array.reshape(-1, array.shape[-1]) for array in (logits.to(targets.dtype), targets))
    return functional.cross_entropy(logits, targets, label_smoothing=smoothing)


def _right(logits: torch.Tensor, targets: torch.Tensor) -> int:
    """How many predictions are right; in distilled training, of the heads' average."""
    if targets.ndim == 3:
        logits, targets = logits.mean(1), targets[:, 0]
    return int((logits.argmax(-1) == targets.argmax(-1)).sum())


def _clip(engine: Engine, gradients: list[torch.Tensor], limit: float | None) -> None:
    """Scales all gradients down to a norm of `limit`; torch's own function falls 1e-6 short of it."""
    if limit is not None:
        torch._foreach_mul_(gradients, torch.clamp(limit / engine.norm(gradients), max=1.0))


class _Steps:
    """The optimizer of a model, its schedule, and the moving average of the weights, which go together."""

    def __init__(self, engine: Engine, recipe: Recipe, steps_per_epoch: int):
        self.engine, self.recipe, self.steps_per_epoch = engine, recipe, steps_per_epoch
        self.optimizer, self.schedule = _optimizer(engine.model, engine.trained, recipe, steps_per_epoch)
        self.averages: dict[str, torch.Tensor] = {}
        if recipe.ema is not None:
            self.average = get_ema_multi_avg_fn(recipe.ema)

    def take(self) -> None:
        """Takes a step along the gradients that there are, and forgets them."""
        _clip(self.engine, self.engine.gradients(), self.recipe.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.engine.forget_gradients()
        if self.recipe.ema is None:
            return
        weights = {key: parameter.detach() for key, parameter in self.engine.trained.items()}
        if self.averages:
            self.average([self.averages[key] for key in weights], list(weights.values()), 0)
        else:
            self.averages = {key: weight.clone() for key, weight in weights.items()}

    def swap_averages(self) -> None:
        """Gives the model the averages, if there are any, and keeps its own weights in their place."""
        with torch.no_grad():
            for key, average in self.averages.items():
                weight, kept = self.engine.trained[key], average.clone()
                average.copy_(weight)
                weight.copy_(kept)

    @contextlib.contextmanager
    def averages_swapped_in(self) -> Iterator[None]:
        """Inside, the model has the averages."""
        self.swap_averages()
        try:
            yield
        finally:
            self.swap_averages()

    def state(self, epoch: int, history: dict[str, list[float]]) -> TrainingState:
        """Returns a copy of all that matters, after `epoch` epochs; all processes take part."""
        engine = self.engine
        first, second = (
            {key: engine.whole(key, self.optimizer.state[value][name]) for key, value in engine.trained.items()}
            for name in ("exp_avg", "exp_avg_sq")
        )
        averages = {key: engine.whole(key, average) for key, average in self.averages.items()}
        history = {name: list(values) for name, values in history.items()}
        step = epoch * self.steps_per_epoch
        return TrainingState(epoch, step, self.recipe, history, engine.weights(), first, second, averages)

    def restore(self, state: TrainingState) -> None:
        """Puts everything where a state says that it was."""
        engine = self.engine
        engine.load(state.weights)
        for key, parameter in engine.trained.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": engine.part(key, state.first_moments[key]),
                "exp_avg_sq": engine.part(key, state.second_moments[key]),
            }
        for group, scale in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * scale(state.step)
        self.schedule.last_epoch = state.step
        self.averages = {key: engine.part(key, average) for key, average in state.averages.items()}
