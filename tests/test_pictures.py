# SPDX-License-Identifier: MIT
"""docs/pictures.py: do the tiles show the numbers of ranet.py, and is each in its place?"""
import copy
import math
import sys
from pathlib import Path

import differences
import inside
import pictures
import pytest
import scipy.stats
import torch
from pictures import GAP, SIDE, TOP, heat
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import data
import evaluate
import models
import ranet
import train

torch.set_num_threads(1)
FLAGS = ["--steps", "2", "--crop", "40", "--batch", "4", "--workers", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of two steps of training, and the picture of another such run."""
    folder, built = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, models):
            patch.setattr(module, "build", lambda *given, build=models.build: built.append(given[1:]) or build(*given))
        patch.setattr(data.Ribbons, "splits", {"train": 16, "val": 3, "test": 3})
        train.main(["--out", str(folder), *FLAGS])
        return folder / "last.pt", pictures.growth(["0", "2"], FLAGS), built


@pytest.fixture(scope="module")
def drawn():
    """A network that knows the objects of a scene, so that its regions have many sizes; the scene and its maps."""
    torch.manual_seed(0)
    model = models.build(train.parse(["--out", "nowhere"]).settings, 7).eval()
    model.reduce[1].weight.data *= 60                           # otherwise all features and weights are nearly equal
    model.context.rcb.logits.data[0, 1] = 2                             # W^g has a direction
    image, label = data.load("ribbons", split="val")[9]
    classes = torch.nn.functional.one_hot(label[2::4, 2::4].long(), 7).permute(2, 0, 1)     # [7, 24, 24]
    B = 8 * ranet.pool_boundary(data.boundary_mask(label)[None], (24, 24))[0] - 4 + 0.3 * torch.randn(1, 1, 24, 24)
    C = 5 * classes + 0.3 * torch.randn(1, 7, 24, 24)
    model.boundary.forward, model.semantic.forward = lambda A: B, lambda A: C   # for every image
    return model, image, pictures.equations(model, image)


def cut(picture, row, column):
    left, top = GAP + column * (SIDE + GAP), GAP + TOP + row * (TOP + SIDE + GAP)
    return pil_to_tensor(picture.crop((left, top, left + SIDE, top + SIDE)))        # [3, SIDE, SIDE]


def test_maps_are_those_of_the_network_and_the_largest_regions_come_first(drawn):
    (model, image, maps), seen = drawn, []
    with torch.inference_mode(), model.context.rib.register_forward_hook(lambda _rib, _given, O: seen.append(O)):
        regions = model(data.normalize(image)[None]).regions
    assert torch.equal(maps.labels, regions.labels.flatten())
    torch.testing.assert_close(maps.J, regions.J.flatten())
    torch.testing.assert_close(maps.O, seen[0][0].flatten(1).T, rtol=1e-4, atol=1e-4)
    sizes = sorted(maps.labels.bincount().tolist(), reverse=True)
    assert sizes[1] > 8 and maps.Wl.max() > 0.1                 # a case with something to see
    for places, size in zip(pictures.largest(maps, 3), sizes[:3], strict=True):
        J, region = maps.J[maps.reps[places]], maps.labels[maps.reps[places]]
        assert len(region.unique()) == 1 and (maps.labels == region[0]).sum() == size and len(places) == min(8, size)
        assert (J.diff() <= 0).all() and J[0] == maps.J[maps.labels == region[0]].max()


def test_attention_shows_the_rows_of_the_matrices(drawn):
    _model, image, maps = drawn
    whole = pictures.attention(image, maps, [100, 200], data.Ribbons.palette)
    for column, x in enumerate((maps.D, maps.E, maps.F, maps.Fg, maps.G), 3):
        tile, want = cut(whole, 1, column), pictures.tile(heat(x[200].view(24, 24)))
        red = (tile == torch.tensor([255, 0, 0])[:, None, None]).all(0)         # a frame around the pixel
        assert red.any() and (red | (tile == want).all(0)).all()


def test_growth_draws_the_regions_of_each_step(trained):
    path, whole, built = trained
    (model, args, checkpoint), seen = pictures.network(path), set()
    torch.manual_seed(0)
    for column, state in ((1, models.build(args, 7).state_dict()), (3, checkpoint["model"])):    # steps 0, 1 and 2
        model.load_state_dict(state)
        for row, scene in enumerate((0, 2)):
            image = data.Ribbons("val")[scene][0][:, 28:68, 28:68]     # the middle 40 of 96
            with torch.inference_mode():
                labels, J = model(data.normalize(image)[None]).regions
            drawn = evaluate.draw_regions(labels[0], J[0], args.k)
            assert torch.equal(cut(whole, row, 0), pictures.tile(image))
            assert torch.equal(cut(whole, row, column), pictures.tile(drawn))
            seen.add(drawn.numpy().tobytes())
    assert len(seen) == 4 and built[-2] == built[-1]            # the steps differ; step 0 has the training's weights


def run(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["pictures.py", *map(str, given)])
    pictures.main()


@pytest.mark.parametrize("given, words", [
    ("growths", "expected growth"), ("none.pt 9", "no such file"), ("last.pt 200", "scene 200 of 200"),
    ("last.pt none.jpg", "none.jpg"), ("last.pt 2 --steps 3", "expected growth"),
    ("growth --context spp", "no regions"), ("alone.pt 9", "--context no-inter")])
def test_mistakes_are_named(given, words, trained, monkeypatch):
    monkeypatch.chdir(trained[0].parent)
    checkpoint = models.read("last.pt")
    checkpoint["args"]["context"] = "no-inter"
    torch.save(checkpoint, "alone.pt")
    with pytest.raises(SystemExit, match=words):
        run(monkeypatch, *given.split(), "--out", "new")
    assert not Path("new").exists()
    run(monkeypatch, "last.pt", 2, "--out", "right")
    assert sorted(path.name for path in Path("right").iterdir()) == ["attention.png", "weights.png"]


def test_line_shows_the_samples_of_eq1(tmp_path, monkeypatch):
    run(monkeypatch, "line", "--out", tmp_path)
    with Image.open(tmp_path / "line.png") as picture:          # 64 a pixel; the sample after three of seven steps
        B = 0.1 + 0.75 * torch.exp(-(3 - 4.6 + 0.4 * torch.arange(4.0)) ** 2)
        value = torch.lerp(B[1], B[2], 2 / 7)                   # row 9 / 7
        assert picture.getpixel((3 * 64 + 32 + 4, round((9 / 7 + 0.5) * 64))) == tuple(heat(value.view(1, 1)).flatten())


def test_pathways_have_an_arrow_where_there_is_a_weight(tmp_path, monkeypatch):
    run(monkeypatch, "pathways", "--out", tmp_path)
    with Image.open(tmp_path / "pathways.png") as picture:      # a line of pixels across the middle between two of them
        def drawn(x, y):
            return sum(picture.getpixel((x, y + k)) == (0, 0, 0) for k in range(-9, 10))
        assert drawn(122, 85) and drawn(122, 195) and not drawn(122 + 310, 85)      # eq. 6: 2 to 0, 3 to 1; not eq. 7
        assert drawn(640 + 85, 85) > drawn(122, 85) > 1         # eq. 8: 0 to 2 with 0.90, more than 0.73


def test_inside_counts_by_hand_and_runs(drawn, trained, monkeypatch, capsys):
    assert inside.spread(torch.tensor([[0.0, 0], [3, 4], [0, 0]])) == pytest.approx(10 / 3)
    (given, image, maps), label, size = drawn, data.load("ribbons", split="val")[9][1], drawn[2].labels.bincount()
    model, large = copy.deepcopy(given), [p for p, i in enumerate(maps.reps) if size[maps.labels[i]] > 32]
    share, attended, among, distance = inside.look(model, image).tolist()
    weighed = sorted(math.exp(scipy.stats.entropy(maps.Wl[p])) for p in large)
    assert attended == pytest.approx(weighed[(len(large) - 1) // 2], rel=1e-4)      # the lower median
    assert among in size - 8 and 0 < share < 1 and 0 < distance < 2
    assert len(set(inside.scores(model, [(image, label)], 7))) == 4
    B, C = differences.maps(label, 7, (24, 24))                 # now the network's regions are the label's
    model.boundary.forward, model.semantic.forward = lambda A: B.logit()[None, None], lambda A: C.log()[None]
    found = inside.scores(model, [(image, label)], 7)
    assert found[0] == found[3] and len(set(found)) == 3
    model.norm.weight.data.zero_()
    assert inside.scores(model, [(image, label)], 7) == [found[1]] * 4 and inside.look(model, image)[0] == 0
    monkeypatch.setattr(sys, "argv", ["inside.py", str(trained[0]), "--images", "2"])
    inside.main()
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == row.count("|") == 10
