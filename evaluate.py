# SPDX-License-Identifier: MIT
"""What a checkpoint is used for: scores, the label maps of a server, masks of pictures, an overview.

train.py is the command line. Each process handles its share of the images, by sliding windows.
"""
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
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2.functional import center_crop, resize, to_pil_image
from torchvision.utils import draw_keypoints, draw_segmentation_masks, make_grid
from tqdm import tqdm

import ranet
from data import PICTURES, DataError, cityscapes_label_ids, colorize, distinct_colours, load, normalize, read_image

BAR = {"dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 30}      # in a file, a line now and then


def one_line(error: BaseException) -> str:
    if "DataLoader worker" in str(error) and "Traceback" in str(error):     # a worker's, whose last line says it
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    if "shared memory" in str(error):
        return "this machine has too little shared memory for workers: raise it, or use --workers 0"
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


# --- Checkpoints -----------------------------------------------------------------------------------------

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


def read(path: str | Path) -> dict:
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
        sys.exit(f"{path} holds the weights of another model, or of an earlier version")


def writable(out: Path) -> None:
    """Makes the folder; one that cannot be written to is told before the work."""
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


# --- Evaluation and prediction ---------------------------------------------------------------------------

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
def evaluate(model: nn.Module, data, split: str, trained: str, args, predictions: Path | None = None) -> dict:
    """mIoU of both maps, each image once, by one of the processes. `trained`: the split that the weights have seen;
    `predictions`: where Cityscapes' label ids go."""
    model.eval()
    N = len(data.classes)
    matrix = torch.zeros(2, N, N, dtype=torch.int64, device=args.device)
    mine = range(args.rank, len(data), args.world)
    loader = DataLoader(Subset(data, mine), batch_size=None, num_workers=args.workers)
    for i, (image, label) in zip(mine, tqdm(loader, "evaluation", disable=args.rank > 0, **BAR)):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            fine, coarse = segment(model, normalize(image).to(args.device), args).argmax(1)      # [h, w] each
        for k, prediction in enumerate((fine, coarse)):
            matrix[k] += confusion(label.to(args.device), prediction, N)
        if predictions:
            Image.fromarray(cityscapes_label_ids(fine).numpy()).save(predictions / f"{data.name(i)}.png")
    if args.world > 1:
        dist.all_reduce(matrix)
    scores = torch.stack([iou(x) for x in matrix.cpu()])        # [2, N]
    scores = torch.cat((scores, scores.nanmean(1, keepdim=True)), 1).tolist()       # the mean over classes last
    *classes, means = [[None if math.isnan(x) else x for x in pair] for pair in zip(*scores)]     # JSON has no NaN
    seen = " (trained on)" if split != "test" and trained.startswith("trainval" if split == "val" else "train") else ""
    protocol = (f"{args.data} {split}{seen}, {len(data)} images, {N} classes; windows of {args.crop}, stride "
                f"{math.ceil(args.crop * 2 / 3)}; scales {' '.join(f'{scale:g}' for scale in args.scales)}"
                f"{', mirrored too' if args.flip else ''}; classes without a pixel left out of the mean")
    return {"fine_miou": means[0], "coarse_miou": means[1], "data": args.data, "context": args.context,
            "backbone": args.backbone, "protocol": protocol, "pixels": int(matrix[0].sum()),
            "classes": {name: {"fine": f, "coarse": c} for name, (f, c) in zip(data.classes, classes)}}


def report(result: dict, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")
    rows = {**result["classes"], "mean": {"fine": result["fine_miou"], "coarse": result["coarse_miou"]}}
    width = max(map(len, [*rows, "IoU in %"]))
    print(f"{'IoU in %':{width}}    fine  coarse")
    for name, row in rows.items():
        print(f"{name:{width}}", *("      -" if x is None else f"{100 * x:7.1f}" for x in row.values()))
    print(result["protocol"], flush=True)


def score(model: nn.Module, args) -> None:
    """--eval: prints the scores of a checkpoint and writes them, or the label maps of a split without labels."""
    data, out, saved = load(args.data, args.root, args.split), Path(args.out), args.saved
    unlabelled = all(label is None for _, label in getattr(data, "files", [(0, 0)]))
    if unlabelled and args.data != "cityscapes":
        sys.exit(f"{args.split} has no labels to score with: use --predict for its pictures")
    restore(model, saved, args.path, data.classes)
    predictions = out / "cityscapes-test" if unlabelled else None
    writable(predictions or out)
    trained = saved["args"]["split"] if args.data == saved["args"]["data"] else ""
    result = evaluate(model, data, args.split, trained, args, predictions)
    if args.rank == 0 and unlabelled:
        print(f"{len(data)} label maps for the Cityscapes server in {predictions}")
    elif args.rank == 0:
        report(dict(result, steps=saved["step"]), out / f"eval-{args.split}.json")


MAKER, OURS = "RANet train.py", PngImagePlugin.PngInfo()
OURS.add_text("Software", MAKER)                # such a file may be replaced, others not


def made_here(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == MAKER
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def predict(model: nn.Module, args) -> None:
    """--predict: a mask and an overlay of every picture. One that cannot be segmented is told, and the others go on; in
    a folder, hidden files and predictions are no pictures."""
    given = [Path(x) for x in args.predict[1:]]
    inside = [x for p in given if p.is_dir() for x in sorted(p.iterdir())
              if x.suffix.lower() in PICTURES and x.name[0] != "." and not made_here(x)]
    pictures = list({x.resolve(): x for x in (*(p for p in given if not p.is_dir()), *inside)}.values())
    if not pictures:
        sys.exit(f"--predict: no pictures ({', '.join(PICTURES)}) in {' '.join(map(str, given))}")
    stems = {}
    for x in pictures:
        if stems.setdefault(x.stem, x) != x:
            sys.exit(f"--predict: {stems[x.stem]} and {x} have the same name, and so would their results")
    palette = [tuple(colour) for colour in args.saved["palette"]]
    restore(model, args.saved, args.path, args.saved["classes"])
    model.eval()
    writable(Path(args.out))
    bad = torch.zeros((), dtype=torch.int64, device=args.device)
    for picture in pictures[args.rank::args.world]:
        targets = [Path(args.out) / f"{picture.stem}_{kind}.png" for kind in ("mask", "overlay")]
        try:
            image = read_image(picture)                         # [3, h, w]
            for target in targets:
                if target.exists() and not made_here(target):
                    raise DataError(f"{target} was not made by --predict and is not replaced: choose another --out")
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                p = segment(model, normalize(image).to(args.device), args, maps=1)[0]       # [N, h, w]
            label = p.argmax(0).cpu()                           # [h, w]
            mask = Image.fromarray(label.byte().numpy())        # the numbers are the ids,
            mask.putpalette([x for colour in palette for x in colour])      # and viewers show the colours
            found = label.unique()
            overlay = draw_segmentation_masks(image, label == found[:, None, None], 0.6, [palette[n] for n in found])
            for target, result in zip(targets, (mask, to_pil_image(overlay))):
                result.save(target.with_suffix(".tmp"), "PNG", pnginfo=OURS)
                os.replace(target.with_suffix(".tmp"), target)
                print(target, flush=True)
        except (DataError, OSError, RuntimeError, MemoryError) as error:    # the last two: too large
            said = error if isinstance(error, DataError) else f"{picture}: {one_line(error)}"
            print(said, file=sys.stderr, flush=True)
            bad += 1
    if args.world > 1:
        dist.all_reduce(bad)
    if bad:
        sys.exit(f"{bad} of {len(pictures)} pictures could not be segmented")


# --- A picture of what the network does, as in the paper's Figure 5 --------------------------------------

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
def draw_overview(model: nn.Module, data, args, path: Path) -> None:
    """A row for each of four images: image, label, B, regions with representatives, coarse and fine result."""
    tiles = []
    for i in sorted({min(i * len(data) // 4 + i, len(data) - 1) for i in range(4)}):
        image, label = (center_crop(x, [min(*x.shape[-2:], args.crop)]) for x in data[i])
        output = model(normalize(image)[None].to(args.device))
        B = (255 * output.boundary.float().sigmoid()).byte().expand(3, -1, -1)      # [3, H, W]
        row = [image, colorize(label, data.palette), B]
        row += [colorize(x[0].argmax(0), data.palette) for x in (output.coarse, output.fine)]
        row = [tile(x) for x in row]
        if output.regions is not None:
            row.insert(3, draw_regions(output.regions.labels[0], output.regions.J[0], args.k))
        tiles += row
    to_pil_image(make_grid(tiles, len(row), padding=8, pad_value=255)).save(path)


