"""Time scoring G candidate answers to one question about one image: the image encoded once, or once per candidate.

    once       build_batch + RewardModel: one processor call, one vision pass and one row per prompt, its candidates
               behind one copy of the prefix
    repeated   the plain batch: processor(images=[image] * G, text=G whole conversations), one forward of G rows
    one by one the plain loop: processor and forward for each candidate by itself

All three compute the same scores; that is asserted, not assumed. The ways are timed in turn within every repetition, so
that whatever else the machine does meets all of them; reported are medians, and the median of the paired ratios.

    python benchmarks/speed/scoring.py [--repetitions 15] [--prompts 4]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from accord.models.inputs import build_batch, prompt_text
from accord.models.load import load_model, parameter_count
from accord.models.tiny import FAMILIES, TinyConfig, build_tiny
from accord.rewards.model import RewardModel
from accord.types import vqa_prompt

GROUPS = (4, 8, 16)
TOLERANCE = 1e-4  # float32; the ways differ in padding and batch shape, so in the order of summation
LARGER = TinyConfig(
    image_size=256,
    patch_size=16,
    hidden_size=256,
    vision_layers=8,
    text_layers=4,
    heads=8,
    intermediate_size=768,
    max_positions=1024,
)
WORDS = ("red", "blue", "green", "yes", "no", "circle", "triangle", "a red circle", "black", "teal", "gray")


def models() -> dict[str, RewardModel]:
    """The three shipped checkpoints, and a larger untrained one with 8 vision layers and 256 image tokens."""
    found = {}
    for seed, family in enumerate(FAMILIES):
        torch.manual_seed(seed)
        found[family] = RewardModel(*load_model(f"accord/{family}"))
    tokenizer = found["llava-clip-llama"].processor.tokenizer
    found["larger llava-clip-llama"] = RewardModel(*build_tiny("llava-clip-llama", tokenizer, LARGER, seed=9))
    return {name: model.eval().requires_grad_(False) for name, model in found.items()}


def pictures(count: int, size: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def once(model: RewardModel, prompts, images, candidates) -> Tensor:
    return model(build_batch(model.processor, prompts, images, candidates))


def _plain(model: RewardModel, images: list[Image.Image], texts: list[str]) -> Tensor:
    """Forward as any script would, to the head on the last real token; the language-model head is left out here too."""
    model.processor.tokenizer.padding_side = "right"
    inputs = model.processor(images=[[image] for image in images], text=texts, return_tensors="pt", padding=True)
    hidden = model.backbone.base_model(**inputs, use_cache=False).last_hidden_state
    last = inputs["attention_mask"].sum(dim=1) - 1
    return model.head(hidden[torch.arange(len(hidden)), last]).squeeze(-1)


def _texts(model: RewardModel, prompt, completions) -> list[str]:
    return [prompt_text(model.processor, prompt) + text + model.processor.tokenizer.eos_token for text in completions]


def repeated(model: RewardModel, prompts, images, candidates) -> Tensor:
    rows = [image for image, group in zip(images, candidates, strict=True) for _ in group]
    texts = [t for prompt, group in zip(prompts, candidates, strict=True) for t in _texts(model, prompt, group)]
    return _plain(model, rows, texts)


def one_by_one(model: RewardModel, prompts, images, candidates) -> Tensor:
    scores = [
        _plain(model, [image], [text])
        for prompt, image, group in zip(prompts, images, candidates, strict=True)
        for text in _texts(model, prompt, group)
    ]
    return torch.cat(scores)


WAYS: dict[str, Callable[..., Tensor]] = {"once": once, "repeated": repeated, "one by one": one_by_one}


def measure(model: RewardModel, prompts: int, group: int, repetitions: int) -> tuple[dict[str, list[float]], float]:
    """Return seconds by way, and the largest difference between the ways' scores."""
    size = model.backbone.config.vision_config.image_size
    asked = [vqa_prompt(f"what is number {p}?") for p in range(prompts)]
    images = pictures(prompts, size)
    candidates = [[f"{WORDS[i % len(WORDS)]} {i}" for i in range(group)] for _ in range(prompts)]
    scores = {name: way(model, asked, images, candidates) for name, way in WAYS.items()}  # also the warm-up
    difference = max(float((s - scores["once"]).abs().max()) for s in scores.values())
    assert difference < TOLERANCE, f"the ways disagree by {difference:.2g}"
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for repetition in range(repetitions):
        names = list(WAYS)
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            began = time.perf_counter()
            WAYS[name](model, asked, images, candidates)
            seconds[name].append(time.perf_counter() - began)
    return seconds, difference


def machine() -> str:
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, float32"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="scoring with the image encoded once, against once per candidate")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=4, help="P, each with its own image")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"{machine()}; P = {options.prompts}, medians of n interleaved repetitions\n")
    ways = " | ".join(f"{name}, ms" for name in WAYS)
    print(f"| model | parameters | G | n | {ways} | repeated ÷ once | one by one ÷ once |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for name, model in models().items():
        # A repetition of the larger model takes seconds, of which scheduling is a small part: fewer do.
        n = options.repetitions if parameter_count(model) < 1e6 else max(3, options.repetitions // 5)
        for group in GROUPS:
            seconds, difference = measure(model, options.prompts, group, n)
            worst = max(worst, difference)
            times = " | ".join(f"{1000 * median(seconds[way]):.1f}" for way in WAYS)
            ratios = " | ".join(
                f"{median(a / b for a, b in zip(seconds[way], seconds['once'], strict=True)):.2f}"
                for way in ("repeated", "one by one")
            )
            count = f"{parameter_count(model) / 1e6:.2f} M"
            print(f"| {name} | {count} | {group} | {n} | {times} | {ratios} |", flush=True)
    print(f"\nlargest difference between the ways' scores: {worst:.1e}")


if __name__ == "__main__":
    main()
