"""Names what takes the time of whole models, operation by operation, in both halves.

    python -m benchmarks.profiles --models nat-mini --parts batch1 --threads 2

Of torch by its own profiler, of Keras by that of TensorFlow's runtime, inside the compiled function: self times, added
up over calls and threads that start operations (not over those that help them).
"""

import argparse
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console
from rich.table import Table

from benchmarks.models import MODELS, PARTS
from benchmarks.timing import threads_in_words

CALLS = 10
WARM_UP = 5


def profile_torch(run: Callable[[], object]) -> Counter[str]:
    """Returns seconds by operation, of `CALLS` calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(CALLS):
            run()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[event.key.removeprefix("aten::")] += event.self_cpu_time_total / 1e6
    return times


def profile_keras(run: Callable[[], object]) -> Counter[str]:
    """Returns seconds by operation, of `CALLS` calls."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        options = tf.profiler.experimental.ProfilerOptions(host_tracer_level=2, python_tracer_level=0)
        tf.profiler.experimental.start(folder, options)
        try:
            for _ in range(CALLS):
                run()
        finally:
            tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace()
        space.ParseFromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    times: Counter[str] = Counter()
    for plane in space.planes:
        names = {key: found.name for key, found in plane.event_metadata.items()}
        for line in plane.lines:
            events = [
                (event.offset_ps, -event.duration_ps, _operation(names[event.metadata_id])) for event in line.events
            ]
            _add_self_times(sorted(events, key=lambda event: event[:2]), times)
    return times


def _operation(name: str) -> str | None:
    """Returns the operation of an event named `layer/path:Operation`; None of what is none."""
    path, _, operation = name.rpartition(":")
    is_one = path and not path.endswith(":") and operation.replace("_", "").isalnum()  # else a function of C++
    return operation.removeprefix("_") if is_one else None


def _add_self_times(events: list[tuple[int, int, str | None]], times: Counter[str]) -> None:
    """Adds to `times` what each event of a thread takes without those within it."""
    open_events: list[tuple[int, str | None]] = []  # (end, operation), outermost first
    for begin, negative, operation in events:
        duration = -negative
        while open_events and open_events[-1][0] <= begin:
            open_events.pop()
        if operation is not None:
            times[operation] += duration / 1e12
            inside = next((outer for _, outer in reversed(open_events) if outer is not None), None)
            if inside is not None:
                times[inside] -= duration / 1e12
        open_events.append((begin + duration, operation))


PROFILE = {"torch": profile_torch, "keras": profile_keras}


def show(console: Console, name: str, half: str, times: Counter[str], most: int) -> None:
    total = sum(times.values())
    table = Table(title=f"{name}, {half}: {1e3 * total / CALLS:.1f} ms a call", title_justify="left", box=None)
    for column in ("operation", "ms a call", "% of all"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for operation, seconds in times.most_common(most):
        table.add_row(operation, f"{1e3 * seconds / CALLS:.2f}", f"{100 * seconds / total:.0f}")
    console.print(table)
    console.print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["batch1", "batch16"], help="default: inference")
    parser.add_argument("--halves", nargs="+", choices=PROFILE, default=list(PROFILE), help="default: both")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--most", type=int, default=6, help="operations that are named (default 6)")
    arguments = parser.parse_args()

    import tensorflow as tf
    import torch

    from benchmarks.model_contenders import ModelCase

    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    console = Console(width=max(100, Console().width))
    console.print(f"{threads_in_words(arguments.threads)}, float32, {CALLS} calls\n")
    for model in arguments.models:
        for options in (each for part in arguments.parts for each in PARTS[part]):
            case = ModelCase(model, **options)
            for half in arguments.halves:
                run = case.run_torch() if half == "torch" else case.run_keras()
                for _ in range(WARM_UP):
                    run()
                show(console, case.name, half, PROFILE[half](run), arguments.most)


if __name__ == "__main__":
    main()
