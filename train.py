# SPDX-License-Identifier: MIT
"""Trains, resumes and evaluates RANet, and segments your own pictures.

    python train.py                                                      generated shapes, minutes on a CPU
    python train.py --data cityscapes --root DIR                         one GPU, or the CPU without one
    python train.py --data cityscapes --root DIR --gpus 8                8 GPUs of this machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train.py --data cityscapes --root DIR --batch 16                 2 machines, the same line on both
    python train.py --out runs/shapes-ranet --resume                     a run that was stopped goes on
    python train.py --eval runs/cityscapes-ranet/last.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
    python train.py --predict runs/cityscapes-ranet/last.pt a.jpg b.jpg  writes a_mask.png, a_overlay.png, ...

A run writes into --out, a folder that all machines share: log.jsonl (a line every few steps), last.pt (the
checkpoint), and at its end metrics.json and overview.png. In a log line `regions` is Q, `singles` the share
of pixels that are a region of their own, `mean_B` and `mean_J` the means of B and J: a run has collapsed
where regions stays at 1 or singles goes to 1. Rn in a comment is a section of docs/differences.md.
"""
import argparse
import colorsys
import itertools
import json
import math
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad, scaled_dot_product_attention
from torch.utils.data import DataLoader, Subset
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

import ranet
from data import PICTURES, DataError, Look, TrainingSet, cityscapes_label_ids, colorize, load, normalize, read_image

# The paper's values for its three data sets, and the field's where it is silent (R12).
RECIPES = {
    "shapes": dict(backbone="small", steps=400, crop=72, scale=[1.0, 1.0], lr=0.1, weight_decay=1e-4, radius=1.0),
    "cityscapes": dict(backbone="resnet101", steps=40000, crop=769, scale=[0.7, 2.1], weight_decay=5e-4),
    "pascal_context": dict(backbone="resnet101", steps=60000, crop=520, scale=[0.5, 2.0], weight_decay=1e-4),
    "coco_stuff": dict(backbone="resnet101", steps=60000, crop=520, scale=[0.5, 2.0], weight_decay=1e-4),
    "folder": dict(backbone="resnet101", steps=10000, crop=320, scale=[0.5, 2.0], weight_decay=1e-4),
}
DEFAULTS = dict(data="shapes", root=None, num_classes=None, coarse=False, context="ranet", cues="both", k=8,
                no_intra=False, no_inter=False, batch=8, lr=0.001, radius=2.0, seed=0, amp=False, compile=False,
                split="train")
BAR = dict(dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30)      # in a file, a line now and then
MODEL = "backbone", "context", "cues", "k", "no_intra", "no_inter"      # what the weights of a checkpoint fit
DATA = "data", "root", "num_classes", "coarse"
TRAINING = "weights", "steps", "batch", "scale", "lr", "radius", "seed", "compile"
SETTINGS = *DATA, *MODEL, *TRAINING, "split", "crop", "amp"       # what a checkpoint remembers of the flags


# ---------------------------------------------------------------------------------------------------------
# Backbones, and what Table 1 compares with
# ---------------------------------------------------------------------------------------------------------

def conv(channels: int, out: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, padding, dilation, bias=False),
                         nn.BatchNorm2d(out), nn.ReLU())


class Level(nn.Module):
    """One level of the features of a timm model."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.channels = net.feature_info.channels()[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)[0]                              # [b, channels, H, W]


class HRNet(nn.Module):
    """HRNet's four branches at stride 8, then ASPP: the paper's second model, as far as its one line says.

    The pooled branch of ASPP has no BatchNorm: it is one pixel an image, and a process may hold one image.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        width, self.channels = sum(net.feature_info.channels()), 512
        self.branches = nn.ModuleList([conv(width, 256, 1)])
        self.branches.extend(conv(width, 256, dilation=d) for d in (12, 24, 36))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 256, 1), nn.ReLU())
        self.project = conv(5 * 256, self.channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        h, w = images.shape[2:]
        quarter, *rest = self.net(pad(images, (0, -w % 32, 0, -h % 32)))    # strides 4, 8, 16, 32
        size = rest[0].shape[2:]
        maps = [avg_pool2d(quarter, 2), *(interpolate(x, size, mode="bilinear") for x in rest)]
        x = torch.cat(maps, 1)[:, :, :-(-h // 8), :-(-w // 8)]              # [b, width, H, W]
        pooled = self.pooled(x).expand(-1, -1, *x.shape[2:])                # [b, 256, H, W]
        x = torch.cat([*(branch(x) for branch in self.branches), pooled], 1)    # [b, 5 * 256, H, W]
        return self.project(x)                                  # [b, 512, H, W]


def make_backbone(name: str, weights: str) -> tuple[nn.Module, int]:
    """A backbone and its channels. weights: none, imagenet, or a file of the whole timm model."""
    if name == "small":     # sees 7 pixels around at stride 4: far context has to come from elsewhere
        return nn.Sequential(conv(3, 32, stride=2), conv(32, 64, stride=2), conv(64, 64), conv(64, 64, 1)), 64
    import timm
    if not timm.is_model(name):
        sys.exit(f"--backbone {name}: expected small, resnet101, hrnet_w48 or a name of timm.list_models()")
    if name.startswith("hrnet"):
        options = dict(features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
    else:       # a look at the levels, before any weights are made or fetched; the stride of some is fixed
        for options in (dict(features_only=True, output_stride=8), dict(features_only=True)):
            try:
                with torch.device("meta"):
                    info = timm.create_model(name, **options).feature_info
                break
            except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
                reason = one_line(error)
        else:
            sys.exit(f"--backbone {name} gives no feature maps: {reason}")
        strides = info.reduction()
        level = min(range(len(strides)), key=lambda i: (abs(strides[i] - 8), -i))   # the deepest around 8
        options["out_indices"] = info.out_indices[level],
    try:
        if weights == "none":
            net = timm.create_model(name, **options)
        else:
            with torch.random.fork_rng([]):
                fresh = timm.create_model(name, **options)
            file = {} if weights == "imagenet" else dict(pretrained_cfg_overlay=dict(file=weights))
            net = timm.create_model(name, **options, pretrained=True, **file)
            # timm skips what the file does not hold; that is equal, as the same numbers were drawn twice.
            for (key, a), b in zip(net.named_parameters(), fresh.parameters()):
                if a.dim() > 1 and torch.equal(a, b):
                    sys.exit(f"--weights {weights} has no {key} for {name}")
    except Exception as error:
        sys.exit(f"--weights {weights} of {name} could not be loaded ({one_line(error)}): "
                 "give a file, or --weights none to start from scratch")
    backbone = HRNet(net) if name.startswith("hrnet") else Level(net)
    try:
        backbone.eval()(torch.zeros(1, 3, 72, 104)).sum().backward()
    except (AssertionError, RuntimeError) as error:
        sys.exit(f"--backbone {name} does not take images of any size: {one_line(error)}")
    idle = [key for key, p in backbone.named_parameters() if p.grad is None]
    if idle:                # DDP would stop at the second step
        sys.exit(f"--backbone {name} has parameters that its features do not use: {', '.join(idle[:3])}")
    backbone.zero_grad()
    return backbone, backbone.channels


class NoContext(nn.Module):
    """O = 0: the backbone and its heads alone."""

    def forward(self, A: Tensor) -> Tensor:
        return torch.zeros_like(A)                              # [b, M, H, W]


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling. Without BatchNorm: its coarsest map is one pixel an image."""

    def __init__(self, channels: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(channels, channels // 4, 1), nn.ReLU())
            for n in (1, 2, 3, 6))

    def forward(self, A: Tensor) -> Tensor:
        maps = [interpolate(branch(A), A.shape[2:], mode="bilinear") for branch in self.branches]
        return torch.cat(maps, 1)                               # [b, M, H, W]


class NonLocal(nn.Module):
    """Non-local attention, the embedded Gaussian form: every pixel collects from all others."""

    def __init__(self, channels: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, 3 * (channels // 2), 1)
        self.out = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, A: Tensor) -> Tensor:
        query, key, value = self.embed(A).flatten(2).mT.chunk(3, 2)         # [b, HW, M / 2] each
        O = scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)[:, 0]
        return self.out(O.mT.unflatten(2, A.shape[2:]))         # [b, M, H, W]


def build(args, num_classes: int, weights: str = "none") -> ranet.RANet:
    backbone, in_channels = make_backbone(args.backbone, weights)
    M = 64 if args.backbone == "small" else 512
    contexts = {"none": lambda M: NoContext(), "spp": PyramidPooling, "nonlocal": NonLocal}
    context = contexts[args.context](M) if args.context != "ranet" else None
    return ranet.RANet(backbone, in_channels, num_classes, M, representatives=args.k, cues=args.cues,
                       intra=not args.no_intra, inter=not args.no_inter, context=context)


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------

def seed_of(seed: int, step: int, slot: int) -> int:
    """All chance of a step comes from this, so a resumed run needs no generator's state."""
    return (seed << 44) + (step << 16) + slot


def order(n: int, args, step: int, rank: int, world: int):
    """This process's part of every batch from `step` on, as (index, augmentation seed).

    Images come in a new permutation every epoch; a batch may hold the end of one and the start of the next.
    """
    epoch = None
    for step in range(step, args.steps):
        batch = []
        for slot in range(rank, args.batch, world):
            now, place = divmod(step * args.batch + slot, n)
            if now != epoch:
                epoch, generator = now, torch.Generator().manual_seed(seed_of(args.seed, now, 2 * args.batch))
                permutation = torch.randperm(n, generator=generator).tolist()
            batch.append((permutation[place], seed_of(args.seed, step, slot)))
        yield batch


def mean(x: Tensor, world: int) -> Tensor:
    """The mean of x over all processes, in place."""
    if world > 1:
        dist.all_reduce(x)
    return x.div_(world)


def region_statistics(output: ranet.Output) -> list[float]:
    """Q, the share of single-pixel regions in the map, and the means of B and J, over all images (R14)."""
    labels, J = output.regions
    sizes = [image.flatten().bincount() for image in labels]
    Q = sum(len(size) for size in sizes) / len(sizes)
    singles = sum((size == 1).sum().item() for size in sizes) / labels.numel()
    return [Q, singles, output.boundary.sigmoid().mean().item(), J.mean().item()]


def train(args, rank: int, world: int, device: torch.device) -> None:
    out = Path(args.out or f"runs/{args.data or 'shapes'}-{args.context or 'ranet'}")
    last, log = out / "last.pt", out / "log.jsonl"
    saved = read_checkpoint(last) if last.exists() else None
    if saved and args.resume:
        settle(args, saved["args"], last, [key for key in SETTINGS if key != "root"])
    else:
        settle(args, RECIPES[args.data or "shapes"])
    if saved and not args.resume:
        if saved["step"] < saved["args"]["steps"]:
            sys.exit(f"{out} holds a run stopped at step {saved['step']} of {saved['args']['steps']}: "
                     "continue it with --resume, or choose another --out")
        other = [flag(key) for key in SETTINGS if getattr(args, key) != saved["args"].get(key)]
        if other:
            sys.exit(f"{out} holds a finished run with other settings ({', '.join(other)}): "
                     "choose another --out")
        saved = None                # the same run again, which replaces the first
    if args.split not in ("train", "trainval"):
        sys.exit(f"--split {args.split}: training takes train or trainval")
    if args.batch % world:
        sys.exit(f"--batch {args.batch} does not split over {world} processes")

    data = load(args.data, args.root, args.split, num_classes=args.num_classes, coarse=args.coarse)
    val = load(args.data, args.root, "val", num_classes=args.num_classes)
    if rank == 0 and not saved:
        look(args.split, data, args.workers)
        look("val", val, args.workers)
    torch.manual_seed(args.seed)
    model = build(args, len(data.classes), "none" if saved else args.weights).to(device)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                weight_decay=RECIPES[args.data]["weight_decay"])
    step = 0
    if saved:
        restore(model, saved, last, data.classes)
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    if mean(torch.tensor([float(step)], device=device), world).item() != step:
        sys.exit(f"{out} has to be a folder that all machines share")
    if args.compile:
        model.backbone.compile()    # not the rest: the shapes within RCB and RIB hang on the data
    net = model                     # `net` is trained; `model`, the same without DDP, evaluated and saved
    if world > 1:
        net = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    every, save_every = max(1, args.steps // 400), min(500, max(1, args.steps // 20))
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if last.exists() and not saved:
            os.replace(last, out / "previous.pt")
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(lines[:step // every]))      # what follows the checkpoint is written again
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{args.data}: {len(data)} images; {args.context} on {args.backbone}, "
              f"{size:.1f} M parameters; {world} x {device.type}; into {out} from step {step}", flush=True)

    batches = DataLoader(TrainingSet(data, args.crop, args.scale, args.radius), num_workers=args.workers,
                         batch_sampler=order(len(data), args, step, rank, world),
                         pin_memory=device.type == "cuda")
    net.train()
    with tqdm(total=args.steps, initial=step, disable=rank > 0, **BAR) as bar:
        for step, batch in enumerate(batches, step):
            image, label, mask = (x.to(device, non_blocking=True) for x in batch)   # [b, 3, h, w], [b, h, w]
            torch.manual_seed(seed_of(args.seed, step, args.batch + rank))  # of the dropout
            lr = args.lr * (1 - step / args.steps)              # falls to 0 linearly
            for group in optimizer.param_groups:
                group["lr"] = lr
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    output = net(image)
                    # DDP averages the gradients. With one count for all processes, every labelled pixel
                    # weighs the same, whichever process holds it.
                    counts = mean(ranet.label_counts(label, mask, output.boundary.shape[1:]), world)
                    loss = ranet.ranet_loss(output, label, mask, counts=counts)
            except ValueError as error:     # on a CPU, B or A is found not to be finite before the loss is
                sys.exit(stopped(step, str(error), last))
            shown = mean(torch.stack(loss).detach(), world).tolist()
            if not math.isfinite(shown[0]):
                sys.exit(stopped(step, f"the loss is {shown[0]}", last))
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()

            bar.set_postfix(loss=f"{shown[0]:.3f}", refresh=False)
            bar.update()
            done = step + 1
            if done % every == 0:
                line = dict(zip(("step", "loss", "fine", "coarse", "boundary", "lr"), (done, *shown, lr)))
                if output.regions is not None:
                    numbers = mean(torch.tensor(region_statistics(output), device=device), world).tolist()
                    line.update(zip(("regions", "singles", "mean_B", "mean_J"), numbers))
                if rank == 0:
                    with open(log, "a") as file:
                        file.write(json.dumps(line) + "\n")
            if rank == 0 and (done % save_every == 0 or done == args.steps):
                save(last, dict(
                    step=done, model=model.state_dict(), optimizer=optimizer.state_dict(),
                    args={key: getattr(args, key) for key in SETTINGS},
                    classes=list(data.classes), palette=[list(colour) for colour in data.palette]))

    if world > 1:       # without SyncBatchNorm, every process has running statistics of its own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    result = evaluate(model, val, args, rank, world, device)
    if rank == 0:
        write_json(out / "metrics.json", dict(result, steps=args.steps, seed=args.seed))
        draw_overview(model, val, args, device, out / "overview.png")
        report(result)


def look(split: str, data, workers: int) -> None:
    """Every label is read once before the first step: what is wrong or missing is said now."""
    if not hasattr(data, "files"):
        return
    loader = DataLoader(Look(data), batch_size=None, num_workers=workers)
    pixels = sum(tqdm(loader, f"looking at the labels of {split}", **BAR))      # [256]
    missing = [name for name, count in zip(data.classes, pixels) if not count]
    if len(missing) == len(data.classes):
        nothing = f"{split}: nothing is labelled in its {len(data)} images"
        if split != "val":
            sys.exit(nothing)
        print(f"{nothing}: there will be no score", flush=True)
    elif missing:
        print(f"{split}: no pixel of {len(missing)} of {len(data.classes)} classes: {', '.join(missing[:5])}", flush=True)


def stopped(step: int, reason: str, last: Path) -> str:
    kept = f"{last} is untouched" if last.exists() else "there is no checkpoint yet"
    return f"training stopped at step {step}: {reason}; {kept}"


# ---------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------

def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def settle(args, known: dict, path: Path | None = None, fixed: Sequence[str] = ()) -> None:
    """Takes flags that were not given from a recipe or a checkpoint; one in `fixed` may not contradict it."""
    for key, value in {**DEFAULTS, **known}.items():
        given = getattr(args, key, None)
        if given is None:
            setattr(args, key, value)
        elif key in fixed and given != value:
            sys.exit(f"{flag(key)} {given} contradicts {path}, which was trained with {value}")
    if args.weights is None:
        args.weights = "none" if args.backbone == "small" else "imagenet"


def save(path: Path, checkpoint: dict) -> None:
    """A kill or a full disk at any moment leaves the previous checkpoint whole."""
    if not all(x.isfinite().all() for x in checkpoint["model"].values() if x.is_floating_point()):
        sys.exit(stopped(checkpoint["step"], "weights that are not finite", path))
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:        # torch.save wraps what the disk says
        new.unlink(missing_ok=True)
        reason = f"the checkpoint could not be written ({one_line(error)})"
        sys.exit(stopped(checkpoint["step"], reason, path))


def read_checkpoint(path: Path) -> dict:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"{path}: no such file")
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError):
        sys.exit(f"{path} cannot be read as a checkpoint")
    if not isinstance(checkpoint, dict) or not {"args", "step", "model", "classes"} <= checkpoint.keys():
        sys.exit(f"{path} is no checkpoint of train.py")
    return checkpoint


def restore(model: nn.Module, checkpoint: dict, path: Path, classes: Sequence[str]) -> None:
    if len(checkpoint["classes"]) != len(classes):
        sys.exit(f"{path} has {len(checkpoint['classes'])} classes and the data {len(classes)}")
    for n, (trained, here) in enumerate(zip(checkpoint["classes"], classes)):
        if trained != here:
            sys.exit(f"class {n} is {trained!r} in {path} and {here!r} in the data")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        sys.exit(f"{path} holds the weights of another model")


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------
# Evaluation and prediction
# ---------------------------------------------------------------------------------------------------------

def slide(model: nn.Module, image: Tensor, crop: int) -> Tensor:
    """Logits of the fine and the coarse map [2, N, h, w] of an image [1, 3, h, w], by windows of the training
    crop two thirds of it apart; a mean where they overlap. Windows shrink to a smaller image."""
    stride = math.ceil(crop * 2 / 3)
    tops, lefts = (sorted({min(x, max(size - crop, 0)) for x in range(0, max(size, crop), stride)})
                   for size in image.shape[2:])
    total, count = None, image.new_zeros(image.shape[2:])       # [h, w]
    windows = [(..., slice(y, y + crop), slice(x, x + crop)) for y, x in itertools.product(tops, lefts)]
    few = max(1, 2 ** 21 // image[windows[0]][0, 0].numel())    # go through the network together
    for some in (windows[a:a + few] for a in range(0, len(windows), few)):
        output = model(torch.cat([image[window] for window in some]))
        logits = torch.stack((output.fine, output.coarse), 1).float()       # [few, 2, N, window]
        if total is None:
            total = logits.new_zeros(*logits.shape[1:3], *count.shape)      # [2, N, h, w]
        for window, part in zip(some, logits):
            total[window] += part
            count[window] += 1
    return total / count


@torch.inference_mode()
def segment(model: nn.Module, image: Tensor, args) -> Tensor:
    """Class probabilities of the fine and the coarse map [2, N, h, w] of a normalised image [3, h, w], a mean
    over the scales and the mirrored images."""
    h, w = image.shape[1:]
    total = 0
    for scale in args.scales:
        size = max(1, round(h * scale)), max(1, round(w * scale))
        scaled = image[None]                                    # [1, 3, h, w]
        if scale != 1:
            scaled = interpolate(scaled, size, mode="bilinear", antialias=True)     # [1, 3, *size]
        for mirrored in ((False, True) if args.flip else (False,)):
            logits = slide(model, scaled.flip(3) if mirrored else scaled, args.crop)    # [2, N, *size]
            logits = logits.flip(3) if mirrored else logits
            total = total + interpolate(logits, (h, w), mode="bilinear").softmax(1)     # over the classes
    return total / (len(args.scales) * (2 if args.flip else 1))


def confusion(label: Tensor, prediction: Tensor, N: int) -> Tensor:
    """[N, N] int64: pixels by label (row) and prediction (column); an ignored label counts nowhere."""
    valid = label != 255
    return (label[valid].long() * N + prediction[valid]).bincount(minlength=N * N).view(N, N)


def iou(matrix: Tensor) -> Tensor:
    """[N]: the intersection over the union of each class; NaN for a class neither labelled nor predicted."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


@torch.inference_mode()
def evaluate(model: nn.Module, data, args, rank: int, world: int, device: torch.device,
             split: str = "val", predictions: Path | None = None) -> dict:
    """mIoU of both maps, every image once, on one process. `predictions`: where Cityscapes' label ids go."""
    model.eval()
    N = len(data.classes)
    matrix = torch.zeros(2, N, N, dtype=torch.int64, device=device)
    mine = range(rank, len(data), world)
    loader = DataLoader(Subset(data, mine), batch_size=None, num_workers=args.workers)
    for (image, label), i in zip(tqdm(loader, "evaluation", disable=rank > 0, **BAR), mine):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            scores = segment(model, normalize(image).to(device), args)      # [2, N, h, w]
        fine, coarse = scores.argmax(1)                         # [h, w] each
        for k, prediction in enumerate((fine, coarse)):
            matrix[k] += confusion(label.to(device), prediction, N)
        if predictions:
            ids = Image.fromarray(cityscapes_label_ids(fine).numpy())
            ids.save(predictions / f"{data.name(i)}.png")
    if world > 1:
        dist.all_reduce(matrix)
    matrix = matrix.cpu()
    fine, coarse = map(iou, matrix)                             # [N] each
    seen = " (trained on)" if args.split == "trainval" and split != "test" else ""
    protocol = (f"{args.data} {split}{seen}, {len(data)} images, {N} classes; windows of {args.crop}, stride "
                f"{math.ceil(args.crop * 2 / 3)}; scales {' '.join(f'{scale:g}' for scale in args.scales)}"
                f"{', mirrored too' if args.flip else ''}; classes without a pixel left out of the mean")
    def plain(x):       # JSON has no NaN
        return None if x.isnan() else x.item()
    classes = {name: dict(fine=plain(f), coarse=plain(c)) for name, f, c in zip(data.classes, fine, coarse)}
    return dict(fine_miou=plain(fine.nanmean()), coarse_miou=plain(coarse.nanmean()), data=args.data,
                context=args.context, backbone=args.backbone, protocol=protocol, pixels=int(matrix[0].sum()),
                classes=classes)


def report(result: dict) -> None:
    rows = [("IoU in %", dict(fine="fine", coarse="coarse")), *result["classes"].items(),
            ("mean", dict(fine=result["fine_miou"], coarse=result["coarse_miou"]))]
    width = max(len(name) for name, _ in rows)
    for name, row in rows:
        cells = (x if isinstance(x, str) else "-" if x is None else f"{100 * x:.1f}" for x in row.values())
        print(f"{name:{width}}", *(f"{cell:>7}" for cell in cells))
    print(result["protocol"], flush=True)


def evaluate_checkpoint(args, rank: int, world: int, device: torch.device) -> None:
    path = Path(args.eval)
    checkpoint = read_checkpoint(path)
    known, split = checkpoint["args"], args.split or "val"
    args.split = None                               # from here on, what the training used
    if args.data not in (None, known["data"]):      # then the folder is another, too
        known = {key: value for key, value in known.items() if key not in (*DATA, "split")}
    settle(args, known, path, MODEL)
    data = load(args.data, args.root, split, num_classes=args.num_classes)
    model = build(args, len(data.classes)).to(device)
    restore(model, checkpoint, path, data.classes)
    if all(label is None for _, label in getattr(data, "files", [(0, 0)])) and (args.data, split) != ("cityscapes", "test"):
        sys.exit(f"{split} has no labels to score with: use --predict for its pictures")
    out = Path(args.out or path.parent)
    unlabelled = args.data == "cityscapes" and split == "test"
    predictions = out / "cityscapes-test" if unlabelled else None
    (predictions or out).mkdir(parents=True, exist_ok=True)
    result = evaluate(model, data, args, rank, world, device, split, predictions)
    if rank == 0 and unlabelled:
        print(f"{len(data)} label maps for the Cityscapes server in {predictions}")
    elif rank == 0:
        report(result)
        write_json(out / f"eval-{split}.json", dict(result, steps=checkpoint["step"]))


def predict(args, rank: int, world: int, device: torch.device) -> None:
    path, *given = map(Path, args.predict)
    pictures = [x for p in given for x in (sorted(f for f in p.iterdir() if f.suffix.lower() in PICTURES) if p.is_dir() else [p])]
    checkpoint = read_checkpoint(path)
    settle(args, checkpoint["args"], path, MODEL)
    if len({picture.stem for picture in pictures}) < len(pictures):
        sys.exit("--predict: two pictures have the same name, and so would their results")
    model = build(args, len(checkpoint["classes"])).to(device).eval()
    restore(model, checkpoint, path, checkpoint["classes"])
    out = Path(args.out or path.parent / "predictions")
    out.mkdir(parents=True, exist_ok=True)
    palette = [tuple(colour) for colour in checkpoint["palette"]]
    bad = 0
    for picture in pictures[rank::world]:
        try:
            image = read_image(picture)                         # [3, h, w]
            for name in ("mask", "overlay"):
                spare(out / f"{picture.stem}_{name}.png")
        except DataError as error:                              # the others go on
            print(error, file=sys.stderr, flush=True)
            bad += 1
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            label = segment(model, normalize(image).to(device), args)[0].argmax(0).cpu()    # [h, w]
        found = label.unique()
        masks = label == found[:, None, None]                   # [found, h, w]
        overlay = draw_segmentation_masks(image, masks, alpha=0.6, colors=[palette[n] for n in found])
        mask = Image.fromarray(label.byte().numpy())            # the numbers are the ids,
        mask.putpalette([x for colour in palette for x in colour])      # and viewers show the colours
        for name, result in (("mask", mask), ("overlay", as_picture(overlay))):
            result.save(out / f"{picture.stem}_{name}.png", pnginfo=OURS)
            print(out / f"{picture.stem}_{name}.png", flush=True)
    if bad:
        sys.exit(f"{bad} of {len(pictures[rank::world])} pictures could not be segmented")


OURS = PngImagePlugin.PngInfo()
OURS.add_text("Software", "RANet train.py")


def spare(path: Path) -> None:
    """A prediction replaces a prediction, and nothing else."""
    if path.exists():
        try:
            ours = Image.open(path).info.get("Software") == "RANet train.py"
        except OSError:
            ours = False
        if not ours:
            raise DataError(f"{path} was not made by --predict and is not replaced: choose another --out")


def as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


# ---------------------------------------------------------------------------------------------------------
# A picture of what the network does, as in the paper's Figure 5
# ---------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def draw_overview(model: nn.Module, data, args, device: torch.device, path: Path) -> None:
    """Image, label, B, regions with their representatives, coarse and fine result of four images."""
    model.eval()
    rows = []
    for i in sorted({min(i * len(data) // 4 + i, len(data) - 1) for i in range(4)}):
        image, label = data[i]
        image, label = middle(image, args.crop), middle(label, args.crop)
        output = model(normalize(image)[None].to(device))
        B = (255 * output.boundary[0].float().sigmoid()).byte().cpu().expand(3, -1, -1)     # [3, H, W]
        row = {"image": tile(image), "label": tile(colorize(label, data.palette)), "boundary B": tile(B)}
        if output.regions is not None:
            labels, J = output.regions
            row["regions, representatives"] = draw_regions(labels[0], J[0], args.k)
        for name, logits in (("coarse result C", output.coarse), ("fine result", output.fine)):
            row[name] = tile(colorize(logits[0].argmax(0), data.palette))
        rows.append(row)
    gap, top = 8, 30
    picture = Image.new("RGB", (gap + len(rows[0]) * (TILE + gap), top + len(rows) * (TILE + gap)), "white")
    pen = ImageDraw.Draw(picture)
    for j, name in enumerate(rows[0]):
        left = gap + j * (TILE + gap)
        pen.text((left + TILE / 2, top / 2), name, "black", ImageFont.load_default(15), anchor="mm")
        for i, row in enumerate(rows):
            picture.paste(row[name], (left, top + i * (TILE + gap)))
    picture.save(path)


TILE = 192      # pixels a side of each small picture


def middle(image: Tensor, crop: int) -> Tensor:
    """The middle square, of the crop's side at most, of [..., h, w]."""
    side = min(*image.shape[-2:], crop)
    y, x = ((size - side) // 2 for size in image.shape[-2:])
    return image[..., y:y + side, x:x + side]                   # [..., side, side]


def tile(image: Tensor, side: int = TILE) -> Image.Image:
    """uint8 [3, h, w] as a picture of side x side; pixels stay sharp."""
    return as_picture(image).resize((side, side), Image.Resampling.NEAREST)


def draw_regions(labels: Tensor, J: Tensor, K: int) -> Image.Image:
    """Regions in arbitrary colours, their representatives as dots; regions of one pixel in grey."""
    H, W = labels.shape
    labels, J = labels.flatten().cpu(), J.flatten().cpu()       # [HW] each
    size = labels.bincount()                                    # [Q]
    hues = ((size > 1).cumsum(0) * 0.618).frac().tolist()       # [Q]  the golden ratio keeps neighbours apart
    colours = torch.tensor([colorsys.hsv_to_rgb(hue, 0.6, 0.95) for hue in hues])   # [Q, 3]
    colours[size == 1] = 0.3
    picture = tile((255 * colours[labels]).byte().T.reshape(3, H, W))
    pen = ImageDraw.Draw(picture)
    reps = ranet.select_representatives(J, labels, K)      # [P]
    for p in reps[size[labels[reps]] > 1].tolist():
        y, x = (p // W + 0.5) * TILE / H, (p % W + 0.5) * TILE / W
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), "white", "black")
    return picture


# ---------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------

def whole(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def natural(text: str) -> int:
    if not 0 <= int(text) < 2 ** 18:
        raise ValueError
    return int(text)


def positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(
        "Train, resume and evaluate RANet, or segment pictures. Defaults in brackets."))
    parser.error = sys.exit         # one line, as for every other mistake
    yes = dict(action="store_true", default=None)       # None: not given
    add = parser.add_argument_group("what to do (without the first two: train)").add_argument
    add("--eval", metavar="CHECKPOINT", help="mIoU; on Cityscapes' test split, label maps for its server")
    add("--predict", nargs="+", metavar=("CHECKPOINT", "IMAGE"), help="masks (8 bits, the numbers are the ids) and overlays of pictures and folders")
    add("--resume", **yes, help="continue the run in --out, or start it if it has no checkpoint yet")
    add("--out", help="folder of results (runs/DATA-CONTEXT; beside the checkpoint for --eval, --predict)")
    add("--gpus", type=natural, help="one process for each of so many GPUs of this machine (one process)")
    add("--workers", type=natural, default=2, help="processes that load data, for each GPU (2)")
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=RECIPES, help="data set (shapes, which is generated)")
    add("--root", help="its folder")
    add("--split", help="train or trainval to train on, val or test for --eval (train; val)")
    add("--num-classes", type=int, help="pascal_context only: 59, or 60 with the background (59)")
    add("--coarse", **yes, help="cityscapes only: train on the coarse annotations too")
    add = parser.add_argument_group("model").add_argument
    add("--backbone", help="small, resnet101, hrnet_w48, or a name of timm.list_models() (by data set)")
    add("--weights", help="of the backbone: imagenet, none, or a file (imagenet; none for small)")
    add("--context", choices=("ranet", "none", "spp", "nonlocal"), help="what makes O; Table 1 (ranet)")
    add("--cues", choices=("both", "boundary", "semantic"), help="what parts regions; Table 1 (both)")
    add("--no-intra", **yes, help="without intra-region communication, eqs. 6 and 8")
    add("--no-inter", **yes, help="without inter-region interaction, eq. 7")
    add("--k", type=whole, help="representatives a region (8)")
    add = parser.add_argument_group("training (defaults: the data set's)").add_argument
    add("--steps", type=whole, help="updates in all")
    add("--batch", type=whole, help="images a step, over all processes together")
    add("--crop", type=whole, help="side of the training crop, and of the windows of evaluation")
    add("--scale", type=positive, nargs=2, metavar=("LOW", "HIGH"), help="range of the random resizing")
    add("--lr", type=positive, help="learning rate at the first step; falls to 0 linearly")
    add("--radius", type=positive, help="of the boundary mask, in pixels of the crop")
    add("--seed", type=natural, help="of weights, data order, augmentation and dropout (0)")
    add("--amp", **yes, help="bfloat16 where it is safe")
    add("--compile", **yes, help="torch.compile the backbone; RCB and RIB stay as they are")
    add = parser.add_argument_group("evaluation and prediction").add_argument
    add("--scales", type=positive, nargs="+", help="average the probabilities over these sizes (1)")
    add("--flip", **yes, help="... and over the mirrored images")
    args = parser.parse_args(argv)

    command = "--eval" if args.eval else "--predict" if args.predict else "training"
    useless = {"--eval": ("predict", "resume", "coarse", *TRAINING),
               "--predict": ("resume", "split", *DATA, *TRAINING),
               "training": ("scales", "flip")}[command]
    for key in useless:
        if getattr(args, key) is not None:
            sys.exit(f"{flag(key)} does not go with {command}")
    if args.predict and len(args.predict) == 1:
        sys.exit("--predict: expected a checkpoint and pictures")
    if args.context not in (None, "ranet"):
        for key in ("cues", "k", "no_intra", "no_inter"):
            if getattr(args, key) is not None:
                sys.exit(f"{flag(key)} belongs to --context ranet, not to {args.context}")
    if args.backbone == "small" and args.weights not in (None, "none"):
        sys.exit("--backbone small has no trained weights")
    if args.gpus and "RANK" in os.environ:
        sys.exit("--gpus starts its own processes: leave it out under torchrun")
    if args.gpus and args.gpus > torch.cuda.device_count():
        sys.exit(f"--gpus {args.gpus}: this machine shows {torch.cuda.device_count()} GPUs")
    args.scales = args.scales or [1.0]
    return args


def one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
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
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                sys.exit(f"process {local} of this machine has no GPU: it shows {torch.cuda.device_count()}")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        run = evaluate_checkpoint if args.eval else predict if args.predict else train
        run(args, rank, world, device)
    except KeyboardInterrupt:
        sys.exit("stopped; a training goes on from its last checkpoint with --resume")
    except (SystemExit, ValueError, OSError) as error:      # a mistake in flags or data, not in the code
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            raise                       # --help
        if store and store.add("failed", 1) > 1:
            sys.exit(1)                 # another process has said it
        message = str(error)
        if "DataLoader worker" in message:      # the worker's whole traceback, whose last line says it
            message = message.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(message)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
