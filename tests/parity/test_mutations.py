"""Bugs planted in the Keras half: each must be found in its block, and known mistakes must be called by their names."""

import dataclasses
import types
from collections.abc import Callable

import numpy as np
import pytest
from golden_copy import GOLDEN

from modelspec.checkpoints import probing_weights
from parity import halves
from parity.explaining import UNKNOWN, explain_subject
from parity.photograph import read_photograph
from parity.subjects import checkpoint_subject

SEEDS = 20


@dataclasses.dataclass(frozen=True)
class Bug:
    """A mistake: in which model, how it is made, and what has to be said of it."""

    model: str
    plant: Callable
    block: str
    culprit: str
    changes: dict = dataclasses.field(default_factory=dict)
    size: tuple[int, int] | None = None


def subject(bug: Bug, seed: int):
    found = checkpoint_subject(GOLDEN / bug.model, 0)
    config = found.config.replace(**bug.changes)
    return dataclasses.replace(found, config=config, weights=lambda: probing_weights(config, seed))


def planted(monkeypatch, *plants: Callable) -> None:
    def build(config, weights, dtype):
        model = halves.build_keras(config, weights, dtype)
        for plant in plants:
            plant(model)
        return model

    monkeypatch.setitem(halves.BUILD, "keras", build)


def explained(bug: Bug, seed: int = 0):
    return explain_subject(subject(bug, seed), read_photograph(), bug.size)


def replace_call(layer, call) -> None:
    """Lets `call(original, *args, **kwargs)` be what a layer does."""
    original = layer.call

    def replaced(self, *args, **kwargs):
        return call(original, *args, **kwargs)

    layer.call = types.MethodType(replaced, layer)


def assign(variable, change: Callable) -> None:
    variable.assign(change(np.array(variable.value)))


# --- mistakes that `explain` knows -----------------------------------------------------------------------------------


def other_layer_norm_epsilon(model):
    model.vit.encoder.layer[1].layernorm_before.epsilon = 1e-5


def other_batch_norm_epsilon(model):
    model.swiftformer.encoder.network[4].blocks[1].norm.epsilon = 1e-3


def tanh_gelu(model):
    from tfmodels.layers import ACTIVATIONS

    model.vit.encoder.layer[2].intermediate.act = ACTIVATIONS["gelu_new"]


def same_padding(model):
    import keras

    layer = model.nat.encoder.levels[0].downsample.reduction

    def call(original, x):
        return keras.ops.conv(x, layer.kernel, strides=2, padding="same")

    replace_call(layer, call)


def transposed_weight(model):
    assign(model.vit.encoder.layer[0].attention.attention.query.kernel, np.transpose)


def swapped_statistics(model):
    norm = model.swiftformer.encoder.network[1].norm
    mean, variance = np.array(norm.moving_mean.value), np.array(norm.moving_variance.value)
    norm.moving_mean.assign(variance)
    norm.moving_variance.assign(mean)  # negative in places: NaN


def batch_statistics(model):
    import keras

    norm = model.swiftformer.encoder.network[3].norm

    def call(original, x, training=None):
        mean, variance = keras.ops.moments(x, axes=(0, 1, 2))
        return keras.ops.batch_normalization(
            x, mean, variance, axis=-1, offset=norm.beta, scale=norm.gamma, epsilon=norm.epsilon
        )

    replace_call(norm, call)


def swapped_gamma_and_beta(model):
    norm = model.nat.encoder.levels[1].layers[0].layernorm_after
    gamma, beta = np.array(norm.gamma.value), np.array(norm.beta.value)
    norm.gamma.assign(beta)
    norm.beta.assign(gamma)


def transposed_bias_table(model):
    assign(model.nat.encoder.levels[0].layers[1].attention.self.rpb, lambda table: table.transpose(0, 2, 1))


def flipped_bias_table(model):
    assign(model.dinat.encoder.levels[1].layers[0].attention.self.rpb, lambda table: table[:, ::-1, ::-1])


def other_dilation(model):
    model.dinat.encoder.levels[0].layers[1].attention.self.dilation = 2


def antialias(model):
    import torch

    layer = model.vit.embeddings

    def interpolate_positions(height, width):
        import keras

        table = np.array(layer.position_embeddings.value)
        grid = torch.from_numpy(table[:, 1:]).reshape(1, layer.grid_size, layer.grid_size, -1).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, (height, width), mode="bicubic", antialias=True)
        positions = np.concatenate([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).numpy()], axis=1)
        return keras.ops.convert_to_tensor(positions)

    layer.interpolate_positions = interpolate_positions


def unscaled_attention(model):
    layer = model.vit.encoder.layer[1].attention.attention
    split = layer.split_heads
    calls = []

    def split_heads(x):
        calls.append(None)
        return split(x) * (8**0.5 if len(calls) % 3 == 1 else 1.0)  # of the query alone

    layer.split_heads = split_heads


def swapped_key_and_value(model):
    layer = model.vit.encoder.layer[2].attention.attention
    for name in ("kernel", "bias"):
        key, value = (np.array(getattr(part, name).value) for part in (layer.key, layer.value))
        getattr(layer.key, name).assign(value)
        getattr(layer.value, name).assign(key)


def no_layer_scale(model):
    assign(model.nat.encoder.levels[2].layers[0].layer_scale_parameters, np.ones_like)


def l2_instead_of_softmax(model):
    model.swiftformer.encoder.network[2].blocks[-1].attn.attention_norm = "l2"


def flipped_kernel(model):
    kernel = model.swiftformer.encoder.network[0].blocks[0].depth_wise_conv.kernel
    assign(kernel, lambda values: values[::-1, ::-1])


def padded_before_the_norm(model):
    layer = model.dinat.encoder.levels[2].layers[1]
    norm, pad = layer.layernorm_before, layer.pad_to_window

    def pad_to_window(x):
        import keras

        padding = 1 - pad(keras.ops.ones_like(x))
        return pad(x) + padding * norm.beta

    layer.pad_to_window = pad_to_window


def no_bias(model):
    assign(model.classifier.bias, np.zeros_like)


def colours_in_another_order(model):
    layer = model.swiftformer.patch_embed
    replace_call(layer, lambda original, x: original(x[..., ::-1]))


def heads_dealt_in_turn(model):
    import keras

    layer = model.nat.encoder.levels[0].layers[0].attention.self

    def split_heads(x):
        *sizes, dim = keras.ops.shape(x)
        return keras.ops.swapaxes(keras.ops.reshape(x, (*sizes, dim // layer.num_heads, layer.num_heads)), -1, -2)

    layer.split_heads = split_heads


def no_residual(model):
    block = model.swiftformer.encoder.network[0].blocks[0]
    replace_call(block, lambda original, x: original(x) - x)


KNOWN = [
    Bug("vit_msn_tiny", other_layer_norm_epsilon, "vit.encoder.layer.1", "epsilon"),
    Bug("swiftformer_tiny", other_batch_norm_epsilon, "swiftformer.encoder.network.4.blocks.1", "epsilon"),
    Bug("vit_msn_tiny", tanh_gelu, "vit.encoder.layer.2", "activation"),
    Bug("nat_tiny", same_padding, "nat.encoder.levels.0.downsample", "padding"),
    Bug("vit_msn_tiny", transposed_weight, "vit.encoder.layer.0", "weight_layout"),
    Bug("swiftformer_tiny", swapped_statistics, "swiftformer.encoder.network.1", "running_statistics"),
    Bug("swiftformer_tiny", batch_statistics, "swiftformer.encoder.network.3", "running_statistics"),
    Bug("nat_tiny", swapped_gamma_and_beta, "nat.encoder.levels.1.layers.0", "weight_and_bias"),
    Bug("nat_tiny", transposed_bias_table, "nat.encoder.levels.0.layers.1", "bias_table"),
    Bug("dinat_tiny", flipped_bias_table, "dinat.encoder.levels.1.layers.0", "bias_table"),
    Bug("dinat_tiny", other_dilation, "dinat.encoder.levels.0.layers.1", "dilation"),
    Bug("vit_msn_tiny", antialias, "vit.embeddings", "interpolation", size=(24, 56)),
    Bug("vit_msn_tiny", unscaled_attention, "vit.encoder.layer.1", "attention_scale"),
    Bug("vit_msn_tiny", swapped_key_and_value, "vit.encoder.layer.2", "sibling_weights"),
    Bug("nat_tiny", no_layer_scale, "nat.encoder.levels.2.layers.0", "layer_scale", {"layer_scale_init_value": 0.5}),
    Bug("swiftformer_tiny", l2_instead_of_softmax, "swiftformer.encoder.network.2.blocks.0", "attention_norm"),
    Bug("swiftformer_tiny", flipped_kernel, "swiftformer.encoder.network.0.blocks.0", "weight_layout"),
    Bug("dinat_tiny", padded_before_the_norm, "dinat.encoder.levels.2.layers.1", "window_padding"),
    Bug("vit_msn_tiny", no_bias, "classifier", "weight_and_bias"),
    Bug("swiftformer_tiny", colours_in_another_order, "swiftformer.patch_embed", "channel_order"),
    Bug("nat_tiny", heads_dealt_in_turn, "nat.encoder.levels.0.layers.0", "projections"),
    Bug("swiftformer_tiny", no_residual, "swiftformer.encoder.network.0.blocks.0", "residual"),
]


# --- mistakes that it does not know ----------------------------------------------------------------------------------


def one_weight_off(model):
    def change(values):
        values[0, 0] *= 1 + 1e-6
        return values

    assign(model.vit.encoder.layer[1].output.dense.kernel, change)


def rolled_tokens(model):
    import keras

    replace_call(model.vit.encoder.layer[0].intermediate, lambda original, x: keras.ops.roll(original(x), 1, axis=1))


def clipped(model):
    import keras

    layer = model.nat.encoder.levels[0].layers[1].output
    replace_call(layer, lambda original, x: keras.ops.clip(original(x), -0.5, 0.5))


def a_detour_through_float32(model):
    import keras

    layer = model.swiftformer.encoder.network[4].blocks[0].point_wise_conv1
    replace_call(layer, lambda original, x: keras.ops.cast(keras.ops.cast(original(x), "float32"), "float64"))


def shifted_map(model):
    import keras

    layer = model.dinat.encoder.levels[1].layers[0].attention.self
    replace_call(layer, lambda original, x, **options: original(keras.ops.roll(x, 1, axis=2), **options))


def another_mean(model):
    import keras

    replace_call(model.norm, lambda original, x, **options: original(x, **options) - 1e-6 * keras.ops.max(x))


UNKNOWN_BUGS = [
    Bug("vit_msn_tiny", one_weight_off, "vit.encoder.layer.1", UNKNOWN),
    Bug("vit_msn_tiny", rolled_tokens, "vit.encoder.layer.0", UNKNOWN),
    Bug("nat_tiny", clipped, "nat.encoder.levels.0.layers.1", UNKNOWN),
    Bug("swiftformer_tiny", a_detour_through_float32, "swiftformer.encoder.network.4.blocks.0", UNKNOWN),
    Bug("dinat_tiny", shifted_map, "dinat.encoder.levels.1.layers.0", UNKNOWN),
    Bug("swiftformer_tiny", another_mean, "norm", UNKNOWN),
]

_of = {bug.plant.__name__: bug for bug in [*KNOWN, *UNKNOWN_BUGS]}
PAIRS = [
    (_of["other_layer_norm_epsilon"], _of["tanh_gelu"]),
    (_of["transposed_weight"], _of["no_bias"]),
    (_of["other_batch_norm_epsilon"], _of["flipped_kernel"]),
    (_of["same_padding"], _of["transposed_bias_table"]),
    (_of["other_dilation"], _of["padded_before_the_norm"]),
]

each = pytest.mark.parametrize("bug", [*KNOWN, *UNKNOWN_BUGS], ids=lambda bug: bug.plant.__name__)


def check(bug: Bug, seed: int) -> None:
    found = explained(bug, seed)
    assert {explanation.block for explanation in found} == {bug.block}
    assert {explanation.culprit for explanation in found} == {bug.culprit}
    assert all(bool(explanation.sentence) == (bug.culprit != UNKNOWN) for explanation in found)


@each
def test_a_planted_bug_is_found_in_its_block_and_named(bug, monkeypatch):
    planted(monkeypatch, bug.plant)
    check(bug, 0)


@pytest.mark.slow
@each
def test_it_is_with_any_weights(bug, monkeypatch):
    planted(monkeypatch, bug.plant)
    for seed in range(1, SEEDS):
        check(bug, seed)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "_and_".join(bug.plant.__name__ for bug in pair))
def test_of_two_bugs_both_are_named(pair, monkeypatch):
    planted(monkeypatch, *(bug.plant for bug in pair))
    found = {explanation.block: explanation.culprit for explanation in explained(pair[0])}
    assert found == {bug.block: bug.culprit for bug in pair}


def test_there_are_as_many_as_promised():
    assert len(KNOWN) >= 15 and len({bug.culprit for bug in KNOWN}) >= 15
    assert len(UNKNOWN_BUGS) >= 6 and len(PAIRS) >= 5


@pytest.mark.parametrize("model", ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"])
def test_a_right_pair_has_nothing_to_explain(model):
    assert explained(Bug(model, lambda model: None, "", "")) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"])
def test_a_right_pair_passes_with_any_weights(model):
    for seed in range(SEEDS):
        assert explained(Bug(model, lambda model: None, "", ""), seed) == []
