"""Ask all sites about a small public set of preference pairs: what `accord.routing.gate` learns from.

    N public pairs  →  scores R̄_k(x_n, y_n±)  [N, 2, K]     what every site says, standardised at the site
                       f(x_n)                  [N, D]        last hidden state of (image, prompt)
                       h(x_n, y_n±)            [N, 2, D]     last hidden state of (image, prompt, answer)
                       z(x_n, y_n±)            [N, 2, K]     logits of the client-id router, where there is one

The pairs are the server's own labelled questions. Nothing private is in them, and to the sites they are queries like
any other: an image, a prompt and candidate answers go down, scores come back, the labels stay at the server.

The client-id router learns whose domain an answer belongs to, the anchors tell which site is right: ArmoRM's gate (Wang
et al. 2024, arXiv 2406.12845) and BayesianRouter (2025, arXiv 2510.02850) learn from such pairs. In all that follows
the two answers of pair n are at positions 0 (chosen) and 1 (rejected).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accord.data.images import image_bytes, load_images
from accord.errors import DataError
from accord.federation.asking import ask_scores
from accord.federation.engine import Engine
from accord.federation.messages import ScoreItem, ScoreRequest, image_name, to_turns
from accord.models.encoder import Encoder
from accord.models.inputs import chunks
from accord.routing.fusion import mixture
from accord.routing.router import RouterNetwork
from accord.routing.stored import load_arrays, save_arrays
from accord.types import ImageSource, PreferencePair, Prompt

QUESTIONS_AT_ONCE = 64
"""Questions of one request, whose images travel in it together."""


@dataclass(frozen=True)
class Anchors:
    """N public pairs as the sites and the encoder see them; all tensors are on the CPU."""

    scores: Tensor  # [N, 2, K], NaN where a site is absent
    prompts: Tensor  # [N, D]
    answers: Tensor  # [N, 2, D]
    questions: Tensor  # [N], which question a pair is of: pairs of one question are never split between folds
    logits: Tensor | None = None  # [N, 2, K] of the client-id router

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit each other."""
        n, _, k = self.scores.shape
        d = self.prompts.shape[-1]
        wanted = {"scores": (n, 2, k), "prompts": (n, d), "answers": (n, 2, d), "questions": (n,), "logits": (n, 2, k)}
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != wanted[name]:
                raise DataError(
                    f"anchors' {name} are {tuple(tensor.shape)}, expected {wanted[name]}; collect them anew"
                )

    @property
    def sites(self) -> int:
        """K."""
        return self.scores.shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the arrays that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def take(self, rows: Tensor) -> Anchors:
        """Return the pairs at `rows`, indices or a mask `[N]`."""
        return Anchors(**{name: tensor[rows] for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class _Asked:
    """One question with the distinct answers of its pairs."""

    prompt: Prompt
    images: tuple[ImageSource, ...]
    candidates: tuple[str, ...]


def collect(
    engine: Engine,
    encoder: Encoder,
    pairs: Sequence[PreferencePair],
    network: RouterNetwork | None = None,
    *,
    deadline: float | None = None,
    rows_at_once: int = 512,
) -> Anchors:
    """Let every site score every pair, and encode the pairs; each image travels once per site.

    Args:
        engine: carries the questions to the sites.
        encoder: the frozen encoder of the router.
        pairs: N public pairs; those of one `question_id` share images and prompt.
        network: the client-id router, whose logits are kept.
        deadline: seconds to wait for the sites, per request.
        rows_at_once: (prompt, answer) rows of one forward pass of the encoder.

    Raises:
        DataError: there are no pairs.
    """
    if not pairs:
        raise DataError("cannot learn from 0 public pairs; give the server labelled questions, split 'base'")
    grouped: dict[str, list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        grouped[pair.question_id].append(pair)
    number = {question: n for n, question in enumerate(grouped)}
    asked = [
        _Asked(group[0].prompt, group[0].images, tuple(dict.fromkeys(t for p in group for t in (p.chosen, p.rejected))))
        for group in grouped.values()
    ]
    starts = torch.tensor([0, *(len(each.candidates) for each in asked)]).cumsum(0).tolist()
    rows = torch.tensor(
        [
            [starts[q] + asked[q].candidates.index(text) for text in (pair.chosen, pair.rejected)]
            for pair in pairs
            for q in [number[pair.question_id]]
        ]
    )  # [N, 2] into the distinct answers of all questions
    questions = torch.tensor([number[pair.question_id] for pair in pairs])
    scores = _ask(engine, asked, deadline)
    prompts, answers, logits = _encode(encoder, asked, network, rows_at_once)
    return Anchors(scores[rows], prompts[questions], answers[rows], questions, None if logits is None else logits[rows])


def pair_accuracy(scores: Tensor, weights: Tensor) -> Tensor:
    """Return for every pair whether the fused score ranks it right, bool `[N]`.

        1[ Σ_k α_k(x, y⁺) R̄_k(x, y⁺)  >  Σ_k α_k(x, y⁻) R̄_k(x, y⁻) ]

    The two answers are fused each with its own weights, as in GRPO: under top-1 routing different sites may judge them,
    each on its own scale. A tie is not right (clipped scores tie often), nor is a pair of which an answer has no score.

    Args:
        scores: `[N, 2, K]`, NaN where a site is absent.
        weights: `[N, 2, K]`, renormalised over the sites that are present.
    """
    fused = mixture(scores, weights)  # [N, 2]
    return fused[:, 0] > fused[:, 1]


def last_states(states: Tensor, mask: Tensor) -> Tensor:
    """Return each row's hidden state at its last real token, `[N, D]` on the CPU, from `[N, T, D]` and `[N, T]`."""
    return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1].float().cpu()


def save_anchors(path: Path, anchors: Anchors) -> None:
    """Write the arrays to the file `path`, as safetensors."""
    save_arrays(path, anchors.tensors())


def load_anchors(path: Path) -> Anchors:
    """Read what `save_anchors` wrote.

    Raises:
        CheckpointError: the file is absent, damaged or of another kind.
    """
    return load_arrays(path, Anchors, "anchors")


def _ask(engine: Engine, asked: Sequence[_Asked], deadline: float | None) -> Tensor:
    """Return every site's score of every distinct answer, `[M, K]`, NaN where there is none."""
    parts = []
    for start in range(0, len(asked), QUESTIONS_AT_ONCE):
        chunk = asked[start : start + QUESTIONS_AT_ONCE]
        images: dict[str, bytes] = {}
        items = []
        for each in chunk:
            stored = [image_bytes(image) for image in each.images]
            names = [image_name(data) for data in stored]
            images.update(zip(names, stored, strict=True))
            items.append(ScoreItem(names, to_turns(each.prompt), list(each.candidates)))
        requests = {site: ScoreRequest(f"anchors-{start}-{site}", images, items) for site in engine.sites}
        parts.append(_ask_all(engine, requests, [len(each.candidates) for each in chunk], deadline))
    return torch.cat(parts)


def _ask_all(
    engine: Engine, requests: Mapping[str, ScoreRequest], sizes: Sequence[int], deadline: float | None
) -> Tensor:
    scores = torch.full((sum(sizes), len(engine.sites)), torch.nan)
    consequence = "it is absent from those anchors"
    for site, checked in ask_scores(engine, requests, consequence=consequence, deadline=deadline).items():
        column = [
            torch.full((n,), torch.nan) if s is None else torch.tensor(s) for n, s in zip(sizes, checked, strict=True)
        ]
        scores[:, list(engine.sites).index(site)] = torch.cat(column)
    return scores


@torch.no_grad()
def _encode(
    encoder: Encoder, asked: Sequence[_Asked], network: RouterNetwork | None, rows_at_once: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return features of prompts `[Q, D]` and of distinct answers `[M, D]`, and the network's logits `[M, K]`."""
    if network is not None:
        network = network.eval().to(encoder.model.device)
    prompts, answers, logits = [], [], []
    for span in chunks([len(each.candidates) for each in asked], rows_at_once):
        chunk = asked[span]
        texts, images = [e.prompt for e in chunk], [load_images(e.images) for e in chunk]
        prompts.append(encoder.before_answers(texts, images))
        states, mask = encoder(texts, images, [e.candidates for e in chunk])
        answers.append(last_states(states, mask))
        if network is not None:
            logits.append(network(states, mask).cpu())
    return torch.cat(prompts), torch.cat(answers), torch.cat(logits) if logits else None
