"""The commands of a consortium's lead and of its server.

accord provision CONSORTIUM --out KITS     make the participants' start-up kits
accord server start KIT                    run the server, until Ctrl-C
accord server revoke KIT SITE              shut a site out
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from accord.errors import RunError
from accord.terminal import say, warn

if TYPE_CHECKING:
    from accord.flare.kit import Kit

START_SECONDS: Final = 120.0
"""How long FLARE may take until it listens."""

TIDY_SECONDS: Final = 60.0
"""Between two looks at what FLARE's server leaves behind."""

server_app = typer.Typer(no_args_is_help=True, help="A consortium's server.")


def provision_command(
    consortium: Annotated[Path, typer.Argument(help="the participants, a TOML file")],
    out: Annotated[Path, typer.Option("--out", help="new folder for the kits")] = Path("kits"),
    authority: Annotated[
        Path | None, typer.Option("--authority", help="of an earlier call: make kits for sites added since")
    ] = None,
    renew: Annotated[
        list[str] | None,
        typer.Option("--renew", help="with --authority: a new kit of this participant, too; all for everyone"),
    ] = None,
) -> None:
    """Make the start-up kits of a consortium: one folder for each participant."""
    from accord.flare.provision import earlier_authorities, load_consortium, provision

    settings = load_consortium(consortium)
    organisations = {site.name: site.org for site in settings.sites}
    earlier = () if authority else earlier_authorities(settings.name, (consortium.parent, out.parent))
    for kit in provision(settings, out, authority=authority, renew=renew or ()):
        to = organisations.get(kit.name, settings.server.org)
        use = {"server": "accord server start", "operator": "accord run"}.get(kit.name, "accord site join")
        say(f"{kit}\tfor {to}: {use}")
    if authority is None:
        say(f"{out / 'authority'}\tstays with you alone: its key admits whomever it signs")
    for folder in earlier:
        line = shlex.join(["accord", "provision", str(consortium.resolve()), "--out", "NEW", "--authority", folder])
        warn(
            f"{folder} admits a consortium of this name already, and these kits are of another: neither lets the "
            f"other's participants in; to add or renew: {line}"
        )


@server_app.command("start")
def server_start(kit: Annotated[Path, typer.Argument(help="the server's start-up kit, a folder")]) -> None:
    """Run the server of a consortium in the foreground, until Ctrl-C."""
    from accord.flare.client import end, put_aside, remove_job_folders
    from accord.flare.kit import check_certificate, server_kit
    from accord.runs.lock import locked

    server = server_kit(kit)
    until = check_certificate(server)
    _refuse_taken_port(server)
    # Until this process ends: nobody else may change the kit, above all the list of those who are shut out.
    lock = locked(server.path, "stop it first")
    put_aside(server.path / "audit.log")
    process = _start(server)
    stopped = []

    def stop(*_: object) -> None:
        stopped.append(True)
        # FLARE does not end on SIGINT: its threads go on.
        process.terminate()

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        _await_listener(server, process)
        if not stopped:
            say(f"{server.consortium}: listening on {server.listen}:{server.port}; Ctrl-C stops it")
            say(f"certificate valid until {until:%Y-%m-%d}; logs in {server.path}: log.txt, log.json, console.log")
            if server.listen.startswith("127.") and server.host not in ("localhost", server.listen):
                say(f'only this machine reaches it: for {server.host}, provision with listen = "0.0.0.0"')
        tidied = 0.0
        while process.poll() is None and not stopped:
            time.sleep(0.2)
            if time.monotonic() - tidied > TIDY_SECONDS:
                tidied = time.monotonic()
                put_aside(server.path / "console.log")
                remove_job_folders(server.path)
    finally:
        end(process.pid)
        status = process.wait()
        for each, handler in before.items():
            signal.signal(each, handler)
        os.close(lock)
    if not stopped:
        raise RunError(f"FLARE's server ended with status {status}; see {server.path / 'console.log'}")
    say("stopped")


@server_app.command("revoke")
def server_revoke(
    kit: Annotated[Path, typer.Argument(help="the server's start-up kit, a folder")],
    site: Annotated[str, typer.Argument(help="the site's name")],
    operator: Annotated[
        Path | None, typer.Option("--operator", help="the operator's kit; by default beside the server's")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="let the site in again")] = False,
) -> None:
    """Shut a site out by its name, whether the server runs or not; its kit is of no use from then on."""
    from accord.flare.kit import server_kit
    from accord.flare.launch import mark_revoked, production, revoked_sites

    server = server_kit(kit)
    if _listens(server):
        access = production(server, operator)
        try:
            was = access.admit(site) if undo else access.revoke(site)
        except ConnectionError as error:
            raise RunError(
                f"FLARE's server did not do all of it ({error}); try again, and see {server.path / 'console.log'}"
            ) from error
        finally:
            access.close()
    else:
        was = mark_revoked(server, site, undo=undo)
    if undo and not was:
        shut_out = ", ".join(sorted(revoked_sites(server))) or "none"
        raise RunError(f"no site {site} is revoked, so it is not admitted again; revoked: {shut_out}")
    say(f"{site} is admitted again" if undo else f"{site} is revoked: {server.consortium} lets it in no more")
    if not was:
        warn(f"no site {site} was connected, and the server has no list of all sites; see that the name is right")


def _listens(kit: Kit) -> bool:
    """Tell whether something listens where the server does."""
    from accord.flare.kit import listens

    return listens("127.0.0.1" if kit.listen == "0.0.0.0" else kit.listen, kit.port)


def _refuse_taken_port(kit: Kit) -> None:
    """Refuse a port where something listens: gRPC would share it, and each would get some of the connections."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((kit.listen, kit.port))
        except OSError as error:
            raise RunError(
                f"{kit.listen}:{kit.port} cannot be listened on ({error.strerror}); stop what is there"
            ) from error


def _start(kit: Kit) -> subprocess.Popen[bytes]:
    """Start FLARE, in a session of its own so that Ctrl-C reaches it only through us."""
    from accord.flare.kit import start_command, start_environment

    command = start_command(kit)
    with (kit.path / "console.log").open("ab") as console:
        return subprocess.Popen(
            command,
            env=start_environment(kit),
            cwd=kit.path,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _await_listener(kit: Kit, process: subprocess.Popen[bytes]) -> None:
    """Return when the server listens or has ended.

    Raises:
        RunError: it does neither in time.
    """
    end = time.monotonic() + START_SECONDS
    while process.poll() is None:
        if _listens(kit):
            return
        time.sleep(0.2)
        if time.monotonic() > end:
            raise RunError(f"FLARE does not listen after {START_SECONDS:g} s; see {kit.path / 'console.log'}")
