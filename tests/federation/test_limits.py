import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.errors import RecipeError
from accord.federation.limits import Budget, Limits, Rate, Spent, queries
from accord.federation.messages import (
    AnswerItem,
    AnswerRequest,
    Declined,
    ImageBlock,
    ScoreItem,
    ScoreRequest,
    TextBlock,
    Turn,
)
from accord.toml import build

SHORT = [Turn("user", "where?")]


def request(*candidates, images=None):
    """A request of a question for each number of candidates, about images such as "a" or "ab", which are two."""
    images = images or [""] * len(candidates)
    return ScoreRequest(
        "s", {}, [ScoreItem(list(own), SHORT, ["x"] * n) for own, n in zip(images, candidates, strict=True)]
    )


def test_what_is_over_a_limit_is_refused_alone():
    """Three questions; two candidates; ten characters with the longest candidate, of which `where?` has six."""
    limits = Limits(items=3, candidates=2, characters=10)
    assert limits.declined(request(2, 3, 1, 1)) == {1: Declined.LIMIT, 3: Declined.LIMIT}
    texts = [ScoreItem([], SHORT, ["x", "y" * n]) for n in (4, 5)]
    blocks = AnswerItem([], [Turn("system", "12345"), Turn("user", [TextBlock("67890"), TextBlock("1")])])
    assert limits.declined(ScoreRequest("s", {}, texts)) == {1: Declined.LIMIT}
    assert limits.declined(AnswerRequest("a", {}, [blocks, AnswerItem([], SHORT)])) == {0: Declined.LIMIT}
    assert Limits(images=2).declined(request(1, 1, 1, images=["ab", "abc", "aaa"])) == dict.fromkeys(
        [1, 2], Declined.LIMIT
    )


def test_what_costs_a_model_much_and_says_little_is_refused():
    """Places for images without an image, turns without words, and a question that asks for nothing."""
    limits = Limits()
    places = [ScoreItem(["a"] * images, [Turn("user", [ImageBlock()] * 2)], ["x"]) for images in (1, 2)]
    turns = [ScoreItem([], [Turn("user", "")] * n, ["x"]) for n in (65, 64)]
    nothing = [ScoreItem(["a"], SHORT, [])]
    refused = limits.declined(ScoreRequest("s", {}, [*places, *turns, *nothing]))
    assert refused == dict.fromkeys([0, 2, 4], Declined.LIMIT)


@pytest.mark.parametrize(
    ("kind", "table", "message"),
    [
        (Limits, {"items": 0}, "items must be at least 1, got 0"),
        (Limits, {"image_memory": 1000}, "image_memory must be at least"),
        (Limits, {"pixel": 3}, "did you mean pixels"),
        (Budget, {"per_day": -1}, "per_day must be at least 0, got -1"),
        (Budget, {"per_hour": 1}, "per_hour is not a setting"),
    ],
)
def test_limits_that_are_none(kind, table, message):
    with pytest.raises(RecipeError, match=message):
        build(kind, table)


def test_budgets_by_day_run_and_image():
    """Ten a day, 14 a run, 6 an image. Questions of 4, 4, 4 about one image, and 2 about none."""
    spent = Spent(Budget(per_day=10, per_run=14, per_image=6))
    asked = request(4, 4, 2, 4, 2, images=["i", "i", "i", "", ""])
    # 4 of i; 4 more of it are over 6, 2 more are not; 4 without an image fill the day.
    assert spent.declined(asked, "2026-01-01", {}) == {1: Declined.BUDGET, 4: Declined.BUDGET}
    assert spent.declined(asked, "2026-01-01", {0: Declined.LIMIT}) == {4: Declined.BUDGET}
    spent.add("2026-01-01", 10, {"i": 6})
    assert set(spent.declined(asked, "2026-01-01", {})) == {0, 1, 2, 3, 4}
    assert set(spent.declined(asked, "2026-01-02", {})) == {0, 1, 2, 4}  # four are left of the run
    spent.add("2026-01-02", 4, {})
    assert set(spent.declined(asked, "2026-01-03", {})) == {0, 1, 2, 3, 4}
    assert (spent.run, spent.today, spent.day) == (14, 4, "2026-01-02")


def test_a_question_about_several_images_is_a_query_about_each():
    """Three an image: after two about a and b, two about b and c are too many for b, and one of c is left to take."""
    spent = Spent(Budget(per_image=3))
    assert spent.declined(request(2, 2, 1, images=["ab", "bc", "ca"]), "2026-01-01", {}) == {1: Declined.BUDGET}
    spent.add("2026-01-01", 2, {"a": 2, "b": 2})
    assert spent.declined(request(2, 3, images=["ca", "c"]), "2026-01-01", {}) == {0: Declined.BUDGET}
    assert spent.declined(request(3, images=["aa"]), "2026-01-01", {}) == {0: Declined.BUDGET}


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["a", "b", "", "ab", "aa"])), max_size=6), max_size=12
    ),
    st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(0, 5)),
)
def test_no_budget_is_ever_passed_and_none_is_refused_that_fits(asked, most):
    """Whatever is asked, in two days; 0 is any number. A question of one candidate is refused only at a full budget."""
    spent = Spent(Budget(*most))
    for n, questions in enumerate(asked):
        day = f"2026-01-0{1 + 2 * n // max(len(asked), 1)}"
        made = request(*[count for count, _ in questions], images=[image for _, image in questions])
        declined = spent.declined(made, day, {})
        taken = [item for n, item in enumerate(made.items) if n not in declined]
        by_image = {i: sum(queries(item) for item in taken if i in item.images) for i in ("a", "b")}
        spent.add(day, sum(map(queries, taken)), by_image)
        totals = (spent.today, spent.run, max(spent.by_image.values()))
        assert all(not limit or total <= limit for limit, total in zip(most, totals, strict=True))
        full = [bool(limit) and total == limit for limit, total in zip(most, totals, strict=True)]
        assert all(any(full) for n in declined if queries(made.items[n]) == 1)


def test_requests_in_any_minute():
    """Two in sixty seconds: at 0, 30, then 60 again; one that is refused does not count."""
    times = iter([0.0, 30.0, 59.0, 60.0, 61.0, 90.0])
    rate = Rate(2, lambda: next(times))
    assert [rate.over() for _ in range(6)] == [False, False, True, False, True, False]
