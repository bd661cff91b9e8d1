"""Let people say which of two answers is better.

accord annotate FOLDER --pairs FILE                      two answers to each question
accord annotate FOLDER --questions DATA --policy P       two samples of one policy, or one each of two
accord annotate FOLDER                                   go on
accord annotate FOLDER --export pairs.jsonl              what was judged, in TRL's preference form
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accord.errors import DataError, RecipeError, RunError
from accord.terminal import hush, say, show_page, tell

if TYPE_CHECKING:
    from accord.types import Question


def annotate_command(
    folder: Annotated[Path, typer.Argument(help="the annotation's own folder; new, or one to go on with")],
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="questions with two answers each, or preference pairs to judge anew")
    ] = None,
    questions: Annotated[str, typer.Option("--questions", help="easy-vqa or a VQA folder, asked of --policy")] = "",
    split: Annotated[str, typer.Option("--split", help="which of the questions; by default all")] = "",
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="a checkpoint to sample; given twice, two are compared")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="of each policy for each question")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="of a sample")] = 128,
    uncertain: Annotated[
        Path | None, typer.Option("--uncertain", help="a reward model: the pairs it is least certain of come first")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="at most so many pairs in the folder; 0 for all")] = 0,
    overlap: Annotated[
        float | None, typer.Option("--overlap", help="share of the pairs that everyone judges; 0.1 in a new folder")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="of samples, sides and the overlap; 0 in a new one")
    ] = None,
    export: Annotated[Path | None, typer.Option("--export", help="write what was judged to this file, and end")] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="on 127.0.0.1; 0 for any that is free")] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="open no browser")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
) -> None:
    """Serve a page at which people say which of two answers is better; or export what they said."""
    from accord.annotation.collect import Source, collect, settle
    from accord.annotation.desk import Desk
    from accord.annotation.export import export as write_export
    from accord.annotation.export import export_lines
    from accord.annotation.folder import held, open_journal

    if export is not None:
        if pairs or questions or policy or uncertain:
            raise RecipeError("--export writes what was judged and takes no pairs in; give it alone")
        for line in export_lines(write_export(folder, export), export):
            say(line)
        return
    try:
        from accord.annotation.server import Page
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise RunError(
            f"the annotation page needs {error.name}; install it with `pip install 'accord[annotate]'`"
        ) from error

    def asked() -> list[Question]:
        return _questions(questions, split)

    def another(address: str) -> None:
        tell(f"for another browser: {address}")

    if policy or uncertain:
        hush()
    source = Source(
        file=pairs,
        data=f"{questions} {split}".strip(),
        questions=asked if questions else None,
        policies=tuple(policy or ()),
        samples=samples,
        max_new_tokens=max_new_tokens,
        limit=limit,
        uncertain=uncertain,
    )
    settings = settle(folder, overlap=overlap, seed=seed)
    with held(folder):
        candidates = collect(folder, source, tell=tell, quiet=quiet)
        journal = open_journal(folder)
        if journal.torn:
            tell(f"half a line at the end of {journal.path} was cut off; its judgement had not been called saved")
        desk = Desk(candidates, journal, overlap=settings.overlap, seed=settings.seed)
        with Page(desk, title=folder.resolve().name, port=port, tell=another) as page, suppress(KeyboardInterrupt):
            tell(f"{len(candidates)} pairs, {len(journal.standing)} judgements; Ctrl-C ends the page, and all is saved")
            say(page.address)
            if not no_open:
                show_page(page.address)
            page.serve()


def _questions(data: str, split: str) -> list[Question]:
    from accord.recipe import Source
    from accord.stages.job import read_source

    everything = read_source(Source() if data == "easy-vqa" else Source(kind="folder", path=data))
    found = [question for question in everything if split in ("", question.split)]
    if not found:
        have = sorted({question.split for question in everything})
        raise DataError(f"{data} has no question of split {split!r}; it has {', '.join(have)}")
    return found
