import io
import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test depends on the network; read when the hub's client is imported

import pytest
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from accord.models.load import load_vlm
from accord.models.tiny import FAMILIES, Family, TinyConfig, build_tiny, train_tokenizer
from accord.types import PreferencePair, Question, vqa_prompt

COLOURS = ("red", "blue", "green", "yellow")
TEXTS = ("what colour is it?", "is it red?", "how many squares?", "yes", "no", "one", "two", *COLOURS)


@pytest.fixture(scope="session")
def tiny_config() -> TinyConfig:
    """32 pixels in patches of 16: 2 x 2 = 4 image tokens."""
    return TinyConfig(
        image_size=32,
        patch_size=16,
        hidden_size=32,
        vision_layers=1,
        text_layers=1,
        heads=4,
        intermediate_size=64,
        max_positions=256,
    )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> dict[Family, str]:
    """One untrained checkpoint with its processor per family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    for seed, family in enumerate(FAMILIES):
        model, processor = build_tiny(family, tokenizer, tiny_config, seed=seed)
        model.save_pretrained(folder / family)
        processor.save_pretrained(folder / family)
    return {family: str(folder / family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each of the three families in turn."""
    name: Family = request.param
    return name


@pytest.fixture
def vlm(family: Family, checkpoints: dict[Family, str]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A fresh copy of each family's model, with its processor."""
    return load_vlm(checkpoints[family])


@pytest.fixture
def llava(checkpoints: dict[Family, str]) -> str:
    """The checkpoint for tests that need one family only."""
    return checkpoints["llava-clip-llama"]


def square(colour: str, size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(name="square", scope="session")
def _square() -> Callable[..., bytes]:
    """Return the PNG of a plain square of a colour."""
    return square


@pytest.fixture(scope="session")
def ask() -> Callable[..., Question]:
    """Return question `number` about a plain square, whose colour is the answer."""

    def make(number: int, colour: str = "red", **fields: str) -> Question:
        given = {"text": "what colour is it?", "answer": colour, "question_type": "colour", "split": "private"}
        return Question(id=f"q{number}", image=square(colour), **{**given, **fields})

    return make


@pytest.fixture(scope="session")
def prefer() -> Callable[..., PreferencePair]:
    """Return the preference for a square's colour over another one."""

    def make(number: int, chosen: str = "red", rejected: str = "blue", **fields: object) -> PreferencePair:
        given = {
            "prompt": vqa_prompt("what colour is it?"),
            "images": fields.get("images") or (square(chosen),),
            "question_id": f"q{number}",
            "question_type": "colour",
            "constructed": True,
        }
        return PreferencePair(chosen=chosen, rejected=rejected, **{**given, **fields})  # type: ignore[arg-type]

    return make
