# SPDX-License-Identifier: MIT
"""Trains RANet.

    python train.py                                                      generated scenes, minutes on a CPU
    python train.py --data cityscapes --root DIR                         one GPU, or the CPU without one
    python train.py --data cityscapes --root DIR --gpus 8                8 GPUs of this machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train.py --data cityscapes --root DIR --batch 16                 2 machines, the same line on both
    python train.py --out runs/ribbons-ranet --resume                     a run that was stopped goes on

A run writes into --out, a folder that all machines share: log.jsonl, last.pt (the checkpoint, for evaluate.py) and at
its end metrics.json and overview.png. In a log line `regions` is Q, `largest` the share of an image that its largest
region has, `mean_B` and `mean_J` the means of B and J. Rn in a comment is a section of docs/differences.md.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import ranet
from data import TrainingSet, load, names
from evaluate import How, draw_overview, evaluate, report, survey
from launch import BAR, PAPER, RECIPES, Where, expected, flags, launch, number, one_line, writable
from models import CONTEXTS, PEERS, VERSION, build, read, restore, save

# --- Training --------------------------------------------------------------------------------------------

def seed_of(seed: int, step: int, slot: int) -> int:
    """Seeds every random number of a step, so a resumed run needs no generator's state. Slots: 0..batch - 1 the images,
    batch + rank the dropout of a process, 2 batch the order of the epoch `step`. A hash, since torch keeps no more than
    the low 32 bits of a seed: what is drawn depends on all of the three."""
    return int(np.random.SeedSequence((seed, step, slot)).generate_state(1)[0])


def order(n: int, settings: argparse.Namespace, step: int, where: Where):
    """This process's part of every batch from `step` on, as (index, augmentation seed).

    Images come in a new permutation every epoch; a batch may hold the end of one and the start of the next.
    """
    epoch = None
    for now in range(step, settings.steps):
        batch = []
        for slot in range(where.rank, settings.batch, where.world):
            this, place = divmod(now * settings.batch + slot, n)
            if this != epoch:
                epoch, generator = this, torch.Generator().manual_seed(seed_of(settings.seed, this, 2 * settings.batch))
                permutation = torch.randperm(n, generator=generator).tolist()
            batch.append((permutation[place], seed_of(settings.seed, now, slot)))
        yield batch


def mean(x: Tensor, world: int) -> Tensor:
    """The mean of x over all processes, in place."""
    if world > 1:
        dist.all_reduce(x)
    return x.div_(world)


def region_statistics(regions: ranet.Regions, boundary: Tensor) -> Tensor:
    """Q, the largest region's share of the image, and the means of B and J, over all images [4]."""
    sizes = [image.flatten().bincount() for image in regions.labels]        # [Q] of each image
    Q, largest = (sum(x) / len(sizes) for x in zip(*((len(size), size.max().item()) for size in sizes)))
    means = Q, largest / regions.labels[0].numel(), boundary.sigmoid().mean().item(), regions.J.mean().item()
    return torch.tensor(means, device=boundary.device)


def train(args: argparse.Namespace, where: Where) -> None:
    settings, saved, out, (rank, world, device, workers) = args.settings, args.saved, args.out, where
    last, log = out / "last.pt", out / "log.jsonl"
    if settings.batch % world:
        sys.exit(f"--batch {settings.batch} does not split over {world} processes")
    step = start = saved["step"] if saved else 0
    if mean(torch.tensor([float(start)], device=device), world).item() != start:
        sys.exit(f"{out} has to be a folder that all machines share")
    data, val = (load(settings.data, settings.root, split) for split in (settings.split, "val"))
    images = names(data)
    if saved and saved["images"] != images:
        sys.exit(f"{last} was trained on other pictures than those in {settings.root}: choose another --out")
    if not saved:           # a resumed run skips this: a broken file would stop it later, and --resume goes on again
        survey(settings.split, data, where)
    survey("val", val, where)
    torch.manual_seed(settings.seed)
    classes = data.classes
    model = restore(saved, last, classes) if saved else build(settings, len(classes), settings.weights)
    model.to(device)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    if settings.compile:
        model.backbone.compile()    # not the rest: the data decides the shapes within RCB and RIB
    net = model                     # `net` is trained; `model`, the same without DDP, evaluated and saved
    if world > 1:
        net = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    every, save_every = max(1, settings.steps // 400), min(500, max(1, settings.steps // 20))
    if rank == 0:
        writable(out)
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(lines[:start // every]))      # what follows the checkpoint is written again
        print(f"{settings.data}: {len(data)} images; {settings.context} on {'compiled ' * settings.compile}"
              f"{settings.backbone}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
              f"{world} x {device.type}; into {out} from step {start}")

    batches = DataLoader(TrainingSet(data, settings.crop, settings.scale, settings.radius), num_workers=workers,
                         batch_sampler=order(len(data), settings, start, where), pin_memory=device.type == "cuda")
    net.train()
    bar = tqdm(total=settings.steps, initial=start, disable=rank > 0, **BAR)
    try:
        for step, batch in enumerate(batches, start):
            image, label, mask = (x.to(device, non_blocking=True) for x in batch)   # [b, 3, h, w], 2 x [b, h, w]
            torch.manual_seed(seed_of(settings.seed, step, settings.batch + rank))  # of the dropout
            for group in optimizer.param_groups:
                group["lr"] = lr = settings.lr * (1 - step / settings.steps)        # falls to 0 linearly
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
                output = net(image)
                # DDP averages the gradients: with one count for all, each labelled pixel weighs the same.
                counts = mean(ranet.label_counts(label, mask, output.boundary.shape[1:]), world)
                loss = ranet.ranet_loss(output, label, mask, counts=counts)
            shown = mean(torch.stack(loss).detach(), world).tolist()
            if not math.isfinite(shown[0]):
                raise ValueError(f"the loss is {shown[0]}")
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()

            bar.set_postfix(loss=f"{shown[0]:.3f}", refresh=False)
            bar.update()
            done = step + 1
            if done % every == 0:
                line = dict(zip(("step", "loss", "fine", "coarse", "boundary", "lr"), (done, *shown, lr)))
                if output.regions is not None:
                    numbers = mean(region_statistics(output.regions, output.boundary), world).tolist()
                    line.update(zip(("regions", "largest", "mean_B", "mean_J"), numbers))
                if rank == 0:
                    with open(log, "a") as file:
                        file.write(json.dumps(line) + "\n")
            if rank == 0 and (done % save_every == 0 or done == settings.steps):
                save(last, {
                    "step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "version": VERSION,
                    "images": images, "args": vars(settings), "classes": list(classes),
                    "palette": list(map(list, data.palette))})
    except (KeyboardInterrupt, ValueError, OSError, RuntimeError) as error:
        if not (expected(error) or isinstance(error, torch._dynamo.exc.TorchDynamoException)):      # no compiler
            raise
        kept = f"{last} is whole, and --resume goes on from it" if last.exists() else "there is no checkpoint yet"
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
        if type(error) is ValueError and any(x in reason for x in ("nan", "inf", "finite")):    # it would be so again
            kept = "start anew with a lower --lr"
        sys.exit(f"training stopped at step {step}: {reason}; {kept}")
    finally:
        bar.close()

    if world > 1:       # without SyncBatchNorm, every process has running statistics of its own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    how = How(settings.crop, amp=settings.amp)
    result = evaluate(model, val, how, where)
    if rank == 0:
        report(result, settings, val, settings.data, "val", how, out / "metrics.json",
               steps=settings.steps, seed=settings.seed)
        draw_overview(model, val, settings.crop, settings.k, out / "overview.png")


# --- The command line ------------------------------------------------------------------------------------

def parse(argv: list[str]) -> argparse.Namespace:
    """The settings are those given, else those of the checkpoint of --resume, else the data set's recipe."""
    parser = flags("train.py")
    whole, natural, positive, add = number(int, 1), number(int, 0, 2 ** 18), number(float, 1e-30), parser.add_argument
    add("--out", type=Path, help="folder of results (runs/DATA-CONTEXT)")
    add("--resume", action="store_true", help="continue the run in --out, or start it if it has no checkpoint yet")
    add("--context", choices=CONTEXTS, help="what makes O: the rows of Table 1 and of section 5.1 (ranet)")
    add("--split", choices=("train", "trainval", "train+coarse", "trainval+coarse"), help="(train)")
    add("--backbone", help="small, resnet101, hrnet_w48, or a name of timm.list_models() (by data set)")
    add("--strides", type=whole, nargs="+", help="keep the backbone's own and take these (dilate it to 8)")
    add("--channels", type=whole, help="M (512; small: 64)")
    add("--k", type=whole, help="representatives a region (8)")
    add("--weights", help="of the backbone: imagenet, none, or a file (imagenet; none for small)")
    add("--steps", type=whole, help="updates in all (by data set)")
    add("--batch", type=whole, help="images a step, over all processes together (8)")
    add("--scale", type=positive, nargs=2, metavar=("LOW", "HIGH"), help="range of the random resizing (by data set)")
    add("--lr", type=positive, help="learning rate at the first step; falls to 0 linearly (by data set)")
    add("--seed", type=natural, help="of weights, data order, augmentation and dropout (0)")
    add("--compile", action="store_true", default=None, help="torch.compile the backbone; RCB and RIB stay as they are")
    args = parser.parse_args(argv)
    given = {key: value for key, value in vars(args).items() if key in PAPER and value is not None}
    args.out = args.out or Path(f"runs/{given.get('data', 'ribbons')}-{given.get('context', 'ranet')}")
    last = args.out / "last.pt"
    args.saved = read(last) if last.exists() else None
    known = args.saved["args"] if args.saved else {}
    if known and not args.resume:
        sys.exit(f"{args.out} holds a run at step {args.saved['step']} of {known['steps']}: "
                 "continue it with --resume, or choose another --out")
    if known and not {"optimizer", "images"} <= args.saved.keys():
        sys.exit(f"{last} cannot be resumed: it lacks its optimizer or its images; evaluate.py still takes it")
    for key in given.keys() & known.keys() - {"root"}:
        if given[key] != known[key]:
            sys.exit(f"--{key} {given[key]} contradicts {last}, which was trained with {known[key]}")
    data = known.get("data", given.get("data", "ribbons"))
    args.settings = settings = argparse.Namespace(**{**RECIPES[data], "data": data, **known, **given})
    small = settings.backbone == "small"
    settings.weights = settings.weights or ("none" if small else "imagenet")
    if small and (settings.strides or settings.weights != "none"):
        sys.exit("--backbone small has no --strides to choose and no trained weights")
    if "k" in given and settings.context in PEERS:
        sys.exit(f"--k: --context {settings.context} has no representatives")
    if settings.scale[0] > settings.scale[1]:
        sys.exit(f"--scale {settings.scale[0]:g} {settings.scale[1]:g}: expected the lower one first")
    return args


def main(argv: list[str]) -> None:
    launch(parse, train, __file__, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
