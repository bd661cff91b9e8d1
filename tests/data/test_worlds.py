"""The two constructed worlds, on small folders in the form of the real ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from accord.data.conventions import FORMS, WANTED, load_conventions
from accord.data.radiology_and_rooms import TYPES, load_radiology_and_rooms, modality_of, organs_of, rooms_of
from accord.errors import DataError
from accord.types import ImageSource, Question

SPLITS = ("base", "private", "public", "dev", "test")


@pytest.fixture
def world(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """Write 60 scans, 60 photographs of rooms and 60 with captions, every split with as many."""
    kinds = [("abd", "is the liver seen?"), ("chest", "is the heart large?"), ("head", "is this an mri?")]
    scans, rooms, captions = [], [], []
    for i in range(60):
        split = SPLITS[i % 5]
        organ, asked = kinds[i % 3]
        modality = {"question_type": "MODALITY"} if organ == "head" else {"question_type": "PRES"}
        scan = {"id": f"s{i}", "image": f"images/s{i}.png", "question": asked, "answer": "yes", "organ": organ}
        scans.append({**scan, **modality, "split": split})
        thing = ("bed", "stove", "sofa")[i % 3]
        room = {"id": f"r{i}", "image": f"images/r{i}.png", "question": f"what is beside the {thing}?"}
        rooms.append({**room, "answer": "pillow" if i % 2 else "lamp", "split": split})
        said = [f"A {('dog', 'man')[i % 2]} runs through the {('snow', 'grass')[i // 2 % 2]} ."] * 5
        captioned = {"base": "base", "public": "public", "dev": "pretrain", "test": "caption-test"}.get(
            split, "private"
        )
        captions.append({"image": f"images/c{i}.png", "split": captioned, "captions": said})
    files = {"vqa_rad/questions": scans, "daquar/questions": rooms, "flickr8k/captions": captions}
    for number, (name, rows) in enumerate(files.items()):
        file = tmp_path / f"{name}.jsonl"
        (file.parent / "images").mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for i, row in enumerate(rows):
            (file.parent / str(row["image"])).write_bytes(picture(1000 * number + i))
    return tmp_path


def by_type(questions: list[Question], split: str) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for q in questions:
        if q.split == split:
            found.setdefault(q.question_type, []).append(q)
    return found


def test_constructed_questions_have_the_answers_that_the_annotations_say(world: Path) -> None:
    test = by_type(load_radiology_and_rooms(world), "test")
    assert set(TYPES) <= set(test)
    for q in test["organ"]:
        number = int(Path(str(q.image)).stem[1:])
        assert q.answer == ("abdomen", "chest", "head")[number % 3]
    assert {q.answer for q in test["modality"]} == {"ct", "x-ray", "mri"}
    assert {q.answer for q in test["room"]} == {"bedroom", "kitchen", "living room"}
    for kind in ("organ yes/no", "modality yes/no", "presence"):
        answers = [q.answer for q in test[kind]]
        assert answers.count("yes") == answers.count("no") > 0
    assert all(q.answer == "yes" for q in test["written radiology"])


def test_the_server_has_no_labels_of_radiology_and_few_of_rooms(world: Path) -> None:
    labelled = [q for q in load_radiology_and_rooms(world, labels=0.5) if q.split == "base"]
    assert {q.domain for q in labelled} == {"indoor"}
    everything = [q for q in load_radiology_and_rooms(world, labels=1.0) if q.split == "base"]
    assert 0 < len(labelled) < len(everything)
    none = load_radiology_and_rooms(world, labels=0.0)
    assert not [q for q in none if q.split == "base"]


def test_exposure_shows_which_answers_there_are_and_not_which_is_right(world: Path) -> None:
    plain = load_radiology_and_rooms(world)
    exposed = [q for q in load_radiology_and_rooms(world, exposure=True) if q not in plain]
    assert exposed and {q.split for q in exposed} == {"base"} and {q.domain for q in exposed} == {"radiology"}
    assert not {q.image for q in plain} & {q.image for q in exposed}  # no image of theirs is in another split
    organs = [q for q in exposed if q.question_type == "organ"]
    right = [("abdomen", "chest", "head")[int(Path(str(q.image)).stem[1:]) % 3] for q in organs]
    assert [q.answer for q in organs] != right and {q.answer for q in organs} <= {"abdomen", "chest", "head"}


def test_a_server_that_knows_radiology_has_the_right_answers(world: Path) -> None:
    plain = load_radiology_and_rooms(world)
    known = [q for q in load_radiology_and_rooms(world, exposure=True, radiology=True) if q not in plain]
    assert known and {q.split for q in known} == {"base"}
    organs = [q for q in known if q.question_type == "organ"]
    assert [q.answer for q in organs] == [
        ("abdomen", "chest", "head")[int(Path(str(q.image)).stem[1:]) % 3] for q in organs
    ]


def test_captions_say_what_the_other_answers_say(world: Path) -> None:
    plain = load_radiology_and_rooms(world, written=False)
    assert not [q for q in plain if q.question_type.startswith("written")]
    found = [q for q in load_radiology_and_rooms(world, written=False, captions=True) if q not in plain]
    answers = {(q.image, q.question_type): q.answer for q in plain}
    for q in found:
        if q.question_type == "scan caption":
            organ, modality = answers[q.image, "organ"], answers[q.image, "modality"]
            assert q.answer == f"{'a' if modality == 'ct' else 'an'} {modality} of the {organ}"
        else:
            number, room = int(Path(str(q.image)).stem[1:]), answers[q.image, "room"]
            seen = {"bedroom": ["a bed"], "kitchen": ["a stove"], "living room": []}[room]
            seen += ["a pillow"] if number % 2 else []
            assert q.answer == " with ".join([f"a {room}", *([" and ".join(seen)] if seen else [])])
    assert {q.question_type for q in found} == {"scan caption", "room caption"}


def test_draws_depend_on_the_files_names_and_not_on_where_the_folder_is(world: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("vqa_rad", "daquar", "flickr8k"):
        (world / name).rename(moved / name)
    here = [(q.id, q.answer, q.split) for q in load_radiology_and_rooms(moved, exposure=True)]
    for name in ("vqa_rad", "daquar", "flickr8k"):
        (moved / name).rename(world / name)
    assert here == [(q.id, q.answer, q.split) for q in load_radiology_and_rooms(world, exposure=True)]


def test_a_modality_is_the_designs_or_what_the_questions_say() -> None:
    def asked(text: str, answer: str, kind: str = "PRES") -> Question:
        return Question("q", Path("i.png"), text, answer, kind, "test")

    assert modality_of("chest", []) == "x-ray" and modality_of("abdomen", []) == "ct"
    assert modality_of("head", []) is None
    assert modality_of("head", [asked("Is this a T2 weighted image?", "yes")]) == "mri"
    assert modality_of("head", [asked("Is this an MRI?", "no", "MODALITY"), asked("Is it a CT?", "yes")]) == "ct"
    assert modality_of("head", [asked("Is this a CT or an MRI?", "unclear")]) is None


def test_a_room_needs_more_words_than_any_other() -> None:
    bed, both = Path("bed.png"), Path("both.png")
    assert rooms_of({bed: "what is on the bed? a blanket", both: "is the bed beside the oven?"}) == {bed: "bedroom"}


def test_an_unknown_organ_is_named(world: Path) -> None:
    file = world / "vqa_rad" / "questions.jsonl"
    file.write_text(file.read_text().replace('"organ": "abd"', '"organ": "foot"'))
    with pytest.raises(DataError, match="the organ is 'foot'"):
        load_radiology_and_rooms(world)


def test_every_site_wants_its_own_form_of_the_same_facts(world: Path) -> None:
    questions = load_conventions(world)
    assert {q.text for q in questions} == {"describe the picture."}
    wanted = by_type(questions, "private")
    assert {q.answer for q in wanted["radiology"]} == {"x-ray chest", "ct abdomen", "mri head"}
    assert {q.answer for q in wanted["indoor"]} <= {"bedroom", "kitchen", "living room"}
    assert {q.answer for q in wanted["photographs"]} == {"snow", "grass"}
    for q in (*wanted["radiology"], *wanted["indoor"], *wanted["photographs"]):
        assert len({q.answer, *q.weaker}) == len(FORMS) and not q.references
    assert "shapes" not in wanted and set(WANTED) == set(wanted)


def test_the_two_worlds_put_the_same_scans_into_dev(world: Path) -> None:
    """Half of those that the folder gives to `base`: no picture of the server is one of dev in the other world."""

    def scans(questions: list[Question], split: str) -> set[ImageSource]:
        return {q.image for q in questions if q.domain == "radiology" and q.split == split}

    tastes, exams = load_conventions(world), load_radiology_and_rooms(world, exposure=True)
    for split in ("base", "dev"):
        assert scans(tastes, split) and scans(tastes, split) <= scans(exams, split)


def test_the_server_and_the_held_out_domain_have_no_taste(world: Path) -> None:
    questions = load_conventions(world)
    without = [q for q in questions if q.split == "base" or q.domain == "shapes"]
    assert without and all(len(q.references) == 3 and not q.weaker for q in without)
    words = {len(q.answer.split()) for q in questions if q.split == "base" and q.domain == "shapes"}
    assert words == {1, 2}


def test_two_sites_may_want_different_things_of_one_domain(world: Path) -> None:
    questions = load_conventions(world, disputed=True)
    north, south = ([q for q in questions if q.domain == f"indoor {side}"] for side in ("north", "south"))
    assert north and south and {q.split for q in (*north, *south)} == {"private"}
    assert all(q.answer in ("bedroom", "kitchen", "living room") for q in north)
    assert all(q.answer in q.weaker or len(q.answer.split()) > 1 for q in south)
    test = by_type(questions, "test")
    ours, theirs = test["indoor, north's taste"], test["indoor, south's taste"]
    assert [q.image for q in ours] == [q.image for q in theirs]
    assert all(a.answer != b.answer for a, b in zip(ours, theirs, strict=True))
    assert len({q.id for q in questions}) == len(questions)


@pytest.mark.parametrize(
    ("name", "load"), [("vqa_rad/questions", load_radiology_and_rooms), ("flickr8k/captions", load_conventions)]
)
def test_a_row_without_an_image_is_named(world: Path, name: str, load: Callable[[Path], list[Question]]) -> None:
    file = world / f"{name}.jsonl"
    first, *others = file.read_text().splitlines()
    bare = {key: value for key, value in json.loads(first).items() if key != "image"}
    file.write_text("\n".join([json.dumps(bare), *others]))
    with pytest.raises(DataError, match=r"\.jsonl:1: column 'image' is missing"):
        load(world)


def test_the_organ_of_a_row_without_an_image(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"organ": "head"}\n')
    with pytest.raises(DataError, match=r"questions\.jsonl:1: column 'image' is missing"):
        organs_of(tmp_path)
