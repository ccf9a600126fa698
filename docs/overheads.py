# SPDX-License-Identifier: MIT
"""What RANet costs beside the other contexts of Table 1, with 512 channels.

    python docs/overheads.py             # the table, at 97 x 97 with 19 classes; on a GPU: --device cuda
    python docs/overheads.py --calls     # what RCB and RIB ask of a GPU, counted without one

Every block takes A [1, M, H, W] to O [1, M, H, W] where RCB and RIB stand. In no row are the 3x3 convolutions around it
and the 1x1 ones that make B and C.

A ratio of times is taken within a round, in which every block has its turn. The machine must be idle: RCB makes
thousands of small calls.
"""
import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")                # the profiler is silent about what it cannot find
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent.parent)]
import models
import ranet


class PlainNonLocal(nn.Module):
    """softmax(A A^T) A: attention between all pixels and nothing else, the unit of every ratio."""

    def forward(self, A: Tensor) -> Tensor:
        X = A.flatten(2).mT                                     # [b, HW, M]
        weights = (X @ X.mT).softmax(2)                         # [b, HW, HW]  softmax over all pixels j
        return (weights @ X).mT.reshape(A.shape)                # [b, M, H, W]


class First(nn.Module):
    """O alone of a context's results; one that makes no regions is given no maps."""

    def __init__(self, context: nn.Module):
        super().__init__()
        self.context = context

    def forward(self, A: Tensor, B: Tensor | None = None, C: Tensor | None = None) -> Tensor:
        return self.context(A, B, C)[0]                         # [b, M, H, W]


# name: (what its row is called, the module for M channels)
BLOCKS = {
    "plain": ("softmax(A A^T) A", lambda M: PlainNonLocal()),
    "pyramid": ("pyramid pooling", lambda M: First(models.PyramidPooling(M))),
    "nonlocal": ("non-local", lambda M: First(models.NonLocal(M))),
}
SCENES = {"objects": "5 x 5 objects", "one": "one region", "pixels": "every pixel a region"}
BLOCKS |= {key: (f"RANet, {words}", lambda M: First(ranet.RegionContext())) for key, words in SCENES.items()}


def scene(kind: str, n: int, N: int) -> tuple[Tensor, Tensor]:
    """B [1, n, n] and C [1, N, n, n] as a trained network might give them: classes certain, boundaries 0.9."""
    at = torch.arange(n)
    row = k = at * 5 // n if kind == "objects" else torch.zeros_like(at)        # [n]  of equal class
    B = torch.full((n, n), 0.9 if kind == "pixels" else 0.05)   # [n, n]
    if kind == "objects":
        edge = (k[1:] != k[:-1]).nonzero()[:, 0]
        B[edge] = B[edge + 1] = B[:, edge] = B[:, edge + 1] = 0.9       # both sides of each border
    classes = torch.randint(N, (int(row[-1]) + 1, int(k[-1]) + 1))[row][:, k]   # [n, n]
    C = (8.0 * one_hot(classes, N) + 0.3 * torch.randn(n, n, N)).softmax(2)     # [n, n, N]  softmax over the classes
    return (B + 0.01 * torch.randn(n, n)).clamp(0, 1)[None], C.permute(2, 0, 1)[None]


def make(name: str, n: int, M: int, N: int, device: str) -> tuple[nn.Module, list[Tensor], Tensor]:
    """A block, its inputs (with gradients) and a gradient of its output."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, M, n, n) * M ** -0.25]             # products of two pixels have variance 1
    if name in SCENES:
        inputs += scene(name, n, N)
    dO = torch.randn(1, M, n, n)                                # [1, M, n, n]
    return BLOCKS[name][1](M).to(device), [x.to(device).requires_grad_() for x in inputs], dO.to(device)


def step(name: str, n: int, M: int, N: int, device: str) -> Callable[[], None]:
    """A forward and backward pass, ready to be called and measured."""
    block, inputs, dO = make(name, n, M, N, device)

    def call() -> None:
        block(*inputs).backward(dO)
        if device == "cuda":
            torch.cuda.synchronize()
    return call


def times(names: Iterable[str], n: int, M: int, N: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each block, a list over the rounds."""
    for name in names:                                          # the first call of everything is slow
        step(name, n if device == "cuda" else 9, M, N, device)()
    seconds = {name: [] for name in names}
    for _, name in itertools.product(range(rounds), names):
        call, start = step(name, n, M, N, device), time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - start)
    return seconds


def peak(call: Callable[[], None], device: str) -> float:
    """The most MiB that a call holds at once, beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 2 ** 20


@torch.no_grad()
def count(name: str, n: int, M: int, N: int, device: str) -> tuple[int, int, str]:
    """Parameters, operations of a forward pass, and the numbers of regions and representatives."""
    block, inputs, _ = make(name, n, M, N, device)
    with FlopCounterMode(display=False) as counter:
        block(*inputs)
    regions = ""
    if name in SCENES:
        size = block.context.rcb(*inputs[1:]).labels.flatten().bincount()       # [Q]
        regions = f"{len(size):,}, {int(size.clamp_max(8).sum()):,}"
    return sum(p.numel() for p in block.parameters()), counter.get_total_flops(), regions


def table(head: str, rows: list[list]) -> str:
    lines = [head.split(" | "), ["---"] + ["---:"] * head.count("|"), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def compare(n: int, M: int, N: int, rounds: int, device: str) -> None:
    seconds, rows = times(BLOCKS, n, M, N, rounds, device), []
    for name, own in seconds.items():
        parameters, flops, regions = count(name, n, M, N, device)
        ratio = statistics.median(a / b for a, b in zip(own, seconds["plain"]))
        memory = peak(step(name, n, M, N, device), device)
        numbers = f"{parameters:,}", f"{flops / 1e9:.1f}", f"{ratio:.2f}", f"{memory:,.0f}", regions
        rows.append([BLOCKS[name][0], *numbers])
    print(table("block | parameters | GFLOP | time | MiB | regions, P", rows))
    print(f"""
A is [{M} x {n} x {n}], with {N} classes. GFLOP: a forward pass, products of matrices and convolutions, a multiply-add
being 2; eqs. 1-5 have none, joining lone pixels has. Time, forward and backward: the median of the rounds ({rounds}),
1 being {statistics.median(seconds["plain"]):.3g} s. MiB: the most that both hold at once beyond module and inputs.
In no row: RANet's two 1x1 heads for B and C
({2 * M * (N + 1) * n * n / 1e9:.2f} GFLOP, {(M + 1) * (N + 1):,} parameters).""")


class Calls(TorchDispatchMode):
    """Counts what would start a kernel on a GPU, and what would make the host wait for one."""
    launches = waits = 0

    def __torch_dispatch__(self, f, types, args=(), options=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(f.tags)
        if f is torch.ops.aten.index.Tensor:                    # only by a mask
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        self.waits += bool(waits)
        self.launches += not (f.is_view or "empty" in f.name() or f is torch.ops.aten._unsafe_view.default)
        return f(*args, **(options or {}))


def calls(n: int, M: int, N: int) -> None:
    rows, way = [], ranet._way(torch.empty(0, device="meta"))   # as on a GPU; checks make no calls there
    quiet = {name: lambda *args, **options: None for name in vars(ranet) if name.startswith("_check")}
    with mock.patch.multiple(ranet, _way=lambda x: way, **quiet):
        for kind in ("objects", "one"):
            block, (A, B, C), dO = make(kind, n, M, N, "cpu")
            with Calls() as rcb:
                regions = block.context.rcb(B, C)
            with Calls() as rib:
                O = block.context.rib(A, regions)
            with Calls() as backward:
                O.backward(dO)
            launches, waits = zip(*((part.launches, part.waits) for part in (rcb, rib, backward)))
            rows.append([f"{SCENES[kind]}, {N} classes", *launches, sum(launches), sum(waits)])
    print(f"Calls that would start a kernel on a GPU, one image of {n} x {n}, and waits of the host:\n")
    print(table("scene | RCB | RIB | backward | all | waits", rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=97, help="pixels a side")
    parser.add_argument("--classes", type=int, default=19, help="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--calls", action="store_true", help="count them, as on a GPU")
    args = parser.parse_args()
    chip = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {chip}\n")
    if args.calls:
        calls(args.size, 512, args.classes)
    else:
        compare(args.size, 512, args.classes, args.rounds, args.device)


if __name__ == "__main__":
    main()
