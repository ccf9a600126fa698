# SPDX-License-Identifier: MIT
"""Is the code the mathematics? Each equation against an oracle that shares nothing with ranet.py (plain
Python loops, scipy), its properties on drawn inputs, its gradients by central differences, the modules
against the functions, and deliberate mistakes that the same tests must catch."""
import ast
import inspect
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

import ranet

# No shrinking: the maps are small as drawn, and the mutations below fail by the dozen.
settings.register_profile("ranet", deadline=None, derandomize=True, database=None, max_examples=40,
                          phases=(Phase.explicit, Phase.generate))
settings.load_profile("ranet")
torch.set_num_threads(1)
ROOT = Path(__file__).parent
close = torch.testing.assert_close


# --- what is drawn ---------------------------------------------------------------------------------------
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
    """C: one-hot (a softmax of +-400 underflows), so that pixels share no class; soft, and pixels that agree."""
    N, sharp, soft = draw(st.integers(1, 5)), st.sampled_from([-400.0, 400.0]), st.floats(-4, 4)
    return draw(tensors((N, *(size or draw(sizes))), draw(st.sampled_from([sharp, sharp | soft, soft])))).softmax(0)


@st.composite
def attention_maps(draw):
    """F or F^g, not symmetric, with the size of its image."""
    H, W = draw(st.sampled_from([(1, 1), (1, 5), (3, 2), (3, 3), (2, 4)]))
    return draw(tensors((H * W, H * W), st.sampled_from([0.0, 0.8, 1.0]) | st.floats(0, 1))), (H, W)


def kernels(k):
    logits = tensors((k * k,), st.sampled_from([-800.0, 0.0]) | st.floats(-3, 3))      # exact zeros, too
    return logits.map(lambda x: x.softmax(0).view(k, k))


def numbered(names):
    """Regions numbered by their first pixel."""
    order = list(dict.fromkeys(names))
    return torch.tensor([order.index(name) for name in names])


def members(labels):
    """The pixels of each region."""
    labels = labels.tolist()
    return [[i for i, s in enumerate(labels) if s == q] for q in range(max(labels) + 1)]


@st.composite
def region_labels(draw, n=None):
    """A partition: single pixels, one region, and what lies between."""
    n = n or draw(st.integers(1, 14))
    return numbered(draw(st.lists(st.integers(0, draw(st.integers(0, n - 1))), min_size=n, max_size=n)))


scores = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)     # J has ties


@st.composite
def interactions(draw):
    """A, J, labels and reps, as eqs. 6-8 take them."""
    labels = draw(region_labels())
    J = draw(tensors((len(labels),), scores))
    A = draw(tensors((len(labels), draw(st.integers(1, 3))), st.sampled_from([-30.0, 0.0]) | st.floats(-2, 2)))
    return A, J, labels, ranet.select_representatives(J, labels, draw(st.integers(1, 4)))


def noise(*shape, seed=0, draw=torch.rand):
    return draw(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_map(H, W, N=3, seed=0, high=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    B = torch.rand(H, W, generator=g, dtype=dtype) * high
    C = (2 * torch.randn(N, H, W, generator=g, dtype=dtype)).softmax(0)
    A = torch.randn(H * W, 4, generator=g, dtype=dtype)
    return B, C, A


# --- eq. 1 -----------------------------------------------------------------------------------------------
def line(i, j):
    """The samples between two pixels (y, x), from i to j: one at every step of the longer axis."""
    return np.linspace(i, j, max(abs(i[0] - j[0]), abs(i[1] - j[1])) + 1)


def slow_D(B):
    pixels = list(np.ndindex(*B.shape))
    lines = [[line(i, j).T for j in pixels] for i in pixels]
    return [[scipy.ndimage.map_coordinates(B, at, order=1, mode="nearest").max() for at in row] for row in lines]


@given(score_maps())
def test_eq1_equals_the_loop(B):
    close(ranet.boundary_probability(B), torch.tensor(slow_D(B.numpy())), rtol=0, atol=1e-12)


def test_eq1_samples_lie_on_the_line():
    ramps = torch.from_numpy(np.indices((5, 8), dtype=float))       # a ramp's value is the position
    for i, a in enumerate(np.ndindex(5, 8)):
        for j, b in enumerate(np.ndindex(5, 8)):
            wide = abs(a[1] - b[1]) > abs(a[0] - b[0])
            places = line(*sorted((a, b), key=lambda p: p[1] if wide else p))    # from the left end, or the upper
            for ramp, position in zip(ramps, places.T):
                got = ranet._on_line(ramp, torch.tensor(i), torch.tensor(j), torch.arange(len(places)))
                close(got, torch.from_numpy(position), rtol=0, atol=1e-12)


@given(score_maps(), st.data())
def test_eq1_is_symmetric_sees_its_ends_grows_with_B_and_turns_with_the_map(B, data):
    D, b = ranet.boundary_probability(B), B.flatten()
    assert torch.equal(D, D.T) and torch.equal(D.diagonal(), b)
    assert (D >= b).all() and (D >= b[:, None]).all() and (D <= b.max() + 1e-12).all()
    more = torch.maximum(B, data.draw(tensors(tuple(B.shape), st.floats(0, 1))))
    assert (ranet.boundary_probability(more) >= D - 1e-12).all()
    name = torch.arange(B.numel()).view(B.shape)
    for turn in (lambda x: x.flip(0), lambda x: x.flip(1), lambda x: x.T):
        order = turn(name).flatten()
        close(ranet.boundary_probability(turn(B)), D[order][:, order], rtol=0, atol=1e-12)


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


def test_eq1_gradient():
    for size in ((3, 4), (5, 2), (1, 5)):
        assert torch.autograd.gradcheck(ranet.boundary_probability, noise(*size).requires_grad_())


def test_eq1_gradient_at_a_tie_goes_to_the_upper_end_or_the_left_of_a_wide_line():
    for i, j, first in (((0, 0), (2, 3), (0, 0)), ((2, 0), (0, 3), (2, 0)), ((3, 0), (0, 2), (0, 2)),
                        ((2, 0), (0, 2), (0, 2)), ((1, 3), (1, 1), (1, 1)), ((3, 1), (1, 1), (1, 1))):
        B = torch.full((4, 4), 0.5, dtype=torch.float64, requires_grad=True)
        ranet.boundary_probability(B)[4 * i[0] + i[1], 4 * j[0] + j[1]].backward()
        assert B.grad.nonzero().tolist() == [list(first)] and B.grad[first] == 1


# --- eq. 2 -----------------------------------------------------------------------------------------------
@given(class_maps())
def test_eq2_equals_scipy(C):
    p = C.flatten(1).T.numpy()
    slow = [[scipy.spatial.distance.jensenshannon(a, b, base=2) ** 2 for b in p] for a in p]
    slow = torch.tensor(np.nan_to_num(slow))                    # scipy's root of -1e-17 is nan
    close(ranet.semantic_divergence(C), slow, rtol=0, atol=1e-6)


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


# --- eq. 3 -----------------------------------------------------------------------------------------------
@given(attention_maps(), st.data())
def test_eq3_equals_the_loop(D, data):
    D, E = D[0], data.draw(tensors(tuple(D[0].shape), st.floats(0, 1)))
    F = ranet.region_attention(D, E)
    slow = [[(1 - d) * (1 - e) for d, e in zip(*rows)] for rows in zip(D.tolist(), E.tolist())]
    close(F, torch.tensor(slow, dtype=F.dtype), rtol=0, atol=1e-15)
    assert F.min() >= 0 and F.max() <= 1


def test_eq3_gradient():
    D, E = noise(2, 5, 5)
    assert torch.autograd.gradcheck(ranet.region_attention, (D.requires_grad_(), E.requires_grad_()))


# --- eq. 4 -----------------------------------------------------------------------------------------------
@given(attention_maps(), st.sampled_from([1, 3, 5]).flatmap(kernels))
def test_eq4_equals_scipy(F, Wg):
    F, size = F
    Fg = ranet.regularize(F, Wg, size)
    slow = scipy.ndimage.correlate(F.reshape(-1, *size).numpy(), Wg[None].numpy(), mode="nearest")
    close(Fg.view(-1, *size), torch.from_numpy(slow), rtol=0, atol=1e-12)
    assert Fg.min() >= 0 and Fg.max() <= 1 + 1e-12


@given(attention_maps(), st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_eq4_decides_by_the_mean_of_both_directions(Fg, threshold):
    there, back = Fg[0].tolist(), Fg[0].T.tolist()
    slow = [[(a + b) / 2 > threshold for a, b in zip(*rows)] for rows in zip(there, back)]      # sgn(0) = -1
    close(ranet.region_decision(Fg[0], threshold), torch.tensor(slow))


def test_eq4_gradient():
    F, Wg = noise(12, 12).requires_grad_(), noise(9).softmax(0).view(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda F, Wg: ranet.regularize(F, Wg, (3, 4)), (F, Wg))


# --- regions ---------------------------------------------------------------------------------------------
@st.composite
def decisions(draw):
    n = draw(st.integers(1, 24))
    edges = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=2 * n))
    G = torch.eye(n, dtype=torch.bool) if draw(st.booleans()) else torch.zeros(n, n, dtype=torch.bool)
    for i, j in edges:
        G[i, j] = G[j, i] = True
    return G


def slow_labels(G):
    graph = scipy.sparse.csr_array(G.numpy())
    return numbered(scipy.sparse.csgraph.connected_components(graph, directed=False)[1].tolist())


@given(decisions())
def test_regions_equal_scipys_components(G):
    assert torch.equal(ranet.connected_regions(G), slow_labels(G))


def test_regions_of_a_long_shuffled_path():
    n = 1600
    order = noise(n).argsort()
    G = torch.zeros(n, n, dtype=torch.bool)
    G[order[:-1], order[1:]] = G[order[1:], order[:-1]] = True
    G[order[800], order[801]] = G[order[801], order[800]] = False
    assert torch.equal(ranet.connected_regions(G), slow_labels(G))


# --- R4: pixels left alone -------------------------------------------------------------------------------
@st.composite
def partitions(draw):
    """Labels with many regions of one pixel, and F^g."""
    labels = draw(region_labels())
    n = len(labels)
    alone = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    names = [(i, "alone") if x else q for i, (q, x) in enumerate(zip(labels.tolist(), alone))]
    spread = st.integers(0, 99).map(lambda seed: noise(n, n, seed=seed))       # drawn numbers are often all alike
    return numbered(names), draw(tensors((n, n), st.floats(0, 1)) | spread)


def attachments(labels, Fg):
    """Of each lone pixel: how much each larger region attracts it, {pixel: {the region's first pixel: mean}}."""
    S, regions = ((Fg + Fg.T) / 2).tolist(), members(labels)
    lone, large = [r[0] for r in regions if len(r) == 1], [r for r in regions if len(r) > 1]
    return {i: {r[0]: math.fsum(S[i][j] for j in r) / len(r) for r in large} for i in lone}


@given(partitions())
def test_lone_pixels_equal_the_loop(x):
    joined = ranet.join_lone_pixels(*x).tolist()
    for i, means in attachments(*x).items():
        highest = [first for first, mean in means.items() if mean > max(means.values()) - 1e-9]     # by rounding, two
        assert not means or joined[i] in [joined[first] for first in highest]
    large = [region for region in members(x[0]) if len(region) > 1]
    assert all(len({joined[i] for i in region}) == 1 for region in large)
    assert len(set(joined)) == len(large or joined) and joined == numbered(joined).tolist()


def test_lone_pixels_go_to_the_lower_number_at_a_tie_and_by_the_mean_of_both_directions():
    labels, Fg = torch.tensor([0, 0, 0, 0, 1, 2, 2]), torch.full((7, 7), 0.5, dtype=torch.float64)
    assert ranet.join_lone_pixels(labels, Fg).tolist() == [0, 0, 0, 0, 0, 1, 1]
    Fg[4, 5:], Fg[5:, 4] = 0.4, 0.8                             # means of 0.5 and 0.6, sums of 2 and 1.2
    assert ranet.join_lone_pixels(labels, Fg).tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_lone_pixels_of_the_modules_regions_are_gone():
    """A wall of one pixel between two halves: its pixels belong to the halves, unless they are asked to stay."""
    B, C = torch.full((1, 6, 7), 0.05), torch.full((1, 2, 6, 7), 0.5)
    B[:, :, 3] = 0.9
    joined, bare = ranet.RCB()(B, C).labels[0], ranet.RCB(join_lone=False)(B, C).labels[0]
    assert joined.max() == 1 and bare.max() == 7
    assert (joined[:, :3] == 0).all() and (joined[:, 4:] == 1).all()


# --- eq. 5 and phi ---------------------------------------------------------------------------------------
@given(attention_maps(), st.data())
def test_eq5_equals_the_loop(Fg, data):
    labels = data.draw(region_labels(len(Fg[0])))
    J = ranet.representative_score(Fg[0], labels)
    for region in members(labels):
        for i in region:
            assert J[i].item() == pytest.approx(sum(Fg[0][i, j].item() for j in region) / len(region), abs=1e-12)
    assert J.min() >= 0 and J.max() <= 1


@given(score_maps(), kernels(3).map(lambda x: x.float()), st.data())
def test_eq5_stays_in_0_1_for_any_kernel(B, Wg, data):
    C = data.draw(class_maps(size=tuple(B.shape)))
    J = ranet.construct_regions(B.float(), C.float(), Wg, 0.5, join_lone=False)[1]
    assert J.min() >= 0 and J.max() <= 1


def test_eq5_gradient():
    labels = torch.tensor([0, 1, 0, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda x: ranet.representative_score(x, labels), noise(6, 6).requires_grad_())


@given(region_labels(), st.integers(1, 9), st.data())
def test_reps_equal_a_sort(labels, K, data):
    J = data.draw(tensors((len(labels),), scores))
    slow = [i for region in members(labels) for i in sorted(region, key=lambda i: (-J[i].item(), i))[:K]]
    assert ranet.select_representatives(J, labels, K).tolist() == slow


# --- eqs. 6, 7 and 8 -------------------------------------------------------------------------------------
def softmaxes(receivers, sent, groups):
    """Of each receiver a row of weights: a softmax over each of its groups of senders on its own, 0 elsewhere."""
    W = np.zeros((len(receivers), len(sent)))
    for k, receiver in enumerate(receivers):
        for group in filter(None, groups[k]):
            W[k, group] = scipy.special.softmax([receiver @ sent[i] for i in group])
    return W


def slow_eq6(A, J, labels, reps, printed=False):
    JA, regions = J[:, None] * A, members(labels)
    W = softmaxes(A[reps], JA, [[[i for i in regions[labels[p]] if i not in reps]] for p in reps])
    return (JA[reps] + W @ JA if printed else A[reps] + W @ A), W


def slow_eq7(Al, J, labels, reps, printed=False):
    JAl, phi = J[reps][:, None] * Al, members(labels[reps])
    W = softmaxes(Al, JAl, [[phi[s] for s in range(len(phi)) if s != labels[p]] for p in reps])
    return (JAl + W @ JAl if printed else Al + W @ Al / max(1, len(phi) - 1)), W


def slow_eq8(A, Ag, J, labels, reps, printed=False):
    JAg, phi = J[reps][:, None] * Ag, members(labels[reps])
    W = softmaxes(A, JAg, [[phi[q]] for q in labels])
    return (J[:, None] * A + W @ JAg if printed else A + W @ Ag), W


def agree(function, slow, *x, **options):
    (got, W), (expected, weights) = function(*x, **options), slow(*(t.numpy() for t in x), **options)
    close(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    close(W, torch.from_numpy(weights), rtol=1e-9, atol=1e-9)
    assert (W >= 0).all() and torch.equal(W == 0, torch.from_numpy(weights == 0))


as_printed = st.sampled_from([{}, {"printed": False}, {"printed": True}])


@given(interactions(), as_printed)
def test_eq6_equals_the_loop(x, options):
    agree(ranet.intra_region_collection, slow_eq6, *x, **options)


@given(interactions(), as_printed)
def test_eq7_equals_the_loop(x, options):
    agree(ranet.inter_region_interaction, slow_eq7, x[0][x[3]], *x[1:], **options)


@given(interactions(), as_printed)
def test_eq8_equals_the_loop(x, options):
    agree(ranet.intra_region_distribution, slow_eq8, x[0], 2 - x[0][x[3]], *x[1:], **options)


def eight_pixels():
    labels, A, J = torch.tensor([0, 0, 1, 0, 2, 1, 1, 0]), noise(8, 3, draw=torch.randn), noise(8)
    return A, J, labels, ranet.select_representatives(J, labels, 2)


@example(eight_pixels(), True, True, True)                      # not left to chance: as printed, of three regions
@given(interactions(), st.booleans(), st.booleans(), st.booleans())
def test_eq8_follows_eqs_6_and_7(x, intra, inter, printed):
    A, J, labels, reps = (t.numpy() for t in x)
    Al = slow_eq6(A, J, labels, reps, printed)[0] if intra else A[reps]
    Ag = slow_eq7(Al, J, labels, reps, printed)[0] if inter else Al
    reached = np.isin(np.arange(len(J)), reps)                  # without eqs. 6 and 8 only these hear of A^g
    O = slow_eq8(A, Ag, J, labels, reps, printed)[0] if intra else A.copy()
    if not intra:
        O[reached] += Ag[reps.argsort()]
    got = ranet.exchange_context(*x[:3], int(np.bincount(labels[reps]).max()), intra, inter, printed)
    close(got, torch.from_numpy(O), rtol=1e-9, atol=1e-9)


def gradients_of(function):
    A, J, labels, reps = eight_pixels()
    inputs = A.requires_grad_(), J.requires_grad_()
    return all(torch.autograd.gradcheck(lambda A, J, printed=printed: function(A, J, labels, reps, printed), inputs)
               for printed in (False, True))


def test_eq6_gradients():
    assert gradients_of(ranet.intra_region_collection)


def test_eq7_gradients():
    assert gradients_of(lambda A, J, labels, reps, *printed: ranet.inter_region_interaction(
        A[reps], J, labels, reps, *printed))


def test_eq8_gradients():
    assert gradients_of(lambda A, J, labels, reps, *printed: ranet.intra_region_distribution(
        A, 1 - A[reps], J, labels, reps, *printed))


# --- RCB and RIB -----------------------------------------------------------------------------------------
def compare(B, C, A, seed=0, k=3, threshold=0.7, cues="both", joint=True, join_lone=True, K=3, intra=True, inter=True,
            printed=False, tolerance=1e-9):
    """RCB and RIB beside the equations: labels, J, O and all gradients. None where rounding may decide: an F^g at the
    threshold, or a lone pixel that is attached to two regions alike."""
    H, W = B.shape
    rcb, rib = ranet.RCB(k, threshold, cues, joint, join_lone).to(B.dtype), ranet.RIB(K, intra, inter, printed)
    for logits in rcb.parameters():
        logits.data += noise(k, k, seed=seed, draw=torch.randn).to(logits)
    B, C, A = (x.detach().clone().requires_grad_() for x in (B, C, A))
    inputs = [B, C, A, *rcb.parameters()]
    b, c = (B, C) if joint else (B.detach(), C.detach())
    D, E = ranet.boundary_probability(b), ranet.semantic_divergence(c)
    F = ranet.region_attention(D * (cues != "semantic"), E * (cues != "boundary"))
    Fg = ranet.regularize(F, rcb.kernel().to(B.dtype), (H, W))
    labels = ranet.connected_regions(ranet.region_decision(Fg, threshold))
    gaps = [((Fg + Fg.T) / 2 - threshold).abs().min().item()]
    if join_lone:
        pulls = [sorted(pull.values())[-2:] for pull in attachments(labels, Fg).values()]
        gaps += [pull[1] - pull[0] for pull in pulls if len(pull) > 1]
        labels = ranet.join_lone_pixels(labels, Fg)
    if min(gaps) < (1e-9 if B.dtype == torch.float64 else 1e-5):
        return None
    J = ranet.representative_score(Fg, labels)
    O = ranet.exchange_context(A, J, labels, K, intra, inter, printed)
    weight = noise(*O.shape, seed=1, draw=torch.randn).to(O.dtype)
    slow = torch.autograd.grad((O * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
    together = ranet.construct_regions(B, C, rcb.kernel().to(B.dtype), threshold, cues, join_lone)
    assert torch.equal(together[0], labels) and torch.equal(together[1], J)
    few = max(40, (H * W) ** 2 // 20)
    small = ranet._Way(few, 4, few, ranet._walks)               # many blocks
    for way in (ranet._way(B), ranet._way(B.to("meta")), small, small._replace(lines=ranet._gathers)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranet, "_way", lambda x, way=way: way)
            regions = rcb(B[None], C[None])
            fast = rib(A.T.reshape(1, -1, H, W), regions)[0].flatten(1).T
            quick = torch.autograd.grad((fast * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        assert torch.equal(regions.labels.flatten(), labels)
        close(regions.J.flatten(), J, rtol=tolerance, atol=tolerance)
        close(fast, O, rtol=tolerance, atol=tolerance)
        for a, b in zip(slow, quick):
            close(b, a, rtol=tolerance, atol=tolerance * a.abs().max().item() + 1e-12)
    return labels


@given(score_maps(), st.data(), st.fixed_dictionaries({
    "k": st.sampled_from([1, 3, 5]), "threshold": st.sampled_from([0.3, 0.61, 0.8]), "joint": st.booleans(),
    "cues": st.sampled_from(["both", "boundary", "semantic"]), "join_lone": st.booleans(), "K": st.integers(1, 9),
    "intra": st.booleans(), "inter": st.booleans(), "printed": st.booleans()}))
def test_rcb_rib_equal_the_functions(B, data, options):
    C = data.draw(class_maps(size=tuple(B.shape)))
    assume(compare(B, C, random_map(*B.shape)[2], seed=B.numel(), **options) is not None)


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
    low, one, half = (torch.full((H, W), v, dtype=C.dtype) for v in (0.05, 1.0, 0.3))
    assert compare(low, uniform, A).max() == 0                              # one region
    assert compare(one, uniform, A).max() == H * W - 1                      # every pixel its own
    assert compare(low, uniform, A, K=H * W + 1).max() == 0                 # K larger than every region
    assert compare(half, one_hot, A, cues="semantic").max() == 2
    assert compare(*random_map(1, 1)).tolist() == [0]                       # a single pixel
    B, C, A = random_map(1, 12, high=0.1)
    B[0, 6] = 0.9
    assert compare(B, (C + 9) / 28, A).max() == 1       # W^g reaches a pixel beyond the widest region


def test_modules_on_a_line_of_260_pixels():
    B, C, A = random_map(1, 260, high=0.1)
    B[0, 258] = 0.15                                # the highest of a line, at a step beyond one byte
    assert compare(B, (C + 9) / (9 * len(C) + 1), A, threshold=0.5).max() == 0


def test_rcb_rib_float32_within_its_rounding():
    for seed in range(3):
        maps = random_map(8, 9, seed=seed, dtype=torch.float32)
        assert compare(*maps, threshold=0.45, tolerance=2e-4) is not None


def test_rcb_batches_images_with_different_numbers_of_regions():
    B, C, A = map(torch.stack, zip(*(random_map(5, 6, seed=s, high=h) for s, h in ((0, 0.0), (1, 0.6), (2, 1.0)))))
    A = A.mT.reshape(3, -1, 5, 6)
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
    ranet.RCB(joint=True)(B, C).J.sum().backward()
    assert B.grad.isfinite().all() and C.grad.isfinite().all() and C.grad.any()


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("cues", ["both", "boundary", "semantic"])
def test_module_any_of_its_inputs_may_be_frozen(cues, kernel_size):
    B, C, _ = random_map(5, 6, high=0.3)
    for wants in range(8):
        rcb = ranet.RCB(kernel_size, 0.5, cues, joint=True).double().requires_grad_(bool(wants & 4))
        b, c = (x[None].detach().clone().requires_grad_(bool(wants & bit)) for x, bit in ((B, 1), (C, 2)))
        J = rcb(b, c).J
        assert J.requires_grad == any(x.requires_grad for x in (b, c, *rcb.parameters()))
        if J.requires_grad:
            J.sum().backward()
        assert b.grad is None or bool(b.grad.any()) == (cues != "semantic")
        assert c.grad is None or bool(c.grad.any()) == (cues != "boundary")
        assert all(p.grad is not None and p.grad.any() for p in rcb.parameters() if p.requires_grad)
    with torch.no_grad():
        assert rcb(b, c).J.grad_fn is None


def test_rcb_kernel_is_a_softmax_that_starts_at_its_centre():
    for k in (3, 5):
        Wg = ranet.RCB(k).kernel()
        assert Wg.shape == (k, k) and Wg.sum().item() == pytest.approx(1)
        centre = math.exp(4) / (math.exp(4) + k * k - 1)
        assert Wg[k // 2, k // 2].item() == pytest.approx(centre) == pytest.approx(Wg.max().item())
    assert list(ranet.RCB(1).parameters()) == [] and ranet.RCB(1).kernel().tolist() == [[1]]


def test_rcb_gradients_are_the_same_every_time_on_several_threads():
    B, C, _ = random_map(24, 24, high=0.1, dtype=torch.float32)
    B, C = B[None].requires_grad_(), (C[None] + 9) / (9 * len(C) + 1)
    torch.set_num_threads(2)
    try:
        seen = set()
        for _ in range(12):
            rcb = ranet.RCB(joint=True)
            gradients = torch.autograd.grad(rcb(B, C).J.square().sum(), (B, rcb.logits))
            seen.add(b"".join(x.numpy().tobytes() for x in gradients))
    finally:
        torch.set_num_threads(1)
    assert len(seen) == 1, "a run that resumes would end elsewhere"


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


# --- the network and its loss ----------------------------------------------------------------------------
def small_net(num_classes=3, **options):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 5, stride=4, padding=2), torch.nn.ReLU())
    return ranet.RANet(backbone, 5, num_classes, 6, **options)


def region_context(rcb, rib):
    return ranet.RegionContext(ranet.RCB(**rcb), ranet.RIB(**rib))


class Doubled(torch.nn.Module):
    """A context that makes no regions."""

    def forward(self, A, B, C):
        return 2 * A, None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rcb, rib", [
    ({}, {}), ({"cues": "boundary"}, {}), ({"cues": "semantic"}, {}), ({"joint": True}, {}), ({}, {"intra": False}),
    ({}, {"inter": False}), ({"kernel_size": 1}, {}), ({"kernel_size": 5, "join_lone": False}, {"representatives": 1})],
    ids=str)
def test_net_every_parameter_learns(rcb, rib, autocast):
    model, label = small_net(context=region_context(rcb, rib)), torch.randint(0, 3, (2, 36, 52))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = ranet.ranet_loss(model(torch.rand(2, 3, 36, 52)), label, (label == 1).byte()).total
    loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == [], "DistributedDataParallel would wait for these"
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_net_takes_any_size_and_returns_it():
    model = small_net().eval()
    for h, w in ((4, 4), (37, 53), (64, 8)):
        out = model(torch.rand(1, 3, h, w))
        assert out.fine.shape == out.coarse.shape == (1, 3, h, w)
        assert out.boundary.shape == out.regions.labels.shape == out.regions.J.shape


def test_context_is_given_A_B_and_C_and_meets_A_normalised():
    model, images = small_net(context=Doubled()), torch.rand(2, 3, 9, 9)
    seen = []
    model.context.register_forward_hook(lambda _module, given, out: seen.append((*given, *out)))
    model.fuse[0].register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    out = model(images)
    (A, B, C, O, regions), met = seen
    assert regions is None is out.regions and torch.equal(A, model.reduce(model.backbone(images)).detach())
    close(B, out.boundary.sigmoid())
    close(C, model.semantic(A).softmax(1))
    close(met, torch.cat((A, 0.25 * torch.nn.functional.batch_norm(O, None, None, training=True)), 1))
    default = small_net()
    assert type(default.context) is ranet.RegionContext and default.context.rib.representatives == 8
    assert not default.context.rcb.joint


def test_context_of_regions_is_rcb_and_rib():
    B, C, A = random_map(5, 6, high=0.6)
    A, context = A.T.reshape(1, 4, 5, 6), region_context({"threshold": 0.45}, {"representatives": 2})
    O, regions = context(A, B[None], C[None])
    same = context.rcb(B[None], C[None])
    assert torch.equal(regions.labels, same.labels) and torch.equal(regions.J, same.J)
    assert torch.equal(O, context.rib(A, same))


def test_net_starts_with_one_region():
    out = small_net()(torch.rand(2, 3, 40, 40))
    assert 0.02 < out.boundary.sigmoid().mean() < 0.12 and out.regions.labels.max() == 0


def test_net_steps_out_of_torch_compile():
    model, images = small_net().eval(), torch.rand(1, 3, 24, 28)
    close(torch.compile(model, backend="eager")(images).fine, model(images).fine)


@pytest.mark.parametrize("joint", [True, False])
def test_net_fine_loss_reaches_the_boundary_head_only_where_joint(joint):
    model = small_net(context=region_context({"joint": joint}, {}))
    model(torch.rand(1, 3, 40, 40)).fine.square().sum().backward()
    head = model.boundary.weight.grad
    assert (head is not None and bool(head.any())) == joint
    assert model.context.rcb.logits.grad.any()


def loss_inputs():
    """Logits, labels and a mask, some of them ignored: not as many in the first image as in the second."""
    fine, coarse = noise(2, 2, 3, 4, 6, draw=torch.randn)
    label = (3 * noise(2, 4, 6, seed=1)).long()
    label[0, :2, :2] = label[1, 3] = 255
    mask = torch.where(label == 255, 255, (2 * noise(2, 4, 6, seed=2)).long())
    return ranet.Output(fine, coarse, noise(2, 2, 3, seed=3, draw=torch.randn), None), label, mask


def test_loss_equals_the_loop():
    out, label, mask = loss_inputs()
    parts, cells = [], []
    for logits in out[:2]:
        p = scipy.special.log_softmax(logits.numpy(), axis=1)
        parts.append(np.mean([-p[b, n, y, x] for (b, y, x), n in np.ndenumerate(label.numpy()) if n != 255]))
    for (b, y, x), logit in np.ndenumerate(out.boundary.numpy()):
        cell = mask[b, 2 * y:2 * y + 2, 2 * x:2 * x + 2]
        if (cell != 255).any():
            cells.append(-math.log(scipy.special.expit(logit if 1 in cell else -logit)))
    parts.append(np.mean(cells))
    assert len(cells) == 11
    loss = ranet.ranet_loss(out, label, mask, weights=(1, 2, 3))
    assert [x.item() for x in loss[1:]] == pytest.approx(parts)
    assert loss.total.item() == pytest.approx(parts[0] + 2 * parts[1] + 3 * parts[2])


def test_loss_of_two_halves_with_their_counts_is_that_of_the_whole():
    out, label, mask = loss_inputs()
    half = [(ranet.Output(*(x[i:i + 1] for x in out[:3]), None), label[i:i + 1], mask[i:i + 1]) for i in range(2)]
    counts = sum(ranet.label_counts(l, m, (2, 3)) for _, l, m in half) / 2      # what two processes would divide by
    mean = sum(ranet.ranet_loss(o, l, m, counts=counts).total for o, l, m in half) / 2
    close(mean, ranet.ranet_loss(out, label, mask).total)


def test_loss_of_an_unlabelled_batch_is_zero():
    nothing = torch.full((2, 16, 16), 255)
    loss = ranet.ranet_loss(small_net()(torch.rand(2, 3, 16, 16)), nothing, nothing)
    loss.total.backward()
    assert loss.total.item() == 0


# --- the file --------------------------------------------------------------------------------------------
def test_file_needs_torch_alone_and_is_silent(tmp_path):
    source = (ROOT / "ranet.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {"torch", "typing", "numbers", "collections.abc"}
    (tmp_path / "ranet.py").write_text(source)
    state = ("[torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(), "
             "torch.is_grad_enabled()]")
    probe = f"import torch\nbefore = {state}\nimport ranet\nassert before == {state}"
    run = subprocess.run([sys.executable, "-W", "error", "-c", probe], cwd=tmp_path, capture_output=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_file_docstrings_open_with_their_equation_and_survive_python():
    public = [f for name, f in vars(ranet).items() if not name.startswith("_") and getattr(f, "__doc__", None)]
    opened = [f.__doc__.split(":")[0] for f in public if f.__doc__.startswith("Eq. ")]
    assert opened == ["Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Eq. 4", "Eq. 5", "Eq. 6", "Eq. 7", "Eq. 8"]
    for thing in [ranet, *(x for x in vars(ranet).values() if getattr(x, "__module__", "") == "ranet")]:
        assert not set("\a\b\f\v\t") & set(thing.__doc__ or ""), "LaTeX in a docstring that is not raw"


def test_file_usage_example_works(capsys):
    example = ranet.__doc__[ranet.__doc__.index("import torch, ranet"):].split("\n\n")[0]
    exec(inspect.cleandoc(example), {})                         # noqa: S102  the docstring's lines
    assert capsys.readouterr().out.startswith("torch.Size([2, 19, 128, 160])\ntensor([")


# --- what was drawn --------------------------------------------------------------------------------------
def pairs(C):
    """The smaller probability of each class and pair of pixels, and whether the two are the same."""
    i, j = C.flatten(1)[:, :, None], C.flatten(1)[:, None]
    return torch.minimum(i, j), (i == j).all(0).fill_diagonal_(False)


@pytest.mark.parametrize("strategy, cases", [
    (score_maps(), [lambda B: (B == 0).any(), lambda B: (B == 1).any(), lambda B: B.min() == B.max() and B.numel() > 1,
                    lambda B: not B.is_contiguous()]),
    (class_maps(), [lambda C: (pairs(C)[0] == 0).all(0).any(), lambda C: pairs(C)[1].any(),
                    lambda C: len(C) > 1 and C.min() > 0]),     # no class in common; agreeing; soft
    (attention_maps(), [lambda x: not torch.equal(x[0], x[0].T), lambda x: (x[0] == 0.8).any()]),
    (kernels(3), [lambda Wg: (Wg == 0).any(), lambda Wg: Wg.min() > 0 and Wg.max() < 0.9]),
    (decisions(), [lambda G: (slow_labels(G)[:, None] == slow_labels(G))[~G].sum() > len(G),    # not transitive
                   lambda G: not G.diagonal().any()]),
    (region_labels(), [lambda q: 0 == q.max() < len(q) - 1, lambda q: q.max() == len(q) - 1, lambda q: q.max() > 2]),
    (partitions(), [lambda x: len(attachments(*x)) > 0 and len(list(attachments(*x).values())[0]) > 1]),
    (interactions(), [lambda x: x[2].max() > 1, lambda x: set(x[3].tolist()) == set(range(len(x[2]))),  # no one else
                      lambda x: len(x[3]) < len(x[2]) - 3, lambda x: len(x[1].unique()) < len(x[1])])])
def test_what_is_drawn_meets_each_special_case(strategy, cases):
    drawn = []
    given(strategy)(lambda x: drawn.append(x))()
    assert all([any(map(case, drawn)) for case in cases])


# --- bad input -------------------------------------------------------------------------------------------
def bad_inputs():
    """Calls that are right but for one argument, and the name of that one."""
    B, C, A = random_map(3, 4)
    nan, image = torch.full_like(B, math.nan), A.T.reshape(1, 4, 3, 4)
    pairs, kernel = torch.full((12, 12), 0.5, dtype=B.dtype), torch.full((3, 3), 1 / 9, dtype=B.dtype)
    labels, J = torch.arange(12) // 6, torch.linspace(0, 1, 12, dtype=B.dtype)
    reps = ranet.select_representatives(J, labels, 2)
    scored = {"J": J, "labels": labels, "reps": reps}
    regions = ranet.Regions(labels.view(1, 3, 4), J.view(1, 3, 4))
    out = ranet.Output(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2), None)
    zeros = torch.zeros(1, 4, 4, dtype=torch.int64)
    calls = [                                                   # the right arguments, and for some the wrong ones
        (ranet.boundary_probability, {}, {"B": [B[0], B + 1, nan, [[0.5]], torch.ones(2, 2).long(), B[:0]]}),
        (ranet.semantic_divergence, {}, {"C": [B, C / 2, C - 1]}),
        (ranet.region_attention, {"D": pairs, "E": pairs}, {"D": [0, J], "E": [0, pairs[:3, :3], pairs.float()]}),
        (ranet.regularize, {"F": pairs, "Wg": kernel, "size": (3, 4)},
         {"F": [J], "Wg": [kernel[:2], kernel[:2, :2], kernel.float()], "size": [(4, 4), 12, (12,), (-3, -4)]}),
        (ranet.region_decision, {"Fg": pairs}, {"Fg": [pairs[:3]], "threshold": [2]}),
        (ranet.connected_regions, {}, {"G": [pairs, (pairs > 0)[:3]]}),
        (ranet.join_lone_pixels, {"labels": labels, "Fg": pairs}, {"labels": [labels[:3]], "Fg": [pairs[:3]]}),
        (ranet.representative_score, {"Fg": pairs, "labels": labels}, {"Fg": [B], "labels": [labels[:3], J]}),
        (ranet.construct_regions, {"B": B, "C": C, "Wg": kernel},
         {"B": [B + 1], "C": [C[:, :2]], "Wg": [kernel[:2, :2]], "cues": ["all"], "threshold": [2]}),
        (ranet.exchange_context, {"A": A, "J": J, "labels": labels}, {"A": [A[:3]], "J": [J[:3]], "K": [0, True]}),
        (ranet.select_representatives, {"J": J, "labels": labels, "K": 2}, {"J": [J[:3]], "K": [0, 1.5]}),
        (ranet.intra_region_collection, {"A": A, **scored},
         {"A": [A[:3]], "J": [J[:3], J.float()], "reps": [reps.int(), reps[None], list(reps)]}),
        (ranet.inter_region_interaction, {"Al": A[reps], **scored}, {"Al": [A], "J": [J.float()]}),
        (ranet.intra_region_distribution, {"A": A, "Ag": A[reps], **scored}, {"Ag": [A, A[:4, :2]]}),
        (ranet.RCB, {}, {"kernel_size": [2, np.int64(2), 3.0], "threshold": [-1, np.float32(2)], "cues": ["all"]}),
        (ranet.RCB(), {"B": B[None], "C": C[None]}, {"B": [B, nan[None]], "C": [C, C[None, :, :2]]}),
        (ranet.RIB, {}, {"representatives": [0]}),
        (ranet.RIB(), {"A": image, "regions": regions},
         {"A": [A, image[:0]], "regions": [None, regions[:1], regions._replace(J=J), regions._replace(labels=image)]}),
        # A lambda's parameter is the name that the error must give.
        (lambda context: small_net(context=context)(torch.rand(1, 3, 8, 8)), {},
         {"context": [lambda A, B, C: A, lambda A, B, C: (A[:1, :1], None)]}),
        (small_net, {}, {"num_classes": [0]}),
        (small_net(), {}, {"images": [torch.rand(3, 8, 8), torch.rand(0, 3, 8, 8)]}),
        (lambda backbone: ranet.RANet(backbone, 5, 3, 6)(torch.rand(1, 3, 8, 8)), {},
         {"backbone": [torch.nn.Identity(), torch.nn.MaxPool2d(2, return_indices=True)]}),      # three channels; a pair
        (ranet.ranet_loss, {"output": out, "label": zeros, "mask": zeros},
         {"label": [zeros + 2, zeros[:, :2], zeros.float()], "mask": [zeros[0], zeros + 2, zeros + 255, zeros + 0.5],
          "output": [out._replace(fine=out.fine[:, :1]), out._replace(fine=torch.zeros(1, 300, 4, 4))],
          "weights": [torch.ones(19), [1.0, 2.0], (1, 1, None)]}),
    ]
    return [(name, function, {**right, name.split(".")[0]: value})
            for function, right, wrong in calls for name, values in wrong.items() for value in values]


@pytest.mark.parametrize("name, function, arguments", bad_inputs())
def test_bad_input_is_one_line_that_names_it(name, function, arguments):
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .+") as error:
        function(**arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 160


# --- mutations -------------------------------------------------------------------------------------------
# (the first word of the tests that must notice, test_eq1_* and so on; the text in ranet.py, to the letter; the mistake)
# Every test reads the global `ranet`, so a mutant is put there and the tests of its group are called again. Tests that
# pytest parametrises cannot be called so: their names begin with test_module_, which is no group.
MUTATIONS = [
    ("eq1", "sample > D, sample", "sample < D, sample"),                                            # minimum
    ("eq1", "sample > D, sample", "sample >= D, sample"),                                           # the last of equals
    ("eq1", "D = _on_line(B, i, j, 0)", "D = 0 * _on_line(B, i, j, 0)"),                            # start dropped
    ("eq1", "range(1, max(H, W)):", "range(1, max(H, W) - 1):"),                                    # end dropped
    ("eq1", "wide = dy.abs() < dx.abs()", "wide = dy.abs() > dx.abs()"),                            # shorter axis
    ("eq1", "wide = dy.abs() < dx.abs()", "wide = dy.abs() <= dx.abs()"),                           # of a diagonal
    ("eq1", "torch.where(wide, W, 1)", "torch.where(wide, 1, W)"),                                  # wrong neighbour
    ("eq1", "torch.where(wide, dx, dy) < 0", "torch.where(wide, dx, dy) > 0"),                      # from the other end
    ("eq1", "remainder.to(B.dtype) / L * (", "(1 - remainder.to(B.dtype) / L) * ("),                # weight reversed
    ("eq1", "step = L.clamp_max(step)", "step = L * 0 + step"),                                     # beyond the end
    ("eq2", "return _clip((kl_i + kl_j) / 2)", "return _clip(kl_i + kl_j)"),                        # missing half
    ("eq2", "return _clip((kl_i + kl_j) / 2)", "return _clip((kl_i + kl_j) / 2).clamp_max(0.99)"),  # never quite 1
    ("eq2", "U = (Ci + Cj) / 2 ", "U = Ci + Cj "),                                                  # U no mean
    ("eq2", "kl_j = (Cj * (_log2(Cj)", "kl_j = (Ci * (_log2(Cj)"),                                  # wrong weight
    ("eq2", "clamp_min(TINY).log2()", "clamp_min(TINY).log()"),                                     # natural log
    ("eq2", "p.detach().clamp_min(TINY).log2()", "p.detach().log2()"),                              # 0 log 0
    ("eq2", "TINY = 2.0 ** -24", "TINY = 2.0 ** -6"),                                               # floor too high
    ("eq3", "return (1 - D) * (1 - E)", "return (1 - D) * (1 + E)"),                                # sign
    ("eq3", "return (1 - D) * (1 - E)", "return 1 - D * E"),
    ("eq4", 'mode="replicate"', 'mode="constant"'),                                                 # zero border
    ("eq4", "zip(Wg.flatten(), _shifted(F,", "zip(Wg.T.flatten(), _shifted(F,"),                    # kernel transposed
    ("eq4", "zip(Wg.flatten(), _shifted(F,", "zip(Wg.flip(0, 1).flatten(), _shifted(F,"),           # a convolution
    ("eq4", "return (Fg + Fg.T) / 2 > threshold", "return (Fg + Fg) / 2 > threshold"),              # no transpose
    ("eq4", "return (Fg + Fg.T) / 2 > threshold", "return (Fg + Fg.T) / 2 >= threshold"),           # sgn(0) = 1
    ("eq4", "return (Fg + Fg.T) / 2 > threshold", "return Fg + Fg.T > threshold"),                  # missing half
    ("regions", "if torch.equal(first, before):", "if True:"),                                        # one round
    ("regions", "((first == pixel).cumsum(0) - 1)", "(first == pixel).cumsum(0)"),                # numbered from 1
    ("eq5", "(Fg * same).sum(1)", "(Fg * same).sum(0)"),                                            # wrong axis
    ("eq5", "same.sum(1))  ", "len(Fg))  "),                                                        # mean over all
    ("eq5", "same = labels[:, None] == labels  ", "same = (labels[:, None] == labels).fill_diagonal_(False)  "),
    ("reps", "J.detach().argsort(descending=True, stable=True)", "J.argsort(stable=True)"),         # the lowest
    ("reps", "order[rank < K]", "order[rank <= K]"),                                                # one too many
    ("eq6", "others[:, reps] = False", "pass"),                                                    # representatives too
    ("eq6", "_masked_softmax(A[reps] @ JA.T, others)", "(A[reps] @ JA.T).softmax(1)"),              # over all pixels
    ("eq6", "_masked_softmax(A[reps] @ JA.T, others)", "_masked_softmax(A[reps] @ A.T, others)"),   # J missing
    ("eq6", "sent = JA if printed else A  ", "sent = JA"),                                          # always as printed
    ("eq6", "sent = JA if printed else A  ", "sent = A"),                                           # never
    ("eq6", "return sent[reps] + Wl @ sent, Wl", "return A[reps] + Wl @ sent, Wl"),                 # J(p) missing
    ("eq6", "return sent[reps] + Wl @ sent, Wl", "return sent[reps] - Wl @ sent, Wl"),              # sign
    ("eq7", "x.softmax(1) for x in each", "x.softmax(0) for x in each"),                            # over receivers
    ("eq7", "* (region[:, None] != region)", "* 1"),                                                # s = q included
    ("eq7", "each = logits.split(region.bincount().tolist(), 1)", "each = [logits]"),               # all at once
    ("eq7", "max(1, len(each) - 1)", "len(each)"),                                                  # divided by Q
    ("eq7", "max(1, len(each) - 1)", "max(1, len(each) - 1) ** 0.5"),                               # grows with Q
    ("eq7", "return sent + Wi @ sent / terms", "return (sent + Wi @ sent) / terms"),                # the own word, too
    ("eq7", "return sent + Wi @ sent / terms", "return Al + Wi @ sent / terms"),                    # J(p) missing
    ("eq7", "logits = Al @ JAl.T  ", "logits = JAl @ Al.T  "),                                      # the receiver's J
    ("eq7", "logits = Al @ JAl.T  ", "logits = Al @ Al.T  "),                                       # J missing
    ("eq7", "(JAl, 1) if printed", "(JAl, max(1, len(each) - 1)) if printed"),                      # always the mean
    ("eq7", "else (Al, max(", "else (JAl, max("),                                                   # J in the sum
    ("eq8", "if intra else A[reps]", "if intra else J[reps][:, None] * A[reps]"),                   # J(p) in A^l
    ("eq8", "labels, reps, printed)[0] if intra", "labels, reps)[0] if intra"),                     # never as printed,
    ("eq8", "labels, reps, printed)[0] if inter", "labels, reps)[0] if inter"),                     # eq. 6, 7
    ("eq8", "labels, reps, printed)[0]    #", "labels, reps)[0]    #"),                             # and 8
    ("eq8", "_masked_softmax(A @ JAg.T, same)", "_masked_softmax(A @ Ag.T, same)"),                 # J missing
    ("eq8", "_masked_softmax(A @ JAg.T, same)", "(A @ JAg.T).softmax(1)"),                          # all, not its own
    ("eq8", "_masked_softmax(A @ JAg.T, same)", "_masked_softmax((A @ JAg.T) / A.shape[1] ** 0.5, same)"),      # scaled
    ("eq8", "return A.index_add(0, reps, Ag)", "return A"),                                         # reaches nobody
    ("eq8", "if inter else Al  ", "if inter else J[reps][:, None] * Al  "),                         # J(p) in A^g
    ("eq8", "(J[:, None] * A, JAg) if printed", "(A, JAg) if printed"),                             # J_i missing
    ("eq8", "(J[:, None] * A, JAg) if printed", "(J[:, None] * A, Ag) if printed"),                 # J(p) missing
    ("eq8", "if printed else (A, Ag)", "if printed else (A, JAg)"),                                 # J in the sum
    ("eq8", "if printed else (A, Ag)", "if printed else (J[:, None] * A, Ag)"),                     # J_i in the sum
    ("eq8", "softmax(1) * mask", "softmax(0) * mask"),                                              # wrong axis
    ("lone", "masked_fill(size == 1, -1)", "masked_fill(size == 0, -1)"),                           # to themselves
    ("lone", "torch.where(size[labels] == 1, ", "torch.where(size[labels] <= 2, "),                 # pairs, too
    ("lone", "S = (Fg + Fg.T).detach() / 2", "S = Fg.detach()"),                                    # one direction
    ("lone", "S @ member / size).", "S @ member)."),                                                # sum, no mean
    ("lone", "mean.argmax(1), labels", "mean.argmin(1), labels"),                                   # the least attached
    ("lone", "return _numbered(torch.where(size", "return (torch.where(size"),                      # gaps in numbers
    ("rcb", "large = (size > 1)", "large = (size > 2)"),                                            # not to pairs
    ("rcb", "+ w * f[:, at, a:] for", "+ (w * x).view(len(f), -1, n)[..., a:] for"),                # one direction
    ("rcb", "(S @ member.to(S) / size[large]).", "(S @ member.to(S))."),                            # sum, no mean
    ("rcb", "(means * Wg.flatten()).sum(2)", "(means * Wg.T.flatten()).sum(2)"),                    # kernel transposed
    ("rcb", "torch.cat(totals, 1) / size[..., None]", "torch.cat(totals, 1)"),                          # sum, no mean
    ("rcb", "return dJ, *(", "return 0 * dJ, *("),                                          # nothing to W^g
    ("rcb", "torch.autograd.grad(regularize(member, Wg, B.shape), member, member)",
     "(regularize(member, Wg, B.shape).detach(),)"),                                                # no adjoint
    ("rcb", "(dJ / size[labels])[i, None]", "dJ[i, None]"),
    ("modules", "torch.uint8 if max(B.shape) < 256 else torch.int16", "torch.uint8"),                  # lines of 260
    ("rcb", "torch.stack((T, T.flip(1)))", "torch.stack((T, T))"),                                  # one direction
    ("rcb", "copy_(up.flip(1))", "copy_(up)"),
    ("rcb", "(r, -L) if flat else (-r, L)", "(-r, L)"),                                             # j > i
    ("rcb", "(B.mT, view.permute(0, 2, 1, 4, 3), 0)", "(B.mT, view.permute(0, 2, 1, 4, 3), 1)"),  # no diagonals
    ("rcb", "(y[:p] * L + s * r[:p]) * w", "(y[:p] * L + s) * w"),                                  # level lines
    ("rcb", "(slice(None), *j, *i)", "(slice(None), *i, *j)"),                                      # i < j or j < i
    ("rcb", "F[:, a:z, a:z].triu(1).mT", "F[:, a:z, a:z].tril(-1)"),
    ("rcb", "own_i[:, :, None] + own_j[:, None] - joint", "own_i[:, :, None] - own_j[:, None] - joint"),
    ("rcb", "clamp_min(2 * TINY)", "clamp_min(TINY)"),                                              # slope at C = 0
    ("rcb", "torch.maximum(i[:, None], j)]", "torch.minimum(i[:, None], j)]"),
    ("rcb", "* share[labels[i]][:, j]", "* share[labels[j]][:, i].T"),                              # from j to i
    ("rcb", "share[labels[i]].any(0)", "share[labels[i[:1]]].any(0)"),                              # of one region only
    ("context", "B = _at_least_float32(boundary).sigmoid()", "B = _at_least_float32(boundary).tanh()"),
    ("context", "C = _at_least_float32(coarse).softmax(1)", "C = _at_least_float32(coarse).softmax(2)"),     # rows
    ("context", "torch.cat((A, self.norm(O)), 1)", "torch.cat((A, O), 1)"),
    ("context", "nn.init.constant_(self.norm.weight, 0.25)", "nn.init.constant_(self.norm.weight, 1)"),
    ("context", "return self.rib(A, regions), regions", "return self.rib(A * 0.5, regions), regions"),
]


@pytest.mark.parametrize("name", dict.fromkeys(group for group, _, _ in MUTATIONS))
def test_mutants_are_caught(name, monkeypatch):
    source = (ROOT / "ranet.py").read_text()

    def passes(text):
        module = types.ModuleType("mutant")
        exec(compile(text, "mutant", "exec"), module.__dict__)  # noqa: S102
        monkeypatch.setitem(globals(), "ranet", module)
        try:
            for test, check in list(globals().items()):
                if test.startswith(f"test_{name}_"):
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
