"""`accord site check`: a page that says ok of a good site, and names what is broken and the remedy."""

import contextlib
import io
import json
import re
import shutil
import socket
import sys
from concurrent import futures
from dataclasses import replace

import grpc
import msgspec
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from accord.data.captions import Judgements
from accord.errors import RunError
from accord.federation.aggregation import Aggregation
from accord.federation.answering import question_key, write_truth
from accord.federation.weights import to_bytes, trainable_weights
from accord.flare.check import check_answerer, check_site, what_crosses
from accord.flare.kit import kit_of
from accord.flare.ledger import Entry, Running, ledgers, note, read_ledger, status
from accord.flare.provision import Consortium, Member, Server, provision
from accord.flare.site_cli import _View, site_check, site_join, site_status
from accord.pipeline import train_site
from accord.recipe import Source
from accord.recipe_file import dump_recipe, load_recipe
from accord.rewards import spending
from accord.rewards.accounting import Mechanism, epsilon_of
from accord.rewards.model import RewardModel
from accord.rewards.private import Privacy, Sigmas
from accord.rewards.spending import read_entries
from accord.routing.router import RouterNetwork
from accord.runs import Run
from accord.stages.job import Job
from processes import free_port

RECIPE = """
name = "consortium"
threads = 1
policy.checkpoint = "{llava}"
questions = []

[router]
layers = 1
width = 8
heads = 2

[[sites]]
name = "colour"
checkpoint = "{siglip}"
finetune = false
preferences = "{pairs}"
reward_model.steps = 40
reward_model.prompts_per_batch = 4
reward_model.evaluate_every = 40
reward_model.learning_rate = 3e-3

[[sites]]
name = "shape"
checkpoint = "{llava}"
"""

app = typer.Typer()
app.command("check")(site_check)
app.command("join")(site_join)
app.command("status")(site_status)


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    out = tmp_path_factory.mktemp("consortium") / "kits"
    provision(
        Consortium("eyes", Server("lead", port=free_port()), (Member("colour", "org"), Member("shape", "org"))), out
    )
    return out


@pytest.fixture(scope="module")
def good(tmp_path_factory, checkpoints, square):
    """A trained site: forty pairs about squares, the chosen answer always "red", which is soon learnt."""
    place = tmp_path_factory.mktemp("good")
    lines = []
    for n in range(40):
        (place / f"{n}.png").write_bytes(square("red", (32 + n, 32)))
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]}]
        answers = {
            which: [{"role": "assistant", "content": text}]
            for which, text in (("chosen", "red"), ("rejected", ("blue", "green")[n % 2]))
        }
        lines.append(json.dumps({"prompt": prompt, **answers, "images": [f"{n}.png"]}) + "\n")
    (place / "pairs.jsonl").write_text("".join(lines))
    text = RECIPE.format(
        llava=checkpoints["llava-clip-llama"], siglip=checkpoints["llava-siglip-qwen2"], pairs=place / "pairs.jsonl"
    )
    (place / "recipe.toml").write_text(text)
    recipe = load_recipe(place / "recipe.toml")
    with Run.create(place / "site", dump_recipe(recipe), seed=0) as run:
        job = Job(recipe, run, quiet=True, alone="colour")
        train_site(job, "colour")
        job.board.close()
    return place


@pytest.fixture
def kit(kits, tmp_path):
    shutil.copytree(kits / "colour", tmp_path / "kit")
    return kit_of(tmp_path / "kit")


@pytest.fixture
def site(good, tmp_path):
    """A copy of the site whose data may be broken, too."""
    shutil.copytree(good, tmp_path / "copy")
    file = tmp_path / "copy" / "site" / "recipe.toml"
    file.write_text(file.read_text().replace(str(good / "pairs.jsonl"), str(tmp_path / "copy" / "pairs.jsonl")))
    return tmp_path / "copy" / "site"


def problems(kit, folder, **settings):
    found = list(check_site(kit, folder, **{"server": False, **settings}))
    return {each.about: f"{each.text} → {each.remedy}" for each in found if not each.ok}


def page(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160"})
    return result.exit_code, result.output


def test_a_good_site(kit, site):
    """Every line is ok. 40 pairs, of which 32 are scored; the router of K = 2 sites in its exact size."""
    status, text = page("check", kit.path, site, "--no-server")
    assert status == 0 and "nothing stands in the way" in text and "problem" not in text
    for part in (
        "site colour, consortium eyes",
        "signed by the authority of eyes, valid until",
        "nothing but Accord's relay",
        "no log is sent",
        "no participant may bring code",
        "40 pairs of its own, all images readable",
        "LlavaForConditionalGeneration",
        "of 32 of its own pairs the chosen answer scores higher in 100%",
        "0 questions, 40 pairs",
        "WHAT IS NOT PROTECTED",
    ):
        assert part in text
    network = RouterNetwork(32, 2, load_recipe(site / "recipe.toml").router)
    numbers = sum(p.numel() for p in network.parameters())
    sent = len(to_bytes(trainable_weights(network), bits=16))
    assert f"{numbers:,} numbers, {sent / 1024:.1f} KiB, each of 23 rounds" in text
    assert "scores of candidate answers, standardised  " in text and "one number each, from 0 to 2" in text


def test_in_16_bits_the_router_has_half_the_bytes(site):
    recipe = load_recipe(site / "recipe.toml")
    numbers = sum(p.numel() for p in RouterNetwork(32, 2, recipe.router).parameters())
    recipes = [replace(recipe, router=replace(recipe.router, aggregation=Aggregation(bits=bits))) for bits in (32, 16)]
    amounts = [
        {each.what: each.amount for each in what_crosses(told, site, "colour")}["router weights"] for told in recipes
    ]
    sizes = [float(amount.split(", ")[-1].removesuffix(" KiB")) for amount in amounts]
    assert all(amount.startswith(f"{numbers:,} numbers, ") for amount in amounts)
    assert sizes[0] - sizes[1] == pytest.approx(2 * numbers / 1024, abs=0.1)  # four bytes a number, then two


def test_what_leaves_is_what_the_messages_can_hold(site):
    """Every reply of a site stands in the table: scores, router weights with n and loss, the card, a refusal."""
    crossings = what_crosses(load_recipe(site / "recipe.toml"), site, "colour")
    leaving = " ".join(crossing.what for crossing in crossings if crossing.way == "leaves")
    for word in (
        "scores",
        "change in the router's weights",
        "number of pairs",
        "steps",
        "loss",
        "counts",
        "ranking",
        "one word",
    ):
        assert word in leaving
    staying = " ".join(crossing.what for crossing in crossings if crossing.way == "stays")
    assert leaving.count("image") == leaving.count("which of the server's images the site has not") == 1
    assert "annotation" not in leaving and "reward model's weights" in staying


def test_sums_of_prompts_are_told(site):
    recipe = load_recipe(site / "recipe.toml")
    (first, *others) = recipe.sites
    agreeing = replace(recipe, sites=(replace(first, sums=True), *others))
    ways = [
        {(each.way, each.amount) for each in what_crosses(told, site, "colour") if each.what.startswith("sums of")}
        for told in (recipe, agreeing)
    ]
    assert ways == [{("stays", "sums = true is not in its table")}, {("leaves", "65 numbers, the same each time")}]


def test_own_answers_are_tried_and_told(kit, site):
    """Nothing of them where the recipe does not say so; else that they leave, and what of the book of two does."""
    recipe, file = load_recipe(site / "recipe.toml"), site / "recipe.toml"
    before = {crossing.what: crossing.way for crossing in what_crosses(recipe, site, "colour")}
    assert before["what its own model would answer"] == "stays"
    assert not any(what.startswith(("answers of", "whether a candidate")) for what in before)
    (first, *others) = recipe.sites
    answering = replace(recipe, sites=(replace(first, answers=True), *others))
    file.write_text(dump_recipe(answering))
    assert "the site's reference answers are missing" in problems(kit, site)["reward model"]
    write_truth(site / "sites" / "colour" / "truth.json", {question_key(str(n), []): ("red",) for n in range(2)})
    found = {each.about: each for each in check_site(kit, site, server=False)}
    assert found["own answers"].ok and "there are none here to try it on" in found["own answers"].text
    amounts = {(each.way, each.what): each.amount for each in what_crosses(answering, site, "colour")}
    assert amounts["leaves", "answers of its own model to the server's questions"] == "at most 256 characters each"
    assert amounts["leaves", "whether a candidate is the answer it holds"] == "1 or 0, for 2 questions"
    assert "what its own model would answer" not in {what for _, what in amounts}


def test_own_answers_are_compared_with_its_questions(kit, site, ask):
    """A model that always says "red", asked three questions, of which one's answer is blue."""
    job = Job(load_recipe(site / "recipe.toml"), None, quiet=True)
    vars(job)["private"] = {"colour": [ask(0), ask(1, "blue"), replace(ask(2), answer=" Red.")]}
    finding = check_answerer(job, "colour", lambda items, images: ["red"] * len(items))
    assert finding.ok and finding.text == "right to 67% of 3 of its own questions"


def test_a_model_that_is_missing(kit, site):
    shutil.rmtree(site / "sites" / "colour" / "reward")
    found = problems(kit, site)
    assert list(found) == ["site's folder"]
    assert "no finished reward model of site colour → make it with `accord site train" in found["site's folder"]
    assert page("check", kit.path, site, "--no-server")[0] == 1


def test_a_model_that_is_damaged(kit, site):
    (site / "sites" / "colour" / "reward" / "head.safetensors").write_bytes(b"x")
    found = problems(kit, site)
    assert list(found) == ["reward model"] and "the file is damaged → " not in found["reward model"]
    assert "→ the file is damaged, train the site again" in found["reward model"]


def test_scores_that_are_not_finite(kit, site):
    folder = site / "sites" / "colour" / "reward"
    model = RewardModel.load(folder)
    with torch.no_grad():
        next(p for name, p in model.backbone.named_parameters() if "language_model.norm" in name).fill_(torch.nan)
    model.save(folder)
    found = problems(kit, site)
    assert list(found) == ["scores"] and "64 of 64 scores of its own pairs are not finite" in found["scores"]


def test_scores_of_another_scale_and_the_wrong_way_round(kit, site):
    """The standardisation stretched a hundredfold; then the head turned round, so that no chosen answer wins."""
    folder = site / "sites" / "colour" / "reward"
    model = RewardModel.load(folder)
    trained = model.standardisation
    model.standardisation = replace(trained, deviation=trained.deviation / 100)
    model.save(folder)
    assert "not on the common scale" in problems(kit, site)["scores"]
    model.standardisation = replace(trained, mean=-trained.mean)
    with torch.no_grad():
        model.head.weight.neg_()
        model.head.bias.neg_()
    model.save(folder)
    found = problems(kit, site)["scores"]
    assert "scores higher in 0%" in found and "no better than chance: train the site again" in found


def test_an_image_that_cannot_be_read(kit, site):
    """One of 40: its pair is left out, and told; of eleven too many are, and nothing is."""
    (site.parent / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    found = problems(kit, site)
    assert list(found) == ["rows left out"] and "left out 1 of 40 rows" in found["rows left out"]
    for n in range(10, 20):
        (site.parent / f"{n}.png").unlink()
    found = problems(kit, site)
    assert {"pairs", "scores"} <= set(found) and "11 of 40 rows cannot be used" in found["pairs"]


def test_pairs_are_constructed_for_a_few_questions(kit, site, square, tmp_path):
    """A site without pairs of its own is scored on pairs that the base policy's answers make."""
    data = tmp_path / "mine"
    data.mkdir()
    rows = []
    for n, colour in enumerate(("red", "blue", "green", "yellow")):
        (data / f"{n}.png").write_bytes(square(colour, (32 + n, 32)))
        row = {"id": str(n), "image": f"{n}.png", "question": "what colour is it?", "answer": colour}
        rows.append(json.dumps({**row, "split": "private"}) + "\n")
    (data / "questions.jsonl").write_text("".join(rows))
    recipe = load_recipe(site / "recipe.toml")
    mine, other = recipe.sites
    sites = (replace(mine, preferences=""), replace(other, domains=("elsewhere",)))
    recipe = replace(recipe, sites=sites, questions=(Source("folder", str(data)),))
    (site / "recipe.toml").write_text(dump_recipe(recipe))
    found = {each.about: each.text for each in check_site(kit, site, server=False)}
    assert found["questions"] == "4 private questions" and found["pairs"].startswith("none of its own")
    assert "of its own pairs the chosen" in found["scores"]


def test_pairs_are_from_judgements(kit, site, square, tmp_path):
    """Eight photographs with a good and a bad caption each, and the other site's somewhere else."""
    data = tmp_path / "photographs"
    (data / "images").mkdir(parents=True)
    captions, judgements = [], []
    for n in range(8):
        name = f"images/{n}.png"
        (data / name).write_bytes(square("red", (32 + n, 32)))
        captions.append({"image": name, "split": "private", "captions": [f"A dog {n} ."]})
        for caption, score in ((f"A dog {n} .", 4), ("A cat .", 1)):
            judgements.append({"image": name, "split": "private", "caption": caption, "experts": [score] * 3})
    for name, rows in (("captions", captions), ("judgements", judgements)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(site / "recipe.toml")
    mine, other = recipe.sites
    for constructed, told in ((False, "8 pairs from people's judgements, all"), (True, "judgements and constructed, ")):
        held = replace(mine, preferences="", question_types=("dogs",), judgements=Judgements(constructed=constructed))
        sites = (held, replace(other, question_types=("others",), judgements=Judgements(), finetune=None))
        changed = replace(recipe, sites=sites, questions=(Source("captions", str(data)),))
        (site / "recipe.toml").write_text(dump_recipe(changed))
        found = {each.about: f"{each.text} → {each.remedy}" for each in check_site(kit, site, server=False)}
        assert told in found["pairs"] and "of its own pairs the chosen" in found["scores"]


@pytest.mark.parametrize(
    ("change", "about", "told"),
    [
        ({"class_allow_list": ["*"]}, "FLARE: classes", "a job may build *"),
        ({"class_list_enforcement_mode": "warn"}, "FLARE: classes", "anything, since the list is not enforced"),
        ({"allow_log_streaming": True}, "FLARE: logs", "logs are sent to the server"),
        (
            {"components": [{"path": "nvflare.app_common.logging.site_log_streamer.SiteLogStreamer"}]},
            "FLARE: logs",
            "sent",
        ),
        ({"class_allow_list": "all"}, "FLARE: policies", "cannot be read"),
    ],
)
def test_resources_that_were_loosened(kit, site, change, about, told):
    file = kit.path / "local" / "resources.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert told in problems(kit, site)[about]


@pytest.mark.parametrize("right", ["byoc", "shell_commands", "show_errors"])
def test_rights_that_were_granted(kit, site, right):
    file = kit.path / "local" / "authorization.json"
    table = json.loads(file.read_text())
    table["permissions"]["lead"][right] = "any"
    file.write_text(json.dumps(table))
    found = problems(kit, site)
    assert list(found) == ["FLARE: rights"] and f"lead may {right}" in found["FLARE: rights"]
    file.write_text(json.dumps({"permissions": {"project_admin": "any"}}))
    assert f"project_admin may {right}" in problems(kit, site)["FLARE: rights"]
    file.unlink()
    assert "cannot be read" in problems(kit, site)["FLARE: policies"]


def test_a_key_that_others_may_read(kit, site):
    kit.key.chmod(0o644)
    found = problems(kit, site)
    assert list(found) == ["certificate"] and "→ run: chmod 600" in found["certificate"]


@contextlib.contextmanager
def listening(kits, kit, name="server", takes="rootCA.pem"):
    """A gRPC server with the certificate of `name`, which takes clients of the authority in `takes` only."""
    startup = kits / name / "startup"
    files = (next(startup.glob("*.key")).read_bytes(), next(startup.glob("*.crt")).read_bytes())
    root = (startup / takes).read_bytes()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_secure_port(
        f"127.0.0.1:{kit.port}", grpc.ssl_server_credentials([files], root, require_client_auth=True)
    )
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()


def test_a_server_is_greeted(kits, kit, site):
    with listening(kits, kit):
        assert problems(kit, site, server=True) == {}
    found = problems(kit, site, server=True)
    assert list(found) == ["server"] and "cannot be reached within 5 s" in found["server"]


def test_a_server_that_is_not_the_consortiums(kits, kit, site, tmp_path, monkeypatch):
    """With a site's certificate in its hands; of another authority; one that does not take ours; one without TLS."""
    with listening(kits, kit, "shape"):
        assert "CERTIFICATE_VERIFY_FAILED" in problems(kit, site, server=True)["server"]
    other = tmp_path / "other"
    provision(Consortium("eyes", Server("lead", port=kit.port), (Member("colour", "org"),)), other)
    with listening(other, kit):
        assert "CERTIFICATE_VERIFY_FAILED" in problems(kit, site, server=True)["server"]
    shutil.copyfile(other / "server" / "startup" / "rootCA.pem", kits / "server" / "startup" / "other.pem")
    with listening(kits, kit, takes="other.pem"):
        assert re.search(
            "does not speak to this site|not as the consortium's", problems(kit, site, server=True)["server"]
        )
    monkeypatch.setattr("accord.flare.check.SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", kit.port)):
        assert "within 0.3 s: " in problems(kit, site, server=True)["server"]


def test_the_commands_take_this_sites_kit_only(kits, site, monkeypatch):
    for arguments in (("check", kits / "server", site), ("join", kits / "operator", site)):
        with pytest.raises(RunError, match="pass the one that was made for this site"):
            app(map(str, arguments), standalone_mode=False)
    with pytest.raises(RunError, match="is the kit of site colour, not of shape; leave --name out"):
        app(["check", str(kits / "colour"), str(site), "--name", "shape"], standalone_mode=False)


def test_join_tells_what_it_does(kit, site, monkeypatch):
    """Off a terminal: a line for every event; with a client of FLARE's that is asked for nothing but to leave."""
    leave = "import os, signal; os.kill(os.getppid(), signal.SIGINT)"
    monkeypatch.setattr("accord.flare.kit.start_command", lambda _: [sys.executable, "-c", leave])
    status, text = page("join", kit.path, site)
    assert status == 0
    first, second, last = text.splitlines()
    assert first == f"colour: listening for eyes; ledger {site / 'ledger.jsonl'}"
    assert second == "FLARE's client: running"
    assert last.startswith("left; the same command comes back: ") and last.endswith(f"site join {kit.path} {site}")
    assert page("join", kit.path, site, "--quiet") == (0, "")


def test_the_status_page(site):
    """Two score requests and a refused card: their bytes and images are added up."""
    assert "(never joined): not running" in page("status", site)[1]
    Running("colour", 1, "2026-11-21T20:00:00Z", "").write(site)
    entry = Entry("2026-11-21T20:01:00Z", "score", "score-1-colour", 3, 8, 64, 40_000, 650, 0.81, "answered")
    for each in (entry, entry, replace(entry, kind="card", images=0, bytes_in=7, bytes_out=9, outcome="error")):
        note(site, each)
    status, text = page("status", site)
    rows = {line[:19].strip(): line[21:].strip() for line in text.splitlines()}
    assert status == 0 and rows["site"] == "colour: not running, last started 2026-11-21T20:00:00Z"
    assert (rows["requests"], rows["what became of them"]) == ("1 card, 2 score", "2 answered, 1 error")
    assert rows["without an answer"] == "1" and rows["images received"] == "6"
    assert rows["bytes in"].startswith("80,007, today ") and rows["bytes that left"].startswith("1,309, today ")
    assert rows["last request"] == "2026-11-21T20:01:00Z card score-1-colour: error; 7 B in, 9 B out, 0.81 s"


def test_the_status_says_what_privacy_is_spent(site, monkeypatch):
    """Two trainings are in the ledger, of which the second made the model; 12 of its 20 paid steps are taken.

    What is not known is no 0, and what was spent on a model that is gone is spent.
    """

    def row(known=True):
        status, text = page("status", site)
        assert status == (0 if known else 1) and "bytes that left" in text
        return " ".join(text[text.index("privacy") :].split())

    assert row() == "privacy of colour no guarantee: the reward model was trained without privacy"
    monkeypatch.setattr(spending, "calibrate", lambda *_: Sigmas(gradient=2.0, projection=0.0, standardisation=40.0))
    monkeypatch.setattr(spending, "router_mechanism", lambda *_: Mechanism(4.0, 0.1, 20))
    privacy = Privacy(epsilon=8.0, steps=10, dimensions=0, router=0.1)
    ledger = site / "privacy" / "colour.json"
    spending.spend(ledger, privacy, "before", router_steps=20)
    entry = spending.spend(ledger, privacy, "now", router_steps=20)
    spending.pay(ledger, entry.id, 12, 0)
    proof = spending.certify(ledger, privacy, entry, uncovered=("counts", "other training"))
    spent = f"ε = {proof.total:.3g} spent at δ = 1e-06, for every pair;"
    assert row().startswith(f"privacy of colour {spent} no guarantee: the model has no certificate; ledger")
    card = site / "sites" / "colour" / "card.json"
    card.write_bytes(msgspec.json.encode({**json.loads(card.read_bytes()), "privacy": proof}))
    own = f"this model's training {proof.epsilon:.3g}; 12 of 20 steps on the router taken"
    assert proof.total > proof.epsilon and row().startswith(f"privacy of colour {spent} {own}; ledger")
    recipe = site / "recipe.toml"
    head = '[[sites]]\nname = "colour"\n'
    assert head in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(head, f"{head}privacy = {{ epsilon = 8, delta = 1e-3 }}\n"))
    looser = epsilon_of([each for one in read_entries(ledger) for each in one.mechanisms], 1e-3)
    assert looser < proof.total and row().startswith(f"privacy of colour ε = {looser:.3g} of 8 spent at δ = 0.001,")
    ledger.rename(site / "elsewhere.json")
    lost = row(known=False)
    assert lost.startswith("privacy not known: ") and f"does not have the training {proof.id}" in lost
    assert "put the ledger back that has it" in lost


def test_the_live_page_holds_no_marks_of_its_own(kit, site):
    """What a request is called is text, also where it looks like colours for the terminal."""
    console = Console(width=160, record=True, file=io.StringIO())
    view = _View(kit, site, console, live=True, quiet=False)
    view.start(kit)
    view.flare("[red]running")
    view.entry(Entry("2026-11-21T20:01:00Z", "score", "[bold]x", 3, 8, 64, 40_000, 650, 0.81, "answered"))
    console.print(view)
    text = console.export_text()
    assert "[bold]x, 8 questions, 64 candidates, 3 new images: answered" in text and "[red]running" in text
    assert f"eyes, localhost:{kit.port}" in text and "colour: running since" in text


def test_a_revoked_site_is_told(kit, site):
    """By FLARE's last word: one that was admitted again since is not."""
    log = kit.path / "flare.log"
    refused = f"ERROR - registration rejected: Client '{kit.name}' is disabled\n"
    admitted = f"INFO - Successfully registered client:{kit.name} for project eyes.\n"
    for text, told in ((admitted, False), (admitted + refused, True), (admitted + refused + admitted, False)):
        log.write_text(text)
        status, shown = page("check", kit.path, site, "--no-server")
        assert ("the server has revoked this site" in shown) is told and (status != 0) is told
    log.unlink()
    assert page("check", kit.path, site, "--no-server")[0] == 0


def entry_of(time, kind, name, queries=0, outcome="answered"):
    return Entry(time, kind, name, 1, 2, 4, 100, 10, 0.5, outcome, queries=queries)


def test_the_status_by_day_and_by_run(site):
    """Three requests on two days, the last two of a run; the first part of the ledger was put aside."""
    begins = f"agreement-lab-1f.{'0' * 16}"
    lines = [
        entry_of("2026-11-20T23:59:59Z", "score", "score-1-colour", 4),
        entry_of("2026-11-21T00:00:00Z", "card", begins),
        entry_of("2026-11-21T00:00:01Z", "score", "score-2-colour", 6, "error"),
    ]
    for line in lines:
        note(site, line, most=1)  # each in a file of its own
    assert [file.name for file in ledgers(site)] == [
        *("ledger-20261121T000000Z.jsonl", "ledger-20261121T000001Z.jsonl", "ledger.jsonl")
    ]
    assert read_ledger(site) == lines and status(site).spent.run == 10
    head = "requests,answered,images,questions,refused,queries,bytes_in,bytes_out,seconds"
    days = [f"day,{head}", "2026-11-20,1,1,1,2,0,4,100,10,0.5", "2026-11-21,2,1,2,4,0,6,200,20,1.0"]
    assert page("status", site, "--csv") == (0, "\n".join([*days, ""]))
    runs = [f"run,{head}", ",1,1,1,2,0,4,100,10,0.5", "lab-1f,2,1,2,4,0,6,200,20,1.0"]
    assert page("status", site, "--by", "run", "--csv") == (0, "\n".join([*runs, ""]))
    first, _, last = page("status", site, "--by", "run")[1].splitlines()
    assert first.split()[:3] == ["run", "requests", "answered"] and last.split()[:3] == ["lab-1f", "2", "1"]
