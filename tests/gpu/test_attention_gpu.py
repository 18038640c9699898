"""torch's attention kernels as lowering/attention.py calls them, and the choice among them. Needs CUDA."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_compile.kernels.runtime import tuning
from svdq_compile.lowering.attention import KINDS, attend, fastest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_exact(kind: str, is_causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=is_causal, scale=0.2)
    result = attend(kind, q, k, v, is_causal, 0.2)
    assert float((result - expected).norm() / expected.norm()) < 4e-3


def test_the_choice_is_measured_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    monkeypatch.delenv("SVDQ_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning._file.cache_clear()
    tuning._known.cache_clear()
    with FakeTensorMode():
        q = torch.empty(1, 1024, 8, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        kind = fastest("efficient", q, q, q, False, None)
    assert kind in KINDS
    monkeypatch.setattr(tuning, "_measure", None)
    assert fastest("efficient", q, q, q, False, None) == kind
    assert "attention" in next(tmp_path.glob("choices-*.json")).read_text()
    tuning._file.cache_clear()
    tuning._known.cache_clear()
