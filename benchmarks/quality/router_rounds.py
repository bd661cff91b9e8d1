"""How many rounds and bits the router's federated training needs: accuracy and bytes of several ways, over seeds.

    python benchmarks/quality/router_rounds.py recipes/compositions.toml --seeds 5

Every way starts from the same weights, takes the same pairs at the same sites, and is judged as in a run: how often the
top site, for sampled answers to dev questions, holds questions of their type. The encoder reads everything once; the
training itself is then some seconds. Bytes are both directions, of weights alone.
"""

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from accord.data.images import load_images
from accord.data.sampling import sample_questions
from accord.evaluation.intervals import half_width
from accord.evaluation.markdown import markdown_table
from accord.federation.aggregation import Aggregation, Update
from accord.federation.local import round_rate
from accord.federation.weights import narrowed, set_trainable_weights, to_bytes, trainable_weights
from accord.models.generate import answer
from accord.recipe_file import load_recipe
from accord.routing.fit import pace
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss
from accord.stages.job import Job
from accord.stages.sites import router_training
from accord.types import prompt_of


@dataclass(frozen=True)
class Way:
    """One way of training."""

    name: str
    config: RouterConfig
    local: type[torch.optim.Optimizer] = torch.optim.SGD
    cosine: bool = True


WAYS = (
    Way(
        "FedAvg, local AdamW, 60 rounds, 32 bits",
        RouterConfig(rounds=60, local_steps=2, pairs_per_batch=32, learning_rate=2e-3, aggregation=Aggregation()),
        torch.optim.AdamW,
        cosine=False,
    ),
    Way("FedAdam, local SGD, 23 rounds, 16 bits (the default)", RouterConfig()),
)


@dataclass(frozen=True)
class World:
    """What the encoder read of the sites' pairs and of the dev answers."""

    pairs: list[tuple[Tensor, Tensor]]  # of each site: states [2N, T, D] and masks [2N, T]
    asked: tuple[Tensor, Tensor]
    fitting: Tensor  # [n, K], whether a site holds questions of that kind
    features: int


def read(recipe_file: str, seed: int) -> World:
    """Let the encoder read what all ways need."""
    recipe = replace(load_recipe(recipe_file), seed=seed)
    job = Job(recipe, cast(Any, None), quiet=True)
    shares = [*job.shares.values()]
    known = [q for q in job.questions["dev"] if any(share.wants(q) for share in shares)]
    asked = sample_questions(known, 300, seed=0)
    said = answer(*job.policy, asked, max_new_tokens=recipe.alignment.max_completion_length, samples=1, seed=0)
    states = job.encoder([prompt_of(q) for q in asked], [load_images(q.images) for q in asked], said)
    return World(
        [router_training(job, site.name).features for site in recipe.sites],
        states,
        torch.tensor([[share.wants(q) for share in shares] for q in asked]),
        job.encoder.features,
    )


def train(world: World, way: Way, seed: int) -> tuple[float, int]:
    """Return the accuracy and the bytes of one training."""
    config, count = way.config, len(world.pairs)
    torch.manual_seed(seed)
    network = RouterNetwork(world.features, count, config)
    weights, rule, sent = trainable_weights(network), config.aggregation.start(seed), 0
    for t in range(config.rounds):
        start, updates = narrowed(weights, config.aggregation.bits), []
        rate = round_rate(config.learning_rate, t, config.rounds) if way.cosine else config.learning_rate
        for k, (hidden, mask) in enumerate(world.pairs):
            set_trainable_weights(network, start)
            optimiser = way.local(network.parameters(), lr=rate)  # type: ignore[call-arg]
            generator, n = random.Random(seed * 7919 + t * 101 + k), len(hidden) // 2
            for _ in range(config.local_steps):
                drawn = generator.sample(range(n), min(config.pairs_per_batch, n))
                rows = torch.tensor([row for pair in drawn for row in (2 * pair, 2 * pair + 1)])
                loss = client_id_loss(network(hidden[rows], mask[rows]), k)
                optimiser.zero_grad()
                (loss * pace(count)).backward()
                optimiser.step()
            change = {name: w - start[name] for name, w in trainable_weights(network).items()}
            updates.append(Update(narrowed(change, config.aggregation.bits), config.local_steps))
            sent += len(to_bytes(weights, bits=config.aggregation.bits))
            sent += len(to_bytes(change, bits=config.aggregation.bits))
        weights = rule(weights, updates, [1 / count] * count)
    set_trainable_weights(network, weights)
    with torch.no_grad():
        top = network(*world.asked).argmax(dim=-1)
    return world.fitting[torch.arange(len(top)), top].double().mean().item(), sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[tuple[float, int]]] = {way.name: [] for way in WAYS}
    for seed in range(options.seeds):
        world = read(str(options.recipe), seed)
        for way in WAYS:
            results[way.name].append(train(world, way, seed))
            print(f"seed {seed}: {way.name}: {100 * results[way.name][-1][0]:.1f} %", flush=True)
    rows = []
    for name, measured in results.items():
        shares = [100 * share for share, _ in measured]
        half = half_width(shares)
        mean = f"{sum(shares) / len(shares):.1f}" + ("" if half is None else f" ± {half:.1f}")
        rows.append([name, mean, ", ".join(f"{share:.1f}" for share in shares), f"{measured[0][1] / 1e6:.1f}"])
    print("\n" + markdown_table(["training", "right, %", "by seed", "MB"], rows))


if __name__ == "__main__":
    main()
