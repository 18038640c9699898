"""The demo's page: one self-contained HTML file with pictures, tables and two small charts.

`build_page` turns measurements into text and knows nothing about models: pictures are arrays [n, height, width, 3] in
0..1, and the first method is the reference that the others are compared with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from svdq_compile.page_parts import document, png

AMPLIFIED = 4  # differences are shown this many times larger


@dataclass(frozen=True)
class Method:
    """One way to draw the pictures: `nbytes` of weights in the transformer, `seconds` for a denoising step."""

    name: str
    note: str
    pictures: np.ndarray
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Adapted:
    """The first of the prompts, drawn with LoRA adapters in 16 bits and by the quantized model.

    strengths    of each adapter, by name; none for the model as it is
    graphs       how many graphs the quantized model compiled for it
    requantized  how many of its packed weights were changed by it
    """

    name: str
    strengths: dict[str, float]
    reference: np.ndarray
    pictures: np.ndarray
    graphs: int
    requantized: int


@dataclass(frozen=True)
class Branch:
    """What the low-rank branch does to one layer.

    weight, residual        [N, K], the smoothed weight before and after the branch has taken its part
    error, error_without    relative error of the 4-bit weight with the branch and without one
    """

    layer: str
    rank: int
    weight: np.ndarray
    residual: np.ndarray
    error: float
    error_without: float


def psnr(pictures: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pictures together; infinite when they are equal."""
    error = float(np.mean((pictures.astype(np.float64) - reference) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def worst_psnr(pictures: np.ndarray, reference: np.ndarray) -> float:
    """The PSNR of the picture that differs most."""
    return min(psnr(p, r) for p, r in zip(pictures, reference, strict=True))


def difference(pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|pictures - reference|, amplified; black where they agree."""
    return np.clip(np.abs(pictures - reference) * AMPLIFIED, 0, 1)


def build_page(
    prompts: Sequence[str],
    methods: Sequence[Method],
    adapted: Sequence[Adapted],
    branch: Branch,
    facts: Sequence[str],
    left_out: str = "",
) -> str:
    """The whole page. `facts` are the sentences of the footer: where, how and with what it was made; `left_out` says
    under the title what is not shown. Without adapters there is no section on them.
    """
    body = "\n".join(
        (
            lead(len(prompts), methods, left_out),
            summary(methods),
            picture_section(prompts, methods),
            difference_section(prompts, methods),
            lora_section(prompts, adapted) if adapted else "",
            branch_section(branch),
            f"<footer>{''.join(f'<p>{escape(fact)}</p>' for fact in facts)}</footer>",
        )
    )
    return document("SVDQuant in 4 bits, side by side", body, STYLE)


def lead(count: int, methods: Sequence[Method], left_out: str) -> str:
    hint = f'\n<p class="hint">{escape(left_out)}</p>' if left_out else ""
    return f"""<header>
<p class="eyebrow">svdq-compile</p>
<h1>The same {count} emoji, drawn {len(methods)} ways</h1>
<p class="lead">One small diffusion transformer, the same prompts, the same noise: first in 16 bits, then with its
weights cut to 4 bits. SVDQuant rounds most of a weight to 4 bits and keeps its few strongest directions in a thin
16-bit branch beside it. The last method does without that branch, so you can see what it is for.</p>
<pre><code>pipe.transformer.compile_repeated_blocks(backend="svdquant", fullgraph=True)</code></pre>{hint}
</header>"""


def summary(methods: Sequence[Method]) -> str:
    """The table of numbers, one row a method."""
    reference = methods[0]
    scale = max((psnr(m.pictures, reference.pictures) for m in methods[1:]), default=1.0)
    rows = "\n".join(summary_row(m, reference, scale) for m in methods)
    return f"""<section>
<table>
<thead><tr><th>Method</th><th>PSNR</th><th>Worst picture</th><th>Weights</th><th>Seconds a step</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p class="hint">PSNR says how close a picture is to the 16-bit one: higher is closer, and 6 dB more means half the
difference.</p>
</section>"""


def summary_row(method: Method, reference: Method, scale: float) -> str:
    """One row; `scale` is the PSNR whose bar is full."""
    value = psnr(method.pictures, reference.pictures)
    ratio = "" if method is reference else f" <small>{reference.nbytes / method.nbytes:.1f}&times; smaller</small>"
    worst = decibels(worst_psnr(method.pictures, reference.pictures))
    return (
        f'<tr><th scope="row">{escape(method.name)}<small>{escape(method.note)}</small></th>'
        f'<td data-label="PSNR"><b>{decibels(value)}</b>{bar(value, scale)}</td>'
        f'<td data-label="Worst picture">{worst}</td>'
        f'<td data-label="Weights">{method.nbytes / 1e6:.1f} MB{ratio}</td>'
        f'<td data-label="A step">{method.seconds:.2f} s</td></tr>'
    )


def bar(value: float, scale: float) -> str:
    """A bar under a number; it is full at `scale`."""
    width = 100 if value >= scale else 100 * value / scale
    return f'<i class="bar" style="width:{width:.0f}%"></i>'


def picture_section(prompts: Sequence[str], methods: Sequence[Method]) -> str:
    """One row a prompt, one column a method."""
    head = "".join(f"<span>{escape(m.name)}</span>" for m in methods)
    rows = "\n".join(
        f'<div class="row"><h3>{escape(prompt)}</h3>{"".join(cell(m, methods[0], i) for m in methods)}</div>'
        for i, prompt in enumerate(prompts)
    )
    return f"""<section style="--columns:{len(methods)}">
<h2>The pictures</h2>
<div class="row head"><span></span>{head}</div>
{rows}
</section>"""


def cell(method: Method, reference: Method, index: int) -> str:
    picture = method.pictures[index]
    label = "reference" if method is reference else decibels(psnr(picture, reference.pictures[index]))
    return (
        f"<figure>{image(picture, f'drawn with {method.name}')}"
        f"<figcaption><b>{escape(method.name)}</b> {label}</figcaption></figure>"
    )


def difference_section(prompts: Sequence[str], methods: Sequence[Method]) -> str:
    """One row a method, one column a prompt."""
    reference = methods[0].pictures
    rows = "\n".join(
        f'<div class="row"><h3>{escape(m.name)}</h3>'
        + "".join(
            image(d, f"difference, {prompt}, {m.name}")
            for d, prompt in zip(difference(m.pictures, reference), prompts, strict=True)
        )
        + "</div>"
        for m in methods[1:]
    )
    return f"""<section class="differences" style="--columns:{len(prompts)}">
<h2>What changed</h2>
<p>The difference from the 16-bit picture, {AMPLIFIED} times brighter than it is. Black means no difference.</p>
{rows}
</section>"""


def lora_section(prompts: Sequence[str], adapted: Sequence[Adapted]) -> str:
    """A table of numbers, then one row a choice of adapters and one column a prompt."""
    scale = max(psnr(a.pictures, a.reference) for a in adapted)
    numbers = "\n".join(lora_numbers(a, scale) for a in adapted)
    count = len(adapted[0].pictures)
    head = "".join(f"<span>{escape(prompt)}</span>" for prompt in prompts[:count])
    rows = "\n".join(
        f'<div class="row"><h3>{escape(a.name)}</h3>{"".join(pair(a, prompts[i], i) for i in range(count))}</div>'
        for a in adapted
    )
    return f"""<section class="lora" style="--columns:{count}">
<h2>The same, in other styles</h2>
<p>Two LoRA adapters are loaded into the w4a8 model, already quantized and compiled, then chosen and mixed. Each joins
the low-rank branch that is there anyway; the 4-bit weights stay as they are.</p>
<pre><code>pipe.load_lora_weights("examples/loras", weight_name="flat.safetensors", adapter_name="flat")
pipe.set_adapters(["flat", "night"], [0.6, 0.6])</code></pre>
<table>
<thead><tr><th>Adapters</th><th>PSNR</th><th>Worst picture</th><th>Graphs compiled</th><th>Weights quantized again</th>
</tr></thead>
<tbody>
{numbers}
</tbody>
</table>
<p class="hint">PSNR against 16-bit with the same adapters. The first adapter and the first change of a strength cost
graphs; later changes cost none. In each pair below, 16-bit is on the left, w4a8 on the right.</p>
<div class="row head"><span></span>{head}</div>
{rows}
</section>"""


def lora_numbers(adapted: Adapted, scale: float) -> str:
    """One row; `scale` is the PSNR whose bar is full."""
    value = psnr(adapted.pictures, adapted.reference)
    note = ", ".join(f"{name} {strength:g}" for name, strength in adapted.strengths.items()) or "as above"
    return (
        f'<tr><th scope="row">{escape(adapted.name)}<small>{escape(note)}</small></th>'
        f'<td data-label="PSNR"><b>{decibels(value)}</b>{bar(value, scale)}</td>'
        f'<td data-label="Worst picture">{decibels(worst_psnr(adapted.pictures, adapted.reference))}</td>'
        f'<td data-label="Graphs">{adapted.graphs}</td>'
        f'<td data-label="Quantized again">{adapted.requantized}</td></tr>'
    )


def pair(adapted: Adapted, prompt: str, index: int) -> str:
    """One prompt in 16 bits and in 4, side by side."""
    exact, picture = adapted.reference[index], adapted.pictures[index]
    about = f"{prompt}, {adapted.name}"
    return (
        f'<figure><div class="pair">{image(exact, f"{about}, 16-bit")}{image(picture, f"{about}, w4a8")}</div>'
        f"<figcaption><b>{escape(prompt)}</b> {decibels(psnr(picture, exact))}</figcaption></figure>"
    )


def branch_section(branch: Branch) -> str:
    """Two charts of one layer, and what they mean."""
    before, after = np.abs(branch.weight), np.abs(branch.residual)
    n, k = branch.weight.shape
    share = 1 - float(np.sum(after**2) / np.sum(before**2))
    channels = chart(
        "Largest weight in each input channel", f"{k} input channels", before.max(axis=0), after.max(axis=0)
    )
    spectrum = chart(
        "Strength of each direction (singular values)",
        f"{min(n, k)} directions, strongest first",
        np.linalg.svd(branch.weight, compute_uv=False),
        np.linalg.svd(branch.residual, compute_uv=False),
    )
    return f"""<section>
<h2>Why the low-rank branch matters</h2>
<p>One layer as an example: <code>{escape(branch.layer)}</code>, a weight of {n} &times; {k}. Smoothing has moved the
outliers of its input into it. The branch takes its {branch.rank} strongest directions, which hold {share:.0%} of its
energy and the outliers, and keeps them in 16 bits as two thin matrices.</p>
<p>What is left is flat: its largest value is {before.max() / after.max():.1f} times smaller, the 4-bit levels lie
closer together, and the rounding error of this weight goes from {branch.error_without:.1%} to {branch.error:.1%}.</p>
<p class="legend"><span class="before">the weight</span> <span class="after">what is left to round to 4 bits</span></p>
<div class="charts">
{channels}
{spectrum}
</div>
</section>"""


def chart(title: str, axis: str, before: np.ndarray, after: np.ndarray) -> str:
    """Two step curves over one another as inline SVG; a dashed line marks the top of the lower one."""
    width, height = 400, 170
    top, limit = float(before.max()), float(after.max())
    line = height * (1 - limit / top)
    return f"""<figure><figcaption>{escape(title)}</figcaption>
<svg viewBox="0 -8 {width + 38} {height + 28}" role="img" aria-label="{escape(title)}, before and after">
<path class="before" d="{step_path(before / top, width, height)}"/>
<path class="after" d="{step_path(after / top, width, height)}"/>
<path class="limit" d="M0 {line:.1f}H{width}"/>
<path class="axis" d="M0 {height}H{width}"/>
<text x="{width + 6}" y="4">{top:.2g}</text>
<text x="{width + 6}" y="{line + 4:.1f}">{limit:.2g}</text>
<text x="0" y="{height + 16}">{escape(axis)}</text>
</svg></figure>"""


def step_path(values: np.ndarray, width: float, height: float) -> str:
    """The outline of a bar chart as one SVG path; values are in 0..1."""
    step = width / len(values)
    steps = "".join(f"V{height * (1 - v):.1f}H{step * (i + 1):.1f}" for i, v in enumerate(values))
    return f"M0 {height}{steps}V{height}Z"


def image(picture: np.ndarray, description: str) -> str:
    """An <img> that carries a picture in itself."""
    return png(np.round(picture * 255).astype(np.uint8), description)


def decibels(value: float) -> str:
    return "reference" if math.isinf(value) else f"{value:.1f} dB"


STYLE = """
img { display: block; width: 100%; height: auto; aspect-ratio: 1; border-radius: 10px; background: #fff; }
td:nth-child(2) { width: 24%; }
.bar { display: block; height: 6px; margin-top: .35rem; border-radius: 3px; background: var(--after); }
tbody tr:first-child .bar { visibility: hidden; }
.lora table { margin: 1rem 0 0; }
.lora tbody tr:first-child .bar { visibility: visible; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.pair img:first-child { border-radius: 10px 0 0 10px; }
.pair img:last-child { border-radius: 0 10px 10px 0; }

.row { display: grid; grid-template-columns: 6.5rem repeat(var(--columns), minmax(0, 1fr)); gap: .75rem;
  margin-top: .75rem; }
.head { align-items: end; font-weight: 600; line-height: 1.3; position: sticky; top: 0; z-index: 1;
  padding: .5rem 0; margin: 0; background: var(--paper); }
.row figcaption b { display: none; }
.differences img { border-radius: 6px; image-rendering: pixelated; background: #000; }
.differences .row { gap: .5rem; }

.legend span { margin-right: 1.25rem; white-space: nowrap; }
.legend span::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .45em;
  border-radius: 3px; background: var(--color); }
.before { --color: var(--before); }
.after { --color: var(--after); }
path.before, path.after { fill: var(--color); }
.limit { stroke: var(--ink); stroke-dasharray: 4 3; stroke-width: 1; }

@media (max-width: 44rem) {
  table, tbody, tr, th, td { display: block; }
  thead { display: none; }
  tbody tr { display: grid; grid-template-columns: 1fr 1.15fr 1.15fr 1.15fr; gap: .5rem; padding: .75rem .9rem; }
  tbody tr:first-child { border-top: 0; }
  tbody th { grid-column: 1 / -1; padding: 0; }
  td, td:nth-child(2) { width: auto; padding: 0; font-size: .88rem; }
  td::before { content: attr(data-label); display: block; color: var(--soft); font-size: .7rem; }
  .head { display: none; }
  .row { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .6rem; margin-top: 1.5rem; }
  .row figcaption b { display: block; color: var(--ink); font-size: .75rem; }
  .row figcaption { font-size: .75rem; }
  .differences .row { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .lora .row { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .differences h3, .lora h3 { grid-column: 1 / -1; }
}
"""
