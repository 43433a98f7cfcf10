"""The layers `NeighborhoodAttention1D`, `2D` and `3D` of both halves."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import torch

import ptmodels.layers
import tfmodels.layers

CASES = [
    ("NeighborhoodAttention1D", (2, 17, 12), {"kernel_size": 5, "dilation": 2}),
    ("NeighborhoodAttention2D", (2, 9, 11, 12), {"kernel_size": (3, 5), "dilation": (2, 1)}),
    ("NeighborhoodAttention3D", (1, 4, 5, 6, 12), {"kernel_size": (2, 3, 3)}),
]
OPTIONS = {"rel_pos_bias": True, "qk_scale": 0.4}


def twins(name, arguments, **options):
    """The same layer in both halves, with the same random weights, in float64."""
    torch_layer = getattr(ptmodels.layers, name)(12, 3, **arguments, **options).double()
    keras_layer = getattr(tfmodels.layers, name)(12, 3, **arguments, **options, dtype="float64")
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in torch_layer.parameters():
            parameter.copy_(torch.tensor(generator.standard_normal(tuple(parameter.shape))))
    state = {key: value.detach().numpy() for key, value in torch_layer.state_dict().items()}
    keras_layer.qkv.kernel.assign(state["qkv.weight"].T)
    keras_layer.proj.kernel.assign(state["proj.weight"].T)
    keras_layer.proj.bias.assign(state["proj.bias"])
    if "qkv.bias" in state:
        keras_layer.qkv.bias.assign(state["qkv.bias"])
    if "rpb" in state:
        keras_layer.rpb.assign(state["rpb"])
    return torch_layer, keras_layer


@pytest.mark.parametrize("implementation", ["auto", "composed"])
@pytest.mark.parametrize(("name", "shape", "arguments"), CASES)
def test_both_halves_agree(name, shape, arguments, implementation):
    for options in (OPTIONS, {"qkv_bias": False}):
        torch_layer, keras_layer = twins(name, arguments, **options, implementation=implementation)
        x = np.random.default_rng(1).standard_normal(shape)
        expected, attentions = torch_layer(torch.tensor(x), output_attentions=True)
        np.testing.assert_allclose(torch_layer(torch.tensor(x)).detach(), expected.detach(), atol=1e-12)
        np.testing.assert_allclose(keras_layer(x), expected.detach(), atol=1e-12)
        output, weights = keras_layer(x, output_attentions=True)
        np.testing.assert_allclose(output, expected.detach(), atol=1e-12)
        np.testing.assert_allclose(weights, attentions.detach(), atol=1e-13)
        keys = np.prod(np.broadcast_to(arguments["kernel_size"], len(shape) - 2))
        assert tuple(weights.shape) == (*shape[:-1], 3, keys)


@pytest.mark.parametrize(("name", "shape", "arguments"), CASES)
def test_parameters_are_nattens(name, shape, arguments):
    layer = getattr(ptmodels.layers, name)(12, 3, **arguments, rel_pos_bias=True)
    keys = ["rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert list(layer.state_dict()) == keys
    sizes = np.broadcast_to(arguments["kernel_size"], len(shape) - 2)
    assert layer.rpb.shape == (3, *(2 * sizes - 1))
    assert 0 < layer.rpb.std() < 0.05
    assert getattr(tfmodels.layers, name)(12, 3, **arguments, rel_pos_bias=True).rpb.shape == layer.rpb.shape


def test_dropout_is_of_training_only():
    torch_layer, keras_layer = twins(*CASES[1][::2], attn_drop=0.5, proj_drop=0.25)
    x = np.random.default_rng(1).standard_normal(CASES[1][1])
    assert not np.allclose(keras_layer(x, training=True), keras_layer(x))
    assert not torch.allclose(torch_layer(torch.tensor(x)), torch_layer.eval()(torch.tensor(x)))
    np.testing.assert_allclose(keras_layer(x), torch_layer(torch.tensor(x)).detach(), atol=1e-12)
    _, weights = keras_layer(x, output_attentions=True, training=True)
    dropped = float(np.mean(np.asarray(weights) == 0))
    assert 0.4 < dropped < 0.6


def test_keras_layers_take_unknown_sizes_and_say_their_shape():
    inputs = keras.Input((None, None, 12))
    layer = tfmodels.layers.NeighborhoodAttention2D(12, 3, 3, rel_pos_bias=True)
    outputs = layer(inputs)
    assert outputs.shape == (None, None, None, 12)
    assert layer.compute_output_shape((None, 7, 8, 12)) == (None, 7, 8, 12)
    model = keras.Model(inputs, outputs)
    for shape in [(1, 5, 9, 12), (3, 8, 4, 12)]:
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        np.testing.assert_allclose(model.predict(x, verbose=0), layer(x), atol=1e-6)


@pytest.mark.parametrize(("name", "shape", "arguments"), CASES)
def test_keras_layers_are_rebuilt_from_their_config(name, shape, arguments):
    layer = getattr(tfmodels.layers, name)(
        12, 3, **arguments, **OPTIONS, qkv_bias=False, attn_drop=0.1, proj_drop=0.2, implementation="composed", name="n"
    )
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    assert [tuple(v.shape) for v in again.weights] == [tuple(v.shape) for v in layer.weights]


def test_a_saved_model_reloads_in_a_new_process(tmp_path):
    inputs = keras.Input((9, 11, 12))
    outputs = tfmodels.layers.NeighborhoodAttention2D(12, 3, (3, 5), rel_pos_bias=True)(inputs)
    model = keras.Model(inputs, outputs)
    x = np.random.default_rng(0).standard_normal((2, 9, 11, 12)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    model.save(tmp_path / "model.keras")
    code = f"""
import keras, numpy as np
import tfmodels.layers
model = keras.models.load_model(r"{tmp_path / "model.keras"}")
np.save(r"{tmp_path / "y.npy"}", model(np.load(r"{tmp_path / "x.npy"}")))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), model(x))


def fitted(implementation, **compile_options):
    """A model with one layer, trained for a step; its input is drawn."""
    keras.utils.set_random_seed(0)
    layer = tfmodels.layers.NeighborhoodAttention2D(12, 3, 3, rel_pos_bias=True, implementation=implementation)
    model = keras.Sequential([keras.Input((8, 9, 12)), layer, keras.layers.GlobalAveragePooling2D()])
    model.compile("sgd", "mse", **compile_options)
    x = np.random.default_rng(0).standard_normal((4, 8, 9, 12)).astype("float32")
    model.fit(x, x.mean((1, 2)), verbose=0, batch_size=4)
    return model


def test_auto_and_composed_layers_are_compiled_by_xla_for_real():
    for implementation in ("auto", "composed"):
        model = fitted(implementation, jit_compile=True)
        assert model.jit_compile is True
        for ours, theirs in zip(model.get_weights(), fitted("native", jit_compile=False).get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_native_layers_fall_back_from_xla_with_a_warning():
    with pytest.warns(UserWarning, match="does not support .*jit_compile|jit_compile"):
        model = fitted("native", jit_compile=True)
    assert model.jit_compile is False


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_float32_weights(policy):
    layer = tfmodels.layers.NeighborhoodAttention2D(12, 3, 3, rel_pos_bias=True, dtype=policy)
    x = np.random.default_rng(0).standard_normal((2, 8, 9, 12)).astype("float32")
    output = layer(x)
    assert keras.backend.standardize_dtype(output.dtype) == policy.removeprefix("mixed_")
    assert {keras.backend.standardize_dtype(v.dtype) for v in layer.weights} == {"float32"}
    single = tfmodels.layers.NeighborhoodAttention2D(12, 3, 3, rel_pos_bias=True)
    single.set_weights(layer.get_weights())
    np.testing.assert_allclose(np.asarray(output, "float32"), single(x), atol=0.05)


@pytest.mark.parametrize("half", [ptmodels.layers, tfmodels.layers])
def test_bad_arguments_are_named(half):
    layer = half.NeighborhoodAttention2D
    with pytest.raises(ValueError, match="embed_dim is 12 and num_heads 5; heads must divide the channels"):
        layer(12, 5, 3)
    with pytest.raises(ValueError, match="kernel_size is .*or 2 of them"):
        layer(12, 3, (3, 3, 3))
    with pytest.raises(ValueError, match="dilation is 0"):
        layer(12, 3, 3, 0)
    with pytest.raises(ValueError, match="attn_drop is 1.0; it must be at least 0 and less than 1"):
        layer(12, 3, 3, attn_drop=1.0)
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        layer(12, 3, 3, implementation="cuda")
    with pytest.raises(ValueError, match=r"x has shape \(1, 5, 12\); give \(batch, height, width, 12\)"):
        layer(12, 3, 3)(torch.zeros(1, 5, 12) if half is ptmodels.layers else np.zeros((1, 5, 12), "float32"))


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_hooks_and_other_modules_see_the_product_for_queries_keys_and_values(qkv_bias):
    layer = ptmodels.layers.NeighborhoodAttention2D(8, 2, 3, qkv_bias=qkv_bias).double()
    x = torch.randn(1, 5, 4, 8, dtype=torch.float64)
    expected = layer(x)
    handle = layer.qkv.register_forward_hook(lambda module, inputs, output: output * 0)
    assert not torch.allclose(layer(x), expected)
    handle.remove()
    torch.testing.assert_close(layer(x), expected)
    layer.qkv = torch.nn.Sequential(layer.qkv)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("use_bias", [True, False])
def test_keras_queries_keys_and_values_are_those_of_one_product(use_bias):
    layer = tfmodels.layers.NeighborhoodAttention2D(8, 2, 3, qkv_bias=use_bias, dtype="float64")
    x = np.random.default_rng(0).standard_normal((1, 5, 4, 8))
    np.testing.assert_allclose(np.concatenate(layer.project(x), -1), layer.qkv(x), rtol=0, atol=1e-12)
