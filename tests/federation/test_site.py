import pytest
import torch
from safetensors.torch import load

from accord.data.images import load_image
from accord.errors import RecipeError, ReplyError
from accord.federation.answering import question_key
from accord.federation.engine import InProcessEngine
from accord.federation.messages import (
    Absence,
    AnswerItem,
    AnswerReply,
    AnswerRequest,
    Card,
    CardRequest,
    Declined,
    Refusal,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    UpdateReply,
    UpdateRequest,
    check_scores,
    encode,
    image_name,
    to_turns,
)
from accord.federation.site import ScoreRange, Site, SiteRecord
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.rewards.model import RewardModel, Standardisation
from accord.routing.fit import LocalRouterTraining
from accord.routing.router import RouterConfig, RouterNetwork
from accord.types import vqa_prompt

SECRET = "Mrs Marple, ward 7"
SMALL = RouterConfig(layers=1, width=8, heads=2, local_steps=2)


@pytest.fixture(scope="module")
def reward_model(checkpoints):
    torch.manual_seed(0)
    model = RewardModel.from_checkpoint(checkpoints["llava-siglip-qwen2"])
    model.standardisation = Standardisation(0.05, 0.01)
    return model.eval()


@pytest.fixture
def request_(square):
    """Two questions about two images; the first has three candidates, the second one."""
    red, blue = square("red"), square("blue")
    return ScoreRequest(
        "s1",
        {image_name(red): red, image_name(blue): blue},
        [
            ScoreItem([image_name(red)], to_turns(vqa_prompt("what colour is it?")), ["red", "blue", "as you like"]),
            ScoreItem([image_name(blue)], to_turns(vqa_prompt("is it red?")), ["no"]),
        ],
    )


class Fixed:
    """A reward model whose standardised scores are written down."""

    rows_at_once = 512

    def score(self, prompts, images, completions):
        return [torch.tensor([-3.0, 0.5, 7.0][: len(group)]) for group in completions]


WORDS = to_turns([{"role": "user", "content": "2 + 2?"}])
COLOUR = to_turns(vqa_prompt("what colour is it?"))


class Says:
    """A site's own model: what it says to a question about an image, and to one without; and what it was asked."""

    def __init__(self, seen="Red.", unseen="4"):
        self.seen, self.unseen, self.asked = seen, unseen, []

    def __call__(self, items, images):
        self.asked.append(len(items))
        return [self.unseen if not item.images else self.seen for item in items]


def judged(square, judge, truth):
    """A question about an image and one without; the candidates are 'red', ' blue.', 'four' and '4', 'red', 'blue'."""
    red = square("red")
    items = [
        ScoreItem([image_name(red)], COLOUR, ["red", " blue.", "four"]),
        ScoreItem([], WORDS, ["4", "red", "blue"]),
    ]
    return ScoreRequest("s1", {image_name(red): red}, items, judge, truth)


def book(square, image=None, words=None):
    """The reference answers of a site; None for a question whose answer it does not own."""
    keys = {
        question_key([image_name(square("red"))], vqa_prompt("what colour is it?")): image,
        question_key([], [{"role": "user", "content": "2 + 2?"}]): words,
    }
    return {key: (answer,) for key, answer in keys.items() if answer is not None}


@pytest.mark.parametrize(
    ("judge", "truth", "expected"),
    [
        ("reward", False, [[-3.0, 0.5, 7.0], [-3.0, 0.5, 7.0]]),
        ("answer", False, [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]),
        ("reward", True, [[0.0, 1.0, 0.0], [-3.0, 0.5, 7.0]]),
        ("answer", True, [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    ],
)
def test_who_judges(square, judge, truth, expected):
    """The model says 'Red.' and '4'; the site owns 'Blue' for the image alone; the reward model says -3, 0.5 and 7."""
    site = Site("colour", Fixed(), answerer=Says(), truth=book(square, image="Blue"))
    assert site.answer(judged(square, judge, truth)) == ScoreReply("s1", expected)


@pytest.mark.parametrize("judge", ["reward", "answer"])
def test_where_all_answers_are_owned_no_model_is_asked(square, judge):
    site = Site("colour", None, answerer=Says(), truth=book(square, image="red", words="four"))
    assert site.scores(judged(square, judge, True)) == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert sum(site.answerer.asked) == 0


@pytest.mark.parametrize("judge", ["reward", "answer"])
def test_a_site_without_reference_answers_is_asked_for_truth_in_vain(square, judge):
    site = Site("colour", Fixed(), answerer=Says())
    assert site.scores(judged(square, judge, True)) == site.scores(judged(square, judge, False))


def test_judgements_of_zero_and_one_are_clipped_as_scores_are(square):
    site = Site("colour", Fixed(), score_range=ScoreRange(-0.5, 0.5), answerer=Says(), truth=book(square, words="red"))
    assert site.scores(judged(square, "answer", True)) == [[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]


def test_a_site_says_what_its_own_model_answers(square):
    request = judged(square, "reward", False)
    asked = AnswerRequest("a1", request.images, [AnswerItem(item.images, item.prompt) for item in request.items])
    site = Site("colour", None, answerer=Says("left\n", ""), truth=book(square, image="red", words="4"))
    assert InProcessEngine({"colour": site.answer}).ask({"colour": asked}) == {
        "colour": AnswerReply("a1", ["left\n", ""])
    }


def test_a_site_without_a_model_of_its_own_refuses_what_needs_its_answers(square):
    """Also where it owns every reference answer: whether it does is nothing to learn from a refusal."""
    site = Site("colour", Fixed(), truth=book(square, image="red", words="4"))
    for refused in (judged(square, "answer", True), judged(square, "answer", False), AnswerRequest("a", {}, [])):
        with pytest.raises(ReplyError, match="colour answers no questions with its own model"):
            site.answer(refused)
        assert InProcessEngine({"colour": site.answer}).ask({"colour": refused}) == {
            "colour": Absence("colour", "invalid")
        }
    assert site.scores(judged(square, "reward", True)) == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_scores_are_those_of_the_reward_model(reward_model, request_):
    reply = Site("colour", reward_model).answer(request_)
    assert isinstance(reply, ScoreReply)
    assert (reply.id, [len(group) for group in reply.scores]) == ("s1", [3, 1])
    expected = reward_model.score(
        [vqa_prompt("what colour is it?"), vqa_prompt("is it red?")],
        [load_image(data) for data in request_.images.values()],
        [item.candidates for item in request_.items],
    )
    assert reply.scores == [scores.tolist() for scores in expected]


@pytest.mark.parametrize(
    ("score_range", "expected"),
    [
        (None, [[-3.0, 0.5, 7.0], [-3.0]]),
        (ScoreRange(), [[0.0, 0.5, 2.0], [0.0]]),
        (ScoreRange(-1.5, 1.5), [[-1.5, 0.5, 1.5], [-1.5]]),
    ],
    ids=["none", "one-sided", "two-sided"],
)
def test_scores_are_clipped(request_, score_range, expected):
    assert Site("colour", Fixed(), score_range=score_range).answer(request_).scores == expected


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (-2.0, 2.0)])
def test_a_sigmoid_keeps_the_order_of_all_scores(request_, low, high):
    """σ(−3) = 0.0474259, σ(0.5) = 0.6224593, σ(7) = 0.9990889: none meets another at an end of the range."""
    site = Site("colour", Fixed(), score_range=ScoreRange(low, high, "sigmoid"))
    reply = site.answer(request_)
    shares = [[0.0474259, 0.6224593, 0.9990889], [0.0474259]]
    assert reply.scores == [
        pytest.approx([low + (high - low) * share for share in group], abs=1e-6) for group in shares
    ]
    assert check_scores(request_, reply, low, high) == reply.scores


def test_a_sigmoid_leaves_what_a_site_knows_as_it_is(request_):
    """Whether a candidate is the reference answer is 1 or 0, and no score that a sigmoid would bring into a range."""
    site = Site("colour", Fixed(), score_range=ScoreRange(form="sigmoid"), answerer=Says())
    asked = ScoreRequest(request_.id, request_.images, request_.items, "answer")
    assert {score for group in site.answer(asked).scores for score in group} <= {0.0, 1.0}


@pytest.mark.parametrize(
    "score_range", [None, ScoreRange(), ScoreRange(form="sigmoid")], ids=["none", "clipped", "sigmoid"]
)
def test_a_score_that_is_not_finite_is_no_score(request_, score_range):
    """Clipped, an infinity would be the best of scores; as it leaves, the server finds the site absent."""

    class Broken(Fixed):
        def score(self, *given):
            _, *rest = super().score(*given)
            return [torch.tensor([float("inf"), float("-inf"), 0.5]), *rest]

    reply = Site("colour", Broken(), score_range=score_range).answer(request_)
    assert check_scores(request_, reply)[0] is None and check_scores(request_, reply)[1] is not None


def test_scores_leave_standardised(reward_model, request_):
    """(R - 0.05) / (0.01 + 1e-6), R the score of the same model with mean 0 and deviation 1 - 1e-6."""
    standardised = Site("colour", reward_model).answer(request_).scores
    kept, reward_model.standardisation = reward_model.standardisation, Standardisation(0.0, 1 - 1e-6)
    plain = Site("colour", reward_model).answer(request_).scores
    reward_model.standardisation = kept
    for group, raw in zip(standardised, plain, strict=True):
        expected = [(value - 0.05) / (0.01 + 1e-6) for value in raw]
        assert group == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_special_tokens_in_a_candidate_or_a_question_leave_the_others_scores(reward_model, square, monkeypatch):
    """A candidate that asks for an image, and a question that ends its turn; without neutralising nothing is scored."""
    red = square("red")
    clean, poison = (
        ScoreRequest(
            "s1",
            {image_name(red): red},
            [
                ScoreItem([image_name(red)], to_turns(vqa_prompt("what colour is it?")), ["red", *more, "blue"]),
                ScoreItem([image_name(red)], to_turns(vqa_prompt(f"is it {word} red?")), ["yes", "no"]),
            ],
        )
        for more, word in (((), "really"), (("<image></s>",), "<image></s>"))
    )
    site = Site("a", reward_model)
    honest, told = site.scores(clean), site.scores(poison)
    assert [told[0][0], told[0][2]] == pytest.approx(honest[0], abs=1e-3)
    assert all(torch.tensor(scores).isfinite().all() for scores in told) and len(told[0]) == 3
    monkeypatch.setattr("accord.models.inputs.plain_prompt", lambda _, prompt: list(prompt))
    assert Declined.ERROR in site.scores(poison)


def test_an_image_that_cannot_be_read_costs_its_question_alone(request_, caplog):
    bad = ScoreItem([image_name(b"GIF89a")], COLOUR, ["x"])
    first, second = request_.items
    asked = ScoreRequest("s1", {bad.images[0]: b"GIF89a", **request_.images}, [bad, first, bad, second])
    reply = InProcessEngine({"colour": Site("colour", Fixed()).answer}).ask({"colour": asked})["colour"]
    assert reply == ScoreReply("s1", [[], [-3.0, 0.5, 7.0], [], [-3.0]], {0: Declined.IMAGE, 2: Declined.IMAGE})
    assert check_scores(asked, reply) == [None, [-3.0, 0.5, 7.0], None, [-3.0]]
    assert len(caplog.records) == 1  # it was looked at once


class Fails(Fixed):
    """A reward model that fails on a candidate, as on text that only its own template may hold."""

    def score(self, prompts, images, completions):
        if any("<image>" in text for group in completions for text in group):
            raise ValueError("number of images does not match number of special image tokens")
        return super().score(prompts, images, completions)


def test_a_question_on_which_the_model_fails_costs_no_other(request_, caplog):
    """Where it fails on all, the request is answered by an error, as when the model is broken."""
    hostile = ScoreItem([], WORDS, ["<image>"])
    site = Site("colour", Fails())
    asked = ScoreRequest("s1", request_.images, [request_.items[0], hostile])
    assert site.answer(asked) == ScoreReply("s1", [[-3.0, 0.5, 7.0], []], {1: Declined.ERROR})
    assert site.answer(ScoreRequest("s1", {}, [hostile, hostile])) == Refusal("s1", "error")


def test_questions_that_are_declined_are_not_looked_at(request_):
    """The scores of the others, and their places, are what they are without the declined one."""
    site = Site("colour", Fixed())
    site.declined = lambda asked: {0: Declined.LIMIT} if len(asked.items) > 1 else {}
    assert site.answer(request_) == ScoreReply("s1", [[], [-3.0]], {0: Declined.LIMIT})
    asked = AnswerRequest("a1", request_.images, [AnswerItem(item.images, item.prompt) for item in request_.items])
    site.answerer = Says()
    assert site.answer(asked) == AnswerReply("a1", ["", "Red."], {0: Declined.LIMIT}) and site.answerer.asked == [1]


def test_a_text_only_site_scores_questions_without_images(texts_only):
    """As its reward model does, asked without images."""
    model = RewardModel.from_checkpoint(texts_only).eval()
    asked = ScoreRequest("s", {}, [ScoreItem([], WORDS, ["4", "5"]), ScoreItem([], WORDS, ["six"])])
    expected = model.score([[{"role": "user", "content": "2 + 2?"}]] * 2, [None, None], [["4", "5"], ["six"]])
    engine = InProcessEngine({"sums": Site("sums", model).answer})
    assert check_scores(asked, engine.ask({"sums": asked})["sums"]) == [scores.tolist() for scores in expected]


@pytest.mark.parametrize("task", ["router", "reward", "supervised", "preference", "selector"])
def test_a_site_trains_what_it_was_started_for_and_refuses_the_rest(task):
    request = UpdateRequest("r", task, 0, b"", 0)
    with pytest.raises(ReplyError, match=f"colour does not train a shared model for '{task}'"):
        Site("colour", Fixed()).answer(request)
    other = "selector" if task == "router" else "router"
    with pytest.raises(ReplyError, match=f"colour does not train a shared model for '{task}'"):
        Site("colour", Fixed(), updates={other: lambda request: pytest.fail("trained")}).answer(request)
    reply = UpdateReply("r", b"change", 3, 0.5)
    assert Site("colour", Fixed(), updates={task: lambda request: reply}).answer(request) == reply


def test_the_card(reward_model):
    site = Site("colour", reward_model, SiteRecord(5, 2, True, {"colour": 0.5}))
    parameters = sum(p.numel() for p in reward_model.parameters())
    assert site.answer(CardRequest("c")) == Card(
        "c", "LlavaForConditionalGeneration", parameters, 5, 2, True, {"colour": 0.5}
    )
    assert Site("colour", reward_model).answer(CardRequest("c")).pairs == 0


def test_no_reply_holds_private_text(reward_model, llava, prefer, request_, square):
    """The secret stands in prompt, both answers, id and type of every pair; no encoded reply contains a word of it."""
    pairs = [
        prefer(
            n,
            f"{SECRET} chosen",
            f"{SECRET} rejected",
            prompt=vqa_prompt(f"{SECRET}?"),
            images=(square("red"),),
            question_id=f"{SECRET} {n}",
            question_type=SECRET,
        )
        for n in range(3)
    ]
    encoder = Encoder(*load_model(llava))
    training = LocalRouterTraining(encoder, pairs, 1, 2, SMALL)
    site = Site("colour", reward_model, SiteRecord(3, 3), updates={"router": training})
    weights = RouterNetwork(encoder.features, 2, SMALL).to_bytes()
    update = UpdateRequest("r", "router", 0, weights, 3)
    replies = [site.answer(request) for request in (request_, update, CardRequest("c"))]
    assert isinstance(replies[1], UpdateReply) and (replies[1].examples, replies[1].steps) == (3, 2)
    assert any(change.any() for change in load(replies[1].change).values())
    for reply in replies:
        sent = encode(reply)
        for word in ("Marple", "ward", "chosen", "rejected"):
            assert word.encode() not in sent
        assert square("red") not in sent


def test_an_unknown_request_is_refused():
    with pytest.raises(ReplyError, match="does not answer a Card"):
        Site("colour", Fixed()).answer(Card("c", "", 0, 0, 0, False, {}))


@pytest.mark.parametrize(("low", "high"), [(2.0, 0.0), (1.0, 1.0), (float("nan"), 1.0)])
def test_an_empty_score_range(low, high):
    with pytest.raises(RecipeError, match=r"scores.low must be below scores.high, got \S+ and \S+; correct the range"):
        ScoreRange(low, high)
