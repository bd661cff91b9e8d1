"""The grid with every training replaced by one that writes its result at once; and once whole, with all its parts."""

import csv
import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from accord.cli import main
from accord.errors import DataError, RecipeError, RunError
from accord.methods.server_alone import ServerAloneConfig
from accord.pipeline import bench as module
from accord.pipeline import cells
from accord.pipeline.bench import bench, duration, plan_grid
from accord.pipeline.cells import read_cells
from accord.pipeline.comparison import arm_file
from accord.recipe_file import load_recipe
from accord.runs import write_atomic
from accord.stages import routing

SPLITS = ("private", "public", "dev", "test")
# Of 10 questions about colour, and about number.
RIGHT = {"routed": (8, 6), "average": (5, 2), "median": (5, 5), "pooled": (8, 8), "ground-truth": (8, 8)}


@pytest.fixture
def recipe(tmp_path, vqa):
    """A recipe of one site, which holds colour, and two methods; one question of each split and type."""
    rows = [(split, kind, "red") for split in SPLITS for kind in ("colour", "number")]
    file = tmp_path / "small.toml"
    table = {
        "name": "small",
        "compare": ["routed", "average"],
        "questions": [{"kind": "folder", "path": vqa("squares", rows)}],
        "sites": [{"name": "a", "checkpoint": "accord/idefics3", "question_types": ["colour"]}],
    }
    file.write_text(tomli_w.dumps(table))
    return file


@pytest.fixture
def did(monkeypatch):
    """What was trained and measured, in order; `did.broken` names what fails."""

    class Did(list):
        broken = ()

        def note(self, job, stage, write):
            with job.doing(stage):
                if stage in self.broken or (stage, job.recipe.seed) in self.broken:
                    raise DataError(f"{stage} has no room")
                write()
                self.append((job.recipe.seed, stage))

    did = Did()

    def method(job, arm):
        more = min(job.recipe.seed, 3) if arm == "average" else job.recipe.seed  # differences vary, from seed 4 on
        counts = {kind: [right + more, 10] for kind, right in zip(("colour", "number"), RIGHT[arm], strict=True)}
        rows = [["a", "score", 4, 2_000_000, 500, 0], ["a", "card", 1, 0, 500, 0]]
        result = {"dev": counts, "test": counts, "traffic": rows, "seconds": 83.0}
        did.note(job, f"compare {arm}", lambda: write_atomic(arm_file(job.path, arm), json.dumps(result)))

    def site(job, name):
        did.note(job, f"site {name}", lambda: None)

    monkeypatch.setattr(routing, "train_site", site)
    monkeypatch.setattr(module, "train_router", lambda job: did.note(job, "router", lambda: None))
    monkeypatch.setattr(module, "compare", method)
    monkeypatch.setattr(cells, "to_figure", lambda made: "<svg/>")  # drawing takes longer than all the rest
    monkeypatch.setattr(module, "load_model", lambda checkpoint: (None, None))
    monkeypatch.setattr(module, "greedy", lambda model, processor, asked, recipe: ["blue"] * len(asked))
    return did


def grid(recipe, tmp_path, seeds=2, methods=()):
    return plan_grid([recipe], seeds=range(seeds), out=tmp_path / "bench", methods=methods)


def of_seed(seed, *methods):
    return [(seed, stage) for stage in ("site a", "router", *(f"compare {method}" for method in methods))]


def test_every_cell_is_measured_once(recipe, tmp_path, did):
    """The base says blue, and all is red; the question alone gives red. Colour: .8 and .9 of routed, mean .85."""
    lines = []
    text = bench(grid(recipe, tmp_path), tell=lines.append)
    assert did == [*of_seed(0, "routed", "average"), *of_seed(1, "routed", "average")]
    assert [line.partition("] ")[0] for line in lines] == [f"[{n}/8" for n in range(1, 9)]
    assert lines[2].startswith("[3/8] small seed 0 routed: 70.0 % in 83 s, about ")
    assert lines[-1] == "[8/8] small seed 1 average: 45.0 % in 83 s"
    folder = tmp_path / "bench" / "small"
    assert (folder / "table.md").read_text() == text and (folder / "table.svg").read_text() == "<svg/>\n"
    with (folder / "table.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert [*rows] == ["base", "question-only", "routed", "average"]
    assert float(rows["base"]["shuffled: mean"]) == 0 and rows["question-only"]["shuffled: mean"] == ""
    assert float(rows["base"]["overall: half width over images"]) == 0  # two pictures, both wrong
    means = ("in-domain: mean", "held-out: mean", "overall: mean", "to sites (MB): mean", "from sites (MB): mean")
    assert [float(rows["routed"][name]) for name in means] == pytest.approx([0.85, 0.65, 0.75, 2.0, 0.001])
    assert [float(rows["base"][name]) for name in means[:3]] == [0, 0, 0]
    assert [float(rows["question-only"][name]) for name in means[:3]] == [1, 1, 1]
    assert not (folder / "failed.txt").exists()


def test_the_controls_are_measured_question_by_question(recipe, tmp_path, did):
    """One test question a type, about a picture each; the base is asked again with the pictures swapped."""
    bench(grid(recipe, tmp_path, seeds=1))
    folder = tmp_path / "bench" / "small" / "0"
    base, alone = (json.loads(arm_file(folder, row).read_text()) for row in ("base", "question-only"))
    assert base["outcomes"] == {"colour": [0], "number": [0]} and base["shuffled"] == {
        "colour": [0, 1],
        "number": [0, 1],
    }
    assert alone["outcomes"] == {"colour": [1], "number": [1]} and "shuffled" not in alone
    asked = json.loads((folder / "compare" / "questions.json").read_text())
    assert asked == {"colour": [["squares-6", 0]], "number": [["squares-7", 1]]}


def test_how_many_settings_were_tried_is_shown(recipe, tmp_path, did):
    """As the recipe says now: what is measured stays when that changes, and the column comes and goes."""
    before = bench(grid(recipe, tmp_path, seeds=1))
    table = tomllib.loads(recipe.read_text())
    recipe.write_text(tomli_w.dumps({**table, "tried": {"routed": 4}}))
    did.clear()
    text = bench(grid(recipe, tmp_path, seeds=1))
    assert did == [] and "| routed | 1 | 4 |" in text and "| average | 1 | – |" in text
    assert json.loads((tmp_path / "bench" / "small" / "tried.json").read_text()) == {"routed": 4}
    recipe.write_text(tomli_w.dumps(table))
    assert bench(grid(recipe, tmp_path, seeds=1)) == before
    for tried, said in (({"routed": 0}, "must be at least 1"), ({"ruted": 1}, "did you mean routed")):
        recipe.write_text(tomli_w.dumps({**table, "tried": tried}))
        with pytest.raises(RecipeError, match=said):
            grid(recipe, tmp_path)


def test_a_folder_of_an_older_version_is_read(recipe, tmp_path, did):
    """It has counts alone: the table is as it was, without the columns that they cannot give."""
    bench(grid(recipe, tmp_path))
    folder = tmp_path / "bench" / "small"
    for seed in "01":
        (folder / seed / "compare" / "questions.json").unlink()
        for row in ("base", "question-only"):
            measured = json.loads(arm_file(folder / seed, row).read_text())
            old = {key: measured[key] for key in ("dev", "test", "traffic", "seconds", "in_domain")}
            arm_file(folder / seed, row).write_text(json.dumps(old, indent=2))
    text = cells.write_table(folder)
    assert "| base | 2 | 0.0 ± 0.0 |" in text and "shuffled" not in text and "clustered" not in text
    (base, *_) = read_cells(folder)
    assert (base.shuffled, base.outcomes, base.asked, base.role) == ({}, {}, {}, "competes")


def test_whatever_is_dealt_is_held(recipe, tmp_path, did):
    """The one site's drawn mixture is all one type, but it is dealt all there is: no type is held out."""
    table = tomllib.loads(recipe.read_text())
    del table["sites"][0]["question_types"]
    recipe.write_text(tomli_w.dumps({**table, "dealing": {"alpha": 0.001}}))
    assert "held-out" not in bench(grid(recipe, tmp_path, seeds=1))


def test_a_second_call_does_nothing(recipe, tmp_path, did):
    first, lines = bench(grid(recipe, tmp_path)), []
    did.clear()
    assert bench(grid(recipe, tmp_path), tell=lines.append) == first
    assert did == lines == []


def test_a_method_that_is_added_is_all_that_is_run(recipe, tmp_path, did):
    """First by the option, then by the recipe; the table keeps the methods that are not asked for now."""
    bench(grid(recipe, tmp_path))
    did.clear()
    text = bench(grid(recipe, tmp_path, methods=["median"]))
    assert did == [(0, "compare median"), (1, "compare median")]
    assert all(f"| {name} | 2 |" in text for name in ("base", "routed", "average", "median"))
    recipe.write_text(recipe.read_text().replace('"average"', '"average", "median"'))
    bench(grid(recipe, tmp_path, seeds=3))
    assert did[2:] == of_seed(2, "routed", "average", "median")


@pytest.mark.parametrize(
    ("methods", "trained"),
    [
        (["ground-truth", "pooled"], []),
        (["average", "ground-truth"], ["site a"]),
        (["pooled", "routed"], ["site a", "router"]),
    ],
)
def test_only_what_a_method_needs_is_trained(recipe, tmp_path, did, methods, trained):
    """A ceiling needs no site, the mean of all sites no router. A site trained later undoes what was compared."""
    bench(grid(recipe, tmp_path, seeds=1, methods=methods))
    assert did == [(0, stage) for stage in (*trained, *(f"compare {method}" for method in methods))]
    did.clear()
    bench(grid(recipe, tmp_path, seeds=1, methods=[*methods, "median"]))
    again = [] if trained else ["site a", *(f"compare {method}" for method in methods)]
    assert did == [(0, stage) for stage in (*again, "compare median")]


def test_what_does_not_compete_is_told_apart(recipe, tmp_path, did):
    """Ground truth and pooled pairs are above routed, which is best all the same, of those that compete."""
    text = bench(grid(recipe, tmp_path, seeds=5, methods=["pooled", "routed", "average", "ground-truth"]))
    assert text.endswith("Not competing: base, question-only, pooled, ground-truth.\n")
    (routed,) = (line for line in text.splitlines() if line.startswith("| routed |"))
    assert "**" in routed and not [line for line in text.splitlines() if line.startswith("| pooled |") and "**" in line]


def test_a_cell_that_fails_is_noted_and_tried_again(recipe, tmp_path, did):
    did.broken, lines = [("compare routed", 0)], []
    text = bench(grid(recipe, tmp_path), tell=lines.append)
    assert did == [*of_seed(0, "average"), *of_seed(1, "routed", "average")]
    assert [line for line in lines if "failed" in line] == [
        "[3/8] small seed 0 routed: failed: compare routed has no room"
    ]
    assert "| routed | 1 (1 failed) |" in text
    note = tmp_path / "bench" / "small" / "failed.txt"
    assert note.read_text() == "seed 0 routed: compare routed has no room\n"
    did.broken = []
    did.clear()
    assert "| routed | 2 |" in bench(grid(recipe, tmp_path))
    assert did == [(0, "compare routed")] and not note.exists()


def test_a_site_that_fails_fails_the_methods_of_its_seed(recipe, tmp_path, did):
    """The controls need no site. Trained later, the site undoes them, and they are measured again."""
    did.broken = [("site a", 0)]
    text = bench(grid(recipe, tmp_path))
    assert did == of_seed(1, "routed", "average")
    assert "| base | 2 |" in text and "| routed | 1 (1 failed) |" in text and "| average | 1 (1 failed) |" in text
    did.broken = []
    did.clear()
    text = bench(grid(recipe, tmp_path))
    assert did == of_seed(0, "routed", "average")
    assert all(f"| {name} | 2 |" in text for name in ("base", "question-only", "routed", "average"))


def test_a_router_that_fails_fails_the_methods_that_need_it(recipe, tmp_path, did):
    """The mean of all sites needs no router, and the ground truth nothing; the sites are not to blame."""
    did.broken = ["router"]
    text = bench(grid(recipe, tmp_path, seeds=1, methods=["routed", "average", "ground-truth"]))
    assert did == [(0, stage) for stage in ("site a", "compare average", "compare ground-truth")]
    note = tmp_path / "bench" / "small" / "failed.txt"
    assert note.read_text() == "seed 0 routed: router has no room\n" and "| routed | 0 (1 failed) |" in text


def test_a_site_that_fails_leaves_the_ceiling(recipe, tmp_path, did):
    did.broken = ["site a"]
    bench(grid(recipe, tmp_path, seeds=1, methods=["average", "ground-truth"]))
    assert did == [(0, "compare ground-truth")]
    assert (tmp_path / "bench" / "small" / "failed.txt").read_text() == "seed 0 average: site a has no room\n"


def test_only_stages_that_will_come_count_as_time_left(recipe, tmp_path, did):
    """Of a grid of two rows no site was trained: the mean of all sites needs it, the router nobody; no row, nothing."""
    (seed,) = grid(recipe, tmp_path, seeds=1, methods=["average", "ground-truth"])
    assert module._judges_waiting(seed, ["base", "average"]) == ["site a"]
    assert module._judges_waiting(seed, ["base", "ground-truth"]) == module._judges_waiting(seed, []) == []
    (other,) = grid(recipe, tmp_path, seeds=1)
    assert module._judges_waiting(other, ["routed"]) == ["site a", "router"]
    bench([other])
    assert module._judges_waiting(other, ["routed"]) == []


def test_a_method_of_another_package_says_what_it_is(recipe, tmp_path, did):
    """Its file notes that it is a bound; an older file notes nothing, and its method competes."""
    bench(grid(recipe, tmp_path, seeds=1))
    folder = tmp_path / "bench" / "small"
    file = arm_file(folder / "0", "average")
    stages = folder / "0" / "stages.json"
    stages.write_text(stages.read_text().replace("compare average", "compare own:MINE"))
    noted = {**json.loads(file.read_text()), "role": "bound"}
    arm_file(folder / "0", "own:MINE").write_text(json.dumps(noted))
    assert cells.write_table(folder).endswith("Not competing: base, question-only, own:MINE.\n")
    arm_file(folder / "0", "own:MINE").write_text(file.read_text())
    assert cells.write_table(folder).endswith("Not competing: base, question-only.\n")


def test_where_it_was_stopped_it_goes_on(recipe, tmp_path, did, monkeypatch):
    """Ctrl-C in the second method of the first seed."""
    method = module.compare

    def stop(job, arm):
        if arm == "average":
            raise KeyboardInterrupt
        method(job, arm)

    monkeypatch.setattr(module, "compare", stop)
    with pytest.raises(KeyboardInterrupt):
        bench(grid(recipe, tmp_path))
    assert "| routed | 1 |" in (tmp_path / "bench" / "small" / "table.md").read_text()
    monkeypatch.setattr(module, "compare", method)
    bench(grid(recipe, tmp_path))
    assert did == [*of_seed(0, "routed", "average"), *of_seed(1, "routed", "average")]


def test_another_recipe_is_refused_and_a_new_default_is_not(recipe, tmp_path, did):
    bench(grid(recipe, tmp_path, seeds=1))
    stored = tmp_path / "bench" / "small" / "0" / "recipe.toml"
    assert "compare = []\n" in stored.read_text()
    stored.write_text(stored.read_text().replace("compare = []\n", ""))  # as if this version had added the setting
    bench(grid(recipe, tmp_path, seeds=1))
    did.clear()
    recipe.write_text('method = "average"\n' + recipe.read_text())  # no cell is aligned by it
    bench(grid(recipe, tmp_path, seeds=1))
    recipe.write_text("features.memory = 0\n" + recipe.read_text())  # no byte of a result depends on it
    bench(grid(recipe, tmp_path, seeds=1))
    assert did == []
    recipe.write_text("threads = 1\n" + recipe.read_text())
    with pytest.raises(RunError, match="threads was 0 and is now 1"):
        bench(grid(recipe, tmp_path, seeds=1))


def test_a_method_that_is_added_brings_its_table(recipe, tmp_path, did):
    """And a table that a measured method reads is refused, as every other setting."""
    bench(grid(recipe, tmp_path, seeds=1, methods=["pooled", "average"]))
    did.clear()
    with recipe.open("a") as file:
        file.write("\n[server_alone]\nquestions = 7\n")
    bench(grid(recipe, tmp_path, seeds=1, methods=["pooled", "median"]))
    assert did == [(0, "compare median")]
    stored = load_recipe(tmp_path / "bench" / "small" / "0" / "recipe.toml")
    assert stored.tables["server_alone"] == ServerAloneConfig(questions=7)
    with recipe.open("a") as file:
        file.write("\n[pooled]\nfinetune = false\n")
    with pytest.raises(RunError, match=r"pooled\.\w+ was left out and is now"):
        bench(grid(recipe, tmp_path, seeds=1, methods=["median"]))


def test_wrong_grids_are_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match="there is no method 'avrage'; did you mean average\\?"):
        grid(recipe, tmp_path, methods=["avrage"])
    with pytest.raises(RecipeError, match="two recipes are called 'small'"):
        plan_grid([recipe, recipe], seeds=[0], out=tmp_path)
    recipe.write_text(recipe.read_text().replace('    "routed",\n    "average",\n', ""))
    with pytest.raises(RecipeError, match="compares no methods; add"):
        grid(recipe, tmp_path)


def test_a_process_that_fails_ends_the_others(recipe, tmp_path, monkeypatch):
    """Seed 0 ends at once with status 2 and a line that says why; seed 1 would sleep, and seed 2 is not begun."""
    begun = []

    def start(seed, jobs):
        code = "import sys, time; time.sleep(60)" if seed.recipe.seed else "import sys; sys.exit(2)"
        seed.log.parent.mkdir(parents=True, exist_ok=True)
        seed.log.write_text("warning: two rows\nerror: the folder is\nin use\n")
        begun.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
        begun[0].wait()
        return begun[-1]

    monkeypatch.setattr(module, "_start", start)
    with pytest.raises(RunError, match="small, seed 0, ended with status 2: the folder is\nin use; correct that"):
        bench(grid(recipe, tmp_path, seeds=3), jobs=2)
    assert [process.returncode for process in begun] == [2, -signal.SIGTERM]


def test_ctrl_c_in_a_process_is_ctrl_c_here(recipe, tmp_path, monkeypatch):
    code = "import sys; sys.exit(130)"
    monkeypatch.setattr(module, "_start", lambda seed, jobs: subprocess.Popen([sys.executable, "-S", "-c", code]))
    with pytest.raises(KeyboardInterrupt):
        bench(grid(recipe, tmp_path, seeds=1), jobs=2)


@pytest.mark.parametrize(
    ("seconds", "said"), [(83.4, "83 s"), (700, "12 min"), (4790, "1 h 20 min"), (7200, "2 h 0 min")]
)
def test_duration(seconds, said):
    assert duration(seconds) == said


@pytest.mark.slow
def test_a_whole_grid(tmp_path, vqa, monkeypatch, capsys):
    """Two seeds in two processes, every stage real, each as short as it gets; then a method more, in this process."""
    monkeypatch.chdir(tmp_path)
    short = {"steps": 2, "batch_size": 4}
    reward = {"steps": 2, "prompts_per_batch": 2, "rejected_per_prompt": 2, "evaluate_every": 2, "vocabulary": 4}
    colours = ("red", "blue", "green", "yellow")
    rows = [("private", "colour", colour) for colour in colours * 6]
    rows += [(split, kind, colour) for split in SPLITS[1:] for kind in ("colour", "number") for colour in colours[:2]]
    site = {"question_types": ["colour"], "finetune": short, "reward_model": reward}
    table = {
        "name": "short",
        "threads": 1,
        "compare": ["routed", "ground-truth"],
        "questions": [{"kind": "folder", "path": vqa("squares", rows)}],
        "preferences": {"rejected_per_question": 2, "policy_samples": 1},
        "sites": [{"name": "a", "checkpoint": "accord/idefics3", **site}],
        "router": {"layers": 1, "width": 8, "rounds": 1, "local_steps": 1, "pairs_per_batch": 4, "pairs_per_site": 4},
        "alignment": {"steps": 1, "prompts_per_step": 2, "group_size": 2},
    }
    Path("short.toml").write_text(tomli_w.dumps(table))
    folder = Path("runs/bench/short")

    def accord(*arguments):
        monkeypatch.setattr("sys.argv", ["accord", "bench", "short.toml", "--seeds", "2", *arguments])
        main()
        out, err = capsys.readouterr()
        return out, [line.split(":")[0] for line in err.splitlines() if line.startswith("[")]

    out, lines = accord("--jobs", "2")
    assert [line.split("]")[0] for line in lines] == [f"[{n}/8" for n in range(1, 9)]
    assert all(f"| {name} | 2 |" in out for name in ("base", "question-only", "routed", "ground-truth"))
    assert "held-out" in out and out == (folder / "table.md").read_text()
    assert "ground-truth" in (folder / "table.svg").read_text()
    heads = [folder / seed / "sites/a/reward/head.safetensors" for seed in "01"]
    trained = [head.stat().st_mtime_ns for head in heads]
    out, lines = accord("--methods", "average")
    assert lines == ["[5/6] short seed 0 average", "[6/6] short seed 1 average"]
    assert "| average | 2 |" in out and "| routed | 2 |" in out
    assert [head.stat().st_mtime_ns for head in heads] == trained
    sent = {cell.method: (cell.bytes_to_sites, cell.bytes_from_sites) for cell in read_cells(folder)}
    assert sent["average"][0] > sent["average"][1] > 0 and sent["base"] == sent["ground-truth"] == (0, 0)
