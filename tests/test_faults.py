# SPDX-License-Identifier: MIT
"""What people met elsewhere, on small files of their kind: told in one line, or right, before time is spent."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
import train

ROOT = Path(train.__file__).parent
TINY = ["--data", "folder", "--backbone", "small", "--crop", "16", "--batch", "2", "--steps", "2", "--workers", "0"]


def folder(root, splits=("train", "val"), classes=("sky", "road"), size=(20, 24), n=2):
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("\n".join(classes))
    rng = np.random.default_rng(0)
    for split in splits:
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(rng.integers(0, len(classes), size, np.uint8)).save(root / split / "labels" / f"{i}.png")
    return root


def run(*flags):
    """What train.py says as it leaves; None if it ends well."""
    try:
        train.main([str(flag) for flag in flags])
    except SystemExit as error:
        return str(error.code)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = folder(tmp_path_factory.mktemp("data") / "set")
    assert run(*TINY, "--root", root, "--out", root / "run") is None
    return root, root / "run" / "last.pt"


def test_labels_that_carry_nothing_are_told_before_training(tmp_path, capsys):
    root = folder(tmp_path / "set")
    for path in (root / "train" / "labels").iterdir():          # 0 and 255, as many tools write foreground
        Image.fromarray(np.full((20, 24), 255, np.uint8)).save(path)
    assert "train: nothing is labelled in its 2 images" in run(*TINY, "--root", root, "--out", tmp_path / "run")
    Image.fromarray(np.where(np.eye(20, 24) > 0, 255, 0).astype(np.uint8)).save(root / "train" / "labels" / "0.png")
    assert run(*TINY, "--root", root, "--out", tmp_path / "run") is None
    assert "train: no pixel of 1 of 2 classes (road)" in capsys.readouterr().out


def test_missing_labels_are_told_at_the_start(tmp_path, capsys):
    root = folder(tmp_path / "set")
    (root / "val" / "labels").rename(root / "val" / "label")
    assert run(*TINY, "--root", root, "--out", tmp_path / "run") is None
    assert "val: no pixel of 2 of 2 classes (sky, road), so there will be no score" in capsys.readouterr().out
    assert "use --predict" in run("--eval", tmp_path / "run" / "last.pt", "--workers", "0")
    (root / "train" / "labels").rename(root / "train" / "label")
    assert "train: nothing is labelled" in run(*TINY, "--root", root, "--out", tmp_path / "other")


@pytest.mark.parametrize("file", ["train", "val"])
def test_a_wrong_label_is_found_at_the_start(tmp_path, file):
    root = folder(tmp_path / "set")
    Image.new("RGB", (24, 20)).save(root / file / "labels" / "1.png")
    said = run(*TINY, "--root", root, "--out", tmp_path / "run")
    assert f"{root / file / 'labels' / '1.png'} has pixels of type RGB" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["JPEG", "BMP"])
def test_a_label_that_is_no_png_says_what_it_is(tmp_path, kind):
    Image.new("L", (4, 4)).save(tmp_path / "a.png", kind)
    with pytest.raises(data.DataError, match=f"is a {kind} file, expected PNG"):
        data.read_ids(tmp_path / "a.png")


@pytest.mark.parametrize("end", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos_are_read_upright(tmp_path, orientation, end):
    """The stored pixels of each orientation, by its definition; read back, all are the same picture."""
    upright = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3) * 40
    stored = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.T, np.rot90(upright, 1),
              upright[::-1, ::-1].T, np.rot90(upright, -1)][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    root = folder(tmp_path / "set", n=1, size=(2, 3))
    (root / "train" / "images" / "0.png").unlink()
    Image.fromarray(stored).convert("RGB").save(root / "train" / "images" / f"0.{end}", exif=exif)
    image, _label = data.load("folder", root)[0]
    assert image[0].tolist() == upright.tolist()
    assert data.Look(data.load("folder", root))[0].sum() == 6   # the size that the label has


def test_pillow_refusals_name_the_file(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (data.read_image, data.read_ids):
        with pytest.raises(data.DataError, match="big.png is no readable picture"):
            read(tmp_path / "big.png")


def test_files_left_out_and_texts_of_other_systems_are_said(tmp_path, capsys):
    root = folder(tmp_path / "set")
    (root / "train" / "images" / "notes.gif").write_text("")
    data.load("folder", root)
    assert "1 files left out, notes.gif is the first" in capsys.readouterr().err
    (root / "classes.txt").write_text("sky\nroad", encoding="utf-16")
    with pytest.raises(data.DataError, match="classes.txt: expected UTF-8"):
        data.load("folder", root)


def test_predictions_are_ids_with_colours_and_replace_only_predictions(trained, tmp_path, capsys):
    root, checkpoint = trained
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, mode in (("a", "RGB"), ("b", "L")):
        Image.new(mode, (24, 20), 90).save(pictures / f"{name}.jpg")
    assert "same name" in run("--predict", checkpoint, pictures, "other/a.png")
    assert run("--predict", checkpoint, pictures, "--out", tmp_path / "out") is None
    assert f"{tmp_path / 'out' / 'b_overlay.png'}\n" in capsys.readouterr().out
    ids = data.read_ids(tmp_path / "out" / "a_mask.png")
    assert ids.shape == Image.open(tmp_path / "out" / "a_overlay.png").size[::-1] == (20, 24)
    assert Image.open(tmp_path / "out" / "a_mask.png").mode == "P" and set(np.unique(ids)) <= {0, 1}
    colours = np.asarray(Image.open(tmp_path / "out" / "a_mask.png").convert("RGB"))
    assert (colours == np.array(data.load("folder", root).palette)[ids]).all()
    (pictures / "a.jpg").write_bytes(b"no picture")             # one bad picture: the other goes on
    Image.new("L", (3, 3)).save(tmp_path / "out" / "b_overlay.png")
    mine = (tmp_path / "out" / "b_overlay.png").read_bytes()
    Image.new("RGB", (24, 20)).save(pictures / "c.webp")
    assert run("--predict", checkpoint, pictures, "--out", tmp_path / "out") == "2 of 3 pictures could not be segmented"
    said = capsys.readouterr().err
    assert "a.jpg is no readable picture" in said and "b_overlay.png was not made by --predict" in said
    assert (tmp_path / "out" / "b_overlay.png").read_bytes() == mine and (tmp_path / "out" / "c_mask.png").exists()


def test_variables_left_over_from_a_launcher_are_named():
    done = subprocess.run([sys.executable, "train.py"], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "RANK": "0", "LOCAL_RANK": "0"})
    assert done.returncode == 1
    assert done.stderr.startswith("RANK is set and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: start with torchrun")


def test_a_place_that_cannot_be_written_is_told_before_the_evaluation(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: pytest.fail("evaluated first"))
    (tmp_path / "file").write_text("")
    said = run("--eval", trained[1], "--root", trained[0], "--workers", "0", "--out", tmp_path / "file" / "out")
    assert "Not a directory" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(tmp_path, workers):
    root = folder(tmp_path / "set", n=4)
    path = root / "train" / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:100])
    said = run(*TINY, "--root", root, "--workers", workers, "--out", tmp_path / "run")
    assert "2.png is no readable picture" in said and "\n" not in said
