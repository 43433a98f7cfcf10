"""One small training, the same for both halves, in one process and in several; and what two of them must agree in."""

import json

import numpy as np

from modelspec import DinatConfig, NatConfig, SwiftFormerConfig, ViTMSNConfig
from modelspec.agreement import compare_all
from modelspec.configs import ModelConfig
from modelspec.training import ArrayImages, EvaluationBatches, Recipe, TrainingBatches, TrainingState
from modelspec.zero_gradients import has_zero_gradient

WINDOWS = {"depths": [2, 1], "num_heads": [1, 2], "embed_dim": 8, "kernel_size": 3, "drop_path_rate": 0.0}
CONFIGS = {
    "swiftformer": (SwiftFormerConfig, {"depths": [2, 1], "embed_dims": [16, 24], "downsamples": [True, True]}),
    "dinat": (DinatConfig, {**WINDOWS, "dilations": [[1, 2], [1]], "layer_scale_init_value": 0.5}),
    "nat": (NatConfig, WINDOWS),
    "vit_msn": (
        ViTMSNConfig,
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
}
# 20 steps of 43 images. No option is left at a value that changes nothing; parts of 5 are no two equal shares. Epsilon
# is not smaller, or AdamW makes steps of what is rounding noise: the gradients that are zero by construction.
RECIPE = {
    "epsilon": 1e-5,
    "epochs": 5,
    "batch_size": 10,
    "learning_rate": 3e-3,
    "min_learning_rate": 1e-4,
    "warmup_epochs": 0.5,
    "weight_decay": 0.1,
    "layer_decay": 0.7,
    "clip_norm": 0.5,
    "label_smoothing": 0.1,
    "mixup": 0.3,
    "ema": 0.8,
    "accumulation_steps": 2,
    "freeze": "stem",
    "seed": 3,
}
ONE_EPOCH = {"epochs": 1, "warmup_epochs": 0}
DROPPING = {
    "vit_msn": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "swiftformer": {"drop_path_rate": 0.3, "drop_mlp_rate": 0.2, "drop_conv_encoder_rate": 0.2},
    "nat": {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
}


def small_config(family, **changes) -> ModelConfig:
    make, options = CONFIGS[family]
    return make(**{**options, "num_labels": 10, **changes})


def random_images(count) -> ArrayImages:
    draws = np.random.default_rng(0)
    return ArrayImages(draws.standard_normal((count, 3, 32, 32)), draws.integers(0, 10, count))


def train(fine_tune, model, data, *, recipe=None, state_path=None, keep=None, teacher=None):
    """Trains a model as a half's `fine_tune` does.

    Args:
        fine_tune: of the half.
        model: in float64.
        data: what to train on; the first seven images are also held out.
        recipe: what differs from `RECIPE`.
        state_path: what to go on from, and where the state is written.
        keep: (epoch, path): the state after the epoch is copied to the path.
        teacher: what it says of every image.

    Returns:
        The curves as arrays, and the last state, where there is one.
    """
    taught = None if teacher is None else lambda pixel_values: np.eye(10)[np.full(len(pixel_values), teacher)]
    options = {**RECIPE, "distillation": teacher is not None, **(recipe or {})}
    losses, states = [], [None]

    def on_epoch(state):
        states.append(state)
        if keep is not None and state.epoch == keep[0]:
            state.save(keep[1])

    history = fine_tune(
        model,
        TrainingBatches(data, Recipe(**options), 10, teacher=taught),
        validation=EvaluationBatches(ArrayImages(data.images[:7], data.labels[:7]), 10, batch_size=3),
        on_step=lambda step, steps, loss: losses.append(loss),
        on_epoch=on_epoch,
        state_path=state_path,
    )
    return {"losses": np.array(losses), **{name: np.array(value) for name, value in history.items()}}, states[-1]


def all_arrays(weights, curves, state: TrainingState | None) -> dict[str, np.ndarray]:
    """All that a training leaves, in one dictionary."""
    arrays = {f"curves/{name}": np.array(values) for name, values in curves.items()}
    arrays |= {f"model/{key}": value for key, value in weights.items()}
    if state is not None:
        for group in ("weights", "first_moments", "second_moments", "averages"):
            arrays |= {f"{group}/{key}": value for key, value in getattr(state, group).items()}
    return arrays


def in_one_process(case) -> str:
    """The same case for one process, from the beginning, in JSON."""
    of_several = ("strategy", "keep", "state_path", "implementation")
    case = {name: value for name, value in case.items() if name not in of_several}
    if "recipe" in case:
        case["recipe"] = {name: value for name, value in case["recipe"].items() if name != "gradient_checkpointing"}
    return json.dumps(case)


def assert_same(family, found, wanted, going_on_after=0):
    """Curves, weights, statistics, moments and averages agree; of the losses there are only those that were left."""
    assert set(found) == set(wanted)
    for name in [name for name in wanted if name.startswith("curves/")]:
        values = wanted[name][going_on_after * 4 :] if name == "curves/losses" else wanted[name]
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-11, err_msg=name)
    for group in sorted({name.partition("/")[0] for name in wanted} - {"curves"}):
        ours, theirs = (
            {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(f"{group}/")}
            for arrays in (found, wanted)
        )
        assert ours and all(ours[key].dtype == theirs[key].dtype for key in theirs)
        if "moments" in group:  # where they are zero by construction, they are rounding noise
            largest = max(np.abs(value).max() for value in theirs.values())
            for key in [key for key in theirs if has_zero_gradient(small_config(family), key, training=True)]:
                assert max(np.abs(arrays.pop(key)).max() for arrays in (ours, theirs)) < 1e-12 * largest
        differing = {key: value.max_rel for key, value in compare_all(ours, theirs, 1e-10).items() if not value.passed}
        assert not differing


def assert_follows(case, arrays, wanted, going_on_after=0):
    """The first process leaves what one alone leaves; the others have its model, and wrote and told nothing."""
    steps = 4 * case.get("recipe", {}).get("epochs", RECIPE["epochs"])
    assert len(wanted["curves/losses"]) == steps == len(set(wanted["curves/losses"]))
    first, *others = arrays
    assert_same(case["family"], first, wanted, going_on_after)
    for other in others:
        assert not {key for key in other if key.startswith(("weights/", "first_moments/"))}
        assert len(other["curves/losses"]) == 0
        for key, value in first.items():
            if key.startswith("model/"):
                np.testing.assert_array_equal(other[key], value)
