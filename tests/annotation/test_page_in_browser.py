"""The annotation page as a person uses it: looked at, clicked, and typed at, in a headless Chromium."""

from __future__ import annotations

import json
import re
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from accord.annotation.folder import Settings, read_pairs, write_pairs, write_settings
from accord.annotation.journal import read_judgements
from accord.annotation.pairs import Candidate, read_candidates
from accord.data.preferences import read_preferences
from in_browser import broken_rules, runs_off

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
expect = pytest.importorskip("playwright.sync_api").expect  # of the extra browser, which the other tests go without
expect.set_options(timeout=30_000)  # a busy machine takes a while

HOSTILE = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script> & \u202eabc'
LOOKS = [(width, dark) for width in (390, 1400) for dark in (False, True)]


def watched(page: Page) -> list[str]:
    """Return a list to which every error of the page is added, and every request to elsewhere."""
    seen: list[str] = []
    page.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("request", lambda request: None if "//127.0.0.1:" in request.url else seen.append(request.url))
    return seen


def ready(page: Page, judged: int) -> None:
    """Wait until so many are judged and the next pair is there."""
    expect(page.locator("#so-far")).to_have_text(re.compile(rf"^{judged} judged"))
    expect(page.locator("#judge")).to_have_attribute("aria-busy", "false")


def enter(page: Page, address: str, name: str, known: str = "") -> None:
    """Open the address and give a name, with the keyboard alone."""
    page.goto(address)
    expect(page.locator("#name")).to_be_focused()
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    expect(page.locator("#judge")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#who-name")).to_have_text(known or name)


def press(page: Page, key: str, judged: int) -> None:
    page.keyboard.press(key)
    ready(page, judged)


def good(page: Page) -> str:
    """The key for the answer that begins with `good`."""
    return "ArrowLeft" if page.locator("#left").inner_text().startswith("good") else "ArrowRight"


def test_a_whole_annotation_with_the_keyboard_alone(chromium, desk, serving, tmp_path):
    """A name, all five choices, a reason that is required, undo, the image, the end; and the mouse is never used."""
    open_desk = desk(8)
    order = list(open_desk.candidates)
    write_settings(tmp_path / "annotation", Settings(0.0, 0))
    with serving(open_desk) as server:
        page = chromium()
        seen = watched(page)
        page.goto(server.address)
        assert "token" not in page.url
        page.keyboard.press("Enter")  # without a name
        expect(page.locator("#name")).to_be_focused()
        assert page.locator("#judge").is_hidden() and page.evaluate("document.querySelector(':invalid').id") != ""
        enter(page, page.url, "Dr. Ä")
        ready(page, 0)

        press(page, good(page), 1)
        expect(page.locator("#status")).to_have_text(re.compile("^Saved: (left|right) is better"))
        press(page, "t", 2)
        press(page, "b", 3)
        page.keyboard.press("s")
        expect(page.locator("#skip-dialog")).to_be_visible()
        page.keyboard.press("Enter")  # without a reason
        expect(page.locator("#skip-alert")).to_have_text("Choose a reason, or say it in your own words.")
        expect(page.locator("#own-reason")).to_be_focused()
        page.keyboard.type("but 1 is too dark")
        page.keyboard.press("Enter")
        ready(page, 4)
        page.keyboard.press("s")
        page.keyboard.press("Escape")
        expect(page.locator("#skip-dialog")).to_be_hidden()
        page.keyboard.press("s")
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        ready(page, 5)
        press(page, "u", 4)
        press(page, "u", 3)
        expect(page.locator("#turns")).to_have_text("what is picture 3?")
        for judged in range(4, 9):
            press(page, good(page), judged)
        expect(page.locator("#finished")).to_be_visible()
        expect(page.locator("[data-choice=left]")).to_be_hidden()
        page.keyboard.press("ArrowLeft")  # there is nothing more to judge
        press(page, "u", 7)
        press(page, good(page), 8)
        assert seen == []
    standing, _ = read_judgements(tmp_path / "annotation" / "judgements.jsonl")
    by_pair = {each.pair: each for each in standing}
    said = [("first" if by_pair[p].preferred == 0 else by_pair[p].choice) for p in order]
    assert said == ["first", "tie", "both bad", *["first"] * 5] and {each.annotator for each in standing} == {"Dr. Ä"}
    lines = (tmp_path / "annotation" / "judgements.jsonl").read_text()
    assert "but 1 is too dark" in lines and "the question is unclear" in lines  # said, and taken back


def test_every_control_is_reached_with_tab(chromium, desk, serving):
    """In the order of the page, and each shows that it has the focus."""
    with serving(desk(2)) as server:
        page = chromium()
        enter(page, server.address, "A")
        reached = []
        for _ in range(30):
            page.keyboard.press("Tab")
            found = page.evaluate(
                "() => { const e = document.activeElement; const s = getComputedStyle(e);"
                "return [e.id || e.dataset.choice || e.tagName, s.outlineStyle] }"
            )
            if found[0] == "BODY" or (reached and found == reached[0]):
                break
            reached.append(found)
        names = [name for name, _ in reached]
        wanted = ["viewer", "zoom-in", "zoom-out", "zoom-all", "left", "right", "tie", "both bad", "skip", "undo"]
        assert [name for name in names if name in wanted] == wanted and "SUMMARY" in names
        assert all(outline != "none" for _, outline in reached)


def test_zoom_and_pan_by_mouse_and_by_keyboard(chromium, desk, serving):
    """What is under the pointer stays there; the image never leaves its frame; the next pair is shown whole."""
    with serving(desk(3)) as server:
        page = chromium()
        enter(page, server.address, "A")
        image, viewer = page.locator("#image"), page.locator("#viewer")

        def place():
            box = image.bounding_box()
            return [round(box[name]) for name in ("x", "y", "width", "height")]

        whole = place()
        page.keyboard.press("+")
        page.keyboard.press("+")
        zoomed = place()
        assert zoomed[2] == pytest.approx(whole[2] * 2.25, abs=2)
        page.keyboard.press("Shift+ArrowRight")
        assert place()[0] == zoomed[0] - 80 and place()[1] == zoomed[1]
        page.keyboard.press("Shift+ArrowDown")
        assert place()[1] == zoomed[1] - 80
        for _ in range(40):
            page.keyboard.press("Shift+ArrowRight")
        frame = viewer.bounding_box()
        assert place()[0] + place()[2] == pytest.approx(frame["x"] + frame["width"], abs=2)
        page.keyboard.press("0")
        assert place() == whole

        x, y = frame["x"] + 100, frame["y"] + 60
        page.mouse.move(x, y)
        share = (x - whole[0]) / whole[2]
        for _ in range(4):
            page.mouse.wheel(0, -100)
        expect(page.locator("#zoomed")).to_have_text("2.4 ×")
        now = place()
        assert (x - now[0]) / now[2] == pytest.approx(share, abs=0.01)
        page.mouse.down()
        page.mouse.move(x + 30, y + 20, steps=3)
        page.mouse.up()
        assert place()[:2] == [now[0] + 30, now[1] + 20]
        page.locator("#zoom-out").click()
        assert place()[2] < now[2]
        press(page, good(page), 1)
        assert place()[2:] == whole[2:] and page.locator("#zoomed").inner_text() == ""


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_it_fits_and_breaks_no_rule(chromium, desk, serving, width, dark):
    """At 390 and 1,400 pixels, light and dark: the name, a pair, the skip, the end, and the second tab."""
    open_desk = desk(3, overlap=1.0)
    for name in ("A second annotator with a long name, of the department of radiology", "B"):
        for choice in ("left", "tie", "right"):
            open_desk.judge(name, open_desk.next(name).pair.id, choice)
    with serving(open_desk) as server:
        page = chromium(width=width, dark=dark)
        seen = watched(page)
        page.goto(server.address)

        def look():
            assert broken_rules(page) == [] and runs_off(page) <= 0

        look()
        enter(page, page.url, "C" * 60)
        page.locator("summary").click()
        look()
        page.keyboard.press("s")
        expect(page.locator("#skip-dialog")).to_be_visible()
        page.keyboard.press("Enter")
        look()
        assert page.locator("#skip-form").evaluate("form => form.scrollWidth <= form.parentElement.clientWidth")
        page.keyboard.press("Escape")
        page.locator("#to-agreement").click()
        expect(page.locator("#alpha")).to_contain_text("Krippendorff's α is ")
        expect(page.locator("#kappa td")).to_have_count(2)
        look()
        page.locator("#to-judge").click()
        expect(page.locator("#judge")).to_be_visible()
        for judged in range(1, 4):
            press(page, "ArrowLeft", judged)
        look()
        shown, ground = page.evaluate(
            "() => [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (shown, ground)]
        assert (brightness[0] > brightness[1]) is dark
        assert seen == []


@pytest.mark.parametrize("width", [390, 1400])
def test_hostile_and_long_texts(chromium, desk, serving, tmp_path, square, width):
    """Markup is text, a word without an end breaks, a conversation has its roles; nothing runs, nothing runs off."""
    prompt = [
        {"role": "system", "content": HOSTILE},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x" * 900}]},
    ]
    pictures = (square("red", (40, 4000)), square("blue", (3000, 20)))
    folder = tmp_path / "annotation"
    write_pairs(folder, [Candidate("h", prompt, (HOSTILE, "word " * 400), pictures, "q")])
    with serving(desk()) as server:
        page = chromium(width=width)
        seen = watched(page)
        enter(page, server.address, "<b>A</b>")
        shown = {page.locator("#left").inner_text().strip(), page.locator("#right").inner_text().strip()}
        assert HOSTILE in shown
        assert page.title() == "a <title> · Accord" and page.locator("#texts img, #texts script").count() == 0
        expect(page.locator("#turns .turn")).to_have_count(2)
        assert page.locator("#image").get_attribute("alt") == "Image 1 of 2 of this question"
        page.keyboard.press("]")
        expect(page.locator("#image")).to_have_attribute("alt", "Image 2 of 2 of this question")
        assert runs_off(page) <= 0 and broken_rules(page) == [] and seen == []
        press(page, "t", 1)
        page.goto(page.url.partition("#")[0] + "#agreement")
        expect(page.locator("#choices th[scope=row]")).to_have_text("<b>A</b>")
        assert runs_off(page) <= 0 and seen == []


def test_a_picture_that_cannot_be_shown_is_skipped_with_a_reason(chromium, desk, serving):
    open_desk = desk(2)
    first = next(iter(open_desk.candidates.values()))
    first.images[0].write_bytes(b"hello")
    with serving(open_desk) as server:
        page = chromium()
        enter(page, server.address, "A")
        expect(page.locator("#image")).to_have_attribute(
            "alt", "This image cannot be shown. Skip the pair, and say so."
        )
        page.keyboard.press("s")
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        ready(page, 1)
        expect(page.locator("#image")).to_have_attribute("alt", "Image 1 of 1 of this question")


def test_a_key_that_is_held_judges_once_and_keys_can_be_off(chromium, desk, serving):
    with serving(desk(6)) as server:
        page = chromium()
        enter(page, server.address, "A")
        page.keyboard.down("t")
        ready(page, 1)
        for _ in range(5):
            page.keyboard.down("t")  # repeats, as a held key does
        page.keyboard.up("t")
        page.keyboard.press("Control+b")
        page.locator("summary").click()
        page.locator("#keys-on").click()
        page.keyboard.press("b")
        page.locator("[data-choice=tie]").click()
        ready(page, 2)


def test_two_annotators_with_overlap(chromium, desk, serving):
    """Two browsers of one machine: each gets a cookie by an address of its own, and they share what is not for both."""
    open_desk = desk(12, overlap=0.4)
    told: list[str] = []
    with serving(open_desk, told) as server:
        one, other = chromium(), chromium()
        enter(one, server.address, "one")
        other.goto(server.address.partition("?")[0])
        expect(other.locator("main")).to_contain_text("This address was used before")
        enter(other, told[-1], "other")
        done = {"one": 0, "other": 0}
        for _ in range(12):
            for page, name in ((one, "one"), (other, "other")):
                if page.locator("#finished").is_hidden():
                    done[name] += 1
                    press(page, good(page) if done[name] != 2 else "t", done[name])
        assert sum(done.values()) == 12 + len(open_desk.shared) and 1 < len(open_desk.shared) < 11
        one.locator("#to-agreement").click()
        expect(one.locator("#alpha")).to_contain_text(f"over {len(open_desk.shared)} pairs that at least two judged")
        expect(one.locator("#kappa th[scope=row]")).to_have_text("one and other")
        expect(one.locator("#sides-all")).to_have_text(re.compile(r"^The left was chosen: \d+ % \(\d+ to \d+ %\)\.$"))


class Stranger(BaseHTTPRequestHandler):
    """A page of another port, which is the same site to a browser: cookies go along, and only its origin tells."""

    def do_GET(self):
        page = f'<!doctype html><title>x</title><iframe id="frame" src="{self.server.victim}"></iframe>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_):
        pass


def test_another_page_can_neither_frame_nor_post(chromium, desk, serving, tmp_path):
    """A server of another port, in the same browser: its frame stays empty, and what it posts counts for nothing."""
    open_desk = desk(2)
    stranger = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=stranger.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with serving(open_desk) as server:
            place = stranger.victim = f"http://127.0.0.1:{server.port}"
            page = chromium()
            enter(page, server.address, "A")
            pair = next(iter(open_desk.candidates))
            other = page.context.new_page()
            sent = []
            other.on("request", lambda request: sent.append((request.method, request.url)))
            other.goto(f"http://127.0.0.1:{stranger.server_port}/")
            body = json.dumps({"annotator": "A", "pair": pair, "choice": "left"})
            other.evaluate(
                "([url, body]) => fetch(url, {method: 'POST', mode: 'no-cors', credentials: 'include', body})"
                ".catch(() => null).then(() => null)",
                [f"{place}/api/judge", body],
            )
            assert ("POST", f"{place}/api/judge") in sent and ("GET", f"{place}/") in sent
            assert read_judgements(tmp_path / "annotation" / "judgements.jsonl") == ([], 0)
            assert other.frame_locator("#frame").locator("#welcome, #judge").count() == 0
            assert page.locator("#welcome, #judge").count() == 2  # what the frame would show
            press(page, "ArrowLeft", 1)
    finally:
        stranger.shutdown()
        thread.join()
        stranger.server_close()


def test_killed_in_mid_judgement_and_the_export_trains(chromium, running, answers_file, tmp_path, monkeypatch, capsys):
    """SIGKILL while a pair is looked at: what was saved stands, what was not is told, and the rest is judged after it.

    Then the export trains a reward model for a few steps.
    """
    from accord.cli import main
    from accord.rewards.model import RewardModel

    folder = tmp_path / "annotation"
    first = running(folder, "--pairs", answers_file(12), "--no-open")
    page = chromium()
    enter(page, first.address(), "Dr. B")
    for judged in range(1, 5):
        press(page, good(page), judged)
    looked_at = page.locator("#turns").inner_text()
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#alert")).to_contain_text("The server does not answer, and this was not saved.")
    expect(page.locator("#so-far")).to_have_text(re.compile("^4 judged"))
    assert page.locator("#turns").inner_text() == looked_at

    again = running(folder, "--no-open")
    page.goto(again.address())
    expect(page.locator("#names option")).to_have_attribute("value", "Dr. B")
    enter(page, page.url, "dr. b", known="Dr. B")
    ready(page, 4)
    assert page.locator("#turns").inner_text() == looked_at
    for judged in range(5, 12):
        press(page, good(page), judged)
    press(page, "t", 12)
    expect(page.locator("#finished")).to_be_visible()

    def command(*words):
        monkeypatch.setattr("sys.argv", ["accord", *map(str, words)])
        main()
        return capsys.readouterr().out

    out = tmp_path / "pairs.jsonl"
    assert command("annotate", folder, "--export", out).startswith("11 preferences: ")
    assert [pair.chosen.split()[0] for pair in read_preferences(out)] == ["good"] * 11
    model = tmp_path / "reward"
    said = command(
        *("reward", "train", out, "--model", "accord/idefics3", "--out", model),
        *("--steps", 2, "--batch", 2, "--quiet"),
    )
    assert "11 pairs" in said and RewardModel.load(model).standardisation.deviation > 0


def test_pairs_without_pictures(chromium, desk, serving, tmp_path):
    file = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"{n} + {n}?", "answers": [str(2 * n), "no idea"]} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_pairs(tmp_path / "annotation", read_candidates(file))
    assert not any(each.images for each in read_pairs(tmp_path / "annotation"))
    with serving(desk()) as server:
        page = chromium(width=390)
        enter(page, server.address, "A")
        expect(page.locator("#picture")).to_be_hidden()
        page.keyboard.press("+")
        for judged in range(1, 4):
            press(page, "ArrowRight", judged)
        assert runs_off(page) <= 0
