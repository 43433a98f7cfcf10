"""Times neighborhood attention of both halves against what a user of torch has without it, and against sgemm.

    python -m benchmarks.neighborhood_attention --threads 1

Contenders: `native` and `composed` of either half; torch's dense attention with a mask of window and bias (`sdpa`; the
mask is made beforehand, but in training, where the bias changes), and torch with keys gathered per window (`gather`).
All compute the same, float32, with a bias. In every round each contender runs for a moment and so does a matrix
product; medians over rounds, so that a machine whose clock swings treats all alike. GFLOP/s count useful work: two
products of each query with the keys of its window, and 3.5 times that with the backward. Percentages are of the matrix
product's rate in the same rounds, with as many threads.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import torch
from rich.console import Console
from rich.table import Table

from neighborhood import native
from neighborhood.tiles import known_tiles
from neighborhood.windows import bias_positions, key_positions
from ptmodels.ops import neighborhood_attention as torch_attention
from tfmodels.ops import neighborhood_attention as keras_attention

# heads, height, width, kernel size, dilation, head_dim; batch 1
CASES = [
    (2, 56, 56, 7, 1, 32),
    (4, 28, 28, 7, 1, 32),
    (8, 14, 14, 7, 1, 32),
    (16, 7, 7, 7, 1, 32),
    (2, 56, 56, 7, 8, 32),
    (4, 28, 28, 7, 4, 32),
    (8, 14, 14, 7, 2, 32),
    (2, 224, 224, 7, 1, 32),
]
DENSE_LIMIT = 4096  # tokens: a mask of more does not fit


class Case:
    """The inputs of one case, and its contenders."""

    def __init__(self, heads: int, height: int, width: int, kernel_size: int, dilation: int, head_dim: int):
        self.kernel_size, self.dilation = kernel_size, dilation
        self.name = f"{heads}x{height}x{width} k{kernel_size} d{dilation} head_dim {head_dim}"
        self.tokens = height * width
        self.flops = 4 * heads * self.tokens * kernel_size**2 * head_dim
        generator = np.random.default_rng(0)
        self.arrays = generator.standard_normal((4, 1, height, width, heads, head_dim)).astype(np.float32)
        self.table = generator.standard_normal((heads, *(2 * kernel_size - 1,) * 2)).astype(np.float32)
        axes = [(length, kernel_size, dilation) for length in (height, width)]
        rows, columns = (key_positions(*axis) for axis in axes)
        row_entries, column_entries = (bias_positions(*axis) for axis in axes)
        flat = rows[:, None, :, None] * width + columns[None, :, None, :]
        self.keys = torch.tensor(flat.reshape(self.tokens, -1))
        flat = row_entries[:, None, :, None] * (2 * kernel_size - 1) + column_entries[None, :, None, :]
        self.entries = torch.tensor(flat.reshape(self.tokens, -1))
        known_tiles((height, width), (kernel_size,) * 2, (dilation,) * 2)

    def contenders(self, backward: bool) -> dict[str, Callable]:
        found = {}
        for implementation in ("native", "composed"):
            found[f"torch {implementation}"] = self._torch(self._ours(implementation), backward)
            found[f"keras {implementation}"] = self._keras(implementation, backward)
        if self.tokens <= DENSE_LIMIT:
            found["sdpa"] = self._torch(self._sdpa if backward else self._sdpa_of_known_mask(), backward)
        found["gather"] = self._torch(self._gather, backward)
        return found

    def _ours(self, implementation: str) -> Callable:
        def attention(query, key, value, table):
            sizes = (self.kernel_size, self.dilation)
            return torch_attention(query, key, value, *sizes, rel_pos_bias=table, implementation=implementation)

        return attention

    def _mask(self, table):
        heads = table.shape[0]
        mask = table.new_full((heads, self.tokens, self.tokens), -torch.inf)
        return mask.scatter(2, self.keys.expand(heads, -1, -1), table.flatten(1)[:, self.entries])

    def _sdpa_of_known_mask(self) -> Callable:
        mask = self._mask(torch.tensor(self.table))  # in training the bias changes from step to step
        return lambda query, key, value, table: self._sdpa(query, key, value, table, mask)

    def _sdpa(self, query, key, value, table, mask=None):
        mask = self._mask(table) if mask is None else mask
        flat = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]  # (B, heads, tokens, head_dim)
        output = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=mask[None])
        return output.transpose(1, 2).reshape(query.shape)

    def _gather(self, query, key, value, table):
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        logits = torch.einsum("bhnd,bhnkd->bhnk", query * query.shape[-1] ** -0.5, key[:, :, self.keys])
        weights = (logits + table.flatten(1)[:, self.entries]).softmax(-1)
        output = torch.einsum("bhnk,bhnkd->bhnd", weights, value[:, :, self.keys])
        return output.transpose(1, 2).reshape(self.arrays[0].shape)

    def _torch(self, attention: Callable, backward: bool) -> Callable:
        inputs = [torch.tensor(x, requires_grad=backward) for x in (*self.arrays[:3], self.table)]
        grad = torch.tensor(self.arrays[3])

        def run():
            if not backward:
                with torch.no_grad():
                    return attention(*inputs).numpy()
            output = attention(*inputs)
            torch.autograd.grad(output, inputs, grad)
            return output.detach().numpy()

        return run

    def _keras(self, implementation: str, backward: bool) -> Callable:
        inputs = [tf.constant(x) for x in (*self.arrays[:3], self.table)]
        grad = tf.constant(self.arrays[3])

        @tf.function
        def attention(query, key, value, table):
            with tf.GradientTape() as tape:
                tape.watch((query, key, value, table))
                sizes = (self.kernel_size, self.dilation)
                output = keras_attention(query, key, value, *sizes, rel_pos_bias=table, implementation=implementation)
            if not backward:
                return output
            return output, tape.gradient(output, (query, key, value, table), output_gradients=grad)

        return lambda: (attention(*inputs)[0] if backward else attention(*inputs)).numpy()


def measure(case: Case, backward: bool, rounds: int) -> dict[str, dict]:
    """Returns, per contender, the median time in seconds, GFLOP/s and percent of sgemm."""
    contenders = case.contenders(backward)
    outputs = {name: run() for name, run in contenders.items()}  # the first call compiles
    for name, output in outputs.items():
        error = np.abs(output - outputs["gather"]).max()
        assert error < 1e-4, f"{name} is off by {error:.1e}"
    matrix = torch.randn(1536, 1536)
    times = {name: [] for name in ("sgemm", *contenders)}
    for _ in range(rounds):
        for name, run in {"sgemm": lambda: matrix @ matrix, **contenders}.items():
            times[name].append(seconds_of(run))
    sgemm = 2 * 1536**3 / statistics.median(times.pop("sgemm"))
    flops = case.flops * (3.5 if backward else 1)
    results = {}
    for name, values in times.items():
        seconds = statistics.median(values)
        results[name] = {"seconds": seconds, "gflops": flops / seconds / 1e9, "percent": 100 * flops / seconds / sgemm}
    return {"sgemm_gflops": sgemm / 1e9, "contenders": results}


def seconds_of(run: Callable) -> float:
    """The mean over as many calls as fit into a few hundredths of a second, after one that fills the caches."""
    begin = time.perf_counter()
    run()
    calls = max(1, int(0.03 / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def show(console: Console, name: str, measured: dict) -> None:
    table = Table(title=f"{name}; sgemm {measured['sgemm_gflops']:.0f} GFLOP/s", title_justify="left", box=None)
    for column in ("contender", "ms", "GFLOP/s", "% of sgemm", "times as long as torch native"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    results = measured["contenders"]
    for contender, result in results.items():
        ratio = result["seconds"] / results["torch native"]["seconds"]
        ms = f"{1e3 * result['seconds']:.2f}"
        table.add_row(contender, ms, f"{result['gflops']:.1f}", f"{result['percent']:.0f}", f"{ratio:.1f}")
    console.print(table)
    console.print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of every contender (default 1)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, of which medians are taken (default 9)")
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases, from the first")
    parser.add_argument("--forward-only", action="store_true", help="no forward with backward")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    console = Console()
    console.print(f"{arguments.threads} thread(s), {native.instruction_set()}, float32, batch 1, medians\n")
    report = {"threads": arguments.threads, "instruction_set": native.instruction_set(), "results": []}
    for sizes in CASES[: arguments.cases]:
        case = Case(*sizes)
        for backward in (False,) if arguments.forward_only else (False, True):
            name = f"{case.name}, {'forward and backward' if backward else 'forward'}"
            measured = measure(case, backward, arguments.rounds if case.tokens <= DENSE_LIMIT else 3)
            show(console, name, measured)
            report["results"].append({"case": name, **measured})
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
