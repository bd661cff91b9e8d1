import math
import random
from types import MappingProxyType

import numpy
import pytest
import torch
from safetensors.torch import load

from accord.alignment.selector import (
    Comparison,
    Selector,
    label_pairs,
    letter_tokens,
    majority,
    selector_loss,
    selector_prompt,
)
from accord.data.images import load_image
from accord.errors import DataError, DataWarning, RecipeError, RunError
from accord.federation.engine import InProcessEngine
from accord.federation.local import Averaging
from accord.federation.messages import UpdateReply, UpdateRequest, encode
from accord.federation.weights import set_trainable_weights, to_bytes, trainable_weights
from accord.methods.fedbiscuit import (
    ONLY_LOSS,
    FedBiscuitConfig,
    LocalSelector,
    ask_losses,
    assign_sites,
    train_biscuit,
    train_selectors,
)
from accord.models.inputs import prompt_text
from accord.models.load import LoraSettings, load_model, seeded_adapter
from accord.types import vqa_prompt

LORA = LoraSettings(rank=4, alpha=8)


def config(**changes):
    averaging = Averaging(rounds=2, local_steps=2, batch_size=2, learning_rate=1e-2)
    small = {"averaging": averaging, "warmup_rounds": 1, "compare_on": 3, "regroup_every": 1, "lora": LORA}
    return FedBiscuitConfig(**{**small, **changes})


def new_selector(checkpoint, seed=0):
    model, processor = load_model(checkpoint)
    return Selector(seeded_adapter(model, LORA, seed), processor)


def moved(selector, seed):
    """Return weights of `selector` whose B is not 0: a selector with an opinion of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(w.shape, generator=generator) / 4 for name, w in trainable_weights(selector.model).items()
    }


@pytest.fixture
def comparisons(square):
    return [
        Comparison(vqa_prompt("is it red?"), load_image(square("red")), "yes", "no"),
        Comparison(vqa_prompt("what colour is it?"), load_image(square("blue")), "it is blue", "red"),
    ]


def test_the_question_shows_both_answers_after_the_prompt():
    talk = [{"role": "user", "content": [{"type": "image"}]}, {"role": "user", "content": "what colour is it?"}]
    assert selector_prompt(talk, "red", "blue") == [
        {"role": "user", "content": [{"type": "image"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what colour is it?"},
                {"type": "text", "text": "\nA: red\nB: blue\nwhich is better, A or B?"},
            ],
        },
    ]
    assert selector_prompt(vqa_prompt("is it?"), "yes", "no")[0]["content"][:2] == vqa_prompt("is it?")[0]["content"]


def test_a_letter_is_a_token_of_every_family(family, checkpoints):
    _, processor = load_model(checkpoints[family])
    a, b, shared = letter_tokens(processor, vqa_prompt("is it red?"))
    assert (processor.tokenizer.decode([a]), processor.tokenizer.decode([b]), shared) == ("A", "B", 0)


def test_the_letter_shows_at_the_first_token_that_differs():
    # A tokeniser that begins an answer with a token for the space: [5, 65, 2] and [5, 66, 2].
    class Tokenizer:
        eos_token, all_special_tokens, added_tokens_decoder = ".", (), MappingProxyType({})

        def __len__(self):
            return 128

        def __call__(self, texts, **_):
            return {"input_ids": [[5, ord(text[0]), 2] for text in texts]}

    class Processor:
        tokenizer, chat_template = Tokenizer(), None

        def apply_chat_template(self, turns, **_):
            return str(len(turns))

    assert letter_tokens(Processor(), vqa_prompt("?")) == (65, 66, 1)


def test_the_log_odds_are_those_of_the_next_token(family, checkpoints, comparisons):
    selector = new_selector(checkpoints[family])
    set_trainable_weights(selector.model, moved(selector, 1))
    a, b, _ = letter_tokens(selector.processor, comparisons[0].prompt)
    selector.model.eval()
    with torch.no_grad():
        together = selector(comparisons)
        for comparison, found in zip(comparisons, together, strict=True):
            asked = prompt_text(
                selector.processor, selector_prompt(comparison.prompt, comparison.first, comparison.second)
            )
            inputs = selector.processor(images=[[comparison.images]], text=[asked], return_tensors="pt")
            after = selector.model(**inputs).logits[0, -1].log_softmax(-1)
            assert found.item() == pytest.approx((after[a] - after[b]).item(), abs=2e-5)
    assert abs(together[0] - together[1]) > 1e-4  # which image and which answers matters


def test_the_loss_is_the_cross_entropy_of_two_letters():
    # s(A) = ¾ at log-odds log 3: −log ¾ = log 4/3 where A is better, −log ¼ = log 4 where B is.
    log_odds = torch.full((2,), math.log(3))
    assert selector_loss(log_odds[:1], torch.tensor([0])).item() == pytest.approx(math.log(4 / 3))
    assert selector_loss(log_odds[:1], torch.tensor([1])).item() == pytest.approx(math.log(4))
    assert selector_loss(log_odds, torch.tensor([0, 1])).item() == pytest.approx(math.log(16 / 3) / 2)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]], [0, 1, 1, 0]),
        ([[0, 1, 1], [1, 0, 1]], [0, 0, 1]),  # as many for both: A
        ([[1, 0]], [1, 0]),
    ],
)
def test_the_majority_decides(votes, expected):
    assert majority(votes) == expected
    assert [int(numpy.bincount(column).argmax()) for column in numpy.array(votes).T] == expected


def test_every_site_goes_to_its_best_selector_if_there_is_room():
    losses = {"a": [0.1, 0.5, 0.9], "b": [0.7, 0.2, 0.8], "c": [0.5, 0.6, 0.3]}
    assert assign_sites(losses, random.Random(0)) == [["a"], ["b"], ["c"]]


def test_a_selector_that_all_prefer_takes_its_share():
    # K = 4, U = 2. All stand by selector 0, which keeps ⌈4/2⌉ = 2 of them; the others are left with selector 1.
    losses = {site: [0.1, 0.9] for site in "abcd"}
    first, second = assign_sites(losses, random.Random(0))
    assert (len(first), len(second)) == (2, 2)
    assert {*first, *second} == set("abcd")
    kept = {tuple(assign_sites(losses, random.Random(seed))[0]) for seed in range(20)}
    assert len(kept) > 1  # who comes first is drawn


def test_who_finds_no_room_goes_to_the_next_best():
    # K = 3, U = 3, all of them like 0 best: it keeps one. a and c like 1 next, b likes 2: if a and c are left, 1 is the
    # fuller and keeps one of them, and the other takes 2. Whoever comes first, each selector has one site, and b has 0
    # or 2, the least loss that is left to it.
    losses = {"a": [0.1, 0.2, 0.3], "b": [0.1, 0.3, 0.2], "c": [0.1, 0.2, 0.3]}
    for seed in range(20):
        groups = assign_sites(losses, random.Random(seed))
        assert sorted(map(len, groups)) == [1, 1, 1]
        assert groups[1] != ["b"]


def test_five_sites_and_two_selectors():
    # ⌈5/2⌉ = 3 keep their place at 0, and then ⌈2/1⌉ = 2 are left to 1, beside nobody.
    losses = {site: [0.1, 0.9] for site in "abcde"}
    assert [len(group) for group in assign_sites(losses, random.Random(1))] == [3, 2]
    # Three like 1 best: it is the fuller, and keeps all three.
    losses = {"a": [0.1, 0.9], "b": [0.2, 0.9], "c": [0.9, 0.1], "d": [0.9, 0.1], "e": [0.9, 0.1]}
    assert [sorted(group) for group in assign_sites(losses, random.Random(1))] == [["a", "b"], ["c", "d", "e"]]


def test_fewer_sites_than_selectors_leave_one_alone():
    assert assign_sites({"a": [0.1, 0.2, 0.3]}, random.Random(0)) == [["a"], [], []]


class Scripted:
    """A site with a given loss for every selector, which adds `step` to whatever weights it is sent."""

    def __init__(self, losses, step=1.0, examples=1):
        self.losses, self.step, self.examples, self.seen = losses, step, examples, []

    def __call__(self, request):
        only_loss = request.state == ONLY_LOSS
        self.seen.append((request.round, request.group, only_loss))
        if only_loss:
            return UpdateReply(request.id, b"", self.examples, self.losses[request.group])
        change = {name: torch.full_like(w, self.step) for name, w in load(request.weights).items()}
        return UpdateReply(request.id, to_bytes(change), self.examples, 0.5)


def zeros(count):
    return [{"w": torch.zeros(1)} for _ in range(count)]


def test_selectors_are_warmed_up_by_all_and_then_trained_in_groups():
    # Warm-up, one round each: both selectors go to ¼·1 + ¾·3 = 2.5. Then a (of selector 1) adds 1, and b (of 0) adds 3,
    # in each of two rounds.
    a, b = Scripted([0.9, 0.1], step=1.0, examples=1), Scripted([0.1, 0.9], step=3.0, examples=3)
    rounds = []
    first, second = train_selectors(
        InProcessEngine({"a": a, "b": b}),
        zeros(2),
        config(selectors=2, regroup_every=2),
        seed=0,
        on_round=lambda *each: rounds.append(each),
    )
    assert (first["w"].item(), second["w"].item()) == (8.5, 4.5)
    assert rounds == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]
    assert a.seen == [(0, 0, False), (1, 1, False), (2, 0, True), (2, 1, True), (2, 1, False), (3, 1, False)]
    assert b.seen == [(0, 0, False), (1, 1, False), (2, 0, True), (2, 1, True), (2, 0, False), (3, 0, False)]


def test_sites_are_regrouped():
    a = Scripted([0.1, 0.9])
    engine = InProcessEngine({"a": a})
    train_selectors(engine, zeros(2), config(selectors=2, warmup_rounds=0), seed=0)
    assert a.seen == [(0, 0, True), (0, 1, True), (0, 0, False), (1, 0, True), (1, 1, True), (1, 0, False)]


def test_a_group_whose_only_site_is_absent_keeps_its_selector():
    a, b = Scripted([0.1, 0.9]), Scripted([0.9, 0.1])

    def tired(request):
        if not request.state and request.round == 1:
            raise OSError("no power")
        return b(request)

    engine = InProcessEngine({"a": a, "b": tired})
    with pytest.warns(DataWarning, match="site b gave no answer"):
        first, second = train_selectors(engine, zeros(2), config(selectors=2, warmup_rounds=0), seed=0)
    assert (first["w"].item(), second["w"].item()) == (2.0, 1.0)
    assert engine.traffic.counts["b", "selector"].absences == 1


def test_a_site_without_a_loss_is_in_no_group():
    a, b, c = Scripted([0.1, 0.9]), Scripted([math.nan, 0.9]), Scripted([0.9, 0.1])

    def silent(request):
        raise OSError("no power")

    engine = InProcessEngine({"a": a, "b": b, "c": c, "d": silent})
    with pytest.warns(DataWarning, match="gave no loss of selector 0"):
        losses = ask_losses(engine, zeros(2), 0)
    assert losses == {"a": [0.1, 0.9], "c": [0.9, 0.1]}
    assert b.seen == [(0, 0, True)]  # it is not asked for the others
    assert [engine.traffic.counts[site, "selector"].absences for site in "abcd"] == [0, 1, 0, 1]


def test_no_site_at_all_is_an_error():
    def silent(request):
        raise OSError("no power")

    with pytest.warns(DataWarning), pytest.raises(RunError, match="no site answered before selector round 1"):
        train_selectors(InProcessEngine({"a": silent}), zeros(2), config(selectors=2, warmup_rounds=0), seed=0)

    def tells_losses_only(request):
        return UpdateReply(request.id, b"", 1, 0.1) if request.state else silent(request)

    for site, count in ((tells_losses_only, 2), (silent, 1)):  # one selector alone needs no losses
        with pytest.warns(DataWarning), pytest.raises(RunError, match="no site answered in round 1"):
            train_selectors(
                InProcessEngine({"a": site}), zeros(count), config(selectors=count, warmup_rounds=0), seed=0
            )


def test_one_selector_is_all_sites_own():
    """Nobody is asked for a loss; two rounds of (1 · 1 + 3 · 3) / 4 = 2.5."""
    a, b = Scripted([0.1], step=1.0, examples=1), Scripted([0.9], step=3.0, examples=3)
    (only,) = train_selectors(InProcessEngine({"a": a, "b": b}), zeros(1), config(selectors=1, warmup_rounds=0), seed=0)
    assert only["w"].item() == 5.0 and a.seen == b.seen == [(0, 0, False), (1, 0, False)]


def test_a_site_tells_its_loss_and_nothing_else(llava, prefer):
    pairs = [prefer(0, "red", "blue"), prefer(1, "blue", "green"), prefer(2, "green", "red")]
    selector = new_selector(llava)
    weights = moved(selector, 2)
    local = LocalSelector(selector, pairs, config())
    reply = local(UpdateRequest("x", "selector", 0, to_bytes(weights), 0, ONLY_LOSS))
    assert (reply.change, reply.examples) == (b"", 3)
    # By hand, pair after pair: A is the chosen answer of the first and the third that it keeps, B of the second.
    by_hand = []
    for n, pair in enumerate(local.known):
        first, second = (pair.rejected, pair.chosen) if n == 1 else (pair.chosen, pair.rejected)
        with torch.no_grad():
            log_odds = selector([Comparison(pair.prompt, load_image(pair.images[0]), first, second)]).item()
        by_hand.append(math.log1p(math.exp(log_odds if n == 1 else -log_odds)))
    assert reply.loss == pytest.approx(sum(by_hand) / 3, rel=1e-4)
    assert all(torch.equal(w, weights[name]) for name, w in trainable_weights(selector.model).items())


def test_local_steps_learn_the_site_s_preference(llava, prefer):
    # "red" is better than "blue", whatever is shown and in whatever order. Knowing nothing costs log 2 = 0.69, knowing
    # one order only more; the frozen head of this model, with small random weights, lets none below 0.37.
    pairs = [prefer(n, "red", "blue", images=prefer(n, colour).images) for n, colour in enumerate(("red", "blue"))]
    selector = new_selector(llava)
    averaging = Averaging(local_steps=40, batch_size=8, learning_rate=1e-2)
    local = LocalSelector(selector, pairs, config(averaging=averaging))
    reply = local(UpdateRequest("x", "selector", 0, to_bytes(trainable_weights(selector.model)), 0))
    assert load(reply.change).keys() == trainable_weights(selector.model).keys()
    assert local.loss() < 0.4


def test_the_majority_labels_what_differs(llava, ask):
    selector = new_selector(llava)
    selectors = [moved(selector, seed) for seed in range(3)]
    questions = [ask(n, colour) for n, colour in enumerate(("red", "blue", "green", "yellow"))]
    answers = [["red", "blue"], ["Red ", "red"], ["one", "two", "one"], ["yes", "no"]]
    pairs = label_pairs(selector, selectors, questions, answers, batch_size=2)
    # The second question has two answers that agree; the third has (one, two), (one, one), (two, one).
    asked = [(0, "red", "blue"), (2, "one", "two"), (2, "two", "one"), (3, "yes", "no")]
    for pair, (n, first, second) in zip(pairs, asked, strict=True):
        votes = 0
        for weights in selectors:
            set_trainable_weights(selector.model, weights)
            comparison = Comparison(vqa_prompt(questions[n].text), load_image(questions[n].image), first, second)
            with torch.no_grad():
                votes += selector([comparison]).item() < 0
        assert (pair.chosen, pair.rejected) == ((second, first) if votes >= 2 else (first, second))
        assert (pair.question_id, pair.images, pair.constructed) == (f"q{n}", (questions[n].image,), False)


def test_the_whole_way(llava, prefer, ask, tmp_path):
    settings = config(selectors=2, prompts=6, dpo_steps=2, dpo_learning_rate=1e-2, temperature=2.0)
    shared = new_selector(llava)
    requests, replies = {"a": [], "b": []}, {"a": [], "b": []}

    def site(name, pairs):
        local = LocalSelector(shared, pairs, settings)

        def answer(request):
            requests[name].append(request)
            replies[name].append(local(request))
            return replies[name][-1]

        return answer

    a, b = [prefer(n, "red", "blue") for n in range(2)], [prefer(n, "green", "red") for n in range(2)]
    questions = [ask(n, colour, split="public") for n, colour in enumerate(("red", "blue", "green"))]

    def run():
        engine = InProcessEngine({"a": site("a", a), "b": site("b", b)})
        model, processor = load_model(llava)
        return engine, train_biscuit(
            engine, model, processor, questions, settings, seed=5, max_new_tokens=2, out=tmp_path
        )

    engine, policy = run()
    base = load_model(llava)[0].state_dict()
    assert policy.state_dict().keys() == base.keys()
    assert any(not torch.equal(w, base[name]) for name, w in policy.state_dict().items())
    adapter = trainable_weights(shared.model).keys()
    for name in "ab":
        # 2 warm-up rounds, 2 regroupings of 2 losses, 2 rounds in one group
        assert len(requests[name]) == 8
        assert all(request.task == "selector" and load(request.weights).keys() == adapter for request in requests[name])
        assert sum(reply.change == b"" for reply in replies[name]) == 4
        count = engine.traffic.counts[name, "selector"]
        assert count.bytes_to_site == sum(len(encode(request)) for request in requests[name])
        assert count.bytes_from_site == sum(len(encode(reply)) for reply in replies[name])
        assert not any(pair.images[0] in encode(message) for pair in (*a, *b) for message in requests[name])
    _, again = run()
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in policy.state_dict().items())


def test_what_cannot_be_done_is_refused(llava, tmp_path, ask):
    with pytest.raises(DataError, match="0 preference pairs"):
        LocalSelector(new_selector(llava), [], config())
    with pytest.raises(RecipeError, match="answers must be at least 2, got 1"):
        FedBiscuitConfig(answers=1)
    engine = InProcessEngine({"a": Scripted([0.1])})
    model, processor = load_model(llava)
    with pytest.raises(DataError, match="gives the same 2 answers"):
        settings = config(selectors=1, averaging=Averaging(rounds=1), warmup_rounds=0, prompts=2, temperature=1e-4)
        train_biscuit(engine, model, processor, [ask(0)], settings, seed=0, max_new_tokens=2, out=tmp_path)
