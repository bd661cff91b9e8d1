"""Time a GRPO step and its peak memory at real sizes with random weights, against stock TRL on the same card.

    3B    the policy trained whole          on a GPU of 80 GB, 8 prompts × 8 completions of 128 tokens
    7B    an adapter of rank 16 on it       the same
    tiny  either, of 0.3 million parameters, for a look at the script on a CPU

One way is `accord.alignment.grpo.align`, the other `trl.GRPOTrainer` with model and processor by transformers
(`stock.py`). Each is measured in a process of its own, so that neither's memory is the other's. An image makes about
1,000 tokens. Beside what is measured stands what `accord.footprint` plans. EasyR1 reports 2.67 completions a second and
GPU for its 7B example on geometry problems.

    python benchmarks/speed/large_step.py                     on a GPU 3B and 7B; without one tiny, and what it would do
    python benchmarks/speed/large_step.py --size 7B --steps 3
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from stock import stock_trainer
from transformers import TrainerCallback
from transformers.utils import logging

from accord.alignment.grpo import AlignmentConfig, align, grpo_config, prompt_dataset
from accord.footprint import footprint, grpo
from accord.models.load import LoraSettings, load_model, lora_config, save_model
from accord.models.tiny import TinyConfig, build_tiny
from accord.types import Question

PATCH = 16


@dataclass(frozen=True)
class Work:
    """What is measured: a LLaVA with the language model of that Qwen2.5-VL."""

    shape: TinyConfig
    lora: LoraSettings | None
    config: AlignmentConfig


LARGE = AlignmentConfig(
    prompts_per_step=8,
    group_size=8,
    learning_rate=1e-6,
    max_completion_length=128,
    completions_per_device=8,
    rollout_rows=64,
    gradient_checkpointing=True,
    evaluate_every=0,
    save_every=0,
)


def shape(width: int, layers: int, heads: int, inner: int, side: int = 31) -> TinyConfig:
    """Return sizes with an image of `side`² patches."""
    return TinyConfig(
        image_size=side * PATCH,
        patch_size=PATCH,
        hidden_size=width,
        vision_layers=2,
        text_layers=layers,
        heads=heads,
        intermediate_size=inner,
        max_positions=2048,
    )


SMALL = replace(LARGE, prompts_per_step=2, group_size=4, max_completion_length=4, completions_per_device=4)
WORKS = {
    "3B": Work(shape(2048, 36, 16, 11008), None, LARGE),
    "7B": Work(shape(3584, 28, 28, 18944), LoraSettings(rank=16, alpha=32), LARGE),
    "tiny": Work(shape(64, 2, 4, 128, side=4), None, SMALL),
    "tiny-lora": Work(shape(64, 2, 4, 128, side=4), LoraSettings(rank=4, alpha=4), SMALL),
}


class Clock(TrainerCallback):
    """Note when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def letters(prompts, completions, **_) -> list[float]:
    return [float(len(set(completion[-1]["content"]))) for completion in completions]


def build(work: Work, folder: Path) -> str:
    """Write the checkpoint with random weights, in bfloat16 where an adapter is trained."""
    tokenizer = load_model("accord/llava-clip-llama")[1].tokenizer
    model, processor = build_tiny("llava-clip-llama", tokenizer, work.shape, seed=0)
    model.config.freeze_vision = True
    return save_model(model.to(torch.bfloat16) if work.lora else model, processor, folder / "policy")


def measure(name: str, shared: bool, steps: int, checkpoint: str) -> dict[str, float]:
    """Return the seconds of a step after the first, and the peak memory in GB; on a CPU the resident one."""
    work = WORKS[name]
    config = replace(work.config, steps=steps + 1, lora=work.lora)
    pixels, side = np.random.default_rng(0), work.shape.image_size
    questions = [
        Question(
            id=str(n),
            image=png(pixels.integers(0, 256, (side, side, 3), dtype=np.uint8)),
            text="what colour is the shape?",
            answer="red",
            question_type="colour",
            split="public",
        )
        for n in range(config.prompts_per_step)
    ]
    clock = Clock()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        if shared:
            model, processor = load_model(checkpoint, trainable=work.lora is None)
            align(model, processor, questions, letters, config, seed=0, out=out, callbacks=[clock])
        else:
            stock_trainer(
                checkpoint,
                torch.float32 if work.lora is None else "auto",
                reward_funcs=letters,
                args=grpo_config(config, seed=0, out=out),
                train_dataset=prompt_dataset(questions, config.steps * config.prompts_per_step, random.Random(0)),
                callbacks=[clock],
                peft_config=lora_config(work.lora) if work.lora else None,
            ).train()
    seconds = (clock.ends[-1] - clock.ends[0]) / steps
    if torch.cuda.is_available():
        peak = float(torch.cuda.max_memory_allocated())
    else:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    return {"seconds": seconds, "peak": peak / 1e9}


def planned(name: str, checkpoint: str) -> float:
    """Return what the plan says that the shared way takes at most, in GB."""
    work = WORKS[name]
    foot = footprint(checkpoint, work.shape.image_size**2, 0)
    assert foot is not None
    config = replace(work.config, lora=work.lora)
    return sum(grpo(foot, config, work.lora, gpu=torch.cuda.is_available()).values()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="a large GRPO step against stock TRL")
    parser.add_argument("--size", choices=[*WORKS], action="append", help="by default what the machine can hold")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
        return
    gpu = torch.cuda.is_available()
    print(torch.cuda.get_device_name() if gpu else "no GPU: resident memory of a process with all its libraries")
    print(
        "| policy | way | seconds a step | completions a second | peak, GB | planned, GB |\n|---|---|---|---|---|---|"
    )
    for name in options.size or (["3B", "7B"] if gpu else ["tiny", "tiny-lora"]):
        rows = WORKS[name].config.prompts_per_step * WORKS[name].config.group_size
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = build(WORKS[name], Path(folder))
            for shared in (False, True):
                told = {"name": name, "shared": shared, "steps": options.steps, "checkpoint": checkpoint}
                called = [sys.executable, __file__, "--child", json.dumps(told)]
                ended = subprocess.run(called, capture_output=True, text=True, check=False)
                way, plan = ("shared", f"{planned(name, checkpoint):.2f}") if shared else ("stock", "")
                if ended.returncode:
                    print(f"| {name} | {way} | failed: {ended.stderr.strip().splitlines()[-1][:200]} | | | {plan} |")
                    continue
                found = json.loads(ended.stdout.splitlines()[-1])
                rate = rows / found["seconds"]
                print(f"| {name} | {way} | {found['seconds']:.2f} | {rate:.2f} | {found['peak']:.2f} | {plan} |")
    if not gpu:
        print("\non a GPU this measures:")
        for name in ("3B", "7B"):
            work = WORKS[name]
            how = f"an adapter of rank {work.lora.rank}" if work.lora else "trained whole"
            c = work.config
            print(
                f"  {name}, {how}: {c.prompts_per_step} prompts × {c.group_size} completions of "
                f"{c.max_completion_length} tokens, images of {(work.shape.image_size // PATCH) ** 2} tokens, both ways"
            )


if __name__ == "__main__":
    main()
