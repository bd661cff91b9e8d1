"""Time the server's part of a GRPO step with K sites, top-1, against the same step with three.

All arms have the same policy, prompts, P, G and seed, and learning rate 0, so that the policy stays the same. The
router has K outputs and is untrained, and every answer of a step goes to another site in turn, so that as many sites
are asked as there are distinct answers. A site answers with a number for each candidate at once: its model runs on its
own machine, and so does the reading of a request, which is left out of the figures. What is left is the server's:
sampling, both models, routing, making, encoding and decoding of all messages, fusion, update. Seconds are of this
process's processor, so that other load on the machine counts for nothing. A round is one trainer per arm; rounds
alternate.

    python benchmarks/speed/sites.py [--sites 3 16 64 256] [--rounds 3] [--steps 6]
"""

from __future__ import annotations

import argparse
import logging as standard_logging
import platform
import random
import tempfile
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from accord.alignment.grpo import AlignmentConfig, grpo_config, prompt_dataset
from accord.alignment.reward import FederatedReward
from accord.alignment.trainer import SharedPrefixTrainer
from accord.data.easy_vqa import load_easy_vqa
from accord.federation.engine import InProcessEngine
from accord.federation.messages import Reply, Request, ScoreRange, ScoreReply, ScoreRequest
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.routing.router import LearnedRouter, RouterConfig, RouterNetwork

CHECKPOINT = "accord/llava-clip-llama"


def judge(request: Request) -> Reply:
    """Answer as a site would, without a model."""
    assert isinstance(request, ScoreRequest)
    scores = [[zlib.crc32(text.encode()) % 200 / 100 for text in item.candidates] for item in request.items]
    return ScoreReply(request.id, scores)


class Timed(InProcessEngine):
    """Adds up the seconds that sites take, which are not the server's."""

    def __init__(self, count: int) -> None:
        super().__init__({f"site-{k}": judge for k in range(count)})
        self.at_sites = 0.0
        self.messages: list[int] = []

    def ask(self, requests: Mapping[str, Request], *, deadline: float | None = None) -> dict:
        self.messages.append(len(requests))
        return super().ask(requests, deadline=deadline)

    def _send(self, site: str, data: bytes) -> bytes:
        began = time.process_time()
        reply = super()._send(site, data)
        self.at_sites += time.process_time() - began
        return reply


class InTurn:
    """A router that computes what a learned one does, and sends every answer of a step to another site in turn."""

    def __init__(self, encoder: Encoder, sites: int) -> None:
        self.learned = LearnedRouter(encoder, RouterNetwork(encoder.features, sites, RouterConfig()))
        self.sites = sites

    def __call__(self, *asked: object) -> torch.Tensor:
        rows = len(self.learned(*asked))
        return torch.nn.functional.one_hot(torch.arange(rows) % self.sites, self.sites).float()


class StepTimes(TrainerCallback):
    """Processor seconds of every step but the first, those at the sites left out."""

    def __init__(self, engine: Timed) -> None:
        self.engine, self.ends = engine, list[float]()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.process_time() - self.engine.at_sites)

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


def steps_of(count: int, config: AlignmentConfig) -> tuple[list[float], list[int]]:
    """Return the seconds of the steps with `count` sites, and how many sites each step asked."""
    model, processor = load_model(CHECKPOINT)
    encoder, engine = Encoder(*load_model(CHECKPOINT)), Timed(count)
    end = [processor.tokenizer.eos_token_id]
    reward = FederatedReward(engine, InTurn(encoder, count), scores=ScoreRange(), end_tokens=end)
    questions = [q for q in load_easy_vqa() if q.split == "public"]
    times = StepTimes(engine)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SharedPrefixTrainer(
            encoder=encoder,
            model=model,
            reward_funcs=reward,
            args=grpo_config(config, seed=0, out=Path(scratch)),
            train_dataset=prompt_dataset(questions, config.steps * config.prompts_per_step, random.Random(0)),
            processing_class=processor,
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return times.seconds, engine.messages[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds per GRPO step by the number of sites")
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 16, 64, 256], help="K; the first is the base")
    parser.add_argument("--rounds", type=int, default=3, help="trainers per arm")
    parser.add_argument("--steps", type=int, default=6, help="steps per trainer, the first of which is not counted")
    parser.add_argument("--prompts", type=int, default=36, help="P")
    parser.add_argument("--group", type=int, default=8, help="G")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard_logging.basicConfig(level=standard_logging.ERROR)
    warnings.simplefilter("ignore")
    config = AlignmentConfig(
        steps=options.steps,
        prompts_per_step=options.prompts,
        group_size=options.group,
        learning_rate=0.0,
        save_every=0,
        evaluate_every=0,
    )
    spent: dict[int, list[float]] = defaultdict(list)
    asked: dict[int, list[int]] = defaultdict(list)
    for _ in range(options.rounds):
        for count in options.sites:
            seconds, messages = steps_of(count, config)
            spent[count] += seconds
            asked[count] += messages
    base = median(spent[options.sites[0]])
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}\nP = {options.prompts}, G = {options.group}, policy "
        f"{CHECKPOINT}; medians of n = {len(spent[options.sites[0]])} steps per arm, {options.rounds} rounds\n"
    )
    print(f"| K | sites asked in a step | step, s | to K = {options.sites[0]} |\n|---|---|---|---|")
    for count in options.sites:
        step = median(spent[count])
        print(f"| {count} | {median(asked[count]):g} | {step:.3f} | {step / base:.2f} |")


if __name__ == "__main__":
    main()
