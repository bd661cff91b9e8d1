"""Choose for every question the sites that are most competent for it: FedGRPO's experts.

    z            = φ(x) − μ, l2-normalised            φ: last hidden state of (image, prompt), frozen, [D]
    C ∈ {0,1}^{K×A}                                   whether site k answered auxiliary item a right
    c_k(x)       = 1/L Σ_{a ∈ L nearest by cosine} C_ka
    α_k(x)       = 1/M for the M sites of largest c_k(x), else 0; ties are broken at random

Source: FedGRPO (AAAI 2026), arXiv 2602.12014; its values are A = 100, L = 20, M = 2. C with the items' features is its
"confidence graph".

Differs: C is measured once and on a schedule, where the paper sends every question's neighbours to every site. The
labels stay at the server, which grades the sites' answers: a site cannot claim a competence. φ is the state from which
the answer would begin, centred by the auxiliary items' mean μ. The share of the 20 nearest of 100 `base` questions of
easy-VQA that have the type of a `dev` question, with `accord/llava-clip-llama`, mean of 5 draws of the items:

                                 types evenly drawn    drawn as they come (two thirds yes/no)
    as it is                                  0.832    0.648
    centred                                   0.862    0.702
    centred, each feature scaled              0.849    0.703

By chance it would be 0.33. At the state of the end token behind an empty answer it is 0.5.

Absent is not zero: a site that answered nothing has a row of NaN, no competence, and no weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load, save
from torch import Tensor

from accord.data.images import Pictures, image_bytes, load_images
from accord.data.questions import normalise_answer, right_answers, uniform
from accord.errors import CheckpointError, DataError, RunError
from accord.federation.asking import ask_checked
from accord.federation.engine import Engine
from accord.federation.messages import AnswerItem, AnswerRequest, check_answers, image_name, to_turns
from accord.models.encoder import Encoder
from accord.models.inputs import chunks
from accord.runs import replace_folder, write_atomic
from accord.types import Prompt, Question, prompt_of

PROMPTS_AT_ONCE = 64
"""Prompts of one forward pass of the encoder."""

UNKNOWN_EVERY = 10
"""Calls between two gradings while a site is unknown: it was away when competence was measured, and may be back."""


@dataclass(frozen=True)
class ConfidenceGraph:
    """Who is good at what: A auxiliary items as the encoder sees them, and which sites answered them right."""

    types: tuple[str, ...]  # A, the items' question types, for a drawing
    features: Tensor  # [A, D] in float64, centred and l2-normalised
    mean: Tensor  # [D], of the items' raw features
    correct: Tensor  # [K, A] in float64: 1 or 0, NaN where a site did not answer

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit each other."""
        k, a, d = len(self.correct), len(self.types), self.mean.shape[-1]
        wanted = {"features": (a, d), "mean": (d,), "correct": (k, a)}
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != wanted[name]:
                raise DataError(
                    f"a confidence graph's {name} are {tuple(tensor.shape)}, expected {wanted[name]}; measure it anew"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in ("features", "mean", "correct")}

    def competence(self, features: Tensor, neighbours: int) -> Tensor:
        """Return c `[P, K]` in 0..1: each site's accuracy on the items nearest to each prompt.

        NaN for a site that answered none of them; of items equally near the first ones count.

        Args:
            features: φ(x) as the encoder gives it, `[P, D]`.
            neighbours: L; with fewer items than that, all count.
        """
        near = _normalised(features, self.mean) @ self.features.T  # [P, A]
        nearest = near.sort(dim=1, descending=True, stable=True).indices[:, :neighbours]
        return self.correct[:, nearest].nanmean(dim=-1).T


def measure(
    engine: Engine, encoder: Encoder, questions: Sequence[Question], *, deadline: float | None = None
) -> ConfidenceGraph:
    """Embed the auxiliary questions, let every site answer them, and grade the answers here.

    A site that is away has a row of NaN; `CompetenceRouter` asks it again now and then.

    Args:
        engine: carries the questions to the sites.
        encoder: φ, frozen.
        questions: A labelled questions of the server.
        deadline: seconds to wait for the sites.

    Raises:
        DataError: there are no questions.
        RunError: no site answers any, so that there is no site to choose.
    """
    correct = grade(engine, questions, deadline=deadline)
    if correct.isnan().all():
        raise RunError(
            f"none of the sites {', '.join(engine.sites)} answered the server's {len(questions)} auxiliary questions, "
            "by which FedGRPO chooses experts; every site needs answers = true in its own recipe, and to be there"
        )
    images = [load_images(q.images) for q in questions]
    raw = embed(encoder, [prompt_of(q) for q in questions], images).double()
    mean = raw.mean(dim=0)
    types = tuple(q.question_type for q in questions)
    return ConfidenceGraph(types, _normalised(raw, mean), mean, correct)


def grade(engine: Engine, questions: Sequence[Question], *, deadline: float | None = None) -> Tensor:
    """Return whether each site answers each question right, `[K, A]`: 1 or 0, NaN for a site that does not answer.

    Raises:
        DataError: there are no questions.
    """
    if not questions:
        raise DataError("cannot measure competence on 0 questions; give the server labelled questions")
    images: dict[str, bytes] = {}
    items = []
    for question in questions:
        stored = [image_bytes(image) for image in question.images]
        names = [image_name(data) for data in stored]
        images.update(zip(names, stored, strict=True))
        items.append(AnswerItem(names, to_turns(prompt_of(question))))
    answers = ask_checked(
        engine,
        {site: AnswerRequest(f"competence-{site}", images, items) for site in engine.sites},
        check_answers,
        what="answers",
        consequence="nothing new is known of its competence",
        deadline=deadline,
    )
    wanted = [right_answers(q) for q in questions]
    correct = torch.full((len(engine.sites), len(questions)), torch.nan, dtype=torch.double)
    for k, site in enumerate(engine.sites):
        if site in answers:
            given = [None if answer is None else normalise_answer(answer) for answer in answers[site]]
            graded = [math.nan if g is None else float(g in w) for g, w in zip(given, wanted, strict=True)]
            correct[k] = torch.tensor(graded, dtype=torch.double)
    return correct


def embed(encoder: Encoder, prompts: Sequence[Prompt], images: Sequence[Pictures]) -> Tensor:
    """Return φ of prompts about images, `[P, D]` on the CPU: the hidden states from which their answers would begin."""
    return torch.cat(
        [encoder.before_answers(prompts[span], images[span]) for span in chunks([1] * len(prompts), PROMPTS_AT_ONCE)]
    )


class CompetenceRouter:
    """Ask the M sites that are most competent for a prompt about all its completions: a `Router`, and a `Memory`.

    Args:
        encoder: φ, the one that the graph was measured with.
        graph: which site is good at what.
        sites: their names in the order of the graph's rows, `[K]`.
        experts: M.
        neighbours: L.
        seed: of the draws between sites of equal competence.
        refresh_every: calls between two gradings; 0 for none but the first.
        grade: grades the sites anew on the same questions, `[K, A]`, every `refresh_every` calls, and every
            `UNKNOWN_EVERY` calls while a site is unknown.
    """

    def __init__(
        self,
        encoder: Encoder,
        graph: ConfidenceGraph,
        *,
        sites: Sequence[str],
        experts: int,
        neighbours: int,
        seed: int,
        refresh_every: int = 0,
        grade: Callable[[], Tensor] | None = None,
    ) -> None:
        if len(sites) != len(graph.correct):
            raise DataError(
                f"a confidence graph of {len(graph.correct)} sites, and there are {len(sites)}; measure it anew"
            )
        self.encoder = encoder
        self.graph = graph
        self.neighbours = neighbours
        self.refresh_every = refresh_every
        self.grade = grade
        self.experts = _Experts(tuple(sites), experts, seed)
        self.calls = 0

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return weights `[N, K]`: 1/M for a prompt's experts; a row of zeros where no site is known to be competent.

        With fewer than M sites that have answered, all of them are experts.
        """
        unknown = self.graph.correct.isnan().all(dim=1).any()
        every = self.refresh_every or (UNKNOWN_EVERY if unknown else 0)
        if self.grade is not None and every and self.calls and self.calls % every == 0:
            self._renew(self.grade())
        self.calls += 1
        features = embed(self.encoder, prompts, images)
        weights = self.experts.choose(self.graph.competence(features, self.neighbours))
        return weights.repeat_interleave(torch.tensor([len(c) for c in completions]), dim=0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run must know: the graph, and how often was asked."""
        return self.graph.tensors() | self.experts.state_dict() | {"calls": torch.tensor(self.calls)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: it is that of other sites or items.
        """
        _check_state(state, self.state_dict())
        self.graph = ConfidenceGraph(self.graph.types, **{name: state[name] for name in self.graph.tensors()})
        self.experts.load_state_dict(state)
        self.calls = int(state["calls"])

    def _renew(self, fresh: Tensor) -> None:
        """Take what was measured anew; where a site did not answer this time, what was known of it is kept."""
        self.graph = replace(self.graph, correct=torch.where(fresh.isnan(), self.graph.correct, fresh))


class RandomExperts:
    """Ask M sites at random about all completions of a prompt: a `Router` and a `Memory`, FedGRPO's control.

    Its public code does so, in place of the choice by competence that the paper describes.
    """

    def __init__(self, sites: Sequence[str], experts: int, *, seed: int) -> None:
        self.experts = _Experts(tuple(sites), experts, seed)

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return weights `[N, K]`: 1/M for a prompt's experts."""
        alike = torch.zeros(len(prompts), len(self.experts.sites), dtype=torch.double)
        return self.experts.choose(alike).repeat_interleave(torch.tensor([len(c) for c in completions]), dim=0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run must know."""
        return self.experts.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: it is that of other sites.
        """
        _check_state(state, self.state_dict())
        self.experts.load_state_dict(state)


class _Experts:
    """Take the M best sites, prompt after prompt; a draw between equals depends on seed, site and prompt number."""

    def __init__(self, sites: tuple[str, ...], experts: int, seed: int) -> None:
        self.sites = sites
        self.most = experts
        self.seed = seed
        self.prompts = 0

    def choose(self, competence: Tensor) -> Tensor:
        """Return weights `[P, K]` for c `[P, K]`; NaN is a site that is not known, which gets none."""
        weights = torch.zeros(competence.shape)
        for p, row in enumerate(competence.tolist()):
            known = sorted((k for k, value in enumerate(row) if value == value), key=lambda k: -row[k])
            chosen = known[: self.most]
            if len(known) > self.most and row[known[self.most]] == (last := row[chosen[-1]]):  # more equals than places
                better, equal = ([k for k in known if row[k] > last], [k for k in known if row[k] == last])
                chosen = better + self._drawn(equal, self.most - len(better))
            weights[p, chosen] = 1 / max(len(chosen), 1)
            self.prompts += 1
        return weights

    def _drawn(self, equal: list[int], count: int) -> list[int]:
        number = str(self.prompts)
        return sorted(equal, key=lambda k: uniform("expert", self.seed, self.sites[k], number))[:count]

    def state_dict(self) -> dict[str, Tensor]:
        return {"prompts": torch.tensor(self.prompts)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.prompts = int(state["prompts"])


def save_graph(path: Path, graph: ConfidenceGraph) -> None:
    """Write the graph to the folder `path`, whole or not at all."""

    def write(folder: Path) -> None:
        write_atomic(folder / "graph.safetensors", save({n: t.contiguous() for n, t in graph.tensors().items()}))
        write_atomic(folder / "graph.json", msgspec.json.encode({"types": graph.types}) + b"\n")

    replace_folder(path, write)


class _Items(msgspec.Struct, forbid_unknown_fields=True):
    types: tuple[str, ...]


def load_graph(path: Path) -> ConfidenceGraph:
    """Load what `save_graph` wrote.

    Raises:
        CheckpointError: the folder is absent, damaged or of another kind.
    """
    try:
        items = msgspec.json.decode((path / "graph.json").read_bytes(), type=_Items)
        return ConfidenceGraph(items.types, **load((path / "graph.safetensors").read_bytes()))
    except Exception as error:  # safetensors raises its own untyped errors on malformed bytes
        raise CheckpointError(
            f"{path}: no confidence graph ({error}); remove the folder, so that it is measured anew"
        ) from error


def _normalised(features: Tensor, mean: Tensor) -> Tensor:
    """Return features `[N, D]` centred and of length 1, in float64."""
    return torch.nn.functional.normalize(features.double() - mean, dim=-1)


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            got = tuple(state[name].shape) if name in state else "nothing"
            raise CheckpointError(
                f"what was known of experts holds {got} as {name!r}, expected {tuple(tensor.shape)}; "
                "resume with the same sites and questions, or start anew"
            )
