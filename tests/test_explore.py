# SPDX-License-Identifier: MIT
"""docs/explore.html: what it holds is what ranet.py gives, and in a browser it finds the same and can be used."""
import html
import json
import re
import shutil
import subprocess

import explore
import numpy as np
import pytest
import torch

PAGE = explore.PAGE.read_text()
SCENES = explore.read(PAGE)[1]


def test_explore_page_is_one_short_file():
    assert PAGE.count("\n") <= 200 and len(PAGE) < 200_000
    assert re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", PAGE) == ["README.md"] and "import(" not in PAGE and "fetch(" not in PAGE


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene["name"])
def test_explore_numbers_are_those_of_ranet(scene):
    """A change of the equations that forgets the page ends here: run `python docs/explore.py`."""
    for held, now in zip(scene["expected"], explore.expected(scene), strict=True):
        assert (held["set"], held["labels"]) == (now["set"], now["labels"])
        for old, new in zip(*(np.frombuffer(explore.base64.b64decode(x["J"]), "<f4") for x in (held, now)), strict=True):
            assert old == pytest.approx(new, abs=1e-6)
        assert held["O"] == pytest.approx(now["O"], rel=1e-4, abs=1e-3)
    assert len({s["J"] for s in scene["expected"]}) == len(explore.OTHERS)     # the settings matter


def test_explore_scene_is_kept_by_its_bytes():
    torch.manual_seed(0)
    B, C, A = torch.rand(3, 4), torch.rand(5, 3, 4).softmax(0), torch.randn(6, 3, 4)
    b, c, a = explore.decode(explore.scene("x", B, C, A, list("abcde")))
    assert (b - B).abs().max() < 0.01 and (c - C).abs().max() < 0.01
    A = A.flatten(1).double()                                   # [6, 12]  the directions are other ones, the products not
    torch.testing.assert_close(a @ a.T, A.T @ A, atol=0.3, rtol=0)


USE = """<script>setTimeout(() => {
  const told = { check: $("check").textContent, wrong: $("check").className, tiles: document.querySelectorAll("canvas").length };
  const Q = () => Math.max(...S.labels) + 1, event = (name, type, more) => canvases[name].dispatchEvent(new type(...more));
  const box = canvases.G.getBoundingClientRect(), at = (x, y) => ({ clientX: box.left + box.width * x, clientY: box.top + box.height * y });
  event("G", PointerEvent, ["pointerdown", at(0.99, 0.01)]); told.clicked = i;
  event("G", KeyboardEvent, ["keydown", { key: "ArrowDown" }]); told.arrow = i;
  event("G", KeyboardEvent, ["keydown", { key: "ArrowLeft", shiftKey: true }]); told.pointer = j;
  told.Q = Q(); $("tau").value = 0; $("tau").dispatchEvent(new Event("input")); told.Q0 = Q();
  $("tau").value = 0.8; $("tau").dispatchEvent(new Event("input")); $("join_lone").click(); told.lone = Q(); $("join_lone").click();
  event("B", KeyboardEvent, ["keydown", { key: " " }]); told.painted = scene.B[i]; told.say = $("say").textContent;
  $("scene").value = 1; $("scene").dispatchEvent(new Event("change")); told.second = scene.name;
  document.body.textContent = "told " + JSON.stringify(told) + " told";
}, 4000)</script>"""


def test_explore_in_a_browser(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    (tmp_path / "page.html").write_text(PAGE + USE)
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
                           "--virtual-time-budget=20000", "--dump-dom", tmp_path / "page.html"],
                          capture_output=True, text=True, check=True)
    told = json.loads(html.unescape(re.search("told (.*) told", done.stdout)[1]))
    W = SCENES[0]["W"]
    assert told["check"].startswith("checked: labels equal ranet.py's") and told["wrong"] == "" and told["tiles"] == 14
    assert (told["clicked"], told["arrow"], told["pointer"]) == (W - 1, 2 * W - 1, W - 2)
    assert told["Q0"] == 1 < told["Q"] < told["lone"]           # tau = 0 puts all into one region
    assert told["painted"] == 0.9 and told["say"].startswith(f"i (1, {W - 1}), j (0, {W - 2}): D 0.9")
    assert told["second"] == SCENES[1]["name"]
