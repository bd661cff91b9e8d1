"""Attention over packed rows that computes what completions see, and nothing that they do not.

A packed row `[prefix | completion 1 | … | completion m]` under a dense mask costs (L + mR)² scores a head, most of them
hidden where completions are long. Here a row is taken apart:

    prefix         L queries, L keys, causal                           no mask: the fastest kernel there is
    completions    each R queries, L + R keys: the prefix and itself   as a batch of m rows

Both are calls of transformers' own SDPA attention. The layout travels in the place of the mask, as integers
`[1, L, C, 2 + R]` (a view of `[C, 2 + R]`; L, the longest prefix, is only in its shape): of every completion its row,
the length of its prefix, and the columns of its tokens, -1 where it has none.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from accord.errors import warn_once

NAME = "accord_shared_prefix"
"""Under this name transformers finds the attention; any mask but a layout is handed on to SDPA."""


def can_share(model: PreTrainedModel) -> bool:
    """Return whether every layer of `model` attends by a mask that we may give."""
    return not why_alone(model)


def why_alone(model: PreTrainedModel) -> str:
    """Return why the completions of a prompt cannot share it in `model`; empty where they can."""
    text = model.config.get_text_config()
    layers = getattr(text, "layer_types", None)
    windowed = set(layers) != {"full_attention"} if layers else getattr(text, "sliding_window", None) is not None
    taken = inspect.signature(type(model).forward).parameters
    if "cross_attention_mask" in taken:
        return "it reads images by cross-attention, under masks of their own"
    if "token_type_ids" in taken:
        return "tokens of its prompt see each other in both directions"
    if windowed:
        return "not all of its layers attend to the whole prompt"
    if text._attn_implementation not in ("sdpa", "eager", NAME):
        return f"its attention {text._attn_implementation!r} takes no mask of another form"
    return "" if "position_ids" in taken else "it takes no positions"


def tell_alone(model: PreTrainedModel, reason: str) -> None:
    """Warn, once, that the completions of a prompt have a full row each."""
    warn_once(
        f"{model.config.model_type}: every completion is computed with a copy of its prompt, because {reason}; same "
        "numbers, more work"
    )


def skip_hidden(model: PreTrainedModel) -> None:
    """Let the language layers of a model that attends by SDPA skip what is hidden in packed rows, if it can share."""
    text = model.config.get_text_config()
    if text._attn_implementation == "sdpa" and model._can_set_attn_implementation() and can_share(model):
        text._attn_implementation = NAME


def skips_hidden(model: PreTrainedModel) -> bool:
    """Return whether `skip_hidden` took."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def layout(row: list[int], prefix: list[int], columns: list[range], longest: int, device: torch.device) -> Tensor:
    """Return what `attend` takes as a mask: of C completions their rows, prefix lengths and columns.

    It is made where it is used: a view that is moved becomes as large as it looks.
    """
    most = max(map(len, columns))
    table = torch.full((len(row), 2 + most), -1)
    for c, own in enumerate(columns):
        table[c, 0], table[c, 1] = row[c], prefix[c]
        table[c, 2 : 2 + len(own)] = torch.arange(own.start, own.stop)
    table = table.to(device)
    return table.expand(1, longest, *table.shape)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend as `sdpa` does; with a layout for a mask, over packed rows.

    Args:
        module: the attention layer.
        query: `[P, H, S, d]`; `key` and `value` may have fewer heads.
        key: see above.
        value: see above; its heads may be of another width.
        attention_mask: a layout, or what SDPA takes.
        **settings: as SDPA's.

    Returns:
        `[P, S, H, d]`; of columns that belong to nothing, any.
    """
    cached = query.shape[2] < key.shape[2] and settings.get("cache") is None and settings.get("position_bias") is None
    if cached and attention_mask is not None and attention_mask.dtype == torch.bool:
        return _few_queries(query, key, value, attention_mask, **settings), None
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    longest, table = attention_mask.shape[1], attention_mask[0, 0]
    row, prefix, columns = table[:, 0], table[:, 1], table[:, 2:]
    rows, heads, size, _ = query.shape
    there = columns >= 0
    flat = row[:, None] * size + columns.clamp(min=0)

    def own(states: Tensor) -> Tensor:  # [P, H, S, d] -> [C, H, R, d]
        dense = states.transpose(1, 2).flatten(0, 1)
        return dense.index_select(0, flat.flatten()).view(*flat.shape, *dense.shape[1:]).transpose(1, 2)

    def seen(states: Tensor) -> Tensor:  # [P, H, S, d] -> [C, H, L + R, d]
        return torch.cat([states[:, :, :longest].index_select(0, row), own(states)], dim=2)

    settings["is_causal"] = True
    first, _ = sdpa_attention_forward(
        module, query[:, :, :longest], key[:, :, :longest], value[:, :, :longest], None, **settings
    )
    step = torch.arange(columns.shape[1], device=columns.device)
    before = torch.arange(longest, device=columns.device) < prefix[:, None]
    mask = torch.cat(
        [before[:, None, :].expand(-1, len(step), -1), (step <= step[:, None]).expand(len(row), -1, -1)], dim=2
    )
    rest, _ = sdpa_attention_forward(module, own(query), seen(key), seen(value), mask[:, None], **settings)
    out = rest.new_zeros(rows, size + 1, heads, rest.shape[-1])  # under autocast of another type than the query
    out[:, :longest] = first
    out[row[:, None], torch.where(there, columns, size)] = rest
    return out[:, :size], None


def _few_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> Tensor:
    """Attend to a cache: heads that share keys ask together, so that the keys need not be repeated for each."""
    kin = key.shape[1]
    together = query.reshape(len(query), kin, -1, query.shape[3])  # [P, H, S, d] -> [P, H', H / H' · S, d]
    mask = mask.repeat(1, 1, query.shape[1] // kin, 1)
    out = nn.functional.scaled_dot_product_attention(together, key, value, mask, dropout, scale=scaling)
    return out.reshape(*query.shape[:3], value.shape[-1]).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
