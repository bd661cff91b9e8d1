import json

import pytest

from accord.pipeline import Job
from accord.recipe import Recipe, SiteConfig
from accord.runs import Run


@pytest.fixture
def vqa(tmp_path, square):
    """Return a function that makes a folder of rows `(split, type, colour)`, each about a picture of its own size."""

    def make(name, rows):
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for n, (split, kind, colour) in enumerate(rows):
            (folder / f"{n}.png").write_bytes(square(colour, (32 + n, 32)))
            row = {"id": f"{name}-{n}", "image": f"{n}.png", "question": "what colour is it?", "answer": colour}
            lines.append(json.dumps({**row, "question_type": kind, "split": split}) + "\n")
        (folder / "questions.jsonl").write_text("".join(lines))
        return str(folder)

    return make


@pytest.fixture
def job(tmp_path):
    """A job of two sites, `a` for colour and `b` for number, in a new run folder; no question is read yet."""
    sites = tuple(
        SiteConfig(name, "accord/idefics3", question_types=(kind,)) for name, kind in (("a", "colour"), ("b", "number"))
    )
    with Run.create(tmp_path / "run", 'name = "x"\n', seed=0) as run:
        yield Job(Recipe("x", sites), run, quiet=True)
