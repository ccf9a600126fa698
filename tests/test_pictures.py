# SPDX-License-Identifier: MIT
"""docs/pictures.py: do the tiles show the numbers of ranet.py, and is each in its place?"""
import sys
from types import SimpleNamespace

import pictures
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import data
import ranet
import train

torch.set_num_threads(1)
close = torch.testing.assert_close
STEPS = 0, 1, 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of training, drawn: the picture, the states of the network at 0, 1, 2, and the checkpoint."""
    folder, states, build, save = tmp_path_factory.mktemp("run"), [], train.build, train.save

    def watched_build(*args):
        model = build(*args)
        states.append({key: x.clone() for key, x in model.state_dict().items()})
        return model

    def watched_save(path, checkpoint):
        states.append({key: x.clone() for key, x in checkpoint["model"].items()})
        save(folder / "last.pt", checkpoint)
        save(path, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Shapes, "splits", {"train": 16, "val": 3, "test": 3})
        patch.setattr(pictures, "SCENES", (0, 2))
        patch.setattr(train, "build", watched_build)
        patch.setattr(train, "save", watched_save)
        flags = "--steps", "2", "--crop", "40", "--batch", "4", "--workers", "0"
        return pictures.growth(STEPS, flags), states[:3], folder / "last.pt"


class Head(torch.nn.Module):
    """Stands where B or C is computed, and gives the same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits[None]

    def forward(self, A):
        return self.logits


@pytest.fixture(scope="module")
def drawn():
    """A network that knows the objects of a scene, so that its regions have many sizes; the scene and its maps."""
    torch.manual_seed(0)
    model = train.build(train.parse([]), 7).eval()
    model.reduce[1].weight.data *= 60                           # else all features and weights are nearly equal
    image, label = data.load("shapes", split="val")[9]
    edges = ranet.pool_boundary(data.boundary_mask(label)[None], (18, 18))[0]   # [1, 18, 18]
    model.boundary = Head(8 * edges - 4 + 0.3 * torch.randn(1, 18, 18))
    classes = torch.nn.functional.one_hot(label[2::4, 2::4].long(), 7).permute(2, 0, 1)
    model.semantic = Head(5 * classes + 0.3 * torch.randn(7, 18, 18))
    model.rcb.logits.data[0, 1] = 2                             # W^g has a direction
    return model, image, pictures.equations(model, image)


def cells(picture, row, column, side, size):
    """The colours [3, H, W] of a tile at the corners of its map's pixels, where no ring or dot begins."""
    left, top = pictures.GAP + column * (side + pictures.GAP), 24 + row * (side + 18 + pictures.GAP)
    pixels = pil_to_tensor(picture.crop((left, top, left + side, top + side)))      # [3, side, side]
    y, x = ((torch.arange(n) * side / n).ceil().long() for n in size)
    return pixels[:, y[:, None], x]


def agree(a, b):
    """The share of pixels in which two [3, H, W] are equal: a ring or a dot covers some."""
    return (a == b).all(0).float().mean()


def test_maps_are_those_of_the_network(drawn):
    model, image, maps = drawn
    seen = []
    hook = model.rib.register_forward_hook(lambda block, inputs, O: seen.extend((inputs[1], O)))
    with torch.inference_mode():
        model(data.normalize(image)[None])
    hook.remove()
    regions, O = seen
    size = maps.labels.bincount()
    assert (size > maps.K).sum() >= 2 and (size > 1).all()
    assert maps.Wl.max() > 0.1 and maps.Wd[maps.Wd > 0].min() < 0.01    # a case with something to see
    assert torch.equal(maps.labels, regions.labels.flatten())
    close(maps.J, regions.J.flatten())
    close(maps.O, O[0].flatten(1).T, rtol=1e-4, atol=1e-4)


def test_attention_shows_the_rows_of_the_matrices(drawn):
    _model, image, maps = drawn
    size, pixels = tuple(maps.B.shape), [0, 100, 200]
    picture = pictures.attention(image, maps, pixels, data.Shapes.palette)
    assert picture.width <= 1400
    for row, i in enumerate(pixels):
        shown = [maps.D[i], maps.E[i], maps.F[i], maps.Fg[i], maps.G[i], maps.labels == maps.labels[i]]
        for column, x in enumerate([maps.B.flatten(), None, *shown], 1):
            if x is not None:
                assert agree(cells(picture, row, column, 144, size), pictures.heat(x.view(size))) > 0.97
        classes = data.colorize(maps.C.argmax(0), data.Shapes.palette)
        assert agree(cells(picture, row, 2, 144, size), classes) > 0.97


def test_weights_show_the_weights_and_fade_what_has_none(drawn):
    _model, image, maps = drawn
    size = tuple(maps.B.shape)
    p = int(pictures.largest(maps, 1)[0][1])
    picture = pictures.weights(image, maps, [p])
    inside = (maps.labels == maps.labels[maps.reps[p]]).view(size)
    others = inside.clone()
    others.view(-1)[maps.reps] = False
    assert others.sum() == inside.sum() - maps.K > 0
    for column, chosen, weight in ((2, others, maps.Wl[p]), (4, inside, maps.Wd[:, p])):
        tile = cells(picture, 0, column, train.TILE, size)
        heat = pictures.heat((weight / weight.max()).view(size))
        assert agree(tile[:, chosen], heat[:, chosen]) > 0.97
        grey = (tile[0] == tile[1]) & (tile[1] == tile[2])
        assert (~grey[~chosen]).sum() < 5 and not grey[chosen].any()     # the ring has a colour


def test_dots_of_eq7_lie_on_the_representatives_of_other_regions(drawn):
    _model, image, maps = drawn
    size = tuple(maps.B.shape)
    p = int(pictures.largest(maps, 1)[0][0])
    picture = pictures.weights(image, maps, [p])
    left, step = pictures.GAP + 3 * (train.TILE + pictures.GAP), train.TILE / size[0]
    region = maps.labels[maps.reps]
    top = maps.Wi[p].max()
    for r, pixel in enumerate(maps.reps.tolist()):
        y, x = (int((place + 0.5) * step) for place in divmod(pixel, size[1]))
        colour = picture.getpixel((left + x, 24 + y))
        if region[r] == region[p]:
            assert len(set(colour)) == 1 and colour[0] > 140    # the faded image
        else:
            assert colour == tuple(pictures.heat(maps.Wi[p, r].view(1, 1) / top).flatten().tolist())


def test_middle_of_an_image():
    image = torch.zeros(3, 9, 13)
    image[:, 4, 6] = 1
    assert pictures.middle(image, 5)[:, 2, 2].all() and pictures.middle(image, 5).shape == (3, 5, 5)
    assert pictures.middle(image, 99)[:, 4, 4].all() and pictures.middle(image, 99).shape == (3, 9, 9)


def test_largest_regions_and_their_representatives(drawn):
    maps = drawn[2]
    own = pictures.largest(maps, 3)
    sizes = sorted(maps.labels.bincount().tolist(), reverse=True)
    assert [int((maps.labels == maps.labels[maps.reps[places[0]]]).sum()) for places in own] == sizes[:3]
    for places, size in zip(own, sizes):
        J, region = maps.J[maps.reps[places]], maps.labels[maps.reps[places]]
        assert len(region.unique()) == 1 and len(places) == min(maps.K, size) and (J.diff() <= 0).all()
        assert J[0] == maps.J[maps.labels == region[0]].max()


def test_growth_draws_each_step_with_the_weights_it_had(trained):
    picture, states, path = trained
    args = SimpleNamespace(**train.read_checkpoint(path)["args"])
    model = train.build(args, 7).eval()
    seen = []
    for column, state in enumerate(states, 1):
        model.load_state_dict(state)
        for row, scene in enumerate((0, 2)):
            image = pictures.middle(data.Shapes("val")[scene][0], 40)
            assert image.shape == (3, 40, 40)
            with torch.inference_mode():
                labels, J = model(data.normalize(image)[None]).regions
            want = train.draw_regions(labels[0], J[0], args.k)
            left, top = pictures.GAP + column * (train.TILE + pictures.GAP), 24 + row * (train.TILE + 18 + pictures.GAP)
            got = picture.crop((left, top, left + train.TILE, top + train.TILE))
            assert torch.equal(pil_to_tensor(got), want)
            seen.append(got.tobytes())
    assert len(set(seen)) > 4                                   # the steps differ


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["pictures.py", *map(str, flags)])
    pictures.main()


def test_the_command_writes_the_pictures(trained, tmp_path, monkeypatch, capsys):
    run(monkeypatch, trained[2], "--scene", 2, "--out", tmp_path / "new")
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / f"{x}.png") for x in ("attention", "weights")]
    by_rows = {}
    for name in ("attention", "weights"):
        path = tmp_path / "new" / f"{name}.png"
        with Image.open(path) as picture:
            by_rows[name] = picture.size
        assert 5_000 < path.stat().st_size < 350_000
    assert by_rows["attention"][0] == 9 * 150 + 6 and by_rows["weights"][0] == 6 * 198 + 6
    run(monkeypatch, trained[2], "--scene", 2, "--out", tmp_path / "one", "--pixel", 9, 0)
    with Image.open(tmp_path / "one" / "attention.png") as picture:
        assert picture.height == 24 + 168 + 26                  # one row, and its ring on the last line at the left
        left = [picture.getpixel((6 + 7, 24 + y)) for y in range(144)]
    red = [y for y, colour in enumerate(left) if colour == (255, 0, 0)]
    assert red and min(red) > 120


@pytest.mark.parametrize("flags, words", [
    ([], "expected a checkpoint"), (["--growth", "x.pt"], "expected a checkpoint"), (["none.pt"], "no such file"),
    (["LAST", "--scene", "200"], "--scene 200: expected 0..199"), (["LAST", "--pixel", "10", "0"], "10 x 10"),
    (["ALONE"], "--context no-inter")])
def test_mistakes_are_named(flags, words, trained, tmp_path, monkeypatch):
    checkpoint = train.read_checkpoint(trained[2])
    checkpoint["args"]["context"] = "no-inter"
    torch.save(checkpoint, tmp_path / "alone.pt")
    flags = [{"LAST": trained[2], "ALONE": tmp_path / "alone.pt"}.get(x, x) for x in flags]
    with pytest.raises(SystemExit, match=words):
        run(monkeypatch, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_drawings_show_the_equations(tmp_path, monkeypatch):
    run(monkeypatch, "--drawings", "--out", tmp_path)
    with Image.open(tmp_path / "curve.png") as picture:
        for p, first, colour in ((0.3, 0, (58, 82, 139)), (0.9, 0.5, (200, 60, 60))):
            C = torch.tensor([[[1 - first, 1 - p]], [[first, p]]])
            E = ranet.semantic_divergence(C)[0, 1].item()
            assert picture.getpixel((round(34 + p * 532), round(34 + (1 - E) * 300))) == colour
    with Image.open(tmp_path / "line.png") as picture:          # seven steps across, and their samples' colours
        assert picture.size == (512, 256)
        B = 0.1 + 0.75 * torch.exp(-(3 - 4.6 + 0.4 * torch.arange(4.0)) ** 2)
        value = torch.lerp(B[1], B[2], 2 / 7)                   # after three of them: row 9 / 7
        assert picture.getpixel((3 * 64 + 32, round((9 / 7 + 0.5) * 64))) == tuple(pictures.heat(value.view(1, 1)).flatten().tolist())
