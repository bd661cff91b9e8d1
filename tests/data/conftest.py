import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from accord.types import PreferencePair, Question, vqa_prompt


def picture(number: int, format: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    """Return a picture that differs for every number below 2**24."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256 % 256, number // 65_536)).save(buffer, format, lossless=True)
    return buffer.getvalue()


@pytest.fixture(name="picture")
def _picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def vqa_folder(tmp_path: Path) -> Callable[[list[object]], Path]:
    """Write `questions.jsonl` (dicts as JSON, text and bytes as they are) beside ten images `images/0.png`..."""

    def write(lines: list[object]) -> Path:
        folder = tmp_path / "ward"
        (folder / "images").mkdir(parents=True)
        for number in range(10):
            (folder / "images" / f"{number}.png").write_bytes(picture(number))
        (folder / "questions.jsonl").write_bytes(b"\n".join(map(as_line, lines)) + b"\n")
        return folder

    return write


def as_line(line: object) -> bytes:
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()


@pytest.fixture
def row() -> Callable[..., dict[str, object]]:
    """Return a good row of `questions.jsonl` with some cells replaced."""

    def make(number: int, **cells: object) -> dict[str, object]:
        image = f"images/{number % 10}.png"
        return {"id": f"q{number}", "image": image, "question": "what colour?", "answer": "red", **cells}

    return make


@pytest.fixture
def question() -> Callable[..., Question]:
    """Return question `number` about picture `number`, or about the picture given."""

    def make(number: int, image: int | None = None, **fields: str) -> Question:
        given = {"text": "what colour is the ball?", "answer": "red", "question_type": "colour", "split": "private"}
        return Question(id=f"q{number}", image=picture(number if image is None else image), **{**given, **fields})

    return make


@pytest.fixture
def pair() -> Callable[..., PreferencePair]:
    """Return pair `number` about picture `number`."""

    def make(number: int, chosen: str = "red", rejected: str = "blue", **fields: object) -> PreferencePair:
        given = {"images": (picture(number),), "question_id": f"q{number}", "question_type": "colour"}
        return PreferencePair(vqa_prompt("what colour?"), chosen, rejected, **{**given, **fields})  # type: ignore[arg-type]

    return make
