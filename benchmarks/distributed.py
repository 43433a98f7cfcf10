"""Times a training step of several devices against one device with as many images, for each engine.

    python -m benchmarks.distributed --engines ddp fsdp --models swiftformer-xs dinat-mini --json figures.json

Two processes (or two replicas) share a batch; one process alone has half of it, so that each device has as much to
compute in both. What the former take longer is lost to communication and to waiting, and on one machine to caches and
memory that are shared: how much that is, two processes show that know nothing of each other (`apart`). Each has one
thread. The lower quartile over the steps of all rounds counts, since other programs make steps longer and never
shorter; not so the first steps of each round, in which buffers and graphs are made. The engines of torch are measured
by the same processes in turns, those of TensorFlow, which wants to know its devices beforehand, one after the other.
The whole loop of `fine_tune` is timed: reading (from memory), forward, backward, clipping, AdamW.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PROCESSES = 2
WARMUP = 3  # steps that are not counted
ALONE = ("alone", "apart")  # of one process, and of two that know nothing of each other


class Start(NamedTuple):
    """How a process is started: arguments to Python, and what its environment has besides."""

    arguments: list[str]
    environment: dict[str, str]


def in_one_process(work: list[str]) -> list[Start]:
    return [Start(["-m", "benchmarks.distributed", *work], {})]


def by_torchrun(work: list[str]) -> list[Start]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    return [Start([*launcher, "-m", "benchmarks.distributed", *work], {})]


def with_replicas(work: list[str]) -> list[Start]:
    # the replicas of one process share its threads
    threads = {"TF_NUM_INTRAOP_THREADS": str(PROCESSES), "TF_NUM_INTEROP_THREADS": str(PROCESSES)}
    return [Start(["-m", "benchmarks.distributed", *work, "--replicas", str(PROCESSES)], threads)]


def by_tf_config(work: list[str]) -> list[Start]:
    workers = [f"localhost:{port}" for port in free_ports(PROCESSES)]
    return [
        Start(
            ["-m", "benchmarks.distributed", *work],
            {"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})},
        )
        for index in range(PROCESSES)
    ]


def apart(work: list[str]) -> list[Start]:
    return in_one_process(work) * PROCESSES


class Engine(NamedTuple):
    """An engine: the half that it belongs to, and how its processes are started."""

    framework: str
    start: Callable[[list[str]], list[Start]]


ENGINES = {
    "ddp": Engine("torch", by_torchrun),
    "fsdp": Engine("torch", by_torchrun),
    "mirrored": Engine("tf", with_replicas),
    "multiworker": Engine("tf", by_tf_config),
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def step_times(starts: list[Start]) -> dict[str, list[float]]:
    """Returns the seconds of each step, per contender, as the first process measures them."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        environment[name] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, *start.arguments],
            env={**environment, **start.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for start in starts
    ]
    outcomes = [(*process.communicate(), process.returncode) for process in processes]
    for _, errors, status in outcomes:
        if status:
            raise RuntimeError(errors)
    return json.loads(outcomes[0][0].strip().splitlines()[-1])


def measure(framework: str, engines: list[str], model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the seconds of a step of each engine of a framework, and of one process with its share."""
    work = ["--work", framework, "--models", model]
    for option in ("batch_size", "image_size", "steps", "rounds"):
        work += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    work.append("--engines")
    if framework == "torch":
        times = step_times(by_torchrun([*work, *ALONE, *engines]))
    else:
        starts = {"alone": in_one_process, "apart": apart} | {name: ENGINES[name].start for name in engines}
        times = {name: step_times(start([*work, name]))[name] for name, start in starts.items()}
    seconds = {name: statistics.quantiles(found, n=4)[0] for name, found in times.items()}
    return [
        {"engine": name, "model": model, "seconds": seconds[name], "ratio": seconds[name] / seconds["alone"]}
        for name in seconds
    ]


def work(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Trains in this process by each contender in turn; returns the seconds of each step that counts."""
    import importlib

    package = {"torch": "ptmodels", "tf": "tfmodels"}[arguments.work]
    distributed = importlib.import_module(f"{package}.distributed")
    times: dict[str, list[float]] = {name: [] for name in arguments.engines}
    if arguments.work == "tf":
        (name,) = arguments.engines
        options = {} if arguments.replicas is None else {"replicas": arguments.replicas}
        with distributed.joined(None if name in ALONE else name, **options):
            for _ in range(arguments.rounds):
                times[name] += train(package, name, arguments)
        return times
    with distributed.joined("ddp"):
        first = distributed.is_first()
        for _ in range(arguments.rounds):
            for name in arguments.engines:
                distributed.wait_for_all()
                if name != "alone" or first:
                    with distributed.joined(None if name in ALONE else name):
                        times[name] += train(package, name, arguments)
    return times if first else {}


def train(package: str, name: str, arguments: argparse.Namespace) -> list[float]:
    """Returns the seconds of each step that counts."""
    import importlib

    import numpy as np

    from modelspec.training import ArrayImages, Recipe, TrainingBatches

    auto, training = (importlib.import_module(f"{package}.{module}") for module in ("auto", "training"))
    batch_size = arguments.batch_size // (PROCESSES if name in ALONE else 1)
    count = batch_size * (arguments.steps + WARMUP + 1)
    draws = np.random.default_rng(0)
    images = draws.standard_normal((count, 3, arguments.image_size, arguments.image_size), np.float32)
    data = ArrayImages(images, draws.integers(0, 10, count))
    recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=batch_size, clip_norm=1.0)
    moments: list[float] = []
    model = auto.create_model(arguments.models[0], num_labels=10)
    training.fine_tune(
        model, TrainingBatches(data, recipe, 10), on_step=lambda *step: moments.append(time.perf_counter())
    )
    return [after - before for before, after in zip(moments[WARMUP:], moments[WARMUP + 1 :], strict=False)]


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("engine", "model", "step, ms", "to one alone", box=None)
    for row in rows:
        table.add_row(row["engine"], row["model"], f"{1e3 * row['seconds']:.0f}", f"{row['ratio']:.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="*", choices=[*ALONE, *ENGINES], default=list(ENGINES))
    parser.add_argument("--models", nargs="+", default=["swiftformer-xs", "dinat-mini"])
    parser.add_argument("--batch-size", type=int, default=16, help="of all together (default: 16)")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="that count, of each round (default: 8)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.add_argument("--work", choices=("torch", "tf"), help=argparse.SUPPRESS)  # of the processes that are timed
    parser.add_argument("--replicas", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        times = work(arguments)
        if times:
            print(json.dumps(times))
        return
    if arguments.batch_size % PROCESSES:
        parser.error(f"--batch-size is {arguments.batch_size}; it must be a multiple of {PROCESSES}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, images of {arguments.image_size}, batch {arguments.batch_size}"
    )
    rows = []
    for framework in ("torch", "tf"):
        engines = [name for name in ENGINES if name in arguments.engines and ENGINES[name].framework == framework]
        for model in arguments.models if engines else ():
            rows += measure(framework, engines, model, arguments)
    show(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
