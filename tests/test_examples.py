"""Each program in examples/ runs as a person would run it, on tiny pipelines (snippets/run.py)."""

from pathlib import Path

import pytest

from snippets.reader import Machine, machine, reader

__all__ = ["machine", "reader"]  # fixtures

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
OTHERS = {"demo.py", "lines.py", "page.py", "size.py"}  # the demo: test_demo_page.py, test_demo_loras.py

SERVICE = """
import time
import service  # with diffusers
from fastapi.testclient import TestClient

with TestClient(service.app) as client:
    first = client.get("/health")
    assert first.status_code == 503 and first.json()["state"] == "starting"
    assert client.get("/picture", params={"prompt": "a dog"}).status_code == 503
    while client.get("/health").json()["state"] == "starting":
        time.sleep(0.1)
    health = client.get("/health")
    assert health.status_code == 200 and health.json()["styles"] == ["night", "style"], health.text

    def picture(**asked):
        return client.get("/picture", params={"prompt": "a dog", "steps": 2} | asked)

    done = picture(size="wide", style="night", strength=0.8)
    assert done.status_code == 200 and done.content.startswith(b"\\x89PNG"), done.text
    assert picture().status_code == 200
    for wrong in ({"size": "round"}, {"style": "day"}, {"strength": 3}, {"steps": 0}):
        assert picture(**wrong).status_code == 422, wrong
"""


def test_every_example_is_tried() -> None:
    tried = {"service.py", "video.py", "two_adapters.py", "saved_file.py", "text_encoder.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tried | OTHERS


def test_video(machine: Machine, tmp_path: Path) -> None:
    assert "dog.gif: 5 frames" in machine.run(EXAMPLES / "video.py", tmp_path)
    assert (tmp_path / "dog.gif").read_bytes().startswith(b"GIF89a")


def test_two_adapters(machine: Machine, reader: Path) -> None:
    machine.run(EXAMPLES / "two_adapters.py", reader, "style.safetensors", "night.safetensors")
    pictures = {path.stem: path.read_bytes() for path in reader.glob("*.png")}
    assert set(pictures) == {"none", "style", "night", "both", "more-night"}
    assert len(set(pictures.values())) == 5


def test_saved_file(machine: Machine, tmp_path: Path) -> None:
    pictures = []
    for _ in range(2):
        machine.run(EXAMPLES / "saved_file.py", tmp_path)
        assert (tmp_path / "flux.svdq.safetensors").exists()
        pictures.append((tmp_path / "dog.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_text_encoder(machine: Machine, tmp_path: Path) -> None:
    told = machine.run(EXAMPLES / "text_encoder.py", tmp_path)
    assert 0 < float(told.split("embedding is ")[1].split("%")[0]) < 20


@pytest.mark.filterwarnings("ignore")
def test_service(machine: Machine, reader: Path) -> None:
    (reader / "loras").mkdir()
    for name in ("style", "night"):
        (reader / f"{name}.safetensors").rename(reader / "loras" / f"{name}.safetensors")
    (reader / "driver.py").write_text(f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n{SERVICE}")
    machine.run(reader / "driver.py", reader)
