"""Answers as TensorFlow Serving does, in a process that has TensorFlow and nothing of ours; without its container.

Not imported but run, as a file: `python -P stand_in_server.py NAME FOLDER`. FOLDER is what a container has at
/models/NAME: folders named by a version, of which the highest is served. The port, chosen by the system, is the first
line on standard output; the process ends with its standard input.

A SavedModel is loaded as the server loads it: as a graph in a session, whose tensors the signatures name. JSON becomes
tensors, and tensors JSON, as TensorFlow Serving's page on its REST interface says ("RESTful API": predict in the row
and the columnar format, binary values, errors).
"""

import base64
import binascii
import http
import http.server
import json
import re
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN = {"keras", "torch", "modelspec", "neighborhood", "tfmodels", "ptmodels", "parity", "twinzoo", "safetensors"}
RUN_ARTEFACT = Path(__file__).parents[2] / "modelspec" / "exports" / "run_artefact.py"
DEFAULT_SIGNATURE = "serving_default"


class RefusedError(Exception):
    """A request that is not answered: the HTTP status, and why."""

    def __init__(self, status: http.HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


def bad(reason: str) -> RefusedError:
    return RefusedError(http.HTTPStatus.BAD_REQUEST, reason)


class ServedModel:
    """The highest version in a folder."""

    def __init__(self, folder: Path):
        import tensorflow as tf

        self.tf = tf
        version = max(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())
        self.session = tf.compat.v1.Session(graph=tf.Graph())
        with self.session.graph.as_default():
            loaded = tf.compat.v1.saved_model.loader.load(self.session, ["serve"], str(folder / str(version)))
        self.signatures = loaded.signature_def

    def predict(self, request: Any) -> dict[str, Any]:
        """Returns the JSON that answers a JSON request.

        Raises:
            RefusedError: it is not as it should be, or the graph refused what it was given.
        """
        if not isinstance(request, dict) or ("instances" in request) == ("inputs" in request):
            raise bad("the request must be an object with either 'instances' or 'inputs'")
        name = request.get("signature_name", DEFAULT_SIGNATURE)
        if name not in self.signatures or name.startswith("__"):
            raise bad(f'Serving signature name: "{name}" not found in signature def')
        signature, by_row = self.signatures[name], "instances" in request
        columns = rows_to_columns(request["instances"], set(signature.inputs)) if by_row else request["inputs"]
        if not isinstance(columns, dict) or is_base64(columns):
            if len(signature.inputs) > 1:
                raise bad("several inputs are needed, and these have no names")
            columns = {next(iter(signature.inputs)): columns}
        if set(columns) != set(signature.inputs):
            raise bad(f"inputs are {', '.join(columns)}; needed are {', '.join(signature.inputs)}")
        feed = {info.name: self.to_tensor(columns[key], info.dtype) for key, info in signature.inputs.items()}
        try:
            arrays = self.session.run({key: info.name for key, info in signature.outputs.items()}, feed)
        except (self.tf.errors.InvalidArgumentError, ValueError) as error:  # a shape that does not fit is a ValueError
            # Python puts words of its own before what the graph said
            raise bad(getattr(error, "message", str(error)).removeprefix("Graph execution error:\n\n")) from error
        outputs = {key: from_array(array, key.endswith("_bytes")) for key, array in arrays.items()}
        (single,) = outputs.values() if len(outputs) == 1 else (None,)
        if not by_row:
            return {"outputs": outputs if single is None else single}
        rows = [dict(zip(outputs, values, strict=True)) for values in zip(*outputs.values(), strict=True)]
        return {"predictions": rows if single is None else single}

    def to_tensor(self, value: Any, dtype: int) -> np.ndarray:
        """Returns JSON values as an array of a tensor's dtype; strings are text, or bytes in base64."""
        if dtype == self.tf.string.as_datatype_enum:
            return np.array(mapped(value, to_bytes), object)
        try:
            return np.array(mapped(value, to_number), self.tf.dtypes.as_dtype(dtype).as_numpy_dtype)
        except ValueError as error:  # lists of different lengths
            raise bad(str(error)) from error


def rows_to_columns(rows: Any, names: set[str]) -> Any:
    """Returns input name -> values, or the values where rows do not name their only input."""
    if not isinstance(rows, list) or not rows:
        raise bad("'instances' must be a list with something in it")
    named = [isinstance(row, dict) and not is_base64(row) for row in rows]
    if not any(named):
        return rows
    if not all(named) or any(set(row) != names for row in rows):
        raise bad(f"all of 'instances' must be objects with the keys {', '.join(sorted(names))}, or none")
    return {name: [row[name] for row in rows] for name in names}


def is_base64(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str)


def mapped(value: Any, function: Any) -> Any:
    return [mapped(entry, function) for entry in value] if isinstance(value, list) else function(value)


def to_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not is_base64(value):
        raise bad(f"JSON Value: {value!r} not formatted correctly for base64 data")
    try:
        return base64.b64decode(value["b64"], validate=True)
    except binascii.Error as error:
        raise bad("Unable to base64 decode") from error


def to_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad(f"JSON Value: {value!r} is not a number")
    return value


def from_array(array: np.ndarray, binary: bool) -> Any:
    """Returns an output as JSON: bytes are text, or in base64 if its name says so."""
    if array.dtype != object:
        return array.tolist()
    return mapped(array.tolist(), lambda value: {"b64": base64.b64encode(value).decode()} if binary else value.decode())


def make_handler(name: str, model: ServedModel) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                status, answer = http.HTTPStatus.OK, self.answer()
            except RefusedError as error:
                status, answer = error.status, {"error": str(error)}
            except Exception as error:
                status, answer = http.HTTPStatus.INTERNAL_SERVER_ERROR, {"error": repr(error)}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self) -> dict[str, Any]:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked = re.fullmatch(r"/v1/models/([^/:]+):predict", self.path)
            if asked is None:
                raise bad(f"Malformed request: POST {self.path}")
            if asked[1] != name:
                raise RefusedError(http.HTTPStatus.NOT_FOUND, f"Servable not found for request: Latest({asked[1]})")
            try:
                request = json.loads(body)
            except ValueError as error:
                raise bad(f"JSON Parse error: {error}") from error
            return model.predict(request)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def main(name: str, folder: str) -> None:
    hiding = runpy.run_path(str(RUN_ARTEFACT))["Hiding"]
    sys.meta_path[:] = [hiding(finder, HIDDEN) for finder in sys.meta_path]
    model = ServedModel(Path(folder))
    present = HIDDEN & {module.partition(".")[0] for module in sys.modules}
    assert not present, f"{present} were imported"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), make_handler(name, model))
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
