"""Reports for people (HTML) and for CI systems (JUnit), from made-up results and from a real check."""

import html.parser
import json
import math
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest
from golden_copy import GOLDEN

from parity import halves
from parity.__main__ import main
from parity.html_report import render_html, write_html
from parity.junit_report import write_junit

VOID = {"meta", "link", "input", "br", "hr", "img"}
LEVELS = ("outputs", "layers", "gradients", "training", "preprocessing", "weights", "op", "export")


def row(model: str, number: int, *, passed: bool = True, **more) -> dict:
    size = 1e-14 * (1 + number % 7) if passed else 1e-4
    mode = ("free", "forced")[number % 2]
    name = f"{mode}.encoder.layer.{number}.attention"
    figures = {"max_abs": 3 * size, "max_rel": size, "mean_abs": size / 5, "cosine": 1.0, "tolerance": 1e-10}
    place = {"mode": mode, "order": number, "block": f"encoder.layer.{number}", "floor": None, "factor": None}
    who = {"model": model, "level": "layers", "name": name, "dtype": "float64", "half": "keras"}
    return {**who, **figures, **place, "passed": passed, "reason": "", **more}


def report(models: int = 2, rows: int = 30, failing: bool = True) -> dict:
    names = [f"model-{number}" for number in range(models)]
    results = [row(name, number) for name in names for number in range(rows)]
    facts = {
        name: {"extent": "whole", "parameters": 3_500_000, "image": "a cat", "weights": "drawn", "notes": ["A note."]}
        for name in names
    }
    if failing:
        results[3] = row(names[0], 3, passed=False)
        results[5] = row(names[0], 5, passed=False, max_abs=None, max_rel=None, mean_abs=None, reason="not finite")
        sentence = "model-0 first diverges in encoder.layer.3"
        first = {"name": results[3]["name"], "dtype": "float64", "half": "keras", "sentence": sentence}
        facts[names[0]]["first_divergence"] = first
        heat = [[0.1 * x * y for x in range(8)] for y in range(5)]
        facts[names[0]]["worst"] = {**first, "shape": [1, 5, 8], "what": "down: axis 1, across: axis 2", "heat": heat}
    environment = {"date": "2026-11-21T00:00:00+00:00", "versions": {"torch": "2.13.0"}, "models": facts}
    return {"passed": not failing, "environment": {**environment, "seconds": 61.0}, "results": results}


class Page(html.parser.HTMLParser):
    """Balanced tags, ids, links and addresses of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.ids, self.links = [], set(), []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.stack.append(tag)
        if "id" in attributes:
            assert attributes["id"] not in self.ids, f"twice {attributes['id']}"
            self.ids.add(attributes["id"])
        for name in ("href", "src"):
            if name in attributes:
                self.links.append(attributes[name])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.mark.parametrize("failing", [True, False])
def test_the_page_is_whole_and_needs_no_network(failing):
    text = render_html(report(failing=failing))
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    inner = [link[1:] for link in page.links if link.startswith("#")]
    # rows that passed are made by the script; without it, those that failed are there
    assert {link for link in inner if "/" not in link} <= page.ids
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert ("✕ FAILED" in text) is failing and ("✓ Passed" in text) is not failing
    if failing:
        assert "model-0 first diverges in encoder.layer.3" in text and "not finite" in text
        assert "model-0/layers/forced.encoder.layer.3.attention/float64/keras" in page.ids
        assert "Worst tensor" in text and "Error by depth" in text


def test_names_are_not_taken_for_markup(tmp_path):
    evil = "<script>alert(1)</script>&\u2028\x00"
    made = report(models=1)
    for entry in made["results"]:
        entry["model"] = evil
    made["environment"]["models"] = {evil: made["environment"]["models"]["model-0"]}
    made["results"][3]["reason"] = "</script><img src=x>"
    text = render_html(made)
    Page(text)
    assert "<script>alert" not in text and "<img src=x>" not in text
    write_junit(tmp_path / "junit.xml", made)
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert suite.get("name").startswith("<script>alert(1)</script>&")


def test_what_earlier_reports_lack_is_not_missed(tmp_path):
    made = report()
    for entry in made["results"]:
        for field in ("mean_abs", "mode", "order", "block", "floor", "factor", "reason"):
            entry.pop(field)
    made["environment"] = {}
    Page(render_html(made))
    write_junit(tmp_path / "junit.xml", made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("results"), "results"),
        (lambda r: r["results"].append("text"), "results[60]"),
        (lambda r: r["results"][0].pop("name"), "results[0]"),
        (lambda r: r["results"][0].update(max_rel="large"), "results[0]"),
        (lambda r: r["environment"].update(models=[1]), "environment.models"),
    ],
)
def test_what_is_no_report_is_told(change, message, tmp_path):
    made = report()
    change(made)
    for write in (write_html, write_junit):
        with pytest.raises(ValueError, match=re.escape(message)):
            write(tmp_path / "report", made)
    assert not list(tmp_path.iterdir())


def test_junit_has_a_case_for_each_row(tmp_path):
    write_junit(tmp_path / "junit.xml", report())
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (root.get("tests"), root.get("failures")) == ("60", "2")
    suites = {suite.get("name"): suite for suite in root}
    assert [suites["model-0"].get(name) for name in ("tests", "failures", "errors")] == ["30", "2", "0"]
    cases = suites["model-0"].findall("testcase")
    assert len(cases) == 30 and cases[0].get("classname") == "model-0.layers"
    failures = [case.find("failure").get("message") for case in cases if case.find("failure") is not None]
    assert failures[0].startswith("max_rel 1.00e-04 of the scale, allowed 1.00e-10")
    assert failures[1].startswith("not finite: ")
    properties = {entry.get("name"): entry.get("value") for entry in suites["model-0"].iter("property")}
    assert properties["versions.torch"] == "2.13.0" and properties["extent"] == "whole"


def test_a_check_writes_all_reports(tmp_path, monkeypatch, capsys):
    def build(config, weights, dtype):
        return halves.build_keras(config.replace(layer_norm_eps=1e-5), weights, dtype)

    monkeypatch.setitem(halves.BUILD, "keras", build)
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html", "junit")}
    options = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    assert main(["check", "--checkpoint", str(GOLDEN / "vit_msn_tiny"), "--dtype", "float64", *options]) == 1
    rows = json.loads(files["json"].read_text())["results"]
    page = files["html"].read_text(encoding="utf-8")
    Page(page)
    assert "vit_msn_tiny first diverges in vit.encoder.layer.0, at its layernorm_before" in page
    root = ElementTree.parse(files["junit"]).getroot()
    assert int(root.get("failures")) == sum(not row["passed"] for row in rows) > 0
    assert int(root.get("tests")) == len(rows)
    assert main(["check", "--checkpoint", "x", "--html", "/nowhere/report.html"]) == 2
    assert "--html: there is no directory /nowhere" in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_shows_it_without_a_word_on_its_console(width, tmp_path):
    path = tmp_path / "report.html"
    write_html(path, report(models=20, rows=1000))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--enable-logging=stderr"]
    options += ["--virtual-time-budget=3000", "--dump-dom", f"--user-data-dir={tmp_path}/profile"]
    process = subprocess.run(
        [
            CHROMIUM,
            *options,
            "--virtual-time-budget=3000",
            "--dump-dom",
            f"--user-data-dir={tmp_path}/profile",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in process.stderr, process.stderr
    assert "20,000 rows" in process.stdout  # which the script counted
    shown = re.search(r'id="all-rows".*?</table>', process.stdout, re.DOTALL)[0]
    first = re.search(r"<tbody><tr.*?</tr>", shown, re.DOTALL)[0]
    assert "not finite" in first or "forced.encoder.layer.3" in first  # the worst first
    assert math.isfinite(len(shown)) and shown.count("<tr") < 2000  # the others when they are asked for
