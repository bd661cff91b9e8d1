import itertools
import math
import signal
import threading

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from pytest import approx
from torch import tensor
from trl import GRPOConfig, GRPOTrainer

from accord.alignment.reward import FederatedReward, Group, PerGroup, Waiting
from accord.data.images import load_image
from accord.errors import DataError, DataWarning, QuorumError, RunError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import (
    CardRequest,
    Declined,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    from_turns,
    image_name,
    to_turns,
)
from accord.federation.ranks import OneConnection
from accord.federation.site import ScoreRange, Site
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.rewards.model import RewardModel
from accord.routing.fusion import group_relative, mixture
from accord.routing.router import LearnedRouter, RouterConfig, RouterNetwork
from accord.types import vqa_prompt

RED, BLUE = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
WEIGHTS = {"a": (0.9, 0.1), "b": (0.2, 0.8), "c": (0.6, 0.4)}
HERE = {"a": 1.0, "b": 2.0, "c": 3.0}
THERE = {"a": -1.0, "b": -2.0, "c": -3.0}


def route(prompts, images, completions):
    return torch.tensor([WEIGHTS[text] for group in completions for text in group], dtype=torch.float64)


def judge(table):
    """A site with a written-down score for every candidate."""
    return lambda request: ScoreReply(request.id, [[table[c] for c in item.candidates] for item in request.items])


def gone(request):
    raise RuntimeError("gone")


absent = pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")


class Spy(InProcessEngine):
    """The in-process engine, which also keeps the score requests that it carried."""

    def __init__(self, **handlers):
        super().__init__(handlers)
        self.asked = []

    def ask(self, requests, *, deadline=None):
        self.asked.append(dict(requests))
        self.deadline = deadline
        return super().ask(requests, deadline=deadline)


def spy(here=None, there=None):
    return Spy(here=here or judge(HERE), there=there or judge(THERE))


def ask(reward, texts, images=None, prompts=None, **columns):
    """Call as TRL does for a conversational data set with an `image` column; one group unless told otherwise."""
    images = images or [RED] * len(texts)
    prompts = prompts or ["what?"] * len(texts)
    turns = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for text, image in zip(prompts, images, strict=True)
    ]
    completions = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    return reward(turns, completions, **columns)


@pytest.mark.parametrize(
    ("mode", "scope", "expected"),
    [
        ("top1", "completion", [1.0, -2.0, 3.0]),
        ("top1", "prompt", [1.0, 2.0, 3.0]),
        ("soft", "completion", [0.8, -1.2, 0.6]),
        ("soft", "prompt", [2 / 15, 4 / 15, 6 / 15]),
    ],
)
def test_rewards_by_hand(mode, scope, expected):
    """Weights a (.9, .1), b (.2, .8), c (.6, .4); scores here 1, 2, 3 and there -1, -2, -3.

    top1/completion: here, there, here: 1, -2, 3.
    top1/prompt:     the mean weights are (1.7, 1.3) / 3, so here judges all: 1, 2, 3.
    soft/completion: .9 - .1 = .8; 2 (.2 - .8) = -1.2; 3 (.6 - .4) = .6.
    soft/prompt:     (1.7 - 1.3) / 3 = 2/15 times 1, 2, 3.
    """
    assert ask(FederatedReward(spy(), route, mode=mode, scope=scope), ["a", "b", "c"]) == approx(expected, abs=1e-6)


def test_a_site_is_asked_for_what_was_routed_to_it_alone():
    engine = spy()
    ask(FederatedReward(engine, route), ["a", "b", "c"])
    (requests,) = engine.asked
    assert {site: request.items[0].candidates for site, request in requests.items()} == {
        "here": ["a", "c"],
        "there": ["b"],
    }
    ask(FederatedReward(engine, route), ["a", "c"])
    assert list(engine.asked[1]) == ["here"]


def test_equal_completions_are_scored_once_and_rewarded_alike():
    """Four completions, two distinct: a scored 1 here, b scored -2 there."""
    engine = spy()
    assert ask(FederatedReward(engine, route), ["a", "b", "a", "a"]) == [1.0, -2.0, 1.0, 1.0]
    assert [request.items[0].candidates for request in engine.asked[0].values()] == [["a"], ["b"]]


def test_the_mean_over_a_prompt_is_over_distinct_completions():
    """a twice and b once: (.9 + .2, .1 + .8) / 2 = (.55, .45), so here judges; soft: (.55 - .45) = .1 times 1, 1, 2."""
    assert ask(FederatedReward(spy(), route, mode="soft", scope="prompt"), ["a", "a", "b"]) == approx([0.1, 0.1, 0.2])


def test_an_image_travels_once_per_message():
    """Two groups about one picture, two sites: each message holds one image, each item its name."""
    engine = spy()
    ask(FederatedReward(engine, route, mode="soft"), ["a", "b", "c", "a"], prompts=["one?", "one?", "two?", "two?"])
    for request in engine.asked[0].values():
        ((name, data),) = request.images.items()
        assert name == image_name(data) and load_image(data).tobytes() == RED.tobytes()
        assert [(item.images, item.candidates) for item in request.items] == [
            ([name], ["a", "b"]),
            ([name], ["c", "a"]),
        ]


def test_the_prompt_arrives_without_the_picture():
    engine = spy()
    ask(FederatedReward(engine, route), ["a"])
    item = engine.asked[0]["here"].items[0]
    assert from_turns(item.prompt) == vqa_prompt("what?")


def test_groups_are_split_by_image_even_if_the_text_is_the_same():
    """Both groups have completions a, b; were they one group, candidates would be asked about one picture only."""
    engine = spy()
    images = [RED, RED, BLUE, BLUE]
    assert ask(FederatedReward(engine, route), ["a", "b", "a", "b"], images) == [1.0, -2.0, 1.0, -2.0]
    items = engine.asked[0]["here"].items
    assert [load_image(engine.asked[0]["here"].images[i.images[0]]).getpixel((0, 0)) for i in items] == [
        (255, 0, 0),
        (0, 0, 255),
    ]


def test_one_prompt_twice_in_a_row_makes_two_groups_of_g():
    """As where one pass over the prompts ends and the next begins with the same: a and b, then c and a."""
    engine = spy()
    ask(FederatedReward(engine, route, per_group=PerGroup(mixture, size=2)), ["a", "b", "c", "a"])
    assert [item.candidates for item in engine.asked[0]["here"].items] == [["a"], ["c", "a"]]


def test_one_id_for_two_prompts_makes_two_groups():
    engine = spy()
    ask(FederatedReward(engine, route), ["a", "a"], prompts=["one?", "two?"], question_id=["x", "x"])
    assert len(engine.asked[0]["here"].items) == 2


def test_one_id_for_two_pictures_makes_two_groups():
    """An id may name the words alone; it stands for a picture only where the server knows which."""
    engine = spy()
    ask(FederatedReward(engine, route), ["a", "a"], [RED, BLUE], question_id=["x", "x"])
    assert len(engine.asked[0]["here"].items) == len(engine.asked[0]["here"].images) == 2


@pytest.mark.parametrize("ids", [None, ["x", "x", "y", "y"]])
def test_groups_are_split_by_text_and_by_id(ids, square):
    engine = spy()
    columns = {} if ids is None else {"question_id": ids}
    prompts = ["one?", "one?", "two?", "two?"] if ids is None else None
    reward = FederatedReward(engine, route, mode="soft", sources=dict.fromkeys("xy", square("red", (4, 4))))
    ask(reward, ["a", "b", "c", "b"], prompts=prompts, **columns)
    assert [item.candidates for item in engine.asked[0]["here"].items] == [["a", "b"], ["c", "b"]]


def test_the_stored_image_travels_if_it_is_known(square):
    """The original bytes of question x; for y, which has none, a PNG of the picture."""
    engine = spy()
    stored = square("red", (4, 4))
    reward = FederatedReward(engine, route, sources={"x": stored})
    ask(reward, ["a", "a"], [RED, BLUE], question_id=["x", "y"])
    images = engine.asked[0]["here"].images
    assert images[image_name(stored)] == stored and len(images) == 2


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_may_come_in_a_column(column):
    """With text-only prompts, as TRL passes them for data sets that keep the picture apart."""
    cells = {"image": [RED, BLUE], "images": [[RED], [BLUE]]}[column]
    prompts = [[{"role": "user", "content": "what?"}]] * 2
    engine = spy()
    assert FederatedReward(engine, route)(prompts, ["a", "c"], **{column: cells}) == [1.0, 3.0]
    assert len(engine.asked[0]["here"].images) == 2


def test_a_row_without_an_image():
    with pytest.raises(DataError, match=r"row 0 has no image .*got \['answer'\]"):
        FederatedReward(spy(), route)([vqa_prompt("what?")], ["a"], answer=["a"])


def test_rows_without_images_are_groups_by_their_words():
    """Three rows of two questions; no image travels, and items name none."""
    prompts = [[{"role": "user", "content": text}] for text in ("what?", "what?", "who?")]
    engine = spy()
    assert FederatedReward(engine, route)(prompts, ["a", "c", "a"]) == [1.0, 3.0, 1.0]
    asked = engine.asked[0]["here"]
    assert asked.images == {} and [item.images for item in asked.items] == [[], []]
    assert [item.candidates for item in asked.items] == [["a", "c"], ["a"]]


@pytest.mark.parametrize(
    "there",
    [
        gone,
        judge({"b": math.nan}),
        judge({"b": math.inf}),
        judge({"b": -math.inf}),
        judge({"b": 1e9}),
        lambda request: ScoreReply(request.id, [[0.0, 0.0]]),
        lambda request: ScoreReply(request.id, []),
        lambda request: ScoreReply("another id", [[0.0]]),
        lambda request: ScoreReply(request.id, [["high"]]),
        lambda request: CardRequest(request.id),
    ],
    ids=["gone", "nan", "inf", "-inf", "range", "shape", "empty", "id", "type", "kind"],
)
@absent
def test_a_bad_reply_is_an_absence_and_no_zero(there, caplog):
    """b was routed there: it gets None, or the mean of its group, (1 + 3) / 2 = 2."""
    assert ask(FederatedReward(spy(there=there), route), ["a", "b", "c"]) == [1.0, None, 3.0]
    filled = FederatedReward(spy(there=there), route, missing="group_mean")
    assert ask(filled, ["a", "b", "c"]) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (gone, r"site there gave no answer \(error\); it counts as absent"),
        (judge({"b": math.nan}), r"site there sent a score that is not finite"),
        (lambda request: ScoreReply(request.id, []), r"site there sent scores that cannot be used \(scores for 0 q"),
    ],
    ids=["gone", "nan", "shape"],
)
def test_an_absence_is_counted_and_said(there, words, caplog):
    engine = spy(there=there)
    with pytest.warns(DataWarning, match=words):
        ask(FederatedReward(engine, route), ["a", "b"])
    assert {site: engine.traffic.counts[site, "score"].absences for site in engine.sites} == {"here": 0, "there": 1}


@absent
def test_the_group_mean_counts_completions(caplog):
    """a three times and c once are known: (1 + 1 + 1 + 3) / 4 = 1.5. The other group's 3 does not enter."""
    reward = FederatedReward(spy(there=gone), route, missing="group_mean")
    texts = ["a", "a", "b", "a", "c", "c"]
    assert ask(reward, texts, [RED] * 5 + [BLUE]) == [1.0, 1.0, 1.5, 1.0, 3.0, 3.0]


@absent
def test_a_group_that_nobody_scored_is_flat(caplog):
    """Its advantages are 0 whatever one value it gets; the mean of the other group, 1, does not move what is logged."""
    filled = FederatedReward(spy(there=gone), route, missing="group_mean")
    assert ask(filled, ["b", "b", "a", "a"], [RED, RED, BLUE, BLUE]) == [1.0, 1.0, 1.0, 1.0]
    assert ask(FederatedReward(spy(gone, gone), route, missing="group_mean"), ["a", "b"]) == [0.0, 0.0]
    assert ask(FederatedReward(spy(gone, gone), route), ["a", "b"]) == [None, None]


@absent
def test_an_absent_site_leaves_the_mixture_to_the_rest(caplog):
    """Soft: only here answers, so its scores stand unweighted: 1, 2, 3."""
    assert ask(FederatedReward(spy(there=gone), route, mode="soft"), ["a", "b", "c"]) == approx([1.0, 2.0, 3.0])


@absent
def test_a_group_with_nan_leaves_the_other_groups(caplog):
    """There, b about the red square is NaN and b about the blue one -2."""

    def there(request):
        return ScoreReply(request.id, [[math.nan], [-2.0]])

    reward = FederatedReward(spy(there=there), route)
    assert ask(reward, ["a", "b", "a", "b"], [RED, RED, BLUE, BLUE]) == [1.0, None, 1.0, -2.0]


@absent
def test_unfinished_completions():
    """b does not end with token 2: its reward is the lowest score, −5, whatever the site says.

    It enters the mean for a and c. Without a range, or without end tokens, b is scored like any other, −2.
    """
    ids = [[5, 2], [5, 6], [7, 2]]
    columns = {"completion_ids": ids}
    wide = {"scores": ScoreRange(-5.0, 5.0)}
    assert ask(FederatedReward(spy(), route, end_tokens=[2], **wide), ["a", "b", "c"], **columns) == [1.0, -5.0, 3.0]
    here = judge({"a": 1.0, "c": math.nan})  # a and c are one item, so neither is scored
    lacking = FederatedReward(spy(here=here), route, end_tokens=[2], missing="group_mean", **wide)
    assert ask(lacking, ["a", "b", "c"], **columns) == [-5.0, -5.0, -5.0]
    for open_ended in (
        FederatedReward(spy(), route, end_tokens=[2]),
        FederatedReward(spy(), route, **wide),
        FederatedReward(spy(), route),
    ):
        assert ask(open_ended, ["a", "b", "c"], **columns) == [1.0, -2.0, 3.0]
    low = FederatedReward(spy(), route, end_tokens=[2], scores=ScoreRange(-2.0, 3.0))
    assert ask(low, ["c", "b", "a"], completion_ids=[[2], [2], [6]]) == [3.0, -2.0, -2.0]


def test_a_completion_that_was_cut_off_and_that_nobody_scored_has_the_lowest_score_all_the_same(caplog):
    """What was cut off needs no judge: b's site is gone, and b is 0; a and c are here's."""
    reward = FederatedReward(spy(there=gone), route, end_tokens=[2], scores=ScoreRange(0.0, 3.0))
    with pytest.warns(DataWarning, match="site there gave no answer"):
        assert ask(reward, ["a", "b", "c"], completion_ids=[[2], [6], [2]]) == [1.0, 0.0, 3.0]


def test_a_site_that_scores_outside_the_agreed_range_is_absent():
    """There says −2 for b, the range begins at 0; here's 3 is the range's end, and its 1 inside."""
    engine = spy()
    reward = FederatedReward(engine, route, scores=ScoreRange(0.0, 3.0))
    with pytest.warns(DataWarning, match=r"site there sent scores that cannot .* of -2, beyond the limits of 0 and 3"):
        assert ask(reward, ["a", "b", "c"]) == [1.0, None, 3.0]
    assert [engine.traffic.counts[site, "score"].absences for site in ("here", "there")] == [0, 1]
    assert ask(FederatedReward(spy(), route, scores=ScoreRange(-2.0, 3.0)), ["a", "b", "c"]) == [1.0, -2.0, 3.0]


def abstaining(prompts, images, completions):
    """Weights as `route`, and none at all for b."""
    return route(prompts, images, completions) * tensor([[text != "b"] for group in completions for text in group])


@pytest.mark.parametrize("mode", ["top1", "soft"])
def test_where_the_router_abstains_no_site_is_asked(mode):
    """b is nobody's: None, and not here's 2; a and c are asked as ever. No site was absent, and none is warned of."""
    engine, told = spy(), {}
    expected = {"top1": [1.0, None, 3.0], "soft": [0.8, None, 0.6]}[mode]
    reward = FederatedReward(engine, abstaining, mode=mode)
    assert ask(reward, ["a", "b", "c"], log_metric=told.__setitem__) == approx(expected)
    assert all("b" not in item.candidates for request in engine.asked[0].values() for item in request.items)
    assert sum(count.absences for count in engine.traffic.counts.values()) == 0 and told["absent"] == approx(1 / 3)
    filled = FederatedReward(spy(), abstaining, mode="top1", missing="group_mean")
    assert ask(filled, ["a", "b", "c"]) == [1.0, 2.0, 3.0]  # (1 + 3) / 2


@pytest.mark.parametrize("mode", ["top1", "soft"])
def test_where_the_router_abstains_altogether_nobody_is_asked(mode):
    """And nobody is waited for, whatever the quorum."""
    engine = spy()
    reward = FederatedReward(engine, abstaining, mode=mode, waiting=Waiting(quorum=1.0))
    assert ask(reward, ["b", "b"]) == [None, None]
    assert engine.asked == [{}] and not engine.traffic.counts


def test_a_group_is_judged_against_itself():
    """Both sites judge all, alike: a 1 and −1, b 2 and −2, c 3 and −3, so z is −1, 0, 1 here and 1, 0, −1 there: 0.

    Here alone: −1, 0, 1 of a deviation of 1. Of a, a, c: mean 5/3, sample deviation 2/√3: −1/√3, −1/√3, 2/√3.
    """
    both = FederatedReward(
        spy(), lambda *given: route(*given) * 0 + 0.5, mode="soft", per_group=PerGroup(group_relative)
    )
    assert ask(both, ["a", "b", "c"]) == approx([0.0, 0.0, 0.0], abs=1e-6)
    alone = FederatedReward(spy(), here_alone, per_group=PerGroup(group_relative))
    assert ask(alone, ["a", "b", "c"]) == approx([-1.0, 0.0, 1.0], abs=2e-4)
    root = 3**-0.5
    assert ask(alone, ["a", "a", "c"]) == approx([-root, -root, 2 * root], abs=2e-4)


def here_alone(prompts, images, completions):
    return tensor([[1.0, 0.0]]).repeat(sum(map(len, completions)), 1)


def test_good_form_within_a_group():
    """1/8 for what ended and says something, on top of −1, 0, 1; c was cut off: the lowest score, if there is one.

    So with the range from −3 to 3: 1, 2, −3 of mean 0 and sample deviation √7: z = 1/√7, 2/√7, −3/√7.
    """
    ids = [[2], [2], [6]]
    open_ended = FederatedReward(spy(), here_alone, per_group=PerGroup(group_relative, form=1 / 8), end_tokens=[2])
    assert ask(open_ended, ["a", "b", "c"], completion_ids=ids) == approx([-0.875, 0.125, 1.0], abs=2e-4)
    ranged = FederatedReward(
        spy(), here_alone, per_group=PerGroup(group_relative, form=1 / 8), end_tokens=[2], scores=ScoreRange(-3.0, 3.0)
    )
    root = 7**-0.5
    expected = [root + 0.125, 2 * root + 0.125, -3 * root]
    assert ask(ranged, ["a", "b", "c"], completion_ids=ids) == approx(expected, abs=2e-4)
    empty = FederatedReward(spy(here=judge({"": 0.0, "a": 1.0})), here_alone, per_group=PerGroup(mixture, form=1 / 8))
    assert ask(empty, ["", "a"]) == [0.0, 1.125]


@pytest.mark.parametrize(
    ("per_group", "judge", "truth"),
    [
        (None, "reward", False),
        (PerGroup(mixture), "reward", False),
        (PerGroup(mixture, judge="answer"), "answer", False),
        (PerGroup(mixture, truth=True), "reward", True),
    ],
)
def test_who_judges_a_group_is_said_in_the_request(per_group, judge, truth):
    engine = spy()
    ask(FederatedReward(engine, route, per_group=per_group), ["a"])
    assert (engine.asked[0]["here"].judge, engine.asked[0]["here"].truth) == (judge, truth)


def test_unfinished_completions_of_later_groups():
    """Token ids run over all rows: row 2, the first of the second group, is the one cut off: the lowest score, −4."""
    reward = FederatedReward(spy(), route, end_tokens=[2], scores=ScoreRange(-4.0, 4.0))
    ids = [[2], [2], [5], [2]]
    assert ask(reward, ["a", "c", "a", "c"], [RED, RED, BLUE, BLUE], completion_ids=ids) == [1.0, 3.0, -4.0, 3.0]


@absent
def test_metrics_say_who_was_asked_and_who_was_missing(caplog):
    """a, c here and b there: 2/3 and 1/3 of the distinct completions; 1 of 4 completions is absent."""
    told = {}
    reward = FederatedReward(spy(there=gone), route)
    ask(reward, ["a", "b", "c", "a"], log_metric=told.__setitem__)
    assert told == {"routed/here": approx(2 / 3), "routed/there": approx(1 / 3), "absent": 0.25}
    assert reward.__name__ == "federation"


def test_the_deadline_reaches_the_engine():
    engine = spy()
    ask(FederatedReward(engine, route, waiting=Waiting(deadline=3.5)), ["a"])
    assert engine.deadline == 3.5


def test_request_ids_do_not_repeat():
    engine = spy()
    reward = FederatedReward(engine, route)
    for _ in range(2):
        ask(reward, ["a", "b"])
    assert len({request.id for requests in engine.asked for request in requests.values()}) == 4


def test_completions_may_be_plain_text():
    reward = FederatedReward(spy(), route)
    prompts = [[{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "what?"}]}]] * 2
    assert reward(prompts, ["a", "c"]) == [1.0, 3.0]
    assert reward(prompts, [[{"role": "assistant", "content": text}] for text in "ac"]) == [1.0, 3.0]


class Away(Spy):
    """Sites that do not answer their first few messages."""

    def __init__(self, tries, error=ConnectionError, here=None, there=None):
        super().__init__(here=here or judge(HERE), there=there or judge(THERE))
        self.tries, self.error = dict(tries), error

    def _send(self, site, data):
        if self.tries.get(site, 0) > 0:
            self.tries[site] -= 1
            raise self.error
        return super()._send(site, data)


def waiting(engine, quorum, **settings):
    """A reward, the seconds of its pauses, and what it told."""
    pauses, told = [], []
    return (
        FederatedReward(
            engine, route, waiting=Waiting(quorum=quorum, tell=told.append, pause=pauses.append), **settings
        ),
        pauses,
        told,
    )


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError])
def test_below_the_quorum_a_step_waits_for_who_may_come_back(error):
    """b, a third of the weight, is there's: 2/3 answered. At .67 the step waits, and asks there alone, thrice more."""
    engine = Away({"there": 3}, error)
    reward, pauses, told = waiting(engine, 0.67)
    assert ask(reward, ["a", "b", "c"]) == [1.0, -2.0, 3.0]
    assert pauses == [1.0, 2.0, 4.0]
    assert [list(requests) for requests in engine.asked] == [["here", "there"], ["there"], ["there"], ["there"]]
    assert len({request.id for requests in engine.asked for request in requests.values()}) == 5
    assert told == [
        "too few sites answered: waiting for there; Ctrl-C ends the run",
        "the wait for sites is over",
    ]


@pytest.mark.parametrize(("mode", "enough", "too_much"), [("top1", 0.66, 0.67), ("soft", 0.56, 0.57)])
@absent
def test_with_the_quorum_a_step_goes_on_without_the_absent(mode, enough, too_much):
    """top1: 2 of 3 rows answered. soft: here has .9 + .2 + .6 = 1.7 of 3, .5667. Who is absent is nobody's 0."""
    reward, pauses, told = waiting(Away({"there": 1}), enough, mode=mode)
    expected = [1.0, None if mode == "top1" else 2.0, 3.0]
    assert ask(reward, ["a", "b", "c"]) == approx(expected)
    assert (pauses, told) == ([], [])
    reward, pauses, _ = waiting(Away({"there": 1}), too_much, mode=mode)
    assert ask(reward, ["a", "b", "c"])[1] == approx({"top1": -2.0, "soft": -1.2}[mode])
    assert pauses == [1.0]


def test_the_quorum_may_be_reached_before_all_are_back():
    """Both gone; here, two of three rows, comes back first. The warning is of there alone, when the step goes on."""
    reward, pauses, _ = waiting(Away({"here": 2, "there": 9}), 0.5)
    with pytest.warns(DataWarning) as told:
        assert ask(reward, ["a", "b", "c"]) == [1.0, None, 3.0]
    assert pauses == [1.0, 2.0]
    assert [str(w.message) for w in told] == ["site there gave no answer (gone); it counts as absent there, not as 0"]


def test_pauses_grow_to_a_minute_and_a_word_comes_now_and_then():
    """Twelve tries fail: before the next ones 1, 2, 4, … 32 s, then 60 s."""
    reward, pauses, told = waiting(Away({"there": 12}), 1.0)
    assert ask(reward, ["b"]) == [-2.0]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0] + [60.0] * 6
    assert told[1:-1] == ["still waiting for there, after 10 tries"]


@pytest.mark.parametrize(
    "there",
    [gone, judge({"b": math.nan}), lambda request: ScoreReply(request.id, []), lambda request: CardRequest(request.id)],
    ids=["error", "nan", "shape", "kind"],
)
@absent
def test_a_site_that_fails_is_not_waited_for(there, caplog):
    """Half of the weight answered: with that quorum the step goes on, with one above it fails at once."""
    reward, pauses, told = waiting(spy(there=there), 0.5)
    assert ask(reward, ["a", "b"]) == [1.0, None]
    assert (pauses, told) == ([], [])
    reward, pauses, told = waiting(spy(there=there), 0.51)
    with pytest.raises(QuorumError, match=r"50% of what was asked .* quorum of 51%.*refused all: there\)"):
        ask(reward, ["a", "b"])
    assert (pauses, told) == ([], [])


def refusing(request):
    """A site whose budget is spent."""
    refused = dict.fromkeys(range(len(request.items)), Declined.BUDGET)
    return ScoreReply(request.id, [[] for _ in request.items], refused)


def test_where_all_refuse_the_run_stops_and_says_why():
    """Without a quorum every reward is None, and GRPO would go on with nothing."""
    everybody = spy(here=refusing, there=refusing)
    reward, pauses, _ = waiting(everybody, 0.9)
    with (
        pytest.warns(DataWarning, match=r"site (here|there) refused . of . questions \(. for its budget\)"),
        pytest.raises(QuorumError, match=r"0% of what was asked .* refused all: here, there\).* limits and budgets"),
    ):
        ask(reward, ["a", "b", "c"])
    assert pauses == [] and len(everybody.asked) == 1
    with pytest.warns(DataWarning):
        assert ask(waiting(everybody, 0.0)[0], ["a", "b", "c"]) == [None] * 3


def test_one_that_may_come_back_is_waited_for_and_one_that_refuses_is_not():
    """There comes back after a try; here refuses two of three rows, which leaves a third: below one half."""
    reward, pauses, _ = waiting(Away({"there": 1}, here=refusing), 0.5)
    with (
        pytest.warns(DataWarning, match="site here refused 1 of 1 questions"),
        pytest.raises(QuorumError, match=r"33% .* refused all: here\)"),
    ):
        ask(reward, ["a", "b", "c"])
    assert pauses == [1.0]


@absent
def test_a_site_that_comes_back_broken_ends_the_wait(caplog):
    """One of two rows is there's: at a quorum of .51 it is waited for, and when it fails so does the step."""
    reward, pauses, told = waiting(Away({"there": 1}, there=gone), 0.51)
    with pytest.raises(QuorumError, match="50% of what was asked"):
        ask(reward, ["a", "b"])
    assert pauses == [1.0] and told == ["too few sites answered: waiting for there; Ctrl-C ends the run"]


@pytest.fixture
def ctrl_c():
    """Ctrl-C at work, also where the tests are a job in the background, which a shell starts deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_wait(ctrl_c):
    reward = FederatedReward(
        Away({"there": 9}),
        route,
        waiting=Waiting(quorum=1.0, pause=lambda seconds: signal.raise_signal(signal.SIGINT)),
    )
    with pytest.raises(KeyboardInterrupt):
        ask(reward, ["b"])


def test_only_a_step_waits():
    """`ask` is for those who look at scores, and asks once."""
    reward, pauses, _ = waiting(Away({"there": 1}), 1.0)
    groups = reward.group([[{"role": "user", "content": "what?"}]], ["b"], {"image": [RED]})
    with pytest.warns(DataWarning, match="site there gave no answer"):
        scores = reward.ask(groups, torch.ones(1, 2, dtype=torch.bool))
    assert scores[0, 0] == 2.0 and scores[0, 1].isnan() and pauses == []


class Slow(Spy):
    """Answers once it is let."""

    def __init__(self, **handlers):
        super().__init__(here=handlers.get("here", judge(HERE)), there=handlers.get("there", judge(THERE)))
        self.let, self.threads = threading.Event(), []

    def ask(self, requests, *, deadline=None):
        self.threads.append(threading.current_thread())
        assert self.let.wait(20)
        return super().ask(requests, deadline=deadline)


def rows_of(*texts):
    prompts = [[{"role": "user", "content": "what?"}] for _ in texts]
    return {"prompts": prompts, "completions": list(texts), "image": [RED] * len(texts)}


def test_a_question_may_begin_before_its_call():
    """`start` routes in the caller's thread and comes back while the engine still asks in another."""
    engine, routers, told = Slow(), [], {}

    def noted(*given):
        routers.append(threading.current_thread())
        return route(*given)

    reward, rows = FederatedReward(engine, noted), rows_of("a", "b", "c")
    reward.start(**rows)
    assert routers == [threading.main_thread()] and engine.asked == []
    engine.let.set()
    assert reward(**rows, log_metric=told.__setitem__) == ask(FederatedReward(spy(), route), ["a", "b", "c"])
    assert len(engine.asked) == len(routers) == 1 and engine.threads[0] is not threading.main_thread()
    assert told == {"routed/here": approx(2 / 3), "routed/there": approx(1 / 3), "absent": 0.0}
    assert reward(**rows) == [1.0, -2.0, 3.0] and len(engine.asked) == 2  # it was a question for one call


def test_other_rows_have_their_own_question():
    """Equal lists are other lists: whoever did not start the question does not get its answers. One at a time."""
    engine = Slow()
    engine.let.set()
    reward = FederatedReward(engine, route)
    reward.start(**rows_of("a"))
    assert reward(**rows_of("b")) == [-2.0]
    reward.start(**rows_of("a"))
    rows = rows_of("c")
    reward.start(**rows)
    assert reward(**rows) == [3.0]
    assert [list(requests) for requests in engine.asked] == [["here"], ["there"], ["here"], ["here"]]


def test_a_started_question_waits_for_its_quorum():
    """The retries are the call's own: in the main thread, where Ctrl-C is."""
    engine = Away({"there": 2})
    reward, pauses, _ = waiting(engine, 1.0)
    rows = rows_of("a", "b")
    reward.start(**rows)
    assert reward(**rows) == [1.0, -2.0] and pauses == [1.0, 2.0]


def test_what_the_engine_raises_comes_out_of_the_call():
    class Down(Spy):
        def ask(self, requests, *, deadline=None):
            raise RunError("no site for an hour")

    reward, rows = FederatedReward(Down(here=judge(HERE), there=judge(THERE)), route), rows_of("a")
    reward.start(**rows)
    with pytest.raises(RunError, match="no site for an hour"):
        reward(**rows)


def test_ctrl_c_ends_the_wait_for_a_started_question(ctrl_c):
    engine = Slow()
    reward, rows = FederatedReward(engine, route), rows_of("a")
    reward.start(**rows)
    press = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    press.start()
    with pytest.raises(KeyboardInterrupt):
        reward(**rows)
    engine.let.set()
    press.join()
    engine.threads[0].join()


def test_several_processes_do_not_start_early(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    reward = FederatedReward(OneConnection(spy(), ["here", "there"]), route)
    reward.start(**rows_of("a"))  # else it would ask, and find no torch.distributed
    assert reward._started is None


def stock_arguments(folder):
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=3,
        beta=0.02,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        activation_checkpointing=False,
        bf16=False,
        dataloader_pin_memory=False,
    )


class TestInStockTrl:
    """Two sites of different families, a learned router, and `GRPOTrainer` as it comes."""

    @pytest.fixture
    def federation(self, checkpoints):
        torch.manual_seed(0)
        sites = {
            name: Site(name, RewardModel.from_checkpoint(checkpoints[family]).eval(), score_range=ScoreRange(-2.0, 2.0))
            for name, family in (("colour", "llava-siglip-qwen2"), ("number", "idefics3"))
        }
        router = LearnedRouter(
            Encoder(*load_model(checkpoints["llava-clip-llama"])),
            RouterNetwork(32, 2, RouterConfig(layers=1, width=8, heads=2)),
        )
        return Spy(**{name: site.answer for name, site in sites.items()}), router

    @pytest.fixture
    def prompts(self, square):
        features = Features(
            {"prompt": [{"role": Value("string"), "content": Value("string")}], "image": ImageFeature()}
        )
        rows = [("what colour is it?", "red"), ("what colour is it?", "blue"), ("is it red?", "green")]
        columns = {
            "prompt": [[{"role": "user", "content": text}] for text, _ in rows],
            "image": [{"bytes": square(colour), "path": None} for _, colour in rows],
        }
        return Dataset.from_dict(columns, features=features)

    @absent
    def test_an_absent_site_moves_nothing(self, prompts, llava, tmp_path, caplog):
        """One site says 1 to every answer and the other is gone. As zeros the absent half would make advantages."""
        model, processor = load_model(llava)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        halves = itertools.cycle([[1.0, 0.0], [0.0, 1.0]])

        def alternate(prompts, images, completions):
            return torch.tensor([next(halves) for group in completions for _ in group])

        engine = Spy(
            here=lambda request: ScoreReply(request.id, [[1.0] * len(i.candidates) for i in request.items]), there=gone
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=FederatedReward(engine, alternate),
            args=stock_arguments(tmp_path),
            train_dataset=prompts,
            processing_class=processor,
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        assert any(0 < entry["absent"] < 1 for entry in logs)
        assert all(entry["reward"] == 1.0 for entry in logs if entry["absent"] < 1)
        assert torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))

    @pytest.mark.parametrize("mode", ["top1", "soft"])
    def test_two_steps(self, federation, prompts, llava, tmp_path, mode):
        """2 prompts with 4 completions a step: rewards reach the trainer, the policy moves, and KL is measured."""
        engine, router = federation
        model, processor = load_model(llava)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=FederatedReward(engine, router, mode=mode),
            args=stock_arguments(tmp_path),
            train_dataset=prompts,
            processing_class=processor,
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        assert len(logs) == len(engine.asked) == 2
        for entry in logs:
            assert {"kl", "rewards/federation/mean", "routed/colour", "routed/number", "absent"} <= entry.keys()
            assert -2.0 <= entry["reward"] <= 2.0 and entry["absent"] == 0.0
            assert entry["routed/colour"] + entry["routed/number"] == approx(1, abs=1e-5)
        assert logs[0]["kl"] == approx(0, abs=1e-6) and logs[1]["kl"] > 0
        assert not torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))
        for requests in engine.asked:
            for request in requests.values():
                assert isinstance(request, ScoreRequest) and len(request.items) <= 2
                assert all(len(set(item.candidates)) == len(item.candidates) <= 4 for item in request.items)
        assert sum(count.absences for count in engine.traffic.counts.values()) == 0


def by_single_reads(reward, groups, weights):
    """What is asked, found by looking at every site's weight for every completion."""
    requests, places = {}, {}
    for k, site in enumerate(reward.engine.sites):
        images, items, start = {}, [], 0
        for group in groups:
            rows = [start + i for i in range(len(group.candidates)) if weights[start + i, k] > 0]
            if rows:
                name = image_name(group.data[0])
                images[name] = group.data[0]
                turns, texts = to_turns(group.prompt), [group.candidates[row - start] for row in rows]
                items.append(ScoreItem([name], turns, texts))
                places.setdefault(site, []).append(rows)
            start += len(group.candidates)
        if items:
            requests[site] = ScoreRequest(f"score-1-{site}", images, items)
    return requests, places


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("sites", [1, 3, 64])
def test_requests_are_those_of_single_reads(sites, share):
    """Order of sites, items, candidates and images, and the place of every score; with nobody asked at all, too."""
    generator = torch.Generator().manual_seed(sites)
    engine = InProcessEngine({f"site-{k}": judge(HERE) for k in range(sites)})
    reward = FederatedReward(engine, route)
    groups = [
        Group(vqa_prompt(f"{n}?"), (), (bytes([n % 3]),), tuple(f"{n}-{i}" for i in range(1 + n % 4)), (0,))
        for n in range(12)
    ]
    weights = torch.rand(sum(len(g.candidates) for g in groups), sites, generator=generator)
    weights *= torch.rand(weights.shape, generator=generator) < share
    query = reward._query(groups, weights)
    requests, places = by_single_reads(reward, groups, weights)
    assert query.requests == requests and list(query.requests) == list(requests)
    assert [list(r.images) for r in query.requests.values()] == [list(r.images) for r in requests.values()]
    assert dict(query.places) == places


def test_the_quorum_and_the_fusion_share_a_table():
    """In soft mode the table holds every site's score of every completion."""
    reward = FederatedReward(spy(), route, mode="soft", waiting=Waiting(quorum=0.5))
    made, real = [], torch.full
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "full", lambda *given, **named: made.append(given) or real(*given, **named))
        assert ask(reward, ["a", "b"]) == approx([0.9 - 0.1, 0.4 - 1.6])
        assert ask(reward, ["c", "b"]) == approx([1.8 - 1.2, 0.4 - 1.6])
    assert len(made) == 2
