"""What is wrong with the data is said before anything is trained, and all of it at once."""

import json
import warnings
from dataclasses import replace

import pytest

from accord import pipeline
from accord.attacks.scores import Attack
from accord.cli import main
from accord.errors import CheckpointError, DataError, DataWarning
from accord.models.load import load_tokenizer
from accord.recipe import Recipe
from accord.recipe_file import load_recipe
from accord.stages.data_check import check_data, too_long, warn_of_long_answers, warn_of_triggers

RECIPE = """
name = "check"
disjoint_images = false
threads = 1
[[questions]]
kind = "folder"
path = "data"
[[sites]]
name = "a"
checkpoint = "accord/idefics3"
{site}
[alignment]
max_completion_length = 3
"""
SPLITS = ("private", "private", "public", "dev", "test")


@pytest.fixture
def write(tmp_path, solid):
    """Write a recipe, and 25 questions about as many squares in a folder beside it; return the recipe's path."""

    def make(site="", pairs=(), **cells):
        folder = tmp_path / "data"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        rows = []
        for n in range(25):
            (folder / "images" / f"{n}.png").write_bytes(solid(n))
            rows.append(
                {"id": n, "image": f"images/{n}.png", "question": "?", "answer": "red", "split": SPLITS[n % 5]}
                | {name: value(n) for name, value in cells.items()}
            )
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        (tmp_path / "recipe.toml").write_text(RECIPE.format(site=site))
        return tmp_path / "recipe.toml"

    return make


@pytest.fixture
def solid():
    import io

    from PIL import Image

    def picture(n):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (n, 2 * n, 3 * n)).save(buffer, "PNG")
        return buffer.getvalue()

    return picture


def check(path, monkeypatch, capsys):
    """Return the status and what was printed after the plan."""
    monkeypatch.setattr("sys.argv", ["accord", "plan", "--check", str(path)])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out.partition("\ndata\n")[2]


def test_paths_are_found_beside_the_recipe(write, monkeypatch, capsys, tmp_path):
    """From any folder; one in the current folder goes before."""
    path = write()
    monkeypatch.chdir("/")
    assert load_recipe(path).questions[0].path == str(tmp_path / "data")
    status, said = check(path, monkeypatch, capsys)
    assert status == 0 and "nothing is wrong with it" in said
    assert "split private        10 questions about 10 images: all 10" in said
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path).questions[0].path == "data"


def test_a_path_that_is_nowhere_is_shown_as_it_was_tried(write, monkeypatch, tmp_path):
    path = write()
    path.write_text(path.read_text().replace('"data"', '"gone"'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"gone/questions\.jsonl: cannot .*current folder \(tried {tmp_path}/gone/"):
        check_data_or_raise(path)


def check_data_or_raise(path):
    (problem,) = check_data(load_recipe(path)).problems
    raise DataError(problem)


def test_a_base_names_its_paths_from_its_own_folder(write, monkeypatch, tmp_path):
    base = write()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mine.toml").write_text('base = "../recipe.toml"\nname = "mine"\n')
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "more" / "mine.toml").questions == load_recipe(base).questions


def test_answers_over_the_limit(write, monkeypatch, capsys):
    """6 of 15 in public, dev and test: a byte a token in Chinese, 3 for each of 2 signs, 6 > 3; one may be short."""
    path = write(answer=lambda n: "红色" if n % 5 == 2 or n == 3 else ["红色", "red"] if n == 4 else "red")
    status, said = check(path, monkeypatch, capsys)
    assert status == 0
    assert "warning: 40% of the reference answers (6 of 15 in public, dev, test) need more than" in said
    assert "max_completion_length = 3 tokens, up to 6 as in '红色'" in said
    assert "raise alignment.max_completion_length to 7" in said


def test_a_run_warns_of_many_and_not_of_a_few(ask):
    """1 of 25 is 4 %, below 5; 2 are 8 %."""
    recipe, tokenizer = Recipe("x", load_demo().sites), load_tokenizer("accord/llava-clip-llama")
    recipe = replace(recipe, alignment=replace(recipe.alignment, max_completion_length=3))
    questions = [ask(n) for n in range(24)]
    assert too_long(recipe, {"public": [*questions, ask(24, "red", answer="红色")]}, tokenizer, least=0.05) is None
    two = [*questions[1:], *(ask(n, "red", answer="红色") for n in (24, 25))]
    said = too_long(recipe, {"public": two}, tokenizer, least=0.05)
    assert said is not None and said.startswith("8% of the reference answers (2 of 25 in")
    assert too_long(recipe, {"private": two}, tokenizer, least=0.05) is None  # nobody asks the policy these


def load_demo():
    from accord.cli import DEMO

    return load_recipe(DEMO)


def test_a_run_warns_before_it_trains(job, ask, monkeypatch):
    job.questions = {"public": [ask(0, answer="红色")], "dev": [], "test": []}
    with pytest.warns(DataWarning, match="100% of the reference answers"):
        warn_of_long_answers(job)

    def train(_):
        raise RuntimeError("it trains")

    monkeypatch.setattr(pipeline, "train_sites", train)
    with pytest.warns(DataWarning, match="need more than"), pytest.raises(RuntimeError, match="it trains"):
        pipeline.execute(job)


PAIR = {"prompt": "which?", "chosen": "red", "rejected": "blue"}


def test_every_fault_is_said_at_once(write, monkeypatch, capsys):
    """Several images, which a run tries, an image that is missing, and answers over the limit."""
    pairs = [{**PAIR, "images": [f"images/{n}.png", f"images/{n + 1}.png"]} for n in range(0, 20, 2)]
    path = write(
        'preferences = "data/pairs.jsonl"',
        pairs,
        image=lambda n: "images/gone.png" if n == 0 else f"images/{n}.png",
        answer=lambda n: "红色",
    )
    path.write_text(path.read_text().replace('"data/pairs', f'"{path.parent}/data/pairs'))
    status, said = check(path, monkeypatch, capsys)
    assert status == 2
    assert "problem: the preferences of site 'a' and the split 'public' share" in said
    assert "10 preference pairs of its own about 20 images (10 about several, which a run tries with each model" in said
    assert "warning:" in said and "left out 1 of 25 rows" in said and "gone.png" in said
    assert "100% of the reference answers" in said


def test_nothing_trains_on_several_images_where_the_model_takes_one(write, monkeypatch):
    """Not even the backbone that comes before the reward model."""
    own = [n for n in range(25) if SPLITS[n % 5] in ("base", "private")]
    pairs = [{**PAIR, "images": [f"images/{n}.png", f"images/{own[0]}.png"]} for n in own[1:]]
    path = write('preferences = "data/pairs.jsonl"', pairs)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr("accord.stages.sites.finetune", None)
    tried = []

    def single(checkpoint, *, several):
        tried.append(several)
        raise CheckpointError(f"{checkpoint} takes one image")

    monkeypatch.setattr("accord.stages.sites.try_checkpoint", single)
    monkeypatch.setattr("sys.argv", ["accord", "site", "train", str(path), "a", "--quiet", "--out", "run"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert tried == [True]


def test_rows_that_cannot_be_used_are_a_problem(write, monkeypatch, capsys):
    path = write(image=lambda n: f"https://example.org/{n}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, said = check(path, monkeypatch, capsys)
    assert status == 2 and "problem:" in said and "is a URL, and nothing is fetched" in said


def test_what_hidden_questions_lack(write, monkeypatch, capsys):
    """The server has five labelled questions of type a; prompts are first all of type c, then of types a and b."""
    methods = 'method = "canary"\ncompare = ["canary-mean"]\n'
    splits = ("base", "private", "public", "dev", "test")
    path = write(split=lambda n: splits[n % 5], question_type=lambda n: "c" if n % 5 == 2 else "a")
    without = path.read_text()
    assert check(path, monkeypatch, capsys)[0] == 0
    path.write_text(methods + without)
    status, said = check(path, monkeypatch, capsys)
    assert "hidden questions" not in said
    assert status == 2 and said.count("the server has 5 labelled questions, and none of a type that the") == 1
    write(split=lambda n: splits[n % 5], question_type=lambda n: "ab"[n // 5 % 2] if n % 5 == 2 else "a")
    path.write_text(methods + without)
    status, said = check(path, monkeypatch, capsys)
    assert status == 0 and said.count("no hidden question is of the types 'b', which the alignment asks") == 1
    assert "the server has 5 questions for canaries, and 300 steps ask 900: from step 2 on no site is watched" in said
    assert said.count("  hidden questions     5 at most, of 900 that the steps ask: a 5, b 0\n") == 1
    path.write_text(methods + without.replace("[alignment]\n", "[alignment]\nsteps = 1\n"))
    assert (
        "  hidden questions     3 at most, of 3 that the steps ask: a 3, b 0\n" in check(path, monkeypatch, capsys)[1]
    )


SPLITS_WITH_BASE = ("base", "private", "public", "dev", "test")
NEVER = "site 'a' lies only where a question has the words trigger = "


@pytest.mark.parametrize(
    "kind, told",
    [
        ('kind = "flip"', {"sides": 0, "colour": 0, "Sides": 1, "which": 1, "test": 1}),
        ('kind = "poison", target = "red"', {"sides": 1, "colour": 1, "Sides": 1, "which": 0, "test": 1}),
    ],
)
def test_a_trigger_that_no_question_has(write, monkeypatch, capsys, kind, told):
    """Scores are of the public questions and the server's labelled ones, poison of the site's own."""
    texts = ("what colour?", "which?", "how many sides?", "dev?", "a test?")
    for trigger, count in told.items():
        path = write(
            f'attack = {{ {kind}, trigger = "{trigger}" }}',
            split=lambda n: SPLITS_WITH_BASE[n % 5],
            question=lambda n: texts[n % 5],
        )
        status, said = check(path, monkeypatch, capsys)
        assert (status, said.count(f"warning: {NEVER}'{trigger}', and no question")) == (0, count)


def test_poison_of_a_sites_own_pairs_is_looked_for_in_these(write, monkeypatch, capsys):
    for trigger, count in (("which", 0), ("?!", 1)):
        attack = f'attack = {{ kind = "poison", target = "red", trigger = "{trigger}" }}'
        path = write(f'preferences = "data/pairs.jsonl"\n{attack}', [PAIR] * 10)
        monkeypatch.chdir(path.parent)
        status, said = check(path, monkeypatch, capsys)
        assert (status, said.count("no question about which it has pairs has them: it never lies")) == (
            0,
            count,
        )


def test_a_run_tells_of_a_trigger_before_it_trains(job, ask, monkeypatch):
    """Where sites are elsewhere, so are their questions, and of poison nothing is told."""
    job.questions = {"public": [ask(0)], "dev": [], "test": []}
    sites = [replace(site, attack=Attack("poison", target="red", trigger="shape")) for site in job.recipe.sites]
    job.recipe = replace(job.recipe, sites=tuple(sites))
    warn_of_triggers(job, held=False)  # warnings are errors
    job.recipe = replace(job.recipe, sites=tuple(replace(site, attack=Attack(trigger="shape")) for site in sites))

    def train(_):
        raise RuntimeError("it trains")

    monkeypatch.setattr(pipeline, "train_sites", train)
    with (
        pytest.warns(DataWarning, match="has them: it never lies; write trigger to"),
        pytest.raises(RuntimeError, match="it trains"),
    ):
        pipeline.execute(job)
