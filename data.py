# SPDX-License-Identifier: MIT
"""The data sets: images with one class a pixel, their augmentation, and the boundary masks.

    ribbons          generated scenes, no files, the default     7 classes
    cityscapes       fine and coarse annotations                19
    pascal_context   from .mat files or PNGs                    59; pascal_context60: with the background
    coco_stuff       10k and 164k                              171
    folder           your own images, as classes.txt says

    from data import TrainingSet, load
    scenes = load("ribbons", split="val")
    image, label = scenes[0]                # uint8 [3, h, w]; uint8 [h, w]: 0..N-1, 255 = ignored
    batch = TrainingSet(scenes, crop=96)    # indexed by (index, seed): image, label, boundary mask

Every data set has `len()`, `classes` (N names), `palette` (N colours) and `labelled`: whether the split has labels;
without, they are 255 only. What is wrong with its files is a `DataError` that names the file. Rn in a comment is a
section of docs/differences.md.
"""
import colorsys
import contextlib
import inspect
import itertools
import re
import sys
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as pixels
from tqdm import tqdm

IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet, for values 0..1
PICTURES = ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"


class DataError(ValueError):
    """Something in a data set is missing, broken or out of range; the message says what, where, what was expected."""


def load(name: str, root: str | Path | None = None, split: str = "train") -> Dataset:
    """A data set by name (those above; the class of each shows its folders and splits); root, its folder, is None for
    ribbons. Item i is (image uint8 [3, h, w], label uint8 [h, w], 255 = ignored). DataError for an unknown name or
    split, a missing or empty folder, a missing file."""
    if name not in SETS:
        raise DataError(f"unknown data set {name!r}, expected one of {', '.join(SETS)}")
    if (root is None) != (name == "ribbons"):
        raise DataError("ribbons is generated and has no root; for your own pictures add --data folder" if root
                        else f"{name} needs root, its folder")
    if split not in SETS[name].splits:
        raise DataError(f"unknown split {split!r} of {name}, expected one of {', '.join(SETS[name].splits)}")
    return Ribbons(split) if name == "ribbons" else SETS[name](Path(root), split)


# --- Generated scenes ------------------------------------------------------------------------------------

class Ribbons(Dataset):
    """Ribbons of equal look, parted by walls. A sign in each and one lamp for all say what they are.

    Four ribbons cross the image; two hold a golden sign, two a blue one, anywhere. A lamp, sun or moon, hangs on one of
    the walls. A ribbon is gold or blue by its own sign, which only its region connects to all of its pixels (eqs. 6 and
    8): the sign that is nearest is often a neighbour's. It is of the day or the night by the lamp, of which another
    region has to tell it (eq. 7). Day and night take turns, and nothing else differs.

    So a network that sees neither calls each ribbon pixel one of four: the IoU of a class is p / (1 + 3p) where it gets
    a share p of them, at most 1/7 each in the mean, and with perfect walls and lamps mIoU (3 + 4/7) / 7 = 51 %. One
    that knows the lamp only (pooling; attention, to which all ribbons look alike) or the signs only (regions without
    eq. 7) is left with one of two: p / (1 + p), 1/3 each and mIoU 62 %. One that knows both can reach 100 %. Near a
    sign or the lamp every network sees it.

    The same (seed, split, index) is the same scene everywhere. size: h and w, at least 80.
    """
    classes = "wall", "gold day", "blue day", "gold night", "blue night", "sun", "moon"
    palette = ((60, 50, 45), (245, 195, 100), (150, 185, 240), (150, 95, 15), (35, 55, 130), (230, 75, 45),
               (240, 248, 255))
    splits, labelled = {"train": 2000, "val": 200, "test": 200}, True

    def __init__(self, split: str = "train", seed: int = 0, size: int = 96):
        if size < 80:
            raise DataError(f"size {size}: signs and lamp do not fit, expected at least 80")
        self.split, self.seed, self.size = split, seed, size

    def __len__(self) -> int:
        return self.splits[self.split]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"scene {i} of {len(self)}")
        rng = np.random.default_rng((self.seed, list(self.splits).index(self.split), i))
        image, label = _scene(rng, self.size, night=i % 2)
        return torch.from_numpy(image), torch.from_numpy(label)


GROUNDS = (214, 192, 152), (150, 170, 120), (176, 150, 130), (150, 160, 170), (190, 170, 180)
SIGNS, LAMPS, WALL = ((255, 190, 40), (60, 120, 255)), ((230, 75, 45), (240, 248, 255)), (60, 50, 45)


def _scene(rng: np.random.Generator, size: int, night: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 image [3, size, size] and label [size, size]. `night` draws nothing from rng and shows at the lamp only."""
    y, x = np.mgrid[:size, :size].astype(np.float32)            # [size, size] each
    image = _texture(rng, y, x, GROUNDS[rng.integers(len(GROUNDS))])    # [3, size, size]
    turn = rng.uniform(0, np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    across += rng.uniform(5, 9) * np.sin(2 * np.pi * (along / rng.uniform(60, 110) + rng.uniform()))
    shares = rng.uniform(0.85, 1.15, 4).cumsum()
    walls = across.min() + np.ptp(across) * shares[:3] / shares[3]      # [3]
    ribbon = np.searchsorted(walls, across)                     # [size, size]  0..3
    edge = abs(across - walls[:, None, None]).min(0)            # [size, size]  how far the nearest wall is
    frame = np.minimum(np.minimum(y, x), size - 1 - np.maximum(y, x))
    colour = rng.permutation([0, 0, 1, 1])                      # [4]  of the ribbons' signs

    def place(room, r):
        """[size, size]: how far each pixel lies within a disc of radius r, whose centre has room for it."""
        spots = np.flatnonzero(room >= min(r, room.max()))
        cy, cx = divmod(int(spots[rng.integers(len(spots))]), size)
        return r + 0.5 - np.hypot(y - cy, x - cx)

    def paint(cover, tint):
        image[:] += np.clip(cover, 0, 1) * (np.array(tint, np.float32)[:, None, None] - image)

    lamp = place(np.where(edge < 1, frame, -1), 8.5)
    paint(3 - edge, WALL)
    paint(lamp, LAMPS[night])
    for q in range(4):
        room = np.minimum(np.minimum(edge, -lamp) - 4, frame)   # off walls and lamp
        paint(place(np.where(ribbon == q, room, -9), 5), SIGNS[colour[q]])
    image += rng.normal(0, 4, image.shape)
    label = np.where(edge < 2.5, 0, 1 + colour[ribbon] + 2 * night)
    label[lamp > 0.5] = 5 + night
    return np.clip(image, 0, 255).astype(np.uint8), label.astype(np.uint8)


def _texture(rng, y, x, colour) -> np.ndarray:
    """Ground [3, h, w]: the colour in four waves, lighter towards one side."""
    waves = np.zeros_like(y)
    for length in (6, 11, 23, 60):
        angle = rng.uniform(0, np.pi)
        bend = 2 * np.sin(rng.uniform(0.05, 0.15) * (x * np.sin(angle) - y * np.cos(angle)))
        waves += np.sqrt(length) * np.sin(2 * np.pi / length * (x * np.cos(angle) + y * np.sin(angle)) + bend)
    return np.array(colour, np.float32)[:, None, None] + 2.2 * waves    # [3, h, w]


# --- Data sets in files ----------------------------------------------------------------------------------

class Files(Dataset):
    """Pairs of an image and a label file (None: no label). `ids` holds all that a label may hold: {id: class}, 255
    for ignored. A subclass finds the files; its docstring shows where, and `splits` are the names that `load` takes."""
    splits = "train", "val", "test"
    matrix: str                                                 # the label map's name in a .mat file

    def __init__(self, files: list[tuple[Path, Path | None]], ids: dict[int, int]):
        for path in itertools.chain(*files):                    # now, not after hours of training
            if path and not path.exists():
                raise DataError(f"missing: {path}")
        last = max(set(ids) - {IGNORE})
        self.allowed = f"{min(ids)}..{last}" + (" or 255 for ignored" if IGNORE in ids and last < IGNORE else "")
        self.labelled = any(label for _, label in files)
        self.files, self.table = files, np.full(max(ids) + 3, -1, np.int16)     # of id + 1; both ends are not allowed
        self.table[np.array(list(ids)) + 1] = list(ids.values())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        path, label_path = self.files[i]
        image = read_image(path)                                # [3, h, w]
        label = np.full(image.shape[1:], IGNORE, np.uint8)      # [h, w]
        if label_path:
            ids = read_mat(label_path, self.matrix) if label_path.suffix == ".mat" else read_ids(label_path)
            if ids.shape != label.shape:
                size, expected = (f"{w} x {h}" for h, w in (ids.shape, label.shape))
                turned = ", which its EXIF block turns: turn the label, too" * (ids.shape == label.shape[::-1])
                raise DataError(f"{label_path} is {size} pixels, expected {expected} as its image {path}{turned}")
            label = self.table.take(ids + 1, mode="clip")       # [h, w]
            if label.min() < 0:
                raise DataError(f"{label_path} holds the id {ids[label < 0][0]}, expected {self.allowed}")
        return image, torch.from_numpy(label.astype(np.uint8))

    def need(self, *paths: Path) -> Path:
        """The first of these paths that exists, or an error that shows the expected folders."""
        for path in paths:
            if path.exists():
                return path
        raise DataError(f"missing: {paths[0]}\n{inspect.cleandoc(type(self).__doc__ or '')}".strip())


@contextlib.contextmanager
def reading(path: str | Path, kind: str):
    """Whatever a library says of a file becomes a DataError that names it; what it warns of is not said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except Exception as error:      # noqa: BLE001  besides OSError: bombs, broken chunks, whatever broken bytes lead to
        raise DataError(f"{path} is no readable {kind}: {error}") from None


def upright(picture: Image.Image) -> Image.Image:
    """As its EXIF orientation says, 2 to 8; as it is where that cannot be read."""
    way = Image.Transpose
    turns = dict(enumerate((way.FLIP_LEFT_RIGHT, way.ROTATE_180, way.FLIP_TOP_BOTTOM, way.TRANSPOSE, way.ROTATE_270,
                            way.TRANSVERSE, way.ROTATE_90), 2))
    picture.load()                              # which turns a TIFF
    with contextlib.suppress(Exception):        # whatever a damaged block leads to
        turn = turns.get(picture.getexif().get(0x0112))
        return picture if turn is None else picture.transpose(turn)
    return picture


def read_image(path: str | Path) -> Tensor:
    """uint8 [3, h, w], upright as viewers show it, grey and palette pictures as RGB."""
    with reading(path, "picture of 8 bits, grey or RGB"), Image.open(path) as picture:
        tags = getattr(picture, "tag_v2", {})                   # of a TIFF, whose bands and bits no mode shows
        bits, bands, ink, extra = (tags.get(tag, other) for tag, other in ((258, ()), (277, 1), (262, 1), (338, (0,))))
        if picture.mode[0] in "IF" or ";16" in str(picture.tile[:1]) or any(n > 8 for n in bits):   # Pillow would clip
            raise DataError(f"{path} has pixels of more than 8 bits ({picture.mode}), expected 8 bits a channel")
        if bands - (extra[0] in (1, 2)) not in (1, 3, 4 * (ink == 5)):      # 1, 2: alpha; 5: CMYK
            raise DataError(f"{path} has {bands} bands, expected grey or RGB, of 8 bits a channel")
        return pixels.pil_to_tensor(upright(picture).convert("RGB"))     # [3, h, w]


def read_ids(path: str | Path) -> np.ndarray:
    """int32 [h, w] of an 8-bit label with one channel; of a palette picture, the indices."""
    with reading(path, "picture"), Image.open(path) as picture:
        if picture.format != "PNG":     # JPEG blurs ids
            raise DataError(f"{path} is a {picture.format} file, expected PNG, which keeps ids as they are")
        packed = picture.mode == "L" and "L" not in picture.tile[0][3:]     # Pillow stretches L;1, L;2, L;4
        kind = "grey of less than 8 bits" if packed else picture.mode
        if kind not in ("L", "P"):
            raise DataError(f"{path} has pixels of type {kind}, expected 8-bit ids in one channel")
        return np.asarray(upright(picture)).astype(np.int32)    # [h, w]


def read_mat(path: Path, key: str) -> np.ndarray:
    """int32 [h, w]: a matrix in a MATLAB file. scipy hands it back in whatever type lies on the disk."""
    with reading(path, "MATLAB file"):
        ids = scipy.io.loadmat(path, variable_names=[key]).get(key)
        if np.ndim(ids) != 2:
            raise DataError(f"{path} holds no matrix {key}, the label map")
        return ids.astype(np.int32)                             # [h, w]


def read_lines(path: Path, gaps: bool = True) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8") from None
    if not any(lines):
        raise DataError(f"{path} is empty")
    if not gaps and "" in lines:        # the numbers of the lines count
        raise DataError(f"{path}: line {lines.index('') + 1} is empty")
    return list(filter(None, lines))


def pictures_in(folder: Path, pattern: str) -> list[Path]:
    """The pictures that a pattern finds in a folder, sorted; hidden and other files are skipped and counted."""
    found = {path for path in folder.glob(pattern) if not path.is_dir()}
    pictures = sorted(path for path in found if path.suffix.lower() in PICTURES and path.name[0] != ".")
    rest = sorted(found.difference(pictures))
    if rest:
        print(f"{folder}: {len(rest)} files left out, {rest[0].name} is the first", file=sys.stderr)
    if not pictures:
        raise DataError(f"no pictures {pattern} ({', '.join(PICTURES)}) in {folder}")
    return pictures


def distinct_colours(n: int) -> list[tuple[int, int, int]]:
    # Hues a golden ratio apart, so that neighbours in the list look least alike.
    hsv = [(i * 0.618 % 1, (0.85, 0.5, 0.7)[i % 3], (0.9, 0.75, 0.55)[i // 3 % 3]) for i in range(n)]
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(*c)) for c in hsv]


CITYSCAPES = [c for c in datasets.Cityscapes.classes if 0 <= c.train_id < 19]       # in the order of train_id


class Cityscapes(Files):
    """Expected folders (a level more, named like the zip files, is fine):

        ROOT/leftImg8bit/{train,val,test,train_extra}/CITY/CITY_SSSSSS_FFFFFF_leftImg8bit.png
        ROOT/gtFine/{train,val}/CITY/CITY_SSSSSS_FFFFFF_gtFine_labelIds.png
        ROOT/gtCoarse/train_extra/CITY/CITY_SSSSSS_FFFFFF_gtCoarse_labelIds.png      only for +coarse

    The split test has no labels. No labelTrainIds are needed. The broken troisdorf_000000_000073 is left out.
    """
    splits = {"train": ["train"], "val": ["val"], "test": ["test"], "trainval": ["train", "val"],       # noqa: RUF012
              "train+coarse": ["train", "train_extra"], "trainval+coarse": ["train", "val", "train_extra"]}
    classes, palette = tuple(c.name for c in CITYSCAPES), tuple(c.color for c in CITYSCAPES)

    def __init__(self, root: Path, split: str):
        files = []
        for part in self.splits[split]:
            kind = "gtCoarse" if part == "train_extra" else "gtFine"
            images = self.need(root / "leftImg8bit" / part, *root.glob(f"leftImg8bit_*/leftImg8bit/{part}"))
            labels = None if part == "test" else self.need(root / kind / part, *root.glob(f"{kind}*/{kind}/{part}"))
            for image in pictures_in(images, "*/*_leftImg8bit.png"):
                stem = image.name.removesuffix("_leftImg8bit.png")
                if stem != "troisdorf_000000_000073":
                    files.append((image, labels and labels / image.parent.name / f"{stem}_{kind}_labelIds.png"))
        super().__init__(files, dict.fromkeys((*range(34), IGNORE), IGNORE) | {c.id: c.train_id for c in CITYSCAPES})

    def name(self, i: int) -> str:
        return self.files[i][0].name.removesuffix("_leftImg8bit.png")


def cityscapes_label_ids(prediction: Tensor) -> Tensor:
    """Classes 0..18 to the labelIds that the evaluation server takes; uint8, of the same shape."""
    return torch.tensor([c.id for c in CITYSCAPES], dtype=torch.uint8)[prediction.long().cpu()]


# Names and ids among the 459.
PASCAL_CONTEXT, PASCAL_IDS = zip(*re.findall(r"(\w+) (\d+)", """
aeroplane 2, bag 9, bed 18, bedclothes 19, bench 22, bicycle 23, bird 25, boat 31, book 33, bottle 34, building 44,
bus 45, cabinet 46, car 59, cat 65, ceiling 68, chair 72, cloth 80, computer 85, cow 98, cup 104, curtain 105, dog 113,
door 115, fence 144, floor 158, flower 159, food 162, grass 187, ground 189, horse 207, keyboard 220, light 232,
motorbike 258, mountain 259, mouse 260, person 284, plate 295, platform 296, pottedplant 308, road 324, rock 326,
sheep 347, shelves 349, sidewalk 354, sign 355, sky 360, snow 366, sofa 368, table 397, track 415, train 416, tree 420,
truck 424, tvmonitor 427, wall 440, water 445, window 454, wood 458"""))


class PascalContext(Files):
    """Expected folders: the images, a list of names, and one of two forms of labels:

        ROOT/JPEGImages/YYYY_NNNNNN.jpg
        ROOT/ImageSets/SegmentationContext/{train,val}.txt      or ROOT/ImageSets/Main/{train,val}.txt
        ROOT/trainval/YYYY_NNNNNN.mat                           the official 459 classes (LabelMap), or
        ROOT/SegmentationClassContext/YYYY_NNNNNN.png           0 = background, 1..59 alphabetically

    Both give the same classes, alphabetically. pascal_context ignores the background, pascal_context60 counts it.
    """
    splits = {"train": ["train"], "val": ["val"], "trainval": ["train", "val"]}         # noqa: RUF012
    classes, palette = PASCAL_CONTEXT, tuple(distinct_colours(59))
    background, matrix = IGNORE, "LabelMap"

    def __init__(self, root: Path, split: str):
        forms = {"trainval": PASCAL_IDS, "SegmentationClassContext": range(1, 60)}
        labels = self.need(*(root / form for form in forms))
        end, rest = ("mat", range(460)) if labels.name == "trainval" else ("png", [0])
        ids = {int(id_): n for n, id_ in enumerate(forms[labels.name], len(self.classes) - 59)}
        lists = self.need(root / "ImageSets" / "SegmentationContext", root / "ImageSets" / "Main")
        images = self.need(root / "JPEGImages")
        names = [name for part in self.splits[split] for name in read_lines(self.need(lists / f"{part}.txt"))]
        super().__init__([(images / f"{name}.jpg", labels / f"{name}.{end}") for name in names],
                         {IGNORE: IGNORE, **dict.fromkeys(rest, self.background), **ids})


class PascalContext60(PascalContext):
    __doc__, background = PascalContext.__doc__, 0
    classes, palette = ("background", *PascalContext.classes), ((0, 0, 0), *PascalContext.palette)


# The names of the ids 1..182: 91 things, of which eleven have no annotation, and 91 kinds of stuff.
COCO_STUFF = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:] + """N/A,
banner,blanket,branch,bridge,building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,cloth,clothes,
clouds,counter,cupboard,curtain,desk-stuff,dirt,door-stuff,fence,floor-marble,floor-other,floor-stone,floor-tile,
floor-wood,flower,fog,food-other,fruit,furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,metal,
mirror-stuff,moss,mountain,mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,playingfield,railing,
railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,stairs,stone,straw,
structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,wall-other,wall-panel,
wall-stone,wall-tile,wall-wood,water-other,waterdrops,window-blind,window-other,wood""".replace("\n", "").split(",")


class CocoStuff(Files):
    """Expected folders, of the 10k images (v1.1), or of the 164k:

        ROOT/images/COCO_train2014_NNNNNNNNNNNN.jpg
        ROOT/annotations/COCO_train2014_NNNNNNNNNNNN.mat
        ROOT/imageLists/{train,test}.txt                        val is another name of test

        ROOT/images/{train2017,val2017}/NNNNNNNNNNNN.jpg
        ROOT/annotations/{train2017,val2017}/NNNNNNNNNNNN.png   the stuffthingmaps

    171 classes: of the ids 1..182, those that occur.
    """
    classes, palette = tuple(name for name in COCO_STUFF if name != "N/A"), tuple(distinct_colours(171))
    matrix = "S"

    def __init__(self, root: Path, split: str):
        forms = root / "imageLists", root / "images" / "train2017", root / "images" / "val2017"
        small = self.need(*forms) == forms[0]
        if split == "test" and not small:
            raise DataError("the 164k images of COCO-Stuff have no labelled split test, expected train or val")
        part = "" if small else f"{split}2017"
        images, labels = (self.need(root / kind / part) for kind in ("images", "annotations"))
        if small:
            names = read_lines(self.need(forms[0] / f"{'train' if split == 'train' else 'test'}.txt"))
        else:
            names = [path.stem for path in pictures_in(images, "*.jpg")]
        end, first, unlabelled = ("mat", 1, 0) if small else ("png", 0, IGNORE)         # a PNG holds id - 1
        ids = {i: self.classes.index(x) if x in self.classes else IGNORE for i, x in enumerate(COCO_STUFF, first)}
        super().__init__([(images / f"{name}.jpg", labels / f"{name}.{end}") for name in names],
                         {unlabelled: IGNORE, **ids})


class Folder(Files):
    """Expected folders:

        ROOT/classes.txt                        one class name a line; the line's number, from 0, is its id
        ROOT/{train,val,test}/images/NAME.jpg   or .jpeg, .png, .webp, .tif, .tiff, .bmp
        ROOT/{train,val,test}/labels/NAME.png   8-bit, one channel: ids, 255 = ignored

    val and test may go without the folder labels.
    """

    def __init__(self, root: Path, split: str):
        self.classes = read_lines(self.need(root / "classes.txt"), gaps=False)
        N = len(self.classes)
        if not 2 <= N < IGNORE or len(set(self.classes)) < N:
            raise DataError(f"{root / 'classes.txt'} names {N} classes, expected 2 to 254, each once")
        self.palette = distinct_colours(N)
        images, labels, names = self.need(root / split / "images"), root / split / "labels", {}
        if split == "train":
            self.need(labels)
        def key(path):                      # some systems write an accent as a letter of its own
            return unicodedata.normalize("NFC", path.stem)
        for path in pictures_in(images, "*"):
            other = names.setdefault(key(path), path)
            if other != path:               # one label, and one name for the prediction
                raise DataError(f"{other} and {path.name}: two images of one name")
        found = {key(path): path for path in sorted(labels.glob("[!.]*"), key=lambda path: path.suffix == ".png")}
        alone = sorted(path.name for name, path in found.items() if name not in names and path.suffix == ".png")
        if alone:
            print(f"{labels}: {len(alone)} labels without an image, {alone[0]} is the first", file=sys.stderr)
        files = [(path, found.get(name, labels / f"{name}.png") if labels.exists() else None)
                 for name, path in names.items()]
        super().__init__(files, {IGNORE: IGNORE, **{n: n for n in range(N)}})


SETS = {"ribbons": Ribbons, "cityscapes": Cityscapes, "pascal_context": PascalContext,
        "pascal_context60": PascalContext60, "coco_stuff": CocoStuff, "folder": Folder}


def names(data: Dataset) -> list[int]:
    """What tells two data sets apart: how many images they have, and a hash of their names."""
    return [len(data), zlib.crc32("\n".join(path.name for path, _ in getattr(data, "files", ())).encode())]


def label_pixels(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].flatten().bincount(minlength=256)            # [256]


def look(data: Dataset, mine: range, workers: int, **bar) -> Tensor:
    """[256]: how many pixels of these images have each label. Each picture and label is read once, so that what is
    wrong with one is said before the work."""
    loader = DataLoader(Subset(data, mine), batch_size=None, num_workers=workers, collate_fn=label_pixels)
    return sum(tqdm(loader, **bar), torch.zeros(256, dtype=torch.int64))


# --- From a data set to batches --------------------------------------------------------------------------

class TrainingSet(Dataset):
    """Augmented crops of a data set, indexed by (index, seed): image float32 [3, crop, crop], normalised; label int64
    [crop, crop]; boundary mask uint8 [crop, crop]. The same pair gives the same crop; an index alone, any crop."""

    def __init__(self, dataset: Dataset, crop: int, scale: tuple[float, float] = (1.0, 1.0), radius: float = 2):
        self.dataset, self.crop, self.scale, self.radius = dataset, crop, scale, radius

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, Tensor, Tensor]:
        index, seed = key if isinstance(key, tuple) else (key, int(torch.randint(2 ** 32, ())))
        image, label = augment(*self.dataset[index], seed, self.crop, self.scale)
        # After the augmentation, so that the boundary is as wide at every scale (R11).
        return normalize(image), label.long(), boundary_mask(label, self.radius)


def augment(image: Tensor, label: Tensor, seed: int, crop: int, scale: tuple[float, float] = (0.5, 2.0),
            flip: float = 0.5, brightness: int = 10) -> tuple[Tensor, Tensor]:
    """A random crop [3, crop, crop] and its label [crop, crop], uint8, as functions of the seed only: both scaled by a
    factor from `scale`, padded to the crop (with the mean colour, and 255), mirrored with probability `flip`, and one
    whole number from -brightness to brightness added to all channels. The window is cut first and then scaled, since a
    whole image may be large."""
    rng = torch.Generator().manual_seed(seed)           # its own: the global one belongs to the dropout
    side = max(1, round(crop / torch.empty(()).uniform_(*scale, generator=rng).item()))     # in the image's pixels
    mirrored = torch.rand((), generator=rng) < flip
    shift = int(torch.randint(-brightness, brightness + 1, (), generator=rng))
    top, left = (int(torch.randint(max(n - side, 0) + 1, (), generator=rng)) for n in label.shape)
    size = [min(crop, max(1, round(n * crop / side))) for n in label.shape]     # less if the image is smaller
    above, before = (int(torch.randint(crop - n + 1, (), generator=rng)) for n in size)
    window = ..., slice(top, top + side), slice(left, left + side)
    edges = [before, above, crop - size[1] - before, crop - size[0] - above]
    image = pixels.resize(image[window], size, antialias=True)              # [3, *size]
    # As a picture: "nearest" for labels would lie up to half a pixel beside the image.
    label = pixels.resize(label[None][window], size, InterpolationMode.NEAREST_EXACT)       # [1, *size]
    image = pixels.pad(image, edges, fill=[round(255 * m) for m in MEAN])   # [3, crop, crop]
    label = pixels.pad(label, edges, fill=IGNORE)[0]                        # [crop, crop]
    if mirrored:
        image, label = image.flip(2), label.flip(1)
    return (image.short() + shift).clamp_(0, 255).to(torch.uint8), label


def normalize(image: Tensor) -> Tensor:
    """uint8 [..., 3, h, w] to float32, with the mean and deviation of ImageNet."""
    return pixels.normalize(image / 255, MEAN, STD)


def boundary_mask(label: Tensor, radius: float = 2, band: int = 6) -> Tensor:
    """uint8 [h, w] of a label [h, w]: 1 within `radius` (Euclidean) of a labelled pixel of another class, 255
    where the label is ignored, else 0. The image frame makes no boundary (R11).

    Nor do ignored pixels, except in a narrow band between two classes, as outlines are in some data sets: 1 is also an
    ignored pixel with two classes within `band` pixels (a square), unless it lies in a square of 2 band + 1 pixels a
    side that is ignored everywhere. Outside of the image all is ignored.
    """
    label, side = label.numpy(), 2 * band + 1
    y, x = np.ogrid[-int(radius):int(radius) + 1, -int(radius):int(radius) + 1]
    disc, ignored = y * y + x * x <= radius * radius, label == IGNORE
    filled = np.where(ignored, 0, label)                        # [h, w]
    high = maximum_filter(filled, footprint=disc, mode="nearest")       # [h, w]
    low = minimum_filter(label, footprint=disc, mode="nearest")         # [h, w]
    mask = np.where(ignored, IGNORE, (high > label) | (low < label)).astype(np.uint8)       # [h, w]
    if ignored.any():
        wide = np.pad(ignored, band, constant_values=True).astype(np.uint8)     # [h + 2 band, w + 2 band]
        wide = maximum_filter(minimum_filter(wide, side, mode="constant", cval=1), side)[band:-band, band:-band]
        two = maximum_filter(filled, side, mode="nearest") > minimum_filter(label, side, mode="nearest")        # [h, w]
        mask[ignored & two & (wide == 0)] = 1
    return torch.from_numpy(mask)


def colorize(label: Tensor, palette: list[tuple[int, int, int]]) -> Tensor:
    """uint8 [3, h, w]: a label [h, w] in its colours, ignored pixels black."""
    colours = torch.tensor([*palette, *[(0, 0, 0)] * (256 - len(palette))], dtype=torch.uint8)      # [256, 3]
    return colours[label.long().cpu()].permute(2, 0, 1)     # [3, h, w]
