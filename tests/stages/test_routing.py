from dataclasses import replace

import pytest
import torch

from accord.errors import DataError
from accord.federation.weights import trainable_weights
from accord.routing.router import RouterConfig, RouterNetwork
from accord.stages import routing
from accord.stages.routing import RandomRouter, audit_of, constant_router, route, routing_accuracy

GROUPS = [["a", "b", "c"], ["d", "e"]]
PROMPTS, IMAGES = [[], []], [None, None]


def test_a_constant_router_gives_every_completion_the_same():
    """3 + 2 completions, 2 sites: five rows."""
    weights = constant_router([0.25, 0.75])(PROMPTS, IMAGES, GROUPS)
    assert weights.tolist() == [[0.25, 0.75]] * 5


def test_a_random_router_sends_each_completion_somewhere():
    """Rows are one-hot; of 3,000 draws each of 3 sites gets 1,000, give or take 5 standard deviations of 26."""
    router = RandomRouter(3, seed=0)
    weights = router(PROMPTS, IMAGES, [["x"] * 3000, []])
    assert weights.shape == (3000, 3) and torch.equal(weights.sum(dim=1), torch.ones(3000))
    assert set(weights.flatten().tolist()) == {0.0, 1.0}
    assert ((weights.sum(dim=0) - 1000).abs() < 130).all()
    again, other = RandomRouter(3, seed=0), RandomRouter(3, seed=1)
    assert torch.equal(again(PROMPTS, IMAGES, [["x"] * 3000, []]), weights)
    assert not torch.equal(other(PROMPTS, IMAGES, [["x"] * 3000, []]), weights)
    assert not torch.equal(router(PROMPTS, IMAGES, [["x"] * 3000, []]), weights)  # it does not repeat itself


def test_questions_are_routed_in_batches(ask):
    """130 questions are a batch of 128 and one of 2; a router that numbers its rows shows their order."""
    sizes = []

    def numbering(prompts, images, completions):
        start = sum(sizes)
        sizes.append(sum(map(len, completions)))
        return torch.arange(start, start + sizes[-1]).unsqueeze(1)

    asked = [ask(n) for n in range(130)]
    weights = route(numbering, asked, [["x"]] * 130)
    assert sizes == [128, 2] and weights.flatten().tolist() == list(range(130))


@pytest.fixture
def dev(job, ask, monkeypatch):
    """Three dev questions about colour, one about number, one about size, which no site holds; answers are canned."""
    kinds = ["colour"] * 3 + ["number", "size"]
    job.questions = {"dev": [ask(n, "red", question_type=kind) for n, kind in enumerate(kinds)]}
    asked = []

    def canned(model, processor, questions, **_):
        asked.extend(questions)
        return [["x"]] * len(questions)

    monkeypatch.setattr(routing, "answer", canned)
    return asked


@pytest.mark.parametrize(("weights", "right"), [([0.9, 0.1], 0.75), ([0.1, 0.9], 0.25)])
def test_routing_accuracy_is_the_share_sent_to_a_fitting_site(job, dev, weights, right):
    """Site a holds colour: a router to it is right for 3 of the 4 questions that some site holds, one to b for 1."""
    assert routing_accuracy(job, constant_router(weights)) == right
    assert [q.question_type for q in dev] == ["colour"] * 3 + ["number"]


def test_there_must_be_dev_questions_of_some_site(job, dev):
    job.questions = {"dev": [q for q in job.questions["dev"] if q.question_type == "size"]}
    with pytest.raises(DataError, match="no dev question is of a domain and type that a site holds"):
        routing_accuracy(job, constant_router([1.0, 0.0]))


def audited(job, ask, **settings):
    """The audit of a job whose encoder makes of every question two states of the same number."""
    kinds = ["colour"] * 5 + ["number"] * 3 + ["size"] * 4
    job.questions = {"base": [ask(n, "red", question_type=kind) for n, kind in enumerate(kinds)], "dev": []}

    def encoder(prompts, images, completions):
        return torch.ones(len(prompts), 2, 4), torch.ones(len(prompts), 2, dtype=torch.bool)

    vars(job)["encoder"] = encoder
    router = RouterConfig(layers=1, width=8, heads=2, **settings)
    job.recipe = replace(job.recipe, router=router)
    return audit_of(job)


def test_the_audits_questions_are_labelled_ones_of_each_sites_kinds(job, ask):
    """Site a holds colour and site b number: of each four questions at most, none of size; each kind weighs a half."""
    audit = audited(job, ask, audit=4)
    assert {site: own.tolist() for site, own in audit.own.items()} == {
        "a": [True] * 4 + [False] * 3,
        "b": [False] * 4 + [True] * 3,
    }
    assert audit.alike.tolist() == pytest.approx([1 / 8] * 4 + [1 / 6] * 3)
    weights = trainable_weights(RouterNetwork(4, 2, job.recipe.router))
    losses = audit.losses(weights)  # the same states: −log α of the own site, which add up to 1
    assert (-losses[0]).exp() + (-losses[4]).exp() == pytest.approx(1.0)


def test_a_kind_that_base_lacks_is_audited_by_dev(job, ask):
    """Base has colour alone: its three questions, and dev's two about number. Dev's about colour are not needed."""
    audited(job, ask)
    job.questions = {
        "base": [ask(n, "red") for n in range(3)],
        "dev": [
            ask(3, "red"),
            ask(4, answer="two", question_type="number"),
            ask(5, answer="one", question_type="number"),
        ],
    }
    assert {site: int(own.sum()) for site, own in audit_of(job).own.items()} == {"a": 3, "b": 2}


def test_no_audit(job, ask):
    assert audited(job, ask, audit=0) is None
    assert audited(job, ask, leave_out=True).leaves_out
    job.questions = {"base": [ask(0, "red", question_type="size")], "dev": []}
    assert audit_of(job) is None
