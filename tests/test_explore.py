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

PAGE = explore.PAGE.read_text()
SCENES = explore.read(PAGE)[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_explore_page_is_one_short_file():
    assert PAGE.count("\n") <= 260 and len(PAGE) < 200_000
    assert max(len(line) for line in PAGE.splitlines() if explore.MARK not in line) <= 120
    assert re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", PAGE) == ["README.md"]
    assert not re.search(r"https?:|import|fetch", PAGE)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene["name"])
def test_explore_numbers_are_those_of_ranet(scene):
    """A change of the equations that forgets the page ends here: run `python docs/explore.py`."""
    for held, now in zip(scene["expected"], explore.expected(scene), strict=True):
        assert (held["set"], held["labels"]) == (now["set"], now["labels"])
        old, new = (np.frombuffer(explore.b64decode(x["J"]), "<f4") for x in (held, now))
        assert old == pytest.approx(new, abs=1e-6) and held["O"] == pytest.approx(now["O"], rel=1e-6, abs=2e-5)
    assert len({s["J"] for s in scene["expected"]}) == len(explore.SETTINGS)    # the settings matter


USE = """<script>setTimeout(() => {
  const told = { check: $("check").textContent, colour: getComputedStyle($("check")).color };
  const Q = () => Math.max(...R.labels) + 1, tell = (target, event) => target.dispatchEvent(event);
  const key = (init) => tell(canvases.G, new KeyboardEvent("keydown", init));
  const mouse = (tile, kind, x, y, box = canvases[tile].getBoundingClientRect()) => tell(canvases[tile],
    new PointerEvent(kind, { clientX: box.left + box.width * x, clientY: box.top + box.height * y, buttons: 1 }));
  const put = (id, value, kind) => { $(id).value = value; tell($(id), new Event(kind, { bubbles: true })); };
  mouse("G", "click", 0.99, 0.01); told.click = at(i);
  key({ key: "ArrowDown" }); told.arrow = at(i);
  key({ key: "ArrowLeft", shiftKey: true }); told.say = $("say").textContent; told.Q = Q();
  put("tau", 0, "input"); told.Q0 = Q(); put("tau", 0.8, "input"); $("join_lone").click(); told.lone = Q();
  $("again").click(); told.again = Q();
  mouse("B", "pointerdown", 0.01, 0.99); told.painted = [at(j), scene.B[j], R.D[j][j]];
  SCENES.forEach((_, s) => { put("scene", s, "change"); for (i = 0; i < scene.B.length; i += 7) draw(); });
  document.body.style.width = "362px";          // a phone of 390, less the padding: no window of Chromium is below 500
  told.right = Math.max(...[...document.querySelectorAll("body *")].map(e => e.getBoundingClientRect().right));
  told.edge = document.body.getBoundingClientRect().right; told.tiles = document.querySelectorAll("canvas").length;
  document.documentElement.textContent = `told ${JSON.stringify({ ...told, last: scene.name })} told`;
}, 4000)</script>"""


def use(page, folder):
    """What the page tells in a browser that does all that USE does."""
    (folder / "page.html").write_text(page + USE)
    flags = "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", f"--user-data-dir={folder}"
    dom = subprocess.check_output([BROWSER, *flags, "--dump-dom", folder / "page.html"], text=True)
    return json.loads(html.unescape(re.search("told (.*) told", dom)[1]))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_explore_in_a_browser(tmp_path):
    told, W = use(PAGE, tmp_path), SCENES[0]["W"]
    assert told["check"].startswith("checked: labels, J and O are ranet.py's") and told["colour"] != "rgb(238, 34, 34)"
    assert told["tiles"] == 14 and told["right"] <= told["edge"], "14 tiles, no wider than a phone"
    assert (told["click"], told["arrow"]) == (f"(0, {W - 1})", f"(1, {W - 1})")
    assert re.match(rf"i \(1, {W - 1}\), j \(0, {W - 2}\): D 0\..*\nQ = {told['Q']} regions", told["say"])
    assert told["Q0"] == 1 < told["Q"] == told["again"] < told["lone"]          # tau = 0 puts all into one region
    assert told["painted"] == ["(17, 0)", 0.9, 0.9] and told["last"] == SCENES[-1]["name"]
    told = use(PAGE.replace("(1 - d) * (1 - E[i][j])", "(1 - d) * (1 - E[i][j] ** 2)"), tmp_path)
    assert told["check"].startswith("this page and ranet.py differ") and told["colour"] == "rgb(238, 34, 34)"
