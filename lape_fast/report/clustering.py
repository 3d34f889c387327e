"""Which languages share neurons: average linkage over a similarity matrix, and the order that draws its tree."""

from __future__ import annotations

import numpy as np


def average_linkage(similarity: np.ndarray) -> tuple[list[tuple[int, int, float]], list[int]]:
    """Joins the two clusters that are most alike, by the mean similarity of their members, until one is left (UPGMA).

    Args:
        similarity: float ``[G, G]``, symmetric.

    Returns:
        ``G - 1`` merges ``(left, right, similarity)``, where numbers from G on are the clusters made so far, and the
        leaves from left to right. Ties go to the lowest numbers, and the larger cluster stands left, so the result
        never depends on hardware.

    Example:
        >>> average_linkage(np.array([[1, 0.1, 0.8], [0.1, 1, 0.2], [0.8, 0.2, 1]]))
        ([(0, 2, 0.8), (3, 1, 0.15000000000000002)], [0, 2, 1])
    """
    count = len(similarity)
    sums = similarity.astype(np.float64)
    np.fill_diagonal(sums, -np.inf)
    members = {number: [number] for number in range(count)}
    # Row i of the matrix belongs to the cluster names[i]; the rows of joined clusters are switched off.
    names, sizes = list(range(count)), np.ones(count)
    merges = []
    for made in range(count, 2 * count - 1):
        means = sums / (sizes[:, None] * sizes)
        # The first of equal entries is one above the diagonal, as the matrix is symmetric.
        row, column = divmod(int(means.argmax()), count)
        left, right = names[row], names[column]
        if len(members[right]) > len(members[left]):
            left, right = right, left
        merges.append((left, right, float(means[row, column])))
        members[made] = members.pop(left) + members.pop(right)
        joined = sums[row] + sums[column]
        sums[row, :], sums[:, row] = joined, joined
        sums[row, row] = sums[column, :] = sums[:, column] = -np.inf
        sizes[row] += sizes[column]
        names[row] = made
    return merges, members[2 * count - 2]
