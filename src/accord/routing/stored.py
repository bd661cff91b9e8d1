"""Keep what a server has collected for its routers: a dataclass of arrays, in one file as safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load, save
from torch import Tensor

from accord.errors import CheckpointError
from accord.runs import write_atomic

Arrays = TypeVar("Arrays")


def save_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Write the arrays to the file `path`, whole or not at all."""
    write_atomic(path, save({name: tensor.contiguous() for name, tensor in arrays.items()}))


def load_arrays(path: Path, kind: Callable[..., Arrays], what: str) -> Arrays:
    """Read what `save_arrays` wrote, as a `kind`; `what` names it in the error.

    Raises:
        CheckpointError: the file is absent, damaged or of another kind.
    """
    try:
        return kind(**load(path.read_bytes()))
    except Exception as error:  # safetensors raises its own untyped errors on malformed bytes
        raise CheckpointError(
            f"{path}: no {what} ({error}); remove the file, so that they are collected anew"
        ) from error
