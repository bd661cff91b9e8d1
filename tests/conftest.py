import fcntl
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test depends on the network; read when the hub's client is imported

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    EfficientNetConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from accord.data.easy_vqa import load_easy_vqa
from accord.models.load import load_model, save_model
from accord.models.tiny import CHAT_TEMPLATE, FAMILIES, Family, TinyConfig, build_tiny, train_tokenizer
from accord.recipe import Recipe, SiteConfig
from accord.runs import Run
from accord.stages.job import Job
from accord.types import PreferencePair, Question, vqa_prompt
from in_browser import Open, opened

COLOURS = ("red", "blue", "green", "yellow")
TEXTS = ("what colour is it?", "is it red?", "how many squares?", "yes", "no", "one", "two", *COLOURS)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that has a folder of this name filled once for all worker processes; it is copied, not changed.

    Where pytest-xdist runs several, each is a session of its own: the first that asks makes it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent / "made-once" if "PYTEST_XDIST_WORKER" in os.environ else base / "made-once"
    shared.mkdir(exist_ok=True)

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder, whole = shared / name, shared / f"{name}.whole"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                whole.touch()
        return folder

    return made


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


@pytest.fixture
def ranks_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No other worker starts processes of torch.distributed meanwhile: two launchers may choose one port."""
    with (tmp_path_factory.getbasetemp().parent / "ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def chromium() -> Iterator[Open]:
    """Open pages in a headless Chromium: `chromium(width=390, dark=True)`; tests that take it are marked `browser`."""
    with opened() as open_page:
        yield open_page


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each of the three families in turn."""
    name: Family = request.param
    return name


@pytest.fixture
def vlm(family: Family, checkpoints: dict[Family, str]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A fresh copy of each family's model, with its processor."""
    return load_model(checkpoints[family])


@pytest.fixture
def llava(checkpoints: dict[Family, str]) -> str:
    """The checkpoint for tests that need one family only."""
    return checkpoints["llava-clip-llama"]


@pytest.fixture(scope="session")
def texts_only(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> str:
    """An untrained checkpoint of a text-only model."""
    model, tokenizer = build_tiny("text-qwen2", train_tokenizer(TEXTS, vocab_size=300), tiny_config, seed=0)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("texts") / "text-qwen2")


@pytest.fixture(scope="session")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained checkpoint with a frozen convolutional tower: EfficientNet, FastVLM's projector, Llama."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    torch.manual_seed(0)
    vision = EfficientNetConfig(
        image_size=64,
        in_channels=[32, 8, 16],
        out_channels=[8, 16, 16],
        kernel_sizes=[3, 3, 3],
        strides=[2, 2, 2],
        num_block_repeats=[1, 1, 1],
        expand_ratios=[1, 2, 2],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_size=1280,  # the width of the top convolution, which no setting changes
        depthwise_padding=[],
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = FastVlmConfig(vision_config=vision, text_config=text, image_token_id=image, tie_word_embeddings=False)
    model = FastVlmForConditionalGeneration(config)
    for module in model.modules():  # statistics that a training has left
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.01, 0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 64, "width": 64}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )
    return save_model(model, processor, tmp_path_factory.mktemp("towers") / "efficientnet")


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


IMAGES = {"base": 10, "private": 40, "public": 12, "dev": 8, "test": 10}
TUNING = {"steps": 2, "batch_size": 8}
REWARD = {
    "steps": 6,
    "prompts_per_batch": 4,
    "rejected_per_prompt": 2,
    "evaluate_every": 3,
    "evaluate_on": 12,
    "vocabulary": 13,
}
AVERAGING = {"rounds": 2, "local_steps": 1, "batch_size": 8}


@pytest.fixture(scope="session")
def vqa_folder(made_once):
    """The questions about the first few images of every split, in Accord's own form."""
    return made_once("shapes", _write_questions)


def _write_questions(folder):
    (folder / "images").mkdir()
    taken = {split: set() for split in IMAGES}
    lines = []
    for q in load_easy_vqa():
        if q.image not in taken[q.split]:
            if len(taken[q.split]) == IMAGES[q.split]:
                continue
            taken[q.split].add(q.image)
            shutil.copyfile(q.image, folder / "images" / f"{q.split}-{q.image.name}")
        image = f"images/{q.split}-{q.image.name}"
        row = {"id": q.id, "image": image, "question": q.text, "answer": q.answer}
        lines.append(json.dumps({**row, "question_type": q.question_type, "split": q.split}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))
    assert Counter(json.loads(line)["split"] for line in lines)["test"] > 60


@pytest.fixture(scope="session")
def tiny_recipe(vqa_folder):
    """A recipe as a table: three sites of three families, a few steps of everything."""
    families = {
        "colour": ("accord/llava-siglip-qwen2", "colour"),
        "shape": ("accord/idefics3", "shape"),
        "yes-no": ("accord/llava-clip-llama", "yes/no"),
    }
    return {
        "name": "tiny",
        "seed": 0,
        "threads": 1,
        "questions": [{"kind": "folder", "path": str(vqa_folder)}],
        "preferences": {"rejected_per_question": 3, "policy_samples": 2},
        "sites": [
            {
                "name": name,
                "checkpoint": checkpoint,
                "question_types": [kind],
                "fraction": 0.5,
                "answers": True,
                "owns": 0.5,
                "finetune": TUNING,
                "reward_model": REWARD,
            }
            for name, (checkpoint, kind) in families.items()
        ],
        "router": {"layers": 1, "width": 16, "rounds": 2, "local_steps": 1, "pairs_per_batch": 8, "pairs_per_site": 8},
        "alignment": {
            "steps": 4,
            "prompts_per_step": 6,
            "group_size": 4,
            "evaluate_every": 2,
            "evaluate_on": 12,
            "save_every": 1,
        },
        "routing": {"mode": "soft"},  # every site is asked, whatever a router of two rounds has learnt
        "fedgrpo": {"auxiliary": 24, "neighbours": 6, "refresh_every": 1},
        "pooled": {"finetune": TUNING, "reward_model": REWARD},
        "server_alone": {"questions": 24, "finetune": TUNING},
        "shared_reward": {"finetune": AVERAGING, "averaging": AVERAGING},
        "fedit": {"averaging": AVERAGING},
        "feddpo": {"averaging": AVERAGING},
        "fedbis": {"averaging": AVERAGING, "prompts": 24, "dpo_steps": 2},
        "fedbiscuit": {
            "averaging": AVERAGING,
            "selectors": 2,
            "warmup_rounds": 1,
            "regroup_every": 1,
            "compare_on": 8,
            "prompts": 24,
            "dpo_steps": 2,
        },
        "evaluation": {"questions": 60, "gallery": 4},
    }


@pytest.fixture
def vqa(tmp_path, square):
    """Return a function that makes a folder of rows `(split, type, colour)`, each about a picture of its own size."""

    def make(name, rows):
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for n, (split, kind, colour) in enumerate(rows):
            (folder / f"{n}.png").write_bytes(square(colour, (32 + n, 32)))
            row = {"id": f"{name}-{n}", "image": f"{n}.png", "question": "what colour is it?", "answer": colour}
            lines.append(json.dumps({**row, "question_type": kind, "split": split}) + "\n")
        (folder / "questions.jsonl").write_text("".join(lines))
        return str(folder)

    return make


@pytest.fixture
def job(tmp_path):
    """A job of two sites, `a` for colour and `b` for number, in a new run folder; no question is read yet."""
    sites = tuple(
        SiteConfig(name, "accord/idefics3", question_types=(kind,)) for name, kind in (("a", "colour"), ("b", "number"))
    )
    with Run.create(tmp_path / "run", 'name = "x"\n', seed=0) as run:
        yield Job(Recipe("x", sites), run, quiet=True)
