"""Put all completions of a prompt behind one copy of it.

    tokens     [ prefix … | completion 1 … | completion 2 … | … ]      one row per prompt, S tokens, padded on the right
    positions    0 … L−1    L …              L …                       each completion goes on where the prefix ends
    sees         a token sees the prefix up to itself, and its own completion up to itself

The hidden states are those of one full row per completion, exactly; the work is L + Σ R tokens and one image instead of
G (L + R) tokens and G images. Any decoder that takes position ids and a 4D attention mask computes it, unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accord.models.attention import layout, skips_hidden

Ids = Sequence[int]


@dataclass(frozen=True)
class Packed:
    """P rows of S tokens, and where each row's completions begin."""

    input_ids: Tensor  # [P, S]
    attention_mask: Tensor  # [P, 1, S, S]
    position_ids: Tensor  # [P, S], or [3, P, S] for models with a position per axis
    starts: list[list[int]]  # column of the first token of every completion of every row

    def model_inputs(self) -> dict[str, Tensor]:
        """Return what `model(...)` takes besides the images."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


def pack(
    model: PreTrainedModel,
    prefixes: Sequence[Ids],
    completions: Sequence[Sequence[Ids]],
    positions: Sequence[Tensor] | None = None,
    *,
    pad: int,
) -> Packed:
    """Lay out `completions[p]` behind `prefixes[p]` for every p.

    Args:
        model: what will compute the rows; its attention decides the form of the mask, its device where they are.
        prefixes: P token lists.
        completions: for each prefix its completions, none of them empty.
        positions: of every prefix and the token after it, `[L + 1]` or `[3, L + 1]`; None counts from 0.
        pad: any token id.
    """
    lengths = [len(prefix) + sum(map(len, those)) for prefix, those in zip(prefixes, completions, strict=True)]
    size = max(lengths)
    ids = torch.full((len(prefixes), size), pad, dtype=torch.long)
    axes = () if positions is None or positions[0].ndim == 1 else (positions[0].shape[0],)
    place = torch.zeros((*axes, len(prefixes), size), dtype=torch.long)
    starts: list[list[int]] = []
    for p, (prefix, those) in enumerate(zip(prefixes, completions, strict=True)):
        known = torch.arange(len(prefix) + 1) if positions is None else positions[p]
        flat, where = list(prefix), [known[..., :-1]]
        starts.append([])
        for completion in those:
            starts[-1].append(len(flat))
            flat += completion
            where.append(known[..., -1:] + torch.arange(len(completion)))
        ids[p, : len(flat)] = torch.tensor(flat)
        place[..., p, : len(flat)] = torch.cat(where, dim=-1)
    device = model.device
    if skips_hidden(model) and _worth_skipping(prefixes, completions):
        mask = _layout(prefixes, completions, starts, device)
    else:
        mask = _dense(_segments(prefixes, completions, size).to(device), model)
    return Packed(ids.to(device), mask, place.to(device), starts)


def _worth_skipping(prefixes: Sequence[Ids], completions: Sequence[Sequence[Ids]]) -> bool:
    """Return whether skipping what is hidden saves more than it costs, a copy of the prefix's keys per completion.

    Measured on a CPU, a key that is copied costs as much as 64 scores that nobody needs, at any number of features.
    """
    lengths = [len(own) for those in completions for own in those]
    longest, most = max(map(len, prefixes)), max(lengths)  # to which all are padded
    size = max(len(before) + sum(map(len, those)) for before, those in zip(prefixes, completions, strict=True))
    copied = len(lengths) * (longest + most)
    hidden = len(prefixes) * (size**2 - longest**2 // 2) - copied * most
    return longest > 0 and hidden > 64 * copied


def _layout(
    prefixes: Sequence[Ids],
    completions: Sequence[Sequence[Ids]],
    starts: Sequence[Sequence[int]],
    device: torch.device,
) -> Tensor:
    every = [
        (p, len(prefixes[p]), range(start, start + len(completion)))
        for p, those in enumerate(completions)
        for start, completion in zip(starts[p], those, strict=True)
    ]
    row, prefix, columns = map(list, zip(*every, strict=True))
    return layout(row, prefix, columns, max(map(len, prefixes)), device)


def _segments(prefixes: Sequence[Ids], completions: Sequence[Sequence[Ids]], size: int) -> Tensor:
    """Return whose every token is, `[P, S]`: 0 the prefix's, n the n-th completion's, -1 padding."""
    rows = []
    for prefix, those in zip(prefixes, completions, strict=True):
        row = [0] * len(prefix) + [n for n, completion in enumerate(those, start=1) for _ in completion]
        rows.append(row + [-1] * (size - len(row)))
    return torch.tensor(rows)


def _dense(segment: Tensor, model: PreTrainedModel) -> Tensor:
    size = segment.shape[1]
    own = segment[:, None, :] == segment[:, :, None]
    return decoder_mask(
        model, (own | (segment == 0)[:, None, :]) & segment.new_ones(size, size, dtype=torch.bool).tril()
    )


def decoder_mask(model: PreTrainedModel, seen: Tensor) -> Tensor:
    """Return the mask `[P, 1, S, K]` that `model` takes, from what each query (row) sees of the keys, `[P, S, K]`."""
    seen = seen[:, None]
    if model.config.get_text_config()._attn_implementation != "eager":
        return seen
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(~seen, lowest)


def prefix_positions(
    model: PreTrainedModel, prefixes: Sequence[Ids], token_types: Sequence[Ids] | None, images: Mapping[str, Tensor]
) -> list[Tensor] | None:
    """Return the positions of every prefix and of the token after it, for models with several axes; else None.

    Multi-axis rotary positions (Qwen2-VL and its kin) depend on where the image tokens stand and on the images' grids;
    the model's own `get_rope_index` knows how.
    """
    index = getattr(model.base_model, "get_rope_index", None)
    if index is None or token_types is None or "image_grid_thw" not in images:
        return None
    device, longest = model.device, max(map(len, prefixes))
    ids, types, mask = (torch.zeros(len(prefixes), longest, dtype=torch.long, device=device) for _ in range(3))
    for p, (prefix, kinds) in enumerate(zip(prefixes, token_types, strict=True)):
        ids[p, : len(prefix)] = torch.tensor(prefix)
        types[p, : len(prefix)] = torch.tensor(kinds)
        mask[p, : len(prefix)] = 1
    found, _ = index(ids, mm_token_type_ids=types, image_grid_thw=images["image_grid_thw"], attention_mask=mask)
    known = [found[:, p, : len(prefix)].cpu() for p, prefix in enumerate(prefixes)]
    return [torch.cat([each, each.max().expand(each.shape[0], 1) + 1], dim=1) for each in known]
