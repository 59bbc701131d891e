"""Merges as one would write them on paper: float64, element by element, sorts and loops."""

import math

import numpy as np

from operators.counter_random import counter_key, counter_words


def words(seed: int, name: str, stream: int, count: int) -> np.ndarray:
    """Counter words of a whole tensor."""
    return counter_words(counter_key(seed, name, stream, 0), 0, count).numpy()


def kept(density: float, count: int) -> int:
    return max(1, math.floor(density * count))


def order(delta, tie) -> list[int]:
    """Indices from the largest magnitude down; equal ones by what decides between them."""
    return sorted(range(len(delta)), key=lambda i: (-abs(delta[i]), tie[i]))


def keep_ranks(delta, tie, first: int, last: int):
    """The delta with only the elements of ranks [first, last) from the top."""
    sparse = np.zeros_like(delta)
    for i in order(delta, tie)[first:last]:
        sparse[i] = delta[i]
    return sparse


def top(delta, density: float, tie):
    return keep_ranks(delta, tie, 0, kept(density, len(delta)))


def breadcrumbs(delta, density: float, gamma: float, tie):
    k = kept(density, len(delta))
    dropped = min(math.floor(gamma * len(delta)), len(delta) - k)
    return keep_ranks(delta, tie, dropped, dropped + k)


def dare(delta, density: float, word):
    limit = math.floor(density * 2**32)
    return np.array([x / density if w < limit else 0.0 for x, w in zip(delta, word, strict=True)])


def magprune_probabilities(row, density: float, epsilon: float):
    """p_r of one row: mid-ranks by counting."""
    if len(row) == 1:
        return [density]
    probabilities = []
    for x in row:
        below = sum(abs(y) < abs(x) for y in row)
        equal = sum(abs(y) == abs(x) for y in row)
        rank = below + (equal + 1) / 2
        probabilities.append(density - epsilon + 2 * epsilon * (rank - 1) / (len(row) - 1))
    return probabilities


def della(delta, shape, density: float, epsilon: float, word):
    if density == 1:
        return delta
    sparse = []
    for row, own in zip(delta.reshape(-1, shape[-1]), word.reshape(-1, shape[-1]), strict=True):
        chances = magprune_probabilities(row, density, epsilon)
        sparse += [
            x / p if w < math.floor(p * 2**32) else 0.0
            for x, p, w in zip(row, chances, own, strict=True)
        ]
    return np.array(sparse)


def weighted_sum(deltas, weights, normalize: bool):
    total = sum(w * d for w, d in zip(weights, deltas, strict=True))
    return total / sum(weights) if normalize else total


def elect(deltas, weights, normalize: bool):
    merged = np.zeros_like(deltas[0])
    for i in range(len(merged)):
        votes = [w * d[i] for w, d in zip(weights, deltas, strict=True)]
        agreeing = [(v, abs(w)) for v, w in zip(votes, weights, strict=True) if v * sum(votes) > 0]
        if agreeing:
            merged[i] = sum(v for v, _ in agreeing)
            merged[i] /= sum(w for _, w in agreeing) if normalize else 1.0
    return merged


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsvm(deltas, ranks=None, weights=None):
    """The plain recipe, with numpy's SVD."""
    count = len(deltas)
    k = min(deltas[0].shape) // count if ranks is None else ranks
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = np.concatenate([left[:, :k] for left, _, _ in parts], axis=1)
    v = np.concatenate([right[:k].T for _, _, right in parts], axis=1)
    s = np.concatenate(
        [values[:k] * w for (_, values, _), w in zip(parts, weights or [1] * count, strict=True)]
    )
    return polar(u) @ np.diag(s) @ polar(v).T
