"""How likely a model finds the reference answers: it tells models apart before any of them answers a question right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from accord.data.images import load_images
from accord.models.inputs import build_batch, model_inputs
from accord.models.load import Processor
from accord.types import Question, prompt_of


@torch.no_grad()
def answer_nll(
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[Question],
    *,
    batch_size: int = 128,
    on_batch: Callable[[int], None] = lambda _: None,
) -> float:
    """Return − Σ log π(a_t | image, question, a_<t) / T over all T tokens of all answers, end tokens included, in nats.

    Args:
        model: put into evaluation mode and back.
        processor: its processor.
        questions: at least one, with their reference answers.
        batch_size: questions at once.
        on_batch: told how many questions were read.
    """
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        batch = build_batch(
            processor,
            [prompt_of(q) for q in chunk],
            [load_images(q.images) for q in chunk],
            [[q.answer] for q in chunk],
        ).to(model.device)
        logits = model(**model_inputs(model, batch)).logits[:, :-1]  # [N, T - 1, V]
        labels = batch.labels[:, 1:]
        total += cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum").item()
        tokens += int((labels != -100).sum())
        on_batch(len(chunk))
    model.train(training)
    return total / tokens
