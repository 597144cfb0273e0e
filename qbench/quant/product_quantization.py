"""Implements product quantization, which represents each sub-vector of weights by a codeword.

k-means on the weights finds the codewords. They can then be fitted to the responses of the layer. A response is the
vector of a layer's outputs at one position of one image.

k-means is initialized by k-means++ with a fixed seed, and computes in float64. The codes therefore depend only on the
weights, not on the state of the random number generators. scikit-learn is not used, because it is slow to import and
starts its own threads. If sub-vectors are single weights, the clustering is exact.

Shapes contain these letters: Ct output channels, Cs input channels per group, kernels of kh x kw, P = kh kw kernel
positions, G groups of a convolution, T = Ct / G outputs per group, M subspaces of s weights each, K codewords per
subspace, N responses.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.quant.kmeans import kmeans

ITERATIONS = 50
"""Number of iterations of Lloyd's algorithm."""

SWEEPS = 3
"""Number of sweeps of block-coordinate descent over all subspaces."""

RIDGE = 0.1
"""Strength of the penalty on the distance between quantized and float weights, in units of the inputs' mean square."""


def product_codes(w: Tensor, subspace: int, codewords: int) -> tuple[Tensor, Tensor]:
    """Return the codebooks and codes that k-means finds for weights.

    Args:
        w: weights of shape (Ct, Cs) or (Ct, Cs, kh, kw).
        subspace: number s of weights in a sub-vector.
        codewords: number K of codewords in each codebook.

    Returns:
        codebooks of shape (M, K, s), and codes of shape (Ct, M) or (Ct, kh, kw, M). If a subspace has fewer than K
            distinct sub-vectors, its codebook is padded with NaN.
    """
    parts = subvectors(w.detach(), subspace)
    clusters = [_clusters(part, codewords) for part in parts.flatten(0, -3).transpose(0, 1).double().cpu()]
    codes = torch.stack([labels for _, labels in clusters], -1).reshape(parts.shape[:-1])
    return torch.stack([centers for centers, _ in clusters]).to(w), codes.to(w.device)


def subvectors(w: Tensor, subspace: int) -> Tensor:
    """Return weights (Ct, Cs) or (Ct, Cs, kh, kw) as sub-vectors (Ct, M, s) or (Ct, kh, kw, M, s).

    If the number of input channels is not a multiple of s, input channels of zeros are appended.
    """
    rows = F.pad(w.movedim(1, -1), (0, -w.shape[1] % subspace))
    return rows.reshape(*rows.shape[:-1], -1, subspace)


def decode(codebooks: Tensor, codes: Tensor, channels: int) -> Tensor:
    """Return the weights, of shape (Ct, Cs) or (Ct, Cs, kh, kw), that codes represent. `channels` is Cs."""
    subspaces = torch.arange(len(codebooks), device=codes.device)
    return codebooks[subspaces, codes.long()].flatten(-2)[..., :channels].movedim(-1, 1)


def _clusters(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cluster n points, of shape (n, s), into at most k clusters.

    Returns:
        centers of shape (min(k, n), s), padded with NaN if there are fewer distinct points, and labels of shape (n,).
    """
    centers, labels = torch.unique(points, dim=0, return_inverse=True)
    if len(centers) > k:
        if points.shape[1] == 1:
            scalars = kmeans(points[:, 0], k)
            centers, labels = scalars.centroids[:, None], scalars.labels
        else:
            centers, labels = _lloyd(points, k)
    return F.pad(centers, (0, 0, 0, min(k, len(points)) - len(centers)), value=torch.nan), labels


def _lloyd(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return k centers (k, s) and labels (n,) of points (n, s). More than k points must be distinct."""
    # k-means++: each further center is a random point. The probability of a point is proportional to its squared
    # distance from the nearest center.
    generator, centers = torch.Generator().manual_seed(0), points[:1]
    for _ in range(1, k):
        squared = _squared_distances(points, centers).amin(1)
        centers = torch.cat([centers, points[torch.multinomial(squared, 1, generator=generator)]])
    # Lloyd's algorithm. A center without points moves to the point that is farthest from its nearest center.
    for _ in range(ITERATIONS):
        squared, labels = _squared_distances(points, centers).min(1)
        counts = labels.bincount(minlength=k)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, labels, points)
        centers = torch.where(counts > 0, sums / counts, points[squared.argmax()])
    return centers, _squared_distances(points, centers).argmin(1)


def _squared_distances(points: Tensor, centers: Tensor) -> Tensor:
    return torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist").square()


@torch.no_grad()
def error_corrected(
    codebooks: Tensor, codes: Tensor, w: Tensor, inputs: Tensor, targets: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """Improve codebooks and codes so that the responses of the layer have a smaller error.

    The error is reduced by block-coordinate descent in float64.

    Args:
        codebooks: the initial codebooks, as returned by `product_codes`.
        codes: the initial codes, as returned by `product_codes`.
        w: the float weights. Their distance from the quantized weights is penalized.
        inputs: the inputs of each response, of shape (N, G, P, Cs). For a linear layer, the shape is (N, 1, 1, Cs).
        targets: the desired responses without bias, of shape (N, Ct).
        ridge: strength of the penalty, above 0, in units of the inputs' mean square.
    """
    (m, _, s), (n, g, p, _) = codebooks.shape, inputs.shape
    # Compute the Gram matrix of the inputs for each group, and add the ridge to its diagonal.
    x = subvectors(inputs.double().flatten(0, 2), s).reshape(n, g, -1).transpose(0, 1)
    gram = x.mT @ x / n
    padded = m * s / inputs.shape[3]  # the columns of zeros beside the inputs do not count
    pull = ridge * (gram.diagonal(dim1=1, dim2=2).mean() * padded).clamp(min=1e-12)
    gram.diagonal(dim1=1, dim2=2).add_(pull)
    # Compute the weights that the current codes represent.
    books, chosen = codebooks.double().clone(), codes.long().reshape(g, -1, p, m).clone()
    ridge_term = subvectors(w.double(), s).reshape(*chosen.shape[:2], -1) * pull
    now = books[torch.arange(m, device=codes.device), chosen].flatten(2)
    # Multiply the residuals of the responses by the inputs. Nothing else about the responses is needed, and the size of
    # this product does not depend on N.
    residual = targets.double().reshape(n, g, -1).permute(1, 2, 0) @ x / n + ridge_term - now @ gram
    for _ in range(SWEEPS):
        for i in range(m):
            # Make views for subspace i: its rows of the Gram matrix, the columns of these rows that belong to the same
            # subspace, and its part of the residual.
            rows = gram.view(g, p, m, s, -1)[:, :, i]
            own_cols, part = rows.view(g, p, s, p, m, s)[..., i, :], residual.view(*chosen.shape, s)[..., i, :]
            _fit_codewords(books[i], chosen[..., i], rows, own_cols, residual, part)
            _choose_codewords(books[i], chosen[..., i], rows, own_cols, residual, part)
    return books.to(codebooks.dtype), chosen.reshape(codes.shape).to(codes.dtype)


def _fit_codewords(
    book: Tensor, chosen: Tensor, rows: Tensor, own_cols: Tensor, residual: Tensor, part: Tensor
) -> None:
    """Fit the codewords of a subspace in place, one after the other, by least squares.

    D = P M s is the number of weights per output, including padding.

    Args:
        book: the codewords, of shape (K, s).
        chosen: the codes, of shape (G, T, P).
        rows: the subspace's rows of the Gram matrix, of shape (G, P, s, D).
        own_cols: the columns of these rows that belong to the same subspace, of shape (G, P, s, P, s).
        residual: the residuals (targets minus responses) times the inputs, of shape (G, T, D).
        part: a view of the part of `residual` that belongs to the subspace, of shape (G, T, P, s).
    """
    for k in torch.unique(chosen).tolist():
        at = (chosen == k).to(book.dtype)
        # Sum the normal equations over all places that use the codeword.
        normal = torch.einsum("gpq,gpiqj->ij", at.mT @ at, own_cols)
        change = torch.linalg.solve(normal, torch.einsum("gtp,gtpi->i", at, part))
        book[k] += change
        residual -= at @ torch.einsum("gpix,i->gpx", rows, change)


def _choose_codewords(
    book: Tensor, chosen: Tensor, rows: Tensor, own_cols: Tensor, residual: Tensor, part: Tensor
) -> None:
    """Choose the best codeword for each output in place, one kernel position after the other.

    The arguments are those of `_fit_codewords`.
    """
    for p in range(chosen.shape[2]):
        block, before = own_cols[:, p, :, p], chosen[..., p].clone()
        # Compute the squared error with each codeword, up to a constant that is the same for all codewords. Padding
        # (NaN) is never chosen.
        cost = torch.einsum("ki,gij,kj->gk", book, block, book).unsqueeze(1)
        cost = (cost - 2 * (part[:, :, p] + book[before] @ block) @ book.T).nan_to_num(nan=torch.inf)
        lowest, best = cost.min(-1)
        # Keep the current codeword unless another codeword is strictly better.
        best = torch.where(lowest < cost.gather(-1, before.unsqueeze(-1)).squeeze(-1), best, before)
        chosen[..., p] = best
        residual -= (book[best] - book[before]) @ rows[:, p]
