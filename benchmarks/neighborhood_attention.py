"""Times neighborhood attention of both halves against what a user of torch has without it, and against sgemm.

    python -m benchmarks.neighborhood_attention --threads 1 2 --json figures.json --plot figures.png

Contenders: the C++ kernels alone, called on NumPy arrays that are there (`kernels`); `native` (the kernels, as a
framework calls them) and `composed` of either half; torch's dense attention with a mask of window and bias (`sdpa`; the
mask is made beforehand, but in training, where the bias changes), torch with keys gathered per window (`gather`),
torch's flex_attention, eager and compiled, and NATTEN where it is installed. In every round each contender runs for a
moment, and so do a matrix product and a copy: medians over rounds treat all alike, on machines too whose clock swings.
GFLOP/s count useful work: two products of each query with the keys of its window, and 3.5 times that with the backward.
Percentages are of the matrix product's rate in the same rounds, with as many threads. A case is named by its heads x
height x width x head_dim, its kernel size and its dilation.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console
from rich.table import Table

from benchmarks.timing import MATRIX, alternate, keep_memory, threads_in_words

# heads, height, width, kernel size, dilation, head_dim
CASES = [
    (2, 56, 56, 7, 1, 32),
    (4, 28, 28, 7, 1, 32),
    (8, 14, 14, 7, 1, 32),
    (16, 7, 7, 7, 1, 32),
    (2, 56, 56, 7, 8, 32),
    (4, 28, 28, 7, 4, 32),
    (8, 14, 14, 7, 2, 32),
    (2, 56, 56, 3, 1, 32),
    (2, 56, 56, 5, 1, 32),
    (2, 56, 56, 9, 1, 32),
    (2, 56, 56, 11, 1, 32),
    (2, 56, 56, 13, 1, 32),
    (4, 56, 56, 7, 1, 16),
    (2, 56, 56, 7, 1, 24),
    (2, 56, 56, 7, 1, 64),
    (2, 112, 112, 7, 1, 32),
    (2, 224, 224, 7, 1, 32),
    (2, 224, 224, 7, 16, 32),
    (2, 448, 448, 7, 1, 32),
]
ROUNDS_OF_LARGE_CASES = 3
COPIED = 1 << 24  # float32 numbers


def measure(case, backward: bool, rounds: int) -> dict:
    """Returns the rates of sgemm and of copying and, per contender, seconds, GFLOP/s and percent of sgemm."""
    import numpy as np
    import torch

    contenders, failed = {}, {}
    reference = case.reference() if case.tokens <= 4096 else None
    for name, run in case.contenders(backward).items():
        try:
            output = run()  # the first call compiles
        except Exception as error:  # a peer that cannot do this case
            failed[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        if reference is not None:
            error = np.abs(output - reference(case.has_bias(name))).max()
            if not error < 1e-4:
                assert not is_ours(name), f"{name} is off by {error:.1e}"
                failed[name] = f"its output is off by {error:.1e}"
                continue
        contenders[name] = run
    matrix, numbers = torch.randn(MATRIX, MATRIX), torch.randn(COPIED)
    copy = torch.empty_like(numbers)
    gauges = {"sgemm": lambda: matrix @ matrix, "copy": lambda: copy.copy_(numbers)}
    times = alternate({**gauges, **contenders}, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    sgemm = 2 * MATRIX**3 / medians["sgemm"]
    flops = case.flops * (3.5 if backward else 1)
    results = {
        name: {
            "seconds": medians[name],
            "gflops": flops / medians[name] / 1e9,
            "percent": 100 * flops / medians[name] / sgemm,
        }
        for name in contenders
    }
    copied = 8 * COPIED / medians["copy"] / 1e9
    return {"sgemm_gflops": sgemm / 1e9, "copy_gbytes": copied, "contenders": results, "failed": failed}


def is_ours(contender: str) -> bool:
    return contender.split()[0] in ("kernels", "torch", "keras")


def peers_of(results: dict) -> dict:
    """What is not ours."""
    return {name: result for name, result in results.items() if not is_ours(name)}


def show(console: Console, name: str, measured: dict) -> None:
    title = f"{name}; sgemm {measured['sgemm_gflops']:.0f} GFLOP/s, copy {measured['copy_gbytes']:.0f} GB/s"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("contender", "ms", "GFLOP/s", "% of sgemm", "times as long as torch native"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    results = measured["contenders"]
    for contender, result in sorted(results.items(), key=lambda item: item[1]["seconds"]):
        ratio = result["seconds"] / results["torch native"]["seconds"]
        ms = f"{1e3 * result['seconds']:.2f}"
        table.add_row(contender, ms, f"{result['gflops']:.1f}", f"{result['percent']:.0f}", f"{ratio:.1f}")
    console.print(table)
    for contender, reason in measured["failed"].items():
        console.print(f"  without {contender}: {reason[:100]}", style="dim", markup=False)
    console.print()


def run_with(threads: int, arguments: argparse.Namespace) -> dict:
    """Measures all cases in this process, with so many threads."""
    import tensorflow as tf
    import torch

    from benchmarks.contenders import DENSE_TOKENS, Case
    from neighborhood import native

    warnings.simplefilter("ignore")  # of peers
    keep_memory()
    torch.set_num_threads(threads)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    console = Console()
    console.print(f"{threads_in_words(threads)}, {native.instruction_set()}, float32, batch 1, medians\n")
    report = {"threads": threads, "instruction_set": native.instruction_set(), "results": []}
    for sizes in CASES[: arguments.cases]:
        case = Case(*sizes)
        for backward in (False,) if arguments.forward_only else (False, True):
            name = f"{case.name}, {'forward and backward' if backward else 'forward'}"
            rounds = arguments.rounds if case.tokens <= DENSE_TOKENS else min(arguments.rounds, ROUNDS_OF_LARGE_CASES)
            measured = measure(case, backward, rounds)
            show(console, name, measured)
            report["results"].append({"case": case.name, "backward": backward, **measured})
    return report


def show_summary(console: Console, reports: list[dict]) -> None:
    """The kernels' share of sgemm, their ratios to peers, their growth with maps; and what further threads gain.

    "both" is forward and backward. Ratios to peers are of torch's half, or of the faster composed one.
    """
    for report in reports:
        table = Table(title=threads_in_words(report["threads"]), title_justify="left", box=None)
        table.add_column("case")
        table.add_column("")
        for column in ("% of\nsgemm", "called by\ntorch"):
            table.add_column(column, justify="right")
        table.add_column("fastest\npeer")
        for column in ("peer /\ntorch", "peer /\ncomposed"):
            table.add_column(column, justify="right")
        for result in report["results"]:
            ours, peers = result["contenders"], peers_of(result["contenders"])
            composed = min(ours["torch composed"]["seconds"], ours["keras composed"]["seconds"])
            best = min(peers, key=lambda peer: peers[peer]["seconds"], default=None)
            cells = ("", "", "")
            if best is not None:
                seconds = peers[best]["seconds"]
                cells = (best, f"{seconds / ours['torch native']['seconds']:.1f}", f"{seconds / composed:.1f}")
            percents = [f"{ours[name]['percent']:.0f}" for name in ("kernels", "torch native")]
            case = ("", "both") if result["backward"] else (result["case"], "forward")
            table.add_row(*case, *percents, *cells)
        console.print(table)
        console.print()
        show_growth(console, report)
    for report in reports[1:]:
        gains = []
        for one, more in zip(reports[0]["results"], report["results"], strict=True):
            gain = one["contenders"]["kernels"]["seconds"] / more["contenders"]["kernels"]["seconds"]
            gains.append(gain / (more["sgemm_gflops"] / one["sgemm_gflops"]))
        text = f"{report['threads']} threads instead of {reports[0]['threads']}: the kernels gain"
        console.print(
            f"{text} {min(gains):.2f} to {max(gains):.2f} of what sgemm gains, {statistics.median(gains):.2f} "
            "in the median."
        )


def show_growth(console: Console, report: dict) -> None:
    """How the time per token of the largest map compares with that of the first case."""
    for backward in (False, True):
        results = {r["case"]: r["contenders"] for r in report["results"] if r["backward"] == backward}
        small, large = (results.get(f"2x{size}x{size}x32 k7 d1") for size in (56, 448))
        if small is None or large is None:
            continue
        tokens = 448**2 / 56**2
        growths = []
        for name in ("kernels", "torch native", "keras native"):
            growth = large[name]["seconds"] / small[name]["seconds"] / tokens
            growths.append(f"{name} {growth:.2f}")
        way = "forward and backward" if backward else "forward"
        console.print(f"Time per token at 448x448 over that at 56x56, {way}: {', '.join(growths)}")
    console.print()


def plot(report: dict, path: Path) -> None:
    """Draws the times of the cases that all contenders can do."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ["torch native", "torch composed", "gather", "sdpa", "flex compiled", "natten"]
    labels = ["native", "composed", "keys gathered", "dense, masked", "flex, compiled", "NATTEN 0.21"]
    colors = ["#0b6e4f", "#6bbf8a", "#b8b8b8", "#8f8f8f", "#6b6b6b", "#474747"]
    results = [r for r in report["results"] if not r["backward"] and "sdpa" in r["contenders"]][:7]
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for i, (name, label, color) in enumerate(zip(shown, labels, colors, strict=True)):
        places = [(row, r["contenders"][name]["seconds"]) for row, r in enumerate(results) if name in r["contenders"]]
        if places:
            rows, seconds = zip(*places, strict=True)
            axes.bar(
                [row + (i - 2.5) * 0.14 for row in rows], [1e3 * s for s in seconds], 0.13, label=label, color=color
            )
    axes.set_yscale("log")
    axes.set_xticks(range(len(results)), [r["case"].replace("x32", "").replace(" k7", "") for r in results])
    axes.set_ylabel("milliseconds, forward")
    axes.set_title(
        "Neighborhood attention, window 7x7, heads x height x width, dilation; " + threads_in_words(report["threads"])
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of every contender (default 1)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, of which medians are taken (default 9)")
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases, from the first")
    parser.add_argument("--forward-only", action="store_true", help="no forward with backward")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the times of forwards there")
    arguments = parser.parse_args()
    reports = []
    if len(arguments.threads) == 1:
        reports.append(run_with(arguments.threads[0], arguments))
    for threads in arguments.threads if len(arguments.threads) > 1 else ():  # TensorFlow's threads are set once
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            command = [sys.executable, "-m", "benchmarks.neighborhood_attention", "--threads", str(threads)]
            command += ["--rounds", str(arguments.rounds), "--cases", str(arguments.cases), "--json", str(path)]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            subprocess.run(command + ["--forward-only"] * arguments.forward_only, check=True, env=environment)
            reports += json.loads(path.read_text())
    show_summary(Console(width=max(90, Console().width)), reports)
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1))
    if arguments.plot:
        plot(reports[0], arguments.plot)


if __name__ == "__main__":
    main()
