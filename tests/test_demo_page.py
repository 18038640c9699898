"""The demo's page (examples/page.py): its numbers, its charts, its adapters, and that it needs nothing but itself; how
much of it a machine draws (examples/size.py).
"""

import base64
import io
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import page  # noqa: E402
from size import FULL, LIMIT, SIZES, Size, largest_within  # noqa: E402

VOID = {"meta", "img"}
PROMPTS = ["dog face", "fish & <chips>"]


class Outline(HTMLParser):
    """The tags of a page; `open_tags` is empty at the end if every tag was closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.attributes: dict[str, list[dict[str, str | None]]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.setdefault(tag, []).append(dict(attrs))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.setdefault(tag, []).append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


def method(name: str, pictures: np.ndarray, nbytes: int = 1_000_000) -> page.Method:
    return page.Method(name, "a note", pictures, nbytes, 0.5)


def adapters() -> list[page.Adapted]:
    black = np.zeros((2, 8, 8, 3))
    return [
        page.Adapted("no adapter", {}, black, black + 0.1, 0, 0),
        page.Adapted("<ink>", {"ink": 1.0}, black, black + 0.05, 2, 0),
        page.Adapted("mixed", {"ink": 0.6, "paper": 0.25}, black, black, 3, 7),
    ]


def example(shown: int = 2, left_out: str = "") -> str:
    """A page of two prompts, `shown` of them with adapters."""
    rng = np.random.default_rng(0)
    reference = rng.random((2, 8, 8, 3)).astype(np.float32)
    methods = [method("16-bit", reference, 4_000_000), method("4-bit", reference * 0.9), method("same", reference)]
    adapted = [replace(a, reference=a.reference[:shown], pictures=a.pictures[:shown]) for a in adapters() if shown]
    weight = rng.standard_normal((6, 4))
    branch = page.Branch("blocks.0.proj", 2, weight, weight / 2, 0.08, 0.16)
    return page.build_page(PROMPTS, methods, adapted, branch, ["Made on a <machine>."], left_out)


def lora_part(shown: int = 2) -> str:
    """The section on adapters."""
    text = example(shown)
    start = text.index('<section class="lora"')
    return text[start : text.index("</section>", start)]


def test_psnr_is_in_decibels_of_the_mean_squared_error():
    black = np.zeros((2, 4, 4, 3))
    assert page.psnr(black + 0.1, black) == pytest.approx(20)
    assert page.psnr(black + 0.05, black) == pytest.approx(26.02, abs=0.01)  # half the difference: 6 dB more


def test_psnr_of_equal_pictures_is_infinite():
    assert page.psnr(np.ones((1, 2, 2, 3)), np.ones((1, 2, 2, 3))) == math.inf


def test_psnr_pools_errors_and_worst_takes_the_largest():
    reference = np.zeros((2, 4, 4, 3))
    pictures = reference.copy()
    pictures[1] += 0.1
    assert page.psnr(pictures, reference) == pytest.approx(20 + 10 * math.log10(2))
    assert page.worst_psnr(pictures, reference) == pytest.approx(20)


def test_difference_is_amplified_and_clipped():
    reference = np.array([0.5, 0.5, 0.0])
    pictures = np.array([0.5, 0.4, 1.0])
    np.testing.assert_allclose(page.difference(pictures, reference), [0, 0.1 * page.AMPLIFIED, 1])


def test_page_is_well_formed_and_self_contained():
    text = example()
    outline = Outline(text)
    assert outline.open_tags == []
    assert "script" not in outline.attributes
    assert "link" not in outline.attributes
    assert not re.search(r"https?:|url\(|@import", text)


def test_page_shows_every_picture_and_every_difference():
    sources = [image["src"] for image in Outline(example()).attributes["img"]]
    # prompts x methods, the differences of all but the reference, pairs with adapters
    assert len(sources) == 2 * 3 + 2 * 2 + 2 * 2 * 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_pictures_survive_as_png():
    picture = np.linspace(0, 1, 8 * 8 * 3).reshape(8, 8, 3)
    tag = Outline(page.image(picture, 'a "dog"')).attributes["img"][0]
    stored = Image.open(io.BytesIO(base64.b64decode(tag["src"].split(",")[1])))
    np.testing.assert_array_equal(np.asarray(stored), np.round(picture * 255))
    assert tag["alt"] == 'a "dog"'


def test_text_is_escaped():
    text = example()
    assert "fish &amp; &lt;chips&gt;" in text
    assert "Made on a &lt;machine&gt;." in text
    assert "<chips>" not in text


def test_summary_gives_the_numbers():
    text = example()
    assert "4.0 MB" in text
    assert "1.0 MB <small>4.0&times; smaller</small>" in text
    assert text.count("<tr>") == (1 + 3) + (1 + 3)  # a head and a row for each method, the same for adapters


def test_adapters_are_compared_with_16_bit_that_has_the_same_ones():
    text = lora_part()
    for value in ("<b>20.0 dB</b>", "<b>26.0 dB</b>", "<b>reference</b>"):
        assert text.count(value) == 1


def test_adapters_come_with_their_strengths_and_their_cost():
    text = lora_part()
    assert "&lt;ink&gt;<small>ink 1</small>" in text
    assert "mixed<small>ink 0.6, paper 0.25</small>" in text
    assert re.findall(r'"Graphs">(\d+)', text) == ["0", "2", "3"]
    assert re.findall(r'"Quantized again">(\d+)', text) == ["0", "0", "7"]


def test_adapters_are_shown_for_the_first_prompts():
    outline = Outline(lora_part(1).split(">", 1)[1])
    assert [image["alt"] for image in outline.attributes["img"][:2]] == [
        "dog face, no adapter, 16-bit",
        "dog face, no adapter, w4a8",
    ]
    assert len(outline.attributes["img"]) == 2 * 3
    assert "fish" not in lora_part(1)


def test_branch_section_says_what_the_branch_took():
    text = example()
    assert "hold 75% of its" in text  # the residual is half the weight, so a quarter of its energy
    assert "2.0 times smaller" in text
    assert "from 16.0% to 8.0%" in text


def test_step_path_draws_one_bar_a_value():
    assert page.step_path(np.array([1.0, 0.5]), 100, 40) == "M0 40V0.0H50.0V20.0H100.0V40Z"


def test_page_says_what_was_left_out():
    text = example(0, "no <adapters>: make demo-full")
    assert text.count("no &lt;adapters&gt;: make demo-full") == 1
    assert 'class="lora"' not in text
    assert Outline(text).open_tags == []


def test_demo_is_full_where_a_machine_is_fast_and_smallest_where_it_is_hopeless():
    assert largest_within(LIMIT, 0.0) is FULL
    assert largest_within(LIMIT, 1e6) is SIZES[-1]


@pytest.mark.parametrize("pace", [0.05, 0.2, 0.5, 1.0, 1.6])
def test_demo_is_as_large_as_the_time_allows(pace: float):
    size = largest_within(LIMIT, pace)
    assert size.seconds(pace) <= LIMIT
    larger = SIZES[: SIZES.index(size)]
    assert all(other.seconds(pace) > LIMIT for other in larger)


def test_sizes_become_smaller():
    work = [size.picture_steps for size in SIZES]
    assert work == sorted(work, reverse=True)
    # 4 methods of 8 pictures and 13 steps, 3 calibrations of 4 prompts and 8 steps, 2 x 3 mixtures of 3 and 12
    assert work[0] == 4 * 8 * 13 + 3 * 4 * 8 + 2 * 3 * 3 * 12


def test_what_is_left_out_is_named():
    assert FULL.without(FULL) == ""
    assert Size(8, 12, lora=False).without(FULL) == "the LoRA adapters"
    assert Size(2, 6, 2, 4, False).without(FULL) == (
        "6 of 8 pictures, 6 of 12 denoising steps, three quarters of the calibration and the LoRA adapters"
    )


def test_demo_takes_what_fits_or_what_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    import demo

    monkeypatch.setattr(demo, "measure_pace", lambda device, console: 1.5)
    said = io.StringIO()

    def size(*arguments: str, device: str = "cpu") -> Size:
        return demo.choose_size(demo.parse_args([*arguments]), device, demo.Console(file=said, width=300))

    assert size("--full") == size(device="cuda") == FULL
    assert size("--prompts", "2") == Size(2, 12)
    assert said.getvalue() == ""
    fitting = size()
    assert fitting == largest_within(LIMIT, 1.5) != FULL
    assert demo.left_out(fitting) in said.getvalue()
    assert "the LoRA adapters were left out: make demo-full draws all of it" in said.getvalue()
    assert demo.left_out(FULL) == ""
