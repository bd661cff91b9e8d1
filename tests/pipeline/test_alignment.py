import pytest

from accord.errors import DataWarning
from accord.pipeline.alignment import _newest_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """Return a function that makes checkpoint `step` with the files named."""

    def make(step, *files):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", *files):
            (folder / name).touch()
        return folder

    return make


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert _newest_checkpoint(tmp_path) is None and _newest_checkpoint(tmp_path / "none") is None


def test_the_newest_is_that_of_the_last_step(checkpoint, tmp_path):
    """By number: 10 is after 9."""
    checkpoint(9, "trainer_state.json", "traffic.json")
    newest = checkpoint(10, "trainer_state.json", "traffic.json")
    assert _newest_checkpoint(tmp_path) == newest


def test_those_that_are_incomplete_go(checkpoint, tmp_path):
    """The newest has neither of the files that come last, the one before it one of them; both are told."""
    whole = checkpoint(1, "trainer_state.json", "traffic.json")
    checkpoint(2, "trainer_state.json")
    checkpoint(3)
    with pytest.warns(DataWarning) as told:
        assert _newest_checkpoint(tmp_path) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    said = [str(warning.message) for warning in told]
    assert "checkpoint-3 is incomplete (no trainer_state.json and no traffic.json)" in said[0]
    assert "checkpoint-2 is incomplete (no traffic.json)" in said[1]
