"""Weights as they travel: safetensors bytes, checked before anything uses them.

Only what is trained travels, an adapter's parameters alone under LoRA, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from accord.errors import CheckpointError, RunError


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that are trained, on the CPU, by name: an adapter's alone under LoRA.

    A tied weight is there once.
    """
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_trainable_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `weights`, which `trainable_weights` named, into `model`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.copy_(weights[name])


def probe_of(model: nn.Module, outputs: Callable[[], Tensor]) -> Callable[[Mapping[str, Tensor]], bool]:
    """Return what tells whether `outputs()`, which asks `model` about a few inputs, is finite under given weights.

    The weights stay in `model`, as `set_trainable_weights` puts them there.
    """

    @torch.no_grad()
    def finite(weights: Mapping[str, Tensor]) -> bool:
        set_trainable_weights(model, weights)
        training = model.training
        model.eval()
        try:
            return bool(outputs().isfinite().all())
        finally:
            model.train(training)

    return finite


def to_bytes(weights: Mapping[str, Tensor], *, bits: int = 32) -> bytes:
    """Return `weights` as safetensors bytes, as they travel: in their own types, or in float16.

    Raises:
        RunError: a finite value is beyond float16's largest, ±65504.
    """
    sent = {name: _narrow(tensor, bits).cpu().contiguous() for name, tensor in weights.items()}
    for name, tensor in sent.items():
        if bits == 16 and (lost := weights[name][tensor.isinf().to(weights[name].device)]).isfinite().any():
            value = lost[lost.isfinite()][0].item()
            raise RunError(
                f"{name} holds {value:g}, and float16 ends at ±{torch.finfo(torch.float16).max:g}; "
                "put bits = 32 into the table `aggregation` of what is trained, or lower its learning rate"
            )
    return save(sent)


def narrowed(weights: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return what the other side reads of `weights` that travel in `bits` bits a number, in their own types."""
    return {name: _narrow(tensor, bits).to(tensor.dtype) for name, tensor in weights.items()}


def _narrow(tensor: Tensor, bits: int) -> Tensor:
    # Not bfloat16: three more bits of fraction are worth more here than its range.
    return tensor.to(torch.float16) if bits == 16 and tensor.dtype in (torch.float32, torch.bfloat16) else tensor


def read_weights(
    data: bytes, expected: Mapping[str, Tensor], *, bits: int = 32, what: str = "weights"
) -> dict[str, Tensor]:
    """Parse safetensors bytes from another party and check them against `expected` before anything uses them.

    Args:
        data: what came.
        expected: names, shapes and types; the result has them.
        bits: of a number on its way.
        what: what the bytes should be, for messages: "an update of the router".

    Raises:
        CheckpointError: names, shapes or types do not match, or a value is not finite.
    """
    return dict(read_update(data, expected, bits=bits, what=what))


class Travelled(Mapping[str, Tensor]):
    """Weights in the few bits in which they came: a tensor is in its own type only while somebody looks at it.

    A server holds the updates of all sites of a round at once, in float16 half of what they are in float32.
    """

    def __init__(self, tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> None:
        self.tensors, self.types = tensors, types

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor in its own type."""
        return self.tensors[name].to(self.types[name])

    def __iter__(self) -> Iterator[str]:
        """Return the names."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.tensors)


def read_update(
    data: bytes, expected: Mapping[str, Tensor], *, bits: int = 32, what: str = "weights"
) -> Mapping[str, Tensor]:
    """Do as `read_weights`, and keep the weights as they travelled."""
    try:
        weights = load(data)
    except Exception as error:  # safetensors raises its own untyped errors on malformed bytes
        # Its text quotes the bytes, which a site may have made up for whoever reads the warning.
        raise CheckpointError(f"{what}: {len(data)} bytes that cannot be read ({type(error).__name__})") from error
    if weights.keys() != expected.keys():
        raise CheckpointError(f"{what} with other names: {sorted(weights.keys() ^ expected.keys())[:5]!a:.200}")
    for name, tensor in weights.items():
        travels = _narrow(expected[name][:0] if expected[name].ndim else expected[name], bits).dtype
        if tensor.shape != expected[name].shape or tensor.dtype != travels:
            want = f"{tuple(expected[name].shape)} {travels}"
            raise CheckpointError(f"{what}: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected {want}")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{what}: {name} holds a value that is not finite")
    # In the model's order: safetensors' own is not the same each time.
    return Travelled({name: weights[name] for name in expected}, {name: w.dtype for name, w in expected.items()})
