"""Product codes: weights side by side replaced by codewords, found by k-means or fitted to responses.

k-means starts from one fixed seed (k-means++) and computes in float64, so that codes follow from the weights alone,
whatever has been drawn before; scikit-learn's would bring a slow import and threads of its own. Single weights are
clustered exactly.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.quant.kmeans import kmeans

# Ct outputs, Cs inputs, M subspaces, s their size, K codewords, G groups, P kernel positions, N responses, T = Ct / G.

ITERATIONS, SWEEPS, RIDGE = 50, 3, 0.1


def product_codes(w: Tensor, subspace: int, codewords: int) -> tuple[Tensor, Tensor]:
    """Return codebooks (M, K, s) by k-means, NaN where sub-vectors are fewer, and codes (Ct, [kh, kw,] M)."""
    parts = split(w.detach(), subspace)
    found = [_clusters(part, codewords) for part in parts.flatten(0, -3).transpose(0, 1).double().cpu()]
    codes = torch.stack([labels for _, labels in found], -1).reshape(parts.shape[:-1])
    return torch.stack([centers for centers, _ in found]).to(w), codes.to(w.device)


def split(w: Tensor, subspace: int) -> Tensor:
    """Return weights (Ct, Cs, [kh, kw]) as sub-vectors (Ct, [kh, kw,] M, s), zeros appended to the channels."""
    rows = F.pad(w.movedim(1, -1), (0, -w.shape[1] % subspace))
    return rows.reshape(*rows.shape[:-1], -1, subspace)


def decoded(codebooks: Tensor, codes: Tensor, channels: int) -> Tensor:
    """Return the weights (Ct, Cs, [kh, kw]) that codes stand for."""
    subspaces = torch.arange(len(codebooks), device=codes.device)
    return codebooks[subspaces, codes.long()].flatten(-2)[..., :channels].movedim(-1, 1)


def _clusters(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return k-means' centers, as many as k and points, NaN behind the last, and labels of points (n, s)."""
    centers, labels = points.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    if len(centers) > k:
        if points.shape[1] == 1:
            scalars = kmeans(points[:, 0], k)
            centers, labels = scalars.centroids[:, None], scalars.labels
        else:
            centers, labels = _lloyd(points, k)
    return F.pad(centers, (0, 0, 0, min(k, len(points)) - len(centers)), value=torch.nan), labels


def _lloyd(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    generator, centers = torch.Generator().manual_seed(0), points[:1]
    for _ in range(1, k):  # far points are likely, taken ones impossible
        far = _distances(points, centers).amin(1)
        centers = torch.cat([centers, points[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(ITERATIONS):
        far, labels = _distances(points, centers).min(1)
        counts = labels.bincount(minlength=k)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, labels, points)
        centers = torch.where(counts > 0, sums / counts, points[far.argmax()])
    return centers, _distances(points, centers).argmin(1)


def _distances(points: Tensor, centers: Tensor) -> Tensor:
    return torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist").square()


@torch.no_grad()
def error_corrected(
    codebooks: Tensor, codes: Tensor, w: Tensor, inputs: Tensor, targets: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """Return codebooks and codes with a smaller error of responses, by block-coordinate descent in float64.

    Args:
        w: the float weights, which `ridge` (above 0, in units of the inputs' mean square) pulls towards.
        inputs: (N, G, P, Cs) what each response sees; (N, 1, 1, Cs) for a linear layer.
        targets: (N, Ct) the responses wanted, without bias.
    """
    (m, _, s), (n, g, p, _) = codebooks.shape, inputs.shape
    x = split(inputs.double().flatten(0, 2), s).reshape(n, g, -1).transpose(0, 1)
    gram = x.mT @ x / n
    pull = ridge * gram.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-12)
    gram.diagonal(dim1=1, dim2=2).add_(pull)
    books, chosen = codebooks.double().clone(), codes.long().reshape(g, -1, p, m).clone()
    off = split(w.double(), s).reshape(*chosen.shape[:2], -1) * pull
    now = books[torch.arange(m, device=codes.device), chosen].flatten(2)
    # What the responses lack, times the inputs: all that is needed of them, however many they are.
    lack = targets.double().reshape(n, g, -1).permute(1, 2, 0) @ x / n + off - now @ gram
    for _ in range(SWEEPS):
        for i in range(m):
            rows = gram.view(g, p, m, s, -1)[:, :, i]
            own, part = rows.view(g, p, s, p, m, s)[..., i, :], lack.view(*chosen.shape, s)[..., i, :]  # views
            _fit_codewords(books[i], chosen[..., i], rows, own, lack, part)
            _choose_codewords(books[i], chosen[..., i], rows, own, lack, part)
    return books.to(codebooks.dtype), chosen.reshape(codes.shape).to(codes.dtype)


def _fit_codewords(book: Tensor, chosen: Tensor, rows: Tensor, own: Tensor, lack: Tensor, part: Tensor) -> None:
    """Solve least squares for one codeword after the other, in place; a subspace's rows (G, P, s, all) of the Gram
    matrix, of these its own columns (G, P, s, P, s), lack (G, T, all), of that its part (G, T, P, s).
    """
    for k in chosen.unique().tolist():  # type: ignore[no-untyped-call]
        at = (chosen == k).to(book.dtype)
        normal = torch.einsum("gpq,gpiqj->ij", at.mT @ at, own)
        change = torch.linalg.solve(normal, torch.einsum("gtp,gtpi->i", at, part))
        book[k] += change
        lack -= at @ torch.einsum("gpix,i->gpx", rows, change)


def _choose_codewords(book: Tensor, chosen: Tensor, rows: Tensor, own: Tensor, lack: Tensor, part: Tensor) -> None:
    """Give each output the best codeword, in place, kernel position after position; see `_fit_codewords`."""
    for p in range(chosen.shape[2]):
        block, before = own[:, p, :, p], chosen[..., p].clone()
        cost = torch.einsum("ki,gij,kj->gk", book, block, book).unsqueeze(1)
        cost = (cost - 2 * (part[:, :, p] + book[before] @ block) @ book.T).nan_to_num(nan=torch.inf)
        lowest, best = cost.min(-1)
        best = torch.where(lowest < cost.gather(-1, before.unsqueeze(-1)).squeeze(-1), best, before)
        chosen[..., p] = best
        lack -= (book[best] - book[before]) @ rows[:, p]
