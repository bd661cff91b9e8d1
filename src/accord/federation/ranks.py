"""One connection to the sites for all processes of a training run.

Under `accelerate launch` with W processes (ranks) each has completions of its own, and TRL calls the reward function
in each. The sites must not notice: they see one federation that sends them one message a step.

    rank 0 … W−1   their requests, encoded → rank 0
    rank 0         merges those to one site, an image once; asks; takes the replies apart
    rank 0 … W−1   ← each its scores; an absence reaches all who asked

`accord run` under a launcher goes further (`Together`): rank 0 does alone what is one process's, as if it had not been
launched with others, and the others wait until it begins to align.

Between ranks travels MessagePack in byte tensors, in a group of its own over gloo: torch.distributed's collectives for
objects pickle, and a backend of GPUs would want the bytes there. Every rank takes part in every question, also with
nothing to ask, or the others wait for it. What a rank does by itself in between, and may fail at, it does by
`Processes.agree`: all go on, or all fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Final, cast

import msgspec
import torch
import torch.distributed as dist
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from torch import Tensor

from accord.errors import ReplyError, RunError
from accord.federation.engine import Done, Engine, Traffic, agree, kind_of
from accord.federation.messages import (
    Absence,
    AnswerReply,
    AnswerRequest,
    Reply,
    Request,
    ScoreReply,
    ScoreRequest,
    WithImages,
    check_answers,
    check_scores,
)

PATIENCE: Final = timedelta(days=7)
"""How long ranks wait for each other: rank 0 may wait for sites meanwhile. One that dies is missed at once."""


class Answers(msgspec.Struct, frozen=True):
    """What rank 0 tells a rank: what the sites said to it, or why none could be asked."""

    replies: dict[str, ScoreReply | AnswerReply]
    absences: dict[str, Absence]
    problem: str = ""


_requests = msgspec.msgpack.Decoder(dict[str, WithImages])
_answers = msgspec.msgpack.Decoder(Answers)


def rank_and_count() -> tuple[int, int]:
    """Return which process this is, and of how many: by torch.distributed, or before it starts by its launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """What the ranks of a training tell each other, in a group over gloo; one that is alone tells itself."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """The number of ranks."""
        return rank_and_count()[1]

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over the ranks, the same on all of them."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self._ranks())
        return cast(list[float], summed.tolist())

    def agree(self, work: Callable[[], Done]) -> Done:
        """Return `work()`, or fail on all ranks, as `accord.federation.engine.agree`."""
        return agree(self.total, work)

    def gather(self, data: bytes, *, everywhere: bool = False) -> list[bytes]:
        """Return every rank's bytes on rank 0, nothing elsewhere; or on all ranks."""
        rank, count = rank_and_count()
        if count == 1:
            return [data]
        group = self._ranks()
        sizes = torch.zeros(count, dtype=torch.int64)
        sizes[rank] = len(data)
        dist.all_reduce(sizes, group=group)
        longest = int(sizes.max())
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(count)] if everywhere or rank == 0 else None
        if everywhere:
            dist.all_gather(parts, _padded(data, longest), group=group)
        else:
            dist.gather(_padded(data, longest), parts, dst=0, group=group)
        return [_cut(part, size) for part, size in zip(parts or (), sizes, strict=False)]

    def scatter(self, parts: Sequence[bytes]) -> bytes:
        """Return this rank's share of what rank 0 hands out, one for each rank."""
        group, (rank, count) = self._ranks(), rank_and_count()
        sizes = torch.tensor([len(data) for data in parts] if rank == 0 else [0] * count)
        dist.broadcast(sizes, src=0, group=group)
        longest = int(sizes.max())
        own = torch.empty(longest, dtype=torch.uint8)
        dist.scatter(own, [_padded(data, longest) for data in parts] if rank == 0 else None, src=0, group=group)
        return _cut(own, sizes[rank])

    def _ranks(self) -> dist.ProcessGroup:
        if self._group is None:  # not before the first question: by then the trainer has started torch.distributed
            if not dist.is_initialized():
                raise RunError(
                    "torch.distributed has not started; ask when the trainer is made, and use `accelerate launch`"
                )
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        return self._group


LAUNCHER: Final = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_", "ACCELERATE_", "FSDP_"),
)
"""What launchers' variables are called, or begin with."""


class Together:
    """The processes that a launcher has started with this one, of which rank 0 owns the run folder.

    Rank 0 is by itself from the beginning: `transformers.Trainer` would take a launcher's variables for a training that
    all take part in. It meets the others once (`meet`), and parts from them once (`part`).
    """

    def __init__(self) -> None:
        self.rank, self.count = rank_and_count()
        self._hidden: dict[str, str] = {}
        self._group: dist.ProcessGroup | None = None
        if self.rank == 0:
            self._hide()

    def _hide(self) -> None:
        self._hidden = {name: value for name, value in os.environ.items() if name.startswith(LAUNCHER)}
        for name in self._hidden:
            del os.environ[name]

    @property
    def met(self) -> bool:
        """Whether the others are there, between `meet` and `part`."""
        return self._group is not None

    def meet(self, stages: Sequence[str] = ()) -> list[str]:
        """Wait for all ranks, and return the stages that rank 0 says they do together."""
        os.environ.update(self._hidden)
        AcceleratorState._reset_state(reset_partial_state=True)  # rank 0 was alone
        PartialState(timeout=PATIENCE)
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        return msgspec.msgpack.decode(self.tell(msgspec.msgpack.encode(list(stages))), type=list[str])

    def tell(self, data: bytes = b"") -> bytes:
        """Return rank 0's `data`, not empty, on all ranks, once all are there; what others pass is not read."""
        size = torch.tensor(len(data))
        dist.broadcast(size, src=0, group=self._group)
        told = _padded(data, int(size)) if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(told, src=0, group=self._group)
        return told.numpy().tobytes()

    def wait(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier(group=self._group)

    def part(self) -> None:
        """End what was done together; from here on rank 0 is by itself, and the others have nothing to do."""
        self.wait()
        dist.destroy_process_group()
        self._group = None
        AcceleratorState._reset_state(reset_partial_state=True)
        if self.rank == 0:
            self._hide()


class OneConnection:
    """The engine of every rank; rank 0 alone has a real one.

    Args:
        engine: carries the questions; None on all ranks but 0.
        sites: the sites' names, `[K]`, in the engine's order.

    Raises:
        RunError: rank 0 has no engine, another rank has one, or the engine reaches other sites.
    """

    def __init__(self, engine: Engine | None, sites: Sequence[str]) -> None:
        rank, _ = rank_and_count()
        if (engine is None) == (rank == 0):
            has = "none" if engine is None else "one"
            raise RunError(f"rank 0 alone has an engine, and rank {rank} was given {has}; pass None on the others")
        if engine is not None and tuple(engine.sites) != tuple(sites):
            raise RunError(f"the engine reaches {list(engine.sites)}, not {list(sites)}; name its sites in its order")
        self.traffic = Traffic() if engine is None else engine.traffic
        self._engine, self._sites = engine, tuple(sites)
        self._processes = Processes()

    @property
    def sites(self) -> Sequence[str]:
        """The sites' names, `[K]`."""
        return self._sites

    @property
    def processes(self) -> int:
        """The number of ranks."""
        return self._processes.count

    def ask(self, requests: Mapping[str, Request], *, deadline: float | None = None) -> dict[str, Reply | Absence]:
        """Ask together with all other ranks; return the answers to this one's requests.

        Raises:
            RunError: a request is neither for scores nor for answers, ranks ask one site for different things, or rank
                0 could not ask.
        """
        for request in requests.values():
            if not isinstance(request, WithImages):
                raise RunError(
                    f"several processes together ask for scores and answers only, got a {type(request).__name__}; "
                    "do what asks for it before, in one process"
                )
        asked = self._processes.gather(msgspec.msgpack.encode(requests))
        answers: list[Answers] = []
        if self._engine is not None:
            try:
                answers = _ask(self._engine, [_requests.decode(data) for data in asked], deadline)
            except Exception as error:
                self._hand_out([Answers({}, {}, str(error) or type(error).__name__) for _ in asked])
                raise
        own = self._hand_out(answers)
        if own.problem:
            raise RunError(f"rank 0 could not ask the sites: {own.problem}")
        return {**own.replies, **own.absences}

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over the ranks, the same on all of them."""
        return self._processes.total(values)

    def _hand_out(self, answers: Sequence[Answers]) -> Answers:
        return _answers.decode(self._processes.scatter([msgspec.msgpack.encode(each) for each in answers]))


def _ask(engine: Engine, by_rank: Sequence[Mapping[str, WithImages]], deadline: float | None) -> list[Answers]:
    """Ask what the ranks want to know; return what each is told."""
    asking = {site: [n for n, asked in enumerate(by_rank) if site in asked] for site in engine.sites}
    merged = {site: _merge([by_rank[n][site] for n in ranks]) for site, ranks in asking.items() if ranks}
    answers = [Answers({}, {}) for _ in by_rank]
    for site, reply in engine.ask(merged, deadline=deadline).items():
        said: Reply | Absence = reply
        if not isinstance(reply, Absence):
            try:
                _check(merged[site], reply)  # what has another shape cannot be taken apart
            except ReplyError:
                engine.traffic.counts[site, kind_of(merged[site])].absences += 1
                said = Absence(site, "invalid")
        start = 0
        for n in asking[site]:
            request = by_rank[n][site]
            end = start + len(request.items)
            if isinstance(said, ScoreReply | AnswerReply):
                refused = {n - start: why for n, why in said.refused.items() if start <= n < end}
            if isinstance(said, ScoreReply):
                answers[n].replies[site] = ScoreReply(request.id, said.scores[start:end], refused)
            elif isinstance(said, AnswerReply):
                answers[n].replies[site] = AnswerReply(request.id, said.answers[start:end], refused)
            else:
                answers[n].absences[site] = cast(Absence, said)
            start = end
    return answers


def _check(request: WithImages, reply: Reply) -> None:
    if isinstance(request, ScoreRequest):
        check_scores(request, reply)
    else:
        check_answers(request, reply)


def _merge(requests: Sequence[WithImages]) -> WithImages:
    """Return one request for all of one kind, an image once.

    Raises:
        RunError: they ask for different things.
    """
    kinds = {_kind(request) for request in requests}
    if len(kinds) > 1:
        raise RunError(f"several processes ask one site for different things, {sorted(kinds)}; ask for one at a time")
    images = {name: data for request in requests for name, data in request.images.items()}
    if isinstance(requests[0], AnswerRequest):
        asked = [item for request in requests if isinstance(request, AnswerRequest) for item in request.items]
        return AnswerRequest(requests[0].id, images, asked)
    scored = [item for request in requests if isinstance(request, ScoreRequest) for item in request.items]
    return msgspec.structs.replace(requests[0], images=images, items=scored)


def _kind(request: WithImages) -> tuple[str, str, bool]:
    if isinstance(request, AnswerRequest):
        return "answer", "", False
    return "score", request.judge, request.truth


def _padded(data: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)


def _cut(part: Tensor, size: Tensor) -> bytes:
    return part[: int(size)].numpy().tobytes()
