"""Measures again what the papers claim of speed and memory, on this machine's CPU, in alternating rounds.

    python -m benchmarks.claims --threads 2 --json claims.json

- `layers`: a neighborhood attention layer (qkv, operator, projection) against a shifted-window one of the same width
  and window (NAT: up to 40 % faster, a quarter less memory); the largest sum of what torch has allocated at a time.
- `mobile`: SwiftFormer-XS against MobileViT-v2 of transformers (SwiftFormer: twice as fast).
- `attention`: ViT-MSN with torch's fused attention against without (transformers' page: 1.17 to 1.33 times).
- `growth`: additive and neighborhood attention against attention to all tokens, as maps grow.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

import ptmodels
from benchmarks.shifted_windows import ShiftedWindowAttention
from benchmarks.timing import alternate, keep_memory, threads_in_words
from modelspec.configs import get_config
from ptmodels.layers import NeighborhoodAttention2D
from ptmodels.swiftformer import SwiftFormerEfficientAdditiveAttention

HEAD_DIM = 32
BATCH = 4


def runner(module: nn.Module, x: torch.Tensor, training: bool) -> Callable[[], object]:
    """Returns what runs a module, or with `training` a layer forward and backward."""

    def infer():
        with torch.no_grad():
            return module(x)

    # inside a model: a gradient comes from the layer after it, and one goes on to the layer before it
    gradient = torch.randn_like(infer()) if training else None
    x.requires_grad_(training)

    def train():
        module.zero_grad()
        x.grad = None
        module(x).backward(gradient)

    module.train(training)
    return train if training else infer


def peak_memory(run: Callable) -> int:
    """Returns the largest sum of bytes that torch held at a time during a call, beyond what it held before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def layers() -> dict[str, dict[str, Callable]]:
    found = {}
    for dim in (64, 128):
        for size in (56, 112):
            for training in (False, True):
                heads = dim // HEAD_DIM
                modules = {
                    "neighborhood": NeighborhoodAttention2D(dim, heads, 7, rel_pos_bias=True),
                    "shifted windows": ShiftedWindowAttention(dim, heads, size, size, 7),
                }
                way = "training" if training else "forward"
                found[f"width {dim}, {size}x{size}, {way}"] = {
                    name: runner(module, torch.randn(BATCH, size, size, dim), training)
                    for name, module in modules.items()
                }
    return found


def mobile() -> dict[str, dict[str, Callable]]:
    import transformers

    config = transformers.MobileViTV2Config(num_labels=1000)
    peers = {
        "SwiftFormer-XS": ptmodels.create_model("swiftformer-xs"),
        "MobileViT-v2 1.0": transformers.MobileViTV2ForImageClassification(config),
    }
    sizes = {"SwiftFormer-XS": 224, "MobileViT-v2 1.0": 256}  # what they were trained for
    found = {}
    for batch in (1, 16):
        for same in (False, True):
            name = f"batch {batch}, {'224 px both' if same else '224 and 256 px'}"
            found[name] = {
                peer: runner(model, torch.randn(batch, 3, *(224 if same else sizes[peer],) * 2), False)
                for peer, model in peers.items()
            }
    return found


def attention() -> dict[str, dict[str, Callable]]:
    found = {}
    for batch in (1, 16):
        runs = {}
        for implementation in ("sdpa", "eager"):
            model = ptmodels.create_model("vit-msn-small", attn_implementation=implementation)
            runs[implementation] = runner(model, torch.randn(batch, 3, 224, 224), False)
        found[f"ViT-MSN-S, batch {batch}"] = runs
    return found


class FullAttention(nn.Module):
    """Attention of every token to all. Input and output: (B, N, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


def growth() -> dict[str, dict[str, Callable]]:
    found = {}
    dim = 64
    for size in (28, 56, 112):
        tokens = torch.randn(1, size * size, dim)
        found[f"{size}x{size} tokens of {dim}"] = {
            "neighborhood": runner(NeighborhoodAttention2D(dim, 2, 7), tokens.view(1, size, size, dim), False),
            "additive": runner(SwiftFormerEfficientAdditiveAttention(get_config("swiftformer-xs"), dim), tokens, False),
            "full": runner(FullAttention(dim), tokens, False),
        }
    return found


CLAIMS = {"layers": layers, "mobile": mobile, "attention": attention, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, of which medians are taken (default 9)")
    parser.add_argument("--cases", type=int, help="how many cases of each claim, from the first")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the processor: with one thread, on a machine that others use"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of peers
    keep_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(width=max(100, Console().width))
    report: list[dict] = []
    for claim in arguments.claims:
        table = Table(title=f"{claim}, {threads_in_words(arguments.threads)}", title_justify="left", box=None)
        for column in ("case", "contender", "ms", "MB", "time /\nfirst", "memory of first /\nits"):
            table.add_column(column, justify="left" if column in ("case", "contender") else "right")
        for case, runs in list(CLAIMS[claim]().items())[: arguments.cases]:
            clock = time.process_time if arguments.cpu_time else time.perf_counter
            memory = {name: peak_memory(run) for name, run in runs.items()}
            times = {name: statistics.median(t) for name, t in alternate(runs, arguments.rounds, clock).items()}
            first = next(iter(runs))
            for name in runs:
                ratios = (f"{times[name] / times[first]:.2f}", f"{memory[first] / memory[name]:.2f}")
                cells = (f"{1e3 * times[name]:.2f}", f"{memory[name] / 1e6:.1f}", *ratios)
                table.add_row(case if name == first else "", name, *cells)
                found = {"seconds": times[name], "bytes": memory[name]}
                report.append({"claim": claim, "case": case, "contender": name, **found})
        console.print(table)
        console.print()
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": arguments.threads, "results": report}, indent=1))


if __name__ == "__main__":
    main()
