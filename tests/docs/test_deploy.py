"""The walk of `docs/deploy.md`, word for word: server and sites are real processes, and the output is what it says.

A comment before a block tells what is done with it, and one that stands alone what a hand at the keyboard does:

    run                       run the block to its end, which must be status 0
    run until TEXT            the same, again and again until TEXT is in its output
    terminal NAME: TEXT       type the block into a new terminal, and read until TEXT appears there
    output                    these lines are in the output of the block before, numbers aside; … stands for others
    see NAME: TEXT            read on in a terminal until TEXT appears
    Ctrl-C NAME               stop what runs in a terminal
    kill NAME                 end it as if the power had gone
"""

import ast
import os
import re
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from processes import end, free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "deploy.md"
MARKED = re.compile(r"<!-- (?P<mark>[^>]+) -->\n(?:```(?:sh|text|toml)\n(?P<block>.*?)^```$)?", re.M | re.S)
SECONDS = 400
"""For any one thing to happen; a busy machine takes a while."""


def plain(line):
    """Without what differs from run to run: numbers, times, ids, blocks and bars, the space between columns."""
    line = re.sub(r"[▁-█━╸╺─]+|(?<=\.)[0-9a-f]{16}", "", line)
    return " ".join(re.sub(r"-?\d+(?:[.,:]\d+)*", "0", line).split())


class Walk:
    """The page's commands, in a home folder of their own."""

    def __init__(self, home):
        self.home = home
        self.here = ROOT
        self.terminals, self.logs = {}, {}
        self.last, self.running = lambda: "", False  # the output of the block before, and whether there may be more
        scripts = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "HOME": str(home), "PATH": scripts, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}

    def run(self, block):
        after = self.home / "after"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{block}\npwd > {after}"],
            cwd=self.here,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        self.here = Path(after.read_text().strip())
        self.last, self.running = lambda: done.stdout, False

    def run_until(self, block, text):
        def shown():
            self.run(block)
            return text in self.last()

        self.await_that(shown, f"{text!r} from {block}")

    def terminal(self, name, block, text):
        log = self.home / f"{name}.log"
        with log.open("wb") as output:
            self.terminals[name] = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", block.replace("accord", "exec accord", 1)],
                cwd=self.here,
                env={**self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.logs[name] = log
        self.see(name, text)
        self.last, self.running = log.read_text, True

    def see(self, name, text):
        self.await_that(lambda: text in self.logs[name].read_text(), f"{text!r} in terminal {name}", name)

    def await_that(self, condition, what, name=""):
        until = time.monotonic() + SECONDS
        while not condition():
            told = "\n".join(f"--- {each}\n{log.read_text()[-3000:]}" for each, log in self.logs.items())
            assert not name or self.terminals[name].poll() is None or condition(), f"no {what}: it ended\n{told}"
            assert time.monotonic() < until, f"no {what}\n{told}"
            time.sleep(0.2)

    def output(self, block):
        """Each line, or a block of lines between two `…`, stands in the real output, in that order."""
        wanted = [plain(line) for line in block.splitlines() if line.strip() and line.strip() != "…"]

        def missing():
            text = self.last().replace(str(self.home), "~").replace(f" on {socket.gethostname()}", " on lab")
            real = iter([plain(line) for line in text.splitlines()])
            return [line for line in wanted if line not in real]

        if self.running:
            self.await_that(lambda: not missing(), f"output {block}")
        assert missing() == [], self.last()

    def stop(self, name, number):
        process = self.terminals[name]
        if number == signal.SIGINT:
            process.send_signal(number)
            assert process.wait(120) in (0, 130), self.logs[name].read_text()
        end(self.terminals.pop(name))

    def close(self):
        for name in list(self.terminals):
            end(self.terminals.pop(name))


def steps():
    return [(match["mark"], match["block"]) for match in MARKED.finditer(PAGE.read_text(encoding="utf-8"))]


@pytest.fixture
def walk(tmp_path):
    made = Walk(tmp_path)
    # Tests that run in the background may have been told to ignore Ctrl-C, and all that they start with them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield made
    finally:
        signal.signal(signal.SIGINT, before)
        made.close()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_page_word_for_word(walk):
    port = free_port()
    for mark, text_of_block in steps():
        # The one word that is not the page's: something may listen there where the tests run.
        block = text_of_block and text_of_block.replace("8002", str(port))
        action, _, rest = mark.partition(" ")
        name, _, text = rest.partition(": ")
        match action:
            case "run" if rest.startswith("until "):
                walk.run_until(block, rest.removeprefix("until "))
            case "run":
                walk.run(block)
            case "terminal":
                walk.terminal(name, block, text)
            case "output":
                walk.output(block)
            case "see":
                walk.see(name, text)
            case "Ctrl-C":
                walk.stop(name, signal.SIGINT)
            case "kill":
                walk.stop(name, signal.SIGKILL)
            case _:
                pytest.fail(f"the page says {mark!r}, which this test does not know")


def said(tree):
    """Every text that the code may say, `…` for what is put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_each_message_of_the_table_is_one():
    texts = [text for file in (ROOT / "src").rglob("*.py") for text in said(ast.parse(file.read_text()))]
    table = PAGE.read_text(encoding="utf-8").partition("## When something goes wrong")[2]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(messages) >= 20
    assert [message for message in messages if not any(message in text for text in texts)] == []
