"""How q, k and v should be scaled for attention in 8 bits: errors of a few ways, emulated in plain torch.

python bench/attention_codes.py            needs no GPU; a minute or two. Writes bench/results/attention-codes.json

The heads are made as models make them: a linear's result with what all tokens share, RMS norm with a weight, rotation;
values with tokens that are far larger than the others. The product is FlashAttention-3's: codes of q, k and v, and
probabilities in e4m3 as well; with int8 it is of codes of q and k alone. The error is against the exact softmax,
relative, the worst head's beside that of all.

Ways of making codes:

    largest        a scale from the largest magnitude of a head; k less its mean: two passes over everything
    largest, k as it is
    bound          q and k by what their norm's weight allows, v by its largest magnitude; k as it is
    sampled, n     the largest of 32 tokens may be n times as large elsewhere; k less the mean of these tokens
    sampled, n, k as it is
    int8, n tokens                 a scale for n tokens of a head, by their largest magnitude; k less its samples' mean
    int8, 1 token, k as it is
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from record import RESULTS, write

E4M3_MAX, SAMPLES = 448.0, 32
SHARP = 1.5  # of the norms' weights: products of q and k are 2.25 at the middle
Qkv = tuple[Tensor, Tensor, Tensor]


def rms_normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotated(x: Tensor) -> Tensor:
    """By neighbouring channels, from one turn a token to one in 10,000."""
    tokens, channels = x.shape[-2:]
    angle = torch.arange(tokens)[:, None] * 1e4 ** -torch.linspace(0, 1, channels // 2)
    turn = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def heads(
    count: int, tokens: int, channels: int, shared: float, is_rotated: bool, spread: float, massive: float
) -> Qkv:
    """shared: how large what all keys share is beside the rest; spread: of the norms' weights, in powers of e; massive:
    how many times as large the values of one token in 200 are, none of which is sampled.
    """
    q, k, v = torch.randn(3, count, tokens, channels)
    k = k + shared * torch.randn(count, 1, channels)
    q, k = (rms_normed(x, SHARP * torch.exp(spread * torch.randn(channels))) for x in (q, k))
    if is_rotated:
        q, k = rotated(q), rotated(k)
    v[:, 101::200] *= massive
    return q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float()


CASES = {
    "normed": (0.0, False, 0.0, 1.0),
    "normed, rotated": (0.0, True, 0.3, 1.0),
    "keys share 3, rotated": (3.0, True, 0.3, 1.0),
    "keys share 3": (3.0, False, 0.3, 1.0),
    "keys share 10": (10.0, False, 0.3, 1.0),
    "weights of any size, rotated": (1.0, True, 1.0, 1.0),
    "some values 30 x": (1.0, True, 0.3, 30.0),
    "some values 300 x": (1.0, True, 0.3, 300.0),
}


def in_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def largest(x: Tensor) -> Tensor:
    return x.abs().amax((1, 2), keepdim=True)


def sample(x: Tensor) -> Tensor:
    at = (2 * torch.arange(SAMPLES) + 1) * x.shape[1] // (2 * SAMPLES)
    return x[:, at]


def by_largest(q: Tensor, k: Tensor, v: Tensor, centred: bool = True) -> Qkv:
    k = k - k.mean(1, keepdim=True) * centred
    return tuple(in_e4m3(x, largest(x) / E4M3_MAX) for x in (q, k, v))  # type: ignore[return-value]


def by_bound(q: Tensor, k: Tensor, v: Tensor) -> Qkv:
    """A normed head is no longer than sqrt(D) times its norm's largest weight, which is about its largest channel."""
    bounds = (x.square().mean(1).sqrt().amax(1)[:, None, None] * x.shape[2] ** 0.5 for x in (q, k))
    scales = (*bounds, largest(v))
    return tuple(in_e4m3(x, b / E4M3_MAX) for x, b in zip((q, k, v), scales, strict=True))  # type: ignore[return-value]


def by_sample(q: Tensor, k: Tensor, v: Tensor, room: float, centred: bool = True) -> Qkv:
    k = k - sample(k).mean(1, keepdim=True) * centred
    return tuple(in_e4m3(x, largest(sample(x)) * room / E4M3_MAX) for x in (q, k, v))  # type: ignore[return-value]


def in_int8(x: Tensor, tokens: int) -> Tensor:
    blocks = x.unflatten(1, (-1, tokens))
    scale = blocks.abs().amax((2, 3), keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(1, 2)


def by_tokens(q: Tensor, k: Tensor, v: Tensor, tokens: int, centred: bool = True) -> Qkv:
    return in_int8(q, tokens), in_int8(k - sample(k).mean(1, keepdim=True) * centred, tokens), v


WAYS: dict[str, Callable[..., Qkv]] = {
    "largest": by_largest,
    "largest, k as it is": lambda *qkv: by_largest(*qkv, centred=False),
    "bound": by_bound,
    **{f"sampled, {n}": lambda *qkv, n=n: by_sample(*qkv, room=n) for n in (1, 4, 16, 64, 256, 1024)},
    "sampled, 64, k as it is": lambda *qkv: by_sample(*qkv, room=64, centred=False),
    "int8, 1 token": lambda *qkv: by_tokens(*qkv, tokens=1),
    "int8, 64 tokens": lambda *qkv: by_tokens(*qkv, tokens=64),
    "int8, 1 token, k as it is": lambda *qkv: by_tokens(*qkv, tokens=1, centred=False),
}


def attention(q: Tensor, k: Tensor, v: Tensor, coded: bool) -> Tensor:
    """FlashAttention-3 has probabilities up to 256 in e4m3 (coded), and adds them up before they are rounded."""
    logits = q @ k.mT * q.shape[2] ** -0.5
    p = 256 * torch.exp(logits - logits.amax(-1, keepdim=True))
    return (p.to(torch.float8_e4m3fn).float() if coded else p) @ v / p.sum(-1, keepdim=True)


def measure(tokens: int, channels: int, count: int) -> Iterator[dict]:
    for case, (shared, is_rotated, spread, massive) in CASES.items():
        torch.manual_seed(0)
        q, k, v = heads(count, tokens, channels, shared, is_rotated, spread, massive)
        exact = attention(q.double(), k.double(), v.double(), False)
        for way, codes in WAYS.items():
            lost = attention(*codes(q, k, v), not way.startswith("int8")) - exact
            by_head = lost.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
            error = float(lost.norm() / exact.norm())
            print(f"{case:32} {way:26} {error:.4f}  worst head {float(by_head.max()):.4f}", flush=True)
            yield {"case": case, "codes": way, "rel_err": round(error, 5), "worst_head": round(float(by_head.max()), 5)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention-codes.json")
    args = parser.parse_args()
    write(args.out, list(measure(args.tokens, args.channels, args.heads)))
