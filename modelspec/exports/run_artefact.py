"""Runs exported artefacts as their users do: in a process of its own, without the packages that it must not need.

Not imported but run, as a file: `python -P run_artefact.py JOBS`, JOBS being a JSON list of jobs, done one after the
other: `kind` (a key of RUNS), `name` (for messages), `artefact` (a path), `absent` (packages that are hidden and that
must not be there afterwards), `library` (of native operations, or null), `inputs` (an npz of images by case) and
`outputs` (an npz of what came of them by case, to write). A case is called `SIGNATURE WORDS` or, of the only signature,
anything without a space. Of several outputs, the first has the case's name, others their own behind it. What fails is
the last line on standard output, and the exit status is 1.
"""

import importlib.machinery
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[np.ndarray, str], dict[str, np.ndarray]]
# signature of a SavedModel -> its input and its outputs, all of which are compared
SIGNATURES = {
    "serving_default": ("pixel_values", ("logits",)),
    "serving_bytes": ("image_bytes", ("logits", "scores", "labels")),
    "features": ("pixel_values", ("features",)),
}


def saved_model(path: str) -> Run:
    import tensorflow as tf

    served = tf.saved_model.load(path)

    def run(images: np.ndarray, signature: str) -> dict[str, np.ndarray]:
        given, returned = SIGNATURES[signature or "serving_default"]
        answer = served.signatures[signature or "serving_default"](**{given: tf.constant(images)})
        found = {name: answer[name].numpy() for name in returned}
        if "labels" in found:  # bytes, as objects, which an npz cannot hold without pickling
            found["labels"] = np.char.decode(found["labels"].astype(np.bytes_), "utf-8")
        return found

    return run


def keras_file(path: str) -> Run:
    import keras

    import tfmodels  # noqa: F401 - makes its classes known

    model = keras.models.load_model(path, safe_mode=True)
    size = model.config.to_dict().get("image_size")

    def run(images: np.ndarray, _: str) -> dict[str, np.ndarray]:
        other = not model.takes_any_size and images.shape[2:] != (size, size)
        options = {"interpolate_pos_encoding": True} if other else {}
        return {"logits": np.asarray(model(images, training=False, **options)["logits"])}

    return run


def program(path: str) -> Run:
    import torch

    loaded = torch.export.load(path)
    module = loaded.module()
    dtype = next(value.dtype for value in loaded.state_dict.values() if value.is_floating_point())

    def run(images: np.ndarray, _: str) -> dict[str, np.ndarray]:
        with torch.no_grad():
            logits = module(pixel_values=torch.from_numpy(images).to(dtype))["logits"]
        return {"logits": logits.to(torch.promote_types(dtype, torch.float32)).numpy()}

    return run


def onnx(path: str) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images, _: {"logits": session.run(["logits"], {"pixel_values": images})[0]}


def litert(path: str) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(path).get_signature_runner("serving_default")
    return lambda images, _: {"logits": np.concatenate([runner(pixel_values=i[None])["logits"] for i in images])}


RUNS = {"saved_model": saved_model, "keras_file": keras_file, "program": program, "onnx": onnx, "litert": litert}


class Hiding:
    """Stands before a finder of modules, which then finds nothing of the hidden packages."""

    def __init__(self, finder: Any, hidden: set[str]):
        self.finder, self.hidden = finder, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, path, target)


def do(job: dict) -> None:
    """Does one job; see the module."""
    absent = set(job["absent"])
    finders = sys.meta_path[:]
    sys.meta_path[:] = [Hiding(finder, absent) for finder in finders]
    try:
        if job["library"] is not None:
            import tensorflow as tf

            tf.load_op_library(job["library"])
        run = RUNS[job["kind"]](job["artefact"])
        outputs: dict[str, np.ndarray] = {}
        with np.load(job["inputs"]) as images:
            for case in images:
                first, *others = run(images[case], case.rpartition(" ")[0]).items()
                outputs |= {case: first[1], **{f"{case} {name}": array for name, array in others}}
    finally:
        sys.meta_path[:] = finders
    present = absent & {name.partition(".")[0] for name in sys.modules}
    if present:
        raise RuntimeError(f"it needed {', '.join(sorted(present))}")
    np.savez(job["outputs"], **outputs)  # type: ignore[arg-type] # to mypy, any of them might be allow_pickle


def main(path: str) -> int:
    with open(path, encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        try:
            do(job)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"{job['name']}: {reason}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
