"""The picture of neighborhoods: the right squares in the right places, from either half."""

import numpy as np
import pytest
import tensorflow as tf
import torch
from matplotlib.patches import Rectangle
from skimage import data

from modelspec import DinatConfig
from neighborhood.windows import key_positions
from twinzoo.plots import plot_neighborhoods

CONFIG = DinatConfig(embed_dim=16, depths=[1, 2], num_heads=[2, 4], kernel_size=3, dilations=[[4], [1, 2]])
IMAGE = data.chelsea()[:96, :128]  # maps of 24x32 and 12x16


def attentions(config=CONFIG, maps=((24, 32), (12, 16))):
    generator = np.random.default_rng(0)
    arrays = [
        generator.random((1, heads, *size, config.kernel_size**2))
        for heads, size in zip(config.num_heads, maps, strict=True)
    ]
    return [array / array.sum(-1, keepdims=True) for array in arrays]


def squares(axis):
    """(x, y, width, height) of the keys drawn, and of the query."""
    patches = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    boxes = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in patches]
    return boxes[:-1], boxes[-1]


def test_every_stage_and_head_shows_its_keys(tmp_path):
    figure = plot_neighborhoods(IMAGE, attentions(), CONFIG, (50, 70))
    panels = [axis for axis in figure.axes if axis.get_title()]
    titles = [axis.get_title() for axis in panels]
    assert titles == [
        *(f"stage 1, dilation 4, head {head}" for head in (1, 2)),
        *(f"stage 2, dilation 2, head {head}" for head in (1, 2, 3, 4)),
    ]
    for axis, size, token, cell, dilation in (
        (panels[0], (24, 32), (12, 17), 4, 4),
        (panels[2], (12, 16), (6, 8), 8, 2),
    ):
        keys, query = squares(axis)
        assert query == (token[1] * cell, token[0] * cell, cell, cell)
        rows, columns = (key_positions(n, 3, dilation)[t] for n, t in zip(size, token, strict=True))
        assert keys == [(column * cell, row * cell, cell, cell) for row in rows for column in columns]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_stronger_keys_are_brighter():
    weights = attentions()
    figure = plot_neighborhoods(IMAGE, weights, CONFIG, (50, 70))
    for head in range(2):
        patches = figure.axes[head].patches[:-1]
        brightness = [sum(patch.get_facecolor()[:3]) for patch in patches]
        np.testing.assert_array_equal(np.argsort(brightness), np.argsort(weights[0][0, head, 12, 17]))


@pytest.mark.parametrize("wrap", [torch.tensor, tf.constant, lambda x: torch.tensor(x, requires_grad=True)])
def test_either_halfs_attentions_will_do(wrap):
    expected = plot_neighborhoods(IMAGE, attentions(), CONFIG, (0, 0))
    figure = plot_neighborhoods(IMAGE, [wrap(x) for x in attentions()], CONFIG, (0, 0))
    assert squares(figure.axes[0]) == squares(expected.axes[0])


def test_keys_in_the_padding_are_left_out():
    config = CONFIG.replace(kernel_size=7)
    padded = attentions(config, ((28, 28), (14, 14)))
    figure = plot_neighborhoods(IMAGE, padded, config, (95, 127), input_size=(48, 48))  # maps of 12x12 and 6x6
    keys, _ = squares(figure.axes[0])
    assert 0 < len(keys) < 49
    assert all(0 <= x < 128 and 0 <= y < 96 for x, y, _, _ in keys)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"pixel is \(96, 0\); the image has 96 rows and 128 columns"):
        plot_neighborhoods(IMAGE, attentions(), CONFIG, (96, 0))
    with pytest.raises(ValueError, match="attentions has 1 entries; the config has 2 stages"):
        plot_neighborhoods(IMAGE, attentions()[:1], CONFIG, (0, 0))
    with pytest.raises(ValueError, match="attentions of stage 1 have shape .*of one image"):
        plot_neighborhoods(IMAGE, [x[:, :, :, :, :4] for x in attentions()], CONFIG, (0, 0))
    with pytest.raises(ValueError, match="image has shape"):
        plot_neighborhoods(np.zeros((2, 3, 4, 5)), attentions(), CONFIG, (0, 0))
