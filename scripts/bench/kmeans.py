"""Measures time and inertia of one-dimensional k-means, relative to np.sort and other packages.

    .venv/bin/python scripts/bench/kmeans.py

The script prints two tables. The first table is for a million weights from a normal distribution, with times relative
to np.sort of the same float32 array. The second table is for the weights of layers, with times relative to kmeans1d, an
exact package. Inertia is computed in float64 from the returned centroids, and is relative to the smallest inertia of
all packages. The packages are scikit-learn, kmeans1d, ckwrap and ckmeans-1d-dp. They are installed into a separate
environment (peers_venv.py). Slow packages are timed only twice. The script takes about a minute.
"""

import importlib
import os
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from measure import Ratio, Work, interleaved, machine, markdown, seconds, versions
from numpy.typing import NDArray
from peers_venv import VENV, enter

from qbench.quant.kmeans import kmeans

Array = NDArray[np.float32]
Solver = Callable[[Array, int], NDArray[np.floating]]  # returns centroids; it also computes labels

TARGET = 12
"""Largest acceptable ratio of qbench's time to the time of np.sort."""

SLOW = 0.2
"""Packages that take at least this many seconds are timed only twice."""

LAYERS = [(1_000, 3), (1_000, 16), (4_000, 3), (4_000, 16), (9_000, 16), (36_864, 3), (36_864, 16)]


def ours(x: Array, k: int) -> NDArray[np.floating]:
    return kmeans(torch.from_numpy(x), k).centroids.numpy()


def scikit_learn(x: Array, k: int, starts: int) -> NDArray[np.floating]:
    from sklearn.cluster import KMeans

    return np.asarray(KMeans(k, n_init=starts, random_state=0).fit(x[:, None]).cluster_centers_).ravel()


def kmeans1d(x: Array, k: int) -> NDArray[np.floating]:
    return np.array(importlib.import_module("kmeans1d").cluster(x, k).centroids)


def ckwrap(x: Array, k: int) -> NDArray[np.floating]:
    return np.asarray(importlib.import_module("ckwrap").ckmeans(x, k).centers)


def ckmeans_1d_dp(x: Array, k: int) -> NDArray[np.floating]:
    return np.asarray(importlib.import_module("ckmeans_1d_dp").ckmeans(x.astype(np.float64), k).centers)


PEERS: dict[str, tuple[str, Solver]] = {
    "scikit-learn, n_init=1": ("sklearn", partial(scikit_learn, starts=1)),
    "scikit-learn, n_init=10": ("sklearn", partial(scikit_learn, starts=10)),
    "kmeans1d (exact)": ("kmeans1d", kmeans1d),
    "ckwrap (exact)": ("ckwrap", ckwrap),
    "ckmeans-1d-dp (exact)": ("ckmeans_1d_dp", ckmeans_1d_dp),
}


def importable() -> dict[str, Solver]:
    """Return the k-means functions of qbench and of all packages that can be imported. Print the skipped packages."""
    solvers: dict[str, Solver] = {"ours": ours}
    for name, (module, solve) in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"skipped: {name}: {error}")
        else:
            solvers[name] = solve
    return solvers


def inertia(x: Array, centroids: NDArray[np.floating]) -> float:
    """Return the sum of the squared distances of the values from their nearest centroids."""
    c = np.sort(centroids.astype(np.float64))
    return float(np.square(x - c[np.searchsorted((c[1:] + c[:-1]) / 2, x)]).sum())


def million(solvers: dict[str, Solver], k: int = 16) -> None:
    """Print the table for a million weights."""
    x = np.random.default_rng(0).normal(size=10**6).astype(np.float32)
    inertias: dict[str, float] = {}

    def once(name: str) -> None:
        inertias[name] = inertia(x, solvers[name](x, k))

    first = {name: seconds(partial(once, name)) for name in solvers}
    slow = {name for name in solvers if first[name] > SLOW}
    times: dict[str, Ratio] = {}
    for names, rounds, warm in ((solvers.keys() - slow, 41, 3), (slow, 2, 0)):
        work: dict[str, Work] = {"np.sort": partial(np.sort, x)}
        times |= interleaved(work | {name: partial(solvers[name], x, k) for name in names}, rounds, warm)
    rows = []
    for name in solvers:
        time, target = times[name], f"<= {TARGET}" if name == "ours" else ""
        ratio = f"{time.median:.0f}" if name in slow else str(time)
        relative = inertias[name] / min(inertias.values())
        rows.append([name, ratio, target, f"{time.seconds * 1e3:.0f}", f"{relative:.7f}"])
    print(f"\n{len(x)} weights, k = {k}; np.sort takes {times['ours'].seconds / times['ours'].median * 1e3:.1f} ms\n")
    print(markdown(["", "time / np.sort (quartiles)", "target", "ms", "inertia / least found"], rows))


def layers(solvers: dict[str, Solver]) -> None:
    """Print the table for the weights of layers."""
    rows = []
    for n, k in LAYERS:
        x = (np.random.default_rng(n).normal(size=n) * 0.05).astype(np.float32)
        both = {name: solvers[name] for name in ("kmeans1d (exact)", "ours")}
        times = interleaved({name: partial(solve, x, k) for name, solve in both.items()}, 11, 1)
        inertias = {name: inertia(x, solve(x, k)) for name, solve in both.items()}
        ratio = f"{inertias['ours'] / min(inertias.values()):.7f}"
        rows.append([str(n), str(k), str(times["ours"]), f"{times['ours'].seconds * 1e3:.2f}", ratio])
    print()
    print(markdown(["weights", "k", "time / kmeans1d (quartiles)", "ms", "inertia / least found"], rows))


def main() -> None:
    enter(VENV)
    torch.set_num_threads(1)
    packages = versions("numpy", "scikit-learn", "kmeans1d", "ckwrap", "ckmeans_1d_dp")
    print(f"{machine()}, {packages}; 1 thread")
    solvers = importable()
    million(solvers)
    if "kmeans1d (exact)" in solvers:
        layers(solvers)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # scikit-learn reads it when it is imported
    main()
