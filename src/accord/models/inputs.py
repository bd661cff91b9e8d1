"""Turn prompts, images if there are any, and candidate answers into one batch; every image is encoded once.

The one place where a prompt and its images become a model's inputs. Each prompt is encoded as if it came by itself
(`encode`), so that every tensor belongs to its prompt, whatever its first dimension counts: images, tiles or patches.
Prompts are joined afterwards, padded as the processors themselves pad. A model is given what its forward pass names
(`accepted`): processors make more, labels of their own among it.

The candidates of a prompt share its images and its text. The processor runs once per prompt, the vision tower once per
image. Where the attention allows it, all candidates stand behind one copy of the prompt (`accord.models.prefix`).
Elsewhere each has a row of its own, and the image features are handed to the language model for every row through
transformers' own `mm_encoder_outputs`. Words that a tokenizer would take for special tokens are neutralised here
(`accord.models.words`):

    rows  n = 1 … N  (a prompt with one candidate)      image features  [I, tokens, D]  →  those of row 1, of row 2, …

A prompt has no image, one or several, and those of a batch may differ in that. Families that do not take
`mm_encoder_outputs`, or whose features are no entry an image (tiles, features of several layers), get their pixel
values repeated instead: slower, same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, islice
from typing import Protocol, TypeAlias, TypeVar, cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from accord.data.images import Pictures, as_list
from accord.errors import DataError, warn_once
from accord.models.attention import tell_alone, why_alone
from accord.models.load import Processor, tokenizer_of, without_adapter
from accord.models.prefix import pack, prefix_positions
from accord.models.words import plain_prompt, plain_words
from accord.types import Message, Prompt, texts_of

_Words: TypeAlias = tuple[tuple[tuple[str, str | tuple[tuple[tuple[str, str], ...], ...]], ...], ...]
"""Turns, their entries, a content's blocks, and theirs."""

_Value = TypeVar("_Value")

_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
"""Fields with an entry for every token; for those of an answer, `Encoded.answers`."""
_NOT_OF_IMAGES = ("input_ids", "attention_mask", "labels", *_PER_TOKEN)
_PER_IMAGE_KEYS = ("image_grid_thw", "image_sizes")  # read by the language side too: position ids, feature splitting


class _EncodesImages(Protocol):
    def get_image_features(self, **kwargs: object) -> object: ...


@dataclass(frozen=True)
class Encoded:
    """A prompt with its images, as the processor makes them of it alone."""

    ids: list[int]  # L tokens
    kinds: dict[str, list[int]] = field(default_factory=dict)  # fields with an entry for every token
    images: dict[str, Tensor] = field(default_factory=dict)  # all that is made of its images
    answers: int = 0  # the kind of an answer's tokens
    count: int = 0  # of its images

    def only(self, names: Collection[str]) -> Encoded:
        """Return the same without other fields than those called `names`."""
        return replace(self, kinds=_named(self.kinds, names), images=_named(self.images, names))


@dataclass(frozen=True)
class Batch:
    """N rows over P prompts, padded on the right to T tokens."""

    input_ids: Tensor  # [N, T]
    attention_mask: Tensor  # [N, T]
    labels: Tensor  # [N, T], -100 outside the completion
    prompt_index: Tensor  # [N], which prompt (and image) a row belongs to
    images: tuple[dict[str, Tensor], ...]  # P, what the processor made of each prompt's images
    kinds: dict[str, Tensor] = field(default_factory=dict)  # [N, T] each, such as which tokens are the image's
    counts: tuple[int, ...] = ()  # P, images of each prompt

    @property
    def text_inputs(self) -> dict[str, Tensor]:
        """What `model(...)` takes besides the images."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.kinds}

    @property
    def image_inputs(self) -> dict[str, Tensor]:
        """What `model(...)` takes of the images of all P prompts."""
        return join_images(self.images)

    def accepted(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what `model(...)` takes of a batch in which every prompt has one row."""
        return accepted(model, {**self.text_inputs, **self.image_inputs})

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
            tuple({name: tensor.to(device) for name, tensor in each.items()} for each in self.images),
            {name: tensor.to(device) for name, tensor in self.kinds.items()},
            self.counts,
        )


def accepted(model: nn.Module, fields: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return those of a processor's fields that `model` takes."""
    return _named(fields, taken_by(model))


def _named(fields: Mapping[str, _Value], names: Collection[str]) -> dict[str, _Value]:
    return {name: value for name, value in fields.items() if name in names}


def taken_by(model: nn.Module) -> set[str]:
    """Return the fields that the forward pass of `model` names, or hands on to a part that does; never labels."""
    plain = without_adapter(model)
    own = inspect.signature(plain.forward).parameters
    named = set(own)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        further = (plain.base_model.forward, getattr(plain, "get_image_features", None))
        named |= {name for each in further if each is not None for name in inspect.signature(each).parameters}
    return named - {"labels"}


def join_images(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the image fields of several prompts as one batch's, in their order; a prompt may come more than once.

    Tensors follow each other along the first dimension. Where they differ in another one, such as in the number of
    tiles, they are padded with zeros at its end, as the processors pad a batch.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _concatenate([part[name] for part in parts if name in part]) for name in names}


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]

    def filled(tensor: Tensor) -> Tensor:
        missing = [size - has for size, has in zip(largest, tensor.shape[1:], strict=True)]
        return pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor

    return torch.cat([filled(tensor) for tensor in tensors])


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
    return plain_words(processor, completion) + cast(str, tokenizer_of(processor).eos_token)


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


def encode(processor: Processor, prompts: Sequence[Prompt], images: Sequence[Sequence[Image]]) -> list[Encoded]:
    """Render, tokenise and process prompts with their images, each as if it came by itself.

    The tokens are those of the stock `apply_chat_template(tokenize=True)`: the tokenizer adds its beginning of a
    sequence only where the template has written none. Words that it would take for special tokens are neutralised.
    Prompts whose images have the same sizes, and with them the same number of tiles, patches and tokens, go through
    the processor together, which is several times as fast.

    Raises:
        DataError: a text-only model is asked about an image.
    """
    begin = cast(str | None, tokenizer_of(processor).bos_token)
    alike: dict[object, list[int]] = {}
    texts = [prompt_text(processor, prompt) for prompt in prompts]
    for n, (text, own) in enumerate(zip(texts, images, strict=True)):
        begun = begin is not None and text.startswith(begin)
        alike.setdefault((begun, *((image.size, image.mode) for image in own)), []).append(n)
    found: dict[int, Encoded] = {}
    for (begun, *_), those in cast(Mapping[tuple[bool], list[int]], alike).items():
        how = {"add_special_tokens": False} if begun or isinstance(processor, PreTrainedTokenizerBase) else {}
        made = _encode(processor, [texts[n] for n in those], [list(images[n]) for n in those], how)
        found |= zip(those, made, strict=True)
    return [found[n] for n in range(len(prompts))]


def _encode(
    processor: Processor, texts: list[str], images: list[list[Image]], how: Mapping[str, bool]
) -> list[Encoded]:
    """Encode prompts whose images are of the same number and sizes."""
    # A processor that takes the answer as `suffix` is a prefix language model's, whose answers are of kind 1.
    answers = int("suffix" in inspect.signature(type(processor).__call__).parameters)
    if not images[0]:
        return [Encoded(ids, answers=answers) for ids in tokenizer_of(processor)(texts, **how)["input_ids"]]
    if isinstance(processor, PreTrainedTokenizerBase):
        raise DataError(
            "a text-only model was asked about an image; name a vision-language checkpoint, or leave the images out"
        )
    count = len(texts)
    made = processor(images=images, text=texts, return_tensors="pt", padding=count > 1, **how)
    fields = _tensors({name: value for name, value in made.items() if name not in _NOT_OF_IMAGES})
    if any(tensor.dim() == 0 or len(tensor) % count for tensor in fields.values()) and count > 1:
        return [
            each for text, own in zip(texts, images, strict=True) for each in _encode(processor, [text], [own], how)
        ]
    real = made["attention_mask"].bool()
    parts = {name: tensor.split(len(tensor) // count) for name, tensor in fields.items()}
    return [
        Encoded(
            made["input_ids"][n][real[n]].tolist(),
            {name: made[name][n][real[n]].tolist() for name in _PER_TOKEN if name in made},
            {name: each[n] for name, each in parts.items()},
            answers,
            len(images[n]),
        )
        for n in range(count)
    ]


def _tensors(fields: Mapping[str, object]) -> dict[str, Tensor]:
    """Return fields as tensors; some processors leave lists. What can be none, such as names, is for no model."""
    found: dict[str, Tensor] = {}
    for name, value in fields.items():
        if isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value):
            found[name] = _concatenate(value)
            continue
        with suppress(ValueError, TypeError):
            found[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
    return found


def encode_prompts(processor: Processor, prompts: Sequence[Prompt], images: Sequence[Pictures]) -> dict[str, Tensor]:
    """Return the fields of prompts with their images, padded on the left.

    Raises:
        DataError: as `encode`.
    """
    each = encode(processor, prompts, [as_list(pictures) for pictures in images])
    size = max(len(one.ids) for one in each)

    def left(rows: Sequence[list[int]], value: int) -> Tensor:
        return torch.tensor([[value] * (size - len(row)) + row for row in rows])

    names = dict.fromkeys(name for one in each for name in one.kinds)
    return {
        "input_ids": left([one.ids for one in each], cast(int, tokenizer_of(processor).pad_token_id)),
        "attention_mask": left([[1] * len(one.ids) for one in each], 0),
        **{name: left([one.kinds.get(name, [0] * len(one.ids)) for one in each], 0) for name in names},
        **join_images([one.images for one in each]),
    }


def build_batch(
    processor: Processor,
    prompts: Sequence[Prompt],
    images: Sequence[Pictures],
    completions: Sequence[Sequence[str]],
) -> Batch:
    """Tokenise `completions[p]` after `prompts[p]` for every p; the images of prompt p are processed once.

    Returns a `Batch` of `N = sum(len(c) for c in completions)` rows in the order of the prompts.

    Raises:
        DataError: as `encode`.
    """
    asked = [p for p, those in enumerate(completions) if those]
    prompts, images = [prompts[p] for p in asked], [images[p] for p in asked]
    completions = [completions[p] for p in asked]
    encoded = encode(processor, prompts, [as_list(pictures) for pictures in images])
    return batch_of(encoded, endings(processor, prompts, completions), cast(int, tokenizer_of(processor).pad_token_id))


def endings(
    processor: Processor, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]
) -> list[list[list[int]]]:
    """Return the tokens of `completions[p]` as they stand behind `prompts[p]`, their ends included."""
    texts = [
        completion_text(processor, prompt, completion)
        for prompt, those in zip(prompts, completions, strict=True)
        for completion in those
    ]
    tokens = iter(tokenizer_of(processor)(texts, add_special_tokens=False)["input_ids"] if texts else [])
    return [list(islice(tokens, len(those))) for those in completions]


def batch_of(encoded: Sequence[Encoded], completions: Sequence[Sequence[Sequence[int]]], padding: int) -> Batch:
    """Put the tokens of `completions[p]` behind prompt p; `padding` is the token that rows are padded with."""
    rows = [(p, [*encoded[p].ids, *ids]) for p, those in enumerate(completions) for ids in those]
    shape = (len(rows), max(len(row) for _, row in rows))
    input_ids = torch.full(shape, padding, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    kinds = {name: torch.zeros_like(input_ids) for each in encoded for name in each.kinds}
    for n, (p, row) in enumerate(rows):
        start = len(encoded[p].ids)
        input_ids[n, : len(row)] = torch.tensor(row)
        attention_mask[n, : len(row)] = 1
        labels[n, start : len(row)] = input_ids[n, start : len(row)]
        for name, field_ in kinds.items():
            before = encoded[p].kinds.get(name, [0] * start)
            field_[n, : len(row)] = torch.tensor([*before, *[encoded[p].answers] * (len(row) - start)])
    index, counts = torch.tensor([p for p, _ in rows]), tuple(each.count for each in encoded)
    return Batch(input_ids, attention_mask, labels, index, tuple(each.images for each in encoded), kinds, counts)


def chunks(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Split prompts of `sizes` rows into consecutive runs of at most `limit` rows.

    The rows of a prompt stay together, so that its images are encoded once; a prompt of more rows is a run by itself.
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
    if reason := why_alone(model):
        tell_alone(model, reason)
        where = torch.arange(rows * longest, device=batch.input_ids.device).view(rows, longest)
        return model_inputs(model, batch), where
    lengths, starts = batch.attention_mask.sum(dim=1).tolist(), (batch.labels != -100).int().argmax(dim=1).tolist()
    tokens, owner = batch.input_ids.tolist(), batch.prompt_index.tolist()
    first = {p: n for n, p in reversed(list(enumerate(owner)))}
    prompts = range(len(first))
    prefixes = [tokens[first[p]][: starts[first[p]]] for p in prompts]
    said: list[list[list[int]]] = [[] for _ in prompts]
    for n, p in enumerate(owner):
        said[p].append(tokens[n][starts[n] : lengths[n]])
    kinds, images = batch.kinds.get("mm_token_type_ids"), accepted(model, batch.image_inputs)
    types = None if kinds is None else [kinds[first[p]].tolist()[: len(prefixes[p])] for p in prompts]
    packed = pack(model, prefixes, said, prefix_positions(model, prefixes, types, images), pad=0)
    size = packed.input_ids.shape[1]
    begins = [start for row in packed.starts for start in row]  # rows come prompt after prompt
    column = torch.arange(longest)
    where = torch.stack(
        [
            p * size + torch.where(column < starts[n], column, column - starts[n] + begins[n])
            for n, p in enumerate(owner)
        ]
    ).clamp(max=len(first) * size - 1)
    return {**packed.model_inputs(), **images}, where.to(batch.input_ids.device)


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, object]:
    """Return the arguments of `model(...)` for all N rows, each image encoded once (with gradients, if enabled)."""
    rows = batch.prompt_index.tolist()
    inputs: dict[str, object] = accepted(model, batch.text_inputs)
    if not any(batch.images):
        return inputs
    encoded = _encode_images(model, batch)
    if encoded is None:
        if len(rows) > len(batch.images):
            warn_once(
                f"{model.config.model_type}: an image is encoded anew for every answer about it, because its forward "
                "pass takes no features that belong to single images; same numbers, more work"
            )
        return inputs | accepted(model, join_images([batch.images[p] for p in rows]))
    output, entries = encoded
    features = output.pooler_output  # type: ignore[attr-defined]  # I tensors [tokens, D], or one [I, tokens, D]
    wanted = [i for p in rows for i in entries[p]]
    output.pooler_output = (  # type: ignore[attr-defined]
        features[wanted] if isinstance(features, Tensor) else [features[i] for i in wanted]
    )
    read = [{name: batch.images[p][name] for name in _PER_IMAGE_KEYS if name in batch.images[p]} for p in rows]
    return inputs | accepted(model, join_images(read)) | {"mm_encoder_outputs": {"image": output}}


def _encode_images(model: PreTrainedModel, batch: Batch) -> tuple[object, list[range]] | None:
    """Return the features of all prompts' images, and which entries are each prompt's.

    There is an entry for every image, or as with Idefics3 one for all images of a prompt. None where the model takes no
    features, or they are neither.
    """
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return None
    images = accepted(model, batch.image_inputs)
    encoded = cast(_EncodesImages, model).get_image_features(**images, return_dict=True)
    found = len(encoded.pooler_output)  # type: ignore[attr-defined]
    sizes = next((sizes for sizes in (batch.counts, [min(n, 1) for n in batch.counts]) if sum(sizes) == found), None)
    if sizes is None or getattr(encoded, "deepstack_features", None) is not None:
        return None
    return encoded, [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
