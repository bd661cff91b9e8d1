"""What frozen vision towers have made of images, so that an image is computed once for every model and every stage.

An entry holds the tensors of one image under its key, a SHA-256 over all that they depend on: the tower's weights and
settings, and what the tower is given. The least recently used entries go when the rest would not fit.

Where a folder is named, what a tower computes is written there too, and looked up after memory: by a second run, by the
processes of other seeds, by a site that starts again. Features are of a site's private images: nobody but their owner
may read the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from accord.errors import DataWarning, RunError, check_least
from accord.runs import write_atomic

Features = Mapping[str, Tensor]
"""What a tower, or an image processor, returns for one image, on the CPU, by field."""


@dataclass(frozen=True)
class FeatureConfig:
    """How many features of frozen vision towers are kept, and where."""

    memory: int = 1_000_000_000  # bytes of features in each process; 0 computes every image anew
    pixels: int = 500_000_000  # bytes of processed pictures in each process; 0 processes every picture anew
    folder: str = ""  # where features are kept beyond the process, too; empty for nowhere
    disk: int = 5_000_000_000  # bytes of features in the folder

    def __post_init__(self) -> None:
        """Refuse a negative number of bytes."""
        check_least(self, memory=0, pixels=0, disk=0)


class FeatureFolder:
    """Tensors of images by key in a folder, a safetensors file each, at most `limit` bytes of them.

    Several processes may use one folder. When it is full, the files that were not used for longest go until a tenth is
    free. A process looks at the folder at its first write, and after each twentieth of the limit that it has written;
    what n processes write in between may exceed the limit by n twentieths.

    Files have mode 0600, and folders that are made 0700. Files with other names are left alone.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self.writes = True  # until a write fails
        self._bytes = limit  # in the folder, as far as this process knows
        self._unseen = limit  # bytes written since it last looked
        self._lock = Lock()

    def get(self, key: str) -> Features | None:
        """Return the features under `key`, None if there are none.

        Warns:
            DataWarning: the file is damaged, or cannot be read.
        """
        path = self._place(key)
        try:
            if (size := path.stat().st_size) > self.limit:
                raise ValueError(f"{size} bytes, more than the folder's limit of {self.limit}")
            features = load(path.read_bytes())
            if not torch.equal(features.pop(_CHECK), _checksum(key, features)):
                raise ValueError("its checksum is of other content")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            warnings.warn(f"{path}: features cannot be read ({error}); computed anew", DataWarning, stacklevel=3)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # many file systems do not write down when a file was read
        return features

    def put(self, key: str, features: Features) -> None:
        """Write `features` under `key`, in the place of what is there.

        Warns:
            DataWarning: the file cannot be written, as on a full disk; this process writes no further one.
        """
        data = save({**{name: t.contiguous() for name, t in features.items()}, _CHECK: _checksum(key, features)})
        with self._lock:
            if not self.writes or len(data) > self.limit:
                return
            path = self._place(key)
            try:
                for folder in (self.path, path.parent):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._bytes + len(data) > self.limit or self._unseen > self.limit / 20:
                    self._make_room(len(data))
                write_atomic(path, data, mode=0o600)
            except (OSError, RunError) as error:
                self.writes = False
                warnings.warn(f"{error}; features are not written any more", DataWarning, stacklevel=3)
                return
            self._bytes += len(data)
            self._unseen += len(data)

    def _place(self, key: str) -> Path:
        return self.path / key[:2] / f"{key}.safetensors"

    def _make_room(self, size: int) -> None:
        """Look at all files; remove the oldest if `size` bytes more would be too many."""
        found = []
        for path in self.path.glob("[0-9a-f][0-9a-f]/*"):
            if _NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                    status = path.stat()
                    found.append((status.st_mtime_ns, path, status.st_size))
        self._bytes, self._unseen = sum(size for _, _, size in found), 0
        if self._bytes + size <= self.limit:
            return
        for _, path, bytes_there in sorted(found):
            if self._bytes + size <= 0.9 * self.limit:
                return
            path.unlink(missing_ok=True)
            self._bytes -= bytes_there


_CHECK = "sha256"
"""The name of the checksum among a file's tensors; no field of a tower is called so."""

_NAME = re.compile(r"\.?[0-9a-f]{64}\.safetensors.*")
"""Of a file of features, or of one that a killed process has begun."""


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Update a `hashlib` digest by a tensor's name, type, shape and bytes."""
    digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _checksum(key: str, features: Features) -> Tensor:
    digest = hashlib.sha256(key.encode())
    for name in sorted(features):
        add_tensor(digest, name, features[name])
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


class FeatureCache:
    """Tensors of images by key, at most `limit` bytes of them in memory, and in a folder if it has one."""

    def __init__(self, limit: int, folder: FeatureFolder | None = None) -> None:
        self.limit, self.folder = limit, folder
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
        """Forget everything in memory, the counts too."""
        with self._lock:
            self._entries.clear()
            self._bytes, self.hits, self.misses = 0, 0, 0

    def get(self, key: str) -> Features | None:
        """Return the features under `key`, None if there are none; what the folder has is a hit, too."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
        if found is None and self.folder:
            found = self.folder.get(key)
            if found is not None:
                self._keep(key, found)
        with self._lock:
            self.hits += found is not None
            self.misses += found is None
        return found

    def put(self, key: str, features: Features) -> None:
        """Keep `features`, which nobody may change any more, if there is room for them at all."""
        if self._keep(key, features) and self.folder:
            self.folder.put(key, features)

    def _keep(self, key: str, features: Features) -> bool:
        """Take `features` into memory if there is room; return whether they are new there."""
        size = _size(features)
        with self._lock:
            if key in self._entries:
                return False
            if size <= self.limit:
                self._entries[key] = features
                self._bytes += size
                self._shrink()
            return True

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
    """Give this process the limits and the folder of `config`.

    Warns:
        DataWarning: the folder is not the user's own, or its group or others may write to it; it is not used.
    """
    FEATURES.resize(config.memory)
    FEATURES.folder = _own(FeatureFolder(Path(config.folder).expanduser(), config.disk)) if config.folder else None
    PIXELS.resize(config.pixels)


def _own(folder: FeatureFolder) -> FeatureFolder | None:
    """Return the folder if nobody else can put features there: their checksum is no secret. None, and say so, if not.

    A folder that is not there yet will be the user's own.
    """
    try:
        status = folder.path.stat()
    except FileNotFoundError:
        return folder
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    else:
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid == os.getuid() and not others:
            return folder
        problem = "can be written by other users" if others else f"belongs to user {status.st_uid}"
    warnings.warn(
        f"{folder.path}: {problem}, so that no features are kept there; name a folder of your own, or chmod 700 it",
        DataWarning,
        stacklevel=3,
    )
    return None
