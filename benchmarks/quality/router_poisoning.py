"""What a router still learns where the last of K sites lies about its update: the share of rows that go to their site.

    python benchmarks/quality/router_poisoning.py --sites 5 --liars 1 --seeds 3

The world is that of `router_sites.py`: Gaussian rows about a centre of every site. The federated training is a run's
own, `accord.routing.fit.fit_router`, with sites of synthetic rows; the attacks are those of `accord.attacks.updates`.
Judged are new rows of the honest sites, by the largest output. A liar knows the honest updates of its round.

    open        the default rule, FedAdam, without a bound or a probe: as it was averaged before there were any
    default     the default rule, bound and probe
    audit       the same, and a site that the audit names is left out (`accord.federation.audit`)
    median      the coordinate-wise median, then the same adaptive step
    trimmed     the trimmed mean, then the same

A training that ends itself because most sites fail is marked `ended`. The column `named` has, for the default rule, how
often the audit names every liar, and after which round at the latest; honest sites that it names are counted. Its
questions are 12 further rows of each site.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from router_sites import FEATURES, ROWS, world
from torch import Tensor

from accord.attacks.updates import Attack, Site, alie, hostile, huge, ipm, norm_bounded, scale, sign_flip
from accord.errors import DataWarning, RunError
from accord.evaluation.markdown import markdown_table
from accord.federation.aggregation import Aggregate, Update, Weights, median, trimmed_mean
from accord.federation.engine import InProcessEngine
from accord.federation.local import begin, finish, round_rate
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.routing import fit
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss

DEFENCES = ["open", "default", "audit", "median", "trimmed"]
LABELLED = 12
"""Rows of each site by which the server audits."""

ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "sign flip": sign_flip,
    "sign flip, 20 times": partial(sign_flip, factor=20.0),
    "scale, 100 times": scale,
    "huge": huge,
    "ALIE, z = 1.5": partial(alie, z=1.5),
    "IPM, ε = 0.5": ipm,
    "norm-bounded, 5 times": norm_bounded,
}


def robust(merge: Mapping[str, object] | object, step: Aggregate) -> Aggregate:
    """Return a rule that takes `step` along what `merge` makes of the updates."""

    def rule(previous: Weights, updates: Sequence[Update], weights: Sequence[float], /) -> dict[str, Tensor]:
        merged = merge([update.change for update in updates])  # type: ignore[operator]
        return step(previous, [Update(merged)], [1.0])

    return rule


def site(rows: Tensor, k: int, sites: int, config: RouterConfig) -> Site:
    """Return site k, whose rows are `[ROWS, D]`."""
    network = RouterNetwork(FEATURES, sites, config)
    drawn = min(2 * config.pairs_per_batch, ROWS)

    def answer(request: UpdateRequest) -> UpdateReply:
        start, generator = begin(network, request), torch.Generator().manual_seed(request.seed)
        rate = round_rate(config.learning_rate, request.round, config.rounds)
        optimiser = torch.optim.SGD(network.parameters(), lr=rate)
        for _ in range(config.local_steps):
            hidden = rows[torch.randperm(ROWS, generator=generator)[:drawn], None]
            loss = client_id_loss(network(hidden, torch.ones(drawn, 1, dtype=torch.bool)), k)
            optimiser.zero_grad()
            (loss * fit.pace(sites)).backward()
            optimiser.step()
        return finish(network, request, start, examples=ROWS // 2, loss=loss.item(), steps=config.local_steps)

    return answer


def right(
    defence: str, attack: Attack | None, sites: int, liars: int, seed: int, apart: float
) -> tuple[float | None, dict[str, int]]:
    """Train once; return the share of the honest sites' new rows that is right, and who was named, and when.

    The share is None of a training that ended.
    """
    rows, new, centres = world(sites, seed, apart)
    drawn = torch.randn(sites, LABELLED, FEATURES, generator=torch.Generator().manual_seed(1000 + seed))
    labelled = (centres[:, None] + drawn).reshape(-1, 1, FEATURES)
    config = RouterConfig()
    if defence == "open":
        config = replace(config, aggregation=replace(config.aggregation, bound=0.0))
    config = replace(config, leave_out=defence == "audit")
    honest = {f"site-{k}": site(rows[k], k, sites, config) for k in range(sites)}
    last = [*honest][sites - liars :]
    engine = InProcessEngine(honest if attack is None else hostile(honest, last, attack, loss=0.5))
    merge = {"median": median, "trimmed": partial(trimmed_mean, trim=0.2)}.get(defence)
    start = type(config.aggregation).start
    kinds = [name for name in honest for _ in range(LABELLED)]
    own = {name: [kind == name for kind in kinds] for name in honest}
    audit = fit.router_audit(labelled, torch.ones(labelled.shape[:2], dtype=torch.bool), kinds, own, config)

    def named() -> dict[str, int]:
        return {name: found.named for name, found in audit.findings.items() if found.named}

    with (
        warnings.catch_warnings(),
        mock.patch.object(
            type(config.aggregation),
            "start",
            (lambda own, seed: robust(merge, start(own, seed))) if merge else start,
        ),
        mock.patch.object(fit, "probe_of", (lambda *_: None) if defence == "open" else fit.probe_of),
    ):
        warnings.simplefilter("ignore", DataWarning)
        try:
            network = fit.fit_router(engine, FEATURES, config, seed=seed, audit=audit)
        except RunError:
            return None, named()
    with torch.no_grad():
        said = network(
            new[: sites - liars].reshape(-1, 1, FEATURES), torch.ones(new[: sites - liars, :, 0].numel(), 1).bool()
        )
    truth = torch.arange(sites - liars).repeat_interleave(new.shape[1])
    return (said.argmax(dim=-1) == truth).float().mean().item(), named()


def naming(found: Sequence[dict[str, int]], liars: Sequence[str]) -> str:
    """Return how often all liars were named, by which round, and which honest sites were."""
    caught = [max(each[name] for name in liars) for each in found if liars and {*liars} <= {*each}]
    wrong = sum(name not in liars for each in found for name in each)
    told = f"{len(caught)} of {len(found)}" + (f", by round {max(caught)}" if caught else "") if liars else "nobody"
    return told + (f"; honest sites {wrong} times" if wrong else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--liars", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--apart", type=float, default=0.6)
    parser.add_argument("--defences", choices=DEFENCES, nargs="+", default=DEFENCES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for name, attack in ATTACKS.items():
        cells, named = [name], "–"
        for defence in options.defences:
            runs = [
                right(defence, attack, options.sites, options.liars, seed, options.apart)
                for seed in range(options.seeds)
            ]
            kept = [share for share, _ in runs if share is not None]
            ended = f" ({len(runs) - len(kept)} ended)" if len(kept) < len(runs) else ""
            cells.append((f"{100 * sum(kept) / len(kept):.1f}" if kept else "–") + ended)
            if defence == "default":
                liars = [f"site-{k}" for k in range(options.sites)][options.sites - options.liars :] if attack else []
                named = naming([each for _, each in runs], liars)
        cells.append(named)
        print(" | ".join(cells), flush=True)
        lines.append(cells)
    print(markdown_table([f"{options.liars} of {options.sites} lies", *options.defences, "named"], lines))


if __name__ == "__main__":
    main()
