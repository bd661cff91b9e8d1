"""The main job made as small as it gets: some eighty pictures of easy-VQA in a folder, and a recipe of few steps."""

import json
import shutil
import signal
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import tomli_w

from accord.cli import main
from accord.data.easy_vqa import load_easy_vqa

IMAGES = {"base": 10, "private": 40, "public": 12, "dev": 8, "test": 10}
TUNING = {"steps": 2, "batch_size": 8}
REWARD = {
    "steps": 6,
    "prompts_per_batch": 4,
    "rejected_per_prompt": 2,
    "evaluate_every": 3,
    "evaluate_on": 12,
    "vocabulary": 13,
}


@pytest.fixture(scope="session")
def vqa_folder(tmp_path_factory):
    """The questions about the first few images of every split, in Accord's own form."""
    folder = tmp_path_factory.mktemp("vqa") / "shapes"
    (folder / "images").mkdir(parents=True)
    taken = {split: set() for split in IMAGES}
    lines = []
    for q in load_easy_vqa():
        if q.image not in taken[q.split]:
            if len(taken[q.split]) == IMAGES[q.split]:
                continue
            taken[q.split].add(q.image)
            shutil.copyfile(q.image, folder / "images" / f"{q.split}-{q.image.name}")
        image = f"images/{q.split}-{q.image.name}"
        row = {"id": q.id, "image": image, "question": q.text, "answer": q.answer}
        lines.append(json.dumps({**row, "question_type": q.question_type, "split": q.split}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))
    assert Counter(json.loads(line)["split"] for line in lines)["test"] > 60
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(vqa_folder):
    """A recipe as a table: three sites of three families, a few steps of everything."""
    families = {
        "colour": ("accord/llava-siglip-qwen2", "colour"),
        "shape": ("accord/idefics3", "shape"),
        "yes-no": ("accord/llava-clip-llama", "yes/no"),
    }
    return {
        "name": "tiny",
        "seed": 0,
        "threads": 1,
        "questions": [{"kind": "folder", "path": str(vqa_folder)}],
        "preferences": {"rejected_per_question": 3, "policy_samples": 2},
        "sites": [
            {
                "name": name,
                "checkpoint": checkpoint,
                "question_types": [kind],
                "fraction": 0.5,
                "finetune": TUNING,
                "reward_model": REWARD,
            }
            for name, (checkpoint, kind) in families.items()
        ],
        "router": {"layers": 1, "width": 16, "rounds": 2, "local_steps": 1, "pairs_per_batch": 8, "pairs_per_site": 8},
        "alignment": {
            "steps": 4,
            "prompts_per_step": 6,
            "group_size": 4,
            "evaluate_every": 2,
            "evaluate_on": 12,
            "save_every": 1,
        },
        "routing": {"mode": "soft"},  # every site is asked, whatever a router of two rounds has learnt
        "pooled": {"finetune": TUNING, "reward_model": REWARD},
        "evaluation": {"questions": 60, "gallery": 4},
    }


@pytest.fixture(scope="session")
def write_recipe(tiny_recipe):
    """Return a function that writes the tiny recipe, with whole tables exchanged, and returns its path."""

    def write(path, **changes):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps({**tiny_recipe, **changes}))
        return path

    return write


@pytest.fixture(scope="session")
def start():
    """Return a function that starts a process, Ctrl-C at work in it whatever this process does with it."""

    def open_process(command, **settings):
        # A shell starts its background jobs deaf to SIGINT, which children inherit; a handler they do not.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
            )
        finally:
            signal.signal(signal.SIGINT, before)

    return open_process


@pytest.fixture(scope="session")
def script():
    """The installed `accord` command."""
    return Path(sysconfig.get_path("scripts")) / "accord"


@pytest.fixture
def accord(monkeypatch, capsys):
    """Return a function that runs the command line in this process; it returns status, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["accord", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, start, script, write_recipe):
    """A whole run of the tiny recipe by the installed command, in a process of its own: recipe, run folder, output."""
    place = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(place / "tiny.toml")
    process = start([script, "run", recipe, "--out", place / "run"])
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    return recipe, place / "run", out, err
