"""Cut pairs of picture and text into K silos by what they are like: spherical k-means on frozen features.

    max Σ_i cos(x_i, c_{a(i)})        x_i unit vectors, c_k the direction of the sum of cluster k's

With x, t the image and text features of an item, centred and of length 1, items are compared by one of four rules:

    image    x_i · x_j
    text     t_i · t_j
    joint    x_i · x_j + t_i · t_j         that of the concatenation [x, t], up to its length
    cross    u_i · v_j                     texts are clustered, and an item goes where its picture is nearest

Sources: the rules, "Fed-CMP", arXiv 2603.26786; k-means, Dhillon and Modha 2001, "Concept decompositions for large
sparse text data", Machine Learning 42:143, https://doi.org/10.1023/A:1007612920971; seeding in proportion to 1 - cos,
Arthur and Vassilvitskii 2007, "k-means++". Differs: features are centred, since those of a tower share a direction that
would make every cosine large; and the paper's encoder (SigLIP) has one space for pictures and texts. A tower and token
embeddings have none, so `cross` makes one, of the items themselves: u and v are their canonical variates, scaled by the
correlation (Gong, Ke, Isard and Lazebnik 2014, "A multi-view embedding space", IJCV 106:210, arXiv 1212.4522, who take
its fourth power).
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from accord.errors import DataError

Similarity: TypeAlias = Literal["image", "text", "joint", "cross"]

RIDGE: Final = 1.0
"""Of canonical correlation, in units of a direction's mean variance: few items have many directions. At 0.1, or with
the fourth power, held-out captions of Flickr8k's photographs are found worse."""

RESTARTS: Final = 10
ITERATIONS: Final = 100


def clusters(image: Tensor | None, text: Tensor | None, by: Similarity, count: int, *, seed: int) -> Tensor:
    """Return the cluster of every item, `[N]`, 0 for the largest; none is empty.

    Args:
        image: features of the items' pictures, `[N, D]`; not looked at by "text".
        text: features of their texts, `[N, E]`; not looked at by "image".
        by: the rule by which items are compared.
        count: K.
        seed: one seed gives one result, whatever the global generator's state.

    Raises:
        DataError: fewer than K items differ, or a feature is not finite.
    """
    items, anchors = compared(image, text, by)
    found = spherical_kmeans(anchors, count, seed=seed)
    if items is not anchors:
        similarity, found = (normalize(items) @ _centroids(normalize(anchors), found, count).T).max(dim=1)
        _fill(found, similarity, count)
    order = torch.bincount(found, minlength=count).argsort(descending=True, stable=True)
    return order.argsort()[found]


def compared(image: Tensor | None, text: Tensor | None, by: Similarity) -> tuple[Tensor, Tensor]:
    """Return the vectors `[N, ·]` of the items, and those of what is clustered: the same ones except for "cross".

    Raises:
        DataError: a feature is not finite.
    """
    if by == "image":
        assert image is not None
        return (unit := _unit(image)), unit
    assert text is not None
    if by == "text":
        return (unit := _unit(text)), unit
    assert image is not None
    if by == "joint":
        return (both := torch.cat([_unit(image), _unit(text)], dim=1)), both
    return canonical(image, text)


def canonical(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return pictures `[N, p]` and texts `[N, p]` in one space, by ridge-regularised canonical correlation.

    With A, B the whitened features (C_A = Xᵀ X / N + ridge) and P S Qᵀ the singular value decomposition of Aᵀ B / N,
    pictures are A P S and texts B Q S.

    Raises:
        DataError: a feature is not finite.
    """
    a, b = _whitened(image), _whitened(text)
    p, s, qt = torch.linalg.svd(a.T @ b / len(a), full_matrices=False)
    return a @ p * s, b @ qt.T * s


def spherical_kmeans(features: Tensor, count: int, *, seed: int) -> Tensor:
    """Return the cluster of every item, `[N]`; the best of `RESTARTS` drawn beginnings, and no cluster is empty.

    Args:
        features: `[N, D]`; only their directions matter.
        count: K.
        seed: one seed gives one result.

    Raises:
        DataError: fewer than K directions differ.
    """
    unit = normalize(features.detach().double().cpu())
    distinct = len(unit.round(decimals=9).unique(dim=0))
    if not 1 <= count <= distinct:
        raise DataError(
            f"{count} clusters need as many items that differ, and of {len(unit)} items {distinct} do; ask for fewer "
            "clusters (a site each), or give more pictures"
        )
    generator = torch.Generator().manual_seed(seed)
    runs = [_one_run(unit, count, generator) for _ in range(RESTARTS)]
    return max(runs, key=lambda run: run[0])[1]


def plane(items: Tensor) -> Tensor:
    """Return items `[N, D]` on their first two principal axes, `[N, 2]`; the largest loading of an axis is positive."""
    centred = items - items.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :2]
    sign = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    points = centred @ (axes * sign)
    return torch.cat([points, points.new_zeros(len(points), 2 - points.shape[1])], dim=1)


def _one_run(unit: Tensor, count: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """Return the sum of cosines, and the cluster of every item."""
    centroids = unit[_seeds(unit, count, generator)]
    previous: Tensor | None = None
    for _ in range(ITERATIONS):
        similarity, found = (unit @ centroids.T).max(dim=1)
        _fill(found, similarity, count)
        if previous is not None and torch.equal(found, previous):
            break
        previous, centroids = found, _centroids(unit, found, count)
    return float(similarity.sum()), found


def _seeds(unit: Tensor, count: int, generator: torch.Generator) -> list[int]:
    chosen = [int(torch.randint(len(unit), (1,), generator=generator))]
    while len(chosen) < count:
        far = (1 - (unit @ unit[chosen].T).max(dim=1).values).clamp(min=0)
        far[far < 1e-9] = 0.0  # copies of what is chosen
        if not far.any():  # what is left differs by less than a cosine shows
            far = torch.ones_like(far).index_fill(0, torch.tensor(chosen), 0.0)
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
    return chosen


def _centroids(unit: Tensor, found: Tensor, count: int) -> Tensor:
    return normalize(torch.zeros(count, unit.shape[1], dtype=unit.dtype).index_add_(0, found, unit))


def _fill(found: Tensor, similarity: Tensor, count: int) -> None:
    """Give every empty cluster, in place, the item that is least like its own centroid and not alone there."""
    for empty in (torch.bincount(found, minlength=count) == 0).nonzero().flatten().tolist():
        alone = torch.bincount(found, minlength=count)[found] == 1
        item = int(similarity.masked_fill(alone, torch.inf).argmin())
        found[item], similarity[item] = empty, 1.0


def _centred(features: Tensor) -> Tensor:
    x = features.detach().double().cpu()
    if not x.isfinite().all():
        bad = int((~x.isfinite()).any(dim=1).nonzero()[0])
        raise DataError(f"item {bad} of {len(x)} has a feature that is not finite; check the checkpoint and its type")
    return x - x.mean(dim=0)


def _unit(features: Tensor) -> Tensor:
    return normalize(_centred(features))


def _whitened(features: Tensor) -> Tensor:
    x = _centred(features)
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))
    scale = (variance.clamp(min=0) + RIDGE * variance.mean() + 1e-12).rsqrt()
    white: Tensor = x @ axes * scale
    return white
