import errno
import json
import os
import random
from dataclasses import replace

import datasets
import pytest
from trl.data_utils import is_conversational, prepare_multimodal_messages

from accord.data.images import image_bytes, image_id
from accord.data.preferences import (
    MIN_PAIRS,
    NegativeMix,
    build_preferences,
    read_preferences,
    to_dataset,
    write_preferences,
)
from accord.errors import DataError, DataWarning, ImageError, RecipeError, RunError
from accord.types import PreferencePair, vqa_prompt


@pytest.fixture
def write(tmp_path, picture):
    """Write rows (dicts, or text as it is) to pairs.jsonl beside twenty images 0.png, 1.png, ..."""

    def write_rows(rows):
        for number in range(20):
            (tmp_path / f"{number}.png").write_bytes(picture(number))
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / "pairs.jsonl"

    return write_rows


def row(number, **cells):
    return {"prompt": "what colour?", "chosen": "red", "rejected": "blue", "images": [f"{number}.png"], **cells}


def contents(pairs):
    """Pairs with each image replaced by its bytes, wherever they are stored."""
    return [
        [
            list(p.prompt),
            p.chosen,
            p.rejected,
            p.question_id,
            p.question_type,
            p.constructed,
            *map(image_bytes, p.images),
        ]
        for p in pairs
    ]


def some_pairs(pair, picture, tmp_path):
    """Twelve pairs: three formats, an image in a file, two images, a system turn, an empty rejected answer, accents."""
    file = tmp_path / "elsewhere.jpg"
    file.write_bytes(picture(77, "JPEG"))
    system = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *vqa_prompt("où?")]
    return [
        *(pair(i) for i in range(7)),
        pair(7, images=(file,), rejected=""),
        pair(8, images=(picture(8, "WEBP"),), chosen="à gauche", constructed=True),
        PreferencePair(system, "left", "right", (picture(9),), "q9", "position"),
        PreferencePair(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a\u2028b"}, {"type": "image"}]}],
            "yes",
            "no",
            (picture(10), picture(11)),
            "q10",
        ),
        pair(0, rejected="green"),
    ]


def test_round_trip_through_jsonl(tmp_path, pair, picture):
    """Stored images: pictures 0 to 6 (0 serves two pairs), the file, 8, 9, and 10 with 11: 7 + 1 + 1 + 1 + 2 = 12."""
    pairs = some_pairs(pair, picture, tmp_path)
    target = tmp_path / "site" / "pairs.jsonl"
    write_preferences(target, pairs)
    assert contents(read_preferences(target)) == contents(pairs)
    stored = sorted(os.listdir(tmp_path / "site" / "images"))
    assert len(stored) == 12
    assert f"{image_id(picture(0))}.png" in stored and {name.split(".")[1] for name in stored} == {"png", "jpg", "webp"}
    before = target.read_bytes()
    write_preferences(target, read_preferences(target))
    assert target.read_bytes() == before


def test_ties_are_kept_only_where_they_are_asked_for(write, tmp_path):
    """Read as preferences they would say that their first answer is better; weights and ties survive a round trip."""
    file = write([*(row(i, weight=1 + i) for i in range(8)), row(8, tie=True), row(9, weight=-1), row(10, tie=False)])
    with pytest.warns(DataWarning, match="1 of 10 pairs are ties, left out"), pytest.warns(match="the weight is -1"):
        assert [p.tie for p in read_preferences(file)] == [False] * 9
    with pytest.warns(DataWarning, match="the weight is -1; make it a number above 0"):
        pairs = read_preferences(file, ties=True)
    assert [p.weight for p in pairs] == [1, 2, 3, 4, 5, 6, 7, 8, 1, 1] and [p.tie for p in pairs].index(True) == 8
    write_preferences(tmp_path / "again" / "pairs.jsonl", pairs)
    again = read_preferences(tmp_path / "again" / "pairs.jsonl", ties=True)
    assert [(p.weight, p.tie) for p in again] == [(p.weight, p.tie) for p in pairs]
    assert len(to_dataset(pairs)) == 9


def test_round_trip_through_a_saved_data_set(tmp_path, pair, picture):
    """`save_to_disk` copies files in: the original may go."""
    pairs = some_pairs(pair, picture, tmp_path)
    expected = contents(pairs)
    to_dataset(pairs).save_to_disk(tmp_path / "site")
    (tmp_path / "elsewhere.jpg").unlink()
    assert contents(read_preferences(tmp_path / "site")) == expected


def test_persons_are_kept_where_any_pair_names_one(pair, tmp_path):
    pairs = [replace(pair(i), person="p1" if i == 3 else "") for i in range(8)]
    to_dataset(pairs).save_to_disk(tmp_path / "site")
    assert [found.person for found in read_preferences(tmp_path / "site")] == [given.person for given in pairs]
    assert "person" not in to_dataset([pair(0)]).column_names


def test_both_forms_are_what_trl_takes(tmp_path, pair):
    pairs = [pair(i) for i in range(8)]
    write_preferences(tmp_path / "pairs.jsonl", pairs)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for example in (lines[0], to_dataset(pairs)[0]):
        assert is_conversational(example)
        assert is_conversational({"chosen": example["chosen"]}) and is_conversational({"rejected": example["rejected"]})
        prompt = prepare_multimodal_messages(example["prompt"], images=example["images"])
        assert [block["type"] for block in prompt[0]["content"]] == ["image", "text"]
        assert prepare_multimodal_messages(example["chosen"])[0]["content"] == [{"type": "text", "text": "red"}]
    assert to_dataset(pairs)[0]["images"][0].size == (8, 8)
    assert lines[0]["constructed"] is False and lines[0]["question_id"] == "q0"


def test_reads_plain_strings_and_one_image(write):
    """Without question ids, pairs about the same image and prompt share one: rows 0 and 8 do."""
    rows = [row(i, rejected=f"answer {i}") for i in range(8)]
    single = {**row(0, rejected="green"), "image": "0.png"}
    del single["images"]
    pairs = read_preferences(write([*rows, single]))
    assert pairs[0].prompt == vqa_prompt("what colour?") and pairs[0].chosen == "red"
    assert pairs[0].question_id == pairs[8].question_id
    assert len({p.question_id for p in pairs}) == 8
    assert not pairs[0].constructed and pairs[0].question_type == ""


def test_images_go_before_the_first_user_text_of_plain_messages(write):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "same?"}]
    pairs = read_preferences(write([row(i, prompt=prompt, images=["0.png", f"{i}.png"]) for i in range(1, 9)]))
    assert [block["type"] for block in pairs[0].prompt[1]["content"]] == ["image", "image", "text"]
    assert len(pairs[0].images) == 2


BAD_CELLS = {
    "equal": ({"rejected": " Red."}, "chosen and rejected are the same answer, 'red'"),
    "empty chosen": ({"chosen": " "}, "the chosen answer is empty"),
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "no prompt": ({"prompt": []}, r"the prompt must be text or a list of messages, got \[\]"),
    "role": ({"prompt": [{"role": "tool", "content": "?"}]}, "a message needs a role among system, user, assistant"),
    "block": (
        {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
        "a content block must be an image or a text",
    ),
    "content": ({"prompt": [{"role": "user"}]}, "content must be text or a list of blocks, got None"),
    "last turn": (
        {"prompt": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
        "must end with the",
    ),
    "counts": (
        {"prompt": vqa_prompt("?"), "images": ["1.png", "2.png"]},
        "the prompt has 1 image blocks and the row 2 im",
    ),
    "no image": ({"images": []}, r"the image is empty or no path, got \[\] for 'images', and other rows have one"),
    "missing image": ({"images": ["gone.png"]}, r"gone\.png: cannot read the image, there is no such file"),
    "climbs": ({"images": ["../1.png"]}, r"the image path '\.\./1\.png' leaves the data's folder"),
    "turns": ({"chosen": [{"role": "user", "content": "red"}]}, "chosen must be text or one assistant message"),
    "picture": (
        {"rejected": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "rejected holds an image; only text",
    ),
    "number": ({"rejected": 3}, "rejected must be text or one assistant message, got 3"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_bad_pair_is_left_out_and_counted(write, name):
    """One bad pair of 10, on line 5."""
    cells, reason = BAD_CELLS[name]
    path = write([row(i, **(cells if i == 4 else {})) for i in range(10)])
    with pytest.warns(DataWarning, match=rf"left out 1 of 10 rows: \S*pairs\.jsonl:5: .*{reason}"):
        assert len(read_preferences(path)) == 9


def test_few_pairs_many_bad_pairs_and_a_missing_file(tmp_path, write):
    with pytest.raises(
        DataError, match=r"pairs\.jsonl: the site has 2 pairs, and a reward model needs at least 8; collect"
    ):
        read_preferences(write([row(0), row(1)]))
    assert len(read_preferences(write([row(i) for i in range(MIN_PAIRS)]))) == MIN_PAIRS
    bad = [row(i, **({"rejected": "red"} if i < 4 else {})) for i in range(16)]
    with pytest.raises(DataError, match=r"4 of 16 rows cannot be used, more than 20%: \S*jsonl:1: chosen and rejected"):
        read_preferences(write(bad))
    with pytest.raises(
        DataError, match=r"gone\.jsonl: cannot read the file \(No such file or directory\); correct the path"
    ):
        read_preferences(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"the folder was not made by save_to_disk .*; name a \.jsonl file inside it"):
        read_preferences(tmp_path)


def test_faults_of_the_file(write):
    good = [row(i) for i in range(20)]
    for name in ("prompt", "chosen", "rejected", "images"):
        cut = {key: value for key, value in row(1).items() if key != name}
        present = ", ".join(map(repr, cut))
        with pytest.raises(
            DataError, match=rf"pairs\.jsonl:2: column '{name}' is missing; the columns present are {present}"
        ):
            read_preferences(write([good[0], cut, *good[2:]]))
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: not valid JSON"):
        read_preferences(write([good[0], "{", *good[2:]]))
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:2: question_id 'a' stands for another prompt or image further up; give"
    ):
        read_preferences(write([row(0, question_id="a"), row(1, question_id="a"), *good[2:]]))


def test_saved_data_set_with_a_missing_column_or_text_for_images(tmp_path, pair):
    dataset = to_dataset([pair(i) for i in range(8)])
    dataset.remove_columns("chosen").save_to_disk(tmp_path / "a")
    with pytest.raises(
        DataError, match=r"a row 0: column 'chosen' is missing; the columns present are 'prompt', 'rejected'"
    ):
        read_preferences(tmp_path / "a")
    numbers = dataset.remove_columns("images").add_column("images", list(range(8)))
    numbers.save_to_disk(tmp_path / "b")
    with pytest.raises(DataError, match=r"b: 8 of 8 rows cannot be used, .*the image is empty or no path, got 0"):
        read_preferences(tmp_path / "b")


def test_saved_data_set_of_plain_strings_with_one_image(tmp_path, picture):
    columns = {
        "prompt": ["what colour?"] * 8,
        "chosen": ["red"] * 8,
        "rejected": ["blue"] * 8,
        "image": [{"bytes": picture(i), "path": None} for i in range(8)],
    }
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "site")
    pairs = read_preferences(tmp_path / "site")
    assert pairs[3].images == (picture(3),) and pairs[3].prompt == vqa_prompt("what colour?")


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("succeeding", [0, 3, 8])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, pair, monkeypatch, call, succeeding):
    """Eight pictures and the file; the disk is full at the first, on the way, or at the last write."""
    real, calls = getattr(os, call), []

    def full(*arguments):
        calls.append(arguments)
        # write_atomic syncs the file and then its folder: two calls a file.
        if len(calls) > succeeding * (2 if call == "fsync" else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunError, match="the disk is full"):
        write_preferences(tmp_path / "site" / "pairs.jsonl", [pair(i) for i in range(8)])
    assert files_below(tmp_path) == []
    assert not (tmp_path / "site" / "images").exists()


def test_a_failed_rewrite_keeps_the_older_file_and_its_images(tmp_path, pair, monkeypatch):
    target = tmp_path / "pairs.jsonl"
    write_preferences(target, [pair(i) for i in range(8)])
    before, listing = target.read_bytes(), files_below(tmp_path)
    real = os.replace

    def full(source, destination):
        if str(destination).endswith(".jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, destination)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError):
        write_preferences(target, [pair(i) for i in range(12)])
    assert target.read_bytes() == before and files_below(tmp_path) == listing
    assert len(read_preferences(target)) == 8


def test_an_unreadable_image_stops_the_writing(tmp_path, pair):
    with pytest.raises(ImageError, match="not a readable PNG"):
        write_preferences(tmp_path / "pairs.jsonl", [pair(0), pair(1, images=(b"junk",))])
    assert files_below(tmp_path) == []


def test_builds_pairs_from_reference_answers(question):
    """Two questions x three rejected answers; each keeps its image, id and type."""
    questions = [question(0), question(1, answer="circle", question_type="shape", text="what shape?")]
    pairs = build_preferences(questions, rejected_per_question=3, generator=random.Random(0))
    assert [p.question_id for p in pairs] == ["q0"] * 3 + ["q1"] * 3
    assert all(p.constructed and p.chosen == ("red" if p.question_id == "q0" else "circle") for p in pairs)
    assert pairs[3].prompt == vqa_prompt("what shape?") and pairs[3].images == (questions[1].image,)
    assert pairs[3].question_type == "shape"


def test_building_is_a_function_of_the_generator(question):
    questions = [question(i, answer=f"answer {i}") for i in range(20)]

    def built(seed):
        return build_preferences(questions, rejected_per_question=4, generator=random.Random(seed))

    assert built(0) == built(0) != built(1)


def test_policy_samples_go_to_their_question_and_right_ones_are_passed_over(question):
    pairs = build_preferences(
        [question(0), question(1)],
        rejected_per_question=5,
        generator=random.Random(0),
        policy_samples={"q0": ["Red", "purple", "purple"], "q1": ["pink"], "q7": ["never"]},
        answers_by_type={},
        mix=NegativeMix(same_type=0, policy=1, other_type=0, malformed=0),
    )
    assert [(p.question_id, p.rejected) for p in pairs] == [("q0", "purple"), ("q1", "pink")]


def test_building_nothing_is_an_error(question):
    with pytest.raises(RecipeError, match="rejected_per_question must be at least 1, got 0; raise it"):
        build_preferences([question(0)], rejected_per_question=0, generator=random.Random(0))
    with pytest.raises(
        DataError, match=r"no preference pair could be built from 1 questions with NegativeMix\(.*; give"
    ):
        build_preferences(
            [question(0)], rejected_per_question=1, generator=random.Random(0), mix=NegativeMix(1, 0, 0, 0)
        )


def test_pairs_without_images_travel_to_disk_and_back(tmp_path, pair):
    """In a file and in a data set: no column of images, and no image block in the prompts."""
    prompt = [{"role": "user", "content": [{"type": "text", "text": "what is 1 plus 1?"}]}]
    pairs = [replace(pair(n), prompt=prompt, images=(), question_id="q") for n in range(8)]
    write_preferences(tmp_path / "pairs.jsonl", pairs)
    to_dataset(pairs).save_to_disk(tmp_path / "saved")
    for place in ("pairs.jsonl", "saved"):
        read = read_preferences(tmp_path / place)
        assert [each.images for each in read] == [()] * 8 and list(read[0].prompt) == prompt
        assert read[0].subjects == ("what is 1 plus 1?",)
