"""Preprocessing inside the frameworks: the same bits as Pillow's, in both halves and in graphs of any size."""

import functools
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import ptmodels.preprocessing
import tfmodels.preprocessing
from modelspec.images import ImageProcessor, resampling
from parity.photograph import Photograph, read_photograph
from parity.preprocessing import compare_preprocessing, measure_other_resizers

FILTERS = range(6)
PROCESSORS = [
    ImageProcessor(size=(9, 14), resample=resample, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    for resample in FILTERS
]


def drawn(height, width, channels=3, seed=0, batch=None) -> np.ndarray:
    shape = (height, width, channels) if batch is None else (batch, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def expected(processor, image) -> np.ndarray:
    return processor(image, input_data_format="channels_last").pixel_values


def halves(processor, **arguments):
    """Half -> function from channels-last images to pixel values, in NumPy."""
    layer = tfmodels.preprocessing.ImagePreprocessor(processor, **{"input_data_format": "channels_last"} | arguments)
    module = ptmodels.preprocessing.ImagePreprocessor(processor, **{"input_data_format": "channels_last"} | arguments)
    return {
        "keras": lambda image: layer(image).numpy(),
        "torch": lambda image: module(torch.from_numpy(image)).numpy(),
    }


@functools.cache
def graph(resample: int):
    """A function traced once, for images of any size."""
    layer = tfmodels.preprocessing.ImagePreprocessor(PROCESSORS[resample])
    return tf.function(layer, input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)])


sizes = st.integers(1, 12) | st.integers(1, 80)


@pytest.mark.parametrize("resample", FILTERS)
@given(in_size=st.tuples(sizes, sizes), out_size=st.tuples(sizes, sizes), seed=st.integers(0, 2**32 - 1))
@example(in_size=(60, 20), out_size=(7, 9), seed=0)  # Pillow 13 begins with the height
@example(in_size=(60, 20), out_size=(30, 5), seed=0)  # exactly twice as many pixels lost: it does not
@example(in_size=(1, 50), out_size=(20, 1), seed=0)
@example(in_size=(9, 9), out_size=(9, 4), seed=0)
@settings(max_examples=60)
def test_the_arithmetic_is_pillows(resample, in_size, out_size, seed):
    image = drawn(*in_size, seed=seed)
    if seed % 2:
        image = np.uint8(255) * (image > 127)  # where bicubic and Lanczos overshoot
    resized = np.asarray(Image.fromarray(image).resize(out_size[::-1], resample))
    np.testing.assert_array_equal(resampling.resize(image, *out_size, resample), resized)
    batch = np.stack([image, 255 - image])
    keras_resized = tfmodels.preprocessing.resize(tf.constant(batch), *out_size, resample).numpy()
    torch_resized = ptmodels.preprocessing.resize(torch.from_numpy(batch).movedim(-1, 1), *out_size, resample)
    for number, piece in enumerate(batch):
        resized = np.asarray(Image.fromarray(piece).resize(out_size[::-1], resample))
        np.testing.assert_array_equal(keras_resized[number], resized)
        np.testing.assert_array_equal(torch_resized[number].movedim(0, -1).numpy(), resized)


@pytest.mark.parametrize("resample", FILTERS)
@given(size=st.tuples(sizes, sizes), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_pixel_values_are_the_processors(resample, size, seed):
    processor, image = PROCESSORS[resample], drawn(*size, seed=seed)
    wanted = expected(processor, image)
    found = {half: process(image[None]) for half, process in halves(processor).items()}
    found["graph"] = graph(resample)(image[None]).numpy()
    for half, values in found.items():
        assert values.dtype == np.float32, half
        np.testing.assert_array_equal(values, wanted, half)


@pytest.mark.parametrize("out_size", [1, 14, 224])
@pytest.mark.parametrize("resample", FILTERS)
def test_weights_made_in_a_graph_are_numpys(resample, out_size):
    """An optimiser that divides by a constant by multiplying with its inverse would change many of them."""

    def weights(in_size):
        if resample == resampling.NEAREST:
            return (tfmodels.preprocessing._nearest(in_size, out_size),)
        return tfmodels.preprocessing._weights(in_size, out_size, resample)

    in_graph = tf.function(weights, input_signature=[tf.TensorSpec((), tf.int32)])
    for in_size in (*range(1, 50), *range(50, 1400, 71), 4032):
        if resample == resampling.NEAREST:
            wanted = (resampling.cached_positions(in_size, out_size),)
        else:
            wanted = resampling.cached_weights(in_size, out_size, resample)
        for found, array in zip(in_graph(in_size), wanted, strict=True):
            np.testing.assert_array_equal(found, array, f"{in_size} to {out_size}")


def test_weights_are_multiples_of_the_fixed_point_and_add_up_to_one():
    positions, weights = resampling.cached_weights(451, 224, 3)
    assert positions.min() == 0 and positions.max() == 450
    np.testing.assert_array_equal(weights * 2**22, np.round(weights * 2**22))
    assert abs(weights.sum(axis=-1) - 1).max() < 30 * 2.0**-22


def test_the_probe_tells_the_orders_of_the_passes_apart():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 8), dtype=np.uint8)
    height_first = resampling._resize_axis(resampling._resize_axis(pixels, 0, 8, 2), 1, 6, 2)
    width_first = resampling._resize_axis(resampling._resize_axis(pixels, 1, 6, 2), 0, 8, 2)
    assert (height_first != width_first).any()
    pillow = np.asarray(Image.fromarray(pixels).resize((6, 8), 2))
    wanted = height_first if resampling._pillow_may_begin_with_height() else width_first
    np.testing.assert_array_equal(pillow, wanted)


@pytest.mark.parametrize("half", ["keras", "torch"])
def test_older_pillows_begin_with_the_width(half, monkeypatch):
    monkeypatch.setattr(resampling, "_pillow_may_begin_with_height", lambda: False)
    processor, image = ImageProcessor(size=(7, 9), do_rescale=False, do_normalize=False), drawn(60, 20)
    width_first = Image.fromarray(image).resize((9, 60), 2).resize((9, 7), 2)
    values = halves(processor, data_format="channels_last")[half](image)
    np.testing.assert_array_equal(values, np.asarray(width_first))


def test_a_large_image_is_resized_in_pieces(monkeypatch):
    monkeypatch.setattr(ptmodels.preprocessing, "_PIECE", 1000)
    image = drawn(70, 90)
    np.testing.assert_array_equal(halves(PROCESSORS[3])["torch"](image[None]), expected(PROCESSORS[3], image))


@pytest.mark.parametrize("resample", [0, 3])
def test_an_empty_batch_stays_empty(resample):
    images = drawn(20, 30, batch=0)
    for process in (*halves(PROCESSORS[resample]).values(), lambda images: graph(resample)(images).numpy()):
        assert process(images).shape == (0, 3, 9, 14)


VARIATIONS = {
    "no_resizing": {"do_resize": False},
    "no_rescaling": {"do_rescale": False},
    "no_normalising": {"do_normalize": False, "rescale_factor": 1 / 127.5},
    "one_mean_for_all": {"image_mean": 0.3, "image_std": 0.7},
    "gray": {"image_mean": [0.5], "image_std": [0.25]},
    "large_factor": {"rescale_factor": 3.7, "image_mean": [0.1, -2.0, 300.0]},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("half", ["keras", "torch"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_every_field_means_what_it_means_in_the_processor(variation, half, data_format, channels):
    processor = ImageProcessor(**{"size": (12, 9)} | VARIATIONS[variation], data_format=data_format)
    images = drawn(20, 17, channels, batch=2)
    values = halves(processor)[half](images)
    np.testing.assert_array_equal(values, processor(images, input_data_format="channels_last").pixel_values)
    assert values.flags.c_contiguous
    np.testing.assert_array_equal(halves(processor)[half](images[0]), values[0])


@pytest.mark.parametrize("half", ["keras", "torch"])
def test_images_may_come_with_the_channels_first(half):
    processor, image = PROCESSORS[2], drawn(20, 3)  # which the reference could take for an image 3 pixels high
    process = halves(processor, input_data_format="channels_first")[half]
    np.testing.assert_array_equal(process(np.moveaxis(image, -1, 0).copy()), expected(processor, image)[0])


def test_formats_default_to_the_processors_and_then_to_the_frameworks():
    module, layer = ptmodels.preprocessing.ImagePreprocessor, tfmodels.preprocessing.ImagePreprocessor
    plain, told = ImageProcessor(), ImageProcessor(input_data_format="channels_first", data_format="channels_last")
    assert (module(plain).input_data_format, module(plain).data_format) == ("channels_first", "channels_first")
    assert (layer(plain).input_data_format, layer(plain).data_format) == ("channels_last", "channels_first")
    assert (layer(told).input_data_format, layer(told).data_format) == ("channels_first", "channels_last")
    assert layer(told, data_format="channels_first").data_format == "channels_first"


def test_setting_a_field_of_the_processor_afterwards_changes_nothing():
    processor, image = ImageProcessor(size=8), drawn(10, 10)
    wanted = expected(processor, image)[0]
    made = halves(processor)
    processor.size, processor.image_mean[0] = {"height": 5, "width": 5}, 9.0
    for half, process in made.items():
        np.testing.assert_array_equal(process(image), wanted, half)


@pytest.mark.parametrize("name", ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"])
def test_it_is_read_from_a_checkpoint(name, golden):
    image = drawn(40, 50)
    wanted = ImageProcessor.from_pretrained(golden(name), size=32)(image).pixel_values[0]
    layer = tfmodels.preprocessing.ImagePreprocessor.from_pretrained(golden(name), size=32)
    module = ptmodels.preprocessing.ImagePreprocessor.from_pretrained(golden(name), size=32)
    np.testing.assert_array_equal(layer(image), wanted)
    np.testing.assert_array_equal(module(torch.from_numpy(image).movedim(-1, 0)), wanted)
    assert not list(layer.weights) and not module.state_dict()


# In pipelines and in files


def test_a_pipeline_of_images_of_many_sizes_is_batched_after_it():
    processor = PROCESSORS[3]
    images = [drawn(height, width, seed=height) for height, width in [(30, 20), (5, 40), (9, 14), (100, 3)]]
    layer = tfmodels.preprocessing.ImagePreprocessor(processor, data_format="channels_last")
    signature = tf.TensorSpec((None, None, 3), tf.uint8)
    dataset = tf.data.Dataset.from_generator(lambda: iter(images), output_signature=signature)
    dataset = dataset.map(layer, num_parallel_calls=2).batch(4)
    assert dataset.element_spec.shape.as_list() == [None, 9, 14, 3]
    (batch,) = dataset.as_numpy_iterator()
    np.testing.assert_array_equal(batch, processor(images, data_format="channels_last").pixel_values)


@pytest.mark.parametrize("resample", [0, 1, 3])
def test_a_saved_function_gives_the_same(resample, tmp_path):
    module = tf.Module()
    module.preprocess = graph(resample)
    tf.saved_model.save(module, tmp_path)
    loaded = tf.saved_model.load(tmp_path)
    for size in [(30, 20), (90, 21), (4, 5)]:
        image = drawn(*size)
        np.testing.assert_array_equal(loaded.preprocess(image[None]), expected(PROCESSORS[resample], image))


def test_it_is_a_part_of_a_keras_model_and_of_its_file(tmp_path):
    processor = PROCESSORS[2]
    inputs = keras.Input((None, None, 3), dtype="uint8")
    values = tfmodels.preprocessing.ImagePreprocessor(processor, name="pixels")(inputs)
    assert values.shape == (None, 3, 9, 14) and values.dtype == "float32"
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(values)))
    images = drawn(20, 30, batch=3)
    logits = model.predict(images, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), logits)
    layer = loaded.get_layer("pixels")
    assert layer.processor == processor and layer.get_config() == model.get_layer("pixels").get_config()
    np.testing.assert_array_equal(layer(images), expected(processor, images))


def test_the_dtype_policy_of_a_model_does_not_round_it():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layer = tfmodels.preprocessing.ImagePreprocessor(PROCESSORS[2])
    finally:
        keras.config.set_dtype_policy("float32")
    image = drawn(20, 30)
    np.testing.assert_array_equal(layer(image), expected(PROCESSORS[2], image)[0])


@pytest.mark.parametrize("resample", [2, 3])
def test_compiled_by_xla_it_gives_the_same(resample):
    layer = tfmodels.preprocessing.ImagePreprocessor(PROCESSORS[resample])
    compiled = tf.function(lambda images: layer(images), jit_compile=True, autograph=False)
    image = drawn(33, 41)
    np.testing.assert_array_equal(compiled(image[None]), expected(PROCESSORS[resample], image))


# What it refuses

RGB, STRICT = ImageProcessor(size=4), ImageProcessor(size=4, do_convert_rgb=False)
REFUSED = {
    "dtype": (RGB, np.zeros((5, 5, 3), np.float32), "dtype float32; allowed is uint8"),
    "axes": (RGB, np.zeros((5, 5), np.uint8), r"shape \(5, 5\); allowed are \(H, W, C\) or \(B, H, W, C\)"),
    "channels": (RGB, np.zeros((5, 5, 4), np.uint8), "4 channels in .*; allowed are 1 and 3"),
    "gray": (STRICT, np.zeros((5, 5, 1), np.uint8), "1 channels in .*; allowed are 3 with do_convert_rgb=False"),
    "empty": (RGB, np.zeros((5, 0, 3), np.uint8), r"shape \(5, 0, 3\): they are empty"),
}


@pytest.mark.parametrize("half", ["keras", "torch"])
@pytest.mark.parametrize("what", REFUSED)
def test_bad_images_are_refused(what, half):
    processor, image, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        halves(processor)[half](image)


@pytest.mark.parametrize("package", [tfmodels.preprocessing, ptmodels.preprocessing])
def test_bad_arguments_are_refused(package):
    with pytest.raises(ValueError, match="processor is a dict; give a modelspec.ImageProcessor"):
        package.ImagePreprocessor({"size": 3})
    with pytest.raises(ValueError, match="input_data_format is 'NHWC'; allowed are channels_first, channels_last"):
        package.ImagePreprocessor(RGB, input_data_format="NHWC")
    spoilt = ImageProcessor()
    spoilt.resample = 9
    with pytest.raises(ValueError, match="ImageProcessor.resample is 9"):
        package.ImagePreprocessor(spoilt)


def test_an_array_is_no_torch_tensor():
    with pytest.raises(ValueError, match="images are a ndarray; give a torch.Tensor"):
        ptmodels.preprocessing.ImagePreprocessor(RGB)(np.zeros((3, 4, 4), np.uint8))


def test_what_a_graph_must_know_is_asked_for():
    layer = tfmodels.preprocessing.ImagePreprocessor(RGB)
    for shape, message in ((None, "an unknown number of axes"), ((None, None, None), "unknown number of channels")):
        with pytest.raises(ValueError, match=message):
            tf.function(layer).get_concrete_function(tf.TensorSpec(shape, tf.uint8))


def test_empty_images_are_noticed_in_a_graph():
    with pytest.raises(tf.errors.InvalidArgumentError, match="images are empty"):
        graph(2)(np.zeros((1, 0, 5, 3), np.uint8))


# The level of the harness


def photograph() -> Photograph:
    return Photograph("noise", drawn(50, 70, seed=5))


def failed(processor) -> set[tuple[str, str]]:
    """(half, mode) of the comparisons that failed."""
    rows = list(compare_preprocessing(processor, photograph(), 0))
    assert {(half, name.partition(".")[0]) for half, name, _ in rows} == {
        *(("keras", "eager"), ("keras", "graph"), ("torch", "eager"))
    }
    return {(half, name.partition(".")[0]) for half, name, agreement in rows if not agreement.passed}


@pytest.mark.parametrize(
    "processor",
    [*PROCESSORS[1:4], STRICT, ImageProcessor(size=9, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False)],
    ids=["lanczos", "bilinear", "bicubic", "strict", "strict_gray"],
)
def test_the_level_passes(processor):
    assert failed(processor) == set()


def without_antialiasing(in_size, out_size, resample):
    maths = {"maximum": lambda a, b: b if np.ndim(a) == 0 else np.maximum(a, b)}
    found = resampling.block_weights(
        np.float64(in_size), out_size, resample, SimpleNamespace(**vars(resampling.NUMPY) | maths)
    )
    return found[0].astype(np.int32), found[1]


def another_coefficient(in_size, out_size, resample):
    positions, weights = resampling.cached_weights(in_size, out_size, resample)
    weights = weights.copy()
    weights[0, 1, np.abs(weights[0, 1]).argmax()] += 2.0**-9
    return positions, weights


@pytest.mark.parametrize("bug", [without_antialiasing, another_coefficient])
@pytest.mark.parametrize("half", ["keras", "torch"])
def test_wrong_weights_fail_the_level(half, bug, monkeypatch):
    package = {"keras": tfmodels.preprocessing, "torch": ptmodels.preprocessing}[half]
    monkeypatch.setattr(package, "cached_weights", bug)
    assert failed(PROCESSORS[3]) == {(half, "eager")}


def test_another_filter_in_graphs_fails_the_level(monkeypatch):
    right = tfmodels.preprocessing.block_weights
    monkeypatch.setattr(tfmodels.preprocessing, "block_weights", lambda n, m, resample, maths: right(n, m, 2, maths))
    assert failed(PROCESSORS[3]) == {("keras", "graph")}


@pytest.mark.parametrize("half", ["keras", "torch"])
def test_the_other_order_of_passes_fails_the_level(half, monkeypatch):
    package = {"keras": tfmodels.preprocessing, "torch": ptmodels.preprocessing}[half]
    right = package.height_comes_first
    monkeypatch.setattr(
        package, "height_comes_first", lambda *sizes: not right(*sizes) if isinstance(sizes[0], int) else right(*sizes)
    )
    assert failed(PROCESSORS[3]) == {(half, "eager")}


@pytest.mark.parametrize("half", ["keras", "torch"])
def test_the_last_bit_of_the_values_fails_the_level(half, monkeypatch):
    package = {"keras": tfmodels.preprocessing, "torch": ptmodels.preprocessing}[half]
    constructor = package.ImagePreprocessor.__init__

    def wrong(self, *arguments, **options):
        constructor(self, *arguments, **options)
        self.byte_table = np.nextafter(self.byte_table, np.float32(9))

    monkeypatch.setattr(package.ImagePreprocessor, "__init__", wrong)
    assert {failing for failing, _ in failed(PROCESSORS[2])} == {half}


def test_the_frameworks_own_resizers_are_not_pillow():
    found = list(measure_other_resizers(read_photograph(), (64, 64)))
    assert len(found) == 32
    for row in found:
        shrinks = row.task.startswith("shrink")
        assert row.maximum >= row.mean >= 0
        assert row.mean < 0.6 or not row.antialias, row
        assert row.mean > 2 or row.antialias or not shrinks, row
        assert row.maximum > 0.5 or not shrinks, row


def test_a_photograph_that_is_too_small_for_measuring_is_refused():
    with pytest.raises(ValueError, match="noise is 50x70; it must be at least 112x112"):
        next(measure_other_resizers(photograph()))
