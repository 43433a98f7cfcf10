"""Programs, ONNX and LiteRT of both halves: their sizes and names, what is refused, and that failures leave nothing."""

import importlib.util
from pathlib import Path

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
import torch

import modelspec
import ptmodels
import ptmodels.export
import tfmodels
import tfmodels.export
from modelspec import DinatConfig
from modelspec.checkpoints import probing_weights
from modelspec.exports import ExportError
from neighborhood.choice import prefer
from ptmodels.artefacts import make_program

pytestmark = pytest.mark.usefixtures("uncompared")

EXPORTS = {
    "program": (ptmodels, ptmodels.export.export_program),
    "torch onnx": (ptmodels, ptmodels.export.export_onnx),
    "keras onnx": (tfmodels, tfmodels.export.export_onnx),
    "litert": (tfmodels, tfmodels.export.export_litert),
}


@pytest.fixture(params=EXPORTS)
def export(request, vit_msn_config):
    """A function that takes a path, and options, and exports a small model in one of the formats."""
    package, function = EXPORTS[request.param]
    model = package.auto.model_class("vit_msn")(vit_msn_config)
    options = {"image_size": 32} if request.param == "litert" else {}

    def export(path, **given):
        function(given.pop("model", model), path, **{**options, **given})

    export.package, export.config = package, vit_msn_config
    return export


def model_of(package, config, dtype="float32"):
    return package.auto.model_class(config.model_type).from_weights(config, probing_weights(config), dtype=dtype)


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def names_and_shapes(values) -> list:
    return [(value.name, value.shape) for value in values]


def tells_where_the_code_was(content: bytes) -> bool:
    return any(Path(package.__file__).parents[1].as_posix().encode() in content for package in (modelspec, torch))


@pytest.mark.parametrize("package", [ptmodels, tfmodels])
@pytest.mark.parametrize(
    ("image_size", "sizes"),
    [(None, ["height", "width"]), ((40, 24), [40, 24]), pytest.param(32, [32, 32], marks=pytest.mark.slow)],
)
def test_both_halves_write_onnx_with_the_same_names_and_sizes(package, image_size, sizes, vit_msn_config, tmp_path):
    path = tmp_path / "new" / "model.onnx"
    package.export.export_onnx(model_of(package, vit_msn_config), path, image_size=image_size)
    session = session_of(path)
    assert names_and_shapes(session.get_inputs()) == [("pixel_values", ["batch", 3, *sizes])]
    assert names_and_shapes(session.get_outputs()) == [("logits", ["batch", 10])]
    assert not tells_where_the_code_was(path.read_bytes())


@pytest.mark.parametrize("export", ["program", "litert"], indirect=True)
def test_nothing_tells_where_on_the_machine_the_code_was(export, tmp_path):
    export(tmp_path / "model")
    assert not tells_where_the_code_was((tmp_path / "model").read_bytes())


def test_onnx_of_channels_last_takes_channels_last(swiftformer_config, tmp_path):
    config = swiftformer_config
    weights = probing_weights(config)
    model = tfmodels.auto.model_class("swiftformer").from_weights(config, weights, data_format="channels_last")
    tfmodels.export.export_onnx(model, tmp_path / "model.onnx")
    images = np.random.default_rng(0).standard_normal((2, 40, 33, 3), np.float32)
    (logits,) = session_of(tmp_path / "model.onnx").run(["logits"], {"pixel_values": images})
    np.testing.assert_allclose(logits, model(images).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_program_keeps_the_dtype(dtype, swiftformer_config, tmp_path):
    model = model_of(ptmodels, swiftformer_config, dtype).eval()
    ptmodels.export.export_program(model, tmp_path / "model.pt2", image_size=32)
    images = torch.randn(3, 3, 32, 32, dtype=getattr(torch, dtype))
    with torch.no_grad():
        logits = torch.export.load(tmp_path / "model.pt2").module()(pixel_values=images)["logits"]
        torch.testing.assert_close(logits, model(images).logits)


def test_training_models_are_exported_for_evaluation_and_go_on_training(swiftformer_config, tmp_path):
    model = model_of(ptmodels, swiftformer_config.replace(drop_path_rate=0.5)).train()
    ptmodels.export.export_program(model, tmp_path / "model.pt2", image_size=32)
    assert model.training and model.swiftformer.encoder.training
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = torch.export.load(tmp_path / "model.pt2").module()(pixel_values=images)["logits"]
        torch.testing.assert_close(logits, model.eval()(images).logits)


DILATED = DinatConfig(
    depths=[1, 1], num_heads=[1, 2], embed_dim=8, kernel_size=3, dilations=[[3], [1]], num_labels=5, drop_path_rate=0.0
)


def assert_every_size_runs(run, model) -> None:
    """Maps smaller than, equal to and larger than windows, of one tile and of several, odd and even."""
    smallest = ptmodels.export.smallest_image(DILATED)
    assert smallest == 9
    generator = torch.Generator().manual_seed(0)
    for height in (smallest, 13, 24, 25, 37, 61):
        for width in (smallest, 12, 26, 40):
            images = torch.randn(1 + width % 2, 3, height, width, generator=generator)
            with torch.no_grad():
                expected = model(images).logits
            actual = run(images)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5, err_msg=f"{height}x{width}")


@pytest.mark.slow
def test_a_program_of_neighborhood_attention_is_for_any_size(tmp_path):
    model = model_of(ptmodels, DILATED).eval()
    ptmodels.export.export_program(model, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert_every_size_runs(lambda images: program(pixel_values=images)["logits"].detach(), model)


@pytest.mark.slow
@pytest.mark.parametrize("package", [ptmodels, tfmodels])
def test_onnx_of_neighborhood_attention_is_for_any_size(package, tmp_path):
    package.export.export_onnx(model_of(package, DILATED), tmp_path / "model.onnx")
    session = session_of(tmp_path / "model.onnx")
    assert_every_size_runs(
        lambda images: session.run(None, {"pixel_values": images.numpy()})[0], model_of(ptmodels, DILATED).eval()
    )


def test_blocks_of_a_stage_share_their_tiles():
    def nodes(depth):
        config = DILATED.replace(depths=[depth, 1], dilations=[[1] * depth, [1]])
        return len(make_program(model_of(ptmodels, config), (64, 64)).graph.nodes)

    one, three = nodes(1), nodes(3)
    assert three - one < one / 2


def test_blocks_of_a_stage_share_their_tiles_in_graphs_of_keras():
    """Those of the same dilation, and only those."""

    def traced(dilations):
        model = model_of(tfmodels, DILATED.replace(depths=[len(dilations), 1], dilations=[dilations, [1]]))
        signature = [tf.TensorSpec((None, 3, None, None), "float32")]
        with prefer("composed"):
            predict = tf.function(lambda images: model(images)["logits"], signature).get_concrete_function()
        kinds = [operation.type for operation in predict.graph.get_operations()]
        assert kinds.count("Softmax") == len(dilations) + 1
        return kinds.count("FloorMod"), model, predict

    (two_tiles, *_), (three_tiles, model, predict) = traced([1]), traced([1, 2, 1])
    assert three_tiles == 3 * two_tiles / 2
    for height, width in [(9, 12), (24, 61), (40, 25)]:
        images = np.random.default_rng(0).standard_normal((2, 3, height, width), np.float32)
        np.testing.assert_allclose(predict(tf.constant(images)), model(images).logits, rtol=0, atol=1e-5)


# Failures


def test_an_export_that_fails_leaves_the_old_file(export, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    def save(program, file, extra_files):
        file.write(b"half of it")
        fail()

    monkeypatch.setattr("torch.export.save", save)
    monkeypatch.setattr("tensorflow.lite.TFLiteConverter.from_saved_model", fail)
    monkeypatch.setattr("onnx.ModelProto.SerializeToString", fail, raising=False)
    with pytest.raises(OSError, match="disk full"):
        export(path, image_size=32)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_export_that_fails_leaves_no_folder_that_it_made(export, tmp_path, monkeypatch):
    """Neither where writing or comparing fails, nor where an argument is refused; what others made stays."""

    def differ(*args, **kwargs):
        raise ExportError("differs")

    for name in ("ptmodels.export", "tfmodels.export"):
        monkeypatch.setattr(f"{name}.compare_with_live", differ)
    for name in ("ptmodels.export.write_program", "ptmodels.export.write_onnx"):
        monkeypatch.setattr(name, lambda model, path, *args: None)
    for name in ("tfmodels.export.write_onnx", "tfmodels.export.write_litert"):
        monkeypatch.setattr(name, lambda model, path, *args, **options: None)
    (tmp_path / "theirs").mkdir()
    for given, error in (({}, "differs"), ({"image_size": "large"}, "image_size is 'large'")):
        with pytest.raises(ValueError, match=error):
            export(tmp_path / "theirs" / "new" / "newer" / "model", **given)
        assert [path.name for path in tmp_path.rglob("*")] == ["theirs"]


def test_an_operation_that_onnx_lacks_is_refused(vit_msn_config, tmp_path):
    config = vit_msn_config.replace(hidden_act=lambda x: keras.ops.gelu(x, approximate=False))  # erfc
    with pytest.raises(ValueError, match="what ONNX does not define: .*Erfc"):
        tfmodels.export.export_onnx(
            tfmodels.TFViTMSNForImageClassification(config), tmp_path / "model.onnx", image_size=32
        )
    assert not list(tmp_path.iterdir())


def test_a_bare_model_has_no_logits_to_serve(export, tmp_path):
    package = export.package
    model = package.ViTMSNModel(export.config) if package is ptmodels else package.TFViTMSNModel(export.config)
    with pytest.raises(ValueError, match="no logits to serve"):
        export(tmp_path / "model", model=model)
    assert not list(tmp_path.iterdir())


def test_a_model_without_labels_has_no_logits_to_serve(export, tmp_path):
    model = model_of(export.package, export.config.replace(num_labels=0))
    with pytest.raises(ValueError, match="no logits to serve, with num_labels=0"):
        export(tmp_path / "model", model=model)


@pytest.mark.parametrize("image_size", ["large", (32,), (32, 0), 2.5])
def test_sizes_that_are_none_are_refused(export, image_size, tmp_path):
    with pytest.raises(ValueError, match="image_size is .*; give pixels"):
        export(tmp_path / "model", image_size=image_size)
    assert not list(tmp_path.iterdir())


def test_litert_needs_a_size(vit_msn_config, tmp_path):
    with pytest.raises(ValueError, match="image_size is None; LiteRT needs one size"):
        tfmodels.export.export_litert(model_of(tfmodels, vit_msn_config), tmp_path / "model", image_size=None)


def test_a_folder_is_no_file(export, tmp_path):
    with pytest.raises(ValueError, match="is a folder; give the name of a file"):
        export(tmp_path)


@pytest.mark.parametrize("export", ["torch onnx", "keras onnx", "litert"], indirect=True)
def test_onnx_and_litert_are_for_float32(export, tmp_path):
    with pytest.raises(ValueError, match="is in float64; allowed here are float32"):
        export(tmp_path / "model", model=model_of(export.package, export.config, "float64"))


def test_mixed_precision_is_not_float32(vit_msn_config, tmp_path):
    with pytest.raises(ValueError, match="is in bfloat16; allowed here are float32"):
        tfmodels.export.export_onnx(model_of(tfmodels, vit_msn_config, "mixed_bfloat16"), tmp_path / "model.onnx")


@pytest.mark.parametrize("export", ["torch onnx", "keras onnx"], indirect=True)
def test_missing_packages_are_told(export, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    needed = f"onnx and onnxruntime and {'onnxscript' if export.package is ptmodels else 'tf2onnx'}"
    with pytest.raises(ImportError, match=rf"needs {needed}: pip install '\.\[export\]'"):
        export(tmp_path / "model")
    assert not list(tmp_path.iterdir())
