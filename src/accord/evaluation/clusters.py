"""Say how far a mean over test questions can be trusted where several of them are about one image.

Such questions tend to be right or wrong together, so that an interval that takes them for independent is too narrow
(Miller 2024, "Adding Error Bars to Evals", section 2.2, https://arxiv.org/abs/2411.00640). Images are the clusters, and
the estimate is the mean over T columns (question types) of the columns' own means m_t. A question i of column t, with
outcome y_i, among n_t, moves that estimate by (y_i - m_t) / (n_t T). Over the G images g,

    SE² = G/(G-1) Σ_g ( Σ_{i in g} (y_i - m_{t(i)}) / (n_{t(i)} T) )²

the cluster-robust variance of a mean of ratios (CR1: Miller's eq. 4 times the correction G/(G-1) for few clusters). It
holds for questions of different types about one image, too. Where every question has an image of its own and there is
one column of zeros and ones, it is p(1-p)/(n-1).

The *effective number* of a column's questions is how many with an image each would be known as well,

    n_eff = n · (p(1-p)/(n-1)) / SE²

cut to 1..n, and put into Wilson's interval in the place of n (Dean and Pagano 2015, "Evaluating confidence interval
methods for binomial proportions in clustered surveys", J. Survey Statistics and Methodology 3:484,
https://doi.org/10.1093/jssam/smv024). Where all answers are right or all wrong, SE is 0 and n_eff is G, the number of
images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def clustered_error(outcomes: Mapping[str, Sequence[float]], images: Mapping[str, Sequence[int]]) -> float | None:
    """Return the standard error of the mean over columns of each column's mean outcome, clustered by image.

    Args:
        outcomes: by column, one number a question `[n_t]`, in the unit of the result.
        images: by column, which image each question is about `[n_t]`; further columns are ignored.

    Returns:
        SE; None for fewer than two images, which tell nothing of others.
    """
    _, cluster = np.unique(np.concatenate([images[name] for name in outcomes]), return_inverse=True)
    count = int(cluster.max()) + 1
    if count < 2:
        return None
    moves = []
    for given in outcomes.values():
        y = np.asarray(given, dtype=np.float64)
        moves.append((y - y.mean()) / (len(y) * len(outcomes)))
    sums = np.bincount(cluster, weights=np.concatenate(moves), minlength=count)
    return math.sqrt(count / (count - 1) * float(sums @ sums))


def effective_number(outcomes: Sequence[float], images: Sequence[int]) -> float:
    """Return how many questions with an image each would tell as much as these, between 1 and their number.

    Args:
        outcomes: 1 where right and 0 where wrong, `[n]`.
        images: which image each question is about, `[n]`.
    """
    n, distinct = len(outcomes), len(set(images))
    p = math.fsum(outcomes) / n
    error = clustered_error({"": outcomes}, {"": images})
    if error is None or p in (0, 1):
        return float(distinct)
    alone = n * p * (1 - p) / (n - 1)
    return min(float(n), max(1.0, alone / error**2)) if error else float(n)
