"""The commands of a site's engineer.

accord site check KIT FOLDER     is everything right, and what will leave
accord site join KIT FOLDER      answer the consortium's requests, until Ctrl-C
accord site status FOLDER        what was asked so far, and what privacy is spent
"""

from __future__ import annotations

import contextlib
import csv as comma_separated
import io
import shlex
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from accord.errors import AccordError, RunError, printable
from accord.terminal import hush, say

if TYPE_CHECKING:
    from accord.flare.kit import Kit
    from accord.flare.ledger import By, Entry, Status
    from accord.stages.private import Spending


class Grouping(StrEnum):
    """What `--by` may say."""

    day = "day"
    run = "run"


KitFolder = Annotated[Path, typer.Argument(help="the site's start-up kit, a folder")]
SiteFolder = Annotated[Path, typer.Argument(help="what `accord site train RECIPE NAME --out FOLDER` wrote")]
KitName = Annotated[str | None, typer.Option("--name", help="the site's name; by default the kit's")]


def site_check(
    kit: KitFolder,
    folder: SiteFolder,
    name: KitName = None,
    no_server: Annotated[bool, typer.Option("--no-server", help="do not greet the server")] = False,
) -> None:
    """Check a site before it joins: data, model, certificate, server, policies, and what will leave."""
    from accord.flare.check import NOT_PROTECTED, check_site, what_crosses
    from accord.flare.service import read_site_folder

    hush()
    site = _site_kit(kit, name)
    console = Console(highlight=False)
    console.print(Text(f"site {site.name}, consortium {site.consortium}", style="bold"))
    problems = 0
    for found in check_site(site, folder, server=not no_server):
        problems += not found.ok
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=7)
        grid.add_column(width=15)
        grid.add_column()
        word = Text("ok", style="green") if found.ok else Text("problem", style="bold red")
        grid.add_row(word, found.about, Text(printable(found.text)))
        if not found.ok:
            grid.add_row("", "", Text(f"→ {printable(found.remedy)}", style="yellow"))
        console.print(grid)
    with contextlib.suppress(AccordError):  # without a trained site, which is a problem above
        crossings = what_crosses(read_site_folder(folder, site.name), folder, site.name)
        for way, title in (("leaves", "WHAT WILL LEAVE"), ("enters", "WHAT COMES IN"), ("stays", "WHAT STAYS")):
            grid = Table.grid(padding=(0, 2))
            for crossing in crossings:
                if crossing.way == way:
                    grid.add_row("", crossing.what, Text(printable(crossing.amount)))
            console.print(Text(f"\n{title}", style="bold"), grid)
        console.print(Text("\nWHAT IS NOT PROTECTED", style="bold"))
        for line in NOT_PROTECTED:
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    many = f"{problems} problem{'s' if problems > 1 else ''}"
    console.print(Text(f"\n{many}" if problems else "\nnothing stands in the way"))
    if problems:
        raise typer.Exit(1)


def site_join(
    kit: KitFolder,
    folder: SiteFolder,
    name: KitName = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            help="a folder of public images that the server asks about and need not send then; no patients' images: "
            "the server learns which of its own are there",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="show nothing")] = False,
) -> None:
    """Answer a consortium's requests with the site's reward model, until Ctrl-C."""
    from accord.flare.service import join

    hush()
    site = _site_kit(kit, name)
    if images is not None and not images.is_dir():
        raise RunError(f"{images} is no folder; name one with images, or leave --images out")
    with _view(site, folder, quiet=quiet) as view:
        join(kit, folder, name, images=images, on_start=view.start, on_entry=view.entry, on_flare=view.flare)
    if not quiet:
        words = [*(["--images", str(images.resolve())] if images is not None else [])]
        words += [str(kit.resolve()), str(folder.resolve())]
        again = shlex.join([Path(sys.argv[0]).name, "site", "join", *words])
        say(f"left; the same command comes back: {again}")


def site_status(
    folder: SiteFolder,
    by: Annotated[Grouping | None, typer.Option("--by", help="what was asked by day (UTC), or by run")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="comma-separated values, by day unless --by says run")] = False,
) -> None:
    """Show what a site was asked so far, whether it is there, and its spent privacy; if that is not known, status 1."""
    from accord.flare.ledger import Sum, read_ledger, status, sums

    found = status(folder)
    if by is None and not csv:
        paid, known = _paid(folder)
        Console(highlight=False).print(Group(_page(found), _rows(*paid)))
        if not known:
            raise typer.Exit(1)
        return
    column: By = "run" if by is Grouping.run else "day"
    table = [(name, *asdict(total).values()) for name, total in sums(read_ledger(folder), column).items()]
    head = (column, *(field.name for field in fields(Sum)))
    if csv:
        text = io.StringIO()
        writer = comma_separated.writer(text, lineterminator="\n")
        writer.writerows([head, *table])
        say(text.getvalue(), end="")
        return
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for name in head:
        grid.add_column(name.replace("_", " "), justify="left" if name == column else "right")
    for name, *numbers in table:
        grid.add_row(Text(printable(name) or "–"), *(f"{number:,}" for number in numbers))
    Console(highlight=False).print(grid)


def _site_kit(folder: Path, name: str | None) -> Kit:
    from accord.flare.kit import site_kit

    kit = site_kit(folder)
    if name not in (None, kit.name):
        raise RunError(f"{folder} is the kit of site {kit.name}, not of {name}; leave --name out")
    return kit


class _View:
    """What `site join` shows: one page that changes on a terminal, a line for every event elsewhere."""

    def __init__(self, kit: Kit, folder: Path, console: Console, *, live: bool, quiet: bool) -> None:
        from accord.flare.ledger import Status

        self._kit, self._folder, self._console, self._live, self._quiet = kit, folder, console, live, quiet
        self._lock = threading.Lock()  # events come from the model's thread, the page is drawn in another
        self._status, self._flare = Status(kit.name), "not started yet"

    def start(self, kit: Kit) -> None:
        """Tell that requests are answered from now on."""
        from accord.flare.ledger import now

        with self._lock:
            self._status.running, self._status.since = True, now()
        self._line(f"{kit.name}: listening for {kit.consortium}; ledger {self._folder / 'ledger.jsonl'}")

    def entry(self, entry: Entry) -> None:
        """Show a line of the ledger."""
        with self._lock:
            self._status.add(entry)
        self._line(_sentence(entry))

    def flare(self, text: str) -> None:
        """Show what FLARE's client does."""
        with self._lock:
            self._flare = text
        self._line(f"FLARE's client: {text}")

    def __rich__(self) -> Group:
        """Return the page."""
        with self._lock:
            page = _page(self._status)
            more = _rows(
                ("consortium", f"{self._kit.consortium}, {self._kit.host}:{self._kit.port}"),
                ("FLARE's client", f"{self._flare}; its words: {self._kit.path / 'flare.log'}"),
                ("ledger", str(self._folder / "ledger.jsonl")),
            )
        return Group(page, more, Text("Ctrl-C leaves", style="dim"))

    def _line(self, text: str) -> None:
        if not self._live and not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _view(kit: Kit, folder: Path, *, quiet: bool) -> Iterator[_View]:
    console = Console(stderr=True)
    live = console.is_terminal and not console.is_dumb_terminal and not quiet
    view = _View(kit, folder, console, live=live, quiet=quiet)
    if not live:
        yield view
        return
    with Live(view, console=console, refresh_per_second=4):
        yield view


def _page(status: Status) -> Table:
    state = f"running since {status.since}" if status.running else "not running"
    if not status.running and status.since:
        state += f", last started {status.since}"
    asked = ", ".join(f"{count:,} {kind}" for kind, count in sorted(status.requests.items()))
    became = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(status.outcomes.items()))
    return _rows(
        ("site", f"{status.name or '(never joined)'}: {state}"),
        ("requests", asked or "none yet"),
        ("what became of them", became or "–"),
        ("without an answer", f"{status.failed:,}"),
        ("images received", f"{status.images:,}"),
        ("bytes in", f"{status.bytes_in:,}, today {status.bytes_in_today:,}"),
        ("bytes that left", f"{status.bytes_out:,}, today {status.bytes_out_today:,}"),
        ("queries answered", _spent(status)),
        ("questions refused", f"{status.refused:,}"),
        ("last request", _sentence(status.last) if status.last else "–"),
    )


def _paid(folder: Path) -> tuple[list[tuple[str, str]], bool]:
    """Return what guarantee the model of every site of the folder carries, what is spent, and whether all is known."""
    from accord.recipe_file import load_recipe
    from accord.stages.private import spending_of

    rows: list[tuple[str, str]] = []
    try:
        sites = [s for s in load_recipe(folder / "recipe.toml").sites if (folder / "sites" / s.name).is_dir()]
        rows += ((f"privacy of {site.name}", _guarantee(spending_of(site, folder))) for site in sites)
    except AccordError as error:
        return [*rows, ("privacy", f"not known: {error}")], False
    return rows, True


def _guarantee(spent: Spending | None) -> str:
    if spent is None:
        return "no guarantee: the reward model was trained without privacy"
    words = f"ε = {spent.epsilon:.3g} of {spent.budget:.3g} spent" if spent.budget else f"ε = {spent.epsilon:.3g} spent"
    words += f" at δ = {spent.delta:g}, for every {spent.unit}; "
    if (proof := spent.certificate) is None:
        words += "no guarantee: the model has no certificate"
    else:
        words += f"this model's training {proof.epsilon:.3g}"
        if proof.router_steps:
            words += f"; {spent.router_taken:,} of {proof.router_steps:,} steps on the router taken"
    return f"{words}; ledger {spent.ledger}"


def _spent(status: Status) -> str:
    def of(spent: int, most: int) -> str:
        return f"{spent:,} of {most:,}" if most else f"{spent:,}"

    budget, spent = status.budget, status.spent
    words = f"{of(spent.run, budget.per_run)}, today {of(status.queries_today, budget.per_day)}"
    if budget.per_image:
        words += f", about one image at most {of(max(spent.by_image.values(), default=0), budget.per_image)}"
    return words


def _rows(*rows: tuple[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=19)
    grid.add_column()
    for about, text in rows:
        grid.add_row(about, Text(printable(text)))  # no plain string, in which rich would look for its own marks
    return grid


def _sentence(entry: Entry) -> str:
    what = f"{entry.kind or 'unreadable'} {entry.id}".strip()
    if entry.kind == "score":
        what += f", {entry.questions} questions, {entry.candidates} candidates, {entry.images} new images"
    elif entry.kind == "answer":
        what += f" by its own model, {entry.questions} questions, {entry.images} new images"
    if entry.refused:
        what += f", {entry.refused} refused"
    return f"{entry.time} {what}: {entry.outcome}; {entry.bytes_in} B in, {entry.bytes_out} B out, {entry.seconds} s"
