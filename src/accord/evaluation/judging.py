"""How well a reward model judges pairs that people have judged, and how well it knows when it does not know.

Bradley–Terry says with what probability the chosen answer is preferred, from the margin m of raw scores,

    P(y⁺ ≻ y⁻) = σ(m),   m = R(x, y⁺) − R(x, y⁻)

so its confidence in its own judgement is c = σ(|m|), and it is right where m > 0. Over B bins of equal width in
[0.5, 1], with n_b pairs, the share a_b of them right and the mean confidence c_b, the expected calibration error is

    ECE = Σ_b n_b / N · |a_b − c_b|

(Guo et al. 2017, "On calibration of modern neural networks", eq. 3, arXiv 1706.04599). A model whose points in the
reliability plot lie below the diagonal is surer than it should be.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

import jinja2
import matplotlib
from markupsafe import Markup

from accord.data.images import load_image
from accord.data.questions import image_identity, together
from accord.errors import DataError
from accord.evaluation.figures import AFTER, INK, NARROW, RULE, STYLE, WIDE, canvas, svg
from accord.evaluation.gallery import small_png
from accord.evaluation.markdown import markdown_table
from accord.evaluation.summary import Accuracy, accuracy_by_image
from accord.rewards.model import RewardModel
from accord.rewards.train import pair_margins
from accord.runs import write_atomic
from accord.types import ImageSource, PreferencePair, text_of
from accord.version import VERSION

BINS: Final = 5
SHOWN: Final = 24
LONGEST_SIDE: Final = 320  # pixels of a shown image


@dataclass(frozen=True)
class Bin:
    """Pairs of similar margin or confidence."""

    low: float
    high: float
    pairs: int
    mean: float  # margin or confidence
    right: float  # share


@dataclass(frozen=True)
class Judging:
    """What a reward model makes of pairs."""

    accuracy: Accuracy  # by question type, with 95 % intervals, clustered by image
    pairs: int
    margins: tuple[float, ...]  # raw, positive where it agrees with people, in the order of the pairs
    by_margin: tuple[Bin, ...]  # fifths of the pairs, by |m|
    reliability: tuple[Bin, ...]  # by confidence; empty bins are left out
    error: float  # ECE

    def table(self) -> str:
        """Return it as Markdown."""
        rows = [[f"{bin.low:.2f} to {bin.high:.2f}", str(bin.pairs), f"{bin.right:.1%}"] for bin in self.by_margin]
        return "\n".join([*self.lines(), "", markdown_table(["margin", "pairs", "as people judged"], rows)])

    def lines(self) -> list[str]:
        """Return what is to be said first."""
        right = sum(margin > 0 for margin in self.margins)
        low, high = self.accuracy.macro_low, self.accuracy.macro_high
        types = len(self.accuracy.by_type)
        over = f", {self.accuracy.macro:.1%} as a mean over {types} types" if types > 1 else ""
        return [
            f"{right / self.pairs:.1%} of {self.pairs} pairs are judged as people judged them{over} "
            f"(95 % interval of the {'mean' if types > 1 else 'share'} {low:.1%} to {high:.1%}, clustered by image)",
            f"calibration error {self.error:.3f}: by so much its confidence is off, on average",
        ]


def judge_pairs(model: RewardModel, pairs: Sequence[PreferencePair]) -> Judging:
    """Score both answers of every pair and compare with what people said.

    Raises:
        DataError: a pair is a tie, of which neither answer is right.
    """
    if tied := next((pair.question_id for pair in pairs if pair.tie), None):
        raise DataError(f"the pair of question {tied!r} is a tie; leave ties out, as read_preferences does by itself")
    scale = model.standardisation.deviation + 1e-6
    margins = [scale * margin for margin in pair_margins(model, pairs)]
    keys = together([pair.subjects for pair in pairs], image_identity())
    numbers: dict[str, int] = {}
    outcomes: dict[str, list[int]] = defaultdict(list)
    images: dict[str, list[int]] = defaultdict(list)
    for pair, key, margin in zip(pairs, keys, margins, strict=True):
        name = pair.question_type or "all"
        outcomes[name].append(int(margin > 0))
        images[name].append(numbers.setdefault(key, len(numbers)))
    confidence = [(1 / (1 + math.exp(-abs(m))), m > 0) for m in margins]
    reliability = _equal_width(confidence)
    return Judging(
        accuracy_by_image(dict(sorted(outcomes.items())), dict(sorted(images.items()))),
        len(pairs),
        tuple(margins),
        _fifths([(abs(m), m > 0) for m in margins]),
        reliability,
        sum(b.pairs * abs(b.right - b.mean) for b in reliability) / len(pairs),
    )


def _bin(found: Sequence[tuple[float, bool]], low: float, high: float) -> Bin:
    values = [value for value, _ in found]
    return Bin(low, high, len(found), sum(values) / len(found), sum(right for _, right in found) / len(found))


def _fifths(found: Sequence[tuple[float, bool]]) -> tuple[Bin, ...]:
    ordered = sorted(found)
    cuts = [round(b * len(ordered) / BINS) for b in range(BINS + 1)]
    parts = [ordered[start:end] for start, end in itertools.pairwise(cuts) if end > start]
    return tuple(_bin(part, part[0][0], part[-1][0]) for part in parts)


def _equal_width(found: Sequence[tuple[float, bool]]) -> tuple[Bin, ...]:
    parts: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for value, right in found:
        parts[min(BINS - 1, int((value - 0.5) * 2 * BINS))].append((value, right))
    width = 0.5 / BINS
    return tuple(_bin(part, 0.5 + b * width, 0.5 + (b + 1) * width) for b, part in sorted(parts.items()))


def reliability_plot(judging: Judging, *, width: float = WIDE) -> str:
    """Draw the share judged as people did against the confidence, beside the diagonal of a calibrated model, as SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(width, min(width, 4.2))
        axes.plot([0.5, 1], [0.5, 1], color=RULE, linewidth=1.2)
        bins = judging.reliability
        most = max((b.pairs for b in bins), default=1)
        axes.plot([b.mean for b in bins], [b.right for b in bins], color=AFTER, linewidth=1.2)
        axes.scatter(
            [b.mean for b in bins], [b.right for b in bins], s=[20 + 100 * b.pairs / most for b in bins], color=AFTER
        )
        for b in bins:
            axes.annotate(str(b.pairs), (b.mean, b.right), xytext=(7, -11), textcoords="offset points", color=INK)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(min([0.45, *(b.right - 0.05 for b in bins)]), 1.03)
        axes.set_xlabel("confidence of the reward model")
        axes.set_ylabel("share judged as people did")
        return svg(figure, "reliability", "Reliability: the share judged as people did, against the confidence")


def write_judging(path: Path, name: str, judging: Judging, pairs: Sequence[PreferencePair]) -> None:
    """Write a page with accuracy, calibration, and the pairs that the model gets most wrong, with their pictures.

    The page needs no network, and a policy forbids the browser to load or run anything.

    Args:
        path: the HTML file.
        name: what to call the model.
        judging: what `judge_pairs` returned.
        pairs: those that it was given.
    """
    worst = sorted(range(len(pairs)), key=lambda n: judging.margins[n])[:SHOWN]
    shown = [
        {
            "images": [_data_uri(source) for source in pairs[n].images],
            "prompt": text_of(pairs[n].prompt),
            "chosen": pairs[n].chosen,
            "rejected": pairs[n].rejected,
            "margin": judging.margins[n],
        }
        for n in worst
        if judging.margins[n] <= 0
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("accord.evaluation").joinpath("judging.html.j2").read_text("utf-8"))
    # Safe: matplotlib escapes what it writes, and the title is escaped by the figure.
    plots = Markup(reliability_plot(judging)), Markup(reliability_plot(judging, width=NARROW))
    page = template.render(name=name, judging=judging, shown=shown, plots=plots, version=VERSION)
    write_atomic(path, page)


def _data_uri(source: ImageSource) -> str:
    picture = small_png(load_image(source), LONGEST_SIDE)
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
