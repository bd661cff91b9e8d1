"""Methods that learn from the server's own few labelled questions, and the one that knows what nobody does.

    anchors    public pairs from the `base` split, scored once by every site; kept in the run folder

Every method that learns from the anchors counts what asking for them sent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import one_hot

from accord.data.images import load_if_any, picture_key
from accord.errors import DataError
from accord.evaluation.accuracy import sample_questions
from accord.federation.engine import Engine
from accord.pipeline.alignment import Aligned, federated_reward, run_grpo
from accord.pipeline.job import Job
from accord.pipeline.routing import trained_router
from accord.pipeline.sites import construct_pairs, open_federation
from accord.pipeline.traffic import add_rows, asked_once
from accord.routing.anchors import Anchors, collect, load_anchors, save_anchors
from accord.routing.gate import (
    AnchoredConfig,
    GateConfig,
    fit_anchored,
    fit_correctness,
    fit_preference_gate,
    save_gate,
)
from accord.routing.gated import AnchoredRouter, CorrectnessRouter, PreferenceGate
from accord.routing.router import Router, RouterNetwork, prompt_words
from accord.types import PreferencePair, Prompt, Question, prompt_of

ANCHOR_QUESTIONS = 200
"""Of the server's labelled questions, which `accord.routing.gate` learns from."""


def client_id_network(job: Job) -> RouterNetwork:
    """Return the network of the federated router, and count what its training sent: whoever uses it pays for it."""
    network = trained_router(job)
    sent = job.path / "traffic" / "router.json"
    if sent.is_file():
        add_rows(job.traffic, json.loads(sent.read_text()))
    return network


def public_pairs(job: Job, questions: Sequence[Question], seed: int) -> list[PreferencePair]:
    """Construct pairs from the server's own labelled questions, as the sites construct theirs."""
    policy = job.encoder.model, job.encoder.processor
    return construct_pairs(job.recipe, *policy, questions, job.questions["base"], seed=seed)


def public_anchors(job: Job) -> Anchors:
    """Return the anchors of this run: the sites are asked once, and every method that learns from them pays the bytes.

    Raises:
        DataError: no question has the split `base`.
    """
    file = job.path / "anchors" / "public-pairs.safetensors"
    engine = open_federation(job)
    asked_once(job, engine, file, lambda: save_anchors(file, _collect(job, engine)))
    return load_anchors(file)


def _collect(job: Job, engine: Engine) -> Anchors:
    base = job.questions.get("base", [])
    if not base:
        raise DataError("no question has the split 'base', which anchors are made of; give the source some")
    pairs = public_pairs(job, sample_questions(base, ANCHOR_QUESTIONS, seed=job.recipe.seed), job.recipe.seed)
    return collect(
        engine,
        job.encoder,
        pairs,
        trained_router(job),
        deadline=job.recipe.routing.deadline,
        rows_at_once=job.recipe.router.rows_at_once,
    )


def preference_gate(job: Job, stage: str) -> Aligned:
    """Mix all sites by a gate on the prompt that public preferences trained (ArmoRM)."""
    network = fit_preference_gate(public_anchors(job), GateConfig(), seed=job.recipe.seed)
    save_gate(job.path / "anchors" / "preference", network)
    router = PreferenceGate(job.encoder, network)
    return run_grpo(job, stage, federated_reward(job, open_federation(job), router, mode="soft"))


def correctness(job: Job, stage: str) -> Aligned:
    """Ask the site that is likeliest to rank the completion right, as public pairs taught (BayesianRouter, offline)."""
    network = fit_correctness(public_anchors(job), GateConfig())
    save_gate(job.path / "anchors" / "correctness", network)
    router = CorrectnessRouter(job.encoder, network, rows_at_once=job.recipe.router.rows_at_once)
    return run_grpo(job, stage, federated_reward(job, open_federation(job), router))


def anchored(job: Job, stage: str) -> Aligned:
    """Mix all sites by MoR's router, corrected by public pairs."""
    network = fit_anchored(public_anchors(job), AnchoredConfig())
    save_gate(job.path / "anchors" / "anchored", network)
    router = AnchoredRouter(job.encoder, client_id_network(job), network)
    return run_grpo(job, stage, federated_reward(job, open_federation(job), router, mode="soft"))


def oracle(job: Job, stage: str) -> Aligned:
    """Ask the first site that holds questions of the prompt's domain and type; all sites alike where there is none."""
    return run_grpo(job, stage, federated_reward(job, open_federation(job), oracle_router(job), mode="soft"))


def oracle_router(job: Job) -> Router:
    """Return the router that looks a prompt's domain and type up: what no server knows of a real prompt."""
    shares = [*job.shares.values()]
    known: dict[tuple[str, int | None], Tensor] = {}
    for q in job.prompts:
        fitting = [k for k, share in enumerate(shares) if share.wants(q)]
        weights = one_hot(torch.tensor(fitting[:1]), len(shares)).float()[0] if fitting else None
        known[_seen(prompt_of(q), load_if_any(q.image))] = (
            torch.full((len(shares),), 1 / len(shares)) if weights is None else weights
        )

    def route(
        prompts: Sequence[Prompt], images: Sequence[Image | None], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        rows = [known[_seen(prompt, image)] for prompt, image in zip(prompts, images, strict=True)]
        return torch.stack(rows).repeat_interleave(torch.tensor([len(c) for c in completions]), dim=0)

    return route


def _seen(prompt: Prompt, image: Image | None) -> tuple[str, int | None]:
    # A picture by its hash: the pixels of all prompts would fill the memory.
    return prompt_words(prompt), None if image is None else hash(picture_key(image))
