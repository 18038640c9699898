"""The page of an evaluation: one HTML file that needs nothing but itself."""

from collections.abc import Callable, Sequence
from html import escape

from torch import Tensor

from .evaluation import Evaluation, Picture, StepError, with_interval
from .page_parts import curve, document, png

SHOWN = 24  # pictures at most, evenly from the worst to the best: a page of hundreds could not be opened


Frames = Callable[[int], tuple[Tensor, Tensor]]


def page(result: Evaluation, frames: Frames) -> str:
    """frames: of a picture, by its number, [F, H, W, 3] uint8 in 16 bits and in 4"""
    body = (_head(result), _numbers(result), _pictures(result, frames), _charts(result), _layers(result), _foot(result))
    return document(f"{result.model} in 4 bits", "\n".join(body), STYLE)


def _head(result: Evaluation) -> str:
    count = len(result.pictures)
    return f"""<header>
<p class="eyebrow">svdq-compile</p>
<h1>{escape(result.model)} in 4 bits</h1>
<p class="lead">{count} picture{"s" * (count != 1)}, each drawn in 16 bits and in 4 from the same noise.</p>
</header>"""


def _numbers(result: Evaluation) -> str:
    rows = (
        ("PSNR to 16-bit", "", f"{with_interval(result.psnr_db, 2)} dB"),
        ("SSIM", "", with_interval(result.ssim, 4)),
        ("Weights", _mib(result.bytes_16bit), _mib(result.bytes_4bit)),
        ("A picture, median", f"{result.seconds_16bit:.2f} s", f"{result.seconds_4bit:.2f} s"),
    )
    body = "\n".join(f'<tr><th scope="row">{name}</th><td>{a}</td><td>{b}</td></tr>' for name, a, b in rows)
    return f"""<section>
<table>
<thead><tr><th></th><th>16-bit</th><th>4-bit</th></tr></thead>
<tbody>
{body}
</tbody>
</table>
<p class="hint">Means over pictures, &plusmn; half the 95&thinsp;% confidence interval. 6 dB more mean half the
difference.</p>
</section>"""


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _pictures(result: Evaluation, frames: Frames) -> str:
    order = sorted(range(len(result.pictures)), key=lambda i: result.pictures[i].psnr_db)
    if len(order) > SHOWN:
        order = [order[i * (len(order) - 1) // (SHOWN - 1)] for i in range(SHOWN)]
    shown = "\n".join(_compared(result.pictures[i], a, b) for i in order for a, b in zip(*frames(i), strict=True))
    many = len(result.pictures)
    which = f"{SHOWN} of {many}, evenly from the worst" if many > SHOWN else "The worst"
    return f"""<section>
<h2>The pictures</h2>
<p>{which} first. Left of the line is 16-bit, right of it 4-bit: move it.</p>
<div class="pictures">
{shown}
</div>
</section>"""


def _compared(picture: Picture, truth: Tensor, drawn: Tensor) -> str:
    about = f"{picture.prompt}, seed {picture.seed}"
    return f"""<figure class="compared">
<div>{png(truth.numpy(), f"{about}, 16-bit")}{png(drawn.numpy(), f"{about}, 4-bit")}</div>
<input type="range" value="50" aria-label="{escape(about)}: how much of it is 16-bit"
oninput="this.parentNode.style.setProperty('--at', this.value + '%')">
<figcaption>{escape(about)}<br>{picture.psnr_db:.1f} dB, SSIM {picture.ssim:.3f}</figcaption>
</figure>"""


def _charts(result: Evaluation) -> str:
    charts = []
    if result.steps:
        charts.append(_chart("Error of the latents after each step", "steps, from the same noise", result.steps))
    if result.timesteps:
        charts.append(_chart("Error of the model's output, same input", "its timesteps, in order", result.timesteps))
    if result.layers:
        errors = [layer.error for layer in result.layers]
        charts.append(curve("Error of each linear's output", f"{len(errors)} linears, the worst first", errors))
    missing = "" if result.steps else "<p>This pipeline does not show its latents after each step.</p>"
    return f"""<section>
<h2>Where it comes from</h2>
<p>Relative errors, against 16 bits. Along the steps they add up; given the same input, they show at which timesteps the
model itself is less exact.</p>{missing}
<div class="charts">
{"".join(charts)}
</div>
</section>"""


def _chart(title: str, axis: str, steps: Sequence[StepError]) -> str:
    return curve(title, axis, [step.error.mean for step in steps], [step.error.ci95 or 0.0 for step in steps])


def _layers(result: Evaluation) -> str:
    rows = "\n".join(
        f"<tr><td><code>{escape(layer.layer)}</code></td><td>{layer.precision}</td><td>{layer.rank}</td>"
        f"<td>{100 * layer.error:.2f} %</td></tr>"
        for layer in result.layers
    )
    return f"""<section>
<details>
<summary>All {len(result.layers)} quantized linears</summary>
<p class="hint">Errors of outputs, on what each linear read in the first two pictures.</p>
<table>
<thead><tr><th>Linear</th><th>Precision</th><th>Rank</th><th>Error</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</details>
</section>"""


def _foot(result: Evaluation) -> str:
    return f"<footer>{''.join(f'<p>{escape(fact)}</p>' for fact in result.facts)}</footer>"


STYLE = """
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1.25rem; }
.compared { --at: 50%; }
.compared div { position: relative; border-radius: 10px; overflow: hidden; background: #fff; }
.compared img { display: block; width: 100%; height: auto; }
.compared img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)); }
.compared div::after { content: ""; position: absolute; inset: 0 auto 0 var(--at);
  border-left: 2px solid var(--after); }
.compared input { width: 100%; margin: .4rem 0 0; accent-color: var(--after); }
summary { cursor: pointer; font-weight: 600; }
"""
