"""The learned router of MoR: whose judgement counts for this image, prompt and answer?

    h = Enc(x, y) ∈ R^{T×D}     last hidden states of a frozen VLM over image, prompt and completion
    z = g_φ(h) ∈ R^K            four pre-norm Transformer layers, the last token, a linear head
    α = softmax(z)              the weight of each site

Source: Lu et al. 2026, arXiv 2605.03426, section 3.3. Differs: the paper names neither the encoder, the width nor
the pooling; ours are the base policy, a width in the recipe, and the last token (the mean over tokens, most of them
the image's, learns more slowly).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import msgspec
import torch
from PIL.Image import Image
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from accord.errors import CheckpointError, RecipeError, check_least
from accord.models.attention import skip_hidden
from accord.models.inputs import build_batch, chunks, completion_text, shared_inputs
from accord.models.load import Processor, tokenizer_of
from accord.runs import replace_folder, write_atomic
from accord.types import Prompt


class Router(Protocol):
    """Says whose judgement counts: weights `[N, K]`, non-negative, rows summing to 1; a plain function qualifies."""

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Image | None], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return one row per completion, in the order of the prompts, `N = sum(len(c) for c in completions)`."""
        ...


StateKey: TypeAlias = tuple[str, int, str]
"""What was read: the prompt's words, the image object or None, the completion."""


def state_key(prompt: Prompt, image: Image | None, completion: str) -> StateKey:
    """Return under what name `Encoder` remembers hidden states; it holds while the image object lives."""
    return prompt_words(prompt), id(image), completion


def prompt_words(prompt: Prompt) -> str:
    """Return a conversation without its pictures, to tell it from others."""
    contents = [cast(str | Sequence[Mapping[str, object]], turn["content"]) for turn in prompt]
    said = [[each] if isinstance(each, str) else [block.get("text") for block in each] for each in contents]
    return str([(turn["role"], words) for turn, words in zip(prompt, said, strict=True)])


class Encoder:
    """A frozen model that turns (image, prompt, completion) into hidden states; a text-only one takes no image.

    Where somebody has computed them already, as GRPO's reference does when it is the same model, `remember` spares the
    encoder the work.
    """

    def __init__(self, model: PreTrainedModel, processor: Processor) -> None:
        self.model = model.eval().requires_grad_(False)
        skip_hidden(self.model)
        self.processor = processor
        self._known: Mapping[StateKey, Tensor] = {}
        self._images: Sequence[Image] = ()

    def remember(self, states: Mapping[StateKey, Tensor], images: Sequence[Image]) -> None:
        """Keep `[T, D]` of each (prompt, image, completion), its end included, in place of what was kept before.

        The images are kept, too: their identities, by which they are known, would pass to others once they were gone.
        """
        self._known, self._images = states, images

    @property
    def features(self) -> int:
        """D, the size of a hidden state."""
        return cast(int, self.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Image | None], completions: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states `[N, T, D]` in float32 and their mask `[N, T]`."""
        if not self._known:
            return self._compute(prompts, images, completions)
        keys = [
            [state_key(prompt, image, text) for text in texts]
            for prompt, image, texts in zip(prompts, images, completions, strict=True)
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

    def before_answers(self, prompts: Sequence[Prompt], images: Sequence[Image | None]) -> Tensor:
        """Return the hidden states from which the answers to prompts would begin, `[P, D]` on the CPU."""
        states, mask = self(prompts, images, [[""]] * len(prompts))
        endings = [completion_text(self.processor, prompt, "") for prompt in prompts]
        tokens = tokenizer_of(self.processor)(endings, add_special_tokens=False)["input_ids"]
        last = mask.sum(dim=1) - 1 - torch.tensor([len(ids) for ids in tokens], device=mask.device)
        return states[torch.arange(len(states), device=states.device), last].cpu()

    def _compute(
        self, prompts: Sequence[Prompt], images: Sequence[Image | None], completions: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        batch = build_batch(self.processor, prompts, images, completions).to(self.model.device)
        inner = self.model.base_model
        inputs, where = shared_inputs(inner, batch)
        hidden = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)  # [P · S, D]
        return hidden[where].float(), batch.attention_mask.bool()


@dataclass(frozen=True)
class RouterConfig:
    """Size of the router and its federated training."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    rounds: int = 60
    local_steps: int = 2
    pairs_per_batch: int = 32
    pairs_per_site: int = 500  # drawn once: features are kept, and no site's size drowns the others
    learning_rate: float = 2e-3
    rows_at_once: int = 512  # (prompt, completion) rows that the encoder takes in one forward pass

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train, and a width that the heads cannot share."""
        check_least(self, layers=1, rounds=1, local_steps=1, pairs_per_batch=1, pairs_per_site=1, learning_rate=0)
        check_least(self, rows_at_once=1)
        if self.heads < 1 or self.width % self.heads:
            raise RecipeError(
                f"width must be a multiple of heads, got {self.width} and {self.heads}; "
                "change router.width or router.heads"
            )


class RouterNetwork(nn.Module):
    """g_φ: hidden states `[N, T, D]` → logits `[N, K]`."""

    def __init__(self, features: int, sites: int, config: RouterConfig) -> None:
        super().__init__()
        self.shape = (features, sites)
        self.config = config
        self.enter = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, config.width))
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, sites)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits z `[N, K]` for hidden states `[N, T, D]` and their mask `[N, T]`."""
        return cast(Tensor, self.head(self.penultimate(hidden, mask)))

    def penultimate(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return what the linear head reads, `[N, width]`."""
        tokens = self.body(self.enter(hidden), src_key_padding_mask=~mask)
        last = tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(dim=1) - 1]
        return cast(Tensor, self.norm(last))

    def to_bytes(self) -> bytes:
        """Return the weights as safetensors bytes, as they travel."""
        return save({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()})

    def from_bytes(self, data: bytes) -> None:
        """Take weights that travelled.

        Raises:
            CheckpointError: names, shapes or types do not match, or a value is not finite.
        """
        self.load_state_dict(read_weights(data, self.state_dict()))


def read_weights(data: bytes, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parse safetensors bytes from another party and check them against `expected` before anything uses them.

    Raises:
        CheckpointError: names, shapes or types do not match, or a value is not finite.
    """
    try:
        weights = load(data)
    except Exception as error:  # safetensors raises its own untyped errors on malformed bytes
        # Its text quotes the bytes, which a site may have made up for whoever reads the warning.
        raise CheckpointError(f"router weights of {len(data)} bytes cannot be read ({type(error).__name__})") from error
    if weights.keys() != expected.keys():
        raise CheckpointError(f"router weights have other names: {sorted(weights.keys() ^ expected.keys())[:5]!a:.200}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            want = f"{tuple(expected[name].shape)} {expected[name].dtype}"
            raise CheckpointError(f"router weight {name} is {tuple(tensor.shape)} {tensor.dtype}, expected {want}")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"router weight {name} holds a value that is not finite")
    return weights


class LearnedRouter:
    """Encoder and network together, on the encoder's device: a `Router`."""

    def __init__(self, encoder: Encoder, network: RouterNetwork) -> None:
        self.encoder = encoder
        self.network = network.eval().to(encoder.model.device)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Image | None], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return `softmax(g_φ(Enc(x, y)))`, `[N, K]`."""
        weights = []
        for span in chunks([len(c) for c in completions], self.network.config.rows_at_once):
            logits: Tensor = self.network(*self.encoder(prompts[span], images[span], completions[span]))
            weights.append(logits.softmax(dim=-1).cpu())
        return torch.cat(weights)


def save_router(path: Path, network: RouterNetwork) -> None:
    """Write the network to the folder `path`, whole or not at all."""

    def write(folder: Path) -> None:
        write_atomic(folder / "router.safetensors", network.to_bytes())
        described = {
            "features": network.shape[0],
            "sites": network.shape[1],
            "config": msgspec.to_builtins(network.config),
        }
        write_atomic(folder / "router.json", msgspec.json.format(msgspec.json.encode(described)))

    replace_folder(path, write)


class _Described(msgspec.Struct, forbid_unknown_fields=True):
    features: int
    sites: int
    config: RouterConfig


def load_router(path: Path) -> RouterNetwork:
    """Load what `save_router` wrote.

    Raises:
        CheckpointError: the folder is absent, damaged or of another kind.
    """
    try:
        described = msgspec.json.decode((path / "router.json").read_bytes(), type=_Described)
        weights = (path / "router.safetensors").read_bytes()
        network = RouterNetwork(described.features, described.sites, described.config)
    except (OSError, RuntimeError, msgspec.MsgspecError, RecipeError) as error:
        raise CheckpointError(f"{path}: not a router ({error}); train one with `accord router train`") from error
    network.from_bytes(weights)
    return network.eval()
