"""The vision tower of a model: frozen once and for all, so that an image always has the same features.

    features = tower(pixels)          no gradient, evaluation mode, weights and statistics of the checkpoint

Trainers call `model.train()`. A tower with BatchNorm (EfficientNet) would then normalise by the batch at hand, which
changes its features, and overwrite its running statistics; one with dropout would answer differently every time. A
pinned tower stays in evaluation mode whatever is called.

What never changes is computed once an image: a pinned tower looks its answer up in `accord.models.features.FEATURES`.
That is exact. A key covers the tower's weights, all that it is given, the libraries' versions, the kind of processor
and the number of threads; and images are computed one by one, with the cache or without: in a batch, a kernel may add
numbers up in another order, so that an image's features would depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from accord.models.features import FEATURES, FeatureCache, Features, add_tensor


def vision_tower(model: PreTrainedModel | PeftModel) -> nn.Module | None:
    """Return what turns pixels into features, with the patch merger of Qwen-VL inside it; None of a text-only model.

    The projector that comes after it in the other families (LLaVA, FastVLM, Idefics3) is no part of it.
    """
    plain = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    found: nn.Module = plain.get_encoder(modality="image")  # the model or its base if there is none
    return None if found in (plain, plain.base_model) else found


def pin(model: PreTrainedModel | PeftModel, cache: FeatureCache = FEATURES) -> None:
    """Freeze the vision tower of `model`, if it has one, and keep it in evaluation mode through any `model.train()`.

    Its weights may be loaded, moved and cast afterwards; only after writes through `.data`, which no version counts,
    it must be pinned again. A tower that is made trainable again, that has an adapter inside it, trainable or not, or
    whose weights are not in this process as a whole (DeepSpeed, FSDP) computes every batch as it comes. To pin once
    more changes no weight.
    """
    tower = vision_tower(model)
    if tower is not None:
        tower.requires_grad_(False).eval()
        config = model.get_base_model().config if isinstance(model, PeftModel) else model.config
        layers = getattr(config, "vision_feature_layer", None)
        # Objects of the instance: a deep copy takes them along, bound to the copy, and no weight file knows them.
        for name, instead in (("train", _Stay(tower)), ("forward", _Recall(tower, layers, cache))):
            setattr(tower, name, instead)


def is_pinned(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether `pin` took."""
    tower = vision_tower(model)
    return tower is not None and isinstance(vars(tower).get("train"), _Stay)


class _Stay:
    """In the place of a pinned tower's `train`."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.tower


class _Recall:
    """In the place of a pinned tower's `forward`: look images up, and compute the missing ones one by one.

    Args:
        tower: whose forward pass this is.
        layers: which hidden states the model reads, if it reads any; only these are kept.
        cache: where the features are.
    """

    def __init__(self, tower: nn.Module, layers: int | Sequence[int] | None, cache: FeatureCache) -> None:
        self.tower, self.cache = tower, cache
        self.layers = [layers] if isinstance(layers, int) else layers
        self._seen: tuple[object, ...] = ()  # tells whether the weights are those of the fingerprint
        self._fingerprint = b""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recall:
        """Return one for the tower's copy; the cache stays one."""
        return _Recall(memo[id(self.tower)], self.layers, self.cache)

    def __call__(self, *given: Any, **named: Any) -> Any:
        weights = {**dict(self.tower.named_parameters()), **dict(self.tower.named_buffers())}
        images = _one_by_one(given, named)
        adapted = any(isinstance(module, BaseTunerLayer) for module in self.tower.modules())  # it can be turned off
        if images is None or adapted or not all(_is_fixed(tensor) for tensor in weights.values()):
            return self._compute(*given, **named)
        device = next(iter(weights.values())).device
        with torch.no_grad():
            identity = self._identify(weights, device)
            found: dict[str, Features] = {}
            keys = [_key(identity, *image) for image in images]
            for key, (one, told) in zip(keys, images, strict=True):
                known = found.get(key) or self.cache.get(key)
                if known is None:
                    known = _fields(self._compute(*one, **told), self.layers)
                    if known is None:
                        return self._compute(*given, **named)
                    self.cache.put(key, known)
                found[key] = known
            return _join([found[key] for key in keys], device)

    def _compute(self, *given: Any, **named: Any) -> Any:
        return type(self.tower).forward(self.tower, *given, **named)

    def _identify(self, weights: Mapping[str, Tensor], device: torch.device) -> bytes:
        """Return a digest of what the features depend on beside the image."""
        seen = tuple((id(t), t.data_ptr(), t._version, t.dtype, t.device) for t in weights.values())
        if seen != self._seen:
            config = cast(PreTrainedModel, self.tower).config
            read = {name: value for name, value in config.to_dict().items() if name not in _NO_SETTINGS}
            settings = [type(self.tower).__name__, read, config._attn_implementation, self.layers]
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
            for name, tensor in weights.items():
                add_tensor(digest, name, tensor)
            self._seen, self._fingerprint = seen, digest.digest()
        mixed = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return self._fingerprint + repr((_machine(device), mixed)).encode()


def _machine(device: torch.device) -> tuple[object, ...]:
    """Return what else decides the order of sums, and so the last bits: features may come from another process."""
    cuda = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    versions = (torch.__version__, torch.version.cuda, transformers.__version__)
    precise = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) if cuda else ()
    return (device.type, chip, versions, torch.get_num_threads(), *precise)


@dataclass
class TowerOutput(BaseModelOutputWithPooling):
    """What the models read of their towers."""

    deepstack_features: list[Tensor] | None = None  # Qwen3-VL's


_UNREAD = ("use_cache", "return_dict")
"""Arguments that a language model's pass hands on to its tower, which answers the same without them."""

_NO_SETTINGS = ("_name_or_path", "transformers_version", "dtype", "architectures")
"""Entries of a tower's configuration on which no feature depends; the weights have their type in the digest."""


def _one_by_one(given: Sequence[Any], named: Mapping[str, Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]] | None:
    """Return the arguments for each image alone, None where they cannot be told apart.

    The first dimension of every tensor is the image; or, with a grid `grid_thw` `[images, 3]`, the patch of the pixels.
    """
    tensors = [each for each in (*given, *named.values()) if isinstance(each, Tensor)]
    grid = named.get("grid_thw")
    if "image_sizes" in named or named.get("output_attentions") or named.get("return_dict") is False:
        return None  # Pixtral has all images in one row
    if not 1 <= len(tensors) <= 2 or any(each.dim() == 0 for each in tensors):
        return None
    if grid is None:
        count = len(tensors[0])
        sizes = [[1] * count] * len(tensors)
    else:
        count = len(grid)
        sizes = [[1] * count if each is grid else grid.prod(dim=-1).tolist() for each in tensors]
    if any(len(each) != sum(those) for each, those in zip(tensors, sizes, strict=True)):
        return None
    parts = {id(each): each.split(those) for each, those in zip(tensors, sizes, strict=True)}

    def of(image: int, value: Any) -> Any:
        return parts[id(value)][image] if isinstance(value, Tensor) else value

    return [
        (tuple(of(image, value) for value in given), {name: of(image, value) for name, value in named.items()})
        for image in range(count)
    ]


def _is_fixed(weight: Tensor) -> bool:
    """Return whether a weight is frozen, and here as a whole."""
    kinds = (Tensor, nn.Parameter, nn.Buffer)
    return type(weight) in kinds and not weight.requires_grad and weight.numel() > 0 and not weight.is_meta


def _key(identity: bytes, given: Sequence[Any], named: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(identity)
    for name, value in (*enumerate(given), *sorted(named.items())):
        if isinstance(value, Tensor):
            add_tensor(digest, str(name), value)
        elif name not in _UNREAD:
            digest.update(repr((name, value)).encode())
    return digest.hexdigest()


def _fields(output: ModelOutput, layers: Sequence[int] | None) -> Features | None:
    """Return the tensors of a tower's output by field, a sequence's by `field.position.length`; None if it has others.

    Of hidden states only those of `layers` are kept, since all of them may be as large as the tower.
    """
    kept: dict[str, Tensor] = {}
    for field, value in output.items():
        if field not in TowerOutput.__dataclass_fields__ or field == "attentions":
            return None
        if isinstance(value, Tensor):
            kept[field] = value
            continue
        chosen = list(range(len(value)))
        if field == "hidden_states" and layers is not None:
            chosen = sorted({layer % len(value) for layer in layers})
        kept |= {f"{field}.{position}.{len(value)}": value[position] for position in chosen}
    # In one layout, since files know no other and a kernel may add up in the order of the layout.
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in kept.items()}


def _join(images: Sequence[Features], device: torch.device) -> TowerOutput:
    """Return the output for several images."""
    output: dict[str, Any] = {}
    for name in images[0]:
        whole = torch.cat([image[name] for image in images]).to(device)
        field, *place = name.split(".")
        if place:
            position, length = map(int, place)
            output.setdefault(field, [None] * length)[position] = whole
        else:
            output[field] = whole
    return TowerOutput(**output)
