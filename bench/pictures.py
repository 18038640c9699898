"""PSNR of many demo pictures against 16-bit: the demo's eight say little, a few dB come and go with the noise.

    python bench/pictures.py [--prompts 64] [--output bench/results/pictures-h200.json]

The demo's recipes and one more, its calibration, 16 steps; other prompts and seeds than the demo shows.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.progress import Progress

from record import results, write

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo

import svdq_compile as svdq

BRANCHLESS = demo.Recipe(
    "int4, no low-rank branch",
    "smoothing kept",
    svdq.Config("int4", rank=0, error_budget=1.0, progress=False),
)
STEPS, FIRST_PROMPT, FIRST_SEED = 16, 40, 1000


def decibels(mse: float) -> float:
    return round(float(-10 * np.log10(mse)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=results("pictures"))
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    captions = (demo.EMOJI / "prompts.txt").read_text(encoding="utf-8").splitlines()
    device = "cuda" if demo.torch.cuda.is_available() else "cpu"
    shown = captions[FIRST_PROMPT : FIRST_PROMPT + args.prompts]
    job = demo.Job(shown, captions[8 : 8 + demo.CALIBRATION_PROMPTS], STEPS, device)
    rows: list[dict] = []
    reference: np.ndarray | None = None
    with Progress() as progress:
        for recipe in (*demo.RECIPES, BRANCHLESS):
            steps = (demo.CALIBRATION_STEPS if recipe.config else 0) + STEPS
            line = demo.Line(progress, recipe.name, steps)
            pipe = demo.prepare(recipe, job, line)
            pictures = demo.draw(pipe, shown, STEPS, FIRST_SEED, line)
            if reference is None:
                reference = pictures
                continue
            mse = ((pictures - reference) ** 2).mean((1, 2, 3))
            row = {
                "method": recipe.name,
                "pictures": len(mse),
                "psnr_db": decibels(mse.mean()),
                "psnr_mean_of_pictures_db": round(float(np.mean([decibels(m) for m in mse])), 2),
                "psnr_worst_db": decibels(mse.max()),
                "psnr_all": [decibels(m) for m in mse],
                "weight_bytes": demo.weight_bytes(pipe.transformer),
            }
            rows.append(row)
            print({key: value for key, value in row.items() if key != "psnr_all"}, flush=True)
    write(args.output, rows)


if __name__ == "__main__":
    main()
