"""Two processes over gloo: what each is told, what the sites saw, and that they end with one policy."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest

from accord.errors import RunError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import CardRequest
from accord.federation.ranks import OneConnection, rank_and_count

BEGIN = """
import json, sys, warnings
from pathlib import Path
import torch
import torch.distributed as dist
from accord.errors import DataWarning, RunError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import (
    Absence, AnswerItem, AnswerReply, AnswerRequest, CardRequest, ScoreItem, ScoreReply, ScoreRequest, image_name
)
from accord.federation.ranks import OneConnection, rank_and_count

out, rank = Path(sys.argv[1]), rank_and_count()[0]
warnings.simplefilter("always", DataWarning)

def scores(request):
    return ScoreReply(request.id, [[float(len(c)) for c in item.candidates] for item in request.items])

def broken(request):
    return ScoreReply(request.id, [[0.0]])

class Spy(InProcessEngine):
    asked = []

    def ask(self, requests, *, deadline=None):
        Spy.asked.append(
            {s: [len(r.images), [getattr(i, "candidates", 0) for i in r.items]] for s, r in requests.items()}
        )
        return super().ask(requests, deadline=deadline)

def start():
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)

def end(**found):
    (out / f"{rank}.json").write_text(json.dumps({**found, "asked": Spy.asked}))
    dist.destroy_process_group()  # its threads, left to themselves, abort a process that ends
"""


def together(tmp_path, script):
    """Run a script in two processes; return what each wrote in the end."""
    file = tmp_path / "script.py"
    file.write_text(BEGIN + textwrap.dedent(script))
    processes = [
        subprocess.Popen(
            [sys.executable, str(file), str(tmp_path)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_ask_as_one(tmp_path):
    """A score is the length of the candidate. Both ask `here` about one picture, and rank 1 about another, too."""
    one, two = together(
        tmp_path,
        """
        def request(*items):
            pictures = {image_name(data): data for data, _ in items}
            return ScoreRequest("r", pictures, [ScoreItem([image_name(data)], [], texts) for data, texts in items])

        def told(answers):
            return {s: a.reason if isinstance(a, Absence) else [a.id, a.scores] for s, a in sorted(answers.items())}

        def away(request):
            raise OSError("no power")

        def answering(request):
            if isinstance(request, AnswerRequest):
                return AnswerReply(request.id, [str(next(iter(item.images), None))[:4] for item in request.items])
            if (request.judge, request.truth) != ("reward", False):
                return ScoreReply(request.id, [[1.0] for _ in request.items])
            return scores(request)

        def answered(answers):
            return {site: [reply.id, getattr(reply, "answers", None)] for site, reply in answers.items()}

        sites = {"here": answering, "away": away, "broken": broken}
        connection = OneConnection(Spy(sites) if rank == 0 else None, list(sites))
        start()
        mine = [
            {"here": request((b"red", ["a", "bb"])), "broken": request((b"red", ["a"]))},
            {
                "here": request((b"red", ["ccc"]), (b"blue", ["dddd"])),
                "away": request((b"red", ["a"])),
                "broken": request((b"red", ["a"])),
            },
        ][rank]
        both = told(connection.ask(mine))
        alone = told(connection.ask({} if rank == 0 else {"here": request((b"red", ["a"]))}))
        nobody = told(connection.ask({}))
        items = [[None], [image_name(b"red"), None]][rank]
        asks = [AnswerItem([image] if image else [], []) for image in items]
        asked = AnswerRequest(f"a{rank}", {image_name(b"red"): b"red"}, asks)
        said = answered(connection.ask({"here": asked}))
        judged = ScoreRequest(f"j{rank}", {}, [ScoreItem([], [], ["long"])], judge="answer", truth=True)
        judged = told(connection.ask({"here": judged}))
        total = connection.total([1.0 + rank, 10.0])
        counts = {f"{s} {k}": [c.messages, c.absences] for (s, k), c in connection.traffic.counts.items()}
        found = {"both": both, "alone": alone, "nobody": nobody, "said": said, "judged": judged, "total": total}
        end(**found, counts=counts, processes=connection.processes)
        """,
    )
    assert one["both"] == {"broken": "invalid", "here": ["r", [[1.0, 2.0]]]}
    assert two["both"] == {"away": "error", "broken": "invalid", "here": ["r", [[3.0], [4.0]]]}
    assert (one["alone"], two["alone"]) == ({}, {"here": ["r", [[1.0]]]})
    assert one["nobody"] == two["nobody"] == {} and one["total"] == two["total"] == [3.0, 20.0]
    assert one["asked"] == [
        {
            "here": [2, [["a", "bb"], ["ccc"], ["dddd"]]],
            "away": [1, [["a"]]],
            "broken": [1, [["a"], ["a"]]],
        },
        {"here": [1, [["a"]]]},
        {},
        {"here": [1, [0, 0, 0]]},
        {"here": [0, [["long"], ["long"]]]},
    ]
    red = hashlib.sha256(b"red").hexdigest()[:4]
    assert (one["said"], two["said"]) == ({"here": ["a0", ["None"]]}, {"here": ["a1", [red, "None"]]})
    assert (one["judged"], two["judged"]) == ({"here": ["j0", [[1.0]]]}, {"here": ["j1", [[1.0]]]})
    assert two["asked"] == [] and two["counts"] == {} and one["processes"] == two["processes"] == 2
    assert one["counts"] == {
        "here score": [3, 0],
        "away score": [1, 1],
        "broken score": [1, 1],
        "here answer": [1, 0],
    }


def test_what_stops_rank_0_stops_all(tmp_path):
    one, two = together(
        tmp_path,
        """
        class Down(Spy):
            def ask(self, requests, *, deadline=None):
                raise RunError("no site for an hour")

        connection = OneConnection(Down({"here": scores}) if rank == 0 else None, ["here"])
        start()
        try:
            connection.ask({})
        except RunError as error:
            end(said=str(error))
        """,
    )
    assert one["said"] == "no site for an hour"
    assert two["said"] == "rank 0 could not ask the sites: no site for an hour"


@pytest.mark.slow
def test_the_quorum_is_of_all_ranks(tmp_path):
    """Rank 0's two answers are here's, rank 1's there's, who comes back at the third try: half of the weight is there.

    At .5 the step goes on, and rank 1's answers have no score, which is no zero. At .6 rank 0, which lacks nothing,
    waits with rank 1.
    """
    one, two = together(
        tmp_path,
        """
        from PIL import Image
        from dataclasses import replace
        from accord.alignment.reward import FederatedReward, Waiting

        class Away(Spy):
            away = 3

            def _send(self, site, data):
                if site == "there" and Away.away:
                    Away.away -= 1
                    raise ConnectionError
                return super()._send(site, data)

        def route(prompts, images, completions):
            return torch.eye(2)[rank].expand(sum(map(len, completions)), 2)

        engine = Away({"here": scores, "there": scores}) if rank == 0 else None
        pauses, told = [], []
        reward = FederatedReward(
            OneConnection(engine, ["here", "there"]),
            route,
            waiting=Waiting(quorum=0.5, tell=told.append, pause=pauses.append),
        )
        start()
        rows = {"prompts": [[{"role": "user", "content": "what?"}]] * 2, "completions": ["a", "bb"]}
        with warnings.catch_warnings(record=True) as warned:
            first = reward(**rows, image=[Image.new("RGB", (4, 4), "red")] * 2)
        reward.waiting = replace(reward.waiting, quorum=0.6)
        second = reward(**rows, image=[Image.new("RGB", (4, 4), "red")] * 2)
        end(first=first, second=second, pauses=pauses, told=told, warned=[str(w.message) for w in warned])
        """,
    )
    assert (one["first"], two["first"]) == ([1.0, 2.0], [None, None])
    assert one["warned"] == [] and len(two["warned"]) == 1 and "site there gave no answer (gone)" in two["warned"][0]
    assert one["second"] == two["second"] == [1.0, 2.0]
    assert one["pauses"] == two["pauses"] == [1.0, 2.0]
    assert one["told"][0] == "too few sites answered: waiting for there; Ctrl-C ends the run"
    assert [list(asked) for asked in one["asked"]] == [["here", "there"], ["here", "there"], ["there"], ["there"]]


PARKING = """
from accord.alignment.parking import Parking
from accord.errors import DataError
from accord.federation.engine import ElsewhereError
from accord.federation.ranks import Processes
from accord.types import Question

QUESTIONS = [Question(f"q{n}", None, f"question {n}", "a", "kind", "domain", "public") for n in range(12)]

def row(asked):
    return {"question_id": asked.id, "prompt": asked.text}

def rows(*numbers):
    return [row(QUESTIONS[n]) for n in numbers for _ in range(2)]

class Step:
    \"\"\"What each does by itself, then what both do together, and again.\"\"\"

    def __init__(self, processes, *poison, error=ValueError, later=()):
        self.processes, self.poison, self.error, self.later, self.asked = processes, poison, error, later, []

    def __call__(self, given):
        ids = [each["question_id"] for each in given]
        self.asked.append(ids)

        def look(poison):
            if bad := [name for name in ids if name in poison]:
                raise self.error(f"{bad[0]} is poison")

        self.processes.agree(lambda: look(self.poison))
        seen = self.processes.total([len(ids)])
        self.processes.agree(lambda: look(self.later))
        return ids, seen, torch.rand(1).item()

processes = Processes()
parking = Parking(QUESTIONS, row, out / "kept" / "failures.json", processes)
mine = rows(0, 1, 2) if rank == 0 else rows(3, 4, 5)
start()
"""


def test_two_ranks_leave_out_what_fails_in_either(tmp_path):
    """q4 fails at rank 1, and q1 at rank 0 in a later part of the step: both are known to both, and told of by one."""
    one, two = together(
        tmp_path,
        PARKING
        + """
with warnings.catch_warnings(record=True) as warned:
    torch.manual_seed(0)
    done = [parking.do(mine, 2, Step(processes, "q4", later=["q1"])) for _ in range(4)]
again = Step(processes, "q4", later=["q1"])
torch.manual_seed(0)
parking.do(mine, 2, again)
drawn = torch.rand(1).item()
file = {n: f.tries for n, f in Parking(QUESTIONS, row, parking.file).failures.items()} if rank == 0 else {}
end(
    done=done, known={n: [f.tries, f.reason] for n, f in parking.failures.items()}, parked=sorted(parking.parked),
    warned=[str(w.message) for w in warned], again=again.asked, drawn=drawn, file=file,
)
""",
    )
    assert one["known"] == two["known"] == {f"q{n}": [3, f"ValueError: q{n} is poison"] for n in (1, 4)}
    assert one["parked"] == two["parked"] == ["q1", "q4"] and one["file"] == {"q1": 3, "q4": 3}
    assert len(one["warned"]) == 6 and two["warned"] == []
    assert len(one["again"]) == len(two["again"]) == 1  # what is parked is not tried
    for own, poison, good in ((one, "q1", ("q0", "q2")), (two, "q4", ("q3", "q5"))):
        assert all(seen == [12] for _, seen, _ in own["done"])
        assert [(ids[0], ids[-1]) for ids, _, _ in own["done"]] == [good] * 4
        assert not any(poison in ids or "q4" in ids for ids, _, _ in own["done"])
    assert one["drawn"] == two["drawn"] and [d[2] for d in one["done"]] == [d[2] for d in two["done"]]


@pytest.mark.parametrize(
    ("steps", "wrong"),
    [
        ("Step(processes, 'q4', error=RunError)", ["ElsewhereError", "RunError"]),
        ("Step(processes, 'q0', 'q1', 'q2', 'q3', 'q4', 'q5', *(q.id for q in QUESTIONS))", ["ValueError"] * 2),
        ("lambda given: processes.agree(lambda: crowded(given))", ["ElsewhereError", "DataError"]),
        ("lambda given: alone(given)", ["DataError"] * 2),
    ],
    ids=["a run's error", "all fail", "no question explains it", "not agreed"],
)
def test_two_ranks_end_together_where_no_question_is_at_fault(tmp_path, steps, wrong):
    """Neither waits for the other, and nothing is noted; what is not agreed on is not tried again."""
    told = together(
        tmp_path,
        PARKING
        + f"""
tried = []

def crowded(given):
    tried.append(len(given))
    if rank == 1 and len(given) > 2:
        raise DataError("too many rows")

def alone(given):
    tried.append(len(given))
    raise DataError("by itself")

try:
    parking.do(mine, 2, {steps})
except Exception as error:
    wrong = type(error).__name__
end(wrong=wrong, tried=tried, failures=len(parking.failures))
""",
    )
    assert [each["wrong"] for each in told] == wrong and [each["failures"] for each in told] == [0, 0]
    if "alone" in steps:
        assert [each["tried"] for each in told] == [[6], [6]]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

TRAINING = """
import gc, hashlib, os
from PIL import Image
from accord.alignment.reward import FederatedReward
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from trl import GRPOConfig, GRPOTrainer
from accord.models.load import load_model

def digest(model):
    weights = [tensor.detach().numpy().tobytes() for tensor in model.state_dict().values()]
    return hashlib.sha256(b"".join(weights)).hexdigest()

def uneven(request):
    return ScoreReply(request.id, [[sum(map(ord, c)) % 7 / 3 for c in item.candidates] for item in request.items])

class Kept(FederatedReward):
    given = []

    def __call__(self, prompts, completions, **columns):
        Kept.given.append([c[0]["content"] for c in completions])
        return super().__call__(prompts, completions, **columns)

def equal(prompts, images, completions):
    return torch.full((sum(map(len, completions)), 2), 0.5)

model, processor = load_model(os.environ["POLICY"])
before = digest(model)
sites = {"here": uneven, "there": uneven}
reward = Kept(OneConnection(Spy(sites) if rank == 0 else None, list(sites)), equal, mode="soft")
rows = [(text, colour) for text in ("what colour is it?", "is it red?") for colour in ("red", "blue", "green")]
features = Features({"prompt": [{"role": Value("string"), "content": Value("string")}], "image": ImageFeature()})
pictures = out / "pictures"
pictures.mkdir(exist_ok=True)
for _, colour in rows:
    Image.new("RGB", (32, 32), colour).save(pictures / f"{rank}-{colour}.png")
data = Dataset.from_dict(
    {
        "prompt": [[{"role": "user", "content": text}] for text, _ in rows],
        "image": [{"bytes": None, "path": str(pictures / f"{rank}-{colour}.png")} for _, colour in rows],
    },
    features=features,
)
trainer = GRPOTrainer(
    model=model,
    processing_class=processor,
    reward_funcs=reward,
    train_dataset=data,
    args=GRPOConfig(
        output_dir=str(out / "trainer"),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=3,
        learning_rate=1e-2,
        beta=0.02,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
    ),
)
trainer.train()
absent = [entry["absent"] for entry in trainer.state.log_history if "absent" in entry]
counts = {site: count.messages for (site, _), count in reward.engine.traffic.counts.items()}
after = digest(trainer.accelerator.unwrap_model(trainer.model))
del trainer, reward, model  # the threads of the group live as long as a model that speaks through it
gc.collect()
dist.barrier()  # a group that one rank leaves while the other still speaks to it may abort the process
end(before=before, after=after, given=Kept.given, absent=absent, counts=counts)
"""


@pytest.mark.usefixtures("ranks_alone")
@pytest.mark.slow
def test_two_ranks_train_one_policy(tmp_path, llava):
    """Two steps of one prompt a rank: each site sees one message a step, which holds what either rank sampled."""
    (tmp_path / "script.py").write_text(BEGIN + TRAINING)
    done = subprocess.run(
        [*TORCHRUN, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "POLICY": llava, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["before"] == two["before"] and one["after"] == two["after"] != one["before"]
    assert one["absent"] == [0.0, 0.0] and one["counts"] == {"here": 2, "there": 2}
    assert len(one["asked"]) == len(one["given"]) == len(two["given"]) == 2
    for step, requests in enumerate(one["asked"]):
        sampled = [sorted(set(rank["given"][step])) for rank in (one, two)]
        for _, candidates in requests.values():
            assert [sorted(each) for each in candidates] == sampled


POISONED = """
import gc, hashlib, os, random
from accord.alignment.grpo import AlignmentConfig, align
from accord.alignment.reward import FederatedReward
from accord.data.images import image_bytes
from accord.models.load import load_model
from accord.types import Question
from PIL import Image
import io

def picture(colour):
    data = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(data, "PNG")
    return data.getvalue()

def question(name, image):
    return Question(name, image, "what colour is it?", "red", "colour", "x", "public")

class Odd(FederatedReward):
    def _finish(self, rewards, texts, cut):
        if "late" in self.asked:
            raise ValueError("no late questions")
        return super()._finish(rewards, texts, cut)

    def group(self, prompts, completions, columns):
        if "odd" in columns["question_id"]:
            raise ValueError("no odd questions")
        self.asked = columns["question_id"]
        return super().group(prompts, completions, columns)

def equal(prompts, images, completions):
    return torch.full((sum(map(len, completions)), 2), 0.5)

model, processor = load_model(os.environ["POLICY"], trainable=True)
sites = {"here": scores, "there": scores}
reward = Odd(OneConnection(Spy(sites) if rank == 0 else None, list(sites)), equal, mode="soft")
good = [question(colour, picture(colour)) for colour in ("red", "blue", "green", "black")]
records = []
trained = align(
    model,
    processor,
    [*good, question("torn", b"no picture"), question("odd", picture("white")), question("late", picture("white"))],
    reward,
    AlignmentConfig(
        steps=4, prompts_per_step=4, group_size=2, learning_rate=1e-3, max_completion_length=2, evaluate_every=0,
        save_every=0,
    ),
    seed=0, out=out / "trainer", log=records.append,
    failures=out / "failures.json" if os.environ["PARKING"] else None,
)
after = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trained.parameters())).hexdigest()
counts = {site: count.messages for (site, _), count in reward.engine.traffic.counts.items()}
del model, trained, reward
gc.collect()
dist.barrier()
end(after=after, records=records, counts=counts)
"""


@pytest.mark.usefixtures("ranks_alone")
@pytest.mark.slow
@pytest.mark.parametrize("parking", ["1", ""], ids=["left out", "not left out"])
def test_poison_does_not_end_a_training_of_two_ranks(tmp_path, llava, parking):
    """An image that is none, and questions on which the reward fails, before it asks or after; else they end it."""
    (tmp_path / "script.py").write_text(BEGIN + POISONED)
    done = subprocess.run(
        [*TORCHRUN, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "POLICY": llava, "OMP_NUM_THREADS": "1", "PARKING": parking, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if not parking:
        assert done.returncode != 0 and ("ImageError" in done.stderr or "no odd questions" in done.stderr)
        return
    assert done.returncode == 0, done.stderr[-5000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["after"] == two["after"]
    assert [record["step"] for record in one["records"]] == [1, 2, 3, 4]
    assert set(json.loads((tmp_path / "failures.json").read_text())) == {"torn", "odd", "late"}
    assert [(r["failed"], r["parked"]) for r in one["records"]] == [(r["failed"], r["parked"]) for r in two["records"]]
    assert one["records"][-1]["failed"] == 3 and done.stderr.count("was left out of a step") >= 3


def test_one_process_is_rank_0_of_1(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_count() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_and_count() == (1, 2)


def test_who_has_the_engine(monkeypatch):
    engine = InProcessEngine({"a": lambda request: None})
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RunError, match="rank 1 was given one; pass None on the others"):
        OneConnection(engine, ["a"])
    other = OneConnection(None, ["a"])
    assert list(other.sites) == ["a"]
    with pytest.raises(RunError, match=r"torch\.distributed has not started"):
        other.ask({})
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RunError, match="rank 0 was given none"):
        OneConnection(None, ["a"])
    with pytest.raises(RunError, match=r"the engine reaches \['a'\], not \['b'\]"):
        OneConnection(engine, ["b"])
    with pytest.raises(RunError, match="ask for scores and answers only, got a CardRequest"):
        OneConnection(engine, ["a"]).ask({"a": CardRequest("c")})
