"""What frozen vision towers have made of images, so that an image is computed once for every model and every stage.

An entry holds the tensors of one image under its key, a SHA-256 over the tower's weights and settings and over all that
the tower is given. The least recently used entries go when the rest would not fit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from accord.errors import check_least

Features = Mapping[str, Tensor]
"""What a tower returns for one image, on the CPU, by field."""


@dataclass(frozen=True)
class FeatureConfig:
    """How many features of frozen vision towers are kept."""

    memory: int = 1_000_000_000  # bytes in each process; 0 computes every image anew

    def __post_init__(self) -> None:
        """Refuse a negative number of bytes."""
        check_least(self, memory=0)


class FeatureCache:
    """Features of images by key, at most `config.memory` bytes of them."""

    def __init__(self, config: FeatureConfig = FeatureConfig()) -> None:
        self.config = config
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

    def configure(self, config: FeatureConfig) -> None:
        """Take other limits; what exceeds them goes."""
        with self._lock:
            self.config = config
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
            if key in self._entries or size > self.config.memory:
                return
            self._entries[key] = features
            self._bytes += size
            self._shrink()

    def _shrink(self) -> None:
        while self._bytes > self.config.memory:
            _, gone = self._entries.popitem(last=False)
            self._bytes -= _size(gone)


def _size(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features.values())


FEATURES = FeatureCache()
"""Of this process: the policy, its reference, the router's encoder and sites' models may have the same tower."""
