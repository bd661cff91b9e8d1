"""Features in a folder: found by another process, with the same bits, within a limit, and by nobody else."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from accord.errors import DataWarning, RecipeError
from accord.models.features import FEATURES, FeatureCache, FeatureConfig, FeatureFolder, remember
from accord.models.load import load_model
from accord.models.tower import pin

KEYS = [f"{n:x}" * 64 for n in range(6)]
FEATURE = {"last_hidden_state": torch.arange(256.0).reshape(1, 4, 64), "pooler_output": torch.ones(1, 8).bfloat16()}


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.fixture
def each(tmp_path):
    """Return how many bytes the file of `FEATURE` has."""
    FeatureFolder(tmp_path / "one", 10**6).put(KEYS[0], FEATURE)
    return files(tmp_path / "one")[0].stat().st_size


def features(checkpoint, folder=None, size=64):
    """Return what a fresh model computes with a fresh memory, and the memory."""
    model, _ = load_model(checkpoint)
    cache = FeatureCache(10**9, folder)
    pin(model, cache)
    pictures = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.get_image_features(pictures[..., :size, :size]), cache


@pytest.mark.parametrize(("family", "size"), [("llava", 32), ("efficientnet", 64)])
def test_the_same_bits_as_without(request, family, size, tmp_path):
    """Computed and written, then found: three images, three files, and no pass in the second run."""
    checkpoint = request.getfixturevalue(family)
    expected, _ = features(checkpoint, size=size)
    first, one = features(checkpoint, FeatureFolder(tmp_path, 10**9), size)
    second, two = features(checkpoint, FeatureFolder(tmp_path, 10**9), size)
    assert (one.misses, two.misses, two.hits) == (3, 0, 3)
    assert len(files(tmp_path)) == 3
    for found in (first, second):
        for a, b in zip(found.pooler_output, expected.pooler_output, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert found.last_hidden_state.stride() == expected.last_hidden_state.stride()


def test_another_process_finds_them(efficientnet, tmp_path):
    """Keys hold nothing of a process, as an address or a hash of strings would be."""
    threads = torch.get_num_threads()
    code = f"""
import torch
torch.set_num_threads({threads})
from accord.models.features import FeatureConfig, remember
from accord.models.load import load_model
remember(FeatureConfig(folder={str(tmp_path)!r}))
model, _ = load_model({efficientnet!r})
model.get_image_features(torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert len(files(tmp_path)) == 3
    _, cache = features(efficientnet, FeatureFolder(tmp_path, 10**9))
    assert (cache.misses, cache.hits) == (0, 3)


def test_a_file_holds_every_type_and_no_other_key(tmp_path):
    folder = FeatureFolder(tmp_path, 10**6)
    folder.put(KEYS[1], FEATURE)
    assert files(tmp_path) == [tmp_path / "11" / f"{KEYS[1]}.safetensors"]
    found = folder.get(KEYS[1])
    assert found.keys() == FEATURE.keys()
    for name, tensor in FEATURE.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert folder.get(KEYS[2]) is None


def test_without_memory_the_folder_serves(tmp_path):
    cache = FeatureCache(0, FeatureFolder(tmp_path, 10**6))
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], FEATURE)
    assert cache.get(KEYS[0]).keys() == FEATURE.keys()
    assert (len(cache), cache.hits, cache.misses) == (0, 1, 1)


def truncated(file):
    file.write_bytes(file.read_bytes()[:-10])


def emptied(file):
    file.write_bytes(b"")


def flipped(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def unchecked(file):
    save_file({name: t for name, t in load_file(file).items() if name != "sha256"}, file)


def another(file):
    FeatureFolder(file.parent.parent, 10**6).put(KEYS[1], FEATURE)
    (file.parent.parent / "11" / f"{KEYS[1]}.safetensors").rename(file)


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, unchecked, another])
def test_a_damaged_file_is_replaced(tmp_path, damage):
    folder = FeatureFolder(tmp_path, 10**6)
    folder.put(KEYS[0], FEATURE)
    damage(files(tmp_path)[0])
    with pytest.warns(DataWarning, match="computed anew"):
        assert folder.get(KEYS[0]) is None
    folder.put(KEYS[0], FEATURE)
    assert torch.equal(folder.get(KEYS[0])["last_hidden_state"], FEATURE["last_hidden_state"])


def test_what_was_not_used_for_longest_goes(tmp_path, each):
    """Room for 4.5 files: the fifth leaves at most 0.9 × 4.5 = 4.05, so that one of four goes; 0 was used after 1."""
    path = tmp_path / "full"
    folder = FeatureFolder(path, int(4.5 * each))
    other = path / "11" / "notes.txt"
    for n in range(4):
        folder.put(KEYS[n], FEATURE)
        os.utime(path / f"{n}{n}" / f"{KEYS[n]}.safetensors", (n + 1, n + 1))
    other.write_text("somebody's")
    os.utime(other, (0, 0))
    assert folder.get(KEYS[0]) is not None
    FeatureFolder(path, folder.limit).put(KEYS[4], FEATURE)  # another process, which counts what is there
    assert [n for n in range(5) if folder.get(KEYS[n]) is not None] == [0, 2, 3, 4]
    assert other.exists()
    FeatureFolder(tmp_path / "small", each - 1).put(KEYS[0], FEATURE)
    assert not (tmp_path / "small").exists()


def test_what_cannot_be_written_is_said_once(tmp_path):
    """A file stands where the folder should be, as a full disk would refuse; what is computed is kept in memory."""
    (tmp_path / "taken").write_text("")
    cache = FeatureCache(10**6, FeatureFolder(tmp_path / "taken", 10**6))
    with pytest.warns(DataWarning, match="not written any more"):
        cache.put(KEYS[0], FEATURE)
    cache.put(KEYS[1], FEATURE)
    assert len(cache) == 2


def test_a_full_disk_turns_writing_off(tmp_path, monkeypatch):
    folder = FeatureFolder(tmp_path, 10**6)
    folder.put(KEYS[0], FEATURE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(DataWarning, match="not written any more"):
        folder.put(KEYS[1], FEATURE)
    monkeypatch.undo()
    folder.put(KEYS[2], FEATURE)
    assert [file.name[0] for file in files(tmp_path)] == ["0"]
    assert folder.get(KEYS[0]) is not None


def test_nobody_else_may_read_them(tmp_path):
    path = tmp_path / "features"
    FeatureFolder(path, 10**6).put(KEYS[0], FEATURE)
    assert {stat.S_IMODE(each.stat().st_mode) for each in (path, path / "00")} == {0o700}
    assert stat.S_IMODE(files(path)[0].stat().st_mode) == 0o600


@pytest.mark.parametrize(("mode", "uid"), [(0o770, 0), (0o707, 0), (0o700, 1)])
def test_a_folder_where_others_may_write_is_not_used(tmp_path, monkeypatch, mode, uid):
    """Whoever can write there can make any features of any image."""
    tmp_path.chmod(mode)
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + uid)
    try:
        with pytest.warns(DataWarning, match="belongs to user" if uid else "can be written by other users"):
            remember(FeatureConfig(folder=str(tmp_path)))
        assert FEATURES.folder is None
    finally:
        remember(FeatureConfig())


def test_a_file_larger_than_the_limit_is_not_read(tmp_path, each):
    FeatureFolder(tmp_path, each).put(KEYS[0], FEATURE)
    assert FeatureFolder(tmp_path, each).get(KEYS[0]) is not None
    with pytest.warns(DataWarning, match=f"{each} bytes, more than the folder's limit of {each - 1}"):
        assert FeatureFolder(tmp_path, each - 1).get(KEYS[0]) is None


def test_a_recipe_names_the_folder(tmp_path):
    try:
        remember(FeatureConfig(folder=str(tmp_path), disk=7))
        assert (FEATURES.folder.path, FEATURES.folder.limit) == (tmp_path, 7)
    finally:
        remember(FeatureConfig())
    assert FEATURES.folder is None
    with pytest.raises(RecipeError, match="disk must be at least 0, got -1"):
        FeatureConfig(disk=-1)
