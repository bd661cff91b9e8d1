"""Look a site over before it joins: its data, its model, its certificate, what FLARE may do here, and what will leave.

Each finding is fine, or names the problem and the remedy. Nothing is sent to anyone but a greeting to the server, by
which it and this site show each other their certificates.
"""

from __future__ import annotations

import math
import random
import socket
import ssl
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import torch

from accord.data.images import image_bytes, image_id, load_images
from accord.data.questions import normalise_answer
from accord.errors import AccordError, DataWarning
from accord.federation.answering import Answerer, read_truth
from accord.federation.endpoint import CACHE_BYTES
from accord.federation.messages import MAX_ANSWER, AnswerItem, to_turns
from accord.federation.site import SiteRecord
from accord.federation.weights import to_bytes, trainable_weights
from accord.flare.service import alone, read_site_folder
from accord.models.load import load_config, parameter_count
from accord.recipe import Recipe
from accord.rewards.model import RewardModel
from accord.routing.router import RouterNetwork
from accord.stages.job import Job
from accord.stages.process import prepare
from accord.stages.sites import construct_pairs, open_site, site_pairs, site_seed
from accord.types import PreferencePair, prompt_of

if TYPE_CHECKING:
    from accord.flare.kit import Kit

PAIRS: Final = 32
"""Pairs that are scored."""

SECONDS: Final = 5.0
"""In which the server must answer."""

DAYS: Final = 30
"""Fewer days of a certificate are a problem: a run may take weeks, and so may a new kit."""

NOT_PROTECTED: Final = (
    "scores carry no noise: with enough of them a server can rebuild what the reward model thinks",
    "without privacy.router in the recipe router weights carry no noise: what a small round of pairs looked like in "
    "the encoder can partly be told",
    "with answers or owns in the recipe: a server that has an image of yours can ask whether you own a question about "
    "it, and by trying candidates, which answer you hold",
    "the consortium's administrator can see that this site is there, and stop its jobs",
)


@dataclass(frozen=True)
class Finding:
    """What a look at one thing showed; with a remedy it is a problem."""

    about: str
    text: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is to be done."""
        return not self.remedy


class _Component(msgspec.Struct):
    path: str


class _Resources(msgspec.Struct):
    """What FLARE reads in `local/resources.json`; what is missing there is what FLARE takes for it."""

    components: list[_Component] = []
    class_allow_list: list[str] = []
    class_list_enforcement_mode: str = ""
    allow_log_streaming: bool = True


class _Authorization(msgspec.Struct):
    permissions: dict[str, str | dict[str, str | list[str]]]


@dataclass(frozen=True)
class Crossing:
    """Something that crosses the border, and how much of it."""

    way: str  # "leaves", "enters" or "stays"
    what: str
    amount: str


def check_site(kit: Kit, folder: Path, *, server: bool = True) -> Iterator[Finding]:
    """Look at everything, the quick things first.

    Args:
        kit: the site's start-up kit.
        folder: the site's run folder.
        server: whether to greet the server.
    """
    yield check_expiry(kit)
    yield from check_policies(kit)
    if server:
        yield check_server(kit)
    yield from check_admission(kit)
    try:
        recipe = read_site_folder(folder, kit.name)
    except AccordError as error:
        yield _problem("site's folder", error)
        return
    prepare(recipe)
    job = alone(recipe, kit.name, folder)
    yield from check_data(job, kit.name)
    try:
        site = open_site(recipe, folder, kit.name, scores=recipe.scores)
    except AccordError as error:
        yield _problem("reward model", error)
        return
    model = site.reward_model
    memory = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    yield Finding(
        "reward model", f"{model.architecture}, {parameter_count(model):,} parameters, {_size(memory)} of memory"
    )
    yield check_scores(job, kit.name, model)
    if site.answerer is not None:
        yield check_answerer(job, kit.name, site.answerer)


def check_expiry(kit: Kit) -> Finding:
    """Check the certificate as the server will, and how long it still holds."""
    from accord.flare.kit import check_certificate

    try:
        until = check_certificate(kit)
    except AccordError as error:
        return _problem("certificate", error)
    days = (until - datetime.now(UTC)).days
    remedy = "" if days >= DAYS else "ask the consortium's lead for a new kit now"
    text = f"{kit.name}, signed by the authority of {kit.consortium}, valid until {until:%Y-%m-%d}: {days} days"
    return Finding("certificate", text, remedy)


def check_policies(kit: Kit) -> Iterator[Finding]:
    """Check that a job can build nothing but our relay here, brings no code, and that no log is sent."""
    from accord.flare.kit import CLASSES
    from accord.flare.provision import DENIED

    local, again = kit.path / "local", "unpack the kit again, or ask the consortium's lead for a new one"
    try:
        resources = msgspec.json.decode((local / "resources.json").read_bytes(), type=_Resources)
        permissions = msgspec.json.decode((local / "authorization.json").read_bytes(), type=_Authorization).permissions
    except (OSError, msgspec.MsgspecError) as error:
        yield Finding("FLARE: policies", f"{local} cannot be read: {error}", again)
        return
    own = [component.path for component in resources.components]
    foreign = sorted({*resources.class_allow_list} - {*CLASSES["site"], *own})
    if resources.class_list_enforcement_mode != "enforce":
        foreign = ["anything, since the list is not enforced"]
    text = f"a job may build {', '.join(foreign)}" if foreign else "a job may build nothing but Accord's relay"
    yield Finding("FLARE: classes", text, f"{again}: {local / 'resources.json'} was changed" if foreign else "")
    streams = resources.allow_log_streaming or any("log_streamer" in path for path in own)
    remedy = f'set "allow_log_streaming": false in {local / "resources.json"}, and take the log streamer out'
    text = "logs are sent to the server" if streams else "no log is sent to the server"
    yield Finding("FLARE: logs", text, remedy if streams else "")
    granted = [
        f"{role} may {right}"
        for role, rights in permissions.items()
        for right in DENIED
        if (rights if isinstance(rights, str) else rights.get(right, "none")) != "none"
    ]
    text = "; ".join(granted) or "no participant may bring code, read files, or ask for a site's errors"
    yield Finding("FLARE: rights", text, f"{again}: {local / 'authorization.json'} was changed" if granted else "")


def check_admission(kit: Kit) -> Iterator[Finding]:
    """Tell of a revocation: the handshake with the server is as before, only FLARE's client was refused, last time."""
    from accord.flare.client import REVOKED, revoked

    if revoked(log := kit.path / "flare.log"):
        text, _, remedy = REVOKED.partition("; ")
        yield Finding("admission", f"{text}, says {log}", f"{remedy}; then start `accord site join` again")


def check_server(kit: Kit) -> Finding:
    """Greet the server: it must show a certificate of the consortium's authority, and take this site's."""
    place, remedy = f"{kit.host}:{kit.port}", "ask the consortium's lead whether the kit is of this server"
    try:
        context = ssl.create_default_context(cafile=str(kit.root))
        context.load_cert_chain(kit.certificate, kit.key)
        context.set_alpn_protocols(["h2"])  # gRPC speaks nothing else
        with (
            socket.create_connection((kit.host, kit.port), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=kit.host) as greeted,
        ):
            # A server that refuses our certificate says so only after the handshake; one that takes it sends settings.
            if greeted.selected_alpn_protocol() != "h2" or not greeted.recv(1):
                return Finding("server", f"{place} does not speak to this site", remedy)
    except ssl.SSLError as error:
        return Finding("server", f"{place} answers, but not as the consortium's server: {error.reason}", remedy)
    except OSError as error:
        remedy = f"ask the lead whether the server runs, and your network whether it lets TCP out to {place}"
        return Finding("server", f"{place} cannot be reached within {SECONDS:g} s: {error}", remedy)
    return Finding("server", f"{place} is the consortium's, and takes this site's certificate")


def check_data(job: Job, name: str) -> Iterator[Finding]:
    """Read the site's questions and pairs; every image is decoded once."""
    site = job.site(name)
    if site.needs_questions:
        with _told() as left_out:
            try:
                yield Finding("questions", f"{len(job.private[name]):,} private questions")
            except AccordError as error:
                yield _problem("questions", error)
                return
        yield from left_out
    if site.preferences or site.judgements:
        origin = "of its own" if site.preferences else "from people's judgements"
        if site.judgements and site.judgements.constructed:
            origin += " and constructed"
        with _told() as left_out:
            try:
                pairs = site_pairs(job, name)
                yield Finding("pairs", f"{len(pairs):,} pairs {origin}, all images readable")
            except AccordError as error:
                yield _problem("pairs", error)
        yield from left_out
    else:
        yield Finding("pairs", "none of its own: they are constructed from its questions, when the router is trained")


def check_scores(job: Job, name: str, model: RewardModel) -> Finding:
    """Score some of the site's pairs: numbers, on the common scale, mostly higher for the chosen answers."""
    try:
        pairs = _some_pairs(job, name)
        with torch.no_grad():
            scored = model.score(
                [pair.prompt for pair in pairs],
                [load_images(pair.images) for pair in pairs],
                [[pair.chosen, pair.rejected] for pair in pairs],
            )
    except AccordError as error:
        return _problem("scores", error)
    values = [value for of_pair in scored for value in of_pair.tolist()]
    again = f"train the site again with `accord site train`, and look at metrics.jsonl; it is site {name}"
    if not all(map(math.isfinite, values)):
        broken = sum(not math.isfinite(value) for value in values)
        return Finding("scores", f"{broken} of {len(values)} scores of its own pairs are not finite", again)
    right = sum(chosen > rejected for chosen, rejected in (s.tolist() for s in scored))
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    text = (
        f"of {len(pairs)} of its own pairs the chosen answer scores higher in {right / len(pairs):.0%}; "
        f"mean {mean:.2f}, deviation {deviation:.2f}"
    )
    if abs(mean) > 3 or not 0.1 < deviation < 10:
        return Finding("scores", f"{text}: not on the common scale, which has mean 0 and deviation 1", again)
    return Finding("scores", text, "" if 2 * right > len(pairs) else f"no better than chance: {again}")


def check_answerer(job: Job, name: str, answerer: Answerer) -> Finding:
    """Let the site's own model answer some of the site's questions."""
    try:
        questions = job.private[name]
        few = random.Random(0).sample(questions, min(PAIRS, len(questions)))
        images = {image_id(image): image_bytes(image) for q in few for image in q.images}
        items = [AnswerItem([image_id(image) for image in q.images], to_turns(prompt_of(q))) for q in few]
        said = answerer(items, images)
    except AccordError as error:
        return _problem("own answers", error)
    if not few:
        return Finding("own answers", "given to the server's questions; there are none here to try it on")
    given = [(a, q) for a, q in zip(said, few, strict=True) if isinstance(a, str)]
    if len(given) < len(few):
        text = f"{len(few) - len(given)} of {len(few)} of its own questions could not be answered"
        return Finding("own answers", text, "see the warnings above, and train the site again with `accord site train`")
    right = sum(normalise_answer(a) == normalise_answer(q.answer) for a, q in given)
    return Finding("own answers", f"right to {right / len(few):.0%} of {len(few)} of its own questions")


def _some_pairs(job: Job, name: str) -> list[PreferencePair]:
    """Return some of the site's pairs; constructed ones are made for a few questions only."""
    generator = random.Random(0)
    site = job.site(name)
    if site.preferences or site.judgements:
        pairs = site_pairs(job, name)
    else:
        questions = job.private[name]
        few = generator.sample(questions, min(PAIRS, len(questions)))
        known = [*job.questions.get("base", []), *questions]
        pairs = construct_pairs(job.recipe, lambda: job.policy, few, known, seed=site_seed(job, name))
    return generator.sample(pairs, min(PAIRS, len(pairs)))


def what_crosses(recipe: Recipe, folder: Path, name: str) -> list[Crossing]:
    """Return what leaves the site, what enters and what stays, with amounts."""
    config = load_config(recipe.encoder_checkpoint)
    network = RouterNetwork(config.get_text_config().hidden_size, len(recipe.sites), recipe.router)
    sent = to_bytes(trainable_weights(network), bits=recipe.router.aggregation.bits)
    router = f"{parameter_count(network):,} numbers, {_size(len(sent))}"
    card = msgspec.json.decode((folder / "sites" / name / "card.json").read_bytes(), type=SiteRecord)
    clipped = f"from {recipe.scores.low:g} to {recipe.scores.high:g}" if recipe.scores else "not clipped"
    site = next(site for site in recipe.sites if site.name == name)
    answers = Crossing("stays", "what its own model would answer", "answers = true is not in its table")
    if site.answers:
        answers = Crossing(
            "leaves", "answers of its own model to the server's questions", f"at most {MAX_ANSWER} characters each"
        )
    sums = Crossing("stays", "sums of its prompts' features", "sums = true is not in its table")
    if site.sums:
        amount = f"{2 * config.get_text_config().hidden_size + 1:,} numbers, the same each time"
        sums = Crossing("leaves", "sums of its prompts' features, a quantile", amount)
    owned = []
    if site.answers or site.owns:
        known = len(read_truth(folder / "sites" / name / "truth.json"))
        owned = [Crossing("leaves", "whether a candidate is the answer it holds", f"1 or 0, for {known} questions")]
    projector = []
    if recipe.projector is not None:
        rounds = recipe.projector.averaging.rounds
        projector = [
            Crossing(
                "leaves", "what its captions change in the policy's projector", f"its weights, each of {rounds} rounds"
            ),
            Crossing("leaves", "number of captions, steps, mean loss, distance d", "four numbers a round"),
        ]
    return [
        Crossing("leaves", "scores of candidate answers, standardised", f"one number each, {clipped}"),
        *owned,
        *(each for each in (answers, sums) if each.way == "leaves"),
        Crossing(
            "leaves",
            "what its pairs change in the router's weights",
            f"{router}, each of {recipe.router.rounds} rounds",
        ),
        Crossing("leaves", "number of pairs the router saw, steps, mean loss", "three numbers a round"),
        *projector,
        Crossing("leaves", "counts", f"{card.questions} questions, {card.pairs} pairs, model's class and size"),
        Crossing("leaves", "what must agree with the server", "Accord's version, digests of recipe and policy"),
        Crossing("leaves", "ranking by question type, with the types' names", ", ".join(card.ranking) or "none"),
        Crossing("leaves", "which of the server's images the site has not", "names, SHA-256"),
        Crossing("leaves", "one word where a request cannot be answered", "error, invalid, refused or gone"),
        Crossing("leaves", "that the site is there: FLARE's heartbeats", "name, organisation, address, state of jobs"),
        Crossing("enters", "the server's images", "kept in memory only, at most " + _size(CACHE_BYTES)),
        Crossing(
            "enters",
            "the server's prompts and candidate answers",
            "in memory; an error's text in site.log may quote one",
        ),
        Crossing("enters", "router weights", router),
        Crossing("stays", "images, questions, answers, pairs, annotations", "no message can hold them"),
        Crossing("stays", "the reward model's weights", "no message that this service answers can hold them"),
        *(each for each in (answers, sums) if each.way == "stays"),
        Crossing("stays", "the texts of errors", "in site.log of the folder"),
    ]


@contextmanager
def _told() -> Iterator[list[Finding]]:
    """Collect the rows that reading leaves out; they are in the list once the body is done."""
    left_out: list[Finding] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        yield left_out
    remedy = "correct these rows or take them out of the file, then train the site again"
    left_out += [Finding("rows left out", str(w.message), remedy) for w in caught if w.category is DataWarning]


def _problem(about: str, error: AccordError) -> Finding:
    """Return what an error says: what was wrong, and after its semicolon the remedy."""
    text, found, remedy = str(error).rpartition("; ")
    return Finding(about, text if found else str(error), remedy if found else "see above")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
