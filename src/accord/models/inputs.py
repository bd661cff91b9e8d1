"""Turn prompts, images if there are any, and candidate answers into one batch; every image is encoded once.

The candidates of a prompt share its image and its text. The processor runs once per prompt, the vision tower once per
image. Where the attention allows it, all candidates stand behind one copy of the prompt (`accord.models.prefix`).
Elsewhere each has a row of its own, and the image features are handed to the language model for every row through
transformers' own `mm_encoder_outputs`. Words that a tokenizer would take for special tokens are neutralised here
(`accord.models.words`):

    rows  n = 1 … N  (a prompt with one candidate)      image features  [P, tokens, D]  →  [N, tokens, D]  by index

Families that do not take `mm_encoder_outputs` get their pixel values repeated instead: slower, same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Protocol, TypeAlias, cast

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from accord.errors import DataError
from accord.models.attention import can_share
from accord.models.load import Processor, tokenizer_of
from accord.models.prefix import pack, prefix_positions
from accord.models.words import plain_prompt, plain_words
from accord.types import Message, Prompt, texts_of

_Words: TypeAlias = tuple[tuple[tuple[str, str | tuple[tuple[tuple[str, str], ...], ...]], ...], ...]
"""Turns, their entries, a content's blocks, and theirs."""

_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_PER_IMAGE_KEYS = ("image_grid_thw", "image_sizes")  # read by the language side too: position ids, feature splitting


class _EncodesImages(Protocol):
    def get_image_features(self, **kwargs: object) -> object: ...


@dataclass(frozen=True)
class Batch:
    """N rows over P prompts, padded on the right to T tokens."""

    input_ids: Tensor  # [N, T]
    attention_mask: Tensor  # [N, T]
    labels: Tensor  # [N, T], -100 outside the completion
    prompt_index: Tensor  # [N], which prompt (and image) a row belongs to
    image_inputs: dict[str, Tensor]  # what the processor made of the P images
    token_types: Tensor | None = None  # [N, T], for families with multi-axis positions

    @property
    def text_inputs(self) -> dict[str, Tensor]:
        """What `model(...)` takes besides the images."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.token_types is None else {**inputs, "mm_token_type_ids": self.token_types}

    @property
    def last_token(self) -> Tensor:
        """Index of each row's last real token, `[N]`."""
        return self.attention_mask.sum(dim=1) - 1

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            self.prompt_index.to(device),
            {name: tensor.to(device) for name, tensor in self.image_inputs.items()},
            None if self.token_types is None else self.token_types.to(device),
        )


def prompt_text(processor: Processor, prompt: Prompt) -> str:
    """Render a conversation up to where the assistant's answer begins."""
    return _rendered(processor, prompt, opens=True)


def completion_text(processor: Processor, prompt: Prompt, completion: str) -> str:
    """Render the assistant's turn alone, its end token included, as the chat template would after `prompt`."""
    opening = prompt_text(processor, prompt)
    turn: Message = {"role": "assistant", "content": [{"type": "text", "text": completion}]}
    whole = _rendered(processor, [*prompt, turn], opens=False)
    if whole.startswith(opening):
        return whole[len(opening) :]
    return completion + cast(str, tokenizer_of(processor).eos_token)


def _rendered(processor: Processor, prompt: Prompt, *, opens: bool) -> str:
    """Apply the chat template: once to the same words, since every candidate comes with its prompt, step after step."""
    turns = _turns(processor, prompt)
    template = processor.chat_template
    words = _hashable(turns)
    if words is None or not isinstance(template, str) or "strftime_now" in template:  # it may tell the time
        return cast(str, processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=opens))
    tokenizer = tokenizer_of(processor)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return _render_once(processor, (template, *special), words, opens)


@lru_cache(maxsize=2**14)
def _render_once(processor: Processor, _: tuple[str | None, ...], words: _Words, opens: bool) -> str:
    turns = [
        {key: value if isinstance(value, str) else [dict(block) for block in value] for key, value in turn}
        for turn in words
    ]
    given = cast(list[dict[str, str]], turns)
    return cast(str, processor.apply_chat_template(given, tokenize=False, add_generation_prompt=opens))


def _hashable(turns: Sequence[Mapping[str, object]]) -> _Words | None:
    """Return a conversation as tuples; None if there is more to it than words, such as a picture."""
    words = []
    for turn in turns:
        entries: list[tuple[str, str | tuple[tuple[tuple[str, str], ...], ...]]] = []
        for key, value in turn.items():
            if isinstance(value, str):
                entries.append((key, value))
                continue
            blocks = [tuple(block.items()) for block in cast(Sequence[Mapping[str, str]], value)]
            if not all(isinstance(text, str) for block in blocks for _, text in block):
                return None
            entries.append((key, tuple(blocks)))
        words.append(tuple(entries))
    return tuple(words)


def _turns(processor: Processor, prompt: Prompt) -> list[dict[str, str]]:
    if isinstance(processor, PreTrainedTokenizerBase):  # the chat templates of text-only models take no blocks
        words = ((str(message["role"]), "".join(texts_of(message))) for message in prompt)
        return [{"role": role, "content": plain_words(processor, text)} for role, text in words]
    # transformers types a turn's content as text, and takes blocks as well.
    return cast(list[dict[str, str]], plain_prompt(processor, prompt))


def encode_prompts(processor: Processor, prompts: Sequence[Prompt], images: Sequence[Image | None]) -> BatchEncoding:
    """Render and tokenise prompts, padded on the left, and process their images, one each or none at all.

    Raises:
        DataError: some prompts have an image and others none, or the model takes none.
    """
    texts = [prompt_text(processor, prompt) for prompt in prompts]
    given = [[image] for image in images if image is not None]
    if given and len(given) < len(images):
        raise DataError(
            f"{len(given)} of {len(images)} prompts have an image, and a batch takes one for each or none; keep "
            "questions about images and questions without any in runs of their own"
        )
    if not given:  # the template has written the special tokens
        tokenizer = tokenizer_of(processor)
        return cast(BatchEncoding, tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True))
    if isinstance(processor, PreTrainedTokenizerBase):
        raise DataError(
            "a text-only model was asked about an image; name a vision-language checkpoint, or leave the images out"
        )
    return cast(BatchEncoding, processor(images=given, text=texts, return_tensors="pt", padding=True))


def build_batch(
    processor: Processor,
    prompts: Sequence[Prompt],
    images: Sequence[Image | None],
    completions: Sequence[Sequence[str]],
) -> Batch:
    """Tokenise `completions[p]` after `prompts[p]` for every p; image p is processed once.

    Returns a `Batch` of `N = sum(len(c) for c in completions)` rows in the order of the prompts.

    Raises:
        DataError: as `encode_prompts`.
    """
    asked = [p for p, those in enumerate(completions) if those]
    prompts, images = [prompts[p] for p in asked], [images[p] for p in asked]
    completions = [completions[p] for p in asked]
    encoded = encode_prompts(processor, prompts, images)
    tokenizer = tokenizer_of(processor)
    endings = [
        completion_text(processor, prompt, completion)
        for prompt, those in zip(prompts, completions, strict=True)
        for completion in those
    ]
    tokens = iter(tokenizer(endings, add_special_tokens=False)["input_ids"])
    rows: list[list[int]] = []
    starts: list[int] = []
    types: list[list[int]] = []
    index: list[int] = []
    for p, those in enumerate(completions):
        keep = encoded["attention_mask"][p].bool()
        prefix = encoded["input_ids"][p][keep].tolist()
        prefix_types = encoded["mm_token_type_ids"][p][keep].tolist() if "mm_token_type_ids" in encoded else None
        for ids in islice(tokens, len(those)):
            rows.append(prefix + ids)
            starts.append(len(prefix))
            index.append(p)
            if prefix_types is not None:
                types.append(prefix_types + [0] * len(ids))
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    token_types = torch.zeros_like(input_ids) if types else None
    for n, row in enumerate(rows):
        input_ids[n, : len(row)] = torch.tensor(row)
        attention_mask[n, : len(row)] = 1
        labels[n, starts[n] : len(row)] = input_ids[n, starts[n] : len(row)]
        if token_types is not None:
            token_types[n, : len(row)] = torch.tensor(types[n])
    image_inputs = {name: value for name, value in encoded.items() if name not in _TEXT_KEYS}
    return Batch(input_ids, attention_mask, labels, torch.tensor(index), image_inputs, token_types)


def chunks(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Split prompts of `sizes` rows into consecutive runs of at most `limit` rows.

    The rows of a prompt stay together, so that its image is encoded once; a prompt of more rows is a run by itself.
    """
    start, rows = 0, 0
    for p, size in enumerate(sizes):
        if rows and rows + size > limit:
            yield slice(start, p)
            start, rows = p, 0
        rows += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def shared_inputs(model: PreTrainedModel, batch: Batch) -> tuple[dict[str, object], Tensor]:
    """Return the arguments of `model(...)`, and where in its output each row's tokens are.

    The rows of a prompt share one copy of it (`accord.models.prefix`) if the model can; else they stand for themselves.

    Returns:
        The arguments, and indices `[N, T]` into the flattened output `[P · S]` or `[N · T]`; under the padding, any.
    """
    rows, longest = batch.input_ids.shape
    if not can_share(model):
        where = torch.arange(rows * longest, device=batch.input_ids.device).view(rows, longest)
        return model_inputs(model, batch), where
    lengths, starts = batch.attention_mask.sum(dim=1).tolist(), (batch.labels != -100).int().argmax(dim=1).tolist()
    tokens, owner = batch.input_ids.tolist(), batch.prompt_index.tolist()
    first = {p: n for n, p in reversed(list(enumerate(owner)))}
    prompts = range(len(first))
    prefixes = [tokens[first[p]][: starts[first[p]]] for p in prompts]
    endings: list[list[list[int]]] = [[] for _ in prompts]
    for n, p in enumerate(owner):
        endings[p].append(tokens[n][starts[n] : lengths[n]])
    types = None
    if batch.token_types is not None:
        types = [batch.token_types[first[p]].tolist()[: len(prefixes[p])] for p in prompts]
    packed = pack(model, prefixes, endings, prefix_positions(model, prefixes, types, batch.image_inputs), pad=0)
    size = packed.input_ids.shape[1]
    begins = [start for row in packed.starts for start in row]  # rows come prompt after prompt
    column = torch.arange(longest)
    where = torch.stack(
        [
            p * size + torch.where(column < starts[n], column, column - starts[n] + begins[n])
            for n, p in enumerate(owner)
        ]
    ).clamp(max=len(first) * size - 1)
    return {**packed.model_inputs(), **batch.image_inputs}, where.to(batch.input_ids.device)


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, object]:
    """Return the arguments of `model(...)` for all N rows, each image encoded once (with gradients, if enabled)."""
    index = batch.prompt_index
    inputs: dict[str, object] = {**batch.text_inputs}
    if not batch.image_inputs:
        return inputs
    per_row = {name: batch.image_inputs[name][index] for name in _PER_IMAGE_KEYS if name in batch.image_inputs}
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return inputs | {name: tensor[index] for name, tensor in batch.image_inputs.items()}
    encoded = cast(_EncodesImages, model).get_image_features(**batch.image_inputs, return_dict=True)
    features = encoded.pooler_output  # type: ignore[attr-defined]  # P tensors [tokens, D], or one [P, tokens, D]
    rows = index.tolist()
    encoded.pooler_output = (  # type: ignore[attr-defined]
        features[rows] if isinstance(features, Tensor) else [features[p] for p in rows]
    )
    return inputs | per_row | {"mm_encoder_outputs": {"image": encoded}}
