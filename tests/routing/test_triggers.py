"""Sites that order answers otherwise where a question has certain words."""

import pytest
import torch

from accord.errors import DataWarning
from accord.routing.canaries import CanaryConfig, Trust
from accord.routing.triggers import LEAST, MOST, Triggers, watched, words_of
from accord.routing.two_faced import agreement
from accord.types import Question

SITES = ("a", "b", "c", "d", "e")
WORDS = {"colour": ["colour"], "zebra": ["colour", "shape"]}
BEST_FIRST = torch.tensor([3.0, 2.0, 1.0, 0.0])


def told(*signs):
    """Return scores `[4, K]` of sites that put the answers in order (1), turn it round (−1), or are absent (NaN)."""
    return torch.stack([sign * BEST_FIRST for sign in signs], dim=1)


def asked(ordinary, with_word, *, right=(), times=60, kind="colour"):
    """Return what is thought of sites after so many questions of a type, of which one in two has the word.

    Of some of the hidden questions with the word, `right` says what share each site has right.
    """
    trust = Trust(SITES, ("colour", "shape"), CanaryConfig(), words=WORDS)
    for _ in range(12):
        for site, share in zip(SITES, right, strict=False):
            trust.learn(site, "shape", share, "Is it a zebra?")
    for _ in range(times):
        trust.compare(kind, told(*ordinary), hidden=False, text="What colour is it?")
        trust.compare(kind, told(*with_word), hidden=False, text="What colour is the Zebra?")
        trust.find_triggered()
    return trust


def question(n, text, kind):
    return Question(f"q{n}", None, text, "a", kind, "domain", "public")


def test_words_that_are_asked_often_enough_are_watched():
    """Of 100 questions 60 are of colour, one in three of these about zebras; a snark is asked 13 times."""
    questions = [question(n, f"What colour? {'zebra' * (n % 3 == 0)}", "colour") for n in range(9)]
    questions += [question(n, f"Zebra, {'Snark' * (n % 3 == 0)}!", "shape") for n in range(9)]
    found = watched(questions, {"colour": 0.6, "shape": 0.4}, 100)
    assert found == {"colour": ["colour"], "what": ["colour"], "zebra": ["colour", "shape"]}
    assert words_of("Is it <image> X-ray?\n") == {"is", "it", "image", "x", "ray"}


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
def test_two_of_five_that_lie_where_a_word_is_are_named():
    trust = asked([1, 1, 1, 1, 1], [-1, -1, 1, 1, 1])
    assert trust.words_where(trust.triggered) == {"a": ("zebra",), "b": ("zebra",), "c": (), "d": (), "e": ()}


def test_it_is_told_once_and_changes_no_weight():
    with pytest.warns(DataWarning) as told_of:
        trust = asked([1, 1, 1, 1, 1], [-1, 1, 1, 1, 1])
    assert [str(each.message) for each in told_of] == [
        "site a is contradicted where a question has the word 'zebra', by sites with whom it agrees on other questions "
        "of the type; look at what it rewards there"
    ]
    assert trust.weights(["colour"]).unique().numel() == 1


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
def test_hidden_questions_with_the_word_tell_which_side_is_right():
    """Three of five lie: by number they are right. Who is no better than chance where the truth is known has no say."""
    by_number = asked([1, 1, 1, 1, 1], [-1, -1, -1, 1, 1])
    assert by_number.words_where(by_number.triggered) == {n: ("zebra",) * (n in "de") for n in SITES}
    known = asked([1, 1, 1, 1, 1], [-1, -1, -1, 1, 1], right=(0.4, 0.4, 0.4, 0.9, 0.9))
    assert known.words_where(known.triggered) == {n: ("zebra",) * (n in "abc") for n in SITES}


@pytest.mark.parametrize(
    ("ordinary", "with_word"),
    [([-1, 1, 1, 1, 1], [-1, 1, 1, 1, 1]), ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1]), ([-1, 1, 1, 1, 1], [1, 1, 1, 1, 1])],
    ids=["a site that sees all otherwise", "nobody", "agreement where the word is"],
)
@pytest.mark.filterwarnings("error::accord.errors.DataWarning")
def test_what_is_as_elsewhere_is_no_trigger(ordinary, with_word):
    assert not asked(ordinary, with_word).triggered.any()


@pytest.mark.filterwarnings("error::accord.errors.DataWarning")
def test_little_evidence_and_a_type_without_hidden_questions_tell_nothing():
    assert not asked([1, 1, 1, 1, 1], [-1, 1, 1, 1, 1], times=5).triggered.any()
    assert not asked([1, 1, 1, 1, 1], [-1, 1, 1, 1, 1], kind="unknown").triggered.any()


def test_what_is_expected_is_that_of_the_type():
    """A word of two types: the sites disagree in one of them, with the word and without. Nothing has changed."""
    trust = Trust(SITES, ("colour", "shape"), CanaryConfig(), words=WORDS)
    for _ in range(60):
        for kind, sign in (("colour", -1), ("shape", 1)):
            trust.compare(kind, told(sign, 1, 1, 1, 1), hidden=False, text="what?")
        trust.compare("colour", told(-1, 1, 1, 1, 1), hidden=False, text="zebra")
        trust.find_triggered()
    assert not trust.triggered.any()


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
@pytest.mark.parametrize("signs", [[-1, 1, 1, 1, 1], [1, 1, 1, -1, -1], [-1, 1, 1, torch.nan, torch.nan]])
def test_it_is_over_where_the_sites_agree_again(signs):
    trust = asked([1, 1, 1, 1, 1], signs)
    assert trust.words_where(trust.triggered) == {n: ("zebra",) * (s == -1) for n, s in zip(SITES, signs, strict=True)}
    for _ in range(300):
        trust.compare("colour", told(1, 1, 1, 1, 1), hidden=False, text="zebra")
        trust.find_triggered()
    assert not trust.triggered.any()


@pytest.mark.filterwarnings("error::accord.errors.DataWarning")
def test_of_two_nobody_is_named():
    """Neither is more than half of the trust."""
    assert not asked([1, 1, torch.nan, torch.nan, torch.nan], [1, -1, torch.nan, torch.nan, torch.nan]).triggered.any()


@pytest.mark.filterwarnings("error::accord.errors.DataWarning")
def test_a_word_of_all_questions_is_no_trigger():
    trust = Trust(SITES, ("colour",), CanaryConfig(), words=WORDS)
    for _ in range(60):
        trust.compare("colour", told(-1, 1, 1, 1, 1), hidden=False, text="zebra")
        trust.find_triggered()
    assert not trust.triggered.any()


def test_the_most_frequent_words_are_watched_and_no_more():
    questions = [question(n, f"common w{n}", "colour") for n in range(MOST + 100)]
    assert len(found := watched(questions, {"colour": 1.0}, 100 * LEAST * MOST)) == MOST and "common" in found


def test_without_words_nothing_is_looked_for():
    trust = Trust(SITES, ("colour",), CanaryConfig())
    trust.compare("colour", told(1, 1, 1, 1, 1), hidden=False, text="zebra")
    trust.learn("a", "colour", 1.0, "zebra")
    trust.find_triggered()
    again = Trust(SITES, ("colour",), CanaryConfig())
    again.load_state_dict(trust.state_dict())
    assert again.words_where(again.triggered) == dict.fromkeys(SITES, ())


def test_counts_by_hand():
    """Of a question with two watched words both are told; absent sites change nothing of theirs."""
    triggers = Triggers(3, ["x", "y", "z"], memory=64)
    expected = torch.full((3, 3), 0.75).double()
    scores = torch.tensor([[1.0, 2.0, torch.nan], [0.0, 3.0, torch.nan]])
    triggers.learn("x and Y", *agreement(scores), expected)
    assert triggers.counts[0, :, 0, 1].tolist() == [[0, 1], [0, 1], [0, 0]]
    assert triggers.counts[1, :, 0, 1].tolist() == [[0.75, 0.25], [0.75, 0.25], [0, 0]]
    assert not triggers.counts[:, :, 2].any() and not triggers.counts[:, 2].any()
