"""The breakdown benchmark: who lies, and the table and the figure of what cells have left behind."""

import json

import liars
import pytest

from accord.attacks.scores import ATTACKS, Attack
from accord.errors import RunError
from accord.recipe import Recipe, SiteConfig

NAMES = ("a", "b", "c", "d", "e")
RECIPE = Recipe("x", tuple(SiteConfig(name, "accord/idefics3") for name in NAMES))


def test_liars_of_a_smaller_number_are_among_those_of_a_larger_one():
    """Of one seed; and the honest sites are as they were."""
    attack = Attack("flip")
    found = [{site.name for site in liars.lying(RECIPE, attack, n).sites if site.attack == attack} for n in range(4)]
    assert [len(names) for names in found] == [0, 1, 2, 3] and found[1] < found[2] < found[3]
    assert liars.lying(RECIPE, attack, 0) == RECIPE


@pytest.mark.parametrize("name", [*ATTACKS, "honest"])
def test_an_attack_gets_the_target_and_the_trigger_that_it_reads(name):
    attack, default = liars.attack_of(name, "dog", "animal"), ATTACKS.get(name, Attack())
    assert attack.target == ("dog" if default.target else "")
    assert attack.trigger == ("animal" if default.trigger else "")


def cell(folder, attack, n, seed, method, right, **columns):
    place = folder / f"{attack}-{n}" / str(seed)
    (place / "compare").mkdir(parents=True, exist_ok=True)
    stages = place / "stages.json"
    done = json.loads(stages.read_text())["done"] if stages.exists() else []
    stages.write_text(json.dumps({"done": [*done, f"compare {method}"]}))
    measured = {
        "test": columns or {"colour": [right, 10], "shape": [5, 10], "nobody's": [0, 10]},
        "traffic": [],
        "seconds": 1.0,
        "role": "competes",
    }
    (place / "compare" / f"{method}.json").write_text(json.dumps(measured))


def test_a_report_of_cells(tmp_path):
    """Macro accuracy of what a site holds: (8/10 + 5/10) / 2 = 65 % and, of two seeds, 60 and 50.

    55 ± 12.706 · 7.07 / √2 = 63.5.
    """
    for seed in (0, 1):
        cell(tmp_path, "honest", 0, seed, "canary", 8)
        cell(tmp_path, "honest", 0, seed, "base", 3)
    cell(tmp_path, "near-constant", 1, 0, "canary", 7)
    cell(tmp_path, "near-constant", 1, 1, "canary", 5)
    text = liars.report(liars.read(tmp_path, ["colour", "shape"]), tmp_path, "liars")
    assert "| near-constant | canary | 65.0 ± 0.0 (2) | 55.0 ± 63.5 (2) |" in text
    assert "| near-constant | base | 40.0 ± 0.0 (2) | 40.0 ± 0.0 (2) |" in text
    assert (tmp_path / "liars.md").read_text() == text + "\n"
    drawn = (tmp_path / "liars.svg").read_text()
    assert drawn.startswith("<svg") and "near-constant" in drawn and "sites that lie" in drawn


def test_captions_are_measured_by_how_often_they_are_preferred(tmp_path):
    cell(tmp_path, "honest", 0, 1, "average", 0, **{"CIDEr-D": [30, 100], "preferred to base": [54.5, 100]})
    assert liars.read(tmp_path, None) == {"honest": {"average": {0: {1: pytest.approx(54.5)}}}}


def test_a_cell_needs_trained_sites(tmp_path):
    with pytest.raises(RunError, match=r"sites/a is missing; train it by `accord bench RECIPE --methods routed"):
        liars.measure(liars.lying(RECIPE, Attack(), 1), tmp_path / "out", tmp_path / "trained", ["average"])
