"""A SavedModel answers as the live model does, in a process that has TensorFlow and nothing of ours."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import tfmodels
from modelspec import ImageProcessor
from modelspec.exports.photographs import read_photographs
from tfmodels.export import export_saved_model
from tfmodels.features import extract_features
from tfmodels.serving import make_servable

pytestmark = pytest.mark.usefixtures("uncompared")

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"]
SIZES = [(2, 64, 64), (1, 45, 53), (3, 32, 96)]

SERVE = """
import sys

HIDDEN = {"keras", "torch", "modelspec", "neighborhood", "tfmodels", "ptmodels", "parity", "twinzoo", "safetensors"}

class Hiding:
    # stands before a finder of modules, which then finds nothing of the hidden packages
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import numpy as np
import tensorflow as tf
served = tf.saved_model.load(sys.argv[1])
found = {}
with np.load(sys.argv[2]) as images:
    for name in images:
        if name == "files":
            answer = served.signatures["serving_bytes"](image_bytes=tf.constant(images[name]))
            found |= {f"files {output}": answer[output].numpy() for output in ("logits", "scores")}
            found["files labels"] = np.array([[label.decode() for label in row] for row in answer["labels"].numpy()])
        else:
            images_of_size = tf.constant(images[name])
            found[name] = served.signatures["serving_default"](pixel_values=images_of_size)["logits"].numpy()
            found[f"{name} features"] = served.signatures["features"](pixel_values=images_of_size)["features"].numpy()
assert not HIDDEN & set(sys.modules), HIDDEN & set(sys.modules)
np.savez(sys.argv[3], **found)
"""


def serve(saved_model: Path, images: dict[str, np.ndarray], tmp_path: Path) -> dict[str, np.ndarray]:
    np.savez(tmp_path / "images.npz", **images)
    arguments = [saved_model, tmp_path / "images.npz", tmp_path / "found.npz"]
    process = subprocess.run([sys.executable, "-c", SERVE, *map(str, arguments)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    with np.load(tmp_path / "found.npz") as found:
        return dict(found)


def near(actual, expected) -> bool:
    return np.abs(actual - expected).max() <= 1e-5 * np.sqrt(np.mean(np.square(expected, dtype=np.float64)))


@pytest.mark.parametrize(
    ("name", "data_format"),
    [
        *(("nat_tiny", "channels_first"), ("vit_msn_tiny", "channels_last")),
        *(pytest.param(name, "channels_last", marks=pytest.mark.slow) for name in FAMILIES[:3]),
        *(pytest.param(name, "channels_first", marks=pytest.mark.slow) for name in FAMILIES[1:]),
    ],
)
def test_a_process_with_only_tensorflow_answers_for_any_batch_and_size(name, data_format, tmp_path):
    model = tfmodels.load(GOLDEN / name, data_format=data_format)
    processor = ImageProcessor(size=(40, 48), image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25], resample=3)
    export_saved_model(model, tmp_path / "saved", image_processor=processor, top_k=3)
    generator = np.random.default_rng(0)
    images = {}
    for batch, height, width in SIZES:
        shape = (batch, 3, height, width) if data_format == "channels_first" else (batch, height, width, 3)
        images[f"{height}x{width}"] = generator.standard_normal(shape, np.float32)
    files = read_photographs()[::-1]
    found = serve(tmp_path / "saved", {**images, "files": np.array(files)}, tmp_path)
    any_size = {"interpolate_pos_encoding": True} if "vit" in name else {}
    for size, pixel_values in images.items():
        assert near(found[size], np.asarray(model(pixel_values, **any_size).logits))
        if not any_size:
            assert near(found[f"{size} features"], extract_features(model, pixel_values))
    pixels = processor(files, data_format=data_format).pixel_values
    live = np.asarray(model(pixels, **any_size).logits)
    assert near(found["files logits"], live)
    order = np.argsort(-live, axis=-1, kind="stable")[:, :3]
    assert found["files labels"].tolist() == [
        [model.config.id2label[number] for number in row] for row in order.tolist()
    ]
    exponentials = np.exp(live - live.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    assert near(found["files scores"], np.take_along_axis(probabilities, order, -1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, uncompared):
    """A ViT-MSN and where it lies as a SavedModel; without an image processor, so without a bytes signature."""
    model, folder = tfmodels.load(GOLDEN / "vit_msn_tiny"), tmp_path_factory.mktemp("exported") / "saved"
    export_saved_model(model, folder, verbose=False)
    return model, folder


def test_features_of_vit_msn_are_the_class_token_before_the_norm(exported):
    model, folder = exported
    served = tf.saved_model.load(folder)
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    features = served.signatures["features"](pixel_values=tf.constant(images))["features"]
    assert near(features.numpy(), extract_features(model, images, "cls-before-norm"))
    assert "serving_bytes" not in served.signatures  # no image processor was given


@pytest.fixture(scope="module")
def served(tmp_path_factory, uncompared):
    """The bytes signature of a ViT-MSN of several labels per image, and its live model and image processor."""
    folder = tmp_path_factory.mktemp("served")
    model = tfmodels.load(GOLDEN / "vit_msn_tiny")
    model.config.problem_type = "multi_label_classification"
    processor = ImageProcessor(size=32)
    export_saved_model(model, folder / "saved", image_processor=processor, verbose=False)
    loaded = tf.saved_model.load(folder / "saved")
    return lambda files: loaded.signatures["serving_bytes"](image_bytes=tf.constant(files)), model, processor


def test_scores_of_several_labels_are_independent(served):
    answer, model, processor = served
    found = answer(read_photographs())
    live = np.asarray(model(processor(read_photographs()).pixel_values).logits)
    expected = -np.sort(-1 / (1 + np.exp(-live)), axis=-1)[:, :5]  # five by default
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-5)


def test_labels_are_in_the_order_of_logits_where_scores_are_all_one():
    model = tfmodels.load(GOLDEN / "vit_msn_tiny")
    model.config.problem_type = "multi_label_classification"
    model.classifier.bias.assign(np.float32([30, 10, 50, 20, -40, -60, -50]))
    _, signatures = make_servable(model, image_processor=ImageProcessor(size=32), top_k=7)
    answer = signatures["serving_bytes"](tf.constant(read_photographs()[:1]))
    order = [2, 0, 3, 1, 4, 6, 5]
    assert [label.decode() for label in answer["labels"].numpy()[0]] == [model.config.id2label[n] for n in order]
    assert len(set(answer["scores"].numpy()[0].tolist())) < 7  # some cannot be told from one


@pytest.mark.parametrize("broken", [b"", b"no image", read_photographs()[0][:2000], read_photographs()[2][:100]])
def test_what_is_no_image_is_refused(served, broken):
    answer, _, _ = served
    with pytest.raises(tf.errors.InvalidArgumentError):
        answer([read_photographs()[1], broken])


def test_photographs_of_telephones_are_upright(served):
    answer, model, processor = served
    picture = Image.open(io.BytesIO(read_photographs()[0])).resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    live = np.asarray(model(processor(file.getvalue()).pixel_values).logits)
    assert near(answer([file.getvalue()])["logits"].numpy(), live)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[:3]), "vit_msn_tiny"]
)
def test_the_export_of_keras_works_too(name, tmp_path):
    model = tfmodels.load(GOLDEN / name)
    size = model.config.image_size if "vit" in name else 64
    images = np.random.default_rng(0).standard_normal((2, 3, size, size), np.float32)
    model(images[:1])  # Keras asks for a call before
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(served.serve(images)["logits"], model(images).logits, rtol=0, atol=1e-5)


def test_an_earlier_export_is_replaced_and_other_files_are_not(exported, tmp_path):
    model, earlier = exported
    shutil.copytree(earlier, tmp_path / "saved")
    (tmp_path / "saved" / "assets" / "of the earlier one").touch()
    export_saved_model(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "saved_model.pb").is_file()
    assert not (tmp_path / "saved" / "assets" / "of the earlier one").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds files that are no SavedModel"):
        export_saved_model(model, tmp_path / "mine")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "saved"]


def test_a_failed_export_leaves_the_old_one(exported, tmp_path, monkeypatch):
    model, earlier = exported
    shutil.copytree(earlier, tmp_path / "saved")
    before = (tmp_path / "saved" / "saved_model.pb").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("tfmodels.artefacts.tf.saved_model.save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_saved_model(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "saved_model.pb").read_bytes() == before
    with pytest.raises(OSError, match="disk full"):
        export_saved_model(model, tmp_path / "new" / "newer" / "saved")  # nor a folder that it made
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_a_bare_model_has_no_logits_to_serve(tmp_path):
    model = tfmodels.TFViTMSNModel.from_pretrained(GOLDEN / "vit_msn_masktoken", use_mask_token=True)
    with pytest.raises(ValueError, match="no logits to serve"):
        export_saved_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("top_k", [0, 8])
def test_top_k_is_among_the_labels(top_k, exported, tmp_path):
    with pytest.raises(ValueError, match=f"top_k is {top_k}; allowed are 1 to 7"):
        export_saved_model(exported[0], tmp_path / "saved", image_processor=ImageProcessor(size=32), top_k=top_k)
    assert not list(tmp_path.iterdir())
