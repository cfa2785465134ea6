"""The page: well-formed, self-contained, with quoted text escaped and plots to scale."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from math import log
from xml.etree import ElementTree

import pytest

from nemo_speculative.data.chat_template import tokenize
from nemo_speculative.data.conversations import Split
from nemo_speculative.inspect_data.comparison import ByTemplate, Comparison
from nemo_speculative.inspect_data.page import (
    FIELD_HEIGHT,
    FIELD_WIDTH,
    LEFT,
    TOP,
    bars,
    conversation,
    curves,
    page,
)
from nemo_speculative.inspect_data.run import comparison_figures, previews, summary
from nemo_speculative.inspect_data.survey import Survey, figures
from tests.conftest import TEMPLATE, make_tokenizer
from tests.inspect_data.conftest import END, dialogue, random_rows

EVIL = '<script>alert("x")</script><img src=http://evil.example/y onerror=z>&amp;\'"'
VOID = {"meta", "img", "br", "link", "input"}
SVG = "{http://www.w3.org/2000/svg}"


class ParsedPage(HTMLParser):
    """A page whose tags are all closed, with its tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.marked, self.crossed = "", ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "pre" in self.open:
            self.marked += data if "mark" in self.open else ""
            self.crossed += data if "del" in self.open else ""


@pytest.fixture
def report(tokenization):
    """The figures of a page with all sections, and the rows that it shows."""
    talks = [
        dialogue("u:the quick fox", "a:jumps over", identity="good", source="code"),
        dialogue(f"u:{EVIL}", f"a:{EVIL}", identity=EVIL, source=EVIL),
        dialogue("u:no answer", identity=EVIL),
    ]
    split = Split([*talks, *random_rows(40)], random_rows(10, seed=1))
    survey = Survey(replace(tokenization, max_length=128), ["good", EVIL])
    thinks = make_tokenizer(TEMPLATE.replace("%}<|assistant|>{%", f"%}}<|assistant|>{EVIL}{{%"))
    comparison = Comparison(tokenization.tokenizer, ByTemplate(thinks), 128, 10)
    survey.read(split, comparison.add)
    report = figures(survey, split, 256, 0) | {
        "comparison": comparison_figures(comparison, f"http://{EVIL}"),
        "notes": [EVIL],
    }
    return report, survey.shown


def test_the_page_is_well_formed_and_self_contained(report, tokenization):
    text = page(*report, tokenization.tokenizer, EVIL)
    checked = ParsedPage(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(checked.tags)
    assert {name for name, _ in checked.attributes} <= {
        "charset", "name", "content", "lang", "class", "xmlns", "viewbox", "role", "x", "y", "x1", "x2", "y1", "y2",
        "width", "height", "points",
    }  # fmt: skip
    assert {value for _, value in checked.attributes if "://" in (value or "")} == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import", text)
    assert "prefers-color-scheme:dark" in text
    assert checked.tags.count("svg") == 4


def test_quoted_text_is_escaped(report, tokenization):
    checked = ParsedPage(page(*report, tokenization.tokenizer, "title"))
    assert checked.text.count(EVIL) >= 6, "title of a source, ids, notes, server, cause and conversation"
    assert report[0]["comparison"]["differences"]


def test_the_page_has_every_number_of_the_tables(report, tokenization):
    text = ParsedPage(page(*report, tokenization.tokenizer, "title")).text
    figures, _ = report
    for number in (f"{figures['tokens']:,}", f"{figures['supervised_share']:.1%}"):
        assert number in text
    for way in figures["packing"]["ways"].values():
        assert f"{way['fill']:.1%}" in text
    for row in figures["vocabulary"]["table"]:
        assert f"{row['entries']:,}" in text and f"{row['held_out']:.2%}" in text


@pytest.mark.parametrize("max_length", [1000, 12, 3])
def test_the_mask_in_color(max_length):
    tokenizer = make_tokenizer()
    row = tokenize(tokenizer, dialogue("u:the quick", "a:fox über <b>", "u:x", "a:y"), {END})
    checked = ParsedPage(conversation(row, tokenizer, max_length))
    assert tokenizer.decode(row.input_ids) in checked.text
    assert checked.marked == "".join(
        tokenizer.decode([i for i, _ in run]) for run in runs(row.input_ids, row.loss_mask)
    )
    assert checked.crossed == tokenizer.decode(row.input_ids[max_length:])


def runs(ids, mask):
    run = []
    for i, inside in [*zip(ids, mask, strict=True), (0, False)]:
        if inside:
            run.append((i, inside))
        elif run:
            yield run
            run = []


def test_a_very_long_conversation_is_shown_in_part():
    tokenizer, row = make_tokenizer(), random_rows(1, longest=1)[0]
    row = type(row)("long", [100] * 5000, [True] * 5000, "f")
    assert "… 904 more tokens" in ParsedPage(conversation(row, tokenizer, 10_000)).text


def test_the_summary_for_the_terminal(report, tokenization):
    text = summary(report[0])
    figures, rows = report
    assert f"{figures['tokens']:,}" in text and f"{figures['duplicates']['copies']} copies" in text
    assert f"0 of {figures['comparison']['turns']} turns equal the server at" in text and "1 refused" in text
    first, *_ = previews(rows, tokenization.tokenizer, 128, color=True)
    assert "\x1b[32mjumps over<|end|>\x1b[0m" in first
    assert "more tokens are cut off" in next(iter(previews(rows, tokenization.tokenizer, 3, color=False)))


def test_bars_are_to_scale():
    values = [("a&b", 4), ("c", 0), ("d", 10)]
    picture = ElementTree.fromstring(bars("title <1>", "axis", values, mark=1))
    drawn = picture.findall(f"{SVG}rect")
    heights = [float(bar.get("height")) for bar in drawn]
    assert heights == pytest.approx([FIELD_HEIGHT * value / 10 for _, value in values], abs=0.1)
    for bar in drawn:
        assert float(bar.get("y")) + float(bar.get("height")) == pytest.approx(TOP + FIELD_HEIGHT, abs=0.1)
    assert [bar.find(f"{SVG}title").text for bar in drawn] == ["a&b: 4", "c: 0", "d: 10"]
    assert len(picture.findall(f"{SVG}line[@class='mark']")) == 1


def test_curves_are_to_scale():
    points = [(16, 0.0), (64, 0.5), (1024, 1.0)]
    picture = ElementTree.fromstring(curves("t", "a", {"one": points}, {64: "half", 5000: "outside"}))
    drawn = picture.find(f"{SVG}polyline").get("points").split()
    for (size, share), place in zip(points, drawn, strict=True):
        x, y = map(float, place.split(","))
        assert x == pytest.approx(LEFT + FIELD_WIDTH * log(size / 16) / log(64), abs=0.1)
        assert y == pytest.approx(TOP + FIELD_HEIGHT * (1 - share), abs=0.1)
    assert len(picture.findall(f"{SVG}line[@class='mark']")) == 1


@pytest.mark.parametrize("picture", [bars("t", "a", []), curves("t", "a", {"x": [(7, 1.0)]}, {})])
def test_plots_without_data(picture):
    assert ElementTree.fromstring(picture).tag == f"{SVG}svg"
