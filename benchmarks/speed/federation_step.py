"""Time a GRPO step against a federation in this process, beside stock TRL with a constant reward.

All arms have the same policy, prompts, P, G and seed. The learning rate is 0, so that the policy, and with it the
length of what it says, stays the same; forward, backward and optimiser run as always. A round is one trainer per arm;
rounds alternate A B C D A B C D, and the first step of each is left out (allocation, caches, comparing the two ways).

    A   stock TRL, a constant reward: what sampling, both models' passes and the update cost anyway
    B   stock TRL, a federation: router (encoder, network), three reward models, messages coded as for a wire
    C   shared prefixes, a constant reward
    D   shared prefixes, a federation

Without `--run` the federation is made of the shipped checkpoints with untrained heads and an untrained router, and
every answer of a group goes to another site in turn. This is the dear case: all sites get and encode each image.

    python benchmarks/speed/federation_step.py [--run runs/demo] [--rounds 3] [--steps 6]
"""

from __future__ import annotations

import argparse
import logging as standard_logging
import platform
import random
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from stock import stock_trainer
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from accord.alignment.grpo import AlignmentConfig, grpo_config, prompt_dataset
from accord.alignment.reward import FederatedReward
from accord.alignment.trainer import SharedPrefixTrainer
from accord.data.easy_vqa import load_easy_vqa
from accord.federation.engine import InProcessEngine
from accord.federation.site import ScoreRange, Site
from accord.models.encoder import Encoder
from accord.models.load import load_model, parameter_count
from accord.models.tiny import FAMILIES
from accord.recipe import Recipe, SiteConfig
from accord.recipe_file import load_recipe
from accord.rewards.model import RewardModel
from accord.routing.router import LearnedRouter, RouterNetwork, load_router
from accord.terminal import hush

WAYS = {"stock TRL": False, "shared prefix": True}


@dataclass
class Clock:
    """Seconds by part, one list entry per GRPO step; rewards are computed once a step."""

    spent: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def around(self, part: str, call: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **kwargs: object) -> object:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[part].append(time.perf_counter() - began)

        return timed


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next, by the clock `now`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self.ends = now, list[float]()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(self.now())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


class InTurn:
    """A router that computes what a learned one does, and sends every answer to another site in turn."""

    def __init__(self, learned: LearnedRouter, sites: int) -> None:
        self.learned, self.sites = learned, sites

    def __call__(self, *asked: object) -> torch.Tensor:
        rows = len(self.learned(*asked))
        return torch.nn.functional.one_hot(torch.arange(rows) % self.sites, self.sites).float()


def constant(prompts, completions, **_) -> list[float]:
    return [0.0] * len(completions)


def federation(run: Path | None, clock: Clock) -> FederatedReward:
    if run is not None:
        recipe = load_recipe(run / "recipe.toml")
        judges = {s.name: RewardModel.load(run / "sites" / s.name / "reward") for s in recipe.sites}
        network, scores = load_router(run / "router"), recipe.scores
    else:
        recipe = Recipe("untrained", tuple(SiteConfig(name, f"accord/{name}") for name in FAMILIES))
        torch.manual_seed(0)
        judges = {s.name: RewardModel.from_checkpoint(s.checkpoint).eval() for s in recipe.sites}
        network, scores = None, ScoreRange()
    encoder = Encoder(*load_model(recipe.policy.checkpoint))
    learned = LearnedRouter(encoder, network or RouterNetwork(encoder.features, len(judges), recipe.router))

    router = clock.around("routing", learned if network is not None else InTurn(learned, len(judges)))
    router.encoder = encoder
    sites = {name: Site(name, judge, score_range=scores) for name, judge in judges.items()}
    engine = InProcessEngine({name: site.answer for name, site in sites.items()})
    engine.ask = clock.around("scoring", engine.ask)
    return FederatedReward(
        engine,
        router,
        mode=recipe.routing.mode,
        scope=recipe.routing.scope,
        scores=scores,
        end_tokens=[encoder.processor.tokenizer.eos_token_id],
    )


def run_arm(
    reward: Callable[..., list[float | None]],
    checkpoint: str,
    config: AlignmentConfig,
    encoder: Encoder | None,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the seconds of every step but the first, by the clock `now`; of stock TRL without `shared_prefix`."""
    questions = [q for q in load_easy_vqa() if q.split == "public"]
    data = prompt_dataset(questions, config.steps * config.prompts_per_step, random.Random(0))
    times = StepTimes(now)
    with tempfile.TemporaryDirectory() as scratch:
        args = grpo_config(config, seed=0, out=Path(scratch))
        told = {"reward_funcs": reward, "args": args, "train_dataset": data, "callbacks": [times]}
        if config.shared_prefix:
            model, processor = load_model(checkpoint)
            trainer = SharedPrefixTrainer(model=model, processing_class=processor, encoder=encoder, **told)
            trainer.remove_callback(PrinterCallback)
        else:
            trainer = stock_trainer(checkpoint, **told)
        trainer.train()
    return times.seconds


def prepared(options: argparse.Namespace) -> AlignmentConfig:
    """Silence libraries, and return the settings of steps that change nothing."""
    hush()
    standard_logging.basicConfig(level=standard_logging.ERROR)
    warnings.simplefilter("ignore")
    return AlignmentConfig(
        steps=options.steps,
        prompts_per_step=options.prompts,
        group_size=options.group,
        learning_rate=0.0,
        save_every=0,
        evaluate_every=0,
    )


def machine() -> str:
    """Return what the figures depend on."""
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds per GRPO step, federation against a constant reward")
    parser.add_argument("--run", type=Path, default=None, help="a run folder whose sites and router to use")
    parser.add_argument("--rounds", type=int, default=3, help="trainers per arm")
    parser.add_argument("--steps", type=int, default=6, help="steps per trainer, the first of which is not counted")
    parser.add_argument("--prompts", type=int, default=36, help="P")
    parser.add_argument("--group", type=int, default=8, help="G")
    options = parser.parse_args()
    config = prepared(options)
    checkpoint = (
        load_recipe(options.run / "recipe.toml").policy.checkpoint if options.run else "accord/llava-clip-llama"
    )
    clock, inside = Clock(), Clock()
    reward = federation(options.run, clock)
    whole = inside.around("reward", reward)
    whole.__name__ = "federation"
    arms: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
    encoder = reward.router.encoder
    for _ in range(options.rounds):
        for way, shared in WAYS.items():
            config = replace(config, shared_prefix=shared)
            arms[f"{way}, constant reward"] += run_arm(constant, checkpoint, config, None)
            arms[f"{way}, federation"] += run_arm(whole, checkpoint, config, encoder if shared else None)
            for name, values in [*clock.spent.items(), *inside.spent.items()]:
                assert len(values) == options.steps, f"{name}: {len(values)} calls in {options.steps} steps"
                parts[way][name] += values[1:]
            clock.spent.clear()
            inside.spent.clear()

    n = len(next(iter(arms.values())))
    step = {name: median(values) for name, values in arms.items()}
    of = f"run {options.run}" if options.run else "untrained models, each answer of a group to another site"
    print(machine())
    print(
        f"P = {options.prompts}, G = {options.group}, policy {checkpoint} "
        f"({parameter_count(load_model(checkpoint)[0]) / 1e6:.2f} M), K = {len(reward.engine.sites)}, {of}; "
        f"medians of n = {n} steps per arm, {options.rounds} rounds A B C D\n"
    )
    print("| per GRPO step | seconds | share of the federated step |")
    print("|---|---|---|")
    for way, timed in parts.items():
        whole_step = step[f"{way}, federation"]
        middle = {name: median(values) for name, values in timed.items()}
        rest = middle["reward"] - middle["routing"] - middle["scoring"]
        for name, seconds in (
            (f"{way}, constant reward", step[f"{way}, constant reward"]),
            (f"{way}, federation", whole_step),
            ("… routing", middle["routing"]),
            ("… scoring at the sites, coding of messages included", middle["scoring"]),
            ("… grouping, images to PNG, fusion", rest),
            ("… the rest: sampling, policy, reference, update", whole_step - middle["reward"]),
        ):
            print(f"| {name} | {seconds:.3f} | {seconds / whole_step:.0%} |")
    print()
    for way in WAYS:
        print(f"{way}: federation ÷ constant: {step[f'{way}, federation'] / step[f'{way}, constant reward']:.2f}")
    ratio = step["stock TRL, federation"] / step["shared prefix, federation"]
    print(f"federation, stock TRL ÷ shared prefix: {ratio:.2f}")
    sent = sum(c.bytes_to_site for (_, kind), c in reward.engine.traffic.counts.items() if kind == "score")
    back = sum(c.bytes_from_site for (_, kind), c in reward.engine.traffic.counts.items() if kind == "score")
    steps = len(WAYS) * options.rounds * options.steps
    print(f"bytes per step: {sent / steps:,.0f} to the sites, {back / steps:,.0f} from them")


if __name__ == "__main__":
    main()
