# SPDX-License-Identifier: MIT
"""Draws the equations at work: every tile is what a function of ranet.py returns for a trained network.

    python docs/pictures.py runs/shapes-ranet/last.pt --scene 9     # attention.png (eqs. 1-4), weights.png (eqs. 6-8)
    python docs/pictures.py runs/shapes-ranet/last.pt --scene 9 --pixel 2 15 --pixel 9 9 --out elsewhere
    python docs/pictures.py --growth                                # regions.png: trains as train.py does, minutes
    python docs/pictures.py --drawings                              # line.png (eq. 1), curve.png (eq. 2)

The scenes are those of the split val, their middle square of the training crop. The functions hold whole
[N, HW, HW] arrays: maps of some 40 x 40 pixels fit, those of the paper's crops do not.
"""
import argparse
import copy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, to_pil_image

sys.path[:0] = [str(Path(__file__).parent.parent)]
import ranet
import train
from data import colorize, load, normalize
from train import TILE

GAP = 6
SCENES, STEPS = (1, 7, 9), (0, 20, 40, 100, 200, 400)           # of --growth
# From 0 to 1: as bright as high, also in grey and to the colour-blind (viridis).
SCALE = torch.tensor([(68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137),
                      (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37)], dtype=torch.float)   # [10, 3]


# ---------------------------------------------------------------------------------------------------------
# The maps
# ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def equations(model: ranet.RANet, image: Tensor) -> SimpleNamespace:
    """Everything that the equations make of an image [3, h, w], under the names of ranet.py's table."""
    A = model.reduce(model.backbone(normalize(image)[None]))    # [1, M, H, W]
    B = model.boundary(A)[0, 0].sigmoid()                       # [H, W]
    C = model.semantic(A)[0].softmax(0)                         # [N, H, W]
    A = A[0].flatten(1).T                                       # [HW, M]
    D = ranet.boundary_probability(B)                           # [HW, HW]
    E = ranet.semantic_divergence(C)                            # [HW, HW]
    F = ranet.region_attention(D, E)                            # [HW, HW]
    Fg = ranet.regularize(F, model.rcb.kernel(), tuple(B.shape))    # [HW, HW]
    G = ranet.region_decision(Fg, model.rcb.threshold)          # [HW, HW]
    labels = ranet.join_lone_pixels(ranet.connected_regions(G), Fg)     # [HW]
    J = ranet.representative_score(Fg, labels)                  # [HW]
    reps = ranet.select_representatives(J, labels, model.rib.representatives)   # [P]
    Al, Wl = ranet.intra_region_collection(A, J, labels, reps)      # [P, M], [P, HW]
    Ag, Wi = ranet.inter_region_interaction(Al, J, labels, reps)    # [P, M], [P, P]
    O, Wd = ranet.intra_region_distribution(A, Ag, J, labels, reps)     # [HW, M], [HW, P]
    return SimpleNamespace(B=B, C=C, D=D, E=E, F=F, Fg=Fg, G=G, labels=labels, J=J, reps=reps, Wl=Wl, Wi=Wi,
                           O=O, Wd=Wd, K=model.rib.representatives)


def largest(maps: SimpleNamespace, n: int) -> list[Tensor]:
    """The places in maps.reps of the representatives of each of the n largest regions, by falling J."""
    regions = maps.labels.bincount().argsort(descending=True, stable=True)[:n]
    return [(maps.labels[maps.reps] == q).nonzero()[:, 0] for q in regions]


# ---------------------------------------------------------------------------------------------------------
# Tiles, and pictures made of them
# ---------------------------------------------------------------------------------------------------------

def heat(x: Tensor) -> Tensor:
    """[H, W] in [0, 1] in the colours of SCALE: uint8 [3, H, W]."""
    place = x.float().clamp(0, 1) * (len(SCALE) - 1)
    low = place.long().clamp_max(len(SCALE) - 2)
    return torch.lerp(SCALE[low], SCALE[low + 1], (place - low)[..., None]).round().byte().permute(2, 0, 1)


def tile(image: Tensor, side: int = TILE) -> Image.Image:
    """uint8 [3, h, w] as a picture of side x side; pixels stay sharp."""
    return to_pil_image(image).resize((side, side), Image.Resampling.NEAREST)


def middle(image: Tensor, crop: int) -> Tensor:
    """The middle square, of the crop's side at most."""
    return center_crop(image.as_subclass(Tensor), [min(*image.shape[-2:], crop)])


def faded(image: Tensor) -> Image.Image:
    grey = tile(image).convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.6)


def dot(picture: Image.Image, pixel: int, size: tuple[int, int], radius: float, colour=None, rim="black",
        width: int = 1) -> None:
    """A dot, or without a colour a ring, around the middle of a pixel of a map of size (H, W)."""
    H, W = size
    x, y = (pixel % W + 0.5) * picture.width / W, (pixel // W + 0.5) * picture.height / H
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), colour, rim, width)


def count(x: Tensor, what: str) -> str:
    return f"{int(x.sum())} {what}{'s' * (int(x.sum()) != 1)}"


def arrange(titles: list[str], rows: list[list[tuple[Image.Image, str]]], legend: str, scale: bool) -> Image.Image:
    """Rows of tiles, each with a line of text below; the titles above, below all the legend and the scale."""
    side, top, below = rows[0][0][0].width, 24, 18
    width, height = GAP + len(titles) * (side + GAP), top + len(rows) * (side + below + GAP) + 26
    picture = Image.new("RGB", (width, height), "white")
    pen, large, small = ImageDraw.Draw(picture), ImageFont.load_default(14), ImageFont.load_default(12)
    for j, title in enumerate(titles):
        left = GAP + j * (side + GAP)
        pen.text((left + side / 2, top / 2), title, "black", large, anchor="mm")
        for i, row in enumerate(rows):
            y = top + i * (side + below + GAP)
            picture.paste(row[j][0], (left, y))
            pen.text((left + side / 2, y + side + below / 2), row[j][1], "black", small, anchor="mm")
    pen.text((GAP, height - 14), legend, "black", large, anchor="lm")
    if scale:
        strip = to_pil_image(heat(torch.linspace(0, 1, 160).expand(12, -1)))
        picture.paste(strip, (width - 200, height - 20))
        for x, text in ((width - 208, "0"), (width - 32, "1")):
            pen.text((x, height - 14), text, "black", large, anchor="mm")
    return picture


# ---------------------------------------------------------------------------------------------------------
# The three pictures
# ---------------------------------------------------------------------------------------------------------

def attention(image: Tensor, maps: SimpleNamespace, pixels: list[int], palette: list) -> Image.Image:
    """Figure 2: from B and C to the region of a pixel, a row for each of `pixels`."""
    size = tuple(maps.B.shape)
    rows = []
    for i in pixels:
        region = maps.labels == maps.labels[i]                  # [HW]
        own = [x[i].view(size) for x in (maps.D, maps.E, maps.F, maps.Fg, maps.G)]  # [H, W] each
        colours = [image, heat(maps.B), colorize(maps.C.argmax(0), palette), *map(heat, own), heat(region.view(size))]
        tiles = [tile(x, 144) for x in colours]
        for picture in tiles:
            dot(picture, i, size, 6, rim="red", width=2)
        rows.append([(picture, "") for picture in tiles[:-1]] + [(tiles[-1], count(region, "pixel"))])
    titles = ["image", "B", "C, the likeliest class", "D, eq. 1", "E, eq. 2", "F, eq. 3", "F^g, eq. 4", "G, eq. 4",
              "its region"]
    return arrange(titles, rows, "Red ring: pixel i. D to G: row i of the matrix, laid out as a map.", scale=True)


def weights(image: Tensor, maps: SimpleNamespace, chosen: list[int]) -> Image.Image:
    """Eqs. 6-8 for some representatives, given as places in maps.reps: what each weighs, and how it is weighed."""
    size = tuple(maps.B.shape)
    region = maps.labels[maps.reps]                             # [P]
    rows = []
    for p in chosen:
        inside = maps.labels == region[p]                       # [HW]
        others = inside.clone()
        others[maps.reps] = False                               # [HW]
        senders, weighed = faded(image), region != region[p]    # [P]
        top = (maps.Wi[p] * weighed).max()
        for r in weighed.nonzero()[:, 0].tolist():
            share = (maps.Wi[p, r] / top).view(1, 1)
            dot(senders, int(maps.reps[r]), size, 3 + 3 * share.item(), tuple(heat(share).flatten().tolist()))
        regions = train.draw_regions(maps.labels.view(size), maps.J.view(size), maps.K)
        row = [(tile(image), ""), (to_pil_image(regions), count(inside, "pixel")),
               within(others, maps.Wl[p], image, size),
               (senders, f"highest {top:.2g}, of {count(weighed, 'representative')}"),
               within(inside, maps.Wd[:, p], image, size),
               (tile(heat(maps.J.view(size))), f"{maps.J[maps.reps[p]]:.2f} here")]
        for picture, _ in row:
            dot(picture, int(maps.reps[p]), size, 8, rim="red", width=2)
        rows.append(row)
    titles = ["image", "regions, representatives", "W^l, eq. 6", "W^g, eq. 7", "W^d, eq. 8", "J, eq. 5"]
    legend = "Red ring: the representative. Faded: outside the sum. Yellow: the highest weight of the tile."
    return arrange(titles, rows, legend, scale=True)


def within(chosen: Tensor, weight: Tensor, image: Tensor, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """Weights [HW] of the pixels where chosen [HW] is True, over the faded image, and what to say below."""
    picture = faded(image)
    top = weight.max()
    mask = Image.fromarray(chosen.view(size).numpy()).resize(picture.size, Image.Resampling.NEAREST)
    picture.paste(tile(heat((weight / top.clamp_min(1e-30)).view(size))), mask=mask)
    return picture, f"highest {top:.2g}, of {count(chosen, 'pixel')}"


def growth(steps: tuple[int, ...] = STEPS, flags: tuple[str, ...] = ()) -> Image.Image:
    """Figure 5: the regions of some scenes as the training of the README's first command goes on."""
    kept, save = {}, train.save

    def keep(path: Path, checkpoint: dict) -> None:
        if checkpoint["step"] in steps:
            kept[checkpoint["step"]] = copy.deepcopy(checkpoint)    # its weights go on changing
        save(path, checkpoint)

    with TemporaryDirectory() as folder, mock.patch.object(train, "save", keep):
        train.main(["--out", folder, *flags])
    args = SimpleNamespace(**kept[max(kept)]["args"])
    torch.manual_seed(args.seed)                                # step 0: the weights that train.py starts from
    model = train.build(args, len(kept[max(kept)]["classes"])).eval()
    scenes = [middle(load("shapes", split="val")[i][0], args.crop) for i in SCENES]
    rows = [[(tile(image), "")] for image in scenes]
    for step in steps:
        if step:
            model.load_state_dict(kept[step]["model"])
        for row, image in zip(rows, scenes):
            with torch.no_grad():
                labels, J = model(normalize(image)[None]).regions       # [1, H, W] each
            regions = train.draw_regions(labels[0], J[0], args.k)
            row.append((to_pil_image(regions), f"Q = {int(labels.max()) + 1}"))
    legend = "Colours: regions. Dots: representatives."
    return arrange(["image", *(f"step {step}" for step in steps)], rows, legend, scale=False)


# ---------------------------------------------------------------------------------------------------------
# Two drawings
# ---------------------------------------------------------------------------------------------------------

def line(rise: int = 3, run: int = 7, side: int = 64) -> Image.Image:
    """Eq. 1: the samples of the line from i to j, each between two pixels; the highest is D_ij."""
    y, x = torch.meshgrid(torch.arange(rise + 1.0), torch.arange(run + 1.0), indexing="ij")
    B = 0.1 + 0.75 * torch.exp(-(x - 4.6 + 0.4 * y) ** 2)      # [rise + 1, run + 1]  a boundary across
    picture = to_pil_image(heat(B)).resize(((run + 1) * side, (rise + 1) * side), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    middle = [((s + 0.5) * side, (s * rise / run + 0.5) * side) for s in range(run + 1)]
    pen.line([middle[0], middle[-1]], "white", 2)
    for s, (left, top) in enumerate(middle):
        low = s * rise // run
        part = s * rise / run - low
        for row in {low, min(low + (part > 0), rise)}:          # the two pixels, joined with their sample
            pen.line([(left, top), (left, (row + 0.5) * side)], "white", 1)
            pen.ellipse((left - 2, (row + 0.5) * side - 2, left + 2, (row + 0.5) * side + 2), "white")
        value = torch.lerp(B[low, s], B[min(low + 1, rise), s], part).item()
        colour = tuple(heat(torch.tensor([[value]])).flatten().tolist())
        pen.ellipse((left - 7, top - 7, left + 7, top + 7), colour, "white", 2)
        pen.text((left + (10 if s < run else -14), top - (17 if s < run else 26)), f"{value:.2f}", "white", font)
    for name, (left, top) in (("i", middle[0]), ("j", middle[-1])):
        pen.text((left - 20, top - 9), name, "red", ImageFont.load_default(20))
    return picture


def curve(side: int = 300, edge: int = 34) -> Image.Image:
    """Eq. 2 for two classes: E between (1, 0) or (1/2, 1/2) and (1 - p, p), over p."""
    picture = Image.new("RGB", (2 * side, side + 2 * edge), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    p = torch.linspace(0, 1, 201)

    def place(p: float, E: float) -> tuple[float, float]:
        return edge + p * (2 * side - 2 * edge), edge + (1 - E) * side

    pen.rectangle([place(0, 1), place(1, 0)], outline="grey")
    for first, colour, name, (x, y) in ((0.0, (58, 82, 139), "from (1, 0)", (0.62, 0.66)),
                                        (0.5, (200, 60, 60), "from (1/2, 1/2)", (0.30, 0.16))):
        q = torch.cat((torch.tensor([first]), p))               # [202]  the second class of pixel 0, then of the others
        E = ranet.semantic_divergence(torch.stack((1 - q, q))[:, None])[0, 1:]      # [201]
        pen.line([place(*point) for point in zip(p.tolist(), E.tolist())], colour, 3)
        pen.text(place(x, y), name, colour, font)
    for value in (0, 0.5, 1):
        pen.text((place(value, 0)[0], side + edge + 12), f"{value:g}", "black", font, anchor="mm")
        pen.text((edge - 16, place(0, value)[1]), f"{value:g}", "black", font, anchor="mm")
    pen.text((side, side + 2 * edge - 8), "p, of the second class", "black", font, anchor="mm")
    pen.text((edge, edge / 2), "E", "black", font, anchor="mm")
    return picture


# ---------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------

def read(args: argparse.Namespace) -> tuple[ranet.RANet, Tensor, list]:
    """The trained network, an image [3, side, side] of its data set, and the colours of the classes."""
    checkpoint = train.read_checkpoint(args.checkpoint)
    known = SimpleNamespace(**checkpoint["args"])
    if known.context != "ranet":
        sys.exit(f"{args.checkpoint} was trained without all of the equations (--context {known.context})")
    data = load(known.data, args.root or known.root, "val")
    if not 0 <= args.scene < len(data):
        sys.exit(f"--scene {args.scene}: expected 0..{len(data) - 1}")
    model = train.build(known, len(data.classes)).eval()
    train.restore(model, checkpoint, args.checkpoint, data.classes)
    return model, middle(data[args.scene][0], known.crop), data.palette


def write(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="of train.py")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--drawings", action="store_true")
    parser.add_argument("--scene", type=int, default=0, help="number of the image in the split val")
    parser.add_argument("--root", help="of the data set, where it is no longer where it was in training")
    parser.add_argument("--pixel", type=int, nargs=2, action="append", metavar=("Y", "X"),
                        help="of attention.png, on the H x W map; can be given again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the pictures")
    args = parser.parse_args()
    if args.growth + args.drawings + (args.checkpoint is not None) != 1:
        sys.exit("expected a checkpoint of train.py, or --growth, or --drawings")
    if args.drawings:
        write(line(), args.out / "line.png")
        return write(curve(), args.out / "curve.png")
    if args.growth:
        return write(growth(), args.out / "regions.png")
    model, image, palette = read(args)
    maps = equations(model, image)
    H, W = maps.B.shape
    for y, x in args.pixel or ():
        if not (0 <= y < H and 0 <= x < W):
            sys.exit(f"--pixel {y} {x}: the map is {H} x {W}")
    pixels = [y * W + x for y, x in args.pixel or ()]
    if not pixels:      # the best representatives of three regions, and the surest boundary
        pixels = [int(maps.reps[own[0]]) for own in largest(maps, 3)] + [int(maps.B.argmax())]
    write(attention(image, maps, pixels, palette), args.out / "attention.png")
    heard = maps.Wd.sum(0)                                      # [P]  by all pixels of its region together
    chosen = [int(own[heard[own].argmax()]) for own in largest(maps, 2)]
    write(weights(image, maps, chosen), args.out / "weights.png")


if __name__ == "__main__":
    main()
