"""The page is complete, self-contained, the same each time, and safe whatever the run says."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from accord.errors import RunError
from accord.evaluation.report import compare_runs, write_report
from accord.evaluation.summary import (
    AuditedSite,
    EvaluationSummary,
    ProjectorMeasure,
    ProjectorRound,
    ProjectorSite,
    ProjectorSummary,
    Ranking,
    RouterSummary,
    Summary,
    TrafficRow,
    TrustSummary,
    VqaAccuracy,
    accuracy,
    competence_summary,
)
from accord.rewards.certificate import UNCOVERED, Uncovered
from certificates import PROOF

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def _page(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, Page(text)


def _assert_self_contained(text: str, page: Page) -> None:
    allowed = {"http-equiv", "aria-label"}
    for tag, attributes in page.tags:
        assert tag not in {
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "video",
            "audio",
            "foreignobject",
        }
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name == "src":
                assert (value or "").startswith("data:image/")
            if name in {"href", "xlink:href"}:
                assert (value or "").startswith("#")
            if re.search(r"https?:|javascript:", value or ""):
                assert name in allowed or name.startswith("xmlns"), (tag, name, value)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", text))


def test_the_page_holds_every_part_in_order(make_run: Callable[..., Path]) -> None:
    run = make_run()
    text, page = _page(run)
    assert write_report(run) == run / "report.html"
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Accuracy before and after",
        "Compared with other methods",
        "Training curves",
        "Which site judged what",
        "Sites",
        "What crossed the border",
        "Gallery",
        "Time",
        "Reproduce",
    ]
    for words in ("three sites", "Accuracy rose from", "accord run recipe.toml", "central reward model", "beta = 0.04"):
        assert words in page.words
    assert sum(tag == "svg" for tag, _ in page.tags) == 10  # five figures, each for a desk and for a phone
    assert sum(tag == "img" for tag, _ in page.tags) == 8
    assert ("✓ right" in page.words) and ("✗ wrong" in page.words)


def test_who_is_good_at_what(make_run: Callable[..., Path], make_summary: Callable[..., Summary]) -> None:
    """Two figures more, a table, a sentence; hostile names stay text; nothing of it without competence."""
    known = competence_summary(
        [HOSTILE, "b"],
        ["colour", HOSTILE, "colour"],
        [[1, 0, 1], [math.nan] * 3],
        neighbours=2,
        experts=1,
    )
    text, page = _page(make_run("with", summary=make_summary(competence=known)))
    _assert_self_contained(text, page)
    assert "<h2>Who is good at what</h2>" in text
    assert "answers of their own models to 3 labelled questions" in page.words
    assert "No answers came from b" in page.words
    assert sum(tag == "svg" for tag, _ in page.tags) == 14
    without, _ = _page(make_run("without"))
    assert "Who is good at what" not in without


def test_nobody_is_known_to_be_good(make_run: Callable[..., Path], make_summary: Callable[..., Summary]) -> None:
    known = competence_summary(["a"], ["colour"], [[math.nan]], neighbours=1, experts=1)
    text, page = _page(make_run(summary=make_summary(competence=known)))
    assert "No answers came from a" in page.words and "Best at" not in page.words
    assert 'aria-label="Which of the server' not in text


def test_who_may_be_poisoning_the_router(make_run: Callable[..., Path], make_summary: Callable[..., Summary]) -> None:
    """Each judged site has a row, and one that was named a sentence; nothing of it without an audit."""
    audit = {HOSTILE: AuditedSite(-1.25, 0.5, 3), "b": AuditedSite(2.0, -0.25, 0)}
    router = dataclasses.replace(make_summary().router or RouterSummary(2, 0.5, 10), audit=audit)
    text, page = _page(make_run("with", summary=make_summary(router=router)))
    _assert_self_contained(text, page)
    assert "<h2>The router's audit</h2>" in text and "was named after round 3." in page.words
    assert "-1.25" in page.words and "No site was named" not in page.words
    honest = dataclasses.replace(router, audit={"b": audit["b"]})
    assert "No site was named." in _page(make_run("honest", summary=make_summary(router=honest)))[1].words
    assert "The router's audit" not in _page(make_run("without"))[0]


@pytest.mark.parametrize(("steps", "open_to"), [(0, "shared training"), (46, "other training")])
def test_what_a_certificate_covers(
    make_run: Callable[..., Path], make_summary: Callable[..., Summary], steps: int, open_to: Uncovered
) -> None:
    """The router's steps and noise are told where they are covered; what is not covered is told anyway."""
    proof = msgspec.structs.replace(PROOF, uncovered=(open_to,), router=1.93 if steps else 0.0, router_steps=steps)
    summary = make_summary()
    sites = (dataclasses.replace(summary.sites[0], privacy=proof), *summary.sites[1:])
    text, page = _page(make_run(summary=make_summary(sites=sites)))
    told = "Updates of the router are covered, too: at most 46 steps on such samples, σ = 1.93, clip 0.5." in text
    assert told == bool(steps) and UNCOVERED[open_to] in page.words


def test_planted_liars_and_contradicted_sites_are_told(
    make_run: Callable[..., Path], make_summary: Callable[..., Summary]
) -> None:
    """Nobody may take a trial for an honest federation."""
    honest = make_summary()
    assert "A trial:" not in _page(make_run("honest", summary=honest))[1].words
    first, second, *others = honest.sites
    sites = (dataclasses.replace(first, attack="flip"), dataclasses.replace(second, attack="mimic"), *others)
    asked = {site.name: {"colour": 0.75} for site in sites}
    trust = TrustSummary(60, asked, dict.fromkeys(asked, ()), {first.name: ("colour",)})
    text, page = _page(make_run("trial", summary=make_summary(sites=sites, trust=trust)))
    _assert_self_contained(text, page)
    told = f"by the recipe {first.name} lies (<code>flip</code>), {second.name} lies (<code>mimic</code>). No figure of"
    assert f"<strong>A trial:</strong> {told}" in " ".join(text.split())
    assert "was contradicted on ordinary questions by about half or more of the trusted sites" in page.words
    assert text.count("75 %, contradicted") == 1


def test_how_the_projector_was_trained(make_run: Callable[..., Path], make_summary: Callable[..., Summary]) -> None:
    """A row a round, a site that was absent, and where there are silos a figure of them; hostile names stay text."""
    measure = ProjectorMeasure(1.25, 2.5, accuracy({HOSTILE: (1, 2)}), 0.5)
    rounds = (
        ProjectorRound(-3.0, {HOSTILE: ProjectorSite(4, 0.5, 7.25, 0.75), "b": ProjectorSite(4, 0.5, None, 0.25)}),
        ProjectorRound(0.5, {HOSTILE: ProjectorSite(4, 0.5, 7.25, 1.0)}, beta=0.5, cosine=0.25, lag=0.75),
    )
    told = ProjectorSummary("x", "federated", "fed-cmp", "plain", "random", 9, measure, measure, rounds)
    text, page = _page(make_run("without", summary=make_summary(projector=told)))
    _assert_self_contained(text, page)
    assert "0.75, 7.2" in page.words and "0.25, –" in page.words and ">absent<" in text
    for name, value in (("β", "0.50"), ("Cosine", "0.25"), ("Lag", "0.75")):
        assert f'<td data-label="{name}">{value}</td>' in text
    assert "first principal axis" not in page.words
    silos = {HOSTILE: ((0.0, 1.0), (2.0, 3.0)), "b": ((1.0, 1.0),)}
    drawn = make_summary(projector=dataclasses.replace(told, silos=silos))
    text, page = _page(make_run("with", summary=drawn))
    _assert_self_contained(text, page)
    assert "first principal axis" in page.words


def test_the_page_is_self_contained(make_run: Callable[..., Path]) -> None:
    text, page = _page(make_run())
    _assert_self_contained(text, page)
    policies = [tag[1]["content"] for tag in page.tags if tag[1].get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_the_same_folder_gives_the_same_bytes(make_run: Callable[..., Path]) -> None:
    one, two = write_report(make_run("one")), write_report(make_run("two"))
    first = one.read_bytes()
    assert first == two.read_bytes()
    assert write_report(one.parent).read_bytes() == first


def test_hostile_text_stays_text(make_run: Callable[..., Path], make_summary: Callable[..., Summary]) -> None:
    full = make_summary()
    hostile = accuracy({HOSTILE: (3, 9), "shape": (5, 9)})
    summary = dataclasses.replace(
        full,
        name=HOSTILE,
        created=HOSTILE,
        policy=dataclasses.replace(full.policy, checkpoint=HOSTILE, architecture=HOSTILE),
        sites=(dataclasses.replace(full.sites[0], name=HOSTILE, architecture=HOSTILE),),
        evaluation=EvaluationSummary(hostile, hostile, hostile, hostile, {HOSTILE: hostile}),
        routing={HOSTILE: {HOSTILE: 1.0}},
        traffic=(TrafficRow(HOSTILE, HOSTILE, 1, 10, 10, 1, 7),),
        seconds={HOSTILE: 1.0},
    )
    row = {
        "image": "gallery/0.png",
        "question": HOSTILE,
        "answer": HOSTILE,
        "question_type": HOSTILE,
        "before": HOSTILE,
        "after": "",
        "routed": {HOSTILE: 1.0},
        "scores": {HOSTILE: {"before": None, "after": 1.0}},
    }
    run = make_run(summary=summary, gallery=[row])
    (run / "recipe.toml").write_text(f"# {HOSTILE}\n</pre></details>")
    text, page = _page(run)
    _assert_self_contained(text, page)
    assert "<script" not in text and "<img src=x" not in text
    assert page.words.count(HOSTILE) >= 10
    assert sum(tag == "img" for tag, _ in page.tags) == 1


def test_a_run_with_little_to_show(make_run: Callable[..., Path], make_summary: Callable[..., Summary]) -> None:
    full = make_summary()
    evaluation = EvaluationSummary(None, full.evaluation.aligned, None, None, {})
    summary = dataclasses.replace(
        full, evaluation=evaluation, router=None, routing={}, traffic=(), seconds={}, peak_memory_bytes=None
    )
    run = make_run(summary=summary)
    for name in ("metrics.jsonl", "gallery.jsonl", "recipe.toml"):
        (run / name).unlink()
    text, page = _page(run)
    assert "No curve was recorded." in page.words
    assert "No routing was recorded." in page.words
    assert "No traffic was recorded." in page.words
    assert "Gallery" not in re.findall(r"<h2>(.*?)</h2>", text)


def test_prompts_that_failed_are_listed(make_run: Callable[..., Path]) -> None:
    run = make_run()
    assert "Prompts on which the alignment failed" not in _page(run)[0]
    kept = run / "kept" / "stage" / "align"
    kept.mkdir(parents=True)
    failures = {"q<1>": {"tries": 3, "reason": "ImageError: <b>"}, "q2": {"tries": 1, "reason": "ValueError: once"}}
    (kept / "failures.json").write_text(json.dumps(failures))
    text, _ = _page(run)
    assert "2 prompts made a step fail" in text and "1 of these failed three times and is no longer tried" in text
    assert "q&lt;1&gt;" in text and "ImageError: &lt;b&gt;" in text and "ValueError: once" in text


def test_a_site_without_a_ranking_has_a_dash(
    make_run: Callable[..., Path], make_summary: Callable[..., Summary]
) -> None:
    full = make_summary()
    unranked = dataclasses.replace(full.sites[0], ranking=Ranking(None, {}))
    text, _ = _page(make_run(summary=make_summary(sites=(unranked, *full.sites[1:]))))
    row = re.search(r'<tr><th scope="row">colour</th><td class="left architecture" .*?</tr>', text)
    assert row is not None and re.findall(r"<td [^>]*>(.*?)</td>", row[0])[-4:] == ["–"] * 4


def test_a_warning_stands_at_the_top(make_run: Callable[..., Path], make_summary: Callable[..., Summary]) -> None:
    before, after = accuracy({"colour": (60, 100)}), accuracy({"colour": (20, 100)})
    run = make_run(summary=make_summary(evaluation=EvaluationSummary(before, after, None, None, {})))
    text, _ = _page(run)
    assert text.index("reward hacking") < text.index("<h2>")


def test_an_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run folder .*accord run recipe.toml"):
        write_report(tmp_path / "nowhere")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("begun", "done", "missing"),
    [
        (["site"], None, "router"),
        (["site", "router"], ["site colour", "router"], "align"),
        (["site", "align"], ["site colour"], "align"),
        (["site", "router", "align"], ["site colour", "router", "align"], "evaluation"),
    ],
)
def test_an_unfinished_run_names_the_missing_stage(
    tmp_path: Path, begun: list[str], done: list[str] | None, missing: str
) -> None:
    lines = [{"stage": stage, "step": 1} | ({"site": "colour"} if stage == "site" else {}) for stage in begun]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done is not None:
        (tmp_path / "stages.json").write_text(json.dumps({"done": done}))
    with pytest.raises(RunError, match=rf"stage '{missing}' is missing.*--resume"):
        write_report(tmp_path)


@pytest.mark.parametrize("line", ['{"stage": "align", "st', "[1]", '{"stage": "align", "step": "two"}', '{"step": 1}'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "gallery.jsonl"])
def test_a_damaged_line_is_named(make_run: Callable[..., Path], name: str, line: str) -> None:
    run = make_run()
    lines = (run / name).read_text().splitlines()
    lines[2] = line
    (run / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=rf"{name}, line 3,"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_gallery_image_outside_the_run_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    (tmp_path / "secret.png").write_bytes((run / "gallery" / "0.png").read_bytes())
    text = (run / "gallery.jsonl").read_text()
    (run / "gallery.jsonl").write_text(text.replace("gallery/1.png", "../secret.png"))
    with pytest.raises(RunError, match="outside the run folder"):
        write_report(run)


def test_a_gallery_image_that_is_none_is_refused(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "gallery" / "1.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(RunError, match="neither PNG nor JPEG"):
        write_report(run)
    (run / "gallery" / "1.png").unlink()
    with pytest.raises(RunError, match="cannot read gallery image"):
        write_report(run)


def _seed(make_summary: Callable[..., Summary], seed: int, right: int) -> Summary:
    evaluation = EvaluationSummary(accuracy({"t": (5, 10)}), accuracy({"t": (right, 10)}), None, None, {})
    return make_summary(name="mixed | <b>", seed=seed, evaluation=evaluation)


def test_seeds_that_share_a_name_are_one_row(
    make_run: Callable[..., Path], make_summary: Callable[..., Summary]
) -> None:
    """After: 60, 70 and 80 %: mean 70, deviation √((100 + 0 + 100) / 2) = 10, half 4.3027 · 10 / √3 = 24.8.

    Before: 50 each, half 0.
    """
    runs = [make_run(f"s{seed}", summary=_seed(make_summary, seed, 6 + seed)) for seed in range(3)]
    table = compare_runs([*runs, make_run("other")]).splitlines()
    assert table[2] == (
        "| mixed \\| &lt;b> | 0, 1, 2 | 50.0 ± 0.0 → 70.0 ± 24.8 | +20.0 ± 24.8 | 50.0 ± 0.0 → 70.0 ± 24.8 "
        "| – → – | – → – | – → – |"
    )
    assert table[3].startswith("| three sites | 0 | 55.1 → 83.9 | +28.8 | – → – | 25.7 → 84.0 |")


def test_one_seed_twice_is_refused(make_run: Callable[..., Path]) -> None:
    with pytest.raises(RunError, match="seed 0"):
        compare_runs([make_run("one"), make_run("two")])


def test_vqa_accuracy_under_its_own_name(make_run: Callable[..., Path], make_summary: Callable[..., Summary]) -> None:
    """A part of the page, and a column of the comparison; neither where nobody asked for it."""
    vqa = {
        "base": VqaAccuracy(40, 0.25, 0.2, 0.3, {HOSTILE: 0.25}),
        "aligned": VqaAccuracy(40, 0.625, 0.5, 0.75, {HOSTILE: 0.625}),
        "shuffled_image": VqaAccuracy(40, 0.125, 0.1, 0.2, {HOSTILE: 0.125}),
    }
    full = make_summary()
    run = make_run("with", summary=make_summary(evaluation=dataclasses.replace(full.evaluation, vqa=vqa)))
    text, page = _page(run)
    _assert_self_contained(text, page)
    assert "<h2>VQA accuracy</h2>" in text and "40 of 1,200 test questions were answered by enough" in page.words
    rows = re.findall(r'<tr[^>]*><th scope="row">([^<]*)</th><td data-label="Mean over types, %">([\d.]+)', text)
    assert rows[:3] == [("before", "25.0"), ("after", "62.5"), ("shuffled image", "12.5")]
    table = compare_runs([run]).splitlines()
    assert table[0].endswith("| VQA accuracy before → after |") and table[2].endswith("| 25.0 → 62.5 |")
    without = make_run("without")
    assert "VQA accuracy" not in _page(without)[0] and "VQA accuracy" not in compare_runs([without])


def test_nothing_to_compare() -> None:
    with pytest.raises(RunError, match="at least one"):
        compare_runs([])
