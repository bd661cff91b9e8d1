import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from accord.data.easy_vqa import load_easy_vqa
from accord.errors import DataError, RunError
from accord.recipe import EncoderConfig, Policy, Prompts, Source
from accord.runs import Run
from accord.stages.alignment import memory_file
from accord.stages.job import load_questions, scalars

SPLITS = ("private", "public", "dev", "test")


def one_each(kind="colour"):
    return [(split, kind, "red") for split in SPLITS]


def test_sources_are_joined_by_split(vqa):
    """Two folders with one question a split: two a split; the folder's name is the domain."""
    sources = [Source(kind="folder", path=vqa(name, one_each())) for name in ("x-ray", "indoor")]
    questions = load_questions(sources)
    assert {split: [q.domain for q in items] for split, items in questions.items()} == {
        split: ["x-ray", "indoor"] for split in SPLITS
    }


def test_prompts_of_a_type_that_no_public_question_has(job, ask):
    job.recipe = replace(job.recipe, prompts=Prompts(question_types=("color",)))
    job.questions = {"public": [ask(0, question_type="colour"), ask(1, question_type="shape", domain="toys")]}
    with pytest.raises(DataError, match=r"no public question is of 'color', and they are of colour, toys/shape; corr"):
        _ = job.prompts


def test_a_domain_can_be_renamed_and_types_carry_it(vqa):
    path = vqa("set-7", one_each())
    (q,) = load_questions([Source(kind="folder", path=path, domain="x-ray", type_prefix=True)])["dev"]
    assert (q.domain, q.question_type) == ("x-ray", "x-ray/colour")
    (q,) = load_questions([Source(kind="folder", path=path)])["dev"]
    assert (q.domain, q.question_type) == ("set-7", "colour")


def test_fractions_deal_out_a_set_without_splits(vqa):
    """60 images by shares of a quarter: every one lands once, and whole splits come from nowhere else."""
    path = vqa("plain", [("test", "colour", "red")] * 60)
    questions = load_questions([Source(kind="folder", path=path, fractions=dict.fromkeys(SPLITS, 0.25))])
    assert sum(map(len, questions.values())) == 60 and set(questions) == set(SPLITS)
    assert all(q.split == split for split, items in questions.items() for q in items)
    again = load_questions([Source(kind="folder", path=path, fractions=dict.fromkeys(SPLITS, 0.25))])
    assert again == questions


@pytest.mark.parametrize("missing", SPLITS)
def test_a_split_that_the_job_needs_is_asked_for(vqa, missing):
    path = vqa("folder", [row for row in one_each() if row[0] != missing])
    with pytest.raises(DataError, match=f"no question has the split '{missing}'") as error:
        load_questions([Source(kind="folder", path=path)])
    assert "`fractions`" in str(error.value) and f"'{missing}': " not in str(error.value)


def test_easy_vqa_needs_nothing_more():
    """Its own splits: 1,000, 1,800, 200 and 1,000 training images, and the 1,000 of its test side."""
    questions = load_questions([Source()])
    images = {split: len({q.image for q in items}) for split, items in questions.items()}
    assert images == {"base": 1000, "private": 1800, "dev": 200, "public": 1000, "test": 1000}
    assert Counter(q.split for q in load_easy_vqa()) == {split: len(items) for split, items in questions.items()}


def test_a_site_is_found_by_name(job):
    assert job.site("b").question_types == ("number",)
    with pytest.raises(RunError, match="no site 'c'; it has a, b"):
        job.site("c")


def test_what_an_earlier_stage_should_have_made_is_needed(job):
    """A folder of a stage that is not done is as good as none: it may be of the sites as they were before."""
    need = ("router", "accord router train RECIPE", "router")
    with pytest.raises(RunError, match="router is missing; make it with `accord router train RECIPE`"):
        job.need(*need)
    with job.doing("router"):
        (job.path / "router").mkdir()
        with pytest.raises(RunError, match="router is out of date; make it with `accord router train RECIPE`"):
            job.need(*need)
    assert job.need(*need) == job.path / "router"
    with job.doing("site a"):
        pass
    with pytest.raises(RunError, match="router is out of date"):
        job.need(*need)


@pytest.fixture
def bring(job, vqa):
    """Return a function that gives both sites a file of their own; without private questions, but for those named."""

    def set_up(*private, **settings):
        rows = [*((split, "colour", "red") for split in ("public", "dev", "test")), *private]
        sites = tuple(replace(site, preferences="pairs.jsonl", **settings) for site in job.recipe.sites)
        source = Source(kind="folder", path=vqa("folder", rows))
        job.recipe = replace(job.recipe, sites=sites, questions=(source,))
        return job

    return set_up


def test_sites_with_pairs_need_no_private_questions(bring):
    job = bring(finetune=None)
    assert job.private == {"a": [], "b": []} and set(job.questions) == {"public", "dev", "test"}


def test_sites_that_fine_tune_need_private_questions(bring):
    with pytest.raises(DataError, match="no question has the split 'private'"):
        _ = bring().private


def test_questions_are_dealt_to_the_sites_that_need_them(bring):
    """Both want the one type there is: without b, which needs none, all 20 images are a's."""
    job = bring(*[("private", "colour", "blue")] * 20, finetune=None, question_types=("colour",))
    a, b = job.recipe.sites
    job.recipe = replace(job.recipe, sites=(replace(a, preferences=""), b))
    assert {name: len(held) for name, held in job.private.items()} == {"a": 20, "b": 0}


def test_the_numbers_of_a_record_have_names():
    record = {"stage": "site", "site": "a", "step": 3, "loss": 0.5, "ranking": {"colour": 1}, "note": "x"}
    assert dict(scalars(record)) == {"site/a/loss": 0.5, "site/a/ranking/colour": 1.0}


def test_the_same_id_in_two_sources_is_told_apart_by_domain(vqa):
    """Two hospitals both count from 0: without their names, one's picture would be scored for the other's question."""
    rows = one_each()
    first, second = vqa("a", rows), vqa("b", [(split, kind, "black") for split, kind, _ in rows])
    file = Path(second, "questions.jsonl")
    file.write_text(file.read_text().replace('"b-', '"a-'))
    questions = load_questions([Source("folder", first), Source("folder", second)])
    assert [q.id for q in questions["dev"]] == ["a/a-2", "b/a-2"]
    with pytest.raises(DataError, match=r"question id 'h/a-0' is in sources 1 and 2, .* different `domain`s"):
        load_questions([Source("folder", first, domain="h"), Source("folder", second, domain="h")])


def test_an_image_in_two_splits_is_refused(vqa):
    folder = vqa("a", [(split, "colour", "red") for split in SPLITS])
    shutil.copy(f"{folder}/0.png", f"{folder}/3.png")
    with pytest.raises(DataError, match=r"the split '\w+' and the split '\w+' share 1 images, .*png among them"):
        load_questions([Source("folder", folder)])


def test_checkpoints_of_a_stage_that_was_broken_off_stay_for_it(job):
    (job.path / "checkpoints" / "align").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), job.doing("align"):
            raise KeyboardInterrupt
        assert (job.path / "checkpoints" / "align").exists()
    with job.doing("site a"):
        assert not (job.path / "checkpoints" / "align").exists()


def test_what_was_built_on_a_repeated_stage_is_done_no_longer(job):
    """Sites do not stand on each other; comparisons stand on the sites and on the router, which some of them use."""
    stages = ["site a", "site b", "router", "align", "compare average", "evaluation"]
    for stage in stages:
        with job.doing(stage):
            pass
    for stage, left in {
        "align": {"site a", "site b", "router", "compare average", "align"},
        "router": {"site a", "site b", "router"},
        "site a": {"site a", "site b"},
    }.items():
        (job.path / "checkpoints" / "align").mkdir(parents=True, exist_ok=True)
        (job.path / "checkpoints" / "compare average").mkdir(parents=True, exist_ok=True)
        with job.doing(stage):
            assert not job.run.done(stage)
        assert {done for done in stages if job.run.done(done)} == left
        assert not (job.path / "checkpoints" / "align").exists()
        assert not (job.path / "checkpoints" / "compare average").exists()
    assert json.loads((job.path / "stages.json").read_text())["done"] == ["site b", "site a"]


def test_what_is_kept_goes_with_what_it_was_made_from(job):
    """Training a site again drops both, the router again what came after it; alignment and comparisons drop neither."""

    def keep():
        for after in ("site", "router"):
            file = job.kept("x.txt", after=after)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    for stage, left in (
        ("align", {"site", "router"}),
        ("compare mor", {"site", "router"}),
        ("evaluation", {"site", "router"}),
        ("router", {"site"}),
        ("site a", set()),
    ):
        keep()
        with job.doing(stage):
            pass
        assert {after for after in ("site", "router") if job.kept("x.txt", after=after).exists()} == left


@pytest.mark.parametrize(
    ("needs", "after_router", "after_site"),
    [
        (None, False, False),
        ({"sites", "router"}, False, False),
        ({"sites", "answers"}, True, False),
        ({"private"}, True, True),
    ],
)
def test_only_what_stands_on_what_was_made_again_is_removed(job, needs, after_router, after_site):
    """What a reward had learnt, and the checkpoints of a stage that was broken off, of this process or another."""
    memory, left = memory_file(job.path, "align"), job.path / "checkpoints" / "compare mine"
    for stage, stays in (("router", after_router), ("site a", after_site)):
        with job.doing("align", needs=needs):
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.touch()
        with pytest.raises(KeyboardInterrupt), job.doing("compare mine", needs=needs):
            left.mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt
        job.run.close()
        job.run = Run.resume(job.path, (job.path / "recipe.toml").read_text())
        with job.doing(stage):
            pass
        assert (memory.exists(), job.run.done("align")) == (stays, stays)
        # What a method has kept of the sites' data goes with the sites, and a checkpoint that was made with it too.
        assert left.exists() == (stays and not (needs == {"private"} and stage == "site a"))


@pytest.mark.parametrize("same", [True, False])
def test_the_encoder_is_the_policy_unless_the_recipe_names_another(job, checkpoints, same):
    """Of the same name it is the same model, loaded once; of another name they share nothing."""
    policy, other = checkpoints["llava-clip-llama"], checkpoints["idefics3"]
    encoder = EncoderConfig(policy if same else other)
    job.recipe = replace(job.recipe, policy=Policy(policy), encoder=encoder)
    assert (job.policy[0] is job.encoder.model) is same
    assert (job.policy[1] is job.encoder.processor) is same
    assert type(job.encoder.model).__name__.startswith("Llava" if same else "Idefics3")
    assert type(job.policy[0]).__name__.startswith("Llava")
    assert not any(p.requires_grad for p in job.policy[0].parameters()) and not job.policy[0].training
