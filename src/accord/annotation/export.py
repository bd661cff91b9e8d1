"""Write what people judged in TRL's preference form, and apart from it whatever is no preference.

    pairs.jsonl               {"prompt": …, "chosen": …, "rejected": …, "images": […], "annotator": "A. B.",
                               "time": "2026-01-31T09:30:00+00:00", "seconds": 12.5, "tie": false, …}
    pairs.not-ranked.jsonl    {"prompt": …, "answers": ["…", "…"], "images": […], "choice": "tie", "tie": true,
                               "reason": "", "annotator": …, "time": …, …}

The second file has ties, pairs with two bad answers, and skips with their reasons, so that no reader of preferences
takes an answer for better that nobody called so. Each judgement that stands is one row: a pair that several people
judged has several, which may disagree. The rows are in the order of the pairs.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from accord.annotation.folder import JOURNAL, PAIRS, read_all
from accord.annotation.journal import Judgement
from accord.annotation.pairs import Candidate
from accord.data.conversation import content_blocks
from accord.data.preferences import pair_row, write_rows
from accord.errors import RunError


@dataclass(frozen=True)
class Exported:
    """What was written, and what was not."""

    preferences: int
    not_ranked: dict[str, int]  # by choice
    unjudged: int  # pairs that nobody has judged yet
    wins: dict[str, int]  # by policy: how often its answer was preferred, where two policies were compared
    beside: Path  # the file of what is no preference


def not_ranked_file(path: Path) -> Path:
    """Return where the judgements that are no preferences go."""
    return path.with_name(f"{path.stem}.not-ranked.jsonl")


def export(folder: Path, path: Path) -> Exported:
    """Write the judgements of a folder that stand to two files, and each image once beside them.

    Raises:
        RunError: the folder is no annotation, a file of another kind stands in the way, or nothing can be written.
        ImageError: an image cannot be read.
    """
    _, candidates, judgements = read_all(folder)
    beside = not_ranked_file(path)
    for file in (path, beside):
        _refuse_others(folder, file)
    of_pair: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        of_pair[judgement.pair].append(judgement)
    if unknown := sorted(of_pair.keys() - {each.id for each in candidates}):
        raise RunError(f"{folder / JOURNAL} has a judgement of the pair {unknown[0]!r:.40}, which {PAIRS} lacks")
    ranked, others = [], []
    wins: Counter[str] = Counter()
    for pair in candidates:
        for judgement in of_pair[pair.id]:
            if judgement.preferred is None:
                others.append((_not_ranked(pair, judgement), pair.images))
            else:
                ranked.append((_ranked(pair, judgement), pair.images))
                if len(set(pair.origins)) == 2:
                    wins[pair.origins[judgement.preferred]] += 1
    write_rows(path, ranked)
    write_rows(beside, others)
    choices = Counter(str(row["choice"]) for row, _ in others)
    return Exported(len(ranked), dict(choices), sum(not of_pair[each.id] for each in candidates), dict(wins), beside)


def _said(pair: Candidate, judgement: Judgement) -> dict[str, object]:
    return {
        "judgement": judgement.id,
        "annotator": judgement.annotator,
        "time": judgement.time,
        "seconds": judgement.seconds,
        "tie": judgement.choice == "tie",
        "left": pair.answers[judgement.left],
    }


def _ranked(pair: Candidate, judgement: Judgement) -> dict[str, object]:
    first = judgement.preferred == 0
    chosen, rejected = pair.origins if first else pair.origins[::-1]
    origins = {"chosen_from": chosen, "rejected_from": rejected} if any(pair.origins) else {}
    return {**pair_row(pair.preferring(first)), **_said(pair, judgement), **origins}


def _not_ranked(pair: Candidate, judgement: Judgement) -> dict[str, object]:
    return {
        "prompt": [{"role": turn["role"], "content": content_blocks(turn["content"])} for turn in pair.prompt],
        "answers": list(pair.answers),
        "question_id": pair.question_id,
        "question_type": pair.question_type,
        "choice": judgement.choice,
        "reason": judgement.reason,
        **_said(pair, judgement),
        **({"answers_from": list(pair.origins)} if any(pair.origins) else {}),
        **({"person": pair.person} if pair.person else {}),
    }


def _refuse_others(folder: Path, file: Path) -> None:
    """Refuse to write over what is no export: the folder's own files, or the pairs that somebody brought."""
    if file.parent.resolve() == folder.resolve() and file.name in (PAIRS, JOURNAL):
        raise RunError(f"{file} is the annotation's own; name another file")
    if file.is_dir() or (file.exists() and not _is_export(file)):
        raise RunError(f"{file} exists and is no export of an annotation, which alone is replaced; name another file")


def _is_export(file: Path) -> bool:
    with file.open("rb") as stream:
        line = stream.readline()
    try:
        row = json.loads(line) if line.strip() else {"judgement": ""}  # an export with nothing in it
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "judgement" in row


def export_lines(found: Exported, path: Path) -> list[str]:
    """Return what to say of an export, line by line."""
    called = {"tie": "ties", "both bad": "both bad", "skip": "skipped"}
    others = ", ".join(f"{found.not_ranked.get(choice, 0)} {name}" for choice, name in called.items())
    lines = [f"{found.preferences} preferences: {path}", f"{others}: {found.beside}"]
    if found.unjudged:
        lines.append(f"{found.unjudged} pairs that nobody has judged yet are in neither")
    total = sum(found.wins.values())
    lines += [f"{policy} was preferred {n} of {total} times" for policy, n in sorted(found.wins.items())]
    return lines
