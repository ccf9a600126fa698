# SPDX-License-Identifier: MIT
"""Data sets in their exact real layouts, every kind of broken file, augmentation, boundary masks, generated scenes."""
import inspect
import itertools
import os
import struct
import subprocess
import sys
import unicodedata
import zlib

import numpy as np
import pytest
import scipy.io
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.models.segmentation import FCN_ResNet50_Weights

import data
from test_ranet import close, sizes, tensors


def write(root, files):
    """Texts, MATLAB files (dicts) and pictures, by their paths."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (root / path).write_text(content)
        elif isinstance(content, dict):
            scipy.io.savemat(root / path, content)
        else:
            Image.fromarray(np.asarray(content, dtype=np.uint8)).save(root / path)


def tiff(path, bits=8, bands=3, extra=()):
    """An uncompressed TIFF of 8 x 6 pixels whose last bands are `extra`: 0 is anything, 2 is alpha. Pillow writes none
    of 16 bits a band."""
    tags = {256: [8], 257: [6], 258: [bits] * bands, 259: [1], 262: [2 if bands > 2 else 1], 273: [0], 277: [bands],
            278: [6], 279: [48 * bands * bits // 8], **({338: list(extra)} if extra else {})}
    at, entries, rest = 14 + 12 * len(tags), b"", b""
    tags[273] = [at + 2 * sum(len(x) for x in tags.values() if len(x) > 2)]
    for tag, x in tags.items():
        inline = struct.pack(f"<{len(x)}H", *x)
        entries += struct.pack("<HHI", tag, 3, len(x))
        entries += inline.ljust(4, b"\0") if len(x) <= 2 else struct.pack("<I", at + len(rest))
        rest += inline if len(x) > 2 else b""
    path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + rest
                     + bytes([90, 0][:bits // 8]) * 48 * bands)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, {"classes.txt": "\ufeffroad\nsky\ntree\n\n",       # with a byte order mark
                     "test/images/a.png": np.full((6, 8), 77)})
    for name in "ab":
        write(tmp_path, {f"train/images/{name}.jpg": np.zeros((6, 8, 3)),
                         f"train/labels/{name}.png": [[255, 0, 1, 2, 2, 2, 1, 255]] * 6})
    return tmp_path


def test_data_folder(folder, capsys):
    write(folder, {"train/images/notes.gif": "", "train/images/._a.jpg": ""})
    train = data.load("folder", folder)
    assert "2 files left out, ._a.jpg is the first" in capsys.readouterr().err
    image, label = train[0]
    assert (len(train), train.classes, len(set(train.palette))) == (2, ["road", "sky", "tree"], 3)
    assert image.dtype == label.dtype == torch.uint8 and image.shape == (3, 6, 8)
    assert label.tolist() == [[255, 0, 1, 2, 2, 2, 1, 255]] * 6
    image, label = data.load("folder", folder, "test")[0]      # grey, and without labels
    assert image.tolist() == [[[77] * 8] * 6] * 3 and label.tolist() == [[255] * 8] * 6
    assert train.labelled and not data.load("folder", folder, "test").labelled


def test_data_folder_pairs_and_what_has_no_partner(folder, capsys):
    for kind, form in (("images", "NFD"), ("labels", "NFC")):       # as two systems write one name
        write(folder, {f"train/{kind}/{unicodedata.normalize(form, chr(233))}.png": np.zeros((6, 8))})
    write(folder, {"train/labels/lone.png": np.zeros((6, 8)), "train/labels/._a.png": ""})
    (folder / "train/images/photos.jpg").mkdir()
    train = data.load("folder", folder)
    assert len(train) == 3 and train[2][1].shape == (6, 8)
    assert "train/labels: 1 labels without an image, lone.png is the first" in capsys.readouterr().err
    (folder / "train/labels/a.png").rename(folder / "train/labels/a.jpg")
    Image.new("L", (8, 6)).save(folder / "train/labels/a.jpg")
    pytest.raises(data.DataError, data.load("folder", folder).__getitem__, 0).match("a.jpg is a JPEG file")


@pytest.mark.parametrize("bits, bands, extra, said", [
    (8, 1, (), ""), (8, 3, (), ""), (8, 4, (2,), ""), (8, 2, (2,), ""), (16, 3, (), "more than 8 bits"),
    (16, 4, (0,), "more than 8 bits"), (16, 1, (), "more than 8"), (8, 4, (0,), "4 bands"), (8, 2, (0,), "2 bands"),
    (8, 5, (0, 0), "5 bands"), (8, 7, (), "no readable picture of 8 bits, grey or RGB")])
def test_data_takes_8_bits_and_bands_that_it_knows(tmp_path, bits, bands, extra, said):
    tiff(tmp_path / "a.tif", bits, bands, extra)
    if said:
        pytest.raises(data.DataError, data.read_image, tmp_path / "a.tif").match(f"a.tif .*{said}")
    else:
        assert data.read_image(tmp_path / "a.tif").unique().tolist() == [90]


@pytest.mark.parametrize("end", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_data_turned_photos_are_read_upright(folder, orientation, end):
    """The stored pixels of each orientation, by its definition; read back, all are the same picture."""
    upright = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    stored = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.T, np.rot90(upright, 1),
              upright[::-1, ::-1].T, np.rot90(upright, -1)][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    if end == "png":                                            # the same, with a resolution that is a text
        entries = struct.pack("<HHII", 0x0112, 3, 1, orientation), struct.pack("<HHI4s", 0x011A, 2, 3, b"72")
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(4)
    (folder / "train/images/a.jpg").unlink()
    Image.fromarray(stored).convert("RGB").save(folder / f"train/images/a.{end}", exif=exif)
    train = data.load("folder", folder)
    assert train[0][0][0].tolist() == upright.tolist() and train[0][1].shape == (6, 8)     # the label's size
    if orientation > 4:                                         # a label drawn on the stored pixels
        Image.fromarray(stored % 3).save(folder / "train/labels/a.png")
        pytest.raises(data.DataError, train.__getitem__, 0).match("expected 8 x 6 .*EXIF block turns: turn the label")
    Image.fromarray(stored % 3).save(folder / "train/labels/a.png", exif=exif)      # a tool that copied the block
    assert train[0][1].tolist() == (upright % 3).tolist()


@pytest.mark.parametrize("deep", [False, True])
def test_data_cityscapes(tmp_path, deep):
    classes = dict(zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19)))
    ids = np.array([*range(34), 255] * 2).reshape(7, 10)
    for stem in ("train/aachen/aachen_000000_000019", "train/bad-honnef/bad-honnef_000001_000019",
                 "val/lindau/lindau_000000_000019", "test/berlin/berlin_000000_000019",
                 "train_extra/troisdorf/troisdorf_000000_000073", "train_extra/troisdorf/troisdorf_000000_000074"):
        images, kind, labels = ("leftImg8bit_trainextra/", "gtCoarse", "gtCoarse/") if "extra" in stem else (
            "leftImg8bit_trainvaltest/", "gtFine", "gtFine_trainvaltest/")
        write(tmp_path, {f"{images * deep}leftImg8bit/{stem}_leftImg8bit.png": np.zeros((7, 10, 3)),
                         **{f"{labels * deep}{kind}/{stem}_{kind}_{what}.png": ids for what in ("labelIds", "color")}})
    train, _, test, *_, coarse = sets = [data.load("cityscapes", tmp_path, x) for x in data.Cityscapes.splits]
    assert list(map(len, sets)) == [2, 1, 1, 3, 3, 4]           # trainval, train+coarse, trainval+coarse come last
    assert (train.classes[0], train.classes[18], train.palette[13]) == ("road", "bicycle", (0, 0, 142))
    assert (test[0][1] == 255).all() and test.name(0) == "berlin_000000_000019"
    assert coarse.name(3) == "troisdorf_000000_000074"
    expected = [[classes.get(i, 255) for i in row] for row in ids.tolist()]
    assert train[0][1].tolist() == coarse[3][1].tolist() == expected
    assert data.cityscapes_label_ids(torch.arange(19)).tolist() == list(classes)


@pytest.mark.parametrize("form, lists, label", [        # none, aeroplane, bag, unknown, wood, table
    ("trainval", "Main", {"LabelMap": np.array([[0, 2, 9, 431, 458, 397]], np.uint16)}),
    ("SegmentationClassContext", "SegmentationContext", [[0, 1, 2, 0, 59, 50]])])
def test_data_pascal_context_forms_agree(tmp_path, form, lists, label):
    for name in ("2008_000002", "2008_000003"):
        write(tmp_path, {f"JPEGImages/{name}.jpg": np.zeros((1, 6, 3)),
                         f"{form}/{name}.{'mat' if form == 'trainval' else 'png'}": label})
    write(tmp_path / "ImageSets" / lists, {"train.txt": "2008_000002\n", "val.txt": "2008_000003\n\n"})
    set59, set60 = (data.load(f"pascal_context{n}", tmp_path, "val") for n in ("", 60))
    assert set59[0][1].tolist() == [[255, 0, 1, 255, 58, 49]] and set60[0][1].tolist() == [[0, 1, 2, 0, 59, 50]]
    assert set60.classes == ("background", *set59.classes) and len(set60.palette) == 60
    assert len(data.load("pascal_context", tmp_path, "trainval")) == 2
    (tmp_path / "JPEGImages" / "2008_000002.jpg").unlink()      # said at once, not when its turn comes
    error = pytest.raises(data.DataError, data.load, "pascal_context", tmp_path, "train")
    error.match("missing: .*JPEGImages.*2008_000002.jpg$")


def test_data_pascal_context_tables():
    ids = list(map(int, data.PASCAL_IDS))
    assert list(data.PASCAL_CONTEXT) == sorted(set(data.PASCAL_CONTEXT)) and len(data.PASCAL_CONTEXT) == 59
    assert ids == sorted(set(ids)) and sum(ids) == 12378
    voc = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:]
    assert {name.removeprefix("dining") for name in voc} <= set(data.PASCAL_CONTEXT)


def test_data_coco_stuff_forms_agree(tmp_path):
    ids = np.arange(183).reshape(3, 61)
    small, large, name = tmp_path / "10k", tmp_path / "164k", "COCO_train2014_000000000077"
    write(small, {f"images/{name}.jpg": np.zeros((3, 61, 3)), "imageLists/train.txt": name, "imageLists/test.txt": name,
                  f"annotations/{name}.mat": {"S": ids.astype(float), "captions": "a cat"}})
    for split in ("train2017", "val2017"):
        write(large, {f"images/{split}/000000000009.jpg": np.zeros((3, 61, 3)),
                      f"annotations/{split}/000000000009.png": np.where(ids == 0, 255, ids - 1)})
    lost = [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]
    expected = [[255 if i in lost else i - sum(m <= i for m in lost) for i in row] for row in ids.tolist()]
    for root, splits in ((small, ("train", "val", "test")), (large, ("train", "val"))):
        assert all(data.load("coco_stuff", root, split)[0][1].tolist() == expected for split in splits)
    assert len(set(data.CocoStuff.classes)) == 171 and data.CocoStuff.classes[79:81] == ("toothbrush", "banner")
    pytest.raises(data.DataError, data.load, "coco_stuff", large, "test").match("no labelled split test")
    for label, said in [({"S": np.full((3, 61), -1)}, "holds the id -1, expected 0..182$"),
                        ({"S": np.full((3, 61), 70000)}, "holds the id 70000"), ({"T": ids}, "holds no matrix S"),
                        ({"S": np.ones((3, 61, 3))}, "holds no matrix S"), ("text", "is no readable MATLAB file")]:
        write(small, {f"annotations/{name}.mat": label})
        pytest.raises(data.DataError, data.load("coco_stuff", small).__getitem__, 0).match(f"{name}.mat {said}")


@pytest.mark.parametrize("breakage, said", [
    (lambda r: (r / "classes.txt").unlink(), "missing: .*classes.txt\n.*Expected folders"),
    (lambda r: write(r, {"classes.txt": "\n"}), "classes.txt is empty"),
    (lambda r: write(r, {"classes.txt": "road\nroad\n"}), "classes.txt names 2 classes, .* each once"),
    (lambda r: write(r, {"classes.txt": "road\n"}), "classes.txt names 1 classes, expected 2 to 254"),
    (lambda r: write(r, {"classes.txt": "road\n\nsky\n"}), "classes.txt: line 2 is empty"),
    (lambda r: (r / "classes.txt").write_text("sky\nroad", encoding="utf-16"), "classes.txt: expected UTF-8"),
    (lambda r: (r / "train/labels/b.png").unlink(), "missing: .*b.png"),
    (lambda r: (r / "train/labels").rename(r / "train/masks"), "missing: .*train/labels\n.*Expected folders"),
    (lambda r: write(r, {"train/images/a.b.png": [[0]], "train/images/a.png": [[0]]}), "a.jpg and a.png: two images"),
    (lambda r: [path.unlink() for path in (r / "train/images").iterdir()], "no pictures"),
    (lambda r: Image.new("I;16", (8, 6)).save(r / "train/images/a.jpg", "PNG"), "a.jpg has pixels .* expected 8 bits"),
    *((lambda r, path=path: Image.new("1", (14000, 13000)).save(r / path, "PNG"), f"{path} is no readable picture")
      for path in ("train/images/a.jpg", "train/labels/a.png")),      # Pillow refuses so many pixels
    *((lambda r, kind=kind: Image.new("L", (8, 6)).save(r / "train/labels/a.png", kind), f"a.png is a {kind} file, exp")
      for kind in ("JPEG", "BMP")),
    (lambda r: write(r, {"train/labels/a.png": [[3] * 8] * 6}), "a.png holds the id 3, expected 0..2 or 255 for ig"),
    (lambda r: write(r, {"train/labels/a.png": [[2] * 3] * 6}), "a.png is 3 x 6 pixels, expected 8 x 6 as .*a.jpg$"),
    (lambda r: data.load("pictures", r), "unknown data set 'pictures'"),
    (lambda r: data.load("folder"), "needs root"),
    (lambda r: data.load("folder", r, "trainval"), "unknown split 'trainval' of folder, .* train, val, test"),
    (lambda r: data.load("ribbons", r), "has no root"),
    (lambda r: data.load("cityscapes", r), r"missing: .*leftImg8bit/train\n.*Expected folders"),
    *((lambda r, name=name: data.load(name, r), "Expected folders") for name in ("coco_stuff", "pascal_context60"))])
def test_data_says_what_is_wrong(folder, breakage, said):
    with pytest.raises(data.DataError, match=f"(?s){said}"):
        breakage(folder)
        data.load("folder", folder)[0]


@pytest.mark.parametrize("bits, ids", [(1, [0, 1, 1, 0]), (2, [0, 1, 2, 3]), (4, [0, 1, 14, 15]), (8, [0, 1, 77, 255])])
def test_data_palette_labels_are_indices_and_packed_grey_ones_are_refused(tmp_path, bits, ids):
    label, file = Image.fromarray(np.array([ids], np.uint8)), tmp_path / "packed.png"
    label.putpalette(bytes(768))
    label.save(file, bits=bits)
    assert data.read_ids(file).tolist() == [ids]
    if bits < 8:        # Pillow stretches 4-bit ids 0, 1, 15 to 0, 17, 255, the last of which would pass for "ignored"
        png = bytearray(file.read_bytes())
        png[25] = 0                                             # the header says grey; Pillow itself writes none
        png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
        file.write_bytes(png)
        pytest.raises(data.DataError, data.read_ids, file).match("packed.png has pixels of type (1|grey).*8-bit")


def test_data_augmentation_hangs_on_the_seed_only_and_keeps_image_and_label_together(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeds GPUs, and with them dropout"))
    label = torch.arange(30, dtype=torch.uint8).view(5, 6).repeat_interleave(12, 0).repeat_interleave(12, 1) * 7 % 5
    image = (label * 50).expand(3, -1, -1).contiguous()          # the image shows the label
    state, seen = torch.get_rng_state(), set()
    for seed in range(30):
        (a, b), again = (data.augment(image, label, seed, 40, brightness=0) for _ in range(2))
        assert a.shape == (3, 40, 40) and b.shape == (40, 40) and torch.equal(a, again[0]) and torch.equal(b, again[1])
        inside = b != 255
        assert ((a[0] / 50 - b).abs() > 0.5)[inside].float().mean() < 0.2, "they agree, but for blurred edges"
        assert (a[:, ~inside].T == torch.tensor([124, 116, 104])).all()      # ImageNet's mean colour
        seen.add(b.numpy().tobytes())
    assert len(seen) == 30 and torch.equal(torch.get_rng_state(), state)
    grey = torch.full_like(image, 100)
    greys = [data.augment(grey, label, seed, 40, (1, 1))[0].unique().tolist() for seed in range(60)]
    assert all(len(grey) == 1 and 90 <= grey[0] <= 110 for grey in greys) and len(set(map(tuple, greys))) > 10


@pytest.mark.parametrize("factor", [0.6, 0.7, 1.3, 1.9])
def test_data_augment_resizes_label_and_image_about_the_same_point(factor):
    # on a ramp of classes, painted in grey of the same number; "nearest" lags by up to half a pixel
    label = torch.arange(100, dtype=torch.uint8).expand(100, 100)
    image, label = data.augment(label.expand(3, 100, 100), label, 0, round(100 * factor), (factor, factor), 0, 0)
    assert abs((image[0].float() - label.float())[:, 3:-3].mean()) < 0.1


@given(sizes | st.just((9, 10)), st.sampled_from([1, 1.5, 2, 3]), st.integers(1, 2), st.sampled_from([1, 3]), st.data())
def test_data_boundary_mask_equals_the_loop(size, radius, band, ignored, draw):
    label = draw.draw(tensors(size, st.sampled_from([0.0, 0.0, 1.0, 7.0] + ignored * [255.0]))).to(torch.uint8)
    expected, near = label.tolist(), list(itertools.product(range(-band, band + 1), repeat=2))
    places = {(y, x): n for y, row in enumerate(label.tolist()) for x, n in enumerate(row) if n != 255}
    for y, x in np.ndindex(size):
        classes = {places[at] for at in [(y + v, x + u) for v, u in near] if at in places}
        squares = ([(y + a + v, x + b + u) for v, u in near] for a, b in near)
        if (y, x) in places:
            expected[y][x] = int(any((y - v) ** 2 + (x - u) ** 2 <= radius ** 2 and m != places[y, x]
                                     for (v, u), m in places.items()))
        elif len(classes) > 1 and all(any(at in places for at in square) for square in squares):
            expected[y][x] = 1
    assert data.boundary_mask(label, radius, band).tolist() == expected


def test_data_boundary_mask_of_an_outlined_object():
    """As VOC has it: an object with an outline of 5 ignored pixels; padding, and another ignored part 30 wide."""
    label = torch.full((90, 120), 255, dtype=torch.uint8)
    label[:80, :110], label[20:60, 10:50], label[25:55, 15:45], label[:70, 70:100] = 0, 255, 3, 255
    mask = data.boundary_mask(label)
    assert (mask[20:60, 10:50][label[20:60, 10:50] == 255] == 1).all() and (mask == 1).sum() == 40 ** 2 - 30 ** 2
    assert (mask[80:] == 255).all() and (mask[:70, 70:100] == 255).all()


@pytest.mark.parametrize("old, new", [
    ("& two & (wide == 0)", "& two"), ("& two & (wide == 0)", "& (wide == 0)"),
    ("constant_values=True", "constant_values=False"), ("cval=1", "cval=0"), ("2 * band + 1\n", "2 * band - 1\n")])
def test_data_boundary_mutants_are_caught(old, new, monkeypatch):
    source, mutant = inspect.getsource(data.boundary_mask), dict(vars(data))
    assert source.count(old) == 1
    exec(source.replace(old, new), mutant)                      # noqa: S102
    monkeypatch.setattr(data, "boundary_mask", mutant["boundary_mask"])
    with pytest.raises(AssertionError):
        test_data_boundary_mask_equals_the_loop()


def test_data_training_set():
    scenes = data.load("ribbons", split="val")
    image, label, mask = data.TrainingSet(scenes, crop=64)[3, 7]
    assert (image.dtype, label.dtype, mask.dtype) == (torch.float32, torch.int64, torch.uint8)
    raw, cut = data.augment(*scenes[3], 7, 64, (1.0, 1.0))
    assert torch.equal(label, cut.long()) and torch.equal(mask, data.boundary_mask(cut))
    image, label, mask = next(iter(DataLoader(data.TrainingSet(scenes, crop=64), 2, shuffle=True)))     # any seeds
    assert image.shape == (2, 3, 64, 64) and label.shape == mask.shape == (2, 64, 64)
    raw, cut = data.augment(*scenes[3], 7, 64, (1.0, 1.0))
    image, label, mask = data.TrainingSet(scenes, crop=64)[3, 7]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    close(image, (raw / 255 - mean) / std)
    assert data.colorize(torch.tensor([[0, 255]]), [(1, 2, 3)]).tolist() == [[[1, 0]], [[2, 0]], [[3, 0]]]


def test_data_ribbons_are_functions_of_seed_split_and_index():
    train, val = data.load("ribbons"), data.load("ribbons", split="val")
    code = "import data; print([data.load('ribbons')[i][0].tolist() for i in (0, 5)])"
    other = subprocess.check_output([sys.executable, "-c", code], cwd=os.path.dirname(data.__file__), text=True)
    assert other.strip() == str([train[i][0].tolist() for i in (0, 5)])
    assert len({image.numpy().tobytes() for image, _ in (train[0], train[1], val[0], data.Ribbons(seed=1)[0])}) == 4
    assert set(torch.cat([train[i][1].unique() for i in range(20)]).tolist()) == set(range(7))
    assert data.Ribbons(size=100)[0][0].shape == (3, 100, 100)
    pytest.raises(data.DataError, data.Ribbons, size=60).match("size 60.* at least 80")


def test_data_ribbons_are_told_by_their_sign_and_the_lamp_only():
    train, pieces = data.load("ribbons"), 0
    for i in range(60):
        assert set(train[i][1].unique().tolist()) == ({0, 3, 4, 6} if i % 2 else {0, 1, 2, 5})
        (day, label), (night, other) = (data._scene(np.random.default_rng(i), 96, night) for night in (0, 1))
        assert (other == np.array([0, 3, 4, 0, 0, 6])[label]).all()
        lamp = (day != night).any(0)
        assert np.ptp(np.argwhere(lamp), axis=0).max() <= 20 and lamp[label == 5].all(), "they differ at the lamp only"
        signs = [(abs(day - np.array(sign)[:, None, None]) < 25).all(0) for sign in data.SIGNS]
        ribbons, n = scipy.ndimage.label(np.where(label == 5, 0, label))
        for piece in (ribbons == k for k in range(1, n + 1)):
            if piece.sum() > 300:                               # not what the frame cuts off
                pieces += 1
                own, foreign = (signs[c][piece].sum() for c in (label[piece][0] - 1, 2 - label[piece][0]))
                assert own > 20 and foreign == 0
    assert pieces > 220


def test_data_ribbons_bounds_are_those_that_are_said():
    """mIoU of the best guess among as many classes as are left, in their shares."""
    labels = [data.load("ribbons")[i][1].flatten() for i in range(200)]
    counts = np.array([label.bincount(minlength=7).tolist() for label in labels]).sum(0)
    def best(groups):
        iou = [c * p / (c + p * (counts[g].sum() - c)) for g in groups for p in [1 / len(g)] for c in counts[g]]
        return (3 + sum(iou)) / 7
    assert best([[1, 2, 3, 4]]) == pytest.approx(0.51, abs=0.01)
    assert best([[1, 2], [3, 4]]) == pytest.approx(best([[1, 3], [2, 4]]), abs=0.01) == pytest.approx(0.62, abs=0.01)
