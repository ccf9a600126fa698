# SPDX-License-Identifier: MIT
"""Trains, resumes and evaluates RANet, and segments your own pictures.

    python train.py                                                      generated scenes, minutes on a CPU
    python train.py --data cityscapes --root DIR                         one GPU, or the CPU without one
    python train.py --data cityscapes --root DIR --gpus 8                8 GPUs of this machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train.py --data cityscapes --root DIR --batch 16                 2 machines, the same line on both
    python train.py --out runs/ribbons-ranet --resume                     a run that was stopped goes on
    python train.py --eval runs/cityscapes-ranet/last.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
    python train.py --predict runs/cityscapes-ranet/last.pt a.jpg photos/    a_mask.png, a_overlay.png, ...

A run writes into --out, a folder that all machines share: log.jsonl, last.pt (the checkpoint) and at its end
metrics.json and overview.png. In a log line `regions` is Q, `singles` the share of pixels that are a region of
their own, `mean_B` and `mean_J` the means of B and J. Rn in a comment is a section of docs/differences.md.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention
from torch.utils.data import DataLoader, Subset
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

import ranet
from data import Look, TrainingSet, load
from evaluate import BAR, draw_overview, evaluate, one_line, predict, read, report, restore, save, score, writable

# The paper's values for its three data sets, and the field's where it is silent (R12).
PAPER = {"root": None, "split": "train", "backbone": "resnet101", "weights": None, "strides": None, "channels": None,
         "context": "ranet", "k": 8, "steps": 60000, "batch": 8, "crop": 520, "scale": [0.5, 2.0], "lr": 0.001,
         "weight_decay": 1e-4, "radius": 2.0, "seed": 0, "amp": False, "compile": False}
RECIPES = {
    "ribbons": {**PAPER, "backbone": "small", "steps": 300, "crop": 96, "scale": [1.0, 1.0], "lr": 0.1, "radius": 1.0},
    "cityscapes": {**PAPER, "steps": 40000, "crop": 769, "scale": [0.7, 2.1], "weight_decay": 5e-4},
    "pascal_context": PAPER, "pascal_context60": PAPER, "coco_stuff": PAPER,
    "folder": {**PAPER, "steps": 10000, "crop": 320},
}
SETTINGS = "data", *PAPER                               # what a checkpoint remembers
MODEL = "backbone", "strides", "channels", "context", "k"       # what its weights fit


# --- Backbones, and what Table 1 compares with -----------------------------------------------------------

class Backbone(nn.Module):
    """The maps of a timm model, brought to stride 8 and concatenated."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.channels = net, net.feature_info.channels()
        strides = net.feature_info.reduction()
        self.multiple = 1 if strides == [8] else max(strides)   # an image of such a size has all maps on one grid

    def forward(self, images: Tensor) -> Tensor:
        h, w = images.shape[2:]
        images = pad(images, (0, -w % self.multiple, 0, -h % self.multiple))
        size = [-(-side // 8) for side in images.shape[2:]]
        maps = [x if x.shape[1] == channels else x.movedim(3, 1)        # Swin's channels come last
                for x, channels in zip(self.net(images), self.channels)]
        maps = [interpolate(x, size, mode="bilinear") for x in maps]    # [b, channels, *size] each
        return torch.cat(maps, 1)[:, :, :-(-h // 8), :-(-w // 8)]       # [b, in_channels, H, W]


def make_backbone(name: str, weights: str = "none", strides: list[int] | None = None) -> tuple[nn.Module, int]:
    """A backbone of stride 8 (small: 4) and its channels: the deepest map of each stride of any timm model.

    weights: none, imagenet, or a file of the whole timm model. strides: of the maps to take; None for all from
    8 on, after the model was dilated to 8 if it can be. So a ResNet gives res5 as in the paper, and HRNet, with
    its map of stride 4, all four branches.
    """
    if name == "small":     # sees 7 pixels around at stride 4: far context has to come from elsewhere
        layers = (3, 32, 3, 2), (32, 64, 3, 2), (64, 64, 3, 1), (64, 64, 1, 1)      # channels, kernel, stride
        return nn.Sequential(*(Conv2dNormActivation(*layer) for layer in layers)), 64
    import timm
    if not timm.is_model(name):
        sys.exit(f"--backbone {name}: expected small, resnet101, hrnet_w48 or a name of timm.list_models()")
    hrnet = {"feature_location": ""} if name.startswith("hrnet") else {}
    ways = [{"strict_img_size": False}, {"dynamic_img_size": True}, {}]       # Swin's, ViT's, the others' for any size
    try:
        for way in (ways if strides or hrnet else [{"output_stride": 8}, *ways]):
            options = dict(way, **hrnet, features_only=True)
            try:
                with torch.device("meta"):                      # a look at the levels, before weights are made
                    info = timm.create_model(name, **options).feature_info
                break
            except (AssertionError, NotImplementedError, TypeError):    # no such way
                if way == {}:
                    raise
        own = info.reduction()
        if not set(strides or own) <= set(own):
            sys.exit(f"--strides {' '.join(map(str, strides))}: {name} has maps of strides "
                     f"{' '.join(map(str, sorted(set(own))))}")
        wanted = strides or [stride for stride in own if stride >= (4 if hrnet else 8)]
        deepest = {stride: index for stride, index in zip(own, info.out_indices) if stride in wanted}
        options["out_indices"] = sorted(deepest.values())
        with torch.random.fork_rng([], weights != "none"):
            net = timm.create_model(name, **options)
        if weights != "none":
            fresh, file = net, {} if weights == "imagenet" else {"pretrained_cfg_overlay": {"file": weights}}
            net = timm.create_model(name, **options, pretrained=True, **file)
            # timm keeps its random numbers where the file has none: equal tensors are the missing ones.
            for (key, a), b in zip(net.named_parameters(), fresh.parameters()):
                if a.dim() > 1 and torch.equal(a, b):
                    sys.exit(f"--weights {weights} has no {key} for {name}")
        backbone = Backbone(net)
        backbone.eval()(torch.zeros(1, 3, 72, 104)).sum().backward()
    except Exception as error:      # noqa: BLE001  timm raises whatever a model, a file or the hub leads to
        sys.exit(f"--backbone {name} with --weights {weights} cannot be had ({one_line(error)}): give a file, "
                 "or --weights none to start from scratch")
    for p in backbone.parameters():
        p.requires_grad_(p.grad is not None)                    # DDP stops where a parameter is idle
        p.grad = None
    if hrnet:               # HRNetV2-W48 + ASPP; the paper says no more (Table 5)
        return nn.Sequential(backbone, ASPP(sum(backbone.channels), (12, 24, 36), 512)), 512
    return backbone, sum(backbone.channels)


class NoContext(nn.Module):
    """O = 0: the backbone and its heads without context."""

    def forward(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(A), None                        # [b, M, H, W]


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling. Without BatchNorm: its coarsest map is one pixel an image."""

    def __init__(self, channels: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(channels, channels // 4, 1), nn.ReLU())
            for n in (1, 2, 3, 6))

    def forward(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, None]:
        maps = [interpolate(branch(A), A.shape[2:], mode="bilinear") for branch in self.branches]
        return torch.cat(maps, 1), None                         # [b, M, H, W]


class NonLocal(nn.Module):
    """Non-local attention, the embedded Gaussian form: every pixel collects from all others."""

    def __init__(self, channels: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, 3 * (channels // 2), 1)
        self.out = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, None]:
        query, key, value = self.embed(A).flatten(2).mT.chunk(3, 2)         # [b, HW, M / 2] each
        O = scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)[:, 0]
        return self.out(O.mT.unflatten(2, A.shape[2:])), None   # [b, M, H, W]


class OwnWeights(nn.Module):
    """RANet with weights around eqs. 6-8, which the paper does not have: RIB works on A after a 1 x 1 convolution and a
    normalisation, times M^(-1/4), and O goes through another 1 x 1 convolution (R15)."""

    def __init__(self, channels: int, k: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.regions = ranet.RegionContext(rib=ranet.RIB(k))
        self.out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ranet.Regions]:
        O, regions = self.regions(self.embed(A) * A.shape[1] ** -0.25, B, C)
        return self.out(O), regions                             # [b, M, H, W]


PEERS = {"none": lambda M: NoContext(), "spp": PyramidPooling, "nonlocal": NonLocal}
RANETS = {"ranet": ({}, {}), "boundary": ({"cues": "boundary"}, {}), "semantic": ({"cues": "semantic"}, {}),
          "no-intra": ({}, {"intra": False}), "no-inter": ({}, {"inter": False}), "printed": ({}, {"mean": False}),
          "no-joint": ({"joint": False}, {})}
CONTEXTS = *RANETS, "own", *PEERS                               # (R10, R8, R4, R15)


def make_context(name: str, M: int, k: int) -> nn.Module:
    if name in ("spp", "nonlocal") and M % 4:
        sys.exit(f"--channels {M}: --context {name} needs a multiple of 4")
    if name in PEERS:
        return PEERS[name](M)
    if name == "own":
        return OwnWeights(M, k)
    rcb, rib = RANETS[name]
    return ranet.RegionContext(ranet.RCB(**rcb), ranet.RIB(k, **rib))


def build(args, num_classes: int, weights: str = "none") -> ranet.RANet:
    backbone, in_channels = make_backbone(args.backbone, weights, args.strides)
    M = args.channels or (64 if args.backbone == "small" else 512)
    return ranet.RANet(backbone, in_channels, num_classes, M, make_context(args.context, M, args.k))


# --- Training --------------------------------------------------------------------------------------------

def seed_of(seed: int, step: int, slot: int) -> int:
    """All chance of a step comes from this, so a resumed run needs no generator's state."""
    return (seed << 44) + (step << 16) + slot


def order(n: int, args, step: int):
    """This process's part of every batch from `step` on, as (index, augmentation seed).

    Images come in a new permutation every epoch; a batch may hold the end of one and the start of the next.
    """
    epoch = None
    for now in range(step, args.steps):
        batch = []
        for slot in range(args.rank, args.batch, args.world):
            this, place = divmod(now * args.batch + slot, n)
            if this != epoch:
                epoch, generator = this, torch.Generator().manual_seed(seed_of(args.seed, this, 2 * args.batch))
                permutation = torch.randperm(n, generator=generator).tolist()
            batch.append((permutation[place], seed_of(args.seed, now, slot)))
        yield batch


def mean(x: Tensor, world: int) -> Tensor:
    """The mean of x over all processes, in place."""
    if world > 1:
        dist.all_reduce(x)
    return x.div_(world)


def region_statistics(regions: ranet.Regions, boundary: Tensor) -> Tensor:
    """Q, the share of single-pixel regions in the map, and the means of B and J, over all images [4].
    A run has collapsed where Q stays at 1 or the share goes to 1 (R14)."""
    sizes = [image.flatten().bincount() for image in regions.labels]
    Q = sum(len(size) for size in sizes) / len(sizes)
    singles = sum((size == 1).sum().item() for size in sizes) / regions.labels.numel()
    return torch.tensor([Q, singles, boundary.sigmoid().mean().item(), regions.J.mean().item()], device=boundary.device)


def look(split: str, data, args) -> None:
    """Every picture and label is read once before the first step, by one of the processes: what is wrong or missing is
    said now."""
    mine = Subset(Look(data), range(args.rank, len(data), args.world))
    loader = DataLoader(mine, batch_size=None, num_workers=args.workers)
    bar = tqdm(loader, f"looking at the labels of {split}", disable=args.rank > 0, **BAR)
    pixels = sum(bar, torch.zeros(256, dtype=torch.int64)).to(args.device)
    if args.world > 1:
        dist.all_reduce(pixels)
    missing = [name for name, count in zip(data.classes, pixels) if not count]
    nothing = len(missing) == len(data.classes)
    if nothing and split != "val":
        folder = getattr(data, "labels", Path())
        why = "" if folder.is_dir() else f": {folder} is no folder"
        sys.exit(f"{split}: nothing is labelled in its {len(data)} images{why}")
    if missing and args.rank == 0:
        print(f"{split}: no pixel of {len(missing)} of {len(data.classes)} classes ({', '.join(missing[:5])})"
              f"{', so there will be no score' * nothing}", flush=True)


def train(args) -> None:
    out, saved, rank, world, device = Path(args.out), args.saved, args.rank, args.world, args.device
    last, log = out / "last.pt", out / "log.jsonl"
    if saved and not args.resume:
        sys.exit(f"{out} holds a run at step {saved['step']} of {saved['args']['steps']}: "
                 "continue it with --resume, or choose another --out")
    if args.batch % world:
        sys.exit(f"--batch {args.batch} does not split over {world} processes")
    if not args.split.startswith("train"):
        sys.exit(f"--split {args.split}: training takes train, trainval, or these with +coarse")
    data, val = load(args.data, args.root, args.split), load(args.data, args.root, "val")
    if not saved and args.data != "ribbons":
        look(args.split, data, args)
        look("val", val, args)
    torch.manual_seed(args.seed)
    model = build(args, len(data.classes), "none" if saved else args.weights).to(device)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    step = start = saved["step"] if saved else 0
    if saved:
        restore(model, saved, last, data.classes)
        optimizer.load_state_dict(saved["optimizer"])
    if mean(torch.tensor([float(start)], device=device), world).item() != start:
        sys.exit(f"{out} has to be a folder that all machines share")
    if args.compile:
        model.backbone.compile()    # not the rest: the data decides the shapes within RCB and RIB
    net = model                     # `net` is trained; `model`, the same without DDP, evaluated and saved
    if world > 1:
        net = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    every, save_every = max(1, args.steps // 400), min(500, max(1, args.steps // 20))
    if rank == 0:
        writable(out)
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(lines[:start // every]))      # what follows the checkpoint is written again
        print(f"{args.data}: {len(data)} images; {args.context} on {'compiled ' * args.compile}{args.backbone}, "
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {world} x {device.type}; "
              f"into {out} from step {start}", flush=True)

    batches = DataLoader(TrainingSet(data, args.crop, args.scale, args.radius), num_workers=args.workers,
                         batch_sampler=order(len(data), args, start), pin_memory=device.type == "cuda")
    net.train()
    bar = tqdm(total=args.steps, initial=start, disable=rank > 0, **BAR)
    try:
        for step, batch in enumerate(batches, start):
            image, label, mask = (x.to(device, non_blocking=True) for x in batch)   # [b, 3, h, w], [b, h, w]
            torch.manual_seed(seed_of(args.seed, step, args.batch + rank))  # of the dropout
            for group in optimizer.param_groups:
                group["lr"] = lr = args.lr * (1 - step / args.steps)        # falls to 0 linearly
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
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
                    line.update(zip(("regions", "singles", "mean_B", "mean_J"), numbers))
                if rank == 0:
                    with open(log, "a") as file:
                        file.write(json.dumps(line) + "\n")
            if rank == 0 and (done % save_every == 0 or done == args.steps):
                save(last, {
                    "step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "args": {key: getattr(args, key) for key in SETTINGS},
                    "classes": list(data.classes), "palette": [list(colour) for colour in data.palette]})
    except (KeyboardInterrupt, ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        kept = f"{last} is whole, and --resume goes on from it" if last.exists() else "there is no checkpoint yet"
        if type(error) is ValueError:           # what is not finite will be so again
            kept = "start anew with a lower --lr"
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
        sys.exit(f"training stopped at step {step}: {reason}; {kept}")
    finally:
        bar.close()

    if world > 1:       # without SyncBatchNorm, every process has running statistics of its own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    result = evaluate(model, val, "val", args.split, args)
    if rank == 0:
        report(dict(result, steps=args.steps, seed=args.seed), out / "metrics.json")
        draw_overview(model, val, args, out / "overview.png")


# --- The command line ------------------------------------------------------------------------------------

def number(kind: type, least: float, below: float = math.inf):
    def convert(text: str):
        if not least <= kind(text) < below:
            raise ValueError
        return kind(text)
    convert.__name__ = f"{kind.__name__} from {least}"          # argparse shows it
    return convert


def parse(argv: list[str]) -> argparse.Namespace:
    """Two passes: the first finds what to do, so a recipe or a checkpoint can give the defaults of the second."""
    whole, natural, positive = number(int, 1), number(int, 0, 2 ** 18), number(float, 1e-30)
    yes = {"action": "store_true"}
    first = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    first.error = sys.exit                  # one line, as for every other mistake
    one, add = first.add_mutually_exclusive_group().add_argument, first.add_argument
    one("--eval", metavar="CHECKPOINT", help="mIoU; on Cityscapes' test split, label maps for its server")
    one("--predict", nargs="+", metavar=("CHECKPOINT", "IMAGE"), help="a mask (its numbers are the ids) and an overlay")
    one("--resume", **yes, help="continue the run in --out, or start it if it has no checkpoint yet")
    add("--out", help="folder of results (runs/DATA-CONTEXT; beside the checkpoint for --eval, --predict)")
    add("--data", choices=RECIPES, help="data set (ribbons, which is generated)")
    add("--context", choices=CONTEXTS, help="what makes O: the rows of Table 1 and of section 5.1 (ranet)")
    args, _ = first.parse_known_args(argv)
    command = "--eval" if args.eval else "--predict" if args.predict else "training"
    path = args.eval or args.predict and args.predict[0]
    out = Path(path).parent if path else Path(args.out or f"runs/{args.data or 'ribbons'}-{args.context or 'ranet'}")
    path = path or out / "last.pt"
    saved = read(path) if command != "training" or path.exists() else None
    known = saved["args"] if saved and (command != "training" or args.resume) else {}
    if known.get("data", "ribbons") not in RECIPES or known.get("context", "none") not in CONTEXTS:
        sys.exit(f"{path} is of another version: --data {known['data']} --context {known['context']}")
    defaults = {**RECIPES[args.data or known.get("data", "ribbons")], "data": "ribbons", **known}
    if args.data not in (None, known.get("data")):      # an evaluation on other data
        defaults["root"] = None
    if command == "--eval":
        defaults["split"] = "val"

    parser = argparse.ArgumentParser(parents=[first], allow_abbrev=False, description="Defaults in brackets.")
    parser.error = lambda message: sys.exit(f"{command}: {message}")
    def add(commands: str, *name: str, **options) -> None:
        if command in commands or {"-h", "--help"} & set(argv):
            parser.add_argument(*name, **options)
    every = "training --eval --predict"
    add(every, "--gpus", type=natural, help="one process for each of so many GPUs of this machine (one process)")
    add(every, "--workers", type=natural, default=2, help="processes that load data, for each GPU (2)")
    add("training --eval", "--root", help="folder of the data set")
    add("training --eval", "--split", help="trainval, train+coarse, trainval+coarse (train); test (--eval: val)")
    add(every, "--backbone", help="small, resnet101, hrnet_w48, or a name of timm.list_models() (by data set)")
    add(every, "--strides", type=whole, nargs="+", help="keep the backbone's own and take these (dilate it to 8)")
    add(every, "--channels", type=whole, help="M (512; small: 64)")
    if (args.context or defaults["context"]) not in PEERS:
        add(every, "--k", type=whole, help="representatives a region (8)")
    add("training", "--weights", help="of the backbone: imagenet, none, or a file (imagenet; none for small)")
    add("training", "--steps", type=whole, help="updates in all (by data set, as all that follows)")
    add("training", "--batch", type=whole, help="images a step, over all processes together")
    add(every, "--crop", type=whole, help="side of the training crop, and of the windows of evaluation")
    add("training", "--scale", type=positive, nargs=2, metavar=("LOW", "HIGH"), help="range of the random resizing")
    add("training", "--lr", type=positive, help="learning rate at the first step; falls to 0 linearly")
    add("training", "--seed", type=natural, help="of weights, data order, augmentation and dropout")
    add(every, "--amp", **yes, help="bfloat16 where it is safe")
    add("training", "--compile", **yes, help="torch.compile the backbone; RCB and RIB stay as they are")
    add("--eval --predict", "--scales", type=positive, nargs="+", help="average the probabilities over these sizes (1)")
    add("--eval --predict", "--flip", **yes, help="... and over the mirrored images")
    parser.set_defaults(**{**defaults, "scales": [1.0], "flip": False})
    args = parser.parse_args(argv)

    for key in () if not known else SETTINGS if command == "training" else MODEL:
        if getattr(args, key) != known.get(key) and key != "root":
            sys.exit(f"--{key} {getattr(args, key)} contradicts {path}, which was trained with {known.get(key)}")
    if args.predict and (len(args.predict) == 1 or args.data != known["data"]):
        sys.exit("--predict: expected a checkpoint and pictures, and no --data")
    if args.gpus and "RANK" in os.environ:
        sys.exit("--gpus starts its own processes: leave it out under torchrun")
    if args.gpus and args.gpus > torch.cuda.device_count():
        sys.exit(f"--gpus {args.gpus}: this machine shows {torch.cuda.device_count()} GPUs")
    if args.scale[0] > args.scale[1]:
        sys.exit(f"--scale {args.scale[0]:g} {args.scale[1]:g}: expected the lower one first")
    if args.backbone == "small" and (args.strides or args.weights not in (None, "none")):
        sys.exit("--backbone small has no --strides to choose and no trained weights")
    args.weights = args.weights or ("none" if args.backbone == "small" else "imagenet")
    args.out = args.out or str(out / ("predictions" if args.predict else ""))
    args.command, args.path, args.saved = command, path, saved
    return args


def main(argv: list[str]) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")   # a class name that cannot be shown ends nothing
    store, rank, world, local = None, 0, 1, 0
    if "RANK" in os.environ:            # torchrun has started this process
        lost = [x for x in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if x not in os.environ]
        if lost:
            sys.exit(f"RANK is set and {', '.join(lost)} not: start with torchrun, or unset RANK")
        store, rank, world = next(dist.rendezvous("env://"))
        local = int(os.environ["LOCAL_RANK"])
    try:
        args = parse(argv)
        if args.gpus:                   # torchrun, spelled shorter; of two --gpus the last holds
            os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                      f"--nproc-per-node={args.gpus}", __file__, *argv, "--gpus", "0"])
        device = torch.device(*("cuda", local) if torch.cuda.is_available() else ("cpu",))
        if device.type == "cuda":
            if local >= torch.cuda.device_count():
                sys.exit(f"process {local} of this machine has no GPU: it shows {torch.cuda.device_count()}")
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", None, None, world, rank, store)
        args.rank, args.world, args.device = rank, world, device
        if args.command == "training":
            train(args)
        else:
            model = build(args, len(args.saved["classes"])).to(device)
            (score if args.command == "--eval" else predict)(model, args)
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (SystemExit, ValueError, OSError, RuntimeError) as error:    # a mistake in flags or data, not in the code
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            raise                       # --help
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        if store and store.add("failed", 1) > 1:
            sys.exit(1)                 # another process has said it
        sys.exit(one_line(error) if "DataLoader worker" in str(error) else str(error))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
