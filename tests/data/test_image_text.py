import json
import warnings

import datasets
import pytest

from accord.data.image_text import PROMPT, read_image_text
from accord.data.questions import split_by_image
from accord.errors import DataError, DataWarning, RecipeError

CHINESE, ARABIC = "一只狗在草地上奔跑。", "كلب يركض على العشب"


@pytest.fixture
def captions(tmp_path, picture):
    """Return a function that writes rows beside ten pictures; a bad picture is called `broken.png`."""

    def write(rows):
        folder = tmp_path / "photographs"
        (folder / "images").mkdir(parents=True)
        for n in range(10):
            (folder / "images" / f"{n}.png").write_bytes(picture(n))
        (folder / "images" / "broken.png").write_bytes(picture(0)[:40])
        (folder / "copy.png").write_bytes(picture(1))
        file = folder / "captions.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


def row(n, caption="A dog runs.", **cells):
    return {"image": f"images/{n}.png", "caption": caption, **cells}


def test_a_caption_answers_the_instruction(captions):
    """Ten pictures; the first has two captions, which have one id and know each other."""
    found = read_image_text(captions([*map(row, range(10)), row(0, " A cat. ")]), split="private", domain="d")
    assert len(found) == 11
    first, last = found[0], found[-1]
    assert (first.text, first.answer, first.references) == (PROMPT, "A dog runs.", ("A cat.",))
    assert (last.answer, last.references, last.id) == ("A cat.", ("A dog runs.",), first.id)
    assert {(q.split, q.domain, q.question_type) for q in found} == {("private", "d", "caption")}
    assert [q.id for q in found] == [*(f"d-{n}" for n in range(10)), "d-0"]


def test_lists_of_captions_and_splits_of_another_name(captions):
    rows = [
        {"image": f"images/{n}.png", "texts": ["One.", "Two."], "split": split}
        for n, split in enumerate(("pretrain", "judged", "pretrain", "held-out"))
    ]
    rows.append({"image": "images/missing.png", "texts": 3, "split": "judged"})  # a split that is not read
    told = {"text_column": "texts", "splits": {"pretrain": "private", "held-out": "test"}, "prompt": "describe it."}
    found = read_image_text(captions(rows), **told)
    assert [(q.image.name, q.answer, q.split) for q in found] == [
        (f"{n}.png", answer, split)
        for n, split in ((0, "private"), (2, "private"), (3, "test"))
        for answer in ("One.", "Two.")
    ]
    assert {(q.text, q.domain) for q in found} == {("describe it.", "photographs")}


def test_captions_of_any_language_are_kept(captions):
    rows = [row(n, text) for n, text in enumerate((CHINESE, ARABIC, "Ein Hund läuft – überall!"))]
    assert [q.answer for q in read_image_text(captions(rows))] == [CHINESE, ARABIC, "Ein Hund läuft – überall!"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(0, ""), "the caption is empty"),
        (row(0, "  \n"), "the caption is empty"),
        (row(0, []), r"the caption is not text but \[\]"),
        (row(0, None), "the caption is empty"),
        (row(0, ["", "A second dog."]), "the caption is empty"),
        (row("broken"), "not a readable PNG, JPEG or WEBP image"),
        (row("nowhere"), "there is no such file"),
        ({"image": "../secret.png", "caption": "a"}, "leaves the data's folder"),
    ],
)
def test_a_bad_caption_is_left_out_and_told(captions, bad, reason):
    file = captions([*map(row, range(10)), bad])
    with pytest.warns(DataWarning, match=rf"left out 1 of 1[12] rows: .*captions\.jsonl:11: .*{reason}"):
        found = read_image_text(file)
    assert len(found) == 10 + (isinstance(bad["caption"], list) and len(bad["caption"]) > 1)


def test_many_bad_captions_are_the_files_fault(captions):
    with pytest.raises(DataError, match="3 of 10 rows cannot be used, more than 20%"):
        read_image_text(captions([row(n, "" if n < 3 else "A dog.") for n in range(10)]))


def test_what_comes_twice_is_kept_once(captions):
    """The same caption about the same picture, under its name and another's; about another picture it stays."""
    file = captions([row(1), row(1), row(2), {"image": "copy.png", "caption": "A dog runs."}])
    with pytest.warns(DataWarning, match="left out 2 captions that came twice about one picture"):
        found = read_image_text(file)
    assert [q.image.name for q in found] == ["1.png", "2.png"]


def test_a_missing_column_is_told_with_those_present(captions):
    file = captions([{"image": "images/0.png", "text": "A dog."}])
    with pytest.raises(DataError, match=r"captions\.jsonl:1: column 'caption' is missing; .* are 'image', 'text'"):
        read_image_text(file)
    with pytest.raises(DataError, match=r"column 'split' is missing; .* 'image', 'text'"):
        read_image_text(file, text_column="text", splits={"train": "private"})


def test_what_cannot_be_asked_for(captions):
    file = captions([row(0, split="train")])
    with pytest.raises(DataError, match="no caption is left of the splits pretrain; choose another"):
        read_image_text(file, splits={"pretrain": "private"})
    with pytest.raises(RecipeError, match="splits names the split 'training'; use base, private"):
        read_image_text(file, splits={"train": "training"})
    with pytest.raises(RecipeError, match="prompt of captions is empty"):
        read_image_text(file, prompt=" ")


def saved(picture, **columns):
    given = {"img": [{"bytes": picture(n), "path": None} for n in range(4)], "caption": ["A dog."] * 3 + [CHINESE]}
    given |= columns
    features = {"img": datasets.Image(), "caption": datasets.Value("string"), "split": datasets.Value("string")}
    return datasets.Dataset.from_dict(given, features=datasets.Features({name: features[name] for name in given}))


def test_a_saved_data_set_with_its_original_bytes(tmp_path, picture):
    saved(picture, split=["a", "a", "b", "c"]).save_to_disk(tmp_path / "clinic")
    found = read_image_text(tmp_path / "clinic", image_column="img")
    assert [(q.image, q.answer, q.domain, q.split) for q in found] == [
        (picture(n), "A dog." if n < 3 else CHINESE, "clinic", "train") for n in range(4)
    ]
    found = read_image_text(tmp_path / "clinic", image_column="img", splits={"a": "private", "c": "dev"})
    assert [q.split for q in found] == ["private", "private", "dev"]
    with pytest.raises(
        DataError, match=r"clinic\[train\]: column 'image' is missing; the columns present are 'img', '"
    ):
        read_image_text(tmp_path / "clinic")


def test_a_folder_of_parquet_files(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    saved(picture).to_parquet(tmp_path / "clinic" / "train-00000.parquet")
    assert [q.image for q in read_image_text(tmp_path / "clinic", image_column="img")] == list(map(picture, range(4)))


def test_captions_of_one_picture_stay_in_one_split(captions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image_text(captions([row(n, f"Caption {m}.") for n in range(10) for m in range(3)]))
    drawn = split_by_image(found, {"private": 0.6, "test": 0.4}, seed=0)
    assert len({(q.image, q.split) for q in drawn}) == 10 and {q.split for q in drawn} == {"private", "test"}
