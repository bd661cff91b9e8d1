"""A checkpoint is whole or passed over: sealed last, verified before it is read, the one before it still there."""

import errno
import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from accord.alignment.grpo import AlignmentConfig
from accord.errors import CheckpointError, DataWarning, RunError
from accord.recipe import Policy, Recipe, SiteConfig
from accord.runs import Run, read_lines
from accord.runs.checkpoints import MANIFEST, keep_newest, newest_good, seal, verify
from accord.stages.alignment import run_grpo
from accord.stages.job import Job

KINDS = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "traffic.json",
    "memory.safetensors",
    "config.json",
)


def fill(folder, step):
    """Write a file of every kind that a checkpoint holds, as the trainer and the callbacks write them."""
    folder.mkdir(parents=True)
    weight = torch.full((4, 4), float(step))
    save_file({"weight": weight}, folder / "model.safetensors")
    save_file({"mean": weight[0].contiguous()}, folder / "memory.safetensors")
    torch.save({"state": {0: {"step": torch.tensor(float(step)), "exp_avg": weight}}}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    torch.save({"cpu": torch.arange(step)}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "traffic.json").write_text(json.dumps([["colour", "score", step, 100, 20, 0]]))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return folder


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """Two sealed checkpoints, of steps 20 and 40."""
    out = tmp_path_factory.mktemp("sealed")
    for step in (20, 40):
        seal(fill(out / f"checkpoint-{step}", step))
    return out


@pytest.fixture
def out(sealed, tmp_path):
    """A copy of them to damage."""
    return shutil.copytree(sealed, tmp_path / "align")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    """Turn over one bit, the same for a file's name and size."""
    content = bytearray(path.read_bytes())
    at = random.Random(path.name).randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path):
    path.unlink()


DAMAGES = [
    *(
        (name, damage, said)
        for name in KINDS
        for damage, said in ((truncate, " bytes, not "), (flip, "SHA-256 differs"))
    ),
    *((name, damage, said) for name in KINDS for damage, said in ((remove, "missing"), (lengthen, " bytes, not "))),
]
OTHER_MANIFESTS = {
    "of another step": lambda text, other: other,
    "empty": lambda text, other: "",
    "cut off": lambda text, other: text[: len(text) // 2],
    "no object": lambda text, other: "[]",
    "of no files": lambda text, other: '{"files": {}}',
    "without hashes": lambda text, other: json.dumps({"files": {name: {"size": 1} for name in KINDS}}),
    "of one file more": lambda text, other: text.replace('"files": {', '"files": {"x": {"size": 1, "sha256": "0"},'),
    "of a hash in another case": lambda text, other: text.upper().replace("FILES", "files"),
}


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_file_is_found_and_named(out, name, damage, said):
    """The newest is set aside and the one before it found; the trainer sees that one only."""
    damage(out / "checkpoint-40" / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint-40 is damaged \({name}: .*{said}"):
        verify(out / "checkpoint-40")
    with pytest.warns(DataWarning) as told:
        assert newest_good(out) == out / "checkpoint-20"
    (line,) = [str(warning.message) for warning in told]
    assert f"checkpoint-40 is damaged ({name}: " in line and said in line
    assert "going on from checkpoint-20, the steps after it are done again" in line
    assert names(out) == ["checkpoint-20", "damaged-checkpoint-40"]


@pytest.mark.parametrize("change", OTHER_MANIFESTS.values(), ids=OTHER_MANIFESTS)
def test_a_wrong_manifest_is_found(out, change):
    manifest = out / "checkpoint-40" / MANIFEST
    manifest.write_text(change(manifest.read_text(), (out / "checkpoint-20" / MANIFEST).read_text()))
    with pytest.raises(CheckpointError, match="checkpoint-40 is damaged"):
        verify(out / "checkpoint-40")
    with pytest.warns(DataWarning, match=r"checkpoint-40 is damaged .* going on from checkpoint-20"):
        assert newest_good(out) == out / "checkpoint-20"


def test_no_byte_of_a_manifest_can_be_damaged(tmp_path):
    """One of every byte in turn, for a checkpoint of two files."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for name in ("a.json", "b"):
        (folder / name).write_text(name)
    seal(folder)
    whole = (folder / MANIFEST).read_bytes()
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        (folder / MANIFEST).write_bytes(flipped)
        with pytest.raises(CheckpointError):
            verify(folder)
    (folder / MANIFEST).write_bytes(whole)
    verify(folder)


@pytest.mark.parametrize("place", ["extra.bin", "global_step40/shard.pt"])
def test_a_file_that_was_not_sealed_is_found(out, place):
    (out / "checkpoint-40" / place).parent.mkdir(exist_ok=True)
    (out / "checkpoint-40" / place).touch()
    with pytest.raises(CheckpointError, match=rf"\({place}: not in manifest.json\)"):
        verify(out / "checkpoint-40")


def test_a_file_that_cannot_be_read_is_damage(out, monkeypatch):
    """A bad sector, as the system tells of it."""

    def unreadable(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("hashlib.file_digest", unreadable)
    with pytest.raises(CheckpointError, match=r"config.json: unreadable, Input/output error"):
        verify(out / "checkpoint-40")


def test_without_a_manifest_the_writing_was_broken_off(out):
    """Such a folder holds nothing worth a look, and its room may be needed: it goes."""
    (out / "checkpoint-40" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json: missing"):
        verify(out / "checkpoint-40")
    with pytest.warns(
        DataWarning, match=r"checkpoint-40 is incomplete \(manifest.json: missing\) and was removed; going"
    ):
        assert newest_good(out) == out / "checkpoint-20"
    assert names(out) == ["checkpoint-20"]


def test_where_none_is_good_every_step_is_done_again(out):
    remove(out / "checkpoint-20" / MANIFEST)
    flip(out / "checkpoint-40" / "optimizer.pt")
    with pytest.warns(DataWarning) as told:
        assert newest_good(out) is None
    assert len(told) == 2 and all("no other is left, all steps are done again" in str(w.message) for w in told)
    assert newest_good(out) is None and newest_good(out / "none") is None


def test_the_newest_is_that_of_the_last_step(sealed, tmp_path):
    """By number, 100 after 40; a whole one is left as it is, and other names are no checkpoints."""
    out = shutil.copytree(sealed, tmp_path / "align")
    shutil.copytree(out / "checkpoint-20", out / "checkpoint-100")
    (out / "checkpoint-best").mkdir()
    (out / "checkpoint-200").touch()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert newest_good(out) == out / "checkpoint-100"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_one_set_aside_makes_way_for_the_next(out):
    shutil.copytree(out / "checkpoint-40", out / "damaged-checkpoint-40")
    flip(out / "checkpoint-40" / "optimizer.pt")
    wrong = (out / "checkpoint-40" / "optimizer.pt").read_bytes()
    with pytest.warns(DataWarning, match="set aside"):
        newest_good(out)
    assert (out / "damaged-checkpoint-40" / "optimizer.pt").read_bytes() == wrong


def test_two_are_kept(out, monkeypatch):
    """Of four the last two; and where removing is interrupted, the rest is an unsealed checkpoint."""
    for step in (60, 80):
        seal(fill(out / f"checkpoint-{step}", step))
    keep_newest(out, 2)
    assert names(out) == ["checkpoint-60", "checkpoint-80"]
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    keep_newest(out, 1)
    assert not (out / "checkpoint-60" / MANIFEST).exists() and newest_good(out) == out / "checkpoint-80"


# a full disk


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_a_checkpoint_unsealed(out, monkeypatch, call):
    """Nothing of a manifest is left, not even a temporary file; the checkpoint before it is good."""
    fill(out / "checkpoint-60", 60)
    before = names(out / "checkpoint-60")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises((OSError, RunError), match=r"No space left|disk is full"):
            seal(out / "checkpoint-60")
    assert names(out / "checkpoint-60") == before
    with pytest.warns(DataWarning, match="checkpoint-60 is incomplete"):
        assert newest_good(out) == out / "checkpoint-40"


@pytest.fixture
def job(tmp_path, llava, ask):
    """Three steps, each saved."""
    settings = AlignmentConfig(
        steps=3, prompts_per_step=1, group_size=2, max_completion_length=2, evaluate_every=0, save_every=1
    )
    with Run.create(tmp_path / "run", 'name = "x"\n', seed=0) as run:
        job = Job(Recipe("x", (SiteConfig("a", "accord/idefics3"),)), run, quiet=True)
        job.recipe = replace(job.recipe, policy=Policy(llava), alignment=settings)
        job.questions = {"dev": [ask(0)], "public": [ask(1)]}
        yield job


def align(job):
    with job.run.doing("align"):
        model, _ = run_grpo(job, "align", lambda completions, **_: [float(len(c[0]["content"])) for c in completions])
    return model.state_dict()


class Memory:
    """What a reward has learnt: nothing, under one name."""

    def state_dict(self):
        return {"mean": torch.zeros(1)}

    def load_state_dict(self, state, /):
        assert state["mean"].tolist() == [0.0]


def test_the_seal_comes_after_all_that_belongs_to_a_checkpoint(job):
    """The trainer's files, the bytes sent and the memory; of three checkpoints the last two are there."""
    with job.run.doing("align"):
        run_grpo(job, "align", lambda completions, **_: [0.0, 1.0], memory=Memory())
    out = job.path / "checkpoints" / "align"
    assert [name for name in names(out) if name.startswith("checkpoint")] == ["checkpoint-2", "checkpoint-3"]
    sealed = json.loads((out / "checkpoint-3" / MANIFEST).read_text())["files"]
    assert {*KINDS} <= {*sealed} == {*names(out / "checkpoint-3")} - {MANIFEST}


@pytest.mark.parametrize(
    ("module", "name", "place"),
    [(torch, "save", "optimizer.pt"), (os, "replace", "manifest.json")],
    ids=["file", "seal"],
)
def test_a_full_disk_costs_one_checkpoint(job, monkeypatch, module, name, place):
    """It is full at checkpoint 3, once both before it are sealed; with room again, only step 3 is done again."""
    out = job.path / "checkpoints" / "align"
    plain = getattr(module, name)

    def scarce(what, path, **settings):
        return (full_disk if str(path).endswith(f"checkpoint-3/{place}") else plain)(what, path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, scarce)
        with (
            pytest.raises(RunError, match=r"cannot be written: the disk is full .* continue with --resume"),
            pytest.warns(DataWarning, match=r"checkpoint-3 is incomplete .* going on from checkpoint-2"),
        ):
            align(job)
    assert [name for name in names(out) if "checkpoint" in name] == ["checkpoint-1", "checkpoint-2"]
    assert not [path for path in job.path.rglob("*") if ".partial-" in path.name]
    resumed = align(job)
    steps = [record["step"] for record in read_lines(job.path / "metrics.jsonl")]
    assert steps == [1, 2, 3]
    shutil.rmtree(out)
    whole = align(job)
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_an_alignment_falls_back_to_the_checkpoint_before(job):
    """Step 3 is done again from checkpoint 2, as though it had never been: the same records, the same weights."""
    whole = align(job)
    records = (job.path / "metrics.jsonl").read_bytes()
    flip(job.path / "checkpoints" / "align" / "checkpoint-3" / "optimizer.pt")
    with pytest.warns(DataWarning, match=r"checkpoint-3 is damaged \(optimizer.pt: SHA-256 differs\) .* checkpoint-2"):
        again = align(job)
    assert (job.path / "metrics.jsonl").read_bytes() == records
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
