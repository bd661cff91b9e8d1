"""A real FLARE server on loopback, and who it lets in: threats T9 and T10 in short."""

import contextlib
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from accord.errors import RunError
from accord.flare.cli import server_start
from accord.flare.kit import CLASSES, Kit, check_certificate, kit_of, start_command, start_environment
from accord.flare.provision import Consortium, Member, Server, provision
from processes import free_port

pytestmark = pytest.mark.slow

Start = Callable[[Kit], None]

SITES = (Member("colour", "org_colour"), Member("shape", "org_shape"))


def wait(condition: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.2)


def said(kit: Kit) -> str:
    """What the participant's FLARE process has said."""
    return (kit.path / "console.log").read_text(errors="replace")


def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


@pytest.fixture(scope="module")
def consortium() -> Consortium:
    return Consortium("consortium", Server("lead", port=free_port()), SITES)


@pytest.fixture(scope="module")
def kits(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("provision") / "kits"
    provision(consortium, out)
    return out


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[Kit, subprocess.Popen[bytes]]]:
    running: dict[Kit, subprocess.Popen[bytes]] = {}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def start(processes: dict[Kit, subprocess.Popen[bytes]]) -> Start:
    def start(kit: Kit) -> None:
        with (kit.path / "console.log").open("wb") as console:
            processes[kit] = subprocess.Popen(
                start_command(kit), env=start_environment(kit), cwd=kit.path, stdout=console, stderr=subprocess.STDOUT
            )

    return start


@pytest.fixture(scope="module")
def server(kits: Path, start: Start, processes: dict[Kit, subprocess.Popen[bytes]]) -> Kit:
    kit = kit_of(kits / "server")
    start(kit)
    wait(lambda: listens(kit.port) or processes[kit].poll() is not None)
    assert processes[kit].poll() is None, said(kit)
    return kit


def copy(kits: Path, name: str, to: Path) -> Kit:
    return kit_of(shutil.copytree(kits / name, to))


def expire(kit: Kit, authority: Path) -> None:
    """Sign the kit's own key again, with the authority's, for the day before yesterday."""
    key = serialization.load_pem_private_key((authority / "rootCA.key").read_bytes(), password=None)
    old = x509.load_pem_x509_certificate(kit.certificate.read_bytes())
    root = x509.load_pem_x509_certificate(kit.root.read_bytes())
    builder = x509.CertificateBuilder(root.subject, old.subject, old.public_key(), old.serial_number)
    now = datetime.now(UTC)
    builder = builder.not_valid_before(now - timedelta(days=2)).not_valid_after(now - timedelta(days=1))
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    signed = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    kit.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="module")
def stranger(consortium: Consortium, kits: Path, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Make a kit of the same name by another authority, which has learnt the server's public root certificate."""
    out = tmp_path_factory.mktemp("strangers") / "kits"
    provision(consortium, out)
    kit = kit_of(out / "shape")
    shutil.copy(kits / "shape" / "startup" / "rootCA.pem", kit.root)
    return kit


@pytest.fixture(scope="module")
def expired(kits: Path, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    kit = copy(kits, "shape", tmp_path_factory.mktemp("expired") / "shape")
    expire(kit, kits / "authority")
    return kit


@pytest.fixture(scope="module")
def impostor(kits: Path, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Take shape's kit, but with colour's certificate and key."""
    kit = copy(kits, "shape", tmp_path_factory.mktemp("impostor") / "shape")
    for name in ("client.crt", "client.key"):
        shutil.copy(kits / "colour" / "startup" / name, kit.path / "startup" / name)
    return kit


HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a gRPC client says first; the answer is a frame of settings, whose fourth byte, its type, is 4."""


def shake_hands(server: Kit, client: Kit | None) -> bytes:
    """Open TLS to the server with a client's certificate, or none, and return the answer to `HELLO`; empty if none."""
    context = ssl.create_default_context(cafile=str(server.root))
    context.set_alpn_protocols(["h2"])
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    with (
        contextlib.suppress(ssl.SSLError, ConnectionError),
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        assert secure.version() == "TLSv1.3"
        secure.sendall(HELLO)
        return secure.recv(64)
    return b""


def test_the_handshake_needs_a_certificate_of_the_authority(server, kits, stranger, expired):
    assert shake_hands(server, kit_of(kits / "shape"))[3] == 4
    for client, reason in (
        (None, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        (stranger, "unable to get local issuer certificate"),
        (expired, "certificate has expired"),
    ):
        assert reason not in said(server)
        assert shake_hands(server, client) == b""
        wait(lambda reason=reason: reason in said(server), 10)


def test_plain_bytes_get_no_answer(server):
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
    ):
        plain.sendall(HELLO)
        assert plain.recv(64)[3:4] != b"\x04"
    wait(lambda: "WRONG_VERSION_NUMBER" in said(server), 10)


def test_only_this_machine_reaches_the_server(server, processes):
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for connection in psutil.Process(processes[server].pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert ("127.0.0.1", server.port) in listening
    assert {host for host, _ in listening} == {"127.0.0.1"}


@pytest.fixture(scope="module")
def session(server, kits):
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    operator = kit_of(kits / "operator")
    session = new_secure_session(operator.name, str(operator.path), timeout=60)
    yield session
    session.close()


def registered(session) -> set[str]:
    return {client.name for client in session.get_system_info().client_info}


def test_a_site_needs_the_certificate_of_its_name(server, kits, start, session, impostor):
    start(impostor)
    wait(lambda: "authenticated as 'colour' but claimed endpoint 'shape' requires identity 'shape'" in said(server))
    start(kit_of(kits / "colour"))
    wait(lambda: registered(session))
    assert registered(session) == {"colour"}


def test_a_site_that_is_added_is_let_in_by_the_running_server(server, consortium, kits, start, session, tmp_path):
    more = replace(consortium, sites=(*consortium.sites, Member("later", "org_later")))
    assert provision(more, tmp_path / "more", authority=kits / "authority") == [tmp_path / "more" / "later"]
    later = kit_of(tmp_path / "more" / "later")
    check_certificate(later)
    start(later)
    wait(lambda: "later" in registered(session))


def test_the_operator_may_not_look_around(session):
    for target in ("server", "colour"):
        with pytest.raises(Exception, match="not authorized"):
            session.ls_target(target)


def test_a_job_that_brings_code_is_refused(server, session, tmp_path):
    """All but the folder `custom` is what Accord's own jobs hold."""
    server_config = {
        "workflows": [{"id": "controller", "path": CLASSES["server"][0], "args": {"server_obj_id": "_server"}}],
        "components": [{"id": "_server", "path": CLASSES["server"][1], "args": {}}],
    }
    executor = {"path": CLASSES["site"][0], "args": {"client_obj_id": "_client"}}
    client_config = {
        "executors": [{"tasks": ["*"], "executor": executor}],
        "components": [{"id": "_client", "path": CLASSES["site"][1], "args": {}}],
    }
    meta = {"name": "accord", "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["@ALL"]}}
    app = tmp_path / "job" / "app"
    for folder in ("config", "custom"):
        (app / folder).mkdir(parents=True)
    (app / "custom" / "mine.py").write_text("")
    (tmp_path / "job" / "meta.json").write_text(json.dumps(meta))
    rest = {"format_version": 2, "task_data_filters": [], "task_result_filters": []}
    (app / "config" / "config_fed_server.json").write_text(json.dumps({**rest, **server_config}))
    (app / "config" / "config_fed_client.json").write_text(json.dumps({**rest, **client_config}))
    job = session.submit_job(str(tmp_path / "job"))
    wait(lambda: session.get_job_meta(job)["status"].startswith("FINISHED:"), 30)
    assert session.get_job_meta(job)["status"] == "FINISHED:FAILED_TO_RUN"
    wait(lambda: "BYOC not permitted" in said(server), 30)  # it is said once the status is set


def test_flare_logs_json_lines(server):
    lines = [json.loads(line) for line in (server.path / "log.json").read_text().splitlines()]
    assert "Server started" in {line["message"] for line in lines}
    assert {line["levelname"] for line in lines} <= {"INFO", "WARNING", "ERROR"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_command_starts_a_server_and_stops_it(consortium, tmp_path, number):
    provision(replace(consortium, server=replace(consortium.server, port=free_port())), tmp_path / "kits")
    kit = kit_of(tmp_path / "kits" / "server")
    code = "import sys; from accord.flare.cli import server_start; server_start(sys.argv[1])"
    command = [sys.executable, "-u", "-c", code, str(kit.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"consortium: listening on 127.0.0.1:{kit.port}; Ctrl-C stops it\n"
            assert f"logs in {kit.path}: log.txt" in process.stdout.readline()
            flare = psutil.Process(process.pid).children()[0]
            with pytest.raises(RunError, match=f"127.0.0.1:{kit.port} cannot be listened on .*in use"):
                server_start(kit.path)
            process.send_signal(number)
            assert process.stdout.readline() == "stopped\n"
            assert process.wait(30) == 0
            assert not flare.is_running() and not listens(kit.port)
        finally:
            process.kill()


def test_the_command_tells_when_flare_fails(kits, tmp_path):
    kit = copy(kits, "server", tmp_path / "server")
    file = kit.path / "startup" / "fed_server.json"
    file.write_text(file.read_text().replace(str(kit.port), str(free_port())).replace('"grpc"', '"nothing"'))
    with pytest.raises(RunError, match=r"FLARE.* see .*console\.log"):
        server_start(kit.path)
