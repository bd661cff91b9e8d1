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
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping
from statistics import median

from federation_step import InTurn, machine, prepared, run_arm

from accord.alignment.grpo import AlignmentConfig
from accord.alignment.reward import FederatedReward
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


def steps_of(count: int, config: AlignmentConfig) -> tuple[list[float], list[int]]:
    """Return the seconds of the steps with `count` sites, and how many sites each step asked."""
    encoder, engine = Encoder(*load_model(CHECKPOINT)), Timed(count)
    end = [encoder.processor.tokenizer.eos_token_id]
    router = InTurn(LearnedRouter(encoder, RouterNetwork(encoder.features, count, RouterConfig())), count)
    reward = FederatedReward(engine, router, scores=ScoreRange(), end_tokens=end)
    seconds = run_arm(reward, CHECKPOINT, config, encoder, lambda: time.process_time() - engine.at_sites)
    return seconds, engine.messages[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds per GRPO step by the number of sites")
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 16, 64, 256], help="K; the first is the base")
    parser.add_argument("--rounds", type=int, default=3, help="trainers per arm")
    parser.add_argument("--steps", type=int, default=6, help="steps per trainer, the first of which is not counted")
    parser.add_argument("--prompts", type=int, default=36, help="P")
    parser.add_argument("--group", type=int, default=8, help="G")
    options = parser.parse_args()
    config = prepared(options)
    spent: dict[int, list[float]] = defaultdict(list)
    asked: dict[int, list[int]] = defaultdict(list)
    for _ in range(options.rounds):
        for count in options.sites:
            seconds, messages = steps_of(count, config)
            spent[count] += seconds
            asked[count] += messages
    base = median(spent[options.sites[0]])
    print(
        f"{machine()}\nP = {options.prompts}, G = {options.group}, policy "
        f"{CHECKPOINT}; medians of n = {len(spent[options.sites[0]])} steps per arm, {options.rounds} rounds\n"
    )
    print(f"| K | sites asked in a step | step, s | to K = {options.sites[0]} |\n|---|---|---|---|")
    for count in options.sites:
        step = median(spent[count])
        print(f"| {count} | {median(asked[count]):g} | {step:.3f} | {step / base:.2f} |")


if __name__ == "__main__":
    main()
