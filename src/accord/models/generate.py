"""Let a model answer questions: greedily for evaluation, sampled for negatives that cover what a policy really says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL.Image import Image
from transformers import PreTrainedModel

from accord.data.images import Pictures, load_images
from accord.models.inputs import accepted, encode_prompts
from accord.models.load import Processor, tokenizer_of
from accord.types import Prompt, Question, prompt_of


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    view: Callable[[Image], Image] = lambda image: image,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[list[str]]:
    """Return the answers to every question: the greedy one, or `samples` sampled ones.

    Args:
        model: the policy, put into evaluation mode and back.
        processor: its processor.
        questions: what is asked.
        max_new_tokens: length limit of an answer.
        samples: 0 for the greedy answer; otherwise how many to draw, from the whole distribution at `temperature`.
        temperature: of the samples.
        seed: of the samples.
        batch_size: questions at once.
        view: applied to every image first.
        on_batch: told how many questions were answered.
    """
    training = model.training
    model.eval()
    out: list[list[str]] = []
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    drawing |= {"num_return_sequences": samples}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for start in range(0, len(questions), batch_size):
            chunk = questions[start : start + batch_size]
            images = [load_images(q.images) for q in chunk]
            seen = [[view(image) for image in own] for own in images]
            how = {"max_new_tokens": max_new_tokens, **(drawing if samples else {"do_sample": False})}
            texts = complete(model, processor, [prompt_of(q) for q in chunk], seen, **how)
            each = samples or 1
            out += [texts[i * each : (i + 1) * each] for i in range(len(chunk))]
            on_batch(len(chunk))
    model.train(training)
    return out


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    processor: Processor,
    prompts: Sequence[Prompt],
    images: Sequence[Pictures],
    **how: object,
) -> list[str]:
    """Return what a model says to prompts, without special tokens and outer spaces; `how` is for its `generate`.

    A checkpoint's own repetition penalty is left out, as TRL leaves it out of rollouts: what is trained is measured.
    """
    fields = accepted(model, encode_prompts(processor, prompts, images))
    inputs = {name: tensor.to(model.device) for name, tensor in fields.items()}
    ids = model.generate(**inputs, **{"repetition_penalty": 1.0, **how})  # type: ignore[operator]  # a mixin of every such model
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer_of(processor).batch_decode(new, skip_special_tokens=True)]
