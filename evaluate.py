# SPDX-License-Identifier: MIT
"""Scores a checkpoint of train.py, or segments your own pictures with it.

    python evaluate.py runs/cityscapes-ranet/last.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
    python evaluate.py runs/cityscapes-ranet/last.pt --split test       label maps for Cityscapes' server
    python evaluate.py runs/cityscapes-ranet/last.pt a.jpg photos/      a_mask.png, a_overlay.png, ...
    python evaluate.py runs/cityscapes-ranet/last.pt a.jpg --regions    a_regions.png, too: how it came about

On n GPUs with --gpus n, or with torchrun as train.py. Each process handles its share of the images.
"""
import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2.functional import center_crop, resize, to_pil_image
from torchvision.utils import draw_keypoints, draw_segmentation_masks, make_grid
from tqdm import tqdm

import ranet
from data import PICTURES, DataError, Files, cityscapes_label_ids, colorize, distinct_colours, load, look, normalize, \
    read_image
from launch import BAR, Where, flags, launch, number, one_line, writable
from models import PEERS, read, restore

# --- Scores ----------------------------------------------------------------------------------------------

class How(NamedTuple):
    """How a picture is segmented: in windows of `crop`, as a mean over `scales` and, with flip, mirrored images."""
    crop: int
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    amp: bool = False


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
def segment(model: nn.Module, image: Tensor, how: How, device: torch.device, maps: int = 2) -> Tensor:
    """Class probabilities of the fine and, of two maps, the coarse one [maps, N, h, w] of an image uint8 [3, h, w].
    In place: a photo has many pixels."""
    h, w = image.shape[1:]
    image, total = normalize(image).to(device), None
    for scale, mirrored in itertools.product(how.scales, (False, True)[:1 + how.flip]):
        scaled = image[None]                                    # [1, 3, h, w]
        if scale != 1:
            size = max(1, round(h * scale)), max(1, round(w * scale))
            scaled = interpolate(scaled, size, mode="bilinear", antialias=True)     # [1, 3, *size]
        with torch.autocast(device.type, torch.bfloat16, enabled=how.amp):
            p = slide(model, scaled.flip(3) if mirrored else scaled, how.crop, maps)    # [maps, N, *size]
        p = p.flip(3) if mirrored else p
        p = interpolate(p, (h, w), mode="bilinear") if scale != 1 else p            # [maps, N, h, w]
        p.sub_(p.amax(1, keepdim=True)).exp_()
        p.div_(p.sum(1, keepdim=True))                          # with the line before: softmax over the classes
        total = p if total is None else total.add_(p)
    return total.div_(len(how.scales) * (1 + how.flip))


def confusion(label: Tensor, prediction: Tensor, N: int) -> Tensor:
    """[N, N] int64: pixels by label (row) and prediction (column); an ignored label counts nowhere."""
    valid = label != 255
    return (label[valid].long() * N + prediction[valid]).bincount(minlength=N * N).view(N, N)


def iou(matrix: Tensor) -> Tensor:
    """[N]: the intersection over the union of each class; NaN for a class neither labelled nor predicted."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


@torch.inference_mode()
def evaluate(model: nn.Module, data, how: How, where: Where, label_maps: Path | None = None) -> dict:
    """IoU of both maps, each image segmented once, by one of the processes. label_maps: where Cityscapes' ids go."""
    model.eval()
    N = len(data.classes)
    matrices = torch.zeros(2, N, N, dtype=torch.int64, device=where.device)
    mine = range(where.rank, len(data), where.world)
    loader = DataLoader(Subset(data, mine), batch_size=None, num_workers=where.workers)
    for i, (image, label) in zip(mine, tqdm(loader, "evaluation", disable=where.rank > 0, **BAR)):
        predictions = segment(model, image, how, where.device).argmax(1)        # [2, h, w]
        matrices += torch.stack([confusion(label.to(where.device), x, N) for x in predictions])
        if label_maps:
            Image.fromarray(cityscapes_label_ids(predictions[0]).numpy()).save(label_maps / f"{data.name(i)}.png")
    if where.world > 1:
        dist.all_reduce(matrices)
    fine, coarse = (iou(matrix) for matrix in matrices.cpu())   # [N] each
    def finite(x):                                              # JSON has no NaN
        return None if x.isnan() else x.item()
    return {"fine_miou": finite(fine.nanmean()), "coarse_miou": finite(coarse.nanmean()),
            "pixels": int(matrices[0].sum()), "classes": {
                name: {"fine": finite(f), "coarse": finite(c)} for name, f, c in zip(data.classes, fine, coarse)}}


def survey(split: str, data, where: Where) -> None:
    """Looks at all pictures and labels of a data set in files; says which classes are missing."""
    if not isinstance(data, Files):
        return
    mine, bar = range(where.rank, len(data), where.world), {"desc": f"looking at the labels of {split}", **BAR}
    pixels = look(data, mine, where.workers, disable=where.rank > 0, **bar).to(where.device)     # [256]
    if where.world > 1:
        dist.all_reduce(pixels)
    missing = [name for name, count in zip(data.classes, pixels) if not count]
    nothing, ignored = len(missing) == len(data.classes), pixels[255].item() / pixels.sum().item()
    if nothing and split.startswith("train"):
        sys.exit(f"{split}: nothing is labelled in its {len(data)} images")
    if missing and where.rank == 0:
        print(f"{split}: no pixel of {len(missing)} of {len(data.classes)} classes ({', '.join(missing[:5])})"
              f"{', so there will be no score' * nothing}"
              f"{f'; {ignored:.0%} of the pixels are 255, ignored: a class needs its number there' * (ignored > 0)}")


def report(result: dict, settings: argparse.Namespace, data, name: str, split: str, how: How, path: Path, **more):
    """Prints and writes what `evaluate` found on a split of a data set, for a network trained with `settings`."""
    seen = name == settings.data and (split.startswith("train") or split in settings.split)
    protocol = (f"{name} {split}{' (trained on)' * seen}, {len(data)} images, {len(data.classes)} classes; windows of "
                f"{how.crop}, stride {math.ceil(how.crop * 2 / 3)}; scales {' '.join(f'{x:g}' for x in how.scales)}"
                f"{', mirrored too' * how.flip}; classes without a pixel left out of the mean")
    result = {"data": name, "context": settings.context, "backbone": settings.backbone, "protocol": protocol, **more,
              **result}
    path.write_text(json.dumps(result, indent=1) + "\n")
    rows = {**result["classes"], "mean": {"fine": result["fine_miou"], "coarse": result["coarse_miou"]}}
    width = max(map(len, [*rows, "IoU in %"]))
    print(f"{'IoU in %':{width}}    fine  coarse")
    for row, found in rows.items():
        print(f"{row:{width}}", *("      -" if x is None else f"{100 * x:7.1f}" for x in found.values()))
    print(protocol)


def score(args: argparse.Namespace, where: Where) -> None:
    """Prints the scores of a checkpoint and writes them, or the label maps of a split without labels."""
    data, trained = load(args.data, args.root, args.split), args.settings
    if not data.labelled and args.data != "cityscapes":
        sys.exit(f"{args.split} has no labels to score with; to segment it, name its folder of images instead")
    model = restore(args.saved, args.checkpoint, data.classes).to(where.device)
    label_maps = None if data.labelled else args.out / "cityscapes-test"
    writable(label_maps or args.out)
    survey(args.split, data, where)
    result = evaluate(model, data, args.how, where, label_maps)
    if where.rank == 0 and label_maps:
        print(f"{len(data)} label maps for the Cityscapes server in {label_maps}")
    elif where.rank == 0:
        report(result, trained, data, args.data, args.split, args.how, args.out / f"eval-{args.split}.json",
               steps=args.saved["step"])


# --- Pictures --------------------------------------------------------------------------------------------

def predict(args: argparse.Namespace, where: Where) -> None:
    """A mask and an overlay of every picture, its regions if asked for. One that fails is named on stderr, and the
    others go on; in a folder, hidden files are no pictures. Only in `predictions`, made here, are files replaced."""
    given, saved = args.pictures, args.saved
    inside = [x for p in given if p.is_dir() for x in sorted(p.iterdir())
              if x.suffix.lower() in PICTURES and x.name[0] != "." and not x.is_dir()]
    pictures = list({os.path.abspath(x): x for x in (*(p for p in given if not p.is_dir()), *inside)}.values())
    if not pictures:
        sys.exit(f"no pictures ({', '.join(PICTURES)}) in {' '.join(map(str, given))}")
    if any(args.out.resolve() == p.resolve() for p in given if p.is_dir()):
        sys.exit(f"--out {args.out} holds the pictures, and results would be taken for pictures: choose another folder")
    stems = {}
    for x in pictures:
        if stems.setdefault(x.stem, x) != x:
            sys.exit(f"{stems[x.stem]} and {x} have the same name, and so would their results")
    palette = [tuple(colour) for colour in saved["palette"]]
    model = restore(saved, args.checkpoint, saved["classes"]).to(where.device).eval()
    writable(args.out)
    bad = torch.zeros((), dtype=torch.int64, device=where.device)
    for picture in pictures[where.rank::where.world]:
        kinds = ("mask", "overlay", "regions")[:2 + args.regions]
        targets = [args.out / f"{picture.stem}_{kind}.png" for kind in kinds]
        try:
            image = read_image(picture)                         # [3, h, w]
            for target in targets:
                if target.exists() and not args.replace:
                    raise DataError(f"{target} exists and is not replaced: choose another --out")
            label = segment(model, image, args.how, where.device, maps=1)[0].argmax(0).cpu()     # [h, w]
            mask = Image.fromarray(label.byte().numpy())        # the numbers are the ids,
            mask.putpalette([x for colour in palette for x in colour])      # and viewers show the colours
            found = label.unique()
            overlay = draw_segmentation_masks(image, label == found[:, None, None], 0.6, [palette[n] for n in found])
            results = [mask, to_pil_image(overlay)]
            if args.regions:                                    # the whole photo, as large as a training crop
                h, w = (max(1, round(side * args.how.crop / max(image.shape[1:]))) for side in image.shape[1:])
                size = [max(1, round(2 * TILE[0] * side / max(h, w))) for side in (h, w)]
                row = draw_row(model, resize(image, [h, w], antialias=True), palette, args.settings.k, size)
                results.append(to_pil_image(make_grid(row, 5, padding=8, pad_value=255)))
            for target, result in zip(targets, results):
                result.save(target.with_suffix(".tmp"), "PNG")
                os.replace(target.with_suffix(".tmp"), target)
                print(target)
        except (DataError, OSError, RuntimeError, MemoryError) as error:    # the last two: too large
            said = error if isinstance(error, DataError) else f"{picture}: {one_line(error)}"
            print(said, file=sys.stderr)
            bad += 1
    if where.world > 1:
        dist.all_reduce(bad)
    if bad:
        sys.exit(f"{bad} of {len(pictures)} pictures could not be segmented")


# --- A picture of what the network does, as in the paper's Figure 5 --------------------------------------

TILE = 192, 192     # pixels of each small picture, h and w


def tile(image: Tensor, size: tuple[int, int] = TILE) -> Tensor:
    """uint8 [3, h, w] as [3, *size]; pixels stay sharp."""
    return resize(image.cpu(), list(size), 0)                   # 0: nearest


def draw_regions(labels: Tensor, J: Tensor, K: int, size: tuple[int, int] = TILE) -> Tensor:
    """uint8 [3, *size]: regions [H, W] in arbitrary colours, their representatives as white dots."""
    H, W = labels.shape
    picture = tile(colorize(labels % 255, distinct_colours(255)), size)
    reps = ranet.select_representatives(J.flatten(), labels.flatten(), K).cpu()     # [P]
    places = torch.stack(((reps % W + 0.5) * size[1] / W, (reps // W + 0.5) * size[0] / H), 1)[None]        # [1, P, 2]
    for colour, radius in (("black", 3), ("white", 2)):
        picture = draw_keypoints(picture, places, colors=colour, radius=radius)
    return picture


@torch.inference_mode()
def draw_row(model: nn.Module, image: Tensor, palette: Sequence, k: int, size: tuple[int, int] = TILE,
             label: Tensor | None = None) -> list[Tensor]:
    """Tiles of an image [3, h, w]: image, label, B, regions with representatives, coarse and fine result."""
    output = model(normalize(image)[None].to(next(model.parameters()).device))
    B = (255 * output.boundary.float().sigmoid()).byte().expand(3, -1, -1)      # [3, H, W]
    shown = [label, *(x[0].argmax(0) for x in (output.coarse, output.fine))]
    label, coarse, fine = (x if x is None else tile(colorize(x, palette), size) for x in shown)
    regions = output.regions and draw_regions(output.regions.labels[0], output.regions.J[0], k, size)
    return [x for x in (tile(image, size), label, tile(B, size), regions, coarse, fine) if x is not None]


def draw_overview(model: nn.Module, data, crop: int, k: int, path: Path) -> None:
    """A row for each of four images."""
    chosen = sorted({min(i * len(data) // 4 + i, len(data) - 1) for i in range(4)})
    cut = ([center_crop(x, [min(*x.shape[-2:], crop)]) for x in data[i]] for i in chosen)
    rows = [draw_row(model, image, data.palette, k, label=label) for image, label in cut]
    to_pil_image(make_grid(sum(rows, []), len(rows[0]), padding=8, pad_value=255)).save(path)


# --- The command line ------------------------------------------------------------------------------------

def parse(argv: list[str]) -> argparse.Namespace:
    parser, positive = flags("evaluate.py"), number(float, 1e-30)
    positive.__name__ = "size above 0 (pictures go before --scales)"        # argparse shows it
    add = parser.add_argument
    add("checkpoint", help="last.pt of a run")
    add("pictures", nargs="*", type=Path, help="segment these, and all in these folders, instead of a data set")
    add("--split", help="of the data set: train, trainval, test, ... (val)")
    add("--scales", type=positive, nargs="+", default=[1.0], help="average the probabilities over these sizes (1)")
    add("--flip", action="store_true", help="... and over the mirrored images")
    add("--regions", action="store_true", help="a third picture: B, regions, representatives, coarse and fine result")
    add("--out", type=Path, help="folder of results (beside the checkpoint; for pictures, predictions there)")
    args = parser.parse_intermixed_args(argv)
    if args.pictures and (args.data or args.root or args.split):
        sys.exit("evaluate.py: pictures need no --data, --root or --split")
    if args.regions and not args.pictures:
        sys.exit("--regions: name the pictures whose regions to draw")
    args.saved = read(args.checkpoint)
    args.settings = settings = argparse.Namespace(**args.saved["args"])
    if args.regions and settings.context in PEERS:
        sys.exit(f"--regions: {args.checkpoint} was trained with --context {settings.context}, which makes none")
    args.root = args.root or (settings.root if args.data in (None, settings.data) else None)
    args.data, args.split = args.data or settings.data, args.split or "val"
    args.how = How(args.crop or settings.crop, args.scales, args.flip, args.amp or settings.amp)
    args.replace = args.out is None
    args.out = args.out or Path(args.checkpoint).parent / ("predictions" if args.pictures else "")
    return args


def main(argv: list[str]) -> None:
    launch(parse, lambda args, where: (predict if args.pictures else score)(args, where), __file__, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
