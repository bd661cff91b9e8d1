"""What lies do to the rewards alone: how often a fusion ranks a better answer above a worse one, by number of liars.

    python benchmarks/quality/breakdown.py recipes/liars-5.toml --seeds 5 --out runs/breakdown

`liars.py` trains a policy for every cell. Here nothing is trained: a cell asks a method's own reward about what the
base policy says to public questions, step after step as the alignment would, with liars among the sites. It costs
seconds, so every fusion, number of liars and attack is measured. What is compared are the answers to one question in
the second half of the steps, when canaries have told what they can; a tie, or no reward, is half right. The better of
two answers is the one that is right; of captions, the one that a judge of no site prefers.

Who lies is drawn as in `liars.py`; `absent` is the oracle, whose router knows who is gone. Honest scores are computed
once, and liars change them (`accord.attacks.scores`). What is measured is kept, and the same command goes on where it
stopped.

Sites and router are trained first, or taken from the folders of `accord bench` (`--trained runs/bench`).

    <out>/<recipe>/<seed>/                          a run folder with sites and router; liars.py can take them, too
    <out>/<recipe>/cells.jsonl                      a line a cell
    <out>/<recipe>/breakdown.md, breakdown.svg      %, mean over seeds ± half its 95 % t-interval
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import msgspec
import torch
from liars import HONEST, copied, lying, opened, shown
from torch import Tensor

from accord.attacks.scores import ATTACKS, Attack, Liar
from accord.data.images import Pictures, as_list, load_images, picture_key
from accord.data.questions import normalise_answer, right_answers
from accord.errors import AccordError, DataWarning
from accord.evaluation.figures import breakdown_curves
from accord.evaluation.intervals import half_width
from accord.evaluation.markdown import markdown_table
from accord.federation.answering import key_of
from accord.federation.engine import Engine, Traffic
from accord.federation.messages import Absence, Reply, Request, ScoreRange, ScoreReply, ScoreRequest
from accord.methods import check_methods, find_method
from accord.models.generate import answer
from accord.recipe import Recipe
from accord.recipe_file import import_methods, load_recipe
from accord.routing.router import Router
from accord.runs import write_atomic
from accord.stages.job import Job
from accord.stages.sites import labelled_keys
from accord.types import Prompt, Question, prompt_of

METHODS = (
    *("average", "median", "trimmed-mean", "minimum", "routed", "routed-soft", "fedgrpo-reward-all"),
    *("rank-mean", "rank-median", "rank-trimmed", "canary", "canary-mean", "canary-routed"),
)

Scores: TypeAlias = dict[tuple[str, ...], float]
"""Of a candidate, by site, judge, question and text."""


class Liars:
    """An engine of honest sites whose scores are kept, some of which lie before they are heard.

    Args:
        engine: of the honest sites.
        known: the honest scores so far, which grow.
        liars: by site.
    """

    def __init__(self, engine: Engine, known: Scores, liars: Mapping[str, Liar]) -> None:
        self.engine = engine
        self.known = known
        self.liars = liars
        self.traffic = Traffic()

    @property
    def sites(self) -> Sequence[str]:
        """The sites' names, `[K]`."""
        return self.engine.sites

    @property
    def processes(self) -> int:
        """One."""
        return 1

    def total(self, values: Sequence[float]) -> Sequence[float]:
        """Return the values themselves."""
        return values

    def ask(self, requests: Mapping[str, Request], *, deadline: float | None = None) -> dict[str, Reply | Absence]:
        """Answer score requests by what is known, after a liar's lie; others go to the sites."""
        self._learn({site: r for site, r in requests.items() if isinstance(r, ScoreRequest)})
        replies: dict[str, Reply | Absence] = {}
        for site, request in requests.items():
            if not isinstance(request, ScoreRequest):
                replies |= self.engine.ask({site: request}, deadline=deadline)
                continue
            keys = [(site, request.judge, key_of(item)) for item in request.items]
            items = zip(keys, request.items, strict=True)
            told = [[self.known[*key, text] for text in item.candidates] for key, item in items]
            if site in self.liars:
                told = self.liars[site](request, told)
            replies[site] = ScoreReply(request.id, told)
        return replies

    def _learn(self, requests: Mapping[str, ScoreRequest]) -> None:
        """Ask the honest sites for what is not known yet."""
        new = {}
        for site, request in requests.items():
            items = []
            for item in request.items:
                key = key_of(item)
                unknown = [text for text in item.candidates if (site, request.judge, key, text) not in self.known]
                if unknown:
                    items.append(msgspec.structs.replace(item, candidates=unknown))
            if items:
                names = {name for item in items for name in item.images}
                images = {name: data for name, data in request.images.items() if name in names}
                new[site] = msgspec.structs.replace(request, items=items, images=images)
        for site, reply in self.engine.ask(new).items():
            assert isinstance(reply, ScoreReply) and not reply.refused, reply
            for item, scores in zip(new[site].items, reply.scores, strict=True):
                for text, score in zip(item.candidates, scores, strict=True):
                    self.known[site, new[site].judge, key_of(item), text] = score


class Remembered:
    """A router that is asked once about the same completions: no lie changes what it has learnt before.

    Args:
        router: weights `[N, K]`.

    Attributes:
        gone: the places of sites that have no weight.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.gone: list[int] = []
        self.known: dict[tuple[object, ...], Tensor] = {}

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], candidates: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return the router's weights `[N, K]`."""
        seen = tuple(hash(picture_key(image)) for own in images for image in as_list(own))
        key = repr((prompts, candidates)), seen
        if key not in self.known:
            self.known[key] = self.router(prompts, images, candidates)
        weights = self.known[key].clone()
        weights[:, self.gone] = 0.0
        return weights


class Steps:
    """What the base policy says to public questions, in the steps of an alignment, and how good it is.

    Args:
        job: with the policy; a judge of captions too, if its answers are captions.
        count: steps.
    """

    def __init__(self, job: Job, count: int) -> None:
        recipe = job.recipe
        generator = random.Random(recipe.seed)
        wanted = count * recipe.alignment.prompts_per_step
        times = -(-wanted // len(job.prompts))
        drawn = [q for _ in range(times) for q in generator.sample(job.prompts, len(job.prompts))][:wanted]
        said = answer(
            *job.policy,
            drawn,
            max_new_tokens=recipe.alignment.max_completion_length,
            samples=recipe.alignment.group_size,
            seed=recipe.seed,
        )
        self.size = recipe.alignment.group_size
        every = recipe.alignment.prompts_per_step
        pairs = list(zip(drawn, said, strict=True))
        steps = [pairs[n : n + every] for n in range(0, wanted, every)]
        self.worth = [[self._worth(job, q, texts) for q, texts in step] for step in steps]
        self.rows = [_rows(step) for step in steps]

    @staticmethod
    def _worth(job: Job, q: Question, texts: Sequence[str]) -> list[float]:
        if job.recipe.evaluation.judge:
            (scores,) = job.judge.score([prompt_of(q)], [load_images(q.images)], [texts])
            return scores.tolist()
        return [float(normalise_answer(text) in right_answers(q)) for text in texts]


def _rows(step: Sequence[tuple[Question, Sequence[str]]]) -> dict[str, list[Any]]:
    """Return the columns of a step: a row for each answer."""
    asked = [(q, load_images(q.images), text) for q, texts in step for text in texts]
    return {
        "prompts": [prompt_of(q) for q, _, _ in asked],
        "completions": [text for _, _, text in asked],
        "images": [images for _, images, _ in asked],
        "question_id": [q.id for q, _, _ in asked],
        "question_type": [q.question_type for q, _, _ in asked],
    }


class Judged:
    """A method's reward over the steps, cell after cell: it is opened once.

    Args:
        job: whose sites are honest.
        method: with a reward.
        steps: what is judged.
        known: the honest scores so far, by the form in which methods ask for them.

    Attributes:
        limits: the range of scores that the method asks for; None for none.
    """

    def __init__(self, job: Job, method: str, steps: Steps, known: dict[str, Scores]) -> None:
        found = find_method(method, [site.name for site in job.recipe.sites])
        if found.reward is None:
            raise SystemExit(f"error: no site judges answers by {method!r}; choose other --methods")
        self.reward = found.reward(job)
        self.reward.router = self.router = Remembered(self.reward.router)
        self.honest = self.reward.engine
        self.known = known.setdefault(str(found.scores), {})
        self.limits = found.scores if isinstance(found.scores, ScoreRange) else None
        if found.scores == "recipe":
            self.limits = job.recipe.scores
        self.steps = steps
        self.new = self.reward.canaries.state_dict() if self.reward.canaries else {}

    def __call__(self, liars: Mapping[str, Liar]) -> float | None:
        """Return how often two answers to a question are ordered rightly: the mean over question types.

        A liar that gives no answer is not asked either: the oracle. None where the base policy's answers to no question
        differ in worth.
        """
        names = self.honest.sites
        self.router.gone = [k for k, name in enumerate(names) if name in liars and liars[name].attack.kind == "absent"]
        self.reward.engine = Liars(self.honest, self.known, liars)
        if self.reward.canaries:
            self.reward.canaries.load_state_dict(self.new)
        found = defaultdict[str, list[float]](list)
        for number, (rows, worth) in enumerate(zip(self.steps.rows, self.steps.worth, strict=True)):
            prompts, completions = rows["prompts"], rows["completions"]
            columns = {name: column for name, column in rows.items() if name not in ("prompts", "completions")}
            rewards = self.reward(prompts, completions, None, lambda _name, _value: None, **columns)
            if number < len(self.steps.rows) // 2:
                continue
            size = self.steps.size
            for n, own in enumerate(worth):
                found[rows["question_type"][n * size]] += ordered(rewards[n * size : (n + 1) * size], own)
        return fmean(fmean(right) for right in found.values() if right) if any(found.values()) else None


def ordered(rewards: Sequence[float | None], worth: Sequence[float]) -> list[float]:
    """Return of every two answers that differ in worth whether the better has more reward; ½ for a tie or no reward."""
    rows = list(zip(rewards, worth, strict=True))
    pairs = [(better, worse) for better, high in rows for worse, low in rows if high > low]
    return [0.5 if a is None or b is None else float(a > b) + 0.5 * (a == b) for a, b in pairs]


def measure(recipe: Recipe, trained: Path | None, file: Path, options: argparse.Namespace) -> None:
    """Measure the cells of one seed that are not in the file yet."""
    most = len(recipe.sites) // 2 if options.liars is None else options.liars
    conditions = [(HONEST, 0), *((name, n) for n in range(1, most + 1) for name in options.attacks.split(","))]
    done = {(row["seed"], row["method"], row["attack"], row["liars"]) for row in read(file)}
    folder = file.parent / str(recipe.seed)
    with opened(
        recipe, folder, trained, ("routed",), lambda job, name: trained is not None and copied(job, trained, name)
    ) as job:
        steps, known = Steps(job, options.steps), dict[str, Scores]()
        labelled = labelled_keys(job)
        for method in options.methods.split(","):
            waiting = [each for each in conditions if (recipe.seed, method, *each) not in done]
            judged = Judged(job, method, steps, known) if waiting else None
            for name, n in waiting:
                attack = replace(ATTACKS.get(name, Attack()), target=options.target)
                assert judged is not None
                liars = {
                    site.name: Liar(
                        attack,
                        judged.limits,
                        seed=recipe.seed,
                        site=site.name,
                        steps=options.steps,
                        labelled=labelled if attack.spares else frozenset(),
                    )
                    for site in lying(recipe, attack, n).sites
                    if site.attack is not None
                }
                row = {"seed": recipe.seed, "method": method, "attack": name, "liars": n, "right": judged(liars)}
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
            print(f"{recipe.name} seed {recipe.seed}, {method}: measured", flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the cells that are measured."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def report(file: Path) -> str:
    """Write the table and the figure beside the cells; return the table. The honest cells stand in every attack."""
    cells: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for row in read(file):
        if row["right"] is not None:
            cells[row["attack"], row["method"], row["liars"]].append(100 * row["right"])
    attacks = dict.fromkeys(attack for attack, _, _ in cells if attack != HONEST)
    methods = dict.fromkeys(method for _, method, _ in cells)
    most = max(n for _, _, n in cells)
    lines: list[list[str]] = []
    panels: dict[str, dict[str, dict[int, tuple[float, float]]]] = {attack: {} for attack in attacks}
    for attack in attacks:
        for method in methods:
            values = {0: cells[HONEST, method, 0]} | {n: cells[attack, method, n] for n in range(1, most + 1)}
            lines.append([attack, method, *map(shown, values.values())])
            panels[attack][method] = {n: (fmean(v), half_width(v) or 0.0) for n, v in values.items() if v}
    text = markdown_table(["attack", "method", *(f"{n} liars" if n != 1 else "1 liar" for n in range(most + 1))], lines)
    write_atomic(file.parent / "breakdown.md", text + "\n")
    write_atomic(file.parent / "breakdown.svg", breakdown_curves(panels) + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--trained", type=Path, help="of a bench: <trained>/<recipe>/<seed> has sites and router")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed-only", type=int, help="measure this seed alone")
    parser.add_argument("--liars", type=int, help="at most; by default half of the sites")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--attacks", default="absent,flip,collude,off-canary")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--target", default="circle", help="the answer that target and mimic promote")
    parser.add_argument("--out", type=Path, default=Path("runs/breakdown"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DataWarning)  # of sites that are absent or set aside, at every step
    base = import_methods(load_recipe(options.recipe))
    check_methods(base, options.methods.split(","))
    file = options.out / base.name / "cells.jsonl"
    for seed in range(options.seeds) if options.seed_only is None else [options.seed_only]:
        recipe = replace(base, seed=seed, compare=(), tried={})
        try:
            measure(recipe, options.trained and options.trained / base.name / str(seed), file, options)
        except AccordError as error:
            raise SystemExit(f"error: {error}") from error
    print(report(file))


if __name__ == "__main__":
    main()
