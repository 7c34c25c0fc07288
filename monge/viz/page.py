"""The frame of a self-contained HTML page: type, colours, tables; no script, no external resource.

Everything that comes from records or settings passes through `escape`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from monge.viz.style import theme_css

_CSS = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
header p.kicker{margin:0;font-size:.8rem;letter-spacing:.09em;text-transform:uppercase;color:var(--muted)}
h1{font-size:clamp(1.5rem,4.5vw,2.1rem);line-height:1.2;margin:.3rem 0 1.2rem;letter-spacing:-.015em}
h2{font-size:1.15rem;margin:2.8rem 0 .6rem;letter-spacing:-.01em}
p{margin:.5rem 0 .9rem;max-width:46rem}
.finding{border-left:4px solid var(--blue);padding:.15rem 0 .15rem 1rem;margin:0 0 1rem;
  font-size:clamp(1.08rem,2.6vw,1.25rem);line-height:1.45}
.notice{border:1px solid var(--orange);border-radius:8px;padding:.6rem .9rem}
ul.findings{margin:.4rem 0 1.6rem;padding-left:1.2rem;max-width:46rem}
ul.findings li{margin:.25rem 0}
.facts{display:flex;flex-wrap:wrap;gap:1px;margin:1.6rem 0;
  background:var(--grid);border:1px solid var(--grid);border-radius:10px;overflow:hidden}
.facts div{flex:1 1 9.5rem;background:var(--paper);padding:.75rem 1rem}
.facts dt{font-size:.8rem;color:var(--muted)}
.facts dd{margin:0;font-size:1.1rem;font-weight:600;font-variant-numeric:tabular-nums}
.facts small{display:block;font-size:.8rem;font-weight:400;color:var(--muted)}
.scroll{overflow-x:auto;margin:.6rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:separate;border-spacing:0;width:100%;
  font-size:.9rem;font-variant-numeric:tabular-nums;line-height:20px}
th,td{padding:8px 7px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
thead th{font-weight:500;color:var(--muted);font-size:.8rem;
  vertical-align:bottom;white-space:normal;min-width:3.2rem}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper);padding-left:0}
tbody th{font-weight:600;white-space:normal;min-width:6.5rem;max-width:13rem}
.dot{display:inline-block;width:.65rem;height:.65rem;border-radius:50%;margin-right:.5rem}
dl.meanings{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.2rem;
  font-size:.88rem;margin:1rem 0}
dl.meanings dt{font-weight:600}
dl.meanings dd{margin:0;color:var(--muted);max-width:42rem}
figure{margin:2rem 0}
figure svg{display:block;width:100%;height:auto}
figure .narrow{display:none}
figcaption{font-size:.88rem;color:var(--muted);margin-top:.5rem;max-width:46rem}
pre{overflow-x:auto;border:1px solid var(--grid);border-radius:8px;padding:.8rem 1rem;
  font-size:.85rem;line-height:1.5}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:3rem;padding-top:1rem;border-top:1px solid var(--grid);font-size:.85rem;color:var(--muted)}
@media (max-width:40rem){
  main{padding:1.5rem 1rem 3rem}
  figure .wide{display:none}
  figure .narrow{display:block}
  tbody th{max-width:8rem}
  dl.meanings{grid-template-columns:1fr;gap:0}
  dl.meanings dd{margin-bottom:.6rem}
}
@media print{main{max-width:none}figure,table{break-inside:avoid}}
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document; ``body`` is HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{theme_css(':root')}{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def header(kicker: str, title: str, finding: str) -> str:
    """The top of the page."""
    return (
        f'<header>\n<p class="kicker">{escape(kicker)}</p>\n<h1>{escape(title)}</h1>\n'
        f"{paragraph(finding, 'finding')}\n</header>"
    )


def footer(text: str) -> str:
    """The end of the page."""
    return f"<footer>{escape(text)}</footer>"


def section(title: str, *parts: str) -> str:
    """A heading and what is under it, or nothing where nothing is under it."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], dots: Sequence[str] = ()) -> str:
    """A table that scrolls sideways on a phone, its first column staying in sight.

    Args:
        titles: one per column.
        rows: text per cell, escaped here.
        dots: a colour name of the theme per row, drawn as a dot before the first cell.
    """
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = []
    for i, (first, *rest) in enumerate(rows):
        dot = f'<span class="dot" style="background:var(--{dots[i]})"></span>' if dots else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        body.append(f'<tr><th scope="row">{dot}{escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def facts(items: Iterable[tuple[str, str, str]]) -> str:
    """A strip of figures: (what, value, remark) each."""
    cells = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for what, value, remark in items
    )
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def meanings(items: Iterable[tuple[str, str]]) -> str:
    """Terms and what they mean."""
    entries = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in items)
    return f'<dl class="meanings">{entries}</dl>'


def figure(wide: str, narrow: str, caption: str) -> str:
    """A drawing in two layouts, of which the page's width chooses one, and its caption."""
    drawings = "".join(
        f'<div class="{layout}" role="img" aria-label="{escape(caption)}">{svg}</div>'
        for layout, svg in (("wide", wide), ("narrow", narrow))
    )
    return f"<figure>\n{drawings}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text, with a class where ``kind`` names one; nothing for no text."""
    if not text:
        return ""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def listing(items: Sequence[str]) -> str:
    """The findings as a list."""
    return (
        f'<ul class="findings">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>' if items else ""
    )


def code(text: str) -> str:
    """Preformatted text."""
    return f"<pre><code>{escape(text)}</code></pre>"
