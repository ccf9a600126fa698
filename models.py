# SPDX-License-Identifier: MIT
"""Networks around ranet.py: backbones from timm, what Table 1 compares with, and their checkpoints.

Rn in a comment is a section of docs/differences.md.
"""
import contextlib
import io
import itertools
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

import ranet
from data import SETS
from launch import RECIPES, one_line

# --- Backbones -------------------------------------------------------------------------------------------

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


def make_backbone(name: str, weights: str = "none", strides: list[int] | None = None) -> tuple[nn.Module, int]:
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
    create = partial(timm.create_model, name, features_only=True, **hrnet)
    # Dilated to 8 where wanted and possible; else for images of any size, which Swin, ViT and others name differently.
    ways = [{"output_stride": 8}, {"strict_img_size": False}, {"dynamic_img_size": True}, {}]
    try:
        for way in ways[bool(strides or hrnet):]:
            with contextlib.suppress(AssertionError, NotImplementedError, TypeError), torch.device("meta"):
                info = create(**way).feature_info               # a look at the levels, before weights are made
                break
        else:
            create()                                            # its error says why
        deepest = dict(zip(info.reduction(), info.out_indices))     # of each stride
        wanted = set(strides or [stride for stride in deepest if stride >= (4 if hrnet else 8)])
        if not wanted <= deepest.keys():
            sys.exit(f"--strides {' '.join(map(str, strides))}: {name} has strides {' '.join(map(str, deepest))}")
        create = partial(create, **way, out_indices=sorted(deepest[stride] for stride in wanted))
        with torch.random.fork_rng([], weights != "none"):
            net = create()
        if weights != "none":
            fresh, file = net, {} if weights == "imagenet" else {"pretrained_cfg_overlay": {"file": weights}}
            net = create(pretrained=True, **file)
            # timm keeps its random numbers where the file has none: equal tensors are the missing ones.
            for (key, a), b in zip(net.named_parameters(), fresh.parameters()):
                if a.dim() > 1 and torch.equal(a, b):
                    sys.exit(f"--weights {weights} has no {key} for {name}")
        backbone = Backbone(net)
        backbone.eval()(torch.zeros(1, 3, 72, 104)).sum().backward()
    except Exception as error:      # noqa: BLE001  timm raises whatever a model, a file or the hub leads to
        advice = "" if weights == "none" else ": give a file, or --weights none to start from scratch"
        sys.exit(f"--backbone {name} with --weights {weights} cannot be made ({one_line(error)}){advice}")
    for p in backbone.parameters():
        p.requires_grad_(p.grad is not None)                    # DDP stops where a parameter is idle
        p.grad = None
    if hrnet:               # HRNetV2-W48 + ASPP; the paper says no more (Table 5)
        return nn.Sequential(backbone, ASPP(sum(backbone.channels), (12, 24, 36), 512)), 512
    return backbone, sum(backbone.channels)


# --- Contexts: what makes O from A, B and C --------------------------------------------------------------

class NoContext(nn.Module):
    """O = 0: the backbone and its heads without context."""

    def forward(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(A), None                        # [b, M, H, W]


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling. Without BatchNorm: its coarsest map is one pixel an image."""

    def __init__(self, channels: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(channels, channels // 4, 1), nn.ReLU())
            for n in (1, 2, 3, 6))

    def forward(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, None]:
        maps = [interpolate(branch(A), A.shape[2:], mode="bilinear") for branch in self.branches]
        return torch.cat(maps, 1), None                         # [b, M, H, W]


class NonLocal(nn.Module):
    """Non-local attention, the embedded Gaussian form: every pixel collects from all others."""

    def __init__(self, channels: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, 3 * (channels // 2), 1)
        self.out = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, None]:
        query, key, value = self.embed(A).flatten(2).mT.chunk(3, 2)         # [b, HW, M / 2] each
        O = scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)[:, 0]
        return self.out(O.mT.unflatten(2, A.shape[2:])), None   # [b, M, H, W]


PEERS = {"none": lambda M: NoContext(), "spp": PyramidPooling, "nonlocal": NonLocal}
# A variant of your own is one row, {options of RCB}, {options of RIB}: "tau05": ({"threshold": 0.5}, {}).
RANETS = {"ranet": ({}, {}), "boundary": ({"cues": "boundary"}, {}), "semantic": ({"cues": "semantic"}, {}),
          "no-intra": ({}, {"intra": False}), "no-inter": ({}, {"inter": False}), "printed": ({}, {"printed": True}),
          "joint": ({"joint": True}, {})}
CONTEXTS = *RANETS, *PEERS                                      # (R10, R9, R8, R16)


def make_context(name: str, M: int, k: int) -> nn.Module:
    if name == "spp" and M % 4:
        sys.exit(f"--channels {M}: --context spp needs a multiple of 4")
    if name in PEERS:
        return PEERS[name](M)
    rcb, rib = RANETS[name]
    return ranet.RegionContext(ranet.RCB(**rcb), ranet.RIB(k, **rib))


def build(settings: Namespace, num_classes: int, weights: str = "none") -> ranet.RANet:
    """The network of a run's settings: backbone, strides, channels, context, k."""
    backbone, in_channels = make_backbone(settings.backbone, weights, settings.strides)
    M = settings.channels or (64 if settings.backbone == "small" else 512)
    return ranet.RANet(backbone, in_channels, num_classes, M, make_context(settings.context, M, settings.k))


# --- Checkpoints -----------------------------------------------------------------------------------------

VERSION = 3     # raised whenever the same settings come to train or compute something else


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
    except IsADirectoryError:
        sys.exit(f"{path} is a folder, expected a checkpoint, such as {Path(path) / 'last.pt'}")
    except Exception:       # noqa: BLE001  torch raises whatever bytes that are no checkpoint lead to
        sys.exit(f"{path} cannot be read as a checkpoint")
    keys = {"args", "step", "model", "classes", "palette"}
    lost = ", ".join(sorted(keys - checkpoint.keys() if isinstance(checkpoint, dict) else keys))
    if lost or not isinstance(checkpoint["args"], dict):
        sys.exit(f"{path} is no checkpoint of train.py: it has no {lost or 'settings in args'}")
    data, context = (checkpoint["args"].get(key) for key in ("data", "context"))
    if checkpoint.get("version") != VERSION or data not in SETS or context not in CONTEXTS:
        sys.exit(f"{path} is of another version of this code: --data {data} --context {context}")
    checkpoint["args"] = {**RECIPES[data], **checkpoint["args"]}        # of a version with fewer settings
    return checkpoint


def restore(checkpoint: dict, path: str | Path, classes: Sequence[str]) -> ranet.RANet:
    """The network of a checkpoint that `path` holds, for these classes."""
    for n, (trained, here) in enumerate(itertools.zip_longest(checkpoint["classes"], classes)):
        if trained != here:
            sys.exit(f"class {n} is {trained!r} in {path} and {here!r} in the data "
                     f"({len(checkpoint['classes'])} and {len(classes)} classes)")
    model = build(Namespace(**checkpoint["args"]), len(classes))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        sys.exit(f"{path} holds the weights of another model, or of an earlier version")
    return model
