# SPDX-License-Identifier: MIT
"""Draws the equations at work: every tile is what a function of ranet.py returns for a trained network.

    python docs/pictures.py runs/ribbons-ranet/last.pt 7         # attention.png (eqs. 1-4), weights.png (eqs. 6-8)
    python docs/pictures.py last.pt street.jpg --out elsewhere  # of its middle square of the training crop
    python docs/pictures.py growth [PICTURE ...] [FLAGS]        # regions.png: trains as train.py does with the flags
    python docs/pictures.py line                                # line.png (eq. 1)
    python docs/pictures.py pathways                            # pathways.png (eqs. 6-8)

A number is a generated scene of the split val. The functions hold whole [N, HW, HW] arrays: maps of some 40 x 40 fit.
"""
import argparse
import math
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, pad, resize, rgb_to_grayscale, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

sys.path[:0] = [str(Path(__file__).parent.parent)]
import evaluate
import models
import ranet
import train
from data import DataError, colorize, load, normalize, read_image

GAP, TOP, SIDE = 6, 18, 144     # between tiles; of the text above each; of a tile
tile = partial(resize, size=[SIDE, SIDE], interpolation=0)      # of [c, h, w]; 0: nearest, pixels stay sharp
# From 0 to 1: as bright as high, also in grey and to the colour-blind (viridis).
SCALE = torch.tensor([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]).float()   # [5, 3]


def network(path: str | Path) -> tuple[ranet.RANet, SimpleNamespace, dict]:
    """A trained RANet, the arguments it was trained with, and its checkpoint."""
    checkpoint = models.read(path)
    args = SimpleNamespace(**checkpoint["args"])
    if args.context != "ranet":
        sys.exit(f"{path} was trained without all of the equations (--context {args.context})")
    return models.restore(checkpoint, path, checkpoint["classes"]).eval(), args, checkpoint


def picture(given: str) -> Tensor:
    """uint8 [3, h, w]: the generated scene of that number, or a picture file."""
    try:
        return load("ribbons", split="val")[int(given)][0] if given.isdigit() else read_image(given)
    except (DataError, IndexError) as error:
        sys.exit(str(error))


def heads(model: ranet.RANet, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A [M, H, W], B [H, W] and C [N, H, W] of an image [3, h, w]."""
    A = model.reduce(model.backbone(normalize(image)[None]))    # [1, M, H, W]
    return A[0], model.boundary(A)[0, 0].sigmoid(), model.semantic(A)[0].softmax(0)


@torch.no_grad()
def equations(model: ranet.RANet, image: Tensor) -> SimpleNamespace:
    """Everything that the equations make of an image [3, h, w], under the names of ranet.py's table."""
    A, B, C = heads(model, image)
    A = A.flatten(1).T                                          # [HW, M]
    D, E = ranet.boundary_probability(B), ranet.semantic_divergence(C)      # [HW, HW] each
    F = ranet.region_attention(D, E)                            # [HW, HW]
    Fg = ranet.regularize(F, model.context.rcb.kernel(), tuple(B.shape))    # [HW, HW]
    G = ranet.region_decision(Fg, model.context.rcb.threshold)          # [HW, HW]
    labels = ranet.join_lone_pixels(ranet.connected_regions(G), Fg)     # [HW]
    J = ranet.representative_score(Fg, labels)                  # [HW]
    reps = ranet.select_representatives(J, labels, model.context.rib.representatives)   # [P]
    Al, Wl = ranet.intra_region_collection(A, J, labels, reps)      # [P, M], [P, HW]
    Ag, Wi = ranet.inter_region_interaction(Al, J, labels, reps)    # [P, M], [P, P]
    O, Wd = ranet.intra_region_distribution(A, Ag, J, labels, reps)     # [HW, M], [HW, P]
    return SimpleNamespace(B=B, C=C, D=D, E=E, F=F, Fg=Fg, G=G, labels=labels, J=J, reps=reps, Wl=Wl, Wi=Wi, O=O, Wd=Wd)


def largest(maps: SimpleNamespace, n: int) -> list[Tensor]:
    """The places in maps.reps of the representatives of each of the n largest regions, by falling J."""
    regions = maps.labels.bincount().argsort(descending=True, stable=True)[:n]
    return [(maps.labels[maps.reps] == q).nonzero()[:, 0] for q in regions]


def heat(x: Tensor) -> Tensor:
    """[H, W] in [0, 1] in the colours of SCALE: uint8 [3, H, W]."""
    place = x.float().clamp(0, 1) * (len(SCALE) - 1)
    low = place.long().clamp_max(len(SCALE) - 2)
    return torch.lerp(SCALE[low], SCALE[low + 1], (place - low)[..., None]).round().byte().permute(2, 0, 1)


def sheet(rows: list[dict[str, Tensor]], W: int = 0, marks: list[int] = ()) -> Image.Image:
    """Rows of tiles with their titles; in row y a red frame around pixel marks[y] of the W x W map."""
    n, tiles, titles = len(rows[0]), [tile(x) for row in rows for x in row.values()], [x for row in rows for x in row]
    for k, i in enumerate(i for i in marks for _ in range(n)):
        box = torch.tensor([i % W, i // W, i % W + 1, i // W + 1]) * SIDE / W + torch.tensor([-2, -2, 2, 2])
        tiles[k] = draw_bounding_boxes(tiles[k], box[None], colors="red", width=2)
    whole = to_pil_image(make_grid([pad(x, [0, TOP, 0, 0], 255) for x in tiles], n, GAP, pad_value=255))
    for k, title in enumerate(titles):
        at = GAP + SIDE / 2 + k % n * (SIDE + GAP), GAP + TOP / 2 + k // n * (TOP + SIDE + GAP)
        ImageDraw.Draw(whole).text(at, title, "black", ImageFont.load_default(12), anchor="mm")
    return whole


def attention(image: Tensor, maps: SimpleNamespace, pixels: list[int], palette: list) -> Image.Image:
    """Figure 2: from B and C to the region of a pixel, a row for each of `pixels`. Of D to G its row, as a map."""
    rows, first = [], {"image": image, "B": heat(maps.B), "C, the likeliest class": colorize(maps.C.argmax(0), palette)}
    for i in pixels:
        region = maps.labels == maps.labels[i]                  # [HW]
        own = {"D, eq. 1": maps.D[i], "E, eq. 2": maps.E[i], "F, eq. 3": maps.F[i], "F^g, eq. 4": maps.Fg[i],
               "G, eq. 4": maps.G[i], f"its region: {region.sum()} pixels": region}
        rows.append(first | {title: heat(x.view(maps.B.shape)) for title, x in own.items()})
    return sheet(rows, maps.B.shape[1], pixels)


def weights(image: Tensor, maps: SimpleNamespace, chosen: list[int], K: int) -> Image.Image:
    """Eqs. 6-8 for some representatives, given as places in maps.reps: what each weighs, and how it is weighed."""
    size, regions, rows = maps.B.shape, maps.labels[maps.reps], []
    faded = (153 + 0.4 * rgb_to_grayscale(tile(image), 3)).byte()       # [3, SIDE, SIDE]  where nothing is weighed
    for p in chosen:
        inside = maps.labels == regions[p]                      # [HW]
        others, senders, heard = inside.clone(), torch.zeros_like(inside), torch.zeros_like(maps.J)     # [HW] each
        others[maps.reps], senders[maps.reps], heard[maps.reps] = False, regions != regions[p], maps.Wi[p]
        row = {"image": image, f"its region: {inside.sum()} pixels":
               evaluate.draw_regions(maps.labels.view(size), maps.J.view(size), K)}
        for title, among, weight in (("W^l, eq. 6", others, maps.Wl[p]), ("W^g, eq. 7", senders, heard),
                                     ("W^d, eq. 8", inside, maps.Wd[:, p])):
            colours = tile(heat((weight / weight.max().clamp_min(1e-30)).view(size)))       # the highest is yellow
            row[f"{title}: {weight.max():.2g} of {among.sum()}"] = colours.where(tile(among.view(1, *size)), faded)
        rows.append(row | {f"J, eq. 5: {maps.J[maps.reps[p]]:.2f} here": heat(maps.J.view(size))})
    return sheet(rows, size[1], maps.reps[chosen].tolist())


def growth(pictures: list[str], flags: list[str]) -> Image.Image:
    """Figure 5: the regions of pictures as the training of the README's first command goes on, or one with flags."""
    with TemporaryDirectory() as folder:                        # not where a run of the same flags may lie
        args = train.parse(["--out", folder, *flags]).settings
    if args.context in models.PEERS:
        sys.exit(f"--context {args.context} makes no regions")
    steps = [args.steps * share // 20 for share in (0, 1, 2, 5, 10, 20)]        # of these train.py saves all but 0
    rows = [{"image": center_crop(picture(name), [args.crop])} for name in pictures]
    torch.manual_seed(args.seed)                                # step 0: the weights that train.py starts from
    model = models.build(args, len(load(args.data, args.root).classes), args.weights).eval()

    @torch.no_grad()
    def draw(_path: Path | None, checkpoint: dict) -> None:     # stands for train.save
        model.load_state_dict(checkpoint["model"])
        for row in rows if checkpoint["step"] in steps else ():
            labels, J = model(normalize(row["image"])[None]).regions        # [1, H, W] each
            row[f"step {checkpoint['step']}: Q = {labels.max() + 1}"] = evaluate.draw_regions(labels[0], J[0], args.k)

    draw(None, {"step": 0, "model": model.state_dict()})
    with TemporaryDirectory() as folder, mock.patch.object(train, "save", draw):
        train.main(["--out", folder, *flags])
    return sheet(rows)


def line() -> Image.Image:
    """Eq. 1: the samples of the line from i to j, each between two pixels; the highest is D_ij."""
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
    B = 0.1 + 0.75 * torch.exp(-(x - 4.6 + 0.4 * y) ** 2)      # [4, 8]  a boundary across
    whole = to_pil_image(resize(heat(B), [256, 512], 0))        # 64 a pixel
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(13)
    pen.line((32, 32, 480, 224), "white", 2)
    places = (ranet._on_line(field, torch.tensor(0), torch.tensor(31), torch.arange(8)).tolist() for field in (x, y, B))
    for x, y, value in zip(*places):
        left, height, pixels = 64 * x + 32, 64 * y + 32, (64 * math.floor(y) + 32, 64 * math.ceil(y) + 32)
        pen.line((left, pixels[0], left, pixels[1]), "white")
        for at, radius in (*((at, 2) for at in pixels), (height, 7)):       # the two pixels, the sample
            pen.circle((left, at), radius, tuple(heat(torch.tensor([[value]])).flatten().tolist()), "white", 2)
        pen.text((left + 20, height - 10), f"{value:.2f}", "white", font, anchor="mm")
    for name, at in (("i", (12, 32)), ("j", (460, 228))):
        pen.text(at, name, "white", ImageFont.load_default(22), anchor="mm")
    return whole


def pathways() -> Image.Image:
    """Eqs. 6-8 on the five pixels of eq6.md: who sends to whom, and with which weight."""
    labels, J, reps = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0.8, 0.6, 0.5, 0.5, 1]), torch.tensor([0, 1, 4])
    A = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 2], [1, 1]])
    Al, Wl = ranet.intra_region_collection(A, J, labels, reps)
    Ag, Wi = ranet.inter_region_interaction(Al, J, labels, reps)
    Wd = ranet.intra_region_distribution(A, Ag, J, labels, reps)[1]
    arrows = [[(i, p, w) for p, row in zip(reps.tolist(), W.tolist()) for i, w in zip(to, row) if w]
              for W, to in ((Wl, range(5)), (Wi, reps.tolist()))]
    arrows.append([(p, i, w) for i, row in enumerate(Wd.tolist()) for p, w in zip(reps.tolist(), row) if w and i != p])
    places = {2: (45, 85), 3: (45, 195), 0: (155, 85), 1: (155, 195), 4: (262, 140)}     # representatives to the right
    whole = Image.new("RGB", (3 * 310, 250), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(14)
    for n, (part, title) in enumerate(zip(arrows, ("eq. 6: to the representatives", "eq. 7: to the other regions",
                                                   "eq. 8: to all pixels of the region"))):
        pen.text((310 * n + 155, 18), title, "black", font, anchor="mm")
        for box, tint in (((12, 45, 188, 235), "#fde9c8"), ((228, 100, 296, 180), "#d5e3f7")):
            pen.rounded_rectangle([x + 310 * n * (k % 2 == 0) for k, x in enumerate(box)], 20, tint)
        for k, (sender, receiver, weight) in enumerate(part):
            a, b = (torch.tensor(places[i]) + torch.tensor((310.0 * n, 0)) for i in (sender, receiver))
            way = (b - a) / (b - a).norm()
            side = torch.stack((-way[1], way[0]))               # arrows there and back lie side by side
            a, b = a + 17 * way + 5 * side, b - 17 * way + 5 * side
            pen.line((*a.tolist(), *b.tolist()), "black", 1 + round(3 * weight))
            pen.polygon([tuple((b + x).tolist()) for x in (3 * way, 5 * side - 7 * way, -5 * side - 7 * way)], "black")
            pen.text(tuple((a + (b - a) * 0.28 + 13 * side).tolist()), f"{weight:.2f}", "#b00020", font, anchor="mm")
        for i, (x, y) in places.items():
            pen.circle((x + 310 * n, y), 15 if i in reps else 10, "white" if i in reps else "#888888", "black", 2)
            pen.text((x + 310 * n, y), str(i), "black" if i in reps else "white", font, anchor="mm")
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="+", metavar="CHECKPOINT PICTURE", help="or growth, line, pathways")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the pictures")
    args, flags = parser.parse_known_args()
    given = args.given + flags
    if given[0] == "growth":
        drawn = {"regions": growth(args.given[1:] or ["1", "7", "9"], flags)}
    elif given in (["line"], ["pathways"]):
        drawn = {given[0]: {"line": line, "pathways": pathways}[given[0]]()}
    elif len(given) == 2:
        model, known, checkpoint = network(given[0])
        image = picture(given[1])
        image = center_crop(image, [min(*image.shape[1:], known.crop)])
        maps = equations(model, image)
        own, heard = largest(maps, 3), maps.Wd.sum(0)           # heard: [P], by all pixels of its region together
        pixels = [int(maps.reps[places[0]]) for places in own] + [int(maps.B.argmax())]     # one on the surest boundary
        chosen = [int(places[heard[places].argmax()]) for places in own[:2]]
        drawn = {"attention": attention(image, maps, pixels, checkpoint["palette"]),
                 "weights": weights(image, maps, chosen, known.k)}
    else:
        sys.exit("expected growth, line or pathways, or a checkpoint of train.py and a picture")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, whole in drawn.items():
        whole.save(args.out / f"{name}.png", optimize=True)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
