"""The page holds everything, and a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_ponder.evaluation.analysis import Analysis
from megatron_ponder.evaluation.figures import FIGURES, draw
from megatron_ponder.evaluation.report import write_page
from tests.evaluation.analyses import analysis_of_small_models


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page alone, in a folder without the pictures that it was made from."""
    analysis = analysis_of_small_models()
    folder = tmp_path_factory.mktemp("figures")
    made = write_page(analysis, draw(analysis.tables, folder), folder, "Pondering of <three>", "data & more")
    return Path(shutil.copy(made, tmp_path_factory.mktemp("page")))


def test_the_page_holds_everything(page):
    content = page.read_text()
    assert set(re.findall(r'(?:src|href)="(data:[^,"]*,|[^"]*)', content)) == {
        "data:image/svg+xml;base64,",
        "data:,",
    }
    assert "@import" not in content
    assert "url(" not in content
    assert re.findall(r'<figure id="(\w+)">', content) == list(FIGURES)
    assert "<h1>Pondering of &lt;three&gt;</h1>" in content
    assert "Measured on data &amp; more." in content
    assert content.count("</script>") == 1
    analysis = analysis_of_small_models()
    rows = [row for row in analysis.tables["tokens"] if row["model"] == "adaptive"]
    spans = re.findall(r'<span id="t0-(\d+)" style="background:rgb\(([\d,]+)\);color:[#\w]+">([^<]*)</span>', content)
    assert [int(index) for index, _, _ in spans] == list(range(60)) == [row["position"] for row in rows]
    shades = {}
    for (_, shade, text), row in zip(spans, rows, strict=True):
        shades.setdefault(row["steps"], set()).add(shade)
        shown = row["token"].replace("▁", " ").replace("\\n", "⏎\n")
        assert html.unescape(text) == shown
    assert shades == {0: {"255,255,255"}, 1: {"132,162,202"}, 2: {"8,69,148"}}
    texts = json.loads(re.search(r"const texts = (.*);\n", content).group(1))
    assert [token["steps"] for token in texts[0]] == [row["steps"] for row in rows]
    assert texts[0][7]["s"] == [pytest.approx(rows[7][f"s_{step}"], abs=1e-4) for step in range(3)]
    for label, of in analysis.summary.items():
        assert f"{of['loss']:.4f}" in content
        for why in of["missing"]:
            assert html.escape(f"{label}: {why}") in content


def test_a_page_without_a_router_has_no_text(tmp_path):
    whole = analysis_of_small_models()
    tables = {name: [row for row in rows if row["model"] == "vanilla"] for name, rows in whole.tables.items()}
    analysis = Analysis(tables, {"vanilla": whole.summary["vanilla"]})
    content = write_page(analysis, draw(tables, tmp_path), tmp_path, "vanilla", "data").read_text()
    assert "Text shaded" not in content
    assert "mode vanilla has no router" in content


def browse(address: str, *arguments: str) -> str:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "this test opens a page in Chromium: apt-get install --no-install-recommends chromium"
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_browser_shows_text_figures_and_the_box_of_a_token(page, tmp_path):
    address = page.as_uri()
    row = [row for row in analysis_of_small_models().tables["tokens"] if row["model"] == "adaptive"][17]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    document = browse(f"{address}#t0-17", profile, "--dump-dom")
    box = re.search(r'<div id="tip".*?>(.*)</div>\s*<script>', document, re.DOTALL).group(1)
    words = html.unescape(re.sub(r"<[^>]*>", " ", box))
    assert f"takes {row['steps']} latent steps, then comes" in words
    assert f"step-0 loss {row['first_loss']:.3f}, fused loss {row['loss']:.3f} nats" in words
    for step in range(3):
        assert f"s{step}  {row[f's_{step}']:.3f}" in words
    assert 'class="shown"' in document

    shot = tmp_path / "page.png"
    browse(address, profile, f"--screenshot={shot}", "--window-size=1200,6000")
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):  # curves of three models: the figures were drawn
        assert (abs(pixels - colour).max(-1) <= 2).sum() > 200, colour
    for colour in ((132, 162, 202), (8, 69, 148)):  # backgrounds of tokens with one step and with two
        assert (abs(pixels - colour).max(-1) == 0).sum() > 500, colour
    assert np.mean(pixels > 250) > 0.5
