# SPDX-License-Identifier: MIT
r"""RANet: Region Attention Network for Semantic Segmentation, in one file that needs only torch.

    Dingguo Shen, Yuanfeng Ji, Ping Li, Yi Wang, Di Lin.
    RANet: Region Attention Network for Semantic Segmentation. NeurIPS 2020.

The file follows the paper: eqs. 1-8, one function each (two for eq. 4), for one image at a time, dense and
differentiable; what they make together; `RCB`, `RIB` and `RANet` for batches; the loss. Below the banner
"nothing from here on is needed to understand the paper", `RCB`'s numbers are made in little memory and few calls.

    paper      here            shape            meaning
    H, W, M    H, W, M                          height and width of the feature map, its channels
    N          N                                number of classes
    Q, R_q     Q, labels       [HW]             number of regions; the region q of each pixel, 0..Q-1
    K, phi     K, reps         [P]              representatives a region; their pixels, P in all, by region
    A          A               [HW, M]          visual features
    B          B               [H, W]           boundary scores, 0..1
    C          C               [N, H, W]        class probabilities: the coarse segmentation
    D          D               [HW, HW]         eq. 1: boundary between pixels i and j, 0..1
    U          U               [N, HW, HW]      eq. 2: the mean of C_i and C_j
    E          E               [HW, HW]         eq. 2: their divergence, 0..1
    F          F               [HW, HW]         eq. 3: region attention, 0..1
    W^g, F^g   Wg, Fg          [k, k], [HW, HW] eq. 4: kernel; regularised region attention, 0..1
    G          G               [HW, HW]         eq. 4: True where two pixels are grouped
    J, J(p)    J, J[reps]      [HW], [P]        eq. 5: representative scores, 0..1
    A^l, W^l   Al, Wl          [P, M], [P, HW]  eq. 6: local context of the representatives; its weights
    A^g, W^g   Ag, Wi          [P, M], [P, P]   eq. 7: global context; its weights (the paper's second W^g)
    O, W^d     O, Wd           [HW, M], [HW, P] eq. 8: contextual features; their weights

i, j: pixels, in raster order. q, s: regions. p, r: representatives (the paper's p_{q,k} and p_{s,i}). labels and reps
are int64, the rest floating-point of one type. Below a docstring's formula stands what goes in -> what comes out, and
what receives a gradient. At 97 x 97 a [HW, HW] matrix takes 338 MiB in float32.

How the paper is read, and where it is not followed: R2, R8, R9 (docs/differences.md has the effects):

    R1   eq. 1: a sample at every step of the line's longer axis, interpolated along the other; both ends belong
    R2   eq. 2: the Jensen-Shannon divergence with log base 2; as printed it is not 0 at i = j
    R3   eq. 4: one k x k kernel for all rows of F, weights >= 0 of sum 1; the sign is that of the mean minus tau
    R4   regions: the connected components of G, since G is not transitive; a pixel that is a component by itself
         joins the region it is most attached to, which gives the paper's sizes
    R5   eq. 5: the mean runs over all of R_q, i included
    R6   phi: the min(K, |R_q|) highest J; ties go to the lower-numbered pixel
    R7   eq. 6: the softmax runs over R_q without its representatives; over nothing, the sum is 0
    R8   eq. 7: one softmax per source region, then the mean over these regions. The paper prints the sum, in which a
         region's own term is one of Q; in the mean it weighs as much as all others together
    R9   eqs. 6-8: J stands in the exponentials only, as in the released code; the paper prints it in the sums too. No
         1 / sqrt(M), as printed
    R10  Table 1: with one cue F = 1 - D or F = 1 - E; without eqs. 6 and 8, A^g reaches only representatives
    R11  boundary target: two classes within radius 2, or beside a narrow ignored band; max-pooled to B's grid
    R12  losses 1 : 1 : 1; where the paper is silent, the values of its released code or of the field
    R13  B starts at 0.05, so that the first map is one region
    R14  O, a sum of several features, is batch-normalised before it meets A, and starts at a quarter of A's size, since
         the first regions are arbitrary
    R15  A is a 3 x 3 convolution of the features; the segmentation sees [A, O]; RIB has no parameters
    R16  J's gradient ends at W^g: in B and C it would disturb what their own losses teach

Wrong input raises a ValueError of one line: the argument, what was expected, what came. Shapes and types are checked
everywhere; the values of B, C, label and mask on the CPU only, since elsewhere a check would wait for the device. The
modules compute in float32 at least, the functions in the type that they are given.

    import torch, ranet
    backbone = torch.nn.Conv2d(3, 64, 8, stride=8)          # any module that returns [b, in_channels, H, W]
    model = ranet.RANet(backbone, in_channels=64, num_classes=19)
    out = model(torch.rand(2, 3, 128, 160))
    print(out.fine.shape)                                    # torch.Size([2, 19, 128, 160])
    print(out.regions.labels.amax((1, 2)) + 1)               # Q, the number of regions of each image
"""
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

TINY = 2.0 ** -24   # E's slope is infinite at C = 0: smaller probabilities take the slope at this one


# --- Section 3.1: the region construction block ----------------------------------------------------------

def boundary_probability(B: Tensor) -> Tensor:
    r"""Eq. 1: D, the highest boundary score on the line between two pixels.

    .. math:: D_{i,j} = \max(B_{i \leftrightarrow j})

    The line is sampled at every whole step of its longer axis, both end points included, each sample
    interpolated between its two nearest pixels along the shorter axis (Figure 2; R1). So D_ii = B_i.

    B [H, W] -> D [HW, HW], symmetric. Gradient: to B, at the highest sample; of several, at the one nearest the
    line's upper end (its left end, if it is wider than high).
    """
    _check(B=B)
    H, W = B.shape
    j = torch.arange(H * W, device=B.device)                    # [HW]
    i = j[:, None]                                              # [HW, 1]
    D = _on_line(B, i, j, 0)                                    # [HW, HW]
    for step in range(1, max(H, W)):
        sample = _on_line(B, i, j, step)                        # [HW, HW]  once a line has ended, its last sample again
        D = torch.where(sample > D, sample, D)
    return D


def _on_line(B: Tensor, i: Tensor, j: Tensor, step: Tensor | int) -> Tensor:
    """B on the lines between pixels i and j, of shapes that broadcast: on a pixel along the longer axis, between two
    along the shorter. `step` counts from a line's upper end, or from its left end if it is wider than high."""
    W = B.shape[1]
    dy, dx = j // W - i // W, j % W - i % W
    wide = dy.abs() < dx.abs()
    reverse = torch.where(wide, dx, dy) < 0                     # the line starts at j
    start, dy, dx = torch.where(reverse, j, i), torch.where(reverse, -dy, dy), torch.where(reverse, -dx, dx)
    L = torch.where(wide, dx, dy).clamp_min(1)
    step = L.clamp_max(step)
    # step * dy / L and step * dx / L: one is whole, the other's remainder is kept. In integers the division is exact.
    down, right = step * dy // L, step * dx // L                # whole pixels,
    remainder = step * (dy + dx) - L * (down + right)           # and L-ths of one
    near = start + down * W + right
    far = near + (remainder > 0) * torch.where(wide, W, 1)
    # Not B[near]: on several threads the gradient of that adds up in another order every time.
    near, far = (B.reshape(-1).index_select(0, x.flatten()).view(x.shape) for x in (near, far))
    return near + remainder.to(B.dtype) / L * (far - near)


def semantic_divergence(C: Tensor) -> Tensor:
    r"""Eq. 2: E, the Jensen-Shannon divergence between the class probabilities of two pixels.

    .. math:: E_{i,j} = \frac12 \sum_{n=1}^{N} \Big( C_{i,n} \log_2 \frac{C_{i,n}}{U_{i,j,n}}
              + C_{j,n} \log_2 \frac{C_{j,n}}{U_{i,j,n}} \Big), \quad U_{i,j,n} = \frac{C_{i,n} + C_{j,n}}{2}

    As printed the formula is not 0 at i = j; we take the divergence that it names, which has the symmetry and the
    range that the paper states (R2).

    C [N, H, W], which sums to 1 over the classes (to 1e-2) -> E [HW, HW], symmetric; 0 where two pixels agree, 1 where
    they share no class. Gradient: to C (first derivatives only); log2 p counts as -24 for p < 2^-24.
    """
    _check(C=C)
    Ci = C.flatten(1)[:, :, None]                               # [N, HW, 1]
    Cj = C.flatten(1)[:, None, :]                               # [N, 1, HW]
    U = (Ci + Cj) / 2                                           # [N, HW, HW]
    kl_i = (Ci * (_log2(Ci) - _log2(U))).sum(0)                 # [HW, HW]  sum over the classes n
    kl_j = (Cj * (_log2(Cj) - _log2(U))).sum(0)                 # [HW, HW]
    return _clip((kl_i + kl_j) / 2)


def _log2(p: Tensor) -> Tensor:
    # Constant to autograd: the three logarithms' own derivatives add up to 0.
    return p.detach().clamp_min(TINY).log2()


def region_attention(D: Tensor, E: Tensor) -> Tensor:
    r"""Eq. 3: F, how strongly two pixels belong together.

    .. math:: F_{i,j} = (1 - D_{i,j})(1 - E_{i,j})

    D, E [HW, HW], or the same part of both -> F, of their shape. Gradient: to D and E.
    """
    _check(D=D, E=E)
    return (1 - D) * (1 - E)


def regularize(F: Tensor, Wg: Tensor, size: tuple[int, int]) -> Tensor:
    r"""Eq. 4: F^g, every row of F smoothed over the image (its decision follows in `region_decision`).

    .. math:: F^g = W^g \otimes F

    Row i of F is an H x W map over the pixels j. One kernel for all rows, a cross-correlation with the
    border replicated (R3).

    F [HW, HW], or some rows of it; W^g [k, k] non-negative, k odd, sum 1; size (H, W) -> F^g of F's shape, not
    symmetric. Gradient: to F and W^g.
    """
    _check(F=F, Wg=Wg)
    _expect(len(Wg) % 2 == 1, "Wg", "an odd k", Wg)
    whole = isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(x, Integral) and x > 0 for x in size)
    _expect(whole and size[0] * size[1] == F.shape[1], "size", f"(H, W) with HW = {F.shape[1]}", str(size))
    return sum(w * x for w, x in zip(Wg.flatten(), _shifted(F, len(Wg), size))).flatten(1)      # [HW, HW]


def _shifted(maps: Tensor, k: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """For each offset of a k x k kernel what maps [n, HW] have at that offset from every pixel: [n, H, W]."""
    H, W = size
    maps = maps.reshape(1, -1, H, W)                            # [1, n, H, W]
    maps = nn.functional.pad(maps, (k // 2,) * 4, mode="replicate")[0]      # [n, H + k - 1, W + k - 1]
    return (maps[:, a:a + H, b:b + W] for a in range(k) for b in range(k))


def region_decision(Fg: Tensor, threshold: float = 0.8) -> Tensor:
    r"""Eq. 4: G, whether two pixels are grouped.

    .. math:: G_{i,j} = \frac12 \mathrm{sgn}\Big(\frac{F^g_{i,j} + F^g_{j,i}}{2} - \tau\Big) + \frac12,
              \quad \mathrm{sgn}(0) = -1

    The paper has no threshold; without one all pixels are one region, since F^g >= 0 (R3).

    F^g [HW, HW]; threshold, tau in [0, 1] -> G [HW, HW] bool, symmetric. Gradient: none; a decision has no slope.
    """
    _check(Fg=Fg)
    _check_settings(threshold=threshold)
    return (Fg + Fg.T) / 2 > threshold


def connected_regions(G: Tensor) -> Tensor:
    r"""The regions R_q: the connected components of the graph whose edges are G_ij = 1.

    G is symmetric but not transitive, so two pixels with G_ij = 0 can share a region (R4).

    G [HW, HW] bool, symmetric -> labels [HW]: 0..Q-1, numbered by their first pixel. Gradient: none.
    """
    _check(G=G)
    n = len(G)
    first = torch.arange(n, device=G.device)                    # [HW]  the lowest pixel known to be connected
    blocks = G.split(max(1, _way(G).block // n))                # a few rows of G at a time, for memory
    while True:
        seen = torch.cat([torch.where(g, first.int(), n).amin(1) for g in blocks]).long()   # [HW]  over the neighbours
        # `first` points at roots: lower the root itself, not i alone, then point every pixel at its root: about log(HW)
        # rounds suffice.
        before, first = first, first.scatter_reduce(0, first, seen, "amin")
        for _ in range(n.bit_length()):
            first = first[first]
        if torch.equal(first, before):
            return _numbered(first)


def _numbered(names: Tensor) -> Tensor:
    """Regions of any names in 0..HW-1, [HW], as 0..Q-1 by their first pixel."""
    pixel = torch.arange(len(names), device=names.device)       # [HW]
    first = torch.full_like(names, len(names)).scatter_reduce(0, names, pixel, "amin")[names]       # [HW]
    return ((first == pixel).cumsum(0) - 1)[first]              # [HW]


def join_lone_pixels(labels: Tensor, Fg: Tensor) -> Tensor:
    r"""Every region of one pixel joins the region of two or more that it is most attached to (R4).

    .. math:: q'_i = \arg\max_{q:\, |R_q| > 1} \frac{1}{|R_q|} \sum_{j \in R_q} \frac{F^g_{i,j} + F^g_{j,i}}{2}
              \quad \text{for the pixels } i \text{ with } |R_{q_i}| = 1

    q_i is the region before, q'_i after. A boundary pixel has D_ii = B_i, so it is not even grouped with itself;
    yet the paper's regions have 400 pixels and hold "pixels near the object boundary". All lone pixels join at
    once; ties go to the lower region number. Where no region has two pixels nothing changes.

    labels [HW], F^g [HW, HW] -> labels [HW]: 0..Q-1, numbered by their first pixel. Gradient: none.
    """
    _check(Fg=Fg, labels=labels)
    size = labels.bincount()                                    # [Q]
    if len(size) == len(labels):
        return labels
    S = (Fg + Fg.T).detach() / 2                                # [HW, HW]
    member = (labels[:, None] == torch.arange(len(size), device=labels.device)).to(S)       # [HW, Q]
    mean = (S @ member / size).masked_fill(size == 1, -1)       # [HW, Q]  over the pixels of each region
    return _numbered(torch.where(size[labels] == 1, mean.argmax(1), labels))


# --- Section 3.2: the region interaction block -----------------------------------------------------------

def representative_score(Fg: Tensor, labels: Tensor) -> Tensor:
    r"""Eq. 5: J, how well a pixel stands for its region.

    .. math:: J_i = \frac{1}{|R_q|} \sum_{j \in R_q} F^g_{i,j}, \quad i \in R_q

    The mean runs over all of R_q, i included (R5).

    F^g [HW, HW], labels [HW] -> J [HW]. Gradient: to F^g; `RCB` passes it on to W^g only, unless joint (R16).
    """
    _check(Fg=Fg, labels=labels)
    same = labels[:, None] == labels                            # [HW, HW]
    return _clip((Fg * same).sum(1) / same.sum(1))              # [HW]  over the pixels j of i's region


def select_representatives(J: Tensor, labels: Tensor, K: int) -> Tensor:
    r"""phi(R_q): the K pixels of each region with the highest scores.

    Smaller regions give all their pixels; ties go to the lower-numbered pixel (R6).

    J [HW], labels [HW], K -> reps [P], by region, then by falling J. Gradient: none.
    """
    _check(labels=labels, J=J)
    _check_settings(K=K)
    order = J.detach().argsort(descending=True, stable=True)    # [HW]
    order = order[labels[order].argsort(stable=True)]           # [HW]  by region, then by falling J
    size = labels.bincount()                                    # [Q]
    start = (size.cumsum(0) - size)[labels[order]]              # [HW]  where its region starts in this order
    rank = torch.arange(len(J), device=J.device) - start        # [HW]  within the region
    return order[rank < K]                                      # [P]


def intra_region_collection(A: Tensor, J: Tensor, labels: Tensor, reps: Tensor,
                            printed: bool = False) -> tuple[Tensor, Tensor]:
    r"""Eq. 6: A^l, what each representative collects from the other pixels of its region.

    .. math:: A^l_{q,k} = A(p_{q,k}) + \sum_{i \in R_q \setminus \phi(R_q)} W^l_{q,k,i} A_i, \quad
              W^l_{q,k,i} = \frac{\exp(A(p_{q,k}) (J_i A_i)^\top)}
                                 {\sum_{j \in R_q \setminus \phi(R_q)} \exp(A(p_{q,k}) (J_j A_j)^\top)}

    The paper's A^l is J(p) A(p) + the sum of W^l (J_i A_i) (R9); printed=True takes that. Where every pixel of a region
    is a representative the sum is empty, and 0 (R7).

    A [HW, M], J [HW], labels [HW], reps [P] -> A^l [P, M]; W^l [P, HW], 0 outside its set. Gradient: to A and J.
    """
    _check(labels=labels, A=A, J=J, reps=reps)
    JA = J[:, None] * A                                         # [HW, M]
    others = labels[reps][:, None] == labels                    # [P, HW]  of the same region,
    others[:, reps] = False                                     #          and no representatives
    Wl = _masked_softmax(A[reps] @ JA.T, others)                # [P, HW]  softmax over those pixels i
    sent = JA if printed else A                                 # [HW, M]  R9
    return sent[reps] + Wl @ sent, Wl                           # [P, M]


def inter_region_interaction(Al: Tensor, J: Tensor, labels: Tensor, reps: Tensor,
                             printed: bool = False) -> tuple[Tensor, Tensor]:
    r"""Eq. 7: A^g, what each representative receives from those of the other regions.

    .. math:: A^g_{q,k} = A^l_{q,k}
              + \frac{1}{Q-1} \sum_{s \neq q,\, i \in \phi(R_s)} W^g_{q,s,k,i} A^l_{s,i}, \quad
              W^g_{q,s,k,i} = \frac{\exp(A^l_{q,k} (J(p_{s,i}) A^l_{s,i})^\top)}
                                   {\sum_{p_{s,j} \in \phi(R_s)} \exp(A^l_{q,k} (J(p_{s,j}) A^l_{s,j})^\top)}

    The weights are normalised for each source region s on its own. The paper's A^g has J(p) before every A^l (R9),
    and no 1 / (Q - 1): there a region's own word is one of Q, and counts less the more regions there are (R8).
    printed=True takes that.

    A^l [P, M], J [HW], labels [HW], reps [P] -> A^g [P, M]; the paper's second W^g (here Wi) [P, P], 0 within a region.
    Gradient: to A^l and J.
    """
    _check(labels=labels, reps=reps, Al=Al, J=J)
    JAl = J[reps][:, None] * Al                                 # [P, M]
    region = labels[reps]                                       # [P]
    logits = Al @ JAl.T                                         # [P, P]  from the source r (column) to p (row)
    each = logits.split(region.bincount().tolist(), 1)          # Q times [P, |phi(R_s)|]
    Wi = torch.cat([x.softmax(1) for x in each], 1) * (region[:, None] != region)   # [P, P]  softmax over each phi(R_s)
    sent, terms = (JAl, 1) if printed else (Al, max(1, len(each) - 1))              # [P, M]; Q - 1
    return sent + Wi @ sent / terms, Wi                         # [P, M]


def intra_region_distribution(A: Tensor, Ag: Tensor, J: Tensor, labels: Tensor, reps: Tensor,
                              printed: bool = False) -> tuple[Tensor, Tensor]:
    r"""Eq. 8: O, what each pixel receives from the representatives of its region.

    .. math:: O_i = A_i + \sum_{p_{q,k} \in \phi(R_q)} W^d_{q,k,i} A^g_{q,k}, \quad
              W^d_{q,k,i} = \frac{\exp(A_i (J(p_{q,k}) A^g_{q,k})^\top)}
                                 {\sum_{p_{q,j} \in \phi(R_q)} \exp(A_i (J(p_{q,j}) A^g_{q,j})^\top)}

    The paper's O is J_i A_i + the sum of W^d (J(p) A^g) (R9); printed=True takes that.

    A [HW, M], A^g [P, M], J [HW], labels [HW], reps [P] -> O [HW, M]; W^d [HW, P], 0 outside the pixel's region.
    Gradient: to A, A^g and J.
    """
    _check(labels=labels, A=A, J=J, reps=reps, Ag=Ag)
    JAg = J[reps][:, None] * Ag                                 # [P, M]
    same = labels[:, None] == labels[reps]                      # [HW, P]
    Wd = _masked_softmax(A @ JAg.T, same)                       # [HW, P]  softmax over those of its region
    own, sent = (J[:, None] * A, JAg) if printed else (A, Ag)   # [HW, M], [P, M]
    return own + Wd @ sent, Wd                                  # [HW, M]


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax of each row over the entries where mask is True; 0 elsewhere, and in a row that has none."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(1) * mask


def _clip(x: Tensor) -> Tensor:
    # Rounding can carry a value just past [0, 1]: clip the value, keep the gradient (straight-through).
    return x + (x.clamp(0, 1) - x).detach()


# --- The equations together, for one image ---------------------------------------------------------------

def construct_regions(B: Tensor, C: Tensor, Wg: Tensor, threshold: float = 0.8, cues: str = "both",
                      join_lone: bool = True) -> tuple[Tensor, Tensor]:
    """Eqs. 1-5, what `RCB` computes: B [H, W], C [N, H, W] and W^g [k, k] to labels and J, [HW] each.

    Gradient: J's to B, C and W^g.
    """
    _check(B=B, C=C, Wg=Wg)
    _check_settings(cues=cues, threshold=threshold)
    zero = B.new_zeros(B.numel(), B.numel())                    # [HW, HW]  for a cue that is left out (R10)
    D = zero if cues == "semantic" else boundary_probability(B)     # [HW, HW]  eq. 1
    E = zero if cues == "boundary" else semantic_divergence(C)      # [HW, HW]  eq. 2
    F = region_attention(D, E)                                  # [HW, HW]  eq. 3
    Fg = regularize(F, Wg, B.shape)                             # [HW, HW]  eq. 4
    labels = connected_regions(region_decision(Fg, threshold))  # [HW]
    if join_lone:
        labels = join_lone_pixels(labels, Fg)                   # [HW]      R4
    return labels, representative_score(Fg, labels)             # [HW]      eq. 5


def exchange_context(A: Tensor, J: Tensor, labels: Tensor, K: int = 8, intra: bool = True, inter: bool = True,
                     printed: bool = False) -> Tensor:
    """Eqs. 6-8, what `RIB` computes: A [HW, M], J and labels [HW] to O [HW, M]; intra, inter, printed as in `RIB`.

    Gradient: to A and J.
    """
    _check(labels=labels, A=A, J=J)
    _check_settings(K=K)
    reps = select_representatives(J, labels, K)                 # [P]
    Al = intra_region_collection(A, J, labels, reps, printed)[0] if intra else A[reps]      # [P, M]   eq. 6
    Ag = inter_region_interaction(Al, J, labels, reps, printed)[0] if inter else Al         # [P, M]   eq. 7
    if not intra:
        return A.index_add(0, reps, Ag)                         # [HW, M]  R10
    return intra_region_distribution(A, Ag, J, labels, reps, printed)[0]    # [HW, M]  eq. 8


# --- RCB and RIB for batches -----------------------------------------------------------------------------

class Regions(NamedTuple):
    """What `RCB` makes of images and `RIB` works on."""
    labels: Tensor   # [b, H, W] int64: the region of each pixel, 0..Q-1
    J: Tensor        # [b, H, W] in [0, 1]: eq. 5


class RCB(nn.Module):
    r"""The region construction block, eqs. 1-5: cuts each image of a batch into regions.

    `construct_regions` of each image, in five bytes a pair of pixels (float32, on a CPU).

    kernel_size: k of W^g, odd. W^g is the softmax of k x k logits, so that F^g and J stay in [0, 1]; at the
        start its centre weighs 0.87 (k = 3). With k = 1 there is no parameter and F^g = F.
    threshold: tau of eq. 4.
    cues: "both", or "boundary" (F = 1 - D) or "semantic" (F = 1 - E), as in Table 1 (R10).
    joint: True lets the gradient of J pass to B and C (R16).
    join_lone: False leaves the bare components of G (R4).
    Gradient: J's to W^g, and to B and C if joint (first derivatives only); labels carry none.
    """

    def __init__(self, kernel_size: int = 3, threshold: float = 0.8, cues: str = "both", joint: bool = False,
                 join_lone: bool = True):
        super().__init__()
        _check_settings(kernel_size=kernel_size, threshold=threshold, cues=cues)
        _expect(kernel_size % 2 == 1, "kernel_size", "an odd number of pixels", kernel_size)
        self.threshold, self.cues, self.joint, self.join_lone = threshold, cues, joint, join_lone
        logits = torch.zeros(kernel_size, kernel_size)          # [k, k]
        logits[kernel_size // 2, kernel_size // 2] = 4.0
        self.logits = nn.Parameter(logits) if kernel_size > 1 else None

    def kernel(self) -> Tensor:
        """W^g [k, k]: a softmax over all k x k logits."""
        if self.logits is None:
            return torch.ones(1, 1)
        return self.logits.flatten().softmax(0).view_as(self.logits)

    @torch.compiler.disable     # the map's size sets its loops, the data its shapes
    def forward(self, B: Tensor, C: Tensor) -> Regions:
        """B [b, H, W] in [0, 1] and C [b, N, H, W], probabilities over N, to labels and J [b, H, W]."""
        _check("b ", B=B, C=C)
        with torch.autocast(B.device.type, enabled=False):
            B, C = _at_least_float32(B), _at_least_float32(C)
            Wg = self.kernel().to(B)                            # [k, k]
            at_once = max(1, _way(B).pairs_at_once // B[0].numel() ** 2)        # images; at 97 x 97, one
            parts = [_construct(*part, Wg, self.threshold, self.cues, self.join_lone)
                     for part in zip(B.split(at_once), C.split(at_once))]
            labels, means = map(torch.cat, zip(*parts))         # [b, HW], [b, HW, k k]
            # Eq. 5 is linear in W^g: from the k k means of F, so that W^g gets its gradient and F needs no graph.
            J = _clip((means * Wg.flatten()).sum(2))            # [b, HW]  over the offsets of W^g
            if self.joint and (B.requires_grad or C.requires_grad):
                J = _Joint.apply(J, B, C, Wg.detach(), labels, self.cues)
        return Regions(labels.view(B.shape), J.view(B.shape))


class RIB(nn.Module):
    r"""The region interaction block, eqs. 6-8: exchanges context between the regions of each image.

    `exchange_context` of each image. It has no parameters.

    representatives: K, at most so many of each region.
    intra: False takes eqs. 6 and 8 out: A^l = A, and A^g reaches only the representatives (R10).
    inter: False takes eq. 7 out: A^g = A^l (R10).
    printed: True takes eqs. 6-8 as printed, with J in the sums (R9), and eq. 7's sum undivided (R8).
    Gradient: to A and to J of the regions.
    """

    def __init__(self, representatives: int = 8, intra: bool = True, inter: bool = True, printed: bool = False):
        super().__init__()
        _check_settings(representatives=representatives)
        self.representatives, self.intra, self.inter, self.printed = representatives, intra, inter, printed

    @torch.compiler.disable     # P, the number of representatives, is another one for every image
    def forward(self, A: Tensor, regions: Regions) -> Tensor:
        """A [b, M, H, W] and the regions of `RCB` to O [b, M, H, W], of A's type."""
        _expect(_is_tensor(A, 4) and A.is_floating_point(), "A", "floating-point features [b, M, H, W]", A)
        shapes = [getattr(x, "shape", None) for x in regions] if isinstance(regions, tuple) else None
        _expect(shapes == 2 * [A[:, 0].shape], "regions", f"labels and J, {list(A[:, 0].shape)} each", str(shapes))
        labels, J = regions
        with torch.autocast(A.device.type, enabled=False):
            pixels = _at_least_float32(A).flatten(2).mT         # [b, HW, M]
            contexts = [exchange_context(*image, self.representatives, self.intra, self.inter, self.printed)   # [HW, M]
                        for image in zip(pixels, J.flatten(1).to(pixels.dtype), labels.flatten(1))]
        return torch.stack(contexts).mT.reshape(A.shape).to(A.dtype)


class RegionContext(nn.Module):
    """RCB and RIB, one after the other: the context that `RANet` adds to A."""

    def __init__(self, rcb: RCB | None = None, rib: RIB | None = None):
        super().__init__()
        self.rcb, self.rib = rcb or RCB(), rib or RIB()

    def forward(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Regions]:
        """A [b, M, H, W], B [b, H, W] and C [b, N, H, W] to O [b, M, H, W] and the regions."""
        regions = self.rcb(B, C)
        return self.rib(A, regions), regions


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- Section 4: the network and its loss -----------------------------------------------------------------

class Output(NamedTuple):
    """What `RANet` returns."""
    fine: Tensor               # [b, N, h, w] logits of the segmentation
    coarse: Tensor             # [b, N, h, w] logits of C
    boundary: Tensor           # [b, H, W]    logits of B
    regions: Regions | None    # as the context returns them


class RANet(nn.Module):
    r"""The network: backbone, A, B, C, the context O, and the segmentation from [A, BN(O)].

    O is batch-normalised before it meets A, and starts at a quarter of A's size, since the first regions are arbitrary
    (R14). B starts at 0.05, so the first steps see one region and no inter-region context (R13).

    backbone: a module from images [b, 3, h, w] to features [b, in_channels, H, W]. Stride 8 in the paper.
    num_classes, channels: N, M.
    context: a module from A [b, M, H, W], B [b, H, W] and C [b, N, H, W] to O [b, M, H, W] and `Regions` (or None);
        None: `RegionContext()`.
    dropout: the share of feature channels dropped before the classifier.
    """

    def __init__(self, backbone: nn.Module, in_channels: int, num_classes: int, channels: int = 512,
                 context: nn.Module | None = None, dropout: float = 0.1):
        super().__init__()
        _check_settings(in_channels=in_channels, num_classes=num_classes, channels=channels)
        self.backbone = backbone
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.boundary = nn.Conv2d(channels, 1, 1)
        self.semantic = nn.Conv2d(channels, num_classes, 1)
        nn.init.constant_(self.boundary.bias, -2.944)           # the logit of 0.05 (R13)
        self.context = context or RegionContext()
        self.norm = nn.BatchNorm2d(channels)                    # (R14)
        nn.init.constant_(self.norm.weight, 0.25)               # O starts small (R14)
        self.fuse = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Dropout2d(dropout))
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, images: Tensor) -> Output:
        """Images [b, 3, h, w] of any size to `Output`."""
        _expect(_is_tensor(images, 4) and images.is_floating_point(), "images", "floating-point [b, 3, h, w]", images)
        features = self.backbone(images)                        # [b, in_channels, H, W]
        in_channels = self.reduce[0].in_channels
        _expect(_is_tensor(features, 4) and features.shape[1] == in_channels,
                "backbone", f"a module that returns [b, {in_channels}, H, W]", features)
        A = self.reduce(features)                               # [b, M, H, W]
        boundary = self.boundary(A)[:, 0]                       # [b, H, W]
        coarse = self.semantic(A)                               # [b, N, H, W]
        B = _at_least_float32(boundary).sigmoid()               # [b, H, W]
        C = _at_least_float32(coarse).softmax(1)                # [b, N, H, W]  over the classes
        context = self.context(A, B, C)
        ok = isinstance(context, tuple) and len(context) == 2 and getattr(context[0], "shape", None) == A.shape
        _expect(ok, "context", f"a module that returns a pair, O {list(A.shape)} and regions", context)
        O, regions = context
        fine = self.classify(self.fuse(torch.cat((A, self.norm(O)), 1)))    # [b, N, H, W]
        fine, coarse = (nn.functional.interpolate(x, images.shape[2:], mode="bilinear", align_corners=False)
                        for x in (fine, coarse))                # [b, N, h, w]
        return Output(fine, coarse, boundary, regions)


class Loss(NamedTuple):
    """What `ranet_loss` returns: scalars, the total and its three parts before weighting."""
    total: Tensor
    fine: Tensor
    coarse: Tensor
    boundary: Tensor


def ranet_loss(output: Output, label: Tensor, mask: Tensor, weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
               counts: Tensor | None = None) -> Loss:
    r"""Cross-entropy of the fine map, of the coarse map C and of the boundary map B.

    Each is a mean over the labelled pixels; B's, over the cells of its grid that hold a pixel whose mask
    is known, with the mask max-pooled to that grid (R11). The paper gives no weights: they are equal (R12).

    label: [b, h, w] int64, a class 0..N-1 or 255 for ignored.
    mask: [b, h, w], 1 on the boundary, 0 off it, 255 where label is ignored and no boundary is known.
    weights: of the fine, coarse and boundary loss in the total.
    counts: the two denominators (`label_counts`). None: this batch's. Under DDP, which averages gradients: their mean
        over the processes.
    Gradient: to the output's logits.
    """
    N = output.fine.shape[1]
    _expect(2 <= N <= 255, "output", "2 to 255 classes (a label of 255 is ignored)", N)
    three = isinstance(weights, (tuple, list)) and len(weights) == 3 and all(isinstance(w, Real) for w in weights)
    _expect(three, "weights", "three numbers, of the fine, coarse and boundary loss", weights)
    _expect(_is_tensor(label, 3, torch.int64) and label.shape == output.fine[:, 0].shape,
            "label", f"int64 of shape {list(output.fine[:, 0].shape)}", label)
    _expect(_is_tensor(mask, 3) and mask.shape == label.shape, "mask", f"label's shape, {list(label.shape)}", mask)
    if label.device.type == "cpu":
        for name, x, ok, expected in (
                ("label", label, (label >= 0) & (label < N) | (label == 255), f"0..{N - 1} or 255"),
                ("mask", mask, (mask == 0) | (mask == 1) | (mask == 255) & (label == 255), "0, 1, or label's 255")):
            _expect(bool(ok.all()), name, expected, str(x[~ok][:1].tolist()))
    pixels, cells = label_counts(label, mask, output.boundary.shape[1:]) if counts is None else counts
    fine, coarse = (nn.functional.cross_entropy(_at_least_float32(x), label, ignore_index=255, reduction="sum")
                    / pixels.clamp_min(1) for x in (output.fine, output.coarse))   # mean over the labelled pixels
    target, known = pool_boundary(mask, output.boundary.shape[1:])
    boundary = nn.functional.binary_cross_entropy_with_logits(
        _at_least_float32(output.boundary), target, weight=known, reduction="sum")
    boundary = boundary / cells.clamp_min(1)                    # mean over the known cells
    total = weights[0] * fine + weights[1] * coarse + weights[2] * boundary
    return Loss(total, fine, coarse, boundary)


def pool_boundary(mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The boundary mask [b, h, w] on B's grid: two [b, H, W] of 0 and 1, cells on the boundary and known ones (R11)."""
    pool = nn.functional.adaptive_max_pool2d
    return pool((mask == 1).float(), size), pool((mask != 255).float(), size)


def label_counts(label: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[2]: the number of labelled pixels, and of the cells of B's grid, of that size, whose mask is known."""
    return torch.stack(((label != 255).sum(), pool_boundary(mask, size)[1].sum())).float()


# --- Nothing from here on is needed to understand the paper. ---------------------------------------------
# `construct_regions` for `RCB`: the same equations on blocks of rows, for a batch, in little memory and few calls.

@torch.no_grad()
def _construct(B: Tensor, C: Tensor, Wg: Tensor, threshold: float, cues: str, join_lone: bool) -> tuple[Tensor, Tensor]:
    """Eqs. 1-5 without a graph: B [b, H, W], C [b, N, H, W], W^g [k, k] to labels [b, HW] and means [b, HW, k k], for
    each offset of W^g the mean of F there over the pixels of i's region: J is their sum, weighted by W^g."""
    (b, H, W), n, k = B.shape, B[0].numel(), len(Wg)
    rows = max(1, _way(B).block // (b * n))
    blocks = [(a, min(a + rows, n)) for a in range(0, n, rows)]
    F = _attention(B, C, cues, blocks)                          # [b, HW, HW]  eqs. 1-3
    pixels = torch.arange(n, device=B.device)                   # [HW]
    # Where each offset of W^g looks from each pixel; as float, since padding takes no integers.
    neighbour = torch.cat([*_shifted(pixels[None].float(), k, (H, W))]).flatten(1).long()   # [k k, HW]

    def mean_Fg(f: Tensor, i: Tensor, a: int = 0) -> Tensor:
        """(F^g_ij + F^g_ji) / 2 for some pixels i and all j >= a, [b, len(i), HW - a]. f is F, or one image of it; as
        it is symmetric, F^g_ji is F_ji smoothed over i."""
        offsets = zip(Wg.flatten(), _shifted(f[:, i], k, (H, W)), neighbour[:, i])
        # The first term smooths over j, the second over i.
        return sum((w * x).view(len(f), -1, n)[..., a:] + w * f[:, at, a:] for w, x, at in offsets) / 2

    G = torch.empty(b, n, n, dtype=torch.bool, device=B.device)     # [b, HW, HW]
    for a, z in blocks:
        g = mean_Fg(F, pixels[a:z], a) > threshold              # [b, rows, HW - a]  eq. 4
        G[:, a:z, a:], G[:, a:, a:z] = g, g.mT
    labels = torch.stack([connected_regions(g) for g in G])     # [b, HW]
    if join_lone:
        labels = torch.stack([_join(q, lambda i: mean_Fg(f[None], i), rows) for q, f in zip(labels, F)])
    size = torch.stack([q.bincount()[q] for q in labels])       # [b, HW]  of i's region
    totals = []
    for a, z in blocks:
        same = (labels[:, a:z, None] == labels[:, None]).view(-1, H, W)     # [b rows, H, W]
        per_offset = [(x * same).sum((1, 2)) for x in _shifted(F[:, a:z], k, (H, W))]       # k k times [b rows]
        totals.append(torch.stack(per_offset, 1).view(b, -1, k * k))
    return labels, torch.cat(totals, 1) / size[..., None]       # eq. 5: over the pixels of i's region


def _attention(B: Tensor, C: Tensor, cues: str, blocks: list[tuple[int, int]]) -> Tensor:
    """Eqs. 1-3: F [b, HW, HW] of B [b, H, W] and C [b, N, H, W], in blocks of rows, for j >= i, then mirrored."""
    b, n, way = len(B), B[0].numel(), _way(B)
    C = C.flatten(2)                                            # [b, N, HW]
    F = B.new_zeros(b, n, n)                                    # [b, HW, HW]  holds D, then F
    if cues != "semantic":
        F.diagonal(0, 1, 2).copy_(B.flatten(1))
        way.lines(B, F)                                         # eq. 1
    columns = max(1, way.block // (b * C.shape[1] * blocks[0][1]))      # [b, N, rows, columns] fits a block
    for a, z in blocks:
        D = F[:, a:z, a:]                                       # [b, rows, HW - a]
        E = torch.zeros_like(D) if cues == "boundary" else torch.cat(
            [_divergence(C[..., a:z], c) for c in C[..., a:].split(columns, 2)], 2)     # eq. 2
        for d, e in zip(D, E):
            d.copy_(region_attention(d, e))                     # eq. 3
        F[:, a:z, a:z].copy_(F[:, a:z, a:z].triu() + F[:, a:z, a:z].triu(1).mT)
        F[:, z:, a:z] = F[:, a:z, z:].mT
    return F


def _tables(B: Tensor, out: Tensor) -> Iterator:
    """What eq. 1 is read from, for images B [b, H, W] into `out` [b, HW, HW] at (i, j), i < j: the highest sample of
    each line, or, if `out` holds integers, the first step where it is met. Lines of the same L (steps along the longer
    axis) have one table: with the shorter axis laid out every 1 / L pixel in T [b, (h - 1) L + 1, w], step s of the
    line from row y and column x to row y + r and column x + L is T[y L + s r, x + s]. First for flat lines, wider than
    high; then for the others, with the axes exchanged. `pairs` is `out` as [b, y, x, y', x'], m the highest |r|: exact
    diagonals belong to the others."""
    b, H, W = B.shape
    view = out.view(b, H, W, H, W)
    for field, pairs, flat in ((B, view, 1), (B.mT, view.permute(0, 2, 1, 4, 3), 0)):
        slope, steps = field.diff(dim=1)[:, :, None], torch.arange(field.shape[2], device=B.device).to(B.dtype)[:, None]
        for L in range(1, field.shape[2]):
            T = (field[:, :-1, None] + steps[:L] / L * slope).flatten(1, 2)     # [b, (h - 1) L, w]
            yield torch.cat((T, field[:, -1:]), 1), L, min(L - flat, field.shape[1] - 1), pairs, flat


def _walks(B: Tensor, out: Tensor) -> None:
    """For one L and r, the samples of all lines are a strided view of T, and one maximum serves all."""
    for T, L, m, pairs, flat in _tables(B, out):
        b, h, w = pairs.shape[:3]
        padded = -(-(w - L) // 32) * 32                         # a maximum is several times faster on rows of whole 32s
        T = nn.functional.pad(torch.stack((T, T.flip(1))).flatten(2), (0, padded))      # down, and up
        for r in range(m + 1):
            walks = T.as_strided((2, b, L + 1, h - r, padded), (*T.stride()[:2], r * w + 1, L * w, 1))
            found = walks.amax(2) if out.is_floating_point() else walks[..., :w - L].max(2)[1]      # over s
            down, up = found[..., :w - L]                       # [b, h - r, w - L] each
            pairs.diagonal(r, 1, 3).diagonal(L, 1, 2).copy_(down)
            rise, run = (r, -L) if flat else (-r, L)            # of a flat line upwards, the right end is i
            pairs.diagonal(rise, 1, 3).diagonal(run, 1, 2).copy_(up.flip(1))


def _gathers(B: Tensor, out: Tensor) -> None:
    """The samples of all lines of one L are gathered by one call."""
    for T, L, m, pairs, flat in _tables(B, out):
        b, h, w = pairs.shape[:3]
        if L == 1:                                              # once for all lengths
            x = torch.arange(w, device=B.device)                # [w]
            y, r = x.new_tensor([(y, end - y) for y in range(h) for end in range(h)]).T     # [h h] each
            y, r = (k[r.abs().argsort(stable=True), None] for k in (y, r))      # [h h, 1]  the flattest lines first
        p = h + m * (2 * h - m - 1)                             # so many pairs of rows have |r| <= m
        s = x[:L + 1, None, None]                               # [L + 1, 1, 1]
        at = (y[:p] * L + s * r[:p]) * w + x[:w - L] + s        # [L + 1, p, w - L]
        samples = T.flatten(1)[:, at]                           # [b, L + 1, p, w - L]
        found = samples.amax(1) if out.is_floating_point() else samples.max(1)[1].to(out.dtype)     # over s
        i, j = (y[:p], x[:w - L]), (y[:p] + r[:p], x[L:])       # of a flat line upwards, j < i
        pairs[(slice(None), *i, *j)] = pairs[(slice(None), *j, *i)] = found


class _Way(NamedTuple):
    """How to compute on a device: here for a CPU's cache; for a GPU, to keep it busy with few calls (docs/cost.md)."""
    block: int = 2 ** 19            # numbers in a block of rows
    rows: int = 32                  # pixels i in a block that autograd goes back through, at most
    pairs_at_once: int = 2 ** 22    # pairs of pixels, over the images that share their calls
    lines: Callable = _walks        # eq. 1


def _way(x: Tensor) -> _Way:
    return _Way() if x.device.type == "cpu" else _Way(2 ** 25, 128, 2 ** 27, _gathers)


def _divergence(Ci: Tensor, Cj: Tensor) -> Tensor:
    """Eq. 2 for pairs, C_i [b, N, I] and C_j [b, N, J] to E [b, I, J], with one logarithm a class and pair: 2 E is the
    sum over n of C_i (1 + log C_i) + C_j (1 + log C_j) - 2 U log 2 U."""
    U2 = Ci[..., :, None] + Cj[..., None, :]                    # [b, N, I, J]
    joint = (U2 * U2.detach().clamp_min(2 * TINY).log2_()).sum(1)       # [b, I, J]  sum over the classes
    own_i, own_j = ((p * (1 + _log2(p))).sum(1) for p in (Ci, Cj))      # [b, I], [b, J]
    return _clip((own_i[:, :, None] + own_j[:, None] - joint) / 2)


def _join(labels: Tensor, mean_Fg: Callable, rows: int) -> Tensor:
    """`join_lone_pixels`; mean_Fg(i) [1, i, HW] is the mean of F^g_ij and F^g_ji, which only lone pixels i need."""
    size, joined = labels.bincount(), labels.clone()            # [Q], [HW]
    large = (size > 1).nonzero()[:, 0]                          # [large]  these regions
    lone = (size[labels] == 1).nonzero()[:, 0]                  # [lone]   these pixels
    if len(lone) in (0, len(labels)):
        return labels
    member = labels[:, None] == large                           # [HW, large]
    for i in lone.split(rows):
        S = mean_Fg(i)[0]                                       # [i, HW]
        joined[i] = large[(S @ member.to(S) / size[large]).argmax(1)]
    return _numbered(joined)


class _Joint(torch.autograd.Function):
    """J [b, HW] unchanged. Backward, J's gradient goes on to W^g unchanged, and through eqs. 1-5 to B and C: that of a
    sum over pairs of pixels, of dJ_i share_q(j) F_ij / |R_q|, where q is i's region and share_q(j) the weight of F_ij
    in the sum of F^g_i over R_q, 0 except in R_q and around it. So rows of one region go together."""

    @staticmethod
    def forward(ctx, J, B, C, Wg, labels, cues):
        ctx.cues = cues
        ctx.save_for_backward(B, C, Wg, labels)
        return J.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dJ):
        *maps, Wg, labels = ctx.saved_tensors
        B, C = (x.detach().requires_grad_() for x in maps)      # [b, H, W], [b, N, H, W]
        with torch.enable_grad():
            for image in zip(B, C, labels, dJ):
                _backward(*image, Wg, ctx.cues)
        return dJ, *(torch.zeros_like(x) if x.grad is None else x.grad for x in (B, C)), None, None, None


def _backward(B: Tensor, C: Tensor, labels: Tensor, dJ: Tensor, Wg: Tensor, cues: str) -> None:
    """Adds one image's gradients to those of the batch, of which B [H, W] and C [N, H, W] are views."""
    size, n = labels.bincount(), len(labels)                    # [Q]
    rows = max(1, min(_way(B).rows, 2 ** 25 // C.numel()))      # [N, rows, HW] stays below 2^25 numbers
    steps = B.new_zeros(1, n, n, dtype=torch.uint8 if max(B.shape) < 256 else torch.int16)      # [1, HW, HW]
    if cues != "semantic":                                      # at which step each line is highest, for i < j
        _way(B).lines(B.detach()[None], steps)
    member = (labels == torch.arange(len(size), device=B.device)[:, None]).to(B).requires_grad_()       # [Q, HW]
    share, = torch.autograd.grad(regularize(member, Wg, B.shape), member, member)   # [Q, HW]  the transpose of eq. 4
    for i in labels.argsort(stable=True).split(rows):
        j = share[labels[i]].any(0).nonzero()[:, 0]             # [columns]
        weight = (dJ / size[labels])[i, None] * share[labels[i]][:, j]      # [rows, columns]
        D = E = torch.zeros_like(weight)                        # [rows, columns]
        if cues != "semantic":
            at = steps[0, torch.minimum(i[:, None], j), torch.maximum(i[:, None], j)]       # [rows, columns]
            D = _on_line(B, i[:, None].int(), j.int(), at)
        if cues != "boundary":
            E = _divergence(C.flatten(1)[None, :, i], C.flatten(1)[None, :, j])[0]
        (weight * region_attention(D, E)).sum().backward()      # over the pairs


# --- Bad input: one line that names the argument, what was expected and what came ------------------------

def _expect(ok: bool, name: str, expected: str, got) -> None:
    if not ok:
        if isinstance(got, Tensor):
            got = f"{str(got.dtype)[6:]} {list(got.shape)}"         # without "torch."
        elif not isinstance(got, (str, Real)):
            got = type(got).__name__
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _is_tensor(x, dims: int, dtype: torch.dtype | None = None) -> bool:
    return isinstance(x, Tensor) and x.dim() == dims and 0 not in x.shape and dtype in (None, x.dtype)


# What an equation's arguments have to be, by their names in the paper; I J and rows: any part of HW HW.
SHAPES = {"B": "H W", "C": "N H W", "D": "I J", "E": "I J", "F": "rows HW", "Wg": "k k", "Fg": "HW HW", "G": "HW HW",
          "J": "HW", "labels": "HW", "reps": "P", "A": "HW M", "Al": "P M", "Ag": "P M"}
KINDS = {"G": torch.bool, "labels": torch.int64, "reps": torch.int64}       # the others: floating-point, of one type


def _check(batch: str = "", **given: Tensor) -> None:
    """Names the first argument that does not fit those before it. Of B and C, values too: logits are not 0 to 1."""
    sizes, floating = {}, None
    for name, x in given.items():
        letters, kind = (batch + SHAPES[name]).split(), KINDS.get(name, floating)
        shape = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
        ok = _is_tensor(x, len(letters), kind) and (kind or x.is_floating_point())
        ok = ok and all(sizes.setdefault(letter, n) == n for letter, n in zip(letters, x.shape))
        _expect(ok, name, f"{str(kind or 'torch.floating-point')[6:]} [{shape}]", x)
        floating = floating if name in KINDS else x.dtype
        if name in ("B", "C") and x.device.type == "cpu":
            low, high = (bound.item() for bound in x.detach().aminmax())        # NaN is both, and fails
            _expect(low >= -1e-6 and high <= 1 + 1e-6, name, "numbers in [0, 1]", f"some from {low:g} to {high:g}")
        if name == "C" and x.device.type == "cpu":
            sums = x.detach().sum(-3).flatten()                 # over the classes
            worst = sums[(sums - 1).abs().argmax()].item()
            _expect(abs(worst - 1) <= 1e-2, name, "a sum of 1", f"a sum of {worst:g}")


def _check_settings(**given) -> None:
    for name, x in given.items():
        if name == "cues":
            ok, expected = x in ("both", "boundary", "semantic"), "'both', 'boundary' or 'semantic'"
        elif name == "threshold":
            ok, expected = isinstance(x, Real) and 0 <= x <= 1, "a number in [0, 1]"
        else:
            ok, expected = isinstance(x, Integral) and not isinstance(x, bool) and x > 0, "a positive whole number"
        _expect(ok, name, expected, x if isinstance(x, Tensor) else repr(x))
