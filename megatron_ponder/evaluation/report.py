"""One self-contained HTML page of an analysis: figures, numbers, and text shaded by executed steps."""

import base64
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_ponder.base.files import write_atomically
from megatron_ponder.evaluation.analysis import Analysis, Row

STRINGS_SHOWN = 12
RARE = 5
# What stands in a token for a line end, a tab and a backslash, and how running text shows it.
ESCAPE = re.compile(r"\\(.)")
VISIBLE = {"n": "⏎\n", "t": "\t", "\\": "\\"}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; font-weight: 600; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.9rem; max-width: 60rem; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 2rem 1rem 0; }
th, td { text-align: right; padding: 0.15rem 0.7rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.side { display: flex; flex-wrap: wrap; }
.text { font: 14px/1.9 ui-monospace, monospace; white-space: break-spaces; overflow-wrap: anywhere; tab-size: 8; }
.text span, .key span { padding: 0.15em 0; border-right: 2px solid #fff; cursor: default; }
.key span { padding: 0.15em 0.6em; }
.text span:hover, .text span.shown { outline: 2px solid #d55e00; }
#tip { position: absolute; display: none; background: #fff; border: 1px solid #888; border-radius: 4px;
  box-shadow: 0 2px 8px #0003; padding: 0.5rem 0.7rem; font-size: 0.85rem; width: max-content; max-width: 22rem; }
#tip code { background: #eee; white-space: pre; }
#tip .bar { display: inline-block; height: 0.7em; background: #0072b2; vertical-align: middle; }
#tip td { border: 0; padding: 0 0.4rem 0 0; }
"""

# Fills the box beside a token from its data; a link to #t0-5 opens that of token 5 of the first text.
SCRIPT = """
const tip = document.getElementById("tip");
const node = (name, text, parent) => { const made = document.createElement(name); made.textContent = text;
  parent.append(made); return made; };
function show(span) {
  document.querySelectorAll("span.shown").forEach(other => other.classList.remove("shown"));
  const [subject, index] = span.id.slice(1).split("-").map(Number);
  const token = texts[subject][index];
  tip.replaceChildren();
  const head = node("div", "", tip);
  node("code", token.token, head);
  head.append(` takes ${token.steps} latent steps, then comes `);
  node("code", token.next, head);
  node("div", `step-0 loss ${token.first_loss.toFixed(3)}, fused loss ${token.loss.toFixed(3)} nats`, tip);
  const table = node("table", "", tip);
  token.s.forEach((share, step) => {
    const row = node("tr", "", table);
    node("td", `s${step}`, row);
    node("td", share.toFixed(3), row);
    const bar = node("span", "", node("td", "", row));
    bar.className = "bar";
    bar.style.width = `${100 * share}px`;
  });
  span.classList.add("shown");
  const box = span.getClientRects()[0];
  tip.style.left = "0";
  tip.style.display = "block";
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
  tip.style.top = `${box.bottom + window.scrollY + 4}px`;
}
document.addEventListener("mouseover", event => {
  if (event.target.closest(".text span")) show(event.target);
  else tip.style.display = "none";
});
function fromLink() {
  const span = document.getElementById(location.hash.slice(1));
  if (span) { span.scrollIntoView({block: "center"}); show(span); }
}
addEventListener("hashchange", fromLink);
addEventListener("load", fromLink);
"""


def write_page(analysis: Analysis, captions: dict[str, str], folder: Path, title: str, data: str) -> Path:
    """Write `index.html` with everything inside.

    Args:
        analysis: what to show.
        captions: of the figures, by name; NAME.svg lies in the folder.
        folder: where the page goes.
        title: of the page.
        data: what was measured on.
    """
    shaded = [
        (label, [row for row in analysis.tables["tokens"] if row["model"] == label])
        for label in analysis.summary
        if any("s_0" in row for row in analysis.tables["tokens"] if row["model"] == label)
    ]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">Measured on {escape(data)}.</p>',
        _overview(analysis.summary),
        *(_figure(name, caption, folder) for name, caption in captions.items()),
        *(_text(number, label, rows) for number, (label, rows) in enumerate(shaded)),
        *(_strings(label, analysis.tables["token_strings"]) for label, _ in shaded),
        _missing(analysis.summary),
    ]
    texts = json.dumps([[_hover(row) for row in rows] for _, rows in shaded], ensure_ascii=False)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + '\n<div id="tip" role="tooltip"></div>\n'
        # A token such as "</script>" must not end the script.
        f"<script>const texts = {texts.replace('<', chr(92) + 'u003c')};{SCRIPT}</script>\n</body></html>\n"
    )
    path = folder / "index.html"
    write_atomically(path, page)
    return path


def _overview(summary: dict[str, dict]) -> str:
    models = [
        [
            label, of["mode"], of["evaluation"], _number(of["threshold"], "g"), _number(of["router_bias"], "g"),
            f"{of['tokens']:,}", _number(of["loss"]), _number(of["mean_steps"], ".3f"), str(of["max_steps"]),
        ]
        for label, of in summary.items()
    ]  # fmt: skip
    gaps = [
        [label, gap["of"], gap["from"], _number(gap["threshold"], "g"), f"{gap['loss']:+.5f}"]
        for label, of in summary.items()
        for gap in of.get("gaps", [])
    ]
    headings = ["model", "mode", "evaluation", "τ", "α", "tokens", "loss [nats]", "mean K̂", "of K"]
    return "\n".join(
        [
            "<h2>Models</h2>",
            _table(headings, models),
            _single_figures(summary, "difficulty", "What the router follows", DIFFICULTY_NOTE, DIFFICULTY),
            _single_figures(summary, "depth", "Steps by true depth", DEPTH_NOTE, DEPTH),
            _section("Gaps", GAPS_NOTE, ["model", "loss of", "less loss of", "τ", "nats"], gaps),
            _single_figures(summary, "contraction", "Contraction", CONTRACTION_NOTE, CONTRACTION),
        ]
    )


DIFFICULTY = {
    "rank_correlation": "K̂ and step-0 loss",
    "rank_correlation_by_identity": "by identity",
    "rank_correlation_beyond_identity": "beyond identity",
    "variance_explained_by_identity": "explained by identity",
    "rank_correlation_with_gain": "K̂ and ΔCE",
}
DIFFICULTY_NOTE = (
    "Rank correlations (Spearman) over tokens. “By identity” replaces the K̂ of each token by the mean over its "
    "occurrences, “beyond” is what remains of K̂ after taking that away; the share of its variance that identity "
    "explains is corrected for the number of different tokens."
)
DEPTH = {
    "rank_correlation": "K̂ and depth of answers (rank correlation)",
    "mean_steps_of_answers": "mean K̂ of answers",
    "mean_steps_of_others": "of all else",
}
DEPTH_NOTE = "A token counts as an answer if what it predicts has a depth."
GAPS_NOTE = "What the hard rule changes against the soft mask, and a few parallel passes against sequential decoding."
CONTRACTION = {
    "factor": "factor per iteration",
    "fitted_iterates": "fitted to iterates",
    "paper_factor": "factor in the paper",
}
CONTRACTION_NOTE = "Of the distance to the fixed point, under the soft mask."


def _single_figures(summary: dict[str, dict], part: str, title: str, note: str, names: dict[str, str]) -> str:
    """A section with the figures of one part of the summary, of each model that has it."""
    rows = [
        [label, *(_number(of[part][name], ".3f" if isinstance(of[part][name], float) else "") for name in names)]
        for label, of in summary.items()
        if part in of
    ]
    return _section(title, note, ["model", *names.values()], rows)


def _section(title: str, note: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return f'<h3>{title}</h3>\n<p class="note">{note}</p>\n{_table(headings, rows)}'


def _figure(name: str, caption: str, folder: Path) -> str:
    picture = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
    return (
        f'<figure id="{name}"><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{picture}">'
        f"<figcaption>{escape(caption)} Data: {name}.csv</figcaption></figure>"
    )


def _text(number: int, label: str, rows: Sequence[Row]) -> str:
    largest = max(sum(name.startswith("s_") for name in row) for row in rows) - 1
    key = "".join(f'<span style="{_shade(steps, largest)}">{steps}</span>' for steps in range(largest + 1))
    spans = "".join(
        f'<span id="t{number}-{index}" style="{_shade(row["steps"], largest)}">{_visible(row["token"])}</span>'
        for index, row in enumerate(rows)
    )
    return (
        f'<h2>Text shaded by executed steps: {escape(label)}</h2>\n<p class="note">Latent steps: '
        f'<span class="key">{key}</span> ({escape(rows[0]["evaluation"])}). Point at a token for its distribution and '
        f'losses.</p>\n<div class="text">{spans}</div>'
    )


def _shade(steps: int, largest: int) -> str:
    """White for none to dark blue for all of them."""
    share = steps / max(1, largest)
    background = [round(255 + share * (end - 255)) for end in (8, 69, 148)]
    return f"background:rgb({','.join(map(str, background))});color:{'#fff' if share > 0.5 else '#222'}"


def _visible(piece: str) -> str:
    """A token as it stands in running text."""
    text = ESCAPE.sub(lambda found: VISIBLE.get(found[1], found[0]), piece.replace("▁", " "))
    return escape(text) or "␣"


def _hover(row: Row) -> dict:
    shares = [round(row[name], 4) for name in row if name.startswith("s_")]
    return {name: row[name] for name in ("token", "next", "steps", "first_loss", "loss")} | {"s": shares}


def _strings(label: str, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["model"] == label and row["count"] >= RARE]
    headings = ["token", "count", "mean K̂", "step-0 loss", "ΔCE"]
    shown = [
        [f"{row['token']}", str(row["count"]), *(f"{row[name]:.3f}" for name in ("mean_steps", "first_loss", "gain"))]
        for row in own
    ]
    count = min(STRINGS_SHOWN, len(shown) // 2)
    if not count:
        return ""
    return (
        f"<h2>Tokens with the most and the fewest steps: {escape(label)}</h2>\n"
        f'<p class="note">Of those that occur at least {RARE} times; all are in token_strings.csv.</p>\n'
        f'<div class="side">{_table(headings, shown[:count])}{_table(headings, shown[-count:])}</div>'
    )


def _missing(summary: dict[str, dict]) -> str:
    reasons = [f"<li>{escape(label)}: {escape(why)}</li>" for label, of in summary.items() for why in of["missing"]]
    return f"<h2>Not shown</h2>\n<ul>{''.join(reasons)}</ul>" if reasons else ""


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
