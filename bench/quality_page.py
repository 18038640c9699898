"""docs/quality.md's tables and plots, made from bench/results/quality.json and peers.json.

    python bench/quality_page.py

What stands between the page's markers is replaced, what stands around them stays. tests/test_quality_page.py says when
the page or a plot is not what the results give.

    quality-gain.svg     PSNR of each recipe against "today", with its interval
    quality-bytes.svg    PSNR against bytes; ranks of one recipe are joined by a line
    quality-layers.svg   each linear's error against "today", sorted
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from step_table import Row, cell, filled, table

from record import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = ("#14857a", "#d9742b", "#5b6fc7", "#b0457f")  # readable on white and on black
WIDTH, LEFT, RIGHT = 640, 150, 30
EQUAL = 0.01  # errors of so small a relative difference count as equal
Layers = dict[tuple[str, str, int], dict[str, float]]  # (format, recipe, rank) -> linear -> error


def layers_of(results: dict[str, Any]) -> Layers:
    found: Layers = {}
    for one in results["layers"]:
        found.setdefault((one["format"], one["recipe"], one["rank"]), {})[one["layer"]] = one["ours"]
    return found


def ratios(layers: Layers, row: Row) -> list[float]:
    """Each linear's error against "today" of the same format and rank, sorted; of a recipe without a branch, against
    the smallest rank of "today".
    """
    ranks = sorted(rank for form, recipe, rank in layers if (form, recipe) == (row["format"], "today"))
    rank = row["rank"] if row["rank"] in ranks else next(iter(ranks), None)
    own, before = (layers.get((row["format"], *key), {}) for key in ((row["recipe"], row["rank"]), ("today", rank)))
    return sorted(error / before[name] for name, error in own.items() if before.get(name))


def spread(row: Row, name: str, ci95: str) -> str:
    return f"{row[name]:.2f} ± {row[ci95]:.2f}" if name in row else "-"


def numbers(results: dict[str, Any]) -> str:
    """The table of all rows."""
    head = ["format", "recipe", "rank", "PSNR, dB", 'against "today", dB', "SSIM", "error of latents", "MiB"]
    head += ['linears better than "today"', "their error against it, median"]
    layers, lines = layers_of(results), []
    for row in results["rows"]:
        own = [] if row["recipe"] == "today" else ratios(layers, row)
        gain = f"{row['gain_db']:+.2f} ± {row['gain_ci95_db']:.2f}" if "gain_db" in row else "-"
        cells = [f"`{row['format']}`", row["recipe"], str(row["rank"]), f"{row['psnr_db']:.2f} ± {row['ci95_db']:.2f}"]
        cells += [gain, f"{row['ssim']:.4f}", cell(row.get("latent_error"), ".4f"), f"{row['bytes'] / 2**20:.1f}"]
        cells += [f"{sum(r < 1 for r in own)} of {len(own)}" if own else "-"]
        cells += [f"{100 * (statistics.median(own) - 1):+.1f} %" if own else "-"]
        lines.append(cells)
    return table(head, lines)


def peers(results: dict[str, Any]) -> str:
    """The table of peers.json: each method, and of a peer on how many layers the one of ours that it is held against is
    better, about equal, worse.
    """
    head = ["method", "weights, activations", "bits", "bytes a weight", "error, median", "90 %", "planted outliers"]
    head += ["held against", "ours better, equal, worse"]
    lines = []
    for row in results["rows"]:
        name, against = row["method"], row.get("against")
        planted = [layer[name] for layer in results["layers"] if layer["layer"].startswith("planted.") and layer[name]]
        cells = [f"`{name}`", row["format"], row["bits"], f"{row['bytes_per_weight']:.2f}"]
        cells += [f"{100 * row[key]:.2f} %" for key in ("median_rel_err", "p90")]
        cells += [f"{100 * statistics.median(planted):.2f} %" if planted else "-"]
        if against is None:
            cells += ["-", "-"]
        else:
            shares = [layer[against] / layer[name] for layer in results["layers"] if layer[against] and layer[name]]
            better, worse = sum(s < 1 - EQUAL for s in shares), sum(s > 1 + EQUAL for s in shares)
            cells += [f"`{against}`", f"{better}, {len(shares) - better - worse}, {worse}"]
        lines.append(cells)
    return table(head, lines)


@dataclass(frozen=True)
class Scale:
    """Values to places in a picture."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def over(values: Sequence[float], start: float, end: float) -> "Scale":
        """With a twentieth of room on both sides."""
        room = (max(values) - min(values)) / 20 or abs(values[0]) / 20 or 1.0
        return Scale(min(values) - room, max(values) + room, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four values or a few more, as round as can be."""
        steps = (digit * 10.0**power for power in range(6, -6, -1) for digit in (5, 2, 1))
        step = next(step for step in steps if 4 * step <= self.high - self.low)
        first = int(self.low // step) + 1
        return [i * step for i in range(first, int(self.high // step) + 1)]


def picture(height: float, title: str, parts: Sequence[str]) -> str:
    style = "text{font:12px system-ui,sans-serif;fill:#808080}.axis{stroke:#808080;stroke-width:.5;fill:none}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{style}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str = 'class="axis"') -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" {style}/>'


def colours_of(rows: Sequence[Row]) -> dict[str, str]:
    """Of each format."""
    return dict(zip(dict.fromkeys(row["format"] for row in rows), COLOURS * 2, strict=False))


def gains(results: dict[str, Any]) -> str:
    rows, colours = [row for row in results["rows"] if "gain_db" in row], colours_of(results["rows"])
    ends = [row["gain_db"] + side * row["gain_ci95_db"] for row in rows for side in (-1, 1)]
    x, bottom = Scale.over([0.0, *ends], LEFT, WIDTH - RIGHT), 24 * len(rows) + 10
    parts = [line(x(0), 4, x(0), bottom)]
    for tick in x.ticks():
        parts += [text(x(tick), bottom + 18, f"{tick:+g}", "middle"), line(x(tick), bottom, x(tick), bottom + 4)]
    for i, row in enumerate(rows):
        y, colour = 24 * i + 18, colours[row["format"]]
        low, high = (x(row["gain_db"] + side * row["gain_ci95_db"]) for side in (-1, 1))
        parts.append(text(LEFT - 10, y + 4, f"{row['format']} {row['recipe']}, rank {row['rank']}", "end"))
        parts.append(line(low, y, high, y, f'stroke="{colour}" stroke-width="2"'))
        parts.append(f'<circle cx="{x(row["gain_db"]):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    parts.append(
        text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, 'PSNR against "today", dB, with 95 % intervals', "middle")
    )
    return picture(bottom + 44, "PSNR of recipes against today", parts)


def by_bytes(results: dict[str, Any]) -> str:
    rows, colours = results["rows"], colours_of(results["rows"])
    left, bottom = 60, 260
    x = Scale.over([row["bytes"] / 2**20 for row in rows], left, WIDTH - 140)
    y = Scale.over([row["psnr_db"] + side * row["ci95_db"] for row in rows for side in (-1, 1)], bottom, 8)
    parts = [line(left, bottom, WIDTH - 140, bottom), line(left, 8, left, bottom)]
    parts += [text(x(tick), bottom + 18, f"{tick:g}", "middle") for tick in x.ticks()]
    parts += [text(left - 8, y(tick) + 4, f"{tick:g}", "end") for tick in y.ticks()]
    joined: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["bytes"]):
        joined.setdefault((row["format"], row["recipe"]), []).append(row)
    last = -20.0  # where the lowest name stands: names of points that lie on one another stand under one another
    for (form, recipe), own in sorted(joined.items(), key=lambda one: -one[1][-1]["psnr_db"]):
        places = [(x(row["bytes"] / 2**20), y(row["psnr_db"])) for row in own]
        for row, (across, down) in zip(own, places, strict=True):
            high, low = (y(row["psnr_db"] + side * row["ci95_db"]) for side in (1, -1))
            parts.append(line(across, high, across, low, f'stroke="{colours[form]}" stroke-width="1.5"'))
            parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3.5" fill="{colours[form]}"/>')
        points = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        parts += [f'<polyline points="{points}" fill="none" stroke="{colours[form]}"/>'] if len(own) > 1 else []
        last = max(last + 14, places[-1][1] + 4)
        parts.append(text(WIDTH - 130, last, f"{form} {recipe}"))
    parts.append(
        text((left + WIDTH - 140) / 2, bottom + 36, "MiB of all weights; PSNR in dB, 95 % intervals", "middle")
    )
    return picture(max(bottom + 44, last + 8), "PSNR against bytes", parts)


def by_layer(results: dict[str, Any]) -> str:
    layers = layers_of(results)
    curves = [(row, own) for row in results["rows"] if row["recipe"] != "today" and (own := ratios(layers, row))]
    left, bottom, colours = 60, 220, colours_of(results["rows"])
    y = Scale.over([1.0, *(ratio for _, own in curves for ratio in own)], bottom, 8)
    parts = [line(left, bottom, WIDTH - 140, bottom), line(left, y(1), WIDTH - 140, y(1))]
    parts += [text(left - 8, y(tick) + 4, f"{tick:g}", "end") for tick in y.ticks()]
    last = -20.0
    for i, (row, own) in enumerate(sorted(curves, key=lambda one: -one[1][-1])):
        step = (WIDTH - 140 - left) / max(1, len(own) - 1)
        points = " ".join(f"{left + step * j:.1f},{y(ratio):.1f}" for j, ratio in enumerate(own))
        dash = f' stroke-dasharray="{6 - i % 3} {i % 3 * 2}"' if i % 3 else ""
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colours[row["format"]]}" stroke-width="2"{dash}/>'
        )
        last = max(last + 14, y(own[-1]) + 4)
        parts.append(text(WIDTH - 130, last, f"{row['format']} {row['recipe']}, {row['rank']}"))
    parts.append(
        text((left + WIDTH - 140) / 2, bottom + 20, 'linears, sorted by their error against "today"', "middle")
    )
    return picture(max(bottom + 28, last + 8), "Errors of linears against today", parts)


PLOTS = {"quality-gain.svg": gains, "quality-bytes.svg": by_bytes, "quality-layers.svg": by_layer}


def made(results: dict[str, Any], of_peers: dict[str, Any], document: str) -> dict[str, str]:
    """The document and the plots, by the names of their files."""
    shown = "\n\n".join(f"![{name.removesuffix('.svg')}]({name})" for name in PLOTS)
    page = filled(document, "quality", f"{numbers(results)}\n\n{shown}")
    page = filled(page, "peers", peers(of_peers))
    return {"quality.md": page} | {name: plot(results) for name, plot in PLOTS.items()}


def main() -> None:
    results, of_peers = (json.loads((RESULTS / name).read_text()) for name in ("quality.json", "peers.json"))
    for name, content in made(results, of_peers, (DOCS / "quality.md").read_text()).items():
        (DOCS / name).write_text(content)


if __name__ == "__main__":
    main()
