# SPDX-License-Identifier: MIT
r"""What RANet costs beside the blocks that the paper compares it with (Tables 1 and 3).

    python docs/overheads.py                         # the table, at 97 x 97 with 512 channels and 19 classes
    python docs/overheads.py --device cuda           # the same on a GPU
    python docs/overheads.py --calls                 # what RCB and RIB ask of a GPU, counted without one

Every block takes A [1, M, H, W] to O [1, M, H, W] and stands where RCB and RIB stand in the network: the 3x3
convolution that makes A, the concatenation [A, O] and what follows are in no row. RANet's rows start at B and C
(their 1x1 convolutions are not included). The peers are written from their papers, without batch
normalisation: the batch is one image and the 1x1 maps of pyramid pooling have nothing to normalise by.

Time is compared in rounds: all blocks once, then all once more; a ratio is taken within a round. Memory is the
peak beyond module and inputs; on the CPU the resident set of a fresh process for each number (Linux only).
Measure on an idle machine: RCB makes thousands of small calls, and each waits for the slowest thread.
"""
import argparse
import datetime
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent.parent)]
import ranet
import train

LINUX = Path("/proc/self/clear_refs").exists()


# ---------------------------------------------------------------------------------------------------------
# The blocks
# ---------------------------------------------------------------------------------------------------------


class PlainNonLocal(nn.Module):
    """softmax(A A^T) A: attention between all pixels and nothing else, the unit of every ratio."""

    def forward(self, A: Tensor) -> Tensor:
        X = A.flatten(2).mT                                     # [b, HW, M]
        weights = (X @ X.mT).softmax(2)                         # [b, HW, HW]  softmax over all pixels j
        return (weights @ X).mT.reshape(A.shape)                # [b, M, H, W]


class AsymmetricNonLocal(nn.Module):
    """Zhu et al., Asymmetric Non-local Neural Networks for Semantic Segmentation, ICCV 2019: the pyramid block
    APNB. One embedding of M / 2 channels serves query and key; keys and values are pooled to
    1 + 9 + 36 + 64 = 110 positions. The fusion block AFNB is the same with keys and values from an earlier
    stage of the backbone, which a single feature map does not have."""

    def __init__(self, M: int, bins: tuple[int, ...] = (1, 3, 6, 8)):
        super().__init__()
        self.bins = bins
        self.key, self.value = nn.Conv2d(M, M // 2, 1), nn.Conv2d(M, M // 2, 1)
        self.out = nn.Conv2d(M // 2, M, 1)

    def pool(self, x: Tensor) -> Tensor:
        """[b, c, H, W] to its means over the bins, [b, 110, c]."""
        return torch.cat([nn.functional.adaptive_avg_pool2d(x, n).flatten(2) for n in self.bins], 2).mT

    def forward(self, A: Tensor) -> Tensor:
        embedded = self.key(A).relu()                           # [b, M / 2, H, W]
        query = embedded.flatten(2).mT                          # [b, HW, M / 2]
        key, value = self.pool(embedded), self.pool(self.value(A))              # [b, 110, M / 2]
        weights = (query @ key.mT / math.sqrt(key.shape[2])).softmax(2)         # [b, HW, 110]  over the bins
        return self.out((weights @ value).mT.unflatten(2, A.shape[2:]))         # [b, M, H, W]


class CrissCross(nn.Module):
    """Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019: each pixel attends to its
    row and column, twice with the same weights. Query and key have M / 8 channels, the value M; gamma starts
    at 0. The two 3x3 convolutions around the loop are not included."""

    def __init__(self, M: int, rounds: int = 2):
        super().__init__()
        self.rounds = rounds
        self.query, self.key = nn.Conv2d(M, M // 8, 1), nn.Conv2d(M, M // 8, 1)
        self.value = nn.Conv2d(M, M, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, A: Tensor) -> Tensor:
        H = A.shape[2]
        for _ in range(self.rounds):
            query, key, value = self.query(A), self.key(A), self.value(A)
            column = torch.einsum("bcyx,bczx->byxz", query, key)                # [b, H, W, H]
            itself = torch.eye(H, dtype=torch.bool, device=A.device)[:, None]   # [H, 1, H]  the row has it too
            column = column.masked_fill(itself, -torch.inf)
            row = torch.einsum("bcyx,bcyz->byxz", query, key)                   # [b, H, W, W]
            weights = torch.cat((column, row), 3).softmax(3)    # [b, H, W, H + W]  over column and row
            column, row = weights[..., :H], weights[..., H:]
            O = torch.einsum("byxz,bmzx->bmyx", column, value) + torch.einsum("byxz,bmyz->bmyx", row, value)
            A = self.gamma * O + A                              # [b, M, H, W]
        return A


class DualAttention(nn.Module):
    """Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019: position attention (query and key M / 8
    channels, value M) plus channel attention (no convolution), summed; alpha and beta start at 0. The 3x3
    convolutions before and after each of the two are not included."""

    def __init__(self, M: int):
        super().__init__()
        self.query, self.key = nn.Conv2d(M, M // 8, 1), nn.Conv2d(M, M // 8, 1)
        self.value = nn.Conv2d(M, M, 1)
        self.alpha, self.beta = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def position(self, A: Tensor) -> Tensor:
        query, key, value = (f(A).flatten(2).mT for f in (self.query, self.key, self.value))    # [b, HW, c]
        weights = (query @ key.mT).softmax(2)                   # [b, HW, HW]  softmax over all pixels j
        return self.alpha * (weights @ value).mT.reshape(A.shape) + A           # [b, M, H, W]

    def channel(self, A: Tensor) -> Tensor:
        X = A.flatten(2)                                        # [b, M, HW]
        weights = (X @ X.mT).softmax(2)                         # [b, M, M]  softmax over the channels
        return self.beta * (weights @ X).reshape(A.shape) + A   # [b, M, H, W]

    def forward(self, A: Tensor) -> Tensor:
        return self.position(A) + self.channel(A)               # [b, M, H, W]


class PointwiseSpatial(nn.Module):
    """Zhao et al., PSANet: Point-wise Spatial Attention Network for Scene Parsing, ECCV 2018, on an n x n map.

    At half resolution (H, W below), as released. Each of the two branches reduces A (here M to M channels) and
    predicts, for every pixel, one score for each offset there can be: an over-complete map of
    (2H - 1)(2W - 1) channels, of which a pixel uses the H x W offsets that stay inside the image."""

    def __init__(self, M: int, n: int):
        super().__init__()
        H = W = (n - 1) // 2 + 1
        self.reduce = nn.ModuleList(nn.Conv2d(M, M, 1, bias=False) for _ in range(2))
        self.scores = nn.ModuleList(
            nn.Sequential(nn.Conv2d(M, M, 1), nn.ReLU(), nn.Conv2d(M, (2 * H - 1) * (2 * W - 1), 1, bias=False))
            for _ in range(2))
        self.out = nn.Conv2d(2 * M, M, 1)
        y, x = torch.arange(H * W) // W, torch.arange(H * W) % W
        offset = (y - y[:, None] + H - 1) * (2 * W - 1) + x - x[:, None] + W - 1
        self.register_buffer("offset", offset)                  # [HW, HW]  the channel for the way from i to j

    def mask(self, scores: Tensor) -> Tensor:
        """The over-complete map [b, (2H - 1)(2W - 1), H, W] to each pixel i's scores of all j, [b, HW, HW]."""
        return scores.flatten(2).mT.gather(2, self.offset.expand(len(scores), -1, -1))

    def forward(self, A: Tensor) -> Tensor:
        size = [(side - 1) // 2 + 1 for side in A.shape[2:]]
        half = [nn.functional.interpolate(reduce(A).relu(), size, mode="bilinear", align_corners=True)
                for reduce in self.reduce]                      # two [b, M, H, W]
        collect, distribute = (self.mask(scores(x)) for scores, x in zip(self.scores, half))    # [b, HW, HW]
        collect = collect.softmax(2)                            # softmax over the pixels j that i collects from
        distribute = distribute.softmax(1)                      # softmax over the pixels i that distribute to j
        O = torch.cat((half[0].flatten(2) @ collect.mT, half[1].flatten(2) @ distribute), 1)    # [b, 2M, HW]
        O = self.out(O.unflatten(2, size)).relu()               # [b, M, H, W]
        return nn.functional.interpolate(O, A.shape[2:], mode="bilinear", align_corners=True)


class RegionAttention(nn.Module):
    """RCB and RIB: K = 8, k = 3."""

    def __init__(self):
        super().__init__()
        self.rcb, self.rib = ranet.RCB(), ranet.RIB()

    def forward(self, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return self.rib(A, self.rcb(B, C))                      # [b, M, H, W]


# name: what its row is called, what the row includes, the module for (M, n)
BLOCKS = {
    "plain": ("softmax(A A^T) A", "two products of matrices", lambda M, n: PlainNonLocal()),
    "pyramid": ("pyramid pooling", "4 poolings, 4 1x1 convolutions", lambda M, n: train.PyramidPooling(M)),
    "nonlocal": ("non-local", "3 embeddings to M/2, 1x1 back to M", lambda M, n: train.NonLocal(M)),
    "asymmetric": ("asymmetric non-local", "APNB: 2 embeddings to M/2, 1x1 back to M",
                   lambda M, n: AsymmetricNonLocal(M)),
    "crisscross": ("CCNet", "2 rounds of: key, query to M/8, value", lambda M, n: CrissCross(M)),
    "dual": ("DANet", "position: key, query to M/8, value; channel", lambda M, n: DualAttention(M)),
    "psa": ("PSANet", "2 reductions, 2 x 2 convolutions for the maps, 1x1 after; half resolution",
            lambda M, n: PointwiseSpatial(M, n)),
}
SCENES = {
    "objects": "5 x 5 objects",
    "one": "one region",
    "pixels": "every pixel a region",
    "pairs": "regions of two pixels",
}
for key, words in SCENES.items():
    BLOCKS[key] = (f"RANet, {words}", "RCB and RIB", lambda M, n: RegionAttention())


def scene(kind: str, n: int, N: int) -> tuple[Tensor, Tensor]:
    """B [1, n, n] and C [1, N, n, n] as a trained network might give them: classes certain, boundaries 0.9."""
    at = torch.arange(n)
    row = k = at * 5 // n if kind == "objects" else torch.zeros_like(at)        # [n]  of equal class
    if kind == "objects":
        B = torch.full((n, n), 0.05)                            # [n, n]
        edge = (k[1:] != k[:-1]).nonzero()[:, 0]
        edge = torch.cat((edge, edge + 1))                      # both sides of each border
        B[edge] = B[:, edge] = 0.9
    elif kind == "pairs":                                       # two pixels, and a wall that joins them
        row, k = at // 2, at // 3
        wall = (at % 3 == 2) | (at[:, None] % 2 == 1)
        B = torch.where(wall, 0.9, 0.05)                        # [n, n]
    else:
        B = torch.full((n, n), 0.05 if kind == "one" else 0.9)  # [n, n]
    classes = torch.randint(N, (int(row[-1]) + 1, int(k[-1]) + 1))[row][:, k]   # [n, n]
    logits = 8.0 * nn.functional.one_hot(classes, N) + 0.3 * torch.randn(n, n, N)               # [n, n, N]
    B = (B + 0.01 * torch.randn(n, n)).clamp(0, 1)
    return B[None], logits.softmax(2).permute(2, 0, 1)[None]    # softmax over the classes


def make(name: str, n: int, M: int, N: int, device: str) -> tuple[nn.Module, list[Tensor], Tensor]:
    """A block, its inputs (with gradients) and a gradient of its output."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, M, n, n) * M ** -0.25]             # products of two pixels have variance 1
    if name in SCENES:
        inputs += scene(name, n, N)
    dO = torch.randn(1, M, n, n)                                # [1, M, n, n]
    return BLOCKS[name][2](M, n).to(device), [x.to(device).requires_grad_() for x in inputs], dO.to(device)


def run(name: str, n: int, M: int, N: int, device: str, backward: bool) -> tuple[float, int]:
    """Seconds of a forward pass, with the backward pass if `backward`, and the peak of bytes beyond the start."""
    block, inputs, dO = make(name, n, M, N, device)
    before = reset_peak(device)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        O = block(*inputs)                                      # [1, M, H, W]
        if backward:
            O.backward(dO)
    wait(device)
    return time.perf_counter() - start, highest(device) - before


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------
# Time, memory, operations
# ---------------------------------------------------------------------------------------------------------

def reset_peak(device: str) -> int:
    """The bytes in use now; what was the peak so far counts no more."""
    wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if LINUX:
        Path("/proc/self/clear_refs").write_text("5")
    return in_proc("self/status", "VmRSS")


def highest(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else in_proc("self/status", "VmHWM")


def in_proc(file: str, key: str) -> int:
    """Bytes; 0 where there is no /proc."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc", file).read_text())[1]) if LINUX else 0


def times(cases: list[tuple], rounds: int, device: str) -> dict[tuple, list[list[float]]]:
    """Seconds of each (name, n, M, N), [forward, forward + backward], a list over the rounds each."""
    for name, n, M, N in cases:                                 # the first call of everything is slow
        run(name, n if device == "cuda" else 9, M, N, device, True)
    seconds = {case: [[], []] for case in cases}
    for _ in range(rounds):
        for case in cases:
            for backward in (False, True):
                seconds[case][backward].append(run(*case, device, backward)[0])
    return seconds


def ratio(seconds: list[float], unit: list[float]) -> float:
    """The median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds, unit))


def peak(name: str, n: int, M: int, N: int, device: str, backward: bool) -> int | None:
    """Bytes beyond module and inputs. On the CPU in a process of its own, whose allocator gives back every
    block of 1 MiB or more at once; None where memory runs out."""
    if device == "cuda":
        try:
            run(name, 9, M, N, device, backward)                   # the libraries' own work space
            return run(name, n, M, N, device, backward)[1]
        except torch.cuda.OutOfMemoryError:
            return None
    mebi = str(2 ** 20)
    settings = {"MALLOC_MMAP_THRESHOLD_": mebi, "MALLOC_TRIM_THRESHOLD_": mebi, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--child", name, "--size", n, "--channels", M, "--classes", N,
               "--threads", torch.get_num_threads(), *["--backward"] * backward]
    done = subprocess.run([str(x) for x in command], env=os.environ | settings, capture_output=True, text=True,
                          check=False)
    if done.returncode and "memory" not in done.stderr:
        raise RuntimeError(done.stderr)
    return None if done.returncode else int(done.stdout)


def child(name: str, n: int, M: int, N: int, backward: bool) -> None:
    """Prints the bytes of `peak`. Running out of memory must end this process and no other."""
    run(name, 9, 16, N, "cpu", backward)                           # torch's own work space and threads
    if LINUX:
        free = in_proc("meminfo", "MemAvailable")
        resource.setrlimit(resource.RLIMIT_DATA, (free, resource.RLIM_INFINITY))
    print(run(name, n, M, N, "cpu", backward)[1])


def samples(n: int) -> int:
    """How many samples eq. 1 takes on an n x n map, over all ordered pairs of pixels, i = j included."""
    side = torch.arange(n)
    ways = (n - side) * torch.where(side > 0, 2, 1)             # [n]  ordered pairs so far apart on one axis
    length = torch.maximum(side, side[:, None]) + 1             # [n, n]
    return int((ways * ways[:, None] * length).sum())


def operations(n: int, N: int, k: int) -> dict[str, int]:
    """Operations of eqs. 1-5 on an n x n map. A multiply-add is 2; a maximum, a comparison, a logarithm are 1.
    D, E, F and G are symmetric: two pixels are one pair in them, and two in F^g and J."""
    pixels = n * n
    pairs = pixels * (pixels + 1) // 2                          # i <= j
    return {
        "eq. 1, interpolation": 3 * pixels * (n - 1) ** 2,      # each sample once: one map for each L, 2 ways
        "eq. 1, maxima": (samples(n) - pixels) // 2 - (pairs - pixels),     # i < j: one less than samples
        "eq. 2, logarithms": N * pairs,
        "eq. 2, the rest": 3 * N * pairs,                       # 2 U, and a multiply-add
        "eq. 3": 3 * pairs,
        "eq. 4, smoothing": 2 * k * k * pixels ** 2,
        "eq. 4, decision": 3 * pairs,
        "regions": 0,                                           # whole numbers compared, not counted
        "eq. 5": 2 * pixels ** 2,
    }


def count(name: str, n: int, M: int, N: int, device: str) -> tuple[int, int, str]:
    """Parameters, operations of a forward pass, and what the row includes."""
    block, inputs, _ = make(name, n, M, N, device)
    words, extra = BLOCKS[name][1], 0
    with torch.no_grad():
        if name in SCENES:
            A, B, C = inputs
            block, inputs, rcb = block.rib, [A, block.rcb(B, C)], block.rcb     # no products of matrices in RCB
            extra = sum(operations(n, N, 3).values())
            size = inputs[1].labels.flatten().bincount()        # [Q]
            words += f"; regions: {len(size):,}, representatives: {int(size.clamp_max(8).sum()):,}"
        with FlopCounterMode(display=False) as counter:
            block(*inputs)
    parameters = (rcb if name in SCENES else block).parameters()
    return sum(p.numel() for p in parameters), counter.get_total_flops() + extra, words


# ---------------------------------------------------------------------------------------------------------
# The two reports
# ---------------------------------------------------------------------------------------------------------

def table(head: str, rows: list[list]) -> str:
    lines = [head.split(" | "), ["---"] + ["---:"] * head.count("|"), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2 ** 20:,.0f}"


def compare(n: int, M: int, N: int, rounds: int, device: str) -> None:
    memory = {name: [mib(peak(name, n, M, N, device, backward)) for backward in (False, True)] for name in BLOCKS}
    seconds = times([(name, n, M, N) for name in BLOCKS], rounds, device)
    unit = seconds["plain", n, M, N]
    rows = []
    for case, own in seconds.items():
        parameters, flops, words = count(*case, device)
        ratios = [f"{ratio(*pair):.2f}" for pair in zip(own, unit)]
        amounts = [f"{parameters:,}", f"{flops / 1e9:.1f}", *ratios, *memory[case[0]]]
        rows.append([BLOCKS[case[0]][0], *amounts, words])
    head = "block | parameters | GFLOP | time, forward | and backward | MiB, forward | and backward | includes"
    print(table(head, rows))
    conv = [f"{18 * c * M * n * n / 1e9:.0f} GFLOP, {9 * c * M / 1e6:.1f} M parameters" for c in (2048, M)]
    forward, both = (statistics.median(x) for x in unit)
    print(f"""
A is [{M} x {n} x {n}], with {N} classes. GFLOP: a forward pass, products of matrices and convolutions, a
multiply-add being 2; for RANet also eqs. 1-5, counted by hand; no softmax, pooling or upsampling. Time: the median
of {rounds} rounds, 1 being {forward:.3g} s forward and {both:.3g} s with backward. MiB: the peak beyond module
and inputs, the output included, and with backward the gradients too.
In no row: a 3x3 convolution from 2048 channels before the block ({conv[0]}), one
from {M} after it ({conv[1]}), and RANet's two 1x1 heads for B and C
({2 * M * (N + 1) * n * n / 1e9:.2f} GFLOP, {(M + 1) * (N + 1):,} parameters).""")


# What starts nothing on a GPU, and what makes the host wait for one.
VIEWS = set("""view _unsafe_view reshape expand as_strided slice select transpose t permute unsqueeze squeeze split
    split_with_sizes unbind diagonal detach alias unfold _reshape_alias lift_fresh empty new_empty empty_strided
    empty_like new_empty_strided""".split())       # noqa: SIM905
WAITS = {"_local_scalar_dense", "nonzero", "unique_consecutive", "equal", "bincount"}


class Calls(TorchDispatchMode):
    """Counts what a GPU would be asked for."""

    def __init__(self):
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, f, types, args=(), options=None):
        name = f._schema.name.split("::")[1]
        masks = args[1] if name == "index" else ()
        self.waits += name in WAITS or any(x is not None and x.dtype == torch.bool for x in masks)
        self.launches += name not in VIEWS and name.rstrip("_") not in VIEWS
        return f(*args, **(options or {}))


def calls(n: int, M: int, N: int) -> None:
    rows = []
    quiet = {name: lambda *args, **options: None for name in vars(ranet) if name.startswith("_check_")}
    with mock.patch.multiple(ranet, _few_calls=lambda B: True, _numbers=lambda x: 2 ** 27, **quiet):
        for kind in ("objects", "one"):
            block, (A, B, C), dO = make(kind, n, M, N, "cpu")
            row = [f"{SCENES[kind]}, {N} classes"]
            with Calls() as count:
                regions = block.rcb(B, C)
                row.append(count.launches)
                O = block.rib(A, regions)
                row.append(count.launches - row[1])
                O.backward(dO)
            rows.append([*map(str, row), str(count.launches - row[1] - row[2]), str(count.launches), str(count.waits)])
    print(f"Calls that would start a kernel on a GPU, one image of {n} x {n}, and waits of the host:\n")
    print(table("scene | RCB | RIB | backward | all | waits", rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=97, help="pixels a side")
    parser.add_argument("--channels", type=int, default=512, help="M")
    parser.add_argument("--classes", type=int, default=19, help="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--calls", action="store_true", help="count them, as on a GPU")
    parser.add_argument("--child", choices=BLOCKS, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = args.size, args.channels, args.classes
    if args.child:
        return child(args.child, *case, args.backward)
    if args.device == "cuda":
        chip = torch.cuda.get_device_name()
    else:
        found = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) if LINUX else None
        chip = f"{found[1] if found else platform.processor()}, {args.threads} threads"
    print(f"{datetime.date.today()}, torch {torch.__version__}, {chip}\n")
    if args.calls:
        calls(*case)
    else:
        compare(*case, args.rounds, args.device)


if __name__ == "__main__":
    main()
