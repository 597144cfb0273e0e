"""Q-CNN's error correction on explicit responses, in loops over NumPy arrays: the reference for the tensor code.

Weights are (Ct, P, M, s): output, kernel position, subspace, element of it; codebooks D are (M, K,
s), codes B (Ct, P, M). Inputs are (N, G, P, M s), channels padded with zeros; targets (N, Ct).
Output t belongs to group t // (Ct / G).
"""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def decode(books: FloatArray, codes: IntArray) -> FloatArray:
    """Return (Ct, P, M, s): the codeword of every code."""
    outputs, positions, subspaces = codes.shape
    w = np.zeros((outputs, positions, subspaces, books.shape[2]))
    for t in range(outputs):
        for p in range(positions):
            for m in range(subspaces):
                w[t, p, m] = books[m, codes[t, p, m]]
    return w


def problem(inputs: FloatArray, targets: FloatArray, w: FloatArray, ridge: float) -> tuple[FloatArray, FloatArray]:
    """Return the inputs of every output t, (Ct, N', P M s), and its targets (Ct, N').

    Further rows add the pull towards the float weights, N ridge mean(x^2) |w_hat - w|^2.
    """
    n, groups, size = len(inputs), inputs.shape[1], inputs[0, 0].size
    pull = np.sqrt(n * ridge * (inputs**2).mean())
    design, goals = [], []
    for t in range(len(w)):
        x = inputs[:, t // (len(w) // groups)].reshape(n, size)
        design.append(np.concatenate([x, pull * np.eye(size)]))
        goals.append(np.concatenate([targets[:, t], pull * w[t].reshape(size)]))
    return np.stack(design), np.stack(goals)


def objective(design: FloatArray, goals: FloatArray, w: FloatArray) -> float:
    """Return sum_n |T_n - W S_n|^2."""
    return float(sum(((t - x @ v.reshape(-1)) ** 2).sum() for x, t, v in zip(design, goals, w, strict=True)))


def correct(
    books: FloatArray,
    codes: IntArray,
    w: FloatArray,
    inputs: FloatArray,
    targets: FloatArray,
    ridge: float,
    sweeps: int,
) -> tuple[FloatArray, IntArray, list[float]]:
    """Return codebooks and codes after block-coordinate descent over subspaces, and the objective after each update."""
    books, codes = books.copy(), codes.copy()
    design, goals = problem(inputs, targets, w, ridge)
    objectives = [objective(design, goals, decode(books, codes))]
    for _ in range(sweeps):
        for m in range(len(books)):
            for k in range(books.shape[1]):
                if (codes[:, :, m] == k).any():
                    books[m, k] = least_squares(books, codes, design, goals, m, k)
                    objectives.append(objective(design, goals, decode(books, codes)))
            for p in range(codes.shape[1]):
                for t in range(len(codes)):
                    codes[t, p, m] = best_code(books, codes, design, goals, m, p, t)
                objectives.append(objective(design, goals, decode(books, codes)))
    return books, codes, objectives


def least_squares(
    books: FloatArray, codes: IntArray, design: FloatArray, goals: FloatArray, m: int, k: int
) -> FloatArray:
    """Return the best codeword k of subspace m for the residual of all other codewords. The codes B are fixed."""
    others = books.copy()
    others[m, k] = 0
    w = decode(others, codes)
    rows, residuals = [], []
    for t in range(len(codes)):
        x = design[t].reshape(len(design[t]), *w.shape[1:])
        rows.append(x[:, codes[t, :, m] == k, m].sum(1))
        residuals.append(goals[t] - design[t] @ w[t].reshape(-1))
    codeword: FloatArray = np.linalg.lstsq(np.concatenate(rows), np.concatenate(residuals), rcond=None)[0]
    return codeword


def best_code(books: FloatArray, codes: IntArray, design: FloatArray, goals: FloatArray, m: int, p: int, t: int) -> int:
    """Return the code with the smallest error for output t at position p, by trying all. The codebooks D are fixed."""
    errors = []
    for k in range(books.shape[1]):
        tried = codes[t : t + 1].copy()
        tried[0, p, m] = k
        errors.append(objective(design[t : t + 1], goals[t : t + 1], decode(books, tried)))
    return int(np.nanargmin(errors))
