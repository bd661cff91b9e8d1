import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from typer.testing import CliRunner

from accord.errors import RecipeError, RunError
from accord.flare import kit as kit_module
from accord.flare.cli import provision_command, server_app
from accord.flare.frames import SOCKETS_VARIABLE, socket_folder
from accord.flare.kit import CLASSES, Kit, check_certificate, kit_of, start_command, start_environment
from accord.flare.launch import open_engine
from accord.flare.provision import Consortium, Member, Server, load_consortium, provision
from accord.toml import build

ROOT = Path(__file__).resolve().parents[2]
SERVER = {"org": "lead"}
SITES = [{"name": "colour", "org": "a"}, {"name": "yes-no", "org": "b"}]


@pytest.fixture(scope="module")
def consortium() -> Consortium:
    sites = (Member("colour", "org_colour"), Member("yes-no", "org_yes_no"))
    return Consortium("consortium", Server("lead", "server.example.org", 8102), sites)


@pytest.fixture(scope="module")
def made(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("provision") / "kits"
    provision(consortium, out)
    return out


@pytest.fixture
def kits(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "kits"))


def local(kits: Path, name: str, file: str) -> dict[str, object]:
    table: dict[str, object] = json.loads((kits / name / "local" / file).read_text())
    return table


def test_the_example_is_a_consortium():
    """The recipe's three sites of `demo`, on this machine."""
    example = load_consortium(ROOT / "examples" / "consortium.toml")
    assert [site.name for site in example.sites] == ["colour", "shape", "yes-no"]
    assert (example.server.address, example.server.listen) == ("localhost", "127.0.0.1")
    assert example.admin == "operator@accord.local"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a b"}, 'name must be letters, digits, _ and -, at most 64 characters, got "a b"'),
        ({"sites": []}, r"a consortium needs a site, got none; add \[\[sites\]\]"),
        ({"sites": [*SITES, {"name": "Colour", "org": "c"}]}, 'two sites are named "Colour"'),
        ({"sites": [{"name": "1e5", "org": "a"}]}, r'\[sites\[0\]\] name must be letters.*got "1e5"'),
        ({"sites": [{"name": "../x", "org": "a"}]}, 'got "../x"; change it'),
        ({"sites": [{"name": "server", "org": "a"}]}, 'name must not be "server"'),
        ({"sites": [{"name": "authority", "org": "a"}]}, 'name must not be "authority"'),
        ({"sites": [{"name": "yes", "org": "a"}]}, 'name must not be "yes"'),
        ({"sites": [{"name": "inf", "org": "a"}]}, 'name must not be "inf"'),
        ({"sites": [{"name": "x", "org": "a-b"}]}, 'org must be letters, digits and _, .*got "a-b"'),
        ({"sites": [{"name": "x" * 65, "org": "a"}]}, "at most 64 characters"),
        ({"server": {"org": "a", "address": "colour"}}, 'site "colour" is named like the server'),
        ({"server": {"org": "a", "address": "a/b"}}, 'address must be a host name .*, got "a/b"'),
        ({"server": {"org": "a", "port": 0}}, r"\[server\] port must be from 1 to 65535, got 0"),
        ({"server": {"org": "a", "port": 65536}}, "got 65536; correct it"),
        ({"server": {"org": "a", "listen": "192.168.1.2"}}, "FLARE binds to no single interface: take 0.0.0.0"),
        ({"server": {"org": "a", "listen": "any"}}, 'got "any"'),
        ({"operator": "a@b"}, 'operator must be .*got "a@b"'),
        ({"days": 0}, "days must be at least 1, got 0"),
        ({"days": 361}, "days must be at most 360, got 361"),
        ({"operators": "x"}, "operators is not a setting; did you mean operator"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        build(Consortium, {"name": "x", "server": SERVER, "sites": SITES, **change})


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
def test_where_a_server_may_listen(listen):
    assert Server("a", listen=listen).listen == listen


def test_an_operator_may_be_an_address():
    assert build(Consortium, {"name": "x", "server": SERVER, "sites": SITES, "operator": "a@b.org"}).admin == "a@b.org"


def test_a_kit_for_each_and_an_authority(consortium, tmp_path):
    out = tmp_path / "new" / "kits"
    assert provision(consortium, out) == [out / name for name in ("server", "colour", "yes-no", "operator")]
    assert {path.name for path in out.iterdir()} == {"server", "colour", "yes-no", "operator", "authority"}
    assert {path.name for path in out.parent.iterdir()} == {"kits"}
    assert {path.name for path in (out / "authority").iterdir()} == {
        *("rootCA.pem", "rootCA.key", "consortium.toml", "README.txt")
    }
    assert load_consortium(out / "authority" / "consortium.toml") == consortium
    with pytest.raises(RunError, match=r"kits exists already; pass a new folder"):
        provision(consortium, out)


def test_nobody_else_may_read_anything(made):
    for path in (made, *made.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    keys = [*made.rglob("*.key")]
    assert len(keys) == 5
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_the_authority_keeps_no_key_of_another(made):
    """Five keys, all different, and the authority's alone signs."""
    keys = {path: path.read_text() for path in made.rglob("*.key")}
    assert len(set(keys.values())) == 5
    assert (
        sum(text.count("PRIVATE KEY") // 2 for path in (made / "authority").iterdir() for text in [path.read_text()])
        == 1
    )


def test_only_our_relays_and_the_kits_own_parts_may_be_built(made):
    for name, role in (("server", "server"), ("colour", "site"), ("yes-no", "site")):
        resources = local(made, name, "resources.json")
        assert resources["class_list_enforcement_mode"] == "enforce"
        own = {each["path"] for each in resources["components"]}
        if role == "server":
            own.add("nvflare.app_common.state_persistors.storage_state_persistor.StorageStatePersistor")
        assert len(resources["class_allow_list"]) == len(own) + 2
        assert set(resources["class_allow_list"]) == {*CLASSES[role], *own}


def test_no_log_is_sent(made):
    for name in ("server", "colour", "yes-no"):
        text = (made / name / "local" / "resources.json").read_text()
        assert local(made, name, "resources.json")["allow_log_streaming"] is False
        assert "log_streamer" not in text and "log_receiver" not in text
        assert local(made, name, "log_config.json")["loggers"]["root"]["level"] == "INFO"


def test_flares_own_reading_of_the_rights(made):
    """The operator may run and stop its own jobs everywhere, operate the server's organisation alone; the rest none."""
    from nvflare.fuel.sec.authz import AuthzContext, Person
    from nvflare.security.security import FLAuthorizer

    def may(site_org, right, role="lead", submitter="operator"):
        config = local(made, "colour", "authorization.json")
        context = AuthzContext(right, Person("operator", "lead", role), Person(submitter, "lead", role))
        return FLAuthorizer(site_org, config).authorize(context)[0]

    for org in ("lead", "org_colour"):
        assert all(may(org, right) for right in ("submit_job", "abort_job", "list_jobs", "check_status"))
        assert not may(org, "abort_job", submitter="another")
        refused = ("byoc", "cat", "ls", "grep", "show_errors", "get_job_log", "configure_site_log", "configure_job_log")
        for role in ("lead", "project_admin", "org_admin", "member"):
            assert not any(may(org, right, role) for right in refused)
        for role in ("project_admin", "org_admin", "member"):
            assert not any(may(org, right, role) for right in ("submit_job", "abort_job", "shutdown", "list_jobs"))
    assert may("lead", "shutdown") and may("lead", "disable_client")
    assert not may("org_colour", "shutdown") and not may("org_colour", "restart")


def test_the_connection_is_mutual_tls_over_grpc_and_jobs_are_signed(made):
    server = json.loads((made / "server" / "startup" / "fed_server.json").read_text())
    client = json.loads((made / "colour" / "startup" / "fed_client.json").read_text())
    assert server["servers"][0]["connection_security"] == client["client"]["connection_security"] == "mtls"
    assert server["servers"][0]["service"]["scheme"] == client["servers"][0]["service"]["scheme"] == "grpc"
    assert server["require_signed_jobs"] is client["require_signed_jobs"] is True


def test_reading_kits(made):
    there = ("consortium", "server.example.org", 8102)
    assert kit_of(made / "server") == Kit(made / "server", "server", "server.example.org", *there, "127.0.0.1")
    assert kit_of(made / "colour") == Kit(made / "colour", "site", "colour", *there)
    assert kit_of(str(made / "operator")) == Kit(made / "operator", "operator", "operator@accord.local", *there)
    for name in ("server", "colour", "yes-no", "operator"):
        days = (check_certificate(kit_of(made / name)) - datetime.now(UTC)) / timedelta(days=1)
        assert 359.9 < days <= 360


def test_certificates_end_when_they_are_told_to(consortium, tmp_path):
    provision(Consortium("short", consortium.server, consortium.sites, days=3), tmp_path / "kits")
    end = check_certificate(kit_of(tmp_path / "kits" / "colour"))
    assert timedelta(days=2.9) < end - datetime.now(UTC) <= timedelta(days=3)


def test_what_is_no_kit(kits, tmp_path):
    with pytest.raises(RunError, match=r"is no start-up kit, it has no startup/fed_\*\.json; unpack"):
        kit_of(tmp_path)
    (kits / "colour" / "startup" / "fed_client.json").write_text("{}")
    with pytest.raises(RunError, match="configuration is damaged"):
        kit_of(kits / "colour")


def signed_again(kit: Kit, authority: Path, start: datetime, end: datetime) -> None:
    """Sign the kit's certificate again with the authority's key, for another time."""
    key = serialization.load_pem_private_key((authority / "rootCA.key").read_bytes(), password=None)
    old = x509.load_pem_x509_certificate(kit.certificate.read_bytes())
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), old.serial_number)
    signed = builder.not_valid_before(start).not_valid_after(end).sign(key, hashes.SHA256())
    kit.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def test_certificates_out_of_time(kits):
    kit, now = kit_of(kits / "colour"), datetime.now(UTC)
    signed_again(kit, kits / "authority", datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 12, 31, tzinfo=UTC))
    with pytest.raises(RunError, match=r"client\.crt expired on 2020-12-31; ask the consortium's lead for a new kit"):
        check_certificate(kit)
    signed_again(kit, kits / "authority", now + timedelta(days=1), now + timedelta(days=2))
    with pytest.raises(RunError, match=r"is valid only from .* UTC; set this machine's clock right"):
        check_certificate(kit)
    signed_again(kit, kits / "authority", now - timedelta(days=1), now + timedelta(days=2))
    assert check_certificate(kit) - now > timedelta(days=1.9)


def test_certificates_of_others(kits, consortium, tmp_path):
    provision(consortium, tmp_path / "other")
    kit = kit_of(kits / "colour")
    for file, source, message in (
        ("client.key", kits / "yes-no", r"client\.key is not the key of client\.crt"),
        ("client.crt", kits / "yes-no", 'is for "yes-no", the kit for "colour"'),
        ("rootCA.pem", tmp_path / "other" / "colour", r"is not signed by the authority in rootCA\.pem"),
    ):
        before = (kit.path / "startup" / file).read_bytes()
        (kit.path / "startup" / file).write_bytes((source / "startup" / file).read_bytes())
        with pytest.raises(RunError, match=message):
            check_certificate(kit)
        (kit.path / "startup" / file).write_bytes(before)
    check_certificate(kit)
    kit.key.chmod(0o640)
    with pytest.raises(RunError, match=r"may be read by other users; run: chmod 600"):
        check_certificate(kit)
    kit.key.write_text("")
    with pytest.raises(RunError, match=r"client\.key cannot be read"):
        check_certificate(kit)
    kit.certificate.unlink()
    with pytest.raises(RunError, match=r"client\.crt cannot be read .* unpack the kit again"):
        check_certificate(kit)


def test_adding_a_site(consortium, kits, tmp_path):
    """The new site's certificate is of the same authority; its neighbours' kits and keys are not made again."""
    more = Consortium("consortium", consortium.server, (*consortium.sites, Member("new", "org_new")))
    out, authority = tmp_path / "more", kits / "authority"
    assert provision(more, out, authority=authority) == [out / "new"]
    assert [path.name for path in out.iterdir()] == ["new"]
    new = kit_of(out / "new")
    check_certificate(new)
    assert new.root.read_bytes() == kit_of(kits / "server").root.read_bytes()
    assert load_consortium(authority / "consortium.toml") == more
    with pytest.raises(RecipeError, match="every site is admitted by"):
        provision(more, tmp_path / "again", authority=authority)
    with pytest.raises(RecipeError, match=r"new: admitted by .* but changed or missing now"):
        provision(consortium, tmp_path / "again", authority=authority)
    moved = Consortium("consortium", Server("lead", "elsewhere.example.org"), more.sites)
    with pytest.raises(RecipeError, match="only sites may be added"):
        provision(moved, tmp_path / "again", authority=authority)
    with pytest.raises(RecipeError, match="only sites may be added"):
        provision(moved, tmp_path / "again", authority=authority, renew=["all"])
    assert not (tmp_path / "again").exists()


def test_the_processes(kits):
    server, site = kit_of(kits / "server"), kit_of(kits / "colour")
    shared = ["--set", "secure_train=true"]
    assert start_command(server)[6:] == [
        *(
            "-m",
            str(server.path),
            "-s",
            "fed_server.json",
            *shared,
            "host=127.0.0.1",
            "org=lead",
            "config_folder=config",
        )
    ]
    child = [sys.executable, "-u", "-m", "accord.flare.child", str(os.getpid())]
    assert start_command(site)[:6] == [*child, "nvflare.private.fed.app.client.client_train"]
    assert start_command(site)[6:] == [
        *(
            "-m",
            str(site.path),
            "-s",
            "fed_client.json",
            *shared,
            "uid=colour",
            "org=org_colour",
            "config_folder=config",
        )
    ]
    assert start_environment(site)[SOCKETS_VARIABLE] == str(socket_folder(site.path))
    with pytest.raises(RunError, match="an operator's kit, which starts nothing"):
        start_command(kit_of(kits / "operator"))


def test_a_server_stores_in_its_kit_wherever_that_lies(made, kits):
    assert f"{made}/server/storage" in (made / "server" / "local" / "resources.json").read_text()
    start_command(kit_of(kits / "server"))
    text = (kits / "server" / "local" / "resources.json").read_text()
    assert str(made) not in text and "/tmp/nvflare" not in text
    assert f'"{kits}/server/storage/jobs"' in text and f'"{kits}/server/storage/snapshots"' in text


def test_without_flare(monkeypatch, consortium, tmp_path, made):
    monkeypatch.setattr(kit_module.importlib.util, "find_spec", lambda _: None)
    for call in (lambda: provision(consortium, tmp_path / "kits"), lambda: start_command(kit_of(made / "colour"))):
        with pytest.raises(RunError, match=r"needs NVIDIA FLARE; install it with `pip install 'accord\[flare\]'`"):
            call()


def test_what_flare_cannot_do_leaves_nothing(consortium, kits, tmp_path):
    """The authority itself has expired."""
    old = kits / "authority" / "rootCA.pem"
    root = Kit(kits / "colour", "site", "colour", "consortium", "", 0)
    shutil.copy(old, root.certificate)
    signed_again(root, kits / "authority", datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 12, 31, tzinfo=UTC))
    shutil.copy(root.certificate, old)
    more = Consortium("consortium", consortium.server, (*consortium.sites, Member("new", "org_new")))
    with pytest.raises(RunError, match=r"FLARE could not make the kits: .*root CA expired"):
        provision(more, tmp_path / "more", authority=kits / "authority")
    assert [path.name for path in tmp_path.iterdir()] == ["kits"]


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("provision")(provision_command)
    app.add_typer(server_app, name="server")
    return app


def test_the_command_says_whose_each_kit_is(app, tmp_path):
    example = ROOT / "examples" / "consortium.toml"
    result = CliRunner().invoke(
        app, ["provision", str(example), "--out", str(tmp_path / "kits")], catch_exceptions=False
    )
    assert result.output.splitlines() == [
        f"{tmp_path}/kits/server\tfor lead: accord server start",
        f"{tmp_path}/kits/colour\tfor colour_hospital: accord site join",
        f"{tmp_path}/kits/shape\tfor shape_hospital: accord site join",
        f"{tmp_path}/kits/yes-no\tfor yes_no_hospital: accord site join",
        f"{tmp_path}/kits/operator\tfor lead: accord run",
        f"{tmp_path}/kits/authority\tstays with you alone: its key admits whomever it signs",
    ]


def test_a_forgotten_authority_is_told(app, tmp_path, capsys):
    """The new kits are of another consortium; nobody would reach anybody."""
    example = tmp_path / "consortium.toml"
    shutil.copy(ROOT / "examples" / "consortium.toml", example)
    run = CliRunner().invoke
    first = run(app, ["provision", str(example), "--out", str(tmp_path / "kits")], catch_exceptions=False)
    assert "admits a consortium" not in first.output + first.stderr + capsys.readouterr().err
    again = run(app, ["provision", str(example), "--out", str(tmp_path / "more")], catch_exceptions=False)
    told = again.output + again.stderr + capsys.readouterr().err
    authority = tmp_path.resolve() / "kits" / "authority"
    assert f"warning: {authority} admits a consortium" in told
    assert f"accord provision {example.resolve()} --out NEW --authority {authority}" in told


@pytest.mark.parametrize("who", [["colour"], ["server"], ["operator", "yes-no"], ["all"]])
def test_renewing_kits(consortium, kits, tmp_path, who):
    """New keys and new certificates by the same authority, which outlives them; nobody else's are made again."""
    out, authority = tmp_path / "renewed", kits / "authority"
    made = provision(replace(consortium, days=100), out, authority=authority, renew=who)
    names = ["server", "colour", "yes-no", "operator"] if who == ["all"] else sorted(who)
    assert sorted(path.name for path in out.iterdir()) == sorted(names) == sorted(path.name for path in made)
    for name in names:
        old, new = kit_of(kits / name), kit_of(out / name)
        assert timedelta(days=99.9) < check_certificate(new) - datetime.now(UTC) <= timedelta(days=100)
        assert new.root.read_bytes() == old.root.read_bytes() and new.key.read_bytes() != old.key.read_bytes()
        assert (new.name, new.host, new.port, new.listen) == (old.name, old.host, old.port, old.listen)
    root = x509.load_pem_x509_certificate(kit_of(out / names[0]).root.read_bytes())
    assert root.not_valid_after_utc - datetime.now(UTC) > timedelta(days=3649)
    assert load_consortium(authority / "consortium.toml").days == 100


@pytest.mark.parametrize("renew", [["colour"], ["all"]])
def test_no_name_is_given_to_another_organisation(consortium, kits, tmp_path, renew):
    """Its old kit would still be good, and the site's place in every recipe would be another's."""
    changed = replace(consortium, sites=(Member("colour", "org_other"), *consortium.sites[1:]))
    with pytest.raises(RecipeError, match=r"colour: admitted by .* but changed or missing now"):
        provision(changed, tmp_path / "renewed", authority=kits / "authority", renew=renew)
    assert load_consortium(kits / "authority" / "consortium.toml") == consortium


def test_another_port_needs_everybodys_kit(consortium, kits, tmp_path):
    authority, moved = kits / "authority", replace(consortium, server=replace(consortium.server, port=8103))
    for renew in ([], ["server"]):
        with pytest.raises(RecipeError, match="with --renew all the server's port"):
            provision(moved, tmp_path / "moved", authority=authority, renew=renew)
    provision(moved, tmp_path / "moved", authority=authority, renew=["all"])
    assert {kit_of(tmp_path / "moved" / name).port for name in ("server", "colour", "yes-no", "operator")} == {8103}


def test_whom_there_is_not_nobody_renews(consortium, kits, tmp_path):
    with pytest.raises(RecipeError, match="--renew blue: no participant of that name; there are colour"):
        provision(consortium, tmp_path / "x", authority=kits / "authority", renew=["blue"])
    with pytest.raises(RunError, match="add --authority FOLDER"):
        provision(consortium, tmp_path / "x", renew=["colour"])


def revoke(app, kits, *words):
    words = ["server", "revoke", str(kits / "server"), *words]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    return result.stdout, result.stderr


def test_a_site_is_revoked_where_no_server_runs(app, kits):
    """FLARE's server reads the file when it starts."""
    from nvflare.private.fed.server.client_manager import ClientManager

    def shut_out():
        manager = ClientManager()
        manager.set_disabled_clients_file(str(kits / "server" / "disabled_clients.json"))
        return {name for name in ("colour", "yes-no") if manager.is_client_disabled(name)}

    said, warned = revoke(app, kits, "colour")
    assert said == "colour is revoked: consortium lets it in no more\n" and "no site colour was connected" in warned
    assert shut_out() == {"colour"}
    revoke(app, kits, "yes-no")
    assert shut_out() == {"colour", "yes-no"}
    assert revoke(app, kits, "colour", "--undo") == ("colour is admitted again\n", "")
    assert shut_out() == {"yes-no"}
    with pytest.raises(RunError, match="no site colour is revoked, so it is not admitted again; revoked: yes-no"):
        revoke(app, kits, "colour", "--undo")
    (kits / "server" / "disabled_clients.json").write_text("[")
    with pytest.raises(RunError, match=r"disabled_clients\.json cannot be read"):
        revoke(app, kits, "colour")


def test_a_list_that_a_server_holds_is_not_written(app, kits, monkeypatch):
    """FLARE's server reads it before it listens, and would write its own over it: here while it starts."""
    refused = []

    def start(kit):
        with pytest.raises(RunError, match=r"in use by process .*docker compose exec server accord server revoke"):
            revoke(app, kits, "colour")
        refused.append(kit)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr("accord.flare.cli._start", start)
    with pytest.raises(RunError, match="FLARE's server ended with status 0"):
        CliRunner().invoke(app, ["server", "start", str(kits / "server")], catch_exceptions=False)
    assert refused and not (kits / "server" / "disabled_clients.json").exists()
    revoke(app, kits, "colour")


@pytest.fixture
def running(monkeypatch):
    """A server that runs, with one site, and answers as FLARE's does."""
    made = SimpleNamespace(shut_out=set(), close=lambda: None, list_jobs=list)

    def disable(name):
        already = name in made.shut_out
        made.shut_out.add(name)
        return {"clients": [{"already_disabled": already, "active_session_removed": name == "colour" and not already}]}

    def enable(name):
        was = name in made.shut_out
        made.shut_out.discard(name)
        return {"clients": [{"was_disabled": was}]}

    made.disable_client, made.enable_client = disable, enable
    monkeypatch.setattr("nvflare.fuel.flare_api.flare_api.new_secure_session", lambda *_, **__: made)
    monkeypatch.setattr("accord.flare.cli._listens", lambda _: True)
    return made


def test_a_name_that_nobody_has_is_told(app, kits, running):
    """It is shut out all the same: a site that is not there just now may be the one."""
    for name, told in (("colour", False), ("colour", False), ("color", True)):
        said, warned = revoke(app, kits, name)
        assert said == f"{name} is revoked: consortium lets it in no more\n"
        assert (f"no site {name} was connected" in warned) is told
    assert running.shut_out == {"colour", "color"}
    assert revoke(app, kits, "color", "--undo") == ("color is admitted again\n", "")
    with pytest.raises(RunError, match="no site color is revoked"):
        revoke(app, kits, "color", "--undo")


def test_the_operators_kit_lies_beside_the_servers(app, kits, running, monkeypatch):
    """Also where the server's kit is named as the folder in which the command runs."""
    monkeypatch.chdir(kits / "server")
    words = ["server", "revoke", ".", "colour"]
    assert "is revoked" in CliRunner().invoke(app, words, catch_exceptions=False).stdout
    running.get_system_info = lambda: SimpleNamespace(client_info=[])
    open_engine(Path("."), None, ("colour",), tell=print).close()
    with pytest.raises(RunError, match="is the kit of colour, a site; name the operator's with --operator"):
        open_engine(Path("."), Path("../colour"), ("colour",), tell=print)


def test_an_operators_certificate_that_has_ended_is_told(app, kits, running):
    """And nobody waits an hour for a server that lets the operator in no more."""
    kit = kit_of(kits / "operator")
    signed_again(kit, kits / "authority", datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 12, 31, tzinfo=UTC))
    for call in (
        lambda: revoke(app, kits, "colour"),
        lambda: open_engine(kits / "server", None, ("colour",), tell=print),
    ):
        with pytest.raises(RunError, match=r"operator/startup/client\.crt expired on 2020-12-31; ask the consortium's"):
            call()
    assert running.shut_out == set()


def test_the_server_command_wants_the_servers_kit(app, made):
    with pytest.raises(RunError, match="is the kit of colour, a site; pass the server's"):
        CliRunner().invoke(app, ["server", "start", str(made / "colour")], catch_exceptions=False)


def test_flare_is_not_imported_before_it_is_needed():
    code = "import sys, accord.flare.cli, accord.flare.provision; assert 'nvflare' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
