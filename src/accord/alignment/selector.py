"""Say which of two answers is better: a base under an adapter, asked for a letter; and several, by majority.

    s_u(x, y_A, y_B) = softmax over the letters A and B of the base under adapter u, asked which answer is better
    vote             = B where more than half of the selectors u = 1 … U say B, else A

Source: FedBiscuit, Wu et al. 2024, arXiv 2407.03038, whose vote is `bincount().argmax()`. Differs: the instruction is
shorter, and answers that agree make no pair, since they have no gradient. How the selectors are trained is in
`accord.methods.fedbiscuit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from accord.data.images import Pictures, load_images
from accord.data.questions import normalise_answer
from accord.federation.weights import set_trainable_weights
from accord.models.inputs import build_batch, completion_text, shared_inputs
from accord.models.load import Processor, tokenizer_of, without_adapter
from accord.types import PreferencePair, Prompt, Question, prompt_of

Weights: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt about the same images, in the order in which they are shown."""

    prompt: Prompt
    images: Pictures
    first: str  # A
    second: str  # B


class Selector:
    """Say which of two answers is better: the base under a LoRA adapter, asked for a letter.

    Args:
        model: the base with the adapter.
        processor: its processor.
    """

    def __init__(self, model: torch.nn.Module, processor: Processor) -> None:
        self.model, self.processor = model, processor

    def __call__(self, comparisons: Sequence[Comparison]) -> Tensor:
        """Return the log-odds `log s(A) − log s(B)` of every comparison, `[N]` in float32."""
        prompts = [selector_prompt(c.prompt, c.first, c.second) for c in comparisons]
        batch = build_batch(self.processor, prompts, [c.images for c in comparisons], [["A"]] * len(prompts))
        plain = without_adapter(self.model)
        a, b, shared = letter_tokens(self.processor, prompts[0])
        inner = cast(PreTrainedModel, plain.base_model)
        inputs, where = shared_inputs(inner, batch.to(plain.device))
        hidden = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)  # [N · T, D]
        before = (batch.labels != -100).int().argmax(dim=1) + shared - 1  # the token that the letter follows
        rows = where.gather(1, before[:, None].to(where.device)).squeeze(1)
        logits = cast(torch.nn.Module, plain.get_output_embeddings())(hidden[rows])
        return cast(Tensor, (logits[:, a] - logits[:, b]).float())


def selector_prompt(prompt: Prompt, first: str, second: str) -> Prompt:
    """Ask, in the last turn of `prompt`, which of two answers to it is better."""
    *before, last = prompt
    content = last["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(cast(Sequence[object], content))
    ask = {"type": "text", "text": f"\nA: {first}\nB: {second}\nwhich is better, A or B?"}
    return [*before, {**last, "content": [*blocks, ask]}]


def letter_tokens(processor: Processor, prompt: Prompt) -> tuple[int, int, int]:
    """Return the first tokens in which the answers A and B differ, and how many tokens they share before.

    A tokeniser may put more than a letter into a token, or less; which letter it is shows at the first difference.
    """
    endings = [completion_text(processor, prompt, letter) for letter in ("A", "B")]
    a, b = tokenizer_of(processor)(endings, add_special_tokens=False)["input_ids"]
    shared = next(n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
    return a[shared], b[shared], shared


def selector_loss(log_odds: Tensor, better: Tensor) -> Tensor:
    """Return the mean cross-entropy of the letters A and B, in nats.

    Args:
        log_odds: `log s(A) − log s(B)`, `[N]`.
        better: 0 where A is better, 1 where B is, `[N]`.
    """
    return softplus(torch.where(better == 0, -log_odds, log_odds)).mean()


def majority(votes: Sequence[Sequence[int]]) -> list[int]:
    """Return for every comparison what most selectors say, 0 for A and 1 for B; as many for both is A.

    Args:
        votes: of U selectors on N comparisons, `[U, N]`.
    """
    return [int(2 * sum(each) > len(votes)) for each in zip(*votes, strict=True)]


@torch.no_grad()
def label_pairs(
    selector: Selector,
    selectors: Sequence[Weights],
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    *,
    batch_size: int,
) -> list[PreferencePair]:
    """Return a pair for every two answers to a question that differ, the better one by the majority of `selectors`.

    Args:
        selector: what the weights are put into.
        selectors: U adapters.
        questions: public ones.
        answers: to every question.
        batch_size: comparisons at once.
    """
    asked = [
        (question, first, second)
        for question, given in zip(questions, answers, strict=True)
        for first, second in combinations(given, 2)
        if normalise_answer(first) != normalise_answer(second)
    ]
    votes: list[list[int]] = [[] for _ in selectors]
    selector.model.eval()
    for start in range(0, len(asked), batch_size):
        comparisons = [
            Comparison(prompt_of(q), load_images(q.images), first, second)
            for q, first, second in asked[start : start + batch_size]
        ]
        for u, weights in enumerate(selectors):
            set_trainable_weights(selector.model, weights)
            votes[u] += (selector(comparisons) < 0).int().tolist()
    return [
        PreferencePair(
            prompt=prompt_of(q),
            chosen=second if better else first,
            rejected=first if better else second,
            images=q.images,
            question_id=q.id,
            question_type=q.question_type,
        )
        for (q, first, second), better in zip(asked, majority(votes), strict=True)
    ]
