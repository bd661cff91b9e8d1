"""Train a projector by several rules on the silos of one recipe, with several seeds: a table, and a line a cell.

    python benchmarks/quality/fed_cmp.py recipes/fed-cmp/fed-cmp-easy-vqa.toml --seeds 3
    python benchmarks/quality/fed_cmp.py recipes/fed-cmp/fed-cmp-easy-vqa.toml --features text --rules fedavg,fed-cmp

Each cell is what `accord pretrain-projector` does with the recipe's `[projector]` and one change: all have the same
captions in the same number of steps. A cell that `--out` holds is not run again. A rule is one of
`accord.federation.aggregation` and `accord.federation.reliability`, or

    none             the projector as it was drawn
    local, central   every site alone, in the mean; all captions in one place: bounds
    fedprox, moon    FedAvg with other local steps
    kept             FedAvg of sites that keep AdamW's moments from round to round
    one-cosine       FedAvg, and the learning rate falls once over all rounds
    longer           FedAvg, and the server goes 1.5 times as far
    ours             all three, and sites weighted as by `cra-relative`
    rule+attack      the rule, where the last site sends what an attack of `accord.attacks.updates` makes of the
                     updates, and a distance of 0: sign-flip, scale, huge, alie, ipm, norm-bounded; or `hostile`, 20
                     times the opposite of its own
    rule+attack+0    the same without a bound on the length of updates

With `--tune STEPS` the server goes on from each projector: it tunes language model and projector on its public
questions, as an assistant is tuned on instructions after its projector is trained, and is measured again.

A column has the share of FedAvg's distance to `central` that a rule leaves, in NLL and in macro accuracy; p is of a
paired t-test of macro accuracies against `fedavg` over at least five seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from accord.attacks.updates import Attack, alie, hostile, huge, ipm, norm_bounded, scale, sign_flip
from accord.data.sampling import sample_questions
from accord.evaluation.accuracy import outcomes_by_type
from accord.evaluation.intervals import half_width, paired_p
from accord.evaluation.markdown import markdown_table
from accord.federation.engine import InProcessEngine
from accord.federation.projector import ProjectorConfig
from accord.models.finetune import FineTuneConfig, finetune
from accord.models.generate import answer
from accord.models.load import load_model
from accord.models.projector import train_projector_alone
from accord.recipe import Recipe
from accord.recipe_file import dump_recipe, load_recipe
from accord.runs import Run
from accord.stages.job import PROJECTOR, Job, open_job
from accord.stages.process import prepare
from accord.stages.projector import pretrain_projector, projector_training
from accord.stages.traffic import add_stage

DEFAULT = (
    "none,local,fedavg,fedprox,moon,fedavgm,fedadam,task-arithmetic,ties,dare,cra,cra-relative,fed-cmp,fed-cmp-relative,"
    "fed-cmp-fixed,fed-cmp-late,fed-cmp-prose,kept,one-cosine,longer,ours,central"
)
FURTHER = 1.5
"""η of `longer` and `ours`."""

ATTACKS: dict[str, Attack] = {
    "hostile": partial(sign_flip, factor=20.0),
    "sign-flip": sign_flip,
    "scale": scale,
    "huge": huge,
    "alie": partial(alie, z=1.5),
    "ipm": ipm,
    "norm-bounded": norm_bounded,
}


def configured(config: ProjectorConfig, rule: str) -> ProjectorConfig:
    """Return the recipe's settings with one change."""
    averaging = config.averaging
    if rule in ("local", "central"):
        return replace(config, training=rule)
    if rule in ("fedprox", "moon"):
        return replace(config, client=replace(config.client, rule=rule))
    further = replace(averaging.aggregation, learning_rate=FURTHER)
    ours = {
        "kept": {"moments": "kept"},
        "one-cosine": {"schedule": "training"},
        "longer": {"aggregation": further},
        "ours": {"moments": "kept", "schedule": "training", "aggregation": replace(further, rule="cra-relative")},
    }
    changes = ours.get(rule, {"aggregation": replace(averaging.aggregation, rule=rule)})
    return replace(config, averaging=replace(averaging, **changes))


def attacked(job: Job, attack: str) -> InProcessEngine:
    """Return what reaches the sites, of which the last lies, and says that its images and texts lie together."""
    loaded = load_model((job.written or job.recipe).policy.checkpoint, trainable=True)
    train_projector_alone(loaded[0])
    sites = {site.name: projector_training(job, site.name, loaded) for site in job.recipe.sites}
    return InProcessEngine(hostile(sites, [*sites][-1:], ATTACKS[attack], distance=0.0))


def tuned(job: Job, rule: str, steps: int) -> float:
    """Return the macro accuracy after the server has tuned what the projector was trained for."""
    recipe = job.written
    assert recipe is not None and recipe.projector is not None
    drawn = rule == "none"
    model, processor = load_model(recipe.policy.checkpoint if drawn else str(job.path / PROJECTOR), trainable=True)
    if drawn:
        trained = [p for p in model.parameters() if p.requires_grad]
        train_projector_alone(model, seed=recipe.seed)
        for parameter in trained:
            parameter.requires_grad_(True)
    config = FineTuneConfig(steps=steps, batch_size=32, learning_rate=5e-4)
    with tempfile.TemporaryDirectory() as scratch:
        finetune(model, processor, job.questions["public"], config, seed=recipe.seed, out=Path(scratch))
    asked = sample_questions(job.questions[recipe.projector.evaluate_split], recipe.projector.evaluate_on, seed=0)
    said = answer(model.eval(), processor, asked, max_new_tokens=recipe.alignment.max_completion_length)
    outcomes = outcomes_by_type(asked, [texts[0] for texts in said])
    return fmean(fmean(found) for found in outcomes.values())


def cell(recipe: Recipe, rule: str, seed: int, tune: int = 0) -> dict[str, object]:
    """Train once; return what was measured."""
    rule, attack, bound = (rule + "++").split("+")[:3]
    assert recipe.projector is not None
    config = configured(recipe.projector, "fedavg" if rule == "none" else rule)
    if bound:
        aggregation = replace(config.averaging.aggregation, bound=float(bound))
        config = replace(config, averaging=replace(config.averaging, aggregation=aggregation))
    if rule == "none":
        config = replace(config, averaging=replace(config.averaging, rounds=1))
    recipe = replace(recipe, seed=seed, projector=config)
    started = time.process_time()
    with (
        tempfile.TemporaryDirectory() as scratch,
        Run.create(Path(scratch) / "run", dump_recipe(recipe), seed=seed) as run,
        open_job(recipe, run, quiet=True) as job,
    ):
        job.engine = attacked(job, attack) if attack else None
        summary = pretrain_projector(job)
        after = tuned(job, rule, tune) if tune and recipe.projector.training != "local" else None
        add_stage(job, "projector")
        counts = job.traffic.counts.values()
        sent = sum(count.bytes_to_site + count.bytes_from_site for count in counts)
    measured = summary.before if rule == "none" else summary.after
    last = summary.rounds[-1]
    return {
        "nll": measured.nll,
        "shuffled": measured.shuffled_nll,
        "cider": measured.cider,
        "macro": measured.accuracy.macro,
        "tuned": after,
        "types": {kind: value.accuracy for kind, value in measured.accuracy.by_type.items()},
        "lag": last.lag,
        "cosine": last.cosine,
        "beta": last.beta,
        "most weight": max(site.weight for site in last.sites.values()),
        "megabytes": 0.0 if rule in ("none", "local", "central") else sent / 1e6,
        "seconds": time.process_time() - started,
    }


def table(cells: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return a row a rule: means over seeds, half widths of 95 % t-intervals, and p against FedAvg."""

    def told(rule: str, name: str, scale: float = 1.0, digits: int = 3) -> str:
        values = [each[name] * scale for each in cells[rule].values() if each.get(name) is not None]
        if not values:
            return "–"
        width = half_width(values)
        return f"{fmean(values):.{digits}f}" + (f" ± {width:.{digits}f}" if width else "")

    def macro(rule: str) -> dict[int, float]:
        return {seed: each["macro"] for seed, each in cells[rule].items()}

    def left(rule: str, name: str) -> str:
        if not {"fedavg", "central"} <= set(cells):
            return "–"
        best, plain, mine = (fmean(each[name] for each in cells[of].values()) for of in ("central", "fedavg", rule))
        return f"{(best - mine) / (best - plain):.2f}" if best != plain else "–"

    rows = []
    for rule in cells:
        p = paired_p(macro(rule), macro("fedavg")) if "fedavg" in cells and rule != "fedavg" else None
        told_p = "–" if p is None else f"{p:.3f}"
        named = [told(rule, "nll"), told(rule, "shuffled"), told(rule, "cider")]
        right = [told(rule, "macro", 100, 1), told_p, told(rule, "tuned", 100, 1)]
        rest = [told(rule, "lag", digits=2), told(rule, "most weight", digits=2), told(rule, "megabytes", digits=1)]
        far = f"{left(rule, 'nll')} / {left(rule, 'macro')}"
        seconds = told(rule, "seconds", digits=0)
        rows.append([rule, str(len(cells[rule])), *named, *right, far, *rest, seconds])
    heads = ["rule", "seeds", "NLL", "NLL, shuffled images", "CIDEr-D", "macro, %", "p", "macro when tuned, %"]
    return markdown_table([*heads, "distance to central left", "lag", "largest w_k", "MB", "CPU-s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rules", default=DEFAULT)
    parser.add_argument("--features", choices=["image", "text", "joint", "cross"], help="instead of the recipe's")
    parser.add_argument("--tune", type=int, default=0, help="steps of tuning that follow; 0 for none")
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--out", type=Path, default=Path("runs/fed-cmp"))
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    if recipe.projector is None:
        parser.error(f"{options.recipe} trains no projector; name a recipe with a [projector] table")
    recipe = replace(recipe, projector=replace(recipe.projector, evaluate_split=options.split))
    if options.features:
        recipe = replace(recipe, dealing=replace(recipe.dealing, features=options.features))
    prepare(recipe)
    options.out.mkdir(parents=True, exist_ok=True)
    told = [recipe.name, options.features or recipe.dealing.features, options.split]
    told += [f"tuned-{options.tune}"] if options.tune else []
    file = options.out / f"{'-'.join(told)}.jsonl"
    cells: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for line in file.read_text().splitlines() if file.exists() else []:
        each = json.loads(line)
        cells[each["rule"]][each["seed"]] = each
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for rule in options.rules.split(","):
            if seed not in cells[rule]:
                measured = {"rule": rule, "seed": seed, **cell(recipe, rule, seed, options.tune)}
                cells[rule][seed] = measured
                with file.open("a") as out:
                    out.write(json.dumps(measured) + "\n")
                print(f"{rule}, seed {seed}: macro {100 * measured['macro']:.1f} %", flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
