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
from dataclasses import dataclass, replace
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

    def __post_init__(self) -> None:
        """Refuse names that collide, and an empty consortium."""
        _check_word("name", self.name, r"[A-Za-z][A-Za-z0-9_-]*", "letters, digits, _ and -")
        person = r"[A-Za-z0-9._%+-]+(@[A-Za-z0-9.-]+\.[A-Za-z]{2,})?"
        _check_word("operator", self.operator, person, "a name, or an e-mail address")
        check_least(self, days=1)
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


def provision(consortium: Consortium, out: Path, *, authority: Path | None = None) -> list[Path]:
    """Make the kits of all participants in a new folder, and return the kits' folders.

    With the `authority` of an earlier call, only the kits of sites that it has not admitted are made, of the same
    authority: the server takes them without a change.

    Raises:
        RecipeError: the file does not go with that authority.
        RunError: `out` exists, FLARE is not installed, or FLARE failed.
    """
    require_flare()
    if out.exists() or out.is_symlink():
        raise RunError(f"{out} exists already; pass a new folder, kits are never overwritten")
    new = consortium if authority is None else replace(consortium, sites=_not_admitted(consortium, authority))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        made, kits = _flare_kits(new, Path(folder), authority), Path(folder) / "kits"
        kits.mkdir()
        roles: dict[str, Role] = {site.name: "site" for site in new.sites}
        sources = {site.name: site.name for site in new.sites}
        if authority is None:
            roles = {"server": "server", **roles, "operator": "operator"}
            sources |= {"server": consortium.server.address, "operator": consortium.admin}
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


def _not_admitted(consortium: Consortium, authority: Path) -> tuple[Member, ...]:
    """Return the sites that an authority has not signed yet."""
    admitted = load_consortium(authority / "consortium.toml")
    if replace(consortium, sites=admitted.sites) != admitted:
        raise RecipeError(
            f"only sites may be added to the consortium of {authority}; take everything else from its consortium.toml, "
            "or make a new consortium without it"
        )
    if missing := [site.name for site in admitted.sites if site not in consortium.sites]:
        raise RecipeError(
            f"{', '.join(missing)}: admitted by {authority}, but changed or missing now; leave its lines as they were"
        )
    new = tuple(site for site in consortium.sites if site not in admitted.sites)
    if not new:
        raise RecipeError(f"every site is admitted by {authority} already; add [[sites]]")
    return new


def _flare_kits(consortium: Consortium, folder: Path, authority: Path | None) -> Path:
    """Let FLARE make the kits in `kits` of the folder returned, and its authority in `state`."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from nvflare.lighter.constants import CtxKey
    from nvflare.lighter.entity import Project
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    root: dict[str, object] = {}
    if authority is not None:
        root["serialized_root_cert"] = (authority / "rootCA.pem").read_bytes()
        root["root_private_key"] = load_pem_private_key((authority / "rootCA.key").read_bytes(), password=None)
    project, server = Project(consortium.name, "an Accord consortium", **root), consortium.server
    ports = {"fed_learn_port": server.port, "admin_port": server.port}
    project.set_server(server.address, server.org, {**ports, "default_host": server.address})
    for site in consortium.sites:
        project.add_client(site.name, site.org, {"allow_log_streaming": False})
    project.add_admin(consortium.admin, server.org, {"role": "lead"})
    builders = [
        WorkspaceBuilder(template_file=["master_template.yml"]),
        StaticFileBuilder(config_folder="config", scheme="grpc", require_signed_jobs=True),
        CertBuilder(root_valid_days=consortium.days),
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
