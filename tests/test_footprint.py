"""What is counted before anything is loaded, against hand counts and against what trainings really take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from accord.errors import RecipeError
from accord.footprint import Gpus, Layers, finetuning, footprint, grpo, reward_training
from accord.models.load import LoraSettings, save_model
from accord.models.tiny import TinyConfig, build_tiny, train_tokenizer
from footprint_cases import GRPO, REWARD, TUNING

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def forty_million(tmp_path_factory):
    """Return a function that makes a checkpoint of a family with some forty million parameters, 150 MB."""
    tokenizer = train_tokenizer(("what colour is it?", "red", "blue", "green", "yellow"), vocab_size=300)
    shape = TinyConfig(
        image_size=32,
        patch_size=16,
        hidden_size=512,
        vision_layers=1,
        text_layers=10,
        heads=8,
        intermediate_size=1536,
        max_positions=256,
    )
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("large") / family
            made[family] = save_model(*build_tiny(family, tokenizer, shape, seed=0), folder)
        return made[family]

    return make


@pytest.mark.parametrize(
    ("family", "stage", "rank"),
    [
        ("llava-clip-llama", "finetune", 0),
        ("idefics3", "finetune", 16),
        ("llava-siglip-qwen2", "reward", 0),
        ("llava-clip-llama", "reward", 16),
        ("llava-clip-llama", "grpo", 0),
        ("llava-siglip-qwen2", "grpo", 16),
    ],
)
def test_planned_peaks_are_those_that_are_measured(family, stage, rank, forty_million, checkpoints, tmp_path):
    """Within 15 %."""
    checkpoint = forty_million(family)
    lora = LoraSettings(rank=rank, alpha=rank) if rank else None
    foot = footprint(checkpoint, 32 * 32, 0, "what colour is it?")
    planned = {
        "finetune": lambda: finetuning(foot, TUNING, lora, gpu=False),
        "reward": lambda: reward_training(foot, REWARD, lora, gpu=False),
        "grpo": lambda: grpo(foot, GRPO, lora, gpu=False),
    }[stage]()
    ended = subprocess.run(
        [sys.executable, str(TESTS / "measured_peak.py"), stage, checkpoint, checkpoints[family], str(rank), tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    measured = int(ended.stdout.split()[-1])
    assert sum(planned.values()) == pytest.approx(measured, rel=0.15), planned


def test_activations_and_caches_by_hand():
    """Two layers, d = 8, m = 16, k = 4; a layer keeps 9·8 + 2·4 + 4·16 = 144 values a token, and 2·16 + 2·8 = 48 pass.

    Of 10 tokens in 2 bytes: 10·2·(2·144 + 48) = 6720; with checkpoints 10·2·(2·8 + 144 + 48) = 4160; without gradients
    10·2·(4·8 + 3·16) = 1600; keys and values 10·2·2·2·4 = 320.
    """
    layers = Layers(2, 8, 16, 4)
    assert layers.kept(10, 2, checkpointing=False) == 6720
    assert layers.kept(10, 2, checkpointing=True) == 4160
    assert layers.passing(10, 2) == 1600 and layers.cache(10, 2) == 320


def test_gradients_take_the_place_of_activations(llava):
    """Unless a batch is accumulated, what activations need beyond 4 bytes a trained parameter is all that they add."""
    foot = footprint(llava, 32 * 32, 0)
    free = 4 * foot.size.parameters
    assert foot.beside(free + 5, None, accumulated=False) == 5
    assert foot.beside(free - 5, None, accumulated=False) == 0
    assert foot.beside(free - 5, None, accumulated=True) == free - 5


def test_an_adapter_is_counted_layer_by_layer(llava):
    """It has as many parameters as PEFT makes."""
    from accord.models.load import add_lora, load_model

    lora = LoraSettings(rank=3, alpha=3)
    model = add_lora(load_model(llava)[0], lora)
    made = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert footprint(llava, 32 * 32, 0).adapter(lora) == made > 0


def test_image_tokens_are_the_processors(llava):
    """32 x 32 pixels are 4 tokens, of which the rest are the question's."""
    from accord.models.inputs import prompt_text
    from accord.models.load import load_model
    from accord.types import vqa_prompt

    processor = load_model(llava)[1]
    text = prompt_text(processor, vqa_prompt("is it red?"))
    words = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])  # one of them stands for the image
    assert footprint(llava, 32 * 32, 0, "is it red?").tokens == words - 1 + 4


@pytest.mark.parametrize("text", ["80", "0x80", "8x0", "eight", "8x80x2"])
def test_gpus_are_a_number_and_a_size(text):
    with pytest.raises(RecipeError, match=r"such as 1x80 or 8x80, got"):
        Gpus.read(text)
    assert Gpus.read("8x80") == Gpus(8, 80e9) and Gpus.read("1x79.5GB") == Gpus(1, 79.5e9)
