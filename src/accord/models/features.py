"""What frozen vision towers have made of images, so that an image is computed once for every model and every stage.

An entry holds the tensors of one image under its key, a SHA-256 over all that they depend on: the tower's weights and
settings, and what the tower is given. The least recently used entries go when the rest would not fit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from accord.errors import check_least

Features = Mapping[str, Tensor]
"""What a tower, or an image processor, returns for one image, on the CPU, by field."""


@dataclass(frozen=True)
class FeatureConfig:
    """How many features of frozen vision towers are kept."""

    memory: int = 1_000_000_000  # bytes of features in each process; 0 computes every image anew
    pixels: int = 500_000_000  # bytes of processed pictures in each process; 0 processes every picture anew

    def __post_init__(self) -> None:
        """Refuse a negative number of bytes."""
        check_least(self, memory=0, pixels=0)


class FeatureCache:
    """Tensors of images by key, at most `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[str, Features] = OrderedDict()  # the least recently used first
        self._bytes = 0
        self._lock = Lock()  # sites score beside the policy
        self.hits, self.misses = 0, 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """How many bytes the entries take."""
        return self._bytes

    def resize(self, limit: int) -> None:
        """Take another limit; what exceeds it goes."""
        with self._lock:
            self.limit = limit
            self._shrink()

    def clear(self) -> None:
        """Forget everything, the counts too."""
        with self._lock:
            self._entries.clear()
            self._bytes, self.hits, self.misses = 0, 0, 0

    def get(self, key: str) -> Features | None:
        """Return the features under `key`, None if there are none."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self._entries.move_to_end(key)
            self.hits += 1
            return found

    def put(self, key: str, features: Features) -> None:
        """Keep `features`, which nobody may change any more, if there is room for them at all."""
        size = _size(features)
        with self._lock:
            if key in self._entries or size > self.limit:
                return
            self._entries[key] = features
            self._bytes += size
            self._shrink()

    def _shrink(self) -> None:
        while self._bytes > self.limit:
            _, gone = self._entries.popitem(last=False)
            self._bytes -= _size(gone)


def _size(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features.values())


FEATURES = FeatureCache(FeatureConfig.memory)
"""Of this process: the policy, its reference, the router's encoder and sites' models may have the same tower."""

PIXELS = FeatureCache(FeatureConfig.pixels)
"""What image processors have made of pictures in this process (`accord.models.pixels`)."""


def remember(config: FeatureConfig) -> None:
    """Give this process the limits of `config`."""
    FEATURES.resize(config.memory)
    PIXELS.resize(config.pixels)
