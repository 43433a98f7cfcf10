"""Every export is compared with the live model before it takes its name: what is wrong leaves but its figure."""

import contextlib
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import ptmodels
import ptmodels.export
import tfmodels
import tfmodels.export
from modelspec import ImageProcessor, ViTMSNConfig
from modelspec.agreement import EXPORT_BOUND, QUANTIZED_BOUNDS, SAVED_MODEL_BOUND
from modelspec.exports import ExportError, read_metadata
from modelspec.exports.photographs import read_photographs
from modelspec.exports.served_labels import compare_labels_and_scores
from modelspec.exports.verification import pixel_cases
from ptmodels.layers import ACTIVATIONS
from tfmodels import preprocessing
from tfmodels.layers import get_activation

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ["nat_tiny", "dinat_tiny", "swiftformer_tiny", "vit_msn_tiny"]
PROCESSOR = ImageProcessor(size=32, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


# Bugs planted in the way out, not in the model


@contextlib.contextmanager
def antialias_off(monkeypatch, model):
    def resize(images, height, width, resample):
        return tf.cast(tf.image.resize(images, (height, width), antialias=False) + 0.5, tf.uint8)

    monkeypatch.setattr(preprocessing, "resize", resize)
    yield


@contextlib.contextmanager
def wrong_mean(monkeypatch, model):
    class Wrong(preprocessing.ImagePreprocessor):
        def __init__(self, processor, **options):
            super().__init__(ImageProcessor.from_dict(processor.to_dict(), image_mean=0.5), **options)

    monkeypatch.setattr("tfmodels.serving.ImagePreprocessor", Wrong)
    yield


@contextlib.contextmanager
def tanh_gelu(monkeypatch, model, writer="write_saved_model"):
    export = tfmodels.export if isinstance(model, keras.Model) else ptmodels.export
    write = getattr(export, writer)

    def write_another(model, *args, **options):
        layers = model._flatten_layers() if export is tfmodels.export else model.modules()
        layers = [layer for layer in layers if hasattr(layer, "act")]
        right = [layer.act for layer in layers]
        for layer in layers:
            layer.act = get_activation("gelu_new") if export is tfmodels.export else ACTIVATIONS["gelu_new"]
        written = write(model, *args, **options)
        for layer, act in zip(layers, right, strict=True):
            layer.act = act
        return written

    monkeypatch.setattr(export, writer, write_another)
    yield


@contextlib.contextmanager
def permuted_labels(monkeypatch, model):
    write = tfmodels.export.write_saved_model

    def write_another(model, *args, **options):
        right = model.config.id2label
        model.config.id2label = {number: right[(number + 1) % len(right)] for number in right}
        write(model, *args, **options)
        model.config.id2label = right

    monkeypatch.setattr(tfmodels.export, "write_saved_model", write_another)
    yield


@contextlib.contextmanager
def sigmoid_for_softmax(monkeypatch, model):
    monkeypatch.setattr("tfmodels.serving._scores", lambda logits, _: tf.sigmoid(logits))
    yield


@pytest.mark.parametrize(
    ("bug", "signatures"),
    [
        (antialias_off, {"serving_bytes"}),
        (wrong_mean, {"serving_bytes"}),
        (tanh_gelu, {"serving_default", "features", "serving_bytes"}),
    ],
)
def test_a_bug_on_the_way_out_fails_with_its_figure_and_the_bound(bug, signatures, monkeypatch, tmp_path):
    model = tfmodels.load(GOLDEN / "vit_msn_tiny")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"old")
    with (
        bug(monkeypatch, model),
        pytest.raises(
            ExportError, match=r"saved_model of keras differs .*nothing was written: .*(bound 1e-05)"
        ) as caught,
    ):
        tfmodels.export.export_saved_model(model, tmp_path / "saved", image_processor=PROCESSOR)
    said = str(caught.value).split("written: ")[1]
    assert {part.split()[0] for part in said.split("; ")} == signatures
    figures = [float(part.split(": ")[1].split()[0]) for part in said.split("; ")]
    assert all(figure > SAVED_MODEL_BOUND for figure in figures)
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "saved_model.pb"]
    assert (tmp_path / "saved" / "saved_model.pb").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        (permuted_labels, r"labels: 20 of 20 are others, the first class \d instead of class \d \(bound 1e-05\)"),
        pytest.param(sigmoid_for_softmax, r"scores: .*e[-+]0\d of the rms \(bound 1e-05\)", marks=pytest.mark.slow),
    ],
)
def test_wrong_labels_or_scores_of_right_logits_are_found(bug, said, monkeypatch, tmp_path):
    model = tfmodels.load(GOLDEN / "vit_msn_tiny")
    with (
        bug(monkeypatch, model),
        pytest.raises(ExportError, match=f"nothing was written: serving_bytes photographs {said}$"),
    ):
        tfmodels.export.export_saved_model(model, tmp_path / "saved", image_processor=PROCESSOR)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("problem_type", "scores_of"),
    [
        (None, lambda logits: np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)),
        ("multi_label_classification", lambda logits: 1 / (1 + np.exp(-logits))),
        ("regression", lambda logits: logits),
    ],
)
def test_labels_and_scores_are_those_of_the_logits(problem_type, scores_of):
    config = ViTMSNConfig(num_labels=4, problem_type=problem_type, id2label=dict(enumerate("abcd")))
    logits = np.float32([[1, 3, 1, -2], [0, -1, 2, 0.5]])
    labels = np.array([["b", "a", "c"], ["c", "d", "a"]])  # of equals the first
    scores = -np.sort(-scores_of(logits.astype(np.float64)))[:, :3]

    def failed(labels, scores, top_k=3):
        rows = compare_labels_and_scores(labels, scores.astype(np.float32), logits, config, top_k, 1e-5)
        return {name: row.reason for name, row in rows.items() if not row.passed}

    assert failed(labels, scores) == {}
    assert list(failed(labels, scores + [[0, 0, 1e-3]])) == ["scores"]
    swapped = labels[:, [1, 0, 2]]
    assert failed(swapped, scores) == {"labels": "4 of 6 are others, the first a instead of b"}
    assert list(failed(labels, scores, top_k=2)) == ["scores", "labels"]


@pytest.mark.parametrize(
    ("package", "kind", "options"),
    [
        (ptmodels, "program", {}),
        pytest.param(ptmodels, "onnx", {}, marks=pytest.mark.slow),
        (tfmodels, "onnx", {}),
        pytest.param(tfmodels, "litert", {}, marks=pytest.mark.slow),
        pytest.param(tfmodels, "litert", {"quantization": "float16"}, marks=pytest.mark.slow),
        (tfmodels, "litert", {"quantization": "int8", "calibration_images": read_photographs()}),
    ],
)
def test_a_gelu_of_another_form_is_found_in_every_format(package, kind, options, monkeypatch, tmp_path):
    """Before what is quantized is quantized: 8 bits, and 16, are further away than that."""
    model, case = package.load(GOLDEN / "vit_msn_tiny"), "float32 4x32x32" if options else "4x32x32"
    half = "torch" if package is ptmodels else "keras"
    with (
        tanh_gelu(monkeypatch, model, f"write_{kind}"),
        pytest.raises(
            ExportError, match=f"the {kind} of {half} differs .*nothing was written: {case}: .*bound 2e-05"
        ) as caught,
    ):
        getattr(package.export, f"export_{kind}")(
            model, tmp_path / "model", image_size=32, image_processor=PROCESSOR, **options
        )
    figure = float(str(caught.value).split(f"{case}: ")[1].split()[0])
    assert EXPORT_BOUND < figure < min(QUANTIZED_BOUNDS.values())
    assert not list(tmp_path.iterdir())


def changed_weight(path: Path) -> None:
    import onnx

    graph = onnx.load(path)
    weight = next(entry for entry in graph.graph.initializer if list(entry.dims) == [32, 32])
    values = onnx.numpy_helper.to_array(weight).copy()
    values[3, 4] += 1e-2
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, path)


@pytest.mark.parametrize("package", [ptmodels, tfmodels])
def test_a_changed_weight_in_onnx_is_found(package, monkeypatch, tmp_path):
    export = package.export
    write = export.write_onnx

    def write_changed(model, path, size):
        write(model, path, size)
        changed_weight(path)

    monkeypatch.setattr(export, "write_onnx", write_changed)
    with pytest.raises(ExportError, match=r"the onnx of (torch|keras) differs .*4x32x32: .* of the rms"):
        export.export_onnx(package.load(GOLDEN / "vit_msn_tiny"), tmp_path / "model.onnx", image_size=32)
    assert not list(tmp_path.iterdir())


def test_what_does_not_run_is_no_export(monkeypatch, tmp_path):
    monkeypatch.setattr(tfmodels.export, "write_litert", lambda model, path, *_, **__: path.write_bytes(b"no model"))
    with pytest.raises(ExportError, match="the litert of keras does not run, and nothing was written"):
        tfmodels.export.export_litert(tfmodels.load(GOLDEN / "vit_msn_tiny"), tmp_path / "model.tflite", image_size=32)
    assert not list(tmp_path.iterdir())


# What is right


def test_the_difference_is_printed_and_kept(tmp_path, capsys):
    """In all four formats; `twinzoo.json` lies where the runtimes do not mind."""
    keras_model, torch_model = tfmodels.load(GOLDEN / "vit_msn_tiny"), ptmodels.load(GOLDEN / "vit_msn_tiny")
    saved = tfmodels.export.export_saved_model(keras_model, tmp_path / "saved", image_processor=PROCESSOR)
    litert = tfmodels.export.export_litert(keras_model, tmp_path / "m.tflite", image_processor=PROCESSOR)
    onnx = ptmodels.export.export_onnx(torch_model, tmp_path / "m.onnx", image_processor=PROCESSOR, image_size=32)
    program = ptmodels.export.export_program(torch_model, tmp_path / "m.pt2", image_processor=PROCESSOR)
    said = capsys.readouterr().out.splitlines()
    for report, line in zip((saved, litert, onnx, program), said, strict=True):
        assert f"at most {report.largest:.1e} of the rms away from the live model (bound" in line
        metadata = read_metadata(report.path)
        assert metadata["differences"] == report.differences and metadata["bound"] == report.bound
        assert metadata["preprocessing"]["image_mean"] == [0.485, 0.456, 0.406]
        assert metadata["labels"] == [keras_model.config.id2label[number] for number in range(7)]
        assert 0 <= report.largest <= report.bound <= EXPORT_BOUND
    assert saved.bound == SAVED_MODEL_BOUND
    assert set(saved.differences) == {
        *("serving_default 4x32x32", "serving_default 1x41x25", "features 4x32x32", "features 1x41x25"),
        *("serving_bytes photographs", "serving_bytes photographs scores"),
    }
    assert (set(litert.differences), set(program.differences)) == (
        {"4x32x32"},
        {"4x32x32", "1x41x32"} - {"1x41x32"} | {"1x41x25"},
    )


def test_what_comes_in_one_size_is_compared_in_one_size_at_a_time(tmp_path):
    """Of a processor that does not resize, nor convert, photographs come in the model's size, then in another."""
    model = tfmodels.load(GOLDEN / "vit_msn_tiny")
    processor = ImageProcessor(size=48, do_resize=False, do_convert_rgb=False, image_mean=0.4)
    report = tfmodels.export.export_saved_model(model, tmp_path / "saved", image_processor=processor)
    assert {case for case in report.differences if case.startswith("serving_bytes")} == {
        *("serving_bytes 4x32x32", "serving_bytes 4x32x32 scores"),
        *("serving_bytes 1x41x25", "serving_bytes 1x41x25 scores"),
    }
    sizes = pixel_cases(model.config, processor, None, any_size=True)  # of ONNX and programs, too
    assert list(sizes) == ["4x32x32", "1x41x25"]
    np.testing.assert_array_equal(
        sizes["4x32x32"], ImageProcessor(size=32, image_mean=0.4)(read_photographs()).pixel_values
    )


def test_metadata_of_others_are_none(tmp_path):
    import onnx

    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no model")
    graph = onnx.helper.make_graph([], "graph", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    for name in ("empty", "text", "other.onnx"):
        with pytest.raises(ValueError, match=f"{name} has no twinzoo.json"):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    [name if name == "vit_msn_tiny" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_eight_bits_are_near(name, tmp_path):
    """Compared on the calibration images, of which 8 bits promise something."""
    model = tfmodels.load(GOLDEN / name)
    whole, eight = tmp_path / "m16.tflite", tmp_path / "m8.tflite"
    report = tfmodels.export.export_litert(
        model, eight, image_processor=PROCESSOR, quantization="int8", calibration_images=read_photographs() * 4
    )
    assert list(report.differences) == ["calibration 16x32x32"]
    assert EXPORT_BOUND < report.largest <= QUANTIZED_BOUNDS["int8"] == report.bound
    half = tfmodels.export.export_litert(model, whole, image_processor=PROCESSOR, quantization="float16")
    assert EXPORT_BOUND < half.largest <= QUANTIZED_BOUNDS["float16"] == half.bound
    told, half_told = read_metadata(eight), read_metadata(whole)
    assert told["quantization"] == "int8" and half_told["quantization"] == "float16"
    for entry in (told, half_told):  # before they were quantized
        assert entry["float32"]["differences"]["float32 4x32x32"] <= entry["float32"]["bound"] == EXPORT_BOUND
    assert told["unbounded_differences"] == report.unbounded and list(report.unbounded) == ["4x32x32"]
    assert half.unbounded == {} and "unbounded_differences" not in half_told
    assert EXPORT_BOUND < report.unbounded["4x32x32"] < 1
    assert eight.stat().st_size < whole.stat().st_size


def test_quantization_wants_its_arguments(tmp_path):
    model, path = tfmodels.load(GOLDEN / "vit_msn_tiny"), tmp_path / "model.tflite"
    export = tfmodels.export.export_litert
    with pytest.raises(ValueError, match="quantization is 'int4'; allowed are None, float16, int8"):
        export(model, path, image_size=32, quantization="int4")
    with pytest.raises(ValueError, match="int8 needs them, and only it"):
        export(model, path, image_processor=PROCESSOR, quantization="int8")
    with pytest.raises(ValueError, match="int8 needs them, and only it"):
        export(model, path, image_processor=PROCESSOR, calibration_images=[])
    with pytest.raises(ValueError, match="image_processor is None; calibration_images need one"):
        export(model, path, image_size=32, quantization="int8", calibration_images=read_photographs())
    assert not list(tmp_path.iterdir())


def test_the_native_operator_stays_and_says_what_it_needs(tmp_path):
    model = tfmodels.load(GOLDEN / "dinat_tiny")
    report = tfmodels.export.export_saved_model(model, tmp_path / "saved", native=True)
    assert read_metadata(tmp_path / "saved")["native"] is True and report.largest <= SAVED_MODEL_BOUND
    code = "import tensorflow as tf; tf.saved_model.load('saved').signatures['serving_default']"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode != 0 and "Op type not registered" in process.stderr


# Batch normalization


def normalizations(model) -> int:
    layers = model._flatten_layers() if isinstance(model, keras.Model) else model.modules()
    return sum("BatchNorm" in type(layer).__name__ for layer in layers)


def test_folding_leaves_float64_as_it_is():
    keras_model = tfmodels.load(GOLDEN / "swiftformer_tiny", dtype="float64")
    torch_model = ptmodels.load(GOLDEN / "swiftformer_tiny", dtype=torch.float64).eval()
    images = np.random.default_rng(0).standard_normal((2, 3, 75, 64))
    expected = np.asarray(keras_model(images).logits)
    folded = tfmodels.folding.fold_batch_norm(keras_model)
    twin = ptmodels.folding.fold_batch_norm(torch_model)
    with torch.no_grad():
        found = {"keras": np.asarray(folded(images).logits), "torch": twin(torch.from_numpy(images)).logits.numpy()}
    for logits in found.values():
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert normalizations(keras_model) == normalizations(torch_model) > 1
    assert normalizations(folded) == normalizations(twin) == 1  # the one before the head
    assert np.array_equal(np.asarray(keras_model(images).logits), expected)  # the model itself is as it was


def test_folding_of_other_families_is_a_copy():
    model = tfmodels.load(GOLDEN / "vit_msn_tiny")
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(tfmodels.folding.fold_batch_norm(model)(images).logits, model(images).logits)


def test_folded_exports_have_no_normalization_left(tmp_path):
    import onnx

    model = ptmodels.load(GOLDEN / "swiftformer_tiny")
    path = tmp_path / "model.onnx"
    report = ptmodels.export.export_onnx(model, path, image_size=64, fold_batch_norm=True, verbose=False)
    assert report.largest <= EXPORT_BOUND
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("BatchNormalization") <= 1 and kinds.count("Conv") > 5
