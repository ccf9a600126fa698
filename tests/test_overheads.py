# SPDX-License-Identifier: MIT
"""The blocks that docs/overheads.py compares RANet with: is each what its paper says? And its counts by hand."""
import itertools
import sys

import overheads
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

torch.set_num_threads(1)
close = torch.testing.assert_close


def case(block, *size):
    """Features [1, M, H, W], and the block in float64 with its gates, the scalars, open: at 0 they hide all else."""
    for gate in (x for x in block.parameters() if x.dim() == 0):
        gate.data.fill_(0.5)
    return torch.randn(1, *size, dtype=torch.float64, requires_grad=True), block.double()


def rows(x):
    """[1, M, H, W] to [1, HW, M], a pixel a row."""
    return x.flatten(2).mT


def test_attention_to_all_pixels_and_to_all_channels():
    A, dual = case(overheads.DualAttention(16), 16, 2, 3)
    X, (query, key, value) = rows(A), (rows(f(A)) for f in (dual.query, dual.key, dual.value))
    close(rows(overheads.PlainNonLocal()(A)), attend(X, X, X, scale=1))
    close(rows(dual.position(A)), 0.5 * attend(query, key, value, scale=1) + X)
    close(rows(dual.channel(A)), 0.5 * attend(X.mT, X.mT, X.mT, scale=1).mT + X)


def test_criss_cross_collects_row_and_column_once_then_everything():
    A, block = case(overheads.CrissCross(16), 16, 3, 4)
    assert torch.autograd.grad(block(A)[0, :, 2, 1].square().sum(), A)[0].abs().amax(1).all()
    block.rounds = 1
    y, x = torch.arange(12) // 4, torch.arange(12) % 4
    cross = (y == y[:, None]) | (x == x[:, None])               # [HW, HW]
    O = attend(rows(block.query(A)), rows(block.key(A)), rows(block.value(A)), cross, scale=1)
    close(rows(block(A)), 0.5 * O + rows(A))


def test_asymmetric_non_local_attends_to_110_pooled_positions():
    A, block = case(overheads.AsymmetricNonLocal(16), 16, 24, 24)
    key, value = block.key(A).relu(), block.value(A)
    bins = [(..., slice(y * 24 // n, (y + 1) * 24 // n), slice(x * 24 // n, (x + 1) * 24 // n))
            for n in (1, 3, 6, 8) for y in range(n) for x in range(n)]
    keys, values = (torch.stack([each[b].mean((2, 3)) for b in bins], 1) for each in (key, value))  # [1, 110, M / 2]
    close(block(A), block.out(attend(rows(key), keys, values).mT.unflatten(2, (24, 24))))


def test_psa_collects_and_distributes_at_half_resolution():
    A, block = case(overheads.PointwiseSpatial(4, 5), 4, 5, 5)
    half = [f(A).relu()[..., ::2, ::2] for f in block.reduce]   # corners aligned: every second pixel, 3 x 3
    pixels, masks = list(itertools.product(range(3), range(3))), []     # [HW, HW] each: what pixel i says of pixel j
    for f, x in zip(block.scores, half):
        score = f(x)[0].view(5, 5, 3, 3)                        # [dy + 2, dx + 2, y, x]
        masks.append(torch.stack([score[v - y + 2, u - x + 2, y, x] for y, x in pixels for v, u in pixels]).view(9, 9))
    O = torch.cat((masks[0].softmax(1) @ rows(half[0]), masks[1].softmax(0).T @ rows(half[1])), 2)     # [1, HW, 2M]
    close(block(A)[..., ::2, ::2], block.out(O.mT.unflatten(2, (3, 3))).relu())


def test_counts_by_hand():
    n, N, flops = 5, 3, 3 * 25 * 4 ** 2                         # eq. 1: samples of each L are interpolated once
    for i, j in itertools.product(range(n * n), repeat=2):
        L = max(abs(i // n - j // n), abs(i % n - j % n))
        flops += 2 * 9 + 2                                      # smoothing with 3 x 3; the mean of eq. 5
        flops += (i < j) * L                                    # maxima of the L + 1 samples
        flops += (i <= j) * (4 * N + 3 + 3)                     # eqs. 2 and 3; the decision of eq. 4
    assert overheads.operations(n, N) == flops
    assert overheads.count("plain", 5, 16, N, "cpu")[:2] == (0, 2 * 2 * 25 * 25 * 16)
    parameters, more, words = overheads.count("one", 5, 1, N, "cpu")
    assert parameters == 9 and more > flops and words.endswith("regions: 1, representatives: 8")


def test_scenes_give_the_regions_that_their_rows_name():
    for kind, side, want in (("objects", 20, 25), ("one", 12, 1), ("pixels", 12, 144), ("pairs", 12, 24)):
        torch.manual_seed(0)
        assert overheads.ranet.RCB()(*overheads.scene(kind, side, 19)).labels.max() + 1 == want


@pytest.mark.parametrize("report", [[], ["--calls"]])
def test_reports_run(report, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["overheads.py", "--size", "9", "--rounds", "1", *report])
    monkeypatch.setattr(overheads, "peak", lambda *case: "1")   # a process for each is slow
    overheads.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == (4 if report else 2 + len(overheads.BLOCKS)) and len({row.count("|") for row in rows}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory on the CPU is read from /proc")
def test_memory_of_a_known_block():
    matrix, maps = 4 * 54 ** 4 / 2 ** 20, 4 * 64 * 54 ** 2 / 2 ** 20    # products, and their softmax; a few maps
    assert 0.9 * 2 * matrix < int(overheads.peak("plain", 54, 64, 1, "cpu", False)) < 2 * matrix + 4 * maps + 16
