"""A method of another package, with a table of its own: loaded, planned, run, compared, measured and opened by name.

Nothing of Accord is touched: the package is a file on the path, and a recipe names it.
"""

import sys
import tomllib

import pytest
import tomli_w
import torch

from accord.errors import RecipeError, RunError
from accord.evaluation.summary import read_summary
from accord.pipeline import compare, execute, open_reward
from accord.pipeline.bench import bench, plan_grid
from accord.pipeline.cells import read_cells
from accord.pipeline.comparison import arm_file
from accord.plan import describe
from accord.recipe_file import dump_recipe, import_methods, load_recipe, recipe_of
from accord.runs import stages_done, stages_planned
from accord.types import vqa_prompt

pytestmark = pytest.mark.filterwarnings("default::UserWarning")

PACKAGE = '''
"""The best of all sites, from a floor up."""

from dataclasses import dataclass
from functools import partial

from accord.errors import check_least
from accord.methods.fusions import everyone
from accord.methods.method import Method, Table, by_reward
from accord.stages.routing import constant_router


@dataclass(frozen=True)
class LargestConfig:
    floor: float = 0.0  # of a reward

    def __post_init__(self):
        check_least(self, floor=-2)


SETTINGS = Table("largest", LargestConfig)
ASKED = []


def largest(scores, weights, floor):
    ASKED.append(floor)
    return scores.nan_to_num(-1e9).max(dim=-1).values.clamp(min=floor)


def reward(job):
    return everyone(job, partial(largest, floor=SETTINGS.of(job.recipe).floor))


def opened(folder, recipe, encoder):
    return constant_router([SETTINGS.of(recipe).floor] + [1.0] * (len(recipe.sites) - 1))


LARGEST = Method(
    by_reward(reward),
    "the largest score of all sites",
    needs=frozenset({"sites"}),
    tables=(SETTINGS,),
    asks=lambda recipe: len(recipe.sites),
    reward=reward,
    opened=opened,
)
TAKEN = Method(by_reward(reward), "its table has another's name", tables=(Table("fedit", LargestConfig),))
'''
NAME = "own_package.methods:LARGEST"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package, on the path for this test alone."""
    folder = tmp_path / "site-packages" / "own_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "methods.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(folder.parent))
    yield lambda: sys.modules["own_package.methods"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]


def import_of(table):
    return import_methods(recipe_of(table))


def test_its_table_is_read_as_strictly_as_any(package, tiny_recipe):
    found = import_of({**tiny_recipe, "method": NAME, "largest": {"floor": 0.25}})
    assert found.tables["largest"].floor == 0.25
    assert import_of(tomllib.loads(dump_recipe(found))) == found
    compared = import_of({**tiny_recipe, "compare": [NAME], "largest": {"floor": 0.25}})
    assert compared.tables["largest"].floor == 0.25
    for method in ({"method": NAME}, {"compare": [NAME]}):
        with pytest.raises(RecipeError, match=r"largest\.flor is not a setting; did you mean floor\?"):
            import_of({**tiny_recipe, **method, "largest": {"flor": 0.25}})
        with pytest.raises(RecipeError, match=r"\[largest\] floor must be at least -2, got -3.0"):
            import_of({**tiny_recipe, **method, "largest": {"floor": -3.0}})
        with pytest.raises(RecipeError, match=r"largst is not a setting; did you mean largest\?"):
            import_of({**tiny_recipe, **method, "largst": {"floor": 0.25}})


def test_its_table_is_nobodys_where_it_is_not_named(package, tiny_recipe):
    with pytest.raises(RecipeError, match="largest is not a setting"):
        import_of({**tiny_recipe, "largest": {"floor": 0.25}})


def test_a_table_of_anothers_name_is_refused(package, tiny_recipe):
    with pytest.raises(RecipeError, match=r"table is called \[fedit\], which means something else; rename it"):
        import_of({**tiny_recipe, "compare": ["own_package.methods:TAKEN"]})


def test_what_it_lacks_is_named(package, tiny_recipe):
    with pytest.raises(RecipeError, match=r"'own_package\.methods:SMALLEST' cannot be imported"):
        import_of({**tiny_recipe, "method": "own_package.methods:SMALLEST"})


def test_it_is_planned(package, tiny_recipe):
    plan = describe(import_of({**tiny_recipe, "method": NAME}))
    assert f"by {NAME}: the largest score of all sites" in plan
    assert "\nsite colour " in plan and "\nrouter " not in plan and "per GRPO step" in plan
    assert f"compare                {NAME}" in describe(import_of({**tiny_recipe, "compare": [NAME]}))


def test_it_aligns_a_run_and_opens_its_reward(package, trained, opened, tmp_path):
    """By its own settings; what its reward is afterwards is in the report, and its router is in the folder's reward."""
    run = trained(tmp_path / "run", router=False, method=NAME, largest={"floor": 0.25})
    with opened(run) as job:
        assert execute(job).is_file()
    assert set(package().ASKED) == {0.25} and (run / "policy" / "model.safetensors").is_file()
    summary = read_summary(run / "summary.json")
    assert summary.method == NAME and summary.router is None and summary.routing
    assert list(stages_planned(run))[-2:] == stages_done(run)[-2:] == ["align", "evaluation"]
    reward = open_reward(run)
    weights = reward.router([vqa_prompt("is it red?")], [None], [["yes", "no"]])
    assert torch.equal(weights, torch.tensor([[0.25, 1.0, 1.0]] * 2))
    assert reward.engine.sites == ("colour", "shape", "yes-no")


def test_it_is_compared(package, trained, opened, tmp_path):
    run = trained(tmp_path / "run", compare=[NAME])
    with opened(run) as job:
        compare(job, NAME)
    assert arm_file(run, NAME).is_file() and set(package().ASKED) == {0.0}


def test_it_is_measured_in_a_grid(package, trained, tiny_recipe, tmp_path):
    """Sites that are trained are not trained again, and no router is: nobody needs one."""
    table = {**tiny_recipe, "largest": {"floor": 0.25}}
    file = tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps({**table, "compare": [NAME]}))
    run = trained(tmp_path / "bench" / "tiny" / "0", router=False)
    (seed,) = grid = plan_grid([file], seeds=[0], out=tmp_path / "bench")
    (run / "recipe.toml").write_text(dump_recipe(seed.recipe))
    text = bench(grid)
    assert f"| {NAME} | 1 |" in text and set(package().ASKED) == {0.25}
    assert {cell.method for cell in read_cells(run.parent)} == {"base", "question-only", NAME}
    assert "router" not in stages_done(run) and not (run / "router").exists()


def test_the_recipe_of_a_grids_folder_can_be_read_again(package, trained, tiny_recipe, tmp_path):
    """It is a run folder like any other; with its table, for that is what the cells were measured by."""
    file = tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps({**tiny_recipe, "largest": {"floor": 0.25}, "compare": [NAME]}))
    (seed,) = plan_grid([file], seeds=[0], out=tmp_path / "bench")
    (tmp_path / "recipe.toml").write_text(dump_recipe(seed.recipe))
    assert import_methods(load_recipe(tmp_path / "recipe.toml")).tables["largest"].floor == 0.25


def test_what_needs_more_than_a_folder_is_not_opened(trained, tmp_path):
    run = trained(tmp_path / "run", router=False, method="fedgrpo")
    with pytest.raises(RunError, match="was aligned by 'fedgrpo', whose reward needs the run's questions"):
        open_reward(run)
