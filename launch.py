# SPDX-License-Identifier: MIT
"""What train.py and evaluate.py share: processes, flags, and what is said of mistakes."""
import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from data import SETS

BAR = {"dynamic_ncols": True, "mininterval": 0.1 if getattr(sys.stderr, "isatty", bool)() else 30}     # s; in a file 30

# The settings of a run, which its checkpoint keeps: the paper's values for its data sets, or the field's (R12).
PAPER = {"root": None, "split": "train", "backbone": "resnet101", "weights": None, "strides": None, "channels": None,
         "context": "ranet", "k": 8, "steps": 60000, "batch": 8, "crop": 520, "scale": [0.5, 2.0], "lr": 0.001,
         "weight_decay": 1e-4, "radius": 2.0, "seed": 0, "amp": False, "compile": False, "data": None}
RECIPES = {
    "ribbons": {**PAPER, "backbone": "small", "steps": 300, "crop": 96, "scale": [1.0, 1.0], "lr": 0.1, "radius": 1.0},
    "cityscapes": {**PAPER, "steps": 40000, "crop": 769, "scale": [0.7, 2.1], "weight_decay": 5e-4},
    "pascal_context": PAPER, "pascal_context60": PAPER, "coco_stuff": PAPER,
    "folder": {**PAPER, "steps": 10000, "crop": 320},
}


class Where(NamedTuple):
    """This process, how many there are, its device, and how many processes load its data."""
    rank: int
    world: int
    device: torch.device
    workers: int


def number(kind: type, least: float, below: float = math.inf) -> Callable[[str], float]:
    def convert(text: str):
        if not least <= kind(text) < below:
            raise ValueError
        return kind(text)
    limit = f" and below {below}" if below < math.inf else ""
    convert.__name__ = f"{kind.__name__} from {least}{limit}"   # argparse shows it
    return convert


def flags(program: str) -> argparse.ArgumentParser:
    """A parser whose mistakes take one line, with the flags of both programs."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Defaults in brackets.")
    parser.error = lambda message: sys.exit(f"{program}: {message}")
    add = parser.add_argument
    add("--gpus", type=number(int, 0), help="one process for each of so many GPUs of this machine (one process)")
    add("--workers", type=number(int, 0), default=2, help="processes that load data, for each GPU (2)")
    add("--amp", action="store_true", default=None, help="bfloat16 where it is safe")
    add("--data", choices=SETS, help="data set (ribbons, which is generated; evaluate.py: the checkpoint's)")
    add("--root", help="folder of the data set")
    add("--crop", type=number(int, 1), help="side of the training crop, and of the windows of evaluation")
    return parser


def launch(parse: Callable, run: Callable, file: str, argv: list[str]) -> None:
    """Calls run(parse(argv), where) in this process, in every process of torchrun, or in --gpus new ones. A mistake in
    flags or files ends it with one line, printed once."""
    sys.stderr = sys.stderr or open(os.devnull, "w")    # noqa: SIM115  a program without a console has none
    for stream in (sys.stdout, sys.stderr):             # a class name that cannot be shown ends nothing
        getattr(stream, "reconfigure", dict)(errors="backslashreplace", line_buffering=True)
    store, rank, world, local = None, 0, 1, 0
    try:
        if "RANK" in os.environ:        # torchrun has started this process
            lost = [x for x in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if x not in os.environ]
            if lost:
                sys.exit(f"RANK is set and {', '.join(lost)} not: start with torchrun, or unset RANK")
            store, rank, world = next(dist.rendezvous("env://"))
            local = int(os.environ["LOCAL_RANK"])
        args, count = parse(argv), torch.cuda.device_count()
        if args.gpus and store:
            sys.exit("--gpus starts its own processes: leave it out under torchrun")
        if args.gpus and args.gpus > count:
            sys.exit(f"--gpus {args.gpus}: this machine shows {count} GPUs")
        if args.gpus:                   # torchrun, spelled shorter; of two --gpus the last holds
            os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                      f"--nproc-per-node={args.gpus}", file, *argv, "--gpus", "0"])
        if 0 < count <= local:
            sys.exit(f"process {local} of this machine has no GPU: it shows {count}")
        device = torch.device(*("cuda", local) if count else ("cpu",))
        if count:
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if count else "gloo", None, None, world, rank, store)
        run(args, Where(rank, world, device, args.workers))
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (SystemExit, ValueError, OSError, RuntimeError) as error:    # a mistake in flags or data, not in the code
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            raise                       # --help
        if store and store.add("failed", 1) > 1:
            sys.exit(1)                 # another process has said it
        if not expected(error):
            raise
        whole = isinstance(error, (SystemExit, ValueError)) and "DataLoader worker" not in str(error)
        sys.exit(str(error) if whole else one_line(error))      # some show the folders that are expected
    if world > 1:
        dist.destroy_process_group()


def writable(out: Path) -> None:
    """Makes the folder; if it cannot be written to, this fails before the work."""
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


# What a machine, not the code, is the cause of, by parts of what is said of it: the line, and what to do.
MACHINE = {
    ("shared memory",): "this machine has too little shared memory for workers: raise it, or use --workers 0",
    ("DataLoader worker",): "a process that loads data was killed, mostly for want of memory: use fewer --workers",
    ("ancdata", "Too many open files"): "too many open files: raise the limit (ulimit -n), or use fewer --workers",
    ("out of memory", "allocate memory"): "out of memory: use a smaller --crop, --batch or picture",
    ("address already in use", "EADDRINUSE"): "MASTER_PORT is in use: choose another port",
    ("clients joined",): "not all processes came: start the same line on every machine, with one MASTER_ADDR and port",
    ("per channel when training",): "BatchNorm needs more than one value a channel: use a larger --batch"}


def cause(error: BaseException) -> str | None:
    return next((line for parts, line in MACHINE.items() if any(part in str(error) for part in parts)), None)


def expected(error: BaseException) -> bool:
    """Whether a line says it: files, flags and the machine, not a mistake in the code."""
    return not isinstance(error, RuntimeError) or cause(error) is not None


def one_line(error: BaseException) -> str:
    text = str(error).strip()
    if "DataLoader worker" in text and "Traceback" in text:     # a worker's, whose last line says it
        return text.splitlines()[-1].partition(": ")[2]
    file = f"{error.filename}: " if getattr(error, "filename", None) else ""
    return cause(error) or file + (getattr(error, "strerror", None) or text or type(error).__name__).splitlines()[0]
