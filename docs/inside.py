# SPDX-License-Identifier: MIT
"""What a trained network does with O: a row of the table in results.md for each checkpoint of train.py.

    python docs/inside.py runs/ribbons-ranet/last.pt ... [--images 30]

On whole images of val, evenly spaced. Left, mIoU in %: as trained; with BN(O) at 0; with one region; with the regions
that RCB makes of the label's own classes and boundaries. J is that of RCB's own regions in all. Right, means over the
images: the share of O in the sum that the fusion forms; how many pixels eq. 6 attends to, out of those it can choose
from; how far the representatives of a region lie from each other, relative to its pixels.
"""
import argparse
from collections.abc import Sequence
from unittest.mock import patch

import torch
from differences import maps
from pictures import heads
from torch import Tensor
from torch.nn.functional import conv2d

import ranet  # pictures.py has put its folder on the path
from data import load, normalize
from evaluate import confusion, iou
from models import read, restore


@torch.inference_mode()
def scores(model: ranet.RANet, images: Sequence[tuple[Tensor, Tensor]], N: int) -> list[float]:
    """The left columns, of images uint8 [3, h, w] and their labels [h, w]."""
    rcb, matrices, keep = model.context.rcb, torch.zeros(4, N, N, dtype=torch.int64), model.norm.forward
    for image, label in images:
        x = normalize(image)[None]                              # [1, 3, h, w]
        own = model(x).regions
        B, C = maps(label, N, own.J.shape[1:])                  # [H, W], [N, H, W]
        one, right = torch.zeros_like(own.labels), rcb(B[None], C[None]).labels     # [1, H, W] each
        ways = (own.labels, keep), (own.labels, torch.zeros_like), (one, keep), (right, keep)
        for matrix, (labels, norm) in zip(matrices, ways):
            regions = own._replace(labels=labels)
            with patch.object(rcb, "forward", lambda B, C: regions), patch.object(model.norm, "forward", norm):
                matrix += confusion(label, model(x).fine[0].argmax(0), N)
    return [100 * iou(matrix).nanmean().item() for matrix in matrices]


def effective(weights: Tensor) -> Tensor:
    """How many of the last dimension's weights, which sum to 1, count: exp of the entropy, n for n equal ones."""
    return torch.special.entr(weights).sum(-1).exp()


def spread(places: Tensor) -> float:
    """The mean distance of points [n, 2] from each other."""
    return torch.pdist(places).mean().item()


@torch.inference_mode()
def look(model: ranet.RANet, image: Tensor) -> Tensor:
    """[4]: the right columns, of an image uint8 [3, h, w]."""
    A, B, C = (x[None] for x in heads(model, image))            # [1, M, H, W], [1, H, W], [1, N, H, W]
    O, (labels, J) = model.context(A, B, C)
    M, (H, W), K = A.shape[1], labels.shape[1:], model.context.rib.representatives
    # What the fusion adds up for A and for O, without the mean that its BatchNorm takes off.
    parts = [conv2d(x, w, padding=1)[0].flatten(1) for x, w in
             zip((A, model.norm(O)), model.fuse[0].weight.split(M, 1))]         # [M, HW] each
    of_A, of_O = (part.std(1).square().mean().sqrt() for part in parts)
    A, labels, J = A[0].flatten(1).T, labels.flatten(), J.flatten()             # [HW, M], [HW], [HW]
    reps, size = ranet.select_representatives(J, labels, K), labels.bincount()  # [P], [Q]
    Wl, region = ranet.intra_region_collection(A, J, labels, reps)[1], labels[reps]         # [P, HW], [P]
    large = size[region] > 4 * K                                # [P]  where eq. 6 has a choice
    place = torch.cartesian_prod(torch.arange(H), torch.arange(W)).float()      # [HW, 2]
    apart = [spread(place[reps[region == q]]) / spread(place[labels == q]) for q in region[large].unique()]
    attended, among = effective(Wl[large]).median(), (size[region] - K)[large].float().median()
    return torch.tensor([of_O / (of_A + of_O), attended, among, sum(apart) / len(apart)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--images", type=int, default=30)
    args = parser.parse_args()
    print("| checkpoint | as trained | BN(O) = 0 | one region | the label's | share of O | eq. 6 | of pixels | apart |")
    print("|---" * 9 + "|")
    for path in args.checkpoints:
        checkpoint = read(path)
        settings, model = checkpoint["args"], restore(checkpoint, path, checkpoint["classes"]).eval()
        data = load(settings["data"], settings["root"], "val")
        n = min(args.images, len(data))
        images = [data[i * len(data) // n] for i in range(n)]
        seen = torch.stack([look(model, image) for image, _ in images]).nanmean(0).tolist()
        found = scores(model, images, len(data.classes))
        print(f"| {path} | " + " | ".join([f"{x:.1f}" for x in found] + [f"{x:.2f}" for x in seen]) + " |", flush=True)


if __name__ == "__main__":
    main()
