"""How many sites a router can tell apart: the share of rows that go to their own site, for K = 3, 16 and 64.

    python benchmarks/quality/router_sites.py --seeds 3
    python benchmarks/quality/router_sites.py --seeds 3 --apart 0.6        sites that overlap

Synthetic: site k's rows are Gaussian in 64 dimensions with deviation 1 about a centre of its own, itself Gaussian with
deviation `--apart`. No encoder reads anything: a row is one token, and every site has 60 pairs, 120 rows. New rows are
judged, 30 of a site, by the largest output.

    optimum     the nearest true centre, which no router knows: Bayes' choice
    default     the router's federated training as in a run, every site with rows of its own alone
    even        the same, from biases about 0 whatever K, and at a rate that K does not raise
    rounds x4   the default with 92 rounds
    means       in one round each site sends count, sum and sum of squares of its rows; the server builds the linear
                discriminant of equal priors, z_k = μ_k · h / σ² − ½ μ_k · μ_k / σ², with one pooled σ² a feature

All sites have as many rows, so that `prior_correction` would change no choice. Bytes are those of weights and sums
alone, of all sites, both directions.
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from accord.evaluation.markdown import markdown_table
from accord.federation.aggregation import Update
from accord.federation.local import round_rate
from accord.federation.weights import narrowed, set_trainable_weights, to_bytes, trainable_weights
from accord.routing.fit import pace
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss

FEATURES, ROWS, NEW = 64, 120, 30


def world(sites: int, seed: int, apart: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows to train on `[K, 120, D]`, new ones `[K, 30, D]`, and the centres `[K, D]`."""
    generator = torch.Generator().manual_seed(seed)
    centres = apart * torch.randn(sites, 1, FEATURES, generator=generator)
    rows = centres + torch.randn(sites, ROWS + NEW, FEATURES, generator=generator)
    return rows[:, :ROWS], rows[:, ROWS:], centres[:, 0]


def trained(rows: Tensor, new: Tensor, config: RouterConfig, seed: int, *, even: bool) -> tuple[float, int]:
    """Train in federated rounds; return the share that is right, and the bytes."""
    sites, drawn = len(rows), min(2 * config.pairs_per_batch, ROWS)
    torch.manual_seed(seed)
    network = RouterNetwork(FEATURES, sites, config)
    if even:
        torch.nn.init.uniform_(network.head.bias, -(config.width**-0.5), config.width**-0.5)
    weights, rule, sent = trainable_weights(network), config.aggregation.start(seed), 0
    for t in range(config.rounds):
        start, updates = narrowed(weights, config.aggregation.bits), []
        for k in range(sites):
            set_trainable_weights(network, start)
            optimiser = torch.optim.SGD(network.parameters(), lr=round_rate(config.learning_rate, t, config.rounds))
            for _ in range(config.local_steps):
                hidden = rows[k, torch.randperm(ROWS)[:drawn], None]
                loss = client_id_loss(network(hidden, torch.ones(drawn, 1, dtype=torch.bool)), k)
                optimiser.zero_grad()
                (loss * (1.0 if even else pace(sites))).backward()
                optimiser.step()
            change = {name: w - start[name] for name, w in trainable_weights(network).items()}
            updates.append(Update(narrowed(change, config.aggregation.bits), config.local_steps))
        sent += 2 * sites * len(to_bytes(weights, bits=config.aggregation.bits))
        weights = rule(weights, updates, [1 / sites] * sites)
    set_trainable_weights(network, weights)
    with torch.no_grad():
        logits = network(new.flatten(0, 1)[:, None], torch.ones(sites * NEW, 1, dtype=torch.bool))
    return right(logits), sent


def means(rows: Tensor, new: Tensor) -> tuple[float, int]:
    """Build the discriminant from the sites' sums; return the share that is right, and the bytes."""
    count, total, square = rows.shape[1], rows.double().sum(1), rows.double().square().sum(1)
    centre = total / count  # [K, D]
    within = (square / count - centre.square()).mean(0)  # [D]
    logits = (new.flatten(0, 1).double() / within) @ centre.T - 0.5 * (centre.square() / within).sum(1)
    return right(logits), 4 * (1 + 2 * FEATURES) * len(rows)


def right(logits: Tensor) -> float:
    """Return the share of rows `[K · 30, K]` whose largest output is their own site's."""
    own = torch.arange(logits.shape[1]).repeat_interleave(NEW)
    return (logits.argmax(dim=-1) == own).double().mean().item()


def main() -> None:
    default = RouterConfig()
    longer = replace(default, rounds=4 * default.rounds)
    routers = {"optimum": None, "default": default, "even": default, "rounds x4": longer, "means": None}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 16, 64])
    parser.add_argument("--routers", choices=routers, nargs="+", default=list(routers))
    parser.add_argument("--apart", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for sites in options.sites:
        for name in options.routers:
            config, found = routers[name], []
            for seed in range(options.seeds):
                known, new, centres = world(sites, seed, options.apart)
                if config is not None:
                    found.append(trained(known, new, config, seed, even=name == "even"))
                elif name == "means":
                    found.append(means(known, new))
                else:
                    found.append((right(-torch.cdist(new.flatten(0, 1), centres)), 0))
            shares = ", ".join(f"{100 * share:.1f}" for share, _ in found)
            lines.append([str(sites), name, shares, f"{found[0][1] / 1e6:.3f}"])
            print(f"{sites} sites, {name}: {shares} %", flush=True)
    print("\n" + markdown_table(["sites", "router", "right, %, by seed", "MB"], lines))


if __name__ == "__main__":
    main()
