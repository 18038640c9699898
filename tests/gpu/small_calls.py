"""Every operator on ragged shapes, once, for a memory checker:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 SVDQ_TUNE=0 compute-sanitizer --tool memcheck python tests/gpu/small_calls.py

Without its cache torch gives each tensor an allocation of its own, so a read or write beside a tensor is seen.
"""

import torch

from svdq_compile import Config
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.lowering import ops
from svdq_compile.quantizer import quantize_group

BF16 = torch.bfloat16
NORM = "prologue(x, a0: BT, a1: C); t0 = sub(x, a0); t1 = mul(t0, a1)"
JOINED = "prologue(x, right)"
RESIDUAL = "epilogue(y, a0: C, auxiliary: BTC); t0 = mul(a0, y); t1 = add(auxiliary, t0)"
SHAPES = [(1, 128, 200), (77, 320, 192), (333, 1088, 1000)]  # M, K, N: edges of every tile


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(BF16)


def main() -> None:
    for m, k, n in SHAPES:
        x, residual = normal(m, k), normal(m, n)
        config = Config(rank=32, refine=0)
        for precision in ("w4a8", "int4", "w4a16"):
            (made,) = quantize_group([normal(n, k)], ["layer"], precision, config, InputStatistics())
            packed = made.packed
            weight, shared = list(packed.weight), packed.shared
            if precision == "w4a16":
                ops.gemv(x[:16], normal(min(m, 16), 32), weight, packed.up, normal(n), precision, BF16)
                continue
            half = k // 2 // 64 * 64
            for quantized in (
                ops.quantize(x, shared.smooth, shared.down, precision, 0.0),
                ops.fused_quantize([x, normal(m, 1), normal(k)], shared.smooth, shared.down, precision, 0.0, NORM),
                ops.fused_quantize([x[:, :half], x[:, half:]], shared.smooth, shared.down, precision, 0.0, JOINED),
            ):
                rest = (*quantized, weight, packed.up, normal(n), None, precision)
                ops.gemm(*rest, BF16)
                ops.gemm(*rest, torch.float32)
                ops.fused_gemm(*rest, BF16, [normal(n), residual], RESIDUAL)
        ops.row_moments(x)
        torch.cuda.synchronize()
        print(f"M={m} K={k} N={n} done", flush=True)


if __name__ == "__main__":
    main()
