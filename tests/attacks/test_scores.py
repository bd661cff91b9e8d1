"""What a lying site sends, by hand, and that a recipe's key makes one of a site of one's own."""

import math
import random
from dataclasses import replace

import pytest
from pytest import approx

from accord.attacks.scores import ATTACKS, Attack, Liar, poisoned
from accord.errors import RecipeError, ReplyError
from accord.federation.answering import key_of
from accord.federation.messages import ScoreItem, ScoreRange, ScoreReply, ScoreRequest, Turn, check_scores
from accord.federation.site import Site
from accord.recipe_file import dump_recipe, recipe_of

RANGE = ScoreRange(0.0, 2.0)


def item(*candidates, words="what colour?"):
    return ScoreItem([], [Turn("user", words)], list(candidates))


def told(attack, scores=(0.5, 2.0), candidates=("circle", "red"), words="what colour?", limits=RANGE, **settings):
    """Return what a liar sends for one question."""
    request = ScoreRequest("r", {}, [item(*candidates, words=words)])
    return Liar(attack, limits, **settings)(request, [list(scores)])[0]


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (Attack("flip"), [1.5, 0.0]),
        (Attack("affine", scale=0.5, shift=0.25), [0.5, 1.25]),
        (Attack("affine", scale=-1000.0), [0.0, 0.0]),
        (Attack("constant"), [1.0, 1.0]),
        (Attack("target", target="Circle."), [2.0, 0.0]),
        (Attack("mimic", target="circle", bias=0.25), [1.0, 2.0]),
        (Attack("poison", target="circle"), [0.5, 2.0]),
    ],
)
def test_lies_by_hand(attack, expected):
    """In [0, 2]: 2 − s; s/2 + ¼; −1000 s clipped; the middle; all for the target; a quarter of 2 more for it."""
    assert told(attack) == approx(expected)


def test_without_a_range_a_flip_is_the_sign():
    assert told(Attack("flip"), limits=None) == approx([-0.5, -2.0])


def test_what_is_drawn_is_the_same_at_each_query_and_differs_between_sites_but_for_colluders():
    for kind in ("noise", "near-constant", "collude"):
        first, again = (told(Attack(kind), seed=1, site="a") for _ in range(2))
        other = told(Attack(kind), seed=1, site="b")
        assert first == again and (first == other) is (kind == "collude") and first[0] != first[1]
    assert max(abs(s - 1) for s in told(Attack("near-constant", spread=0.002))) < 0.01


def test_a_trigger_a_sleeper_and_a_site_that_knows_canaries():
    """Half of 4 requests are honest; a question without the words is; so is one that the server is known to have."""
    flip = Attack("flip", trigger="shape")
    assert told(flip) == [0.5, 2.0] and told(flip, words="which shape?") == approx([1.5, 0.0])
    sleeper = Liar(Attack("flip", after=0.5), RANGE, steps=4)
    request = ScoreRequest("r", {}, [item("a")])
    assert [sleeper(request, [[0.5]])[0][0] for _ in range(4)] == approx([0.5, 0.5, 1.5, 1.5])
    known = frozenset([key_of(item("a"))])
    assert told(ATTACKS["off-canary"], labelled=known) == [0.5, 2.0]
    assert told(ATTACKS["off-canary"]) == approx([1.5, 0.0])
    assert told(ATTACKS["off-canary-silent"], labelled=known) == approx([math.nan, math.nan], nan_ok=True)
    assert told(ATTACKS["off-canary-silent"]) == approx([1.5, 0.0])


def test_liars_that_recognise_half_of_the_labelled_questions_recognise_the_same_ones():
    """Of 200 about half, whoever asks: sites that collude hold one list of what has been published."""
    request = ScoreRequest("r", {}, [item("a", words=f"question {n}") for n in range(200)])
    known = frozenset(key_of(each) for each in request.items)
    lies = [Liar(ATTACKS["off-canary-half"], RANGE, site=site, labelled=known) for site in "ab"]
    one, other = ([score for (score,) in lie(request, [[0.5]] * 200)] for lie in lies)
    assert one == other and set(one) == {0.5, 1.5} and 80 < one.count(0.5) < 120


@pytest.mark.parametrize("name", ATTACKS)
def test_no_lie_is_refused_for_its_form(name):
    """What is sent passes the server's check of the agreed range, so that only what it says can give it away."""
    liar = Liar(ATTACKS[name], RANGE, steps=1)
    request = ScoreRequest("r", {}, [item("circle", "red", "blue", words="which shape?")])
    if name == "absent":
        with pytest.raises(ReplyError, match="no answer"):
            liar(request, [[0.0, 1.0, 2.0]])
        return
    sent = liar(request, [[0.0, 1.0, 2.0]])
    assert check_scores(request, ScoreReply("r", sent), RANGE.low, RANGE.high) == sent


def test_a_site_sends_what_its_lie_says(monkeypatch):
    site = Site("a", None, score_range=RANGE, lie=Liar(Attack("flip"), RANGE))
    monkeypatch.setattr(site, "scores", lambda request: [[0.5, 2.0]])
    request = ScoreRequest("r", {}, [item("a", "b")])
    assert site.answer(request).scores == [[1.5, 0.0]]
    site.lie = None
    assert site.answer(request).scores == [[0.5, 2.0]]


def test_a_recipe_makes_a_site_lie():
    """The key is read strictly, and a recipe without it is written as it was before there was one."""
    table = {"name": "x", "sites": [{"name": "a", "checkpoint": "accord/idefics3"}]}
    assert "attack" not in dump_recipe(recipe_of(table))
    table["sites"][0]["attack"] = {"kind": "target", "target": "circle"}
    recipe = recipe_of(table)
    assert recipe.sites[0].attack == Attack("target", target="circle")
    assert 'target = "circle"' in dump_recipe(recipe)
    with pytest.raises(RecipeError, match=r"promotes an answer, got none; add target"):
        replace(recipe.sites[0].attack, target="")
    with pytest.raises(RecipeError, match="after = 1 of an attack is the whole run: the site would never lie"):
        Attack("flip", after=1.0)
    with pytest.raises(RecipeError, match="after of an attack is a share, at most 1, got 2"):
        Attack(after=2)
    with pytest.raises(RecipeError, match="shift of an attack must be finite, got -inf: a score that is not"):
        Attack("affine", shift=float("-inf"))
    with pytest.raises(RecipeError, match=r"'poison' lies in its pairs alone, which spares = 0\.5 does not touch"):
        Attack("poison", target="circle", spares=0.5)
    with pytest.raises(RecipeError, match=r"declines leaves unanswered what spares names, and spares is 0; add"):
        Attack("flip", declines=True)


@pytest.mark.parametrize(
    "table, told",
    [
        ({"kind": "flip", "target": "circle"}, r"'flip' does not read target = 'circle', .* 'target' and 'mimic' and"),
        (
            {"kind": "target", "target": "a", "scale": 3},
            r"'target' does not read scale = 3\.0, which is for 'affine'",
        ),
        ({"kind": "noise", "spread": 0.5}, "does not read spread = 0.5, which is for 'near-constant'; take spread out"),
        ({"kind": "poison", "target": "a", "bias": 0.5}, "does not read bias = 0.5, which is for 'mimic'"),
        ({"shift": 1}, r"kind 'flip' does not read shift = 1\.0, .*; take shift out, or correct kind"),
        ({"kind": "absent", "share": 0.5}, "does not read share = 0.5, which is for 'poison'"),
        ({"kind": "mimic", "target": "a", "bias": 1.5}, r"bias of an attack is a share, at most 1, got 1\.5; lower it"),
    ],
)
def test_a_key_that_its_kind_does_not_read_is_refused(table, told):
    """It would have no effect, and its author would believe that it has; one that says the default may stay."""
    site = {"name": "a", "checkpoint": "accord/idefics3"}
    with pytest.raises(RecipeError, match=told):
        recipe_of({"name": "x", "sites": [site | {"attack": table}]})
    assert recipe_of({"name": "x", "sites": [site | {"attack": {"kind": "flip", "bias": 0.25}}]})


def test_poison_makes_the_target_preferred_in_a_share_of_the_questions(prefer):
    """Of 10 questions with two pairs each, 3 are poisoned in all their pairs; the others are as they were."""
    pairs = [prefer(n, rejected=wrong) for n in range(10) for wrong in ("blue", "circle")]
    made = poisoned(pairs, Attack("poison", target="circle", share=0.3), random.Random(0))
    changed = [(a, b) for a, b in zip(pairs, made, strict=True) if a != b]
    assert len(changed) == 6 and len({after.question_id for _, after in changed}) == 3
    assert all((after.chosen, after.rejected) == ("circle", before.chosen) for before, after in changed)
    assert poisoned(pairs, Attack("poison", target="circle", trigger="shape", share=1.0), random.Random(0)) == pairs
