"""Fine-tuning by a recipe. Twin: `tfmodels/training.py`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modelspec.parameter_groups import frozen_keys, has_weight_decay, learning_rate_scale
from modelspec.training import EvaluationBatches, Recipe, TrainingBatches, TrainingState, matching_state
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
        ValueError: the recipe does not fit the model.
        CheckpointError: the file at `state_path` is damaged, or of another recipe or model.
        OSError: the state cannot be written; what was saved before is kept.
    """
    recipe, per_epoch = batches.recipe, batches.steps_per_epoch
    check_recipe(model, recipe)
    state = matching_state(state_path, recipe, model.checkpoint_shapes())
    if recipe.freeze is not None:
        model.freeze(upto=recipe.freeze)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    steps = _Steps(model, recipe, per_epoch)
    history: dict[str, list[float]] = {}
    if state is not None:
        steps.restore(state)
        history = {name: list(values) for name, values in state.history.items()}
    if recipe.distillation:
        model.set_distilled_training(True)  # type: ignore[operator]  # which `check_recipe` has seen
    try:
        for epoch in range(0 if state is None else state.epoch, recipe.epochs):
            found = _train_epoch(model, batches, epoch, steps, on_step)
            if validation is not None:
                measured = evaluate(steps.measured_model, validation, recipe)
                found |= {f"val_{name}": value for name, value in measured.items()}
            found["learning_rate"] = recipe.learning_rate_at((epoch + 1) * per_epoch - 1, per_epoch)
            for name, value in found.items():
                history.setdefault(name, []).append(value)
            reached = steps.state(epoch + 1, history)
            if state_path is not None:
                reached.save(state_path)
            if on_epoch is not None:
                on_epoch(reached)
    finally:
        if recipe.distillation:
            model.set_distilled_training(False)  # type: ignore[operator]
    with torch.no_grad():
        for parameter, measured in zip(model.parameters(), steps.measured_model.parameters(), strict=True):
            parameter.copy_(measured)
    model.eval()
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
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
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
    smoothing = 0.0 if recipe is None else recipe.label_smoothing
    model.eval()
    total, right, count = 0.0, 0, 0
    with torch.inference_mode(), _precision(model, recipe):
        for pixel_values, labels in batches:
            logits = model(torch.from_numpy(pixel_values).to(model.device)).logits
            targets = torch.from_numpy(labels).to(logits.device)
            total += float(_loss(logits, targets, smoothing)) * len(targets)
            right += _right(logits, targets)
            count += len(targets)
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
    model: PreTrainedModel, batches: TrainingBatches, epoch: int, steps: "_Steps", on_step: OnStep | None
) -> dict[str, float]:
    recipe = batches.recipe
    model.train()
    torch.manual_seed(int(np.random.SeedSequence([recipe.seed, epoch]).generate_state(1)[0]))
    total, right, count = 0.0, 0, 0
    for number, (pixel_values, targets) in enumerate(_ahead(batches, epoch)):
        images, wanted = (torch.from_numpy(array).to(model.device) for array in (pixel_values, targets))
        with _precision(model, recipe):
            logits = model(images).logits
        loss = _loss(logits, wanted, recipe.label_smoothing)
        (loss / recipe.accumulation_steps).backward()
        total += float(loss.detach()) * len(images)
        right += _right(logits, wanted)
        count += len(images)
        if (number + 1) % recipe.accumulation_steps == 0:
            steps.take()
            if on_step is not None:
                done = epoch * batches.steps_per_epoch + (number + 1) // recipe.accumulation_steps
                on_step(done, recipe.epochs * batches.steps_per_epoch, float(loss.detach()))
    return {"loss": total / count, "accuracy": right / count}


def _ahead(batches: TrainingBatches, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the parts of an epoch; while one is trained on, the next is read."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(batches.part, epoch, 0)
        for index in range(batches.parts_per_epoch):
            part = coming.result()
            if index + 1 < batches.parts_per_epoch:
                coming = reader.submit(batches.part, epoch, index + 1)
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


def _clip(model: PreTrainedModel, limit: float | None) -> None:
    """Scales all gradients down to a norm of `limit`; torch's own function falls 1e-6 short of it."""
    if limit is None:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, torch.clamp(limit / norm, max=1.0))


class _Steps:
    """The optimizer of a model, its schedule, and the moving average of the weights, which go together."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, steps_per_epoch: int):
        self.model, self.recipe, self.steps_per_epoch = model, recipe, steps_per_epoch
        self.optimizer, self.schedule = recipe_optimizer(model, recipe, steps_per_epoch)
        self.averaged = None
        if recipe.ema is not None:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
        self.trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}

    @property
    def measured_model(self) -> Any:
        """The one with the averages, or the only one."""
        return self.model if self.averaged is None else self.averaged.module

    def take(self) -> None:
        """Takes a step along the gradients that there are, and forgets them."""
        _clip(self.model, self.recipe.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def state(self, epoch: int, history: dict[str, list[float]]) -> TrainingState:
        """Returns a copy of all that matters, after `epoch` epochs."""
        first, second = (
            {key: _array(self.optimizer.state[parameter][name]) for key, parameter in self.trained.items()}
            for name in ("exp_avg", "exp_avg_sq")
        )
        averages = {}
        if self.averaged is not None:
            parameters = dict(self.averaged.module.named_parameters())
            averages = {key: _array(parameters[key]) for key in self.trained}
        weights = {key: _array(value) for key, value in self.model.state_dict().items()}
        history = {name: list(values) for name, values in history.items()}
        step = epoch * self.steps_per_epoch
        return TrainingState(epoch, step, self.recipe, history, weights, first, second, averages)

    def restore(self, state: TrainingState) -> None:
        """Puts everything where a state says that it was."""
        self.model.load_state_dict({key: torch.from_numpy(value) for key, value in state.weights.items()})
        for key, parameter in self.trained.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": torch.from_numpy(state.first_moments[key]).to(parameter),
                "exp_avg_sq": torch.from_numpy(state.second_moments[key]).to(parameter),
            }
        for group, scale in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * scale(state.step)
        self.schedule.last_epoch = state.step
        if self.averaged is not None:
            self.averaged.module.load_state_dict(self.model.state_dict())
            averages = {key: torch.from_numpy(value) for key, value in state.averages.items()}
            self.averaged.module.load_state_dict(averages, strict=False)
            self.averaged.n_averaged.fill_(state.step)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()
