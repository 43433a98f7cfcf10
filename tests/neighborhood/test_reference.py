"""The windows and the definition of neighborhood attention, against loops, dense attention and recorded outputs."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from neighborhood.reference import attention_probabilities, neighborhood_attention
from neighborhood.windows import bias_positions, key_positions, per_axis


@st.composite
def axes(draw):
    """Lengths, kernel sizes and dilations of one to three axes that fit."""
    sizes = []
    for _ in range(draw(st.integers(1, 3))):
        kernel_size, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        sizes.append((kernel_size * dilation + draw(st.integers(0, 3)), kernel_size, dilation))
    return [tuple(column) for column in zip(*sizes, strict=True)]


@given(length=st.integers(1, 40), kernel_size=st.integers(1, 13), dilation=st.integers(1, 6))
def test_every_query_has_its_nearest_neighbours(length, kernel_size, dilation):
    if kernel_size * dilation > length:
        with pytest.raises(ValueError, match=f"more than the {length} positions"):
            key_positions(length, kernel_size, dilation)
        return
    keys = key_positions(length, kernel_size, dilation)
    for query, row in enumerate(keys):
        group = list(range(query % dilation, length, dilation))
        assert set(row) <= set(group) and query in row
        assert (np.diff(row) == dilation).all()  # ascending, without a gap
        left = np.sum(row < query)
        inside = row[0] > group[0] and row[-1] < group[-1]
        assert not inside or left == kernel_size // 2  # only a border shifts a window


@given(length=st.integers(1, 40), kernel_size=st.integers(1, 13), dilation=st.integers(1, 6))
def test_the_bias_is_looked_up_by_distance(length, kernel_size, dilation):
    if kernel_size * dilation > length:
        return
    entries = bias_positions(length, kernel_size, dilation)
    assert entries.min() >= 0 and entries.max() <= 2 * kernel_size - 2
    distance = (entries - (kernel_size - 1)) * dilation
    assert np.array_equal(np.arange(length)[:, None] + distance, key_positions(length, kernel_size, dilation))


def in_loops(query, key, value, kernel_size, dilation, table, scale):
    """Neighborhood attention query by query and key by key."""
    output = np.zeros_like(query)
    batch, *spatial, heads, _ = query.shape
    for b, head in itertools.product(range(batch), range(heads)):
        for position in itertools.product(*map(range, spatial)):
            choices = [
                key_positions(*sizes)[i]
                for sizes, i in zip(zip(spatial, kernel_size, dilation, strict=True), position, strict=True)
            ]
            logits, values = [], []
            for neighbour in itertools.product(*choices):
                entry = [
                    (n - p) // d + k - 1 for n, p, d, k in zip(neighbour, position, dilation, kernel_size, strict=True)
                ]
                bias = 0.0 if table is None else table[(head, *entry)]
                logits.append(scale * query[(b, *position, head)] @ key[(b, *neighbour, head)] + bias)
                values.append(value[(b, *neighbour, head)])
            weights = np.exp(np.array(logits) - max(logits))
            output[(b, *position, head)] = weights / weights.sum() @ np.array(values)
    return output


@settings(max_examples=25)
@given(sizes=axes(), heads=st.integers(1, 2), head_dim=st.integers(1, 3), biased=st.booleans(), seed=st.integers(0, 99))
def test_the_definition_equals_loops(sizes, heads, head_dim, biased, seed):
    spatial, kernel_size, dilation = sizes
    generator = np.random.default_rng(seed)
    query, key, value = generator.standard_normal((3, 1, *spatial, heads, head_dim))
    table = generator.standard_normal((heads, *(2 * k - 1 for k in kernel_size))) if biased else None
    actual = neighborhood_attention(query, key, value, kernel_size, dilation, rel_pos_bias=table, scale=0.7)
    np.testing.assert_allclose(actual, in_loops(query, key, value, kernel_size, dilation, table, 0.7), atol=1e-12)


def test_a_window_as_large_as_the_map_is_plain_attention():
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 3, 4, 2, 5))
    logits = np.einsum("bqhd,bkhd->bhqk", *(x.reshape(2, 12, 2, 5) for x in (query, key))) / np.sqrt(5)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value.reshape(2, 12, 2, 5)).reshape(query.shape)
    np.testing.assert_allclose(neighborhood_attention(query, key, value, (3, 4)), expected, atol=1e-13)


@pytest.mark.parametrize(("name", "dilation"), [("nat_tiny", 1), ("dinat_tiny", 2)])
def test_recorded_attentions_of_the_reference_models(golden, name, dilation):
    """The second stage is a single block, so that its input is a recorded hidden state."""
    folder, prefix = golden(name), name.partition("_")[0]
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    recorded = np.load(folder / "io.npz")
    keys = [key for key in recorded if key.endswith("hidden_states.1") and "reshaped" not in key]
    attentions = [key for key in recorded if key.endswith("attentions.1")]
    assert keys and attentions
    heads, kernel_size = config["num_heads"][1], config["kernel_size"]
    checked = 0
    for hidden_key in keys:
        attention_key = hidden_key.replace("hidden_states", "attentions")
        if attention_key not in attentions:
            continue
        block = f"{prefix}.encoder.levels.1.layers.0."
        x = recorded[hidden_key].astype(np.float64)
        if min(x.shape[1:3]) < kernel_size * dilation:
            continue  # the model pads such maps
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config["layer_norm_eps"])
        x = x * weights[block + "layernorm_before.weight"] + weights[block + "layernorm_before.bias"]
        query, key = (
            (x @ weights[f"{block}attention.self.{part}.weight"].T + weights[f"{block}attention.self.{part}.bias"])
            for part in ("query", "key")
        )
        query, key = (part.reshape(*part.shape[:-1], heads, -1) for part in (query, key))
        table = weights[block + "attention.self.rpb"]
        ours = attention_probabilities(query, key, kernel_size, dilation, rel_pos_bias=table)  # (B, H, W, heads, keys)
        np.testing.assert_allclose(np.moveaxis(ours, -2, 1), recorded[attention_key], rtol=0, atol=2e-5)
        checked += 1
    assert checked


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "7", (3,), (3, 3, 3), (3, 0), None])
def test_a_bad_size_names_itself(value):
    with pytest.raises(ValueError, match="kernel_size is .*or 2 of them"):
        per_axis("kernel_size", value, 2)


def test_shapes_that_do_not_go_together_are_named():
    x = np.zeros((1, 4, 4, 2, 3))
    with pytest.raises(ValueError, match="query has shape .* and key"):
        neighborhood_attention(x, x[:, :3], x, 3)
    with pytest.raises(ValueError, match="query has shape .* and value"):
        neighborhood_attention(x, x, x[..., :2], 3)
    with pytest.raises(ValueError, match="one to three spatial axes"):
        neighborhood_attention(x[0, 0], x[0, 0], x[0, 0], 3)
    with pytest.raises(
        ValueError, match=r"rel_pos_bias has shape \(2, 3, 3\); these heads and windows need \(2, 5, 5\)"
    ):
        neighborhood_attention(x, x, x, 3, rel_pos_bias=np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="kernel_size 3 times dilation 2 is 6, more than the 4 positions"):
        neighborhood_attention(x, x, x, 3, 2)
