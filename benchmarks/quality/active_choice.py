"""What active choice saves: judgements until a reward model ranks held-out pairs as well as random choice makes it.

    python benchmarks/quality/active_choice.py ../shared/data/flickr8k --seeds 20

The pairs are captions of one photograph of Flickr8k, and the judgements are people's: of two captions the one with the
larger share of the crowd's votes is better, by at least 0.3. The pool is of the photographs of `private`, held out are
those of `dev` and `test`. A reward model here is linear, R(x, y) = w · φ(x, y), trained with Bradley–Terry and a
ridge. φ [41] is how a caption fits a photograph: words are predicted from features of EfficientNet-lite0 by ridge
regression on the captions of `base`, which nobody judged; with the products of photograph and caption along the 32
commonest directions of these predictions.

    random        pairs in random order
    once          the first 50 at random; the rest by |margin| of the model of these 50, as accord annotate --uncertain
                  orders a pool
    again         the same, in order anew with the model of all judgements so far, every 25

`decided` is a pool of pairs of which people prefer one. In `all` there are also those of which they do not: such a
judgement is a tie, which takes its time and trains nothing.
"""

import argparse
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from accord.data.captions import Judged, read_captions, read_judgements
from accord.data.images import load_image
from accord.evaluation.intervals import half_width
from accord.evaluation.markdown import markdown_table
from accord.models.convert import convert_tower
from accord.types import ImageSource

PIXELS, WORDS, DIRECTIONS, RIDGE = 160, 1000, 32, 1e-2
FIRST, BATCH, MOST, TARGET = 50, 25, 600, 300
LEAST, PAIRS_OF_A_PHOTOGRAPH = 0.3, 12
STEPS = 12


@torch.no_grad()
def image_features(images: Sequence[ImageSource]) -> Tensor:
    """Return means over positions of the pretrained tower, `[N, 1280]`."""
    tower, found = convert_tower("efficientnet-lite0", PIXELS), []
    for start in range(0, len(images), 32):
        pictures = [load_image(image).resize((PIXELS, PIXELS)) for image in images[start : start + 32]]
        raw = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures])
        pixels = (raw.view(-1, PIXELS, PIXELS, 3).permute(0, 3, 1, 2).float() - 127) / 128
        found.append(tower(pixels).last_hidden_state.mean(dim=(2, 3)))
    return torch.cat(found).double()


class Fit:
    """How captions fit photographs, learnt from captions that nobody judged."""

    def __init__(self, features: Tensor, captions: Sequence[Sequence[str]]) -> None:
        counts: dict[str, int] = defaultdict(int)
        for texts in captions:
            for word in {word for text in texts for word in text.split()}:
                counts[word] += 1
        common = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
        self.number = {word: n for n, word in enumerate(common)}
        self.weight = torch.tensor([len(captions) / counts[word] for word in common], dtype=torch.float64).log()
        self.mean, self.scale = features.mean(dim=0), features.std(dim=0) + 1e-6
        said = torch.stack([torch.stack([self.words(text) for text in texts]).mean(dim=0) for texts in captions])
        self.middle = said.mean(dim=0)
        x = (features - self.mean) / self.scale
        self.map = torch.linalg.solve(x.T @ x + len(x) * torch.eye(x.shape[1]).double(), x.T @ (said - self.middle))
        self.directions = torch.linalg.svd(x @ self.map, full_matrices=False).Vh[:DIRECTIONS]

    def words(self, caption: str) -> Tensor:
        """Return the weighted words of a caption, `[W]`."""
        bag = torch.zeros(len(self.number), dtype=torch.float64)
        for word in caption.split():
            if word in self.number:
                bag[self.number[word]] = self.weight[self.number[word]]
        return bag

    def predict(self, features: Tensor) -> Tensor:
        """Return the words of photographs `[N, W]`, beside their middle, from features `[N, 1280]`."""
        return (features - self.mean) / self.scale @ self.map

    def __call__(self, predicted: Tensor, caption: str) -> Tensor:
        """Return φ of one photograph's predicted words `[W]` and a caption, `[41]`."""
        bag = self.words(caption)
        fits = predicted[bag > 0] / (self.middle[bag > 0] + 0.01) if (bag > 0).any() else torch.zeros(1).double()
        length = len(caption.split())
        plain = [
            cosine_similarity(predicted, bag - self.middle, dim=0),
            cosine_similarity(predicted + self.middle, bag, dim=0),
            fits.mean(),
            fits.min(),
            fits.max(),
            (predicted * bag).sum(),
            bag.sum() / max(1, length),
            torch.tensor(length / 10),
            torch.tensor(sum(word in self.number for word in caption.split()) / max(1, length)),
        ]
        products = (self.directions @ predicted) * (self.directions @ (bag - self.middle))
        return torch.cat([torch.stack([value.double() for value in plain]), products])


def pairs_of(rows: Sequence[Judged], fit: Fit, predicted: dict[str, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Return the differences of φ of pairs of captions of one photograph `[N, D]`, and how they were judged, `[N]`.

    1 where the first is better, −1 where the second is, 0 for a tie. Of a photograph there are at most a dozen decided
    pairs and a dozen ties, drawn at random.
    """
    generator = random.Random(seed)
    by_photograph: dict[str, dict[str, tuple[Tensor, float]]] = defaultdict(dict)
    for row in rows:
        if (share := row.score("crowd", ())) is not None:
            by_photograph[row.photograph.id][row.caption] = fit(predicted[row.photograph.id], row.caption), share
    differences, judged = [], []
    for captions in by_photograph.values():
        couples = list(combinations(captions.values(), 2))
        generator.shuffle(couples)
        kept = {True: 0, False: 0}
        for (one, yes), (other, no) in couples:
            decided = abs(yes - no) >= LEAST
            if kept[decided] < PAIRS_OF_A_PHOTOGRAPH:
                kept[decided] += 1
                differences.append(one - other)
                judged.append(((yes > no) - (yes < no)) if decided else 0)
    return torch.stack(differences), torch.tensor(judged, dtype=torch.float64)


def train(differences: Tensor, judged: Tensor) -> Tensor:
    """Return the w `[D]` that minimises the Bradley–Terry loss with a ridge; ties train nothing."""
    x = (judged[:, None] * differences)[judged != 0]
    ridge = 2 * RIDGE * torch.eye(x.shape[1]).double()
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(STEPS):  # Newton's; the loss is convex
        wrong = torch.sigmoid(-(x @ w))
        n = max(1, len(x))
        gradient = ridge @ w - x.T @ wrong / n
        w = w - torch.linalg.solve(ridge + (x.T * (wrong * (1 - wrong))) @ x / n, gradient)
    return w


def curve(choice: str, pool: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], seed: int) -> list[float]:
    """Return the held-out pair accuracy after `FIRST` judgements, and after each `BATCH` more, up to `MOST`."""
    x, judged = pool
    order = random.Random(seed).sample(range(len(x)), len(x))
    taken, waiting = order[:FIRST], order[FIRST:]
    found = []
    while True:
        w = train(x[taken], judged[taken])
        found.append(float((held_out[0] @ w * held_out[1] > 0).double().mean()))
        if len(taken) >= MOST:
            return found
        if choice == "again" or (choice == "once" and len(taken) == FIRST):
            margins = (x @ w).abs().tolist()
            waiting.sort(key=lambda n: margins[n])
        taken, waiting = [*taken, *waiting[:BATCH]], waiting[BATCH:]


def needed(accuracies: Sequence[float], target: float) -> float | None:
    """Return after how many judgements a curve first reaches an accuracy, between two points on the line; None: never.

    >>> needed([0.5, 0.6, 0.8], 0.7)
    87.5
    """
    for n, accuracy in enumerate(accuracies):
        if accuracy >= target:
            before = accuracies[n - 1] if n else accuracy
            share = 1.0 if accuracy == before else (target - before) / (accuracy - before)
            return FIRST + BATCH * (n - 1 + share) if n else float(FIRST)
    return None


def main() -> None:
    """Print what each choice needs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="the folder of Flickr8k with captions.jsonl and judgements.jsonl")
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)

    base = {q.id: q for q in read_captions(options.data, splits=["base"])}
    judged = {split: read_judgements(options.data, split=split) for split in ("private", "judge")}
    images = {row.photograph.id: row.photograph.image for rows in judged.values() for row in rows}
    features = image_features([*(q.image for q in base.values()), *images.values()])
    fit = Fit(features[: len(base)], [[q.answer, *q.references] for q in base.values()])
    of_image = dict(zip(images, fit.predict(features[len(base) :]), strict=True))
    x, y = pairs_of(judged["private"], fit, of_image, seed=0)
    held_x, held_y = pairs_of(judged["judge"], fit, of_image, seed=0)
    scale = x.std(dim=0) + 1e-6
    held_out = (held_x / scale)[held_y != 0], held_y[held_y != 0]
    rows = []
    for name, part in (("decided", y != 0), ("all", y == y)):
        pool = (x / scale)[part], y[part]
        curves = {
            choice: [curve(choice, pool, held_out, seed) for seed in range(options.seeds)]
            for choice in ("random", "once", "again")
        }
        mean = {choice: [statistics.fmean(at) for at in zip(*of, strict=True)] for choice, of in curves.items()}
        place = (TARGET - FIRST) // BATCH
        target = mean["random"][place]
        for choice, of in curves.items():
            at = [100 * each[place] for each in of]
            paired = [100 * (each[place] - other[place]) for each, other in zip(of, curves["random"], strict=True)]
            count = needed(mean[choice], target)
            rows.append(
                [
                    name,
                    choice,
                    f"{statistics.fmean(at):.1f} ± {half_width(at) or 0:.1f}",
                    "" if choice == "random" else f"{statistics.fmean(paired):+.1f} ± {half_width(paired) or 0:.1f}",
                    f"{100 * mean[choice][-1]:.1f}",
                    f"more than {MOST}" if count is None else f"{count:.0f}",
                ]
            )
        ties = float((pool[1] == 0).double().mean())
        print(f"{name}: {len(pool[0])} pairs, {ties:.0%} ties; held out {len(held_out[0])} pairs")
    head = ["pool", "choice", f"% right, {TARGET} judgements", "beside random", f"{MOST} judgements"]
    print(markdown_table([*head, f"judgements for random's {TARGET}"], rows))


if __name__ == "__main__":
    main()
