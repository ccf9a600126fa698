# SPDX-License-Identifier: MIT
"""Writes the scenes of explore.html, and what ranet.py makes of each, with which the page compares itself.

    python docs/explore.py                          what ranet.py makes of the scenes that the page holds
    python docs/explore.py NAME CHECKPOINT IMAGE    puts in a scene: a picture, or the generated scene of that number
"""
import json
import sys
from base64 import b64decode, b64encode
from pathlib import Path

import torch
from pictures import heads, network, picture
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.io import encode_jpeg
from torchvision.transforms.v2.functional import resize

import ranet  # pictures.py has put its folder on the path

PAGE, MARK = Path(__file__).with_name("explore.html"), "const SCENES = "
START = {"tau": 0.8, "centre": 0.87, "K": 8, "cues": "both", "join_lone": True, "intra": True, "inter": True,
         "printed": False}
SETTINGS = [START | changed for changed in (
    {}, {"tau": 0.5, "cues": "boundary", "K": 3, "printed": True}, {"cues": "semantic", "intra": False, "centre": 0.6},
    {"join_lone": False, "inter": False, "K": 1})]


def text(x: Tensor) -> str:
    return b64encode(x.contiguous().numpy().tobytes()).decode()


def scene(name: str, B: Tensor, C: Tensor, A: Tensor, classes: list[str], shown: str = "") -> dict:
    """B [H, W], C [N, H, W], A [M, H, W] as bytes; of A its eight strongest directions, which keep most of A A^T."""
    (N, H, W), A = C.shape, A.flatten(1)                        # [M, HW]
    A = torch.linalg.svd(A, full_matrices=False)[0][:, :8].T @ A    # [8, HW]
    unit = round(A.abs().max().item() / 127, 6)
    means = [A[:, C.argmax(0).flatten() == n].mean(1).nan_to_num() for n in range(N)]       # what the brush paints
    B, C, A = (text(x.round().byte()) for x in (255 * B, 255 * C, A / unit + 128))
    return {"name": name, "H": H, "W": W, "N": N, "classes": classes, "unit": unit, "B": B, "C": C, "A": A,
            "means": [[round(x, 3) for x in mean.tolist()] for mean in means], "picture": shown}


def painted() -> dict:
    """A disc behind a wall with a gap, a wedge without a wall, and a strip behind a straight wall."""
    y, x = torch.meshgrid(torch.arange(18), torch.arange(18), indexing="ij")
    r = (y - 6.0).hypot(x - 6.0)
    kind = torch.where(y > 13, 3, torch.where(r < 4.6, 1, torch.where(x - y > 7, 2, 0)))    # [H, W]
    B, C, A = torch.rand(9, 18, 18, generator=torch.Generator().manual_seed(0)).split([1, 4, 4])
    B = 0.03 + 0.04 * B[0]
    B[((r - 4.2).abs() < 0.75) & ~((y == 6) & (x > 8)) | (y == 13)] = 0.9
    sure = one_hot(kind, 4).permute(2, 0, 1)                    # [4, H, W]
    C = 0.9 * sure + 0.03 * C
    return scene("painted", B, C / C.sum(0), 1.5 * sure + 0.3 * A, ["ground", "disc", "wedge", "strip"])


def trained(name: str, path: str, given: str) -> dict:
    """What a checkpoint of train.py makes of a generated scene, or of a picture that is made small: 18 pixels on the
    map's shorter side."""
    model, args, checkpoint = network(path)
    image = picture(given)
    image = image if given.isdigit() else resize(image, 18 * (4 if args.backbone == "small" else 8))
    with torch.no_grad():
        A, B, C = heads(model, image)
    shown = "data:image/jpeg;base64," + text(encode_jpeg(resize(image, 144), quality=80))
    return scene(name, B, C, A, checkpoint["classes"], shown)


def decode(s: dict) -> tuple[Tensor, Tensor, Tensor]:
    """B [H, W], C [N, H, W], A [HW, M] in float64, as the page reads them."""
    B, C, A = (torch.frombuffer(bytearray(b64decode(s[key])), dtype=torch.uint8).double().view(-1, s["H"], s["W"])
               for key in "BCA")
    return B[0] / 255, C / C.sum(0), (A.flatten(1).T - 128) * s["unit"]


def expected(s: dict) -> list[dict]:
    """Labels, J and O, summed over the pixels, of ranet.py for every setting."""
    (B, C, A), found = decode(s), []
    for use in SETTINGS:
        Wg = torch.full((3, 3), (1 - use["centre"]) / 8, dtype=torch.float64)
        Wg[1, 1] = use["centre"]
        labels, J = ranet.construct_regions(B, C, Wg, use["tau"], use["cues"], use["join_lone"])
        O = ranet.exchange_context(A, J, labels, use["K"], use["intra"], use["inter"], use["printed"])   # [HW, M]
        found.append({"set": use, "labels": text(labels.to(torch.uint16)), "J": text(J.float()),
                      "O": [round(x, 5) for x in O.sum(0).tolist()]})
    return found


def read(page: str) -> tuple[str, list[dict], str]:
    """The page before its scenes, the scenes, and the page after them."""
    before, rest = page.split(MARK)
    scenes, after = rest.split(";\n", 1)
    return before + MARK, json.loads(scenes), ";\n" + after


def main(argv: list[str]) -> None:
    if len(argv) not in (0, 3):
        sys.exit(f"expected no arguments, or NAME CHECKPOINT IMAGE, got {len(argv)}")
    before, scenes, after = read(PAGE.read_text())
    scenes = {s["name"]: s for s in [*scenes, painted(), *([trained(*argv)] if argv else [])]}
    PAGE.write_text(before + json.dumps([s | {"expected": expected(s)} for s in scenes.values()]) + after)


if __name__ == "__main__":
    main(sys.argv[1:])
