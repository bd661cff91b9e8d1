"""`accord run` from end to end: what it leaves, that it repeats itself bit for bit, and that stages add up to it."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from accord.data.images import load_image
from accord.evaluation.summary import read_summary
from accord.evaluation.trace import read_gallery
from accord.rewards.model import RewardModel
from accord.runs import read_lines
from accord.types import vqa_prompt

SITES = ("colour", "shape", "yes-no")
WITHOUT_ACCORD = """
import json, sys
sys.modules["accord"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, rows = sys.argv[1], json.loads(sys.argv[2])
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
for path, question in rows:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(images=[Image.open(path).convert("RGB")], text=[text], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip())
"""


def metrics(run):
    return (run / "metrics.jsonl").read_bytes()


def weights(run):
    return (run / "policy" / "model.safetensors").read_bytes()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_leaves_its_folder(finished):
    """Everything of the run folder's contract, nothing half-written, and the trainer's checkpoints gone."""
    _, run, out, err = finished
    files = ("recipe.toml", "manifest.json", "stages.json", "metrics.jsonl", "timings.jsonl", "summary.json")
    written = ("report.html", "gallery.jsonl", "run.lock", "tensorboard", "sites", "router", "checkpoints", "policy")
    assert names(run) == sorted([*files, *written, "gallery", "traffic"])
    assert names(run / "sites") == sorted(SITES) and names(run / "checkpoints") == []
    assert all(names(run / "sites" / site) == ["card.json", "model", "reward", "truth.json"] for site in SITES)
    assert names(run / "gallery") == ["0.png", "1.png", "2.png", "3.png"]
    assert not [path for path in run.rglob("*") if ".partial-" in path.name or ".replaced-" in path.name]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "</html>" in page and all(site in page for site in SITES)
    assert f"report: {run / 'report.html'}" in out and f"aligned checkpoint: {run / 'policy'}" in out
    assert "warning" not in err.lower()


def test_the_records_are_those_of_the_stages_in_order(finished):
    """4 steps of alignment are 4 records, and 2 points of the accuracy curve; 2 rounds of the router and its accuracy.

    6 steps of a reward model ranked every 3 are 2 records a site. Nothing holds a wall time.
    """
    _, run, _, _ = finished
    records = read_lines(run / "metrics.jsonl")
    stages = [(r["stage"], r.get("site")) for r in records]
    assert [s for s, after in pairwise([*stages, None]) if s != after] == [
        *(("site", site) for site in SITES),
        ("router", None),
        ("align", None),
        ("evaluation", None),
    ]
    assert [stages.count(("site", site)) for site in SITES] == [2, 2, 2]
    assert stages.count(("router", None)) == 3 and stages.count(("align", None)) == 6
    assert [r["of"] for r in records if r["stage"] == "evaluation"] == [
        "base",
        "aligned",
        "shuffled_image",
        "question_only",
    ]
    assert not [key for r in records for key in r if "second" in key or "time" in key]


def test_the_summary_states_the_run(finished):
    """60 test questions were asked; each of 3 sites answered 4 steps' scores and 2 rounds of the router, both ways."""
    _, run, _, _ = finished
    summary = read_summary(run / "summary.json")
    assert (summary.name, summary.seed, summary.constructed_preferences) == ("tiny", 0, True)
    assert [site.name for site in summary.sites] == list(SITES)
    assert len({site.architecture for site in summary.sites} | {summary.policy.architecture}) >= 2
    assert all(site.questions > 0 and site.pairs > 0 and site.parameters > 100_000 for site in summary.sites)
    evaluation = summary.evaluation
    for result in (evaluation.base, evaluation.aligned, evaluation.question_only, evaluation.shuffled_image):
        assert result is not None and result.n == 60 and set(result.by_type) == {"colour", "shape", "yes/no"}
    assert evaluation.compare == {}
    for shares in summary.routing.values():
        assert sum(shares.values()) == pytest.approx(1)
    messages = {(row.site, row.kind): row.messages for row in summary.traffic}
    assert messages == {(site, kind): n for site in SITES for kind, n in (("score", 4), ("router", 2))}
    assert all(row.bytes_to_site > 0 and row.bytes_from_site > 0 and not row.absences for row in summary.traffic)
    assert set(summary.seconds) == {*(f"site {site}" for site in SITES), "router", "align", "evaluation"}
    assert Path(summary.checkpoint, "config.json").is_file() and summary.versions["trl"]
    assert summary.macro_accuracy["aligned"] == summary.evaluation.aligned.macro and set(summary.bytes) == set(SITES)


def test_the_policy_answers_without_accord(finished):
    """Plain transformers in another process, in which accord cannot be imported, gives the gallery's answers."""
    _, run, _, _ = finished
    rows = read_gallery(run / "gallery.jsonl")
    asked = json.dumps([(str(run / row.image), row.question) for row in rows])
    command = [sys.executable, "-c", WITHOUT_ACCORD, str(run / "policy"), asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [row.after for row in rows]


def test_the_reward_models_can_be_used_again(finished):
    """What a site told the gallery, clipped to 0..2, is what its folder says when it is opened by itself."""
    _, run, _, _ = finished
    for site in SITES:
        model = RewardModel.load(run / "sites" / site / "reward")
        for row in read_gallery(run / "gallery.jsonl"):
            scores = row.scores[site]
            assert scores is not None
            (said,) = model.score([vqa_prompt(row.question)], [load_image(run / row.image)], [[row.before, row.after]])
            assert said.isfinite().all()
            expected = torch.tensor([scores.before, scores.after])
            torch.testing.assert_close(said.clamp(0, 2), expected, atol=1e-4, rtol=0)


def test_another_seed_gives_other_bytes(finished, accord, tmp_path):
    """The same one gives the same: the next test begins anew, in another process than the finished run's."""
    recipe, run, _, _ = finished
    again = tmp_path / "again"
    status, _, err = accord("run", recipe, "--out", again, "--seed", 1, "--quiet")
    assert (status, err) == (0, "")
    assert metrics(again) != metrics(run) and weights(again) != weights(run)


def test_stage_by_stage_it_is_the_same_run(finished, accord, tmp_path):
    """Each stage by its own command, bit for bit; one whose input is missing names the command that makes it."""
    recipe, run, _, _ = finished
    out = ("--out", tmp_path / "run", "--quiet")
    status, _, err = accord("router", "train", recipe, *out)
    assert status == 2 and "accord site train RECIPE colour" in err
    for site in SITES:
        assert accord("site", "train", recipe, site, *out)[0] == 0
    status, _, err = accord("align", recipe, *out)
    assert status == 2 and "accord router train RECIPE" in err
    assert accord("router", "train", recipe, *out)[0] == 0
    status, _, err = accord("evaluate", recipe, *out)
    assert status == 2 and "accord align RECIPE" in err
    status, _, err = accord("report", tmp_path / "run")
    assert status == 2 and "summary.json" in err
    assert accord("align", recipe, *out)[0] == 0
    assert accord("evaluate", recipe, *out)[0] == 0
    status, page, _ = accord("report", tmp_path / "run")
    assert (status, page.strip()) == (0, str(tmp_path / "run" / "report.html"))
    assert (tmp_path / "run" / "report.html").is_file()
    assert metrics(tmp_path / "run") == metrics(run) and weights(tmp_path / "run") == weights(run)
    ours, whole = read_summary(tmp_path / "run" / "summary.json"), read_summary(run / "summary.json")
    assert ours.evaluation == whole.evaluation and ours.traffic == whole.traffic and ours.sites == whole.sites
    assert accord("run", recipe, *out, "--resume")[0] == 0  # nothing is left to do
    assert metrics(tmp_path / "run") == metrics(run)


@pytest.fixture(scope="module")
def compared(finished, write_recipe, tmp_path_factory):
    """The finished run again, with every comparison: recipe and a folder in which only they are left to do."""
    arms = ["average", "random", "best-site", "ground-truth", "pooled", "site shape"]
    place = tmp_path_factory.mktemp("compared")
    recipe = write_recipe(place / "tiny.toml", compare=arms)
    _, run, _, _ = finished
    shutil.copytree(run, place / "run")
    stored = place / "run" / "recipe.toml"
    listed = ", ".join(f'"{arm}"' for arm in arms)
    stored.write_text(stored.read_text().replace("compare = []", f"compare = [{listed}]"))
    forget(place / "run", "evaluation")
    return recipe, place / "run", arms


def forget(run, stage):
    """Make a stage not done."""
    done = json.loads((run / "stages.json").read_text())["done"]
    (run / "stages.json").write_text(json.dumps({"done": [name for name in done if name != stage]}))


def test_comparisons_are_measured_beside_an_unchanged_run(compared, finished, accord, monkeypatch):
    """Five arms and a single site; an arm that is interrupted and resumed leaves the same records.

    The run's own bytes do not count what the comparisons send.
    """
    from accord.stages import alignment

    recipe, run, arms = compared
    status, _, err = accord("evaluate", recipe, "--out", run, "--quiet")
    assert status == 2 and "average.json is missing" in err and "accord run RECIPE --resume" in err
    status, _, err = accord("run", recipe, "--out", run, "--quiet", "--resume")
    assert (status, err) == (0, "")
    ours, plain = read_summary(run / "summary.json"), read_summary(finished[1] / "summary.json")
    assert list(ours.evaluation.compare) == arms
    assert all(result.n == 60 for result in ours.evaluation.compare.values())
    assert ours.evaluation.aligned == plain.evaluation.aligned and ours.traffic == plain.traffic
    lines = metrics(run).splitlines()
    own = [line for line in lines if b'"compare ' not in line]
    assert own == metrics(finished[1]).splitlines()

    def interrupt(self, args, state, control, **rest):
        saved(self, args, state, control, **rest)
        if state.global_step == 2:
            raise KeyboardInterrupt

    saved = alignment._Seal.on_save
    for arm in ("random", "pooled"):
        forget(run, f"compare {arm}")
        with monkeypatch.context() as patch:
            patch.setattr(alignment._Seal, "on_save", interrupt)
            assert accord("run", recipe, "--out", run, "--quiet", "--resume")[0] == 130
        status, _, err = accord("run", recipe, "--out", run, "--quiet", "--resume")
        assert (status, err) == (0, "")
        stage = f'"compare {arm}"'.encode()
        again = [line for line in metrics(run).splitlines() if stage in line]
        before = [line for line in lines if stage in line]
        # The pooled reward model is kept, so only the records of its alignment are made again.
        kept = [line for line in before if b'"reward_model_step"' not in line] if arm == "pooled" else before
        assert [line for line in again if b'"reward_model_step"' not in line] == kept
        assert sorted(again) == sorted(before)
