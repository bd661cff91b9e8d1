"""Read a start-up kit: whose it is, whether its certificate holds, and how its FLARE process is started.

<kit>/startup   FLARE's configuration, certificate and key, as the lead handed them out
<kit>/local     the participant's own policies
<kit>           FLARE's logs: log.txt, log.json (JSON lines), error_log.txt, audit.log
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from accord.errors import RunError
from accord.flare.frames import SOCKETS_VARIABLE, socket_folder
from accord.runs import write_atomic

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

PRIVATE: Final = 0o600
"""The mode of a kit's files: keys lie among them."""

Role: TypeAlias = Literal["server", "site", "operator"]

CLASSES: Final[Mapping[Role, tuple[str, ...]]] = {
    "server": ("nvflare.collab.runtime.controller.CollabController", "accord.flare.relay.ServerRelay"),
    "site": ("nvflare.collab.runtime.executor.CollabExecutor", "accord.flare.relay.SiteRelay"),
}
"""What a job of Accord's names, and all that it may build at a participant, besides the kit's own components."""


@dataclass(frozen=True)
class Kit:
    """An unpacked start-up kit."""

    path: Path
    role: Role
    name: str  # the common name of its certificate
    consortium: str
    host: str  # of the server
    port: int
    listen: str = ""  # of a server's kit

    @property
    def certificate(self) -> Path:
        """The participant's certificate."""
        return self.path / "startup" / ("server.crt" if self.role == "server" else "client.crt")

    @property
    def key(self) -> Path:
        """The participant's private key."""
        return self.certificate.with_suffix(".key")

    @property
    def root(self) -> Path:
        """The authority's certificate."""
        return self.path / "startup" / "rootCA.pem"


def kit_of(folder: Path | str) -> Kit:
    """Read an unpacked start-up kit.

    Raises:
        RunError: the folder is not one.
    """
    path = Path(folder).resolve()
    found = next(
        (p for n in ("server", "client", "admin") if (p := path / "startup" / f"fed_{n}.json").is_file()), None
    )
    if found is None:
        raise RunError(f"{folder} is no start-up kit, it has no startup/fed_*.json; unpack what the lead handed out")
    try:
        table = json.loads(found.read_text(encoding="utf-8"))
        if found.name == "fed_admin.json":
            admin = table["admin"]
            return Kit(path, "operator", admin["username"], admin["project_name"], admin["host"], int(admin["port"]))
        server = table["servers"][0]
        host, port = server["service"]["target"].split(":")
        if found.name == "fed_client.json":
            return Kit(path, "site", table["client"]["fqsn"], server["name"], host, int(port))
        listen = json.loads((path / "local" / "resources.json").read_text(encoding="utf-8"))["accord"]["listen"]
        return Kit(path, "server", server["admin_server"], server["name"], host, int(port), listen)
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{folder}: its configuration is damaged ({error!r}); unpack the kit again") from error


def server_kit(folder: Path | str) -> Kit:
    """Read the server's start-up kit.

    Raises:
        RunError: the folder is not it.
    """
    kit = kit_of(folder)
    if kit.role != "server":
        raise RunError(f"{folder} is the kit of {kit.name}, a {kit.role}; pass the server's")
    return kit


def site_kit(folder: Path | str) -> Kit:
    """Read a site's start-up kit.

    Raises:
        RunError: the folder is not one.
    """
    kit = kit_of(folder)
    if kit.role != "site":
        raise RunError(f"{folder} is the kit of the consortium's {kit.role}; pass the one that was made for this site")
    return kit


def operator_kit(folder: Path | str) -> Kit:
    """Read the operator's start-up kit.

    Raises:
        RunError: the folder is not it.
    """
    kit = kit_of(folder)
    if kit.role != "operator":
        raise RunError(f"{folder} is the kit of {kit.name}, a {kit.role}; name the operator's with --operator")
    return kit


def listens(host: str, port: int) -> bool:
    """Tell whether something takes connections there."""
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def check_certificate(kit: Kit) -> datetime:
    """Check a kit's certificate as its peers will, and return when it ends.

    Raises:
        RunError: it is not of the kit's authority, is for another name, is not valid now, or the key is another's or
            may be read by others.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    again = "ask the consortium's lead for a new kit"
    certificate, root = _certificate(kit.certificate), _certificate(kit.root)
    try:
        certificate.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise RunError(f"{kit.certificate} is not signed by the authority in {kit.root.name}; {again}") from error
    if (name := _subject(certificate, "commonName")) != kit.name:
        raise RunError(f'{kit.certificate} is for "{name}", the kit for "{kit.name}"; {again}')
    now = datetime.now(UTC)
    for path, each in ((kit.certificate, certificate), (kit.root, root)):
        if now > each.not_valid_after_utc:
            raise RunError(f"{path} expired on {each.not_valid_after_utc:%Y-%m-%d}; {again}")
        if now < each.not_valid_before_utc:
            start = each.not_valid_before_utc
            raise RunError(f"{path} is valid only from {start:%Y-%m-%d %H:%M} UTC; set this machine's clock right")
    try:
        key = load_pem_private_key(kit.key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{kit.key} cannot be read ({error}); unpack the kit again") from error
    if key.public_key() != certificate.public_key():
        raise RunError(f"{kit.key} is not the key of {kit.certificate.name}; {again}")
    if kit.key.stat().st_mode & 0o077:
        raise RunError(f"{kit.key} may be read by other users; run: chmod 600 '{kit.key}'")
    return min(certificate.not_valid_after_utc, root.not_valid_after_utc)


def start_command(kit: Kit) -> list[str]:
    """Return the command line of the participant's FLARE process, to be started by this process.

    It stays until it is ended with SIGTERM, or this process ends.

    FLARE's storage wants absolute paths: a server's kit is pointed to where it lies now.

    Raises:
        RunError: an operator's kit, which starts nothing, or FLARE is not installed.
    """
    require_flare()
    if kit.role == "operator":
        raise RunError(f"{kit.path} is an operator's kit, which starts nothing; pass a server's or a site's")
    org = _subject(_certificate(kit.certificate), "organizationName")
    if kit.role == "server":
        move_storage(kit.path, to=kit.path)
        module, file, own = "server.server_train", "fed_server.json", f"host={kit.listen}"
    else:
        module, file, own = "client.client_train", "fed_client.json", f"uid={kit.name}"
    module = f"nvflare.private.fed.app.{module}"
    settings = ("secure_train=true", own, f"org={org}", "config_folder=config")
    child = (sys.executable, "-u", "-m", "accord.flare.child", str(os.getpid()))  # ends with this process
    return [*child, module, "-m", str(kit.path), "-s", file, "--set", *settings]


def start_environment(kit: Kit) -> dict[str, str]:
    """Return the environment of that process: this one's, and where the sockets are."""
    return {**os.environ, SOCKETS_VARIABLE: str(socket_folder(kit.path))}


def require_flare() -> None:
    """Refuse to go on without FLARE.

    Raises:
        RunError: it is not installed.
    """
    if importlib.util.find_spec("nvflare") is None:
        raise RunError(
            "working with other organisations needs NVIDIA FLARE; install it with `pip install 'accord[flare]'`"
        )


def move_storage(kit: Path, *, to: Path) -> None:
    """Point a server's storage into the folder where its kit is to lie; FLARE's default is in /tmp, for all users."""
    file = kit / "local" / "resources.json"
    old = file.read_text(encoding="utf-8")
    resources = json.loads(old)
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(to / "storage" / "snapshots")
    manager = next(each for each in resources["components"] if each["id"] == "job_manager")
    manager["args"]["uri_root"] = str(to / "storage" / "jobs")
    if (new := json.dumps(resources, indent=2)) != old:
        write_atomic(file, new, mode=PRIVATE)


def _certificate(path: Path) -> Certificate:
    from cryptography.x509 import load_pem_x509_certificate

    try:
        return load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); unpack the kit again") from error


def _subject(certificate: Certificate, attribute: str) -> str:
    """Return an attribute of a certificate's subject; empty if it has none."""
    found = [str(each.value) for each in certificate.subject if each.oid._name == attribute]
    return found[0] if found else ""
