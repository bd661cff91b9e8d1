"""Questions and pairs about several images: read, their places, and on which side of a split they are."""

import json
import random
from dataclasses import replace

import pytest

from accord.data.conversation import read_prompt
from accord.data.dealing import deal, kind_of
from accord.data.preferences import build_preferences, read_preferences, to_dataset, write_preferences
from accord.data.questions import image_identity, read_vqa_folder, split_by_image, together
from accord.data.rows import BadRow
from accord.data.sites import SiteShare, check_disjoint, share_out
from accord.errors import DataError
from accord.evaluation.accuracy import images_by_type, shuffle_images
from accord.rewards.train import keep_back
from accord.types import at_places, prompt_of, subjects_of

IMAGE = {"type": "image"}


def words(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("text", "images", "blocks"),
    [
        ("is <image> like <image>?", 2, [words("is"), IMAGE, words("like"), IMAGE, words("?")]),
        ("<image>\n<image>\nalike?", 2, [IMAGE, IMAGE, words("alike?")]),
        ("is <image> the later?", 2, [IMAGE, words("is"), IMAGE, words("the later?")]),
        ("alike?", 3, [IMAGE, IMAGE, IMAGE, words("alike?")]),
        ("what is <image>?", 0, [words("what is <image>?")]),
        ("<image> or <image>?", 1, [IMAGE, words("or <image>?")]),
    ],
)
def test_images_stand_at_their_places_and_else_first(text, images, blocks):
    assert at_places(text, images) == blocks


def test_the_places_of_a_prompt(question):
    """In plain text, over two turns, and one image of two without a place; a third place has no image."""
    two = [{"role": "user", "content": "<image> old"}, {"role": "assistant", "content": "yes"}]
    read = read_prompt([*two, {"role": "user", "content": "and <image>?"}], 2)
    assert [turn["content"] for turn in read] == [
        [IMAGE, words("old")],
        [words("yes")],
        [words("and"), IMAGE, words("?")],
    ]
    assert read_prompt("is <image> later?", 2)[0]["content"] == [IMAGE, words("is"), IMAGE, words("later?")]
    with pytest.raises(BadRow, match=r"the prompt has 3 places '<image>' and the row 2 images"):
        read_prompt("<image> <image> <image>", 2)


def test_a_folder_of_questions_about_one_and_about_two(vqa_folder, row, picture):
    """A list is several images, in their order; the tag of a single one is taken out, as before."""
    two = {"image": ["images/1.png", "images/2.png"], "question": "is <image> like <image>?"}
    folder = vqa_folder([row(0, question="<image>\nwhat colour?"), row(1, **two), row(2, images=["images/3.png"])])
    one, both, listed = read_vqa_folder(folder)
    assert one.text == "what colour?" and one.images == (folder / "images/0.png",) and not one.further
    assert both.images == (folder / "images/1.png", folder / "images/2.png") and both.image == both.images[0]
    assert prompt_of(both)[0]["content"] == [words("is"), IMAGE, words("like"), IMAGE, words("?")]
    assert prompt_of(one)[0]["content"] == [IMAGE, words("what colour?")]
    assert listed.images == (folder / "images/2.png",)  # `image` comes before `images`


def several(question, *groups):
    """Questions about pictures of these numbers."""
    made = [question(n, image=numbers[0]) for n, numbers in enumerate(groups)]
    other = [[question(0, image=number).image for number in numbers[1:]] for numbers in groups]
    return [replace(q, further=tuple(more)) for q, more in zip(made, other, strict=True)]


def test_questions_that_share_an_image_go_together(question):
    """0-1, 1-2 and 2-3 are one, by way of each other; 4 is alone; 5-6 and 6 are one."""
    asked = several(question, (0, 1), (1, 2), (4,), (3, 2), (5, 6), (6,))
    identify = image_identity()
    keys = together([q.subjects for q in asked], identify)
    linked = [{0, 1, 3}, {2}, {4, 5}]
    assert [{n for n, key in enumerate(keys) if key == keys[min(each)]} for each in linked] == linked
    assert keys[2] == identify(asked[2].image)
    assert keys[0] == min(identify(image) for q in asked[:2] for image in q.images + asked[3].images)
    assert together([q.subjects for q in asked[::-1]], identify) == keys[::-1]
    assert images_by_type(asked, identify) == {"colour": [0, 0, 1, 0, 2, 2]}


@pytest.mark.parametrize("seed", range(3))
def test_no_image_is_on_two_sides(question, seed):
    """120 pictures in 40 groups of three that share pictures: splits, sites and pairs kept back have none in common."""
    asked = several(question, *[(3 * n, 3 * n + 1) for n in range(40)], *[(3 * n + 2, 3 * n) for n in range(40)])
    split = split_by_image(asked, {"private": 0.5, "test": 0.5}, seed=seed)
    sides = [[q for q in split if q.split == name] for name in ("private", "test")]
    dealt = share_out(asked, [SiteShare("a"), SiteShare("b")], seed=seed)
    mixed = {site: {kind_of(q): 1.0 for q in asked} for site in "ab"}
    drawn = deal(asked, mixed, seed=seed)
    for parts in (sides, [*dealt.values()], [*drawn.values()]):
        assert sum(map(len, parts)) == 80 and min(map(len, parts)) > 10
        check_disjoint({str(n): subjects_of(part) for n, part in enumerate(parts)})


def test_a_shared_second_image_is_found(question):
    first, second = several(question, (0, 1), (2, 1))
    with pytest.raises(DataError, match="a and b share 1 images"):
        check_disjoint({"a": subjects_of([first]), "b": subjects_of([second])})


def test_pairs_that_share_an_image_are_kept_back_together(pair, picture):
    pairs = [pair(n, images=(picture(n // 2), picture(10 + n // 2))) for n in range(12)]
    pairs += [pair(20 + n, images=(picture(10 + n),)) for n in range(6)]
    for seed in range(4):
        trained, kept = keep_back(pairs, 0.4, random.Random(seed))
        assert kept and len(trained) + len(kept) == 18
        check_disjoint({"trained": subjects_of(trained), "kept": subjects_of(kept)})
    with pytest.raises(DataError, match="linked by images that they share"):
        keep_back([pair(n, images=(picture(n), picture(n + 1))) for n in range(9)], 0.5, random.Random(0))


def test_pairs_come_back_as_they_were_written(pair, picture, tmp_path, question):
    """Two images a pair, one pair with one: written, read, and in TRL's form; constructed pairs have all images."""
    pairs = [
        replace(pair(n, images=(picture(n), picture(n + 1))), prompt=prompt_of(q))
        for n, q in enumerate(compared(question))
    ]
    write_preferences(tmp_path / "pairs.jsonl", [*pairs, pair(99)])
    back = read_preferences(tmp_path / "pairs.jsonl")
    assert [p.prompt for p in back] == [*(p.prompt for p in pairs), pair(99).prompt]
    assert [[image.read_bytes() for image in p.images] for p in back] == [list(p.images) for p in [*pairs, pair(99)]]
    rows = to_dataset(pairs)
    assert [len(row["images"]) for row in rows] == [2] * len(pairs)
    made = build_preferences(compared(question), rejected_per_question=1, generator=random.Random(0))
    assert {len(p.images) for p in made} == {2} and made[0].prompt == pairs[0].prompt


def compared(question):
    asked = several(question, *[(n, n + 1) for n in range(9)])
    return [replace(q, text="is <image> like <image>?", answer=("yes", "no")[n % 2]) for n, q in enumerate(asked)]


def test_a_file_of_pairs_with_tags(tmp_path, picture):
    (tmp_path / "images").mkdir()
    for n in range(3):
        (tmp_path / "images" / f"{n}.png").write_bytes(picture(n))
    row = {
        "prompt": "is <image> like <image>?",
        "chosen": "yes",
        "rejected": "no",
        "images": ["images/0.png", "images/1.png"],
    }
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({**row, "question_id": str(n)}) + "\n" for n in range(8)))
    first = read_preferences(tmp_path / "pairs.jsonl")[0]
    assert (
        first.prompt[0]["content"] == [words("is"), IMAGE, words("like"), IMAGE, words("?")] and len(first.images) == 2
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_image_of_a_question_is_shuffled(question, seed):
    """Six pictures in pairs: none keeps its place, and each question has two others."""
    asked = several(question, (0, 1), (2, 3), (4, 5))
    shuffled = shuffle_images(asked, seed)
    for before, after in zip(asked, shuffled, strict=True):
        assert len(set(after.images)) == 2
        assert all(a != b for a, b in zip(before.images, after.images, strict=True))
    assert sorted(subjects_of(shuffled)) == sorted(subjects_of(asked))
