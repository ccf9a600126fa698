# SPDX-License-Identifier: MIT
"""Is the code the mathematics? Each equation against an oracle that shares nothing with ranet.py (plain
Python loops, fractions, scipy), its properties on drawn inputs, its gradients by central differences, the
modules against the functions, and deliberate mistakes that the same tests must catch."""
import ast
import math
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse.csgraph
import scipy.spatial.distance
import scipy.special
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import ranet

# No shrinking: the maps are small as drawn, and the mutations below fail by the dozen.
settings.register_profile("ranet", deadline=None, derandomize=True, database=None, max_examples=40,
                          phases=(Phase.explicit, Phase.generate))
settings.load_profile("ranet")
torch.set_num_threads(1)
ROOT = Path(__file__).parent
close = torch.testing.assert_close


# ------------------------------------------------------------------------------------- what is drawn

sizes = st.sampled_from([(1, 1), (1, 6), (5, 1), (2, 2), (3, 4), (4, 3), (5, 5), (2, 7), (6, 4)])


@st.composite
def tensors(draw, shape, elements):
    """A float64 tensor; now and then not contiguous."""
    values = draw(st.lists(elements, min_size=math.prod(shape), max_size=math.prod(shape)))
    x = torch.tensor(values, dtype=torch.float64).view(shape)
    return x.mT.contiguous().mT if len(shape) > 1 and draw(st.booleans()) else x


@st.composite
def score_maps(draw):
    """B: ties, exact 0 and 1, constant maps."""
    levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    elements = draw(st.sampled_from([levels, levels | st.floats(0, 1), st.just(0.3)]))
    return draw(tensors(draw(sizes), elements))


@st.composite
def class_maps(draw, size=None):
    """C: sharp (a softmax of +-120 underflows to one-hot), soft, and pixels that agree."""
    size = size or draw(sizes)
    logits = draw(tensors((draw(st.integers(1, 5)), *size), st.sampled_from([-120.0, 0.0, 120.0]) | st.floats(-4, 4)))
    return logits.softmax(0)


@st.composite
def attention_maps(draw):
    """F or F^g, not symmetric, with the size of its image."""
    H, W = draw(st.sampled_from([(1, 1), (1, 5), (3, 2), (3, 3), (2, 4)]))
    return draw(tensors((H * W, H * W), st.sampled_from([0.0, 0.8, 1.0]) | st.floats(0, 1))), (H, W)


def kernels(k):
    return tensors((k * k,), st.sampled_from([-120.0, 0.0, 120.0]) | st.floats(-3, 3)).map(lambda x: x.softmax(0).view(k, k))


@st.composite
def region_labels(draw, n=None):
    """A partition, numbered by first pixel: single pixels, one region, and what lies between."""
    n = n or draw(st.integers(1, 14))
    names = draw(st.lists(st.integers(0, draw(st.integers(0, n - 1))), min_size=n, max_size=n))
    order = list(dict.fromkeys(names))
    return torch.tensor([order.index(name) for name in names])


@st.composite
def interactions(draw):
    """A, J, labels and reps, as eqs. 6-8 take them; J has ties."""
    labels = draw(region_labels())
    J = draw(tensors((len(labels),), st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)))
    A = draw(tensors((len(labels), draw(st.integers(1, 3))), st.sampled_from([-9.0, 0.0]) | st.floats(-2, 2)))
    K = draw(st.integers(1, 4))
    return A, J, labels, ranet.select_representatives(J, labels, K)


def random_map(H, W, N=3, seed=0, low=0.0, high=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    B = torch.rand(H, W, generator=g, dtype=dtype) * (high - low) + low
    C = (2 * torch.randn(N, H, W, generator=g, dtype=dtype)).softmax(0)
    A = torch.randn(H * W, 4, generator=g, dtype=dtype)
    return B, C, A


def pixels(H, W):
    return [(y, x) for y in range(H) for x in range(W)]


# ------------------------------------------------------------------------------------- eq. 1

def line(i, j):
    """The sample positions between two pixels (y, x), as fractions, from i to j."""
    dy, dx = j[0] - i[0], j[1] - i[1]
    L = max(abs(dy), abs(dx))
    return [i] if L == 0 else [(i[0] + Fraction(s * dy, L), i[1] + Fraction(s * dx, L)) for s in range(L + 1)]


def interpolate(B, y, x):
    total = 0.0
    for v in {math.floor(y), math.ceil(y)}:
        for u in {math.floor(x), math.ceil(x)}:
            total += float((1 - abs(y - v)) * (1 - abs(x - u))) * B[v][u]
    return total


def slow_D(B):
    B = B.tolist()
    places = pixels(len(B), len(B[0]))
    return [[max(interpolate(B, y, x) for y, x in line(i, j)) for j in places] for i in places]


@given(score_maps())
def test_eq1_equals_the_loop(B):
    close(ranet.boundary_probability(B), torch.tensor(slow_D(B), dtype=B.dtype), rtol=0, atol=1e-12)


def test_eq1_samples_lie_where_fractions_say():
    H, W = 5, 8
    ramps = [torch.arange(H, dtype=torch.float64)[:, None].expand(H, W), torch.arange(W, dtype=torch.float64).expand(H, W)]
    for i, a in enumerate(pixels(H, W)):
        for j, b in enumerate(pixels(H, W)):
            wide = abs(a[1] - b[1]) > abs(a[0] - b[0])
            ends = sorted((a, b), key=lambda p: p[1] if wide else p)    # from the left end, or from the upper
            for s, place in enumerate(line(*ends)):
                for ramp, position in zip(ramps, place):     # a ramp's value is the position
                    got = ranet._on_line(ramp, torch.tensor(i), torch.tensor(j), torch.tensor(s)).item()
                    assert abs(got - position) < Fraction(1, 10 ** 12)


@given(score_maps())
def test_eq1_is_symmetric_and_sees_its_ends(B):
    D, b = ranet.boundary_probability(B), B.flatten()
    assert torch.equal(D, D.T) and torch.equal(D.diagonal(), b)
    assert (D >= b).all() and (D >= b[:, None]).all() and (D <= b.max() + 1e-12).all()


@given(score_maps(), st.data())
def test_eq1_grows_with_B(B, data):
    more = torch.maximum(B, data.draw(tensors(tuple(B.shape), st.floats(0, 1))))
    assert (ranet.boundary_probability(more) >= ranet.boundary_probability(B) - 1e-12).all()


@given(st.integers(2, 6), st.integers(4, 7), st.floats(0.1, 1), st.data())
def test_eq1_walls(H, W, b, data):
    column = data.draw(st.integers(1, W - 3))
    x = torch.arange(H * W) % W
    for wall, height in (([column, column + 1], b), ([column], b / 2)):
        B = torch.zeros(H, W, dtype=torch.float64)
        B[:, wall] = b
        D = ranet.boundary_probability(B)
        crossing = D[x < column][:, x > wall[-1]]
        assert (crossing >= height).all() and (len(wall) == 2 or (crossing > height).all())
        assert (D[x < column][:, x < column] == 0).all()


@given(score_maps())
def test_eq1_turns_with_the_map(B):
    name = torch.arange(B.numel()).view(B.shape)
    D = ranet.boundary_probability(B)
    for turn in (lambda x: x.flip(0), lambda x: x.flip(1), lambda x: x.T):
        order = turn(name).flatten()
        close(ranet.boundary_probability(turn(B)), D[order][:, order], rtol=0, atol=1e-12)


def test_eq1_gradient():
    for size in ((3, 4), (5, 2), (1, 5)):
        B = random_map(*size)[0].requires_grad_()
        assert torch.autograd.gradcheck(ranet.boundary_probability, B)


def test_eq1_gradient_at_a_tie_goes_to_the_upper_end_or_the_left_of_a_wide_line():
    for i, j, first in (((0, 0), (2, 3), (0, 0)), ((2, 0), (0, 3), (2, 0)), ((3, 0), (0, 2), (0, 2)),
                        ((2, 0), (0, 2), (0, 2)), ((1, 3), (1, 1), (1, 1)), ((3, 1), (1, 1), (1, 1))):
        B = torch.full((4, 4), 0.5, dtype=torch.float64, requires_grad=True)
        ranet.boundary_probability(B)[4 * i[0] + i[1], 4 * j[0] + j[1]].backward()
        assert B.grad.nonzero().tolist() == [list(first)] and B.grad[first] == 1


# ------------------------------------------------------------------------------------- eq. 2

@given(class_maps())
def test_eq2_equals_scipy(C):
    p = C.flatten(1).T.numpy()
    slow = [[scipy.spatial.distance.jensenshannon(a, b, base=2) ** 2 for b in p] for a in p]
    close(ranet.semantic_divergence(C), torch.tensor(np.nan_to_num(slow)), rtol=0, atol=1e-6)   # scipy's root of -1e-17 is nan


@given(class_maps())
def test_eq2_is_a_symmetric_divergence(C):
    E = ranet.semantic_divergence(C)
    close(E, E.T, rtol=0, atol=1e-12)
    assert (E.diagonal() == 0).all() and E.min() >= 0 and E.max() <= 1
    p = C.flatten(1).T
    agree = (p[:, None] == p).all(2)
    disjoint = (torch.minimum(p[:, None], p) == 0).all(2)
    assert (E[agree] == 0).all() and (E[disjoint] > 1 - 1e-12).all()


def test_eq2_gradient():
    C = (0.9 * random_map(2, 3, N=4)[1] + 0.025).requires_grad_()
    # Off the simplex too: the formula is a divergence of any positive numbers, and C may miss a sum of 1.
    assert torch.autograd.gradcheck(ranet.semantic_divergence, C, eps=1e-7, atol=1e-4)


def test_eq2_slope_at_zero_is_that_at_tiny():
    C = torch.tensor([[[0.0, 0.5]], [[1.0, 0.5]]], dtype=torch.float64, requires_grad=True)
    ranet.semantic_divergence(C)[0, 1].backward()
    assert C.grad[0, 0, 0].item() == pytest.approx(0.5 * (-24 - math.log2(0.25)))


# ------------------------------------------------------------------------------------- eq. 3

@given(attention_maps(), st.data())
def test_eq3_equals_the_loop(D, data):
    D = D[0]
    E = data.draw(tensors(tuple(D.shape), st.floats(0, 1)))
    F = ranet.region_attention(D, E)
    for i in range(len(D)):
        for j in range(len(D)):
            assert F[i, j].item() == pytest.approx((1 - D[i, j].item()) * (1 - E[i, j].item()), abs=1e-15)
    assert F.min() >= 0 and F.max() <= 1


@given(score_maps(), st.data())
def test_eq3_of_eqs_1_and_2_is_symmetric(B, data):
    C = data.draw(class_maps(size=tuple(B.shape)))
    F = ranet.region_attention(ranet.boundary_probability(B), ranet.semantic_divergence(C))
    close(F, F.T, rtol=0, atol=1e-12)


def test_eq3_gradient():
    D, E = (torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.autograd.gradcheck(ranet.region_attention, (D.requires_grad_(), E.requires_grad_()))


# ------------------------------------------------------------------------------------- eq. 4

@given(attention_maps(), st.sampled_from([1, 3, 5]).flatmap(kernels))
def test_eq4_equals_scipy(F, Wg):
    F, size = F
    Fg = ranet.regularize(F, Wg, size)
    for row, smooth in zip(F, Fg):
        slow = scipy.ndimage.correlate(row.view(size).numpy(), Wg.numpy(), mode="nearest")
        close(smooth.view(size), torch.from_numpy(slow), rtol=0, atol=1e-12)
    assert Fg.min() >= 0 and Fg.max() <= 1 + 1e-12


@given(attention_maps(), st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_eq4_decides_by_the_mean_of_both_directions(Fg, threshold):
    Fg = Fg[0]
    G = ranet.region_decision(Fg, threshold)
    assert G.dtype == torch.bool and torch.equal(G, G.T)
    for i, row in enumerate(Fg.tolist()):
        for j, f in enumerate(row):
            assert G[i, j].item() == ((f + Fg[j, i].item()) / 2 > threshold)    # sgn(0) = -1


def test_eq4_gradient():
    B, C, _ = random_map(3, 4)
    F = ranet.region_attention(ranet.boundary_probability(B), ranet.semantic_divergence(C)).requires_grad_()
    Wg = torch.tensor([1.0, 2, 3, 4, 20, 6, 7, 8, 9], dtype=torch.float64).div(60).view(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda F, Wg: ranet.regularize(F, Wg, (3, 4)), (F, Wg))


# ------------------------------------------------------------------------------------- regions

@st.composite
def decisions(draw):
    n = draw(st.integers(1, 24))
    edges = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=2 * n))
    G = torch.eye(n, dtype=torch.bool) if draw(st.booleans()) else torch.zeros(n, n, dtype=torch.bool)
    for i, j in edges:
        G[i, j] = G[j, i] = True
    return G


def slow_labels(G):
    names = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_array(G.numpy()), directed=False)[1].tolist()
    order = list(dict.fromkeys(names))
    return torch.tensor([order.index(name) for name in names])


@given(decisions())
def test_regions_equal_scipys_components(G):
    assert torch.equal(ranet.connected_regions(G), slow_labels(G))


@given(decisions(), st.randoms(use_true_random=False))
def test_regions_do_not_depend_on_the_order(G, random):
    order = random.sample(range(len(G)), len(G))
    a, b = ranet.connected_regions(G)[order], ranet.connected_regions(G[order][:, order])
    assert torch.equal(a[:, None] == a, b[:, None] == b)


def test_regions_of_a_long_shuffled_path():
    n = 1600
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    G = torch.zeros(n, n, dtype=torch.bool)
    G[order[:-1], order[1:]] = G[order[1:], order[:-1]] = True
    G[order[800], order[801]] = G[order[801], order[800]] = False
    assert torch.equal(ranet.connected_regions(G), slow_labels(G))


# ------------------------------------------------------------------------------------- R4b: pixels left alone

@st.composite
def partitions(draw):
    """Labels with many regions of one pixel, and F^g; a quarter of the numbers are the same everywhere."""
    n = draw(st.integers(1, 14))
    labels = draw(region_labels(n))
    alone = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    names = [(i, "alone") if x else q for i, (q, x) in enumerate(zip(labels.tolist(), alone))]
    order = list(dict.fromkeys(names))
    return torch.tensor([order.index(name) for name in names]), draw(tensors((n, n), st.floats(0, 1)))


def slow_join(labels, Fg):
    """Also whether two regions of two or more pull alike, so that rounding decides."""
    labels, Fg, joined, close_call = labels.tolist(), Fg.tolist(), labels.tolist(), False
    for i, q in enumerate(labels):
        pulls = []
        for s in sorted(set(labels)):
            members = [j for j, name in enumerate(labels) if name == s]
            if len(members) > 1:
                pulls.append((math.fsum(Fg[i][j] + Fg[j][i] for j in members) / 2 / len(members), -s))
        if labels.count(q) == 1 and pulls:
            joined[i] = -max(pulls)[1]
            pulls.sort()
            close_call |= len(pulls) > 1 and pulls[-1][0] - pulls[-2][0] < 1e-9
    order = list(dict.fromkeys(joined))
    return torch.tensor([order.index(q) for q in joined]), close_call


@given(partitions())
def test_lone_pixels_equal_the_loop(x):
    slow, close_call = slow_join(*x)
    assume(not close_call)
    assert torch.equal(ranet.join_lone_pixels(*x), slow)


@given(partitions())
def test_lone_pixels_join_and_the_others_stay_together(x):
    labels, joined = x[0], ranet.join_lone_pixels(*x)
    size, now = labels.bincount(), joined.bincount()
    assert (now > 1).all() or torch.equal(joined, labels)
    large = size[labels] > 1
    together = (labels[:, None] == labels)[large][:, large]
    assert torch.equal((joined[:, None] == joined)[large][:, large], together)
    assert list(dict.fromkeys(joined.tolist())) == list(range(len(now)))       # numbered by first pixel


@given(partitions(), st.randoms(use_true_random=False))
def test_lone_pixels_do_not_depend_on_the_order(x, random):
    (labels, Fg), n = x, len(x[0])
    assume(not slow_join(labels, Fg)[1])
    order = torch.tensor(random.sample(range(n), n))
    a, b = ranet.join_lone_pixels(labels, Fg)[order], ranet.join_lone_pixels(ranet._numbered(
        torch.tensor([labels[order].tolist().index(q) for q in labels[order].tolist()])), Fg[order][:, order])
    assert torch.equal(a[:, None] == a, b[:, None] == b)


def test_lone_pixels_go_to_the_lower_number_at_a_tie():
    labels = torch.tensor([0, 0, 1, 2, 2])
    assert ranet.join_lone_pixels(labels, torch.full((5, 5), 0.5, dtype=torch.float64)).tolist() == [0, 0, 0, 1, 1]


def test_lone_pixels_go_by_the_mean_and_not_by_the_sum():
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 2])
    Fg = torch.full((7, 7), 0.4, dtype=torch.float64)
    Fg[2, :2] = Fg[:2, 2] = 0.6                                 # a mean of 0.6 and 0.4, a sum of 1.2 and 1.6
    assert ranet.join_lone_pixels(labels, Fg).tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_lone_pixels_of_the_modules_regions_are_gone():
    """A wall of one pixel between two halves: its pixels belong to the halves, unless they are asked to stay."""
    B, C = torch.full((1, 6, 7), 0.05), torch.full((1, 2, 6, 7), 0.5)
    B[:, :, 3] = 0.9
    joined, bare = ranet.RCB()(B, C).labels[0], ranet.RCB(join_lone=False)(B, C).labels[0]
    assert joined.max() == 1 and bare.max() == 7
    assert (joined[:, :3] == 0).all() and (joined[:, 4:] == 1).all()


# ------------------------------------------------------------------------------------- eq. 5 and phi

@given(attention_maps(), st.data())
def test_eq5_equals_the_loop(Fg, data):
    Fg = Fg[0]
    labels = data.draw(region_labels(len(Fg)))
    J = ranet.representative_score(Fg, labels)
    for i, q in enumerate(labels.tolist()):
        region = [j for j, s in enumerate(labels.tolist()) if s == q]
        assert J[i].item() == pytest.approx(sum(Fg[i, j].item() for j in region) / len(region), abs=1e-12)
    assert J.min() >= 0 and J.max() <= 1


@given(score_maps(), kernels(3).map(lambda x: x.float()), st.data())
def test_eq5_stays_in_0_1_for_any_kernel(B, Wg, data):
    C = data.draw(class_maps(size=tuple(B.shape))).float()
    F = ranet.region_attention(ranet.boundary_probability(B.float()), ranet.semantic_divergence(C))
    Fg = ranet.regularize(F, Wg, B.shape)
    J = ranet.representative_score(Fg, ranet.connected_regions(ranet.region_decision(Fg, 0.5)))
    assert J.min() >= 0 and J.max() <= 1


def test_eq5_gradient():
    Fg = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ranet.representative_score(x, torch.tensor([0, 1, 0, 0, 2, 1])), Fg)


@given(region_labels(), st.integers(1, 9), st.data())
def test_reps_equal_a_sort(labels, K, data):
    J = data.draw(tensors((len(labels),), st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)))
    slow = []
    for q in range(int(labels.max()) + 1):
        region = [i for i, s in enumerate(labels.tolist()) if s == q]
        slow += sorted(region, key=lambda i: (-J[i].item(), i))[:K]
    assert ranet.select_representatives(J, labels, K).tolist() == slow


# ------------------------------------------------------------------------------------- eqs. 6, 7 and 8

def attend(query, sent):
    """Softmax over what is sent, and its weighted sum. Plain numpy vectors."""
    if not sent:
        return [], np.zeros_like(query)
    weights = scipy.special.softmax([query @ v for v in sent])
    return weights, sum(w * v for w, v in zip(weights, sent))


def slow_eq6(A, J, labels, reps):
    out, W = [], np.zeros((len(reps), len(A)))
    for k, p in enumerate(reps):
        others = [i for i in range(len(A)) if labels[i] == labels[p] and i not in reps]
        weights, received = attend(A[p], [J[i] * A[i] for i in others])
        out.append(J[p] * A[p] + received)
        W[k, others] = weights
    return np.array(out), W


def slow_eq7(Al, J, labels, reps):
    out, W = [], np.zeros((len(reps), len(reps)))
    for k, p in enumerate(reps):
        total = J[p] * Al[k]
        for s in set(labels) - {labels[p]}:
            sources = [r for r in range(len(reps)) if labels[reps[r]] == s]
            weights, received = attend(Al[k], [J[reps[r]] * Al[r] for r in sources])
            total = total + received
            W[k, sources] = weights
        out.append(total)
    return np.array(out), W


def slow_eq8(A, Ag, J, labels, reps):
    out, W = [], np.zeros((len(A), len(reps)))
    for i in range(len(A)):
        sources = [r for r in range(len(reps)) if labels[reps[r]] == labels[i]]
        weights, received = attend(A[i], [J[reps[r]] * Ag[r] for r in sources])
        out.append(J[i] * A[i] + received)
        W[i, sources] = weights
    return np.array(out), W


def plain(A, J, labels, reps):
    return A.numpy(), J.numpy(), labels.tolist(), reps.tolist()


def same(got, slow):
    for a, b in zip(got, slow):
        close(a, torch.from_numpy(b), rtol=1e-9, atol=1e-9)


@given(interactions())
def test_eq6_equals_the_loop(x):
    same(ranet.intra_region_collection(*x), slow_eq6(*plain(*x)))


@given(interactions())
def test_eq7_equals_the_loop(x):
    A, J, labels, reps = x
    same(ranet.inter_region_interaction(A[reps], J, labels, reps), slow_eq7(A[reps].numpy(), *plain(*x)[1:]))


@given(interactions())
def test_eq8_equals_the_loop(x):
    A, J, labels, reps = x
    Ag = 2 - A[reps]
    same(ranet.intra_region_distribution(A, Ag, J, labels, reps), slow_eq8(A.numpy(), Ag.numpy(), *plain(*x)[1:]))


@given(interactions())
def test_eq6_weights_sum_to_1_over_the_other_pixels(x):
    A, _J, labels, reps = x
    W = ranet.intra_region_collection(*x)[1]
    is_rep = torch.isin(torch.arange(len(A)), reps)
    members = (labels[reps][:, None] == labels) & ~is_rep
    assert (W[~members] == 0).all() and (W >= 0).all()
    close(W.sum(1), members.any(1).to(W.dtype))


@given(interactions())
def test_eq7_weights_sum_to_1_over_each_other_region(x):
    A, J, labels, reps = x
    W = ranet.inter_region_interaction(A[reps], J, labels, reps)[1]
    region = labels[reps]
    for s in range(int(labels.max()) + 1):
        close(W[:, region == s].sum(1), (region != s).to(W.dtype))
    assert (W >= 0).all()


@given(interactions())
def test_eq8_weights_sum_to_1_over_the_regions_representatives(x):
    A, J, labels, reps = x
    W = ranet.intra_region_distribution(A, A[reps], J, labels, reps)[1]
    assert (W[labels[:, None] != labels[reps]] == 0).all() and (W >= 0).all()
    close(W.sum(1), torch.ones(len(A), dtype=W.dtype))


@given(region_labels(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_eq8_renaming_pixels_renames_O(labels, K, random):
    n = len(labels)
    g = torch.Generator().manual_seed(n)
    Fg, A = torch.rand(n, n, generator=g, dtype=torch.float64), torch.randn(n, 3, generator=g, dtype=torch.float64)
    order = torch.tensor(random.sample(range(n), n))

    def O(Fg, A, labels):
        J = ranet.representative_score(Fg, labels)
        return ranet.exchange_context(A, J, labels, K)
    close(O(Fg[order][:, order], A[order], labels[order]), O(Fg, A, labels)[order], rtol=1e-9, atol=1e-9)


def gradient_of(function):
    labels = torch.tensor([0, 0, 1, 0, 2, 1, 1, 0])
    g = torch.Generator().manual_seed(0)
    A = torch.randn(8, 3, generator=g, dtype=torch.float64, requires_grad=True)
    J = torch.rand(8, generator=g, dtype=torch.float64, requires_grad=True)
    reps = ranet.select_representatives(J.detach(), labels, 2)
    return torch.autograd.gradcheck(lambda A, J: function(A, J, labels, reps), (A, J))


def test_eq6_gradient():
    assert gradient_of(ranet.intra_region_collection)


def test_eq7_gradient():
    assert gradient_of(lambda A, J, labels, reps: ranet.inter_region_interaction(A[reps], J, labels, reps))


def test_eq8_gradient():
    assert gradient_of(lambda A, J, labels, reps: ranet.intra_region_distribution(A, 1 - A[reps], J, labels, reps))


# ------------------------------------------------------------------------------------- RCB and RIB

def certain(B, C, Wg, threshold, cues, by):
    """Whether labels do not hang on rounding: no F^g near the threshold, no pixel attached to two regions alike."""
    labels, _ = ranet.construct_regions(B, C, Wg, threshold, cues, join_lone=False)
    D, E = ranet.boundary_probability(B), ranet.semantic_divergence(C)
    Fg = ranet.regularize((1 - D if cues != "semantic" else 1) * (1 - E if cues != "boundary" else 1), Wg, B.shape)
    S = (Fg + Fg.T) / 2
    best = np.array([[S[i, labels == q].mean().item() for q in range(int(labels.max()) + 1) if (labels == q).sum() > 1]
                     for i in range(len(S)) if (labels == labels[i]).sum() == 1])
    best.sort(1) if best.size else None
    return (S - threshold).abs().min() > by and not (best.size and best.shape[1] > 1 and (best[:, -1] - best[:, -2]).min() < by)


def compare(B, C, A, seed=0, k=3, threshold=0.7, cues="both", joint=True, join_lone=True, K=3, intra=True, inter=True,
            tolerance=1e-9):
    """RCB and RIB beside the functions: labels, J, O and all gradients. None where rounding may decide."""
    H, W = B.shape
    rcb, rib = ranet.RCB(k, threshold, cues, joint, join_lone).to(B.dtype), ranet.RIB(K, intra, inter)
    if k > 1:
        with torch.no_grad():
            rcb.logits += torch.randn(k, k, generator=torch.Generator().manual_seed(seed))
    B, C, A = (x.detach().clone().requires_grad_() for x in (B, C, A))
    b, c = (B, C) if joint else (B.detach(), C.detach())
    Wg = rcb.kernel().to(B.dtype)
    if not certain(B.detach(), C.detach(), Wg.detach(), threshold, cues, 1e-9 if B.dtype == torch.float64 else 1e-5):
        return None
    labels, J = ranet.construct_regions(b, c, Wg, threshold, cues, join_lone)
    O = ranet.exchange_context(A, J, labels, K, intra, inter)
    inputs = [B, C, A, *rcb.parameters()]
    weight = torch.randn(O.shape, generator=torch.Generator().manual_seed(1)).to(O.dtype)
    slow = torch.autograd.grad((O * weight).sum(), inputs, allow_unused=True)
    for few_calls, numbers in ((True, 2 ** 26), (True, 40), (False, 2 ** 19), (False, 40)):     # a GPU's way, a CPU's
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranet, "_few_calls", lambda B, few=few_calls: few)
            patch.setattr(ranet, "_numbers", lambda x, n=numbers: n)
            regions = rcb(B[None], C[None])
            fast = rib(A.T.reshape(1, -1, H, W), regions)
            assert torch.equal(regions.labels.flatten(), labels)
            close(regions.J.flatten(), J, rtol=tolerance, atol=tolerance)
            close(fast[0].flatten(1).T, O, rtol=tolerance, atol=tolerance)
            quick = torch.autograd.grad((fast[0].flatten(1).T * weight).sum(), inputs, allow_unused=True)
        for x, a, b in zip(inputs, slow, quick):
            a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
            close(b, a, rtol=tolerance, atol=tolerance * a.abs().max().item() + 1e-12)
    return labels


@given(score_maps(), st.data())
def test_rcb_rib_equal_the_functions(B, data):
    C = data.draw(class_maps(size=tuple(B.shape)))
    A = random_map(*B.shape)[2]
    labels = compare(B, C, A, seed=B.numel(), k=data.draw(st.sampled_from([1, 3, 5])), K=data.draw(st.integers(1, 9)),
            threshold=data.draw(st.sampled_from([0.3, 0.61, 0.8])), cues=data.draw(st.sampled_from(["both", "boundary", "semantic"])),
            joint=data.draw(st.booleans()), join_lone=data.draw(st.booleans()), intra=data.draw(st.booleans()), inter=data.draw(st.booleans()))
    assume(labels is not None)


def test_rcb_rib_equal_the_functions_on_larger_maps():
    for H, W in ((12, 15), (17, 11), (9, 9)):
        B, C, A = random_map(H, W, seed=H, high=0.2)
        B[:, W // 3] = B[H // 2, W // 3:] = 0.9                 # walls, and soft classes in between
        soft = (C + 3) / (1 + 3 * len(C))
        size = compare(B, soft, A, join_lone=False).bincount()
        assert len(size) > 10 and (size > 9).sum() >= 3 and compare(B, soft, A).bincount().min() > 1


def test_rcb_rib_worst_cases():
    H, W = 6, 7
    _, C, A = random_map(H, W)
    uniform = torch.full_like(C, 1 / len(C))
    one_hot = torch.nn.functional.one_hot(C.argmax(0), len(C)).permute(2, 0, 1).to(C.dtype)
    zero, one, half = (torch.full((H, W), v, dtype=C.dtype) for v in (0.05, 1.0, 0.3))
    assert compare(zero, uniform, A).max() == 0                             # one region
    assert compare(one, uniform, A).max() == H * W - 1                      # every pixel its own
    compare(zero, uniform, A, K=H * W + 1)                                  # K larger than every region
    compare(half, one_hot, A, cues="semantic")
    compare(*random_map(1, 1))                                              # a single pixel


def test_modules_on_a_line_of_300_pixels():
    B, C, A = random_map(1, 300, high=0.1)          # steps beyond one byte
    C = (C + 9) / (9 * len(C) + 1)
    assert compare(B, C, A, threshold=0.5).max() == 0
    B[0, 150] = 1.0
    assert compare(B.T, C.mT, A, threshold=0.5, join_lone=False).max() == 2


def test_rcb_rib_float32_within_its_rounding():
    for seed in range(3):
        compare(*random_map(8, 9, seed=seed, dtype=torch.float32), threshold=0.45, tolerance=2e-4)


def test_rcb_batches_images_with_different_numbers_of_regions():
    B, C, A = zip(*(random_map(5, 6, seed=s, high=h) for s, h in ((0, 0.0), (1, 0.6), (2, 1.0))))
    B, C, A = torch.stack(B), torch.stack(C), torch.stack([a.T.reshape(-1, 5, 6) for a in A])
    rcb, rib = ranet.RCB(threshold=0.45), ranet.RIB(2)
    regions = rcb(B, C)
    O = rib(A, regions)
    assert len(set(regions.labels.amax((1, 2)).tolist())) == 3
    for i in range(3):
        single = rcb(B[i:i + 1], C[i:i + 1])
        assert torch.equal(single.labels[0], regions.labels[i]) and torch.equal(single.J[0], regions.J[i])
        close(rib(A[i:i + 1], single)[0], O[i])


@pytest.mark.parametrize("size", [(4, 300), (1, 300), (500, 1), (2, 700), (300, 4)])
def test_module_on_long_maps_with_small_regions(size):
    B, C, _ = random_map(*size, seed=sum(size), dtype=torch.float32)
    B, C = B[None].requires_grad_(), C[None].requires_grad_()
    ranet.RCB()(B, C).J.sum().backward()
    assert B.grad.isfinite().all() and C.grad.isfinite().all() and C.grad.any()


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("cues", ["both", "boundary", "semantic"])
def test_module_any_of_its_inputs_may_be_frozen(cues, kernel_size):
    B, C, _ = random_map(5, 6, high=0.3)
    for wants in range(8):
        rcb = ranet.RCB(kernel_size, 0.5, cues).double()
        b, c = (x[None].detach().clone().requires_grad_(bool(wants & bit)) for x, bit in ((B, 1), (C, 2)))
        for p in rcb.parameters():
            p.requires_grad_(bool(wants & 4))
        J = rcb(b, c).J
        if J.requires_grad:
            J.sum().backward()
        assert b.grad is None or bool(b.grad.any()) == (cues != "semantic")
        assert c.grad is None or bool(c.grad.any()) == (cues != "boundary")
        assert all(p.grad is not None and p.grad.any() for p in rcb.parameters() if p.requires_grad)


def test_net_steps_out_of_torch_compile():
    model = small_net().eval()
    images = torch.rand(1, 3, 24, 28)
    close(torch.compile(model, backend="eager")(images).fine, model(images).fine)


def test_rcb_kernel_is_a_softmax_that_starts_at_its_centre():
    for k, centre in ((3, math.exp(4) / (math.exp(4) + 8)), (5, math.exp(4) / (math.exp(4) + 24))):
        Wg = ranet.RCB(k).kernel()
        assert Wg.shape == (k, k) and Wg.sum().item() == pytest.approx(1)
        assert Wg[k // 2, k // 2].item() == pytest.approx(centre) == pytest.approx(Wg.max().item())
    assert list(ranet.RCB(1).parameters()) == [] and ranet.RCB(1).kernel().tolist() == [[1]]


def test_rcb_sharp_probabilities_keep_gradients_finite():
    sharp = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0)).sign() * 120
    B = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(0))
    A = torch.ones(1, 3, 5, 6, requires_grad=True)
    for logits in (sharp, torch.zeros_like(sharp)):
        logits.requires_grad_()
        O = ranet.RIB()(A, ranet.RCB()(B.requires_grad_(), logits.softmax(1)))
        O.square().sum().backward()
        for x in (logits, B, A):
            assert x.grad.isfinite().all()


def test_rcb_gradients_are_the_same_every_time_on_several_threads():
    B, C, _ = random_map(24, 24, high=0.1, dtype=torch.float32)
    B, C = B[None].requires_grad_(), (C[None] + 9) / (9 * len(C) + 1)
    torch.set_num_threads(2)
    try:
        seen = set()
        for _ in range(12):
            rcb = ranet.RCB()
            gradients = torch.autograd.grad(rcb(B, C).J.square().sum(), (B, rcb.logits))
            seen.add(b"".join(x.numpy().tobytes() for x in gradients))
    finally:
        torch.set_num_threads(1)
    assert len(seen) == 1, "a run that resumes would end elsewhere"


def test_rcb_keeps_nothing_without_gradients():
    B, C, _A = random_map(5, 6)
    with torch.no_grad():
        regions = ranet.RCB().double()(B[None].requires_grad_(), C[None])
    assert regions.J.grad_fn is None and not regions.J.requires_grad
    regions = ranet.RCB(1)(B[None].detach(), C[None])
    assert regions.J.grad_fn is None


def test_rcb_rib_autocast_computes_in_float32():
    B, C, A = random_map(6, 7, dtype=torch.float32)
    A = A.T.reshape(1, -1, 6, 7).bfloat16().requires_grad_()
    rcb = ranet.RCB(threshold=0.45)
    with torch.autocast("cpu", torch.bfloat16):
        regions = rcb(B[None].bfloat16(), C[None].bfloat16())
        O = ranet.RIB()(A, regions)
        O.float().square().mean().backward()
    assert regions.J.dtype == torch.float32 and O.dtype == torch.bfloat16
    exact = rcb(B[None].bfloat16().float(), C[None].bfloat16().float())
    assert torch.equal(exact.labels, regions.labels) and torch.equal(exact.J, regions.J)
    assert A.grad.isfinite().all() and rcb.logits.grad.isfinite().all()


# ------------------------------------------------------------------------------------- the network and its loss

def small_net(num_classes=3, **options):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 5, stride=4, padding=2), torch.nn.ReLU())
    return ranet.RANet(backbone, 5, num_classes, 6, **options)


@pytest.mark.parametrize("options", [
    {}, {"cues": "boundary"}, {"cues": "semantic"}, {"joint": False}, {"intra": False}, {"inter": False},
    {"kernel_size": 1}, {"kernel_size": 5, "representatives": 1}, {"join_lone": False}, {"context": torch.nn.Conv2d(6, 6, 1)}], ids=str)
def test_net_every_parameter_learns(options):
    model = small_net(**options)
    images = torch.rand(2, 3, 36, 52)
    label = torch.randint(0, 3, (2, 36, 52))
    ranet.ranet_loss(model(images), label, (label == 1).byte()).total.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == [], "DistributedDataParallel would wait for these"
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_net_takes_any_size_and_returns_it():
    model = small_net().eval()
    for h, w in ((4, 4), (37, 53), (64, 8)):
        out = model(torch.rand(1, 3, h, w))
        assert out.fine.shape == out.coarse.shape == (1, 3, h, w)
        assert out.boundary.shape == out.regions.labels.shape == out.regions.J.shape
    assert small_net(context=torch.nn.Identity())(torch.rand(2, 3, 9, 9)).regions is None


def test_net_starts_with_one_region():
    out = small_net()(torch.rand(2, 3, 40, 40))
    assert 0.02 < out.boundary.sigmoid().mean() < 0.12 and out.regions.labels.max() == 0


def test_net_teaches_B_and_C_through_O_only_where_joint():
    """The fine loss alone: it reaches the boundary head through J, unless joint is False (R4)."""
    for joint in (True, False):
        model = small_net(joint=joint)
        model(torch.rand(1, 3, 40, 40)).fine.square().sum().backward()
        head = model.boundary.weight.grad
        assert (head is not None and bool(head.any())) == joint
        assert model.rcb.logits.grad.any()


def test_net_autocast_stays_finite():
    model = small_net()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.rand(2, 3, 40, 40))
        label = torch.randint(0, 3, (2, 40, 40))
        loss = ranet.ranet_loss(out, label, (label == 1).byte()).total
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_loss_equals_the_loop():
    g = torch.Generator().manual_seed(0)
    fine, coarse = torch.randn(2, 2, 3, 4, 6, generator=g, dtype=torch.float64)
    boundary = torch.randn(2, 2, 3, generator=g, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 4, 6), generator=g)
    label[0, :2, :2] = label[1, 3] = 255
    mask = torch.randint(0, 2, (2, 4, 6), generator=g)
    mask[label == 255] = 255
    parts = []
    for logits in (fine, coarse):
        p = scipy.special.log_softmax(logits.numpy(), axis=1)
        parts.append(np.mean([-p[b, label[b, y, x], y, x] for b in range(2) for y, x in pixels(4, 6) if label[b, y, x] != 255]))
    cells = []
    for b in range(2):
        for y, x in pixels(2, 3):
            cell = mask[b, 2 * y:2 * y + 2, 2 * x:2 * x + 2].flatten().tolist()
            if set(cell) != {255}:
                p = scipy.special.expit(boundary[b, y, x].item())
                cells.append(-math.log(p if 1 in cell else 1 - p))
    parts.append(np.mean(cells))
    assert len(cells) == 11
    loss = ranet.ranet_loss(ranet.Output(fine, coarse, boundary, None), label, mask, weights=(1, 2, 3))
    assert [x.item() for x in loss[1:]] == pytest.approx(parts)
    assert loss.total.item() == pytest.approx(parts[0] + 2 * parts[1] + 3 * parts[2])


def test_loss_of_two_halves_with_their_counts_is_that_of_the_whole():
    g = torch.Generator().manual_seed(0)
    out = ranet.Output(*torch.randn(2, 2, 3, 4, 6, generator=g), torch.randn(2, 2, 3, generator=g), None)
    label = torch.randint(0, 3, (2, 4, 6), generator=g)
    label[0, :3] = 255
    mask = torch.where(label == 255, 255, label % 2)
    half = [(ranet.Output(*(x[i:i + 1] for x in out[:3]), None), label[i:i + 1], mask[i:i + 1]) for i in range(2)]
    counts = sum(ranet.label_counts(l, m, (2, 3)) for _, l, m in half) / 2      # what two processes would divide by
    mean = sum(ranet.ranet_loss(o, l, m, counts=counts).total for o, l, m in half) / 2
    close(mean, ranet.ranet_loss(out, label, mask).total)


def test_loss_of_an_unlabelled_batch_is_zero():
    out = small_net()(torch.rand(2, 3, 16, 16))
    nothing = torch.full((2, 16, 16), 255)
    loss = ranet.ranet_loss(out, nothing, nothing)
    loss.total.backward()
    assert loss.total.item() == 0


# ------------------------------------------------------------------------------------- the file

def test_file_needs_torch_alone_and_is_silent(tmp_path):
    imports = {alias.name for node in ast.walk(ast.parse((ROOT / "ranet.py").read_text())) if isinstance(node, ast.Import)
               for alias in node.names}
    sources = {node.module for node in ast.walk(ast.parse((ROOT / "ranet.py").read_text())) if isinstance(node, ast.ImportFrom)}
    assert imports | sources == {"torch", "typing"}
    (tmp_path / "ranet.py").write_text((ROOT / "ranet.py").read_text())
    probe = ("import torch; state = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled();"
             "import ranet; now = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled();"
             "assert torch.equal(state[0], now[0]) and state[1:] == now[1:]")
    run = subprocess.run([sys.executable, "-W", "error", "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_file_docstrings_open_with_their_equation_and_survive_python():
    public = [f for name, f in vars(ranet).items() if not name.startswith("_") and getattr(f, "__doc__", None)]
    opened = [f.__doc__.split(":")[0] for f in public if f.__doc__.startswith("Eq. ")]
    assert opened == ["Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Eq. 4", "Eq. 5", "Eq. 6", "Eq. 7", "Eq. 8"]
    for thing in [ranet, *(x for x in vars(ranet).values() if getattr(x, "__module__", "") == "ranet")]:
        assert not set("\a\b\f\v\t") & set(thing.__doc__ or ""), "LaTeX in a docstring that is not raw"


def test_file_usage_example_works(capsys):
    lines = ranet.__doc__.split("import torch, ranet\n")[1].split("\n\n")[0]
    code = "import torch, ranet\n" + "\n".join(line.strip() for line in lines.splitlines())
    exec(code, {})                                              # noqa: S102  the docstring's lines
    assert capsys.readouterr().out.startswith("torch.Size([2, 19, 128, 160])\ntensor([")


# ------------------------------------------------------------------------------------- bad input

class Dict(torch.nn.Module):
    def forward(self, images):
        return {"features": images}


def bad_inputs():
    B, C, A = random_map(3, 4)
    pairs = torch.full((12, 12), 0.5, dtype=torch.float64)
    kernel = torch.full((3, 3), 1 / 9, dtype=torch.float64)
    labels = torch.tensor([0] * 6 + [1] * 6)
    J = torch.linspace(0, 1, 12, dtype=torch.float64)
    reps = ranet.select_representatives(J, labels, 2)
    image = A.T.reshape(1, 4, 3, 4)
    regions = ranet.Regions(labels.view(1, 3, 4), J.view(1, 3, 4))
    out = ranet.Output(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2), None)
    nan = B.clone().fill_(math.nan)
    zeros = torch.zeros(1, 4, 4, dtype=torch.int64)
    r = ranet
    return [
        ("B", lambda: r.boundary_probability(B[0])), ("B", lambda: r.boundary_probability(B + 1)),
        ("B", lambda: r.boundary_probability(nan)), ("B", lambda: r.boundary_probability([[0.5]])),
        ("B", lambda: r.boundary_probability(torch.ones(2, 2, dtype=torch.int64))),
        ("B", lambda: r.boundary_probability(B[:0])),
        ("C", lambda: r.semantic_divergence(B)), ("C", lambda: r.semantic_divergence(C / 2)),
        ("C", lambda: r.semantic_divergence(C - 1)), ("D", lambda: r.region_attention(B, pairs)),
        ("E", lambda: r.region_attention(pairs, pairs[:3, :3])), ("E", lambda: r.region_attention(pairs, -pairs)),
        ("F", lambda: r.regularize(2 * pairs + 1, kernel, (3, 4))), ("Wg", lambda: r.regularize(pairs, 2 * kernel, (3, 4))),
        ("Wg", lambda: r.regularize(pairs, kernel[:2, :2], (3, 4))), ("size", lambda: r.regularize(pairs, kernel, (4, 4))),
        ("size", lambda: r.regularize(pairs, kernel, 12)), ("labels", lambda: r.representative_score(pairs, labels * 10 ** 12)),
        ("Fg", lambda: r.region_decision(pairs[:3])), ("threshold", lambda: r.region_decision(pairs, 2)),
        ("G", lambda: r.connected_regions(pairs)), ("G", lambda: r.connected_regions((pairs > 0).triu())),
        ("Fg", lambda: r.representative_score(B, labels)), ("labels", lambda: r.representative_score(pairs, labels[:3])),
        ("labels", lambda: r.representative_score(pairs, labels * 2)), ("labels", lambda: r.representative_score(pairs, labels - 1)),
        ("labels", lambda: r.representative_score(pairs, labels.float())),
        ("J", lambda: r.select_representatives(J[:3], labels, 2)), ("K", lambda: r.select_representatives(J, labels, 0)),
        ("K", lambda: r.select_representatives(J, labels, 1.5)),
        ("A", lambda: r.intra_region_collection(A[:3], J, labels, reps)), ("A", lambda: r.intra_region_collection(A / 0, J, labels, reps)),
        ("J", lambda: r.intra_region_collection(A, J + 1, labels, reps)), ("reps", lambda: r.intra_region_collection(A, J, labels, reps + 9)),
        ("reps", lambda: r.intra_region_collection(A, J, labels, reps.flip(0))),
        ("reps", lambda: r.intra_region_collection(A, J, labels, reps[:1])),
        ("reps", lambda: r.intra_region_collection(A, J, labels, reps[[0, 0, 2, 3]])),
        ("Al", lambda: r.inter_region_interaction(A, J, labels, reps)), ("Ag", lambda: r.intra_region_distribution(A, A, J, labels, reps)),
        ("Ag", lambda: r.intra_region_distribution(A, A[:4, :2], J, labels, reps)),
        ("kernel_size", lambda: r.RCB(2)), ("threshold", lambda: r.RCB(threshold=-1)), ("cues", lambda: r.RCB(cues="all")),
        ("B", lambda: r.RCB()(B, C)), ("C", lambda: r.RCB()(B[None], C)), ("C", lambda: r.RCB()(B[None], C[None, :, :2])),
        ("B", lambda: r.RCB()(nan[None], C[None])), ("representatives", lambda: r.RIB(0)), ("A", lambda: r.RIB()(A, regions)),
        ("A", lambda: r.RIB()(image / 0, regions)),
        ("regions.labels", lambda: r.RIB()(image[..., :2], regions)),
        ("regions.J", lambda: r.RIB()(image, regions._replace(J=J))),
        ("num_classes", lambda: small_net(num_classes=0)), ("images", lambda: small_net()(torch.rand(3, 8, 8))),
        ("backbone", lambda: r.RANet(torch.nn.Identity(), 5, 3, 6)(torch.rand(1, 3, 8, 8))),
        ("backbone", lambda: r.RANet(Dict(), 5, 3, 6)(torch.rand(1, 3, 8, 8))),
        ("J", lambda: r.intra_region_collection(A.float(), J, labels, reps)),
        ("J", lambda: r.inter_region_interaction(A[:4].float(), J, labels, reps)),
        ("E", lambda: r.region_attention(pairs, pairs.float())), ("Wg", lambda: r.regularize(pairs, kernel.float(), (3, 4))),
        ("labels", lambda: r.join_lone_pixels(labels[:3], pairs)), ("Fg", lambda: r.join_lone_pixels(labels, pairs + 1)),
        ("cues", lambda: r.construct_regions(B, C, kernel, cues="all")),
        ("label", lambda: r.ranet_loss(out, zeros + 2, zeros)), ("label", lambda: r.ranet_loss(out, zeros[:, :2], zeros)),
        ("label", lambda: r.ranet_loss(out, zeros.float(), zeros)), ("mask", lambda: r.ranet_loss(out, zeros, zeros[0])),
    ]


@pytest.mark.parametrize("number", range(len(bad_inputs())))
def test_bad_input_is_one_line_that_names_it(number):
    name, call = bad_inputs()[number]
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .+") as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 160


# ------------------------------------------------------------------------------------- mutations

# (the tests that must notice, the text in ranet.py, the mistake)
MUTATIONS = [
    ("eq1", "torch.where(sample > D, sample, D)", "torch.where(sample < D, sample, D)"),              # minimum
    ("eq1", "torch.where(sample > D, sample, D)", "torch.where(sample >= D, sample, D)"),             # the last of equals
    ("eq1", "D = _on_line(B, i, j, torch.zeros_like(j))", "D = 0 * _on_line(B, i, j, torch.zeros_like(j))"),  # start dropped
    ("eq1", "    for step in range(1, max(H, W)):", "    for step in range(1, max(H, W) - 1):"),      # end dropped
    ("eq1", "longer = torch.where(dy.abs() < dx.abs(), dx, dy)", "longer = torch.where(dy.abs() < dx.abs(), dy, dx)"),        # shorter axis
    ("eq1", "torch.where(dy.abs() < L, W, 1)", "torch.where(dy.abs() < L, 1, W)"),               # wrong neighbour
    ("eq1", "return near + part * (", "return near + (1 - part) * ("),                          # weight reversed
    ("eq2", "return _unit((kl_i + kl_j) / 2)", "return _unit(kl_i + kl_j)"),                          # missing half
    ("eq2", "U = (Ci + Cj) / 2 ", "U = Ci + Cj "),                                                    # U no mean
    ("eq2", "kl_j = (Cj * (_log2(Cj)", "kl_j = (Ci * (_log2(Cj)"),                                    # wrong weight
    ("eq2", "p.detach().clamp_min(TINY).log2()", "p.detach().clamp_min(TINY).log()"),                 # natural log
    ("eq2", "p.detach().clamp_min(TINY).log2()", "p.detach().log2()"),                                # 0 log 0
    ("eq2", "TINY = 2.0 ** -24", "TINY = 2.0 ** -6"),                                                 # floor too high
    ("eq3", "return (1 - D) * (1 - E)", "return (1 - D) * (1 + E)"),                                  # sign
    ("eq3", "return (1 - D) * (1 - E)", "return 1 - D * E"),
    ("eq4", 'mode="replicate"', 'mode="constant"'),                                                   # zero border
    ("eq4", "Wg[a, b] * maps[:, a:a + H, b:b + W]", "Wg[b, a] * maps[:, a:a + H, b:b + W]"),          # kernel transposed
    ("eq4", "Wg[a, b] * maps[:, a:a + H, b:b + W]", "Wg[-1 - a, -1 - b] * maps[:, a:a + H, b:b + W]"),    # a convolution
    ("eq4", "return (Fg + Fg.T) / 2 > threshold", "return (Fg + Fg) / 2 > threshold"),                # no transpose
    ("eq4", "return (Fg + Fg.T) / 2 > threshold", "return (Fg + Fg.T) / 2 >= threshold"),             # sgn(0) = 1
    ("eq4", "return (Fg + Fg.T) / 2 > threshold", "return Fg + Fg.T > threshold"),                    # missing half
    ("regions", "        if torch.equal(first, last):\n", "        if True:\n"),                       # one round
    ("regions", "(starts.cumsum(-1) - 1)", "starts.cumsum(-1)"),                          # numbered from 1
    ("eq5", "(Fg * same).sum(1)", "(Fg * same).sum(0)"),                                              # wrong axis
    ("eq5", "same.sum(1))  ", "len(Fg))  "),                                                          # mean over all pixels
    ("eq5", "same = labels[:, None] == labels  ", "same = (labels[:, None] == labels) & ~torch.eye(len(Fg), dtype=bool)  "),
    ("reps", "J.detach().argsort(descending=True, stable=True)", "J.argsort(stable=True)"),                    # the lowest
    ("reps", "order[rank < K]", "order[rank <= K]"),                                                  # one too many
    ("eq6", "others[:, reps] = False", "pass"),                                                       # representatives kept
    ("eq6", "_masked_softmax(A[reps] @ JA.T, others)", "(A[reps] @ JA.T).softmax(1)"),                # softmax over all pixels
    ("eq6", "_masked_softmax(A[reps] @ JA.T, others)", "_masked_softmax(A[reps] @ A.T, others)"),     # J missing
    ("eq6", "return JA[reps] + Wl @ JA, Wl", "return A[reps] + Wl @ JA, Wl"),                         # J(p) missing
    ("eq6", "return JA[reps] + Wl @ JA, Wl", "return JA[reps] - Wl @ JA, Wl"),                        # sign
    ("eq7", "(region[:, None] != region)  ", "1  "),                                                  # s = q included
    ("eq7", "source = region.expand_as(logits)  ", "source = 0 * region.expand_as(logits)  "),        # all regions at once
    ("eq7", "return JAl + Wi @ JAl, Wi", "return JAl + Wi @ JAl / Q, Wi"),                            # divided by Q
    ("eq7", "return JAl + Wi @ JAl, Wi", "return Al + Wi @ JAl, Wi"),                                 # J(p) missing
    ("eq7", "logits = Al @ JAl.T  ", "logits = JAl @ Al.T  "),                                        # J on the wrong side
    ("eq8", "_masked_softmax(A @ JAg.T, same)", "(A @ JAg.T).softmax(1)"),                            # all representatives
    ("eq8", "_masked_softmax(A @ JAg.T, same)", "_masked_softmax((A @ JAg.T) / A.shape[1] ** 0.5, same)"),    # scaled
    ("eq8", "return J[:, None] * A + Wd @ JAg, Wd", "return A + Wd @ JAg, Wd"),                       # J_i missing
    ("eq8", "softmax(1) * mask", "softmax(0) * mask"),                                                # wrong axis
    ("lone", "(size > 1).nonzero()", "(size > 0).nonzero()"),                                         # to themselves
    ("lone", "(size[labels] == 1).nonzero()", "(size[labels] <= 2).nonzero()"),                       # pairs, too
    ("lone", "S = (Fg[i] + Fg[:, i].T) / 2", "S = Fg[i]"),                                            # one direction
    ("lone", "S @ member / size[large]", "S @ member"),                                               # sum, no mean
    ("lone", "size[large]).argmax(1)", "size[large]).argmin(1)"),                                     # the least attached
    ("lone", "return _numbered(first[joined])", "return joined"),                                     # gaps in the numbers
    ("rcb", "x = (members % W + d[:, None]).clamp(0, W - 1)", "x = (members % W - d[:, None]).clamp(0, W - 1)"),  # no adjoint
    ("rcb", "= dJ[members] / size[labels[members]], q", "= dJ[members], q"),
    ("rcb", "B.shape[2]) + len(Wg) // 2, steps", "B.shape[2]), steps"),                                                         # lines too short
    ("rcb", "T = torch.stack((T, T.flip(1)))", "T = torch.stack((T, T))"),                            # one direction
    ("rcb", "copy_(back.flip(1))", "copy_(back)"),
    ("rcb", "incline = gap[:, None] * w + 1", "incline = gap[:, None] * w"),
    ("rcb", "torch.where(gap < 0, n, 1)", "torch.full_like(gap, 1)"),                                 # i > j
    ("rcb", "sum(1)[:, :, None] + (Cj", "sum(1)[:, :, None] - (Cj"),
    ("rcb", "omega.diagonal().div_(2)", "pass"),                                                      # i = j twice
    ("rcb", "dj[:, n] -= log.sum(1)", "pass"),                                                     # one side of E
    ("rcb", "(dD * part).flatten()", "dD.flatten()"),
    ("rcb", "F.triu(1).T", "F.T"),
]


def checks(name):
    return [test for key, test in globals().items() if key.startswith(f"test_{name}_")]


@pytest.mark.parametrize("name", ["eq1", "eq2", "eq3", "eq4", "regions", "lone", "eq5", "reps", "eq6", "eq7", "eq8", "rcb"])
def test_mutants_are_caught(name, monkeypatch):
    source = (ROOT / "ranet.py").read_text()

    def passes(text):
        module = types.ModuleType("mutant")
        exec(compile(text, "mutant", "exec"), module.__dict__)  # noqa: S102
        monkeypatch.setitem(globals(), "ranet", module)
        try:
            for check in checks(name):
                check()
        except (NameError, TypeError, AttributeError):
            raise                                               # a mutant must compute something wrong, not break
        except Exception:       # noqa: BLE001  however a test fails
            return False
        return True

    assert passes(source), "the mutations prove nothing if the unchanged source fails"
    for target, old, new in MUTATIONS:
        if target == name:
            assert source.count(old) == 1, f"{old!r} must stand exactly once in ranet.py"
            assert not passes(source.replace(old, new)), f"no {name} test notices {old!r} -> {new!r}"
