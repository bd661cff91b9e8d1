import hashlib
import stat
from dataclasses import replace

import pytest
from PIL import Image

from accord.errors import CheckpointError
from accord.federation.answering import (
    Answerer,
    key_of,
    matches,
    question_key,
    read_truth,
    truth_book,
    write_truth,
)
from accord.federation.messages import MAX_ANSWER, AnswerItem, Declined, ScoreItem, image_name, to_turns
from accord.models.generate import answer
from accord.models.load import load_model
from accord.types import prompt_of, vqa_prompt

KEYS = [question_key([], [{"role": "user", "content": str(n)}]) for n in range(3)]


def test_a_question_is_known_by_its_image_and_its_words():
    """SHA-256 of the JSON of both; the form of the prompt, on the wire or in a trainer, does not matter."""
    user = [{"role": "user", "content": "where?"}]
    assert question_key(["ab"], user) == hashlib.sha256(b'["ab", [["user", "where?"]]]').hexdigest()
    assert question_key([], user) == hashlib.sha256(b'[null, [["user", "where?"]]]').hexdigest()
    picture = {"type": "image", "image": Image.new("RGB", (1, 1))}
    pictured = [{"role": "user", "content": [picture, {"type": "text", "text": "where?"}]}]
    keys = {question_key(["ab"], prompt) for prompt in (user, vqa_prompt("where?"), pictured)}
    assert keys == {key_of(AnswerItem(["ab"], to_turns(pictured)))}
    others = [[{"role": "user", "content": "here?"}], [{"role": "system", "content": "where?"}], [*user, *user]]
    assert len({question_key(images, prompt) for images in ([], ["ab"], ["None"]) for prompt in (user, *others)}) == 12


def test_exact_match_is_that_of_the_evaluation():
    assert matches(["left lung", " Left  Lung. ", "left", ""], "Left lung").tolist() == [1.0, 1.0, 0.0, 0.0]
    assert matches(["left lung", "Lung", "left"], "Left lung", "lung").tolist() == [1.0, 1.0, 0.0]


@pytest.fixture
def loads():
    return []


@pytest.fixture
def answerer(llava, loads):
    """At most two questions at once, three answers remembered."""

    def load():
        loads.append(llava)
        return load_model(llava)

    return Answerer(load, max_new_tokens=4, batch_size=2, remember=3)


def test_the_answers_are_the_greedy_ones(answerer, loads, llava, ask, square):
    """Those of the evaluation, two at once; the model is loaded at the first question, and no earlier."""
    questions = [ask(n, colour) for n, colour in enumerate(("red", "blue", "green"))]
    images = {image_name(q.image): q.image for q in questions}
    items = [AnswerItem([name], to_turns(vqa_prompt("what colour is it?"))) for name in images]
    assert answerer([], {}) == [] and loads == []
    expected = [said for (said,) in answer(*load_model(llava), questions, max_new_tokens=4, batch_size=2)]
    assert answerer(items, images) == expected
    scored = [ScoreItem(item.images, item.prompt, ["red"]) for item in items]
    assert answerer(scored, {}) == expected  # remembered, and so the images are not looked at
    assert loads == [llava]


def test_a_text_only_model_answers_questions_without_images(texts_only, ask, square, caplog):
    """Those of the evaluation; asked about an image it answers nothing."""
    questions = [replace(ask(n, text=f"{n} plus 2?"), image=None) for n in range(3)]
    items = [AnswerItem([], to_turns(prompt_of(q))) for q in questions]
    answerer = Answerer(lambda: load_model(texts_only), max_new_tokens=4)
    assert answerer(items, {}) == [said for (said,) in answer(*load_model(texts_only), questions, max_new_tokens=4)]
    red = square("red")
    pictured = AnswerItem([image_name(red)], to_turns(vqa_prompt("what?")))
    assert answerer([pictured], {image_name(red): red}) == [Declined.ERROR]
    assert "a text-only model was asked about an image" in caplog.text


class Counting(Answerer):
    """Its answer to a question is the question; it counts."""

    def _generate(self, items, images):
        self.asked = [*getattr(self, "asked", []), *(item.prompt[0].content for item in items)]
        return [item.prompt[0].content[:MAX_ANSWER] for item in items]


def words(*texts):
    return [AnswerItem([], to_turns([{"role": "user", "content": text}])) for text in texts]


def test_a_question_is_answered_once_while_it_is_remembered():
    """Three are remembered. d drops b, since a was asked for again; then b is new."""
    counting = Counting(None, max_new_tokens=4, remember=3)
    for asked in (("a", "b", "a", "c"), ("a",), ("d",), ("c", "a", "d"), ("b",)):
        assert counting(words(*asked), {}) == list(asked)
    assert counting.asked == ["a", "b", "c", "d", "b"]
    assert counting(words(*"uvwxyz"), {}) == list("uvwxyz")  # more at once than are remembered
    assert len(counting._known) == 3


def test_questions_with_and_without_images_are_answered_together(square):
    red = square("red")
    counting = Counting(None, max_new_tokens=4)
    seen, told = words("seen")[0], words("told")[0]
    mixed = [told, AnswerItem([image_name(red)], seen.prompt), told]
    assert counting(mixed, {image_name(red): red}) == ["told", "seen", "told"]
    assert counting.asked == ["told", "seen"]


def test_a_long_answer_is_cut(llava, monkeypatch):
    model, processor = load_model(llava)
    monkeypatch.setattr(type(processor.tokenizer), "batch_decode", lambda *_, **__: [" " + "x" * 999])
    assert Answerer(lambda: (model, processor), max_new_tokens=1)(words("say x"), {}) == ["x" * MAX_ANSWER]


def test_an_image_that_cannot_be_read(answerer, square):
    """Its question is refused, each time anew; the others are answered."""
    turns = to_turns(vqa_prompt("what?"))
    items = [AnswerItem(["bad"], turns), AnswerItem(["good"], turns), AnswerItem(["bad"], turns)]
    said = answerer(items, {"bad": b"GIF89a", "good": square("red")})
    assert said[0] is said[2] is Declined.IMAGE and said[1] == answerer(items[1:2], {})[0]
    assert list(answerer._known) == [key_of(items[1])]


def test_a_disputed_question_has_no_reference_answer():
    """The first is answered twice alike, but for its form; the second in two ways; the third by fewer the next time."""
    known = [(KEYS[0], ("Left lung",)), (KEYS[1], ("red",)), (KEYS[2], ("4", "four", "iv"))]
    known += [(KEYS[0], ("left lung.",)), (KEYS[1], ("blue",)), (KEYS[2], ("Four", "4"))]
    assert truth_book(known) == {KEYS[0]: ("Left lung",), KEYS[2]: ("4", "four")}


def test_reference_answers_survive_the_file(tmp_path):
    """Whatever the order they came in, the file is the same; only its owner reads it."""
    book, path = {KEYS[0]: ("où? 🙂",), KEYS[1]: ("", "none")}, tmp_path / "sites" / "truth.json"
    write_truth(path, book)
    written = path.read_bytes()
    assert read_truth(path) == book and stat.S_IMODE(path.stat().st_mode) == 0o600
    write_truth(path, dict(reversed(book.items())))
    assert path.read_bytes() == written
    write_truth(path, {})
    assert read_truth(path) == {} and [each.name for each in path.parent.iterdir()] == ["truth.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "reference answers are missing"),
        (b"", "cannot be read"),
        (b'{"' + KEYS[0].encode() + b'": "re', "cannot be read"),
        (b'["red"]', "cannot be read"),
        (b'{"' + KEYS[0].encode() + b'": 4}', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"what colour is it?": "red"}', "'what colour is it\\?' is the key of no question"),
        (b'{"' + b"\\u001b" * 64 + b'": "red"}', r"'(\\x1b){40}' is the key of no question"),
    ],
    ids=["missing", "empty", "torn", "list", "number", "bytes", "text", "control"],
)
def test_damaged_reference_answers(tmp_path, content, message):
    path = tmp_path / "truth.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"truth\.json: .*{message}.*; train the site again with"):
        read_truth(path)


def test_a_folder_in_the_place_of_the_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_truth(tmp_path)
