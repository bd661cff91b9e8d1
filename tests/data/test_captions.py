import json
import random
from collections import Counter

import pytest

from accord.data.captions import (
    PROMPT,
    Judged,
    Judgements,
    judged_good,
    judged_pairs,
    photographs,
    read_captions,
    read_judgements,
    topic_of,
    words_of,
)
from accord.errors import DataError, RecipeError
from accord.types import Question

DOG = ["A dog runs .", "The dog , running", "A brown dog ."]
MAN = ["A man sits .", "A man with a boy ."]


@pytest.fixture
def folder(tmp_path, square):
    """Two photographs of every split: a dog and a man."""
    place = tmp_path / "photographs"
    (place / "images").mkdir(parents=True)
    captions, judgements = [], []
    for n, split in enumerate(("base", "pretrain", "private", "public", "caption-test", "dev", "test")):
        for name, of_one, colour in ((f"{n}a", DOG, "red"), (f"{n}b", MAN, "blue")):
            (place / "images" / f"{name}.png").write_bytes(square(colour))
            captions.append({"image": f"images/{name}.png", "split": split, "captions": of_one})
            for own, caption in ((True, of_one[0]), (False, "Two cats ."), (False, "A very small thing ")):
                row = {"image": f"images/{name}.png", "split": split, "caption": caption}
                if split in ("private", "dev", "test"):
                    scores = [4, 4, 3] if own else [1, 2, 1]
                    judgements.append({**row, "experts": scores, "crowd_yes": 3 * own, "crowd_no": 3 - 3 * own})
    (place / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    (place / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judgements))
    return place


def judged(caption, experts=(), votes=None, *, photograph="0", topic="dogs"):
    return Judged(Question(photograph, b"image", PROMPT, caption, topic, "private"), experts, votes)


def test_words_are_lower_case_and_without_punctuation():
    assert words_of("A man 's T-shirt , red !") == ["a", "man", "'s", "t", "shirt", "red"]
    assert words_of(" ' . ") == []


def test_a_topic_is_that_of_most_captions():
    """Of two captions one is not more than half; a child in a girlfriend or a dog in a hotdog is none."""
    assert topic_of(["a puppy", "dogs", "a man"]) == "dogs"
    assert topic_of(["a boy", "a kid with a dog", "a toddler"]) == "children"
    assert topic_of(["a dog", "a man"]) == "others"
    assert topic_of(["a hotdog", "a girlfriend"]) == "others"


def test_captions_are_read_by_split(folder):
    """Each caption of base and private photographs is an answer; a prompt, a dev or a test photograph has one."""
    found = read_captions(folder)
    assert Counter(q.split for q in found if q.id[0] != "1") == {"base": 5, "private": 5, "public": 2, "test": 2}
    first = found[0]
    assert (first.id, first.text, first.answer) == ("0a", PROMPT, "a dog runs")
    assert first.references == ("the dog running", "a brown dog")
    assert (first.question_type, first.domain) == ("dogs", "photographs")
    assert first.image == folder / "images" / "0a.png"
    assert [q.id for q in found[:3]] == ["0a"] * 3 and found[1].references == ("a dog runs", "a brown dog")
    (test,) = [q for q in found if q.split == "test" and q.question_type == "others"]
    assert (test.id, test.answer, test.references) == ("4b", "a man sits", ("a man with a boy",))


def test_what_judges_is_read_by_nobody_else(folder):
    """Those two photographs of `dev` and `test` each, and of `pretrain` whatever its draw gives the judge."""
    theirs = {q.id for q in read_captions(folder, splits=("judge",))}
    assert {"5a", "5b", "6a", "6b"} <= theirs
    assert not theirs & {q.id for q in read_captions(folder)}


def test_pretraining_photographs_go_by_their_names(folder):
    """Of 400 photographs some thirty are dev, some 200 the judge's and the others sites'; always the same."""
    rows = [{"image": "images/1a.png", "split": "pretrain", "captions": DOG}]
    for n in range(400):
        (folder / "images" / f"p{n}.png").write_bytes((folder / "images" / "1a.png").read_bytes())
        rows.append({"image": f"images/p{n}.png", "split": "pretrain", "captions": DOG[:1]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_captions(folder, splits=("dev", "judge", "private"))
    count = Counter(q.split for q in found if q.id.startswith("p"))
    assert 15 < count["dev"] < 50 and 160 < count["judge"] < 240 and sum(count.values()) == 400
    assert [q.split for q in found] == [q.split for q in read_captions(folder, splits=("dev", "judge", "private"))]


def test_long_captions_train_nothing(folder):
    row = {"image": "images/0a.png", "split": "base", "captions": ["a dog " * 8, "a dog"]}
    (folder / "captions.jsonl").write_text(json.dumps(row) + "\n")
    assert [q.answer for q in read_captions(folder)] == ["a dog"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"split": "train"}, "unknown split 'train'"), ({"captions": []}, "captions must be a list of at least one")],
)
def test_captions_that_cannot_be_read(folder, changes, message):
    row = {"image": "images/0a.png", "split": "base", "captions": DOG, **changes}
    (folder / "captions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        read_captions(folder)


def test_judgements_are_read_with_the_topic_of_their_photograph(folder):
    rows = read_judgements(folder, split="private")
    assert [(row.photograph.id, row.caption, row.experts, row.votes) for row in rows[:2]] == [
        ("2a", "a dog runs", (4, 4, 3), (3, 0)),
        ("2a", "two cats", (1, 2, 1), (0, 3)),
    ]
    assert {row.photograph.question_type for row in rows} == {"dogs", "others"}
    assert {row.photograph.id for row in read_judgements(folder, split="judge")} == {"5a", "5b", "6a", "6b"}
    assert [photograph.id for photograph in photographs(rows)] == ["2a", "2b"]


@pytest.mark.parametrize("split", ["private", "judge"])
def test_a_photograph_has_one_split(folder, split):
    """One that is tested on is not judged as a private one, whichever split is asked for."""
    row = {"image": "images/4a.png", "split": "private", "caption": "a dog", "experts": [4, 4, 4]}
    with (folder / "judgements.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"4a.png is in the split 'private' here and in 'caption-test' in captions"):
        read_judgements(folder, split=split)


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("changes", [{"experts": [5, 1, 1]}, {"crowd_yes": 0, "crowd_no": 0}, {"crowd_no": None}])
def test_judgements_that_cannot_be_read(folder, changes):
    row = {"image": "images/2a.png", "split": "private", "caption": "a dog", "crowd_yes": 1, "crowd_no": 1, **changes}
    (folder / "judgements.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"experts must be scores of 1 to 4|must be numbers of votes"):
        read_judgements(folder, split="private")


def test_pairs_are_of_what_people_preferred():
    """Experts' means: a 3, b 2, c 2, so a over b and a over c. Votes: d 2/3, e 1/3, so d over e; not across the two."""
    rows = [
        judged("a", (3, 3, 3)),
        judged("b", (1, 2, 3)),
        judged("c", (2, 2, 2)),
        judged("d", votes=(2, 1)),
        judged("e", votes=(1, 2)),
        judged("f", (1, 1, 1), photograph="1"),
    ]
    pairs = judged_pairs(rows, Judgements(), random.Random(0))
    assert {(p.question_id, p.chosen, p.rejected) for p in pairs} == {("0", "a", "b"), ("0", "a", "c"), ("0", "d", "e")}
    assert {(p.question_type, p.constructed, p.images) for p in pairs} == {("dogs", False, (b"image",))}
    assert len(judged_pairs(rows, Judgements(rejected_per_caption=1), random.Random(0))) == 2


def test_one_expert_alone_decides_and_the_crowd_may_be_away():
    """To the first expert b and c differ as they do to nobody else: a 3, c 2, b 1."""
    rows = [judged("a", (3, 3, 3)), judged("b", (1, 2, 3)), judged("c", (2, 2, 2), (0, 1)), judged("d", votes=(1, 0))]
    pairs = judged_pairs(rows, Judgements(experts=(0,), crowd=False), random.Random(0))
    assert {(p.chosen, p.rejected) for p in pairs} == {("a", "b"), ("a", "c"), ("c", "b")}


def test_experts_decide_where_the_crowd_thinks_otherwise():
    rows = [judged("a", (3, 3, 3), (0, 3)), judged("b", (1, 1, 1), (3, 0))]
    pairs = judged_pairs(rows, Judgements(), random.Random(0))
    assert [(p.chosen, p.rejected) for p in pairs] == [("a", "b")]


def test_good_captions_are_those_that_people_found_good():
    """A mean of 3 is good and one of 8/3 is not; votes count where no expert judged; 16 words are too long."""
    rows = [
        judged("a", (3, 3, 3), (0, 3)),
        judged("b", (2, 3, 3), (3, 0)),
        judged("c", votes=(2, 1)),
        judged("d", votes=(1, 1)),
        judged("e " * 16, (4, 4, 4)),
    ]
    good = judged_good(rows, Judgements())
    assert [(q.answer, q.references) for q in good] == [("a", ("c",)), ("c", ("a",))]
    assert [q.answer for q in judged_good(rows, Judgements(crowd=False, experts=(1,)))] == ["a", "b", "e " * 16][:2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": (3,)}, "experts are some of 0, 1 and 2"),
        ({"experts": (1, 1)}, "experts are some of 0, 1 and 2"),
        ({"experts": (), "crowd": False}, "judgements of no expert"),
        ({"rejected_per_caption": 0}, "rejected_per_caption must be at least 1"),
    ],
)
def test_judgements_that_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        Judgements(**settings)
