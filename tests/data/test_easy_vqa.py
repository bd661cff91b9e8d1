import importlib.util
from collections import Counter
from importlib.machinery import ModuleSpec

import pytest

from accord.data.easy_vqa import EASY_VQA_ANSWERS, load_easy_vqa, split_of, type_of
from accord.data.images import load_image
from accord.errors import DataError


@pytest.fixture(scope="module")
def questions():
    return load_easy_vqa()


def test_counts_are_those_of_the_package(questions):
    """Its README: 38,575 training and 9,673 test questions; 28,407 + 7,136 = 35,543 of them are yes/no."""
    assert len(questions) == 38_575 + 9_673
    assert Counter(q.question_type for q in questions)["yes/no"] == 35_543
    assert Counter(q.split for q in questions)["test"] == 9_673
    assert {q.answer for q in questions} == set(EASY_VQA_ANSWERS) and len(EASY_VQA_ANSWERS) == 13


def test_fine_types_part_yes_no_by_what_is_asked_about(questions):
    """Of 35,543 yes/no questions 25,859 name a colour and 9,684 a shape; the others keep their type."""
    fine = load_easy_vqa(fine_types=True)
    counts = Counter(q.question_type for q in fine)
    assert counts == {"yes/no colour": 25_859, "yes/no shape": 9_684, "colour": 6_446, "shape": 6_259}
    assert [q.id for q in fine] == [q.id for q in questions]
    assert next(
        q for q in fine if q.text == "is there no circle?" or q.text == "is no circle present?"
    ).question_type == ("yes/no shape")


def test_compositions_keep_the_colour_of_triangles_and_the_shape_of_red_and_teal_apart(questions):
    composed = load_easy_vqa(compositions=True)
    counts = Counter(q.question_type for q in composed)
    assert counts["yes/no"] == 35_543
    assert counts["colour"] + counts["colour of triangles"] == 6_446 - 119
    assert counts["shape"] + counts["shape of red or teal"] == 6_259 - 276
    for q in composed:  # no picture that is asked about elsewhere may be of the other kind
        assert not (q.question_type == "colour" and "triangle" in q.text)
        assert not (
            q.question_type == "colour of triangles" and {"circle", "rectangle"} & {*q.text.rstrip("?").split()}
        )
        assert not (q.question_type == "shape" and {"red", "teal"} & {*q.text.split()})
    shapes = {q.image: q.answer for q in questions if q.question_type == "shape"}
    colours = {q.image: q.answer for q in questions if q.question_type == "colour"}
    assert {shapes.get(q.image) for q in composed if q.question_type == "colour of triangles"} == {None, "triangle"}
    assert {colours.get(q.image) for q in composed if q.question_type == "shape of red or teal"} == {
        None,
        "red",
        "teal",
    }
    assert {shapes.get(q.image) for q in composed if q.question_type == "colour"} == {None, "circle", "rectangle"}


def test_splits_follow_the_image_number(questions):
    """Training images 0-999, 1000-2799, 2800-2999, 3000-3999: 1000, 1800, 200, 1000 images; 1000 of the test side."""
    images = {
        split: {q.image for q in questions if q.split == split}
        for split in ("base", "private", "dev", "public", "test")
    }
    assert {split: len(found) for split, found in images.items()} == {
        "base": 1000, "private": 1800, "dev": 200, "public": 1000, "test": 1000,
    }  # fmt: skip
    assert sum(map(len, images.values())) == len(set.union(*images.values()))
    edges = [split_of("train", image) for image in (999, 1000, 2799, 2800, 2999, 3000)]
    assert edges == ["base", "private", "private", "dev", "dev", "public"]
    assert split_of("test", 0) == "test"


def test_first_rows_and_ids(questions):
    """The package's train/questions.json begins with ["what is the blue shape?", "rectangle", 0]."""
    first = questions[0]
    assert (first.id, first.text, first.answer) == ("easy_vqa-train-0", "what is the blue shape?", "rectangle")
    assert (first.question_type, first.split, first.domain) == ("shape", "base", "easy_vqa")
    assert load_image(first.image).size == (64, 64)
    assert questions[38_575].id == "easy_vqa-test-0"
    assert len({q.id for q in questions}) == len({(q.image, q.text) for q in questions}) == len(questions)
    assert [type_of(a) for a in ("yes", "no", "circle", "teal")] == ["yes/no", "yes/no", "shape", "colour"]


def install(tmp_path, monkeypatch, rows, images):
    """Stand a package with this data in for the real one."""
    for side in ("train", "test"):
        (tmp_path / "data" / side / "images").mkdir(parents=True)
        (tmp_path / "data" / side / "questions.json").write_text(rows)
        for image in images:
            (tmp_path / "data" / side / "images" / image).touch()
    spec = ModuleSpec("easy_vqa", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_repeated_rows_are_dropped_and_ids_do_not_shift(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, '[["a?", "yes", 0], ["a?", "yes", 0], ["b?", "red", 0]]', ["0.png"])
    assert [q.id for q in load_easy_vqa()][:2] == ["easy_vqa-train-0", "easy_vqa-train-2"]


def test_absent_or_damaged_package(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DataError, match="easy_vqa is not installed; run `pip install easy-vqa`"):
            load_easy_vqa()
    install(tmp_path, monkeypatch, '[["a?", "mauve", 0]]', ["0.png"])
    with pytest.raises(
        DataError, match=r"questions\.json: row 0 has the answer 'mauve' and the image 0\.png.*reinstall"
    ):
        load_easy_vqa()
    (tmp_path / "data/train/questions.json").write_text("[")
    with pytest.raises(DataError, match=r"train/questions\.json: cannot read easy-VQA .*; reinstall it"):
        load_easy_vqa()
