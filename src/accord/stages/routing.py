"""Stage 2: the sites train the router together; nothing but its weights travels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed

from accord.data.images import Pictures, load_images
from accord.data.sampling import sample_questions
from accord.errors import DataError
from accord.federation.audit import Audit, Finding
from accord.models.generate import answer
from accord.progress import stage_bar
from accord.routing.fit import fit_router, router_audit
from accord.routing.router import LearnedRouter, Router, RouterNetwork, load_router, save_router
from accord.runs import write_atomic
from accord.stages.job import Job
from accord.stages.sites import check_sites, open_federation, train_site
from accord.stages.traffic import save_traffic
from accord.types import Prompt, Question, prompt_of


def train_sites(job: Job, *, take_over: Callable[[str], bool] = lambda name: False) -> None:
    """Train the sites of this process that are not trained, but for those that `take_over` says it has brought in."""
    here = [] if job.engine is not None else job.recipe.sites
    waiting = [site.name for site in here if not job.run.done(f"site {site.name}")]
    if waiting:
        check_sites(job)
    for name in waiting:
        if not take_over(name):
            train_site(job, name)


def train_router(job: Job) -> None:
    """Train the router with all sites, and measure on held-out policy answers whether it picks a fitting site."""
    config = job.recipe.router
    with job.doing("router"):
        set_seed(job.recipe.seed)
        engine = open_federation(job, training=True)
        with stage_bar("router", config.rounds, quiet=job.quiet) as advance:
            audit = audit_of(job)

            def on_round(number: int, loss: float) -> None:
                record = {"stage": "router", "step": number, "loss": loss}
                if audit is not None and audit.findings:
                    record["taught"] = {site: found.taught for site, found in audit.findings.items()}
                    record["spoilt"] = {site: found.spoilt for site, found in audit.findings.items()}
                job.log(record)
                advance(text=f"loss {loss:.3f}")

            network = fit_router(
                engine, job.encoder.features, config, seed=job.recipe.seed, audit=audit, on_round=on_round
            )
        right = routing_accuracy(job, LearnedRouter(job.encoder, network))
        job.log({"stage": "router", "step": config.rounds, "accuracy": right})
        save_router(job.path / "router", network)
        measured = RouterMeasured(right, audit.findings if audit is not None else {})
        write_atomic(job.path / "router" / "measured.json", msgspec.json.encode(measured) + b"\n")
        save_traffic(job, "router")


@dataclass(frozen=True)
class RouterMeasured:
    """What is kept of a router beside its weights: routing accuracy, and what its audit found by site."""

    accuracy: float
    audit: Mapping[str, Finding] = field(default_factory=dict)


def audit_of(job: Job) -> Audit | None:
    """Return the audit of the router's training by the server's labelled questions; None where there are none.

    They are of each kind that a site holds: of the split `base`, or of `dev` where that has none of the kind.
    """
    count = job.recipe.router.audit
    if not count:
        return None
    by_kind: dict[str, list[Question]] = {}
    for split in ("dev", "base"):
        found = defaultdict(list)
        for q in job.questions.get(split, []):
            if any(share.wants(q) for share in job.shares.values()):
                found[f"{q.domain}/{q.question_type}"].append(q)
        by_kind |= found
    asked = [(kind, q) for kind in sorted(by_kind) for q in sample_questions(by_kind[kind], count, seed=0)]
    if not asked:
        return None
    states = [
        job.encoder([prompt_of(q) for q in chunk], [load_images(q.images) for q in chunk], [[q.answer] for q in chunk])
        for chunk in ([q for _, q in asked[n : n + 128]] for n in range(0, len(asked), 128))
    ]
    hidden = pad_sequence([row.cpu() for of_chunk, _ in states for row in of_chunk], batch_first=True)
    mask = pad_sequence([row.cpu() for _, of_chunk in states for row in of_chunk], batch_first=True)
    own = {site: [share.wants(q) for _, q in asked] for site, share in job.shares.items()}
    return router_audit(hidden, mask, [kind for kind, _ in asked], own, job.recipe.router)


def trained_router(job: Job) -> RouterNetwork:
    """Return the network of the federated router.

    Raises:
        RunError: it is not trained; says which command does it.
    """
    return load_router(job.need("router", "accord router train RECIPE", "router"))


def held_questions(job: Job) -> list[Question]:
    """Return the dev questions by which a router is measured: at most 300 of domains and types that a site holds.

    Raises:
        DataError: there is none.
    """
    known = [q for q in job.questions["dev"] if any(share.wants(q) for share in job.shares.values())]
    if not known:
        raise DataError(
            "no dev question is of a domain and type that a site holds, so it cannot be told where answers belong; "
            "correct domains and question_types of the sites, or give such questions the split 'dev'"
        )
    return sample_questions(known, 300, seed=0)


def routing_accuracy(job: Job, router: Router) -> float:
    """Return how often the top site, for sampled answers to dev questions, holds questions of that domain and type.

    Raises:
        DataError: no dev question is of a domain and type that a site holds.
    """
    shares, asked = [*job.shares.values()], held_questions(job)
    said = answer(
        *job.policy,
        asked,
        max_new_tokens=job.recipe.alignment.max_completion_length,
        samples=1,
        seed=0,
        batch_size=job.recipe.alignment.questions_at_once,
    )
    chosen: list[int] = route(router, asked, said).argmax(dim=-1).tolist()
    return sum(shares[k].wants(q) for q, k in zip(asked, chosen, strict=True)) / len(asked)


def route(router: Router, questions: Sequence[Question], completions: Sequence[Sequence[str]]) -> Tensor:
    """Return the router's weights for the completions of every question, `[N, K]`, in batches."""
    parts = []
    for start in range(0, len(questions), 128):
        chunk = questions[start : start + 128]
        parts.append(
            router(
                [prompt_of(q) for q in chunk],
                [load_images(q.images) for q in chunk],
                completions[start : start + 128],
            )
        )
    return torch.cat(parts)


def constant_router(weights: Sequence[float]) -> Router:
    """Return a router that gives every completion the same weights `[K]`."""

    def route(prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /) -> Tensor:
        return torch.tensor(weights).expand(sum(map(len, completions)), -1)

    return route


class RandomRouter:
    """Send every completion to a site drawn at random: a `Router`."""

    def __init__(self, sites: int, seed: int) -> None:
        self.sites = sites
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return one-hot weights `[N, K]`."""
        drawn = torch.randint(self.sites, (sum(map(len, completions)),), generator=self.generator)
        return torch.nn.functional.one_hot(drawn, self.sites).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Return how far the drawing is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on drawing from `state`."""
        self.generator.set_state(state["generator"])
