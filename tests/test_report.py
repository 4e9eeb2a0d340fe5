"""The report page: what it shows of records, what models wrote stays text, and what Chromium makes of it."""

import json

import pytest
from browser import Page
from conftest import REPO, log_row, write_evaluation

from eval_settings import load_settings
from page_report import SAMPLE_BYTES, page, panel_plots, reasoning

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&{{data}}"


@pytest.fixture
def hostile_results(tmp_path):
    """Records whose every free text tries to become markup."""
    hostile = {"extracted": HOSTILE, "gold": HOSTILE}
    rows = [
        log_row("tiny_math", "m-1", text=HOSTILE, correct=False, **hostile),
        log_row("tiny_math", "m-2", text="fine", **hostile),
    ]
    model = {"path": HOSTILE, "config_sha256": "0", "bytes": 10**6, "family": None}
    log = write_evaluation(tmp_path, "t", rows, model=model, seconds=1.0)
    record = json.loads((tmp_path / "eval/t.json").read_text())
    (tmp_path / "eval/t.json").write_text(json.dumps(record | {"tag": HOSTILE, "samples": log.name}))
    return tmp_path


def elements(text):
    """(tag, attributes) of every element of a page."""
    from html.parser import HTMLParser

    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Parser().feed(text)
    return found


def assert_nothing_became_markup(text):
    found = elements(text)
    assert [tag for tag, _ in found].count("script") == 2 and not [tag for tag, _ in found if tag == "img"]
    assert not any(name.startswith("on") for _, attributes in found for name in attributes)


def test_the_report_escapes_what_models_wrote(hostile_results):
    text = page(hostile_results, load_settings())
    assert_nothing_became_markup(text)
    shown = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [entry["text"] for entry in shown] == [HOSTILE, "fine"] and shown[0]["question"] is None


def test_the_report_of_our_own_records(ours):
    text = ours.read_text()
    assert len(text.encode()) < SAMPLE_BYTES + 1_000_000 < 3_000_001  # pictures included
    assert text.count("<svg") >= 2 and "razor_tiny_int3_int4_clip16" in text and "98.0 % <" in text and "97.9 to 99.3" in text
    assert "http://" not in text and "https://" not in text.split("<script")[0]  # nothing is fetched
    shown = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert {entry["benchmark"] for entry in shown} >= {"tiny_know", "tiny_math", "tiny_reason", "tiny_code", "tiny_count"}
    assert all(entry["question"] for entry in shown) and any(not entry["correct"] for entry in shown)


def test_reasoning_and_the_panel_are_shown_with_their_intervals():
    """A change whose interval excludes none gets a chip; what no log tells is no zero; a KL below the floor claims nothing."""
    made = {"n": 50, "base": 0.0, "other": 0.2, "difference": 0.2, "low": 0.1, "high": 0.3}
    same = made | {"other": 0.0, "difference": 0.0, "low": -0.05, "high": 0.05}
    length = {"n": 50, "base": 100.0, "other": 90.0, "unit": "tokens", "ratio": 0.9, "ratio_low": 0.85, "ratio_high": 0.95}
    drift = dict(length=length, truncated=same, loops=made, unemitted=None, waits=same, wait_rate=same)
    record = {"base": "b", "other": "o", "metrics": {"gpqa": {"reasoning": drift}, "aime": {"verdict": "older record"}}}
    (section,) = reasoning([("compare/b__o.json", record)])
    cells = dict(zip(section.head, *section.rows))
    assert (
        cells["models"].text == "b -> o" and cells["items"].text == "50" and cells["right, not emitted"].text == "not recorded"
    )
    assert cells["length"].text == "x 0.90" and cells["length"].small == ("100.0 -> 90.0 tokens", "[0.85, 0.95]")
    assert (cells["length"].chip[0], cells["loops"].chip[0], cells["cut"].chip) == ("less", "more", None)
    assert list(reasoning([("compare/b__o.json", record | {"metrics": {"aime": {"verdict": "older record"}}})])) == []
    stratum = dict.fromkeys(("mean", "median", "p99", "p99_9", "top1", "flips"), 0.01) | {"positions": 2000, "floor": 0.009}
    strata = {"all": stratum | {"low": 0.008, "high": 0.012, "claimed": False}}
    record = {"tag": "q", "judge": "transformers", "floor": "a copy", "reference": {"path": "models/m"}}
    found = [("panel/q.json", record | {"panel": {"sha256": "0"}, "metrics": {"strata": strata}})]
    (plot,) = panel_plots(found)
    assert plot["title"] == "KL panel of m" and plot["svg"].count("q, all: 0.01000 (0.00800 to 0.01200), floor 0.009000") == 2


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The page of our own records."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(REPO / "results", load_settings()))
    return path


@pytest.fixture
def browser(tmp_path):
    opened = Page(tmp_path / "profile")
    yield opened
    opened.close()


def every(browser, selector, expression):
    """The values of an expression of the elements ``e`` of a selector."""
    return browser.js(f"[...document.querySelectorAll('{selector}')].map(e => {expression})")


COLUMN = "[...{table}.tBodies[0].rows].map(row => row.cells[{column}].firstChild?.textContent.trim() || '')"


@pytest.mark.slow
def test_the_report_in_a_browser(browser, ours, hostile_results):
    """No error on the console; plots are drawn, a table sorts, a sample opens; no text of a model has become markup."""
    hostile = hostile_results / "report.html"
    hostile.write_text(page(hostile_results, load_settings()))
    browser.open(hostile.as_uri(), 1200)
    assert browser.js("document.title") == "moe-lowbit: results" and browser.js("document.images.length") == 0
    assert browser.js("document.getElementById('count').textContent") == "1 to 2 of 2"
    assert HOSTILE in browser.js("document.querySelector('.sample').textContent")
    browser.open(ours.as_uri(), 1200)
    plots = every(browser, "figure svg", "[e.clientWidth, e.clientHeight, e.querySelectorAll('path').length]")
    assert len(plots) >= 2 and all(width > 300 and height > 150 and marks > 10 for width, height, marks in plots), plots
    table = "document.querySelector('table')"
    column = COLUMN.format(table=table, column=2)
    before = browser.js(column)
    for turn in (1, -1):
        browser.js(f"{table}.tHead.rows[0].cells[2].click()")
        shown = browser.js(column)
        figures = [float(text.partition(" ")[0]) for text in shown if text]
        assert figures == sorted(figures)[::turn] and len(figures) > 5 and sorted(shown) == sorted(before)
        assert not any(shown[len(figures) :]), "blank cells come last"
        assert browser.js(f"{table}.tHead.rows[0].cells[2].ariaSort") == {1: "ascending", -1: "descending"}[turn]
    assert browser.js("document.querySelectorAll('.sample').length") == 10
    second = "document.querySelectorAll('.sample')[1]"
    assert browser.js(f"{second}.open") is False
    browser.js(f"{second}.querySelector('summary').click()")
    assert browser.js(f"{second}.querySelector('pre:not(.question)').offsetHeight") > 10
    assert browser.faults == []
    browser.js("console.error('heard')")
    assert browser.js("1") == 1 and len(browser.faults) == 1, "an error would have been heard"


@pytest.mark.slow
def test_the_report_on_a_phone(browser, ours):
    """At 390 CSS pixels nothing is wider than the page; tables scroll inside their frames and keep their first column."""
    browser.open(ours.as_uri(), 390)
    assert browser.js("innerWidth") == 390 and browser.js("document.scrollingElement.scrollWidth") <= 390
    frames = every(browser, ".scroll", "[e.clientWidth, e.scrollWidth]")
    assert any(inside > shown for shown, inside in frames) and all(shown <= 390 for shown, _ in frames)
    plots = every(browser, "figure svg", "[e.getBoundingClientRect().right, e.clientWidth]")
    assert plots and all(right <= 390 and width > 300 for right, width in plots), plots
    scrolled = "const frame = document.querySelector('.scroll'); frame.scrollLeft = 150;"
    place = "Math.round(frame.querySelector('td').getBoundingClientRect().left - frame.getBoundingClientRect().left)"
    assert browser.js(f"{{ {scrolled} {place} }}") <= 1, "the first column stays in sight"
    sizes = every(browser, "td, p, summary, label", "parseFloat(getComputedStyle(e).fontSize)")
    assert min(sizes) >= 12
    heights = every(browser, "td:first-child", "e.offsetHeight")
    assert max(heights) < 300, "no cell is squeezed into a column of letters"
    assert browser.faults == []
