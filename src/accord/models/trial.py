"""Try a checkpoint before anything is trained on it: are its numbers here those of stock transformers?

    prompts     the tokens of `apply_chat_template(tokenize=True)`, one at a time
    states      h of stock `generate`, one prompt at a time, prompt and answer      against
                h behind shared prefixes (or of full rows), and of prompts padded to one batch
    rollout     sampled behind shared prefixes

Families differ in how their processors pad, in how images become tokens and in who attends to whom. Where one of them
is not carried, a run would be wrong in silence, or fail at alignment, after every site has trained. Where the data have
several images a prompt, the same is tried with prompts of two images, between their words and before them, beside one
of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from accord.errors import AccordError, CheckpointError
from accord.models.attention import why_alone
from accord.models.encoder import last_states
from accord.models.inputs import (
    Encoded,
    accepted,
    batch_of,
    encode,
    encode_prompts,
    join_images,
    shared_inputs,
    taken_by,
)
from accord.models.load import Processor, load_model, locate, tokenizer_of
from accord.models.rollout import sample_completions, widest_float
from accord.types import Message, Prompt, at_places

TOLERANCE: Final = 1e-3
"""Largest |h − h_stock| / |h_stock| in float32."""
COARSE_TOLERANCE: Final = 0.1
"""In half precision, where either way rounds by about a hundredth."""

_TOKENS = 3  # of an answer
_TEXTS = ("What is this?", "Is this picture brighter in the middle than at its sides?", "Where?")
_SIZES = ((64, 64), (120, 48), (64, 64))
_SEVERAL_TEXTS = ("Is <image> brighter than <image>?", "What is this?", "Are the two alike?")
_SEVERAL_SIZES = (((64, 64), (120, 48)), ((64, 64),), ((48, 96), (48, 96)))

REMEDY: Final = "name a checkpoint of another family, such as one of those in docs/models.md"
REMEDY_SEVERAL: Final = "give every prompt one image, or name a checkpoint that docs/models.md says takes several"


def try_checkpoint(checkpoint: str, *, several: bool = False) -> None:
    """Load a checkpoint and try it as `try_model` does; one whose files are as they were is not tried again.

    Args:
        checkpoint: its name.
        several: whether it will get several images a prompt.

    Raises:
        CheckpointError: it cannot be loaded, Accord does not carry its family, or with several images a prompt.
    """
    place = Path(locate(checkpoint))
    files = sorted(place.iterdir()) if place.is_dir() else []
    seen = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    _try_once(checkpoint, several, seen)


@lru_cache(maxsize=256)
def _try_once(checkpoint: str, several: bool, _: tuple[tuple[str, int, int], ...]) -> None:
    loaded = load_model(checkpoint)
    for more in (False, True)[: 1 + several]:
        try_model(checkpoint, *loaded, more)


@torch.no_grad()
def try_model(name: str, model: PreTrainedModel, processor: Processor, several: bool = False) -> None:
    """Compare what Accord makes of three questions about made-up pictures with what stock transformers makes of them.

    Args:
        name: what to call the checkpoint.
        model: it is put into evaluation mode and back.
        processor: its processor.
        several: whether two of the questions are about two pictures.

    Raises:
        CheckpointError: the two differ, or either fails.
    """
    if several and isinstance(processor, PreTrainedTokenizerBase):
        raise CheckpointError(f"{name} is a text-only model, and prompts have several images; {REMEDY_SEVERAL}")
    what = "several images a prompt with this" if several else "this"
    remedy = REMEDY_SEVERAL if several else REMEDY
    family = model.config.model_type
    why = why_alone(model)
    if "cross-attention" in why:
        raise CheckpointError(f"{name}: Accord does not carry models of the family {family!r}: {why}; {REMEDY}")
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            found = _difference(model, processor, *_questions(processor, several))
    except AccordError:
        raise
    except Exception as error:  # whatever a processor or a model raises that takes its inputs in another way
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise CheckpointError(
            f"{name}: Accord does not carry {what} model of the family {family!r}: a forward pass over three questions "
            f"failed ({reason:.200}); {remedy}"
        ) from error
    finally:
        model.train(training)
    if found:
        raise CheckpointError(f"{name}: Accord does not carry {what} model of the family {family!r}: {found}; {remedy}")


def _difference(
    model: PreTrainedModel, processor: Processor, prompts: Sequence[Prompt], images: Sequence[Sequence[Image.Image]]
) -> str:
    """Return in what a model differs here from stock transformers; empty where it does not."""
    names = taken_by(model)
    encoded = [each.only(names) for each in encode(processor, prompts, images)]
    stock = [_stock(model, processor, prompt, own) for prompt, own in zip(prompts, images, strict=True)]
    for mine, (prompt, _, _) in zip(encoded, stock, strict=True):
        if mine.ids != prompt:
            return f"its prompts have {len(mine.ids)} tokens here, and {len(prompt)} or others by its own chat template"
    said, states = [said for _, said, _ in stock], [states for _, _, states in stock]
    allowed = TOLERANCE if model.dtype == torch.float32 else COARSE_TOLERANCE
    behind = _apart(_states(model, encoded, said, processor), states)
    if not behind <= allowed:
        return f"states of answers differ from those of one prompt at a time by {behind:.2g} (allowed {allowed:g})"
    padded = _apart(_padded(model, processor, prompts, images), [own[:1] for own in states])
    if not padded <= allowed:
        return f"states of prompts in a batch differ from those of one at a time by {padded:.2g} (allowed {allowed:g})"
    if not why_alone(model):
        _sample(model, processor, encoded)
    return ""


def _questions(processor: Processor, several: bool) -> tuple[list[Prompt], list[list[Image.Image]]]:
    if isinstance(processor, PreTrainedTokenizerBase):
        return [[{"role": "user", "content": text}] for text in _TEXTS], [[] for _ in _TEXTS]
    texts, sizes = (_SEVERAL_TEXTS, _SEVERAL_SIZES) if several else (_TEXTS, [(size,) for size in _SIZES])
    turns = [[{"role": "user", "content": at_places(t, len(own))}] for t, own in zip(texts, sizes, strict=True)]
    images = [[_picture(n + k, size) for k, size in enumerate(own)] for n, own in enumerate(sizes)]
    return cast(list[Prompt], turns), images


def _picture(number: int, size: tuple[int, int]) -> Image.Image:
    """Return a picture of light; every second one is dark where the others are bright."""
    light = Image.radial_gradient("L").resize(size)
    return (ImageOps.invert(light) if number % 2 else light).convert("RGB")


def _stock(
    model: PreTrainedModel, processor: Processor, prompt: Prompt, images: Sequence[Image.Image]
) -> tuple[list[int], list[int], Tensor]:
    """Return the prompt's tokens, the greedy answer's, and the states that predict the latter, `[tokens, D]`."""
    given = iter(images)
    turns: list[Message] = [
        {**turn, "content": [{**b, "image": next(given)} if b["type"] == "image" else b for b in turn["content"]]}
        if images
        else turn
        for turn in cast(Any, prompt)
    ]
    made = processor.apply_chat_template(
        cast(Any, turns), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    fields = {name: value.to(model.device) for name, value in accepted(model, cast(Any, made)).items()}
    ids = fields["input_ids"][0].tolist()
    with last_states(model) as seen:
        out = _generate(model, fields)
    return ids, out[0, len(ids) :].tolist(), torch.cat([states[0, -1:] for states in seen])


def _states(
    model: PreTrainedModel, encoded: Sequence[Encoded], said: Sequence[Sequence[int]], processor: Processor
) -> list[Tensor]:
    """Return the states that predict each prompt's answer, computed beside another answer to the same prompt."""
    both = [[own, other[:1]] for own, other in zip(said, reversed(said), strict=True)]
    batch = batch_of(encoded, both, cast(int, tokenizer_of(processor).pad_token_id)).to(model.device)
    inner = cast(PreTrainedModel, model.base_model)
    inputs, where = shared_inputs(inner, batch)
    hidden = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[where]
    rows = zip(hidden[::2], encoded, said, strict=True)
    return [states[len(each.ids) - 1 :][: len(ids)] for states, each, ids in rows]


def _padded(
    model: PreTrainedModel, processor: Processor, prompts: Sequence[Prompt], images: Sequence[Sequence[Image.Image]]
) -> list[Tensor]:
    """Return the state that predicts the first token of each answer, in a batch of prompts."""
    fields = accepted(model, encode_prompts(processor, prompts, images))
    with last_states(model) as seen:
        _generate(model, {name: tensor.to(model.device) for name, tensor in fields.items()})
    return list(seen[0][:, -1:])


def _generate(model: PreTrainedModel, fields: dict[str, Tensor]) -> Tensor:
    ends = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    return cast(Tensor, cast(Any, model).generate(**fields, **ends))


def _sample(model: PreTrainedModel, processor: Processor, encoded: Sequence[Encoded]) -> None:
    """Take the way of shared rollouts, which rests on the same masks."""
    tokenizer = tokenizer_of(processor)
    settings = GenerationConfig(
        max_new_tokens=_TOKENS, do_sample=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    types = [each.kinds["mm_token_type_ids"] for each in encoded if "mm_token_type_ids" in each.kinds]
    rows = [p for p, _ in enumerate(encoded) for _ in range(2)]
    noise = torch.linspace(0.1, 0.9, len(rows) * _TOKENS, dtype=widest_float(model.device), device=model.device)
    images = {name: tensor.to(model.device) for name, tensor in join_images([e.images for e in encoded]).items()}
    prompts = [each.ids for each in encoded]
    sample_completions(model, prompts, images, rows, settings, noise.view(len(rows), -1), types or None)


def _apart(mine: Sequence[Tensor], stock: Sequence[Tensor]) -> float:
    """Return |h − h_stock| / |h_stock| over all states."""
    one, other = torch.cat(list(mine)).cpu().double(), torch.cat(list(stock)).cpu().double()
    return float((one - other).norm() / other.norm())
