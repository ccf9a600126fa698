# SPDX-License-Identifier: MIT
"""Measures what the readings of differences.md change (R1, R3, R4, R11), on label maps.

    python docs/differences.py --root camvid

B and C are made from the labels of a `folder` data set (B 0.9 on class borders and 0.05 elsewhere, C a softmax that is
sure of the label), so that the numbers speak of the equations and not of a trained network.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate, one_hot

sys.path[:0] = [str(Path(__file__).parent.parent)]
import ranet
from data import boundary_mask, load

torch.set_grad_enabled(False)
SIZE = 23, 30       # where every [HW, HW] matrix of the equations is small


def maps(label: Tensor, N: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """B [H, W] and C [N, H, W] of a label map [h, w]."""
    B = 0.05 + 0.85 * adaptive_max_pool2d((boundary_mask(label) == 1).float()[None], size)[0]       # [H, W]
    label = interpolate(label[None, None].float(), size, mode="nearest")[0, 0].long()       # [H, W]
    label[label == 255] = 0
    return B, (8.0 * one_hot(label, N).permute(2, 0, 1)).softmax(0)                         # [N, H, W]


def without_end_points(B: Tensor) -> Tensor:
    """Eq. 1 as the released code has it: the end points do not count. [HW, HW]"""
    pixel, W = torch.arange(B.numel()), B.shape[1]
    i, j = torch.minimum(pixel[:, None], pixel), torch.maximum(pixel[:, None], pixel)       # [HW, HW] each
    L, D = torch.maximum((j // W - i // W).abs(), (j % W - i % W).abs()), torch.zeros(i.shape)
    for step in range(1, max(B.shape) - 1):
        sample = ranet._on_line(B, i, j, torch.full_like(i, step))
        D = torch.where((step < L) & (sample > D), sample, D)
    return D


def end_points(labels: list[Tensor], N: int) -> None:
    rows = {"with": [], "without": []}
    for label in labels:
        B, C = maps(label, N, SIZE)
        E = ranet.semantic_divergence(C)
        for name, D in (("with", ranet.boundary_probability(B)), ("without", without_end_points(B))):
            Fg = ranet.regularize((1 - D) * (1 - E), ranet.RCB().kernel(), SIZE)
            count = ranet.connected_regions(ranet.region_decision(Fg)).bincount()       # [Q]
            rows[name].append(((count > 20).sum(), (count == 1).sum(), len(count)))
    print(f"\nR1. Regions of {len(labels)} label maps at {SIZE[0]} x {SIZE[1]} (means):\n\n"
          "| end points | regions of more than 20 pixels | single pixels | Q |\n|---|---|---|---|")
    for name, found in rows.items():
        large, single, Q = torch.tensor(found).float().mean(0).tolist()
        print(f"| {name} | {large:.1f} | {single:.0f} | {Q:.0f} |")


def thin_walls(n: int = 21) -> None:
    print(f"\nR3. The lowest wall, in steps of 0.02, that parts a {n} x {n} map (B = 0 elsewhere, classes equal):\n\n"
          "| threshold | one pixel thick | two pixels thick |\n|---|---|---|")
    for threshold in (0.5, 0.65, 0.8):
        found = []
        for wall in (1, 2):
            B = torch.zeros(51, n, n)                           # an image for each height
            B[:, :, n // 2:n // 2 + wall] = (torch.arange(51) / 50)[:, None, None]
            labels = ranet.RCB(threshold=threshold)(B, torch.full((51, 2, n, n), 0.5)).labels
            found.append((labels[:, 0, 0] != labels[:, 0, -1]).int().argmax().item() / 50)
        print(f"| {threshold} | {found[0]:.2f} | {found[1]:.2f} |")


def region_sizes(labels: list[Tensor], N: int, side: int = 97) -> None:
    print(f"\nR4. Regions at {side} x {side} (means over {len(labels)} label maps, in brackets the lowest and highest)"
          ":\n\n| lone pixels | cues | Q | pixels a region | lone pixels | P (K = 8) |\n" + "|---" * 6 + "|")
    for join, cues in ((False, "both"), (True, "both"), (True, "boundary"), (True, "semantic")):
        rows = []
        for label in labels:
            B, C = maps(label, N, (side, side))
            count = ranet.RCB(cues=cues, join_lone=join)(B[None], C[None]).labels.flatten().bincount()      # [Q]
            rows.append((len(count), side ** 2 / len(count), (count == 1).sum() / side ** 2, count.clamp_max(8).sum()))
        rows = torch.tensor(rows)
        (Q, size, lone, P), (low, high) = rows.mean(0).tolist(), rows[:, 1].aminmax()
        print(f"| {'join' if join else 'stay'} | {cues} | {Q:.1f} | {size:.0f} ({low:.0f}-{high:.0f}) | {lone:.1%} | "
              f"{P:.0f} |", flush=True)


def boundary_target(labels: list[Tensor]) -> None:
    rows = []
    for label in labels:
        mask = (boundary_mask(label) == 1).float()              # [h, w]
        cells = adaptive_max_pool2d(mask[None], [-(-s // 8) for s in mask.shape])[0]        # [H, W]
        up = interpolate(cells[None, None], mask.shape, mode="nearest")[0, 0]               # [h, w]
        rows.append((mask.mean(), cells.mean(), mask[up == 1].mean()))
    full, pooled, taught = torch.tensor(rows).mean(0).tolist()
    print(f"\nR11. Boundary pixels {full:.1%}; boundary cells of the pooled mask at stride 8 {pooled:.1%}; within "
          f"these cells\n{taught:.0%} of the pixels are boundary: what a loss at image size teaches B there.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="a data set in the layout of `folder`")
    parser.add_argument("--images", type=int, default=24, help="label maps of val; half as many of each split for R4")
    args = parser.parse_args()
    data = load("folder", args.root, "val")
    labels = [data[i * len(data) // args.images][1] for i in range(args.images)]
    N, half = len(data.classes), max(1, args.images // 2)       # half: of each split, so that all drives are there
    every = [split[i * len(split) // half][1]
             for split in (load("folder", args.root, name) for name in ("train", "val", "test")) for i in range(half)]
    region_sizes(every, N)
    thin_walls()
    end_points(labels, N)
    boundary_target(labels)


if __name__ == "__main__":
    main()
