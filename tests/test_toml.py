"""A recipe is read strictly: what is not declared is refused, with its place and the nearest valid name."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.errors import RecipeError
from accord.federation.aggregation import Aggregation
from accord.methods.fedit import FedITConfig
from accord.routing.router import RouterConfig
from accord.toml import _LONG_KEY, build, dump_toml, load_toml


@dataclass(frozen=True)
class Site:
    name: str
    rank: int | None = None


@dataclass(frozen=True)
class Align:
    group_size: int = 8
    beta: float = 0.04
    mode: Literal["prompt", "completion"] = "prompt"
    rates: tuple[float, float] = (0.1, 0.2)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 to centre rewards, got {self.group_size}; raise it")


@dataclass(frozen=True)
class Recipe:
    name: str
    align: Align = field(default_factory=Align)
    sites: tuple[Site, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    by_name: dict[str, Site] = field(default_factory=dict)
    data: Path | None = None
    device: Literal["cpu", "cuda"] | int = "cpu"
    verbose: bool = False
    extra: Align | None = None


@dataclass(frozen=True)
class Deep:
    align: Align = Align()
    depth: int = 1


@dataclass(frozen=True)
class Around:
    deep: Deep = Deep(Align(16, 0.5), 3)
    made: Align = field(default_factory=lambda: Align(4, 0.25))
    either: Align | Site | None = Align(16, 0.5)


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return build(Recipe, load_toml(path))


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
        name = "demo"
        data = "vqa"
        device = 1
        verbose = true
        [align]
        beta = 1            # a whole number is a number
        rates = [1, 0.5]
        [[sites]]
        name = "colour"
        [[sites]]
        name = "shape"
        rank = 4
        [shares]
        colour = 0.25
        [by_name."site a"]
        name = "a"
        [extra]
        group_size = 2
        """,
    )
    assert recipe == Recipe(
        name="demo",
        align=Align(beta=1.0, rates=(1.0, 0.5)),
        sites=(Site("colour"), Site("shape", 4)),
        shares={"colour": 0.25},
        by_name={"site a": Site("a")},
        data=Path("vqa"),
        device=1,
        verbose=True,
        extra=Align(group_size=2),
    )
    assert type(recipe.align.beta) is float and recipe.data == Path("vqa")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'name = "a"\n[align]\ngroup_sise = 2',
            "align.group_sise is not a setting; did you mean group_size? valid in [al",
        ),
        ('name = "a"\n[align]\nGroup-Size = 2', "align.Group-Size is not a setting; did you mean group_size?"),
        (
            'name = "a"\n[alling]',
            "alling is not a setting; did you mean align? valid at the top: align, by_name, data,",
        ),
        ('name = "a"\nqqq = 1', "qqq is not a setting; valid at the top: align,"),
        (
            'name = "a"\n[[sites]]\nname = "x"\n[[sites]]\nnam = "y"',
            "sites[1].nam is not a setting; did you mean name?",
        ),
        ('name = "a"\n[[sites]]\nrank = 1', "sites[0].name is missing; add it, with a value that is a text"),
        ("", "name is missing"),
        ("name = 3", "name must be a text, got 3"),
        ('name = "a"\nverbose = 1', "verbose must be true or false, got 1"),
        ('name = "a"\nverbose = "true"', 'verbose must be true or false, got "true"'),
        ('name = "a"\n[align]\ngroup_size = true', "align.group_size must be a whole number, got true"),
        ('name = "a"\n[align]\ngroup_size = 8.0', "align.group_size must be a whole number, got 8.0"),
        ('name = "a"\n[align]\nbeta = "0.1"', 'align.beta must be a number, got "0.1"'),
        ('name = "a"\n[align]\nbeta = nan', "align.beta must be a number, got nan"),
        ('name = "a"\n[align]\nmode = "group"', 'align.mode must be one of "prompt", "completion", got "group"'),
        ('name = "a"\n[align]\nrates = [0.1]', "align.rates must be a list (a number, a number), got [0.1]"),
        ('name = "a"\n[align]\nrates = [0.1, "x"]', 'align.rates[1] must be a number, got "x"'),
        ('name = "a"\nsites = "colour"', 'sites must be a list (each a table), got "colour"'),
        ('name = "a"\nsites = ["colour"]', 'sites[0] must be a table, got "colour"'),
        ('name = "a"\nalign = 3', "align must be a table, got 3"),
        ('name = "a"\n[shares]\nx = "y"', 'shares.x must be a number, got "y"'),
        ('name = "a"\nshares = 3', "shares must be a table (each value a number), got 3"),
        ('name = "a"\ndevice = "tpu"', 'device must be one of "cpu", "cuda" or a whole number, got "tpu"'),
        ('name = "a"\n[data]\nx = 1', "data must be a path (text), got a table with x"),
        (
            'name = "a"\n[align]\ngroup_size = 1',
            "[align] group_size must be at least 2 to centre rewards, got 1; raise it",
        ),
        ('name = "a"\n[extra]\ngroup_size = 1', "[extra] group_size must be at least 2"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(message)


def test_a_table_within_leaves_the_rest_of_its_default_as_it_is() -> None:
    settings = build(RouterConfig, {"aggregation": {"bound": 10.0}}).aggregation
    assert settings == replace(RouterConfig().aggregation, bound=10.0) != Aggregation(bound=10.0)
    again = build(RouterConfig, {"aggregation": {"rule": "fedadam", "bound": 10.0}}).aggregation
    assert again == settings


def test_another_rule_has_other_defaults() -> None:
    """A step of 0.003 is FedAdam's; FedAvg with it would stand still."""
    assert build(RouterConfig, {"aggregation": {"rule": "fedavg"}}).aggregation == Aggregation("fedavg")


def test_a_table_two_deep_keeps_the_rest_of_the_default_around_it() -> None:
    assert build(Around, {"deep": {"align": {"beta": 1.0}}}).deep == Deep(Align(16, 1.0), 3)


def test_a_default_that_is_made_and_one_of_several_kinds_are_kept_too() -> None:
    assert build(Around, {"made": {"beta": 1.0}}).made == Align(4, 1.0)
    assert build(Around, {"either": {"beta": 1.0}}).either == Align(16, 1.0)
    assert build(Around, {"either": {"name": "a"}}).either == Site("a")
    assert build(Around, {"either": False}).either is None
    settings = build(FedITConfig, {"averaging": {"rounds": 2}}).averaging
    assert settings == replace(FedITConfig().averaging, rounds=2)


def test_a_table_within_a_recipe_keeps_its_place() -> None:
    with pytest.raises(RecipeError, match=r"^align\.mod is not a setting; did you mean mode\?"):
        build(Align, {"mod": 1}, "align")


def test_a_type_that_a_recipe_cannot_hold_is_a_fault_of_the_dataclass() -> None:
    @dataclass(frozen=True)
    class Odd:
        value: bytes

    with pytest.raises(TypeError, match="cannot hold a bytes"):
        build(Odd, {"value": "x"})


def test_a_file_that_is_not_toml_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with pytest.raises(RecipeError, match=r"recipe\.toml does not exist; check the path"):
        load_toml(path)
    path.write_text('name = "a"\nsteps = \n')
    with pytest.raises(RecipeError, match=r"recipe\.toml is not TOML: .*line 2.*; correct that line"):
        load_toml(path)
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_toml(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_toml(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "a"\r\nsteps = 1\r\n')
    assert load_toml(path) == {"name": "a", "steps": 1}


def test_false_is_none_of_it() -> None:
    """Where the default is something, leaving the key out cannot say None."""

    @dataclass(frozen=True)
    class Limit:
        steps: int | None = 5
        align: Align | None = Align()

    assert build(Limit, {"steps": False, "align": False}) == Limit(None, None)
    assert dump_toml(Limit(None, None)) == "steps = false\nalign = false\n"
    with pytest.raises(RecipeError, match="steps must be a whole number, got true"):
        build(Limit, {"steps": True})


finite = st.floats(allow_nan=False, allow_infinity=True)
text = st.text(st.characters(codec="utf-8"), max_size=20)
aligns = st.builds(
    Align,
    group_size=st.integers(2, 2**62),
    beta=finite,
    mode=st.sampled_from(["prompt", "completion"]),
    rates=st.tuples(finite, finite),
)
sites = st.builds(Site, name=text, rank=st.none() | st.integers(0, 99))


@settings(deadline=None)  # a busy machine is no fault of the law
@given(
    st.builds(
        Recipe,
        name=text,
        align=aligns,
        sites=st.lists(sites, max_size=3).map(tuple),
        shares=st.dictionaries(text, finite, max_size=3),
        by_name=st.dictionaries(text, sites, max_size=2),
        data=st.none() | st.sampled_from([Path("a/b"), Path("größe")]),
        device=st.sampled_from(["cpu", "cuda", 0, 3]),
        verbose=st.booleans(),
        extra=st.none() | aligns,
    )
)
def test_a_dumped_recipe_is_read_back_equal(recipe: Recipe) -> None:
    import tomllib

    assert build(Recipe, tomllib.loads(dump_toml(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = " + 200_000 * "[" + 200_000 * "]", "too deep"),
        ("a = " + 100_000 * "{a = ", "too deep"),
        (".".join(200_000 * ["a"]) + " = 1", "more than 32 parts in line 2"),
        ('name = "x"\n[' + " . ".join(100 * ['"a"']) + "]", "more than 32 parts in line 2"),
        ("a = " + 100_000 * "1", "is not TOML"),
        ("#" + 2**20 * "x", "longer than 1,048,576 bytes"),
        ("align.group_size = 9223372036854775808", "align.group_size must be a whole number, got 9223372036854775808"),
        ("[shares]\na = 1" + 400 * "0", "shares.a must be a number"),
    ],
    ids=["arrays", "tables", "parts", "quoted parts", "digits", "bytes", "an integer", "a float"],
)
def test_a_bomb_is_refused_at_once(tmp_path: Path, text: str, said: str) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError, match=re.escape(said)):
        load(tmp_path, text if "name" in text else f'name = "x"\n{text}')
    assert time.process_time() - began < 2


def test_the_pattern_of_long_keys_takes_no_time(tmp_path: Path) -> None:
    """A long word, many quotes and many dots are none of them a key of many parts."""
    began = time.process_time()
    for text in ("x" * 10**6, '"' * 10**6, "." * 10**6, "a." * 31 + "b", "a b . " * 10**5):
        assert not _LONG_KEY.search(text)
    assert _LONG_KEY.search("a." * 32 + "b")
    assert time.process_time() - began < 2


@pytest.mark.parametrize("place", ["/dev/zero", "pipe"])
def test_what_has_no_end_is_not_read(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="no ordinary file"):
        load_toml(tmp_path / place)
