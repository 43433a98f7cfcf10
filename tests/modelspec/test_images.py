"""The image processor: bit-equal to the reference, generous with its inputs, strict with nonsense."""

import hashlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from modelspec.images import AutoImageProcessor, ImageBatch, ImageProcessor, read_image

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_FILES = [GOLDEN / name / "preprocessor_config.json" for name in ("nat_tiny", "dinat_tiny", "swiftformer_tiny")]
GOLDEN_FILES.append(GOLDEN / "vit_msn_tiny" / "preprocessor_config.json")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def reference():
    pil_vit = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    return pil_vit.ViTImageProcessorPil


def drawn_array(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def drawn_image(height=9, width=13):
    return Image.fromarray(drawn_array(height, width))


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(images, **arguments):
    """The pixels as numbers 0..255, unresized: what the processor has read."""
    return ImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)(images, **arguments).pixel_values


def of_reference(reference, image, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = reference(**arguments)(image, return_tensors="np")["pixel_values"]
    return values


def assert_same_bits(ours, theirs):
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    assert theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    different = int((ours.view(np.uint32) != theirs.view(np.uint32)).sum())
    assert different == 0, f"{different} of {ours.size} values differ, by up to {np.abs(ours - theirs).max()}"


@pytest.mark.oracle
class TestAgainstTheReference:
    @pytest.mark.parametrize("resample", range(6))
    @pytest.mark.parametrize("size", [224, {"height": 37, "width": 61}, (500, 640)], ids=str)
    @pytest.mark.parametrize("photo", ["chelsea", "astronaut"])
    def test_photographs_through_every_filter(self, reference, photo, size, resample):
        data = pytest.importorskip("skimage.data")
        image = Image.fromarray(getattr(data, photo)())
        arguments = {"size": size, "resample": resample, **IMAGENET}
        assert_same_bits(ImageProcessor(**arguments)(image).pixel_values, of_reference(reference, image, arguments))

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.tuples(*[st.integers(5, 40)] * 4),  # from 25 to 1600 pixels: on both sides of the 256 values of a byte
        st.integers(0, 5),
        st.sampled_from([np.uint8, np.int64, np.float32, np.float64]),
        st.booleans(),
        st.tuples(*[st.booleans()] * 3),
        st.integers(0, 2**31),
    )
    def test_any_array(self, reference, sides, resample, dtype, channels_first, flags, seed):
        array = drawn_array(sides[0], sides[1], seed=seed).astype(dtype)
        array = np.moveaxis(array, -1, 0) if channels_first else array
        arguments = {"size": sides[2:], "resample": resample, "image_mean": [0.1, 0.2, 0.7], "image_std": [0.3, 1, 2.0]}
        arguments.update(zip(("do_resize", "do_rescale", "do_normalize"), flags, strict=True))
        theirs = of_reference(reference, array, arguments)
        assert_same_bits(ImageProcessor(**arguments)(array).pixel_values, theirs.astype(np.float32))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("do_resize", [True, False])
    def test_fractions_that_are_scaled_already(self, reference, dtype, do_resize):
        array = np.random.default_rng(1).random((21, 17, 3)).astype(dtype)
        arguments = {"size": 30, "do_rescale": False, "do_resize": do_resize, **IMAGENET}
        theirs = of_reference(reference, array, arguments)
        assert_same_bits(ImageProcessor(**arguments)(array).pixel_values, theirs.astype(np.float32))

    def test_fractions_that_are_rescaled_again_are_warned_of(self, reference):
        array = np.random.default_rng(1).random((21, 17, 3))
        with pytest.warns(UserWarning, match="image 0 of the batch .* do_rescale=False"):
            ours = ImageProcessor()(array).pixel_values
        assert_same_bits(ours, of_reference(reference, array, {}))

    @pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "P", "HSV"])
    def test_other_modes_are_as_with_do_convert_rgb(self, reference, mode):
        image = drawn_image().convert(mode)
        theirs = of_reference(reference, image, {"do_convert_rgb": True})
        assert_same_bits(ImageProcessor()(image).pixel_values, theirs)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
    def test_transparency_is_as_with_do_convert_rgb(self, reference, mode):
        rgba = Image.fromarray(drawn_array(40, 31, channels=4))
        image = rgba.quantize(16) if mode == "P" else rgba.convert(mode)  # quantize keeps alpha as `transparency`
        theirs = of_reference(reference, image, {"do_convert_rgb": True})
        assert_same_bits(ImageProcessor()(image).pixel_values, theirs)

    def test_arrays_with_alpha_are_as_with_do_convert_rgb(self, reference):
        array = drawn_array(40, 31, channels=4)
        theirs = of_reference(reference, array, {"do_convert_rgb": True})
        assert_same_bits(ImageProcessor()(array).pixel_values, theirs)

    def test_a_list_of_several_sizes(self, reference):
        images = [drawn_image(9, 13), drawn_image(40, 11), drawn_image(224, 224)]
        assert_same_bits(ImageProcessor()(images).pixel_values, of_reference(reference, images, {}))

    @pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.parent.name)
    def test_both_read_one_file_alike(self, reference, path):
        image = drawn_image(50, 70)
        theirs = reference.from_pretrained(path)(image, return_tensors="np")["pixel_values"]
        assert_same_bits(ImageProcessor.from_pretrained(path)(image).pixel_values, theirs)

    def test_the_reference_reads_what_we_save(self, reference, tmp_path):
        ours = ImageProcessor(size=(20, 30), resample=3, rescale_factor=0.01, do_normalize=False)
        ours.save_pretrained(tmp_path)
        image = drawn_image()
        theirs = reference.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"]
        assert_same_bits(ours(image).pixel_values, theirs)
        automatic = pytest.importorskip("transformers").AutoImageProcessor.from_pretrained(tmp_path)
        assert type(automatic).__name__.startswith("ViTImageProcessor")


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 always begins with the width")
@pytest.mark.parametrize(
    "resample, digest",
    [
        (0, "09ec00b7c9007aa9"),
        (1, "a9d52710fa2f1e3e"),
        (2, "094ce1b140d4829f"),
        (3, "291e0b8f026ac934"),
        (4, "e0d9b480982f80be"),
        (5, "710ea762aa92aa7b"),
    ],
)
def test_recorded_digests_of_the_reference(resample, digest):
    # Recorded from ViTImageProcessorPil of transformers 5.23.0 with Pillow 13; little-endian float32.
    values = ImageProcessor(size=(31, 64), resample=resample, **IMAGENET)(drawn_array(48, 40)).pixel_values
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16] == digest


class TestInputs:
    def test_one_image_is_a_batch_of_one(self):
        assert ImageProcessor()(drawn_image()).pixel_values.shape == (1, 3, 224, 224)

    def test_all_ways_to_hand_over_an_image_are_one(self, tmp_path):
        array = drawn_array(9, 13)
        image = Image.fromarray(array)
        path = tmp_path / "image.png"
        path.write_bytes(encoded(image))
        images = [image, array, np.moveaxis(array, -1, 0), str(path), path, path.read_bytes(), array.astype(np.float64)]
        values = ImageProcessor()(images).pixel_values
        assert values.shape == (7, 3, 224, 224)
        assert (values == values[:1]).all()

    def test_batches_and_nested_lists_are_flattened(self):
        array = drawn_array(9, 13)
        values = plain([np.stack([array, array]), [Image.fromarray(array), [array]]])
        assert values.shape == (4, 3, 9, 13)
        assert np.array_equal(values[3], np.moveaxis(array, -1, 0))

    def test_torch_tensors(self):
        torch = pytest.importorskip("torch")
        array = drawn_array(9, 13).astype(np.float32)
        tensor = torch.tensor(array, requires_grad=True)
        assert np.array_equal(plain([tensor, tensor[None]]), plain([array, array]))
        with pytest.raises(ValueError, match="Tensor cannot be read as an array"):
            plain(tensor.bfloat16())

    def test_tensorflow_tensors(self):
        tf = pytest.importorskip("tensorflow")
        array = drawn_array(9, 13)
        assert np.array_equal(plain(tf.constant(array)[None]), plain(array))

    def test_gray_is_replicated(self):
        gray = drawn_array(9, 13, channels=0)
        for image in (gray, gray[None], gray[:, :, None], Image.fromarray(gray)):
            assert np.array_equal(plain(image), np.broadcast_to(gray, (1, 3, 9, 13)))

    def test_what_is_transparent_shows_white(self):
        rgba = drawn_array(9, 13, channels=4)
        rgba[:3, :, 3], rgba[3:6, :, 3] = 0, 255
        for image in (rgba, np.moveaxis(rgba, -1, 0), Image.fromarray(rgba), encoded(Image.fromarray(rgba))):
            pixels = np.moveaxis(plain(image)[0], 0, -1)
            assert (pixels[:3] == 255).all()
            assert np.array_equal(pixels[3:6], rgba[3:6, :, :3])
        assert (plain(Image.fromarray(rgba).convert("LA"))[0, :, :3] == 255).all()
        fractions = rgba.astype(np.float32) / 255
        assert (plain(fractions)[0, :, :3] == 1).all()

    def test_a_palette_with_transparency_keeps_its_opaque_colours(self):
        palette = drawn_image().quantize(8)
        data = encoded(palette, transparency=bytes([0] + [255] * 7))
        assert Image.open(io.BytesIO(data)).mode == "P"
        opaque = np.asarray(palette) != 0
        pixels = np.moveaxis(plain(data)[0], 0, -1)
        assert np.array_equal(pixels[opaque], np.asarray(palette.convert("RGB"))[opaque])
        assert (pixels[~opaque] == 255).all()

    def test_bilevel_and_boolean(self):
        bits = drawn_array(9, 13, channels=0) > 127
        assert np.array_equal(plain(Image.fromarray(bits))[0, 0], 255 * bits)
        assert np.array_equal(plain(bits)[0, 0], bits)

    @pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
    def test_sixteen_bit_files_keep_their_upper_bits(self, format):
        deep = np.random.default_rng(0).integers(0, 65536, (9, 13), dtype=np.uint16)
        assert np.array_equal(plain(encoded(Image.fromarray(deep), format))[0, 2], deep >> 8)

    @pytest.mark.parametrize("mode, dtype", [("I", np.int32), ("F", np.float32)])
    def test_wide_modes_take_bytes_only(self, mode, dtype):
        gray = drawn_array(9, 13, channels=0).astype(dtype)
        assert Image.fromarray(gray).mode == mode
        assert np.array_equal(plain(Image.fromarray(gray))[0, 0], gray)
        with pytest.raises(ValueError, match=f"image 0 of the batch .* mode {mode} holds values from .* scale them"):
            plain(Image.fromarray(gray + 200))

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["PNG", "TIFF"])
    def test_exif_orientation_is_applied(self, orientation, format):
        stored = drawn_image()
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        data = encoded(stored, format, exif=exif)
        pixels = np.asarray(stored)
        # EXIF 2.3, tag 0x0112: where the stored row 0 and column 0 belong.
        upright = {
            1: pixels,
            2: pixels[:, ::-1],
            3: pixels[::-1, ::-1],
            4: pixels[::-1],
            5: pixels.swapaxes(0, 1),
            6: pixels[::-1].swapaxes(0, 1),
            7: pixels[::-1, ::-1].swapaxes(0, 1),
            8: pixels[:, ::-1].swapaxes(0, 1),
        }[orientation]
        for image in (data, Image.open(io.BytesIO(data))):
            assert np.array_equal(plain(image)[0], np.moveaxis(upright, -1, 0))

    def test_unreadable_exif_is_no_orientation(self):
        data = encoded(drawn_image(), "JPEG", exif=b"Exif\0\0garbage")
        assert plain(data).shape == (1, 3, 9, 13)

    def test_channel_axis(self):
        assert plain(np.zeros((3, 5, 3))).shape == (1, 3, 5, 3)
        assert plain(np.zeros((3, 5, 3)), input_data_format="channels_last").shape == (1, 3, 3, 5)
        assert plain(np.zeros((1, 5, 3))).shape == (1, 3, 1, 5)
        with pytest.raises(ValueError, match=r"shape \(5, 6, 7\); channels_first or channels_last needs"):
            plain(np.zeros((5, 6, 7)))
        with pytest.raises(ValueError, match=r"shape \(5, 6, 3\); channels_first needs"):
            plain(np.zeros((5, 6, 3)), input_data_format="channels_first")

    def test_the_callers_image_is_left_alone(self):
        array, image = drawn_array(9, 13), drawn_image()
        before = array.copy(), image.tobytes()
        ImageProcessor()([array, image])
        assert np.array_equal(array, before[0]) and image.tobytes() == before[1]


class TestGrayMode:
    processor = ImageProcessor(image_mean=[0.5], image_std=[0.25], size=8)

    def test_colour_becomes_gray(self):
        image = drawn_image()
        values = self.processor(image).pixel_values
        assert values.shape == (1, 1, 8, 8)
        assert np.array_equal(values, self.processor(image.convert("L")).pixel_values)
        assert np.array_equal(values, self.processor(np.asarray(image)).pixel_values)

    def test_float_colour_is_refused(self):
        with pytest.raises(ValueError, match="image 0 of the batch is a colour image of dtype float64"):
            self.processor(np.zeros((9, 13, 3)))


class TestOutputs:
    def test_batch_reads_by_key_and_attribute(self):
        batch = ImageProcessor()(drawn_image())
        assert isinstance(batch, ImageBatch) and batch["pixel_values"] is batch.pixel_values
        assert dict(**batch).keys() == {"pixel_values"}
        with pytest.raises(AttributeError, match="no 'labels'; it has pixel_values"):
            _ = batch.labels

    @pytest.mark.parametrize("return_tensors", [None, "np"])
    def test_numpy(self, return_tensors):
        assert isinstance(ImageProcessor()(drawn_image(), return_tensors=return_tensors).pixel_values, np.ndarray)

    def test_torch_and_to(self):
        torch = pytest.importorskip("torch")
        batch = ImageProcessor()(images=drawn_image(), return_tensors="pt")
        assert np.array_equal(batch.pixel_values.numpy(), ImageProcessor()(drawn_image()).pixel_values)
        assert batch.to("cpu", dtype=torch.float16) is batch
        assert batch.pixel_values.dtype == torch.float16
        with pytest.raises(ValueError, match='pixel_values is a ndarray; .* return_tensors="pt"'):
            ImageProcessor()(drawn_image()).to("cpu")

    def test_tensorflow(self):
        tf = pytest.importorskip("tensorflow")
        values = ImageProcessor()(drawn_image(), return_tensors="tf").pixel_values
        assert tf.is_tensor(values) and values.dtype == tf.float32
        assert np.array_equal(values.numpy(), ImageProcessor()(drawn_image()).pixel_values)

    def test_channels_last(self):
        first = ImageProcessor()(drawn_image()).pixel_values
        last = ImageProcessor()(drawn_image(), data_format="channels_last").pixel_values
        assert np.array_equal(last, np.moveaxis(first, 1, -1)) and last.flags.c_contiguous

    def test_overrides_last_for_one_call(self):
        processor = ImageProcessor()
        changed = {"size": 32, "resample": 0, "do_normalize": False, "rescale_factor": 0.5, **IMAGENET}
        once = processor(drawn_image(), **changed).pixel_values
        assert np.array_equal(once, ImageProcessor(**changed)(drawn_image()).pixel_values)
        assert processor == ImageProcessor()

    def test_attributes_can_be_set_and_are_checked(self):
        processor = ImageProcessor()
        processor.size = 32
        assert processor(drawn_image()).pixel_values.shape == (1, 3, 32, 32)
        processor.size = 0
        with pytest.raises(ValueError, match="ImageProcessor.size is 0"):
            processor(drawn_image())

    def test_preprocess_is_the_same(self):
        assert np.array_equal(
            ImageProcessor().preprocess(drawn_image())["pixel_values"], ImageProcessor()(drawn_image())["pixel_values"]
        )


class TestBadInputs:
    @pytest.mark.parametrize(
        "image, reason",
        [
            (np.zeros((0, 5, 3)), "it is empty"),
            (np.zeros((5, 5, 3, 1, 1)), "allowed are"),
            (np.zeros(5), "allowed are"),
            (np.full((5, 5, 3), np.nan), "NaN or infinite"),
            (np.full((5, 5, 3), -np.inf), "NaN or infinite"),
            (np.array([["a"]]), "dtype <U1"),
            (np.zeros((5, 5, 3), complex), "dtype complex128"),
            (np.full((5, 5, 3), 300), "from 300 to 300"),
            (np.full((5, 5, 3), -1.0), "from -1.0"),
            (np.full((5, 5, 3), 12.5), "whole numbers of 0..255"),
            (b"", "it is empty, or of no format"),
            (b"no image", "of no format"),
            (None, "of type NoneType"),
            (7, "of type int"),
            (Image.new("RGB", (0, 5)), "cannot be read"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_the_message_counts_in_the_batch(self, image, reason):
        with pytest.raises(ValueError, match=f"image 2 of the batch .*{reason}"):
            ImageProcessor()([drawn_image(), drawn_image(), image])

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_a_truncated_file_is_named(self, tmp_path, format):
        data = encoded(drawn_image(64, 64), format)
        path = tmp_path / "photo"
        for length in (len(data) // 2, 40, 10):
            path.write_bytes(data[:length])
            with pytest.raises(ValueError, match=f"{path} cannot be read as an image: ."):
                ImageProcessor()([drawn_image(), path])

    def test_a_truncated_image_that_was_opened_lazily(self):
        data = encoded(drawn_image(64, 64), "JPEG")
        with pytest.raises(ValueError, match="image 0 of the batch cannot be read as an image: .*truncated"):
            ImageProcessor()(Image.open(io.BytesIO(data[:-200])))

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(["PNG", "JPEG", "GIF", "TIFF"]),
        st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4),
    )
    def test_damaged_bytes_give_an_image_or_a_value_error(self, format, damages):
        data = bytearray(encoded(drawn_image(12, 12), format))
        for position, damage in damages:
            position %= len(data)
            data[position : position + len(damage)] = damage
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                values = ImageProcessor(size=8)(bytes(data)).pixel_values
            except ValueError as error:
                assert str(error).startswith("image 0 of the batch cannot be read as an image: ")
            else:
                assert values.shape == (1, 3, 8, 8)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match="cat.png cannot be read as an image: there is no such file"):
            ImageProcessor()(str(tmp_path / "cat.png"))

    def test_a_decompression_bomb(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with pytest.raises(ValueError, match="exceeds limit of 20 pixels"):
            ImageProcessor()(encoded(drawn_image()))

    @pytest.mark.parametrize("images", [[], (), [[]], np.zeros((0, 5, 5, 3))], ids=repr)
    def test_no_images(self, images):
        with pytest.raises(ValueError, match="images is empty"):
            ImageProcessor()(images)

    def test_sizes_that_differ_without_resize(self):
        with pytest.raises(ValueError, match="image 1 of the batch is 8 x 7 pixels .* do_resize=False"):
            plain([drawn_image(9, 7), drawn_image(8, 7)])

    def test_conversion_can_be_forbidden(self):
        assert plain(drawn_image(), do_convert_rgb=False).shape == (1, 3, 9, 13)
        for image in (drawn_image().convert("L"), np.zeros((9, 13), np.uint8)):
            with pytest.raises(ValueError, match="do_convert_rgb=False allows only"):
                plain(image, do_convert_rgb=False)

    def test_return_tensors(self):
        with pytest.raises(ValueError, match="return_tensors is 'jax'; allowed are None, 'np', 'pt', 'tf'"):
            ImageProcessor()(drawn_image(), return_tensors="jax")


class TestFields:
    @pytest.mark.parametrize(
        "field, value",
        [
            ("size", 0),
            ("size", 1.5),
            ("size", True),
            ("size", "224"),
            ("size", (1, 2, 3)),
            ("size", {"shortest_edge": 224}),
            ("size", {"height": 2, "width": -2}),
            ("resample", 6),
            ("resample", "bicubic"),
            ("resample", True),
            ("image_mean", [0.5, 0.5]),
            ("image_mean", [0.5, 0.5, "0.5"]),
            ("image_mean", "0.5"),
            ("image_std", [0.5, 0, 0.5]),
            ("image_std", [0.5]),
            ("image_std", float("nan")),
            ("rescale_factor", float("inf")),
            pytest.param("rescale_factor", 10**400, id="rescale_factor-huge"),
            ("rescale_factor", 0),
            ("do_resize", 1),
            ("do_convert_rgb", "yes"),
            ("data_format", "NCHW"),
            ("input_data_format", 3),
            ("do_center_crop", True),
            ("do_pad", True),
        ],
    )
    def test_a_bad_value_is_refused_by_name(self, field, value):
        with pytest.raises(ValueError, match=rf"ImageProcessor\.{field}.* (is|has) .* allowed|give one"):
            ImageProcessor.from_dict({field: value})
        with pytest.raises(ValueError, match=rf"ImageProcessor\.{field}"):
            ImageProcessor()(drawn_image(), **{field: value})

    def test_a_misspelt_field_is_no_field(self):
        with pytest.raises(TypeError, match="image_maen"):
            ImageProcessor(image_maen=0.5)
        with pytest.raises(TypeError, match="image_maen"):
            ImageProcessor()(drawn_image(), image_maen=0.5)

    def test_one_number_serves_all_channels(self):
        one = ImageProcessor(image_mean=0.4, image_std=0.2)(drawn_image()).pixel_values
        assert np.array_equal(
            one, ImageProcessor(image_mean=[0.4] * 3, image_std=[0.2] * 3)(drawn_image()).pixel_values
        )

    def test_defaults_are_not_shared(self):
        ImageProcessor().image_mean[0] = 9
        assert ImageProcessor().image_mean == [0.5, 0.5, 0.5]


class TestFiles:
    @pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.parent.name)
    def test_golden_files_survive_a_round_trip(self, path, tmp_path):
        written = ImageProcessor.from_pretrained(path).save_pretrained(tmp_path / "new")
        assert json.loads(written.read_text()) == json.loads(path.read_text())
        assert [file.name for file in written.parent.iterdir()] == ["preprocessor_config.json"]

    def test_a_directory(self):
        pytest.importorskip("modelspec.checkpoints.source")
        assert ImageProcessor.from_pretrained(GOLDEN / "nat_tiny").size == {"height": 64, "width": 64}

    def test_a_missing_file_is_an_os_error(self, tmp_path):
        pytest.importorskip("modelspec.checkpoints.source")
        with pytest.raises(OSError, match="preprocessor_config.json"):
            ImageProcessor.from_pretrained(tmp_path)

    def test_unknown_keys_survive(self, tmp_path):
        settings = {**ImageProcessor().to_dict(), "license": {"name": "mit"}, "processor_class": None}
        processor = ImageProcessor.from_dict(settings, size=32)
        processor.save_pretrained(tmp_path)
        again = ImageProcessor.from_pretrained(tmp_path / "preprocessor_config.json")
        assert again == processor
        assert again.to_dict() == {**settings, "size": {"height": 32, "width": 32}}

    def test_old_files(self):
        old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "resample": 3, "do_normalize": None}
        processor = ImageProcessor.from_dict({**old, **IMAGENET})
        assert processor == ImageProcessor(size=384, resample=3, **IMAGENET)
        assert processor.to_dict()["image_processor_type"] == "ViTImageProcessor"

    def test_an_override_can_mend_a_file(self):
        cropping = {"size": {"shortest_edge": 256}, "do_center_crop": True}
        assert ImageProcessor.from_dict(cropping, size=224, do_center_crop=False)(drawn_image())
        with pytest.raises(TypeError, match="no field image_maen"):
            ImageProcessor.from_dict({}, image_maen=0.5)

    def test_nested_in_processor_config(self, tmp_path):
        path = tmp_path / "processor_config.json"
        path.write_text(json.dumps({"image_processor": {"size": 48}, "processor_class": "X"}))
        assert ImageProcessor.from_pretrained(path) == ImageProcessor(size=48)
        pytest.importorskip("modelspec.checkpoints.source")
        assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor(size=48)

    def test_processor_config_without_images(self, tmp_path):
        path = tmp_path / "processor_config.json"
        path.write_text("{}")
        with pytest.raises(ValueError, match='processor_config.json has no object "image_processor"'):
            ImageProcessor.from_pretrained(path)

    def test_foreign_processors_may_crop(self):
        with pytest.raises(ValueError, match="image_processor_type is 'CLIPImageProcessor', which may crop"):
            ImageProcessor.from_dict({"image_processor_type": "CLIPImageProcessor"})
        foreign = {"image_processor_type": "BitImageProcessor", "do_center_crop": False}
        assert ImageProcessor.from_dict(foreign).to_dict()["do_center_crop"] is False

    @pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"size": -1}', "[" * 100_000])
    def test_a_broken_file_is_named(self, tmp_path, text):
        path = tmp_path / "preprocessor_config.json"
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="preprocessor_config.json"):
            ImageProcessor.from_pretrained(path)

    def test_a_failed_save_leaves_the_old_file(self, tmp_path):
        path = ImageProcessor(size=32).save_pretrained(tmp_path)
        broken = ImageProcessor()
        broken.size = None, None
        with pytest.raises(ValueError, match="ImageProcessor.size"):
            broken.save_pretrained(tmp_path)
        assert ImageProcessor.from_pretrained(path) == ImageProcessor(size=32)
        assert list(tmp_path.iterdir()) == [path]

    def test_auto_image_processor(self):
        processor = AutoImageProcessor.from_pretrained(GOLDEN_FILES[0], use_fast=True, size=16)
        assert type(processor) is ImageProcessor and processor.size == {"height": 16, "width": 16}


def test_read_image_gives_pixels_in_rows():
    array = drawn_array(9, 13)
    assert np.array_equal(read_image(encoded(Image.fromarray(array))), array)
