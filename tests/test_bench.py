"""bench/flux_step.py on a tiny model: rows with their fields, merged into a file, and its tables."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

diffusers = pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import flux_step  # noqa: E402
import lora_step  # noqa: E402
import multi_gpu  # noqa: E402
import small_memory  # noqa: E402
import stream_quantize  # noqa: E402
from memory import TINY  # noqa: E402

import svdq_compile as svdq  # noqa: E402
from svdq_compile import compiled as compiled_module  # noqa: E402

FIELDS = {"model", "method", "run", "device", "ms", "ms_all", "resident_gib", "peak_gib", "first_step_s"}
FIELDS |= {"warm_process_s", "rel_err", "host_ms", "kernels"}


def test_flux_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit eager in its own process; ours in this one, without the minute that Inductor takes on a CPU."""
    out, row = tmp_path / "steps.json", tmp_path / "row.json"
    common = ["--model", "flux", "--tiny", "--no-warm", "--out", str(out)]
    flux_step.main([*common, "--methods", "eager", "--limit", "120"])

    def as_it_is(gm: fx.GraphModule, *rest: object) -> Callable:
        return gm.forward

    def here(options: object, method: str, caches: Path, first_only: bool, saved: Path) -> dict:
        more = ["--first-only"] if first_only else []
        flux_step.main([*common, "--methods", method, "--child", str(row), "--saved", str(saved), *more])
        return json.loads(row.read_text())

    monkeypatch.setattr(compiled_module, "compile_with_inductor", as_it_is)
    monkeypatch.setattr(flux_step, "run_child", here)
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # put back what it sets
        flux_step.main([*common, "--load", "--methods", "ours"])

    rows = json.loads(out.read_text())["rows"]
    assert [r["method"] for r in rows] == ["eager", "ours"]
    assert all(r.keys() >= FIELDS and r["ms"] > 0 for r in rows)
    assert rows[0]["rel_err"] == 0
    assert 0 < rows[1]["rel_err"] < 0.25
    assert rows[1]["loaded_process_s"] > 0

    document = tmp_path / "document.md"
    document.write_text("before\n<!-- table: steps -->\nold\n<!-- end -->\nafter\n")
    flux_step.main([*common, "--table", str(document)])
    lines = document.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "old" not in lines
    assert sum(line.startswith("| ours |") for line in lines) == 1


def test_stream_quantize(tmp_path: Path) -> None:
    """Each way, in this process: which is larger than what it looks at, so only what adds to it is."""
    stream_quantize.build(tmp_path, TINY, 2**22)
    config = svdq.Config(rank=8, refine=0, progress=False)
    rows = [stream_quantize.measure(way, tmp_path, tmp_path / f"{way}.file", config) for way in stream_quantize.WAYS]
    assert [row["way"] for row in rows] == ["quantize", "from_pretrained", "diffusers"]
    assert all(row["shards"] == 3 and row["host_peak_gib"] >= row["host_base_gib"] > 0 for row in rows)
    assert (tmp_path / "quantize.file").stat().st_size > 2**20
    assert [row["file_gib"] is None for row in rows] == [False, True, True]


def test_processes_that_compile_at_once_are_timed_in_turn(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    flux_step.main(["--tiny", "--together", "1", "--methods", "eager", "--limit", "120", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row.keys() >= FIELDS
    assert row["ms"] > 0
    assert row["processes_at_once"] == 1


def test_merge_replaces_an_earlier_run_and_compares_rows_of_one(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    both = {"model": "flux", "methods": "eager,ours"}
    for run, method, ms in (("1", "eager", 3.0), ("1", "ours", 1.5), ("3", "eager", 2.0), ("3", "ours", 1.0)):
        flux_step.merge(out, both | {"method": method, "ms": ms, "run": run})
        flux_step.merge(out, {"model": "flux", "methods": "ours", "method": "ours", "ms": 1.2, "run": "2"})
    flux_step.merge(out, {"model": "flux", "methods": "broken", "method": "broken", "error": "none", "run": "4"})
    flux_step.merge(out, both | {"model": "sdxl", "method": "ours", "ms": 4.0, "run": "3"})
    rows = json.loads(out.read_text())["rows"]
    assert [(r["run"], r["method"], r.get("ms"), r.get("x")) for r in rows if r["run"] != "2"] == [
        ("3", "eager", 2.0, {"eager": 1.0, "ours": 0.5}),
        ("3", "ours", 1.0, {"eager": 2.0, "ours": 1.0}),
        ("4", "broken", None, None),
        ("3", "ours", 4.0, {"ours": 1.0}),
    ]


def test_tables(tmp_path: Path) -> None:
    out, document = tmp_path / "steps.json", tmp_path / "steps.md"
    for method, ms in (("compile", 3.0), ("ours", 1.5), ("ours-unfused", 2.1)):
        row = {
            "model": "flux",
            "methods": "all",
            "method": method,
            "ms": ms,
            "run": "1",
            "device": "none",
            "kernels": 7,
        }
        flux_step.merge(out, row | {"resident_gib": 1.0, "peak_gib": 2.0})
    document.write_text("<!-- table: steps -->\n<!-- end -->\n\n<!-- table: fusions -->\n<!-- end -->\n")
    flux_step.main(["--table", str(document), "--out", str(out)])
    assert "| ours | 1.5 | 2.00 | - | - | 1.00 | 2.00 | - | - | - | - | 7 | - |" in document.read_text()
    assert "| ours-unfused | 2.1 | 1.400 | 7 |" in document.read_text()


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_128x128x128", "attention"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_mm_3", "norms/pointwise"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "gemm"),
        ("_gemm_kernel", "gemm"),
        ("_quantize_kernel", "quantize"),
        ("_gemv_kernel", "gemv"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "norms/pointwise"),
        ("distribution_something", "other"),
    ],
)
def test_kernel_groups(kernel: str, group: str) -> None:
    assert flux_step.step_profile.group(kernel) == group


def test_a_method_over_its_limit_is_a_row(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    flux_step.main(["--tiny", "--methods", "eager", "--limit", "1", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["error"] == "stopped after the limit of 1 s"
    assert row["warm_process_s"] is None


def test_unknown_method(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        flux_step.main(["--methods", "our"])
    assert "no method our; there are eager, compile" in capsys.readouterr().err


@pytest.mark.parametrize("name", flux_step.MODELS)
def test_models(name: str) -> None:
    """The published configuration builds, and a tiny one of the same structure gives a finite output."""
    spec = flux_step.MODELS[name]
    cpu = torch.device("cpu")
    with torch.device("meta"):
        published = getattr(diffusers, spec.class_name)(**spec.config)
    assert sum(p.numel() for p in published.parameters()) > 8e8
    model = flux_step.build(name, True, cpu)
    assert model(**flux_step.inputs(name, True, model, cpu))[0].isfinite().all()


def test_an_adapter_for_every_linear_of_the_blocks() -> None:
    model = flux_step.build("flux", True, torch.device("cpu"))
    names = lora_step.linears(model)
    assert "transformer_blocks.0.attn.to_q" in names
    assert "single_transformer_blocks.1.proj_out" in names
    assert "proj_out" not in names
    state = lora_step.adapter(model, names, seed=0)
    assert len(state) == 2 * len(names)
    model.load_lora_adapter(state, adapter_name="first")
    loaded = dict(model.named_parameters())
    assert torch.equal(
        loaded["transformer_blocks.0.attn.to_q.lora_A.first.weight"],
        state["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    )


def test_lora_ratios_are_against_both_steps_without() -> None:
    events = [("a step without an adapter", 10.0), ("a step with an adapter", 12.0)]
    events += [("a step without an adapter, again", 14.0), ("a step with a hotswappable adapter", 13.2)]
    rows = [{"event": event, "ms": ms} for event, ms in events]
    expected = {"slower_ms": 0.0, "slower_hotswappable_ms": 0.1}
    assert lora_step.summary(rows) == expected  # no GPU
    rows = [row | {"gpu_ms": row["ms"] ** 2} for row in rows]
    assert lora_step.summary(rows) == expected | {"slower_gpu_ms": -0.027, "slower_hotswappable_gpu_ms": 0.1773}


def test_small_memory(tmp_path: Path) -> None:
    """16-bit is the reference, group offloading of ours close to it; on a CPU nothing is held to a cap."""
    out = tmp_path / "small.json"
    small_memory.main(["--tiny", "--models", "16-bit,ours", "--caps", "16", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    methods = ("16-bit-sequential", "16-bit-group", "ours-resident", "ours-group")
    assert [(row["method"], row["cap_gib"]) for row in rows] == [(name, 16) for name in methods]
    assert all(row["ms"] > 0 and row["peak_gib"] is None for row in rows)
    errors = [row["error_vs_16bit"] for row in rows]
    assert errors[:2] == [0, 0]
    assert all(0 < error < 0.05 for error in errors[2:])


def test_multi_gpu_predicts_what_was_not_measured() -> None:
    common = {"model": "flux", "method": "ours"}
    one = common | {"ranks": 1, "kind": "one GPU", "ms": 80.0, "serial_ms": 2.0}
    two = common | {"ranks": 2, "kind": "ulysses", "ms": 45.0, "serial_ms": 2.0}
    rows = multi_gpu.with_predictions([one, two])
    predicted = {row["ranks"]: row["predicted_ms"] for row in rows}
    assert predicted[1] == 80.0
    # Half of 78 ms, 2 ms, 114 exchanges of 25 us, and 228 times 7 MB of 21 us.
    assert predicted[2] == pytest.approx(41 + 114 * 0.025 + 228 * 0.021, rel=0.01)
    assert predicted[2] > predicted[4] > predicted[8] > 80 / 8
    assert [row["ranks"] for row in rows if row["kind"] == "predicted"] == [4, 8, 16]
    assert multi_gpu.with_predictions(rows) == rows


def test_rows_of_several_gpus_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are ready before the first is timed; one that fails does not keep the others waiting."""
    ready, timed = [], []

    def row_of(name: str, method: str, ranks: int, tiny: bool, turn: Path, limit: float) -> dict:
        if method == "torchao-fp8":
            return {"error": "not here"}
        ready.append(method)
        for rank in range(ranks):
            multi_gpu._ready(turn, rank).touch()
        while not turn.exists():
            time.sleep(0.01)
        timed.append((method, len(ready)))
        time.sleep(0.1)
        return {"method": method, "timed_before": len(timed)}

    monkeypatch.setattr(multi_gpu, "row_of", row_of)
    asked = [("flux", method, 2) for method in ("ours", "torchao-fp8", "compile", "ours-graphs")]
    rows = list(multi_gpu.rows_together(asked, 3, True, 60))
    assert rows[1] == {"error": "not here"}
    assert timed == [("ours", 2), ("compile", 2), ("ours-graphs", 3)]
    assert [row.get("timed_before") for row in rows] == [1, None, 2, 3]
