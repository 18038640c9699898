"""A service that draws with one model in 4 bits: several sizes, a LoRA for each request, a health check.

    pip install fastapi uvicorn
    python examples/service.py
    curl localhost:8000/health
    curl -o dog.png "localhost:8000/picture?prompt=a+dog&size=wide&style=night&strength=0.8"

Each file in the folder `loras` is a style. All are loaded before the first request, and each size and style is drawn
once: so everything is quantized and compiled, and no request waits for a compiler. Meanwhile /health says 503.
"""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Lock, Thread
from typing import Annotated

import torch
from diffusers import DiffusionPipeline
from fastapi import FastAPI, HTTPException, Query, Response
from PIL.Image import Image

import svdq_compile as svdq

SIZES = {"square": (1024, 1024), "wide": (768, 1344), "tall": (1344, 768)}  # height, width
LORAS = Path("loras")


class Painter:
    """A pipeline, used by one request at a time."""

    def __init__(self) -> None:
        self.state = "starting"
        self.styles: list[str] = []
        self._lock = Lock()

    def start(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:
            self.state = f"failed: {error}"
            raise
        self.state = "ready"

    def _warm_up(self) -> None:
        """Load, quantize and compile: minutes the first time, seconds once torch's caches are full."""
        pipe = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
        self._pipe = svdq.compile(pipe)
        self.draw("a dog", "square", None, 1.0, steps=10)  # the first 8 steps watch in 16-bit
        for file in sorted(LORAS.glob("*.safetensors")):
            pipe.load_lora_weights(file, adapter_name=file.stem)
            self.styles.append(file.stem)
        for style in (None, *self.styles):
            for size in SIZES:
                for strength in (1.0, 0.5):  # the first change of a strength makes a graph that takes any
                    self.draw("a dog", size, style, strength, steps=1)

    def draw(self, prompt: str, size: str, style: str | None, strength: float, steps: int) -> Image:
        height, width = SIZES[size]
        with self._lock:
            if style is not None:
                self._pipe.enable_lora()
                self._pipe.set_adapters([style], [strength])
            elif self.styles:
                self._pipe.disable_lora()
            return self._pipe(prompt, height=height, width=width, num_inference_steps=steps).images[0]


painter = Painter()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    Thread(target=painter.start, daemon=True).start()
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
def health(response: Response) -> dict:
    response.status_code = 200 if painter.state == "ready" else 503
    return {"state": painter.state, "sizes": list(SIZES), "styles": painter.styles}


@app.get("/picture")
def picture(
    prompt: str,
    size: str = "square",
    style: str | None = None,
    strength: Annotated[float, Query(ge=0, le=2)] = 1.0,
    steps: Annotated[int, Query(ge=1, le=100)] = 28,
) -> Response:
    if painter.state != "ready":
        raise HTTPException(503, painter.state)
    if size not in SIZES:
        raise HTTPException(422, f"size is one of {', '.join(SIZES)}")
    if style is not None and style not in painter.styles:
        raise HTTPException(422, f"style is one of {', '.join(painter.styles) or '(none are loaded)'}")
    file = io.BytesIO()
    painter.draw(prompt, size, style, strength, steps).save(file, "PNG")
    return Response(file.getvalue(), media_type="image/png")


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, port=8000)
