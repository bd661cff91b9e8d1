"""Train a checkpoint for two steps in a process of its own, and print the bytes of memory that this took at most.

    python tests/measured_peak.py {finetune,reward,grpo} CHECKPOINT WARM_UP_CHECKPOINT LORA_RANK SCRATCH

A small checkpoint is trained first, so that all code is loaded and counts for nothing. What is printed is the peak of
the resident memory beyond what the process had before it loaded the checkpoint. The kernel's counter starts once that
is loaded, since reading a file maps it beside the weights for a moment.
"""

import ctypes
import gc
import io
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image

from accord.alignment.grpo import align
from accord.models.finetune import finetune
from accord.models.load import LoraSettings, add_lora, load_model
from accord.rewards.model import RewardModel
from accord.rewards.train import train_reward_model
from accord.types import PreferencePair, Question, vqa_prompt
from footprint_cases import GRPO, REWARD, TUNING


def square(colour: str, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def letters(prompts, completions, **_) -> list[float]:
    return [float(len(set(completion[-1]["content"]))) for completion in completions]


def main(stage: str, checkpoint: str, lora: LoraSettings | None, out: Path) -> int:
    """Return the peak, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    colours = ("red", "blue", "green", "yellow")
    questions = [
        Question(id=str(n), image=square(c, 32), text="what colour is it?", answer=c, question_type="c", split="public")
        for n, c in enumerate(colours)
    ]
    if stage == "reward":
        reward = RewardModel.from_checkpoint(checkpoint, lora=lora)
        pairs = [
            PreferencePair(vqa_prompt(q.text), q.answer, wrong, (q.image,), q.id, "c", constructed=True)
            for q in questions
            for wrong in colours
            if wrong != q.answer
        ]
    else:
        model, processor = load_model(checkpoint, trainable=lora is None)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    if stage == "finetune":
        finetune(add_lora(model, lora) if lora else model, processor, questions, TUNING, seed=0, out=out)
    elif stage == "reward":
        train_reward_model(reward, pairs, [], [], REWARD, seed=0, out=out)
    else:
        from dataclasses import replace

        align(model, processor, questions, letters, replace(GRPO, lora=lora), seed=0, out=out)
    return resident("VmHWM") - before


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    named, large, small, rank, scratch = sys.argv[1:]
    settings = LoraSettings(rank=int(rank), alpha=int(rank)) if int(rank) else None
    main(named, small, settings, Path(scratch))
    print(main(named, large, settings, Path(scratch)))
