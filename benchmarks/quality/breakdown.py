"""What lies do to the rewards alone: how often the best-rewarded answer is right, by number of liars.

    python benchmarks/quality/breakdown.py recipes/liars-5.toml --seeds 5 --out runs/breakdown

`liars.py` trains a policy for every cell. Here no policy is trained: a cell asks a method's own reward about what the
base policy says to the public questions that the alignment draws, step after step, with liars among the sites. It costs
seconds, so every fusion, number of liars and attack is measured. Over the questions of types that a site holds, in the
second half of the steps, and of these those whose G answers differ in worth:

    best      the worth of the answer with the most reward, the mean where several have it; 1 for the best, 0 for the
              worst of the G; that of a random one where there is no reward
    order     how often the better of two answers has more reward; a tie, or no reward, is half

An answer's worth is 1 if it is right and 0 if not; of captions it is what a judge of no site says. Both are means over
question types. They are no accuracy of a policy: an alignment follows small margins over many steps, and finds answers
that the base policy never gives. Completions that were cut off are judged as the others are. Forty steps have 60
canaries before the half that counts, where an alignment of 120 steps has 360 in all.

Who lies is drawn as in `liars.py`; `absent` is the oracle, whose router knows who is gone. Honest scores are computed
once, and liars change them (`accord.attacks.scores`); pairs that poison would need their sites trained anew. What is
measured is kept, and the same command goes on where it stopped. Sites and router are trained first, or taken from the
folders of `accord bench` (`--trained runs/bench`).

    <out>/<recipe>/<seed>/                          a run folder with sites and router
    <out>/<recipe>/cells.jsonl                      a line a cell
    <out>/<recipe>/breakdown.md, breakdown.svg      best, %, mean over seeds ± half its 95 % t-interval
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias, cast

import msgspec
import torch
from liars import HONEST, Found, attack_of, copied, lying, opened, report
from torch import Tensor

from accord.attacks.scores import ATTACKS, Liar
from accord.data.images import Pictures, as_list, load_images, picture_key
from accord.data.questions import normalise_answer, right_answers
from accord.data.sampling import draw_balanced
from accord.errors import AccordError, DataWarning
from accord.federation.answering import key_of
from accord.federation.engine import Engine, InProcessEngine
from accord.federation.messages import Absence, Reply, Request, ScoreRange, ScoreReply, ScoreRequest
from accord.methods import check_methods, find_method
from accord.models.generate import answer
from accord.recipe import Recipe
from accord.recipe_file import import_methods, load_recipe
from accord.routing.router import Router
from accord.runs import append_line, read_lines
from accord.stages.job import Job
from accord.stages.sites import labelled_keys
from accord.types import Prompt, Question, prompt_of

METHODS = (
    *("average", "median", "trimmed-mean", "minimum", "routed", "routed-soft", "fedgrpo-reward-all"),
    *("rank-mean", "rank-median", "rank-trimmed", "canary", "canary-mean", "canary-routed"),
    *("canary-average", "canary-routed-soft"),
)

KNOWN = tuple(name for name in ATTACKS if name != "poison")
SETTINGS = ("steps", "target", "trigger")

Scores: TypeAlias = dict[tuple[str, ...], float]
"""Of a candidate, by site, judge, question and text."""


class Liars(InProcessEngine):
    """An engine of honest sites whose scores are kept, some of which lie before they are heard.

    Args:
        engine: of the honest sites.
        known: the honest scores so far, which grow.
        liars: by site.
    """

    def __init__(self, engine: Engine, known: Scores, liars: Mapping[str, Liar]) -> None:
        super().__init__({})
        self.engine = engine
        self.known = known
        self.liars = liars

    @property
    def sites(self) -> Sequence[str]:
        """The sites' names, `[K]`."""
        return self.engine.sites

    def ask(self, requests: Mapping[str, Request], *, deadline: float | None = None) -> dict[str, Reply | Absence]:
        """Answer score requests by what is known, after a liar's lie."""
        asked = {site: r for site, r in requests.items() if isinstance(r, ScoreRequest)}
        self._learn(asked)
        replies: dict[str, Reply | Absence] = {}
        for site, request in asked.items():
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
        recipe, settings = job.recipe, job.recipe.alignment
        wanted = count * settings.prompts_per_step
        types = [q.question_type if settings.balanced else "" for q in job.prompts]
        drawn = [job.prompts[i] for i in draw_balanced(types, wanted, random.Random(recipe.seed))]
        said = answer(
            *job.policy,
            drawn,
            max_new_tokens=settings.max_completion_length,
            samples=settings.group_size,
            temperature=settings.temperature,
            seed=recipe.seed,
            batch_size=settings.questions_at_once,
        )
        self.size = settings.group_size
        every = settings.prompts_per_step
        pairs = list(zip(drawn, said, strict=True))
        steps = [pairs[n : n + every] for n in range(0, wanted, every)]
        self.worth = [[self._worth(job, q, texts) for q, texts in step] for step in steps]
        self.rows = [_rows(step) for step in steps]

        held = {q.id for q in drawn if any(share.wants(q) for share in job.shares.values())}
        self.counted = [[q.id in held for q, _ in step] for step in steps]

    @staticmethod
    def _worth(job: Job, q: Question, texts: Sequence[str]) -> list[float]:
        if not job.recipe.captions:
            return [float(normalise_answer(text) in right_answers(q)) for text in texts]
        distinct = list(dict.fromkeys(texts))
        (scores,) = job.judge.score([prompt_of(q)], [load_images(q.images)], [distinct])
        known = dict(zip(distinct, scores.tolist(), strict=True))
        return [known[text] for text in texts]


def _rows(step: Sequence[tuple[Question, Sequence[str]]]) -> tuple[list[Prompt], list[str], dict[str, list[Any]]]:
    """Return the prompts, the completions and the other columns of a step: a row for each answer."""
    asked = [(q, images, text) for q, texts in step for images in [load_images(q.images)] for text in texts]
    columns: dict[str, list[Any]] = {
        "images": [images for _, images, _ in asked],
        "question_id": [q.id for q, _, _ in asked],
        "question_type": [q.question_type for q, _, _ in asked],
    }
    return [prompt_of(q) for q, _, _ in asked], [text for _, _, text in asked], columns


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
        assert found.reward is not None, method
        self.reward = found.reward(job)
        self.reward.router = self.router = Remembered(self.reward.router)
        self.honest = self.reward.engine
        self.known = known.setdefault(str(found.scores), {})
        self.limits = limits_of(found.scores, job.recipe)
        self.steps = steps
        self.new = self.reward.canaries.state_dict() if self.reward.canaries else {}

    def __call__(self, liars: Mapping[str, Liar]) -> dict[str, float | int | None]:
        """Return `best`, `order` and the number of `questions`; both are None where no answers differ in worth.

        A liar that gives no answer is not asked either: the oracle.
        """
        names = self.honest.sites
        self.router.gone = [k for k, name in enumerate(names) if name in liars and liars[name].attack.kind == "absent"]
        self.reward.engine = Liars(self.honest, self.known, liars)
        if self.reward.canaries:
            self.reward.canaries.load_state_dict(self.new)
        best, order = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        for number, (rows, worth) in enumerate(zip(self.steps.rows, self.steps.worth, strict=True)):
            prompts, completions, columns = rows
            rewards = self.reward(prompts, completions, None, lambda _name, _value: None, **columns)
            if number < len(self.steps.rows) // 2:
                continue
            size = self.steps.size
            for n, own in enumerate(worth):
                if self.steps.counted[number][n] and max(own) > min(own):
                    kind, given = columns["question_type"][n * size], rewards[n * size : (n + 1) * size]
                    best[kind].append(best_of(given, own))
                    order[kind] += ordered(given, own)
        means = [fmean(map(fmean, found.values())) if found else None for found in (best, order)]
        return {"best": means[0], "order": means[1], "questions": sum(map(len, best.values()))}


def limits_of(scores: ScoreRange | str | None, recipe: Recipe) -> ScoreRange | None:
    """Return the range into which sites clip their scores for a method that asks for this form; None for none."""
    if isinstance(scores, ScoreRange):
        return scores
    return recipe.scores if scores == "recipe" else None


CLOSE = 1e-6
"""Rewards that differ by less are equal: of evenly many sites that contradict each other rounding is left."""


def best_of(rewards: Sequence[float | None], worth: Sequence[float]) -> float:
    """Return the worth of the best-rewarded answer, 0 for the worst and 1 for the best; the mean over those that tie.

    Without any reward it is that of a random answer.
    """
    known = [reward for reward in rewards if reward is not None]
    top = max(known, default=0.0)
    chosen = [w for w, r in zip(worth, rewards, strict=True) if r is not None and top - r <= CLOSE] or worth
    return (fmean(chosen) - min(worth)) / (max(worth) - min(worth))


def ordered(rewards: Sequence[float | None], worth: Sequence[float]) -> list[float]:
    """Return of every two answers that differ in worth whether the better has more reward; ½ for a tie or no reward."""
    rows = list(zip(rewards, worth, strict=True))
    pairs = [(better, worse) for better, high in rows for worse, low in rows if high > low]
    return [0.5 if a is None or b is None or abs(a - b) <= CLOSE else float(a > b) for a, b in pairs]


def measure(recipe: Recipe, trained: Path | None, file: Path, options: argparse.Namespace) -> None:
    """Measure the cells of one seed that are not in the file yet."""
    methods, settings = options.methods.split(","), {name: getattr(options, name) for name in SETTINGS}
    most = len(recipe.sites) // 2 if options.liars is None else options.liars
    cells = [(HONEST, 0), *((name, n) for n in range(1, most + 1) for name in options.attacks.split(","))]
    waiting = {method: cells for method in methods}
    for row in read_lines(file):
        if row["seed"] == recipe.seed and row["settings"] == settings and row["method"] in waiting:
            name = str(row["method"])
            waiting[name] = [cell for cell in waiting[name] if cell != (row["attack"], row["liars"])]
    if not any(waiting.values()):
        return
    folder = file.parent / str(recipe.seed)
    with opened(
        recipe, folder, trained, methods, lambda job, name: trained is not None and copied(job, trained, name)
    ) as job:
        steps, known = Steps(job, options.steps), dict[str, Scores]()
        labelled = labelled_keys(job)
        for method in filter(waiting.get, methods):
            judged = Judged(job, method, steps, known)
            for name, n in waiting[method]:
                attack = attack_of(name, options.target, options.trigger)
                liars = {
                    site.name: Liar(
                        site.attack,
                        judged.limits,
                        seed=recipe.seed,
                        site=site.name,
                        steps=options.steps,
                        labelled=labelled if site.attack.spares else frozenset(),
                    )
                    for site in lying(recipe, attack, n).sites
                    if site.attack is not None
                }
                cell = {"seed": recipe.seed, "method": method, "attack": name, "liars": n, "settings": settings}
                append_line(file, {**cell, **judged(liars)})
            print(f"{recipe.name} seed {recipe.seed}, {method}: measured", flush=True)


def read(file: Path) -> Found:
    """Return what is measured of `best`, in per cent, by attack, method, liars and seed."""
    found: Found = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in read_lines(file):
        if isinstance(best := row["best"], float):
            n, seed = cast(int, row["liars"]), cast(int, row["seed"])
            found[str(row["attack"])][str(row["method"])][n][seed] = 100 * best
    return found


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
    parser.add_argument("--trigger", default="shape", help="words of the questions where the attack trigger lies")
    parser.add_argument("--out", type=Path, default=Path("runs/breakdown"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DataWarning)  # of sites that are absent or set aside, at every step
    base = import_methods(load_recipe(options.recipe))
    check_methods(base, options.methods.split(","))
    for what, given, there in (("method", options.methods, METHODS), ("attack", options.attacks, KNOWN)):
        if unknown := set(given.split(",")) - set(there):
            raise SystemExit(f"error: no {what} {', '.join(sorted(unknown))} is measured here; {', '.join(there)} are")
    file = options.out / base.name / "cells.jsonl"
    for seed in range(options.seeds) if options.seed_only is None else [options.seed_only]:
        recipe = replace(base, seed=seed, compare=(), tried={})
        try:
            measure(recipe, options.trained and options.trained / base.name / str(seed), file, options)
        except AccordError as error:
            raise SystemExit(f"error: {error}") from error
    print(report(read(file), file.parent, "breakdown"))


if __name__ == "__main__":
    main()
