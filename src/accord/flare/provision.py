"""Make a consortium's start-up kits: certificates, configurations, and the participants' policies.

    consortium.toml → <out>/server, <out>/<site> …, <out>/operator, one folder to hand to each, and
                      <out>/authority, which the lead keeps: its key admits whomever it signs

FLARE's own builders make keys, certificates and configurations. What we change lies in each kit's `local` folder, where
a participant may read and tighten it: only our relays may be built by a job (`class_allow_list`), no role may bring
code, read files or ask for error texts, and no log is sent to the server. FLARE requires each job to be signed.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from accord.errors import RecipeError, RunError, check_least
from accord.flare.kit import CLASSES, PRIVATE, Role, move_storage, require_flare
from accord.runs import write_atomic
from accord.toml import build, dump_toml, load_toml

DENIED: Final = ("byoc", "shell_commands", "show_errors", "get_job_log", "configure_site_log", "configure_job_log")
"""What no role may do anywhere: bring code, read files, ask for a site's error texts or log, make it log more."""

PERMISSIONS: Final = {
    "lead": {  # the operator
        **{"submit_job": "any", "manage_job": "n:submitter", "download_job": "n:submitter", "view": "any"},
        **{"operate": "o:site", "clone_job": "none", "server-predeployed-flwr": "none"},
        **dict.fromkeys(DENIED, "none"),
    },
    **{role: dict.fromkeys(("submit_job", *DENIED), "none") for role in ("project_admin", "org_admin", "member")},
}
"""FLARE's rights: `n:submitter` for one's own jobs, `o:site` for participants of one's own organisation."""

MAX_DAYS: Final = 360
"""FLARE gives a participant's certificate no more."""

NOT_NAMES: Final = frozenset({"server", "operator", "authority", "yes", "no", "true", "false", "t", "f", "y", "n"})
NOT_NUMBERS: Final = frozenset({"nan", "inf", "infinity"})
"""Folders of ours, and words that FLARE's command line would turn into a truth value or a number."""


@dataclass(frozen=True)
class Server:
    """Where the sites find the server, and where it listens."""

    org: str
    address: str = "localhost"  # the host name or IPv4 address that sites connect to; the certificate is for it
    port: int = 8002
    listen: str = "127.0.0.1"  # or 0.0.0.0 for every interface

    def __post_init__(self) -> None:
        """Refuse what FLARE cannot use."""
        _check_word("org", self.org, r"[A-Za-z][A-Za-z0-9_]*", "letters, digits and _")
        label = r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
        _check_word("address", self.address, rf"({label}\.)*{label}", "a host name or an IPv4 address")
        if not 1 <= self.port <= 65535:
            raise RecipeError(f"port must be from 1 to 65535, got {self.port}; correct it")
        with contextlib.suppress(ValueError):
            if self.listen == "0.0.0.0" or ipaddress.IPv4Address(self.listen).is_loopback:
                return
        raise RecipeError(
            f'listen must be 127.0.0.1 (this machine) or 0.0.0.0 (every interface), got "{self.listen}"; '
            "FLARE binds to no single interface: take 0.0.0.0 and a firewall"
        )


@dataclass(frozen=True)
class Member:
    """A site, and the organisation that runs it."""

    name: str
    org: str

    def __post_init__(self) -> None:
        """Refuse what FLARE cannot use as a name."""
        _check_word("name", self.name, r"[A-Za-z][A-Za-z0-9_-]*", "letters, digits, _ and -")
        _check_word("org", self.org, r"[A-Za-z][A-Za-z0-9_]*", "letters, digits and _")


@dataclass(frozen=True)
class Consortium:
    """Who takes part."""

    name: str
    server: Server
    sites: tuple[Member, ...]
    operator: str = "operator"  # the person that submits the jobs; an e-mail address, or a name that is made one
    days: int = MAX_DAYS  # that the certificates are valid
    authority_days: int = 3650  # that the authority is: it signs later kits, and those renewed

    def __post_init__(self) -> None:
        """Refuse names that collide, and an empty consortium."""
        _check_word("name", self.name, r"[A-Za-z][A-Za-z0-9_-]*", "letters, digits, _ and -")
        person = r"[A-Za-z0-9._%+-]+(@[A-Za-z0-9.-]+\.[A-Za-z]{2,})?"
        _check_word("operator", self.operator, person, "a name, or an e-mail address")
        check_least(self, days=1, authority_days=self.days)
        if self.days > MAX_DAYS:
            raise RecipeError(f"days must be at most {MAX_DAYS}, got {self.days}; FLARE's certificates last no longer")
        if not self.sites:
            raise RecipeError("a consortium needs a site, got none; add [[sites]] with name and org")
        seen: set[str] = set()
        for site in self.sites:
            name = site.name.casefold()  # each has a folder, and some file systems ignore case
            if name == self.server.address.casefold():
                raise RecipeError(f'site "{site.name}" is named like the server; rename it')
            if name in seen:
                raise RecipeError(f'two sites are named "{site.name}", upper and lower case alike; rename one')
            seen.add(name)

    @property
    def admin(self) -> str:
        """The operator's name in FLARE, which wants the form of an e-mail address."""
        return self.operator if "@" in self.operator else f"{self.operator}@accord.local"


def load_consortium(path: Path | str) -> Consortium:
    """Read a consortium's TOML file.

    Raises:
        RecipeError: it is absent, not TOML, or says what cannot be.
    """
    return build(Consortium, load_toml(path))


def earlier_authorities(name: str, folders: Iterable[Path]) -> list[str]:
    """Return the authorities of a consortium of that name that lie in a folder beside others, as whole paths."""
    found: dict[str, None] = {}
    for folder in folders:
        for file in sorted(folder.glob("*/authority/consortium.toml")):
            with contextlib.suppress(RecipeError):
                if load_consortium(file).name == name:
                    found[str(file.parent.resolve())] = None
    return list(found)


def provision(
    consortium: Consortium, out: Path, *, authority: Path | None = None, renew: Sequence[str] = ()
) -> list[Path]:
    """Make the kits of all participants in a new folder, and return the kits' folders.

    With the `authority` of an earlier call, only the kits of sites that it has not admitted are made, of the same
    authority: the server takes them without a change. Those named in `renew` are made anew beside them, with new keys;
    the old certificate of each stays good until it ends.

    Args:
        consortium: who takes part.
        out: the new folder.
        authority: of an earlier call.
        renew: participants, `server` and `operator` among them; `all` for every one. The days of certificates may
            differ from the earlier call's, and with `all` the server's port and where it listens.

    Raises:
        RecipeError: the file does not go with that authority.
        RunError: `out` exists, FLARE is not installed, or FLARE failed.
    """
    require_flare()
    if out.exists() or out.is_symlink():
        raise RunError(f"{out} exists already; pass a new folder, kits are never overwritten")
    every = {"server", *(site.name for site in consortium.sites), "operator"}
    if authority is None:
        if renew:
            raise RunError("a kit is renewed by the authority that admitted its owner; add --authority FOLDER")
        wanted = every
    else:
        wanted = _wanted(consortium, authority, every, renew)
    new = replace(consortium, sites=tuple(site for site in consortium.sites if site.name in wanted) or consortium.sites)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        made, kits = _flare_kits(new, Path(folder), authority), Path(folder) / "kits"
        kits.mkdir()
        all_roles: dict[str, Role] = {"server": "server"}
        all_roles |= {site.name: "site" for site in new.sites}
        all_roles["operator"] = "operator"
        roles = {name: role for name, role in all_roles.items() if name in wanted}
        sources = {name: name for name in roles} | {"server": consortium.server.address, "operator": consortium.admin}
        for name, role in roles.items():
            shutil.move(made / "kits" / sources[name], kits / name)
            if role != "operator":
                _restrict(kits / name, role, consortium.server.listen)
            if role == "server":
                move_storage(kits / name, to=out.resolve() / name)
        if authority is None:
            _write_authority(kits / "authority", made / "state", consortium)
        for path in (kits, *kits.rglob("*")):
            path.chmod(path.stat().st_mode & 0o700)
        kits.rename(out)
    if authority is not None:
        write_atomic(authority / "consortium.toml", dump_toml(consortium), mode=PRIVATE)
    return [out / name for name in roles]


def _check_word(setting: str, value: str, pattern: str, allowed: str) -> None:
    if not re.fullmatch(pattern, value) or len(value) > 64:
        raise RecipeError(f'{setting} must be {allowed}, at most 64 characters, got "{value}"; change it')
    if value.lower() in NOT_NAMES | NOT_NUMBERS and setting in ("name", "org"):
        raise RecipeError(f'{setting} must not be "{value}", which has a meaning of its own; change it')


def _wanted(consortium: Consortium, authority: Path, every: Collection[str], renew: Sequence[str]) -> set[str]:
    """Return who gets a kit by an earlier authority: sites that it has not signed yet, and who is to be renewed."""
    admitted = load_consortium(authority / "consortium.toml")
    if unknown := [name for name in renew if name not in every and name != "all"]:
        raise RecipeError(
            f'--renew {", ".join(unknown)}: no participant of that name; there are {", ".join(sorted(every))}, or "all"'
        )
    renewed = set(every) if "all" in renew else set(renew)
    server = consortium.server
    if renewed >= {*every}:  # everybody learns of it
        server = replace(server, port=admitted.server.port, listen=admitted.server.listen)
    same = replace(consortium, sites=admitted.sites, server=server)
    if replace(same, days=admitted.days, authority_days=admitted.authority_days) != admitted:
        raise RecipeError(
            f"only sites may be added to the consortium of {authority}, days changed, and with --renew all the "
            "server's port and listen; take everything else from its consortium.toml, or make a new consortium "
            "without it"
        )
    known = {site.name: site for site in admitted.sites}
    here = {site.name: site for site in consortium.sites}
    if missing := [name for name, site in known.items() if here.get(name) != site]:
        raise RecipeError(
            f"{', '.join(missing)}: admitted by {authority}, but changed or missing now; leave its lines as they were"
        )
    wanted = renewed | {name for name in here if name not in known}
    if not wanted:
        raise RecipeError(f"every site is admitted by {authority} already; add [[sites]], or --renew NAME")
    return wanted


def _flare_kits(consortium: Consortium, folder: Path, authority: Path | None) -> Path:
    """Let FLARE make the kits in `kits` of the folder returned, and its authority in `state`."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificate
    from nvflare.lighter.constants import CtxKey
    from nvflare.lighter.entity import Project
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    root, valid = dict[str, object](), consortium.authority_days
    if authority is not None:
        root["serialized_root_cert"] = (authority / "rootCA.pem").read_bytes()
        root["root_private_key"] = load_pem_private_key((authority / "rootCA.key").read_bytes(), password=None)
        signed = load_pem_x509_certificate((authority / "rootCA.pem").read_bytes())
        valid = (signed.not_valid_after_utc - signed.not_valid_before_utc).days  # which FLARE wants to hear again
    project, server = Project(consortium.name, "an Accord consortium", **root), consortium.server
    ports = {"fed_learn_port": server.port, "admin_port": server.port}
    project.set_server(server.address, server.org, {**ports, "default_host": server.address})
    for site in consortium.sites:
        project.add_client(site.name, site.org, {"allow_log_streaming": False})
    project.add_admin(consortium.admin, server.org, {"role": "lead"})
    certificates = CertBuilder(root_valid_days=valid)
    sign = certificates._generate_cert
    ends = datetime.now(UTC) + timedelta(days=consortium.days)

    def signed_for_days(*args: object, not_valid_after: datetime | None = None, **settings: object) -> object:
        if not settings.get("ca"):  # FLARE gives a participant its own number of days
            not_valid_after = min(ends, not_valid_after or ends)
        return sign(*args, not_valid_after=not_valid_after, **settings)

    certificates._generate_cert = signed_for_days
    builders = [
        WorkspaceBuilder(template_file=["master_template.yml"]),
        StaticFileBuilder(config_folder="config", scheme="grpc", require_signed_jobs=True),
        certificates,
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        context = Provisioner(str(folder), builders).provision(project)
    if context.get(CtxKey.BUILD_ERROR):
        raise RunError(f"FLARE could not make the kits: {'; '.join(context.get_errors())}")
    made = folder / consortium.name
    Path(context.get_result_location()).rename(made / "kits")
    return made


def _restrict(kit: Path, role: Role, listen: str) -> None:
    """Write the policies of a server's or a site's kit."""
    local = kit / "local"
    resources = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    # These upload a site's error log to the server, and receive it there.
    streamers = ("site_log_streamer", "log_receiver")
    resources["components"] = [each for each in resources["components"] if each["id"] not in streamers]
    resources["allow_log_streaming"] = False
    own = [each["path"] for each in resources["components"]]
    if role == "server":
        persistor = resources["snapshot_persistor"]
        own += [persistor["path"], persistor["args"]["storage"]["path"]]
        resources["accord"] = {"listen": listen}
    resources["class_allow_list"] = list(dict.fromkeys([*CLASSES[role], *own]))
    resources["class_list_enforcement_mode"] = "enforce"
    write_atomic(local / "resources.json", json.dumps(resources, indent=2), mode=PRIVATE)
    write_atomic(
        local / "authorization.json",
        json.dumps({"format_version": "1.0", "permissions": PERMISSIONS}, indent=2),
        mode=PRIVATE,
    )
    # INFO, in text and as JSON lines (log.json), as FLARE has it.
    shutil.copyfile(local / "log_config.json.default", local / "log_config.json")


def _write_authority(folder: Path, state: Path, consortium: Consortium) -> None:
    """Keep the authority's key and certificate, and nothing of the participants' keys."""
    folder.mkdir()
    kept = json.loads((state / "cert.json").read_text(encoding="utf-8"))
    write_atomic(folder / "rootCA.pem", kept["root_cert"], mode=PRIVATE)
    write_atomic(folder / "rootCA.key", kept["root_pri_key"], mode=PRIVATE)
    write_atomic(folder / "consortium.toml", dump_toml(consortium), mode=PRIVATE)
    write_atomic(
        folder / "README.txt",
        "Never hand out this folder: with rootCA.key anyone can be admitted to the consortium.\n"
        "Keep it where only the lead reaches it. It admits further sites: accord provision … --authority FOLDER\n"
        "The kits beside it hold private keys too: hand each to its participant alone, then delete your copy.\n",
        mode=PRIVATE,
    )
