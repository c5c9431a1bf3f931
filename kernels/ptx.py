"""Single PTX instructions, and short runs of them, as functions for Gluon kernels.

For what the language has no word for: waits and copies of one warp while others do something else, words that other
programs wait for, tensor cores fed from addresses in shared memory.  An address is a number: int32 in shared memory,
int64 in global memory.  Each thread does what it is told unless a function says who does it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Waits give up by a trap, which the host sees as an error, when what they wait for can no longer come.  They count
# turns and not time, so that a program that was not running while others did has not used up any.
POLLS = 1 << 22  # of global memory, 0.7 us each or more: 3 s
TRIES = 1 << 26  # of an mbarrier, 30 ns each at least: 2 s


@gluon.jit
def _asm(code: gl.constexpr, constraints: gl.constexpr, operands, dtype: gl.constexpr):
    """One result of inline PTX that is neither dropped nor moved across other such code."""
    return gl.inline_asm_elementwise(code, constraints, operands, dtype=dtype.value, is_pure=False, pack=1)


@gluon.constexpr_function
def _int32(count):
    return (gl.int32,) * count


def _by_thread_0(code):
    """Code whose instructions with @p are thread 0's."""
    start = "{ .reg .pred p; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 p, thread, 0;"
    return gl.constexpr(f"{start} {code} mov.b32 $0, 0; }}")


# Who and where.


@gluon.jit
def warp_index():
    """The number of the thread's warp, as a scalar: what depends on it may differ between warps."""
    return _asm("mov.u32 $0, %tid.x; shr.u32 $0, $0, 5; // $1", "=r,r", [0], gl.int32)


@gluon.jit
def shared_base():
    """The address of the kernel's first allocation in shared memory."""
    return _asm("mov.u32 $0, global_smem; // $1", "=r,r", [0], gl.int32)


# Shared memory.

# $1 address, $2 value, $3 whether
_STORE = gl.constexpr("{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }")
# $1 address, $2 and $3 values, $4 whether they are added to what is there, $5 whether
_ADD_SUMS = gl.constexpr("""{
    .reg .pred p, more;
    .reg .f32 a, b;
    setp.ne.b32 p, $5, 0;
    setp.ne.and.b32 more, $4, 0, p;
    mov.f32 a, 0f00000000;
    mov.f32 b, 0f00000000;
    @more ld.shared.v2.f32 {a, b}, [$1];
    add.f32 a, a, $2;
    add.f32 b, b, $3;
    @p st.shared.v2.f32 [$1], {a, b};
    mov.b32 $0, 0;
}""")
# $1 address, $2 ... $13 values
_STORE_12 = _by_thread_0(" ".join(f"@p st.shared.b64 [$1 + {8 * i}], ${2 + i};" for i in range(12)))
# $1 address, $2 value
_STORE_FLAG = _by_thread_0("@p st.volatile.shared.b32 [$1], $2;")


@gluon.jit
def store_shared(address, value, mask):
    """32 bits to shared memory, where mask is true."""
    _asm(_STORE, "=r,r,r,r", [address, value.to(gl.int32, bitcast=True), mask.to(gl.int32)], gl.int32)


@gluon.jit
def store_shared_pair(address, first, second):
    """Two int32 to shared memory."""
    _asm("st.shared.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0;", "=r,r,r,r", [address, first, second], gl.int32)


@gluon.jit
def zero_shared(address):
    """16 bytes of zeros to shared memory."""
    _asm("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, 0;", "=r,r,r", [address, 0], gl.int32)


@gluon.jit
def store_12_pointers(address, pointers):
    """Twelve pointers to shared memory, by thread 0."""
    _asm(_STORE_12, "=r,r,l,l,l,l,l,l,l,l,l,l,l,l", (address,) + pointers, gl.int32)


@gluon.jit
def load_shared(address):
    """A float32 from shared memory."""
    return _asm("ld.shared.f32 $0, [$1];", "=f,r", [address], gl.float32)


@gluon.jit
def load_shared_words(address):
    """A tuple of four int32, 16 bytes of shared memory."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [address],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_shared_int64(address):
    return _asm("ld.shared.b64 $0, [$1];", "=l,r", [address], gl.int64)


@gluon.jit
def store_flag(address, value):
    """An int32 that other warps look at without a barrier, by thread 0."""
    _asm(_STORE_FLAG, "=r,r,r", [address, value], gl.int32)


@gluon.jit
def load_flag(address):
    return _asm("ld.volatile.shared.b32 $0, [$1];", "=r,r", [address], gl.int32)


@gluon.constexpr_function
def _sum_code(count):
    """$0 = the sum of count (a multiple of four) float32 from $1 on in shared memory."""
    lines = ["{ .reg .f32 v<4>, w<4>; ld.shared.v4.f32 {v0, v1, v2, v3}, [$1];"]
    for first in range(4, count, 4):
        lines += [f"ld.shared.v4.f32 {{w0, w1, w2, w3}}, [$1 + {4 * first}];"]
        lines += [f"add.f32 v{i}, v{i}, w{i};" for i in range(4)]
    return "\n".join(lines + ["add.f32 v0, v0, v1; add.f32 v2, v2, v3; add.f32 $0, v0, v2; }"])


@gluon.jit
def sum_shared(address, COUNT: gl.constexpr):
    """The sum of COUNT float32, a multiple of four, that lie at an address in shared memory."""
    return _asm(_sum_code(COUNT), "=f,r", [address], gl.float32)


@gluon.constexpr_function
def _pair_sums_code(count, stride):
    """$0 and $1 = the sums of count pairs of float32, stride bytes apart, from $2 on in shared memory."""
    lines = [f"{{ .reg .f32 v<{2 * count}>;"]
    lines += [f"ld.shared.v2.f32 {{v{2 * i}, v{2 * i + 1}}}, [$2 + {stride * i}];" for i in range(count)]
    for i in range(2):
        lines += [f"add.f32 v{i}, v{i}, v{2 * j + i};" for j in range(1, count)] + [f"mov.f32 ${i}, v{i};"]
    return "\n".join([*lines, "}"])


@gluon.jit
def sum_pairs(address, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """The sums of the first and of the second of COUNT pairs of float32, STRIDE bytes apart in shared memory."""
    return gl.inline_asm_elementwise(
        _pair_sums_code(COUNT, STRIDE), "=&f,=&f,r", [address],
        dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def add_sums(address, sums, more, mask):
    """Two float32 to shared memory where mask is true; with more, added to what is there."""
    _asm(_ADD_SUMS, "=r,r,f,f,r,r", (address,) + sums + (more.to(gl.int32), mask.to(gl.int32)), gl.int32)


# Barriers.

# $1 mbarrier, $2 arrivals that end a phase
_MBARRIER_INIT = _by_thread_0("@p mbarrier.init.shared::cta.b64 [$1], $2;")
_MBARRIER_FENCE = gl.constexpr("fence.mbarrier_init.release.cluster; fence.proxy.async; mov.b32 $0, 0; // $1")
# $1 mbarrier; by lane 0 when the whole warp has come here
_MBARRIER_ARRIVE = gl.constexpr("""{
    .reg .pred p;
    .reg .b32 lane;
    mov.u32 lane, %laneid;
    setp.eq.u32 p, lane, 0;
    bar.warp.sync 0xffffffff;
    @p mbarrier.arrive.shared::cta.b64 _, [$1];
    mov.b32 $0, 0;
}""")
# $1 mbarrier, $2 parity of the phase
_MBARRIER_WAIT = gl.constexpr(f"""{{
    .reg .pred p;
    .reg .b32 turns;
    mov.b32 turns, 0;
again:
    mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2;
    @p bra done;
    add.u32 turns, turns, 1;
    setp.lt.u32 p, turns, {TRIES};
    @p bra again;
    trap;
done:
    mov.b32 $0, 0;
}}""")


@gluon.jit
def barrier(number, threads):
    """Wait until so many threads have come to the barrier of this number."""
    _asm("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [number, threads], gl.int32)


@gluon.jit
def warp_barrier():
    """Wait for the other lanes of the warp, and see what they have stored in shared memory."""
    _asm("bar.warp.sync 0xffffffff; mov.b32 $0, 0; // $1", "=r,r", [0], gl.int32)


@gluon.jit
def mbarrier_init(address, arrivals):
    """Make 8 bytes of shared memory an mbarrier, whose phases end after so many arrivals; by thread 0."""
    _asm(_MBARRIER_INIT, "=r,r,r", [address, arrivals], gl.int32)


@gluon.jit
def mbarrier_fence():
    """Let copies see the mbarriers that were made, and what was stored in shared memory."""
    _asm(_MBARRIER_FENCE, "=r,r", [0], gl.int32)


@gluon.jit
def mbarrier_arrive(address):
    """Arrive once for the whole warp, when all its lanes are done with what they did before."""
    _asm(_MBARRIER_ARRIVE, "=r,r", [address], gl.int32)


@gluon.jit
def mbarrier_wait(address, parity):
    """Wait until the phase of this parity has ended; before the first phase that of parity 1 has."""
    _asm(_MBARRIER_WAIT, "=r,r,r", [address, parity], gl.int32)


# Copies from global memory that no thread waits for.

# $1 to, $2 from, $3 bytes of a row, $4 whether, $5 mbarrier, $6 bytes of all rows, $7 policy
_COPY_ROWS = gl.constexpr("""{
    .reg .pred p, first;
    .reg .b32 lane;
    mov.u32 lane, %laneid;
    setp.eq.u32 first, lane, 0;
    @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$5], $6;
    bar.warp.sync 0xffffffff;
    setp.ne.b32 p, $4, 0;
    @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$1], [$2], $3, [$5], $7;
    mov.b32 $0, 0;
}""")


@gluon.jit
def evict_first():
    """The cache policy for what is read once."""
    return _asm("createpolicy.fractional.L2::evict_first.b64 $0, 1.0; // $1", "=l,r", [0], gl.int64)


@gluon.jit
def evict_normal():
    """The cache policy for what others read soon."""
    return _asm("createpolicy.fractional.L2::evict_normal.b64 $0, 1.0; // $1", "=l,r", [0], gl.int64)


@gluon.jit
def copy_rows(target, source, row_bytes, mask, mbarrier, all_bytes, policy):
    """A lane's row_bytes where mask is true, to shared memory; mbarrier's phase ends when those of all are there.

    Addresses and row_bytes are multiples of 16; all_bytes is what the lanes copy together.
    """
    operands = [target, source, row_bytes, mask.to(gl.int32), mbarrier, all_bytes, policy]
    _asm(_COPY_ROWS, "=r,r,l,r,r,r,r,l", operands, gl.int32)


# Words in global memory.


@gluon.jit
def load_float(address):
    """A float32 from global memory."""
    return _asm("ld.global.f32 $0, [$1];", "=f,l", [address], gl.float32)


@gluon.constexpr_function
def _load_code(count, width, stride, wait):
    """$0 ... = `count` groups of `width` words, each `stride` bytes behind the one before it, from address a on.

    Of the groups only the first n are loaded, the others are 0; with wait, again until no word of them is 0.
    """
    words = [f"${i}" for i in range(count * width)]
    address, n = f"${len(words)}", f"${len(words) + 1}"
    groups = [words[i * width : (i + 1) * width] for i in range(count)]
    load = "ld.relaxed.gpu.global" if wait else "ld.global"
    lines = ["{", ".reg .pred p, q, missing;", ".reg .b32 turns;", "mov.b32 turns, 0;"]
    lines += [f"mov.b32 {word}, 0;" for word in words] + ["again:"]
    for i, group in enumerate(groups):
        lines += [f"setp.gt.s32 p, {n}, {i};"]
        if wait:  # only those that were not there yet
            lines += [f"setp.eq.b32 q, {group[0]}, 0;"] + [f"setp.eq.or.b32 q, {word}, 0, q;" for word in group[1:]]
            lines += ["and.pred p, p, q;"]
        for first in range(0, width, 4):
            part = group[first : first + 4]
            vector = f".v{len(part)}.b32 {{{', '.join(part)}}}" if len(part) > 1 else f".b32 {part[0]}"
            lines += [f"@p {load}{vector}, [{address} + {i * stride + 4 * first}];"]
    if wait:
        lines += ["setp.ne.b32 missing, 0, 0;"]
        for i, group in enumerate(groups):
            lines += [f"setp.gt.s32 q, {n}, {i};"]
            for word in group:
                lines += [f"setp.eq.and.b32 p, {word}, 0, q;", "or.pred missing, missing, p;"]
        lines += ["@!missing bra done;", "add.u32 turns, turns, 1;", f"setp.lt.u32 p, turns, {POLLS};"]
        lines += ["@p bra again;", "trap;", "done:"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _load_constraints(count):
    return ",".join(["=&r"] * count + ["l", "r"])


@gluon.jit
def load_words(
    address, n, COUNT: gl.constexpr, WIDTH: gl.constexpr, STRIDE: gl.constexpr, WAIT: gl.constexpr = False
):  # fmt: skip
    """A tuple of COUNT * WIDTH int32: COUNT groups of adjacent words, STRIDE bytes apart, of which the first n exist.

    The others are 0.  With WAIT, wait until no word of those that exist is 0.
    """
    return gl.inline_asm_elementwise(
        _load_code(COUNT, WIDTH, STRIDE, WAIT), _load_constraints(COUNT * WIDTH), [address, n],
        dtype=_int32(COUNT * WIDTH), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _load_rows_code(rows, count, width, stride, wait):
    """$0 ... = the words of `_load_code` of each of `rows` rows; with wait those that are 0, until none is."""
    words = [f"${i}" for i in range(rows * count * width)]
    groups = [words[i : i + width] for i in range(0, len(words), width)]
    address, n, row_stride = (f"${len(words) + i}" for i in range(3))
    lines = ["{", ".reg .pred p, missing;", ".reg .b32 turns, least;", f".reg .b64 row<{rows}>;"]
    lines += [f"mov.b64 row0, {address};"]
    lines += [f"add.s64 row{i}, row{i - 1}, {row_stride};" for i in range(1, rows)]
    loads, checks = [], []
    for i, group in enumerate(groups):
        vector = f".v{width}.b32 {{{', '.join(group)}}}" if width > 1 else f".b32 {group[0]}"
        load = f"@p ld.relaxed.gpu.global{vector}, [row{i // count} + {i % count * stride}];"
        exists = f"setp.gt.s32 p, {n}, {i % count};"
        least = [f"mov.b32 least, {group[0]};"] + [f"min.u32 least, least, {word};" for word in group[1:]]
        least += ["setp.eq.b32 p, least, 0;", f"setp.gt.and.s32 p, {n}, {i % count}, p;"]
        loads += [*(least if wait else [exists]), load]
        checks += [*least, "or.pred missing, missing, p;"]
    if not wait:
        return "\n".join([*lines, *(f"mov.b32 {word}, 0;" for word in words), *loads, "}"])
    lines += ["mov.b32 turns, 0;", "again:", "setp.ne.b32 missing, 0, 0;", *checks, "@!missing bra done;", *loads]
    lines += ["add.u32 turns, turns, 1;", f"setp.lt.u32 p, turns, {POLLS};", "@p bra again;", "trap;", "done:"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _wait_for_rows_constraints(count):
    return ",".join([_load_constraints(count), "l", *map(str, range(count))])


@gluon.jit
def load_rows(
    address, n, row_stride, ROWS: gl.constexpr, COUNT: gl.constexpr, WIDTH: gl.constexpr, STRIDE: gl.constexpr
):  # fmt: skip
    """The tuple of `load_words`, WIDTH being at most 4, of each of ROWS rows row_stride bytes apart.

    A word that is not there yet is 0, and one for `wait_for_rows`.
    """
    return gl.inline_asm_elementwise(
        _load_rows_code(ROWS, COUNT, WIDTH, STRIDE, False), _load_constraints(ROWS * COUNT * WIDTH) + ",l",
        [address, n, row_stride], dtype=_int32(ROWS * COUNT * WIDTH), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_for_rows(
    words, address, n, row_stride,
    ROWS: gl.constexpr, COUNT: gl.constexpr, WIDTH: gl.constexpr, STRIDE: gl.constexpr,
):  # fmt: skip
    """words, of `load_rows`, when none of those that exist is 0 any more."""
    return gl.inline_asm_elementwise(
        _load_rows_code(ROWS, COUNT, WIDTH, STRIDE, True), _wait_for_rows_constraints(ROWS * COUNT * WIDTH),
        (address, n, row_stride) + words, dtype=_int32(ROWS * COUNT * WIDTH), is_pure=False, pack=1,
    )  # fmt: skip


# $1 address, $2 value, $3 whether
_STORE_WORD = gl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.relaxed.gpu.global.b32 [$1], $2; mov.b32 $0, 0; }"
)


@gluon.jit
def store_word(address, value, mask):
    """32 bits to global memory, where mask is true; programs may be waiting for them."""
    _asm(_STORE_WORD, "=r,l,r,r", [address, value.to(gl.int32, bitcast=True), mask.to(gl.int32)], gl.int32)


# Between the lanes of a warp.


@gluon.constexpr_function
def _butterfly_code(distances):
    """$0 = the sum of $1 over the lanes that differ in these bits of their number."""
    lines = ["{ .reg .f32 v, w; mov.f32 w, $1;"]
    lines += [f"shfl.sync.bfly.b32 v, w, {d}, 31, 0xffffffff; add.f32 w, w, v;" for d in distances]
    return "\n".join(lines + ["mov.f32 $0, w; }"])


@gluon.jit
def sum_lanes(value, DISTANCES: gl.constexpr):
    """The sum of a float32 over the lanes whose numbers differ in the bits DISTANCES, for each of these lanes."""
    return _asm(_butterfly_code(DISTANCES), "=f,f", [value], gl.float32)


@gluon.jit
def other_lane(value, distance: gl.constexpr):
    """The float32 of the lane whose number differs in the bit distance."""
    return _asm("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [value, distance], gl.float32)


@gluon.jit
def highest_lane(value):
    """The largest int32 of a warp; none is negative."""
    return _asm("redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r", [value], gl.int32)


# Numbers.

# bytes 1 and 0 of $2 ... $5, the latter less 128
_DIGITS = gl.constexpr("""{
    .reg .b32 a, b, c;
    prmt.b32 a, $2, $3, 0x5410;
    prmt.b32 b, $4, $5, 0x5410;
    prmt.b32 c, a, b, 0x6420;
    prmt.b32 $0, a, b, 0x7531;
    xor.b32 $1, c, 0x80808080;
}""")
# bytes 2, 1 and 0 of $3 ... $6
_TRANSPOSE = gl.constexpr("""{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $3, $4, 0x5140;
    prmt.b32 b, $5, $6, 0x5140;
    prmt.b32 c, $3, $4, 0x0062;
    prmt.b32 d, $5, $6, 0x0062;
    prmt.b32 $0, c, d, 0x5410;
    prmt.b32 $1, a, b, 0x7632;
    prmt.b32 $2, a, b, 0x5410;
}""")


@gluon.jit
def pack_bfloat16(low, high):
    """Two float32 as bfloat16 in the halves of an int32."""
    return _asm("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32)


@gluon.jit
def max_of_magnitudes(peak, pair):
    """Of two bfloat16 in an int32 each the larger: peak, or the magnitude in pair; NaN is the largest."""
    code: gl.constexpr = "{ .reg .b32 a; and.b32 a, $2, 0x7fff7fff; max.NaN.bf16x2 $0, $1, a; }"
    return _asm(code, "=r,r,r", [peak, pair], gl.int32)


@gluon.jit
def transpose_bytes(a, b, c, d):
    """Of four int32, their bytes 2, their bytes 1 and their bytes 0, as an int32 each."""
    return gl.inline_asm_elementwise(
        _TRANSPOSE, "=&r,=&r,=&r,r,r,r,r", [a, b, c, d],
        dtype=(gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def multiply_bfloat16(pair, other):
    """Two bfloat16 in an int32 times two others, rounded."""
    return _asm("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [pair, other], gl.int32)


@gluon.jit
def two_digits(a, b, c, d):
    """Of four int32 that are 128 more than a number of 16 bits: its two signed digits in base 256, the higher first.

    The other bits of them do not count.  Returns two int32, of four bytes each.
    """
    return gl.inline_asm_elementwise(
        _DIGITS, "=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.constexpr_function
def _tile_code(size, steps):
    """$0 ... $3 = $7 ... $10 plus products of w at $4 and x at $5, which lanes with $6 load, 64 bytes a step apart."""
    number, zero = (".b32", "0") if size == 1 else (".f32", "0f00000000")
    shape = {1: "m16n8k32.row.col.s32.s8.s8.s32", 2: "m16n8k16.row.col.f32.bf16.bf16.f32", 4: None}[size]
    lines = ["{", ".reg .b32 w<4>, x<4>, none;", f".reg {number} unused<4>, zero;", ".reg .pred p;"]
    lines += ["setp.ne.b32 p, $6, 0;", f"mov{number} zero, {zero};", "mov.b32 none, 0;"]
    lines += [f"mov.b32 x{i}, 0;" for i in range(4)]
    for step in range(steps):
        lines += [f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$4 + {64 * step}];"]
        lines += [f"@p ld.shared.v4.b32 {{x0, x1, x2, x3}}, [$5 + {64 * step}];"]
        sums = ["$7", "$8", "$9", "$10"] if step == 0 else ["$0", "$1", "$2", "$3"]
        if size == 4:
            lines += [f"fma.rn.f32 ${i}, w{i}, x{i}, {sums[i]};" for i in range(4)]
        else:
            # the left operand has 16 rows, of which the lower 8, here none, would give the results that are not used
            lines += [
                f"mma.sync.aligned.{shape} {{${i}, ${i + 1}, unused{i}, unused{i + 1}}}, "
                f"{{x{i}, none, x{i + 1}, none}}, {{w{i}, w{i + 1}}}, {{{sums[i]}, {sums[i + 1]}, zero, zero}};"
                for i in (0, 2)
            ]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _tile_constraints(size):
    kind = "r" if size == 1 else "f"
    return ",".join([f"=&{kind}"] * 4 + ["r"] * 3 + [kind] * 4)


@gluon.jit
def multiply_tile(sums, w, x, mask, SIZE: gl.constexpr, STEPS: gl.constexpr):
    """sums, a tuple of four, plus the products of a warp's 64 * STEPS bytes of eight rows of weights with x.

    A lane reads 16 bytes at w, of row lane // 4, and at x every 64 bytes, its lane % 4 being its place in those; of x
    only where mask is true, else 0.  SIZE is the bytes of a weight.  With 4, float32: the lane's four sums are of the
    row that it reads.  Else bfloat16 or int8, for tensor cores, w as the right operand [columns, 8]: the lanes with
    the same lane // 4 read the same row of x, and sums 0 and 1, and again 2 and 3, are those of its products with the
    rows 2 * (lane % 4) and 2 * (lane % 4) + 1 of the weights.
    """
    return gl.inline_asm_elementwise(
        _tile_code(SIZE, STEPS), _tile_constraints(SIZE), [w, x, mask.to(gl.int32), sums[0], sums[1], sums[2], sums[3]],
        dtype=(sums[0].dtype, sums[1].dtype, sums[2].dtype, sums[3].dtype), is_pure=False, pack=1,
    )  # fmt: skip


_FULL_TILE_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 12))


@gluon.constexpr_function
def _full_tile_code(steps):
    """$0 ... $7 = $12 ... $19 plus products of w at $8 and x at $9 and $10, which lanes with $11 load."""
    lines = ["{", ".reg .b32 w<4>, x<4>, y<4>;", ".reg .pred p;", "setp.ne.b32 p, $11, 0;"]
    lines += [f"mov.b32 {v}{i}, 0;" for v in "xy" for i in range(4)]
    for step in range(steps):
        lines += [f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$8 + {64 * step}];"]
        lines += [f"@p ld.shared.v4.b32 {{x0, x1, x2, x3}}, [$9 + {64 * step}];"]
        lines += [f"@p ld.shared.v4.b32 {{y0, y1, y2, y3}}, [$10 + {64 * step}];"]
        for i in (0, 2):
            first = 2 * i
            results = ", ".join(f"${first + j}" for j in range(4))
            sums = ", ".join(f"${(12 if step == 0 else 0) + first + j}" for j in range(4))
            lines += [
                f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{{results}}}, "
                f"{{x{i}, y{i}, x{i + 1}, y{i + 1}}}, {{w{i}, w{i + 1}}}, {{{sums}}};"
            ]
    return "\n".join([*lines, "}"])


@gluon.jit
def multiply_full_tile(sums, w, x, y, mask, STEPS: gl.constexpr):
    """`multiply_tile` of int8 with two rows of x for each lane // 4, at x and at y: sums, a tuple of eight, plus those.

    Sums 0 and 1, and again 4 and 5, are those of x; 2 and 3, 6 and 7 those of y.
    """
    return gl.inline_asm_elementwise(
        _full_tile_code(STEPS), _FULL_TILE_CONSTRAINTS,
        [w, x, y, mask.to(gl.int32), sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]],
        dtype=_int32(8), is_pure=False, pack=1,
    )  # fmt: skip
