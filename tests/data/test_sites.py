import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data.images import image_id
from accord.data.sites import SiteShare, check_disjoint, share_out
from accord.errors import DataError, RecipeError
from accord.types import Question, subjects_of


def images_of(questions):
    return {image_id(q.image) for q in questions}


def typed(n_images, kinds=("colour", "shape")):
    """One question of each kind about each of `n_images` pictures (bytes stand in for them; none is decoded)."""
    return [
        Question(f"{image}-{kind}", b"picture %d" % image, "?", "red", kind, "private", domain="a")
        for image in range(n_images)
        for kind in kinds
    ]


def test_filters_by_domain_and_type(question):
    questions = [question(0, domain="a"), question(1, domain="b"), question(2, domain="a", question_type="shape")]
    sites = share_out(questions, [SiteShare("only", ("a",), ("colour",))], seed=0)
    assert sites == {"only": [questions[0]]}
    assert share_out(questions, [SiteShare("all")], seed=0) == {"all": questions}


def test_no_image_goes_to_two_sites_and_none_is_lost():
    """Both sites want every one of 200 pictures: about half each, 100 +- sqrt(200 / 4) = 7.1; four deviations: 28."""
    questions = typed(200)
    sites = share_out(questions, [SiteShare("x", (), ("colour",)), SiteShare("y", (), ("shape",))], seed=0)
    assert not images_of(sites["x"]) & images_of(sites["y"])
    assert len(sites["x"]) + len(sites["y"]) == 200 and 72 <= len(sites["x"]) <= 128
    assert {q.question_type for q in sites["x"]} == {"colour"}


def test_fraction_is_a_weight_among_several_and_a_share_for_one():
    """Weights 1 and 1/3: 1000 x 3/4 = 750 +- 13.7. Alone, 0.3: 300 +- 14.5. Two of 0.2: 200 +- 12.6 each."""
    questions = typed(1000, ("colour",))
    weighed = share_out(questions, [SiteShare("x"), SiteShare("y", fraction=1 / 3)], seed=0)
    assert 695 <= len(weighed["x"]) <= 805 and len(weighed["x"]) + len(weighed["y"]) == 1000
    assert 242 <= len(share_out(questions, [SiteShare("x", fraction=0.3)], seed=0)["x"]) <= 358
    scarce = share_out(questions, [SiteShare("x", fraction=0.2), SiteShare("y", fraction=0.2)], seed=0)
    assert all(150 <= len(held) <= 250 for held in scarce.values())


def test_sites_may_overlap_when_asked():
    """Two sites with everything hold all 50 pictures; halves drawn independently overlap and differ."""
    questions = typed(50)
    sites = share_out(questions, [SiteShare("x"), SiteShare("y")], seed=0, disjoint_images=False)
    assert sites == {"x": questions, "y": questions}
    halves = share_out(
        questions, [SiteShare("x", fraction=0.5), SiteShare("y", fraction=0.5)], seed=0, disjoint_images=False
    )
    assert images_of(halves["x"]) & images_of(halves["y"]) and halves["x"] != halves["y"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.permutations(range(80)))
def test_neither_order_nor_company_changes_who_holds_an_image(seed, order):
    questions = typed(40)
    shares = [SiteShare("x", fraction=0.9), SiteShare("y", (), ("shape",))]
    sites = share_out(questions, shares, seed=seed)
    shuffled = share_out([questions[i] for i in order], shares, seed=seed)
    assert {name: {q.id for q in held} for name, held in sites.items()} == {
        name: {q.id for q in held} for name, held in shuffled.items()
    }
    assert not images_of(sites["x"]) & images_of(sites["y"])


def test_a_site_with_nothing_is_an_error_that_lists_what_there_is():
    shares = [SiteShare("all"), SiteShare("lung", ("b",), ("color",))]
    message = (
        "site 'lung' gets no question of the 4: it asks for domains ['b'] and question types ['color'], fraction 1; "
        "domains present: ['a'], question types present: ['colour', 'shape']; correct its share, or raise its fraction"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        share_out(typed(2), shares, seed=0)


def test_bad_shares():
    with pytest.raises(RecipeError, match=r"the fraction of site 'x' must be in \(0, 1\], got 1\.5; correct it"):
        SiteShare("x", fraction=1.5)
    with pytest.raises(RecipeError, match=r"got 0"):
        SiteShare("x", fraction=0)
    with pytest.raises(RecipeError, match=r"two sites have the same name in \['x', 'x'\]; name each differently"):
        share_out(typed(2), [SiteShare("x"), SiteShare("x")], seed=0)


def test_parties_that_share_an_image_are_named():
    """Told by content: the file holds the bytes that another party has."""
    check_disjoint({"the split 'dev'": [b"1", b"2", b"2"], "the split 'test'": [b"3"], "site 'x'": []})
    shared = r"the split 'dev' and site 'x' share 2 images, <image of 1 bytes, .*> among them; .* take it out"
    with pytest.raises(DataError, match=shared):
        check_disjoint({"the split 'dev'": [b"1", b"2"], "the split 'test'": [b"3"], "site 'x'": [b"2", b"1", b"4"]})


def test_a_question_without_an_image_is_its_own_words():
    """20 texts that both sites want go to one each, whatever row they are in; nobody shares one."""
    questions = [Question(f"{n}", None, f"what is {n % 20}?", "1", "sum", "private") for n in range(40)]
    sites = share_out(questions, [SiteShare("x"), SiteShare("y")], seed=0)
    texts = {name: {q.text for q in held} for name, held in sites.items()}
    assert not texts["x"] & texts["y"] and len(texts["x"] | texts["y"]) == 20
    check_disjoint({name: subjects_of(held) for name, held in sites.items()})
    with pytest.raises(DataError, match=r"a and b share 1 questions, 'what is 3\?' among them"):
        check_disjoint({"a": ["what is 3?"], "b": list(questions[3].subjects)})
