import pytest

from accord.errors import RunError
from accord.evaluation.summary import accuracy
from accord.pipeline.comparison import arm_accuracy, arm_file
from accord.runs import write_atomic


def test_what_an_arm_measured_is_read_again(job):
    """3 of 4 right on dev and 1 of 2 on test; an arm that was not run, or before a site, names the command."""
    with job.doing("compare site a"):
        write_atomic(job.path / "compare" / "site-a.json", '{"dev": {"colour": [3, 4]}, "test": {"colour": [1, 2]}}')
    assert arm_accuracy(job, "site a", "dev") == accuracy({"colour": (3, 4)})
    assert arm_accuracy(job, "site a", "test").macro == 0.5
    with pytest.raises(RunError, match=r"average\.json is missing; make it with `accord run RECIPE --resume`"):
        arm_accuracy(job, "average", "test")
    with job.doing("site a"):
        pass
    with pytest.raises(RunError, match=r"site-a\.json is out of date; make it with `accord run RECIPE --resume`"):
        arm_accuracy(job, "site a", "test")


def test_every_arm_has_a_file_of_its_own(tmp_path):
    assert arm_file(tmp_path, "site a") == tmp_path / "compare" / "site-a.json"
    assert arm_file(tmp_path, "my_package.mine:LARGEST") == tmp_path / "compare" / "my_package.mine-LARGEST.json"
