"""Progress is shown on a terminal, told in a few lines elsewhere, and never on standard output."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from accord import progress
from accord.progress import ProgressBarCallback, stage_bar


def screen(*, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, width=120, legacy_windows=False, _environ={"TERM": "xterm-256color"}
    )
    return console, file


def test_without_a_terminal_a_thousand_steps_make_ten_lines() -> None:
    console, file = screen(terminal=False)
    with stage_bar("router", 1000, console=console) as advance:
        for step in range(1000):
            advance(text=f"loss {step}")
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{tenth}00/1000" for tenth in range(1, 11)]
    assert lines[0].startswith("router  100/1000  0:00 elapsed  0:0") and lines[0].endswith("left  loss 99")


def test_the_time_left_is_of_this_process_alone() -> None:
    """Steps 50 to 60 of 100 took 10 s, so the last 40 take 40 s; the 50 before took no time here."""
    console, file = screen(terminal=False)
    times = iter([0.0, 10.0])
    advance = progress._plain_lines("align", 100, 50, console, clock=lambda: next(times))
    advance(10)
    assert file.getvalue() == "align  60/100  0:10 elapsed  0:40 left\n"


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7384, "2:03:04")])
def test_times_are_shown_as_clocks(seconds: float, shown: str) -> None:
    assert progress._clock(seconds) == shown


@pytest.mark.parametrize(("total", "lines"), [(0, 0), (1, 1), (3, 3), (7, 7)])
def test_a_short_stage_makes_a_line_a_step(total: int, lines: int) -> None:
    console, file = screen(terminal=False)
    with stage_bar("x", total, console=console) as advance:
        for _ in range(total):
            advance()
    assert len(file.getvalue().splitlines()) == lines


def test_a_terminal_gets_a_bar_with_the_metric() -> None:
    console, file = screen(terminal=True)
    with stage_bar("align", 4, start=1, console=console) as advance:
        advance(text="reward [0.5]")
        advance(2)
    shown = file.getvalue()
    assert "align" in shown and "4/4" in shown and "reward [0.5]" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_hostile_name_cannot_steer_the_terminal(terminal: bool) -> None:
    console, file = screen(terminal=terminal)
    with stage_bar("site \x1b]0;owned\x07[bold]", 1, console=console) as advance:
        advance(text="\x1b[2J")
    assert "\x1b]0;" not in file.getvalue() and "\x1b[2J" not in file.getvalue()
    assert "site ?]0;owned?[bold]" in file.getvalue()


@pytest.mark.parametrize("quiet", [True, False])
def test_standard_output_holds_results_only(capfd: pytest.CaptureFixture[str], quiet: bool) -> None:
    with stage_bar("router", 1, quiet=quiet) as advance:
        advance(text="loss 1")
    out, err = capfd.readouterr()
    assert out == "" and (err == "") is quiet


def test_the_terminal_is_put_right_when_the_stage_fails() -> None:
    console, file = screen(terminal=True)
    with pytest.raises(ValueError), stage_bar("align", 4, console=console):
        raise ValueError
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")  # the cursor is shown again


def trained(bar: ProgressBarCallback, state: TrainerState, steps: int, tmp_path: object) -> None:
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    bar.on_train_begin(arguments, state, control)
    for _ in range(steps):
        state.global_step += 1
        bar.on_step_end(arguments, state, control)
        bar.on_log(arguments, state, control, logs={"reward": 0.12345, "loss": "n/a", "other": 1})
    bar.on_train_end(arguments, state, control)


def test_the_callback_follows_the_trainer(tmp_path: object) -> None:
    console, file = screen(terminal=False)
    bar = ProgressBarCallback("align", console=console)
    trained(bar, TrainerState(max_steps=4), 4, tmp_path)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert lines[1].endswith("reward 0.123")


def test_the_callback_goes_on_from_a_checkpoint(tmp_path: object) -> None:
    console, file = screen(terminal=False)
    trained(ProgressBarCallback("align", console=console), TrainerState(max_steps=4, global_step=2), 2, tmp_path)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["3/4", "4/4"]


def test_only_the_first_process_shows_a_bar(tmp_path: object) -> None:
    console, file = screen(terminal=False)
    state = TrainerState(max_steps=2, is_world_process_zero=False)
    trained(ProgressBarCallback("align", console=console), state, 2, tmp_path)
    assert file.getvalue() == ""


def test_the_callback_takes_its_bar_down_when_training_fails(tmp_path: object) -> None:
    console, file = screen(terminal=True)
    with pytest.raises(ValueError), ProgressBarCallback("align", console=console) as bar:
        bar.on_train_begin(TrainingArguments(output_dir=str(tmp_path)), TrainerState(max_steps=2), TrainerControl())
        raise ValueError
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
