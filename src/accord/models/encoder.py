"""A frozen model that turns (image, prompt, completion) into hidden states: what routers and gates read.

    h = Enc(x, y) ∈ R^{T×D}     last hidden states over image, prompt and completion

By default it is the base policy itself; a recipe may name a smaller one (`[encoder] checkpoint`), which every site and
the server then share. Source: Lu et al. 2026, arXiv 2605.03426, section 3.3. Differs: the paper does not name its
encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias, cast

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from accord.data.images import Pictures, as_list
from accord.models.attention import skip_hidden
from accord.models.inputs import build_batch, completion_text, shared_inputs
from accord.models.load import Processor, as_base, tokenizer_of
from accord.types import Prompt

StateKey: TypeAlias = tuple[str, tuple[int, ...], str]
"""What was read: the prompt's words, the image objects, the completion."""


def state_key(prompt: Prompt, images: Pictures, completion: str) -> StateKey:
    """Return under what name `Encoder` remembers hidden states; it holds while the image objects live."""
    return prompt_words(prompt), tuple(map(id, as_list(images))), completion


def prompt_words(prompt: Prompt) -> str:
    """Return a conversation without its pictures, but with their places, to tell it from others."""
    contents = [cast(str | Sequence[Mapping[str, object]], turn["content"]) for turn in prompt]
    said = [[each] if isinstance(each, str) else [block.get("text") for block in each] for each in contents]
    return str([(turn["role"], words) for turn, words in zip(prompt, said, strict=True)])


class Encoder:
    """A frozen model that turns (images, prompt, completion) into hidden states; a text-only one takes no image.

    Where they are computed already, as by GRPO's reference when it is the same model, `remember` spares the
    encoder the work. Where the model is trained meanwhile by an adapter on it, the encoder reads with the adapter off.
    """

    def __init__(self, model: PreTrainedModel, processor: Processor) -> None:
        self.model = model.eval().requires_grad_(False)
        skip_hidden(self.model)
        self.processor = processor
        self._known: Mapping[StateKey, Tensor] = {}
        self._images: Sequence[Image] = ()

    def remember(self, states: Mapping[StateKey, Tensor], images: Sequence[Image]) -> None:
        """Keep `[T, D]` of each (prompt, images, completion), its end included, in place of what was kept before.

        The images are kept, too: their identities, by which they are known, would pass to others once they were gone.
        """
        self._known, self._images = states, images

    @property
    def features(self) -> int:
        """D, the size of a hidden state."""
        return cast(int, self.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states `[N, T, D]` in float32 and their mask `[N, T]`."""
        if not self._known:
            return self._compute(prompts, images, completions)
        keys = [
            [state_key(prompt, pictures, text) for text in texts]
            for prompt, pictures, texts in zip(prompts, images, completions, strict=True)
        ]
        missing = [[key[2] for key in those if key not in self._known] for those in keys]
        found = dict(self._known)
        if any(missing):
            states, mask = self._compute(prompts, images, missing)
            unknown = [key for those in keys for key in those if key not in self._known]
            found |= {key: row[real] for key, row, real in zip(unknown, states, mask, strict=True)}
        rows = [found[key] for those in keys for key in those]
        masks = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        return pad_sequence(rows, batch_first=True).float(), pad_sequence(masks, batch_first=True)

    def before_answers(self, prompts: Sequence[Prompt], images: Sequence[Pictures]) -> Tensor:
        """Return the hidden states from which the answers to prompts would begin, `[P, D]` on the CPU."""
        states, mask = self(prompts, images, [[""]] * len(prompts))
        endings = [completion_text(self.processor, prompt, "") for prompt in prompts]
        tokens = tokenizer_of(self.processor)(endings, add_special_tokens=False)["input_ids"]
        last = mask.sum(dim=1) - 1 - torch.tensor([len(ids) for ids in tokens], device=mask.device)
        return states[torch.arange(len(states), device=states.device), last].cpu()

    def _compute(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        batch = build_batch(self.processor, prompts, images, completions).to(self.model.device)
        inner = self.model.base_model
        inputs, where = shared_inputs(inner, batch)
        with as_base(self.model):
            hidden = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)  # [P · S, D]
        return hidden[where].float(), batch.attention_mask.bool()


@contextmanager
def last_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the last hidden states of every pass through `model`, `[N, T, D]` each."""
    seen: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda *given: seen.append(given[-1].last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()
