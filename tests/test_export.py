"""A SavedModel gives the live model's logits, in a process that has TensorFlow and nothing of ours."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tfmodels
from tfmodels.export import export_saved_model

GOLDEN = Path(__file__).parent / "golden"
SIZES = [(2, 64, 64), (1, 45, 53), (3, 32, 96)]

SERVE = """
import sys

HIDDEN = {"keras", "torch", "modelspec", "tfmodels", "ptmodels", "parity", "safetensors"}

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
signature = served.signatures["serving_default"]
logits = {}
with np.load(sys.argv[2]) as images:
    for name in images:
        logits[name] = signature(pixel_values=tf.constant(images[name]))["logits"].numpy()
assert not HIDDEN & set(sys.modules), HIDDEN & set(sys.modules)
np.savez(sys.argv[3], **logits)
"""


def serve(saved_model: Path, images: dict[str, np.ndarray], tmp_path: Path) -> dict[str, np.ndarray]:
    np.savez(tmp_path / "images.npz", **images)
    arguments = [saved_model, tmp_path / "images.npz", tmp_path / "logits.npz"]
    process = subprocess.run([sys.executable, "-c", SERVE, *map(str, arguments)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    with np.load(tmp_path / "logits.npz") as logits:
        return dict(logits)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("name", ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"])
def test_a_process_with_only_tensorflow_serves_any_batch_and_size(name, data_format, tmp_path):
    model = tfmodels.load(GOLDEN / name, data_format=data_format)
    export_saved_model(model, tmp_path / "saved")
    generator = np.random.default_rng(0)
    images = {}
    for batch, height, width in SIZES:
        shape = (batch, 3, height, width) if data_format == "channels_first" else (batch, height, width, 3)
        images[f"{height}x{width}"] = generator.standard_normal(shape, np.float32)
    served = serve(tmp_path / "saved", images, tmp_path)
    any_size = {"interpolate_pos_encoding": True} if "vit" in name else {}
    for size, pixel_values in images.items():
        live = np.asarray(model(pixel_values, **any_size).logits)
        np.testing.assert_allclose(served[size], live, rtol=0, atol=1e-5 * np.abs(live).max())


@pytest.mark.parametrize("name", ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"])
def test_the_export_of_keras_works_too(name, tmp_path):
    model = tfmodels.load(GOLDEN / name)
    size = model.config.image_size if "vit" in name else 64
    images = np.random.default_rng(0).standard_normal((2, 3, size, size), np.float32)
    model(images[:1])  # Keras asks for a call before
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(served.serve(images)["logits"], model(images).logits, rtol=0, atol=1e-5)


def test_an_earlier_export_is_replaced_and_other_files_are_not(tmp_path):
    model = tfmodels.load(GOLDEN / "swiftformer_tiny")
    export_saved_model(model, tmp_path / "saved")
    export_saved_model(model, tmp_path / "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds files that are no SavedModel"):
        export_saved_model(model, tmp_path / "mine")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "saved"]


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    model = tfmodels.load(GOLDEN / "swiftformer_tiny")
    export_saved_model(model, tmp_path / "saved")
    before = (tmp_path / "saved" / "saved_model.pb").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("tfmodels.export.tf.saved_model.save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_saved_model(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "saved_model.pb").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_a_bare_model_has_no_logits_to_serve(tmp_path):
    model = tfmodels.TFViTMSNModel.from_pretrained(GOLDEN / "vit_msn_masktoken", use_mask_token=True)
    with pytest.raises(ValueError, match="no logits to serve"):
        export_saved_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
