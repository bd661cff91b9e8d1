"""Sample several completions of each prompt, computing what they share once.

    prefill      every prompt once, its image once                      P rows, kept as they are to the end
    step t       every *distinct* continuation once                     beside the others of its prompt, in one row;
                                                                        prompts with fewer of them are padded

Rows that have said the same so far are in the same state: one query gives the distribution from which each of them
draws for itself. The states of a prompt stand side by side behind one copy of its prefix, and a mask says which columns
of the cache each has come through, so nothing is copied where answers part:

    cache   [ prompt … | a b | c d e | … ]     a state after `b`, `e` sees the prompt, b, e

Every row brings its own random numbers, so what it says does not depend, up to rounding, on what else is computed with
it. The samples have the distribution of `generate` on N full rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from accord.models.prefix import Ids, decoder_mask, prefix_positions


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    images: Mapping[str, Tensor],
    rows: Sequence[int],
    settings: GenerationConfig,
    noise: Tensor,
    token_types: Sequence[Ids] | None = None,
) -> list[list[int]]:
    """Return the sampled token ids of every row, its end token included if it came.

    Args:
        model: the policy.
        prompts: P token lists.
        images: what the processor made of the prompts' images.
        rows: which prompt each of the N rows continues.
        settings: `max_new_tokens`, `eos_token_id`, `pad_token_id`, `temperature`, `top_k`, `top_p`, `min_p`,
            `suppress_tokens`.
        noise: one uniform number in [0, 1) for every row and token, `[N, max_new_tokens]`, in the type in which chances
            are summed (`widest_float`).
        token_types: the kind of every prompt token, for models with several position axes.
    """
    device = model.device
    size = max(map(len, prompts))
    ids = torch.full((len(prompts), size), cast(int, settings.pad_token_id))
    mask = torch.zeros_like(ids)
    known = prefix_positions(model, prompts, token_types, images)
    known = known or [torch.arange(len(prompt) + 1) for prompt in prompts]
    place = torch.zeros(*known[0].shape[:-1], *ids.shape, dtype=torch.long)
    for p, prompt in enumerate(prompts):  # padded on the left, so that every row goes on in the same column
        ids[p, size - len(prompt) :] = torch.tensor(prompt)
        mask[p, size - len(prompt) :] = 1
        place[..., p, size - len(prompt) :] = known[p][..., :-1]
    ids, mask, place = ids.to(device), mask.to(device), place.to(device)
    after = torch.stack([each[..., -1] for each in known], dim=-1).to(device)  # [P] or [3, P]
    ends = torch.tensor(settings.eos_token_id, device=device).flatten()
    warp = _warpers(settings)

    out = model(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True, logits_to_keep=1, **images)
    seen = mask.bool()[:, None]  # [P, S, columns of the cache], what each of the S states of a prompt has come through
    said: list[list[int]] = [[] for _ in rows]
    open_rows = torch.arange(len(rows), device=device)
    state = torch.tensor(rows, device=device)  # of every open row
    of, slot = torch.arange(len(prompts), device=device), torch.zeros(len(prompts), dtype=torch.long, device=device)
    last = cast(int, settings.max_new_tokens) - 1
    for step in range(last + 1):
        chances = warp(cast(torch.LongTensor, ids), out.logits[of, slot].float()).softmax(dim=-1)
        below = chances.to(noise.dtype).cumsum(dim=-1)[state]  # [rows, V], the distribution function
        drawn = torch.searchsorted(below, noise[open_rows, step, None] * below[:, -1:], right=True).squeeze(-1)
        drawn = drawn.clamp(max=below.shape[1] - 1)
        for row, token in zip(open_rows.tolist(), drawn.tolist(), strict=True):
            said[row].append(token)
        going = ~torch.isin(drawn, ends)
        open_rows = open_rows[going]
        if not len(open_rows) or step == last:
            break
        states, state = torch.stack([state[going], drawn[going]], dim=1).unique(dim=0, return_inverse=True)
        parent, token = states.unbind(dim=1)  # in the order of their prompts
        before, slots = of[parent], slot[parent]
        alive, of = before.unique(return_inverse=True)
        if len(alive) < len(seen):  # all that a prompt was asked has been said
            cast(Cache, out.past_key_values).batch_select_indices(alive)
            after = after[..., alive]
        counts = of.bincount(minlength=len(alive))
        slot = torch.arange(len(of), device=device) - (counts.cumsum(0) - counts)[of]
        most = int(counts.max())
        given = torch.full((len(alive), most), cast(int, settings.pad_token_id), device=device)
        given[of, slot] = token
        through = seen.new_zeros(len(alive), most, seen.shape[2])
        through[of, slot] = seen[before, slots]
        itself = torch.eye(most, dtype=torch.bool, device=device).expand(len(alive), most, most)
        seen = torch.cat([through, itself], dim=2)
        out = model(
            input_ids=given,
            attention_mask=decoder_mask(model, seen),
            position_ids=(after + step)[..., None].expand(*after.shape, most),
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    return said


def widest_float(device: torch.device) -> torch.dtype:
    """Return the type in which chances are summed: float64, but on Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _warpers(settings: GenerationConfig) -> LogitsProcessorList:
    """Return what `generate` would apply, in its order."""
    chain = LogitsProcessorList()
    if settings.suppress_tokens:
        chain.append(SuppressTokensLogitsProcessor(settings.suppress_tokens))
    if settings.temperature not in (None, 1.0):
        chain.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        chain.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1.0:
        chain.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p is not None:
        chain.append(MinPLogitsWarper(settings.min_p))
    return chain
