"""The projector of a vision-language model, which makes tokens for the language model of what the tower saw.

    image  →  frozen tower  →  projector  →  visual tokens [tokens, D]  →  frozen language model

Found by its place in the families of transformers:

    multi_modal_projector    LLaVA, FastVLM, PaliGemma, InternVL, …
    connector                Idefics3, SmolVLM
    visual.merger            Qwen2-VL, Qwen2.5-VL; Qwen3-VL, whose further mergers stay as they are

The merger of Qwen-VL stands inside the tower. While it is trained, that tower's output changes from step to step, and
the features of an image are computed anew each time (`accord.models.tower`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from accord.errors import CheckpointError
from accord.models.features import add_tensor
from accord.models.inputs import Batch, accepted, model_inputs
from accord.models.load import Processor, placeholder_tokens, tokenizer_of
from accord.models.tower import pin

PLACES: Final = ("multi_modal_projector", "connector", "visual.merger")
"""Where projectors are, by the ends of their modules' names."""


def find_projector(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Return the projector of `model`, and its name among the modules.

    Raises:
        CheckpointError: it has none, or none in a place that is known.
    """
    for place in PLACES:
        for name, module in model.named_modules():
            if name == place or name.endswith(f".{place}"):
                return name, module
    raise CheckpointError(
        f"{type(model).__name__} has no projector between a vision tower and a language model (looked for "
        f"{', '.join(PLACES)}); name a vision-language checkpoint that has one, such as accord/llava-clip-llama"
    )


def train_projector_alone(model: PreTrainedModel, *, seed: int | None = None) -> None:
    """Freeze all of `model` but its projector, and keep the tower in evaluation mode through any `model.train()`.

    Args:
        model: changed in place.
        seed: draw the projector's weights anew, from this seed; None keeps them.

    Raises:
        CheckpointError: as `find_projector`; or a part of the projector does not say how it is initialised.
    """
    _, projector = find_projector(model)
    pin(model)
    model.requires_grad_(False)
    projector.requires_grad_(True)
    if seed is not None:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            _initialise(projector)


@torch.no_grad()
def _initialise(projector: nn.Module) -> None:
    """Draw every weight as its layer's class does; the scales of norms become 1."""
    for module in projector.modules():
        own = dict(module.named_parameters(recurse=False))
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        elif [(name, weight.ndim) for name, weight in own.items()] == [("weight", 1)]:
            own["weight"].fill_(1.0)
        elif own:
            raise CheckpointError(
                f"the projector's {type(module).__name__} does not say how it is initialised; put "
                'initial = "keep" into [projector] to start from the weights of the checkpoint'
            )


def frozen_digest(model: PreTrainedModel, processor: Processor) -> Tensor:
    """Return a SHA-256 of all that stays as it is while the projector is trained, as 32 bytes `[32]`.

    Frozen weights and statistics of norms by name, type and value, vocabulary, chat template, and the size and scale
    of images: a projector fits those of its training alone.
    """
    digest, tokenizer = hashlib.sha256(), tokenizer_of(processor)
    settings = processor.image_processor.to_dict()
    images = {name: settings.get(name) for name in ("size", "crop_size", "rescale_factor", "image_mean", "image_std")}
    told = [sorted(tokenizer.get_vocab().items()), processor.chat_template, images]
    digest.update(json.dumps(told, sort_keys=True, default=dict).encode())
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in model.state_dict().items():
        if name not in trained:
            add_tensor(digest, name, weight)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


class Seen:
    """A batch whose images are projected once: the model's arguments, and what the projector made of each image."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        """Project the images of `batch`, one for each of its rows."""
        self._model = model
        name, self._projector = find_projector(model)
        self._prefix = f"{name}."
        with _calls(self._projector) as calls:
            self.inputs = model_inputs(model, batch)
            given = cast(Mapping[str, Any] | None, self.inputs.get("mm_encoder_outputs"))
            if given is None:  # a family whose forward pass computes them once more
                encode = cast(Callable[..., Any], model.get_image_features)
                given = {"image": encode(**accepted(model, batch.image_inputs), return_dict=True)}
        self._tokens: Sequence[Tensor] = list(given["image"].pooler_output)
        self._calls = calls

    @property
    def mean(self) -> Tensor:
        """The mean visual token of every image, `[P, D]`."""
        return torch.stack([tokens.mean(dim=0) for tokens in self._tokens])

    @torch.no_grad()
    def mean_under(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return what `mean` would be with these weights of the projector, by their names in the model, `[P, D]`.

        Raises:
            CheckpointError: the family makes other tokens of the projector's output than that itself.
        """
        own = {name.removeprefix(self._prefix): weight for name, weight in weights.items()}
        outputs = [functional_call(self._projector, own, given, named) for given, named in self._calls]
        flat = torch.cat([output.flatten(0, -2) for output in outputs])
        sizes = [len(tokens) for tokens in self._tokens]
        if sum(sizes) != len(flat):
            raise CheckpointError(
                f"{type(self._model).__name__} makes {sum(sizes)} visual tokens of {len(flat)} that its projector "
                "returns, and MOON compares the latter; choose another rule in [projector.client]"
            )
        return torch.stack([tokens.mean(dim=0) for tokens in flat.split(sizes)])


@contextmanager
def _calls(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Note what `module` is called with."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(
        lambda _, given, named: seen.append((given, named)),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        hook.remove()


def mean_text(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the mean embedding of the text tokens of every row, its prompt's and its answer's, `[N, D]`.

    Padding and the tokens that stand for the image are left out.
    """
    kept = batch.attention_mask.bool()
    for token in placeholder_tokens(model):
        kept &= batch.input_ids != token
    embedded = model.get_input_embeddings()(batch.input_ids)  # [N, T, D]
    return cast(Tensor, (embedded * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True))
