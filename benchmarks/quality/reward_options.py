"""What the options of a reward model are worth, on people's judgements of captions of photographs (Flickr8k).

Every arm is trained on the judged photographs of the split `private`, and is measured on those of the file's `dev` and
`test`, which it has not seen: pair accuracy as a mean over topics, and calibration error (`accord.evaluation.judging`).
An arm departs from `linear` in one thing:

    linear       linear head, centring 0.01, judgements alone, no ties, every pair counts alike
    mlp          a head of two layers with SiLU
    uncentred    centring 0
    text         as many pairs more that the words alone decide: a caption of another photograph against its words in
                 a random order, beside a plain grey picture, for a reward model takes pictures in all pairs or in none
    ties         pairs of captions that fared alike, a third as many as there are preferences, by Davidson's likelihood
    weights      a pair counts as many experts as agree with it, or three times by how much the crowd's votes differ

A cell is an arm and a seed. Its figures stand in a file of their own, so the same command goes on where it stopped.

    python benchmarks/quality/reward_options.py ../shared/data/flickr8k --checkpoint runs/captions/captioner --seeds 5
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import msgspec
import torch
from PIL import Image

from accord.data.captions import MOST_WORDS, Judged, Judgements, judged_pairs, read_captions, read_judgements
from accord.evaluation.intervals import half_width
from accord.evaluation.judging import judge_pairs
from accord.evaluation.markdown import markdown_table
from accord.rewards.alone import ALONE, train_on_pairs
from accord.runs import write_atomic
from accord.types import PreferencePair, Question, prompt_of

ARMS = ("linear", "mlp", "uncentred", "text", "ties", "weights")
HELD = Judgements()


@dataclass(frozen=True)
class Cell:
    """What one arm came to with one seed."""

    arm: str
    seed: int
    checkpoint: str
    steps: int
    pairs: int  # trained on or kept back
    accuracy: float  # mean over topics, on photographs that it has not seen
    error: float  # calibration
    measured_on: int  # pairs
    seconds: float  # of CPU


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with captions.jsonl, judgements.jsonl and the images")
    parser.add_argument("--checkpoint", default="accord/idefics3", help="what the reward models are made from")
    parser.add_argument("--out", type=Path, default=Path("runs/reward-options"), help="folder for the cells")
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, …")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of these")
    parser.add_argument("--steps", type=int, default=150, help="of each training, at most")
    parser.add_argument("--held-out", type=int, default=0, help="pairs to measure on; 0 for all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    arms = given.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"unknown arms {sorted(unknown)}; choose from {', '.join(ARMS)}")
    judged = read_judgements(given.data, split="private")
    unseen = judged_pairs(read_judgements(given.data, split="judge"), HELD, random.Random("unseen"))
    if given.held_out:
        unseen = random.Random("fewer").sample(unseen, min(given.held_out, len(unseen)))
    captions = [q for q in read_captions(given.data) if q.split == "base"]
    cells = []
    for seed in range(given.seeds):
        for arm in arms:
            cell = _stored(given.out / f"{arm}-{seed}.json", given.checkpoint, given.steps, len(unseen))
            if cell is None:
                cell = measure(arm, seed, given.checkpoint, given.steps, judged, captions, unseen)
                write_atomic(given.out / f"{arm}-{seed}.json", json.dumps(asdict(cell)) + "\n")
            cells.append(cell)
    write_atomic(given.out / "table.md", table(cells) + "\n")
    print(table(cells))


def _stored(file: Path, checkpoint: str, steps: int, measured_on: int) -> Cell | None:
    """Return what was measured before in the same way."""
    if not file.is_file():
        return None
    cell = msgspec.json.decode(file.read_bytes(), type=Cell)
    return cell if (cell.checkpoint, cell.steps, cell.measured_on) == (checkpoint, steps, measured_on) else None


def measure(
    arm: str,
    seed: int,
    checkpoint: str,
    steps: int,
    judged: Sequence[Judged],
    captions: Sequence[Question],
    unseen: Sequence[PreferencePair],
) -> Cell:
    """Train one arm with one seed, and judge the pairs that it has not seen."""
    began = time.process_time()
    pairs = pairs_of(arm, judged, captions, random.Random(f"pairs {seed}"))
    config = replace(
        ALONE,
        steps=steps,
        head="mlp" if arm == "mlp" else "linear",
        centring=0.0 if arm == "uncentred" else 0.01,
    )
    model, _ = train_on_pairs(checkpoint, pairs, config, seed=seed)
    found = judge_pairs(model, unseen)
    spent = time.process_time() - began
    return Cell(
        arm, seed, checkpoint, steps, len(pairs), found.accuracy.macro, found.error, len(unseen), round(spent, 1)
    )


def pairs_of(
    arm: str, judged: Sequence[Judged], captions: Sequence[Question], generator: random.Random
) -> list[PreferencePair]:
    """Return the pairs that an arm is trained on."""
    pairs = judged_pairs(judged, HELD, generator)
    if arm == "weights":
        return weighted(pairs, judged)
    if arm == "ties":
        alike = tied(judged)
        return pairs + generator.sample(alike, min(len(alike), len(pairs) // 3))
    if arm == "text":
        return pairs + worded(captions, len(pairs), generator)
    return pairs


def weighted(pairs: Sequence[PreferencePair], judged: Sequence[Judged]) -> list[PreferencePair]:
    """Weigh pairs by how many experts agree, at least 1, or by 3 times the difference of the shares of yes."""
    said = {(row.photograph.id, row.caption): row for row in judged}
    out = []
    for pair in pairs:
        better, worse = (said[pair.question_id, caption] for caption in (pair.chosen, pair.rejected))
        if better.experts and worse.experts:
            weight = float(max(1, sum(a > b for a, b in zip(better.experts, worse.experts, strict=True))))
        else:
            weight = 3 * abs((better.score("crowd", ()) or 0.0) - (worse.score("crowd", ()) or 0.0))
        out.append(replace(pair, weight=max(weight, 1.0)))
    return out


def tied(judged: Sequence[Judged]) -> list[PreferencePair]:
    """Return the pairs of captions of one photograph to which experts gave the same mean score."""
    alike: dict[tuple[str, float], list[Judged]] = defaultdict(list)
    for row in judged:
        if (score := row.score("experts", HELD.experts)) is not None:
            alike[row.photograph.id, score].append(row)
    return [
        replace(_pair(first.photograph, first.caption, second.caption), tie=True)
        for rows in alike.values()
        for n, first in enumerate(rows)
        for second in rows[n + 1 :]
        if first.caption != second.caption
    ]


def worded(captions: Sequence[Question], count: int, generator: random.Random) -> list[PreferencePair]:
    """Return pairs of a caption and its own words in another order, beside a plain grey picture."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(stream, "PNG")
    short = [q for q in captions if len(set(q.answer.split())) > 3 and len(q.answer.split()) <= MOST_WORDS]
    pairs = []
    for n, question in enumerate(generator.sample(short, min(count, len(short)))):
        words = question.answer.split()
        while (mixed := generator.sample(words, len(words))) == words:
            pass
        blank = replace(question, image=stream.getvalue(), id=f"words-{n}")
        pairs.append(_pair(blank, question.answer, " ".join(mixed)))
    return pairs


def _pair(question: Question, chosen: str, rejected: str) -> PreferencePair:
    assert question.image is not None
    return PreferencePair(prompt_of(question), chosen, rejected, (question.image,), question.id, question.question_type)


def table(cells: Sequence[Cell]) -> str:
    """Return one row an arm: means ± half their 95 % t-intervals over seeds, and the paired difference to `linear`."""
    by_arm: dict[str, dict[int, Cell]] = defaultdict(dict)
    for cell in cells:
        by_arm[cell.arm][cell.seed] = cell
    base = by_arm.get("linear", {})
    rows = []
    for arm, of in by_arm.items():
        both = [seed for seed in of if seed in base and arm != "linear"]
        rows.append(
            [
                arm,
                str(len(of)),
                str(round(fmean(cell.pairs for cell in of.values()))),
                _spread([100 * cell.accuracy for cell in of.values()]),
                _spread([100 * (of[seed].accuracy - base[seed].accuracy) for seed in both]),
                _spread([100 * cell.error for cell in of.values()]),
                _spread([100 * (of[seed].error - base[seed].error) for seed in both]),
                f"{fmean(cell.seconds for cell in of.values()):.0f}",
            ]
        )
    head = ["arm", "seeds", "pairs", "accuracy, %", "− linear", "calibration error, %", "− linear", "CPU, s"]
    return markdown_table(head, rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    half = half_width(values)
    return f"{fmean(values):.1f}" if half is None else f"{fmean(values):.1f} ± {half:.1f}"


if __name__ == "__main__":
    main()
