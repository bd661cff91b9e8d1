"""A site that holds people's judgements makes its pairs of them, and of what is put together without judgement."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from accord.data.captions import Judgements, read_captions
from accord.data.preferences import write_preferences
from accord.errors import DataError, RecipeError
from accord.models.finetune import FineTuneConfig
from accord.recipe import Policy, Recipe, SiteConfig, Source
from accord.stages import sites
from accord.stages.job import Job
from accord.stages.sites import check_sites, site_pairs

EVERYONE = Judgements()
SAID = "what the policy says"


@pytest.fixture
def judged(tmp_path, llava, square, monkeypatch):
    """Return a job of two sites, of dogs and of all else: eight photographs each, with a good and a bad caption."""
    (tmp_path / "images").mkdir()
    captions, judgements = [], []
    for n in range(16):
        name, what = f"images/{n}.png", "dog" if n < 8 else "man"
        (tmp_path / name).write_bytes(square("red", (32 + n, 32)))
        captions.append({"image": name, "split": "private", "captions": [f"A {what} of mine {n} ."]})
        for caption, score in ((f"A {what} {n} .", 4), ("A cat .", 1)):
            judgements.append({"image": name, "split": "private", "caption": caption, "experts": [score] * 3})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    (tmp_path / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judgements))
    monkeypatch.setattr(sites, "answer", lambda model, processor, questions, **_: [[SAID] for _ in questions])

    def make(held=EVERYONE, **fields):
        site = {"checkpoint": llava, "judgements": held, "finetune": None, **fields}
        two = (
            SiteConfig(name="a", question_types=("dogs",), **site),
            SiteConfig(name="b", question_types=("others",), **site),
        )
        recipe = make_recipe(two, tmp_path, llava)
        job = Job(recipe, None, quiet=True)
        job.questions = {"public": [], "dev": [], "test": []}
        return job

    return make


def make_recipe(two, folder, checkpoint):
    source = Source(kind="captions", path=str(folder))
    return Recipe("x", two, questions=(source,), policy=Policy(checkpoint))


def test_a_site_has_judgements_of_its_own_topic_alone(judged):
    """Eight photographs, each with one judged pair; nothing else where nothing is constructed."""
    job = judged(Judgements(constructed=False))
    pairs = site_pairs(job, "a")
    assert {(p.chosen, p.rejected) for p in pairs} == {(f"a dog {n}", "a cat") for n in range(8)}
    assert not any(p.constructed for p in pairs)
    assert {p.question_id for p in site_pairs(job, "b")} == {str(n) for n in range(8, 16)}
    assert job.private == {"a": [], "b": []}


def test_pairs_without_judgement_have_a_caption_that_was_judged_good(judged):
    """Rejected are what the policy says, good captions of other photographs and malformed ones; no site's own caption.

    Photograph n's caption is chosen over another photograph's. What nobody judged, "of mine", is not known to a site.
    """
    made = [pair for pair in site_pairs(judged(), "a") if pair.constructed]
    assert {pair.chosen for pair in made} == {f"a dog {n}" for n in range(8)}
    assert all(pair.chosen == f"a dog {pair.question_id}" for pair in made)
    rejected = {pair.rejected for pair in made}
    assert SAID in rejected and rejected & {f"a dog {n}" for n in range(8)} and "a cat" not in rejected
    assert not any("of mine" in text for text in rejected)


def test_a_site_may_hold_captions_beside_judgements(judged):
    """Where it tunes a backbone it is dealt its captions too, and makes pairs of them."""
    job = judged(finetune=FineTuneConfig(steps=1))
    job.questions["private"] = read_captions(job.recipe.captions)
    chosen = {pair.chosen for pair in site_pairs(job, "a")}
    assert chosen == {f"a dog {n}" for n in range(8)} | {f"a dog of mine {n}" for n in range(8)}


@pytest.mark.parametrize("split", ["public", "dev", "test"])
@pytest.mark.parametrize("look", [check_sites, lambda job: site_pairs(job, "b")])
def test_what_was_judged_is_not_asked_chosen_or_tested_on(judged, ask, split, look, square):
    """The same bytes under another name are one photograph: the ninth, of site b."""
    job = judged()
    check_sites(job)
    job.questions[split] = [replace(ask(0), image=square("red", (40, 32)))]
    with pytest.raises(DataError, match=f"the judgements of site 'b' and the split '{split}' share 1 images"):
        look(job)


def test_what_was_judged_is_at_one_site(judged, ask, square, prefer, tmp_path):
    """Neither another site's questions nor its pairs are about the ninth photograph, unless the recipe allows it."""
    image = square("red", (40, 32))
    job = judged()
    vars(job)["private"] = {"a": [replace(ask(0), image=image)], "b": []}
    with pytest.raises(DataError, match="the judgements of site 'b' and site 'a' share 1 images"):
        check_sites(job)
    job.recipe = replace(job.recipe, disjoint_images=False)
    check_sites(job)
    write_preferences(
        tmp_path / "own" / "pairs.jsonl",
        [prefer(n, "red", "plum", images=(image,), constructed=False) for n in range(8)],
    )
    job = judged()
    a, b = job.recipe.sites
    a = replace(a, judgements=None, preferences=str(tmp_path / "own" / "pairs.jsonl"))
    job.recipe = replace(job.recipe, sites=(a, b))
    with pytest.raises(DataError, match="the preferences of site 'a' and the judgements of site 'b' share 1 images"):
        check_sites(job)


def test_a_site_that_works_alone_has_its_own_judgements_only(judged):
    """The photographs of another site are elsewhere; what it is dealt is what it is dealt beside the other."""
    job = judged()
    beside = [row.photograph.id for row in job.judged["a"]]
    folder = Path(job.recipe.captions)
    for name in ("captions.jsonl", "judgements.jsonl"):
        rows = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join(rows[: len(rows) // 2]) + "\n")  # those of dogs
    alone = judged()
    alone.alone = "a"
    assert [row.photograph.id for row in alone.judged["a"]] == beside and set(alone.judged) == {"a"}


def test_a_recipe_without_a_judge_is_told_how_to_make_one(judged):
    with pytest.raises(RecipeError, match="the recipe names none; make one with `accord judge`"):
        _ = judged().judge
