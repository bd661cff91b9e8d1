"""The closed set of messages between the server and a site.

No type here can hold a preference pair, an annotation or a model of a site.

    server → site                          site → server
    ScoreRequest   images, prompts,        ScoreReply    standardised scores, one list per question
                   candidate answers       MissingImages names of images that the site has not kept
    AnswerRequest  images, prompts         AnswerReply   what the site's own model says to each: public questions, whose
                                                         answers the server grades itself
    UpdateRequest  weights of a model      UpdateReply   what local steps changed in them, number of examples, for
                                                         Fed-CMP one distance: the router's; those of policies
                                                         and reward models only for the baselines that share
                                                         parameters, which MoR never does
    CardRequest    –                       Card          what the site says of itself: counts, its model's ranking,
                                                         digests of what it must agree on with the server
    any                                    Refusal       that there is no answer, and of what kind the reason is: the
                                                         text of an error never leaves the site

Messages are typed MessagePack (msgspec, strict); weights inside them are safetensors bytes. Nothing is ever unpickled
or executed. An image is named by the SHA-256 of its stored bytes and sent to a site once: candidates share it, and a
site keeps it for later requests as long as its cache has room.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias, TypeVar, cast

import msgspec

from accord.errors import RecipeError, ReplyError
from accord.rewards.certificate import Certificate
from accord.types import Prompt


class ImageBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="image", tag_field="type"):
    """Where the image stands in a turn."""


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text", tag_field="type"):
    """A piece of text in a turn."""

    text: str


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[ImageBlock | TextBlock]


MAX_IMAGES: Final = 1024
"""Images of a question; a message with more is not read, since an empty name takes eight times its bytes in memory."""

Names: TypeAlias = Annotated[list[str], msgspec.Meta(max_length=MAX_IMAGES)]
"""The SHA-256 of the bytes of each image of a question, in the order of their places; none of one without images."""


class ScoreItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question about candidate answers."""

    images: Names
    prompt: list[Turn]
    candidates: list[str]


Images: TypeAlias = Annotated[dict[str, bytes], msgspec.Meta(max_length=65_536)]
"""Images by name. A longer mapping is refused before it is read: an empty entry takes 37 times its bytes in memory."""

Judge: TypeAlias = Literal["reward", "answer"]
"""What judges a candidate at a site: its reward model, or whether its own model's answer is the same, 1 or 0."""


class ScoreRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="score"):
    """Ask a site how good candidate answers are."""

    id: str
    images: Images  # those of the items' images that the site need not have
    items: list[ScoreItem]
    judge: Judge = "reward"
    truth: bool = False  # where the site owns the reference answer: whether the candidate is that, 1 or 0, in its place


class Declined(enum.Enum):
    """Why a site does not answer one question of a request, of which it answers the others."""

    IMAGE = "image"  # cannot be decoded within the site's memory and time
    LIMIT = "limit"  # more than the site takes in one request, or in a minute
    BUDGET = "budget"  # more than the site answers in a day, in a run or about one image
    ERROR = "error"  # the site's model failed on it


class ScoreReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="scores"):
    """Standardised scores, in the order of the request; none for a question that is refused."""

    id: str
    scores: list[list[float]]
    refused: dict[int, Declined] = {}  # by the question's place


class MissingImages(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="missing_images"):
    """Images that came neither with a request nor before; the same request with all of them is answered."""

    id: str
    images: list[str]


class AnswerItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question to a site's own model."""

    images: Names
    prompt: list[Turn]


class AnswerRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="answer"):
    """Ask what a site's own model says to questions; their reference answers stay where they are."""

    id: str
    images: Images
    items: list[AnswerItem]


class AnswerReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="answers"):
    """The site's answers, in the order of the request; an empty text for a question that is refused."""

    id: str
    answers: list[str]
    refused: dict[int, Declined] = {}  # by the question's place


Task: TypeAlias = Literal["router", "means", "reward", "supervised", "preference", "selector", "projector"]
"""What is trained at a site: MoR's router, or sums of its prompts' features that stand for one; the projector of the
policy that is to be; for baselines a reward model, the policy on answers or pairs, a selector."""


class UpdateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="update"):
    """Ask a site to improve a shared model on its data for a few steps."""

    id: str
    task: Task
    round: int
    weights: bytes  # safetensors: w^t
    seed: int
    state: bytes = b""  # safetensors; what the algorithm sends beside the weights, such as a control variate
    group: int = 0  # which of several models this is
    bits: Literal[16, 32] = 32  # of a number on its way, there and back


class UpdateReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="updated"):
    """What a site's local steps changed in the shared model."""

    id: str
    change: bytes  # safetensors: Δ_k = w_k − w^t
    examples: int  # n_k, the weight of this site in the average
    loss: float
    state: bytes = b""
    steps: int = 1  # S_k, how many local steps these were
    distance: float | None = None  # d_k of `accord.federation.reliability`, where the task measures it


class CardRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="card"):
    """Ask a site to describe itself for the report."""

    id: str


MESSAGES = 3
"""The version of these messages; it rises when servers or sites of the version before could not work with it."""


class Agreement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a site or the server works by, and must be the same at all of them (`accord.federation.agreement`)."""

    messages: int
    accord: str
    sites: str
    router: str
    scores: str
    policy: str


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="card_reply"):
    """What a site says of itself: sizes and quality, nothing of its content."""

    id: str
    architecture: str
    parameters: int
    questions: int
    pairs: int
    constructed: bool
    ranking: dict[str, float]
    privacy: Certificate | None = None  # the guarantee that its reward model carries, if any
    agreement: Agreement | None = None  # None from an Accord that knew of none


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refusal"):
    """A site's word that it gives no answer: it does not do that, cannot read the request, failed, or is not there."""

    id: str
    reason: Literal["error", "refused", "invalid", "gone"]


class Absence(msgspec.Struct, frozen=True):
    """A site that did not answer. Absent is not zero: a reader of scores must leave the site out."""

    site: str
    reason: Literal["error", "late", "refused", "invalid", "gone"]


WithImages: TypeAlias = ScoreRequest | AnswerRequest
"""Requests about images, of which each travels to a site once."""

Request: TypeAlias = ScoreRequest | AnswerRequest | UpdateRequest | CardRequest
Reply: TypeAlias = ScoreReply | MissingImages | AnswerReply | UpdateReply | Card | Refusal
T = TypeVar("T")
Answered = TypeVar("Answered", ScoreReply, AnswerReply, UpdateReply, Card)


@dataclass(frozen=True)
class ScoreRange:
    """The range into which every site brings its standardised scores z before they leave it; checked on arrival.

        clip       min(max(z, low), high)
        sigmoid    low + (high − low) σ(z)         for scores of a reward model; what is 0 or 1 already is clipped

    The one-sided clip, the default, keeps a group in which every answer is poor from turning the reward model's small
    noise into advantages. The sigmoid keeps the order of all scores, that noise included.
    """

    low: float = 0.0
    high: float = 2.0
    form: Literal["clip", "sigmoid"] = "clip"

    def __post_init__(self) -> None:
        """Refuse an empty range: everything clipped to one value is no judgement."""
        if not self.low < self.high:
            raise RecipeError(
                f"scores.low must be below scores.high, got {self.low} and {self.high}; correct the range, or leave "
                "the table out for the default"
            )


MAX_SCORE = 1e4
"""A standardised score beyond this is no score; it would drown every other site's."""

MAX_ANSWER = 256
"""Characters of an answer to a question that the server grades by exact match."""

MAX_NAME = 100
"""Characters of an architecture's or a question type's name."""


class _Stored(msgspec.Struct):
    """What of a request takes no more memory than it has bytes."""

    images: msgspec.Raw = msgspec.Raw()
    weights: msgspec.Raw = msgspec.Raw()
    state: msgspec.Raw = msgspec.Raw()


_encoder = msgspec.msgpack.Encoder()
_stored = msgspec.msgpack.Decoder(_Stored)
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """Return the bytes that cross the border."""
    return _encoder.encode(message)


def decode_request(data: bytes) -> Request:
    """Parse a request at a site.

    Raises:
        ReplyError: it is not one of the closed set.
    """
    return cast(Request, _decode(_requests, data))


def text_bytes(data: bytes) -> int:
    """Return how many bytes of a message are neither images nor weights: those take twenty times as many in memory.

    Raises:
        ReplyError: it is no mapping.
    """
    stored = _decode(_stored, data)
    return len(data) - sum(len(bytes(part)) for part in (stored.images, stored.weights, stored.state))


def decode_reply(data: bytes) -> Reply:
    """Parse a reply at the server.

    Raises:
        ReplyError: it is not one of the closed set.
    """
    return cast(Reply, _decode(_replies, data))


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ReplyError(f"cannot read a message of {len(data)} bytes: {error}") from error


def to_turns(prompt: Prompt) -> list[Turn]:
    """Convert a chat-form prompt for the wire; an image inside a block is dropped, it travels by its name."""
    turns = []
    for message in prompt:
        content = message["content"]
        if not isinstance(content, str):
            assert isinstance(content, Sequence)
            content = [ImageBlock() if block["type"] == "image" else TextBlock(block["text"]) for block in content]
        turns.append(Turn(message["role"], content))  # type: ignore[arg-type]
    return turns


def from_turns(turns: Sequence[Turn]) -> list[dict[str, object]]:
    """Convert a prompt from the wire back to the chat form."""
    built: list[dict[str, object]] = msgspec.to_builtins(list(turns))
    return built


def image_name(data: bytes) -> str:
    """Return the name under which an image travels: the SHA-256 of its bytes, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def check_images(images: Mapping[str, bytes]) -> None:
    """Check at the site that each image is what its name says.

    Raises:
        ReplyError: one is not.
    """
    for name, data in images.items():
        if image_name(data) != name:
            raise ReplyError(f"image {name[:12]}… does not match its SHA-256; it was changed on its way")


def reply_limit(request: Request) -> int:
    """Return how many bytes an honest reply to a request may have; a longer one is dropped before it is read.

    A reply of empty lists takes seventy times its bytes in memory.
    """
    if isinstance(request, ScoreRequest):  # nine bytes a score, or a name of 66 an image
        return 4096 + sum(80 + 9 * len(item.candidates) + 66 * len(item.images[1:]) for item in request.items)
    if isinstance(request, AnswerRequest):  # a character has four bytes at most
        return 4096 + sum(8 + 4 * MAX_ANSWER + 66 * len(item.images[1:]) for item in request.items)
    if isinstance(request, UpdateRequest):
        return 65_536 + 2 * (len(request.weights) + len(request.state))
    return 65_536


def check_kind(request: Request, reply: Reply, kind: type[Answered], what: str) -> Answered:
    """Return a reply that is of its request's kind and answers it; `what` it must be, for the message.

    Raises:
        ReplyError: it is of another kind, or answers another request.
    """
    if not isinstance(reply, kind):
        raise ReplyError(f"expected {what}, got a {type(reply).__name__}")
    if reply.id != request.id:
        raise ReplyError(f"reply to request {reply.id!r:.40}, expected {request.id!r}")
    return reply


def check_card(request: CardRequest, reply: Reply) -> Card:
    """Validate what a site says of itself before it is shown.

    Raises:
        ReplyError: wrong type or request id, a count below 0, a share outside 0 to 1, text that is long or cannot be
            printed, or a certificate with a number that is none.
    """
    reply = check_kind(request, reply, Card, "a card")
    if min(reply.parameters, reply.questions, reply.pairs) < 0:
        raise ReplyError(f"a count of {min(reply.parameters, reply.questions, reply.pairs)}")
    for share in reply.ranking.values():
        if not 0 <= share <= 1:
            raise ReplyError(f"a ranking of {share}, which must be from 0 to 1")
    agreed = () if reply.agreement is None else map(str, msgspec.structs.astuple(reply.agreement))
    for text in (reply.architecture, *reply.ranking, *agreed):
        if len(text) > MAX_NAME or not text.isprintable():
            raise ReplyError(f"a name {text[:40]!a}, which must be printable and of {MAX_NAME} characters at most")
    if reply.privacy is not None:
        for number in msgspec.structs.astuple(reply.privacy):
            if isinstance(number, float) and not math.isfinite(number):
                raise ReplyError(f"a certificate of privacy with the number {number}")
    return reply


def check_scores(
    request: ScoreRequest, reply: Reply, low: float = -MAX_SCORE, high: float = MAX_SCORE
) -> list[list[float] | None]:
    """Validate a site's scores before use; None stands for a group that was refused or has a score that is not finite.

    The site is absent for that group.

    Raises:
        ReplyError: wrong type, request id, or shape, or a score outside `low` to `high`, the range that was agreed.
    """
    reply = check_kind(request, reply, ScoreReply, "scores")
    if len(reply.scores) != len(request.items):
        raise ReplyError(f"scores for {len(reply.scores)} questions, expected {len(request.items)}")
    _check_refused(request, reply)
    checked: list[list[float] | None] = []
    for n, (item, scores) in enumerate(zip(request.items, reply.scores, strict=True)):
        if n in reply.refused:
            checked.append(None)
            continue
        if len(scores) != len(item.candidates):
            raise ReplyError(f"{len(scores)} scores for {len(item.candidates)} candidates")
        if not all(map(math.isfinite, scores)):
            checked.append(None)
            continue
        if any(not low - 1e-6 <= score <= high + 1e-6 for score in scores):
            worst = max(scores, key=lambda score: max(low - score, score - high))
            raise ReplyError(f"a standardised score of {worst:.3g}, beyond the limits of {low:g} and {high:g}")
        checked.append(scores)
    return checked


def check_answers(request: AnswerRequest, reply: Reply) -> list[str | None]:
    """Validate a site's answers before they are graded; None stands for a question that was refused.

    They may hold any character: compare them, never print them.

    Raises:
        ReplyError: wrong type, request id or number, or an answer of more than `MAX_ANSWER` characters.
    """
    reply = check_kind(request, reply, AnswerReply, "answers")
    if len(reply.answers) != len(request.items):
        raise ReplyError(f"answers to {len(reply.answers)} questions, expected {len(request.items)}")
    longest = max(map(len, reply.answers), default=0)
    if longest > MAX_ANSWER:
        raise ReplyError(f"an answer of {longest} characters, at most {MAX_ANSWER} are allowed")
    _check_refused(request, reply)
    return [None if n in reply.refused else answer for n, answer in enumerate(reply.answers)]


def _check_refused(request: WithImages, reply: ScoreReply | AnswerReply) -> None:
    given: Sequence[object] = reply.scores if isinstance(reply, ScoreReply) else reply.answers
    for n in reply.refused:
        if not 0 <= n < len(request.items) or given[n]:
            raise ReplyError(f"question {n} of {len(request.items)} is refused, and is none of them or answered")
