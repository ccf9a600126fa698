# SPDX-License-Identifier: MIT
"""What a trained network does with O: a row of the table in results.md for each checkpoint of train.py.

    python docs/inside.py runs/ribbons-ranet/last.pt ... [--images 20]

Of the first images of val, by means over images. Effective numbers are exponentials of entropies: n for n equal
weights, 1 where one weight is all.
"""
import argparse

import torch
from pictures import heads
from torch import Tensor
from torch.nn.functional import conv2d

import ranet  # pictures.py has put its folder on the path
from data import load
from models import read, restore


def effective(weights: Tensor, dim: int) -> Tensor:
    """exp of the entropy of weights that sum to 1 over dim."""
    return torch.special.entr(weights).sum(dim).exp()


def spread(places: Tensor, n: int) -> float:
    """The mean distance of n points [n, 2] from each other."""
    return torch.cdist(places, places).sum().item() / (n * (n - 1))


@torch.inference_mode()
def look(model: ranet.RANet, image: Tensor) -> Tensor:
    """[7]: the columns of the table for an image uint8 [3, h, w]."""
    A, B, C = (x[None] for x in heads(model, image))            # [1, M, H, W], [1, H, W], [1, N, H, W]
    O, (labels, J) = model.context(A, B, C)
    M, (H, W), block = A.shape[1], labels.shape[1:], model.context.rib
    # What the fusion adds up for A and for O, without the mean that its BatchNorm takes off.
    parts = [conv2d(x, w, padding=1)[0].flatten(1) for x, w in
             zip((A, model.norm(O)), model.fuse[0].weight.split(M, 1))]         # [M, HW] each
    of_A, of_O = (part.std(1).square().mean().sqrt() for part in parts)
    A, labels, J = A[0].flatten(1).T, labels.flatten(), J.flatten()             # [HW, M], [HW], [HW]
    reps = ranet.select_representatives(J, labels, block.representatives)
    Al, Wl = ranet.intra_region_collection(A, J, labels, reps)
    Ag, Wi = ranet.inter_region_interaction(Al, J, labels, reps, block.mean)
    Wd = ranet.intra_region_distribution(A, Ag, J, labels, reps)[1]
    size, region = labels.bincount(), labels[reps]              # [Q], [P]
    large = size[region] > 4 * block.representatives            # [P]  where eq. 6 has a choice
    Q, among = len(size), (size[region] - block.representatives)[large]
    heard = (torch.special.entr(Wi).sum(1) / (Q - 1)).exp().mean()      # of each source; NaN with one region
    place = torch.stack((torch.arange(H * W) // W, torch.arange(H * W) % W), 1).float()     # [HW, 2]
    shares = [spread(place[reps[region == q]], block.representatives) / spread(place[labels == q], int(size[q]))
              for q in region[large].unique()]
    return torch.tensor([of_O / (of_A + of_O), Q, effective(Wl[large], 1).median(), among.float().median(), heard,
                         effective(Wd, 1)[size[labels] >= block.representatives].mean(),
                         sum(shares) / len(shares)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--images", type=int, default=20)
    args = parser.parse_args()
    print("| checkpoint | share of O in the fusion | Q | eq. 6 attends to | of pixels | eq. 7, of each source | "
          "eq. 8 hears, of K | representatives' distance, of pixels' |\n" + "|---" * 8 + "|")
    for path in args.checkpoints:
        checkpoint = read(path)
        settings, model = checkpoint["args"], restore(checkpoint, path, checkpoint["classes"]).eval()
        data = load(settings["data"], settings["root"], "val")
        rows = [look(model, data[i][0]) for i in range(min(args.images, len(data)))]
        print(f"| {path} | " + " | ".join(f"{x:.2f}" for x in torch.stack(rows).nanmean(0)) + " |")


if __name__ == "__main__":
    main()
