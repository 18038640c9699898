"""Record what a first run writes, on a terminal and into a file: docs/first-run.md.

    python tools/record_first_run.py

A small Flux pipeline with random weights, compiled by its blocks, draws on the CPU; nothing is downloaded, and the
compile caches are empty. Each line is written down with the second at which it came; of one that is written over in
place, those states are kept that say something new.
"""

import os
import platform
import pty
import re
import subprocess
import sys
import tempfile
import termios
import time
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first-run.md"
SHOWN = """\
pipe.transformer.compile_repeated_blocks(backend="svdquant", fullgraph=True)
pipe(**prompt, num_inference_steps=8)
print("a picture", flush=True)
pipe(**prompt, num_inference_steps=2)
print("a picture in 4 bits", flush=True)
"""
PROGRAM = f"""\
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from zoo import make

model, inputs = make("flux", torch.bfloat16)
parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **parts)
prompt = dict(prompt_embeds=inputs["encoder_hidden_states"], pooled_prompt_embeds=inputs["pooled_projections"],
              height=64, width=64, output_type="latent")
print("loaded", flush=True)
{SHOWN}"""
LONGEST = 20.0  # seconds without a line


def run(is_terminal: bool) -> list[tuple[float, str]]:
    """(second, text) of each piece that the program writes, from the time when it was started."""
    ours, its = pty.openpty() if is_terminal else os.pipe()
    if is_terminal:
        termios.tcsetwinsize(its, (40, 120))
    with tempfile.TemporaryDirectory() as caches:
        folders = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SVDQ_CACHE"), caches)
        environment = os.environ | folders | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        start, pieces = time.monotonic(), []
        command = [sys.executable, "-c", PROGRAM]
        with subprocess.Popen(command, stdout=its, stderr=its, env=environment, cwd=caches) as process:
            os.close(its)
            while piece := read(ours):
                pieces.append((time.monotonic() - start, piece))
        os.close(ours)
    text = "".join(piece for _, piece in pieces)
    if process.returncode:
        raise SystemExit(text)
    return pieces


def read(end: int) -> str:
    try:
        return os.read(end, 1 << 16).decode()
    except OSError:  # how a terminal tells that its program has ended
        return ""


def shown(pieces: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The lines, each with the second when it was last written."""
    lines: list[tuple[float, str]] = []
    now, begun = "", 0.0
    for second, piece in pieces:
        for character in piece.replace("\r\n", "\n").replace("\x1b[K", "").replace("\x1b[A", ""):
            is_whole = character == "\n"
            if is_whole or (character == "\r" and now.strip() and _is_news(now, begun, second, lines)):
                lines.append((second if is_whole else begun, now))
            if character in "\r\n":
                now, begun = "", second
            else:
                now, begun = now + character, second if not now else begun
    return lines


def _is_news(text: str, begun: float, ended: float, lines: list[tuple[float, str]]) -> bool:
    """Whether a state of a line that is written over stood long enough and says more than how long it takes."""
    second, before = lines[-1] if lines else (0.0, "")
    words, words_before = (re.sub(r"about \d+ s left|\d+ s$|\|.*\[.*", "", t) for t in (text, before))
    return ended - begun >= 0.2 and (words != words_before or begun - second >= 10)


def check(lines: list[tuple[float, str]]) -> None:
    """SystemExit where nothing was said for too long, or nothing in a line."""
    seconds = [second for second, _ in lines]
    silence = max(later - earlier for earlier, later in pairwise(seconds))
    if silence > LONGEST:
        raise SystemExit(f"nothing was written for {silence:.0f} s")
    if not all(text.strip() for _, text in lines):
        raise SystemExit("there is an empty line")


def recording(is_terminal: bool) -> str:
    lines = shown(run(is_terminal))
    text = "\n".join(f"{second:6.1f}  {text.rstrip()}" for second, text in lines)
    print(text, flush=True)
    check(lines)
    return f"```text\n{text}\n```"


def main() -> None:
    terminal, file = recording(True), recording(False)
    PAGE.write_text(f"""\
# A first run, as it went

Recorded by `python tools/record_first_run.py` on a CPU ({platform.machine()}, {os.cpu_count()} cores, busy with other
work), with PyTorch {torch.__version__}, empty compile caches, and a small Flux pipeline that has random weights:

```text
{SHOWN}```

The number before a line is the second at which it came, from the start of the program on; the first seconds are
Python's imports. The bars are the pipeline's own.

## On a terminal

Lines that begin with svdquant: and end in seconds are one line that is written over and goes away in the end; here are
some of its states. The summary stays.

{terminal}

## Into a file

`python draw.py > log 2>&1`: each stage is told once, and one that takes long every 15 seconds.

{file}
""")


if __name__ == "__main__":
    main()
