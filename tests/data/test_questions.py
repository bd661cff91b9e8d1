import json
import warnings
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accord.data.images import image_id
from accord.data.questions import (
    SPLITS,
    normalise_answer,
    read_vqa_dataset,
    read_vqa_folder,
    split_by_image,
    uniform,
)
from accord.errors import DataError, DataWarning, RecipeError
from accord.types import Question

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  Left  Lung. ", "left lung"),
        ("YES", "yes"),
        ("", ""),
        (".", ""),
        ("3.5", "3.5"),
        ("a\tb\n", "a b"),
        ("x .", "x"),
    ],
)
def test_normalise_answer(text, normal):
    assert normalise_answer(text) == normal


@settings(deadline=None)
@given(st.text())
def test_normalised_answers_have_no_upper_case_and_no_loose_space(text):
    normal = normalise_answer(text)
    assert normal == " ".join(normal.split()) == normal.lower()


def test_reads_a_folder(vqa_folder, row):
    """The type falls back from question_type to answer_type to "all", the split to "test"; numbers become text."""
    lines = [
        row(0, question_type="colour", answer_type="open", split="private"),
        row(1, answer_type="closed", answer=" Yes "),
        row(2, answer=3),
    ]
    folder = vqa_folder(lines)
    questions = read_vqa_folder(folder)
    assert questions[0] == Question(
        "q0", folder / "images/0.png", "what colour?", "red", "colour", "private", domain="ward"
    )
    assert [(q.question_type, q.split, q.answer) for q in questions[1:]] == [
        ("closed", "test", "Yes"),
        ("all", "test", "3"),
    ]
    assert [q.id for q in read_vqa_folder(folder, splits={"private"})] == ["q0"]


def test_line_separators_and_a_byte_order_mark_inside_the_file(vqa_folder, row):
    """U+2028 is a letter to JSON and a line end to str.splitlines."""
    first = b"\xef\xbb\xbf" + json.dumps(row(0)).encode() + b"\r"
    folder = vqa_folder([first, json.dumps(row(1, question="a\u2028b"), ensure_ascii=False)])
    assert [q.text for q in read_vqa_folder(folder)] == ["what colour?", "a\u2028b"]


BAD_CELLS = {
    "missing": ({"image": "images/gone.png"}, r"gone\.png: cannot read the image, there is no such file; correct"),
    "climbs": (
        {"image": "../ward/images/1.png"},
        r"the image path '\.\./ward/images/1\.png' leaves the data's folder; keep",
    ),
    "climbs as on Windows": ({"image": "..\\1.png"}, "leaves the data's folder"),
    "absolute": ({"image": "/etc/hostname"}, "the image path '/etc/hostname' leaves the data's folder"),
    "drive": ({"image": "C:\\1.png"}, "leaves the data's folder"),
    "no path": ({"image": None}, "the image is empty or no path, got None"),
    "not text": ({"image": 3}, r"no path, got 3"),
    "one of several images": ({"image": ["images/1.png", "images/corrupt.png"]}, r"corrupt\.png: not a readable"),
    "several images in the place of one": (
        {"image": ["images/1.png", ["images/1.png", "images/2.png"]]},
        "the row has 2 images, and there is place for one; keep one",
    ),
    "more places than images": (
        {"image": ["images/1.png", "images/2.png"], "question": "<image> or <image> or <image>?"},
        "the question has 3 places '<image>' for its 2 images; leave as many, or fewer",
    ),
    "empty question": ({"question": "  "}, "the question is empty"),
    "empty answer": ({"answer": ""}, "the answer is empty"),
    "null answer": ({"answer": None}, "the answer is empty"),
    "full stop": ({"answer": "."}, r"the answer '\.' is empty once normalised"),
    "list answer": ({"answer": [["red"]]}, r"the answer is not text but \['red'\]"),
    "no answers": ({"answer": ["", None]}, "the answer is empty"),
    "corrupt": ({"image": "images/corrupt.png"}, r"corrupt\.png: not a readable PNG, JPEG or WEBP image"),
    "oversized": ({"image": "images/huge.png"}, r"huge\.png: the image has 8000 x 7000 = 56000000 pixels, over"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_bad_row_is_left_out_and_counted(vqa_folder, row, name):
    """One bad row of 10 (10 %): nine are left; it is the fourth line of the file."""
    cells, reason = BAD_CELLS[name]
    folder = vqa_folder([row(i, **(cells if i == 3 else {})) for i in range(10)])
    (folder / "images/corrupt.png").write_bytes(b"not an image")
    Image.new("1", (8000, 7000)).save(folder / "images/huge.png")
    with pytest.warns(DataWarning, match=rf"left out 1 of 10 rows: \S*questions\.jsonl:4: .*{reason}"):
        questions = read_vqa_folder(folder)
    assert [q.id for q in questions] == [f"q{i}" for i in range(10) if i != 3]


def test_an_empty_line_is_left_out_and_counted(vqa_folder, row):
    folder = vqa_folder([row(0), row(1), "", row(2), row(3)])
    with pytest.warns(DataWarning, match=r"left out 1 of 5 rows: \S*:3: the line is empty"):
        assert len(read_vqa_folder(folder)) == 4


def test_the_warning_is_one_and_shows_three_reasons(vqa_folder, row):
    """4 of 20 rows is 20 % exactly, which passes; lines 1 to 4 are bad, and the fourth is not shown."""
    folder = vqa_folder([row(i, **({"answer": ""} if i < 4 else {})) for i in range(20)])
    with pytest.warns(DataWarning) as caught:
        assert len(read_vqa_folder(folder)) == 16
    (warning,) = caught
    text = str(warning.message)
    assert "left out 4 of 20 rows" in text
    assert "jsonl:3:" in text and "jsonl:4:" not in text and text.endswith("...")
    assert warning.filename == __file__


def test_more_than_a_fifth_bad_is_an_error(vqa_folder, row):
    """5 of 20 rows is 25 %."""
    folder = vqa_folder([row(i, **({"answer": ""} if i < 5 else {})) for i in range(20)])
    with pytest.raises(
        DataError, match=r"5 of 20 rows cannot be used, more than 20%: .*jsonl:1: the answer is empty.*Corr"
    ):
        read_vqa_folder(folder)


STRUCTURAL = {
    "not UTF-8": (b'{"id": "\xe9"}', r"questions\.jsonl:2: not UTF-8, byte 0xe9 at position 8; save the file as UTF-8"),
    "not JSON": (
        "{'id': 1}",
        r"questions\.jsonl:2: not valid JSON \(.*\), got \"\{'id': 1\}\"; write one object a line",
    ),
    "nested beyond measure": ("[" * 200_000, r"questions\.jsonl:2: not valid JSON"),
    "not an object": ('["q1"]', r"questions\.jsonl:2: expected a JSON object, got '\[\"q1\"\]'; write"),
    "missing column": (
        '{"id": "q1", "image": "images/1.png", "query": "?", "answer": "a"}',
        r"questions\.jsonl:2: column 'question' is missing; the columns present are 'id', 'image', 'query', 'ans",
    ),
    "empty object": ("{}", r"jsonl:2: column 'id' is missing; the columns present are none"),
    "duplicate id": (
        '{"id": "q0", "image": "images/1.png", "question": "?", "answer": "a"}',
        r"jsonl:2: the id 'q0' was used before, at \S*jsonl:1; give every question its own id",
    ),
    "unknown split": (
        '{"id": "q1", "image": "images/1.png", "question": "?", "answer": "a", "split": "train"}',
        r"jsonl:2: unknown split 'train'; use base, private, public, dev, test, or leave the field out",
    ),
}


@pytest.mark.parametrize("name", STRUCTURAL)
def test_a_fault_of_the_file_is_an_error_at_its_line(vqa_folder, row, name):
    line, message = STRUCTURAL[name]
    folder = vqa_folder([row(0), line, *(row(i) for i in range(2, 20))])
    with pytest.raises(DataError, match=message):
        read_vqa_folder(folder)


def test_file_missing_and_nothing_left(tmp_path, vqa_folder, row):
    with pytest.raises(
        DataError, match=r"nowhere/questions\.jsonl: cannot read the file \(No such file.*; correct the path"
    ):
        read_vqa_folder(tmp_path / "nowhere")
    folder = vqa_folder([row(0, split="dev")])
    with pytest.raises(DataError, match=r"no question is left in \['tset'\] \(splits present: dev\); ask for a split"):
        read_vqa_folder(folder, splits=["tset"])
    (folder / "questions.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"questions\.jsonl: no question is left; ask"):
        read_vqa_folder(folder)


def hf_rows(picture, n=10):
    return {
        "image": [{"bytes": picture(i // 2), "path": None} for i in range(n)],
        "question": ["what colour?"] * n,
        "answer": ["red"] * n,
        "kind": ["colour"] * n,
    }


def hf_dataset(columns):
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"image": datasets.Image()})
    return datasets.Dataset.from_dict(columns, features=features)


def test_reads_a_saved_data_set_with_its_original_bytes(tmp_path, picture):
    """Ten rows about five pictures: the bytes are the stored ones, and held once per picture."""
    hf_dataset(hf_rows(picture)).save_to_disk(tmp_path / "clinic")
    questions = read_vqa_dataset(tmp_path / "clinic", split="train", type_column="kind")
    assert questions[3] == Question("clinic-train-3", picture(1), "what colour?", "red", "colour", "train", "clinic")
    assert len({id(q.image) for q in questions}) == 5
    assert read_vqa_dataset(str(tmp_path / "clinic"), split="train", domain="x")[0].question_type == "all"


def test_reads_one_split_of_a_saved_dictionary(tmp_path, picture):
    both = {"train": hf_dataset(hf_rows(picture)), "validation": hf_dataset(hf_rows(picture, 2))}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "clinic")
    assert len(read_vqa_dataset(tmp_path / "clinic", split="validation")) == 2
    with pytest.raises(DataError, match=r"clinic: no split 'test'; the splits present are train, validation"):
        read_vqa_dataset(tmp_path / "clinic", split="test")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
def test_reads_what_load_dataset_finds(tmp_path, picture):
    hf_dataset(hf_rows(picture)).to_parquet(tmp_path / "clinic" / "train-00000.parquet")
    assert len(read_vqa_dataset(tmp_path / "clinic", split="train")) == 10


def test_bad_rows_of_a_data_set_are_counted_and_ids_keep_their_rows(tmp_path, picture):
    columns = hf_rows(picture)
    columns["image"][2] = {"bytes": b"broken", "path": None}
    columns["answer"][5] = None
    hf_dataset(columns).save_to_disk(tmp_path / "clinic")
    with pytest.warns(
        DataWarning, match=r"left out 2 of 10 rows: \S*clinic\[train\] row 2: .*; \S* row 5: the answer is"
    ):
        questions = read_vqa_dataset(tmp_path / "clinic", split="train")
    assert [q.id.removeprefix("clinic-train-") for q in questions] == list("01346789")


@pytest.mark.usefixtures("own_cache")
def test_data_set_missing_columns_missing_and_wrong(tmp_path, picture):
    hf_dataset(hf_rows(picture)).save_to_disk(tmp_path / "clinic")
    with pytest.raises(
        DataError, match=r"clinic\[train\]: column 'label' is missing; the columns present are '.*; name"
    ):
        read_vqa_dataset(tmp_path / "clinic", split="train", answer_column="label")
    numbers = datasets.Dataset.from_dict({"image": [1, 2], "question": ["a", "b"], "answer": ["c", "d"]})
    numbers.save_to_disk(tmp_path / "numbers")
    with pytest.raises(
        DataError, match=r"numbers\[train\]: column 'image' holds .*int64.*, not images; name the column"
    ):
        read_vqa_dataset(tmp_path / "numbers", split="train")
    with pytest.raises(DataError, match=r"nowhere: cannot open the data set, split 'train' .*; give a folder made by"):
        read_vqa_dataset(tmp_path / "nowhere", split="train")
    hf_dataset({name: [] for name in hf_rows(picture)}).to_parquet(tmp_path / "empty" / "train.parquet")
    with pytest.raises(DataError, match=r"empty.*(holds no row|corresponds to no data)"):
        read_vqa_dataset(tmp_path / "empty", split="train")


def test_splits_share_no_image_and_do_not_depend_on_order_or_company(question):
    """300 questions about 100 pictures; half and half: 50 pictures expected, deviation sqrt(100 / 4) = 5."""
    questions = [question(i, image=i // 3) for i in range(300)]
    fractions = {"private": 0.5, "test": 0.5, "dev": 0.0}
    split = split_by_image(questions, fractions, seed=0)
    sides = {name: {image_id(q.image) for q in split if q.split == name} for name in SPLITS}
    assert not sides["private"] & sides["test"] and not sides["dev"]
    assert 30 <= len(sides["private"]) <= 70
    assert split_by_image(questions[::-1], fractions, seed=0) == split[::-1]
    assert split_by_image(questions[:30], fractions, seed=0) == split[:30]
    assert split_by_image(questions, fractions, seed=1) != split
    assert [q.id for q in split] == [q.id for q in questions]


def test_uniform_is_independent_between_purposes():
    """1,000 pairs of independent uniform numbers correlate by 0 +- 0.032; four deviations are 0.13."""
    a, b = ([uniform(purpose, 0, str(i)) - 0.5 for i in range(1000)] for purpose in ("split", "sites"))
    correlation = sum(x * y for x, y in zip(a, b, strict=True)) / 1000 * 12
    assert abs(correlation) < 0.13
    assert uniform("split", 0, "a", "b") != uniform("split", 0, "ab")


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 1.0}, "fractions names the split 'train'; use base, private"),
        ({"base": 0.5, "test": 0.4}, r"sum to 1, got \{'base': 0\.5, 'test': 0\.4\} \(sum 0\.9\); correct them"),
        ({"base": 1.5, "test": -0.5}, "must be 0 or more"),
        ({"base": float("nan"), "test": 1.0}, "must be 0 or more"),
    ],
)
def test_bad_fractions(question, fractions, message):
    with pytest.raises(RecipeError, match=message):
        split_by_image([question(0)], fractions, seed=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not here")
@pytest.mark.parametrize(
    ("name", "n", "n_images", "n_test"), [("vqa_rad", 3077, 274, 644), ("daquar", 10_735, 1242, 1947)]
)
def test_reads_real_data_whole(name, n, n_images, n_test):
    """Counts from the data's README (questions, images), and from counting `"split": "test"` in the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        questions = read_vqa_folder(SHARED / name)
    assert len(questions) == n and len({q.image for q in questions}) == n_images
    assert Counter(q.split for q in questions)["test"] == n_test
    assert {q.domain for q in questions} == {name} and {q.split for q in questions} == set(SPLITS)


def test_questions_without_images_are_split_by_their_words(tmp_path):
    """The same words in two rows stay together; rows with and without images do not mix."""
    rows = [{"id": f"{n}", "question": f"what is {n % 20}?", "answer": "1"} for n in range(40)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    questions = split_by_image(read_vqa_folder(tmp_path), {"dev": 0.5, "test": 0.5}, seed=0)
    assert {q.image for q in questions} == {None} and {q.split for q in questions} == {"dev", "test"}
    assert all(questions[n].split == questions[n + 20].split for n in range(20))
    (tmp_path / "questions.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "image": "a.png"}))
    with pytest.raises(DataError, match=r"jsonl:1: column 'image' is missing; .*give every row its image"):
        read_vqa_folder(tmp_path)
    saved = datasets.Dataset.from_dict({"question": ["what?"], "answer": ["1"]})
    saved.save_to_disk(tmp_path / "saved")
    (question,) = read_vqa_dataset(tmp_path / "saved", split="train", image_column=None)
    assert (question.image, question.text) == (None, "what?")
