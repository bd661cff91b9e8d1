"""Sites that bring pairs people judged: in TRL's form, with nothing said of how they came about."""

import json
import shutil

import pytest

from accord.evaluation.summary import read_summary
from accord.runs import read_lines

KINDS = {"colour": "colour", "shape": "shape", "yes-no": "yes/no"}


@pytest.fixture
def brought(vqa_folder, tmp_path):
    """The questions in a folder of their own, the private ones taken out, and by site a file of pairs about them."""
    folder = tmp_path / "shapes"
    shutil.copytree(vqa_folder, folder)
    rows = read_lines(folder / "questions.jsonl")
    files = {}
    for number, (site, kind) in enumerate(KINDS.items()):
        mine = [row for row in rows if row["split"] == "private" and row["question_type"] == kind]
        # Every site its own pictures: of all images in order, each third.
        pictures = set(sorted({row["image"] for row in rows if row["split"] == "private"})[number::3])
        answers = sorted({row["answer"] for row in mine})
        lines = []
        for row in mine:
            if row["image"] in pictures:
                pair = {
                    "prompt": [
                        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
                    ],
                    "chosen": [{"role": "assistant", "content": row["answer"]}],
                    "rejected": [{"role": "assistant", "content": next(a for a in answers if a != row["answer"])}],
                    "images": [row["image"]],
                }
                lines.append(json.dumps(pair) + "\n")
        files[site] = folder / f"{site}.jsonl"
        files[site].write_text("".join(lines))
    return folder, rows, files


def keep(folder, rows, wanted):
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if wanted(row)))


def recipe_of(write_recipe, tiny_recipe, folder, files, **settings):
    """Return the tiny recipe in which the sites of `files` bring their pairs."""
    sites = [
        {**site, "preferences": str(files[site["name"]]), **settings} if site["name"] in files else site
        for site in tiny_recipe["sites"]
    ]
    return write_recipe(folder / "own.toml", sites=sites, questions=[{"kind": "folder", "path": str(folder)}])


def test_a_federation_of_people_needs_no_private_questions(accord, brought, write_recipe, tiny_recipe, tmp_path):
    """A whole run without one: the page says that people judged. No dev question is of site shape, so nothing ranks it.

    Its vocabulary of answers is its pairs', and those of the base questions.
    """
    folder, rows, files = brought
    keep(folder, rows, lambda r: r["split"] != "private" and (r["split"], r["question_type"]) != ("dev", "shape"))
    recipe = recipe_of(write_recipe, tiny_recipe, folder, files, finetune=False)
    run = tmp_path / "run"
    status, _, err = accord("run", recipe, "--out", run, "--quiet")
    assert (status, err) == (0, "")
    summary = read_summary(run / "summary.json")
    assert not summary.constructed_preferences
    pairs = {name: len(file.read_text().splitlines()) for name, file in files.items()}
    assert {s.name: (s.questions, s.pairs) for s in summary.sites} == {name: (0, n) for name, n in pairs.items()}
    assert {s.name: set(s.ranking.by_type) for s in summary.sites} == {
        "colour": {"colour"},
        "shape": set(),
        "yes-no": {"yes/no"},
    }
    assert [s.ranking.macro is None for s in summary.sites] == [False, True, False]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "By the sites' account the pairs are people's judgements" in page.replace("&#39;", "'")
    assert "constructed from reference answers" not in page


def test_one_site_of_people_beside_others(accord, brought, write_recipe, tiny_recipe, tmp_path):
    """Its card says so, and the others' do not; it is dealt questions to fine-tune on, of other images than theirs."""
    folder, rows, files = brought
    taken = {json.loads(line)["images"][0] for line in files["colour"].read_text().splitlines()}
    keep(folder, rows, lambda r: r["image"] not in taken)
    recipe = recipe_of(write_recipe, tiny_recipe, folder, {"colour": files["colour"]})
    for site, constructed in (("colour", False), ("yes-no", True)):
        assert accord("site", "train", recipe, site, "--out", tmp_path / "run", "--quiet")[0] == 0
        card = json.loads((tmp_path / "run" / "sites" / site / "card.json").read_text())
        assert card["constructed"] is constructed and card["questions"] > 0 and card["pairs"] >= 8


@pytest.mark.parametrize("other", ["questions", "pairs"])
def test_an_image_at_two_sites_stops_the_run_before_it_trains(
    accord, brought, write_recipe, tiny_recipe, tmp_path, other
):
    """The last site's pairs are about an image of the questions dealt to another site, or of another site's pairs."""
    folder, rows, files = brought
    keep(folder, rows, lambda r: other == "questions" or r["split"] != "private")
    if other == "pairs":
        with files["yes-no"].open("a") as file:
            file.write(files["colour"].read_text().splitlines(keepends=True)[0])
    chosen = {"yes-no": files["yes-no"]} if other == "questions" else files
    settings = {} if other == "questions" else {"finetune": False}
    recipe = recipe_of(write_recipe, tiny_recipe, folder, chosen, **settings)
    status, _, err = accord("run", recipe, "--out", tmp_path / "run", "--quiet")
    assert status == 2 and "share" in err and "the preferences of site 'yes-no'" in err
    assert not (tmp_path / "run" / "sites").exists() and not (tmp_path / "run" / "timings.jsonl").exists()
