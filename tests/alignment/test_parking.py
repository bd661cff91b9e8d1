"""Questions on which a step fails are left out, and the run goes on. Each test has its poison; without, it ends."""

import shutil
from dataclasses import replace

import pytest
import torch

from accord.alignment.grpo import AlignmentConfig, align
from accord.alignment.parking import Parking
from accord.errors import DataError, DataWarning, QuorumError, RunError
from accord.models.load import load_model
from accord.runs.failures import FAILURES, TRIES, failures_of, read_failures
from accord.types import Question

G = 2


def question(n):
    return Question(f"q{n}", None, f"question {n}", "a", "kind", "domain", "public")


QUESTIONS = [question(n) for n in range(8)]


def row(asked):
    return {"question_id": asked.id, "prompt": asked.text}


def rows(*numbers):
    return [row(QUESTIONS[n]) for n in numbers for _ in range(G)]


def ids(given):
    return [each["question_id"] for each in given]


class Step:
    """Fails where a poisoned question is among the rows; draws a number of torch's."""

    def __init__(self, *poison, error=ValueError):
        self.poison, self.error, self.asked = poison, error, []

    def __call__(self, given):
        drawn = torch.rand(1).item()
        self.asked.append(ids(given))
        if bad := [name for name in ids(given) if name in self.poison]:
            raise self.error(f"{bad[0]} is poison")
        return ids(given), drawn


@pytest.fixture
def parking(tmp_path):
    return Parking(QUESTIONS, row, tmp_path / "kept" / FAILURES)


@pytest.mark.filterwarnings("error")
def test_where_nothing_fails_nothing_is_done(parking, tmp_path):
    """Each step once, with the rows as they came and the numbers that would have been drawn; no file is written."""
    step = Step()
    torch.manual_seed(0)
    said, drawn = parking.do(rows(0, 1, 2), G, step)
    torch.manual_seed(0)
    assert (said, drawn) == (ids(rows(0, 1, 2)), torch.rand(1).item()) and len(step.asked) == 1
    assert not (tmp_path / "kept").exists()


def test_a_question_that_fails_is_replaced_three_times_and_then_parked(parking):
    """Twice it is tried again where it is drawn; at the fourth draw it is not."""
    for tries in (1, 2, 3):
        step = Step("q1")
        what = "is parked, and no longer tried" if tries == 3 else "was left out of a step"
        with pytest.warns(DataWarning, match=f"prompt 'q1' {what}: it failed {tries} of 3 times .ValueError: q1 is"):
            said, _ = parking.do(rows(0, 1, 2), G, step)
        assert said[:G] == ["q0"] * G and said[2 * G :] == ["q2"] * G and said[G] == said[G + 1] not in ("q1",)
        assert step.asked[0] == ids(rows(0, 1, 2))
    assert parking.parked == ["q1"] and read_failures(parking.file) == parking.failures
    again = Step("q1")
    last, _ = parking.do(rows(0, 1, 2), G, again)
    assert last == said and len(again.asked) == 1


@pytest.mark.filterwarnings("ignore::accord.errors.DataWarning")
def test_a_step_draws_as_if_it_had_never_failed(parking):
    """And a run that is resumed, and knows what had failed, puts the same question in the place of the parked one."""
    torch.manual_seed(0)
    said, drawn = parking.do(rows(0, 1, 2, 3), G, Step("q1", "q3"))
    after = torch.rand(1).item()
    torch.manual_seed(0)
    assert drawn == torch.rand(1).item() and after == torch.rand(1).item()
    for _ in range(TRIES - 1):
        parking.do(rows(0, 1, 2, 3), G, Step("q1", "q3"))
    resumed = Parking(QUESTIONS, row, parking.file)
    assert resumed.parked == ["q1", "q3"]
    torch.manual_seed(0)
    assert resumed.do(rows(0, 1, 2, 3), G, Step("q1", "q3")) == (said, drawn)


@pytest.mark.filterwarnings("ignore::accord.errors.DataWarning")
def test_a_stand_in_that_fails_too_is_replaced(parking):
    said, _ = parking.do(rows(0, 1), G, Step(*(f"q{n}" for n in range(1, 7))))
    assert said == ["q0", "q0", "q7", "q7"] and "q1" in parking.failures
    assert set(parking.failures) <= {f"q{n}" for n in range(1, 7)}


def test_a_failure_that_no_question_explains_ends_it(parking):
    """Each succeeds alone: the step is tried three times, and the error is that of the step. Nothing is noted."""
    tried = []

    def crowded(given):
        tried.append(ids(given))
        if len(given) > G:
            raise RuntimeError("too many rows")

    with pytest.raises(RuntimeError, match="too many rows"):
        parking.do(rows(0, 1), G, crowded)
    assert tried.count(ids(rows(0, 1))) == 3 and parking.failures == {}


def test_a_failure_that_passes_is_none(parking):
    left = [2]

    def shaky(given):
        left[0] -= 1
        if left[0] >= 0 and len(given) > G:
            raise OSError("for a moment")
        return ids(given)

    assert parking.do(rows(0, 1), G, shaky) == ids(rows(0, 1)) and parking.failures == {}


def test_where_all_fail_it_is_not_the_questions(parking):
    with pytest.raises(ValueError, match="is poison"):
        parking.do(rows(0, 1, 2), G, Step(*(f"q{n}" for n in range(8))))
    assert parking.failures == {} and not parking.file.exists()


def test_errors_of_the_run_are_passed_on_at_once(parking):
    step = Step("q1", error=RunError)
    with pytest.raises(RunError, match="q1 is poison"):
        parking.do(rows(0, 1), G, step)
    assert len(step.asked) == 1


def test_a_reason_cannot_steer_a_terminal(parking):
    def step(given):
        if "q1" in ids(given):
            raise ValueError("\x1b[2J" + "x" * 1000)

    with pytest.warns(DataWarning):
        parking.do(rows(0, 1), G, step)
    assert parking.failures["q1"].reason.isprintable() and len(parking.failures["q1"].reason) == 200


def test_a_damaged_file(tmp_path):
    (tmp_path / FAILURES).write_text("{")
    with pytest.raises(RunError, match="delete it: what fails is found again"):
        Parking(QUESTIONS, row, tmp_path / FAILURES)


# In the trainer

SETTINGS = AlignmentConfig(
    steps=4,
    prompts_per_step=3,
    group_size=G,
    learning_rate=1e-3,
    max_completion_length=2,
    evaluate_every=0,
    save_every=2,
)


def lengths(prompts, completions, question_id, **_):
    if "odd" in question_id:
        raise ValueError("the reward knows no odd questions")
    return [float(len(completion[-1]["content"])) + n for n, completion in enumerate(completions)]


TORN = Question("torn", b"no picture", "what colour is it?", "red", "colour", "x", "public")


def odd(ask):
    return replace(ask(7), id="odd")


@pytest.fixture
def run(llava, ask, tmp_path):
    """Return a function that aligns on good questions and some more; it returns the records of the steps."""

    def go(*more, failures=True, resume=False, reward=lengths, folder="out"):
        questions = [ask(n, colour) for n, colour in enumerate(("red", "blue", "green"))] + list(more)
        model, processor = load_model(llava, trainable=True)
        torch.manual_seed(0)
        records = []
        trained = align(
            *(model, processor, questions, reward),
            SETTINGS,
            seed=0,
            out=tmp_path / folder,
            log=records.append,
            resume=resume,
            failures=tmp_path / folder / "kept" / "stage" / "align" / FAILURES if failures else None,
        )
        return records, torch.cat([p.detach().flatten() for p in trained.parameters()])

    return go


def test_an_honest_run_is_the_same_to_the_bit(run, tmp_path):
    records, weights = run()
    plain, same = run(failures=False, folder="plain")
    assert records == plain and torch.equal(weights, same) and "parked" not in records[-1]
    assert failures_of(tmp_path / "out") == {}


@pytest.mark.filterwarnings("ignore:prompt:accord.errors.DataWarning")
def test_poison_is_parked_counted_and_the_run_goes_on_also_after_a_resume(run, ask, tmp_path):
    """An image that is none, and a question on which the reward raises; a special token in words is no poison."""
    poison = [odd(ask), TORN, replace(ask(8, "blue", text="what <image> is </s> it?"), id="token")]
    records, weights = run(*poison)
    assert [record["step"] for record in records] == [1, 2, 3, 4] and weights.isfinite().all()
    failures = failures_of(tmp_path / "out")
    assert set(failures) == {"odd", "torn"}
    assert records[-1]["failed"] == 2 and records[-1]["parked"] == sum(f.parked for f in failures.values())
    assert "ImageError" in failures["torn"].reason or "DataError" in failures["torn"].reason
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")  # as after a kill behind step 2
    again, resumed = run(*poison, resume=True)
    assert [record["step"] for record in again] == [3, 4] and torch.equal(resumed, weights)


@pytest.mark.parametrize("poison", ["odd", "torn"])
def test_without_parking_it_ends_the_run(run, ask, poison):
    with pytest.raises((ValueError, DataError)):
        run(odd(ask) if poison == "odd" else TORN, failures=False)


def test_a_reward_that_always_raises_ends_the_run(run, tmp_path):
    def broken(prompts, completions, **_):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run(reward=broken)
    assert failures_of(tmp_path / "out") == {}


def test_a_quorum_that_no_question_reaches_is_no_questions_fault(parking):
    """All of three fail together and alone: the step, two halves, and two of the pair; then the run ends."""
    step = Step(*(q.id for q in QUESTIONS), error=QuorumError)
    with pytest.raises(QuorumError):
        parking.do(rows(0, 1, 2), G, step)
    assert len(step.asked) == 5 and not parking.failures


def test_a_question_that_all_sites_refuse_is_parked_and_no_more(parking):
    """One question costs the quorum of the step, and is replaced; where it is a step of its own, too."""
    with pytest.warns(DataWarning, match="'q1' was left out of a step: .* .QuorumError: q1 is poison"):
        parking.do(rows(0, 1, 2), G, Step("q1", error=QuorumError))
    with pytest.warns(DataWarning, match="'q1' was left out"):
        assert "q1" not in parking.do(rows(1), G, Step("q1", error=QuorumError))[0]
