"""A router and a fusion rule of your own: plain functions, no class to inherit from and nothing to register.

A router gives each site a weight: `(prompts, images, completions) → weights [N, K]`. A fusion rule turns the sites'
scores into rewards: `(scores [N, K], weights [N, K]) → rewards [N]`, NaN where no site answered. Both are pure
functions, so a table of numbers can test them. `main` does that, and needs no model.

    python examples/own_router.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from accord.alignment.reward import FederatedReward
from accord.federation.engine import InProcessEngine
from accord.federation.messages import Reply, Request, ScoreReply, ScoreRequest
from accord.types import Prompt, vqa_prompt

SITES = ("colour", "shape", "yes-no")


def by_words(
    prompts: Sequence[Prompt], images: Sequence[Image.Image], completions: Sequence[Sequence[str]], /
) -> Tensor:
    """Route by the question's words; a question that names neither colour nor shape goes to all sites alike.

    This router reads the question alone, so all completions of a prompt have the same judges. The learned router does
    so only with `scope="prompt"`.
    """
    rows = []
    for prompt, said in zip(prompts, completions, strict=True):
        text = " ".join(str(b["text"]) for b in prompt[-1]["content"] if b["type"] == "text").lower()
        if text.startswith(("is ", "does ")):
            row = [0.0, 0.0, 1.0]
        else:
            row = [float("color" in text), float("shape" in text and "color" not in text), 0.0]
        rows += [row if any(row) else [1.0, 1.0, 1.0]] * len(said)
    weights = torch.tensor(rows)
    return weights / weights.sum(dim=-1, keepdim=True)


def most_doubtful(scores: Tensor, weights: Tensor) -> Tensor:
    """Take the lowest score of the sites that answered and have weight: an answer must please all of its judges.

        R = min over {k : α_k > 0, R̄_k present} of R̄_k

    An answer that only one reward model likes gets a low reward. The price: one bad judge can hold a reward down.
    """
    present = ~scores.isnan() & (weights > 0)
    lowest = torch.where(present, scores, torch.inf).min(dim=-1).values
    return torch.where(present.any(dim=-1), lowest, torch.nan)


def with_fusion(federation: FederatedReward):
    """Return a TRL reward function that fuses `federation`'s scores by `most_doubtful`."""

    def reward(prompts, completions, **columns) -> list[float | None]:
        groups = federation.group(prompts, completions, columns)
        weights, scores = federation.judge(groups)
        fused = iter(most_doubtful(scores, weights).split([len(group.candidates) for group in groups]))
        values = [value for group in groups for value in next(fused)[list(group.rows)].tolist()]
        return [None if math.isnan(value) else value for value in values]

    return reward


def judge(table: dict[str, float]):
    """Stand in for a site: a written-down score for each answer."""

    def answer(request: Request) -> Reply:
        assert isinstance(request, ScoreRequest)
        return ScoreReply(request.id, [[table[text] for text in item.candidates] for item in request.items])

    return answer


def main() -> None:
    picture = Image.new("RGB", (8, 8), "red")
    asked = [("what color is it?", "red"), ("what color is it?", "blue"), ("tell me", "red"), ("is it red?", "yes")]
    rows = {
        "prompts": [vqa_prompt(text) for text, _ in asked],
        "completions": [[{"role": "assistant", "content": said}] for _, said in asked],
        "image": [picture] * len(asked),
    }
    tables = ({"red": 2.0, "blue": 0.5}, {"red": 1.0}, {"red": math.nan, "yes": math.nan})
    engine = InProcessEngine({site: judge(table) for site, table in zip(SITES, tables, strict=True)})

    # One line each: the router goes in as it is, the fusion rule around the federation.
    routed = FederatedReward(engine, by_words, mode="soft", missing="none")
    doubtful = with_fusion(routed)

    # "what color": only the site of colours is asked. "tell me": all three are asked, and yes-no is absent because it
    # says NaN; the mixture is the mean of 2 and 1, the most doubtful the lower of the two. "is it red?": only yes-no
    # is asked, so no site answered, and the reward is None and not 0.
    print("question            answer  mixture  most doubtful")
    for (text, said), mixed, lowest in zip(asked, routed(**rows), doubtful(**rows), strict=True):
        print(f"{text:<18}  {said:<6}  {mixed!s:<7}  {lowest!s}")
    assert routed(**rows) == [2.0, 0.5, 1.5, None]
    assert doubtful(**rows) == [2.0, 0.5, 1.0, None]


if __name__ == "__main__":
    main()
