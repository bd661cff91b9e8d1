"""The files of `deploy`: the image and Compose file that `make lint` checks, and the services of systemd."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from accord.cli import app
from accord.version import VERSION

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
PAGE = DEPLOY.parent / "docs" / "deploy.md"
UNITS = ["accord-server.service", "accord-site.service"]


def arguments_of(unit):
    line = re.search(r"^ExecStart=/opt/accord/bin/accord (.*)$", (DEPLOY / unit).read_text(), re.MULTILINE)
    assert line
    return line[1].split()


def parses(words):
    """Whether the command line knows the command and its options; nothing is run."""
    command = get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command.make_context("accord", list(words))


@pytest.mark.parametrize("unit", UNITS)
def test_services_start_commands_that_are_there(unit):
    parses(arguments_of(unit))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_services_are_exposed_little(unit):
    """By systemd's own measure, from 0 to 10: below 4. Without any setting it is above 9."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=40", str(DEPLOY / unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_the_reply_in_hand_leaves_before_flare_ends(unit):
    """SIGTERM is for Accord alone, which ends FLARE last: by default systemd sends it to every process of a service."""
    assert "\nKillMode=mixed\n" in (DEPLOY / unit).read_text()


@pytest.mark.parametrize("unit", UNITS)
def test_sockets_lie_where_no_other_user_looks(unit):
    """And stay when the service is started again: a run holds its own there."""
    name, text = unit.removesuffix(".service"), (DEPLOY / unit).read_text()
    for setting in (f"RuntimeDirectory={name}", "RuntimeDirectoryMode=0700", "RuntimeDirectoryPreserve=yes"):
        assert f"\n{setting}\n" in text
    assert f"\nEnvironment=TMPDIR=/run/{name}\n" in text


def test_the_containers_run_commands_and_may_do_little():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(compose["services"]) == {"server", "run", "site"}
    for service in compose["services"].values():
        parses(service["command"])
        assert service["image"] == f"accord:{VERSION}" and service["read_only"] is True
        assert service["user"] == "10001:10001" and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_page_shows_every_command_that_containers_need():
    """Each is one that its service's container knows; `exec` names the program, `run` stands behind the entry point."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    shown = []
    for line in re.findall(r"^docker compose (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        named = re.fullmatch(r"--profile (\w+) (?:up -d|run --rm (\w+)(?: (.*))?|exec (\w+) accord (.*))", line)
        assert named, line
        profile, asked, words, there, revoking = named.groups()
        assert profile in services.get(asked or there or profile)["profiles"]
        if words or revoking:
            parses((words or revoking).split())
            shown.append(" ".join((words or revoking).split()[:2]))
    assert {"run recipe.toml", "site train", "site check", "server revoke"} <= {*shown}
    assert "--resume" in PAGE.read_text(encoding="utf-8").partition("--profile run run --rm run run")[2].split("\n")[0]


@pytest.mark.parametrize("unit", UNITS)
def test_a_service_keeps_checkpoints_where_it_may_write(unit):
    """Homes are closed to it. The page's commands keep them there, too, and name the program: sudo does not find it."""
    text = (DEPLOY / unit).read_text()
    assert "\nEnvironment=HF_HOME=/srv/accord/cache\n" in text and "\nReadWritePaths=/srv/accord\n" in text
    commands = re.findall(r"^sudo -u accord env (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 3
    for each in commands:
        place, words = each.split("/opt/accord/bin/accord ")
        assert "HF_HOME=/srv/accord/cache" in place
        parses(words.split())


def test_the_image_holds_pytorch_for_processors_and_every_family():
    """PyPI's PyTorch for Linux brings CUDA; torchvision is what the families of docs/models.md need beside it."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    first, second = re.findall(r"pip install (.*?)(?=&&|$)", text, re.MULTILINE)
    assert "--index-url https://download.pytorch.org/whl/cpu" in first
    assert "'^torch=='" in first and "torchvision" in first
    assert "'.[flare,vlm]'" in second and "-c constraints.txt" in second


def test_the_image_runs_as_nobody_and_tells_its_health():
    """The health check looks for FLARE's process by how Accord starts it."""
    text = (DEPLOY / "Containerfile").read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]
    pattern = re.search(r"grep -qsa '([^']*)' /proc", text)
    assert pattern
    found = subprocess.run(
        ["grep", "-qa", pattern[1]], input=b"python\0-u\0-m\0accord.flare.child\0" + b"1", check=False
    )
    none = subprocess.run(["grep", "-qa", pattern[1]], input=f"grep\0-qsa\0{pattern[1]}\0".encode(), check=False)
    assert (found.returncode, none.returncode) == (0, 1)
