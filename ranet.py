# SPDX-License-Identifier: MIT
r"""RANet: Region Attention Network for Semantic Segmentation, in one file that needs torch alone.

    Dingguo Shen, Yuanfeng Ji, Ping Li, Yi Wang, Di Lin.
    RANet: Region Attention Network for Semantic Segmentation. NeurIPS 2020.

The file follows the paper. Section 3.1 cuts the image into regions (eqs. 1-4), section 3.2 scores their
pixels (eq. 5) and lets the regions exchange context (eqs. 6-8): one function an equation, two for eq. 4; one
image at a time, dense and differentiable. The modules at the end take batches: `RCB` and `RIB` compute the
same numbers in little memory, `RANet` puts them on a backbone, `ranet_loss` trains it. Rn in a comment is
the n-th reading of the paper in docs/differences.md: a place where the text is silent or contradicts itself.

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

Pixels are numbered in raster order; i and j are pixels, p and r representatives. The equations' [HW, HW]
matrices take 338 MiB each at 97 x 97 in float32. `RCB` holds one of them, and one of a byte an entry.

    import torch, ranet
    backbone = torch.nn.Conv2d(3, 64, 8, stride=8)          # any module that returns [b, in_channels, H, W]
    model = ranet.RANet(backbone, in_channels=64, num_classes=19)
    out = model(torch.rand(2, 3, 128, 160))
    print(out.fine.shape)                                    # torch.Size([2, 19, 128, 160])
    print(out.regions.labels.amax((1, 2)) + 1)               # Q, the number of regions of each image

Not here: the backbones, the data sets, the boundary masks and the training loop (train.py and data.py of
the same project), trained weights, kernels in CUDA or Triton.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

TINY = 2.0 ** -24   # log2 C has no slope at C = 0: below this, C takes the slope it has here (R2)


# ---------------------------------------------------------------------------------------------------------
# Section 3.1: the region construction block
# ---------------------------------------------------------------------------------------------------------

def boundary_probability(B: Tensor) -> Tensor:
    r"""Eq. 1: D, the highest boundary score on the line between two pixels.

    .. math:: D_{i,j} = \max(B_{i \leftrightarrow j})

    The line is sampled at every whole step of its longer axis, both end points included, each sample
    interpolated between its two nearest pixels along the shorter axis (Figure 2; R1). So D_ii = B_i.

    Args:
        B: [H, W] boundary scores in [0, 1].
    Returns:
        D [HW, HW] in [0, 1], symmetric.
    Gradient: to B, at the highest sample; of several, at the one nearest the lower-numbered pixel.
    Raises: ValueError for another shape or type, or a score outside [0, 1].
    Source: eq. 1, section 3.1.
    """
    _check_scores("B", B, "[H, W]", 2)
    H, W = B.shape
    j = torch.arange(H * W, device=B.device)                    # [HW]
    i = j[:, None]                                              # [HW, 1]
    D = _on_line(B, i, j, torch.zeros_like(j))                  # [HW, HW]
    for step in range(1, max(H, W)):
        sample = _on_line(B, i, j, torch.full_like(j, step))    # [HW, HW]  the end again on a line that has ended
        D = torch.where(sample > D, sample, D)
    return D


def _on_line(B: Tensor, i: Tensor, j: Tensor, step: Tensor) -> Tensor:
    """B on the line between pixels i and j, `step` steps from the lower-numbered one: on a pixel along the
    longer axis, between two along the shorter (Figure 2). Integers whose shapes broadcast to the result's."""
    H, W = B.shape
    y, x = i // W, i % W
    dy, dx = j // W - y, j % W - x
    L = torch.maximum(dy.abs(), dx.abs()).clamp_min(1)
    step = torch.minimum(step, L)
    step = torch.where(i < j, step, L - step)                   # now from i
    down, right = step * dy // L, step * dx // L                # whole pixels,
    rest = step * (dy + dx) - L * (down + right)                # and L-ths of one, along the shorter axis
    near = (y + down) * W + x + right
    far = near + (rest > 0) * torch.where(dy.abs() < L, W, 1)
    # Not B[near]: on several threads the gradient of that adds up in another order every time.
    near, far = (B.reshape(-1).index_select(0, at.reshape(-1)).view(at.shape) for at in (near, far))
    return near + rest.to(B.dtype) / L * (far - near)


def semantic_divergence(C: Tensor) -> Tensor:
    r"""Eq. 2: E, the Jensen-Shannon divergence between the class probabilities of two pixels.

    .. math:: E_{i,j} = \frac12 \sum_{n=1}^{N} \Big( C_{i,n} \log_2 \frac{C_{i,n}}{U_{i,j,n}}
              + C_{j,n} \log_2 \frac{C_{j,n}}{U_{i,j,n}} \Big), \quad U_{i,j,n} = \frac{C_{i,n} + C_{j,n}}{2}

    As printed the formula is not 0 at i = j; its name, its symmetry and its range decide (R2).

    Args:
        C: [N, H, W] probabilities in [0, 1] that sum to 1 over the classes (to 1e-2).
    Returns:
        E [HW, HW] in [0, 1], symmetric; 0 where two pixels agree, 1 where they share no class.
    Gradient: to C (first derivatives only); below 2^-24 the logarithms stay as they are at 2^-24.
    Raises: ValueError for another shape or type, or where C is no probability.
    Source: eq. 2, section 3.1.
    """
    _check_probabilities("C", C, "[N, H, W]", 3)
    Ci = C.flatten(1)[:, :, None]                               # [N, HW, 1]
    Cj = C.flatten(1)[:, None, :]                               # [N, 1, HW]
    U = (Ci + Cj) / 2                                           # [N, HW, HW]
    kl_i = (Ci * (_log2(Ci) - _log2(U))).sum(0)                 # [HW, HW]  sum over the classes n
    kl_j = (Cj * (_log2(Cj) - _log2(U))).sum(0)                 # [HW, HW]
    return _unit((kl_i + kl_j) / 2)


def _log2(p: Tensor) -> Tensor:
    # A constant to autograd, and exactly so: in dE the derivatives of the three logarithms cancel.
    return p.detach().clamp_min(TINY).log2()


def region_attention(D: Tensor, E: Tensor) -> Tensor:
    r"""Eq. 3: F, how strongly two pixels belong together.

    .. math:: F_{i,j} = (1 - D_{i,j})(1 - E_{i,j})

    Args:
        D: [HW, HW] in [0, 1], of eq. 1.
        E: [HW, HW] in [0, 1], of eq. 2.
    Returns:
        F [HW, HW] in [0, 1].
    Gradient: to D and E.
    Raises: ValueError for other or different shapes, types, or a value outside [0, 1].
    Source: eq. 3, section 3.1.
    """
    _check_pairs("D", D)
    _check_pairs("E", E)
    _expect(D.shape == E.shape, "E", f"the shape of D, {list(D.shape)}", E)
    return (1 - D) * (1 - E)


def regularize(F: Tensor, Wg: Tensor, size: tuple[int, int]) -> Tensor:
    r"""Eq. 4: F^g, every row of F smoothed over the image (its decision follows in `region_decision`).

    .. math:: F^g = W^g \otimes F

    Row i of F is an H x W map over the pixels j. One kernel for all rows, a cross-correlation with the
    border replicated (R3).

    Args:
        F: [HW, HW] in [0, 1], of eq. 3.
        Wg: [k, k] non-negative, k odd, sum 1 (to 1e-2).
        size: (H, W).
    Returns:
        F^g [HW, HW] in [0, 1], not symmetric.
    Gradient: to F and Wg.
    Raises: ValueError for other shapes, types or values.
    Source: eq. 4, section 3.1.
    """
    _check_pairs("F", F)
    odd = _is_tensor(Wg, 2) and Wg.shape[0] == Wg.shape[1] and Wg.shape[0] % 2 == 1
    _expect(odd, "Wg", "a kernel [k, k], k odd", Wg)
    total = Wg.sum().item() if bool((Wg >= 0).all()) else float("nan")
    _expect(abs(total - 1) <= 1e-2, "Wg", "weights >= 0 that sum to 1", f"a sum of {total:g}")
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    _expect(pair and size[0] * size[1] == len(F), "size", f"(H, W) with HW = {len(F)}", size)
    return _smooth(F, Wg, size)


def _smooth(rows: Tensor, Wg: Tensor, size: tuple[int, int]) -> Tensor:
    H, W = size
    k = len(Wg)
    maps = rows.view(1, -1, H, W)                               # [1, rows, H, W]
    maps = nn.functional.pad(maps, (k // 2,) * 4, mode="replicate")[0]   # [rows, H + k - 1, W + k - 1]
    shifted = (Wg[a, b] * maps[:, a:a + H, b:b + W] for a in range(k) for b in range(k))
    return sum(shifted).view(-1, H * W)                         # [rows, HW]


def region_decision(Fg: Tensor, threshold: float = 0.8) -> Tensor:
    r"""Eq. 4: G, whether two pixels are grouped.

    .. math:: G_{i,j} = \frac12 \mathrm{sgn}\Big(\frac{F^g_{i,j} + F^g_{j,i}}{2} - \tau\Big) + \frac12,
              \quad \mathrm{sgn}(0) = -1

    The paper has no threshold; without one all pixels are one region, since F^g >= 0 (R3).

    Args:
        Fg: [HW, HW] in [0, 1], of `regularize`.
        threshold: tau in [0, 1].
    Returns:
        G [HW, HW] bool, symmetric.
    Gradient: none; a decision has no slope.
    Raises: ValueError for another shape, type or value.
    Source: eq. 4, section 3.1.
    """
    _check_pairs("Fg", Fg)
    _check_threshold(threshold)
    return (Fg + Fg.T) / 2 > threshold


def connected_regions(G: Tensor) -> Tensor:
    r"""The regions R_q: the connected components of the graph whose edges are G_ij = 1.

    G is symmetric but not transitive, so two pixels with G_ij = 0 can share a region (R4).

    Args:
        G: [HW, HW] bool, symmetric, of `region_decision`.
    Returns:
        labels [HW] int64: 0..Q-1, numbered by their first pixel.
    Gradient: none.
    Raises: ValueError where G is no symmetric matrix of bool.
    Source: section 3.1, below eq. 4.
    """
    _expect(_is_tensor(G, 2, torch.bool) and G.shape[0] == G.shape[1] > 0, "G", "a bool tensor [HW, HW]", G)
    _expect(torch.equal(G, G.T), "G", "a symmetric matrix", "one with G_ij != G_ji")
    return _components(G)


def _components(G: Tensor) -> Tensor:
    n = len(G)
    first = torch.arange(n, dtype=torch.int32, device=G.device)     # [HW]  the lowest pixel known to be connected
    while True:
        seen = torch.cat([torch.where(edges, first, n).amin(1) for edges in G.split(256)])  # over the neighbours
        seen = torch.minimum(seen, first)                           # [HW]
        # Whole trees move, not pixels: that and full pointer jumping need about log(HW) rounds.
        last, first = first, first.scatter_reduce(0, first.long(), seen, "amin")
        while not torch.equal(first, first[first.long()]):
            first = first[first.long()]
        if torch.equal(first, last):
            break
    return ((first == torch.arange(n, device=G.device)).cumsum(0) - 1)[first.long()]


# ---------------------------------------------------------------------------------------------------------
# Section 3.2: the region interaction block
# ---------------------------------------------------------------------------------------------------------

def representative_score(Fg: Tensor, labels: Tensor) -> Tensor:
    r"""Eq. 5: J, how well a pixel stands for its region.

    .. math:: J_i = \frac{1}{|R_q|} \sum_{j \in R_q} F^g_{i,j}, \quad i \in R_q

    The mean runs over all of R_q, i included (R5).

    Args:
        Fg: [HW, HW] in [0, 1], of eq. 4.
        labels: [HW] int64, of `connected_regions`.
    Returns:
        J [HW] in [0, 1].
    Gradient: to Fg; through J alone do eqs. 5-8 teach W^g, B and C.
    Raises: ValueError for other shapes, types or values.
    Source: eq. 5, section 3.2.
    """
    _check_pairs("Fg", Fg)
    _check_labels(labels, len(Fg))
    same = labels[:, None] == labels                            # [HW, HW]
    return _unit((Fg * same).sum(1) / same.sum(1))              # [HW]  over the pixels j of i's region


def select_representatives(J: Tensor, labels: Tensor, K: int) -> Tensor:
    r"""phi(R_q): the K pixels of each region with the highest scores.

    Smaller regions give all their pixels; ties go to the lower-numbered pixel (R6).

    Args:
        J: [HW] in [0, 1], of eq. 5.
        labels: [HW] int64, of `connected_regions`.
        K: representatives a region, at least 1.
    Returns:
        reps [P] int64: pixel numbers, by region, then by falling J.
    Gradient: none.
    Raises: ValueError for other shapes, types or values.
    Source: section 3.2, below eq. 5.
    """
    _check_labels(labels)
    _check_scores("J", J, "[HW]", 1, length=len(labels))
    _check_count("K", K)
    order = J.argsort(descending=True, stable=True)             # [HW]
    order = order[labels[order].argsort(stable=True)]           # [HW]  by region, then by falling J
    size = labels.bincount()                                    # [Q]
    start = (size.cumsum(0) - size)[labels[order]]              # [HW]  where its region starts in this order
    rank = torch.arange(len(J), device=J.device) - start        # [HW]  within the region
    return order[rank < K]                                      # [P]


def intra_region_collection(A: Tensor, J: Tensor, labels: Tensor, reps: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eq. 6: A^l, what each representative collects from the other pixels of its region.

    .. math:: A^l_{q,k} = J(p_{q,k}) A(p_{q,k}) + \sum_{i \in R_q \setminus \phi(R_q)} W^l_{q,k,i} (J_i A_i), \quad
              W^l_{q,k,i} = \frac{\exp(A(p_{q,k}) (J_i A_i)^\top)}
                                 {\sum_{j \in R_q \setminus \phi(R_q)} \exp(A(p_{q,k}) (J_j A_j)^\top)}

    Where every pixel of a region is a representative the sum is empty, and 0 (R7).

    Args:
        A: [HW, M] features.
        J: [HW] in [0, 1], of eq. 5.
        labels: [HW] int64, of `connected_regions`.
        reps: [P] int64, of `select_representatives`.
    Returns:
        A^l [P, M], and the weights W^l [P, HW], 0 outside their set.
    Gradient: to A and J.
    Raises: ValueError for other shapes, types or values.
    Source: eq. 6, section 3.2.
    """
    _check_features("A", A, labels, J)
    _check_representatives(reps, labels)
    JA = J[:, None] * A                                         # [HW, M]  what each pixel sends
    others = labels[reps][:, None] == labels                    # [P, HW]  of the same region,
    others[:, reps] = False                                     #          and no representatives
    Wl = _masked_softmax(A[reps] @ JA.T, others)                # [P, HW]  softmax over those pixels i
    return JA[reps] + Wl @ JA, Wl                               # [P, M]


def inter_region_interaction(Al: Tensor, J: Tensor, labels: Tensor, reps: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eq. 7: A^g, what each representative receives from those of the other regions.

    .. math:: A^g_{q,k} = J(p_{q,k}) A^l_{q,k}
              + \sum_{s \neq q,\, i \in \phi(R_s)} W^g_{q,s,k,i} (J(p_{s,i}) A^l_{s,i}), \quad
              W^g_{q,s,k,i} = \frac{\exp(A^l_{q,k} (J(p_{s,i}) A^l_{s,i})^\top)}
                                   {\sum_{p_{s,j} \in \phi(R_s)} \exp(A^l_{q,k} (J(p_{s,j}) A^l_{s,j})^\top)}

    The weights are normalised for each source region s on its own and the sum over s is not divided by
    Q - 1, as printed (R8): |A^g| grows with Q.

    Args:
        Al: [P, M], of eq. 6.
        J: [HW] in [0, 1], of eq. 5.
        labels: [HW] int64, of `connected_regions`.
        reps: [P] int64, of `select_representatives`.
    Returns:
        A^g [P, M], and the weights W^g (here Wi) [P, P], 0 within a region.
    Gradient: to A^l and J.
    Raises: ValueError for other shapes, types or values.
    Source: eq. 7, section 3.2.
    """
    _check_labels(labels)
    _check_scores("J", J, "[HW]", 1, length=len(labels))
    _check_representatives(reps, labels)
    _check_matrix("Al", Al, len(reps))
    JAl = J[reps][:, None] * Al                                 # [P, M]  what each representative sends
    region = labels[reps]                                       # [P]
    logits = Al @ JAl.T                                         # [P, P]  from the source r (column) to p (row)
    source = region.expand_as(logits)                           # [P, P]
    Q = int(region.max()) + 1
    top = logits.new_zeros(len(reps), Q).scatter_reduce(1, source, logits.detach(), "amax", include_self=False)
    exp = (logits - top.gather(1, source)).exp()                # [P, P]
    total = logits.new_zeros(len(reps), Q).scatter_add(1, source, exp)   # [P, Q]  over the representatives r of s
    Wi = exp / total.gather(1, source) * (region[:, None] != region)     # [P, P]  softmax within s, for s != q
    return JAl + Wi @ JAl, Wi                                   # [P, M]


def intra_region_distribution(A: Tensor, Ag: Tensor, J: Tensor, labels: Tensor,
                              reps: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eq. 8: O, what each pixel receives from the representatives of its region.

    .. math:: O_i = J_i A_i + \sum_{p_{q,k} \in \phi(R_q)} W^d_{q,k,i} (J(p_{q,k}) A^g_{q,k}), \quad
              W^d_{q,k,i} = \frac{\exp(A_i (J(p_{q,k}) A^g_{q,k})^\top)}
                                 {\sum_{p_{q,j} \in \phi(R_q)} \exp(A_i (J(p_{q,j}) A^g_{q,j})^\top)}

    Args:
        A: [HW, M] features.
        Ag: [P, M], of eq. 7.
        J: [HW] in [0, 1], of eq. 5.
        labels: [HW] int64, of `connected_regions`.
        reps: [P] int64, of `select_representatives`.
    Returns:
        O [HW, M], and the weights W^d [HW, P], 0 outside the pixel's region.
    Gradient: to A, A^g and J.
    Raises: ValueError for other shapes, types or values.
    Source: eq. 8, section 3.2.
    """
    _check_features("A", A, labels, J)
    _check_representatives(reps, labels)
    _check_matrix("Ag", Ag, len(reps), A.shape[1])
    JAg = J[reps][:, None] * Ag                                 # [P, M]   what each representative sends
    same = labels[:, None] == labels[reps]                      # [HW, P]
    Wd = _masked_softmax(A @ JAg.T, same)                       # [HW, P]  softmax over those of its region
    return J[:, None] * A + Wd @ JAg, Wd                        # [HW, M]


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax of each row over the entries where mask is True; 0 elsewhere, and in a row that has none."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(1) * mask


def _unit(x: Tensor) -> Tensor:
    # Rounding can carry a value just past [0, 1]; its gradient is right all the same.
    return x + (x.clamp(0, 1) - x).detach()


# ---------------------------------------------------------------------------------------------------------
# RCB and RIB for batches: the same numbers and gradients in little memory
# ---------------------------------------------------------------------------------------------------------

class Regions(NamedTuple):
    """What `RCB` makes of an image and `RIB` works on."""
    labels: Tensor   # [b, H, W] int64: the region of each pixel, 0..Q-1
    scores: Tensor   # [b, H, W] in [0, 1]: J, eq. 5


class RCB(nn.Module):
    r"""The region construction block, eqs. 1-5: cuts each image of a batch into regions.

    It takes one image at a time, or a few small ones, and holds one [HW, HW] matrix of B's type and one of
    bool in the forward pass, one of a byte an entry (two from 257 pixels a side on) in the backward pass, and
    nothing of that size between them.

    Args:
        kernel_size: k of W^g, odd. W^g is the softmax of k x k logits, so that F^g and J stay in [0, 1]; at
            the start its centre weighs 0.87 (k = 3). With k = 1 there is no parameter and F^g = F.
        threshold: tau of eq. 4.
        cues: "both", or "boundary" (F = 1 - D) or "semantic" (F = 1 - E), as in Table 1 (R10).
        joint: False stops the gradient of J at B and C; W^g still receives it.
    Gradient: J's to B, C and W^g (first derivatives only); labels carry none.
    Raises: ValueError for impossible arguments, other shapes or types; for values on the CPU alone, since on
        a GPU it would have to wait for them.
    Source: section 3.1 and Figure 3; eq. 5 is from section 3.2.
    """

    def __init__(self, kernel_size: int = 3, threshold: float = 0.8, cues: str = "both", joint: bool = True):
        super().__init__()
        _expect(isinstance(kernel_size, int) and kernel_size > 0 and kernel_size % 2 == 1,
                "kernel_size", "an odd number of pixels", kernel_size)
        _check_threshold(threshold)
        _expect(cues in ("both", "boundary", "semantic"), "cues", "'both', 'boundary' or 'semantic'", repr(cues))
        self.threshold, self.cues, self.joint = threshold, cues, joint
        self.logits = None
        if kernel_size > 1:
            logits = torch.zeros(kernel_size, kernel_size)
            logits[kernel_size // 2, kernel_size // 2] = 4.0
            self.logits = nn.Parameter(logits)

    def kernel(self) -> Tensor:
        """W^g [k, k]: a softmax over all k x k logits."""
        if self.logits is None:
            return torch.ones(1, 1)
        return self.logits.flatten().softmax(0).view_as(self.logits)

    def forward(self, B: Tensor, C: Tensor) -> Regions:
        """B [b, H, W] in [0, 1] and C [b, N, H, W], probabilities over N, to labels and scores [b, H, W]."""
        _check_scores("B", B, "[b, H, W]", 3, values=not B.is_cuda)
        _check_probabilities("C", C, "[b, N, H, W]", 4, values=not C.is_cuda)
        _expect(C[:, 0].shape == B.shape, "C", f"the b, H, W of B, {list(B.shape)}", C)
        with torch.autocast(B.device.type, enabled=False):
            B, C = _at_least_float32(B), _at_least_float32(C)
            if not self.joint:
                B, C = B.detach(), C.detach()
            Wg = self.kernel().to(B)
            few = max(1, 2 ** 22 // B[0].numel() ** 2)          # small images go together, to save on calls
            with torch.no_grad():
                parts = zip(B.split(few), C.split(few))
                parts = [_construct(b, c, Wg, self.threshold, self.cues) for b, c in parts]
            labels, J = map(torch.cat, zip(*parts))             # [b, HW]
            images = zip(B, C, J, labels)
            J = torch.stack([_ScoreGradient.apply(b, c, Wg, j, q, self.cues) for b, c, j, q in images])
        return Regions(labels.view(B.shape), J.view(B.shape))


def _construct(B: Tensor, C: Tensor, Wg: Tensor, threshold: float, cues: str) -> tuple[Tensor, Tensor]:
    """Eqs. 1-5 of a few images [b, H, W] and [b, N, H, W] without autograd: labels and J [b, HW]."""
    H, W = B.shape[1:]
    n = H * W
    buffers = B.new_empty(len(B), n, n)                         # [b, HW, HW]  hold D, then F, then F^g
    if cues == "semantic":
        buffers.zero_()
    else:
        _walk_lines(buffers, B, max(H, W))
    labels, J = [], []
    for F, c in zip(buffers, C.flatten(2)):                     # [HW, HW], [N, HW]
        for a in range(0, n, 64):                               # 64 rows stay in the processor's cache
            z = min(a + 64, n)
            E = 0 if cues == "boundary" else _pair_divergence(c[:, a:z], c[:, a:]).clamp_(0, 1)
            F[a:z, a:] = (1 - F[a:z, a:]) * (1 - E)             # [rows, HW - a]
            F[a:z, a:z] = F[a:z, a:z].triu() + F[a:z, a:z].triu(1).T    # up to here only i <= j is filled
            F[z:, a:z] = F[a:z, z:].T
            if len(Wg) > 1:
                F[a:z] = _smooth(F[a:z], Wg, (H, W))
        G = torch.empty(n, n, dtype=torch.bool, device=B.device)    # [HW, HW]
        for a in range(0, n, 64):
            g = (F[a:a + 64, a:] + F[a:, a:a + 64].T) / 2 > threshold       # [rows, HW - a]
            G[a:a + 64, a:], G[a:, a:a + 64] = g, g.T
        q = _components(G)                                      # [HW]
        total = torch.cat([(F[a:a + 64] * (q[a:a + 64, None] == q)).sum(1) for a in range(0, n, 64)])   # [HW]
        labels.append(q)
        J.append((total / q.bincount()[q]).clamp_(0, 1))        # mean over the pixels j of i's region
    return torch.stack(labels), torch.stack(J)


def _walk_lines(out: Tensor, B: Tensor, reach: int, steps: bool = False) -> None:
    """Eq. 1 of images B [b, H, W] into out[:, i, j] for i <= j, or (steps) the first step where it is highest.

    Lines of more than `reach` steps are left out. All lines of the same L (steps along the longer axis) and
    rise (pixels along the shorter) are walks of one pattern: with the shorter axis laid out at every L-th of
    a pixel in T, step s of the line from (y, x) is T[y L + s rise, x + s]. That is a strided view, and one
    maximum over s serves every start.
    """
    b, H, W = B.shape
    n = H * W
    out.diagonal(0, 1, 2).copy_(torch.zeros_like(B).flatten(1) if steps else B.flatten(1))
    stride = {"y": n * W + W, "x": n + 1}                       # in out, of i and j moving together
    for field, rows, cols, x_dim in ((B, "y", "x", -1), (B.mT, "x", "y", -2)):  # the longer axis is cols
        h, w = field.shape[1:]
        for L in range(1, min(w - 1, reach) + 1):
            part = torch.arange(L, device=B.device).to(B.dtype)[:, None] / L    # [L, 1]
            T = (field[:, :-1, None] + part * field.diff(dim=1)[:, :, None]).flatten(1, 2)
            T = torch.cat((T, field[:, -1:]), 1)                # [b, (h-1) L + 1, w]
            T = torch.stack((T, T.flip(x_dim)))         # [2, b, (h-1) L + 1, w]  towards higher x, and lower
            wide = -(-(w - L) // 64) * 64               # amax is several times faster on rows of whole 64s
            padded = nn.functional.pad(T.flatten(), (0, wide))
            for rise in range(min(L, h - 1) + 1):
                shape, strides = (2, b, L + 1, h - rise, wide), (*T.stride()[:2], rise * w + 1, L * w, 1)
                walks = padded.as_strided(shape, strides)
                best = walks[..., :w - L].max(2)[1] if steps else walks.amax(2)     # over s
                forth, back = best[..., :w - L]                 # [b, h - rise, w - L]
                dy, dx = (rise, L) if cols == "x" else (L, rise)
                strides = n * n, stride[rows], stride[cols]
                out.as_strided(forth.shape, strides, dy * W + dx).copy_(forth)          # (y, x) to (y + dy, x + dx)
                back = back.flip(x_dim)
                out.as_strided(forth.shape, strides, dy * W + dx * n).copy_(back)       # (y, x + dx) to (y + dy, x)


def _pair_divergence(Ci: Tensor, Cj: Tensor) -> Tensor:
    """Eq. 2 for pairs: [N, I] and [N, J] to [I, J], as entropies: one logarithm a class and pair.
    2 E = sum over n of C_i (1 + log C_i) + C_j (1 + log C_j) - 2 U log 2 U."""
    E = (Ci * (1 + _log2(Ci))).sum(0)[:, None] + (Cj * (1 + _log2(Cj))).sum(0)   # [I, J]
    for ci, cj in zip(Ci, Cj):
        U2 = ci[:, None] + cj                                   # [I, J]
        E.addcmul_(U2, U2.detach().clamp_min(2 * TINY).log2_(), value=-1)
    return E / 2


class _ScoreGradient(torch.autograd.Function):
    """Hands J through; backward differentiates eqs. 1-5 on the pairs that J depends on, block by block."""

    @staticmethod
    def forward(ctx, B, C, Wg, J, labels, cues):
        ctx.save_for_backward(B, C, Wg, labels)
        ctx.cues = cues
        return J.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dJ):
        *inputs, labels = ctx.saved_tensors
        B, C, Wg = leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, ctx.needs_input_grad)]
        H, W = B.shape
        order = labels.argsort(stable=True)                     # [HW]  pixels by region
        size = labels.bincount()                                # [Q]
        steps = None
        if ctx.cues != "semantic":
            # No line is longer than the widest region, and as much of its surroundings as W^g sees.
            pixel = torch.arange(H * W, device=B.device)
            ends = [[size.scatter_reduce(0, labels, at, side, include_self=False) for side in ("amax", "amin")]
                    for at in (pixel // W, pixel % W)]          # [Q] each: of the regions' rows and columns
            reach = max(int((last - first).max()) for last, first in ends) + len(Wg) // 2
            kind = torch.uint8 if max(H, W) <= 256 else torch.int16
            steps = torch.empty(H * W, H * W, dtype=kind, device=B.device)
            _walk_lines(steps[None], B.detach()[None], reach, steps=True)
        # A block has about 128 rows at most and about 2^22 numbers: its pairs times the classes.
        cost = size[labels[order]].clamp_min(2 ** 15 // len(C)) * len(C)        # [HW]
        blocks = (cost.cumsum(0) // 2 ** 22).unique_consecutive(return_counts=True)[1].tolist()
        with torch.enable_grad(), torch.autocast(dJ.device.type, enabled=False):
            for rows in order.split(blocks):
                J = _block_scores(B, C, Wg, rows, order, labels, size, steps, ctx.cues)
                J.backward(dJ[rows])                            # adds to the gradients of the leaves
        return *(leaf.grad for leaf in leaves), None, None, None


def _block_scores(B, C, Wg, rows, order, labels, size, steps, cues):
    """J of the pixels `rows` (by region), as sum_j share_j F_ij / |R_q|: eq. 4 is carried over from F^g to F.

    share_j = sum of W^g over the offsets that bring a pixel of R_q to j, border replicated: the adjoint of
    `_smooth` on the indicator of R_q. It is 0 but on R_q and k // 2 pixels around, the columns used here.
    """
    H, W = B.shape
    k = len(Wg)
    region = labels[rows]                                       # [rows]
    low, high = region[0], region[-1]
    members = order[(labels[order] >= low) & (labels[order] <= high)]   # [members]  all pixels of these regions
    d = torch.arange(k, device=B.device) - k // 2
    y = (members // W + d[:, None, None]).clamp(0, H - 1)       # [k, 1, members]
    x = (members % W + d[:, None]).clamp(0, W - 1)              # [k, members]
    cols, at = (y * W + x).flatten(0, 1).unique(return_inverse=True)    # [cols], [k k, members]
    at = at + (labels[members] - low) * len(cols)
    share = Wg.new_zeros((int(high - low) + 1) * len(cols))
    share = share.scatter_add(0, at.flatten(), Wg.reshape(-1, 1).expand_as(at).flatten())    # over a region's pixels
    share = share.view(-1, len(cols)).index_select(0, region - low)         # [rows, cols]
    D = E = 0
    if cues != "semantic":
        step = steps[torch.minimum(rows[:, None], cols), torch.maximum(rows[:, None], cols)]
        D = _on_line(B, rows[:, None], cols, step.long())                               # [rows, cols]
    if cues != "boundary":
        E = _pair_divergence(C.flatten(1)[:, rows], C.flatten(1)[:, cols])              # [rows, cols]
    F = (1 - D) * (1 - E)
    return (F * share).sum(1) / size[region]                    # [rows]  over the columns j


class RIB(nn.Module):
    r"""The region interaction block, eqs. 6-8: exchanges context between the regions of each image.

    It has no parameters. Dense weights are made for a few regions at a time in eqs. 6 and 8, and in eq. 7
    only from regions of two or more representatives, since a single one has weight 1 for everyone. At worst,
    with small regions of two pixels and more alone, that is a [P, P] matrix with P = HW.

    Args:
        k: K, the representatives a region (no kernel size).
        intra: False takes eqs. 6 and 8 out: A^l = J A, and A^g reaches the representatives alone (R10).
        inter: False takes eq. 7 out: A^g = J A^l (R10).
    Gradient: to A and to the scores of the regions.
    Raises: ValueError for impossible arguments, other shapes or types.
    Source: section 3.2 and Figure 4.
    """

    def __init__(self, k: int = 8, intra: bool = True, inter: bool = True):
        super().__init__()
        _check_count("k", k)
        self.k, self.intra, self.inter = k, intra, inter

    def forward(self, A: Tensor, regions: Regions) -> Tensor:
        """A [b, M, H, W] and the regions of `RCB` to O [b, M, H, W], of A's type."""
        labels, scores = regions
        _expect(_is_tensor(A, 4) and A.is_floating_point(), "A", "floating-point features [b, M, H, W]", A)
        for name, map_ in (("labels", labels), ("scores", scores)):
            _expect(_is_tensor(map_, 3) and map_.shape == A[:, 0].shape, f"regions.{name}",
                    f"the b, H, W of A, {list(A[:, 0].shape)}", map_)
        with torch.autocast(A.device.type, enabled=False):
            pixels = _at_least_float32(A).flatten(2).mT         # [b, HW, M]
            images = zip(pixels, scores.flatten(1).to(pixels.dtype), labels.flatten(1))
            O = torch.stack([self._one_image(*image) for image in images])   # [b, HW, M]
        return O.mT.reshape(A.shape).to(A.dtype)

    def _one_image(self, A: Tensor, J: Tensor, labels: Tensor) -> Tensor:
        reps = select_representatives(J.detach(), labels, self.k)            # [P]
        # Eqs. 6 and 8 stay within a region, so they are taken on a few whole regions at a time: pixels
        # are put in the order of their regions, as the representatives are, and both are cut alike.
        order = labels.argsort(stable=True)                     # [HW]
        place = order.argsort()                                 # [HW]  of each pixel in that order
        size = labels.bincount()                                # [Q]
        part = (size.cumsum(0) - size) // 1024                  # [Q]   regions that start within 1024 pixels
        cuts = [part[labels[x]].unique_consecutive(return_counts=True)[1].tolist() for x in (order, reps)]
        parts = []
        for pixels, chosen in zip(order.split(cuts[0]), reps.split(cuts[1])):
            own = labels[pixels] - labels[pixels[0]]            # 0, 1, ... within the part
            parts.append((A[pixels], J[pixels], own, place[chosen] - place[pixels[0]]))
        if self.intra:
            Al = torch.cat([intra_region_collection(a, j, own, r)[0] for a, j, own, r in parts])   # [P, M]
        else:
            Al = (J[:, None] * A)[reps]                         # [P, M]
        Jp = J[reps]                                            # [P]
        Ag = _interaction(Al, Jp, labels[reps]) if self.inter else Jp[:, None] * Al             # [P, M]
        if not self.intra:
            return (J[:, None] * A).index_add(0, reps, Jp[:, None] * Ag)
        shares = Ag.split(cuts[1])
        O = [intra_region_distribution(a, ag, j, own, r)[0] for (a, j, own, r), ag in zip(parts, shares)]
        return torch.cat(O)[place]                              # [HW, M]


def _interaction(Al: Tensor, J: Tensor, region: Tensor) -> Tensor:
    """Eq. 7 for representatives with scores J [P] and regions [P], without the dense weights."""
    JAl = J[:, None] * Al                                       # [P, M]
    peers = region.bincount()[region]                           # [P]  representatives in the same region
    alone = JAl * (peers == 1)[:, None]
    Ag = JAl + alone.sum(0) - alone                             # [P, M]  a softmax over one is 1
    for count in peers[peers > 1].unique().tolist():
        source = JAl[peers == count]                            # [S count, M]  S regions of `count` each
        name = region[peers == count][::count]                  # [S]
        logits = (Al @ source.T).unflatten(1, (-1, count))      # [P, S, count]
        own = (region[:, None] == name)[..., None]              # [P, S, 1]
        weights = logits.softmax(2).masked_fill(own, 0)         # softmax over the representatives of each source
        Ag = Ag + weights.flatten(1) @ source
    return Ag


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------------------------
# Section 4: the network and its loss
# ---------------------------------------------------------------------------------------------------------

class Output(NamedTuple):
    """What `RANet` returns."""
    fine: Tensor               # [b, N, h, w] logits of the segmentation
    coarse: Tensor             # [b, N, h, w] logits of C
    boundary: Tensor           # [b, H, W]    logits of B
    regions: Regions | None    # None with another context in RCB's and RIB's place


class RANet(nn.Module):
    r"""The network: backbone, A, B, C, `RCB`, `RIB`, and the segmentation from [A, BN(O)].

    O is batch-normalised before it meets A: |O| grows with the number of regions, and else the fine loss
    can shrink it by raising B, towards a region for every pixel (R14). B starts at 0.05, so the first steps
    see one region and no inter-region context (R13).

    Args:
        backbone: a module from images [b, 3, h, w] to features [b, in_channels, H, W]. Stride 8 in the paper.
        in_channels: the channels of these features.
        num_classes: N.
        channels: M.
        k, kernel_size, threshold, cues, joint, intra, inter: see `RIB` and `RCB`.
        dropout: the share of feature channels dropped before the classifier.
        context: a module from A [b, M, H, W] to O [b, M, H, W] that takes the place of RCB and RIB.
    Raises: ValueError for impossible arguments, images or features.
    Source: section 4; Figures 1-4.
    """

    def __init__(self, backbone: nn.Module, in_channels: int, num_classes: int, channels: int = 512, *,
                 k: int = 8, kernel_size: int = 3, threshold: float = 0.8, cues: str = "both", joint: bool = True,
                 intra: bool = True, inter: bool = True, dropout: float = 0.1, context: nn.Module | None = None):
        super().__init__()
        for name, count in (("in_channels", in_channels), ("num_classes", num_classes), ("channels", channels)):
            _check_count(name, count)
        self.backbone = backbone
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.boundary = nn.Conv2d(channels, 1, 1)
        self.semantic = nn.Conv2d(channels, num_classes, 1)
        nn.init.constant_(self.boundary.bias, -2.944)           # the logit of 0.05 (R13)
        self.context = context
        if context is None:
            self.rcb = RCB(kernel_size, threshold, cues, joint)
            self.rib = RIB(k, intra, inter)
        self.norm = nn.BatchNorm2d(channels)
        self.fuse = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Dropout2d(dropout))
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, images: Tensor) -> Output:
        """Images [b, 3, h, w] of any size to `Output`."""
        ok = _is_tensor(images, 4) and images.is_floating_point()
        _expect(ok, "images", "floating-point [b, 3, h, w]", images)
        features = self.backbone(images)                        # [b, in_channels, H, W]
        in_channels = self.reduce[0].in_channels
        _expect(_is_tensor(features, 4) and features.shape[1] == in_channels,
                "backbone", f"a module that returns [b, {in_channels}, H, W]", features)
        A = self.reduce(features)                               # [b, M, H, W]
        boundary = self.boundary(A)[:, 0]                       # [b, H, W]
        coarse = self.semantic(A)                               # [b, N, H, W]
        if self.context is None:
            B = _at_least_float32(boundary).sigmoid()           # [b, H, W]
            C = _at_least_float32(coarse).softmax(1)            # [b, N, H, W]  over the classes
            regions = self.rcb(B, C)
            O = self.rib(A, regions)                            # [b, M, H, W]
        else:
            regions, O = None, self.context(A)
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

    Each is a mean over the labelled pixels; B's, over the cells of its grid that hold a labelled pixel,
    with the mask max-pooled to that grid (R11). The paper gives no weights: they are equal (R12).

    Args:
        output: of `RANet`.
        label: [b, h, w] int64, a class 0..N-1 or 255 for ignored.
        mask: [b, h, w], 1 on the boundary, 0 off it, 255 for ignored.
        weights: of the fine, coarse and boundary loss in the total.
        counts: what to divide by, see `label_counts`; None: this batch's. With n processes that average
            their gradients, the sum of their counts, divided by n.
    Gradient: to the output's logits; to B and C also through O (R4).
    Raises: ValueError for other shapes, types or labels.
    Source: section 4.
    """
    N = output.fine.shape[1]
    _expect(_is_tensor(label, 3, torch.int64) and label.shape == output.fine[:, 0].shape,
            "label", f"int64 of shape {list(output.fine[:, 0].shape)}", label)
    _expect(_is_tensor(mask, 3) and mask.shape == label.shape, "mask", f"label's shape, {list(label.shape)}", mask)
    if not label.is_cuda:
        bad = label[((label < 0) | (label >= N)) & (label != 255)]
        _expect(len(bad) == 0, "label", f"0..{N - 1} or 255", bad[:1].tolist())
    pixels, cells = label_counts(label, mask, output.boundary.shape[1:]) if counts is None else counts
    fine, coarse = (nn.functional.cross_entropy(_at_least_float32(x), label, ignore_index=255, reduction="sum")
                    / pixels.clamp_min(1) for x in (output.fine, output.coarse))   # mean over the labelled pixels
    target, labelled = pool_boundary(mask, output.boundary.shape[1:])
    boundary = nn.functional.binary_cross_entropy_with_logits(
        _at_least_float32(output.boundary), target, weight=labelled, reduction="sum")
    boundary = boundary / cells.clamp_min(1)                    # mean over the labelled cells
    total = weights[0] * fine + weights[1] * coarse + weights[2] * boundary
    return Loss(total, fine, coarse, boundary)


def pool_boundary(mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The boundary mask [b, h, w] on B's grid: two [b, H, W] of 0 and 1, boundary and labelled cells (R11)."""
    pool = nn.functional.adaptive_max_pool2d
    return pool((mask == 1).float(), size), pool((mask != 255).float(), size)


def label_counts(label: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[2]: how many pixels are labelled, and how many cells of B's grid of that size."""
    return torch.stack(((label != 255).sum(), pool_boundary(mask, size)[1].sum())).float()


# ---------------------------------------------------------------------------------------------------------
# Bad input: one line that names the argument, what was expected and what came
# ---------------------------------------------------------------------------------------------------------

def _expect(ok: bool, name: str, expected: str, got) -> None:
    if not ok:
        if isinstance(got, Tensor):
            got = f"{str(got.dtype).removeprefix('torch.')} {list(got.shape)}"
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _is_tensor(x, dims: int, dtype: torch.dtype | None = None) -> bool:
    return isinstance(x, Tensor) and x.dim() == dims and 0 not in x.shape and dtype in (None, x.dtype)


def _check_scores(name: str, x: Tensor, shape: str, dims: int, values: bool = True, length: int | None = None):
    _expect(_is_tensor(x, dims) and x.is_floating_point(), name, f"floating-point scores {shape}", x)
    _expect(length in (None, len(x)), name, f"a score for each of {length} pixels", x)
    if values:
        low, high = (bound.item() for bound in x.detach().aminmax())
        fine = low >= -1e-6 and high <= 1 + 1e-6                # what rounding may add; NaN fails
        _expect(fine, name, "scores in [0, 1]", f"values from {low:g} to {high:g}")


def _check_probabilities(name: str, x: Tensor, shape: str, dims: int, values: bool = True) -> None:
    _check_scores(name, x, shape, dims, values)
    if values:
        sums = x.detach().sum(-3)                               # over the classes
        worst = sums.flatten()[(sums - 1).abs().argmax()].item()
        _expect(abs(worst - 1) <= 1e-2, name, "a sum of 1 over the classes", f"a sum of {worst:g}")


def _check_pairs(name: str, x: Tensor) -> None:
    _check_scores(name, x, "[HW, HW]", 2)
    _expect(x.shape[0] == x.shape[1], name, "a square matrix [HW, HW]", x)


def _check_matrix(name: str, x: Tensor, rows: int, columns: int | None = None) -> None:
    _expect(_is_tensor(x, 2) and x.is_floating_point() and len(x) == rows and columns in (None, x.shape[1]),
            name, f"floating-point [{rows}, {columns or 'M'}]", x)
    _expect(bool(x.isfinite().all()), name, "finite features", "inf or nan")


def _check_labels(labels: Tensor, length: int | None = None) -> None:
    _expect(_is_tensor(labels, 1, torch.int64) and length in (None, len(labels)),
            "labels", f"int64 [{length or 'HW'}]", labels)
    low, high = int(labels.min()), int(labels.max())
    ok = low == 0 and high < len(labels) and bool((labels.bincount() > 0).all())
    _expect(ok, "labels", "regions 0..Q-1, none of them empty", f"numbers from {low} to {high}")


def _check_features(name: str, A: Tensor, labels: Tensor, J: Tensor) -> None:
    _check_labels(labels)
    _check_matrix(name, A, len(labels))
    _check_scores("J", J, "[HW]", 1, length=len(labels))


def _check_representatives(reps: Tensor, labels: Tensor) -> None:
    _expect(_is_tensor(reps, 1, torch.int64), "reps", "int64 [P]", reps)
    inside = int(reps.min()) >= 0 and int(reps.max()) < len(labels)
    _expect(inside, "reps", f"pixels 0..{len(labels) - 1}", f"numbers from {int(reps.min())} to {int(reps.max())}")
    by_region = bool((labels[reps].diff() >= 0).all()) and len(labels[reps].unique()) == int(labels.max()) + 1
    ok = by_region and len(reps.unique()) == len(reps)
    _expect(ok, "reps", "different pixels of every region, by region", reps.tolist()[:9])


def _check_threshold(threshold: float) -> None:
    ok = isinstance(threshold, (int, float)) and 0 <= threshold <= 1
    _expect(ok, "threshold", "a number in [0, 1]", repr(threshold))


def _check_count(name: str, count: int) -> None:
    ok = isinstance(count, int) and not isinstance(count, bool) and count > 0
    _expect(ok, name, "a positive whole number", repr(count))
