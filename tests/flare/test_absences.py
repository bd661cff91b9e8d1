"""Sites that are slow, silent, killed and started again, through real FLARE (threats T23, T24)."""

import contextlib
import random
import threading
import time

import psutil
import pytest
import torch
from PIL import Image

from accord.alignment.reward import FederatedReward, Waiting
from accord.errors import DataWarning
from accord.federation.messages import (
    Absence,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    decode_request,
    encode,
    image_name,
)
from accord.flare.frames import send_frame
from accord.flare.launch import Production
from accord.types import vqa_prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

IMAGE = b"any bytes"


def scored(site):
    """Each site adds its own number to a candidate's: 0, 10 and 20."""

    def reply(message):
        request = decode_request(message)
        more = 10.0 * list(REPLIES).index(site)
        return encode(ScoreReply(request.id, [[float(c) + more for c in item.candidates] for item in request.items]))

    return reply


REPLIES = {name: scored(name) for name in ("first", "second", "third")}


class Asking:
    """Asks all sites, counts what happened, and checks every answer: none may be another question's or site's."""

    def __init__(self, wire):
        self.wire, self.engine = wire, wire.engine()
        self.asks, self.accepted, self.absent = 0, dict.fromkeys(wire.names, 0), dict.fromkeys(wire.names, 0)
        self.ids = {name: set() for name in wire.names}
        self.before = {name: (count.messages, count.absences) for name, count in self.counts().items()}

    def counts(self):
        return {name: self.engine.traffic.counts[name, "score"] for name in self.wire.names}

    def __call__(self, deadline):
        """Ask once; return the reasons of the absences, by site, and the seconds."""
        self.asks += 1
        item = ScoreItem([image_name(IMAGE)], [], [f"{time.monotonic_ns() % 10**9}", "1"])
        requests = {
            name: ScoreRequest(f"ask-{self.asks}-{name}", {image_name(IMAGE): IMAGE}, [item])
            for name in self.wire.names
        }
        began = time.monotonic()
        replies = self.engine.ask(requests, deadline=deadline)
        seconds, missing = time.monotonic() - began, {}
        for n, (name, reply) in enumerate(replies.items()):
            if isinstance(reply, Absence):
                self.absent[name] += 1
                missing[name] = reply.reason
                continue
            assert reply.id == requests[name].id and reply.id not in self.ids[name]
            assert reply.scores == [[float(item.candidates[0]) + 10 * n, 1.0 + 10 * n]]
            self.ids[name].add(reply.id)
            self.accepted[name] += 1
        return missing, seconds

    def until_all(self, seconds, deadline=3.0):
        """Ask until everybody answers; return how many asks it took."""
        end, asks = time.monotonic() + seconds, 0
        while True:
            asks += 1
            missing, _ = self(deadline)
            if not missing:
                return asks
            assert time.monotonic() < end, (missing, self.wire.said)
            time.sleep(0.5)

    def check(self):
        """Every question became one reply or one absence at every site, and the engine counted the same."""
        for name, count in self.counts().items():
            messages, absences = self.before[name]
            assert count.messages - messages == self.asks == self.accepted[name] + self.absent[name]
            assert count.absences - absences == self.absent[name]


@pytest.fixture
def asking(wire):
    made = Asking(wire)
    made.until_all(120)
    yield made
    made.check()


def tenfold(stop):
    """Answers in ten times the time that the deadline allows."""

    def send(connection, data):
        stop.wait(20.0)
        send_frame(connection, data)

    return send


def for_ever(stop):
    return lambda connection, data: stop.wait()


def trickle(stop):
    """The right answer, one byte a second."""

    def send(connection, data):
        for byte in len(data).to_bytes(8, "big") + data:
            with contextlib.suppress(OSError):
                connection.sendall(bytes([byte]))
            if stop.wait(1.0):
                return

    return send


def rewards(engine, deadline):
    """Rewards of two prompts with two completions each, numbered 0 to 3; the second is for the third site alone."""

    def router(prompts, images, candidates):
        return torch.tensor([[1 / 3] * 3] * 2 + [[0.0, 0.0, 1.0]] * 2)

    reward = FederatedReward(engine, router, mode="soft", waiting=Waiting(deadline=deadline))
    prompts = [vqa_prompt("which?")] * 2 + [vqa_prompt("what?")] * 2
    return reward(prompts, ["0", "1", "2", "3"], image=[Image.new("RGB", (8, 8))] * 4)


@pytest.mark.parametrize("way", [tenfold, for_ever, trickle])
def test_a_slow_site_costs_its_deadline_and_no_more(asking, way):
    """T23: one of three. A mean of scores n, n + 10 and n + 20 is n + 10; without the third it is n + 5.

    What only the third site could say has no reward, and none is 0.
    """
    engine, stop, deadline = asking.engine, threading.Event(), 2.0
    assert rewards(engine, 30.0) == pytest.approx([10.0, 11.0, 22.0, 23.0])
    third = asking.wire.services["third"]
    third.send = way(stop)
    segments = sum("a segment with" in words for words in asking.wire.said)
    began = time.monotonic()
    with pytest.warns(DataWarning, match=r"site third gave no answer \(late\)"):
        assert rewards(engine, deadline) == pytest.approx([5.0, 6.0, None, None])
    assert deadline <= time.monotonic() - began <= 1.1 * deadline + 1.0
    third.send = send_frame
    stop.set()
    assert rewards(engine, 30.0) == pytest.approx([10.0, 11.0, 22.0, 23.0])  # one miss, and all is as before
    assert sum("a segment with" in words for words in asking.wire.said) == segments
    for name in asking.wire.names:  # three questions of the reward's own, one of them absent at the third site
        messages, absences = asking.before[name]
        asking.before[name] = (messages + 3, absences + (name == "third"))


def test_a_service_that_ends_is_gone_at_once_and_back_at_once(asking):
    """FLARE's client lives on and says that nobody answers; no deadline passes, and no segment begins."""
    service, said = asking.wire.services["second"], len(asking.wire.said)
    for _ in range(3):
        service.stop()
        for _ in range(3):
            missing, seconds = asking(60.0)
            assert missing == {"second": "gone"} and seconds < 5
        service.start()
        assert asking(60.0)[0] == {}
    assert asking.wire.said[said:] == []


def kill_and_wait(asking, name, chance):
    """Kill a site's process tree, ask without it, start it again; return how many asks it then took."""
    wire = asking.wire
    wire.kill(name)
    others = {}
    for _ in range(chance.randint(1, 4)):
        missing, seconds = asking(2.0)
        others |= {site: reason for site, reason in missing.items() if site != name}
        assert missing.get(name) in ("late", "gone") and seconds < 60
    assert others == {}
    wire.start(name)
    return asking.until_all(240)


def test_a_revoked_site_is_asked_no_more(asking):
    """Its FLARE process goes on, as an honest site's does not, and so does the segment that it is in."""
    wire, access = asking.wire, Production(asking.wire.kits / "operator")
    try:
        assert access.revoke("third")
        end = time.monotonic() + 90
        while asking(10.0)[0] != {"third": "gone"}:
            assert time.monotonic() < end, wire.said
            time.sleep(0.5)
        asked = len(wire.services["third"].asked)
        for _ in range(5):
            assert asking(10.0)[0] == {"third": "gone"}
        assert len(wire.services["third"].asked) == asked
        assert wire.said[-1] == "a segment with first, second"
        assert access.admit("third") and not access.admit("third")
    finally:
        access.close()
    wire.kill("third")
    wire.start("third")
    asking.until_all(240)


def job_processes(wire, name):
    """FLARE's processes for jobs at a participant; a job has one."""
    lines = (" ".join(each.cmdline()) for each in psutil.Process(wire.processes[name].pid).children(recursive=True))
    return [line for line in lines if "nvflare" in line]


@pytest.mark.long
def test_a_site_that_is_killed_three_times_takes_part_again(asking):
    """T24: its whole process tree, with SIGKILL. Nobody touches the server; no reply is counted twice."""
    chance = random.Random(24)
    asks = [kill_and_wait(asking, "third", chance) for _ in range(3)]
    assert max(asks) < 240
    assert asking.wire.said[-1] == "a segment with first, second, third"
    end = time.monotonic() + 120
    while any(len(job_processes(asking.wire, name)) > 1 for name in asking.wire.processes):  # earlier segments' jobs
        assert time.monotonic() < end
        time.sleep(0.5)
    assert len(job_processes(asking.wire, "server")) == 1


def lose_server(asking):
    """Kill the server while a question is on its way to all sites; they are absent long before the deadline.

    A question that is asked after the engine has seen the loss would wait for the server.
    """
    wire, stop = asking.wire, threading.Event()
    for service in wire.services.values():
        service.send = for_ever(stop)
    killer = threading.Timer(1.0, wire.kill, ("server",))
    killer.start()
    missing, seconds = asking(60.0)
    killer.join()
    stop.set()
    for service in wire.services.values():
        service.send = send_frame
    assert missing == dict.fromkeys(wire.names, "gone") and 0.5 < seconds < 20


def test_a_server_that_is_killed_and_started_again(asking):
    """A question on its way is lost, the next waits for the server; engine and sites go on by themselves."""
    said = len(asking.wire.said)
    lose_server(asking)
    back = threading.Timer(3.0, asking.wire.start, ("server",))
    back.start()
    asking.until_all(240)
    back.join()
    assert any("waiting for" in words for words in asking.wire.said[said:])


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_fifty_kills(asking):
    """T24 in full: sites, services and the server in turn."""
    chance = random.Random(50)
    for _ in range(50):
        victim = chance.choice([*asking.wire.names, "service", "server"])
        if victim == "service":
            service = asking.wire.services[chance.choice(asking.wire.names)]
            service.stop()
            asking(5.0)
            service.start()
            assert asking.until_all(240) < 60
        elif victim == "server":
            lose_server(asking)
            asking.wire.start("server")
            asking.until_all(240)
        else:
            kill_and_wait(asking, victim, chance)
