import json

import pytest

from accord.errors import RunError
from accord.evaluation.summary import accuracy_by_image
from accord.methods.method import Method
from accord.pipeline import comparison
from accord.pipeline.comparison import arm_accuracy, arm_file, compare, questions_file
from accord.runs import write_atomic
from accord.types import Question


def test_what_an_arm_measured_is_read_again(job):
    """1 of 2 right on test; an arm that was not run, or before a site, names the command."""
    with job.doing("compare site a"):
        write_atomic(job.path / "compare" / "site-a.json", '{"dev": {"colour": [3, 4]}, "test": {"colour": [1, 2]}}')
    assert arm_accuracy(job, "site a").macro == 0.5
    with pytest.raises(RunError, match=r"average\.json is missing; make it with `accord run RECIPE --resume`"):
        arm_accuracy(job, "average")
    with job.doing("site a"):
        pass
    with pytest.raises(RunError, match=r"site-a\.json is out of date; make it with `accord run RECIPE --resume`"):
        arm_accuracy(job, "site a")


def test_an_arm_is_measured_with_its_own_images_and_with_others(job, monkeypatch):
    """A policy that names the picture's colour: right of its own image, and of two images swapped always wrong.

    One of two questions about the red picture asks for its number, which it never knows; both types are about both.
    """

    def q(name, image, answer, kind):
        return Question(name, image, "what?", answer, kind, "test", "shapes")

    asked = [q("1", b"red", "red", "colour"), q("2", b"red", "one", "number"), q("3", b"blue", "blue", "colour")]
    vars(job)["evaluated"], vars(job)["questions"] = asked, {"dev": asked[:1]}
    method = Method(lambda job, stage: (None, None), role="bound")
    monkeypatch.setattr(comparison, "find_method", lambda arm, sites: method)
    monkeypatch.setattr(comparison, "greedy", lambda model, processor, asked, recipe: [q.image.decode() for q in asked])
    compare(job, "own:MINE")
    measured = json.loads(arm_file(job.path, "own:MINE").read_text())
    assert measured["dev"] == {"colour": [1, 1]} and measured["test"] == {"colour": [2, 2], "number": [0, 1]}
    assert measured["outcomes"] == {"colour": [1, 1], "number": [0]}
    assert measured["shuffled"] == {"colour": [0, 2], "number": [0, 1]} and measured["role"] == "bound"
    assert json.loads(questions_file(job.path).read_text()) == {"colour": [["1", 0], ["3", 1]], "number": [["2", 0]]}
    assert arm_accuracy(job, "own:MINE") == accuracy_by_image(
        {"colour": [1, 1], "number": [0]}, {"colour": [0, 1], "number": [0]}
    )


def test_without_images_there_is_nothing_to_shuffle(job):
    vars(job)["evaluated"] = [Question("1", None, "1 + 1", "2", "sum", "test", "numbers")]
    assert comparison.with_other_images(job, lambda asked, split: pytest.fail("asked")) == {}


def test_every_arm_has_a_file_of_its_own(tmp_path):
    assert arm_file(tmp_path, "site a") == tmp_path / "compare" / "site-a.json"
    assert arm_file(tmp_path, "my_package.mine:LARGEST") == tmp_path / "compare" / "my_package.mine-LARGEST.json"
