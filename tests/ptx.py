"""The PTX that Triton makes for an NVIDIA GPU, run on the CPU: numbers of compiled code, where there is no such GPU.

    launch = on_cpu(80)                                       # in the place of runtime/launcher.launch
    launch(kernel, grid, arguments, constants, num_warps=4)   # CPU tensors

A program at a time, all its threads in step, each register an array with a value for each. Asynchronous copies are made
at once, so missing waits and barriers are not seen; addresses outside of all tensors are, and branches on which threads
part. It knows the instructions that the kernels for sm_80 to sm_89 consist of, and says which one it does not know.
"""

import re
from functools import cache

import numpy as np
import torch

GUARD = 256  # bytes between tensors, that nobody may touch
START = 1 << 20
WIDTH = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "bf16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4,
         "f32": 4, "b64": 8, "u64": 8, "s64": 8}  # fmt: skip
TYPES = {torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.bfloat16: "bf16",
         torch.float16: "fp16", torch.float32: "fp32"}  # fmt: skip
COMPARE = {"eq": np.equal, "ne": np.not_equal, "neu": np.not_equal, "lt": np.less, "le": np.less_equal,
           "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
           "hs": np.greater_equal}  # fmt: skip


def on_cpu(capability):
    """A `launch` that compiles for this capability and runs what comes of it here."""

    def launch(kernel, grid, arguments, constants, num_warps=4, num_stages=3, **_):
        built = compiled(kernel, signature_of(arguments), constants, capability, num_warps, num_stages)
        memory = Memory()
        values = [memory.place(a) if isinstance(a, torch.Tensor) else a for a in flat(arguments)]
        program = parsed(built.asm["ptx"])
        for place in np.ndindex(*reversed(grid)):
            Program(program, 32 * num_warps, built.metadata.shared, memory, [*values, 0, 0], grid, place[::-1]).run()
        memory.give_back()

    return launch


def flat(values):
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        else:
            yield value


def signature_of(arguments):
    """Types as Triton's compiler wants them."""
    return tuple(
        signature_of(a) if isinstance(a, tuple)
        else "*" + TYPES[a.dtype] if isinstance(a, torch.Tensor)
        else "fp32" if isinstance(a, float) else "i32"
        for a in arguments
    )  # fmt: skip


@cache
def compiled(kernel, types, constants, capability, warps, stages):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(names[len(types) :], "constexpr")
    even = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if isinstance(t, str) and t[0] == "*"}
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    program = source(kernel, signature, dict(zip(names[len(types) :], constants, strict=True)), even)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(program, target=GPUTarget("cuda", capability, 32), options=options)


@cache
def parsed(ptx):
    """Instructions as (guard, opcode, operands), and where labels are."""
    body = re.sub(r"//.*|\.loc.*", "", ptx[ptx.index(".entry") :].split(".section")[0])
    body = body[body.index("{") :]
    instructions, labels = [], {}
    for statement in re.split(r";|\n", body.replace("\n{", "\n").replace("}\n", "}\n")):
        text = re.sub(r"^\s*(\{|\})\s*(?!%)", "", statement).strip()
        while label := re.match(r"(\$?[\w$]+):", text):
            labels[label[1]] = len(instructions)
            text = text[label.end() :].strip()
        if not text or text.startswith(".") or text in "{}":
            continue
        guard, opcode, rest = re.match(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", text).groups()
        operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        instructions.append((guard, opcode, operands))
    return instructions, labels


class Memory:
    """Global memory: tensors with guards between them, and a mark on each byte that is somebody's."""

    def __init__(self):
        self.bytes, self.tensors, self.end = np.zeros(0, np.uint8), [], START

    def place(self, tensor):
        """Its address. Storage that several tensors share is placed once."""
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        for kept, address in self.tensors:
            if kept.data_ptr() == storage.data_ptr():
                return address + tensor.data_ptr() - storage.data_ptr()
        address = self.end
        self.tensors.append((storage, address))
        self.end = -(-(address + storage.numel() + GUARD) // GUARD) * GUARD
        grown = np.zeros(self.end - START, np.uint8)
        grown[: len(self.bytes)] = self.bytes
        grown[address - START : address - START + storage.numel()] = storage.numpy()
        self.bytes = grown
        live = np.zeros(len(grown), bool)
        for kept, at in self.tensors:
            live[at - START : at - START + kept.numel()] = True
        self.live = live
        return address + tensor.data_ptr() - storage.data_ptr()

    def give_back(self):
        for storage, address in self.tensors:
            storage.numpy()[:] = self.bytes[address - START : address - START + storage.numel()]


class Program:
    """One program of a kernel, with its registers and shared memory."""

    def __init__(self, program, threads, shared, memory, parameters, grid, place):
        self.instructions, self.labels = program
        self.threads, self.memory, self.parameters = threads, memory, parameters
        self.grid, self.place = grid, place
        self.shared = np.zeros(shared, np.uint8)
        self.all = np.ones(threads, bool)
        self.registers = {}

    def run(self):
        at = 0
        while True:
            guard, opcode, operands = self.instructions[at]
            at += 1
            live = self.all
            if guard is not None:
                live = self.registers[guard.lstrip("!")] ^ guard.startswith("!")
            head, *rest = opcode.split(".")
            if head in ("bra", "ret"):
                if live.all():
                    if head == "ret":
                        return
                    at = self.labels[operands[0]]
                elif live.any():
                    raise NotImplementedError(f"threads part at {opcode} {operands}")
                continue
            handler = getattr(self, f"do_{head}", None)
            if handler is None:
                raise NotImplementedError(f"{opcode} {operands}")
            if live.any():
                handler(rest, operands, live)

    # ** values **

    def read(self, operand, kind="u32"):
        """An operand as an array of a type."""
        if operand.startswith("{"):
            parts = [self.read(o.strip(), "u64") for o in operand[1:-1].split(",")]
            bits = 16 if len(parts) * 16 == 8 * WIDTH[kind] else 8 * WIDTH[kind] // len(parts)
            raw = sum(part << np.uint64(bits * i) for i, part in enumerate(parts))
        elif operand in self.registers:
            raw = self.registers[operand]
            if raw.dtype == bool:
                return raw
        else:
            raw = np.full(self.threads, self.constant(operand) & (2**64 - 1), np.uint64)
        return typed(raw, kind)

    def constant(self, operand):
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        if re.fullmatch(r"-?\d+U?|-?0x[0-9a-fA-F]+U?", operand):
            return int(operand.rstrip("U"), 0)
        if operand.startswith("%ctaid"):
            return self.place["xyz".index(operand[-1])]
        if operand.startswith("%nctaid"):
            return self.grid["xyz".index(operand[-1])]
        if operand == "global_smem":
            return 0
        raise NotImplementedError(f"operand {operand}")

    def write(self, register, value, live):
        is_predicate = value.dtype == bool
        unsigned = value if is_predicate else value.view(f"u{value.dtype.itemsize}").astype(np.uint64)
        old = self.registers.get(register)
        self.registers[register] = unsigned if live.all() or old is None else np.where(live, unsigned, old)

    def address(self, operand):
        base, _, offset = operand[1:-1].replace(" ", "").partition("+")
        return self.read(base, "s64") + int(offset or "0", 0)

    def place_of(self, space, addresses, size, live):
        """The memory and the indices of the live threads' bytes [threads, size]."""
        at = (addresses[live] - (START if space == "global" else 0))[:, None] + np.arange(size)
        if space == "global":
            if (at < 0).any() or (at >= len(self.memory.live)).any() or not self.memory.live[at].all():
                raise IndexError("memory that is no tensor's")
            return self.memory.bytes, at
        if (at < 0).any() or (at >= len(self.shared)).any():
            raise IndexError("outside of shared memory")
        return self.shared, at

    # ** instructions **

    def do_mov(self, rest, operands, live):
        kind = rest[0]
        target, source = operands
        if target.startswith("{"):
            parts = [p.strip() for p in target[1:-1].split(",")]
            raw, bits = self.read(source, kind.replace("b", "u")), 8 * WIDTH[kind] // len(parts)
            for i, part in enumerate(parts):
                self.write(part, (raw >> (bits * i)).astype(f"u{bits // 8}"), live)
        elif kind == "pred":
            value = self.registers.get(source)
            self.write(target, np.full(self.threads, int(source, 0) != 0) if value is None else value, live)
        elif source == "%tid.x":
            self.write(target, np.arange(self.threads, dtype=np.uint32), live)
        else:
            self.write(target, self.read(source, kind), live)

    def arithmetic(self, rest, operands, live, function):
        kind = rest[-1]
        if kind == "pred":
            self.write(operands[0], function(*(self.read(o) for o in operands[1:])), live)
            return
        with np.errstate(all="ignore"):
            values = [self.read(o, kind) for o in operands[1:]]
            self.write(operands[0], function(*values).astype(values[0].dtype), live)

    def do_add(self, *a):
        self.arithmetic(*a, np.add)

    def do_sub(self, *a):
        self.arithmetic(*a, np.subtract)

    def do_min(self, *a):
        self.arithmetic(*a, np.minimum)

    def do_max(self, *a):
        self.arithmetic(*a, np.maximum)

    def do_and(self, *a):
        self.arithmetic(*a, np.bitwise_and)

    def do_or(self, *a):
        self.arithmetic(*a, np.bitwise_or)

    def do_xor(self, *a):
        self.arithmetic(*a, np.bitwise_xor)

    def do_not(self, *a):
        self.arithmetic(*a, np.invert)

    def do_neg(self, *a):
        self.arithmetic(*a, np.negative)

    def do_abs(self, *a):
        self.arithmetic(*a, np.abs)

    def do_div(self, rest, operands, live):
        if rest[-1] == "f32":
            self.arithmetic(rest, operands, live, np.divide)
        else:
            self.arithmetic(rest, operands, live, lambda a, b: np.fix(a.astype(np.float64) / b))

    def do_rem(self, *a):
        self.arithmetic(*a, np.fmod)

    def do_shl(self, rest, operands, live):
        a, n = self.read(operands[1], rest[0].replace("b", "u")), self.read(operands[2], "u32")
        self.write(operands[0], np.where(n < 8 * WIDTH[rest[0]], a << n.astype(a.dtype), 0).astype(a.dtype), live)

    def do_shr(self, rest, operands, live):
        a, n = self.read(operands[1], rest[0].replace("b", "u")), self.read(operands[2], "u32")
        self.write(operands[0], a >> np.minimum(n, 8 * WIDTH[rest[0]] - 1).astype(a.dtype), live)

    def wide(self, rest):
        return rest[-1] if rest[0] != "wide" else rest[-1].replace("32", "64").replace("16", "32")

    def do_mul(self, rest, operands, live):
        out, kind = self.wide(rest), rest[-1]
        a, b = (self.read(o, kind).astype(typed_name(out)) for o in operands[1:])
        with np.errstate(all="ignore"):
            self.write(operands[0], a * b, live)

    def do_mad(self, rest, operands, live):
        out, kind = self.wide(rest), rest[-1]
        a, b = (self.read(o, kind).astype(typed_name(out)) for o in operands[1:3])
        with np.errstate(all="ignore"):
            self.write(operands[0], a * b + self.read(operands[3], out), live)

    def do_fma(self, rest, operands, live):
        a, b, c = (self.read(o, "f32").astype(np.float64) for o in operands[1:])
        self.write(operands[0], (a * b + c).astype(np.float32), live)

    def do_bfe(self, rest, operands, live):
        a, first, count = (self.read(o, "u32") for o in operands[1:])
        above = np.uint32(32) - count  # of the field, once it is at the upper end: s32 repeats its sign
        self.write(
            operands[0], (a << (above - first)).view(typed_name(rest[0])) >> above.view(typed_name(rest[0])), live
        )

    def do_lop3(self, rest, operands, live):
        a, b, c = (self.read(o, "u32") for o in operands[1:4])
        table, result = int(operands[4], 0), np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        self.write(operands[0], result, live)

    def do_prmt(self, rest, operands, live):
        a, b, selector = (self.read(o, "u64") for o in operands[1:])
        both, result = (a & np.uint64(2**32 - 1)) | b << np.uint64(32), np.zeros(self.threads, np.uint64)
        for i in range(4):
            nibble = selector >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (8 * (nibble & np.uint64(7))) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), 255, 0), byte).astype(np.uint64)
            result |= byte << np.uint64(8 * i)
        self.write(operands[0], result.astype(np.uint32), live)

    def do_selp(self, rest, operands, live):
        a, b = (self.read(o, rest[0]) for o in operands[1:3])
        self.write(operands[0], np.where(self.registers[operands[3]], a, b), live)

    def do_setp(self, rest, operands, live):
        kind = rest[-1].replace("b", "u") if rest[-1] != "bf16" else rest[-1]
        a, b = (self.read(o, kind) for o in operands[1:3])
        self.write(operands[0], COMPARE[rest[0]](a, b), live)

    def do_cvt(self, rest, operands, live):
        to, source = rest[-2], rest[-1]
        if to in ("bf16x2", "f16x2"):
            high, low = (rounded(self.read(o, "f32"), to[:-2]).astype(np.uint32) for o in operands[1:])
            self.write(operands[0], high << np.uint32(16) | low, live)
        elif to in ("bf16", "f16"):
            self.write(operands[0], rounded(self.read(operands[1], "f32"), to), live)
        elif source == "bf16":
            self.write(operands[0], (self.read(operands[1], "u16").astype(np.uint32) << 16).view(np.float32), live)
        elif source == "f16":
            self.write(operands[0], self.read(operands[1], "u16").view(np.float16).astype(np.float32), live)
        elif to == "f32" or source[0] in "us":
            self.write(operands[0], self.read(operands[1], source).astype(typed_name(to)), live)
        else:
            raise NotImplementedError(f"cvt.{'.'.join(rest)}")

    def do_ld(self, rest, operands, live):
        kind = rest[-1]
        if rest[0] == "param":
            value = self.parameters[int(re.search(r"param_(\d+)", operands[1])[1])]
            raw = np.array([value], np.float32).view(np.uint32)[0] if isinstance(value, float) else value & (2**64 - 1)
            self.write(operands[0], typed(np.full(self.threads, raw, np.uint64), kind), live)
            return
        targets = [t.strip() for t in operands[0].strip("{}").split(",")]
        size = WIDTH[kind]
        memory, at = self.place_of(rest[0], self.address(operands[1]), size * len(targets), live)
        for i, target in enumerate(targets):
            value = np.zeros(self.threads, f"u{size}")
            value[live] = np.ascontiguousarray(memory[at[:, size * i : size * (i + 1)]]).view(f"u{size}")[:, 0]
            self.write(target, value, live)

    def do_st(self, rest, operands, live):
        kind = rest[-1]
        sources = [s.strip() for s in operands[1].strip("{}").split(",")]
        size = WIDTH[kind]
        memory, at = self.place_of(rest[0], self.address(operands[0]), size * len(sources), live)
        values = np.stack([self.read(s, "u64").astype(f"u{size}") for s in sources], 1)[live]
        memory[at] = np.ascontiguousarray(values).view(np.uint8)

    def do_atom(self, rest, operands, live):
        if rest[-2:] != ["add", "u32"]:
            raise NotImplementedError(f"atom.{'.'.join(rest)}")
        before = np.zeros(self.threads, np.uint32)
        for thread in np.flatnonzero(live):
            one = np.arange(self.threads) == thread
            memory, at = self.place_of("global", self.address(operands[1]), 4, one)
            word = memory[at[0]].view(np.uint32)
            before[thread] = word[0]
            memory[at[0]] = (word + self.read(operands[2], "u32")[one]).view(np.uint8)
        self.write(operands[0], before, live)

    def do_cp(self, rest, operands, live):
        if rest[1] in ("commit_group", "wait_group"):
            return
        size = int(operands[2], 0)
        wanted = self.read(operands[3], "u32") if len(operands) > 3 else np.full(self.threads, size)
        target, at = self.place_of("shared", self.address(operands[0]), size, live)
        target[at] = 0  # what is not asked for
        some = live & (wanted > 0)
        if some.any():
            source, of = self.place_of("global", self.address(operands[1]), size, some)
            target, at = self.place_of("shared", self.address(operands[0]), size, some)
            target[at] = source[of]

    def do_shfl(self, rest, operands, live):
        own = np.arange(self.threads)
        if rest[1] == "bfly":
            other = own ^ int(operands[2])
        elif rest[1] == "idx" and operands[3] == "31":
            other = own & ~31 | self.read(operands[2], "s32") & 31
        else:
            raise NotImplementedError(f"shfl.{'.'.join(rest)} {operands}")
        self.write(operands[0], self.read(operands[1], "u32")[other], live)

    def do_redux(self, rest, operands, live):
        if rest != ["sync", "max", "s32"]:
            raise NotImplementedError(f"redux.{'.'.join(rest)}")
        values, lanes = self.read(operands[1], "s32").reshape(-1, 1, 32), self.read(operands[2], "u32")
        among = (lanes[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).reshape(-1, 32, 32)
        self.write(operands[0], np.where(among, values, np.iinfo(np.int32).min).max(2).reshape(-1), live)

    def do_ex2(self, rest, operands, live):
        self.arithmetic(rest, operands, live, np.exp2)

    def do_createpolicy(self, rest, operands, live):
        self.write(operands[0], np.zeros(self.threads, np.uint64), live)

    def do_bar(self, *_):
        pass

    def do_griddepcontrol(self, *_):
        pass

    def do_ldmatrix(self, rest, operands, live):
        targets = [t.strip() for t in operands[0].strip("{}").split(",")]
        addresses = self.address(operands[1]).reshape(-1, 32)
        for i, target in enumerate(targets):
            rows = addresses[:, 8 * i : 8 * (i + 1)].reshape(-1)
            at = rows[:, None] + np.arange(16)
            if (at < 0).any() or (at >= len(self.shared)).any():
                raise IndexError("outside of shared memory")
            matrix = np.ascontiguousarray(self.shared[at]).view(np.uint16).reshape(-1, 8, 8)
            if "trans" in rest:
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            self.write(target, matrix.reshape(-1, 32, 2).view(np.uint32).reshape(-1), live)

    def do_mma(self, rest, operands, live):
        """m16n8k32 of int8, m16n8k16 of 16-bit floats: fragments to matrices, and back."""
        d, a, b, c = ([self.read(r.strip(), "u32").reshape(-1, 32) if i else r.strip()
                       for r in group.strip("{}").split(",")] for i, group in enumerate(operands))  # fmt: skip
        shape, kinds = next(r for r in rest if r.startswith("m16n8")), rest[-4:]
        if (shape, kinds[1]) not in (("m16n8k32", "s8"), ("m16n8k16", "bf16"), ("m16n8k16", "f16")):
            raise NotImplementedError(f"mma.{'.'.join(rest)}")
        left, right = fragments(a, kinds[1], 16), fragments(b, kinds[2], 8)
        out = np.int32 if kinds[0] == "s32" else np.float32
        sums = np.stack(c, 2).view(out).reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)
        sums = sums.astype(np.float64) + left @ right.transpose(0, 2, 1)
        result = sums.astype(out).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 32, 4)
        for i, target in enumerate(d):
            self.write(target, np.ascontiguousarray(result[:, :, i]).reshape(-1), live)


def fragments(words, kind, rows):
    """Registers of a warp's lanes -> [warps, rows, K] float64. A lane has a row in four, and of it neighbours along K;
    registers count rows by eight, then halves of K.
    """
    per, high = (4 if kind == "s8" else 2), rows // 8
    raw = np.stack(words, 2).reshape(-1, 8, 4, len(words) // high, high)
    values = numbers(np.ascontiguousarray(raw), kind).reshape(*raw.shape, per)
    # warps, row % 8, lane % 4, half, row // 8, neighbour -> row // 8, row % 8, half, lane % 4, neighbour
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(len(raw), rows, -1)


def numbers(words, kind):
    """What a register holds, as float64."""
    if kind == "s8":
        return words.view(np.int8).astype(np.float64)
    halves = words.view(np.uint16)
    if kind == "f16":
        return halves.view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(value, kind):
    """fp32 -> the bits of bf16 or fp16, ties to even."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    bits = value.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def typed_name(kind):
    letter = {"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]]
    return f"{letter}{WIDTH[kind]}" if kind != "bf16" else "u2"


def typed(raw, kind):
    """The low bits of 64 as a type."""
    size = WIDTH[kind]
    return raw.astype(f"u{size}").view(typed_name(kind))
