# SPDX-License-Identifier: MIT
"""Trains, resumes and evaluates RANet, and segments your own pictures.

    python train.py                                                      generated shapes, minutes on a CPU
    python train.py --data cityscapes --root DIR                         one GPU, or the CPU without one
    python train.py --data cityscapes --root DIR --gpus 8                8 GPUs of this machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train.py --data cityscapes --root DIR --batch 16                 2 machines, the same line on both
    python train.py --out runs/shapes-ranet --resume                     a run that was stopped goes on
    python train.py --eval runs/cityscapes-ranet/last.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
    python train.py --predict runs/cityscapes-ranet/last.pt a.jpg photos/    a_mask.png, a_overlay.png, ...

A run writes into --out, a folder that all machines share: log.jsonl (a line every few steps), last.pt (the
checkpoint), and at its end metrics.json and overview.png. In a log line `regions` is Q, `singles` the share
of pixels that are a region of their own, `mean_B` and `mean_J` the means of B and J: a run has collapsed
where regions stays at 1 or singles goes to 1. Rn in a comment is a section of docs/differences.md.
"""
import argparse
import io
import itertools
import json
import math
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention
from torch.utils.data import DataLoader, Subset
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.v2.functional import center_crop, resize, to_pil_image
from torchvision.utils import draw_keypoints, draw_segmentation_masks, make_grid
from tqdm import tqdm

import ranet
from data import (
    PICTURES,
    DataError,
    Look,
    TrainingSet,
    cityscapes_label_ids,
    colorize,
    distinct_colours,
    load,
    normalize,
    read_image,
)

# The paper's values for its three data sets, and the field's where it is silent (R12).
PAPER = {"root": None, "split": "train", "backbone": "resnet101", "weights": None, "strides": None, "channels": None,
         "context": "ranet", "k": 8, "steps": 60000, "batch": 8, "crop": 520, "scale": [0.5, 2.0], "lr": 0.001,
         "weight_decay": 1e-4, "radius": 2.0, "seed": 0, "amp": False, "compile": False}
RECIPES = {
    "shapes": {**PAPER, "backbone": "small", "steps": 400, "crop": 72, "scale": [1.0, 1.0], "lr": 0.1, "radius": 1.0},
    "cityscapes": {**PAPER, "steps": 40000, "crop": 769, "scale": [0.7, 2.1], "weight_decay": 5e-4},
    "pascal_context": PAPER, "pascal_context60": PAPER, "coco_stuff": PAPER,
    "folder": {**PAPER, "steps": 10000, "crop": 320},
}
SETTINGS = "data", *PAPER                               # what a checkpoint remembers
MODEL = "backbone", "strides", "channels", "context", "k"       # what its weights fit
BAR = {"dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 30}      # in a file, a line now and then


# ---------------------------------------------------------------------------------------------------------
# Backbones, and what Table 1 compares with
# ---------------------------------------------------------------------------------------------------------

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


def make_backbone(name: str, weights: str = "none", strides: Sequence[int] | None = None) -> tuple[nn.Module, int]:
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
            # timm skips what the file does not hold; that is equal, as the same numbers were drawn twice.
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
    channels = sum(backbone.channels)
    if hrnet:               # the paper's second model, as far as its one line says
        return nn.Sequential(backbone, ASPP(channels, (12, 24, 36), 512)), 512
    return backbone, channels


class NoContext(nn.Module):
    """O = 0: the backbone and its heads without context."""

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


PEERS = {"none": lambda M: NoContext(), "spp": PyramidPooling, "nonlocal": NonLocal}
RANETS = {"ranet": {}, "boundary": {"cues": "boundary"}, "semantic": {"cues": "semantic"},
          "no-intra": {"intra": False}, "no-inter": {"inter": False}}     # (R10)


def build(args, num_classes: int, weights: str = "none") -> ranet.RANet:
    backbone, in_channels = make_backbone(args.backbone, weights, args.strides)
    M = args.channels or (64 if args.backbone == "small" else 512)
    context = ({"context": PEERS[args.context](M)} if args.context in PEERS else
               dict(representatives=args.k, **RANETS[args.context]))
    return ranet.RANet(backbone, in_channels, num_classes, M, **context)


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
    for now in range(step, args.steps):
        batch = []
        for slot in range(rank, args.batch, world):
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


def region_statistics(regions: ranet.Regions, boundary: Tensor) -> list[float]:
    """Q, the share of single-pixel regions in the map, and the means of B and J, over all images (R14)."""
    sizes = [image.flatten().bincount() for image in regions.labels]
    Q = sum(len(size) for size in sizes) / len(sizes)
    singles = sum((size == 1).sum().item() for size in sizes) / regions.labels.numel()
    return [Q, singles, boundary.sigmoid().mean().item(), regions.J.mean().item()]


def look(split: str, data, workers: int) -> None:
    """Every picture and label is read once before the first step: what is wrong or missing is said now."""
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
        print(f"{split}: no pixel of {len(missing)} of {len(data.classes)} classes: {', '.join(missing[:5])}",
              flush=True)


def train(args, rank: int, world: int, device: torch.device) -> None:
    out = Path(args.out)
    last, log, saved = out / "last.pt", out / "log.jsonl", args.saved
    if saved and not args.resume:
        sys.exit(f"{out} holds a run at step {saved['step']} of {saved['args']['steps']}: "
                 "continue it with --resume, or choose another --out")
    if args.batch % world:
        sys.exit(f"--batch {args.batch} does not split over {world} processes")
    if not args.split.startswith("train"):
        sys.exit(f"--split {args.split}: training takes train, trainval, or these with +coarse")
    data, val = load(args.data, args.root, args.split), load(args.data, args.root, "val")
    if rank == 0 and not saved:
        look(args.split, data, args.workers)
        look("val", val, args.workers)
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
        model.backbone.compile()    # not the rest: the shapes within RCB and RIB hang on the data
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
                         batch_sampler=order(len(data), args, start, rank, world), pin_memory=device.type == "cuda")
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
                # DDP averages the gradients. With one count for all processes, every labelled pixel weighs
                # the same, whichever process holds it.
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
                    numbers = torch.tensor(region_statistics(output.regions, output.boundary), device=device)
                    line.update(zip(("regions", "singles", "mean_B", "mean_J"), mean(numbers, world).tolist()))
                if rank == 0:
                    with open(log, "a") as file:
                        file.write(json.dumps(line) + "\n")
            if rank == 0 and (done % save_every == 0 or done == args.steps):
                save(last, {
                    "step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "args": {key: getattr(args, key) for key in SETTINGS},
                    "classes": list(data.classes), "palette": [list(colour) for colour in data.palette]})
    except (KeyboardInterrupt, ValueError, OSError) as error:
        kept = f"{last} is whole, and --resume goes on from it" if last.exists() else "there is no checkpoint yet"
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
        sys.exit(f"training stopped at step {step}: {reason}; {kept}")
    finally:
        bar.close()

    if world > 1:       # without SyncBatchNorm, every process has running statistics of its own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    result = evaluate(model, val, "val", args.split, args, rank, world, device)
    if rank == 0:
        report(result)
        result = dict(result, steps=args.steps, seed=args.seed)
        (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
        draw_overview(model, val, args, device, out / "overview.png")


# ---------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------

def save(path: Path, checkpoint: dict) -> None:
    """A kill or a full disk at any moment leaves the previous checkpoint whole."""
    if not all(x.isfinite().all() for x in checkpoint["model"].values() if x.is_floating_point()):
        raise ValueError("weights that are not finite")
    whole, new = io.BytesIO(), path.with_name(path.name + ".tmp")
    torch.save(checkpoint, whole)       # not into the file: torch hides what the disk says
    try:
        with open(new, "wb") as file:
            file.write(whole.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(f"the checkpoint could not be written ({one_line(error)})") from None


def read_checkpoint(path: str | Path) -> dict:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"{path}: no such file")
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError):
        sys.exit(f"{path} cannot be read as a checkpoint")
    if not isinstance(checkpoint, dict) or not {"args", "step", "model", "classes"} <= checkpoint.keys():
        sys.exit(f"{path} is no checkpoint of train.py")
    return checkpoint


def restore(model: nn.Module, checkpoint: dict, path: str | Path, classes: Sequence[str]) -> None:
    for n, (trained, here) in enumerate(itertools.zip_longest(checkpoint["classes"], classes)):
        if trained != here:
            sys.exit(f"class {n} is {trained!r} in {path} and {here!r} in the data "
                     f"({len(checkpoint['classes'])} and {len(classes)} classes)")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        sys.exit(f"{path} holds the weights of another model")


def writable(out: Path) -> None:
    """Makes the folder; one that cannot be written to is told before the work."""
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


# ---------------------------------------------------------------------------------------------------------
# Evaluation and prediction
# ---------------------------------------------------------------------------------------------------------

def slide(model: nn.Module, image: Tensor, crop: int, maps: int = 2) -> Tensor:
    """Logits of the fine and, of two maps, the coarse one [maps, N, h, w] of an image [1, 3, h, w], by windows of
    the training crop two thirds of it apart; a mean where they overlap. Windows shrink to a smaller image."""
    tops, lefts = (sorted({min(x, max(size - crop, 0)) for x in range(0, max(size, crop), math.ceil(crop * 2 / 3))})
                   for size in image.shape[2:])
    windows = [(..., slice(y, y + crop), slice(x, x + crop)) for y, x in itertools.product(tops, lefts)]
    few = max(1, 2 ** 19 // image[windows[0]][0, 0].numel())    # go through the network together
    total, count = None, image.new_zeros(image.shape[2:])       # [h, w]
    for some in (windows[a:a + few] for a in range(0, len(windows), few)):
        logits = model(torch.cat([image[window] for window in some]))[:maps]    # [few, N, window] each
        if total is None:
            total = image.new_zeros(maps, logits[0].shape[1], *count.shape)     # [maps, N, h, w]
        for window, *parts in zip(some, *logits):
            for sums, part in zip(total, parts):
                sums[window] += part
            count[window] += 1
    return total.div_(count)


@torch.inference_mode()
def segment(model: nn.Module, image: Tensor, args, maps: int = 2) -> Tensor:
    """Class probabilities of the fine and, of two maps, the coarse one [maps, N, h, w] of a normalised image
    [3, h, w], a mean over the scales and the mirrored images. In place: a photo has many pixels."""
    h, w = image.shape[1:]
    total = None
    for scale, mirrored in itertools.product(args.scales, (False, True)[:1 + args.flip]):
        scaled = image[None]                                    # [1, 3, h, w]
        if scale != 1:
            size = max(1, round(h * scale)), max(1, round(w * scale))
            scaled = interpolate(scaled, size, mode="bilinear", antialias=True)     # [1, 3, *size]
        p = slide(model, scaled.flip(3) if mirrored else scaled, args.crop, maps)   # [maps, N, *size]
        p = p.flip(3) if mirrored else p
        p = interpolate(p, (h, w), mode="bilinear") if scale != 1 else p            # [maps, N, h, w]
        p.sub_(p.amax(1, keepdim=True)).exp_()
        p.div_(p.sum(1, keepdim=True))                          # with the line before: softmax over the classes
        total = p if total is None else total.add_(p)
    return total.div_(len(args.scales) * (1 + args.flip))


def confusion(label: Tensor, prediction: Tensor, N: int) -> Tensor:
    """[N, N] int64: pixels by label (row) and prediction (column); an ignored label counts nowhere."""
    valid = label != 255
    return (label[valid].long() * N + prediction[valid]).bincount(minlength=N * N).view(N, N)


def iou(matrix: Tensor) -> Tensor:
    """[N]: the intersection over the union of each class; NaN for a class neither labelled nor predicted."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


@torch.inference_mode()
def evaluate(model: nn.Module, data, split: str, trained: str, args, rank: int, world: int, device: torch.device,
             predictions: Path | None = None) -> dict:
    """mIoU of both maps, every image once, on one process. `predictions`: where Cityscapes' label ids go."""
    model.eval()
    N = len(data.classes)
    matrix = torch.zeros(2, N, N, dtype=torch.int64, device=device)
    mine = range(rank, len(data), world)
    loader = DataLoader(Subset(data, mine), batch_size=None, num_workers=args.workers)
    for i, (image, label) in zip(mine, tqdm(loader, "evaluation", disable=rank > 0, **BAR)):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            fine, coarse = segment(model, normalize(image).to(device), args).argmax(1)      # [h, w] each
        for k, prediction in enumerate((fine, coarse)):
            matrix[k] += confusion(label.to(device), prediction, N)
        if predictions:
            Image.fromarray(cityscapes_label_ids(fine).numpy()).save(predictions / f"{data.name(i)}.png")
    if world > 1:
        dist.all_reduce(matrix)
    scores = torch.stack([iou(x) for x in matrix.cpu()])        # [2, N]
    scores = torch.cat((scores, scores.nanmean(1, keepdim=True)), 1).tolist()       # the mean over classes last
    *classes, means = [[None if math.isnan(x) else x for x in pair] for pair in zip(*scores)]     # JSON has no NaN
    seen = " (trained on)" if trained.startswith("trainval") and split != "test" else ""
    protocol = (f"{args.data} {split}{seen}, {len(data)} images, {N} classes; windows of {args.crop}, stride "
                f"{math.ceil(args.crop * 2 / 3)}; scales {' '.join(f'{scale:g}' for scale in args.scales)}"
                f"{', mirrored too' if args.flip else ''}; classes without a pixel left out of the mean")
    return {"fine_miou": means[0], "coarse_miou": means[1], "data": args.data, "context": args.context,
                "backbone": args.backbone, "protocol": protocol, "pixels": int(matrix[0].sum()),
                "classes": {name: {"fine": f, "coarse": c} for name, (f, c) in zip(data.classes, classes)}}


def report(result: dict) -> None:
    rows = {**result["classes"], "mean": {"fine": result["fine_miou"], "coarse": result["coarse_miou"]}}
    width = max(map(len, [*rows, "IoU in %"]))
    print(f"{'IoU in %':{width}}    fine  coarse")
    for name, row in rows.items():
        print(f"{name:{width}}", *("      -" if x is None else f"{100 * x:7.1f}" for x in row.values()))
    print(result["protocol"], flush=True)


def evaluate_checkpoint(args, rank: int, world: int, device: torch.device) -> None:
    data, out = load(args.data, args.root, args.split), Path(args.out)
    trained = args.saved["args"]["split"] if args.data == args.saved["args"]["data"] else ""
    unlabelled = all(label is None for _, label in getattr(data, "files", [(0, 0)]))
    if unlabelled and args.data != "cityscapes":
        sys.exit(f"{args.split} has no labels to score with: use --predict for its pictures")
    model = build(args, len(data.classes)).to(device)
    restore(model, args.saved, args.eval, data.classes)
    predictions = out / "cityscapes-test" if unlabelled else None
    writable(predictions or out)
    result = evaluate(model, data, args.split, trained, args, rank, world, device, predictions)
    if rank == 0 and unlabelled:
        print(f"{len(data)} label maps for the Cityscapes server in {predictions}")
    elif rank == 0:
        report(result)
        result = dict(result, steps=args.saved["step"])
        (out / f"eval-{args.split}.json").write_text(json.dumps(result, indent=1) + "\n")


MAKER, OURS = "RANet train.py", PngImagePlugin.PngInfo()
OURS.add_text("Software", MAKER)                # such a file may be replaced, others not


def predict(args, rank: int, world: int, device: torch.device) -> None:
    given = [Path(x) for x in args.predict[1:]]
    pictures = [x for p in given for x in (sorted(p.iterdir()) if p.is_dir() else [p])
                if x in given or x.suffix.lower() in PICTURES]
    if len({picture.stem for picture in pictures}) < len(pictures):
        sys.exit("--predict: two pictures have the same name, and so would their results")
    classes, palette = args.saved["classes"], [tuple(colour) for colour in args.saved["palette"]]
    model = build(args, len(classes)).to(device).eval()
    restore(model, args.saved, args.predict[0], classes)
    writable(Path(args.out))
    bad, mine = 0, pictures[rank::world]
    for picture in mine:
        targets = [Path(args.out) / f"{picture.stem}_{kind}.png" for kind in ("mask", "overlay")]
        try:
            image = read_image(picture)                         # [3, h, w]
            for target in targets:
                if target.exists() and Image.open(target).info.get("Software") != MAKER:
                    raise DataError(f"{target} was not made by --predict and is not replaced: choose another --out")
        except (DataError, OSError) as error:                   # the others go on
            print(error, file=sys.stderr, flush=True)
            bad += 1
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            label = segment(model, normalize(image).to(device), args, maps=1)[0].argmax(0).cpu()    # [h, w]
        mask = Image.fromarray(label.byte().numpy())            # the numbers are the ids,
        mask.putpalette([x for colour in palette for x in colour])      # and viewers show the colours
        found = label.unique()
        overlay = draw_segmentation_masks(image, label == found[:, None, None], 0.6, [palette[n] for n in found])
        for target, result in zip(targets, (mask, to_pil_image(overlay))):
            result.save(target, pnginfo=OURS)
            print(target, flush=True)
    if bad:
        sys.exit(f"{bad} of {len(mine)} pictures could not be segmented")


# ---------------------------------------------------------------------------------------------------------
# A picture of what the network does, as in the paper's Figure 5
# ---------------------------------------------------------------------------------------------------------

TILE = 192      # pixels a side of each small picture


def tile(image: Tensor) -> Tensor:
    """uint8 [3, h, w] as [3, TILE, TILE]; pixels stay sharp."""
    return resize(image.cpu(), [TILE, TILE], 0)                 # 0: nearest


def draw_regions(labels: Tensor, J: Tensor, K: int) -> Tensor:
    """uint8 [3, TILE, TILE]: regions [H, W] in arbitrary colours, their representatives as white dots."""
    H, W = labels.shape
    picture = tile(colorize(labels % 255, distinct_colours(255)))
    reps = ranet.select_representatives(J.flatten(), labels.flatten(), K).cpu()     # [P]
    places = torch.stack(((reps % W + 0.5) * TILE / W, (reps // W + 0.5) * TILE / H), 1)[None]      # [1, P, 2]
    for colour, radius in (("black", 3), ("white", 2)):
        picture = draw_keypoints(picture, places, colors=colour, radius=radius)
    return picture


@torch.inference_mode()
def draw_overview(model: nn.Module, data, args, device: torch.device, path: Path) -> None:
    """A row for each of four images: image, label, B, regions with representatives, coarse and fine result."""
    tiles = []
    for i in sorted({min(i * len(data) // 4 + i, len(data) - 1) for i in range(4)}):
        image, label = (center_crop(x, [min(*x.shape[-2:], args.crop)]) for x in data[i])
        output = model(normalize(image)[None].to(device))
        B = (255 * output.boundary.float().sigmoid()).byte().expand(3, -1, -1)      # [3, H, W]
        row = [image, colorize(label, data.palette), B]
        row += [colorize(x[0].argmax(0), data.palette) for x in (output.coarse, output.fine)]
        row = [tile(x) for x in row]
        if output.regions is not None:
            row.insert(3, draw_regions(output.regions.labels[0], output.regions.J[0], args.k))
        tiles += row
    to_pil_image(make_grid(tiles, len(row), padding=8, pad_value=255)).save(path)


# ---------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------

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
    add = first.add_argument
    add("--eval", metavar="CHECKPOINT", help="mIoU; on Cityscapes' test split, label maps for its server")
    add("--predict", nargs="+", metavar=("CHECKPOINT", "IMAGE"),
        help="masks (8 bits, the numbers are the ids) and overlays of pictures and folders")
    add("--resume", **yes, help="continue the run in --out, or start it if it has no checkpoint yet")
    add("--out", help="folder of results (runs/DATA-CONTEXT; beside the checkpoint for --eval, --predict)")
    add("--data", choices=RECIPES, help="data set (shapes, which is generated)")
    add("--context", choices=(*RANETS, *PEERS), help="what makes O: the rows of Table 1 and of section 5.1 (ranet)")
    args, _ = first.parse_known_args(argv)
    command = "--eval" if args.eval else "--predict" if args.predict else "training"
    path = args.eval or args.predict and args.predict[0]
    out = Path(path).parent if path else Path(args.out or f"runs/{args.data or 'shapes'}-{args.context or 'ranet'}")
    path = path or out / "last.pt"
    saved = read_checkpoint(path) if command != "training" or path.exists() else None
    known = saved["args"] if saved and (command != "training" or args.resume) else {}
    defaults = {**RECIPES[args.data or known.get("data", "shapes")], "data": "shapes", **known}
    if args.data not in (None, known.get("data")):      # an evaluation on other data
        defaults["root"] = None
    if command == "--eval":
        defaults["split"] = "val"

    parser = argparse.ArgumentParser(parents=[first], allow_abbrev=False, description=(
        "Train, resume and evaluate RANet, or segment pictures. Defaults in brackets."))
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
    if (args.context or defaults["context"]) in RANETS:
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

    fixed = () if not known else SETTINGS if command == "training" else MODEL
    for key in fixed:
        if getattr(args, key) != known.get(key) and key != "root":
            sys.exit(f"--{key} {getattr(args, key)} contradicts {path}, which was trained with {known.get(key)}")
    if args.predict and (len(args.predict) == 1 or args.resume or args.eval or args.data != known["data"]):
        sys.exit("--predict: expected a checkpoint and pictures, and no --resume, --eval or --data")
    if args.gpus and "RANK" in os.environ:
        sys.exit("--gpus starts its own processes: leave it out under torchrun")
    if args.gpus and args.gpus > torch.cuda.device_count():
        sys.exit(f"--gpus {args.gpus}: this machine shows {torch.cuda.device_count()} GPUs")
    if args.backbone == "small" and args.weights not in (None, "none"):
        sys.exit("--backbone small has no trained weights")
    args.weights = args.weights or ("none" if args.backbone == "small" else "imagenet")
    args.out = args.out or str(out / ("predictions" if args.predict else ""))
    args.saved, args.run = saved, evaluate_checkpoint if args.eval else predict if args.predict else train
    return args


def one_line(error: BaseException) -> str:
    if "DataLoader worker" in str(error) and "Traceback" in str(error):     # a worker's, whose last line says it
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    if "shared memory" in str(error):
        return "this machine has too little shared memory for workers: raise it, or use --workers 0"
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


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
        args.run(args, rank, world, device)
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
    main()
