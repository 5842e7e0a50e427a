"""The pieces of the page: what is text stays text, and numbers stand as numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.pages import Opened
from sest.report.figures import Figure, Line, curve
from sest.report.page import Html, Page, details, element, note, paragraph, section, sentence_case, table, text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "-"),
        (None, "-"),
        (0.123456, "0.1235"),
        (12345, "12,345"),
        (1e4, "10,000"),
        (True, "yes"),
        ("<b>&", "&lt;b&gt;&amp;"),
    ],
)
def test_values_are_shown_in_words(value: object, shown: str) -> None:
    assert text(value) == shown


def test_text_is_escaped_everywhere_and_html_is_taken_as_it_is() -> None:
    assert element("p", "a < b", Html("<b>c</b>")) == "<p>a &lt; b<b>c</b></p>"
    assert element("a", "x", class_='"><script>', data_figure="f0") == (
        '<a class="&quot;&gt;&lt;script&gt;" data-figure="f0">x</a>'
    )
    for made in (note("<i>"), details("<i>"), section("id", "<i>"), table(["<i>"], [["<i>"]])):
        assert "<i>" not in made and "&lt;i&gt;" in made
    assert sentence_case("val split") == "Val split" and sentence_case("") == ""


def test_columns_of_numbers_stand_right_and_long_texts_get_room() -> None:
    made = table(["name", "n", "mixed", "flag"], [["a" * 31, 1, 1.5, True], ["b", None, "-", False]])
    assert [part.split('"')[0] for part in made.split('<th scope="col" class="')[1:]] == [
        "word long",
        "number",
        "word",
        "word",
    ]
    assert made.startswith('<div class="scroll" tabindex="0" role="region"')
    assert "<tbody></tbody>" in table(["n"], [])


def figure(name: str) -> Figure:
    made = curve([Line(name, np.arange(3.0), np.arange(3.0))], name)
    assert made is not None
    return made


def test_figures_are_kept_as_json_that_cannot_end_its_script() -> None:
    page = Page()
    body = page.plot("a plot", figure("a</script>"))
    whole = Opened(page.whole("title", [("id", "Section")], body))
    assert len(whole.scripts) == 3 and whole.figures["f0"]["layout"]["yaxis"]["title"]["text"] == "a</script>"


def test_a_plot_without_values_says_so_and_adds_no_figure() -> None:
    page = Page()
    assert "No values." in page.plot("a plot", None)
    assert Opened(page.whole("t", [], Html(""))).figures == {}


def test_choices_show_the_figure_that_is_named_for_each_place() -> None:
    page = Page()
    figures = {name: figure(name) for name in "abc"}
    made = page.choices(["worst", "best"], [0, 2], figures)
    assert made.count('<option value="f0" selected>a') == 1 and made.count('<option value="f2" selected>c') == 1
    assert made.count("<option") == 6 and made.count("<figure>") == 2
    buttons = page.buttons("colour", figures)
    assert made.count('data-save="svg"') == made.count('data-save="png"') == 2 and buttons.count("data-save") == 2
    assert buttons.count('aria-pressed="true"') == 1 and 'data-figure="f3" aria-pressed="true">a' in buttons


def test_numbers_stand_in_the_page_once_and_become_a_table_when_it_is_opened() -> None:
    page = Page()
    made = page.numbers("all", ["name", "x"], [["<b>", 1.5], ["c", math.nan]])
    whole = Opened(page.whole("t", [], made))
    assert whole.figures["f0"] == {"columns": ["name", "x"], "rows": [["<b>", 1.5], ["c", None]]}
    assert "<table" not in made and 'data-rows="f0"' in made


def test_words_between_backticks_are_code() -> None:
    assert paragraph("run `sest <x>` now") == "<p>run <code>sest &lt;x&gt;</code> now</p>"
