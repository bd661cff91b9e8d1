"""Hidden questions: that they look as the others do, what they tell, and that a run goes on where it stopped."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx

from accord.errors import CheckpointError, DataWarning, RecipeError
from accord.federation.messages import ScoreItem, ScoreRequest, Turn, image_name
from accord.methods.robust import _key
from accord.routing.canaries import PRIOR, Canaries, Canary, CanaryConfig, Trust, alarms, share_below
from accord.types import vqa_prompt

KINDS = ("colour", "shape")
CONFIG = CanaryConfig()


def pool(square, count=12):
    wrong = tuple(f"wrong {n}" for n in range(7))
    images = [square("red", (8 + n, 8)) for n in range(count)]
    return [Canary(vqa_prompt("what?"), (image,), "right", wrong, KINDS[n % 2]) for n, image in enumerate(images)]


def requests(square, sites=("a", "b"), sizes=(4, 2, 4, 1)):
    """A request of four questions for every site, about two images."""
    images = [square("blue"), square("green")]
    turns = [Turn("user", "what?")]
    items = [
        ScoreItem([image_name(images[n % 2])], turns, [f"{n} {c}" for c in range(size)]) for n, size in enumerate(sizes)
    ]
    named = {image_name(image): image for image in images}
    return {site: ScoreRequest(f"score-1-{site}", named, items) for site in sites}


def test_a_canary_looks_as_its_neighbours(square):
    """As many candidates as one of the request that has some to rank; places and orders differ; no image is last.

    The ordinary items are all there, in their order, with their images.
    """
    canaries = Canaries(pool(square, 400), ("a", "b"), CanaryConfig(per_step=2), key=0)
    sizes, places, rights = [], [], []
    for _ in range(200):
        asked = requests(square)
        mixed, hidden = canaries.mix(asked)
        for site, request in mixed.items():
            at = [each.position for each in hidden[site]]
            ordinary = [item for n, item in enumerate(request.items) if n not in at]
            assert ordinary == asked[site].items and len(at) == 2 and request.id == asked[site].id
            assert set(request.images) == {item.images[0] for item in request.items}
            assert list(request.images) == list(dict.fromkeys(item.images[0] for item in request.items))
            for each in hidden[site]:
                sizes.append(len(request.items[each.position].candidates))
                assert request.items[each.position].candidates[each.order[0]] == "right"
                rights.append(each.order[0] / (sizes[-1] - 1))
            places += at
    assert set(sizes) == {2, 4} and sum(size == 4 for size in sizes) / len(sizes) == approx(2 / 3, abs=0.07)
    assert set(places) == set(range(6)) and sum(rights) / len(rights) == approx(0.5, abs=0.04)
    assert mixed["a"].items != mixed["b"].items


def test_no_canary_is_asked_twice_and_a_pool_ends(square):
    """12 canaries, 5 a step: 5, 5, 2 and none; types come in turn."""
    canaries = Canaries(pool(square), ("a",), CanaryConfig(per_step=5), key=3)
    seen, found = [], []
    for _ in range(4):
        mixed, hidden = canaries.mix(requests(square, ("a",)))
        seen += [mixed["a"].items[each.position].images[0] for each in hidden["a"]]
        found.append(len(hidden["a"]))
        kinds = [each.kind for each in hidden["a"]]
        assert abs(kinds.count("colour") - kinds.count("shape")) <= 1
    assert found == [5, 5, 2, 0] and len(set(seen)) == 12


def test_a_step_without_anything_to_rank_has_no_canary(square):
    canaries = Canaries(pool(square), ("a",), CONFIG, key=0)
    asked = requests(square, ("a",), sizes=(1, 1))
    assert canaries.mix(asked) == (asked, {}) and canaries.used == 0


def test_the_share_below_by_hand():
    """Of 0, 1 and 2 beside a 1: below, tie, above."""
    assert share_below([0.0, 1.0, 1.0, 2.0], 1) == approx((1 + 0.5 + 0) / 3)


def learnt(trust, site, kind, *shares):
    for share in shares:
        trust.learn(site, kind, share)


def test_trust_by_hand():
    """One right: (3 + 1) / (5 + 1) in either memory; then one wrong, n = 16: S = 15/16, F = 1, m = 3.9375 / 6.9375.

    τ is log(m / (1 − m)), of the smaller m: the short memory's after a loss.
    """
    trust = Trust(["a", "b"], KINDS, CONFIG)
    assert trust.weights(["colour"])[0].tolist() == approx([torch.tensor(1.5).log().item()] * 2)
    learnt(trust, "a", "colour", 1.0)
    assert trust.estimate()[0].tolist() == approx([4 / 6, 4 / 6, 3 / 5])  # all types, colour, shape
    learnt(trust, "a", "colour", 0.0)
    m = 3.9375 / 6.9375
    assert trust.estimate()[0, 1].item() == approx(m)
    told = trust.weights(["colour", "number"])
    assert told[0, 0].item() == approx(torch.tensor(m / (1 - m)).log().item())
    assert told[1].tolist() == approx([torch.tensor(1.5).log().item()] * 2)  # of a type without canaries: the prior
    with pytest.warns(DataWarning, match="set aside"):
        learnt(trust, "b", "shape", *[0.0] * 11)
    assert trust.weights(["number"])[0, 1] == 0  # worse than chance over all types


def test_who_knows_little_moves_little():
    """One of two sites is set aside: the other has all the weight, and rewards are as small as its trust.

    By hand: 3 / 6 after a wrong one, whose weight is 0; then, after a right one, 4 / (6 + 63/64) in the long memory.
    A new type has a newcomer's trust.
    """
    trust = Trust(["a", "b"], KINDS, CONFIG)
    with pytest.warns(DataWarning, match="set aside"):
        learnt(trust, "a", "shape", *[0.0] * 11)
    assert trust.confidence(["shape", "number"]).tolist() == approx([1.0, 1.0])
    learnt(trust, "b", "shape", 0.0)
    assert trust.estimate()[1, 2].item() == approx(0.5) and trust.confidence(["shape"]).tolist() == approx([0.0])
    learnt(trust, "b", "shape", 1.0)
    m = 4 / (6 + 63 / 64)
    odds = torch.tensor(m / (1 - m)).log().item() / torch.tensor(1.5).log().item()
    assert 0 < odds < 1 and trust.confidence(["shape"]).tolist() == approx([odds])


def test_quick_to_lose_and_slow_to_gain():
    """After 64 right ones it takes 12 wrong ones to be nobody, and more than twice as many right ones to be heard."""
    trust = Trust(["a"], ("colour",), CONFIG)
    learnt(trust, "a", "colour", *[1.0] * 64)
    with pytest.warns(DataWarning, match="site a ranks the server's hidden questions worse than chance .* set aside"):
        fallen = next(n for n in range(1, 99) if learnt(trust, "a", "colour", 0.0) or trust.estimate()[0, 1] < 0.5)
        learnt(trust, "a", "colour", *[0.0] * (40 - fallen))
    assert fallen == 12 and trust.weights(["colour"]).tolist() == [[0.0]]
    with pytest.warns(DataWarning, match="has ranked hidden questions right again"):
        back = next(n for n in range(1, 99) if learnt(trust, "a", "colour", 1.0) or not trust.aside[0, 1])
    assert back > 2 * fallen and trust.weights(["colour"])[0, 0] > 0


def test_t2b_a_specialist_keeps_its_domain():
    """One of five is right about shapes alone (95 %), the others are at 50 % there: its weight is above 2/5.

    Elsewhere the others are right and it is not, and no canary of another type costs it anything at home.
    """
    trust = Trust("abcde", KINDS, CONFIG)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        draw = torch.rand(5, 2, generator=generator).tolist()
        for site, (colour, shape) in zip("abcde", draw, strict=True):
            learnt(trust, site, "shape", float(shape < (0.95 if site == "a" else 0.5)))
            learnt(trust, site, "colour", float(colour < (0.5 if site == "a" else 0.95)))
    shape, colour = trust.weights(["shape", "colour"])
    assert shape[0] / shape.sum() > 2 / 5 and colour[0] / colour.sum() < 0.1
    pooled = trust.weights(["number"])[0]
    assert pooled[0] / pooled.sum() < 2 / 5  # without a trust of its own for every type it would lose its domain


def test_a_run_goes_on_where_it_stopped(square):
    """State after two steps into a new object: the third step's requests and what is learnt are the same."""

    def step(canaries):
        mixed, hidden = canaries.mix(requests(square))
        canaries.learn(hidden, {"a": [[float(c == "right") for c in i.candidates] for i in mixed["a"].items]})
        return mixed

    once = Canaries(pool(square), ("a", "b"), CONFIG, key=0)
    step(once)
    step(once)
    again = Canaries(pool(square), ("a", "b"), CONFIG, key=0)
    again.load_state_dict({name: tensor.clone() for name, tensor in once.state_dict().items()})
    assert step(once) == step(again)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in once.state_dict().items())
    assert once.trust.estimate()[0].gt(0.6).all() and once.trust.estimate()[1].tolist() == approx([0.6] * 3)
    older = {name: once.state_dict()[name] for name in ("aside", "calls", "counts", "used")}
    with pytest.raises(CheckpointError, match=r"by another version of Accord, which wrote aside, calls, counts, used"):
        again.load_state_dict(older)
    with pytest.raises(CheckpointError, match=r"is of questions with other words, such as 'zebra'; resume with the"):
        Canaries(pool(square), ("a", "b"), CONFIG, key=0, words={"zebra": ["colour"]}).load_state_dict(
            once.state_dict()
        )
    with pytest.raises(CheckpointError, match=r"is of 2 sites and the question types colour, shape, expected 1 "):
        Canaries(pool(square), ("a",), CONFIG, key=0).load_state_dict(once.state_dict())
    others = [replace(canary, kind=f"other {canary.kind}") for canary in pool(square)]
    with pytest.raises(
        CheckpointError, match=r"colour, shape, expected 2 and other colour, other shape; resume with the"
    ):
        Canaries(others, ("a", "b"), CONFIG, key=0).load_state_dict(once.state_dict())


def test_an_absence_is_no_evidence(square):
    """A site that is gone, and one without a finite score for any item."""
    canaries = Canaries(pool(square), ("a", "b"), CONFIG, key=0)
    mixed, hidden = canaries.mix(requests(square))
    canaries.learn(hidden, {"a": [None] * len(mixed["a"].items)})
    assert not canaries.trust.counts.any()


def test_a_canary_that_is_left_out_of_an_answer_is_half_right(square):
    """Site a answers ordinary questions and no canary, and b nothing at all, which is no evidence.

    Where b answers the canaries, a could have: its two are half right. Where nobody does, the questions are at fault.
    """
    canaries = Canaries(pool(square), ("a", "b"), CONFIG, key=0)
    mixed, hidden = canaries.mix(requests(square))
    asked = len(mixed["a"].items)
    places = {each.position for each in hidden["a"]}
    given = [None if n in places else [0.0] * len(item.candidates) for n, item in enumerate(mixed["a"].items)]
    canaries.learn(hidden, {"a": given, "b": [None] * asked})
    assert not canaries.trust.counts.any()
    canaries.learn(hidden, {"a": given, "b": [[0.0] * len(item.candidates) for item in mixed["b"].items]})
    right, wrong = canaries.trust.counts[0, 0, 0]  # of a, over all types, in the short memory
    assert right == wrong > 0


def test_how_often_an_alarm_is_false():
    """The probabilities of docs/liars.md: a site that is always wrong is set aside by the same canary as in a run.

    Of sites that know nothing one in 350 is, within 48 canaries; of those that flip nine in ten orders 86 % within 24.
    """
    trust = Trust(["a"], ("colour",), CONFIG)
    with pytest.warns(DataWarning, match="set aside"):
        found = next(n for n in range(1, 99) if learnt(trust, "a", "colour", 0.0) or trust.aside[0, 1])
    assert found == next(n for n in range(1, 99) if alarms(0.0, n) == 1) == 11
    assert alarms(1.0, 48) == 0
    assert alarms(0.1, 24) == approx(0.863, abs=0.001) and alarms(0.5, 48) == approx(0.0028, abs=0.0001)


@pytest.mark.parametrize(("accuracy", "canaries"), [(0.1, 24), (0.3, 24), (0.3, 48)])
def test_alarms_are_as_frequent_as_in_a_simulation(accuracy, canaries):
    """20,000 sites are asked, and each one's trust is kept without rounding; within three standard deviations."""
    config, count = CanaryConfig(), 20_000
    right = np.random.default_rng(0).random((canaries, count)) < accuracy
    s, f, aside = np.zeros(count), np.zeros(count), np.zeros(count, dtype=bool)
    for hit in right:
        s, f = (1 - 1 / config.short) * s + hit, (1 - 1 / config.short) * f + ~hit
        a, b = PRIOR[0] + s, PRIOR[1] + f
        mean = a / (a + b)
        aside |= mean + config.alarm * np.sqrt(mean * (1 - mean) / (a + b + 1)) < 0.5
    expected = alarms(accuracy, canaries)
    assert aside.mean() == approx(expected, abs=3 * (expected * (1 - expected) / count) ** 0.5)


def test_other_organisations_sites_cannot_tell_which_questions_are_canaries(tmp_path):
    """They hold the recipe. By its seed they would know the places; between organisations these are by a secret."""
    recipe = SimpleNamespace(seed=7)
    here, elsewhere = (SimpleNamespace(engine=engine, path=tmp_path, recipe=recipe) for engine in (None, object()))
    assert _key(here) == 7 and not list(tmp_path.iterdir())
    key = _key(elsewhere)
    assert len(key) == 32 and key == _key(elsewhere)  # a resumed run goes on with its own
    (file,) = tmp_path.iterdir()
    assert file.read_text() == key and file.stat().st_mode & 0o077 == 0
    assert _key(SimpleNamespace(engine=object(), path=tmp_path / "other", recipe=recipe)) != key


def test_settings_that_cannot_be():
    with pytest.raises(RecipeError, match=r"short must be at most long = 64, got 80; lower canaries\.short"):
        CanaryConfig(short=80)
    with pytest.raises(RecipeError, match="per_step must be at least 1"):
        CanaryConfig(per_step=0)
