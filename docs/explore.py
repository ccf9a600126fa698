# SPDX-License-Identifier: MIT
"""Writes the scenes of explore.html, and what ranet.py makes of each, with which the page compares itself.

    python docs/explore.py                                  what ranet.py makes of the scenes that the page holds
    python docs/explore.py NAME CHECKPOINT IMAGE H W        puts in a scene, or replaces it: a network of train.py on
                                                            a picture (or the number of a generated scene), on H x W
"""
import argparse
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_pil_image

sys.path[:0] = [str(Path(__file__).parent.parent)]
import ranet
import train
from data import load, normalize, read_image

PAGE = Path(__file__).with_name("explore.html")
START = {"tau": 0.8, "centre": 0.87, "K": 8, "cues": "both", "join_lone": True, "intra": True, "inter": True}
OTHERS = [{}, {"tau": 0.5, "cues": "boundary", "K": 3}, {"cues": "semantic", "intra": False, "centre": 0.6},
          {"join_lone": False, "inter": False, "K": 1}]


def text(x) -> str:
    return base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()


def scene(name: str, B: Tensor, C: Tensor, A: Tensor, classes: list[str], image: Tensor | None = None) -> dict:
    """B [H, W], C [N, H, W], A [M, H, W] as bytes; of A its eight strongest directions, which keep most of A A^T."""
    (N, H, W), A = C.shape, A.flatten(1)                        # [M, HW]
    U = torch.linalg.svd(A, full_matrices=False)[0][:, :8]      # [M, 8]
    A = U.T @ A                                                 # [8, HW]
    unit = round(A.abs().max().item() / 127, 6)
    means = [A[:, C.argmax(0).flatten() == n].mean(1).nan_to_num() for n in range(N)]
    picture = ""
    if image is not None:
        file = io.BytesIO()
        to_pil_image(resize(image, [8 * H, 8 * W])).save(file, "JPEG", quality=80)
        picture = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"name": name, "H": H, "W": W, "N": N, "M": len(A), "classes": list(classes), "unit": unit,
            "B": text((255 * B).round().byte()), "C": text((255 * C).round().byte()),
            "A": text((A / unit + 128).round().clamp(0, 255).byte()),
            "means": [[round(x, 3) for x in mean.tolist()] for mean in means],
            "picture": picture}


def painted() -> dict:
    """A disc behind a wall with a gap, a wedge without a wall, and a strip behind a straight wall."""
    H = W = 18
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    r = (y - 6.0).hypot(x - 6.0)
    kind = torch.where(y > 13, 3, torch.where(r < 4.6, 1, torch.where(x - y > 7, 2, 0)))    # [H, W]
    B = 0.03 + 0.04 * torch.rand(H, W)
    B[((r - 4.2).abs() < 0.75) & ~((y == 6) & (x > 8)) | (y == 13)] = 0.9
    C = torch.nn.functional.one_hot(kind, 4).permute(2, 0, 1) * 0.9 + 0.03 * torch.rand(4, H, W)
    A = torch.nn.functional.one_hot(kind, 4).permute(2, 0, 1) * 1.5 + 0.3 * torch.rand(4, H, W)
    return scene("painted", B, C / C.sum(0), A, ["ground", "disc", "wedge", "strip"])


def trained(name: str, path: str, picture: str, H: int, W: int) -> dict:
    """What a checkpoint of train.py makes of a picture whose map is brought to H x W."""
    checkpoint = train.read_checkpoint(path)
    model = train.build(argparse.Namespace(**checkpoint["args"]), len(checkpoint["classes"])).eval()
    train.restore(model, checkpoint, path, checkpoint["classes"])
    stride = 4 if checkpoint["args"]["backbone"] == "small" else 8
    image = load("shapes", split="val")[int(picture)][0] if picture.isdigit() else read_image(picture)
    image = resize(image.as_subclass(Tensor), [stride * H, stride * W], antialias=True)
    with torch.inference_mode():
        A = model.reduce(model.backbone(normalize(image)[None]))    # [1, M, H, W]
        B, C = model.boundary(A)[0, 0].sigmoid(), model.semantic(A)[0].softmax(0)       # over the classes
    return scene(name, B, C, A[0], checkpoint["classes"], image)


def decode(s: dict) -> tuple[Tensor, Tensor, Tensor]:
    """B [H, W], C [N, H, W], A [HW, M] in float64, as the page reads them."""
    B, C, A = (torch.frombuffer(bytearray(base64.b64decode(s[key])), dtype=torch.uint8).double() for key in "BCA")
    C = C.view(s["N"], s["H"], s["W"])
    return B.view(s["H"], s["W"]) / 255, C / C.sum(0), (A.view(s["M"], -1).T - 128) * s["unit"]


def expected(s: dict) -> list[dict]:
    """Labels, J and sums of O of ranet.py, for the page's first settings and for others."""
    B, C, A = decode(s)
    found = []
    for changed in OTHERS:
        use = {**START, **changed}
        Wg = torch.full((3, 3), (1 - use["centre"]) / 8, dtype=torch.float64)
        Wg[1, 1] = use["centre"]
        labels, J = ranet.construct_regions(B, C, Wg, use["tau"], use["cues"], use["join_lone"])
        O = ranet.exchange_context(A, J, labels, use["K"], use["intra"], use["inter"])      # [HW, M]
        found.append({"set": changed, "labels": text(labels.numpy().astype("<u2")), "J": text(J.numpy().astype("<f4")),
                      "O": [round(x, 5) for x in O.sum(0).tolist()]})       # over the pixels
    return found


def read(page: str) -> tuple[str, list[dict], str]:
    """The page before its scenes, the scenes, and the page after them."""
    before, rest = page.split("const SCENES = ")
    scenes, after = rest.split(";\n", 1)
    return f"{before}const SCENES = ", json.loads(scenes), f";\n{after}"


def main(argv: list[str]) -> None:
    if len(argv) not in (0, 5):
        sys.exit(__doc__)
    before, scenes, after = read(PAGE.read_text())
    torch.manual_seed(0)
    new = [painted()] + ([trained(*argv[:3], *map(int, argv[3:]))] if argv else [])
    scenes = list({s["name"]: s for s in scenes + new}.values())
    PAGE.write_text(before + json.dumps([{**s, "expected": expected(s)} for s in scenes]) + after)


if __name__ == "__main__":
    main(sys.argv[1:])
