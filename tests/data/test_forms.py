"""The forms in which people have their data: each is read as what it means, or named with the remedy."""

import base64
import json
from pathlib import Path

import datasets
import pytest

from accord.data.forms import raw_pair
from accord.data.preferences import read_preferences
from accord.data.questions import normalise_answer, read_vqa_dataset, read_vqa_folder, right_answers
from accord.errors import DataError, DataWarning
from accord.types import vqa_prompt

ASKED = "what colour?"
BLOCKS = [{"type": "image"}, {"type": "text", "text": ASKED}]


@pytest.fixture
def folder(tmp_path, picture):
    """Ten images `images/0.png` to `images/9.png` in a folder."""
    (tmp_path / "ward" / "images").mkdir(parents=True)
    for number in range(10):
        (tmp_path / "ward" / "images" / f"{number}.png").write_bytes(picture(number))
    return tmp_path / "ward"


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs_of(folder, make):
    return read_preferences(lines(folder / "pairs.jsonl", [make(n) for n in range(10)]))


def said(role, content):
    return {"role": role, "content": content}


def spoken(who, value):
    return {"from": who, "value": value}


TAGGED = f"<image>\n{ASKED}"
USER = said("user", BLOCKS)
PAIR_FORMS = {
    "TRL, explicit": {"prompt": [USER], "chosen": [said("assistant", "red")], "rejected": [said("assistant", "blue")]},
    "TRL, implicit prompt": {
        "chosen": [USER, said("assistant", "red")],
        "rejected": [USER, said("assistant", "blue")],
    },
    "UltraFeedback": {
        "prompt": ASKED,
        "chosen": [USER, said("assistant", "red")],
        "rejected": [USER, said("assistant", "blue")],
    },
    "RLAIF-V": {"question": ASKED, "chosen": "red", "rejected": "blue"},
    "a null prompt": {"prompt": None, "question": ASKED, "chosen": "red", "rejected": "blue"},
    "instruction": {"instruction": ASKED, "chosen": "red", "rejected": "blue"},
    "ShareGPT": {
        "conversations": [spoken("human", TAGGED)],
        "chosen": spoken("gpt", "red"),
        "rejected": spoken("gpt", "blue"),
    },
    "LLaVA": {
        "conversations": [spoken("human", TAGGED), spoken("gpt", "red")],
        "rejected_conversations": [spoken("human", TAGGED), spoken("gpt", "blue")],
    },
    "ms-swift": {
        "messages": [said("user", TAGGED), said("assistant", "red")],
        "rejected_response": "blue",
    },
    "ms-swift, rejected messages": {
        "messages": [said("user", TAGGED), said("assistant", "red")],
        "rejected_messages": [said("user", TAGGED), said("assistant", "blue")],
    },
    "ms-swift, with nulls": {
        "messages": [said("user", TAGGED), said("assistant", "red")],
        "rejected_response": "blue",
        "chosen": None,
        "rejected": None,
    },
    "ms-swift, older": {"query": TAGGED, "response": "red", "rejected_response": "blue"},
    "tag in a plain prompt": {"prompt": TAGGED, "chosen": "red", "rejected": "blue"},
    "tag in the only block": {
        "prompt": [said("user", [{"type": "text", "text": TAGGED}])],
        "chosen": "red",
        "rejected": "blue",
    },
}


@pytest.mark.parametrize("name", PAIR_FORMS)
def test_every_form_of_a_pair_is_the_same_pair(folder, name):
    pairs = pairs_of(folder, lambda n: {**PAIR_FORMS[name], "images": [f"images/{n}.png"]})
    assert len(pairs) == 10
    for number, pair in enumerate(pairs):
        assert (list(pair.prompt), pair.chosen, pair.rejected) == (vqa_prompt(ASKED), "red", "blue")
        assert pair.images == (folder / f"images/{number}.png",)


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ("RLAIF-V", "question"),
        ("RLAIF-V", "chosen"),
        ("RLAIF-V", "rejected"),
        ("ms-swift", "messages"),
        ("ms-swift", "rejected_response"),
        ("ms-swift, older", "response"),
    ],
)
def test_a_null_in_one_row_costs_that_row_alone(folder, form, field):
    row = {**PAIR_FORMS[form], "question_type": "colour"}
    with pytest.warns(DataWarning, match=rf"left out 1 of 10 rows: \S*:5: .*{field} is null"):
        pairs = pairs_of(folder, lambda n: {**row, "image": f"images/{n}.png", **({field: None} if n == 4 else {})})
    assert len(pairs) == 9


@pytest.mark.parametrize("name", ["ShareGPT", "LLaVA", "RLAIF-V", "TRL, implicit prompt"])
@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_so_it_is_in_arrow(folder, picture, name, kind):
    """Which writes nulls for what a turn lacks, and labels and images in its own form."""
    form = PAIR_FORMS[name]
    if name == "TRL, implicit prompt":  # Arrow holds no column of blocks beside text
        form = {key: [said("user", TAGGED), turns[1]] for key, turns in form.items()}
    rows = [{**form, "images": [{"bytes": picture(n), "path": None}]} for n in range(10)]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    place = folder / "own"
    if kind == "saved":
        dataset.save_to_disk(place)
    else:
        place.mkdir()
        dataset.to_parquet(place / "train-00000-of-00001.parquet")
    pairs = read_preferences(place)
    assert [pair.images for pair in pairs] == [(picture(n),) for n in range(10)]
    assert all(list(pair.prompt) == vqa_prompt(ASKED) and pair.rejected == "blue" for pair in pairs)
    if kind == "parquet":
        assert read_preferences(place / "train-00000-of-00001.parquet") == pairs


def test_a_conversation_of_several_turns_and_a_system_prompt(folder):
    """All but the last turn is the prompt; the image stands where the tag is."""
    turns = [spoken("human", "hello"), spoken("gpt", "hi"), spoken("human", f"{ASKED} <image>")]
    form = {"conversations": turns, "chosen": spoken("gpt", "red"), "rejected": spoken("gpt", "blue")}
    pair = pairs_of(folder, lambda n: {**form, "system": "Be brief.", "image": f"images/{n}.png"})[0]
    assert [turn["role"] for turn in pair.prompt] == ["system", "user", "assistant", "user"]
    assert pair.prompt[3]["content"] == [{"type": "text", "text": ASKED}, {"type": "image"}]


def test_spoken_text_is_a_conversation(folder):
    asked = "\n\nHuman: what is 1 + 1?\n\nAssistant:"
    pair = pairs_of(folder, lambda n: {"chosen": f"{asked} 2", "rejected": f"{asked} {n + 3}"})[0]
    assert (pair.chosen, pair.rejected, pair.images) == ("2", "3", ())
    assert list(pair.prompt) == [said("user", [{"type": "text", "text": "what is 1 + 1?"}])]


def test_tags_and_images_that_do_not_agree_are_left_out(folder):
    with pytest.raises(DataError, match="the prompt has 2 places '<image>' and the row 1 images"):
        pairs_of(
            folder,
            lambda n: {
                "prompt": "<image> and <image>",
                "chosen": "a",
                "rejected": "b",
                "image": f"images/{n}.png",
            },
        )


def test_a_tag_in_an_answer_is_text(folder):
    pairs = pairs_of(
        folder, lambda n: {"prompt": ASKED, "chosen": "red", "rejected": "<image>", "image": f"images/{n}.png"}
    )
    assert {pair.rejected for pair in pairs} == {"<image>"}


@pytest.mark.parametrize(
    "block",
    [
        lambda path: {"type": "image", "image": path},
        lambda path: {"type": "image_url", "image_url": {"url": path}},
        lambda path: {"type": "image", "url": path},
    ],
)
def test_an_image_may_stand_in_its_block(folder, block):
    text = {"type": "text", "text": ASKED}
    pairs = pairs_of(
        folder,
        lambda n: {"prompt": [said("user", [block(f"images/{n}.png"), text])], "chosen": "red", "rejected": "blue"},
    )
    assert list(pairs[3].prompt) == vqa_prompt(ASKED) and pairs[3].images == (folder / "images/3.png",)


def test_what_no_form_knows_is_named():
    with pytest.raises(DataError, match=r"column 'prompt' is missing; .*TRL's implicit prompt is read where .*also ca"):
        raw_pair("pairs.jsonl:1", {"chosen": "red", "rejected": "blue"})
    with pytest.raises(DataError, match=r"column 'chosen' is missing; the columns present are 'output_1', 'output_2'"):
        raw_pair("pairs.jsonl:1", {"output_1": "red", "output_2": "blue"})
    with pytest.raises(DataError, match="conversations that differ before their last turn"):
        first, second = [USER, said("assistant", "a")], [said("user", "other"), said("assistant", "b")]
        raw_pair("pairs.jsonl:1", {"chosen": first, "rejected": second})


def questions(folder, make, count=10):
    lines(
        folder / "questions.jsonl",
        [{"id": f"q{n}", "question": ASKED, "answer": "red", **make(n)} for n in range(count)],
    )
    return read_vqa_folder(folder)


def uri(folder, number):
    data = (folder / f"images/{number}.png").read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


PATHS = {
    "images": lambda folder, n: {"images": [f"images/{n}.png"]},
    "image_path": lambda folder, n: {"image_path": f"images/{n}.png"},
    "file_name": lambda folder, n: {"file_name": f"images/{n}.png"},
    "a list of one": lambda folder, n: {"image": [f"images/{n}.png"]},
    "null, and another field": lambda folder, n: {"image": None, "image_path": f"images/{n}.png"},
    "backslash": lambda folder, n: {"image": f"images\\{n}.png"},
    "backslash and a dot": lambda folder, n: {"image": f".\\images\\{n}.png"},
    "without its folder": lambda folder, n: {"image": f"{n}.png"},
    "from the folder above": lambda folder, n: {"image": f"ward/images/{n}.png"},
    "absolute": lambda folder, n: {"image": str(folder.absolute() / f"images/{n}.png")},
    "file URI": lambda folder, n: {"image": (folder.absolute() / f"images/{n}.png").as_uri()},
    "an object": lambda folder, n: {"image": {"path": f"images/{n}.png", "bytes": None}},
}


@pytest.mark.parametrize("name", PATHS)
def test_every_way_to_name_an_image_finds_it(folder, name):
    found = questions(folder, lambda n: PATHS[name](folder, n))
    assert [q.image.resolve() for q in found] == [(folder / f"images/{n}.png").resolve() for n in range(10)]


def test_an_image_may_be_in_the_row(folder, picture):
    """A data URI, or base64 alone where it is longer than a path."""
    assert [q.image for q in questions(folder, lambda n: {"image": uri(folder, n)})] == [picture(n) for n in range(10)]
    large = [picture(n, size=(64, 64)) for n in range(10)]
    found = questions(folder, lambda n: {"image": base64.b64encode(large[n]).decode()})
    assert [q.image for q in found] == large


REFUSED = {
    "URL": ("https://example.org/a.png", "is a URL, and nothing is fetched; download the images"),
    "bucket": ("s3://bucket/a.png", "is a URL, and nothing is fetched"),
    "elsewhere": ("file://server/a.png", "is on another machine"),
    "outside": ("file:///etc/hostname", "leaves the data's folder"),
    "not base64": ("data:image/png;base64,====", "is not base64"),
    "plain data": ("data:text/plain,hello", "is no data URI in base64"),
    "absent": (
        "images/gone.png",
        r"there is no such file; .*\(tried \S*/ward/images/gone\.png, \S*/ward/images/images/",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_cannot_be_read_says_why(folder, name):
    value, reason = REFUSED[name]
    with pytest.raises(DataError, match=rf"10 of 10 rows cannot be used, .*{reason}"):
        questions(folder, lambda n: {"image": value})


@pytest.mark.parametrize("empty", [{"image": None}, {"images": []}, {"image": ""}, {"images": [None]}, {}])
def test_a_field_that_is_empty_everywhere_is_no_field(folder, empty):
    assert {q.image for q in questions(folder, lambda n: empty)} == {None}
    pairs = pairs_of(folder, lambda n: {"prompt": f"{n}?", "chosen": "a", "rejected": "b", **empty})
    assert {pair.images for pair in pairs} == {()}


def test_a_field_that_is_empty_somewhere_is_left_out_and_counted(folder):
    with pytest.warns(DataWarning, match=r"left out 1 of 10 rows: .*the image is empty .* and other rows have one"):
        assert len(questions(folder, lambda n: {"image": f"images/{n}.png" if n else None})) == 9


def test_an_image_under_a_strange_name_is_named(folder):
    with pytest.raises(DataError, match=r"no row has an image in 'image', and 'xray' looks like one, 'images/0\.png'"):
        questions(folder, lambda n: {"xray": f"images/{n}.png"})


def test_a_tag_in_a_question_is_the_place_of_its_image(folder):
    """Before the words; a question without an image keeps the word."""
    found = questions(folder, lambda n: {"image": f"images/{n}.png", "question": f"<image>\n{ASKED}"})
    assert {q.text for q in found} == {ASKED}
    found = questions(folder, lambda n: {"image": f"images/{n}.png", "question": f"look at <image> and say: {ASKED}"})
    assert {q.text for q in found} == {f"look at and say: {ASKED}"}
    assert {q.text for q in questions(folder, lambda n: {"question": "what is <image>?"})} == {"what is <image>?"}
    with pytest.raises(DataError, match="the question has 2 places '<image>' for its one image"):
        questions(folder, lambda n: {"image": f"images/{n}.png", "question": "<image> <image> same?"})


VOTES = ["red", "dark red", "Red.", "red", "blue"]
ANSWERS = {
    "a list": {"answer": VOTES},
    "answers": {"answer": None, "answers": VOTES},
    "VQAv2": {"answers": [{"answer": text, "answer_confidence": "yes", "answer_id": 1} for text in VOTES]},
    "a column of Arrow": {"answers": {"answer": VOTES, "answer_id": [1, 2, 3, 4, 5]}},
}


@pytest.mark.parametrize("name", ANSWERS)
def test_of_several_answers_the_commonest_is_the_answer_and_any_is_right(folder, name):
    rows = [{"id": f"q{n}", "question": ASKED, "image": f"images/{n}.png", **ANSWERS[name]} for n in range(10)]
    if name == "answers":
        rows = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
    lines(folder / "questions.jsonl", rows)
    question = read_vqa_folder(folder)[0]
    assert (question.answer, question.references) == ("red", ("dark red", "Red.", "red", "blue"))
    assert right_answers(question) == {"red", "dark red", "blue"}


def test_llava_conversations_are_questions(folder):
    turns = [spoken("human", TAGGED), spoken("gpt", "red")]
    rows = [{"id": f"q{n}", "image": f"images/{n}.png", "conversations": turns} for n in range(10)]
    lines(folder / "questions.jsonl", rows)
    assert {(q.text, q.answer) for q in read_vqa_folder(folder)} == {(ASKED, "red")}
    lines(folder / "questions.jsonl", [{**row, "conversations": turns * 2} for row in rows])
    with pytest.raises(DataError, match="a conversation of 4 turns, and a question has one"):
        read_vqa_folder(folder)


def test_a_file_may_be_one_list(folder):
    rows = [{**PAIR_FORMS["RLAIF-V"], "image": f"images/{n}.png"} for n in range(10)]
    (folder / "pairs.json").write_text(json.dumps(rows, indent=1))
    assert len(read_preferences(folder / "pairs.json")) == 10
    (folder / "pairs.json").write_text(json.dumps([rows[0], 3]))
    with pytest.raises(DataError, match=r"pairs\.json item 2: expected a JSON object, got 3"):
        read_preferences(folder / "pairs.json")


def test_a_folder_without_questions_says_what_it_has(folder):
    lines(folder / "train.jsonl", [])
    with pytest.raises(DataError, match=r"No such file .* has train\.jsonl; rename the file"):
        read_vqa_folder(folder)
    datasets.Dataset.from_dict({"question": [ASKED]}).save_to_disk(folder)
    with pytest.raises(DataError, match=r'no questions\.jsonl; read it with kind = "huggingface"'):
        read_vqa_folder(folder)


def test_labels_are_their_names(tmp_path):
    """An unknown label, -1, is an empty answer."""
    labels = datasets.ClassLabel(names=["red", "blue"])
    features = datasets.Features(question=datasets.Value("string"), answer=labels, kind=labels)
    cells = {"question": [ASKED] * 10, "answer": [0, 1] * 4 + [0, -1], "kind": [1] * 10}
    datasets.Dataset.from_dict(cells, features=features).save_to_disk(tmp_path / "saved")
    with pytest.warns(DataWarning, match="left out 1 of 10 rows: .*row 9: the answer is empty"):
        found = read_vqa_dataset(tmp_path / "saved", split="train", image_column=None, type_column="kind")
    assert [q.answer for q in found] == ["red", "blue"] * 4 + ["red"] and {q.question_type for q in found} == {"blue"}


def test_a_data_set_with_several_splits_names_them(tmp_path, pair):
    from accord.data.preferences import to_dataset

    whole = to_dataset([pair(n) for n in range(8)])
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"has the splits train, test; name one, as in \S*saved/train"):
        read_preferences(tmp_path / "saved")
    assert len(read_preferences(tmp_path / "saved" / "train")) == 8


def test_half_an_emoji_is_left_out_and_counted(folder):
    """In any field, in objects within, and in pairs; a whole emoji is two surrogates in JSON, and stays."""
    whole = questions(folder, lambda n: {"image": f"images/{n}.png", "answer": "red \U0001f534"})
    assert {q.answer for q in whole} == {"red \U0001f534"}
    for cells in ({"answer": "red \ud83d"}, {"question": "\udd34?"}, {"question_type": "\ud83d"}):
        with pytest.warns(DataWarning, match="left out 1 of 10 rows: .*half a character, .*an emoji was cut in two"):
            found = questions(folder, lambda n, cells=cells: {"image": f"images/{n}.png", **(cells if n == 4 else {})})
        assert len(found) == 9
    row = {"prompt": ASKED, "rejected": "blue"}
    with pytest.warns(DataWarning, match="half a character"):
        pairs = pairs_of(folder, lambda n: {**row, "chosen": [said("assistant", "a\ud83d" if n == 4 else "red")]})
    assert len(pairs) == 9


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("\u0130zmir", "I\u0307zmir"),
        ("\uff39\uff25\uff33\uff01", "yes!"),
        ("\u662f\u3002", "\u662f"),
        ("a\u3000b", "a b"),
        ("x\u00a0ray", "x ray"),
        ("don\u2019t", "don't"),
        ("x\u2011ray", "x-ray"),
        ("\ufeffyes", "yes"),
        ("zero\u200bwidth", "zerowidth"),
        ("\uac00", "\u1100\u1161"),
    ],
)
def test_what_a_reader_cannot_tell_apart_is_equal(one, other):
    assert normalise_answer(one) == normalise_answer(other)
    assert normalise_answer(normalise_answer(one)) == normalise_answer(one)


@pytest.mark.parametrize(("one", "other"), [("m\u00b2", "m2"), ("resume", "r\u00e9sum\u00e9"), ("\u4e8c", "2")])
def test_what_a_reader_tells_apart_stays_apart(one, other):
    assert normalise_answer(one) != normalise_answer(other)


def test_paths_of_a_data_set_are_looked_for_beside_it(folder, monkeypatch):
    """Saved from its own folder, and read from another."""
    rows = [{"question": ASKED, "answer": "red", "image": f"images/{n}.png"} for n in range(10)]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    monkeypatch.chdir(Path("/"))
    found = read_vqa_dataset(folder / "saved", split="train")
    assert [q.image for q in found] == [folder / f"images/{n}.png" for n in range(10)]
