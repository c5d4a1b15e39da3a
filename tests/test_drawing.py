"""The drawing of a residual stream: everything in the report is in it, and it stands alone."""

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from larosa_compile.drawing import STREAM, WIDTH, draw_streams
from larosa_compile.passes.graph import Refusal
from larosa_compile.report import GraphReport
from tests.support.reports import tiny_report

SVG = "{http://www.w3.org/2000/svg}"


def drawn(report: GraphReport) -> ElementTree.Element:
    text = draw_streams(report)
    assert "<script" not in text
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    return ElementTree.fromstring(text)


def circles(svg: ElementTree.Element) -> list[float]:
    """x of every dot, top to bottom."""
    return [float(circle.attrib["cx"]) for circle in svg.iter(f"{SVG}circle")]


@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_everything_is_drawn(architecture: str) -> None:
    report = tiny_report(architecture)
    svg = drawn(report)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    for site in report.sites:
        assert f"{site.kept} / {site.features}" in texts
    titles = " ".join(title.text or "" for title in svg.iter(f"{SVG}title"))
    assert all(path in titles for site in report.sites for path in site.paths)
    found = circles(svg)
    assert [x == STREAM for x in found] == [item.on_stream for item in report.online]
    # a group for each site, rotation and refusal inside one for its row
    groups = [group for row in svg.findall(f"{SVG}g") for group in row.findall(f"{SVG}g")]
    assert len(groups) == len(report.sites) + len(report.online) + len(report.refusals)
    heights = [float(row.attrib["transform"].split()[1].rstrip(")")) for row in svg.findall(f"{SVG}g")]
    assert heights == sorted(set(heights)) and heights[-1] < float(svg.attrib["height"])
    assert float(svg.attrib["width"]) == WIDTH


def test_the_boxes_are_filled_as_far_as_inputs_are_kept() -> None:
    report = tiny_report("llama")
    svg = drawn(report)
    boxes = [row for row in svg.iter(f"{SVG}g") if row.find(f"{SVG}rect") is not None]
    for site, row in zip(report.sites, boxes, strict=True):
        whole, filled = (float(rect.attrib["width"]) for rect in row.findall(f"{SVG}rect"))
        assert (filled + 1) / whole == pytest.approx(site.kept / site.features, abs=1e-3)


def test_the_stream_changes_colour_where_it_is_rotated() -> None:
    report = tiny_report("llama")
    lines = [path for path in drawn(report).findall(f"{SVG}path") if path.attrib.get("stroke-width") == "4"]
    assert len(lines) == 1 + sum(item.on_stream for item in report.online)
    colours = [line.attrib["stroke"] for line in lines]
    assert all(a != b for a, b in pairwise(colours))


def test_what_stays_dense_stands_in_its_layer_with_its_reason() -> None:
    report = tiny_report("llama")
    reason = "a reason <that> goes on for longer than one line of a box can hold, so that it is wrapped"
    refusals = (Refusal("model.layers.1.mlp.extra.weight", reason), Refusal("some_node", "no layer"))
    texts = [text.text or "" for text in drawn(replace(report, refusals=refusals)).iter(f"{SVG}text")]
    at = texts.index("mlp.extra")
    assert texts.index("model.layers.1") < at < texts.index("model.layers.2")
    assert " ".join(texts[at + 2 : at + 4]) == reason
    assert texts[-4:-2] == ["elsewhere", "some_node"]
