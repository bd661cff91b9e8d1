"""How many sites may lie? Accuracy against the number of liars, for fusions and defences, attack by attack.

    accord bench recipes/liars-5.toml --seeds 5 --methods rank-mean --out runs/bench        trains sites and router
    python benchmarks/quality/liars.py recipes/liars-5.toml --trained runs/bench --seeds 5 --out runs/liars

A cell costs an alignment alone: sites and router are copied from the run folders of a bench, and the first sites of a
list drawn by the seed become liars by the recipe's own key, `attack`. With fewer than `--liars` of them the same ones
lie. Only poisoned pairs need their sites trained anew. The attack `absent` is the oracle: the same fusion with the
liars gone. What is measured is kept, and the same command goes on where it stopped.

    <out>/<recipe>/<attack>-<liars>/<seed>/     a run folder: compare/<method>.json, and cpu.json, seconds a cell
    <out>/<recipe>/liars.md, liars.svg          in-domain accuracy, %, mean over seeds ± half its 95 % t-interval;
                                                of captions how often a judge prefers them to the base's

    python benchmarks/quality/liars.py --canaries     how many canaries find a liar, and how often an alarm is false
    python benchmarks/quality/liars.py --contradictions     the same of sites that others contradict, by simulation
"""

import argparse
import json
import random
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

import torch

from accord.attacks.scores import ATTACKS, Attack
from accord.errors import AccordError, DataWarning, RunError
from accord.evaluation.figures import breakdown_curves
from accord.evaluation.intervals import half_width
from accord.evaluation.markdown import markdown_table
from accord.evaluation.table import PREFERRED, macro
from accord.methods import check_methods, needed
from accord.pipeline.bench import measure_base
from accord.pipeline.cells import cells_of, in_domain
from accord.pipeline.comparison import compare
from accord.recipe import Recipe
from accord.recipe_file import dump_recipe, import_methods, load_recipe, renewed
from accord.routing.canaries import CanaryConfig, Trust, alarms
from accord.runs import Run, something_done, write_atomic
from accord.stages.job import Job, open_job
from accord.stages.routing import train_router, train_sites

Found: TypeAlias = dict[str, dict[str, dict[int, dict[int, float]]]]

HONEST = "honest"
METHODS = ("average", "median", "routed", "fedgrpo-reward-all", "rank-mean", "rank-median", "rank-trimmed", "canary")


def attack_of(name: str, target: str, trigger: str) -> Attack:
    """Return the attack of this name, flip of any other, with the target and the trigger where it has one."""
    attack = ATTACKS.get(name, Attack())
    attack = replace(attack, target=target) if attack.target else attack
    return replace(attack, trigger=trigger) if attack.trigger else attack


def lying(recipe: Recipe, attack: Attack, liars: int) -> Recipe:
    """Return the recipe with so many sites that lie, drawn by its seed: those of a smaller number are among them."""
    order = random.Random(recipe.seed).sample([site.name for site in recipe.sites], len(recipe.sites))
    sites = (replace(site, attack=attack) if site.name in order[:liars] else site for site in recipe.sites)
    return replace(recipe, sites=tuple(sites))


@contextmanager
def opened(
    recipe: Recipe, folder: Path, trained: Path | None, methods: Sequence[str], take_over: Callable[[Job, str], bool]
) -> Iterator[Job]:
    """Open a cell's run folder, with the sites that `take_over` brings in and the router of the folder `trained`.

    What neither brings is trained.

    Raises:
        RunError: `trained` holds no router.
    """
    text = dump_recipe(recipe)
    run = (
        Run.resume(folder, text, renewed=renewed)
        if something_done(folder)
        else Run.create(folder, text, seed=recipe.seed)
    )
    with open_job(recipe, run, quiet=True) as job:
        train_sites(job, take_over=lambda name: take_over(job, name))
        if "router" in needed(recipe, methods) and not run.done("router"):
            if trained is None:
                train_router(job)
            else:
                take_router(job, trained)
        yield job


def take_router(job: Job, trained: Path) -> None:
    """Copy a trained router, and what its training sent."""
    with job.doing("router"):
        take(trained / "router", job.path / "router")
        if (sent := trained / "traffic" / "router.json").is_file():
            write_atomic(job.path / "traffic" / "router.json", sent.read_bytes())


def copied(job: Job, trained: Path, name: str) -> bool:
    """Copy a trained site; one whose pairs are poisoned is trained here, for its pairs are others."""
    attack = job.site(name).attack
    if attack is not None and attack.kind == "poison":
        return False
    with job.doing(f"site {name}"):
        take(trained / "sites" / name, job.path / "sites" / name)
    return True


def take(source: Path, target: Path) -> None:
    """Copy a folder of a trained run.

    Raises:
        RunError: it is not there.
    """
    if not source.is_dir():
        raise RunError(f"{source} is missing; train it by `accord bench RECIPE --methods routed --out …`, see --help")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def measure(recipe: Recipe, folder: Path, trained: Path, methods: Sequence[str]) -> None:
    """Measure the cells of one folder that are not measured, and note the CPU seconds of each.

    Where nobody lies the untrained base is among them.
    """
    file = folder / "cpu.json"
    taken = json.loads(file.read_text()) if file.is_file() else {}
    with opened(recipe, folder, trained, methods, lambda job, name: copied(job, trained, name)) as job:
        if not any(site.attack for site in recipe.sites) and not job.run.done("compare base"):
            measure_base(job)
        for method in methods:
            if not job.run.done(f"compare {method}"):
                began = time.process_time()
                compare(job, method)
                taken[method] = round(time.process_time() - began, 1)
                write_atomic(file, json.dumps(taken) + "\n")


def read(folder: Path, in_domain: Sequence[str] | None) -> Found:
    """Return what is measured, in per cent, by attack, method, liars and seed.

    Args:
        folder: a recipe's.
        in_domain: the question types that a site holds, whose accuracies are averaged; None for captions, where it is
            how often they are preferred to the base's.
    """
    found: Found = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for place in sorted(folder.glob("*-*/*")):
        attack, _, liars = place.parent.name.rpartition("-")
        for cell in cells_of(place) if place.name.isdecimal() else []:
            value = macro(cell, [PREFERRED] if in_domain is None else in_domain)
            if value is not None:
                found[attack][cell.method][int(liars)][cell.seed] = 100 * value
    return found


def report(found: Found, folder: Path, name: str) -> str:
    """Write a table and a figure of this name to a recipe's folder; return the table.

    The honest cells stand in every attack, and the base beside every number of liars.
    """
    honest = found.pop(HONEST, {})
    panels: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    most = max((n for lines in found.values() for points in lines.values() for n in points), default=0)
    lines = []
    for attack, by_method in (found or {HONEST: honest}).items():
        panel = panels[attack] = {}
        for method in dict.fromkeys([*honest, *by_method]):
            seeds = {**honest.get(method, {}), **by_method.get(method, {})}
            if method == "base":  # it asks nobody
                seeds = dict.fromkeys(range(most + 1), seeds[0])
            values = {n: list(of.values()) for n, of in sorted(seeds.items())}
            panel[method] = {n: (fmean(v), half_width(v) or 0.0) for n, v in values.items()}
            lines.append([attack, method, *(shown(values.get(n, [])) for n in range(most + 1))])
    heads = ["attack", "method", *(f"{n} liars" if n != 1 else "1 liar" for n in range(most + 1))]
    text = markdown_table(heads, lines)
    write_atomic(folder / f"{name}.md", text + "\n")
    if figure := breakdown_curves(panels):
        write_atomic(folder / f"{name}.svg", figure + "\n")
    return text


def shown(values: Sequence[float]) -> str:
    """Return mean ± half interval and the number of seeds; a dash of none."""
    half = half_width(values) if values else None
    around = "" if half is None else f" ± {half:.1f}"
    return f"{fmean(values):.1f}{around} ({len(values)})" if values else "–"


def canaries_needed() -> str:
    """Return the table of docs/liars.md: how often a site is set aside in a type within so many canaries of it."""
    counts = (9, 12, 16, 24, 32, 48)
    rows = {"flips every order": 0.0, "flips, and is sometimes wrong itself": 0.1, "flips most": 0.3}
    rows |= {"knows nothing": 0.5, "knows a little": 0.6, "knows much": 0.9}
    lines = [
        [name, f"{100 * accuracy:.0f} %", *(f"{float(f'{100 * alarms(accuracy, n):.2g}'):g} %" for n in counts)]
        for name, accuracy in rows.items()
    ]
    return markdown_table(["a site that", "ranks right", *(f"{n} canaries" for n in counts)], lines)


RUNS, STEPS, ORDINARY = 200, 120, 12
"""Simulated runs; steps of each; ordinary questions of a type in a step, beside one hidden question."""


def named(hidden: Sequence[float], ordinary: Sequence[float], *, seed: int = 0) -> list[tuple[bool, int]]:
    """Simulate runs of one question type; return of each whether it named an honest site, and when all liars were.

    A site that ranks ordinary questions right less than half of the time is a liar here.

    Args:
        hidden: how often each site ranks a hidden question right, `[K]`; every answer of another in its place.
        ordinary: the same of ordinary questions.
        seed: of the draws.

    Returns:
        For each run a flag, and the first step after which every liar is named; 0 for never, or for no liar.
    """
    generator = torch.Generator().manual_seed(seed)
    rates = torch.tensor([hidden, *[ordinary] * ORDINARY])
    liars = torch.tensor(ordinary) < 0.5
    found = []
    for _ in range(RUNS):
        trust = Trust([str(k) for k in range(len(hidden))], ["a type"], CanaryConfig())  # every order is an opinion
        honest_named, all_named = False, 0
        for step in range(1, STEPS + 1):
            right = torch.rand(rates.shape, generator=generator) < rates
            for k, share in enumerate(right[0].double().tolist()):
                trust.learn(str(k), "a type", share)
            for n, row in enumerate(right.double()):
                trust.compare("a type", torch.stack([row, 1 - row]), hidden=n == 0)
            trust.find_two_faced()
            who = trust.two_faced[:, 1]
            honest_named |= bool((who & ~liars).any())
            if not all_named and liars.any() and bool(who[liars].all()):
                all_named = step
        found.append((honest_named, all_named))
    return found


def contradictions_named() -> str:
    """Return the table of docs/liars.md: how often an honest site is named, and how soon one that knows canaries."""
    lines = []
    for about, right, elsewhere, liars in (
        ("nobody lies, right half of the time", 0.5, 0.5, 0),
        ("nobody lies, right at 75 %", 0.75, 0.75, 0),
        ("nobody lies, right at 90 % of hidden ones and half of the others", 0.9, 0.5, 0),
        ("one flips ordinary ones, the others right at 75 %", 0.75, 0.75, 1),
        ("one flips ordinary ones, the others right at 90 %", 0.9, 0.9, 1),
        ("two flip ordinary ones, the others right at 75 %", 0.75, 0.75, 2),
        ("two flip ordinary ones, the others right at 90 %", 0.9, 0.9, 2),
    ):
        for sites in (3, 5):
            if 2 * liars >= sites:
                continue
            honest = sites - liars
            runs = named([1.0] * liars + [right] * honest, [1 - elsewhere] * liars + [elsewhere] * honest)
            when = sorted(step or STEPS + 1 for _, step in runs)[len(runs) // 2]
            shares = [sum(flag for flag, _ in runs), sum(step > 0 for _, step in runs)]
            told = [f"{100 * share / len(runs):.3g} %" for share in shares]
            median = str(when) if when <= STEPS else "–"
            lines.append([about, str(sites), told[0], told[1] if liars else "", median if liars else ""])
    heads = ["sites that", "sites", "an honest one is named", "all liars are named", "after steps, median"]
    return markdown_table(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--trained", type=Path, help="of a bench: <trained>/<recipe>/<seed> has sites and router")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed-only", type=int, help="measure this seed alone: seeds can be measured side by side")
    parser.add_argument("--liars", type=int, help="at most; by default half of the sites")
    parser.add_argument("--attacks", default="absent,flip,scale,noise,target,collude,sleeper,mimic,off-canary")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--target", default="circle", help="the answer that target, mimic, trigger and poison promote")
    parser.add_argument("--trigger", default="shape", help="words of the questions where the attack trigger lies")
    parser.add_argument("--out", type=Path, default=Path("runs/liars"))
    parser.add_argument("--canaries", action="store_true", help="print the table of canaries and alarms instead")
    parser.add_argument("--contradictions", action="store_true", help="print the table of contradicted sites instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DataWarning)  # of sites that are absent or set aside, at every step
    warnings.filterwarnings("always", ".* is contradicted where a question has the word", DataWarning)
    if options.canaries or options.contradictions:
        print(canaries_needed() if options.canaries else contradictions_named())
        return
    if options.recipe is None or options.trained is None:
        print(parser.format_help())
        return
    base, methods = import_methods(load_recipe(options.recipe)), options.methods.split(",")
    check_methods(base, methods)
    attacks = options.attacks.split(",")
    if unknown := set(attacks) - set(ATTACKS):
        raise SystemExit(f"error: there is no attack {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}")
    most = len(base.sites) // 2 if options.liars is None else options.liars
    for seed in range(options.seeds) if options.seed_only is None else [options.seed_only]:
        recipe = replace(base, seed=seed, compare=(), tried={})
        for name, n in [(HONEST, 0), *((name, n) for n in range(1, most + 1) for name in attacks)]:
            attack = attack_of(name, options.target, options.trigger)
            folder = options.out / base.name / f"{name}-{n}" / str(seed)
            try:
                measure(lying(recipe, attack, n), folder, options.trained / base.name / str(seed), methods)
            except AccordError as error:
                raise SystemExit(f"error: {error}") from error
            print(f"{base.name} {name} {n} of {len(base.sites)}, seed {seed}: measured", flush=True)
    folder = options.out / base.name
    print(report(read(folder, in_domain(folder / f"{HONEST}-0")), folder, "liars"))


if __name__ == "__main__":
    main()
