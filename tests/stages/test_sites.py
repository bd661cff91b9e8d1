import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accord import pipeline
from accord.data.images import image_id, load_image
from accord.data.preferences import read_preferences, write_preferences
from accord.data.questions import uniform
from accord.errors import CheckpointError, DataError, RecipeError
from accord.federation.answering import question_key, read_truth
from accord.federation.messages import AnswerItem, AnswerRequest, ScoreItem, ScoreRequest, image_name, to_turns
from accord.models.finetune import FineTuneConfig
from accord.models.generate import answer
from accord.models.load import LoraSettings, load_model
from accord.recipe import SiteConfig, Source
from accord.rewards.train import Ranking, RewardConfig, group_pairs
from accord.stages import routing, sites
from accord.stages.sites import (
    check_sites,
    common_answers,
    fit_reward_model,
    flip,
    open_federation,
    open_site,
    site_pairs,
    site_truth,
    train_site,
    write_site_preferences,
)
from accord.types import prompt_of, vqa_prompt

COLOURS = ("red", "blue", "green", "yellow")
REWARD = RewardConfig(steps=1, prompts_per_batch=2, rejected_per_prompt=2, vocabulary=4)


@pytest.fixture
def hold(job, ask, monkeypatch):
    """Return a function that gives each of the two sites `n` questions; the policy always says "what"."""
    monkeypatch.setattr(sites, "answer", lambda model, processor, questions, **_: [["what"] for _ in questions])

    def give(n):
        kinds = ("colour", "number")
        private = [
            ask(10 * k + i, COLOURS[i % 4], question_type=kinds[k], text=f"what colour is it, {kinds[k]} {i}?")
            for k in range(2)
            for i in range(n)
        ]
        job.questions = {"private": private, "dev": [ask(90, "red"), ask(91, "blue")], "public": [], "test": []}
        vars(job)["private"] = {"a": private[:n], "b": private[n:]}

    return give


def test_too_few_pairs_are_too_few_each_time(job, hold):
    """One question with three wrong answers makes three pairs."""
    hold(1)
    job.recipe = replace(job.recipe, preferences=replace(job.recipe.preferences, rejected_per_question=3))
    for _ in range(2):
        with pytest.raises(DataError, match="site a has 3 preference pairs from 1 questions, at least 8 are needed"):
            site_pairs(job, "a")
    hold(4)
    assert site_pairs(job, "a") is site_pairs(job, "a") is job.pairs["a"]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4)], ids=["full", "lora"])
def test_a_sites_folder_is_all_it_needs(job, hold, tmp_path, lora):
    """It is moved, and the site is trained anew where it was: what was moved scores as before."""
    hold(4)
    settings = {"finetune": FineTuneConfig(steps=1, batch_size=2), "reward_model": REWARD, "lora": lora}
    job.recipe = replace(job.recipe, sites=tuple(replace(site, **settings) for site in job.recipe.sites))
    train_site(job, "a")
    folder = job.path / "sites" / "a"
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "reward"]
    assert list((job.path / "checkpoints").iterdir()) == []

    def score(run):
        (given,) = open_site(job.recipe, run, "a", scores=job.recipe.scores).reward_model.score(
            [vqa_prompt("what colour is it?")], [load_image(job.questions["dev"][0].image)], [COLOURS]
        )
        return given

    here = score(job.path)
    (tmp_path / "elsewhere" / "sites").mkdir(parents=True)
    folder.rename(tmp_path / "elsewhere" / "sites" / "a")
    job.recipe = replace(job.recipe, seed=1)
    train_site(job, "a")
    assert torch.equal(score(tmp_path / "elsewhere"), here) and not torch.equal(score(job.path), here)


def key(question):
    return question_key([image_id(image) for image in question.images], prompt_of(question))


def ask_about(question, name="a1"):
    items = [AnswerItem([image_name(question.image)], to_turns(prompt_of(question)))]
    return AnswerRequest(name, {image_name(question.image): question.image}, items)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4)], ids=["full", "lora"])
def test_a_site_that_answers_keeps_its_fine_tuned_model(job, hold, ask, lora):
    """It answers as the model in its folder does, loaded at the first question; its book has its four questions."""
    hold(4)
    settings = {"finetune": FineTuneConfig(steps=1, batch_size=2), "reward_model": REWARD, "lora": lora}
    job.recipe = replace(
        job.recipe, sites=tuple(replace(site, **settings, answers=site.name == "a") for site in job.recipe.sites)
    )
    train_site(job, "a")
    folder = job.path / "sites" / "a"
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "model", "reward", "truth.json"]
    assert list((job.path / "checkpoints").iterdir()) == []
    book = read_truth(folder / "truth.json")
    assert book == {key(q): (q.answer,) for q in job.private["a"]} and len(book) == 4
    site, question = open_site(job.recipe, job.path, "a", scores=job.recipe.scores), ask(99, "purple")
    assert "_loaded" not in vars(site.answerer)
    ((expected,),) = answer(
        *load_model(str(folder / "model")), [question], max_new_tokens=job.recipe.alignment.max_completion_length
    )
    assert site.answer(ask_about(question)).answers == [expected]
    own = job.private["a"][1]
    item = ScoreItem([image_name(own.image)], to_turns(prompt_of(own)), ["red", "Blue.", "green"])
    judged = ScoreRequest("s", {item.images[0]: own.image}, [item], judge="answer", truth=True)
    assert own.answer == "blue" and site.answer(judged).scores == [[0.0, 1.0, 0.0]]
    train_site(job, "b")
    other = open_site(job.recipe, job.path, "b", scores=job.recipe.scores)
    assert other.answerer is None and other.truth == {}
    assert sorted(path.name for path in (job.path / "sites" / "b").iterdir()) == ["card.json", "reward"]


def test_what_a_site_no_longer_answers_with_goes(job, hold, monkeypatch, reward):
    """Trained again without `answers`, it has neither a model nor a book that could be opened."""
    hold(4)
    kept = []

    def fit(*_, keep, **__):
        kept.append(keep)
        if keep is not None:
            keep.mkdir(parents=True)
        return reward, {}

    monkeypatch.setattr(sites, "fit_reward_model", fit)
    folder = job.path / "sites" / "a"
    for answers in (True, True, False):
        job.recipe = replace(job.recipe, sites=tuple(replace(site, answers=answers) for site in job.recipe.sites))
        train_site(job, "a")
        assert (folder / "model").exists() is (folder / "truth.json").exists() is answers
    assert kept == [folder / "model", folder / "model", None]


@pytest.fixture
def reward():
    """A reward model of no weights, which leaves a folder."""

    class Empty:
        def save(self, path):
            path.mkdir(parents=True, exist_ok=True)

    return Empty()


def test_a_site_that_was_not_fine_tuned_answers_with_its_checkpoint(job, hold, ask, llava):
    hold(4)
    fields = {"checkpoint": llava, "finetune": None, "reward_model": REWARD, "answers": True}
    job.recipe = replace(job.recipe, sites=tuple(replace(site, **fields) for site in job.recipe.sites))
    train_site(job, "a")
    assert not (job.path / "sites" / "a" / "model").exists()
    question = ask(99, "purple")
    limit = job.recipe.alignment.max_completion_length
    ((expected,),) = answer(*load_model(llava), [question], max_new_tokens=limit)
    assert open_site(job.recipe, job.path, "a", scores=job.recipe.scores).answer(ask_about(question)).answers == [
        expected
    ]
    (job.path / "sites" / "a" / "truth.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"truth\.json: the site's reference answers cannot be read"):
        open_site(job.recipe, job.path, "a", scores=job.recipe.scores)
    job.recipe = replace(job.recipe, sites=tuple(replace(s, finetune=FineTuneConfig()) for s in job.recipe.sites))
    with pytest.raises(CheckpointError, match=r"the model that answers questions is missing; train site a again"):
        open_site(job.recipe, job.path, "a", scores=job.recipe.scores)


@pytest.fixture
def public(job, hold, ask):
    """Two private questions a site; 40 public ones, half of them colour, which is all that site a wants."""
    hold(2)
    kinds = ("colour", "number")
    job.questions["public"] = [
        ask(200 + n, "red", text=f"question {n}?", question_type=kinds[n % 2], split="public") for n in range(40)
    ]
    return job


@pytest.mark.parametrize("owns", [0.0, 0.3, 1.0])
def test_a_site_owns_a_share_of_the_public_answers(public, owns):
    """Its two, and of the 20 that fit it those whose draw is below the share, whichever sites there are besides."""
    job = public
    job.recipe = replace(job.recipe, sites=tuple(replace(site, owns=owns) for site in job.recipe.sites), seed=3)
    fitting = [q for q in job.questions["public"] if q.question_type == "colour"]
    drawn = [q for q in fitting if uniform("owns", 3, "a", q.id) < owns]
    assert len(fitting) == 20 and (len(drawn) in (0, 20) if owns != 0.3 else 2 <= len(drawn) <= 10)
    expected = {key(q): (q.answer,) for q in (*job.private["a"], *drawn)}
    assert site_truth(job, "a") == expected and len(expected) == 2 + len(drawn)
    before = set(expected)
    job.questions["public"].reverse()
    vars(job).pop("shares", None)
    job.recipe = replace(job.recipe, sites=job.recipe.sites[:1])
    assert set(site_truth(job, "a")) == before


def test_a_larger_share_takes_nothing_away(public):
    books = []
    for owns in (0.2, 0.6):
        public.recipe = replace(public.recipe, sites=tuple(replace(s, owns=owns) for s in public.recipe.sites))
        books.append(set(site_truth(public, "a")))
    assert books[0] < books[1]


def test_questions_without_images_are_owned_by_their_words(public):
    """The same words about an image are another question."""
    words = replace(public.questions["public"][0], image=None)
    public.questions["public"] = [words]
    public.recipe = replace(public.recipe, sites=tuple(replace(s, owns=1.0) for s in public.recipe.sites))
    book = site_truth(public, "a")
    asked = [{"role": "user", "content": "question 0?"}]
    assert book[question_key([], asked)] == ("red",) and len(book) == 3


def test_a_share_of_owned_answers_that_is_none():
    for owns in (-0.1, 1.1, float("nan")):
        with pytest.raises(RecipeError, match=rf"owns must be in \[0, 1\], got {owns}; correct it"):
            SiteConfig("a", "accord/idefics3", owns=owns)


@pytest.fixture
def bring(job, ask, prefer, square, tmp_path):
    """Return a function that gives sites eight pairs of their own, each about a picture of the size named."""
    own = {"public": 40, "dev": 41, "test": 42}
    job.questions = {split: [replace(ask(size), image=square("red", (size, 32)))] for split, size in own.items()}
    vars(job)["private"] = {
        name: [replace(ask(size), image=square("red", (size, 32)))] for name, size in (("a", 50), ("b", 51))
    }

    def give(**widths):
        for name, width in widths.items():
            images = [square("red", (size, 32)) for size in (width, *range(100 * ord(name), 100 * ord(name) + 7))]
            pairs = [prefer(n, "red", "plum", images=(image,), constructed=False) for n, image in enumerate(images)]
            write_preferences(tmp_path / name / "pairs.jsonl", pairs)
        job.recipe = replace(
            job.recipe,
            sites=tuple(
                replace(site, preferences=str(tmp_path / site.name / "pairs.jsonl") if site.name in widths else "")
                for site in job.recipe.sites
            ),
        )
        return job

    return give


@pytest.mark.parametrize(("split", "width"), [("public", 40), ("dev", 41), ("test", 42)])
def test_own_pairs_are_not_about_the_servers_questions(bring, split, width):
    with pytest.raises(DataError, match=f"the preferences of site 'a' and the split '{split}' share 1 images"):
        site_pairs(bring(a=width), "a")


def test_own_pairs_are_not_about_another_sites_questions(bring):
    """Site a's pairs may be about its own question, 50 pixels wide, and about b's, 51, only where images are shared."""
    with pytest.raises(DataError, match="the preferences of site 'a' and site 'b' share 1 images"):
        site_pairs(bring(a=51), "a")
    assert len(site_pairs(bring(a=50), "a")) == 8
    job = bring(a=51)
    job.pairs.clear()
    job.recipe = replace(job.recipe, disjoint_images=False)
    assert len(site_pairs(job, "a")) == 8


def test_two_sites_pairs_are_not_about_one_image(bring, monkeypatch):
    """Before the first site trains, and again before the router does."""
    job = bring(a=60, b=60)
    trained = []
    monkeypatch.setattr(routing, "train_site", lambda job, name: trained.append(name))
    shared = "the preferences of site 'a' and the preferences of site 'b' share 1 images"
    monkeypatch.setattr(job, "need", lambda *_: None)  # as if both were trained
    for look in (check_sites, pipeline.execute, lambda job: open_federation(job, training=True)):
        with pytest.raises(DataError, match=shared):
            look(job)
    assert trained == []
    job.recipe = replace(job.recipe, disjoint_images=False)
    check_sites(job)


def test_the_answers_of_pairs_count_where_there_are_no_questions(bring, ask, monkeypatch):
    """Questions answer red 2, blue 1; with the pairs red 3, plum 1, blue 1. Only a site without questions uses them."""
    job = bring(a=60)
    questions, pairs = [ask(0), ask(1), ask(2, "blue")], site_pairs(job, "a")
    assert common_answers(questions, 2) == common_answers(questions, 2, ()) == ["red", "blue"]
    assert common_answers(questions, 9, pairs[:1]) == ["red", "blue", "plum"]
    ranked = []

    def train(model, pairs, held_out, vocabulary, config, **_):
        ranked.append(vocabulary)
        return Ranking({})

    monkeypatch.setattr(sites, "train_reward_model", train)
    for held in ([], questions):
        given = {"lora": None, "questions": held, "pairs": pairs, "held_out": [], "seed": 0, "log": None}
        fit_reward_model(job, "a", "accord/idefics3", None, REWARD, **given)
    assert ranked == [["plum", "red"], ["red", "blue"]]


def test_preferences_are_constructed_whatever_a_site_has(bring, monkeypatch, vqa, tmp_path):
    """Its own file is not what is written, and no file is replaced."""
    job = bring(a=60)
    rows = [("private", "colour", COLOURS[n % 4]) for n in range(4)] + [(s, "colour", "red") for s in job.questions]
    recipe = replace(job.recipe, questions=(Source(kind="folder", path=vqa("folder", rows)),))
    recipe = replace(recipe, sites=(replace(recipe.sites[0], finetune=None),))
    monkeypatch.setattr(sites, "answer", lambda model, processor, questions, **_: [["what"] for _ in questions])
    count = write_site_preferences(recipe, "a", tmp_path / "new.jsonl", seed=None, quiet=True)
    pairs = read_preferences(tmp_path / "new.jsonl")
    assert len(pairs) == count and all(pair.constructed for pair in pairs)
    own = Path(recipe.sites[0].preferences)
    before = own.read_bytes()
    for file in (own, tmp_path / "new.jsonl"):
        with pytest.raises(RecipeError, match=r"jsonl exists already and is not replaced; name another file"):
            write_site_preferences(recipe, "a", file, seed=None, quiet=True)
    assert own.read_bytes() == before


def test_a_mistaken_question_stays_one_group(prefer):
    """Four questions of two pairs, half mistaken: there a wrong answer beats the right one and the other wrong one."""
    pairs = [prefer(n, "red", wrong) for n in range(4) for wrong in ("blue", "green")]
    flipped = flip(pairs, 0.5, random.Random(0))
    groups = {n: [(p.chosen, p.rejected) for p in flipped if p.question_id == f"q{n}"] for n in range(4)}
    right = [("red", "blue"), ("red", "green")]
    mistaken = ([("blue", "red"), ("blue", "green")], [("green", "blue"), ("green", "red")])
    assert sum(found == right for found in groups.values()) == 2
    assert sum(found in mistaken for found in groups.values()) == 2
    assert len(group_pairs(flipped)) == 4
    assert flip(pairs, 0.0, random.Random(0)) == pairs
