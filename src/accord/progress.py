"""Show how far a stage is: a live bar on a terminal, a few plain lines elsewhere, nothing when quiet.

Everything goes to standard error, so that standard output holds results only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from accord.errors import printable


class Advance(Protocol):
    """Report that `steps` more are done, and what to show beside the bar until the next report."""

    def __call__(self, steps: int = 1, /, *, text: str | None = None) -> None:
        """Move on by `steps`; a `text` of None leaves the one shown."""
        ...


@contextlib.contextmanager
def stage_bar(
    description: str, total: int, *, start: int = 0, quiet: bool = False, console: Console | None = None
) -> Iterator[Advance]:
    """Show the progress of a stage of `total` steps while the body runs, and yield the function that reports it.

    Args:
        description: what is being done, as in `router`.
        total: the number of steps.
        start: the steps done before, when the stage goes on from a checkpoint; they do not count for the time left.
        quiet: show nothing.
        console: where to show it; standard error when None.
    """
    console = console or Console(stderr=True)
    if quiet:
        yield lambda steps=1, /, *, text=None: None
    elif console.is_terminal and not console.is_dumb_terminal:
        with _live_bar(printable(description), total, start, console) as advance:
            yield advance
    else:
        yield _plain_lines(printable(description), total, start, console)


class ProgressBarCallback(TrainerCallback):
    """Drive a stage's bar from a Transformers `Trainer`; pass `disable_tqdm=True` to the trainer beside it.

    Used as a context manager around `trainer.train()` it also puts the terminal right if training fails:

        with ProgressBarCallback("align") as bar:
            trainer.add_callback(bar)
            trainer.train()
    """

    def __init__(
        self,
        description: str,
        *,
        metrics: Sequence[str] = ("reward", "loss"),
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        """Name the stage, and the logged `metrics` to show beside its bar."""
        self.description = description
        self.metrics = tuple(metrics)
        self.quiet = quiet
        self.console = console
        self._stack = contextlib.ExitStack()
        self._advance: Advance | None = None
        self._shown = 0

    def __enter__(self) -> Self:
        """Return the callback itself; the bar appears when training begins."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the bar down."""
        self.close()

    def close(self) -> None:
        """Take the bar down; the last state stays on the screen."""
        self._advance = None
        self._stack.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Show the bar, at the step training goes on from."""
        self.close()
        if state.is_world_process_zero:
            self._shown = state.global_step
            self._advance = self._stack.enter_context(
                stage_bar(self.description, state.max_steps, start=self._shown, quiet=self.quiet, console=self.console)
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move the bar to the trainer's step."""
        if self._advance is not None:
            self._advance(state.global_step - self._shown)
            self._shown = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the latest metrics."""
        found = {name: value for name in self.metrics if isinstance(value := (logs or {}).get(name), int | float)}
        if self._advance is not None and found:
            self._advance(0, text="  ".join(f"{name} {value:.3g}" for name, value in found.items()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the bar down."""
        self.close()


@contextlib.contextmanager
def _live_bar(description: str, total: int, start: int, console: Console) -> Iterator[Advance]:
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        refresh_per_second=4,
    )
    with progress:
        task = progress.add_task(description, total=total, completed=start, text="")

        def advance(steps: int = 1, /, *, text: str | None = None) -> None:
            if text is None:
                progress.update(task, advance=steps)
            else:
                progress.update(task, advance=steps, text=printable(text))

        yield advance


def _plain_lines(
    description: str, total: int, start: int, console: Console, clock: Callable[[], float] = time.monotonic
) -> Advance:
    """Return a function that prints one line for each tenth of `total`, so that a log of any run stays short."""
    began, done, shown, note = clock(), start, _tenths(start, total), ""

    def advance(steps: int = 1, /, *, text: str | None = None) -> None:
        nonlocal done, shown, note
        done += steps
        note = note if text is None else f"  {printable(text)}"
        if (tenths := _tenths(done, total)) > shown and done > start:
            shown = tenths
            elapsed = clock() - began
            left = elapsed / (done - start) * max(total - done, 0)
            line = f"{description}  {done}/{total}  {_clock(elapsed)} elapsed  {_clock(left)} left{note}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return advance


def _tenths(done: int, total: int) -> int:
    return 10 * done // total if total > 0 else 10


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
