"""`twinzoo export`: what it makes, what it says, and what it refuses before any work."""

import json
import shutil
from pathlib import Path

import pytest

from modelspec import ImageProcessor
from modelspec.exports import read_metadata
from modelspec.exports.photographs import read_photographs
from twinzoo.__main__ import main

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a checkpoint `model` and a folder `photos` of folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copytree(GOLDEN / "vit_msn_tiny", "model")
    ImageProcessor(size=32).save_pretrained("model")
    for index, content in enumerate(read_photographs()):
        (tmp_path / "photos" / str(index)).mkdir(parents=True)
        (tmp_path / "photos" / str(index) / f"{index}.{'jpg' if index == 0 else 'png'}").write_bytes(content)
    return tmp_path


def test_a_table_of_differences(folder, capsys):
    assert main(["export", "model", "new/model.tflite", "--format", "litert"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    heading, header, row, note = said.out.splitlines()
    assert heading == "new/model.tflite  LiteRT of the Keras model"
    assert header.split()[-1] == "difference" and row.split()[0] == "4x32x32" and float(row.split()[1]) < 2e-5
    assert note.endswith("the bound is 2e-05.")


def test_eight_bits_are_calibrated_with_a_folder_of_folders(folder, capsys):
    options = ["--format", "litert", "--quantization", "int8", "--calibration-images", "photos"]
    assert main(["export", "model", "model.tflite", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["half"], found["bound"]) == ("litert", "keras", 0.3)
    assert list(found["differences"]) == ["calibration 4x32x32"]
    assert read_metadata("model.tflite")["differences"] == found["differences"]


def test_onnx_is_torchs_for_the_checkpoints_size_or_as_told(folder, capsys):
    import onnx

    assert main(["export", "model", "one.onnx", "--format", "onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["half"] == "torch"
    options = ["--framework", "tf", "--image-size", "any", "--json"]
    assert main(["export", "model", "any.onnx", "--format", "onnx", *options]) == 0
    assert json.loads(capsys.readouterr().out)["half"] == "keras"
    shapes = {}
    for name in ("one.onnx", "any.onnx"):
        dimensions = onnx.load(name).graph.input[0].type.tensor_type.shape.dim
        shapes[name] = [dimension.dim_param or dimension.dim_value for dimension in dimensions]
    assert shapes == {"one.onnx": ["batch", 3, 32, 32], "any.onnx": ["batch", 3, "height", "width"]}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--format", "saved_model", "--framework", "torch"], "framework is 'torch'; saved_model is made from tf"),
        (["--format", "program", "--framework", "tf"], "framework is 'tf'; program is made from torch"),
        (
            ["--format", "onnx", "--quantization", "int8"],
            "quantization is 'int8'; that goes with litert, not with onnx",
        ),
        (["--format", "litert", "--quantization", "int8"], "quantization int8 needs calibration_images"),
        (["--format", "litert", "--calibration-images", "photos"], "quantization int8 needs calibration_images"),
        (["--format", "litert", "--native"], "native is True; that goes with saved_model, not with litert"),
        (["--format", "onnx", "--top-k", "3"], "top_k is 3; that goes with saved_model, not with onnx"),
        (["--format", "saved_model", "--top-k", "0"], "top_k is 0; allowed are 1 to 7"),
        (["--format", "saved_model", "--image-size", "32"], "image_size is '32'; that goes with litert, onnx, program"),
        (["--format", "litert", "--image-size", "any"], "image_size is 'any'; that goes with onnx, program"),
        (["--format", "onnx", "--image-size", "large"], "image_size is 'large'; give pixels, or 'any'"),
        (
            ["--format", "litert", "--quantization", "int8", "--calibration-images", "model/nothing"],
            "model/nothing holds no images",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line_and_no_file(folder, options, reason, capsys):
    assert main(["export", "model", "made", *options]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"twinzoo: error: {reason}") and said.err.count("\n") == 1 and said.out == ""
    assert sorted(path.name for path in folder.iterdir()) == ["model", "photos"]


def test_a_checkpoint_without_a_head_is_refused(folder, capsys):
    shutil.copytree(GOLDEN / "vit_msn_masktoken", "headless")
    ImageProcessor(size=32).save_pretrained("headless")
    assert main(["export", "headless", "made", "--format", "saved_model"]) == 1
    assert "headless holds no trained classifier" in capsys.readouterr().err
    assert not (folder / "made").exists()
