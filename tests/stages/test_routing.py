import pytest
import torch

from accord.errors import DataError
from accord.stages import routing
from accord.stages.routing import RandomRouter, constant_router, route, routing_accuracy

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
