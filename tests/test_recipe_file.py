"""Recipes are read with the tables of their methods, strictly, and written so that they are read back equal."""

import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

import accord.cli
from accord.errors import RecipeError, RunError
from accord.flare.service import read_site_folder
from accord.methods import METHODS
from accord.methods.bounds import Pooled
from accord.methods.fedgrpo import FedGrpoConfig
from accord.methods.fedit import FedITConfig
from accord.recipe_file import dump_recipe, import_methods, load_recipe, method_tables, recipe_of, renewed

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
SITES = [{"name": "a", "checkpoint": "accord/idefics3"}, {"name": "b", "checkpoint": "accord/idefics3"}]


def recipe(**changes):
    return recipe_of({"name": "x", "sites": SITES, **changes})


def again(found):
    return recipe_of(tomllib.loads(dump_recipe(found)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_being_written(path):
    found = load_recipe(path)
    assert found.name == path.stem
    assert again(found) == found


def test_the_demo_is_the_one_that_ships():
    assert (ROOT / "recipes" / "demo.toml").read_bytes() == accord.cli.DEMO.read_bytes()


@pytest.mark.parametrize("name", [*METHODS, "site a", "site b", "local a"])
def test_every_method_may_be_named(name):
    """As the run's own, and compared."""
    assert recipe(method=name).method == name and recipe(compare=[name]).compare == (name,)


def test_tables_of_methods_are_read():
    """Where one is left out there is nothing; within one, what is left out has its default."""
    found = recipe(fedit={"mu": 0.5}, fedgrpo={"experts": 3, "judge": "answer"}, pooled={"finetune": False})
    assert found.tables == {
        "fedit": FedITConfig(mu=0.5),
        "fedgrpo": FedGrpoConfig(experts=3, judge="answer"),
        "pooled": Pooled(finetune=None),
    }
    assert again(found) == found


def test_the_runs_own_method_is_written_out_in_full():
    """Whoever reads a run's recipe later finds what its method did, defaults included; those of others are left out."""
    written = tomllib.loads(dump_recipe(recipe(method="fedgrpo", fedit={"mu": 0.5})))
    assert written["fedgrpo"]["neighbours"] == 20 and written["fedit"]["mu"] == 0.5
    assert set(written) & set(method_tables([])) == {"fedgrpo", "fedit"}
    assert again(recipe(method="fedgrpo")).tables == {"fedgrpo": FedGrpoConfig()}
    once = dump_recipe(recipe(method="mor"))
    assert dump_recipe(recipe_of(tomllib.loads(once))) == once and "[online]" in once


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_recipe_survives_being_written(name):
    found = recipe(method=name, **{table.name: {} for table in METHODS[name].tables})
    assert found.tables == {table.name: table.config() for table in METHODS[name].tables}
    assert again(found) == found == replace(again(recipe(method=name)), tables=found.tables)


def test_a_method_without_its_table_is_read_back_equal():
    """Written out or left out, the defaults are the same recipe."""
    for name in METHODS:
        assert again(recipe(method=name)) == recipe(method=name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fedgrpo": {"neighbors": 3}}, "fedgrpo.neighbors is not a setting; did you mean neighbours? valid in [fedgr"),
        ({"fedit": {"averging": {}}}, "fedit.averging is not a setting; did you mean averaging? valid in [fedit]: av"),
        ({"fedit": {"averaging": {"ronds": 1}}}, "fedit.averaging.ronds is not a setting; did you mean rounds?"),
        ({"online": {"scle": "raw"}}, "online.scle is not a setting; did you mean scale?"),
        ({"fedit": {"mu": "a little"}}, 'fedit.mu must be a number, got "a little"'),
        ({"fedit": {"mu": -1.0}}, "[fedit] mu must be at least 0"),
        ({"fedgrpo": {"auxiliary": 5, "neighbours": 6}}, "[fedgrpo] neighbours must be at most auxiliary = 5, got 6"),
        ({"fedgrpo": 3}, "fedgrpo must be a table, got 3; write it as [fedgrpo]"),
        ({"fedgrpo": [{}]}, "fedgrpo must be a table, got [{}]; write it as [fedgrpo]"),
        (
            {"fedgrop": {}},
            "fedgrop is not a setting; did you mean fedgrpo? valid at the top: alignment, canaries, compare",
        ),
        ({"fed-it": {}}, "fed-it is not a setting; did you mean fedit? valid at the top"),
        ({"aligment": {}}, "aligment is not a setting; did you mean alignment?"),
        ({"tables": {"fedit": {}}}, "tables is not a setting"),
        ({"method": "mro"}, "there is no method 'mro'; did you mean mor?"),
        ({"method": 3}, "method must be a text, got 3"),
        ({"compare": ["site c"]}, "there is no method 'site c'"),
        ({"compare": ["routed", "avrage"]}, "there is no method 'avrage'; did you mean average?"),
        ({"compare": [3]}, "compare[0] must be a text, got 3"),
        ({"compare": "routed"}, 'compare must be a list (each a text), got "routed"'),
        ({"compare": 3}, "compare must be a list (each a text), got 3"),
        ({"uses": ["nonsense"]}, "uses[0] names a method of another package, as package.module:name, got 'nonsense'"),
        ({"uses": ["own.package:METHOD", "routed"]}, "uses[1] names a method of another package"),
        ({"uses": [3]}, "uses[0] must be a text, got 3"),
        ({"uses": ["own.package:METHOD"], "own": 3}, "own is not a setting"),
        ({"sites": 3}, "sites must be a list (each a table), got 3"),
    ],
)
def test_what_is_refused(changes, said):
    with pytest.raises(RecipeError, match=f"^{re.escape(said)}"):
        recipe(**changes)


def test_every_method_table_is_among_the_valid_names():
    with pytest.raises(RecipeError, match="qqq is not a setting; valid at the top: ") as error:
        recipe(qqq={})
    valid = str(error.value).partition("valid at the top: ")[2].split(", ")
    assert {*method_tables([]), "method", "compare", "encoder", "alignment"} <= set(valid) and valid == sorted(valid)


def test_a_recipe_may_start_from_another(tmp_path):
    """Tables are merged, lists replaced; a chain that comes back to itself is refused."""
    (tmp_path / "first.toml").write_text(
        'name = "first"\nseed = 3\n[[sites]]\nname = "a"\ncheckpoint = "accord/idefics3"\n'
        "[alignment]\nsteps = 7\nkl = 0.5\n[fedgrpo]\nexperts = 3\nneighbours = 5\n"
    )
    (tmp_path / "second.toml").write_text(
        'base = "first.toml"\nname = "second"\n[alignment]\nsteps = 9\n[[sites]]\nname = "b"\n'
        'checkpoint = "accord/idefics3"\nflipped = 0.2\n[fedgrpo]\nexperts = 4\n'
    )
    found = load_recipe(tmp_path / "second.toml")
    assert (found.name, found.seed, found.alignment.steps, found.alignment.kl) == ("second", 3, 9, 0.5)
    assert [(site.name, site.flipped) for site in found.sites] == [("b", 0.2)]
    assert found.tables == {"fedgrpo": FedGrpoConfig(experts=4, neighbours=5)}
    (tmp_path / "loop.toml").write_text('base = "loop.toml"\nname = "loop"\n')
    with pytest.raises(RecipeError, match=r"loop\.toml is its own base"):
        load_recipe(tmp_path / "loop.toml")
    (tmp_path / "wrong.toml").write_text('base = 3\nname = "wrong"\n')
    with pytest.raises(RecipeError, match="base must be the path of a recipe, got 3"):
        load_recipe(tmp_path / "wrong.toml")


def test_bases_that_do_not_end(tmp_path):
    """A circle is found under other spellings of a path, and a chain has a limit."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.toml").write_text('base = "inner/../b.toml"\n')
    (tmp_path / "b.toml").write_text('base = "./inner/../inner/../a.toml"\n')
    with pytest.raises(RecipeError, match="is its own base"):
        load_recipe(tmp_path / "a.toml")
    for n in range(100):
        (tmp_path / f"{n}.toml").write_text(f'base = "{n + 1}.toml"\n')
    with pytest.raises(RecipeError, match=r"0\.toml stands on more than 16 others"):
        load_recipe(tmp_path / "0.toml")
    (tmp_path / "zero.toml").write_text('base = "/dev/zero"\n')
    with pytest.raises(RecipeError, match=r"/dev/zero is no ordinary file"):
        load_recipe(tmp_path / "zero.toml")


@pytest.mark.parametrize("copies", [[10**8], [10**18], [600, 600]])
def test_too_many_copies(copies):
    sites = [{"name": str(n), "checkpoint": "accord/idefics3", "copies": each} for n, each in enumerate(copies)]
    with pytest.raises(RecipeError, match=r"a recipe has at most 1,000 sites, got .* lower copies"):
        recipe(sites=sites)


def test_copies_of_a_site(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(
        'name = "x"\n[dealing]\nalpha = 0.1\n'
        '[[sites]]\nname = "a"\ncheckpoint = "accord/idefics3"\ncopies = 2\n'
        '[[sites]]\nname = "b"\ncheckpoint = "accord/llava-clip-llama"\n'
    )
    found = load_recipe(file)
    assert [(site.name, site.checkpoint) for site in found.sites] == [
        ("a-1", "accord/idefics3"),
        ("a-2", "accord/idefics3"),
        ("b", "accord/llava-clip-llama"),
    ]
    assert again(found) == found


@pytest.mark.parametrize("copies", ["0", "true", "2.5", '"two"'])
def test_copies_that_are_no_number(tmp_path, copies):
    file = tmp_path / "x.toml"
    file.write_text(f'name = "x"\n[[sites]]\nname = "a"\ncheckpoint = "accord/idefics3"\ncopies = {copies}\n')
    with pytest.raises(RecipeError, match="copies of site 'a' must be a whole number of at least 1"):
        load_recipe(file)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A package whose import leaves a file behind; returns whether that has happened."""
    (tmp_path / "trap_package.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\nMETHOD = print\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: (tmp_path / "imported").exists()
    sys.modules.pop("trap_package", None)


NAMED = ({"method": "trap_package:METHOD"}, {"compare": ["trap_package:METHOD"]}, {"uses": ["trap_package:METHOD"]})


@pytest.mark.parametrize("named", NAMED, ids=lambda named: next(iter(named)))
def test_to_read_a_recipe_imports_nothing_that_it_names(trap, named):
    """Its tables pass unread, and are written as they came; only `import_methods` imports, and then reads strictly."""
    found = recipe(**named, mine={"floor": 0.5, "deep": {"list": [1, 2]}}, fedit={"mu": 0.5})
    assert found.tables["mine"] == {"floor": 0.5, "deep": {"list": [1, 2]}}
    assert found.tables["fedit"] == FedITConfig(mu=0.5) and again(found) == found
    assert not trap()
    with pytest.raises(RecipeError, match="mine is not a setting; did you mean"):
        import_methods(found)
    assert trap()


@pytest.mark.parametrize("named", NAMED, ids=lambda named: next(iter(named)))
def test_commands_that_run_no_method_import_none(trap, named, tmp_path, monkeypatch):
    """A recipe from elsewhere at a site: its training, its check, its preferences, and pre-training."""
    file, seen = tmp_path / "x.toml", []
    file.write_text(tomli_w.dumps({"name": "x", "sites": SITES, **named, "mine": {"floor": 0.5}}))
    monkeypatch.setattr("accord.pipeline.train_site", lambda job, name: seen.append(name))
    monkeypatch.setattr("accord.pipeline.train_router", lambda job: seen.append("router"))
    monkeypatch.setattr("accord.stages.sites.site_pairs", lambda job, name: [])
    monkeypatch.setattr("accord.models.pretrain.pretrain_families", lambda *given, **more: [])
    out = ["--out", str(tmp_path / "run")]
    for command in (
        ["site", "train", file, "a", *out],
        ["router", "train", file, *out],
        ["preferences", file, "a", tmp_path / "pairs.jsonl"],
        ["pretrain", tmp_path / "made", "--recipe", file],
    ):
        monkeypatch.setattr("sys.argv", ["accord", *map(str, command)])
        accord.cli.main()
        assert not trap()
    assert seen == ["a", "router"]
    with pytest.raises(RunError, match="has no finished reward model of site a"):  # what check and join read
        read_site_folder(tmp_path / "run", "a")
    assert not trap()


def test_what_cannot_be_imported_is_told_where_methods_are_run():
    with pytest.raises(RecipeError, match="the method 'no_such_module:METHOD' cannot be imported"):
        import_methods(recipe(method="no_such_module:METHOD"))


def test_what_an_older_accord_stored_is_renewed(tmp_path):
    """It lacks a setting of today; and what is no recipe at all is left alone."""
    path = tmp_path / "recipe.toml"
    path.write_text(accord.cli.DEMO.read_text())
    today = dump_recipe(load_recipe(path))
    assert today.count("leave_out = false\n") == 1
    assert renewed(today.replace("leave_out = false\n", "")) == today == renewed(today)
    assert renewed("of_yesterday = 1\n") == "of_yesterday = 1\n"
