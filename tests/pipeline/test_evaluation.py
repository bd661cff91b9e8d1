import json

import pytest
import torch

from accord.errors import DataWarning
from accord.evaluation.summary import Ranking, SiteSummary, accuracy
from accord.federation.engine import InProcessEngine
from accord.federation.messages import Card
from accord.pipeline.evaluation import _summary
from accord.routing.competence import ConfidenceGraph, save_graph
from accord.routing.router import RouterConfig, RouterNetwork, save_router

CHECKPOINT = "accord/idefics3"


@pytest.fixture
def summarise(job):
    """Return a function that states the result of a run whose sites have no folder here, only a function each."""
    with job.run.doing("router"):
        save_router(job.path / "router", RouterNetwork(4, 2, RouterConfig(layers=1, width=8, heads=2)))
        (job.path / "router" / "measured.json").write_text(json.dumps({"accuracy": 0.5}))
    vars(job)["evaluated"] = []
    measured = dict.fromkeys(("base", "aligned", "question_only", "shuffled_image"), accuracy({"colour": (1, 2)}))
    return lambda **sites: _summary(job, InProcessEngine(sites), measured, {}, torch.zeros(0, 2))


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
    assert summary.constructed_preferences


def test_who_is_good_at_what_is_told_where_it_was_measured(job, summarise):
    """A run by another method, which compared FedGRPO: of two questions site a has one right, and b did not answer."""
    sites = {name: lambda request: Card(request.id, "Llava", 9, 5, 20, False, {}) for name in "ab"}
    assert summarise(**sites).competence is None
    mean, features = torch.zeros(1, dtype=torch.double), torch.ones(2, 1, dtype=torch.double)
    correct = torch.tensor([[1, 0], [torch.nan, torch.nan]], dtype=torch.double)
    save_graph(job.path / "competence" / "graph", ConfidenceGraph(("colour", "number"), features, mean, correct))
    told = summarise(**sites).competence
    assert told.answers == {"a": "10", "b": "--"} and (told.experts, told.neighbours) == (2, 20)


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
