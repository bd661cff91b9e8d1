import io
import math
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pytest import approx

from accord.data.images import load_image
from accord.errors import DataError, RecipeError
from accord.models.load import LoraSettings, load_model, save_model
from accord.rewards import train as module
from accord.rewards.model import RewardModel, Standardisation
from accord.rewards.train import (
    PairGroup,
    Ranking,
    RewardConfig,
    bradley_terry,
    group_pairs,
    keep_back,
    measure_standardisation,
    rank,
    rank_pairs,
    train_reward_model,
)

QUICK = RewardConfig(steps=4, prompts_per_batch=2, learning_rate=1e-2, evaluate_every=1, patience=0)


def shade(number, colour):
    """Return a square in one of many shades of red or blue, as a PNG."""
    level = 255 - 10 * number
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level, 0, 0) if colour == "red" else (0, 0, level)).save(buffer, "PNG")
    return buffer.getvalue()


class Scores:
    """A reward model whose scores are written down."""

    def __init__(self, scores):
        self.scores = scores
        self.standardisation = Standardisation(9.0, 9.0)
        self.asked = []

    def score(self, prompts, images, completions):
        self.asked.append([list(group) for group in completions])
        return [torch.tensor([self.scores[text] for text in group]) for group in completions]


@pytest.fixture
def pairs(prefer):
    return [prefer(0, "red", "blue"), prefer(1, "blue", "red"), prefer(2, "red", "green")]


@pytest.fixture
def train(llava, pairs, ask, tmp_path):
    """Train a fresh model on three pairs; return it, its best ranking and what was logged."""

    def run(config=QUICK, *, seed=0, lora=None, held_out=None, checkpoint=llava):
        torch.manual_seed(0)
        model = RewardModel.from_checkpoint(checkpoint, lora=lora)
        records = []
        questions = [ask(7), ask(8, "blue")] if held_out is None else held_out
        best = train_reward_model(
            model, pairs, questions, ["red", "blue"], config, seed=seed, out=tmp_path, log=records.append
        )
        return model, best, records

    return run


def flat(model):
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def test_bradley_terry_of_one_group():
    """Chosen 1; rejected 0 and 2: margins 1 and -1.

    -log σ(1) = ln(1 + e⁻¹) = 0.313262; -log σ(-1) = ln(1 + e) = 1.313262; their mean is 0.813262.
    Centring 0.1: ((1 + 0)² + (1 + 2)²) / 2 = 5, so 0.5 on top. One margin of two is positive.
    """
    scores = torch.tensor([1.0, 0.0, 2.0])
    loss, accuracy = bradley_terry(scores, [3], 0.0)
    assert (loss.item(), accuracy.item()) == (approx(0.813262, abs=1e-6), 0.5)
    assert bradley_terry(scores, [3], 0.1)[0].item() == approx(1.313262, abs=1e-6)


def test_bradley_terry_counts_pairs_and_not_groups():
    """Margins 2 | 0, -ln 3: (ln(1 + e⁻²) + ln 2 + ln 4) / 3 = (0.126928 + 0.693147 + 1.386294) / 3 = 0.735456."""
    scores = torch.tensor([2.0, 0.0, 0.0, 0.0, math.log(3)])
    loss, accuracy = bradley_terry(scores, [2, 3], 0.0)
    assert (loss.item(), accuracy.item()) == (approx(0.735456, abs=1e-6), approx(1 / 3))


def test_bradley_terry_does_not_overflow():
    """-log σ(-2000) = 2000 + ln(1 + e⁻²⁰⁰⁰) = 2000."""
    assert bradley_terry(torch.tensor([-1000.0, 1000.0]), [2], 0.0)[0].item() == approx(2000)


def test_pairs_of_one_question_and_answer_form_a_group(prefer):
    """Questions 0, 1, 0, 0; the last has another chosen answer, so its image is encoded for a group of its own."""
    given = [prefer(0, rejected="blue"), prefer(1), prefer(0, rejected="green"), prefer(0, "blue", "red")]
    assert group_pairs(given) == [
        PairGroup(given[0], ("blue", "green")),
        PairGroup(given[1], ("blue",)),
        PairGroup(given[3], ("red",)),
    ]


def test_ranking_by_hand(ask):
    """Scores red 3, blue 2, green 2, yellow 1. Right answer on top: red yes; blue no; green ties with blue: no.

    Of type colour red and blue are asked, 1 of 2 right; of type other, green and yellow (new to the vocabulary), none.
    Macro = (1/2 + 0) / 2 = 1/4.
    """
    model = Scores({"red": 3.0, "blue": 2.0, "green": 2.0, "yellow": 1.0})
    questions = [
        ask(0, "red"),
        ask(1, "blue"),
        ask(2, "green", question_type="other"),
        ask(3, "yellow", question_type="other"),
    ]
    ranking = rank(model, questions, ["red", "blue", "green"], prompts_at_once=3)
    assert dict(ranking.by_type) == {"colour": 0.5, "other": 0.0}
    assert ranking.macro == 0.25
    assert model.asked == [
        [["red", "blue", "green"], ["blue", "red", "green"], ["green", "red", "blue"]],
        [["yellow", "red", "blue", "green"]],
    ]


def test_an_answer_that_is_as_good_is_no_rival(ask):
    """Crimson and Red. are as right as red, and score higher; blue is below it."""
    model = Scores({"red": 2.0, "crimson": 3.0, "Red.": 3.0, "blue": 1.0})
    question = replace(ask(0, "red"), references=("Crimson",))
    assert rank(model, [question], ["crimson", "Red.", "red", "blue"]).macro == 1.0
    assert model.asked == [[["red", "blue"]]]


def test_a_model_without_finite_scores_ranks_nothing_on_top(ask):
    model = Scores({"red": math.nan, "blue": math.nan})
    assert rank(model, [ask(0)], ["red", "blue"]).macro == 0.0


def test_pair_accuracy_by_hand(prefer):
    """Scores red 3, blue 2, green 2, yellow 1. Colour: red over blue yes, blue over green a tie and so no: 1/2.

    Other: yellow over red no. Question 0's two pairs have three answers between them, each scored once.
    """
    model = Scores({"red": 3.0, "blue": 2.0, "green": 2.0, "yellow": 1.0})
    pairs = [prefer(0, "red", "blue"), prefer(0, "blue", "green"), prefer(1, "yellow", "red", question_type="other")]
    assert dict(rank_pairs(model, pairs).by_type) == {"colour": 0.5, "other": 0.0}
    assert model.asked == [[["red", "blue", "green"], ["yellow", "red"]]]


def test_pairs_are_kept_back_by_image(prefer, tmp_path):
    """Of four images a quarter is one; the red square is one image as bytes and as a file that holds them."""
    red = prefer(0).images[0]
    (tmp_path / "red.png").write_bytes(red)
    pairs = [prefer(n, colour, "teal") for n in range(3) for colour in ("red", "blue", "green", "yellow")]
    pairs.append(prefer(9, images=(tmp_path / "red.png",)))
    kept_images = set()
    for seed in range(20):
        rest, kept = keep_back(pairs, 0.25, random.Random(seed))
        (image,) = {pair.chosen for pair in kept}
        kept_images.add(image)
        assert kept == [pair for pair in pairs if pair.chosen == image]
        assert rest == [pair for pair in pairs if pair.chosen != image]
    assert kept_images == {"red", "blue", "green", "yellow"}
    assert keep_back(pairs, 0.25, random.Random(3)) == keep_back(pairs, 0.25, random.Random(3))


def test_some_images_are_kept_back_and_some_are_not(prefer):
    pairs = [prefer(0, "red"), prefer(1, "blue", "red")]
    for share in (0.01, 0.99):
        assert [len(part) for part in keep_back(pairs, share, random.Random(0))] == [1, 1]
    with pytest.raises(DataError, match=r"all 2 pairs are about one image.* choose"):
        keep_back([prefer(0), prefer(1)], 0.5, random.Random(0))


@pytest.mark.parametrize("share", [0.0, 1.0, math.nan])
def test_a_share_that_keeps_back_none_or_all_is_refused(share):
    with pytest.raises(RecipeError, match=f"kept_back must be between 0 and 1, got {share}"):
        RewardConfig(kept_back=share)


def test_pairs_kept_back_choose_the_weights_and_train_nothing(train, pairs, monkeypatch):
    """Two images: red in two pairs, blue in one. The image kept back is in no training batch and in every ranking."""
    ranked, trained = [], []
    monkeypatch.setattr(module, "rank", lambda *_: pytest.fail("no question is ranked"))
    monkeypatch.setattr(
        module, "rank_pairs", lambda _, kept: ranked.append(kept) or Ranking({"colour": 1 / len(ranked)})
    )
    standardise = measure_standardisation
    monkeypatch.setattr(
        module, "measure_standardisation", lambda model, groups: trained.extend(groups) or standardise(model, groups)
    )
    _, best, records = train(replace(QUICK, choose="pairs", kept_back=0.5))
    assert best.macro == 1.0 == records[0]["ranking_macro"]
    kept = ranked[0]
    assert sorted(p.question_id for p in [*kept, *(g.chosen for g in trained)]) == ["q0", "q1", "q2"]
    assert not {p.chosen for p in kept} & {g.chosen.chosen for g in trained}


def test_judgements_alone_are_learnt(prefer, llava, tmp_path):
    """Ten shades of red and ten of blue, each with its own colour preferred: pairs on shades kept back become right."""
    torch.manual_seed(0)
    model = RewardModel.from_checkpoint(llava)
    pairs = [
        prefer(n, *answers, images=(shade(n, answers[0]),))
        for n in range(10)
        for answers in (("red", "blue"), ("blue", "red"))
    ]
    config = RewardConfig(
        steps=100, prompts_per_batch=4, learning_rate=5e-3, evaluate_every=5, patience=0, choose="pairs"
    )
    best = train_reward_model(model, pairs, [], [], config, seed=0, out=tmp_path)
    assert best.macro == 1.0


def test_no_ranking_has_the_macro_mean_0():
    assert Ranking({}).macro == 0.0


def test_standardisation_is_pooled_over_chosen_and_rejected(prefer):
    """Scores 1, 3 | 5: mean 3, deviation √((4 + 0 + 4) / 2) = 2. The standardisation set before does not enter."""
    model = Scores({"red": 1.0, "blue": 3.0, "green": 5.0})
    groups = [PairGroup(prefer(0), ("blue",)), PairGroup(prefer(1, "green"), ())]
    assert measure_standardisation(model, groups, prompts_at_once=1) == Standardisation(3.0, 2.0)


def test_a_separable_toy_is_learnt(family, checkpoints, prefer, ask, tmp_path):
    """Red against blue squares: the ranking becomes 1, where training stops."""
    torch.manual_seed(0)
    model = RewardModel.from_checkpoint(checkpoints[family])
    pairs = [prefer(0, "red", "blue"), prefer(1, "blue", "red")]
    config = RewardConfig(steps=100, prompts_per_batch=4, learning_rate=5e-3, evaluate_every=5, patience=0)
    records = []
    best = train_reward_model(
        model,
        pairs,
        [ask(8, "red"), ask(9, "blue")],
        ["red", "blue"],
        config,
        seed=0,
        out=tmp_path,
        log=records.append,
    )
    assert best.macro == 1.0 == records[-1]["ranking_macro"]
    assert records[-1]["step"] < 100
    assert rank(model, [ask(8, "red"), ask(9, "blue")], ["red", "blue"]) == best


def test_scores_leave_training_standardised(train, pairs):
    """Over the very answers that the model was trained on: mean 0, deviation 1."""
    model, _, _ = train()
    groups = group_pairs(pairs)
    scores = torch.cat(
        model.score(
            [g.chosen.prompt for g in groups],
            [load_image(g.chosen.images[0]) for g in groups],
            [[g.chosen.chosen, *g.rejected] for g in groups],
        )
    )
    assert (len(scores), scores.mean().item(), scores.std().item()) == (6, approx(0, abs=1e-4), approx(1, abs=1e-4))


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4)], ids=["full", "lora"])
def test_the_best_weights_come_back(train, monkeypatch, lora):
    """Rankings 0.2, 0.9, 0.9, 0.5 over four steps: the weights after the second step, the first of the equals."""
    seen = []
    script = iter([0.2, 0.9, 0.9, 0.5])

    def scripted(model, *_):
        seen.append(flat(model))
        return Ranking({"colour": next(script)})

    monkeypatch.setattr(module, "rank", scripted)
    model, best, records = train(lora=lora)
    assert best.macro == 0.9
    assert [(r["step"], r["ranking_macro"], r["ranking"]) for r in records] == [
        (step, macro, {"colour": macro}) for step, macro in enumerate([0.2, 0.9, 0.9, 0.5], start=1)
    ]
    assert torch.equal(flat(model), seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_training_stops_when_nothing_gets_better(train, monkeypatch):
    """Patience 2: 0.5 is best at step 1, steps 2 and 3 bring nothing, so step 4 never comes."""
    monkeypatch.setattr(module, "rank", lambda *_: Ranking({"colour": 0.5}))
    _, _, records = train(replace(QUICK, steps=9, patience=2))
    assert [record["step"] for record in records] == [1, 2, 3]


def test_the_last_step_is_always_ranked(train, monkeypatch):
    monkeypatch.setattr(module, "rank", lambda *_: Ranking({"colour": 0.5}))
    _, _, records = train(replace(QUICK, evaluate_every=3))
    assert [record["step"] for record in records] == [3, 4]


def test_without_held_out_questions_the_last_weights_stay(train):
    _, best, records = train(held_out=())
    assert (best, records) == (Ranking({}), [])


def test_an_adapter_leaves_the_backbone_as_it_was(train, llava):
    model, _, _ = train(lora=LoraSettings(rank=2, alpha=4))
    base = RewardModel.from_checkpoint(llava).backbone.state_dict()
    now = {name.replace(".base_layer", ""): t for name, t in model._plain.state_dict().items() if "lora_" not in name}
    assert now.keys() == base.keys()
    assert all(torch.equal(tensor, now[name]) for name, tensor in base.items())


def test_the_same_seed_gives_the_same_weights(train):
    """With symmetries, drawn rejected answers and two batches to a step, so that every random draw takes part."""
    config = replace(QUICK, steps=2, symmetries=True, rejected_per_prompt=1, gradient_accumulation=2)
    models = [train(config, seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(flat(models[0]), flat(models[1]))
    assert models[0].standardisation == models[1].standardisation
    assert not torch.equal(flat(models[0]), flat(models[2]))


@pytest.mark.filterwarnings("ignore:.*overflow:RuntimeWarning")
def test_a_training_that_diverged_is_told(train):
    """Steps of 1e30 leave no weight with which a score is finite."""
    with pytest.raises(RecipeError, match=r"training diverged.* mean nan .*lower reward_model\.learning_rate.* 1e\+30"):
        train(replace(QUICK, learning_rate=1e30, warmup=0.0), held_out=())


@pytest.mark.parametrize(("mean", "deviation"), [(math.nan, 1.0), (0.0, math.inf), (0.5, 0.0)])
def test_scores_that_cannot_be_standardised_are_told(train, monkeypatch, mean, deviation):
    monkeypatch.setattr(module, "measure_standardisation", lambda *_: Standardisation(mean, deviation))
    with pytest.raises(RecipeError, match=f"have mean {mean:g} and deviation {deviation:g}; lower"):
        train(replace(QUICK, steps=1), held_out=())


def test_no_pairs(llava, tmp_path):
    model = RewardModel.from_checkpoint(llava)
    with pytest.raises(DataError, match="on 0 preference pairs; give the site pairs"):
        train_reward_model(model, [], [], [], QUICK, seed=0, out=tmp_path)


def test_a_bfloat16_checkpoint_moves_at_a_small_learning_rate(train, llava, tmp_path):
    """AdamW's first steps are as long as the learning rate, 1e-6, whatever the gradient's size.

    A bfloat16 weight has 8 significant bits: it moves by 1e-6 only if it is smaller than about 2 · 256 · 1e-6 = 5e-4.
    """
    model, processor = load_model(llava)
    checkpoint = save_model(model.to(torch.bfloat16), processor, tmp_path / "bfloat16")
    config = replace(QUICK, steps=1, learning_rate=1e-6, warmup=0.0, weight_decay=0.0)
    trained, _, _ = train(config, held_out=(), checkpoint=checkpoint)
    before, after = model.state_dict(), trained.backbone.state_dict()
    name = "model.language_model.layers.0.self_attn.v_proj.weight"
    large = before[name].abs() > 1e-3
    step = (after[name] - before[name].float())[large].abs()
    assert after[name].dtype == torch.float32 and large.float().mean() > 0.9
    assert step.median().item() == approx(1e-6, rel=0.05)
    assert torch.equal((before[name].float() + 1e-6).bfloat16()[large], before[name][large])


def test_scores_are_standardised_without_the_trainers_autocast(train, monkeypatch, pairs, tmp_path):
    """Trained in bfloat16 arithmetic, as on a GPU: mean and deviation are of the scores that the saved model gives."""
    plain = module.trainer_arguments
    monkeypatch.setattr(module, "trainer_arguments", lambda out, **given: plain(out, bf16=True, use_cpu=True, **given))
    model, _, _ = train()
    model.save(tmp_path / "reward")
    again = RewardModel.load(tmp_path / "reward")
    assert measure_standardisation(again, group_pairs(pairs)) == model.standardisation


def test_the_rows_at_once_are_the_recipes(train, monkeypatch):
    """Three groups of two answers each, two rows at once."""
    taken = []
    forward = RewardModel.forward
    monkeypatch.setattr(
        RewardModel, "forward", lambda model, batch: (taken.append(len(batch.input_ids)), forward(model, batch))[1]
    )
    model, _, _ = train(replace(QUICK, steps=1, rows_at_once=2), held_out=())
    assert model.rows_at_once == 2 and taken[1:] == [2, 2, 2]


def test_all_pairs_have_an_image_or_none(llava, prefer, ask, tmp_path):
    model = RewardModel.from_checkpoint(llava)
    none = replace(prefer(4), images=())
    for pairs, questions in (([prefer(3), none], []), ([none], [ask(0)])):
        with pytest.raises(DataError, match=rf"1 of {len(pairs)} pairs and {len(questions)} held-out .* without"):
            train_reward_model(model, pairs, questions, [], QUICK, seed=0, out=tmp_path)


@pytest.mark.parametrize("setting", ["steps", "evaluate_every", "rejected_per_prompt", "gradient_accumulation"])
def test_settings_that_leave_nothing_to_train(setting):
    with pytest.raises(RecipeError, match=f"{setting} must be at least 1, got 0; raise {setting}"):
        RewardConfig(**{setting: 0})
