"""A model fine-tuned on digits says the same of held-out ones in every form in which it leaves."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
import torch
from ai_edge_litert.interpreter import Interpreter

import ptmodels
import tfmodels
from modelspec import ImageProcessor
from modelspec.exports import read_metadata
from twinzoo.__main__ import main

HELD_OUT = 200
TRAINING = (
    *("--model", "swiftformer-xs", "--from-scratch", "--image-size", "32", "--epochs", "10", "--seed", "1"),
    *("--learning-rate", "2e-3", "--framework", "torch"),
    *("--set", "depths=[2,2,2]", "--set", "embed_dims=[24,32,48]", "--set", "downsamples=[true,true,true]"),
)
FORMATS = {
    "saved_model": ("saved_model",),
    "torch.onnx": ("onnx", "--framework", "torch"),
    "keras.onnx": ("onnx", "--framework", "tf"),
    "folded.onnx": ("onnx", "--framework", "tf", "--fold-batch-norm", "--image-size", "any"),
    "float32.tflite": ("litert",),
    "float16.tflite": ("litert", "--quantization", "float16"),
    "int8.tflite": ("litert", "--quantization", "int8", "--calibration-images", "digits"),
    "program.pt2": ("program", "--image-size", "any"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with `digits`, split into `train` and `val`, the checkpoint `model`, and all its exports."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["digits", "digits"]) == 0
        for index, path in enumerate(sorted(Path("digits").glob("*/*.png"))):
            target = Path("digits") / ("val" if index % 5 == 0 else "train") / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        for path in Path("digits").iterdir():
            if path.name not in ("train", "val"):
                path.rmdir()
        assert main(["finetune", "digits", *TRAINING, "--output", "model"]) == 0
        for name, (kind, *options) in FORMATS.items():
            assert main(["export", "model", name, "--format", kind, *options]) == 0
    return folder


def litert_logits(path: Path, pixels: np.ndarray) -> np.ndarray:
    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    return np.concatenate([runner(pixel_values=image[None])["logits"] for image in pixels])


def onnx_logits(path: Path, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": pixels})[0]


@pytest.mark.slow
def test_held_out_digits_are_the_same_in_every_form(exported, capsys):
    paths = sorted((exported / "digits" / "val").glob("*/*.png"))
    paths = [paths[index] for index in np.linspace(0, len(paths) - 1, HELD_OUT).round().astype(int)]
    files = [path.read_bytes() for path in paths]
    pixels = ImageProcessor.from_pretrained(exported / "model")(files).pixel_values
    live = np.asarray(tfmodels.load(exported / "model")(pixels, training=False).logits)
    with torch.no_grad():
        twin = ptmodels.load(exported / "model").eval()(torch.from_numpy(pixels)).logits.numpy()
        program = torch.export.load(exported / "program.pt2").module()(pixel_values=torch.from_numpy(pixels))["logits"]
    served = tf.saved_model.load(str(exported / "saved_model")).signatures["serving_bytes"]
    answer = served(image_bytes=tf.constant(files))
    found = {
        "torch twin": twin,
        "SavedModel, bytes": answer["logits"].numpy(),
        "program": program.numpy(),
        **{name: onnx_logits(exported / name, pixels) for name in FORMATS if name.endswith(".onnx")},
        **{name: litert_logits(exported / name, pixels) for name in FORMATS if name.endswith(".tflite")},
    }
    first = live.argmax(-1)
    assert (first == [int(path.parent.name) for path in paths]).mean() > 0.97  # it has learnt something
    scale = np.sqrt(np.mean(np.square(live, dtype=np.float64)))
    same = {name: (logits.argmax(-1) == first).mean() for name, logits in found.items()}
    with capsys.disabled():
        print(file=sys.stderr)
        for name, logits in found.items():
            print(f"{name:20} same top-1 {same[name]:.1%}  {np.abs(logits - live).max() / scale:.1e}", file=sys.stderr)
    assert same.pop("int8.tflite") >= 0.97
    assert same.pop("float16.tflite") >= 0.99
    assert set(same.values()) == {1.0}  # bytes too: they are preprocessed bit by bit as Pillow does
    labels = [label.decode() for label in answer["labels"].numpy()[:, 0]]
    assert labels == [tfmodels.load(exported / "model").config.id2label[number] for number in first]
    for name in FORMATS:
        metadata = read_metadata(exported / name)
        assert 0 <= max(metadata["differences"].values()) <= metadata["bound"]
        assert metadata["labels"] == [str(digit) for digit in range(10)]
