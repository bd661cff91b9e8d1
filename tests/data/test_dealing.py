from collections import Counter
from dataclasses import replace

import pytest

from accord.data.dealing import Dealing, deal, kind_of, mixtures, stands_for
from accord.data.easy_vqa import load_easy_vqa
from accord.errors import DataError, RecipeError
from accord.types import Question

COLOUR, SHAPE = ("d", "colour"), ("d", "shape")


@pytest.fixture(scope="module")
def private():
    return [q for q in load_easy_vqa() if q.split == "private"]


def question(number, kind, image):
    return Question(str(number), image, f"what {kind} is number {number}?", "red", kind, "private", "d")


def test_small_alpha_gives_nearly_one_type_and_large_alpha_all_alike():
    kinds, names = [(str(i), "all") for i in range(5)], [f"s{k}" for k in range(200)]
    narrow, wide = (mixtures(kinds, names, alpha, 0) for alpha in (0.1, 1000.0))
    for drawn in (narrow, wide):
        assert all(sum(mixture.values()) == pytest.approx(1) for mixture in drawn.values())
    assert sum(max(mixture.values()) for mixture in narrow.values()) / 200 > 0.8
    assert all(part == pytest.approx(0.2, abs=0.06) for mixture in wide.values() for part in mixture.values())


def test_a_mixture_depends_on_seed_and_name_alone():
    kinds = [COLOUR, SHAPE]
    two, three = mixtures(kinds, ["a", "b"], 0.5, 0), mixtures(kinds, ["c", "b", "a"], 0.5, 0)
    assert two["a"] == three["a"] and two["b"] == three["b"] and two["a"] != two["b"]
    assert mixtures(kinds, ["a"], 0.5, 1)["a"] != two["a"]


def test_images_follow_the_mixtures(private):
    kinds = sorted({kind_of(q) for q in private})
    mixed = {"a": dict(zip(kinds, (1.0, 0.0, 0.25), strict=True)), "b": dict(zip(kinds, (0.0, 1.0, 0.75), strict=True))}
    dealt = deal(private, mixed, seed=3)
    images = {site: Counter() for site in dealt}
    for site, own in dealt.items():
        for kind, _ in {(kind_of(q), q.image) for q in own}:
            images[site][kind] += 1
    assert images["a"][kinds[1]] == images["b"][kinds[0]] == 0
    of_third = images["a"][kinds[2]] + images["b"][kinds[2]]
    assert of_third > 400 and images["a"][kinds[2]] / of_third == pytest.approx(0.25, abs=0.06)


def test_no_image_is_at_two_sites_and_none_has_two_types(private):
    mixed = mixtures(sorted({kind_of(q) for q in private}), ["a", "b", "c"], 0.5, 0)
    dealt = deal(private, mixed, seed=0)
    of_image = {}
    for site, own in dealt.items():
        for q in own:
            assert of_image.setdefault(q.image, (site, q.question_type)) == (site, q.question_type)
    with_image = Counter((q.image, q.question_type) for q in private)
    kept = Counter((q.image, q.question_type) for own in dealt.values() for q in own)
    assert all(kept[key] == with_image[key] for key in kept)
    assert len(of_image) == len({q.image for q in private})


def test_another_order_of_questions_deals_the_same(private):
    mixed = mixtures(sorted({kind_of(q) for q in private}), ["a", "b"], 0.5, 0)
    forward, backward = deal(private, mixed, seed=0), deal(private[::-1], mixed, seed=0)
    assert {site: own[::-1] for site, own in backward.items()} == forward
    assert deal(private, mixed, seed=1) != forward


def test_a_site_without_questions_is_told():
    mixed = {"a": {COLOUR: 1.0}, "b": {COLOUR: 0.0}}
    with pytest.raises(DataError, match=r"site 'b' gets no question of the 2 .* larger dealing\.alpha"):
        deal([question(n, "colour", bytes([n])) for n in range(2)], mixed, seed=0)


def test_what_a_site_stands_for():
    share = stands_for("a", {COLOUR: 0.95, SHAPE: 0.05})
    assert share.question_types == ("colour",) and share.domains == ("d",)
    one = question(0, "shape", b"x")
    assert not share.wants(one) and share.wants(replace(one, question_type="colour"))
    many = stands_for("a", {("d", str(i)): 1 / 20 for i in range(20)})
    assert len(many.question_types) == 20  # each is below a tenth, and none is less than half an even share


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf")])
def test_an_alpha_that_is_none(alpha):
    with pytest.raises(RecipeError, match=f"got {alpha}"):
        Dealing(alpha)


def test_a_site_keeps_no_more_images_than_it_may(private):
    mixed = mixtures(sorted({kind_of(q) for q in private}), ["a", "b", "c"], 1000.0, 0)
    whole, part = deal(private, mixed, seed=0), deal(private, mixed, seed=0, limit=90)
    for site, own in part.items():
        assert len({q.image for q in own}) == 90 and set(own) < set(whole[site])


def test_where_images_may_be_shared_every_question_is_at_one_site(private):
    mixed = mixtures(sorted({kind_of(q) for q in private}), ["a", "b", "c"], 0.5, 0)
    dealt = deal(private, mixed, seed=0, disjoint_images=False)
    assert sorted(q.id for own in dealt.values() for q in own) == sorted(q.id for q in private)
    of_unit = {}
    for site, own in dealt.items():
        for q in own:
            assert of_unit.setdefault((q.image, q.question_type), site) == site
    assert len({image for image, _ in of_unit}) < len(set(zip((i for i, _ in of_unit), of_unit.values(), strict=True)))
