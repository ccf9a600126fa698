# SPDX-License-Identifier: MIT
"""Measures what the readings of differences.md change (R3, R4, R11), on label maps.

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


def maps(label: Tensor, N: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """B [H, W] and C [N, H, W] of a label map [h, w]."""
    B = 0.05 + 0.85 * adaptive_max_pool2d((boundary_mask(label) == 1).float()[None], size)[0]       # [H, W]
    label = interpolate(label[None, None].float(), size, mode="nearest")[0, 0].long()       # [H, W]
    label[label == 255] = 0
    return B, (8.0 * one_hot(label, N).permute(2, 0, 1)).softmax(0)                         # [N, H, W]


def thin_walls(n: int = 21) -> None:
    """Walls of one pixel across a map, B = 0 elsewhere: an image for each height."""
    B = torch.zeros(51, n, n)
    B[:, :, n // 2] = (torch.arange(51) / 50)[:, None]
    for threshold in (0.5, 0.65, 0.8):
        labels = ranet.RCB(threshold=threshold)(B, torch.full((51, 2, n, n), 0.5)).labels
        lowest = (labels[:, 0, 0] != labels[:, 0, -1]).int().argmax().item() / 50
        print(f"R3. With tau {threshold} the lowest wall that parts a {n} x {n} map is {lowest:.2f} high.")


def region_sizes(labels: list[Tensor], N: int, side: int = 97) -> None:
    print(f"\nR4. Regions at {side} x {side} (means over {len(labels)} label maps, in brackets the lowest and highest)"
          ":\n\n| lone pixels | cues | Q | pixels a region | alone | P (K = 8) |\n" + "|---" * 6 + "|")
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
        outlined = boundary_mask(label.masked_fill(mask == 1, 255)) == 1        # [h, w]
        band = adaptive_max_pool2d(outlined[None].float(), cells.shape)
        rows.append((mask.mean(), cells.mean(), mask[up == 1].mean(), band.mean()))
    full, pooled, taught, band = torch.tensor(rows).mean(0).tolist()
    print(f"\nR11. Boundary pixels {full:.1%}; boundary cells of the pooled mask at stride 8 {pooled:.1%}; within "
          f"these cells\n{taught:.0%} of the pixels are boundary: what a loss at image size teaches B there.\nWith "
          f"the boundary pixels ignored {band:.1%} of the cells hold a boundary pixel.")


@torch.no_grad()
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
    boundary_target(labels)


if __name__ == "__main__":
    main()
