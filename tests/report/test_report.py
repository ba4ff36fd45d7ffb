"""The report of runs: what it shows, and that nothing a model wrote gets to be markup."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.report import page
from tessera.report.charts import MAX_POINTS, Series, averaged, chart
from tessera.report.page import markdown
from tessera.report.sections import Figure
from tessera.runs.files import RunError
from tessera.runs.run import Run

HOSTILE = "<script>document.title = 'owned'</script>\n```\n| <img src=x onerror=alert(1)> |"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A policy that trained, with samples, and an evaluation with the switch on and off."""
    home = tmp_path / "toy"
    with Run.open(home / "grpo", stage="grpo", config={}, inputs={}, seed=0, quiet=True) as run:
        for step in range(1, 4):
            run.log(step, **{"loss": -0.1 * step, "reward": 0.2, "reward/exact": 0.1 * step})
            run.log_timing(step, seconds=2.0, tokens_per_second=50.0, mfu=0.1)
        for step in (0, 3):
            row = {"prompt": HOSTILE, "kind": "best", "reward": 1.0, "text": HOSTILE}
            run.write_file(f"samples/{step:08}.jsonl", json.dumps(row) + "\n")
        run.finish()
    inputs = {"model": home / "grpo"}
    with Run.open(home / "eval", stage="eval", config={}, inputs=inputs, seed=0, quiet=True) as run:
        row = {"task": "calc@3", "metric": "accuracy", "stderr": 0.02, "tokens": 9.0}
        modes = [row | {"mode": "off", "value": 0.25}, row | {"mode": "on", "value": 0.75}]
        run.write_table("eval", modes)
        run.finish()
    return home


def test_sections_appear_where_the_runs_have_what_they_show(runs: Path):
    _, found = page.sections(runs)
    titles = [section.title for section in found]
    assert titles == [
        "In short",
        "Accuracy, thinking on and off",
        "Training",
        "Reinforcement learning",
        "Samples",
        "Cost",
        "Lineage",
    ]
    short = page.plain(found)[0]["blocks"][0]["rows"]
    assert [row["value"] for row in short[:2]] == [
        "0.250 ± 0.020, 9.0 tokens",
        "0.750 ± 0.020, 9.0 tokens",
    ]
    cost = next(one for one in page.plain(found) if one["title"] == "Cost")
    rows = {row["run"]: row for row in cost["blocks"][1]["rows"]}
    assert rows["grpo"]["tokens"] == 300  # 3 steps of 2 s at 50 tokens a second
    assert rows["eval"]["tokens"] is None


def test_drawings_are_well_formed(runs: Path):
    _, found = page.sections(runs)
    figures = [b for section in found for b in section.blocks if isinstance(b, Figure)]
    assert figures
    for one in figures:
        ElementTree.fromstring(one.svg)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_what_a_model_wrote_is_never_markup_and_nothing_is_fetched(runs: Path):
    _, found = page.sections(runs)
    tags = Tags()
    tags.feed(page.html(HOSTILE, HOSTILE, found))
    assert [tag for tag, _ in tags.found].count("script") == 0
    assert not any(tag in ("img", "link", "iframe") for tag, _ in tags.found)
    for _, attributes in tags.found:
        assert not any(name == "src" or name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")


def test_markdown_holds_the_same_and_escapes_it(runs: Path):
    _, found = page.sections(runs)
    text = markdown("toy", "subtitle", found)
    assert "## Samples" in text and "| calc@3 |" in text
    outside = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not any("<script" in line or "<img" in line for line in outside)


def test_a_long_line_is_averaged_and_a_log_axis_leaves_out_what_it_cannot_show():
    points = averaged([(float(i), float(i % 2)) for i in range(10 * MAX_POINTS)])
    assert len(points) == MAX_POINTS and {y for _, y in points} == {0.5}
    assert averaged(points) == points and averaged([]) == []
    assert chart([Series("a", [(1.0, 0.0)])], x="x", y="y", log=True) == ""


def test_a_chart_draws_and_names_every_line():
    series = [Series(f"m<{i}>", [(1 + i, 0.1 + i), (2 + i, 0.2)]) for i in range(7)]
    for log in (False, True):
        root = ElementTree.fromstring(chart(series, x="steps & more", y="loss", log=log))
        texts = {
            (text.text or "").strip() for text in root.iter("{http://www.w3.org/2000/svg}text")
        }
        assert {"steps & more", "loss", *(one.name for one in series)} <= texts


def test_the_command_writes_beside_a_finished_run_and_never_into_it(runs: Path):
    invoke = CliRunner().invoke
    before = sorted(p.name for p in (runs / "eval").iterdir())
    assert invoke(app, ["report", str(runs / "eval")]).exit_code == 0
    assert (runs / "report-eval.html").is_file()
    assert sorted(p.name for p in (runs / "eval").iterdir()) == before
    assert invoke(app, ["report", str(runs)]).exit_code == 0
    assert (runs / "report.html").is_file()
    told = invoke(app, ["report", str(runs), "--json"])
    assert json.loads(told.stdout)["sections"]


def test_a_place_without_runs_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="holds no runs"):
        page.sections(tmp_path / "nothing")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")
def test_a_browser_renders_the_page_and_runs_no_script_of_a_sample(runs: Path, tmp_path: Path):
    _, found = page.sections(runs)
    file = tmp_path / "report.html"
    file.write_text(page.html("toy", "subtitle", found), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run([str(CHROMIUM), *flags], capture_output=True, text=True, timeout=60)
    assert "<title>toy</title>" in done.stdout and "owned'</script>" not in done.stdout
    assert done.stdout.count("<section") == len(found)
