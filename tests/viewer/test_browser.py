"""The page in a real browser: Chromium, driven headless, with no network."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from midstream.records import Record
from midstream.viewer import write_page
from tests.viewer.pages import ATTACK, hostile, named, some

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="chromium or chromedriver is missing (Debian: apt-get install chromium chromium-driver)",
    ),
]
# The rest keeps the browser from looking for its maker's servers.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1400,900",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER, log_output=os.devnull))
        yield driver
        driver.quit()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens a page of records. At the end there must have been no error, and nothing fetched."""

    def open_page(records: list[Record], **options: Any) -> Page:
        write_page(records, tmp_path / "page.html", **options)
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get((tmp_path / "page.html").as_uri())
        page = Page(browser)
        page.wait(lambda: browser.find_element(By.TAG_NAME, "body").get_attribute("data-ready"))
        return page

    yield open_page
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


class Page:
    """What a reader does with the page."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, 120, poll_frequency=0.02).until(lambda _: condition())

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements(By.CSS_SELECTOR, selector))

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of all matches, read at one moment."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(self.browser.execute_script(script, selector))

    def names(self) -> list[str]:
        """The prompts and samples of the lines that are drawn, top down."""
        return self.texts("#rows .row .col-id")

    def open(self, number: int) -> None:
        self.browser.execute_script(f"location.hash = '#{number}'")
        self.wait(lambda: self.one("body").get_attribute("data-ready") == f"#{number}")

    def press(self, keys: str, place: str = "#scroller") -> None:
        self.one(place).send_keys(keys)


def test_it_lists_all_and_opens_the_first(show: Callable[..., Page]) -> None:
    page = show(some(), title="Some rollouts")
    assert page.browser.title == page.one("#title").text == "Some rollouts"
    assert page.names() == ["plain · 0", "short · 0", "short · 1", "rich · 0", "drawn · 0"]
    assert page.one("#count").text == "5 rollouts"
    assert "".join(page.texts(".token")).endswith("Only the word zebra.")
    assert page.one(".sound").is_displayed()


@pytest.mark.parametrize("number", range(5))
def test_the_text_is_the_records_to_the_character(show: Callable[..., Page], number: int) -> None:
    record = some()[number]
    page = show(some())
    page.open(number + 1)
    trajectory = record.trajectory
    assert "".join(page.texts(".token")) == record.prompt_text + trajectory.text
    assert "".join(page.texts(".token.injected")) == "".join(
        s.text for s in trajectory.segments if s.origin == "injected"
    )
    assert len(page.all(".token")) == record.total_length
    assert page.texts(".block .code") == [entry.call.code for entry in trajectory.calls]
    assert page.texts(".block > .result") == [c.result.text for c in trajectory.calls if c.result and c.result.text]
    pictures = sum(len(c.result.media) for c in trajectory.calls if c.result)
    assert len(page.all("img.picture")) == pictures


def test_a_rollout_that_takes_longer_to_unpack_takes_no_other_s_place(
    show: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midstream.viewer.page.CHUNK_BYTES", 1)  # each by itself
    page = show(some())
    hold = """
        const text = Response.prototype.text;
        Response.prototype.text = async function () {
          Response.prototype.text = text;
          await new Promise((go) => { window.release = go; });
          return text.call(this);
        };
        location.hash = '#2';
    """
    page.browser.execute_script(hold)
    page.wait(lambda: page.browser.execute_script("return 'release' in window"))
    page.browser.execute_async_script(
        "const done = arguments[0]; addEventListener('hashchange', () => setTimeout(done)); location.hash = '#4'"
    )
    page.browser.execute_script("delete document.body.dataset.ready; release()")
    page.wait(lambda: page.one("body").get_attribute("data-ready") == "#4")
    assert page.texts("#rollout h2") == ["rich · 4"]


def test_a_picture_is_drawn(show: Callable[..., Page]) -> None:
    page = show(some())
    page.open(5)
    assert (
        page.wait(lambda: page.browser.execute_script("return document.querySelector('.picture').naturalWidth")) == 10
    )


def test_hovering_shows_id_logprob_and_position(show: Callable[..., Page]) -> None:
    record = some()[1]
    trajectory = record.trajectory
    page = show(some())
    page.open(2)
    tokens = page.all(".token")
    for position in (0, len(record.prompt_ids), trajectory.mask.index(0, len(record.prompt_ids)), len(tokens) - 1):
        page.browser.execute_script("arguments[0].scrollIntoView()", tokens[position])
        webdriver.ActionChains(page.browser).move_to_element(tokens[position]).perform()
        tip = page.wait(
            lambda position=position: f"position {position}\n" in (text := page.one("#tip").text + "\n") and text
        )
        assert f"id {trajectory.ids[position]}\n" in tip
        if trajectory.mask[position]:
            assert "origin generated\n" in tip
            assert f"logprob {round(trajectory.logprobs[position], 5):g}" in tip
            assert f"{100 * math.exp(trajectory.logprobs[position]):.2f}"[:3] in tip
        else:
            assert "logprob" not in tip


def test_filters_and_search(show: Callable[..., Page]) -> None:
    page = show(some())
    page.press("short", "#search")
    page.wait(lambda: page.names() == ["short · 0", "short · 1"])
    assert page.one("#count").text == "2 of 5 rollouts"
    page.press("0.7", "#reward-from")
    page.wait(lambda: page.names() == ["short · 0"])
    page.one("#search").clear()
    page.press(" ", "#search")
    page.wait(lambda: page.names() == ["short · 0", "drawn · 0"])
    page.one("#reward-from").clear()
    page.press("1", "#calls-from")
    page.wait(lambda: "plain · 0" not in page.names())
    page.one("#with-errors").click()
    page.wait(lambda: page.names() == ["rich · 0"])


def test_search_in_whole_texts(show: Callable[..., Page]) -> None:
    page = show([*some(), *(named(some()[1], f"n{index}") for index in range(300))], check=False)
    page.press("zebra", "#search")
    page.wait(lambda: page.names() == [])
    page.one("#whole").click()
    page.wait(lambda: page.names() == ["plain · 0"])


def test_sorting(show: Callable[..., Page]) -> None:
    page = show(some())
    page.one("#columns .col-reward").click()
    page.wait(lambda: page.names() == ["short · 0", "drawn · 0", "short · 1", "plain · 0", "rich · 0"])
    page.one("#columns .col-reward").click()
    page.wait(lambda: page.names() == ["rich · 0", "plain · 0", "short · 1", "short · 0", "drawn · 0"])
    assert page.one("#columns .col-reward").get_attribute("aria-sort") == "ascending"


def test_everything_by_the_keyboard(show: Callable[..., Page]) -> None:
    page = show(some())
    page.press("j")
    page.wait(lambda: page.one("body").get_attribute("data-ready") == "#2")
    page.press(Keys.ARROW_DOWN)
    page.wait(lambda: page.one("body").get_attribute("data-ready") == "#3")
    page.press("k")
    page.wait(lambda: page.one("body").get_attribute("data-ready") == "#2")
    page.press("/")
    assert page.browser.switch_to.active_element.get_attribute("id") == "search"
    page.press(Keys.ESCAPE, "#search")
    page.press("h")
    page.wait(lambda: page.all(".tokens.heat"))
    page.press(Keys.ARROW_RIGHT * 3, ".tokens")
    page.wait(lambda: "position 2\n" in page.one("#tip").text + "\n")
    page.press("s")
    page.wait(lambda: page.all(".siblings"))
    page.press("?")
    assert page.one("dialog").is_displayed()
    page.one("dialog button").click()
    before = page.browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    page.press("t")
    assert page.browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before


def test_siblings_stand_side_by_side(show: Callable[..., Page]) -> None:
    page = show(some())
    page.open(2)
    page.press("s")
    page.wait(lambda: len(page.all(".siblings article")) == 2)
    assert page.texts(".siblings .reward") == ["reward 1", "reward 0.5"]
    text = some()[1].trajectory.text
    assert page.texts(".siblings .tokens") == [text, text]
    page.all(".siblings .link")[1].click()
    page.wait(lambda: page.one("body").get_attribute("data-ready") == "#3")


def test_what_the_certificate_says(show: Callable[..., Page]) -> None:
    page = show([*some(), named(some()[1], "wrong", total_length=3)])
    page.one("#with-violations").click()
    page.wait(lambda: page.names() == ["wrong · 0"])
    page.all("#rows .row")[0].click()
    page.wait(lambda: any("total_length is 3" in text for text in page.texts(".violations li")))


def test_a_hostile_rollout_runs_nothing(show: Callable[..., Page]) -> None:
    record = hostile()
    page = show([*some(), record], title=ATTACK)
    page.open(6)
    page.browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true })")
    page.press("s")
    page.wait(lambda: page.all(".siblings"))
    page.open(6)
    assert "".join(page.texts(".token")) == record.prompt_text + record.trajectory.text
    assert page.browser.title.startswith("</script>")
    assert page.browser.execute_script("return [window.owned, ({}).polluted]") == [None, None]
    assert page.all("iframe, a, svg, #rollout script, #list script, img:not(.picture)") == []
    assert [picture.get_attribute("src")[:22] for picture in page.all("img")] == ["data:image/png;base64,"]


def test_the_policy_stops_what_would_get_in(browser: Any, tmp_path: Path) -> None:
    """Even if text became markup one day, it would not run: markup put in by force does not."""
    write_page(some(), tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    browser.execute_script(
        "const inline = document.createElement('script'); inline.textContent = 'window.owned = 1';"
        "document.body.append(inline);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">');"
        "document.body.insertAdjacentHTML('beforeend', '<img src=http://localhost:1/x>');"
    )
    refused: list[str] = []

    def both_are_refused() -> bool:
        refused.extend(entry["message"] for entry in browser.get_log("browser"))
        return all(any(kind in message for message in refused) for kind in ("script-src", "img-src"))

    Page(browser).wait(both_are_refused)
    assert browser.execute_script("return window.owned") is None


def test_ten_thousand_rollouts(show: Callable[..., Page]) -> None:
    records = [named(some()[index % 5], f"n{index:05}") for index in range(10_000)]
    page = show(records, check=False)
    assert page.one("#count").text == "10,000 rollouts"
    assert len(page.all("#rows .row")) < 100
    page.browser.execute_script("document.getElementById('scroller').scrollTop = 1e9")
    page.wait(lambda: page.names()[-1].startswith("n09999"))
    page.press("n07777", "#search")
    page.wait(lambda: [name.split()[0] for name in page.names()] == ["n07777"])
    page.all("#rows .row")[0].click()
    page.wait(lambda: page.one("body").get_attribute("data-ready") == "#7778")
    assert "n07777" in page.one("#rollout h2").text


def test_a_very_long_rollout(show: Callable[..., Page]) -> None:
    from tests.records.trajectories import Scenario, drive

    page = show([drive(Scenario(["All work and no play makes Jack a dull boy.\n" * 4000]))], check=False)
    assert len(page.all(".token")) > 40_000
