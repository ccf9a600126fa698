# SPDX-License-Identifier: MIT
"""The blocks that docs/overheads.py compares RANet with: is each what its paper says? And its counts by hand."""
import sys

import overheads
import pytest
import torch

torch.set_num_threads(1)
close = torch.testing.assert_close


def open_gates(block):
    """A gate that starts at 0 hides what is behind it."""
    for name, x in block.named_parameters():
        if name in ("alpha", "beta", "gamma"):
            x.data.fill_(0.5)
    return block


def features(M, H, W):
    torch.manual_seed(0)
    return torch.randn(1, M, H, W, dtype=torch.float64, requires_grad=True)


def reached(f, A, y, x):
    """The positions [H, W] of A that f(A) at (y, x) depends on."""
    slope, = torch.autograd.grad(f(A)[0, :, y, x].square().sum(), A)
    return slope[0].abs().amax(0) > 0


@pytest.mark.parametrize("name", overheads.BLOCKS)
def test_shape_and_gradients(name):
    block, inputs, dO = overheads.make(name, 8, 16, 5, "cpu")
    O = open_gates(block)(*inputs)
    assert O.shape == dO.shape == inputs[0].shape
    O.backward(dO)
    for key, x in (*enumerate(inputs), *block.named_parameters()):
        assert x.grad is not None and x.grad.isfinite().all()
        # What a key's bias adds is the same for all that the softmax runs over; one region has E = 0.
        shifted = name in ("crisscross", "dual") and key == "key.bias"
        assert shifted or x.grad.abs().max() > 0, key


def test_gated_blocks_start_as_the_identity():
    A = torch.randn(1, 16, 4, 5)
    close(overheads.CrissCross(16)(A), A)
    close(overheads.DualAttention(16)(A), 2 * A)


def test_plain_non_local_against_loops():
    A = features(4, 2, 3)
    X = A.detach().flatten(2)[0].T.tolist()
    want = []
    for a in X:
        weights = torch.tensor([sum(p * q for p, q in zip(a, b)) for b in X], dtype=torch.float64).softmax(0)
        want.append(sum(w * torch.tensor(b, dtype=torch.float64) for w, b in zip(weights, X)))
    close(overheads.PlainNonLocal()(A), torch.stack(want).T.view(1, 4, 2, 3))


def test_non_local_and_position_attention_reach_every_position():
    A = features(16, 4, 5)
    dual = open_gates(overheads.DualAttention(16)).double()
    for f in (overheads.PlainNonLocal(), overheads.train.NonLocal(16).double(), dual.position):
        assert reached(f, A, 1, 3).all()


def test_criss_cross_reaches_row_and_column_then_everything():
    A = features(16, 5, 4)
    block = open_gates(overheads.CrissCross(16, rounds=1)).double()
    cross = torch.zeros(5, 4, dtype=torch.bool)
    cross[2], cross[:, 1] = True, True
    assert torch.equal(reached(block, A, 2, 1), cross)
    block.rounds = 2
    assert reached(block, A, 2, 1).all()


def test_criss_cross_counts_each_position_once():
    A = features(16, 3, 4)
    block = open_gates(overheads.CrissCross(16, rounds=1)).double()
    query, key, value = block.query(A)[0], block.key(A)[0], block.value(A)[0]
    for y in range(3):
        for x in range(4):
            seen = sorted({(y, w) for w in range(4)} | {(h, x) for h in range(3)})
            assert len(seen) == 3 + 4 - 1
            weights = torch.stack([query[:, y, x] @ key[:, h, w] for h, w in seen]).softmax(0)
            O = sum(weight * value[:, h, w] for weight, (h, w) in zip(weights, seen))
            close(block(A)[0, :, y, x], 0.5 * O + A[0, :, y, x])


def test_channel_attention_mixes_channels_only():
    A = features(6, 3, 4)
    X = A[0].flatten(1)
    weights = torch.stack([torch.stack([a @ b for b in X]).softmax(0) for a in X])
    block = open_gates(overheads.DualAttention(8)).double()
    close(block.channel(A)[0, :, 1, 2], 0.5 * weights @ A[0, :, 1, 2] + A[0, :, 1, 2])
    shuffled = torch.randperm(12)
    moved = block.channel(X[None, :, shuffled].view(1, 6, 3, 4))
    close(moved.flatten(2), block.channel(A).flatten(2)[..., shuffled])


def test_asymmetric_non_local_sees_the_pooled_positions_alone():
    A = features(16, 24, 24)
    block = overheads.AsymmetricNonLocal(16).double()
    key = block.key(A).relu()
    pooled = block.pool(key)
    assert pooled.shape == (1, 110, 8)
    close(pooled[0, 0], key[0].mean((1, 2)))                    # the bin of 1 x 1
    close(pooled[0, -1], key[0, :, -3:, -3:].mean((1, 2)))      # the last of 8 x 8: 24 / 8 = 3
    close(pooled[0, 10], key[0, :, :4, :4].mean((1, 2)))        # the first of 6 x 6, after 1 + 9
    # Non-local attention with these keys and values. Two pixels that change places within a bin of every size
    # (3, 4, 8 and 24 pixels wide) change nothing for the others.
    weights = (key.flatten(2).mT @ pooled.mT / 8 ** 0.5).softmax(2)
    value = block.pool(block.value(A))
    close(block(A), block.out((weights @ value).mT.unflatten(2, (24, 24))))
    moved = A.detach().clone()
    moved[..., 0, 0], moved[..., 0, 1] = A[..., 0, 1].detach(), A[..., 0, 0].detach()
    close(block(moved)[..., 0, 2:], block(A)[..., 0, 2:])       # elsewhere it is the same
    assert not torch.allclose(block(moved)[..., 0, 0], block(A)[..., 0, 0])     # as a query it is another pixel


def test_psa_takes_its_mask_from_the_right_offsets():
    block = overheads.PointwiseSpatial(8, 7)                    # half resolution: 4 x 4, so 7 x 7 offsets
    scores = torch.arange(7 * 7 * 16.0).view(1, 49, 4, 4)
    mask = block.mask(scores)[0]
    for i in range(16):
        for j in range(16):
            dy, dx = j // 4 - i // 4, j % 4 - i % 4
            assert mask[i, j] == scores[0].view(7, 7, 16)[dy + 3, dx + 3, i]


def test_psa_collects_and_distributes():
    torch.manual_seed(0)
    block = overheads.PointwiseSpatial(4, 3).double()           # half resolution: 2 x 2
    A = features(4, 3, 3)
    half = [torch.nn.functional.interpolate(f(A).relu(), (2, 2), mode="bilinear", align_corners=True)
            for f in block.reduce]
    masks = [block.mask(f(x))[0] for f, x in zip(block.scores, half)]
    X, Y = (x[0].flatten(1) for x in half)                      # [M, 4]
    collected = [sum(masks[0][i].softmax(0)[j] * X[:, j] for j in range(4)) for i in range(4)]
    distributed = [sum(masks[1][:, j].softmax(0)[i] * Y[:, i] for i in range(4)) for j in range(4)]
    both = torch.cat((torch.stack(collected, 1), torch.stack(distributed, 1))).view(1, 8, 2, 2)
    close(block(A)[..., ::2, ::2], block.out(both).relu())      # corners of the map keep their values
    read = torch.zeros(3, 3, dtype=torch.bool)
    read[::2, ::2] = True                                       # half resolution is every second pixel
    assert torch.equal(reached(block, A, 1, 1), read)


def test_counts_by_hand():
    n, lines = 5, 0
    for i in range(n * n):
        for j in range(n * n):
            lines += max(abs(i // n - j // n), abs(i % n - j % n)) + 1
    assert overheads.samples(n) == lines
    ops = overheads.operations(n, 3, 3)
    assert ops["eq. 1, maxima"] == sum(max(abs(i // n - j // n), abs(i % n - j % n))
                                       for i in range(n * n) for j in range(i))
    assert ops["eq. 2, logarithms"] == 3 * 325 and ops["eq. 4, smoothing"] == 18 * 625
    parameters, flops, _ = overheads.count("plain", 5, 16, 3, "cpu")
    assert (parameters, flops) == (0, 2 * 2 * 25 * 25 * 16)
    assert overheads.count("objects", 5, 16, 3, "cpu")[1] > sum(ops.values())


def test_scenes_give_the_regions_that_their_rows_name():
    for kind, want in (("one", 1), ("pixels", 144), ("pairs", 24)):
        torch.manual_seed(0)
        regions = overheads.ranet.RCB()(*overheads.scene(kind, 12, 19))
        assert regions.labels.max() + 1 == want


@pytest.mark.parametrize("report", [[], ["--calls"]])
def test_reports_run(report, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["overheads.py", "--size", "9", "--channels", "16", "--rounds", "1", *report])
    monkeypatch.setattr(overheads, "peak", lambda *case: 2 ** 20)   # a process for each is slow
    overheads.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 3 and len({row.count("|") for row in rows}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory on the CPU is read from /proc")
def test_memory_of_a_known_block():
    """The plain non-local holds its products, their softmax and a few maps."""
    n, M = 54, 64
    matrix, maps = 4 * n ** 4, 4 * M * n * n
    seen = overheads.peak("plain", n, M, 1, "cpu", False)
    assert 0.9 * 2 * matrix < seen < 2 * matrix + 4 * maps + 2 ** 24
