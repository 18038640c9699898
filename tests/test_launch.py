"""Starting a kernel with little Python: what is passed, what is cached and under which key, and the ways round it.

There is no GPU here: Triton's real wrapper of a compiled kernel passes its arguments to a recorder in place of the
driver. What it passes for the same arguments, through Triton and past it, must agree.
"""

from types import SimpleNamespace

import pytest
import torch
from kernel_testing import compiled
from triton.experimental.gluon import language as gl

from svdq_compile.kernels.runtime import launcher
from svdq_compile.kernels.runtime.launcher import Descriptor, launch

pytestmark = compiled

META = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [64, 64], "fp4_padded": False}
LAYOUT, OTHER_LAYOUT = (gl.NVMMASharedLayout(width, element_bitwidth=16, rank=2) for width in (128, 64))
GRID = (5, 2, 1)


class Driver:
    """Triton's driver without a GPU: encoded descriptors say what they were made of."""

    def __init__(self):
        self.encoded = 0
        self.passed = []
        tools = {
            "launch": self.launch,
            "fill_tma_descriptor": self.encode,
            "fill_tma_descriptor_tiled": self.encode,
            "build_signature_metadata": lambda types: b"",
        }
        self.utils = SimpleNamespace(**tools)

    def launch(self, *arguments):
        self.passed.append(arguments)

    def encode(self, *content):
        self.encoded += 1
        return "encoded", *(tuple(c) if isinstance(c, (list, torch.Size)) else c for c in content)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77


class Kernel:
    """A JITFunction: gives its compiled kernel, whatever it is called with."""

    def __init__(self, driver, signature, **changed):
        from triton.backends.nvidia import driver as nvidia

        self.fn, self.calls = object(), 0
        launcher = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
        metas = [META for s in signature if s.startswith("tensordesc")]
        attributes = {"num_ctas": 1, "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0,
                      "profile_scratch_align": 1, "launch_cooperative_grid": False, "launch_pdl": False,
                      "gsan_enabled": False, "arg_annotations": [], "kernel_signature": b""}  # fmt: skip
        launcher.__dict__.update(attributes | changed)
        launcher.launch = nvidia.wrap_handle_tensordesc(driver.launch, dict(enumerate(signature)), metas)
        self.compiled = CompiledKernel(launcher, SimpleNamespace(tensordesc_meta=metas))

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.calls += 1
            return self.compiled

        return run


class CompiledKernel:
    function, packed_metadata = 1234, (4, 1, 1000)

    def __init__(self, run, metadata):
        self.run, self.metadata, self.ordinary = run, metadata, 0

    def __getitem__(self, grid):
        def run(*arguments, stream=None):
            self.ordinary += 1
            self.run(*grid, stream, self.function, self.packed_metadata, None, None, None, *arguments)

        return run


@pytest.fixture
def driver(monkeypatch):
    import triton.runtime

    fake = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    monkeypatch.setattr(launcher, "gpu", lambda: (fake.get_current_device, fake.get_current_stream))
    monkeypatch.setattr(launcher, "_started", {})
    return fake


def described(tensor, block=(64, 128), layout=LAYOUT, padding="zero"):
    return Descriptor(tensor, tensor.shape, tensor.stride(), block, layout, padding)


def flat(passed):
    """The arguments as the driver sees them: addresses for tensors, everything in one row."""
    for a in passed:
        if isinstance(a, (list, tuple)) and not (a and a[0] == "encoded"):
            yield from flat(a)
        else:
            yield a.data_ptr() if isinstance(a, torch.Tensor) else a


SIGNATURE = ["tensordesc<fp16[64, 128],x>", "*fp32", "tensordesc<fp16[64, 128],x>", "i32", "fp32", "tuple", "constexpr"]


def arguments(rows=96):
    x, w = torch.zeros(rows, 128, dtype=torch.float16), torch.zeros(64, 256, dtype=torch.float16)
    hook = (torch.zeros(8), 3, 2.5)
    return described(x), torch.zeros(7), described(w[:, 128:]), 48, 0.5, hook


def test_past_triton_as_through_it(driver):
    kernel = Kernel(driver, SIGNATURE)
    given = arguments()
    for _ in range(3):
        launch(kernel, GRID, given, (True,), num_warps=4)
    assert kernel.calls == 1
    assert kernel.compiled.ordinary == 0
    kernel.compiled[GRID](*given, True, stream=77)
    past, again, through = driver.passed
    assert list(flat(past)) == list(flat(again)) == list(flat(through))
    assert driver.encoded == 2 + 2, "two descriptors, once past Triton and once through it"


def test_without_descriptors(driver):
    kernel = Kernel(driver, ["*fp32", "i32"])
    x = torch.zeros(5)
    for rows in (5, 9, 3):
        launch(kernel, GRID, (x, rows), (), num_warps=4)
    assert [[*flat(p)][-2:] for p in driver.passed] == [[x.data_ptr(), 9], [x.data_ptr(), 3]]
    assert (kernel.calls, kernel.compiled.ordinary) == (1, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: described(t[32:]),
        lambda t: described(t[:, :64]),
        lambda t: described(t.view(64, 192)),
        lambda t: described(t[:64]),
        lambda t: described(t[::2]),
        lambda t: described(t, padding="nan"),
    ],
)
def test_a_descriptor_is_its_content(driver, change):
    """Nothing but address, shape, strides and padding: another tensor there is the same, any of them changed is not."""
    kernel = Kernel(driver, SIGNATURE[:1])
    storage = torch.zeros(96, 128, dtype=torch.float16)
    for given in (described(storage), described(storage), change(storage), described(storage.clone().set_(storage))):
        launch(kernel, GRID, (given,), (), num_warps=4)
    assert kernel.calls == 1
    assert driver.encoded == 2
    first, changed, third = ([*flat(p)] for p in driver.passed)
    assert first == third != changed
    kernel.compiled[GRID](change(storage), stream=77)
    assert [*flat(driver.passed[-1])] == changed


def test_descriptors_are_bounded(driver, monkeypatch):
    monkeypatch.setattr(launcher, "MAX_ENCODED", 4)
    kernel = Kernel(driver, SIGNATURE[:1])
    storage = torch.zeros(96, 128, dtype=torch.float16)
    for i in (0, *range(10), 9):
        launch(kernel, GRID, (described(storage[i:]),), (), num_warps=4)
    assert driver.encoded == 10
    assert driver.passed[-1] == driver.passed[-2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2), (1, 17), (16, 17), (16, 1 << 40), (17, (1 << 40) + 1), (-(1 << 31) - 16, -(1 << 31)), (2, 2.0),
        (1, True),
        (torch.zeros(4), torch.zeros(4).half()), (torch.zeros(8), torch.zeros(8)[1:]), (torch.zeros(4), 4),
        ((), (3,)), ((3, 5), (3, (5,))), ((3, 5), (3, 5, 7)), ((torch.zeros(4),), torch.zeros(4)),
        (described(torch.zeros(64, 128)), described(torch.zeros(64, 128).half())),
        (described(torch.zeros(64, 128)), described(torch.zeros(64, 128), block=(32, 128))),
        (described(torch.zeros(64, 128)), described(torch.zeros(64, 128), layout=OTHER_LAYOUT)),
        (described(torch.zeros(64, 128)), torch.zeros(64, 128)),
    ],
)  # fmt: skip
def test_what_is_compiled_for_differs(one, other):
    assert _key(one) != _key(other)
    assert _key(9, one) != _key(9, other)
    assert _key(one, (5,)) != _key(other, (5,))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (2, 3), (16, 1024), (0, 32), (2.0, 1.0), (torch.zeros(4), torch.zeros(9, 9)), ((3, 4.0), (5, 9.0)),
        (torch.zeros(8)[1:], torch.zeros(8)[3:]), (described(torch.zeros(64, 128)), described(torch.zeros(9, 64, 3))),
    ],
)  # fmt: skip
def test_what_is_not_compiled_for_agrees(one, other):
    assert _key(one) == _key(other)


def _key(*given):
    key = []
    launcher._read(given, key, [])
    return tuple(key)


def test_constants_device_and_options_are_part_of_it(driver, monkeypatch):
    kernel = Kernel(driver, ["*fp32", "constexpr"])
    x = torch.zeros(5)
    launch(kernel, GRID, (x,), (1,), num_warps=4)
    launch(kernel, GRID, (x,), (2,), num_warps=4)
    launch(kernel, GRID, (x,), (2,), num_warps=8)
    monkeypatch.setattr(driver, "get_current_device", lambda: 1)
    monkeypatch.setattr(launcher, "gpu", lambda: (driver.get_current_device, driver.get_current_stream))
    launch(kernel, GRID, (x,), (2,), num_warps=8)
    assert kernel.calls == 4


@pytest.mark.parametrize("fault", ["scratch", "closure", "order", "attribute", "meta"])
def test_an_unknown_triton_is_left_alone(driver, monkeypatch, fault):
    """Whatever looks different from what we know, kernels are started through Triton's own path."""
    kernel = Kernel(driver, SIGNATURE, **({"global_scratch_size": 128} if fault == "scratch" else {}))
    launcher = kernel.compiled.run
    if fault == "closure":
        inner = launcher.launch
        launcher.launch = lambda *a: inner(*a)
    elif fault == "order":
        known = type(launcher).__call__
        monkeypatch.setattr(type(launcher), "__call__", lambda self, x, y, z, *a: known(self, z, y, x, *a))
    elif fault == "attribute":
        del launcher.launch_pdl
    elif fault == "meta":
        kernel.compiled.metadata = SimpleNamespace()
    given = arguments()
    launch(kernel, GRID, given, (True,), num_warps=4)
    kernel.compiled.run = lambda *a: driver.launch(*a)
    launch(kernel, GRID, given, (True,), num_warps=4)
    assert kernel.compiled.ordinary == 1
    assert driver.passed[-1][:3] == GRID
    assert all(a is b for a, b in zip(driver.passed[-1][-7:], (*given, True), strict=True))


def test_a_profiler_sees_the_launch(driver, monkeypatch):
    from triton import knobs

    kernel = Kernel(driver, SIGNATURE)
    given = arguments()
    for _ in range(2):
        launch(kernel, GRID, given, (True,), num_warps=4)
    assert kernel.compiled.ordinary == 0
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    launch(kernel, GRID, given, (True,), num_warps=4)
    assert kernel.compiled.ordinary == 1


def test_kernels_make_each_layout_once():
    """`launch` knows a layout by its identity: one made anew in each call would be compiled for in each call."""
    from svdq_compile.kernels.hopper.descriptors import describe, of_both_halves, plain
    from svdq_compile.kernels.hopper.quantize import Tile, describe_down

    down = torch.zeros(96, 64, dtype=torch.bfloat16)
    for made in (
        lambda: describe_down(down, Tile(8, 2))[0],
        lambda: describe(down, 2, 64, plain(16)),
        lambda: describe(down, 64, 64),
        lambda: of_both_halves(describe(down, 64, 64), 0),
    ):
        assert made().layout is made().layout
