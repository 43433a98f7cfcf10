"""What an artefact says of itself: format, signatures, preprocessing, and how far from the live model it was found."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "twinzoo.json"
_LABELS = "labels.txt"  # where LiteRT's tools look for them
_EXTRA_ASSETS = "assets.extra"  # of a SavedModel, where TensorFlow does not look
_ONNX_KEY = "twinzoo"


def add_metadata(path: str | os.PathLike, kind: str, metadata: Mapping[str, Any]) -> None:
    """Adds metadata to an artefact; what it computes does not change.

    It lies in `assets.extra/twinzoo.json` of a SavedModel, in the property `twinzoo` of an ONNX model, and in a zip
    archive at the end of a LiteRT file, with the labels beside it, which is where LiteRT's own tools keep such files. A
    program of torch is given it when it is saved.

    Args:
        path: the artefact.
        kind: `"saved_model"`, `"onnx"` or `"litert"`.
        metadata: JSON values; `labels`, a list, become a file of their own in LiteRT.
    """
    path = Path(path)
    text = json.dumps(metadata, indent=1)
    if kind == "saved_model":
        (path / _EXTRA_ASSETS).mkdir(exist_ok=True)
        (path / _EXTRA_ASSETS / NAME).write_text(text + "\n", encoding="utf-8")
    elif kind == "onnx":
        import onnx

        model = onnx.load(path)
        onnx.helper.set_model_props(model, {_ONNX_KEY: text})
        path.write_bytes(model.SerializeToString())
    elif kind == "litert":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(NAME, text)
            archive.writestr(_LABELS, "".join(f"{label}\n" for label in metadata["labels"]))
    else:
        raise ValueError(f"kind is {kind!r}; allowed are saved_model, onnx, litert")


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Returns what an exported artefact says of itself.

    Its `differences` are those from the live model, by signature and images, as parts of the rms of what the live model
    gave (of scores, from what the logits beside them say), and `bound` is the largest that was allowed.
    What was quantized has those from before under `float32`, and int8 those on photographs, which no bound holds, under
    `unbounded_differences`.

    Args:
        path: a folder or a file that one of the `export_...` functions of either half wrote.

    Raises:
        ValueError: the artefact has no metadata of ours.
        ImportError: onnx is not installed, and the file is no other artefact.
    """
    path = Path(path)
    if path.is_dir():
        if (path / _EXTRA_ASSETS / NAME).is_file():
            return json.loads((path / _EXTRA_ASSETS / NAME).read_text(encoding="utf-8"))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.rpartition("/")[2] == NAME:
                    return json.loads(archive.read(name))
    else:
        import onnx
        from google.protobuf.message import DecodeError

        try:
            properties = onnx.load(path, load_external_data=False).metadata_props
        except DecodeError:
            properties = []
        for entry in properties:
            if entry.key == _ONNX_KEY:
                return json.loads(entry.value)
    raise ValueError(f"{path} has no {NAME}; it was not written by an export of ours")
