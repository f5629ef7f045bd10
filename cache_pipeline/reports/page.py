"""A self-contained HTML page of headings, tables and pictures, without other files or scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from cache_pipeline.files import FileKind, begins_with, output_file

STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#22313f;
     max-width:1020px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}
h2{font-size:1.15rem;margin:2.2rem 0 .4rem;border-bottom:1px solid #d8dee4}
p.lead{color:#5f6b76;margin-top:0}
img{max-width:100%;display:block;margin:.6rem 0}
table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;border-bottom:1px solid #eef1f4}
td.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.facts{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.fact{background:#f5f7f9;border-radius:8px;padding:.7rem 1.1rem;min-width:8rem}
.fact b{display:block;font-size:1.35rem}
code,pre{font:13px/1.45 ui-monospace,Menlo,monospace;background:#f5f7f9;border-radius:4px;padding:.1rem .3rem}
pre{padding:.7rem;overflow:auto}
.table{overflow-x:auto}
td{min-width:4.5rem}
h1,h2,p,td,.fact{overflow-wrap:anywhere}
:root{color-scheme:light dark}
@media (prefers-color-scheme:dark){
body{color:#d5dce2;background:#14191e}
h2{border-color:#3a444d}
td,th{border-color:#2a323a}
p.lead{color:#93a0ab}
.fact,code,pre{background:#1f262d}
a{color:#7ab8ea}
img{background:#fff;border-radius:6px;padding:.4rem;box-sizing:border-box}
}
"""


HTML = FileKind("an HTML page", begins_with(b"<!doctype html", b"<html"))
GENERATOR = '<meta name="generator" content="cache_pipeline report">'
VIEWPORT = '<meta name="viewport" content="width=device-width,initial-scale=1">'


def is_ours(path: Path) -> bool:
    """Whether a file is a page that :class:`Page` wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(400)


class Page:
    """Collects blocks in order; ``write`` writes the page."""

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._blocks = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']

    def heading(self, text: str) -> None:
        self._blocks.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._blocks.append(f"<p>{escape(text)}</p>")

    def code(self, text: str) -> None:
        self._blocks.append(f"<pre>{escape(text)}</pre>")

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Adds large figures, each (value, label)."""
        cells = "".join(f'<div class="fact"><b>{escape(value)}</b>{escape(label)}</div>' for value, label in facts)
        self._blocks.append(f'<div class="facts">{cells}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Adds a table; numbers are right-aligned."""
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        self._blocks.append(f'<div class="table"><table><tr>{head}</tr>{body}</table></div>')

    def picture(self, png: bytes, caption: str) -> None:
        data = base64.b64encode(png).decode()
        self._blocks.append(f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">')

    def link(self, text: str, path: str) -> None:
        """Adds a link to a file; ``path`` starts at the folder of the page."""
        self._blocks.append(f'<p><a href="{escape(quote(path, errors="surrogateescape"))}">{escape(text)}</a></p>')

    def html(self) -> str:
        head = f'<meta charset="utf-8">{VIEWPORT}{GENERATOR}<title>{escape(self._title)}</title><style>{STYLE}</style>'
        return (
            f'<!doctype html><html lang="en"><head>{head}</head><body>' + "\n".join(self._blocks) + "</body></html>\n"
        )

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the page atomically and returns its path; raises ConfigError if the path may not be replaced."""
        path = Path(path)
        with output_file(path, HTML, overwrite=overwrite) as partial:
            partial.write_text(self.html(), encoding="utf-8", errors="backslashreplace")
        return path


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{escape(str(value))}</td>"
