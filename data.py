# SPDX-License-Identifier: MIT
"""The data sets: images with one class a pixel, their augmentation, and the boundary masks.

    shapes           generated scenes, no files, the default     7 classes
    cityscapes       fine and coarse annotations                19
    pascal_context   from .mat files or PNGs                    59; pascal_context60: with the background
    coco_stuff       10k and 164k                              171
    folder           your own images, as classes.txt says

    from data import TrainingSet, load
    scenes = load("shapes", split="val")
    image, label = scenes[0]                # uint8 [3, h, w]; uint8 [h, w]: 0..N-1, 255 = ignored
    batch = TrainingSet(scenes, crop=72)    # indexed by (index, seed): image, label, boundary mask

Every data set has `len()`, `classes` (N names), `palette` (N colours), `name(i)` (unique, a file stem for
predictions) and `file(i)` (for messages). Whatever is wrong with the files raises `DataError`, which names
the file. A split without labels gives labels of 255 only. Rn in a comment is a line of docs/differences.md.
"""
import colorsys
import contextlib
import inspect
import itertools
import sys
from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import ExifTags, Image, ImageOps
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet, for values 0..1
PICTURES = ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"


class DataError(ValueError):
    """Something in a data set is missing, broken or out of range; the message says what, where, what was expected."""


def load(name: str, root: str | Path | None = None, split: str = "train") -> Dataset:
    """A data set by name; item i is (image uint8 [3, h, w], label uint8 [h, w], 255 = ignored).

    Args:
        name: shapes, cityscapes, pascal_context, pascal_context60, coco_stuff or folder; the class of each shows
            its folders and its splits.
        root: the folder of the data set. None for shapes.
    Raises: DataError for an unknown name or split, a missing or empty folder, a missing file.
    """
    sets = {"shapes": Shapes, "cityscapes": Cityscapes, "pascal_context": PascalContext,
            "pascal_context60": PascalContext60, "coco_stuff": CocoStuff, "folder": Folder}
    if name not in sets:
        raise DataError(f"unknown data set {name!r}, expected one of {', '.join(sets)}")
    if (root is None) != (name == "shapes"):
        raise DataError("shapes is generated and has no root" if root else f"{name} needs root, its folder")
    if split not in sets[name].splits:
        raise DataError(f"unknown split {split!r} of {name}, expected one of {', '.join(sets[name].splits)}")
    if name == "shapes":
        return Shapes(split)
    files = sets[name](Path(root), split)
    for image, label in files.files:        # now, not after hours of training
        if not image.exists():
            raise DataError(f"missing: {image}")
        if label and not label.exists():
            raise DataError(f"missing: {label}, the label of {image}")
    return files


# ---------------------------------------------------------------------------------------------------------
# Generated scenes
# ---------------------------------------------------------------------------------------------------------

class Shapes(Dataset):
    r"""Scenes of balls and stars that are day or night things by the lamp, a small disc far away.

    A golden lamp, the sun, makes every ball a "day ball" and every star a "day star"; a blue one, the moon, makes
    them "night". Nothing else in the picture differs, the lamp is at least 21 pixels from every ball and star, and
    day and night take turns. So a network whose output sees less than 21 pixels around calls the same share p of
    the ball pixels day by day and by night: IoU(day ball) = p / (1 + p), IoU(night ball) = (1 - p) / (2 - p), whose
    sum is highest at p = 1/2: 1/3 each. So is it for the stars, and with the other three classes perfect its mIoU is
    at most (3 + 4/3) / 7 = 61.9 % in the mean over scenes (a split can be a few points off, by its luck).
    A scale augmentation below or above 1 can push the lamp out of the crop: leave it at 1.

    Args:
        split: train (2000 scenes), val (200) or test (200), from different random streams.
        seed: other scenes; the same (seed, split, index) is the same scene everywhere.
        size: h and w, at least 64: image [3, size, size], label [size, size].
    """
    classes = "ground", "sun", "moon", "day ball", "night ball", "day star", "night star"
    palette = ((196, 180, 150), (255, 225, 90), (210, 235, 255), (240, 150, 30), (60, 90, 200), (220, 60, 70),
               (140, 60, 170))
    splits = {"train": 2000, "val": 200, "test": 200}           # noqa: RUF012

    def __init__(self, split: str = "train", seed: int = 0, size: int = 72):
        if size < 64:
            raise DataError(f"size {size}: lamp and shapes do not fit, expected at least 64")
        self.split, self.seed, self.size = split, seed, size

    def __len__(self) -> int:
        return self.splits[self.split]

    def name(self, i: int) -> str:
        return f"{self.split}_{i:04d}"

    def file(self, i: int) -> str:
        return f"shapes (seed {self.seed}), {self.name(i)}"

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        if not 0 <= i < len(self):
            raise IndexError(f"scene {i} of {len(self)}")
        rng = np.random.default_rng((self.seed, list(self.splits).index(self.split), i))
        image, label = _scene(rng, self.size, day=i % 2 == 0)
        return tv_tensors.Image(torch.from_numpy(image)), tv_tensors.Mask(torch.from_numpy(label))


GROUNDS = (214, 192, 152), (150, 170, 120), (176, 150, 130), (150, 160, 170), (190, 170, 180)
COATS = (150, 88, 140), (88, 140, 110), (190, 96, 84), (120, 120, 120), (150, 112, 84), (190, 120, 150)
GAP = 21        # pixels between the lamp and what it decides


def _scene(rng: np.random.Generator, size: int, day: bool) -> tuple[np.ndarray, np.ndarray]:
    """image uint8 [3, size, size], label uint8 [size, size]. `day` draws nothing from rng and is seen at the lamp only."""
    y, x = np.mgrid[:size, :size].astype(np.float32)            # [size, size] each
    image = _texture(rng, y, x, GROUNDS[rng.integers(len(GROUNDS))])    # [3, size, size]
    label = np.zeros((size, size), np.uint8)                    # [size, size]

    lamp_r = rng.uniform(7.5, 9)
    side, along, depth = rng.integers(4), rng.uniform(9, size - 9), rng.uniform(8, 10)
    lamp = [(depth, along), (size - 1 - depth, along), (along, depth), (along, size - 1 - depth)][side]
    from_lamp = np.hypot(y - lamp[0], x - lamp[1])              # [size, size]
    inside = np.minimum(np.minimum(y, x), size - 1 - np.maximum(y, x)) >= 4     # centres keep off the frame

    for kind in rng.permutation([3, 5, rng.integers(1, 3) * 2 + 1]):                  # groups of balls and stars
        coat = COATS[rng.integers(len(COATS))]
        near = None                                             # the first of a group lies anywhere
        for _ in range(rng.integers(1, 3)):                     # ... and the others touch one before
            r = rng.uniform(9.5, 13) * (1.15 if kind == 5 else 1)
            free = inside & (from_lamp > lamp_r + r + GAP + 1)
            if near is not None:
                free &= abs(np.hypot(y - near[0], x - near[1]) - 0.9 * (near[2] + r)) < 1
            spots = np.flatnonzero(free)
            if not len(spots):
                break
            cy, cx = divmod(int(spots[rng.integers(len(spots))]), size)
            near = cy, cx, r
            _draw(rng, image, label, y - cy, x - cx, r, kind, coat, day)

    core = np.clip(lamp_r + 0.5 - from_lamp, 0, 1)              # [size, size]  1 inside, soft at the rim
    glow = np.clip(1.4 - from_lamp / lamp_r, 0, 1)[None] ** 2   # [1, size, size]
    tint = np.array((255, 190, 40) if day else (70, 130, 255), np.float32)[:, None, None]   # [3, 1, 1]
    image += core * (tint + (255 - tint) * glow - image)
    label[core > 0] = 1 if day else 2
    image += rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), label


def _draw(rng, image, label, dy, dx, r, kind, coat, day):
    """Draws one shape into image [3, h, w] and label [h, w]; dy, dx [h, w] are the offsets from its centre."""
    angle, d = np.arctan2(dy, dx), np.hypot(dy, dx)             # [h, w] each
    turn = rng.uniform(0, 2 * np.pi)
    if kind == 3:       # a ball
        edge = np.full_like(d, r)
    else:               # a star with five round arms
        edge = r * (0.75 + 0.25 * np.cos(5 * angle + turn))
    cover = np.clip(edge - d + 0.5, 0, 1)                       # [h, w]  1 inside, soft at the rim
    shadow = np.clip((r + 3 - np.hypot(dy - 2.5, dx - 2.5)) / 4, 0, 1)      # [h, w]
    image *= 1 - 0.35 * shadow

    inward = d / np.maximum(edge, 1)                            # 0 at the centre, 1 at the rim
    shade = 1.15 - 0.25 * (dy + dx) / (1.4 * r) - 0.45 * inward ** 4
    colour = np.array(coat, np.float32) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    skin = colour[:, None, None] * shade                        # [3, h, w]
    if kind == 3:       # a spot of light
        skin += 110 * np.clip(1 - np.hypot(dy + 0.35 * r, dx + 0.35 * r) / (0.4 * r), 0, 1) ** 2
    else:               # ridges along the arms
        skin += 22 * np.cos(5 * angle + turn) * np.clip(inward, 0, 1)
    image += cover * (skin - image)
    label[cover > 0.5] = kind if day else kind + 1


def _texture(rng, y, x, colour) -> np.ndarray:
    """Ground [3, h, w]: the colour in four waves, lighter towards one side."""
    waves = np.zeros_like(y)
    for length in (6, 11, 23, 60):
        angle = rng.uniform(0, np.pi)
        bend = 2 * np.sin(rng.uniform(0.05, 0.15) * (x * np.sin(angle) - y * np.cos(angle)))
        waves += np.sqrt(length) * np.sin(2 * np.pi / length * (x * np.cos(angle) + y * np.sin(angle)) + bend)
    return np.array(colour, np.float32)[:, None, None] + 2.2 * waves    # [3, h, w]


# ---------------------------------------------------------------------------------------------------------
# Data sets in files
# ---------------------------------------------------------------------------------------------------------

class Files(Dataset):
    """Pairs of an image and a label file (None: no label). A subclass fills `files`, a list of such pairs, and
    `table` [ids] int16: the class of each id in a label file, 255 for ignored, -1 for an id it must not hold. Its
    `splits` are the names that `load` takes."""
    files: list[tuple[Path, Path | None]]
    table: np.ndarray
    splits = "train", "val", "test"

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return self.files[i][0].stem

    def file(self, i: int) -> str:
        return str(self.files[i][0])

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image = read_image(self.files[i][0])                    # [3, h, w]
        return tv_tensors.Image(image), tv_tensors.Mask(self.label(i, tuple(image.shape[1:])))

    def label(self, i: int, size: tuple[int, int] | None = None) -> Tensor:
        """uint8 [h, w]: the classes of image i, of whose (h, w) only the header is read if it is not given."""
        path, label_path = self.files[i]
        if size is None:
            with opened(path) as picture:
                # Lies on its side; of a TIFF Pillow gives the upright size.
                turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5 and picture.format != "TIFF"
                size = picture.size if turned else picture.size[::-1]
        if label_path is None:
            return torch.full(size, IGNORE, dtype=torch.uint8)
        ids = self.read_ids(label_path)                         # [h, w]
        if ids.shape != size:
            raise DataError(f"{label_path} is {ids.shape[1]} x {ids.shape[0]} pixels, its image {path} is "
                            f"{size[1]} x {size[0]}: expected the same size")
        known = (0 <= ids) & (ids < len(self.table))
        label = np.where(known, self.table[np.where(known, ids, 0)], -1)
        if label.min() < 0:
            raise DataError(f"{label_path} holds the id {ids[label < 0][0]}, expected {self.allowed()}")
        return torch.from_numpy(label.astype(np.uint8))

    def read_ids(self, path: Path) -> np.ndarray:
        return read_ids(path)

    def allowed(self) -> str:
        ids = np.flatnonzero(self.table[:IGNORE] >= 0)
        return f"{ids[0]}..{ids[-1]}" + (" or 255 for ignored" if len(self.table) > IGNORE else "")

    def need(self, *paths: Path) -> Path:
        """The first of these paths that exists, or an error that shows the expected folders."""
        for path in paths:
            if path.exists():
                return path
        raise DataError(f"missing: {paths[0]}\n{inspect.cleandoc(type(self).__doc__)}")


@contextlib.contextmanager
def opened(path: str | Path):
    """A picture. Whatever Pillow says of it becomes a DataError that names the file."""
    try:
        with Image.open(path) as picture:
            yield picture
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"missing: {path}") from None
    except Exception as error:      # noqa: BLE001  besides OSError: bombs, broken chunks, whatever broken bytes lead to
        raise DataError(f"{path} is no readable picture: {error}") from None


def read_image(path: str | Path) -> Tensor:
    """uint8 [3, h, w], upright as viewers show it, grey and palette pictures as RGB."""
    with opened(path) as picture:
        if picture.mode[0] in "IF":     # Pillow would clip it to 255
            raise DataError(f"{path} has pixels of type {picture.mode}, expected 8 bits a channel")
        return pil_to_tensor(ImageOps.exif_transpose(picture).convert("RGB"))       # [3, h, w]


def read_ids(path: str | Path) -> np.ndarray:
    """int32 [h, w] of an 8-bit label with one channel; of a palette picture, the indices."""
    with opened(path) as picture:
        if picture.format != "PNG":     # JPEG blurs ids
            raise DataError(f"{path} is a {picture.format} file, expected PNG, which keeps ids as they are")
        packed = picture.mode == "L" and "L" not in picture.tile[0][3:]     # Pillow stretches L;1, L;2, L;4
        picture.load()
        if packed or picture.mode not in ("L", "P"):
            kind = "grey of less than 8 bits" if packed else picture.mode
            raise DataError(f"{path} has pixels of type {kind}, expected 8-bit ids in one channel")
        return np.asarray(picture).astype(np.int32)             # [h, w]


def read_mat(path: Path, key: str) -> np.ndarray:
    """int32 [h, w]: a matrix in a MATLAB file. scipy hands it back in whatever type lies on the disk."""
    try:
        ids = np.asarray(scipy.io.loadmat(path, variable_names=[key])[key]).astype(np.int32)
    except FileNotFoundError:
        raise DataError(f"missing: {path}") from None
    except KeyError:
        raise DataError(f"{path} holds no {key}, the label map") from None
    except Exception as error:      # noqa: BLE001  scipy raises whatever the broken bytes lead to
        raise DataError(f"{path} is no readable MATLAB file: {error}") from None
    if ids.ndim != 2:
        raise DataError(f"{path} holds {key} of shape {ids.shape}, expected a matrix")
    return ids                                                  # [h, w]


def id_table(classes: dict[int, int], ignored: tuple[int, ...] = (IGNORE,)) -> np.ndarray:
    """`Files.table` of {id: class} and the ids to ignore."""
    table = np.full(max([*classes, *ignored]) + 1, -1, np.int16)    # [ids]
    table[list(ignored)] = IGNORE
    table[list(classes)] = list(classes.values())
    return table


def distinct_colours(n: int) -> list[tuple[int, int, int]]:
    # Hues a golden ratio apart, so that neighbours in the list look least alike.
    hsv = [(i * 0.618 % 1, (0.85, 0.5, 0.7)[i % 3], (0.9, 0.75, 0.55)[i // 3 % 3]) for i in range(n)]
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(*c)) for c in hsv]


def read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8") from None


# labelId, name and colour of the 19 classes, in the order of their train ids.
CITYSCAPES = [
    (7, "road", (128, 64, 128)), (8, "sidewalk", (244, 35, 232)), (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)), (13, "fence", (190, 153, 153)), (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)), (20, "traffic sign", (220, 220, 0)), (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)), (23, "sky", (70, 130, 180)), (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)), (26, "car", (0, 0, 142)), (27, "truck", (0, 0, 70)), (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)), (32, "motorcycle", (0, 0, 230)), (33, "bicycle", (119, 11, 32))]


class Cityscapes(Files):
    """Expected folders (a level more, named like the zip files, is fine):

        ROOT/leftImg8bit/{train,val,test,train_extra}/CITY/CITY_SSSSSS_FFFFFF_leftImg8bit.png
        ROOT/gtFine/{train,val}/CITY/CITY_SSSSSS_FFFFFF_gtFine_labelIds.png
        ROOT/gtCoarse/train_extra/CITY/CITY_SSSSSS_FFFFFF_gtCoarse_labelIds.png      only for +coarse

    The split test has no labels. The 19 classes are made from labelIds, so no labelTrainIds are needed. The coarse
    image troisdorf_000000_000073 is broken and left out.
    """
    splits = "train", "val", "test", "trainval", "train+coarse", "trainval+coarse"
    classes = tuple(name for _, name, _ in CITYSCAPES)
    palette = tuple(colour for _, _, colour in CITYSCAPES)

    def __init__(self, root: Path, split: str):
        self.root, coarse = root, split.endswith("+coarse")
        split = split.removesuffix("+coarse")
        self.table = id_table({id_: n for n, (id_, _, _) in enumerate(CITYSCAPES)},
                              tuple(set(range(34)) - {id_ for id_, _, _ in CITYSCAPES}) + (IGNORE,))
        self.files = []
        for part in ("train", "val") if split == "trainval" else (split,):
            self.add(part, "leftImg8bit_trainvaltest", "gtFine", "gtFine_trainvaltest")
        if coarse:
            self.add("train_extra", "leftImg8bit_trainextra", "gtCoarse", "gtCoarse")

    def add(self, split: str, image_zip: str, kind: str, label_zip: str) -> None:
        images = self.need(self.root / "leftImg8bit" / split, self.root / image_zip / "leftImg8bit" / split)
        labels = None
        if split != "test":
            labels = self.need(self.root / kind / split, self.root / label_zip / kind / split)
        found = sorted(images.glob("*/*_leftImg8bit.png"))
        if not found:
            raise DataError(f"no CITY/*_leftImg8bit.png in {images}")
        for image in found:
            stem = image.name.removesuffix("_leftImg8bit.png")
            if stem == "troisdorf_000000_000073":
                continue
            label = labels and labels / image.parent.name / f"{stem}_{kind}_labelIds.png"
            self.files.append((image, label))

    def name(self, i: int) -> str:
        return self.files[i][0].name.removesuffix("_leftImg8bit.png")


def cityscapes_label_ids(prediction: Tensor) -> Tensor:
    """Classes 0..18 to the labelIds that the evaluation server takes; uint8, of the same shape."""
    if prediction.numel() and not 0 <= prediction.min() <= prediction.max() <= 18:
        raise DataError(f"classes {int(prediction.min())}..{int(prediction.max())}, expected 0..18")
    return torch.tensor([id_ for id_, _, _ in CITYSCAPES], dtype=torch.uint8)[prediction.long().cpu()]


# The 59 classes in ascending order of their ids among the 459, which is alphabetical ("order B").
PASCAL_CONTEXT = """
  aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling chair cloth
  computer cow cup curtain dog door fence floor flower food grass ground horse keyboard light motorbike mountain mouse
  person plate platform pottedplant road rock sheep shelves sidewalk sign sky snow sofa table track train tree truck
  tvmonitor wall water window wood
""".split()      # noqa: SIM905
PASCAL_CONTEXT_459 = [
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458]
# 59_labels.txt has another order, the 20 VOC classes first ("order A"): the class here of its 1st, 2nd, ...
PASCAL_CONTEXT_ORDER_A = [
    0, 5, 6, 7, 9, 11, 13, 14, 16, 19, 49, 22, 30, 33, 36, 39, 42, 48, 51, 54, 1, 2, 4, 8, 10, 12, 15, 17, 18, 20, 23,
    24, 25, 26, 27, 28, 29, 31, 32, 34, 35, 21, 38, 45, 37, 40, 41, 43, 44, 46, 47, 3, 50, 52, 53, 55, 56, 57, 58]


class PascalContext(Files):
    """Expected folders: the images, a list of names, and one of three forms of labels:

        ROOT/JPEGImages/YYYY_NNNNNN.jpg
        ROOT/ImageSets/SegmentationContext/{train,val}.txt      or ROOT/ImageSets/Main/{train,val}.txt
        ROOT/trainval/YYYY_NNNNNN.mat                           the official 459 classes (LabelMap), or
        ROOT/SegmentationClassContext/YYYY_NNNNNN.png           0 = background, 1..59 alphabetically, or
        ROOT/59_context_labels/YYYY_NNNNNN.png                  0 = background, 1..59 as in 59_labels.txt

    All give the same classes, in alphabetical order. Other forms: the masks of the Detail API and the train.pth
    and val.pth of PyTorch-Encoding have the order of SegmentationClassContext: save them as such PNGs.
    Here the background is ignored; in pascal_context60 it is class 0 (the two scores cannot be compared).
    """
    splits = "train", "val", "trainval"
    background = 0

    def __init__(self, root: Path, split: str):
        background = self.background
        self.classes = ["background"] * background + PASCAL_CONTEXT
        self.palette = [(0, 0, 0)] * background + distinct_colours(59)
        none = 0 if background else IGNORE
        labels = self.need(root / "trainval", root / "SegmentationClassContext", root / "59_context_labels")
        self.mat = labels.name == "trainval"
        order = PASCAL_CONTEXT_ORDER_A if labels.name == "59_context_labels" else range(59)
        ids = PASCAL_CONTEXT_459 if self.mat else [1 + list(order).index(n) for n in range(59)]
        self.table = id_table({**dict.fromkeys(range(460) if self.mat else [0], none),
                               **{id_: n + background for n, id_ in enumerate(ids)}})
        lists = self.need(root / "ImageSets" / "SegmentationContext", root / "ImageSets" / "Main")
        self.need(root / "JPEGImages")
        self.files = []
        for part in ("train", "val") if split == "trainval" else (split,):
            for name in read_lines(self.need(lists / f"{part}.txt")):
                label = labels / f"{name}.{'mat' if self.mat else 'png'}"
                self.files.append((root / "JPEGImages" / f"{name}.jpg", label))
        if not self.files:
            raise DataError(f"{lists} names no images of the split {split}")

    def read_ids(self, path: Path) -> np.ndarray:
        return read_mat(path, "LabelMap") if self.mat else read_ids(path)


class PascalContext60(PascalContext):
    __doc__, background = PascalContext.__doc__, 1


# COCO-Stuff's 182 ids in order; eleven have no annotation, and stand here as "-".
COCO_STUFF = """
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,-,stop sign,parking meter,
bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,-,backpack,umbrella,-,-,handbag,tie,suitcase,frisbee,
skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,-,wine glass,
cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
potted plant,bed,-,dining table,-,-,toilet,-,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,-,book,clock,vase,scissors,teddy bear,hair drier,toothbrush,-,banner,blanket,branch,bridge,
building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,cloth,clothes,clouds,counter,cupboard,
curtain,desk-stuff,dirt,door-stuff,fence,floor-marble,floor-other,floor-stone,floor-tile,floor-wood,flower,fog,
food-other,fruit,furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,metal,mirror-stuff,moss,
mountain,mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,playingfield,railing,railroad,river,road,
rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,stairs,stone,straw,structural-other,table,
tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,wall-other,wall-panel,wall-stone,wall-tile,wall-wood,
water-other,waterdrops,window-blind,window-other,wood
""".replace("\n", "").split(",")


class CocoStuff(Files):
    """Expected folders, of the 10k images (v1.1):

        ROOT/images/COCO_train2014_NNNNNNNNNNNN.jpg
        ROOT/annotations/COCO_train2014_NNNNNNNNNNNN.mat
        ROOT/imageLists/{train,test}.txt                        val is another name of test

    or of the 164k:

        ROOT/images/{train2017,val2017}/NNNNNNNNNNNN.jpg
        ROOT/annotations/{train2017,val2017}/NNNNNNNNNNNN.png   the stuffthingmaps

    171 classes: of the ids 1..182, those that occur.
    """
    classes = tuple(name for name in COCO_STUFF if name != "-")
    palette = tuple(distinct_colours(171))

    def __init__(self, root: Path, split: str):
        used = [id_ for id_, name in enumerate(COCO_STUFF, 1) if name != "-"]
        forms = root / "imageLists", root / "images" / "train2017", root / "images" / "val2017"
        self.mat = self.need(*forms) == forms[0]
        shift = 0 if self.mat else 1                            # a PNG holds id - 1, and 255 for unlabelled
        rest = set(range(1, 183)) - set(used)
        self.table = id_table({id_ - shift: n for n, id_ in enumerate(used)},
                              tuple(id_ - shift for id_ in rest) + ((0,) if self.mat else (IGNORE,)))
        if self.mat:
            names = read_lines(self.need(root / "imageLists" / f"{'train' if split == 'train' else 'test'}.txt"))
            images, labels, end = self.need(root / "images"), self.need(root / "annotations"), "mat"
        else:
            if split == "test":
                raise DataError("the 164k images of COCO-Stuff have no labelled split test, expected train or val")
            images, labels = (self.need(root / kind / f"{split}2017") for kind in ("images", "annotations"))
            names, end = sorted(path.stem for path in images.glob("*.jpg")), "png"
        self.files = [(images / f"{name}.jpg", labels / f"{name}.{end}") for name in names]
        if not self.files:
            raise DataError(f"no images of the split {split} in {images}")

    def read_ids(self, path: Path) -> np.ndarray:
        return read_mat(path, "S") if self.mat else read_ids(path)


class Folder(Files):
    """Expected folders:

        ROOT/classes.txt                        one class name a line; the line's number, from 0, is its id
        ROOT/{train,val,test}/images/NAME.jpg   or .jpeg, .png, .webp, .tif, .tiff, .bmp
        ROOT/{train,val,test}/labels/NAME.png   8-bit, one channel: ids, 255 = ignored

    A split without its folder labels has no labels.
    """

    def __init__(self, root: Path, split: str):
        self.classes = read_lines(self.need(root / "classes.txt"))
        if not 0 < len(self.classes) < IGNORE or len(set(self.classes)) < len(self.classes):
            raise DataError(f"{root / 'classes.txt'} names {len(self.classes)} classes, expected 1 to 254, each once")
        self.palette = distinct_colours(len(self.classes))
        self.table = id_table({n: n for n in range(len(self.classes))})
        images, labels = self.need(root / split / "images"), root / split / "labels"
        found = sorted(path for path in images.iterdir() if path.suffix.lower() in PICTURES)
        rest = sorted(path.name for path in images.iterdir() if path not in found)
        if rest:
            print(f"{images}: {len(rest)} files left out, {rest[0]} is the first", file=sys.stderr)
        if not found:
            raise DataError(f"no pictures ({', '.join(PICTURES)}) in {images}")
        for a, b in itertools.pairwise(found):
            if a.stem == b.stem:        # one label, and one name for the prediction
                raise DataError(f"{a} and {b.name}: two images of one name")
        self.files = [(path, labels / f"{path.stem}.png" if labels.exists() else None) for path in found]


# ---------------------------------------------------------------------------------------------------------
# From a data set to batches
# ---------------------------------------------------------------------------------------------------------

class TrainingSet(Dataset):
    """Augmented crops of a data set, indexed by (index, seed): (image float32 [3, crop, crop], normalised;
    label int64 [crop, crop]; boundary mask uint8 [crop, crop]). The same pair gives the same crop."""

    def __init__(self, dataset: Dataset, crop: int, scale: tuple[float, float] = (1.0, 1.0), radius: float = 2):
        self.dataset, self.crop, self.scale, self.radius = dataset, crop, scale, radius

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        index, seed = key
        image, label = augment(*self.dataset[index], seed, self.crop, self.scale)
        # After the augmentation, so that the boundary is as wide at every scale (R11).
        return normalize(image), label.long(), boundary_mask(label, self.radius)


class Look(Dataset):
    """For each image of a data set in files, [256] int64: how many pixels its label gives to each class. Reads labels
    and the headers of pictures only, so that what is wrong with a file is told before the first step."""

    def __init__(self, files: Files):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return self.files.label(i).flatten().bincount(minlength=256)


def augment(image: Tensor, label: Tensor, seed: int, crop: int, scale: tuple[float, float] = (0.5, 2.0),
            flip: float = 0.5, brightness: int = 10) -> tuple[Tensor, Tensor]:
    """A random crop [3, crop, crop] and its label [crop, crop], uint8, as functions of the seed alone.

    Scales both by a factor from `scale`, pads them to the crop (with the mean colour, and 255), cuts, flips with
    probability `flip`, and adds one whole number from -brightness to brightness to all channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)                           # torch.manual_seed reseeds GPUs too
        factor = torch.empty(()).uniform_(*scale).item()
        size = [max(1, round(s * factor)) for s in label.shape]
        image = v2.functional.resize(image.as_subclass(Tensor), size, antialias=True)       # [3, *size]
        # As a picture: v2's own "nearest" for masks lies up to half a pixel beside the image.
        label = v2.functional.resize(label.as_subclass(Tensor)[None], size, InterpolationMode.NEAREST_EXACT)[0]
        fill = {tv_tensors.Image: [round(255 * m) for m in MEAN], tv_tensors.Mask: IGNORE}
        joint = v2.Compose([v2.RandomCrop(crop, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip(flip)])
        image, label = joint(tv_tensors.Image(image), tv_tensors.Mask(label))
        shift = int(torch.randint(-brightness, brightness + 1, ()))
    image = (image.as_subclass(Tensor).short() + shift).clamp_(0, 255).to(torch.uint8)      # [3, crop, crop]
    return image, label.as_subclass(Tensor)                                 # [crop, crop]


def normalize(image: Tensor) -> Tensor:
    """uint8 [..., 3, h, w] to float32, with the mean and deviation of ImageNet."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (image.as_subclass(Tensor) / 255 - mean) / std


def boundary_mask(label: Tensor, radius: float = 2) -> Tensor:
    """uint8 [h, w] of a label [h, w]: 1 within `radius` (Euclidean) of a labelled pixel of another class, 255
    where the label is ignored, else 0. Ignored pixels and the image frame make no boundary (R11)."""
    label = label.numpy()
    y, x = np.ogrid[-int(radius):int(radius) + 1, -int(radius):int(radius) + 1]
    disc = y * y + x * x <= radius * radius
    high = maximum_filter(np.where(label == IGNORE, 0, label), footprint=disc, mode="nearest")      # [h, w]
    low = minimum_filter(label, footprint=disc, mode="nearest")                                     # [h, w]
    return torch.from_numpy(np.where(label == IGNORE, IGNORE, (high > label) | (low < label)).astype(np.uint8))



def colorize(label: Tensor, palette: list[tuple[int, int, int]]) -> Tensor:
    """uint8 [3, h, w]: a label [h, w] in its colours, ignored pixels black."""
    colours = torch.zeros(256, 3, dtype=torch.uint8)            # [ids, 3]
    colours[:len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return colours[label.as_subclass(Tensor).long().cpu()].permute(2, 0, 1)     # [3, h, w]
