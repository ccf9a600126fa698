# SPDX-License-Identifier: MIT
"""The two commands and what they share: resuming, processes, models, evaluation, and what is said of mistakes."""
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
import launch
import models
import ranet
import train

torch.set_num_threads(1)
TINY = ["--crop", "32", "--batch", "4", "--workers", "0"]

# What a child process runs: the code that it is given, then few scenes on one thread.
CHILD = f"""
import os, sys
sys.path[:0] = {sys.path!r}
import torch, data, {Path(__file__).stem} as tests
torch.set_num_threads(1)
data.Ribbons.splits = dict(train=16, val=3, test=3)
exec(sys.argv.pop(1))
tests.run(*sys.argv[1:])
"""


def plain(setattr):
    """For a comparison of one process with two: images are normalised one by one, the second loses its running
    statistics, no layer draws numbers, few pixels are of class 0 (which NaN says), unequal shares are ignored."""
    scene, momentum = data.Ribbons.__getitem__, math.nan if os.environ.get("RANK") == "1" else 0.1
    def changed(self, i):
        image, label = scene(self, i)
        return image, (6 - label).index_fill(0, torch.arange(4 * i), 255)
    setattr(nn.BatchNorm2d, "forward", lambda self, x: nn.functional.instance_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum))
    setattr(nn, "Dropout2d", lambda _share: nn.Identity())
    setattr(data.Ribbons, "__getitem__", changed)


def at_step(setattr, call, happens):
    """What happens to the loss of the given step."""
    losses, loss = [], ranet.ranet_loss
    def watched(*args, **options):
        losses.append(loss(*args, **options))
        return happens(losses[-1]) if len(losses) == call else losses[-1]
    setattr(ranet, "ranet_loss", watched)


def ends(error, *_given, **_options):
    raise error


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(data.Ribbons, "splits", {"train": 16, "val": 3, "test": 3})
    monkeypatch.chdir(tmp_path)
    Path("child.py").write_text(CHILD)


def run(*flags):
    """train.py with these flags, or evaluate.py, where that is the first."""
    program = evaluate if flags[:1] == ("evaluate",) else train
    program.main([str(flag) for flag in flags[program is evaluate:]])


def child(*flags, processes=1, code=""):
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    return subprocess.run([sys.executable, *start, "child.py", code, *map(str, flags)], timeout=120,
                          capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


def fails(*flags):
    with pytest.raises(SystemExit) as error:
        run(*flags)
    message = error.value.code
    assert message and len(message) < 400 and "\n" not in message and "Traceback" not in message
    return message


def load(path="out/last.pt"):
    return torch.load(path, weights_only=True)


def log(out="out"):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def same(a, b):
    """Bitwise, whatever the nesting."""
    return json.dumps(a, default=torch.Tensor.tolist) == json.dumps(b, default=torch.Tensor.tolist)


# --- a run, and its continuation -------------------------------------------------------------------------
def test_train_writes_what_it_says_the_same_for_the_same_seed(capsys):
    run(*TINY, "--steps", 2, "--out", "out")
    first, metrics = load(), json.loads(Path("out/metrics.json").read_text())
    assert first["step"] == 2 and first["args"]["k"] == 8 and first["args"]["context"] == "ranet"
    assert " ".join(metrics) == "data context backbone protocol steps seed fine_miou coarse_miou pixels classes"
    assert metrics["classes"].keys() == set(data.Ribbons.classes) and metrics["steps"] == 2
    assert f"{100 * metrics['fine_miou']:.1f}" in capsys.readouterr().out
    assert Path("out/overview.png").stat().st_size > 10000
    line = log()[0]
    assert " ".join(line) == "step loss fine coarse boundary lr regions largest mean_B mean_J"
    assert line["loss"] == pytest.approx(line["fine"] + line["coarse"] + line["boundary"])
    assert 1 <= line["regions"] <= 64 and 0 < line["largest"] <= 1 and 0 < line["mean_B"] < 1
    assert [row["lr"] for row in log()] == pytest.approx(train.RECIPES["ribbons"]["lr"] * np.array([1, 0.5]))
    assert "--resume" in fails(*TINY, "--steps", 2, "--out", "out")
    run(*TINY, "--steps", 2, "--out", "again", "--resume")      # without a checkpoint it starts
    assert same(load("again/last.pt"), first)
    run(*TINY, "--steps", 2, "--out", "other", "--seed", 1)
    assert not torch.equal(load("other/last.pt")["model"]["classify.weight"], first["model"]["classify.weight"])


def test_train_resumes_bitwise_after_kill_9():
    flags = *TINY, "--steps", 40                        # a checkpoint every 2
    run(*flags, "--out", "whole")
    killed = child(*flags, "--out", "out", code="tests.at_step(setattr, 40, lambda _: os.kill(os.getpid(), 9))")
    assert killed.returncode == -9 and load()["step"] == 38 and len(log()) == 39    # a line beyond the checkpoint
    with open("out/log.jsonl", "a") as file:
        file.write('{"step": 40, "lo')                   # and half of one
    assert "--resume" in fails(*flags, "--out", "out") and load()["step"] == 38
    run("--out", "out", "--resume", "--workers", 1)     # the rest is in the checkpoint
    assert same(load(), load("whole/last.pt")) and log() == log("whole")
    assert Path("out/metrics.json").read_text() == Path("whole/metrics.json").read_text()
    run("--out", "out", "--resume", "--workers", 0)     # a finished run: evaluated again, nothing else
    assert same(load(), load("whole/last.pt")) and log() == log("whole")


def test_train_a_full_disk_keeps_the_checkpoint(monkeypatch):
    flags = *TINY, "--steps", 4, "--out", "out"
    with monkeypatch.context() as patch:
        at_step(patch.setattr, 3, partial(ends, KeyboardInterrupt()))
        assert "step 2: interrupted; out/last.pt is whole, and --resume goes on from it" in fails(*flags)
    before = Path("out/last.pt").read_bytes()
    Path("out/last.pt.tmp").symlink_to("/dev/full")
    message = fails("--out", "out", "--resume", "--workers", 0)
    assert "step 2: the checkpoint could not be written (No space left on device); out/last.pt is whole" in message
    assert Path("out/last.pt").read_bytes() == before and not Path("out/last.pt.tmp").is_symlink()


@pytest.mark.parametrize("happens, said", [
    (lambda loss: loss._replace(total=loss.total / 0), "step 1: the loss is inf; start anew with a lower --lr"),
    (partial(ends, RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                                "dataloader's workers are out of shared memory.")),
     "too little shared memory for workers: raise it"),
    (partial(ends, data.DataError("banana.png is no readable picture")), "picture; out/last.pt is whole, and --resume"),
    (partial(ends, RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore")), "a smaller --crop"),
    (partial(ends, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")), "step 1: a process that"),
    (partial(ends, RuntimeError("received 0 items of ancdata")), "too many open files: raise the limit"),
    (partial(ends, OSError(24, "Too many open files")), "or use fewer --workers; out/last.pt is whole, and --resume"),
    (partial(ends, OSError(5, "Input/output error", "a/b.png")), "step 1: a/b.png: Input/output error; out/last.pt"),
    (partial(ends, ValueError("Expected more than 1 value per channel when training")), "use a larger --batch"),
    (lambda _loss: ends(torch._dynamo.exc.TorchDynamoException("No working C++ compiler\nmore")),       # --compile
     "step 1: No working C++ compiler; out/last.pt is whole")])
def test_train_says_what_ended_it(monkeypatch, happens, said):
    at_step(monkeypatch.setattr, 2, happens)
    assert said in fails(*TINY, "--context", "none", "--steps", 6, "--out", "out")
    assert load()["step"] == 1 and [row["step"] for row in log()] == [1]


def test_train_never_saves_weights_that_are_not_finite_and_says_what_they_led_to(monkeypatch):
    message = fails(*TINY, "--lr", "1e38", "--out", "high")
    assert "step 1: B: expected numbers in [0, 1], got some from nan" in message and "with a lower --lr" in message
    at_step(monkeypatch.setattr, 1, lambda loss: loss._replace(total=1e30 * loss.total))
    message = fails(*TINY, "--lr", "1e30", "--steps", 6, "--out", "out")
    assert "step 0: weights that are not finite; start anew with a lower --lr" in message


# --- processes -------------------------------------------------------------------------------------------
def test_train_two_processes_are_one(monkeypatch):
    plain(monkeypatch.setattr)
    flags = *TINY, "--steps", 5, "--lr", 0.01           # five steps of 0.1 let rounding grow beyond the bound
    run(*flags, "--out", "one")
    result = child(*flags, "--out", "two", processes=2, code="tests.plain(setattr)")
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = load("one/last.pt"), load("two/last.pt")
    for key in one["model"]:
        if "running" not in key:
            torch.testing.assert_close(two["model"][key], one["model"][key], rtol=0, atol=1e-5)
    for a, b in zip(log("one"), log("two"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    run("evaluate", "two/last.pt", "--workers", 0)        # at the end, two processes shared the three images
    alone, shared = (json.loads(Path("two", f"{name}.json").read_text()) for name in ("eval-val", "metrics"))
    assert all(alone[key] == shared[key] for key in alone) and "3 images" in alone["protocol"]


def test_train_mistakes_are_said_once_and_without_a_traceback():
    result = child(*TINY, "--batch", 3, "--steps", 2, "--out", "out", processes=2)
    assert result.stderr.count("--batch 3 does not split over 2 processes") == result.returncode == 1
    result = child("evaluate", "missing.pt", "a.png")
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "missing.pt: no such file\n")
    result = child(code="os.environ.update(RANK='0', LOCAL_RANK='0')")          # left over from a launcher
    assert result.stderr.startswith("RANK is set and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: start with torchrun")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        result = child(code=f"os.environ.update({environ}, MASTER_PORT='{taken.getsockname()[1]}')")
    assert result.stderr.endswith("MASTER_PORT is in use: choose another port\n") and "Traceback" not in result.stderr
    with pytest.raises(RuntimeError, match="ours"):              # a mistake in the code is shown whole
        launch.launch(lambda argv: Namespace(gpus=None, workers=0), partial(ends, RuntimeError("ours")), "", [])


class WritesOnly:
    """What a notebook may put in place of stdout."""
    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text


def test_train_runs_where_streams_can_only_write_or_are_none(monkeypatch):
    monkeypatch.setattr(sys, "stdout", WritesOnly())
    monkeypatch.setattr(sys, "stderr", None)
    run(*TINY, "--steps", 1, "--context", "none", "--out", "out")
    assert "IoU in %" in sys.stdout.written


def test_train_order_is_one_permutation_an_epoch():
    def order(step, rank, world):
        settings, where = Namespace(batch=4, steps=12, seed=3), launch.Where(rank, world, None, 0)
        return list(train.order(10, settings, step, where))
    whole = order(0, 0, 1)
    indices = [i for batch in whole for i, _ in batch]
    assert all(sorted(indices[a:a + 10]) == list(range(10)) for a in (0, 10, 20, 30))
    assert indices[:10] != indices[10:20]
    assert len({seed for batch in whole for _, seed in batch}) == 48
    assert order(7, 0, 1) == whole[7:]
    assert [sorted(a + b) for a, b in zip(order(0, 0, 2), order(0, 1, 2))] == [sorted(batch) for batch in whole]


def test_train_what_is_drawn_depends_on_seed_step_and_slot():
    """Of what is drawn, not of the seeds: torch keeps 32 bits of them."""
    image, label = torch.randint(256, (3, 90, 90), dtype=torch.uint8), torch.zeros(90, 90, dtype=torch.uint8)

    def drawn(seed, step, slot):
        settings, where = Namespace(batch=4, steps=step + 1, seed=seed), launch.Where(0, 1, None, 0)
        (batch,) = train.order(4 * (step + 1), settings, step, where)           # of an epoch that is as long as the run
        torch.manual_seed(train.seed_of(seed, step, slot))
        return (str(torch.randperm(30, generator=torch.Generator().manual_seed(train.seed_of(seed, step, slot)))),
                str(data.augment(image, label, batch[slot][1], 20)[0]), str(nn.functional.dropout(torch.ones(60))))
    keys = [(0, 3, 0), (1, 3, 0), (2, 3, 0), (0, 3 + 2 ** 16, 0), (0, 3 + 2 ** 20, 0), (0, 4, 0), (0, 3, 1)]
    orders, crops, masks = zip(*(drawn(*key) for key in keys))
    assert len(set(orders)) == len(set(crops)) == len(set(masks)) == len(keys)
    assert drawn(*keys[0]) == (orders[0], crops[0], masks[0])
    first = [[i for i, _ in next(train.order(2000, Namespace(batch=4, steps=1, seed=s), 0, HERE))] for s in range(3)]
    assert len(set(map(str, first))) == 3


# --- models ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    *(["--context", name] for name in models.CONTEXTS if name != "ranet"), ["--k", "1"], ["--amp"],
    ["--channels", "20"]], ids=" ".join)
def test_train_every_variant_takes_two_steps(flags, monkeypatch):
    monkeypatch.setattr(data.Ribbons, "splits", {"train": 16, "val": 1, "test": 1})
    built, build = [], train.build
    monkeypatch.setattr(train, "build", lambda *args: built.append(build(*args)) or built[-1])
    run(*TINY, *flags, "--steps", 2, "--batch", 1, "--crop", 64, "--out", "out")    # BatchNorm with one image
    assert [n for n, p in built[0].named_parameters() if p.grad is None] == []
    run("evaluate", "out/last.pt", "--workers", 0)        # rebuilt from the checkpoint alone
    result, metrics = (json.loads(Path(f"out/{name}.json").read_text()) for name in ("eval-val", "metrics"))
    assert result["classes"] == metrics["classes"] and result["steps"] == 2


def test_train_contexts_are_different():
    A, maps = torch.rand(2, 8, 7, 5), (torch.full((2, 7, 5), 0.1), torch.full((2, 3, 7, 5), 1 / 3))
    spp, nonlocal_ = (models.make_context(name, 8, 3) for name in ("spp", "nonlocal"))
    query, key, value = nonlocal_.embed(A).flatten(2).mT.chunk(3, 2)
    O = nonlocal_.out(((query @ key.mT).softmax(2) @ value).mT.reshape(2, 4, 7, 5))
    torch.testing.assert_close(nonlocal_(A, *maps)[0], O)
    pooled = spp.branches[0](A.mean((2, 3), keepdim=True)).relu().expand(2, 2, 7, 5)
    torch.testing.assert_close(spp(A, *maps)[0][:, :2], pooled)
    assert spp(A, *maps)[0].shape == A.shape and not models.make_context("none", 8, 3)(A, *maps)[0].any()
    assert models.make_context("ranet", 8, 3).rib.representatives == 3


@pytest.mark.parametrize("name, strides, channels, each", [
    ("resnet101", None, 2048, [2048]),                          # dilated: one map, res5
    ("resnet18", [8, 32], 640, [128, 512]),                     # its own strides
    ("hrnet_w18_small", None, 512, [16, 32, 64, 128]),      # four branches, then ASPP
    ("swin_tiny_patch4_window7_224", None, 1344, [192, 384, 768]),      # cannot be dilated; channels last
    ("vit_tiny_patch16_224", None, 192, [192]), ("vgg11", None, 1536, [512, 512, 512]),
    ("efficientnet_lite0", [8, 16], 152, [40, 112])])           # what lies deeper is idle
def test_train_backbones(name, strides, channels, each):
    backbone, found = models.make_backbone(name, strides=strides)
    features = backbone.train()(torch.rand(2, 3, 72, 57))
    assert found == channels and features.shape == (2, channels, 9, 8)
    features.square().sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []
    assert (backbone[0] if name.startswith("hrnet") else backbone).channels == each


def test_train_backbone_maps_lie_on_one_grid():
    """A model whose maps are the image at strides 8 and 16, as means: at stride 8, each is where the image has it."""
    class Means(nn.Module):
        feature_info = type("", (), {"channels": lambda: [3, 3], "reduction": lambda: [8, 16]})
        def forward(self, images):
            assert images.shape[2:] == (48, 64)                 # padded to the coarser stride
            return [nn.functional.avg_pool2d(images, 8), nn.functional.avg_pool2d(images, 16)]
    ramp = (torch.arange(48.0)[:, None] + 100 * torch.arange(64.0)).expand(1, 3, 48, 64)
    fine, coarse = models.Backbone(Means())(ramp).chunk(2, 1)    # [1, 3, 6, 8] each
    torch.testing.assert_close(fine[:, :, 1:-1, 1:-1], coarse[:, :, 1:-1, 1:-1])
    assert models.Backbone(Means())(ramp[:, :, :33, :50]).shape == (1, 6, 5, 7)


def test_train_takes_backbone_weights_from_a_file_and_says_when_they_cannot_be_had(monkeypatch):
    import timm
    net = timm.create_model("resnet18", num_classes=3)
    torch.save(net.state_dict(), "resnet18.pth")
    backbone, _ = models.make_backbone("resnet18", "resnet18.pth")
    assert torch.equal(backbone.net.layer4[1].conv2.weight, net.layer4[1].conv2.weight)
    torch.save({"a": torch.ones(1)}, "other.pth")
    Path("text.pth").write_text("no weights")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", partial(ends, OSError("no connection")))
    for weights, said in (("other.pth", "other.pth has no conv1.weight"), ("text.pth", "cannot be made"),
                          ("imagenet", "no connection"), ("imagenet", "--weights none")):
        assert said in fails("--backbone", "resnet18", "--weights", weights)


# --- evaluation and prediction ---------------------------------------------------------------------------
class Painted(nn.Module):
    """Fine: class 0 where red is dark, 1 where it is bright, 2 between; coarse: 2 everywhere."""

    def forward(self, images):
        red = images[:, 0]                                      # [b, h, w]
        fine = torch.stack((-red, red, 0.5 - red.abs(), torch.full_like(red, -9)), 1)       # [b, 4, h, w]
        return ranet.Output(fine, nn.functional.one_hot(torch.full_like(red, 2).long(), 4).movedim(3, 1), red, None)


class Four(list):
    classes = "dark", "red", "absent", "unseen"


HERE = launch.Where(0, 1, torch.device("cpu"), 0)


def test_train_evaluation_by_hand():
    red = torch.tensor([[0, 255, 255], [0, 255, 118]], dtype=torch.uint8)           # [h, w]
    label = torch.tensor([[0, 1, 3], [1, 255, 255]], dtype=torch.uint8)             # [h, w]
    images = Four([(red.expand(3, -1, -1), x) for x in (label, torch.full_like(label, 255))])
    how, path = evaluate.How(2), Path("scores.json")
    result = evaluate.evaluate(Painted(), images, how, HERE)
    # fine: dark 1 right, 1 wrong (from red); red 1 right, 1 missed, 1 wrong (from unseen); unseen 1 missed; absent is
    # found where nothing is labelled, and does not count; coarse: it is found everywhere, and counts as 0.
    assert [c["fine"] for c in result["classes"].values()] == [1 / 2, 1 / 3, None, 0]
    assert [c["coarse"] for c in result["classes"].values()] == [0, 0, 0, 0] and result["coarse_miou"] == 0
    assert result["fine_miou"] == pytest.approx((1 / 2 + 1 / 3) / 3) and result["pixels"] == 4
    settings = Namespace(data="four", split="train", context="none", backbone="")
    evaluate.report(result, settings, images, "four", "val", how, path)
    assert json.loads(path.read_text())["protocol"].startswith("four val, 2 images, 4 classes; windows of 2, stride 2")
    nothing = evaluate.evaluate(Painted(), Four(images[1:]), how, HERE)
    assert nothing["fine_miou"] is None
    evaluate.report(nothing, settings, images, "four", "train", how, path)
    assert json.loads(path.read_text())["protocol"].startswith("four train (trained on), 2 images")


@pytest.mark.parametrize("h, w, crop", [(20, 33, 8), (7, 30, 9), (16, 16, 16), (5, 4, 9), (21, 22, 1), (20, 12, 11)])
def test_train_windows_are_averaged(h, w, crop):
    def network(images):                                        # what it sees matters, so windows do
        calls.append(len(images))
        return ranet.Output(images[:, :2] * images.mean((1, 2, 3), keepdim=True), images[:, 1:], None, None)
    calls, image = [], torch.rand(1, 3, h, w)
    found = evaluate.slide(network, image, crop)                # [2, 2, h, w]
    total, count, stride = torch.zeros(2, 2, h, w), torch.zeros(h, w), math.ceil(crop * 2 / 3)
    tops, lefts = ([min(k * stride, last) for k in range(math.ceil(last / stride) + 1)]
                   for last in (max(h - crop, 0), max(w - crop, 0)))
    for y, x in itertools.product(tops, lefts):
        window = image[:, :, y:y + crop, x:x + crop]            # smaller where the image is
        total[:, :, y:y + crop, x:x + crop] += torch.cat((window[:, :2] * window.mean(), window[:, 1:]))
        count[y:y + crop, x:x + crop] += 1
    torch.testing.assert_close(found, total / count)
    assert calls == [len(tops) * len(lefts)]                    # together


def test_train_scales_and_mirrors_are_averaged():
    def pointwise(images):                                      # so windows cannot matter
        fine = torch.cat((images, images.square()), 1)          # [b, 6, h, w]
        return ranet.Output(fine, -fine, fine[:, 0], None)

    def segment(scales=(1.0,), flip=False, maps=2):
        return evaluate.segment(pointwise, image, evaluate.How(8, scales, flip), HERE.device, maps)
    image = torch.randint(256, (3, 12, 10), dtype=torch.uint8)
    plain, half, both = segment(), segment(scales=[0.5]), segment(scales=[1.0, 0.5])
    torch.testing.assert_close(plain.sum(1), torch.ones(2, 12, 10))
    torch.testing.assert_close(segment(flip=True), plain)
    torch.testing.assert_close((plain + half) / 2, both)
    torch.testing.assert_close(segment(maps=1), plain[:1])


# --- mistakes: one line each -----------------------------------------------------------------------------
@pytest.mark.parametrize("flags, part", [
    *((flags, flags.split()[0]) for flags in ("--steps 0", "--nonsense", "--context other", "--lr nan", "--seed -1",
                                              "--workers -1", "--flip", "--split val", "--gpus 4000")),
    ("--context none --k 3", "--k"), ("--strides 7 --backbone resnet18", "strides 2 4 8 16 32"),
    ("--strides 8", "small"), ("--backbone small --weights imagenet", "small"), ("--backbone resnet9999", "resnet9999"),
    ("--backbone resnet18 --weights missing.pth", "missing.pth"), ("--context spp --channels 66", "--channels 66"),
    ("--backbone vit_tiny_patch14_reg4_dinov2 --weights none", "vit_tiny"), ("--data other", "other"),
    ("--scale 2 1", "--scale"), ("--data cityscapes", "root"), ("--root x", "root"), ("--split trainval", "trainval"),
    ("--split train+coarse", "train+coarse"), ("evaluate missing.pt", "missing.pt"), ("evaluate child.py", "child.py"),
    ("evaluate", "checkpoint"), ("evaluate .", "is a folder, expected a checkpoint, such as last.pt"),
    ("--root x", "add --data folder"), ("evaluate a.pt a.png --scales 1 0.5 b.png", "pictures go before --scales")])
def test_train_mistakes_take_one_line(flags, part):
    assert part in fails(*flags.split())
    assert os.listdir() == ["child.py"]


def test_train_checkpoints_that_do_not_fit():
    run(*TINY, "--steps", 1, "--context", "none", "--out", "out")
    before, checkpoint = Path("out/last.pt").read_bytes(), load()
    for flags, said in (
            ("--resume --steps 2 --out out", "--steps"), ("--resume --context spp --out out", "--context"),
            ("evaluate out/last.pt --context ranet", "--context"), ("evaluate out/last.pt --resume", "--resume"),
            ("evaluate out/last.pt a.png --data folder", "--data")):
        assert said in fails(*flags.split())
    for changed, said in (
            ({**checkpoint, "classes": ["a"]}, "class 0 is 'a' in x.pt and 'wall' in the data (1 and 7 classes)"),
            ({**checkpoint, "args": {**checkpoint["args"], "context": "spp"}}, "another model"),
            ({**checkpoint, "args": {**checkpoint["args"], "data": "shapes"}}, "version of this code: --data shapes"),
            ({**checkpoint, "version": 2}, "x.pt is of another version of this code"),
            (checkpoint["model"], "it has no args, classes, model"), ({**checkpoint, "args": None}, "settings in args"),
            ({k: v for k, v in checkpoint.items() if k != "palette"}, "no checkpoint of train.py: it has no palette")):
        torch.save(changed, "x.pt")
        assert said in fails("evaluate", "x.pt")
    Path("old").mkdir()
    for lost in ("images", "optimizer"):
        args = {key: x for key, x in checkpoint["args"].items() if key not in ("k", "strides", "amp", "crop")}
        torch.save({key: x for key, x in {**checkpoint, "args": args}.items() if key != lost}, "old/last.pt")
        assert "old/last.pt cannot be resumed: it lacks its optimizer or" in fails("--resume", "--out", "old")
        run("evaluate", "old/last.pt", "--workers", 0)          # the recipe has what is missing
    Path("half.pt").write_bytes(before[:len(before) // 2])
    assert "half.pt" in fails("evaluate", "half.pt", "a.png")
    assert Path("out/last.pt").read_bytes() == before


def test_train_gpus_is_torchrun(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execv", lambda _program, argv: calls.append(argv) or sys.exit())   # does not return
    run(*TINY, "--steps", 1, "--context", "none", "--out", "out")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        run("evaluate", "out/last.pt", "a.png", "b.png", "--gpus", 2)
    at = calls[0].index(evaluate.__file__)
    assert calls[0][1:at] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    args = evaluate.parse(calls[0][at + 1:])                    # what each of the processes then parses
    assert args.gpus == 0 and args.pictures == [Path("a.png"), Path("b.png")]
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("torch.distributed.rendezvous", lambda _: iter([(torch.distributed.HashStore(), 0, 1)]))
    assert "torchrun" in fails("--gpus", 1)


# --- files -----------------------------------------------------------------------------------------------
@pytest.fixture
def photos(tmp_path):
    """Flags that train on a folder of photographs, which is `set`."""
    for split in ("train", "val"):
        for kind, mode in (("images", "RGB"), ("labels", "L")):
            Path("set", split, kind).mkdir(parents=True)
            for i in range(2):
                noise = Image.effect_noise((24, 20), 50).point(lambda x: x % 2)
                noise.convert(mode).save(f"set/{split}/{kind}/{i}.png")
    Path("set/classes.txt").write_text("sky\nroad")
    return ["--data", "folder", "--root", "set", "--backbone", "small", "--crop", "16", "--batch", "2", "--steps", "2",
            "--workers", "0", "--out", "out"]


def test_train_looks_at_the_labels_first(photos, capsys):
    label, good = Path("set/val/labels/1.png"), Path("set/val/labels/1.png").read_bytes()
    run(*photos)
    label.write_bytes(good[:60])
    for flags in (*photos, "--resume"), ("evaluate", "out/last.pt", "--workers", "0"):      # before anything else
        assert "set/val/labels/1.png is no readable picture" in fails(*flags)
    Path("set/val/labels").rename("set/val/label")
    run(*photos, "--resume")
    Path("set/train/images/1.png").rename("set/train/images/2.png")
    Path("set/train/labels/1.png").rename("set/train/labels/2.png")
    assert "out/last.pt was trained on other pictures than those in set" in fails(*photos, "--resume")
    Path("set/train/images/2.png").rename("set/train/images/1.png")
    Path("set/train/labels/2.png").rename("set/train/labels/1.png")
    assert "val: no pixel of 2 of 2 classes (sky, road), so there will be no score" in capsys.readouterr().out
    assert "val has no labels" in fails("evaluate", "out/last.pt", "--workers", "0")
    for i in (0, 1):
        Image.new("L", (24, 20), 255).save(f"set/train/labels/{i}.png")
    assert "train: nothing is labelled in its 2 images" in fails(*photos, "--out", "new")
    Image.fromarray(np.uint8(255 * np.eye(20, 24))).save("set/train/labels/0.png")      # 0 and 255, as many tools write
    run(*photos, "--out", "new")
    assert "train: no pixel of 1 of 2 classes (road); 52% of the pixels are 255, ignored" in capsys.readouterr().out
    shared = child(*photos, "--out", "two", processes=2)        # each looks at one of the two
    assert shared.stdout.count("train: no pixel of 1 of 2 classes (road)") == 1, shared.stderr[-2000:]
    Image.new("RGB", (24, 20)).save("set/train/labels/1.png")
    assert "set/train/labels/1.png has pixels of type RGB" in fails(*photos, "--out", "newer")
    assert not Path("newer").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_train_names_a_broken_picture(photos, workers):
    path = Path("set/train/images/1.png")
    path.write_bytes(path.read_bytes()[:100])
    assert "1.png is no readable picture" in fails(*photos, "--workers", workers)


def test_train_predictions_are_ids_with_colours_and_replace_only_predictions(photos, capsys, monkeypatch):
    run(*photos)
    Path("pictures").mkdir()
    for name, mode in (("a", "RGB"), ("b", "L")):
        Image.new(mode, (24, 20), 90).save(f"pictures/{name}.jpg")
    assert "no pictures (" in fails("evaluate", "out/last.pt", "set/train")
    assert "pictures/a.jpg have the same name" in fails("evaluate", "out/last.pt", "pictures", "other/a.png")
    Path("pictures/._a.jpg").write_bytes(b"what another system leaves")
    run("evaluate", "out/last.pt", "pictures", "pictures/b.jpg")
    run("evaluate", "out/last.pt", "pictures")                  # its own folder: replaced
    assert len(os.listdir("out/predictions")) == 4
    assert "results would be taken for pictures" in fails("evaluate", "out/last.pt", "pictures", "--out", "pictures")
    Path("links").mkdir()
    for name, target in (("a.png", "../pictures/a.jpg"), ("b.png", "../pictures/a.jpg"), ("self.png", "self.png")):
        Path("links", name).symlink_to(target)
    assert fails("evaluate", "out/last.pt", "links", "--out", "linked") == "1 of 3 pictures could not be segmented"
    assert {"a_mask.png", "b_mask.png"} <= set(os.listdir("linked"))
    run("evaluate", "out/last.pt", "pictures", "--out", "new")
    assert "new/b_overlay.png\n" in capsys.readouterr().out
    ids, mask = data.read_ids("new/a_mask.png"), Image.open("new/a_mask.png")
    assert ids.shape == Image.open("new/a_overlay.png").size[::-1] == (20, 24)
    assert mask.mode == "P" and set(np.unique(ids)) <= {0, 1}
    assert (np.asarray(mask.convert("RGB")) == np.array(data.load("folder", "set").palette)[ids]).all()
    Path("pictures/a.jpg").write_bytes(b"no picture")           # one bad picture: the others go on
    Image.new("L", (3, 3)).save("new/b_overlay.png")
    mine = Path("new/b_overlay.png").read_bytes()
    Image.new("RGB", (24, 20)).save("pictures/c.webp")
    assert fails("evaluate", "out/last.pt", "pictures", "--out", "new") == "2 of 3 pictures could not be segmented"
    said = capsys.readouterr().err
    assert "a.jpg is no readable picture" in said and "b_mask.png exists and is not replaced" in said
    assert Path("new/b_overlay.png").read_bytes() == mine and Path("new/c_mask.png").exists()
    slide = evaluate.slide
    with monkeypatch.context() as patch:                        # nor does one that is too large end the others
        patch.setattr(evaluate, "slide", lambda model, image, *given: slide(model, image, *given)
                      if image.shape[3] < 30 else ends(RuntimeError("can't allocate memory: 9 bytes\nat")))
        Image.new("RGB", (34, 20)).save("pictures/b1.png")
        assert "2 of 4 pictures" in fails("evaluate", "out/last.pt", "pictures", "--out", "newest")
    assert "pictures/b1.png: out of memory: use a smaller --crop, --batch or picture\n" in capsys.readouterr().err
    assert Path("newest/c_mask.png").exists()
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: pytest.fail("evaluated first"))
    assert "Not a directory" in fails("evaluate", "out/last.pt", "--workers", "0", "--out", "pictures/c.webp/out")


def test_train_draws_the_regions_of_a_whole_photo(photos):
    run(*photos)
    Image.new("RGB", (96, 48), (90, 80, 40)).save("wide.jpg")
    run("evaluate", "out/last.pt", "wide.jpg", "--regions", "--out", "new")
    with Image.open("new/wide_regions.png") as picture:         # photo, B, regions, coarse, fine: 384 x 192 each
        assert picture.size == (5 * 392 + 8, 192 + 16) and picture.getpixel((100, 100))[0] == pytest.approx(90, abs=3)
        whites = [(x, y) for x in range(792, 1176) for y in range(8, 200) if min(picture.getpixel((x, y))) == 255]
    xs, ys = (np.ptp([at[k] for at in whites]) for k in (0, 1))         # representatives of a map of 2 x 4 pixels
    assert whites and xs == pytest.approx(3 * 96, abs=5) and ys == pytest.approx(96, abs=5)
    assert "wide_regions.png" in os.listdir("new") and len(os.listdir("new")) == 3
    assert "--regions: name the pictures" in fails("evaluate", "out/last.pt", "--regions")
    run(*photos, "--context", "none", "--out", "plain")
    assert "--context none, which makes none" in fails("evaluate", "plain/last.pt", "wide.jpg", "--regions")


def test_train_keeps_its_results_where_names_cannot_be_printed(photos):
    Path("set/classes.txt").write_text("\u5929\u7a7a\nroad", encoding="utf-8")
    result = child(*photos, code="os.environ.update(OMP_NUM_THREADS='1'); sys.stdout.reconfigure(encoding='cp1252')")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "\\u5929\\u7a7a" in result.stdout and {"metrics.json", "overview.png"} <= set(os.listdir("out"))


def test_train_writes_cityscapes_label_ids():
    for split in ("train", "val", "test"):
        for kind, suffix, picture in (("leftImg8bit", "leftImg8bit", Image.new("RGB", (64, 32), (90, 80, 40))),
                                      ("gtFine", "gtFine_labelIds", Image.new("L", (64, 32), 7))):
            Path("set", kind, split, "ulm").mkdir(parents=True)
            for i in range(3):
                picture.save(f"set/{kind}/{split}/ulm/ulm_00000{i}_000019_{suffix}.png")
    run("--data", "cityscapes", "--root", "set", "--backbone", "small", "--steps", 1, "--batch", 2, "--crop", 32,
        "--context", "none", "--workers", 0, "--split", "trainval", "--out", "out")
    run("evaluate", "out/last.pt", "--split", "test", "--workers", 0)
    names, metrics = sorted(os.listdir("out/cityscapes-test")), json.loads(Path("out/metrics.json").read_text())
    assert metrics["protocol"].startswith("cityscapes val (trained on), 3 images")
    assert load()["args"]["split"] == "trainval"
    assert len(names) == 3 and all(name.startswith(f"ulm_00000{i}_000019") for i, name in enumerate(names))
    ids = Image.open(f"out/cityscapes-test/{names[0]}")
    assert ids.mode == "L" and ids.size == (64, 32)
    assert {value for _, value in ids.getcolors()} <= {7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33}
