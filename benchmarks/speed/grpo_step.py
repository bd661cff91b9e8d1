"""Time a GRPO step with shared prefixes against stock TRL at equal work, and say where the time goes.

    whole    a step: images, rollout, rewards, reference, policy, backward, optimiser
    update   the policy's log-probabilities and the backward pass alone, beside the bound that token counts set,
             G (P + R) / (P + G R)
    memory   the peak resident memory of a training, each way in a process of its own, above that with the model loaded

P prefix tokens, R completion tokens, G completions a prompt. One way is `trl.GRPOTrainer` with model and processor by
transformers (`stock.py`), the other `SharedPrefixTrainer`; they alternate within one run. No completion ends before R
tokens (its end token is one that is never sampled), so both ways compute the same number of tokens. The reward is the
text's length of distinct letters. `demo` is the shipped policy with the demo's P, G and R; the others are a LLaVA of
256 features with 4 + 2 layers and random weights, whose image gives the prefix.

On a CPU the seconds are those that this process computes in all its threads, whatever else the machine does.

    OMP_NUM_THREADS=1 python benchmarks/speed/grpo_step.py [--repetitions 5] [--figure benchmarks/speed/step.svg]
    python benchmarks/speed/grpo_step.py --gpu        3 B parameters, bfloat16, 8 prompts × 8, 1,000 image tokens
"""

from __future__ import annotations

import argparse
import json
import logging as standard_logging
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from stock import stock_trainer
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl import GRPOTrainer

from accord.alignment.grpo import AlignmentConfig, grpo_config
from accord.alignment.trainer import SharedPrefixTrainer
from accord.models.inputs import prompt_text
from accord.models.load import load_model, save_model
from accord.models.tiny import TinyConfig, build_tiny
from accord.types import vqa_prompt

matplotlib.use("svg")
import matplotlib.pyplot as plt

PATCH = 16
GRID = {80: 8, 300: 17, 1000: 31}  # prefix: patches along a side of the image; text fills up the rest
SHAPES = {
    "small": {"hidden_size": 256, "vision_layers": 2, "text_layers": 4, "heads": 8, "intermediate_size": 768},
    "3B": {"hidden_size": 2048, "vision_layers": 8, "text_layers": 36, "heads": 16, "intermediate_size": 11008},
}
"""`3B` has the width and depth of Qwen2.5-VL-3B's language model."""
PARTS = ("images and tokens", "rollout", "rewards", "reference", "policy, forward", "policy, backward", "the rest")


@dataclass(frozen=True)
class Work:
    """What one comparison computes."""

    prefix: int = 0  # 0 for the demo's model and images
    completion: int = 3
    group: int = 8
    prompts: int = 36
    size: str = "small"

    @property
    def name(self) -> str:
        size = "" if self.size == "small" else f"{self.size} "
        return "demo" if not self.prefix else f"{size}P={self.prefix} R={self.completion} G={self.group}"


def policy(work: Work, folder: Path) -> str:
    """Return the checkpoint: the shipped one, or a larger one with random weights."""
    if not work.prefix:
        return "accord/llava-clip-llama"
    side = GRID[work.prefix] * PATCH
    shape = TinyConfig(image_size=side, patch_size=PATCH, max_positions=2048, **SHAPES[work.size])
    tokenizer = load_model("accord/llava-clip-llama")[1].tokenizer
    return save_model(*build_tiny("llava-clip-llama", tokenizer, shape, seed=0), folder / "policy")


def questions(work: Work, checkpoint: str, count: int) -> tuple[Dataset, int]:
    """Return prompts of about P tokens with one random picture each, and the true P."""
    _, processor = load_model(checkpoint)
    side = GRID[work.prefix] * PATCH if work.prefix else 64
    pixels = np.random.default_rng(0)
    pictures = [Image.fromarray(pixels.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]

    def tokens(text: str) -> int:
        given = processor(images=[[pictures[0]]], text=[prompt_text(processor, vqa_prompt(text))], return_tensors="pt")
        return int(given["input_ids"].shape[1])

    text = "what colour is the shape?"
    while tokens(text) < work.prefix:
        text += " yes"
    data = {"prompt": [[{"role": "user", "content": text}]] * count, "image": pictures}
    return Dataset.from_dict(data), tokens(text)


def letters(prompts, completions, **_) -> list[float]:
    return [float(len(set(completion[-1]["content"]))) for completion in completions]


def trainer_for(work: Work, checkpoint: str, data: Dataset, scratch: Path, *, shared: bool) -> GRPOTrainer:
    large = work.size != "small"
    config = AlignmentConfig(
        steps=1000,
        prompts_per_step=work.prompts,
        group_size=work.group,
        learning_rate=0.0,
        max_completion_length=work.completion,
        completions_per_device=work.group if large else 0,  # one prompt at a time: 64 full rows would not fit
        evaluate_every=0,
        save_every=0,
    )
    random.seed(0)
    torch.manual_seed(0)
    told = {"reward_funcs": letters, "args": grpo_config(config, seed=0, out=scratch), "train_dataset": data}
    half = large and torch.cuda.is_available()
    if shared:
        model, processor = load_model(checkpoint)
        model = model.to(torch.bfloat16) if half else model
        trainer: GRPOTrainer = SharedPrefixTrainer(model=model, processing_class=processor, **told)
        trainer.remove_callback(PrinterCallback)
    else:
        trainer = stock_trainer(checkpoint, torch.bfloat16 if half else "auto", **told)
    never = trainer.model.config.image_token_id  # suppressed, so that every completion has R tokens
    trainer.eos_token_ids = [never]
    trainer.generation_kwargs["eos_token_id"] = trainer.generation_config.eos_token_id = never
    if large:
        trainer.args.optim = "sgd"  # two trainers' Adam would not fit beside four models
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


class Step:
    """One trainer, stepped by hand, with a clock around its parts."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self.rows = iter(trainer.get_train_dataloader())
        self.spent: dict[str, float] = defaultdict(float)
        for part, names in {
            "images and tokens": ("_tokenize_prompts",),
            "rollout": ("_generate_single_turn",),
            "rewards": ("_calculate_rewards",),
            "reference": ("_get_per_token_logps_and_entropies",),
        }.items():
            for name in names:
                setattr(trainer, name, self.around(part, getattr(trainer, name)))

    def around(self, part: str, call):
        def timed(*args, **named):
            began = now()
            try:
                return call(*args, **named)
            finally:
                self.spent[part] += now() - began

        return timed

    def whole(self) -> dict[str, float]:
        """Return the seconds of one step by part."""
        trainer = self.trainer
        self.spent.clear()
        began, parts = now(), defaultdict(float)
        for _ in range(trainer.args.gradient_accumulation_steps):
            rows = next(self.rows)
            trainer.model.train()
            batch = trainer._prepare_inputs(rows)
            parts["reference"] += self.spent.pop("reference", 0.0)
            forward = now()
            loss = trainer._compute_loss(trainer.model, batch)
            backward = now()
            trainer.accelerator.backward(loss)
            self.spent.pop("reference", None)  # the policy's log-probabilities go by the same name
            parts["policy, forward"] += backward - forward
            parts["policy, backward"] += now() - backward
            trainer._step += 1
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        ended = now()
        parts |= self.spent
        parts["the rest"] = ended - began - sum(parts.values())
        update = parts["policy, forward"] + parts["policy, backward"]
        return {**parts, "whole": ended - began, "update": update}


def now() -> float:
    """Return the time, once the GPU has done what it was given; on a CPU the seconds that this process has computed."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(work: Work, repetitions: int) -> dict[str, object]:
    """Time both ways in turn; return medians and ratios."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = policy(work, Path(scratch))
        data, prefix = questions(work, checkpoint, work.prompts * (repetitions + 2))
        ways = {
            name: Step(trainer_for(work, checkpoint, data, Path(scratch), shared=name == "shared"))
            for name in ("stock", "shared")  # on a GPU both models and their references are there at once
        }
        times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for repetition in range(repetitions + 1):
            for name, step in ways.items():
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                spent = step.whole()
                if torch.cuda.is_available():
                    spent["memory"] = torch.cuda.max_memory_allocated() - held
                if repetition:  # the first one allocates, and compares the two ways
                    times[name].append(spent)
        assert ways["shared"].trainer._shares, "the shared way fell back to full rows"
    rows, r = work.group, work.completion
    middle = {name: {part: median(t[part] for t in taken) for part in taken[0]} for name, taken in times.items()}
    ratio = {
        part: median(a[part] / b[part] for a, b in zip(times["stock"], times["shared"], strict=True))
        for part in ("whole", "update")
    }
    return {
        "name": work.name,
        "prefix": prefix,
        "prompts": work.prompts,
        "bound": rows * (prefix + r) / (prefix + rows * r),
        "seconds": middle,
        "ratio": ratio,
    }


def peak(work: Work, way: str) -> float:
    """Return the peak memory of two steps in a process of its own, in bytes above that with the model loaded."""
    called = [sys.executable, __file__, "--peak", json.dumps(asdict(work)), "--way", way]
    return float(subprocess.run(called, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_here(work: Work, way: str) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = policy(work, Path(scratch))
        data, _ = questions(work, checkpoint, work.prompts * 3)
        trainer = trainer_for(work, checkpoint, data, Path(scratch), shared=way == "shared")
        trainer._check = lambda *_: None  # done once in a training, and not what a step needs
        step = Step(trainer)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here; a new process starts with its parent's
        before = resident("VmRSS")
        for _ in range(2):
            step.whole()
        return resident("VmHWM") - before


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def draw(results: list[dict[str, object]], file: Path) -> None:
    """Draw one step of each way as a bar by part."""
    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.6), layout="constrained")
    for axis, result in zip(np.atleast_1d(axes), results, strict=True):
        for x, way in enumerate(("stock", "shared")):
            base = 0.0
            for n, part in enumerate(PARTS):
                seconds = result["seconds"][way].get(part, 0.0)
                axis.bar(x, seconds, bottom=base, color=f"C{n}", label=part if x == 0 else None, width=0.6)
                base += seconds
            axis.text(x, base, f"{base:.2f} s", ha="center", va="bottom", fontsize=9)
        axis.set_xticks([0, 1], ["stock TRL", "shared prefix"])
        axis.set_title(f"{result['name']}: {result['ratio']['whole']:.1f} ×", fontsize=10)
        axis.set_ylabel("seconds a step")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(file, metadata={"Date": None})


def work_of(prefix: int, completion: int, group: int, tokens: int = 5_000) -> Work:
    """Choose as many prompts as make about `tokens` tokens in the stock way, 2 at least."""
    return Work(prefix, completion, group, max(2, min(16, round(tokens / (group * (prefix + completion))))))


def main() -> None:
    parser = argparse.ArgumentParser(description="a GRPO step with shared prefixes against stock TRL")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--figure", type=Path, default=None)
    parser.add_argument("--only", default="", help="comparisons whose name contains this")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--gpu", action="store_true", help="only the comparison that wants a GPU")
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard_logging.basicConfig(level=standard_logging.ERROR)
    warnings.simplefilter("ignore")
    if options.peak:
        print(peak_here(Work(**json.loads(options.peak)), options.way))
        return
    works = [Work(), *(work_of(p, r, g) for p in GRID for r in (4, 32, 128) for g in (4, 8, 16))]
    if options.gpu:
        works = [Work(1000, 32, 8, 8, size="3B"), Work(1000, 128, 8, 8, size="3B")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    print(
        f"{device}{', ' if device else ''}{platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}; "
        f"medians of {options.repetitions} steps\n"
    )
    print(
        "| | prompts | stock, s | shared, s | whole step | update alone | token bound | update ÷ bound "
        "| stock, MB | shared, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    drawn = []
    for work in works:
        if options.only not in work.name:
            continue
        result = measure(work, options.repetitions)
        memory = ["", ""]
        if torch.cuda.is_available():
            memory = [f"{result['seconds'][way]['memory'] / 1e6:.0f}" for way in ("stock", "shared")]
        elif work.group == 8 and not options.no_memory:
            memory = [f"{peak(work, way) / 1e6:.0f}" for way in ("stock", "shared")]
        ratio, seconds = result["ratio"], result["seconds"]
        print(
            f"| {work.name} | {work.prompts} | {seconds['stock']['whole']:.3f} | {seconds['shared']['whole']:.3f} | "
            f"**{ratio['whole']:.1f}** | {ratio['update']:.1f} | {result['bound']:.1f} | "
            f"{ratio['update'] / result['bound']:.0%} | {memory[0]} | {memory[1]} |",
            flush=True,
        )
        if work.size != "small":
            tokens = work.prompts * work.group * (result["prefix"] + work.completion)
            rates = ", ".join(f"{way} {tokens / seconds[way]['whole']:,.0f}" for way in ("stock", "shared"))
            print(f"\ntokens of full rows per second: {rates}\n", flush=True)
        if work.name in ("demo", "P=300 R=32 G=8", "P=1000 R=32 G=8"):
            drawn.append(result)
    if options.figure and drawn:
        draw(drawn, options.figure)


if __name__ == "__main__":
    main()
