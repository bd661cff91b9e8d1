"""The best site is the one that puts right answers first; one site judges everything; what was chosen is kept."""

import math
from dataclasses import replace

import pytest

from accord.errors import DataWarning, RunError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreReply
from accord.methods import find_method, single
from accord.methods.single import best_site, best_site_reward, one_site
from accord.stages import alignment

KINDS = ("colour", "number")


@pytest.fixture
def ranked(job, ask, monkeypatch, llava):
    """Return a function that opens two sites; each puts the right answer first in this share of 5 questions a type.

    To the others it prefers all wrong answers. With None for shares it scores all answers alike, with {} it fails.
    """
    answers = {f"{kind} {n}?": ("red", "blue")[n % 2] for kind in KINDS for n in range(5)}
    dev = [ask(0, a, text=text, question_type=text.split()[0], split="dev") for text, a in answers.items()]
    job.recipe = replace(job.recipe, policy=replace(job.recipe.policy, checkpoint=llava))
    job.questions = {"dev": dev, "public": []}

    absent = {}  # by site, the texts to which it gives no score

    def site(name, shares):
        def score(request):
            scores = []
            for item in request.items:
                text = item.prompt[0].content[-1].text
                kind, number = text.rstrip("?").split()
                first = shares is not None and int(number) < round(5 * shares[kind])
                given = [0.5 if shares is None else float((c == answers[text]) is first) for c in item.candidates]
                scores.append([math.nan] * len(given) if text in absent.get(name, ()) else given)
            return ScoreReply(request.id, scores)

        return score

    def open_sites(**by_site):
        engine = InProcessEngine({name: site(name, shares) for name, shares in by_site.items()})
        for module in (alignment, single):
            monkeypatch.setattr(module, "open_federation", lambda job, **settings: engine)
        return engine

    open_sites.absent = absent
    return open_sites


@pytest.mark.parametrize(
    ("a", "b", "best"),
    [
        ({"colour": 1.0, "number": 0.0}, {"colour": 0.6, "number": 0.6}, 1),
        ({"colour": 1.0, "number": 0.4}, {"colour": 0.6, "number": 0.6}, 0),
        ({"colour": 0.4, "number": 0.4}, {"colour": 0.4, "number": 0.4}, 0),
    ],
)
def test_the_best_site_ranks_best_over_all_types(job, ranked, a, b, best):
    """Means over types: 0.5 against 0.6; 0.7 against 0.6; equal, where the first named is taken."""
    ranked(a=a, b=b)
    assert best_site(job) == best


def test_types_count_alike_however_many_questions_they_have(job, ranked):
    """Of 5 colours and 1 number: a has all colours, b the number and 3 colours. Over types 0.5 against 0.8."""
    job.questions["dev"] = [q for q in job.questions["dev"] if q.question_type == "colour" or q.text == "number 0?"]
    ranked(a={"colour": 1.0, "number": 0.0}, b={"colour": 0.6, "number": 1.0})
    assert best_site(job) == 1


@pytest.mark.parametrize(("elsewhere", "best"), [(False, 1), (True, 0)])
def test_a_tie_counts_by_half_where_scores_are_clipped(job, ranked, elsewhere, best):
    """Site a scores all alike, b is right in 2 of 5. Here ties are none above: 0 against 0.4; elsewhere 0.5."""
    engine = ranked(a=None, b=dict.fromkeys(KINDS, 0.4))
    job.engine = engine if elsewhere else None
    assert best_site(job) == best


@pytest.mark.parametrize("others", [{}, dict.fromkeys(KINDS, 0.2)])
def test_a_site_that_says_nothing_is_not_compared(job, ranked, others):
    """Absent is not wrong: who would be best is not known, of one site away or of both."""
    ranked(a={}, b=others)
    said = "site 'a' answered none of the 10 dev questions by which 'best-site' is chosen"
    with pytest.warns(DataWarning) as told, pytest.raises(RunError, match=said):
        best_site(job)
    assert any("site a gave no answer" in str(warning.message) for warning in told)


@pytest.mark.filterwarnings("ignore:site . sent a score that is not finite")
def test_what_a_site_did_not_answer_counts_not_against_it(job, ranked):
    """a is right in both that it answered of 5 colours, b in 3 of 5; both are right in 3 of 5 numbers.

    a: (1 + 0.6) / 2 = 0.8; b: (0.6 + 0.6) / 2 = 0.6. Were absent wrong, a would have (0.4 + 0.6) / 2 = 0.5.
    """
    ranked(a={"colour": 0.4, "number": 0.6}, b={"colour": 0.6, "number": 0.6})
    ranked.absent["a"] = {"colour 2?", "colour 3?", "colour 4?"}
    assert best_site(job) == 0


@pytest.mark.filterwarnings("ignore:site . sent a score that is not finite")
def test_a_type_that_one_site_did_not_answer_counts_for_none(job, ranked):
    """By numbers alone b is better, 0.6 against 0.4; with the colours that only a answered, a would be (0.7)."""
    ranked(a={"colour": 1.0, "number": 0.4}, b={"colour": 1.0, "number": 0.6})
    ranked.absent["b"] = {f"colour {n}?" for n in range(5)}
    assert best_site(job) == 1
    ranked.absent["a"] = {f"number {n}?" for n in range(5)}
    with pytest.raises(RunError, match="of the 2 question types none was answered by every site"):
        best_site(job)


def test_an_answer_that_is_as_good_is_no_rival(job, ranked):
    """With red and blue both right no rival is left, and the site that prefers the other one is as good: the first."""
    job.questions["dev"] = [replace(q, references=("Red", "blue.")) for q in job.questions["dev"]]
    ranked(a=dict.fromkeys(KINDS, 0.0), b=dict.fromkeys(KINDS, 1.0))
    assert best_site(job) == 0


def test_the_best_site_is_chosen_once(job, ranked):
    """Then kept: it may be asked again only once a site was trained anew."""
    ranked(a=dict.fromkeys(KINDS, 0.2), b=dict.fromkeys(KINDS, 0.8))
    for _ in range(2):
        reward = best_site_reward(job)
        assert reward.router([[]], [None], [["x"]]).tolist() == [[0.0, 1.0]]
        assert (job.path / "kept" / "site" / "best-site" / "chosen.txt").read_text() == "1\n"
        ranked(a=dict.fromkeys(KINDS, 0.8), b=dict.fromkeys(KINDS, 0.2))
    with job.doing("site a"):
        pass
    assert best_site_reward(job).router([[]], [None], [["x"]]).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("k", [0, 1])
def test_a_single_site_judges_everything(job, monkeypatch, k):
    monkeypatch.setattr(single, "federated_reward", lambda job, router: router)
    router = one_site(job, k)
    assert router([[]], [None], [["x", "y"]]).tolist() == [[float(k == 0), float(k == 1)]] * 2
    assert find_method(f"site {'ab'[k]}", "ab").reward(job)([[]], [None], [["x"]]).argmax() == k
