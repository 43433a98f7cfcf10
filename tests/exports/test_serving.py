"""docs/serving.md, word by word: a SavedModel behind a server that has TensorFlow and nothing of ours, and its client.

The server is `stand_in_server.py`; where the page says port 8501, these tests have the stand-in's.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import tfmodels
from modelspec import ImageProcessor, SwiftFormerConfig
from modelspec.checkpoints import probing_weights
from modelspec.exports.photographs import read_photographs
from twinzoo.__main__ import main

pytestmark = pytest.mark.usefixtures("uncompared")

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "golden" / "swiftformer_tiny"
SERVER = Path(__file__).with_name("stand_in_server.py")
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://localhost:8501"
EXPORT, CLIENT, USE, ASK_ONNX, ASK_LITERT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
EXPORT_COMMAND, CONTAINER, CURL, EXPORT_ONNX, EXPORT_LITERT = COMMANDS
ROSE, TULIP = "rose.jpg", "tulip.png"  # of the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory, uncompared):
    """Where the page's reader is: a checkpoint, two photographs, and what the page's first lines export."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(CHECKPOINT, folder / "my-checkpoint")
    (folder / ROSE).write_bytes(read_photographs()[0])
    (folder / TULIP).write_bytes(read_photographs()[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(EXPORT, {})
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """The address of a server, which has the name and the folder that the page's container has."""
    mount = r'-v "\$PWD/flowers/1:/models/(\w+)/1" -e MODEL_NAME=(\w+) tensorflow/serving\n'
    mounted, name = re.search(mount, CONTAINER).groups()
    assert mounted == name
    command = [sys.executable, "-P", str(SERVER), name, str(folder / "flowers")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        port = process.stdout.readline().strip()
        assert port.isdigit(), "the server did not start; standard error says why"
        yield f"http://localhost:{port}"
        process.stdin.close()


@pytest.fixture(scope="module")
def live():
    """What the live model says of the photographs: logits, and by file the labels and scores of the five first."""
    model = tfmodels.load(CHECKPOINT)
    pixels = ImageProcessor.from_pretrained(CHECKPOINT)(read_photographs()).pixel_values
    logits = np.asarray(model(pixels).logits, np.float64)
    order = np.argsort(-logits, kind="stable")[:, :5]
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = [[model.config.id2label[number] for number in row] for row in order.tolist()]
    return {"pixels": pixels, "logits": logits, "labels": labels, "scores": np.take_along_axis(scores, order, -1)}


@pytest.fixture
def classify(server):
    """The page's client."""
    names = {}
    run(CLIENT.replace(ADDRESS, server), names)
    return names["classify"]


def run(code, names):
    exec(compile(code, "docs/serving.md", "exec"), names)


def ask(server, request, name="flowers"):
    """Returns status and JSON of the answer to a request, which is JSON or bytes."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    try:
        with urllib.request.urlopen(f"{server}/v1/models/{name}:predict", body, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def assert_near(actual, expected):
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected).max() / np.sqrt(np.mean(np.square(expected)))
    assert difference <= 1e-5, f"differs by {difference:.1e} of the rms"


def test_the_client_is_told_what_the_live_model_says(classify, live):
    files = read_photographs()
    assert len({file[:4] for file in files}) == 2  # JPEG and PNG
    found = classify(files)
    assert [sorted(entry) for entry in found] == [["labels", "logits", "scores"]] * 4
    assert [entry["labels"] for entry in found] == live["labels"]
    assert_near([entry["scores"] for entry in found], live["scores"])
    assert_near([entry["logits"] for entry in found], live["logits"])


def test_the_client_tells_what_the_server_refuses(classify):
    with pytest.raises(RuntimeError, match="^Unknown image file format"):
        classify([read_photographs()[0], b"no image"])
    with pytest.raises(RuntimeError, match="Servable not found"):
        classify(read_photographs(), name="trees")
    with pytest.raises(urllib.error.URLError):
        classify([], server="http://localhost:9")


def test_the_examples_use_the_client(folder, server, live, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run(CLIENT.replace(ADDRESS, server) + USE, {})
    said = [f"{name}: {live['labels'][i][0]}, {live['scores'][i][0]:.1%}" for i, name in enumerate((ROSE, TULIP))]
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_line_of_curl(folder, server, live):
    command = CURL.replace(ADDRESS, server)
    assert command != CURL
    process = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (found,) = json.loads(process.stdout)["predictions"]
    assert found["labels"] == live["labels"][0]
    assert_near(found["logits"], live["logits"][0])


@pytest.mark.slow
def test_the_files_of_onnx_and_litert(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = SwiftFormerConfig(depths=[1, 1], embed_dims=[8, 16], downsamples=[True, True], num_labels=7)
    model = tfmodels.TFSwiftFormerForImageClassification.from_weights(config, probing_weights(config, seed=0))
    processor = ImageProcessor(size=(40, 48), image_mean=[0.4, 0.5, 0.6])
    model.save_pretrained("my-checkpoint", image_processor=processor)
    Path(ROSE).write_bytes(read_photographs()[0])
    pixels = processor(read_photographs()[0]).pixel_values
    logits = np.asarray(model(pixels).logits)
    names = {}
    for command, code in ((EXPORT_ONNX, ASK_ONNX), (EXPORT_LITERT, ASK_LITERT)):
        program, *arguments = shlex.split(command)
        assert program == "twinzoo" and main(arguments) == 0
        capsys.readouterr()
        run(code, names)
        assert_near(names["logits"], logits)
        assert capsys.readouterr().out.splitlines() == [config.id2label[logits[0].argmax()]]
    assert_near(names["preprocess"](ROSE, names["told"]["preprocessing"]), pixels)


def test_the_command_exports_what_the_python_exports(folder, monkeypatch):
    calls = []
    monkeypatch.setattr("tfmodels.export.export_saved_model", lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr("twinzoo.export_command._print_report", lambda report: None)
    monkeypatch.chdir(folder)
    run(EXPORT, {})
    program, *arguments = shlex.split(EXPORT_COMMAND)
    assert program == "twinzoo" and main(arguments) == 0
    ((model, destination), options), ((other_model, other_destination), other_options) = calls
    assert destination == other_destination == "flowers/1"
    assert type(model) is type(other_model) and model.config.to_dict() == other_model.config.to_dict()
    assert options["image_processor"].to_dict() == other_options["image_processor"].to_dict()


def test_the_notebook_has_the_client_of_the_page():
    notebook = json.loads((ROOT / "notebooks" / "3-export-and-serve.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert CLIENT.strip() in cells


def test_rows_and_columns(server, live):
    pixels, logits = live["pixels"][:2].tolist(), live["logits"][:2]
    forms = {
        "predictions": ({"instances": pixels}, {"instances": [{"pixel_values": image} for image in pixels]}),
        "outputs": ({"inputs": pixels}, {"inputs": {"pixel_values": pixels}}),
    }
    for key, requests in forms.items():
        for request in requests:
            status, answer = ask(server, request)
            assert (status, list(answer)) == (200, [key])
            assert_near(answer[key], logits)
    _, answer = ask(server, {"signature_name": "features", "instances": pixels})
    assert np.shape(answer["predictions"]) == (2, 40)


def test_columns_of_several_outputs(classify, server, live):
    from base64 import b64encode

    files = [{"b64": b64encode(file).decode()} for file in read_photographs()]
    _, answer = ask(server, {"signature_name": "serving_bytes", "inputs": {"image_bytes": files}})
    assert answer["outputs"]["labels"] == live["labels"]
    _, rows = ask(server, {"signature_name": "serving_bytes", "instances": [{"image_bytes": file} for file in files]})
    assert rows["predictions"] == classify(read_photographs())


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"{", "JSON Parse error"),
        ([1], "either 'instances' or 'inputs'"),
        ({"instances": [1], "inputs": [1]}, "either 'instances' or 'inputs'"),
        ({"signature_name": "serving", "instances": [1]}, '"serving" not found'),
        ({"signature_name": "serving_bytes", "instances": []}, "must be a list"),
        ({"signature_name": "serving_bytes", "instances": [{"b64": "?"}]}, "Unable to base64 decode"),
        ({"signature_name": "serving_bytes", "instances": [{"image": {"b64": ""}}]}, "keys image_bytes"),
        ({"signature_name": "serving_bytes", "instances": [7]}, "for base64 data"),
        ({"signature_name": "serving_bytes", "instances": ["no image"]}, "Unknown image file format"),
        ({"instances": [{"b64": ""}]}, "is not a number"),
        ({"instances": [[[[1, 2]], [[1]]]]}, "inhomogeneous"),
        ({"instances": [[1, 2]]}, "shape"),
    ],
)
def test_what_is_asked_wrongly_is_refused(server, request_, reason):
    status, answer = ask(server, request_)
    assert status == 400 and list(answer) == ["error"]
    assert reason in answer["error"]
