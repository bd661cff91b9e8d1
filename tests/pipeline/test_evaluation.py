import json
from dataclasses import replace

import pytest
import torch

from accord.errors import DataWarning
from accord.evaluation.summary import Ranking, SiteSummary, accuracy
from accord.federation.engine import InProcessEngine
from accord.federation.messages import Card
from accord.methods import find_method
from accord.pipeline import evaluation
from accord.pipeline.evaluation import _summary
from accord.routing.competence import ConfidenceGraph, save_graph
from accord.routing.router import RouterConfig, RouterNetwork, save_router
from accord.runs import write_atomic

CHECKPOINT = "accord/idefics3"


@pytest.fixture
def summarise(job, monkeypatch):
    """Return a function that states the result of a run whose sites have no folder here, only a function each."""
    with job.run.doing("router"):
        save_router(job.path / "router", RouterNetwork(4, 2, RouterConfig(layers=1, width=8, heads=2)))
        (job.path / "router" / "measured.json").write_text(json.dumps({"accuracy": 0.5}))
    vars(job)["evaluated"] = []
    measured = dict.fromkeys(("base", "aligned", "question_only", "shuffled_image"), accuracy({"colour": (1, 2)}))

    def state(method="routed", **sites):
        monkeypatch.setattr(evaluation, "open_federation", lambda job: InProcessEngine(sites))
        job.recipe = replace(job.recipe, method=method)
        return _summary(job, find_method(method, "ab"), measured, {}, {}, torch.zeros(0, 2))

    return state


def test_what_is_said_of_a_site_came_in_its_card(summarise):
    """The macro mean of a ranking of 0.5 and 1 is 0.75, and of none not 0; nothing of a site is read from a disk."""
    summary = summarise(
        a=lambda request: Card(request.id, "Llava", 9, 5, 20, False, {"colour": 0.5, "number": 1.0}),
        b=lambda request: Card(request.id, "Idefics3", 8, 4, 10, True, {}),
    )
    assert summary.sites == (
        SiteSummary("a", "Llava", CHECKPOINT, 9, 5, 20, Ranking(0.75, {"colour": 0.5, "number": 1.0})),
        SiteSummary("b", "Idefics3", CHECKPOINT, 8, 4, 10, Ranking(None, {})),
    )
    assert summary.constructed_preferences and summary.method == "routed"


def test_a_method_without_sites_asks_none_and_has_no_router(summarise):
    """FedIT needs no reward model, so that no card is asked for; what a site is was said in the recipe."""
    summary = summarise("fedit-fedavg", a=lambda request: pytest.fail("asked"), b=lambda request: pytest.fail("asked"))
    assert summary.sites == tuple(
        SiteSummary(name, "none, the method needs no reward model", CHECKPOINT, 0, 0, 0, Ranking(None, {}))
        for name in "ab"
    )
    assert summary.router is None and summary.method == "fedit-fedavg" and not summary.constructed_preferences


def test_a_method_with_sites_and_no_router_says_so(summarise):
    sites = {name: lambda request: Card(request.id, "Llava", 9, 5, 20, True, {}) for name in "ab"}
    assert summarise("fedgrpo", **sites).router is None
    router = summarise("mor", **sites).router
    assert (router.rounds, router.accuracy) == (RouterConfig().rounds, 0.5)


def test_sites_that_only_a_compared_method_needs_are_told(job, summarise):
    """FedIT needs no reward model, and the compared routing does: the cards are asked for; its router is not the run's.

    The router sent 7 bytes and the alignment 5 to site a: 5 are FedIT's.
    """
    for stage, size in (("router", 7), ("align", 5)):
        write_atomic(job.path / "traffic" / f"{stage}.json", json.dumps([["a", stage, 1, size, 0, 0]]))
    sites = {name: lambda request: Card(request.id, "Llava", 9, 5, 20, False, {}) for name in "ab"}
    job.recipe = replace(job.recipe, compare=("routed",))
    summary = summarise("fedit-fedavg", **sites)
    assert [site.architecture for site in summary.sites] == ["Llava", "Llava"] and summary.router is None
    assert summary.bytes == {"a": {"to_site": 5, "from_site": 0}}
    assert summarise("routed", **sites).bytes == {"a": {"to_site": 12, "from_site": 0}}


def test_who_is_good_at_what_is_told_where_it_was_measured(job, summarise):
    """A run by another method, which compared FedGRPO: of two questions site a has one right, and b did not answer."""
    sites = {name: lambda request: Card(request.id, "Llava", 9, 5, 20, False, {}) for name in "ab"}
    job.recipe = replace(job.recipe, compare=("fedgrpo",))
    assert summarise(**sites).competence is None
    mean, features = torch.zeros(1, dtype=torch.double), torch.ones(2, 1, dtype=torch.double)
    correct = torch.tensor([[1, 0], [torch.nan, torch.nan]], dtype=torch.double)
    save_graph(
        job.path / "kept" / "site" / "competence" / "graph",
        ConfidenceGraph(("colour", "number"), features, mean, correct),
    )
    told = summarise(**sites).competence
    assert told.answers == {"a": "10", "b": "--"} and (told.experts, told.neighbours) == (2, 20)
    job.recipe = replace(job.recipe, compare=())
    assert summarise(**sites).competence is None  # nobody here knows what the folder is


def test_a_site_that_says_nothing_of_itself(summarise):
    def silent(_):
        raise RuntimeError("out of order")

    with pytest.warns(DataWarning, match=r"site a did not describe itself \(error\); the report says so"):
        summary = summarise(a=silent, b=lambda request: Card(request.id, "Llava", 9, 5, 20, False, {}))
    assert [site.architecture for site in summary.sites] == ["unknown, the site was away", "Llava"]
    assert summary.sites[0].pairs == 0 and summary.sites[0].ranking.macro is None


def test_a_card_that_must_not_be_shown(summarise):
    """A request's id that is another's, and a ranking that is no share."""
    bad = Card("card-b", "Llava", 1, 2, 3, True, {"colour": 2.0})
    with pytest.warns(DataWarning, match="did not describe itself"):
        summary = summarise(a=lambda request: bad, b=lambda request: bad)
    assert {site.architecture for site in summary.sites} == {"unknown, the site was away"}


def test_any_checkpoint_is_measured_clustered_by_image(square, monkeypatch, tmp_path):
    """A policy that says red, asked twice about each of two pictures: both answers right, and one.

    The moves (y - 3/4) / 4 are 2/16 and -2/16 by image, SE² = 2 · 2/64 = 1/16: .75 ± 1.96/4, cut to 26.0 to 100 %.
    """
    rows = [{"id": str(n), "image": f"{n // 2}.png", "answer": "blue" if n == 3 else "red"} for n in range(4)]
    for n, colour in enumerate(("red", "blue")):
        (tmp_path / f"{n}.png").write_bytes(square(colour, (32, 32 + n)))
    lines = [json.dumps({**row, "question": "colour?", "question_type": "colour", "split": "test"}) for row in rows]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(evaluation, "load_model", lambda checkpoint: (None, None))
    monkeypatch.setattr(evaluation, "tokenizer_of", lambda processor: lambda text: {"input_ids": [0]})
    monkeypatch.setattr(evaluation, "answer", lambda model, processor, asked, **_: [["red"] for _ in asked])
    text = evaluation.evaluate_checkpoint("any", str(tmp_path), "test", limit=0, quiet=True)
    assert "| macro | 4 | 75.0% (26.0% to 100.0%) | 75.0% |" in text
    assert text.endswith("by text where there is no image: 4 questions in 2 clusters.") and "VQA" not in text


def test_vqa_accuracy_of_questions_that_enough_people_answered(square, monkeypatch, tmp_path):
    """Two pictures with the answers of four people each, red once and four times: 1/4 and 1, the mean 62.5 %.

    The moves -3/8 / 2 and 3/8 / 2 are by picture: SE² = 2 · 2 · (3/16)² = 9/64, 62.5 ± 196 · 3/8 is all of 0 to 100.
    A third question with one answer is not among them. Where there are only such, a warning says so.
    """
    answers = [["red", "blue", "blue", "green"], ["red"] * 4, "red"]
    lines = []
    for n, given in enumerate(answers):
        (tmp_path / f"{n}.png").write_bytes(square("red", (32, 32 + n)))
        lines.append(json.dumps({"id": str(n), "image": f"{n}.png", "question": "colour?", "answer": given}))
    monkeypatch.setattr(evaluation, "load_model", lambda checkpoint: (None, None))
    monkeypatch.setattr(evaluation, "tokenizer_of", lambda processor: lambda text: {"input_ids": [0]})
    monkeypatch.setattr(evaluation, "answer", lambda model, processor, asked, **_: [["red"] for _ in asked])
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    text = evaluation.evaluate_checkpoint("any", str(tmp_path), "test", limit=0, quiet=True, vqa_accuracy=True)
    assert "VQA accuracy: 62.5% (0.0% to 100.0%), mean over types, 2 questions\n" in text
    assert "VQA accuracy, shuffled image: 62.5%" in text
    (tmp_path / "questions.jsonl").write_text(lines[2] + "\n")
    with pytest.warns(DataWarning, match="no test question has the answers of at least 4 people, so there is no VQA"):
        text = evaluation.evaluate_checkpoint("any", str(tmp_path), "test", limit=0, quiet=True, vqa_accuracy=True)
    assert "VQA" not in text
