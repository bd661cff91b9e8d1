"""A run folder that somebody else made: what is not its own is neither read nor written."""

import os

import pytest

from accord.cli import main
from accord.errors import RunError
from accord.evaluation.report import compare_runs, write_report
from accord.flare.view import look
from accord.runs import Run, refuse_foreign, stages_done
from accord.runs.received import MAX_RECORDS

SECRET = "the content of another file"
READ = ["recipe.toml", "summary.json", "metrics.jsonl", "gallery.jsonl", "stages.json", "manifest.json", "c/a.json"]


@pytest.fixture
def received(make_run, tmp_path):
    folder = make_run()
    (folder / "recipe.toml").write_text('name = "x"\n')
    (tmp_path / "secret").write_text(SECRET)
    return folder


def link(folder, name, to):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(to)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize(
    "use",
    [write_report, lambda run: compare_runs([run]), lambda run: Run.resume(run, 'name = "x"\n'), look],
    ids=["report", "compare", "resume", "watch"],
)
def test_a_link_out_of_the_folder(received, tmp_path, name, use):
    """Whoever reads the page or resumes the run gets nothing of the target, and the target stays as it was."""
    link(received, name, tmp_path / "secret")
    (received / "report.html").unlink(missing_ok=True)
    with pytest.raises(RunError, match=f"{name} is a link to a place outside the run folder; put the file itself"):
        use(received)
    assert not (received / "report.html").exists() and (tmp_path / "secret").read_text() == SECRET


def test_a_folder_that_is_a_link_out(received, tmp_path):
    link(received, "checkpoints", tmp_path)
    with pytest.raises(RunError, match="checkpoints is a link"):
        write_report(received)


def test_links_in_a_circle(received):
    link(received, "checkpoints/a", received / "checkpoints" / "b")
    link(received, "checkpoints/b", received / "checkpoints" / "a")
    with pytest.raises(RunError, match=r"checkpoints/a cannot be followed \(.*\); remove it"):
        write_report(received)


def test_what_never_ends(received):
    os.mkfifo(received / "traffic.json")
    with pytest.raises(RunError, match="neither a file nor a folder"):
        write_report(received)


def test_records_that_would_fill_the_memory(received):
    os.truncate(received / "metrics.jsonl", MAX_RECORDS + 1)
    with pytest.raises(RunError, match="at most 268,435,456 are read"):
        compare_runs([received])


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "gallery.jsonl"])
def test_deep_records(received, name):
    (received / name).write_text(100_000 * "[" + 100_000 * "]" + "\n")
    with pytest.raises(RunError, match=name):
        write_report(received)


def test_links_within_are_its_own(received, tmp_path):
    """So is the folder by another name."""
    (received / "checkpoints").mkdir()
    link(received, "newest", "checkpoints")
    link(received, "gone", "nothing")
    refuse_foreign(received)
    (tmp_path / "alias").symlink_to(received)
    refuse_foreign(tmp_path / "alias")


def test_before_it_is_known_to_be_a_run(tmp_path):
    """A new run looks into a folder for what an earlier one left there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "secret").write_text('{"done": "secret"}')
    link(tmp_path / "run", "stages.json", tmp_path / "secret")
    with pytest.raises(RunError, match="it is a link"):
        stages_done(tmp_path / "run")


def test_a_comparison_steers_no_terminal(make_run, make_summary, monkeypatch, capsys):
    """Whoever made the run named it; the table keeps its lines."""
    folder = make_run(summary=make_summary(name="x\x1b[2J\x1b]0;owned\x07\u202e"))
    monkeypatch.setattr("sys.argv", ["accord", "compare", str(folder)])
    main()
    told = capsys.readouterr().out
    assert "x?[2J?]0;owned??" in told.replace("\\", "") and told.count("\n") > 3
    assert all(line.isprintable() for line in told.split("\n"))
