from dataclasses import replace

import pytest
import torch

from accord.data.dealing import Dealing
from accord.errors import CheckpointError, DataError, RecipeError
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.recipe import Source
from accord.stages.job import load_questions
from accord.stages.silos import cut_silos

SITES = ("north", "south")
RULES = ("image", "text", "joint", "cross")
SHADES = {"red": "yes", "darkred": "yes", "firebrick": "yes", "blue": "two", "darkblue": "two", "navy": "two"}


@pytest.fixture
def encoder(llava):
    return Encoder(*load_model(llava))


@pytest.fixture
def captions(ask):
    """Three reddish pictures whose captions are alike, and four bluish ones, two captions a picture."""
    shades = {**SHADES, "mediumblue": "two"}
    return [
        ask(n, shade, text="describe it.", answer=f"{said} {said} {more}")
        for n, (shade, said) in enumerate(shades.items())
        for more in ("squares", "colour")
    ]


@pytest.mark.parametrize("rule", RULES)
def test_what_is_alike_is_at_one_site_and_the_largest_silo_is_the_first(encoder, captions, rule):
    found = cut_silos(captions, SITES, encoder, rule, seed=0)
    assert found.questions == {"north": captions[6:], "south": captions[:6]}
    assert {site: points.shape for site, points in found.points.items()} == {"north": (4, 2), "south": (3, 2)}


@pytest.mark.parametrize("rule", RULES)
def test_a_picture_is_at_one_site_with_all_its_captions_in_any_order(encoder, captions, rule):
    """The captions of a picture belong to both kinds now; they are not torn apart."""
    mixed = [replace(q, answer="yes" if n % 2 else "two") for n, q in enumerate(captions)]
    mixed[0] = replace(mixed[0], answer="red")  # so that texts differ at all
    found = cut_silos(mixed, SITES, encoder, rule, seed=0).questions
    assert sorted(len(own) for own in found.values()) == sorted(
        2 * len({q.image for q in own}) for own in found.values()
    )
    assert sum(map(len, found.values())) == len(mixed)
    backward = cut_silos(mixed[::-1], SITES, encoder, rule, seed=0).questions
    assert {site: own[::-1] for site, own in backward.items()} == found


def test_a_site_keeps_no_more_pictures_than_it_may(encoder, captions):
    whole = cut_silos(captions, SITES, encoder, "image", seed=0).questions
    found = cut_silos(captions, SITES, encoder, "image", seed=0, limit=2)
    for site, own in found.questions.items():
        assert len({q.image for q in own}) == 2 == len(found.points[site]) and set(own) < set(whole[site])


def test_questions_about_pictures_are_texts_with_their_answers(encoder, ask):
    """By text, questions that differ are compared with their answers, and those without a picture too."""
    questions = [
        replace(ask(n, text=text, answer=said), image=None)
        for n, (text, said) in enumerate(
            [("is it red?", "yes"), ("is it red? ", "no"), ("how many squares?", "two"), ("how many squares? ", "one")]
        )
    ]
    found = cut_silos(questions, SITES, encoder, "text", seed=0).questions
    assert sorted(sorted(q.id for q in own) for own in found.values()) == [["q0", "q1"], ["q2", "q3"]]
    with pytest.raises(DataError, match=r"question 'q\d' has no picture, and .* dealing\.features = \"text\""):
        cut_silos(questions, SITES, encoder, "image", seed=0)


def test_what_cannot_be_cut(encoder, captions, texts_only):
    with pytest.raises(DataError, match="2 clusters need as many items that differ, and of 1 items 1 do"):
        cut_silos(captions[:2], SITES, encoder, "image", seed=0)
    with pytest.raises(DataError, match="no private question is there"):
        cut_silos([], SITES, encoder, "image", seed=0)
    with pytest.raises(CheckpointError, match="reads no pictures"):
        cut_silos(captions, SITES, Encoder(*load_model(texts_only)), "image", seed=0)


def test_a_recipe_deals_by_clusters(job, captions):
    """Sites hold what they are dealt, whatever types they would name; elsewhere nothing is cut."""
    job.questions["private"] = captions
    with pytest.raises(RecipeError, match='add \\[dealing\\] with by = "clusters"'):
        _ = job.silos
    job.recipe = replace(
        job.recipe,
        dealing=Dealing(by="clusters", features="image", images=2),
        sites=tuple(replace(site, question_types=()) for site in job.recipe.sites),
    )
    assert {site: len({q.image for q in own}) for site, own in job.private.items()} == {"a": 2, "b": 2}
    assert not set(job.private["a"]) & set(job.private["b"])
    assert job.shares["a"].wants(captions[0]) and torch.isfinite(job.silos.points["a"]).all()


def test_a_site_that_works_alone_has_no_pool_to_cut(job, captions):
    job.recipe = replace(
        job.recipe,
        dealing=Dealing(by="clusters"),
        sites=tuple(replace(site, question_types=()) for site in job.recipe.sites),
    )
    job.alone = "a"
    job.questions = {"private": captions}
    with pytest.raises(RecipeError, match="'a' works alone and has its own"):
        _ = job.private


def test_a_source_of_captions_is_read_as_a_recipe_says(tmp_path, square):
    """Splits of the file by the names that the recipe gives them."""
    names = {"pretrain": "private", "public": "public", "dev": "dev", "held-out": "test"}
    lines = []
    for name, colour in zip(names, ("red", "blue", "green", "yellow"), strict=True):
        (tmp_path / f"{name}.png").write_bytes(square(colour))
        lines.append(
            f'{{"image": "{name}.png", "captions": ["A {colour} one.", "It is {colour}."], "split": "{name}"}}'
        )
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n")
    told = {"text_column": "captions", "prompt": "say it.", "splits": names, "domain": "d"}
    found = load_questions([Source(kind="image-text", path=str(tmp_path / "c.jsonl"), **told)])
    assert {split: [(q.text, q.answer) for q in own] for split, own in found.items()}["private"] == [
        ("say it.", "A red one."),
        ("say it.", "It is red."),
    ]
    assert {split: len(own) for split, own in found.items()} == dict.fromkeys(names.values(), 2)
