"""Wanda, SparseGPT and ADMM once more, slowly, in float64 and from the papers' formulas: what the passes are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def lowest(scores: np.ndarray, count: int, old: np.ndarray) -> np.ndarray:
    """True where pruned: `count` entries of the smallest scores, those that are gone already first; ties by position."""
    flat, kept = scores.reshape(-1), old.reshape(-1)
    order = np.lexsort((np.arange(len(flat)), flat, kept))
    gone = ~kept
    gone[order[:count]] = True
    return gone.reshape(scores.shape)


def choose(scores: np.ndarray, pattern: str, sparsity: float, old: np.ndarray) -> np.ndarray:
    """True where pruned, all of the matrix compared, or group by group, or block by block."""
    if ":" in pattern and not pattern.startswith("block"):
        n, m = map(int, pattern.split(":"))
        gone = np.zeros(scores.shape, dtype=bool)
        for r in range(scores.shape[0]):
            for c in range(0, scores.shape[1], m):
                gone[r, c : c + m] = lowest(scores[r, c : c + m], m - n, old[r, c : c + m])
        return gone
    if pattern.startswith("block"):
        rows, columns = map(int, pattern.removeprefix("block:").split("x"))
        tiles = scores.shape[0] // rows, scores.shape[1] // columns
        small, left = np.zeros(tiles), np.zeros(tiles, dtype=bool)
        for i in range(tiles[0]):
            for j in range(tiles[1]):
                place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                small[i, j] = np.mean(np.where(old[place], scores[place], 0.0) ** 2)
                left[i, j] = old[place].any()
        gone = lowest(small, round(sparsity * small.size), left)
        return gone.repeat(rows, 0).repeat(columns, 1) | ~old
    return lowest(scores, round(sparsity * scores.size), old)


def wanda(weight: np.ndarray, x: np.ndarray, sparsity: float, pattern: str, old: np.ndarray) -> np.ndarray:
    """Mask, True where kept. Score |W_ij| * ||X_j||_2; unstructured ones are compared within a row."""
    scores = np.abs(weight) * np.sqrt((x**2).sum(0))
    if pattern != "unstructured":
        return ~choose(scores, pattern, sparsity, old)
    count = round(sparsity * weight.shape[1])
    return ~np.stack([lowest(s, count, o) for s, o in zip(scores, old, strict=True)])


def sparsegpt(
    weight: np.ndarray, x: np.ndarray, sparsity: float, pattern: str, block_size: int, damping: float, old: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(mask, weights). The inverse Hessian of the columns that are left is computed anew for every column, as in the paper's (3).

    Masks are chosen for block_size columns together, by w**2 / [H^-1]_cc with the inverse at each column's own turn; N:M ones for
    each group, when it is reached.
    """
    w = np.where(old, weight, 0.0).astype(np.float64)
    hessian = x.T @ x
    dead = np.diag(hessian) == 0
    mean = np.diag(hessian).mean()
    w[:, dead] = 0
    hessian = hessian + np.diag(np.where(dead, mean, 0.0)) + damping * mean * np.eye(len(hessian))
    columns = w.shape[1]
    inverses = [np.linalg.inv(hessian[c:, c:]) for c in range(columns)]
    mask = np.ones(w.shape, dtype=bool)
    together = int(pattern.split(":")[1]) if ":" in pattern and not pattern.startswith("block") else block_size
    for c in range(columns):
        if c % together == 0:
            end = min(c + together, columns)
            scores = np.stack([np.abs(w[:, j]) / np.sqrt(inverses[j][0, 0]) for j in range(c, end)], axis=1)
            if together != block_size or pattern != "unstructured":
                part = choose(scores, pattern, sparsity, old[:, c:end])
            else:  # so many that all columns so far have their share
                count = round(sparsity * w.shape[0] * end) - int((~mask[:, :c]).sum())
                part = lowest(scores, max(0, count), old[:, c:end])
            mask[:, c:end] = ~part
        gone = ~mask[:, c]
        error = np.where(gone, w[:, c], 0.0) / inverses[c][0, 0]
        w[:, c:] -= np.outer(error, inverses[c][0])
        w[gone, c] = 0.0
    return mask, w


def admm(
    weight: np.ndarray,
    x: np.ndarray,
    sparsity: float | None,
    pattern: str,
    rounds: int,
    choosing: Sequence[int],
    rho: float,
    damping: float,
    relaxation: float,
    old: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(mask, weights). sparsity None: the mask is `old`. No column of x is zero."""
    gram = x.T @ x
    norms = np.sqrt(np.diag(gram))
    h = gram / np.outer(norms, norms)
    h += damping * np.diag(h).mean() * np.eye(len(h))
    dense = weight * norms
    w, u, mask = dense, np.zeros_like(dense), old
    for t in range(1, rounds + 1):
        if sparsity is not None and t in choosing:
            share = sparsity * (1 - (1 - t / choosing[-1]) ** 4)
            mask = ~choose(np.abs(w + u), pattern, share, old)
        z = mask * (w + u)
        if t == rounds:
            return mask, z / norms
        u = u + w - z
        solved = np.linalg.solve(h + rho * np.eye(len(h)), (dense @ h + rho * (z - u)).T).T
        w = relaxation * solved + (1 - relaxation) * z
    raise AssertionError(rounds)
