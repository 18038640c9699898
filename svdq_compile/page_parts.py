"""What self-contained HTML pages are made of: a frame with a style, pictures that are in the page, curves."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any


def document(title: str, body: str, style: str = "") -> str:
    """A whole page. style: what is added to the one of all pages."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def png(pixels: Any, description: str) -> str:
    """An <img> that carries its PNG in itself. pixels: [H, W, 3] uint8, a NumPy array"""
    from PIL import Image  # pillow comes with diffusers, without which nothing is drawn

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    height, width = pixels.shape[:2]
    return f'<img src="{source}" width="{width}" height="{height}" alt="{escape(description)}">'


def curve(title: str, axis: str, values: Sequence[float], spread: Sequence[float] | None = None) -> str:
    """A figure with one curve over evenly spaced places, from 0 up, as inline SVG.

    axis    what the places are
    spread  half the interval around each value, a band
    """
    width, height = 400.0, 170.0
    halves = spread or [0.0] * len(values)
    top = max((v + s for v, s in zip(values, halves, strict=True)), default=0.0) or 1.0
    xs = [width * i / max(1, len(values) - 1) for i in range(len(values))]

    def points(ys: Sequence[float], xs: Sequence[float]) -> str:
        return " ".join(f"{x:.1f},{height * (1 - max(0.0, y) / top):.1f}" for x, y in zip(xs, ys, strict=True))

    upper = [v + s for v, s in zip(values, halves, strict=True)]
    lower = [v - s for v, s in zip(values, halves, strict=True)]
    return f"""<figure><figcaption>{escape(title)}</figcaption>
<svg viewBox="0 -8 {width + 50:.0f} {height + 28:.0f}" role="img" aria-label="{escape(title)}">
<polygon class="band" points="{points(upper, xs)} {points(lower[::-1], xs[::-1])}"/>
<polyline class="curve" points="{points(values, xs)}"/>
<path class="axis" d="M0 {height:.0f}H{width:.0f}"/>
<text x="{width + 6:.0f}" y="4">{top:.2g}</text>
<text x="{width + 6:.0f}" y="{height:.0f}">0</text>
<text x="0" y="{height + 16:.0f}">{escape(axis)}</text>
</svg></figure>"""


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f7; --card: #fff; --ink: #1d1c1a; --soft: #6b6862; --line: #e4e1db;
  --before: #e8863a; --after: #14857a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #171615; --card: #211f1e; --ink: #edebe7; --soft: #a29d95; --line: #383532;
    --before: #e8914d; --after: #35b3a5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1rem; }
section { margin-top: 2.75rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .75rem; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 .5rem; }
h3 { font-size: .95rem; line-height: 1.25; margin: 0; align-self: center; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 46rem; }
small { display: block; font-weight: 400; font-size: .8rem; line-height: 1.35; color: var(--soft); }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border-radius: 10px;
  box-shadow: 0 0 0 1px var(--line); padding: .7rem .9rem; margin: 1rem 0 0; width: fit-content; max-width: 100%; }
.eyebrow { color: var(--after); font-weight: 600; margin: 0 0 .25rem; }
.lead { font-size: 1.1rem; }
.hint, footer, figcaption, .head { color: var(--soft); font-size: .85rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-top: .25rem; line-height: 1.3; }

table { width: 100%; border-collapse: collapse; background: var(--card); border-radius: 14px; overflow: hidden;
  box-shadow: 0 0 0 1px var(--line); font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .7rem .9rem; }
tbody tr { border-top: 1px solid var(--line); }
thead th { color: var(--soft); font-size: .8rem; font-weight: 500; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.charts figure { background: var(--card); border-radius: 14px; padding: 1rem; box-shadow: 0 0 0 1px var(--line); }
.charts figcaption { margin: 0 0 .5rem; font-weight: 600; }
svg { display: block; width: 100%; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.axis { stroke: var(--soft); stroke-width: 1; }
.curve { fill: none; stroke: var(--after); stroke-width: 2; }
.band { fill: var(--after); opacity: .2; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
"""
