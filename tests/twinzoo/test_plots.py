"""Pictures show the right numbers in the right places, from either half's arrays."""

import numpy as np
import pytest
import tensorflow as tf
import torch
from matplotlib.patches import Rectangle
from skimage import data

from modelspec import DinatConfig
from neighborhood.windows import key_positions
from twinzoo.plots import (
    attention_rollout,
    plot_attention,
    plot_confusion_matrix,
    plot_curves,
    plot_neighborhoods,
)

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


def assert_nothing_is_cut_off(figure):
    figure.draw_without_rendering()
    ends = figure.get_tightbbox().get_points()
    assert (ends[0] >= 0).all() and (ends[1] <= figure.get_size_inches()).all(), f"{ends} of {figure.bbox_inches}"


# Curves

HISTORY = {
    "loss": [2.0, 1.0, 0.5, 0.4],
    "accuracy": [0.2, 0.5, 0.75, 0.8],
    "val_loss": [2.1, 1.2, 0.9, 1.1],
    "val_accuracy": [0.1, 0.4, 0.7, 0.6],
    "learning_rate": [1e-3, 8e-4, 4e-4, 1e-4],
}


def drawn(axis):
    """Label of a line -> its (epoch, value) points."""
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axis.lines}


def test_curves_show_every_epoch():
    figure = plot_curves(HISTORY)
    loss, accuracy, rate = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "accuracy, percent", "learning\nrate"]
    assert drawn(loss) == {
        "training": [(1, 2.0), (2, 1.0), (3, 0.5), (4, 0.4)],
        "validation": [(1, 2.1), (2, 1.2), (3, 0.9), (4, 1.1)],
    }
    assert drawn(accuracy)["training"] == [(1, 20.0), (2, 50.0), (3, 75.0), (4, 80.0)]
    assert drawn(rate) == {"learning rate": [(1, 1e-3), (2, 8e-4), (3, 4e-4), (4, 1e-4)]}
    assert loss.get_title("right") == "best validation: 0.9, epoch 3"
    assert accuracy.get_title("right") == "best validation: 70.0 %, epoch 3"
    assert_nothing_is_cut_off(figure)
    assert rate.get_position().height < 0.5 * loss.get_position().height


def test_curves_pass_over_epochs_without_validation():
    nan = float("nan")
    history = HISTORY | {"val_accuracy": [nan, 0.4, nan, 0.6], "val_loss": [nan] * 4, "loss": [2, float("inf"), 1, nan]}
    loss, accuracy, _ = plot_curves(history).axes
    assert drawn(accuracy)["validation"] == [(2, 40.0), (4, 60.0)]
    assert drawn(loss) == {"training": [(1, 2.0), (3, 1.0)]}
    assert loss.get_title("right") == "best training: 1, epoch 3"


def test_curves_of_what_was_recorded():
    figure = plot_curves({"loss": [3.0, 2.0], "seconds": [60]})
    (axis,) = figure.axes
    assert drawn(axis) == {"training": [(1, 3.0), (2, 2.0)]}
    assert_nothing_is_cut_off(figure)


def test_one_epoch_is_seen():
    figure = plot_curves({key: values[:1] for key, values in HISTORY.items()})
    for axis in figure.axes:
        assert all(line.get_marker() == "o" for line in axis.lines)
    assert_nothing_is_cut_off(figure)


def test_histories_that_cannot_be_drawn_are_named():
    with pytest.raises(ValueError, match="history has the keys seconds; give any of loss, val_loss, "):
        plot_curves({"seconds": [1.0]})
    with pytest.raises(ValueError, match=r"different lengths \(loss 2, val_loss 1\)"):
        plot_curves({"val_loss": [1.0], "loss": [1.0, 2.0]})
    for empty in ([], [[1.0]]):
        with pytest.raises(ValueError, match=r"history\['loss'\] has shape .*one number per epoch"):
            plot_curves({"loss": empty})


# Confusion matrices


def texts(axis):
    """(row, column) -> what is written there."""
    return {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axis.texts}


def test_rows_of_a_confusion_matrix_are_the_true_classes():
    figure = plot_confusion_matrix(
        [[3, 1, 0], [0, 0, 0], [2, 0, 6]], ["cat", "$dog$", "a name of more than 24 letters"]
    )
    axis = figure.axes[0]
    percent = axis.images[0].get_array()
    expected = np.ma.masked_invalid([[75, 25, 0], [np.nan] * 3, [25, 0, 75]])
    np.testing.assert_array_equal(percent.filled(-1), expected.filled(-1))
    assert texts(axis) == {(0, 0): "3", (0, 1): "1", (0, 2): "0", (2, 0): "2", (2, 1): "0", (2, 2): "6"}
    assert axis.yaxis_inverted() and (axis.get_ylabel(), axis.get_xlabel()) == ("true", "predicted")
    for names in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [name.get_text() for name in names] == ["cat", "$dog$", "a name of more than 24…"]
    assert axis.get_title() == "accuracy 75.0 %, 9 of 12 images"
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("n", [1, 20, 21, 1000])
def test_a_confusion_matrix_of_any_size_can_be_read(n):
    figure = plot_confusion_matrix(np.eye(n, dtype=np.uint8) * 200, [f"class number {index}" for index in range(n)])
    axis = figure.axes[0]
    assert len(axis.texts) == (n * n if n <= 20 else 0)
    names = {int(tick): label.get_text() for tick, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)}
    assert 0 < len(names) <= 40
    assert all(name == f"class number {index}" for index, name in names.items())
    assert_nothing_is_cut_off(figure)
    for labels, side in ((axis.get_yticklabels(), "height"), (axis.get_xticklabels(), "width")):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False)), side
    square = axis.get_window_extent().width / n
    assert all(text.get_window_extent().width < square for text in axis.texts[:: n + 1])


def test_a_confusion_matrix_of_no_images_says_so():
    axis = plot_confusion_matrix(np.zeros((2, 2), int), ["cat", "dog"]).axes[0]
    assert axis.get_title() == "no images" and not axis.texts


def test_what_is_no_confusion_matrix_is_named():
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 3\); give \(n, n\)"):
        plot_confusion_matrix(np.ones((2, 3), int), ["cat", "dog"])
    with pytest.raises(ValueError, match="matrix is of float64 from 0.5; give integer counts"):
        plot_confusion_matrix(np.full((2, 2), 0.5), ["cat", "dog"])
    with pytest.raises(ValueError, match="matrix is of int64 from -1; give integer counts, 0 or more"):
        plot_confusion_matrix([[1, -1], [0, 0]], ["cat", "dog"])
    with pytest.raises(ValueError, match="labels has 3 names; the matrix is of 2 classes"):
        plot_confusion_matrix(np.ones((2, 2), int), ["cat", "dog", "cow"])


# Attention of ViT-MSN


def layers(patches=6, heads=3, count=2):
    logits = np.random.default_rng(0).standard_normal((count, 1, heads, patches + 1, patches + 1))
    return list(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))


def test_rollout_follows_every_path_through_the_layers():
    attentions = layers(patches=2, count=3)
    steps = [0.5 * entry[0].mean(0) + 0.5 * np.eye(3) for entry in attentions]
    rollout = attention_rollout(attentions)
    for last in range(3):
        for first in range(3):
            paths = [(last, j, i, first) for j in range(3) for i in range(3)]
            expected = sum(steps[2][a, b] * steps[1][b, c] * steps[0][c, d] for a, b, c, d in paths)
            assert rollout[last, first] == pytest.approx(expected, rel=1e-12)


def strongest(axis, grid):
    """The cell of the grid in whose middle a panel's heat is strongest."""
    heat = axis.images[1].get_array()
    rows, columns = (np.int64((np.arange(n) + 0.5) * length / n) for n, length in zip(grid, heat.shape, strict=True))
    return np.unravel_index(heat[np.ix_(rows, columns)].argmax(), grid)


def test_the_class_tokens_heads_and_rollout_lie_over_the_photograph():
    attentions = layers()
    figure = plot_attention(IMAGE, attentions, grid=(2, 3))
    photograph, *panels = figure.axes[:5]
    assert [axis.get_title() for axis in figure.axes[:5]] == ["photograph", "head 1", "head 2", "head 3", "rollout"]
    np.testing.assert_allclose(photograph.images[0].get_array(), IMAGE / 255.0)
    maps = [*attentions[-1][0, :, 0, 1:], attention_rollout(attentions)[0, 1:]]
    for axis, expected in zip(panels, maps, strict=True):
        assert axis.images[1].get_array().shape == IMAGE.shape[:2]
        assert strongest(axis, (2, 3)) == divmod(expected.argmax(), 3)
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("wrap", [torch.tensor, tf.constant, lambda x: torch.tensor(x).bfloat16().requires_grad_()])
def test_either_halfs_class_token_will_do(wrap):
    expected = plot_attention(IMAGE, layers(9))
    figure = plot_attention(IMAGE, [wrap(x) for x in layers(9)])
    np.testing.assert_allclose(
        figure.axes[1].images[1].get_array(), expected.axes[1].images[1].get_array(), atol=100 * 2**-8
    )


def test_many_heads_fit():
    figure = plot_attention(IMAGE, layers(4, heads=16), max_heads=12)
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert titles == ["photograph", *(f"head {head}" for head in range(1, 13)), "rollout"]
    assert_nothing_is_cut_off(figure)


def test_large_photographs_are_drawn_smaller():
    large = np.repeat(np.repeat(IMAGE, 16, 0), 16, 1)
    figure = plot_attention(large, layers(4), max_heads=1)
    assert figure.axes[1].images[1].get_array().shape == (768, 1024)
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, np.repeat(np.repeat(IMAGE, 8, 0), 8, 1) / 255.0)


def test_attentions_that_cannot_be_drawn_are_named():
    with pytest.raises(ValueError, match=r"there is no grid; the attentions are of 6 patches, and grid is"):
        plot_attention(IMAGE, layers())
    with pytest.raises(ValueError, match="grid is 2x2; the attentions are of 6 patches"):
        plot_attention(IMAGE, layers(), grid=(2, 2))
    with pytest.raises(ValueError, match="max_heads is 0; give 1 or more"):
        plot_attention(IMAGE, layers(4), max_heads=0)
    with pytest.raises(ValueError, match="attentions has no entries; .*output_attentions=True"):
        plot_attention(IMAGE, [])
    for wrong in (layers(4)[0][0], layers(4)[0][:, :, :3], np.ones((2, 3, 5, 5)), layers(9)[0], np.float64(1)):
        with pytest.raises(ValueError, match="attentions of layer 2 have shape .*of one image"):
            plot_attention(IMAGE, [layers(4)[0], wrong])
