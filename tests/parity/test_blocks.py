"""Taps, recordings and the rules of blocks, on small models made for it."""

import keras
import numpy as np
import pytest
import torch
from golden_copy import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modelspec import get_config
from parity import check, layers
from parity.blocks import Comparing, Layouts, Recording, RecordingTooLarge, block_of, blocks, in_layout_of
from parity.layers import heat_map
from parity.taps import KerasTap, TorchTap
from parity.variants import reduced
from ptmodels.auto import model_class


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.LeakyReLU(0.125, inplace=True)

    def forward(self, x):
        return x + self.act(self.linear(self.act(self.linear(x))))  # each is called twice


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.body = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.body:
            x = block(x)
        return {"logits": self.head(x), "hidden": (x,)}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def tap(net) -> TorchTap:
    return TorchTap(net, lambda: net(torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)))


def test_blocks_are_layers_of_lists_and_those_beside_them(net):
    assert blocks(tap(net)) == ["stem", "body.0", "body.1", "head"]
    assert block_of("body.1.linear", blocks(tap(net))) == "body.1"
    assert block_of("body.0 (own code)", blocks(tap(net))) == "body.0"


def test_blocks_of_the_four_families():
    found = {}
    for name in ("dinat-mini", "swiftformer-xs", "vit-msn-small"):
        config = reduced(get_config(name))
        found[name] = blocks(TorchTap(model_class(config.model_type)(config), None))
    assert found["dinat-mini"][:4] == [
        "dinat.embeddings",
        "dinat.encoder.levels.0.layers.0",
        "dinat.encoder.levels.0.layers.1",
        "dinat.encoder.levels.0.downsample",
    ]
    assert found["swiftformer-xs"][:2] == ["swiftformer.patch_embed", "swiftformer.encoder.network.0.blocks.0"]
    assert found["swiftformer-xs"][-3:] == ["norm", "head", "dist_head"]
    assert found["vit-msn-small"] == [
        "vit.embeddings",
        "vit.encoder.layer.0",
        "vit.encoder.layer.1",
        "vit.layernorm",
        "classifier",
    ]


def test_every_call_is_recorded_as_it_was_though_layers_work_in_place(net):
    found = tap(net)
    recording = Recording(list(found.layers))
    outputs = found.run(recording)
    assert outputs.keys() == {"logits", "hidden.0"}
    assert [call for call, ended in recording.order if ended][:5] == [
        ("stem", 0),
        ("body.0.linear", 0),
        ("body.0.act", 0),
        ("body.0.linear", 1),
        ("body.0.act", 1),
    ]
    before, after = recording.inputs["body.0.act", 0][0], recording.outputs["body.0.act", 0][0]
    assert (before < 0).any() and np.array_equal(after, np.maximum(before, before / 8))
    assert recording.parents["body.0.act"] == "body.0" and recording.parents["stem"] == ""
    with pytest.raises(RecordingTooLarge):
        found.run(Recording(list(found.layers), max_bytes=100))


def findings(net, recording, **options) -> dict[str, float]:
    comparing = Comparing(recording, list(recording.layers), "float64", 1e-10, **options)
    tap(net).run(comparing)
    return {found.layer: found.agreement.passed for found in comparing.findings()}


def test_forced_layers_are_judged_by_themselves(net):
    recording = Recording(list(tap(net).layers))
    tap(net).run(recording)
    assert all(findings(net, recording, forced=True, split=True).values())
    with torch.no_grad():
        net.body[0].linear.weight += 1e-6
    free = findings(net, recording)
    assert free["stem"] and not free["body.0"] and not free["body.1"] and not free["head"]
    forced = findings(net, recording, forced=True, split=True)
    assert {layer for layer, passed in forced.items() if not passed} == {"body.0.linear"}

    net.body[0].forward = lambda x: x + net.body[0].act(net.body[0].linear(x))  # one time less, and the bug is there
    missing = findings(net, recording, forced=True, split=True)
    assert not missing["body.0.act"] and not missing["body.0 (own code)"]


def test_nothing_is_left_behind(net):
    recording = Recording(list(tap(net).layers))
    original = keras.layers.Layer.__call__
    dense = keras.layers.Dense(2, activation="relu")
    model = keras.Sequential([dense])
    x = np.ones((1, 3), np.float32)
    expected = np.asarray(model(x))
    found = KerasTap(model, lambda: model(x))
    assert list(found.layers) == [dense.name, f"{dense.name}:activation"]
    assert np.array_equal(found.run(recording)["output"], expected)
    assert keras.layers.Layer.__call__ is original and dense.activation is keras.activations.relu
    tap(net).run(recording)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_large_recordings_keep_whole_blocks_only_and_say_so(monkeypatch):
    monkeypatch.setattr(layers, "MAX_RECORDING", 1000)
    report = check(checkpoint=GOLDEN / "vit_msn_tiny", levels=["layers"], dtypes=["float64"])
    assert report.passed and "Only whole blocks are compared" in " ".join(report.models[0].notes)
    names = {row.layer for row in report.results if row.mode == "forced"}
    assert names == {"vit.embeddings", *(f"vit.encoder.layer.{n}" for n in range(3)), "vit.layernorm", "classifier"} | {
        f"{container} (own code)" for container in ("model", "vit", "vit.encoder")
    }


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 100))
def test_heat_maps_are_small_and_keep_the_largest_number(shape, seed):
    array = np.random.default_rng(seed).random(shape)
    heat, what = heat_map(array)
    assert heat.ndim == 2 and max(heat.shape) <= 64 and heat.max() == array.max() and what


def test_heat_maps_of_large_arrays():
    array = np.zeros((2, 197, 384))
    array[1, 100, 300] = 5.0
    heat, what = heat_map(array)
    assert heat.shape == (50, 64) and heat[100 // 4, 300 // 6] == 5.0 and "axis 1" in what


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 100), st.sampled_from([(1, -1), (-1, 1), None])
)
def test_layouts_are_found_out_and_undone(shape, seed, moved):
    reference = np.random.default_rng(seed).random(shape)
    actual = reference if moved is None or len(shape) < 3 else np.moveaxis(reference, *moved)
    expected, back = in_layout_of(reference, actual)
    assert np.array_equal(expected, actual) and np.array_equal(back(actual), reference)


def test_where_shapes_and_numbers_cannot_tell_a_layout_it_is_the_last_that_was_clear():
    first, second = np.random.default_rng(0).random((2, 1, 4, 4, 4))
    for moved in ((1, -1), None):
        layouts = Layouts()
        clear = first if moved is None else np.moveaxis(first, *moved)
        layouts.find(first, clear)
        wrong = np.random.default_rng(1).random((1, 4, 4, 4)) * 100
        expected, back = layouts.find(second, wrong)
        assert np.array_equal(expected, second if moved is None else np.moveaxis(second, *moved))
        assert np.array_equal(back(expected), second)
