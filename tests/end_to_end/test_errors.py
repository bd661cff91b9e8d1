"""What can go wrong at the command line: one line that names the value and the remedy, status 2, never a traceback."""

import errno
import json
import os
import shutil

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from accord.models.tiny import train_tokenizer
from accord.runs import Run


@pytest.fixture
def fails(accord):
    """Return a function that runs a command which must fail, and returns its one line."""

    def run(*arguments):
        status, out, err = accord(*arguments)
        assert (status, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture
def recipe(write_recipe, tmp_path):
    return write_recipe(tmp_path / "tiny.toml")


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    """A language model that sees nothing."""
    folder = tmp_path_factory.mktemp("models") / "text-only"
    tokenizer = train_tokenizer(["yes", "no"], vocab_size=270)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize("command", [("run",), ("plan",), ("site", "train"), ("align",), ("evaluate",)])
def test_a_missing_recipe(fails, tmp_path, command):
    line = fails(*command, tmp_path / "missing.toml", *(["colour"] if command[0] == "site" else []))
    assert "missing.toml does not exist; check the path" in line


def test_an_unknown_key_names_the_nearest(fails, recipe):
    edit(recipe, "group_size", "groupsize")
    line = fails("run", recipe)
    assert "alignment.groupsize is not a setting; did you mean group_size?" in line


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("group_size = 4", "group_size = 1", "group_size must be at least 2 to centre rewards, got 1; raise"),
        ("group_size = 4", 'group_size = "four"', 'alignment.group_size must be a whole number, got "four"'),
        ("steps = 4", "steps = ", "is not TOML"),
        ("questions = 60", "questions = -1", "questions must be at least 0, got -1"),
        ("fraction = 0.5", "fraction = 0.0", "fraction of site 'colour' must be in (0, 1], got 0.0"),
        ('"colour",\n', '"color",\n', "site 'colour' gets no question"),
    ],
)
def test_a_wrong_value(fails, recipe, tmp_path, old, new, said):
    edit(recipe, old, new)
    assert said in fails("run", recipe, "--out", tmp_path / "run", "--quiet")


@pytest.mark.parametrize("seed", [-1, 4_294_967])
def test_a_seed_out_of_range(fails, recipe, tmp_path, seed):
    line = fails("run", recipe, "--out", tmp_path / "run", "--seed", seed)
    assert f"seed must be between 0 and 4294966, got {seed}" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("runn",), "No such command 'runn'"),
        (("site", "trian"), "No such command 'trian'"),
        (("run",), "Missing argument 'recipe'"),
        (("plan", "--speed", "3"), "No such option: --speed"),
        (("run", "x.toml", "--seed", "two"), "Invalid value for '--seed': Input should be a valid integer"),
        (
            ("evaluate", "accord/idefics3", "--questions", "-5"),
            "Invalid value for '--questions': Input should be greater than or equal to 0",
        ),
    ],
)
def test_a_wrong_command(fails, arguments, said):
    line = fails(*arguments)
    assert said in line and "see accord --help" in line


def test_no_command_shows_the_help(accord):
    status, out, err = accord()
    assert (status, err) == (2, "") and "pretrain" in out


def test_a_run_folder_that_exists(fails, finished):
    recipe, run, _, _ = finished
    before = (run / "manifest.json").read_bytes()
    line = fails("run", recipe, "--out", run)
    assert f"{run} already holds a run; add --resume to go on with it, or pass another --out" in line
    assert (run / "manifest.json").read_bytes() == before


def test_a_mistake_is_corrected_where_it_was_made(accord, fails, recipe, write_recipe, tmp_path):
    """A wrong path leaves a run folder in which nothing was done: the corrected recipe starts there, by any command."""
    run = tmp_path / "run"
    wrong = write_recipe(tmp_path / "wrong.toml", questions=[{"kind": "folder", "path": str(tmp_path / "none")}])
    assert "correct the path" in fails("run", wrong, "--out", run, "--quiet")
    edit(recipe, '"colour",\n', '"color",\n')
    assert "site 'colour' gets no question" in fails("run", recipe, "--out", run, "--quiet")
    edit(recipe, '"color",\n', '"colour",\n')
    assert accord("site", "train", recipe, "colour", "--out", run, "--quiet")[0] == 0
    assert "already holds a run" in fails("run", recipe, "--out", run, "--quiet")
    assert "started with another recipe" in fails("site", "train", wrong, "colour", "--out", run, "--quiet")


@pytest.mark.parametrize(
    ("undone", "command", "remedy"),
    [
        (
            "site shape",
            ("router", "train"),
            "shape/reward is out of date; make it with `accord site train RECIPE shape`",
        ),
        ("router", ("align",), "router is out of date; make it with `accord router train RECIPE`"),
        ("router", ("evaluate",), "router is out of date; make it with `accord router train RECIPE`"),
        ("align", ("evaluate",), "policy is out of date; make it with `accord align RECIPE`"),
    ],
)
def test_what_is_out_of_date_is_not_used(fails, finished, tmp_path, undone, command, remedy):
    recipe, run, _, _ = finished
    shutil.copytree(run, tmp_path / "run")
    stages = tmp_path / "run" / "stages.json"
    stages.write_text(json.dumps({"done": [s for s in json.loads(stages.read_text())["done"] if s != undone]}))
    assert remedy in fails(*command, recipe, "--out", tmp_path / "run", "--quiet")
    assert "evaluation" not in json.loads(stages.read_text())["done"]


def test_another_recipe_cannot_resume(fails, finished, write_recipe, tmp_path):
    _, run, _, _ = finished
    other = write_recipe(tmp_path / "other.toml", scores={"high": 3.0})
    line = fails("run", other, "--out", run, "--resume")
    assert "started with another recipe: scores.high was 2.0 and is now 3.0" in line and "--out" in line
    assert "seed was 0 and is now 5" in fails("run", finished[0], "--out", run, "--resume", "--seed", 5)


def test_nothing_to_resume(fails, recipe, tmp_path):
    assert "holds no run to resume" in fails("run", recipe, "--out", tmp_path / "none", "--resume")


def test_a_locked_folder(fails, recipe, tmp_path):
    with Run.create(tmp_path / "run", "x = 1\n", seed=0):
        line = fails("run", recipe, "--out", tmp_path / "run", "--resume")
    assert f"is in use by process {os.getpid()}" in line and "another --out" in line


def test_an_unknown_site(fails, recipe, tmp_path):
    line = fails("site", "train", recipe, "color", "--out", tmp_path / "run")
    assert "the recipe has no site 'color'; it has colour, shape, yes-no" in line
    assert "no site 'color'" in fails("preferences", recipe, "color", tmp_path / "pairs.jsonl")


def test_a_text_only_checkpoint(fails, text_only, vqa_folder, recipe, tmp_path):
    """One that nothing tells how to ask is refused when it is loaded, any other when it is asked about an image."""
    line = fails("evaluate", text_only, "--data", vqa_folder, "--questions", 2)
    assert "the tokenizer has no chat template" in line and str(text_only) in line
    edit(recipe, "accord/llava-siglip-qwen2", "accord/text-qwen2")
    for command in (
        ("evaluate", "accord/text-qwen2", "--data", vqa_folder, "--questions", 2),
        ("site", "train", recipe, "colour", "--out", tmp_path / "run", "--quiet"),
    ):
        assert "a text-only model was asked about an image; name a vision-language checkpoint" in fails(*command)


def test_a_checkpoint_that_does_not_ship(fails, vqa_folder):
    line = fails("evaluate", "accord/llava", "--data", vqa_folder)
    assert "'accord/llava' does not ship with Accord; shipped are: accord/idefics3" in line


def test_evaluation_needs_questions(fails, vqa_folder, tmp_path):
    line = fails("evaluate", "accord/idefics3")
    assert "'accord/idefics3' needs questions; add --data easy-vqa or --data FOLDER" in line
    line = fails("evaluate", "accord/idefics3", "--data", vqa_folder, "--split", "tset")
    assert "has no question of split 'tset'; it has base, dev, private, public, test" in line
    assert "correct the path" in fails("evaluate", "accord/idefics3", "--data", tmp_path / "none")


def test_questions_without_a_split_that_the_job_needs(fails, vqa_folder, write_recipe, tmp_path):
    folder = tmp_path / "shapes"
    shutil.copytree(vqa_folder, folder)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["split"] != "dev")
    (folder / "questions.jsonl").write_text(kept)
    recipe = write_recipe(tmp_path / "tiny.toml", questions=[{"kind": "folder", "path": str(folder)}])
    line = fails("run", recipe, "--out", tmp_path / "run", "--quiet")
    assert "no question has the split 'dev'" in line and "`fractions`" in line


def test_a_report_of_nothing(fails, tmp_path):
    assert "summary.json" in fails("report", tmp_path)


def test_an_unknown_family(fails, tmp_path):
    line = fails("pretrain", tmp_path / "out", "--family", "llava")
    assert (
        "there is no family 'llava' for these questions; use one of llava-clip-llama" in line
        and not (tmp_path / "out").exists()
    )


def space_for(writes):
    """Return an `os.write` that finds the disk full after so many calls."""
    write, left = os.write, writes

    def scarce(descriptor, data):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    return scarce


def test_a_full_disk_leaves_nothing_half_written(finished, accord, monkeypatch, tmp_path):
    """The disk fills up at one write after another, until the stage gets by with as many as there were."""
    recipe, run, _, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = (copy / "router" / "router.safetensors").read_bytes()
    failures = 0
    for allowed in range(0, 60, 3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", space_for(allowed))
            status, _, err = accord("router", "train", recipe, "--out", copy, "--quiet")
        assert not [path for path in copy.rglob("*") if ".partial-" in path.name or ".replaced-" in path.name]
        assert (copy / "router" / "router.safetensors").read_bytes() == before
        if status == 0:
            break
        failures += 1
        assert status == 2 and len(err.splitlines()) == 1
        assert "the disk is full" in err and "free some space" in err
    assert status == 0 and failures >= 3
    assert (copy / "metrics.jsonl").read_bytes().count(b"router") == 3


@pytest.mark.filterwarnings("default::accord.errors.DataWarning")
def test_a_damaged_image_is_counted_and_left_out(accord, vqa_folder, write_recipe, tmp_path):
    """The questions about one picture go, in one line that says how many; the stage goes on without them."""
    folder = tmp_path / "shapes"
    shutil.copytree(vqa_folder, folder)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    image = next(row["image"] for row in rows if row["split"] == "private")
    whole = (folder / image).read_bytes()
    (folder / image).write_bytes(whole[: len(whole) // 2])
    lost = sum(row["image"] == image for row in rows)
    recipe = write_recipe(tmp_path / "tiny.toml", questions=[{"kind": "folder", "path": str(folder)}])
    status, _, err = accord("site", "train", recipe, "colour", "--out", tmp_path / "run", "--quiet")
    assert status == 0
    (line,) = err.splitlines()
    assert line.startswith("warning: ") and f"left out {lost} of {len(rows)} rows" in line and image in line
    assert (tmp_path / "run" / "sites" / "colour" / "reward" / "reward.json").is_file()
