"""A run folder as a finished run leaves it, small and without a model."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from accord.evaluation.summary import (
    EvaluationSummary,
    PolicySummary,
    Ranking,
    RouterSummary,
    SiteSummary,
    Summary,
    TrafficRow,
    accuracy,
    headline,
    write_summary,
)

TYPES = ("colour", "shape", "presence")


def _site(name: str, architecture: str, parameters: int, own: float) -> SiteSummary:
    by_type = {kind: own if kind == name else 0.52 for kind in TYPES}
    ranking = Ranking(sum(by_type.values()) / 3, by_type)
    return SiteSummary(name, architecture, f"models/{name}", parameters, 3000, 9000, ranking)


def build_summary(**changes: object) -> Summary:
    """Return the summary of a run that went well, with `changes` to its fields."""
    fields: dict[str, object] = {
        "schema_version": 1,
        "name": "three sites",
        "seed": 0,
        "accord_version": "0.1.0",
        "created": "2026-01-01T00:00:00Z",
        "constructed_preferences": True,
        "policy": PolicySummary("models/base", "LlavaForConditionalGeneration", 271_000),
        "sites": (
            _site("colour", "LlavaForConditionalGeneration", 271_000, 0.96),
            _site("shape", "Idefics3ForConditionalGeneration", 240_000, 0.89),
            _site("presence", "LlavaForConditionalGeneration", 790_000, 0.83),
        ),
        "router": RouterSummary(5, 0.991, 34_000),
        "evaluation": EvaluationSummary(
            base=accuracy({"colour": (77, 300), "shape": (241, 300), "presence": (355, 600)}),
            aligned=accuracy({"colour": (252, 300), "shape": (249, 300), "presence": (508, 600)}),
            question_only=accuracy({"colour": (36, 300), "shape": (104, 300), "presence": (420, 600)}),
            shuffled_image=accuracy({"colour": (41, 300), "shape": (111, 300), "presence": (330, 600)}),
            compare={
                "average of all sites": accuracy({"colour": (180, 300), "shape": (240, 300), "presence": (470, 600)}),
                "central reward model": accuracy({"colour": (262, 300), "shape": (251, 300), "presence": (510, 600)}),
                "one site alone": accuracy({"colour": (210, 300), "shape": (190, 300), "presence": (380, 600)}),
            },
        ),
        "routing": {
            "colour": {"colour": 0.98, "shape": 0.015, "presence": 0.005},
            "shape": {"colour": 0.02, "shape": 0.955, "presence": 0.025},
            "presence": {"colour": 0.24, "shape": 0.11, "presence": 0.65},
        },
        "traffic": tuple(
            row
            for place, name in enumerate(TYPES)
            for row in (
                TrafficRow(name, "router", 5, 680_000, 680_400, 0),
                TrafficRow(name, "score", 3200 - 400 * place, 24_000_000 - 5_000_000 * place, 210_000, 12 * place),
            )
        ),
        "seconds": {
            "site colour": 62.0, "site shape": 71.5, "site presence": 80.2, "router": 9.4, "align": 412.0,
            "evaluation": 31.0,
        },
        "peak_memory_bytes": 1_840_000_000,
    }  # fmt: skip
    fields |= {"checkpoint": "runs/three/policy", "versions": {"accord": "0.1.0", "torch": "2.13.0", "python": "3.11"}}
    fields |= changes
    return Summary(**{**headline(fields["evaluation"], fields["traffic"]), **fields})  # type: ignore[arg-type]


def _metrics(reward_rise: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {"stage": "site", "site": "colour", "step": 10, "loss": 0.6},
        {"stage": "router", "step": 1, "loss": 0.5, "accuracy": 0.7},
    ]
    for step in range(1, 201):
        wave = 0.12 * math.sin(step * 1.7) + 0.08 * math.cos(step * 0.61)
        reward = -0.4 + reward_rise * (1 - math.exp(-step / 60)) + wave
        rows.append(
            {"stage": "align", "step": step, "reward": reward, "reward_std": 0.4, "kl": 0.0004 * step + 0.004 * wave}
        )
        if step % 25 == 0:
            by_type = {"colour": 0.25 + 0.003 * step, "shape": 0.8 + 0.0002 * step, "presence": 0.58 + 0.0013 * step}
            rows.append(
                {"stage": "align", "step": step, "accuracy_macro": sum(by_type.values()) / 3, "accuracy": by_type}
            )
    return rows


def _picture(place: int) -> bytes:
    image = Image.new("RGB", (64, 64), ("#f2f2ee", "#dfe9f3", "#f7e6d8")[place % 3])
    draw = ImageDraw.Draw(image)
    box = (14 + 2 * place, 12, 46 + 2 * place, 44)
    fill = ("#c02020", "#1858b8", "#189048", "#d8a010")[place % 4]
    (draw.ellipse if place % 2 else draw.rectangle)(box, fill=fill)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _gallery(count: int) -> list[dict[str, object]]:
    asked = (
        ("what is the colour of the shape?", "colour", "red", "yes", "red"),
        ("what shape does the image contain?", "shape", "circle", "circle", "circle"),
        ("is there a green rectangle in the picture?", "presence", "yes", "no", "yes"),
        ("which shape is present?", "shape", "circle", "circle", "triangle"),
    )
    rows: list[dict[str, object]] = []
    for place in range(count):
        question, kind, answer, before, after = asked[place % 4]
        others = [name for name in TYPES if name != kind]
        rows.append(
            {
                "image": f"gallery/{place}.png",
                "question": question,
                "answer": answer,
                "question_type": kind,
                "before": before,
                "after": after,
                "routed": {kind: 0.94, others[0]: 0.06, others[1]: 0.0},
                "scores": {
                    kind: {"before": -0.31, "after": 1.22},
                    others[0]: {"before": 0.1, "after": None},
                    others[1]: None,
                },
            }
        )
    return rows


def fill_run(
    run: Path,
    *,
    summary: Summary | None = None,
    gallery: list[dict[str, object]] | None = None,
    reward_rise: float = 1.1,
) -> Path:
    """Write a finished run into `run`, which may exist, and return it."""
    rows = _gallery(8) if gallery is None else gallery
    (run / "gallery").mkdir(parents=True, exist_ok=True)
    write_summary(run / "summary.json", summary or build_summary())
    for name, records in (("metrics.jsonl", _metrics(reward_rise)), ("gallery.jsonl", rows)):
        (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    for place in range(len(rows)):
        (run / "gallery" / f"{place}.png").write_bytes(_picture(place))
    (run / "recipe.toml").write_text('name = "three sites"\nseed = 0\n\n[alignment]\nsteps = 200\nbeta = 0.04\n')
    return run


@pytest.fixture
def make_summary() -> Callable[..., Summary]:
    """Return `build_summary`."""
    return build_summary


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a finished run into a new folder of the test's own."""

    def make(name: str = "run", **options: object) -> Path:
        return fill_run(tmp_path / name, **options)  # type: ignore[arg-type]

    return make
