"""Times whole models of both halves against what a user would take instead, and against sgemm.

    python -m benchmarks.models --threads 1 2 --json models.json --plot models.png

Contenders: either half, eager (`torch`), compiled (`torch compiled`, by torch.compile; `keras`, a tf.function), as
SavedModel and by Keras' `predict`; transformers, eager and compiled, for SwiftFormer and ViT-MSN; for NAT and DiNAT,
which transformers has no longer, the same half's own model with another operator in all blocks: attention to all keys
with a mask (`dense`; made beforehand, but in training, where the bias changes) and to each window's keys, gathered
(`gather`). `composed` is our operator without kernels, `operator alone` the operators of all blocks and nothing else.
ONNX Runtime runs the torch half's export, LiteRT the Keras half's. `folded` is without batch normalization.

In every round each contender runs for a moment, and a matrix product too: medians over rounds treat all alike. Outputs
are compared first, so that all do the same work, in float32. Percentages are of the matrix product's rate in the same
rounds, with as many threads, and count useful work. Each contender has a process of its own; its memory is what that
holds at most while it runs, less what it held before (`benchmarks.processes`). What would leave the others no memory
while it waits, Keras' training with another operator, comes after them, in rounds with `torch` alone.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console
from rich.table import Table

from benchmarks.processes import Contender, ContenderError
from benchmarks.timing import MATRIX, alternate, threads_in_words

MODELS = ("swiftformer-xs", "swiftformer-l1", "vit-msn-small", "nat-mini", "dinat-mini")
PARTS = {
    "batch1": [{"batch": 1}],
    "batch16": [{"batch": 16}],
    "training": [{"batch": 16, "training": True}],
    "growth": [{"batch": 1, "size": 448}, {"batch": 1, "size": 896}],
}
# in the plot: ours green, others gray
SHOWN = {
    "torch": "#0b6e4f",
    "torch compiled": "#0b6e4f",
    "keras": "#6bbf8a",
    "keras SavedModel": "#6bbf8a",
    "transformers": "#8f8f8f",
    "transformers compiled": "#8f8f8f",
    "torch dense": "#8f8f8f",
    "torch gather": "#8f8f8f",
    "keras dense": "#b8b8b8",
    "keras gather": "#b8b8b8",
    "onnxruntime": "#6b6b6b",
}
AGREEMENT = 1e-3  # of the rms of the logits, or of the loss: none computes something else


def measure(case, rounds: int, wanted, clock) -> dict:
    """Returns sgemm's rate and, per contender, median, least and most seconds, percent of sgemm, and bytes.

    Raises:
        ContenderError: our PyTorch half, the reference, cannot do this case.
    """
    found: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    flops = _run_once(lambda: lambda: case.flops)
    makers = case.contenders()
    try:
        found["sgemm"] = Contender(_matrix_product)
        found["torch"] = Contender(makers.pop("torch"))
        makers = {name: make for name, make in makers.items() if wanted(name)}
        for name, make in makers.items():
            if name not in case.apart:
                _add(name, make, found, failed)
        results, sgemm = _time(found, failed, flops, rounds, clock)
        for name in [name for name in makers if name in case.apart]:
            for other in found.keys() - {"sgemm", "torch"}:
                found.pop(other).close()
            _add(name, makers[name], found, failed)
            if name in found:
                failed_now: dict[str, str] = {}  # not `torch`, which was timed before
                results[name] = _time(found, failed_now, flops, rounds, clock)[0][name]
                if name in failed_now:
                    failed[name] = failed_now[name]
    finally:
        for contender in found.values():
            contender.close()
    return {
        "model": case.model,
        "size": case.size,
        "batch": case.batch,
        "training": case.training,
        "gflop": flops / 1e9,
        "sgemm_gflops": sgemm / 1e9,
        "contenders": {name: result for name, result in results.items() if name not in failed},
        "failed": failed,
    }


def _run_once(make) -> Any:
    """Returns what a contender's run gives; in a process of its own, as this one must compute nothing."""
    contender = Contender(make)
    contender.close()
    return contender.output


def _add(name: str, make, found: dict[str, Contender], failed: dict[str, str]) -> None:
    """Makes a contender, which is then either among those found or those that failed."""
    import numpy as np

    try:
        contender = Contender(make)
    except ContenderError as error:  # a peer that cannot do this case
        failed[name] = str(error)
        return
    found[name] = contender
    if not name.endswith("operator alone"):
        reference = found["torch"].output
        error = np.abs(contender.output - reference).max() / np.sqrt(np.mean(np.square(reference)))
        if not error < AGREEMENT:
            failed[name] = f"its output is off by {error:.1e}"
            found.pop(name).close()


def _time(found: dict[str, Contender], failed: dict[str, str], flops: int, rounds: int, clock) -> tuple[dict, float]:
    """Times all in alternating rounds; returns a result for each, and sgemm's rate."""

    def seconds(name: str, clock) -> float:
        try:
            return found[name].seconds(clock)
        except ContenderError as error:
            failed[name] = str(error)
            return float("inf")

    times = alternate({name: name for name in found}, rounds, clock, seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    sgemm = 2 * MATRIX**3 / medians["sgemm"]
    results = {
        name: {
            "seconds": medians[name],
            "least": min(times[name]),
            "most": max(times[name]),
            "percent": 100 * flops / medians[name] / sgemm,
            "preparation": contender.preparation,
            "bytes": contender.peak,
        }
        for name, contender in found.items()
        if name != "sgemm"
    }
    return results, sgemm


def _matrix_product():
    import torch

    matrix = torch.randn(MATRIX, MATRIX)
    return lambda: torch.matmul(matrix, matrix)[0, 0].item()


def show(console: Console, name: str, measured: dict) -> None:
    title = f"{name}: {measured['gflop']:.1f} GFLOP; sgemm {measured['sgemm_gflops']:.0f} GFLOP/s"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("contender", "ms", "least", "most", "% of sgemm", "/ torch", "/ keras", "MB", "first call, s"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    results = measured["contenders"]
    for contender, result in sorted(results.items(), key=lambda item: item[1]["seconds"]):
        milliseconds = [f"{1e3 * result[key]:.1f}" for key in ("seconds", "least", "most")]
        ratios = [
            f"{result['seconds'] / results[ours]['seconds']:.2f}" if ours in results else ""
            for ours in ("torch", "keras")
        ]
        percent = "" if contender.endswith("alone") else f"{result['percent']:.0f}"
        megabytes = "" if result["bytes"] is None else f"{result['bytes'] / 1e6:.0f}"
        table.add_row(contender, *milliseconds, percent, *ratios, megabytes, f"{result['preparation']:.0f}")
    console.print(table)
    for contender, reason in measured["failed"].items():
        console.print(f"  without {contender}: {reason[:100]}", style="dim", markup=False)
    console.print()


def run_with(threads: int, arguments: argparse.Namespace) -> dict:
    """Measures all cases in this process, with so many threads."""
    import tensorflow as tf
    import torch

    from benchmarks.model_contenders import ModelCase

    warnings.simplefilter("ignore")  # of peers
    torch.set_num_threads(threads)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    console = Console(width=max(100, Console().width))
    console.print(f"{threads_in_words(threads)}, float32, medians of {arguments.rounds} rounds\n")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    report = {"threads": threads, "results": []}
    settings = [(model, each) for model in arguments.models for part in arguments.parts for each in PARTS[part]]
    for model, options in settings:
        case = ModelCase(model, **options)
        measured = measure(case, arguments.rounds, functools.partial(is_wanted, arguments), clock)
        show(console, case.name, measured)
        report["results"].append(measured)
        if arguments.json:  # the next cases take long
            arguments.json.write_text(json.dumps([report], indent=1))
    return report


def plot(reports: list[dict], path: Path) -> None:
    """Draws the time of each contender over that of our PyTorch half, for images of 224 px."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in reports[0]["results"] if result["size"] == 224]
    parts: dict[tuple, int] = {}  # of the plot -> its rows
    for result in results:
        part = (result["batch"], result["training"])
        parts[part] = parts.get(part, 1) + 1 + len(SHOWN.keys() & result["contenders"])
    size = (5.2 * len(parts), 1 + 0.18 * max(parts.values()))
    figure, axes = plt.subplots(1, len(parts), figsize=size, layout="constrained", squeeze=False)
    for axis, (batch, training) in zip(axes[0], parts, strict=True):
        ticks, row = [], 0
        for result in (found for found in results if (found["batch"], found["training"]) == (batch, training)):
            contenders, row = result["contenders"], row + 1
            for name, color in SHOWN.items():
                if name in contenders:
                    times = contenders[name]["seconds"] / contenders["torch"]["seconds"]
                    axis.barh(row, times, 0.8, color=color)
                    axis.annotate(f"{times:.2f}", (times, row), (3, 0), textcoords="offset points", va="center", size=8)
                    ticks.append((row, f"{name}" if name != "torch" else result["model"] + ", torch"))
                    row += 1
        axis.set_yticks([place for place, _ in ticks], [label for _, label in ticks], size=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{'training step' if training else 'inference'}, batch {batch}", size=10)
        axis.set_xlabel("time, over that of our PyTorch half, eager")
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def is_wanted(arguments: argparse.Namespace, contender: str) -> bool:
    if arguments.only is not None:
        return contender in arguments.only
    return not any(word in contender for word in arguments.without)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of every contender (default 1)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, of which medians are taken (default 7)")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="these, and torch, as the reference")
    parser.add_argument("--without", nargs="+", metavar="WORD", default=[], help="no contender with a word in its name")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the processor: with one thread, on a machine that others use"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the times of 224 px there")
    arguments = parser.parse_args()
    reports = []
    if len(arguments.threads) == 1:
        reports.append(run_with(arguments.threads[0], arguments))
    for threads in arguments.threads if len(arguments.threads) > 1 else ():  # TensorFlow's threads are set once
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            command = [sys.executable, "-m", "benchmarks.models", *sys.argv[1:]]
            command += ["--threads", str(threads), "--json", str(path)]  # the last of an option counts
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
            reports += json.loads(path.read_text())
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1))
    if arguments.plot:
        plot(reports, arguments.plot)


if __name__ == "__main__":
    main()
