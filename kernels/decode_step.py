"""One token through all layers of the model as a single kernel, whose programs stay on their multiprocessors.

At batch 1 every weight is read for one product, so that the memory is all that counts, and must never rest.  There is
one program a multiprocessor, and it owns a share of the rows of every matrix.

Ring.  In each program one warp, the producer, copies the program's rows of all matrices of all layers, one endless
sequence of tiles, into a ring of slots in shared memory, and eight warps consume them.  The sequence does not depend
on any activation: while a program waits for the others, weights of what comes next keep coming.

Words.  Activations travel between programs as words of 32 bits, a float32 or two bfloat16, each in a place of its own
in global memory that is zero before: who needs a word reads it until it is not zero, and a zero is sent as minus zero.
A word that is there is right, so there is no barrier between programs, no fence and no atomic, and no place is written
twice, so none can be reused too early.  All programs run at the same time and go through the stages in the same order,
and a stage needs words of the ones before it only (of attention: of parts that need no others), so it always ends.

Tensor cores.  They multiply the 8 rows of a tile with a left operand that has 16 rows where one is needed.  Others of
these are used for precision: a float32 input is the sum of parts, two or three bfloat16 or, for int8 weights, three
digits in base 256, and each part is a row.  That costs no more than one, and leaves 16 to 24 bits of an input.

Where what is, is counted in bytes of weights: a row of a matrix is cut into chunks of 2 KB, of which each consumer warp
has 256 bytes in every tile, and so the inputs that belong to these, which no other warp needs.  Consumers wait for each
other only where their sums are added up, once a product.

With the sizes of a model, as in the docstrings: K kv heads with G query heads each, of H numbers, N = K*G*H and
Q = K*(G+2)*H together; D and F numbers in the stream and between w_gate_up and w_down; S slots, V logits.
"""

import math

import jax
import jax.extend
import jax.numpy as jnp
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from jaxllm.kernels import ptx
from jaxllm.kernels.launch import launch

WARPS = gl.constexpr(16)  # a power of two, as it must be: those behind the producer end at once
CONSUMER_WARPS = gl.constexpr(8)  # the producer is the next one
THREADS = 32 * CONSUMER_WARPS  # of the consumers
REGISTERS = 128  # a thread: all that there are, for 512 threads
WARP_BYTES = gl.constexpr(256)  # of a row of a tile, that a warp multiplies
LANE_BYTES = gl.constexpr(8)  # of these, whose inputs a lane receives
CHUNK = CONSUMER_WARPS * WARP_BYTES  # bytes of a row that are in a tile
# bytes from a row of a tile to the next: the 16 bytes that lanes read of eight rows are in different banks
PITCH = CHUNK + 64
TILE = 8 * PITCH  # bytes of a slot: eight rows
SLOTS = range(4, 33)  # of the ring, as many as there is room for
# Tiles under way from memory: 3, of 16 KB, for each multiprocessor keep it busy.  Words queue behind them, so that they
# are fewer while the program waits for words.
UNDER_WAY = gl.constexpr(3)
UNDER_WAY_WAITING = gl.constexpr(2)
COPIES = gl.constexpr(2)  # of all words, each read by every second program: one place would have too many readers
MOST_SPLITS = 8  # of the slots of a query head
SPLIT = gl.constexpr(256)  # slots for each of which there is a split
DEEP = gl.constexpr(4)  # slots of which a lane loads k and v at a time
PREFETCHED = gl.constexpr(65536)  # bytes of k, and of v, that a program brings into L2 before it needs them
SHARED_MEMORY = 226 << 10  # bytes, of 227 KB
# an address in the table for each of a layer's arrays: scales are behind the matrix that they belong to
ATTN_NORM, WQKV, WO, FFN_NORM, W_GATE_UP, W_DOWN, KEYS, VALUES, POINTERS = map(
    gl.constexpr, (0, 1, 3, 5, 6, 8, 10, 11, 12)
)


def decode_step(x, cos, sin, positions, layers, norm, output, output_scale=None, eps=0.0):
    """Logits float32 [1, V] behind one token, and the cache with it: ([1, V], L arrays k, L arrays v).

    x [1, 1, D] is the token's embedding, float32 or bfloat16, as is all that is no weight and no scale; cos and sin
    float32 [1, 1, H/2] and positions int32 [1, 1] are as in `reference.rope_store`; output is [V, D].  A layer is
    (attn_norm [D], wqkv [K, G+2, H, D], wo [D, N*H], ffn_norm [D], w_gate_up [2, F, D], w_down [D, F], scales, k, v)
    with k and v [1, K, S, H] and, with int8 weights, scales: the four matrices' float32 scales, one a row, in that
    order; else None.  Weights are float32 (with float32 x), bfloat16, or int8.

    Needs compute capability 9.0, H a power of two of which k has at most 512 bytes, rows of all matrices of a multiple
    of 16 bytes, four slots of the ring, and of each layer's matrices no more rows a program than there are words for
    its consumers' threads.  On 114 or more multiprocessors that is D, N and F up to 28672, or, of bfloat16 weights with
    float32 x, 20480; ValueError for what does not fit.
    """
    _, wqkv, wo, _, w_gate_up, w_down, scales, k, _ = layers[0]
    K, parts, H, D = wqkv.shape
    plan = make_plan(
        LAYERS=len(layers), D=D, K=K, G=parts - 2, H=H, F=w_gate_up.shape[1], V=output.shape[0], S=k.shape[2],
        WEIGHT_BYTES=wqkv.dtype.itemsize, PER_WORD=4 // x.dtype.itemsize, SCALED=scales is not None, EPS=eps,
        PROGRAMS=jax.extend.backend.get_default_device().core_count,
    )  # fmt: skip
    arrays, aliases = [], {}
    for number, (attn_norm, wqkv, wo, ffn_norm, w_gate_up, w_down, scales, k, v) in enumerate(layers):
        s = scales or (wqkv, wo, w_gate_up, w_down)  # not used
        arrays += [attn_norm, wqkv, s[0], wo, s[1], ffn_norm, w_gate_up, s[2], w_down, s[3], k, v]
        aliases |= {4 + len(arrays) - 2: 2 + number, 4 + len(arrays) - 1: 2 + len(layers) + number}
    arrays += [norm, output, output if output_scale is None else output_scale]
    arrays += [norm] * (-len(arrays) % POINTERS.value)  # the table is written twelve at a time
    words = jnp.zeros((COPIES.value * plan.COPY_BYTES.value // 4,), jnp.int32)
    logits, _, *cache = launch(
        _decode_step,
        x,
        cos,
        sin,
        positions,
        tuple(arrays),
        words,
        out=(
            jax.ShapeDtypeStruct((1, output.shape[0]), jnp.float32),
            jax.ShapeDtypeStruct(words.shape, words.dtype),
            *(jax.ShapeDtypeStruct(k.shape, k.dtype) for *_, k, _ in layers),
            *(jax.ShapeDtypeStruct(v.shape, v.dtype) for *_, v in layers),
        ),
        grid=(plan.PROGRAMS.value,),
        aliases=aliases | {4 + len(arrays): 1},
        num_warps=WARPS.value,
        num_stages=1,
        # checks for overflow, which nobody looks at, are half of the operations that there are to compile
        backend_options={"maxnreg": REGISTERS, "sanitize_overflow": False},
        plan=plan,
    )
    return logits, tuple(cache[: len(layers)]), tuple(cache[len(layers) :])


class Plan:
    """What a kernel is compiled for: numbers by name, as constants for kernels."""

    def __init__(self, **numbers):
        self._numbers = tuple(sorted(numbers.items()))
        for name, number in numbers.items():
            setattr(self, name, gl.constexpr(number))

    def __repr__(self):
        return f"Plan{self._numbers!r}"

    def __hash__(self):
        return hash(self._numbers)

    def __eq__(self, other):
        return isinstance(other, Plan) and self._numbers == other._numbers


def make_plan(*, LAYERS, D, K, G, H, F, V, S, WEIGHT_BYTES, PER_WORD, SCALED, EPS, PROGRAMS):
    """The `Plan` for a model with WEIGHT_BYTES a weight and PER_WORD activations in a word.

    Its names are those of the module, and X ... WAITING, places in shared memory, in bytes.  ValueError if there is too
    little of that, a program has too many rows, or these are not of whole 16 bytes.
    """
    N, Q = K * G * H, K * (G + 2) * H
    if any(width * WEIGHT_BYTES % 16 for width in (D, N, F)):
        raise ValueError(f"{D=}, {N=}, {F=}: rows of weights must be a multiple of 16 bytes")
    x_parts = {1: 3, 2: 2 if PER_WORD == 2 else 3, 4: 1}[WEIGHT_BYTES]
    # 64 bytes more, so that the parts that lanes read at the same time are in different banks
    x_part_bytes = triton.cdiv(max(D, N, F) * WEIGHT_BYTES, CHUNK.value) * CHUNK.value + 64
    # of a program's rows of a matrix, in whole tiles; of the output matrix, which has more, so many at a time
    rows = max(256, triton.cdiv(max(Q, D, 2 * F), PROGRAMS) // 16 * 16 + 32)
    warps, slot_bytes = CONSUMER_WARPS.value, TILE.value
    sizes = {
        "X": x_parts * x_part_bytes,  # inputs of a product
        "SUMS": 2 * rows * warps * 4,  # of each row and warp; a product uses the half that the one before it does not
        "SQUARES": 2 * 64,  # of each warp, in the same way
        "ATTENTION": (3 * H + warps * (H + 4)) * 4,  # a head's q, k and v; of each warp sums, maximum and total
        "TABLE": 8 * POINTERS.value * (LAYERS + 1),  # addresses of all arrays
        "FULL": 8 * SLOTS[-1],  # an mbarrier a slot
        "EMPTY": 8 * SLOTS[-1],
        "WAITING": 16,  # whether the program waits for words
    }
    slots = min(SLOTS[-1], (SHARED_MEMORY - sum(sizes.values()) - 128 * len(sizes)) // slot_bytes)
    if slots < SLOTS[0] or triton.cdiv(max(Q, D, F), PROGRAMS) + PER_WORD > THREADS.value * PER_WORD:
        raise ValueError(f"{D=}, {N=}, {F=}: too much for {PROGRAMS} multiprocessors and their shared memory")
    end, places = slots * slot_bytes, {}
    for name, size in sizes.items():
        places[name] = end
        end += triton.cdiv(size, 128) * 128
    # a query head is split as long as there is a program for each part, which then has no other part
    most_splits = min(MOST_SPLITS, max(1, PROGRAMS // (K * G)))
    exchange = triton.cdiv(K * G * (most_splits - 1) * (H + 2), 32) * 32
    words = LAYERS * ((2 * D + Q + N + F) // PER_WORD + exchange) + D // PER_WORD
    return Plan(
        LAYERS=LAYERS, D=D, K=K, G=G, H=H, F=F, V=V, S=S, N=N, Q=Q, WEIGHT_BYTES=WEIGHT_BYTES, PER_WORD=PER_WORD,
        SCALED=SCALED, EPS=EPS, SCALE=H**-0.5 * math.log2(math.e), PROGRAMS=PROGRAMS, SLOTS=slots,
        X_PART_BYTES=x_part_bytes, ROWS=rows, MOST_SPLITS=most_splits,
        RAGGED=any(width * WEIGHT_BYTES % CHUNK.value for width in (D, N, F)),
        EXCHANGE_BYTES=4 * exchange, COPY_BYTES=triton.cdiv(words, 32) * 128, MEMORY=triton.cdiv(end, 2048) * 2048,
        **places,
    )  # fmt: skip


@gluon.jit
def _decode_step(x, cos, sin, positions, arrays, words, logits, plan: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    thread = gl.arange(0, 32 * WARPS, layout=layout)
    memory = gl.allocate_shared_memory(
        gl.int32, [plan.MEMORY // (128 * WARPS), 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    memory.index(0).store(thread)  # memory that nothing is stored in would not be allocated
    base = ptx.shared_base()
    program = gl.program_id(0)
    ptx.barrier(0, 32 * WARPS)
    for slot in gl.static_range(plan.SLOTS):
        ptx.mbarrier_init(base + (plan.FULL + slot * 8), 1)
        ptx.mbarrier_init(base + (plan.EMPTY + slot * 8), CONSUMER_WARPS)
    if plan.RAGGED:
        # behind the end of a row its last tile keeps what is there, which counts zero times: it must not be NaN
        for start in range(0, plan.SLOTS * TILE, 16 * 32 * WARPS):
            ptx.zero_shared(base + gl.minimum(start + thread * 16, plan.SLOTS * TILE - 16))
    for first in gl.static_range(0, len(arrays), POINTERS):
        ptx.store_12_pointers(base + (plan.TABLE + first * 8), arrays[first : first + POINTERS])
    ptx.store_flag(base + plan.WAITING, 0)
    ptx.mbarrier_fence()
    ptx.barrier(0, 32 * WARPS)
    # from here on warps do not do the same: nothing may make all of them wait for each other
    warp = ptx.warp_index()
    if warp < CONSUMER_WARPS:
        position = gl.load(positions)
        _consume(
            x.to(gl.int64), cos.to(gl.int64), sin.to(gl.int64), position, words.to(gl.int64), logits.to(gl.int64),
            program, base, thread, plan,
        )  # fmt: skip
    elif warp == CONSUMER_WARPS:
        _produce(program, base, thread, plan)
    memory._keep_alive()


@gluon.jit
def _address(base, layer, array, plan: gl.constexpr):
    """Address of an array of a layer; the final norm, output matrix and its scales are those of one more layer."""
    return ptx.load_shared_int64(base + plan.TABLE + (layer * POINTERS + array) * 8)


@gluon.jit
def _share(program, OUT: gl.constexpr, PER_WORD: gl.constexpr, plan: gl.constexpr):
    """The first of a program's rows of a matrix of OUT rows, of which PER_WORD stay together, and how many they are."""
    begin = program * (OUT // PER_WORD) // plan.PROGRAMS * PER_WORD
    return begin, (program + 1) * (OUT // PER_WORD) // plan.PROGRAMS * PER_WORD - begin


@gluon.jit
def _next(slot, phase, plan: gl.constexpr):
    """The slot after this one, and the parity of its phase."""
    last = slot == plan.SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


# The producer.


@gluon.jit
def _produce(program, base, thread, plan: gl.constexpr):
    """Copy the program's tiles of all matrices into the ring, in the order in which they are consumed.

    A tile has eight rows, one after the other; of w_gate_up four of the gate and the four of up that go with them.
    """
    lane = thread % 32  # eight copy a row each
    policy = ptx.evict_first()
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for number in range(4 * plan.LAYERS + 1):
        address, to_fifth, row_bytes, outputs, left = _matrix(number, program, base, plan)
        source = address + (lane % 4 * row_bytes).to(gl.int64) + (lane // 4).to(gl.int64) * to_fifth
        index = lane % 4 + lane // 4 * (outputs - 4)
        while left > 0:
            mine = (lane < 8) & (index < left)
            rows = gl.minimum(left, outputs) * gl.where(outputs == 4, 2, 1)
            for start in range(0, row_bytes, CHUNK):
                width = gl.minimum(row_bytes - start, CHUNK)
                ptx.mbarrier_wait(base + plan.EMPTY + slot * 8, phase ^ 1)
                waiting = ptx.load_flag(base + plan.WAITING)
                earlier = slot - gl.where(waiting != 0, UNDER_WAY_WAITING, UNDER_WAY)
                wrapped = (earlier < 0).to(gl.int32)
                ptx.mbarrier_wait(base + plan.FULL + (earlier + wrapped * plan.SLOTS) * 8, phase ^ wrapped)
                ptx.copy_rows(
                    base + slot * TILE + lane % 8 * PITCH, source + gl.cast(start, gl.int64), width, mine,
                    base + plan.FULL + slot * 8, width * rows, policy,
                )  # fmt: skip
                slot, phase = _next(slot, phase, plan)
            left -= outputs
            source += (outputs * row_bytes).to(gl.int64)


@gluon.jit
def _matrix(number, program, base, plan: gl.constexpr):
    """A matrix, numbered in the order of use: the address of the program's rows, and how they make tiles.

    Returns that, bytes from a tile's first row to its fifth one, bytes of a row, how many outputs of the program are in
    a tile (of w_gate_up 4 with two rows each), and how many outputs the program has.
    """
    stage = number % 4
    last = number == 4 * plan.LAYERS
    q0, q = _share(program, plan.Q, plan.PER_WORD, plan)
    d0, d = _share(program, plan.D, plan.PER_WORD, plan)
    f0, f = _share(program, plan.F, plan.PER_WORD, plan)
    v0, v = _share(program, plan.V, 1, plan)
    begin = gl.where(last, v0, gl.where(stage == 0, q0, gl.where(stage == 2, f0, d0)))
    rows = gl.where(last, v, gl.where(stage == 0, q, gl.where(stage == 2, f, d)))
    row_bytes = gl.where(stage == 1, plan.N, gl.where(stage == 3, plan.F, plan.D)) * plan.WEIGHT_BYTES
    array = gl.where(stage == 0, WQKV, gl.where(stage == 1, WO, gl.where(stage == 2, W_GATE_UP, W_DOWN)))
    address = _address(base, number // 4, array, plan) + begin.to(gl.int64) * row_bytes
    to_up = gl.to_tensor(plan.F * plan.D * plan.WEIGHT_BYTES).to(gl.int64)
    to_fifth = gl.where(stage == 2, to_up, (4 * row_bytes).to(gl.int64))
    return address, to_fifth, row_bytes, gl.where(stage == 2, 4, 8), rows


# The consumers.


@gluon.jit
def _consume(x, cos, sin, position, words, logits, program, base, thread, plan: gl.constexpr):
    """All products and attentions, in order.

    ring is the slot of the next tile and the parity of its phase.  The vectors of a layer lie one after the other from
    words on: what comes in, qkv, attended, the sum of the two, hidden, and the partial results of attention; then those
    of the next layer.  Of the sums a thread keeps those that it has sent: they are what its next ones are added to.
    """
    q_share = _share(program, plan.Q, plan.PER_WORD, plan)
    d_share = _share(program, plan.D, plan.PER_WORD, plan)
    f_share = _share(program, plan.F, plan.PER_WORD, plan)
    copy = program % COPIES * plan.COPY_BYTES  # where the program reads
    ring = (gl.to_tensor(0), gl.to_tensor(0))
    # the program's part of x: the others get it as if from a layer
    begin, rows = d_share
    start = gl.minimum(begin + thread * plan.PER_WORD, plan.D - plan.PER_WORD)
    word = _not_zero(ptx.load_words(x + (start // plan.PER_WORD * 4).to(gl.int64), 1, 1, 1, 0)[0], plan.PER_WORD)
    residual = _numbers(word, plan.PER_WORD)
    stream = words
    _publish(stream, begin, rows, word, thread, plan)
    for layer in range(plan.LAYERS):
        qkv = stream + plan.D // plan.PER_WORD * 4
        attended = qkv + plan.Q // plan.PER_WORD * 4
        middle = attended + plan.N // plan.PER_WORD * 4
        hidden = middle + plan.D // plan.PER_WORD * 4
        exchange = hidden + plan.F // plan.PER_WORD * 4
        following = exchange + plan.EXCHANGE_BYTES
        keys = _address(base, layer, KEYS, plan)
        values = _address(base, layer, VALUES, plan)
        _prefetch_cache(keys, values, position, program, plan)
        ring, _ = _product(
            ring, stream + copy, qkv, _address(base, layer, ATTN_NORM, plan), _address(base, layer, WQKV + 1, plan),
            None, q_share, 0, base, thread, plan.D, plan.Q, False, plan,
        )  # fmt: skip
        _attention(qkv + copy, attended, exchange, keys, values, cos, sin, position, program, base, thread, plan)
        ring, residual = _product(
            ring, attended + copy, middle, None, _address(base, layer, WO + 1, plan),
            residual, d_share, 1, base, thread, plan.N, plan.D, False, plan,
        )  # fmt: skip
        ring, _ = _product(
            ring, middle + copy, hidden, _address(base, layer, FFN_NORM, plan),
            _address(base, layer, W_GATE_UP + 1, plan), None, f_share, 0, base, thread, plan.D, plan.F, True, plan,
        )  # fmt: skip
        ring, residual = _product(
            ring, hidden + copy, following, None, _address(base, layer, W_DOWN + 1, plan),
            residual, d_share, 1, base, thread, plan.F, plan.D, False, plan,
        )  # fmt: skip
        stream = following
    _logits(ring, stream + copy, logits, program, base, thread, plan)


@gluon.jit
def _product(
    ring, source, target, gain, scales, residual, share, parity: gl.constexpr, base, thread,
    IN: gl.constexpr, OUT: gl.constexpr, GATED: gl.constexpr, plan: gl.constexpr,
):  # fmt: skip
    """The program's share of the rows of a matrix [OUT, IN] times the vector [IN] at source, into the one at target.

    With gain [IN] the input is normalized first; residual, a thread's numbers, is added; GATED is SwiGLU, with a matrix
    [2, OUT, IN].  parity, 0 or 1, changes from product to product.  Returns ring and the numbers of the thread's word.
    """
    begin, rows = share
    PER_WORD: gl.constexpr = plan.PER_WORD
    index = thread * PER_WORD  # of the thread's outputs in the program's
    # early, so that nobody waits for them
    factors = ()
    if plan.SCALED:
        for i in gl.static_range(PER_WORD):
            row = begin + gl.maximum(gl.minimum(index + i, rows - 1), 0)
            factors += (ptx.load_float(scales + (row * 4).to(gl.int64)),)
            if GATED:
                factors += (ptx.load_float(scales + ((OUT + row) * 4).to(gl.int64)),)
    x_scale = _receive(source, gain, parity, base, thread, IN, plan)
    sums = base + plan.SUMS + parity * (plan.ROWS * CONSUMER_WARPS * 4)
    X_PARTS: gl.constexpr = _x_parts(plan.WEIGHT_BYTES, plan.PER_WORD, gain is not None)
    ring = _multiply(ring, rows, x_scale, sums, base, thread, IN, 4 if GATED else 8, X_PARTS, plan)
    ptx.barrier(1, THREADS)
    norm = _norm(parity, base, thread, IN, plan) if gain is not None else 1.0
    results = ()
    for i in gl.static_range(PER_WORD):
        row = gl.maximum(gl.minimum(index + i, rows - 1), 0)
        if GATED:
            row = row // 4 * 8 + row % 4
        result = ptx.sum_shared(sums + row * (CONSUMER_WARPS * 4), CONSUMER_WARPS) * norm
        if plan.SCALED:
            result *= factors[2 * i if GATED else i]
        if GATED:
            up = ptx.sum_shared(sums + (row + 4) * (CONSUMER_WARPS * 4), CONSUMER_WARPS) * norm
            if plan.SCALED:
                up *= factors[2 * i + 1]
            result = result / (1.0 + gl.exp(-result)) * up
        if residual is not None:
            result += residual[i]
        results += (result,)
    word = _not_zero(_word(results[0], results[PER_WORD - 1], PER_WORD), PER_WORD)
    _publish(target, begin, rows, word, thread, plan)
    return ring, _numbers(word, PER_WORD)


@gluon.jit
def _logits(ring, source, logits, program, base, thread, plan: gl.constexpr):
    """The program's rows of the output matrix times the normalized vector [D] at source, to logits."""
    begin, rows = _share(program, plan.V, 1, plan)
    gain = _address(base, plan.LAYERS, ATTN_NORM, plan)
    scales = _address(base, plan.LAYERS, WQKV + 1, plan)
    x_scale = _receive(source, gain, 0, base, thread, plan.D, plan)
    X_PARTS: gl.constexpr = _x_parts(plan.WEIGHT_BYTES, plan.PER_WORD, True)
    parity = gl.to_tensor(0)
    for first in range(0, rows, plan.ROWS):
        count = gl.minimum(rows - first, plan.ROWS)
        sums = base + plan.SUMS + parity * (plan.ROWS * CONSUMER_WARPS * 4)
        ring = _multiply(ring, count, x_scale, sums, base, thread, plan.D, 8, X_PARTS, plan)
        ptx.barrier(1, THREADS)
        norm = _norm(0, base, thread, plan.D, plan)
        for start in range(0, count, THREADS):
            row = gl.minimum(start + thread, count - 1)
            result = ptx.sum_shared(sums + row * (CONSUMER_WARPS * 4), CONSUMER_WARPS) * norm
            if plan.SCALED:
                result *= ptx.load_float(scales + ((begin + first + row) * 4).to(gl.int64))
            address = logits + ((begin + first + row) * 4).to(gl.int64)
            ptx.store_word(address, result, start + thread < count)
        parity = 1 - parity


# Vectors as words.


@gluon.jit
def _numbers(word, PER_WORD: gl.constexpr):
    """The numbers in a word, as a tuple of float32."""
    if PER_WORD == 1:
        return (word.to(gl.float32, bitcast=True),)
    else:
        return (word << 16).to(gl.float32, bitcast=True), (word & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _word(first, second, PER_WORD: gl.constexpr):
    """A float32, or two as bfloat16, as a word."""
    if PER_WORD == 1:
        return first.to(gl.int32, bitcast=True)
    else:
        return ptx.pack_bfloat16(first, second)


@gluon.jit
def _not_zero(word, PER_WORD: gl.constexpr):
    """The word, with a zero in it made a minus zero if it is 0."""
    return gl.where(word == 0, -2147483648 if PER_WORD == 1 else 0x8000, word)


@gluon.jit
def _publish(vector, begin, rows, word, thread, plan: gl.constexpr):
    """Each thread's word of numbers begin to begin + rows of a vector, for all programs."""
    address = vector + ((begin // plan.PER_WORD + thread) * 4).to(gl.int64)
    for copy in gl.static_range(COPIES):
        ptx.store_word(address + copy * plan.COPY_BYTES, word, thread * plan.PER_WORD < rows)


@gluon.jit
def _wait_for_words(
    address, n, COUNT: gl.constexpr, WIDTH: gl.constexpr, STRIDE: gl.constexpr, base, plan: gl.constexpr
):
    """`ptx.load_words` that are waited for, while fewer tiles are under way."""
    ptx.store_flag(base + plan.WAITING, 1)
    words = ptx.load_words(address, n, COUNT, WIDTH, STRIDE, True)
    ptx.store_flag(base + plan.WAITING, 0)
    return words


@gluon.constexpr_function
def _x_parts(size, per, normalized):
    """How many numbers a product with weights of so many bytes takes for one input: see the module."""
    exact = per == 2 and not normalized  # it is a bfloat16
    return {1: 3, 2: 1 if exact else 2 if per == 2 else 3, 4: 1}[size]


@gluon.jit
def _receive(source, gain, parity: gl.constexpr, base, thread, IN: gl.constexpr, plan: gl.constexpr):
    """Wait for the inputs that go with a warp's part of the weights, and store their parts in shared memory.

    With gain they are multiplied by it, and the sum of their squares is stored too.  Returns what sums of products with
    int8 weights are to be multiplied by.
    """
    COUNT: gl.constexpr = (IN * plan.WEIGHT_BYTES + CHUNK - 1) // CHUNK
    NUMBERS: gl.constexpr = LANE_BYTES // plan.WEIGHT_BYTES  # of a lane in a chunk
    WIDTH: gl.constexpr = NUMBERS // plan.PER_WORD  # words of these
    STRIDE: gl.constexpr = CHUNK // plan.WEIGHT_BYTES // plan.PER_WORD * 4
    column = thread // 32 * WARP_BYTES + thread % 32 * LANE_BYTES  # in bytes of weights
    n = gl.maximum((IN * plan.WEIGHT_BYTES - column + CHUNK - 1) // CHUNK, 0)  # chunks that reach as far
    offset = (column // plan.WEIGHT_BYTES // plan.PER_WORD * 4).to(gl.int64)
    if gain is not None:
        gains = ptx.load_words(gain + offset, n, COUNT, WIDTH, STRIDE)
    words = _wait_for_words(source + offset, n, COUNT, WIDTH, STRIDE, base, plan)
    values = ()
    if gain is not None:
        squares = gl.zeros_like(thread).to(gl.float32)
        for i in gl.static_range(COUNT * WIDTH):
            numbers = _numbers(words[i], plan.PER_WORD)
            factors = _numbers(gains[i], plan.PER_WORD)
            for j in gl.static_range(plan.PER_WORD):
                squares += numbers[j] * numbers[j]
                values += (numbers[j] * factors[j],)
        squares = ptx.sum_lanes(squares, (16, 8, 4, 2, 1))
        ptx.store_shared(base + plan.SQUARES + parity * 64 + thread // 32 * 4, squares, thread % 32 == 0)
    else:
        for i in gl.static_range(COUNT * WIDTH):
            values += _numbers(words[i], plan.PER_WORD)
    peak = 0.0
    if plan.WEIGHT_BYTES == 1:
        # of the words, if these are the inputs: with all numbers of all words at a time there are not enough registers
        peak = _peak(values, 1) if gain is not None or plan.PER_WORD == 1 else _peak(words, 2)
    x_scale = _store_parts(values, peak, base + plan.X + thread * LANE_BYTES, COUNT, gain is not None, plan)
    ptx.warp_barrier()
    return x_scale


@gluon.jit
def _peak(values, PER_WORD: gl.constexpr):
    """The largest magnitude in a warp of so many float32, or of bfloat16 in words; NaN if there is one."""
    peak = values[0].to(gl.int32, bitcast=True) * 0
    for i in gl.static_range(len(values)):
        if PER_WORD == 1:
            peak = gl.maximum(peak, values[i].to(gl.int32, bitcast=True) & 0x7FFFFFFF)
        else:
            peak = ptx.max_of_magnitudes(peak, values[i])
    if PER_WORD == 2:
        peak = gl.maximum(peak << 16, peak & -65536)
    return ptx.highest_lane(peak).to(gl.float32, bitcast=True)


@gluon.jit
def _store_parts(values, peak, target, COUNT: gl.constexpr, NORMALIZED: gl.constexpr, plan: gl.constexpr):
    """A lane's inputs, 8 bytes for each of COUNT chunks and each part; returns the scale of parts that are integers."""
    X_PARTS: gl.constexpr = _x_parts(plan.WEIGHT_BYTES, plan.PER_WORD, NORMALIZED)
    x_scale = gl.zeros_like(target).to(gl.float32) + 1.0
    if plan.WEIGHT_BYTES == 1:
        # integers of 23 bits, as much as the warp's largest number leaves of each, in three signed digits of base 256
        peak = gl.where(peak < 1e-30, 1e-30, peak)
        x_scale = peak / 4000000.0
        inverse = 4000000.0 / peak
        for chunk in gl.static_range(COUNT):
            digits = ()
            for first in gl.static_range(chunk * 8, chunk * 8 + 8, 4):
                four = ()
                for i in gl.static_range(4):
                    # 1.5 * 2^23 leaves the integer in the low bits; 128 in each digit makes it signed
                    bits = (values[first + i] * inverse + 12582912.0).to(gl.int32, bitcast=True)
                    four += ((bits + (0x808080 - 0x4B400000)) ^ 0x808080,)
                digits += ptx.transpose_bytes(four[0], four[1], four[2], four[3])
            for part in gl.static_range(3):
                place = target + (chunk * CHUNK + part * plan.X_PART_BYTES)
                ptx.store_shared_pair(place, digits[part], digits[3 + part])
    elif plan.WEIGHT_BYTES == 2:
        for chunk in gl.static_range(COUNT):
            left = (values[chunk * 4], values[chunk * 4 + 1], values[chunk * 4 + 2], values[chunk * 4 + 3])
            for part in gl.static_range(X_PARTS):
                first = ptx.pack_bfloat16(left[0], left[1])
                second = ptx.pack_bfloat16(left[2], left[3])
                ptx.store_shared_pair(target + (chunk * CHUNK + part * plan.X_PART_BYTES), first, second)
                low = _numbers(first, 2)
                high = _numbers(second, 2)
                left = (left[0] - low[0], left[1] - low[1], left[2] - high[0], left[3] - high[1])
    else:
        for chunk in gl.static_range(COUNT):
            first = values[chunk * 2].to(gl.int32, bitcast=True)
            second = values[chunk * 2 + 1].to(gl.int32, bitcast=True)
            ptx.store_shared_pair(target + chunk * CHUNK, first, second)
    return x_scale


@gluon.jit
def _norm(parity: gl.constexpr, base, thread, IN: gl.constexpr, plan: gl.constexpr):
    """One over the root mean square of the inputs of a product, when all warps have received theirs."""
    squares = ptx.sum_shared(base + plan.SQUARES + parity * 64 + thread * 0, CONSUMER_WARPS)
    return gl.rsqrt(squares / IN + plan.EPS)


@gluon.jit
def _multiply(
    ring, rows, x_scale, sums, base, thread,
    IN: gl.constexpr, STEP: gl.constexpr, X_PARTS: gl.constexpr, plan: gl.constexpr,
):  # fmt: skip
    """Consume the tiles of so many outputs, STEP a tile: a warp's parts of their sums, to sums [8 * tiles, warps]."""
    slot, phase = ring
    warp = thread // 32
    group = thread % 32 // 4
    column = thread % 4
    w = base + group * PITCH + warp * WARP_BYTES + column * 16
    x = base + plan.X + warp * WARP_BYTES + column * 16
    KIND: gl.constexpr = gl.int32 if plan.WEIGHT_BYTES == 1 else gl.float32
    if plan.WEIGHT_BYTES == 4:
        has_x = group >= 0
        sums += (group * CONSUMER_WARPS + warp) * 4
    else:
        has_x = group < X_PARTS
        x += gl.minimum(group, X_PARTS - 1) * plan.X_PART_BYTES
        sums += (column * (2 * CONSUMER_WARPS) + warp) * 4
    if plan.WEIGHT_BYTES == 1:
        x_scale *= gl.where(group == 0, 65536.0, gl.where(group == 1, 256.0, 1.0))
    for _ in range(0, rows, STEP):
        zero = gl.zeros_like(thread).to(KIND)
        acc = (zero, zero, zero, zero)
        for chunk in range((IN * plan.WEIGHT_BYTES + CHUNK - 1) // CHUNK):
            ptx.mbarrier_wait(base + plan.FULL + slot * 8, phase)
            acc = ptx.multiply_tile(acc, w + slot * TILE, x + chunk * CHUNK, has_x, plan.WEIGHT_BYTES, WARP_BYTES // 64)
            ptx.mbarrier_arrive(base + plan.EMPTY + slot * 8)
            slot, phase = _next(slot, phase, plan)
        if plan.WEIGHT_BYTES == 4:
            ptx.store_shared(sums, ptx.sum_lanes(acc[0] + acc[1] + (acc[2] + acc[3]), (1, 2)), column == 0)
        else:
            for i in gl.static_range(2):
                products = (acc[i] + acc[2 + i]).to(gl.float32)
                if plan.WEIGHT_BYTES == 1:
                    products *= x_scale
                products = ptx.sum_lanes(products, (4, 8))  # groups from 4 on have none
                ptx.store_shared(sums + i * (CONSUMER_WARPS * 4), products, group == 0)
        sums += 8 * CONSUMER_WARPS * 4
    return slot, phase


# Attention.


@gluon.jit
def _splits(stored, plan: gl.constexpr):
    """Into how many parts the slots of a query head are cut, and how long these are."""
    splits = gl.maximum(1, gl.minimum(plan.MOST_SPLITS, (stored + SPLIT - 1) // SPLIT))
    return splits, (stored + splits - 1) // splits


@gluon.jit
def _prefetch_cache(keys, values, position, program, plan: gl.constexpr):
    """Have the first slots of the program's first part brought into L2, where they are when their q is there."""
    SLOT: gl.constexpr = plan.H * 4 // plan.PER_WORD
    stored = gl.minimum(position, plan.S)
    splits, share = _splits(stored, plan)
    if program < plan.K * plan.G * splits:
        begin = program % splits * share
        size = gl.minimum(gl.minimum(share, stored - begin) * SLOT, PREFETCHED)
        offset = (gl.cast(program // splits // plan.G, gl.int64) * plan.S + begin) * SLOT
        ptx.prefetch(keys + offset, size)
        ptx.prefetch(values + offset, size)


@gluon.jit
def _attention(
    qkv, attended, exchange, keys, values, cos, sin, position, program, base, thread, plan: gl.constexpr
):  # fmt: skip
    """Attention of one token over the slots before position and its own k and v, which are stored there.

    A program takes query heads, or a part of the slots of one (Flash-Decoding, Dao et al. 2023): who has the first
    part, to which the token itself belongs, adds up what the others send.  A token beyond the last slot is not stored,
    and sees only what is.
    """
    H: gl.constexpr = plan.H
    WORDS: gl.constexpr = H // plan.PER_WORD
    SLOT: gl.constexpr = H * 4 // plan.PER_WORD  # bytes
    KIND: gl.constexpr = gl.float32 if plan.PER_WORD == 1 else gl.bfloat16
    stored = gl.minimum(position, plan.S)
    has_slot = position < plan.S
    area = base + plan.ATTENTION
    parts = area + 3 * H * 4
    splits, share = _splits(stored, plan)
    for number in range(program, plan.K * plan.G * splits, plan.PROGRAMS):
        query_head = number // splits
        split = number % splits
        kv_head = query_head // plan.G
        begin = split * share
        end = gl.minimum(begin + share, stored)
        head_keys = keys + gl.cast(kv_head, gl.int64) * (plan.S * SLOT)
        head_values = values + gl.cast(kv_head, gl.int64) * (plan.S * SLOT)
        block = _load_block(head_keys, head_values, begin, end, thread, plan)
        element = gl.minimum(thread, H - 1)
        inside = thread < H
        angle = (element % (H // 2) * 4).to(gl.int64)
        cosine = ptx.load_float(cos + angle)
        sine = ptx.load_float(sin + angle)
        ptx.barrier(1, THREADS)
        for start in gl.static_range(0, 3 * WORDS, THREADS):
            index = start + thread
            vector = index // WORDS  # q, k or v
            row = kv_head * (plan.G + 2) + gl.where(vector == 0, query_head % plan.G, plan.G - 1 + vector)
            exists = index < 3 * WORDS
            address = qkv + ((row * WORDS + index % WORDS) * 4).to(gl.int64)
            numbers = _numbers(_wait_for_words(address, exists.to(gl.int32), 1, 1, 0, base, plan)[0], plan.PER_WORD)
            for i in gl.static_range(plan.PER_WORD):
                ptx.store_shared(area + (index * plan.PER_WORD + i) * 4, numbers[i], exists)
        ptx.barrier(1, THREADS)
        query = _rotated(area, element, cosine, sine, H).to(KIND).to(gl.float32)
        key = _rotated(area + H * 4, element, cosine, sine, H).to(KIND).to(gl.float32)
        ptx.barrier(1, THREADS)
        ptx.store_shared(area + element * 4, query, inside)
        ptx.store_shared(area + (H + element) * 4, key, inside)
        ptx.barrier(1, THREADS)
        if has_slot & (query_head % plan.G == 0) & (split == 0):
            pair = gl.minimum(thread, WORDS - 1)
            offset = gl.cast(position, gl.int64) * SLOT + pair * 4
            first = area + H * 4 + pair * (4 * plan.PER_WORD)
            _store_pair(head_keys + offset, first, thread < WORDS, plan.PER_WORD)
            _store_pair(head_values + offset, first + H * 4, thread < WORDS, plan.PER_WORD)
        own = has_slot & (split == 0)
        _attend(block, head_keys, head_values, begin, end, own, area, parts, thread, plan)
        ptx.barrier(1, THREADS)
        highest, total, sums = _combine_warps(parts, thread, plan)
        address = exchange + gl.cast(query_head * (plan.MOST_SPLITS - 1), gl.int64) * ((H + 2) * 4)
        if split > 0:
            _send_part(address + gl.cast((split - 1) * ((H + 2) * 4), gl.int64), highest, total, sums, thread, plan)
        else:
            if plan.MOST_SPLITS > 1:
                if splits > 1:
                    total, sums = _add_parts(address, splits - 1, highest, total, sums, base, thread, plan)
            word = _not_zero(_word(sums[0] / total, sums[plan.PER_WORD - 1] / total, plan.PER_WORD), plan.PER_WORD)
            _publish(attended, query_head * H, H, word, thread, plan)


@gluon.jit
def _store_pair(address, numbers, mask, PER_WORD: gl.constexpr):
    """A word of float32 numbers in shared memory, to global memory."""
    second = ptx.load_shared(numbers + (PER_WORD - 1) * 4)
    ptx.store_word(address, _word(ptx.load_shared(numbers), second, PER_WORD), mask)


@gluon.jit
def _rotated(head, element, cosine, sine, H: gl.constexpr):
    """RoPE of an element of a head [H] in shared memory."""
    low = element < H // 2
    other = gl.where(low, element + H // 2, element - H // 2)
    sine = gl.where(low, -sine, sine)
    return ptx.load_shared(head + element * 4) * cosine + ptx.load_shared(head + other * 4) * sine


@gluon.jit
def _load_block(keys, values, start, end, thread, plan: gl.constexpr):
    """16 bytes a lane of k, then of v, of each of DEEP slots from start on; zeros from end on."""
    LANES: gl.constexpr = plan.H // plan.PER_WORD // 4
    block = ()
    for i in gl.static_range(DEEP):
        slot = start + thread // LANES + i * (THREADS // LANES)
        exists = (slot < end).to(gl.int32)
        offset = (slot * (plan.H // plan.PER_WORD * 4) + thread % LANES * 16).to(gl.int64)
        block += ptx.load_words(keys + offset, exists, 1, 4, 0)
        block += ptx.load_words(values + offset, exists, 1, 4, 0)
    return block


@gluon.jit
def _attend(block, keys, values, begin, end, own, area, parts, thread, plan: gl.constexpr):
    """Of each warp: maximum of scores, total of weights and weighted sums of v over its slots, to parts.

    Several lanes have a slot; the first ones of all, if own is true, the token's own k and v besides.
    """
    H: gl.constexpr = plan.H
    NUMBERS: gl.constexpr = 4 * plan.PER_WORD  # of a lane
    LANES: gl.constexpr = H // NUMBERS  # of a slot
    SLOTS: gl.constexpr = THREADS // LANES * DEEP
    zero = gl.zeros_like(thread).to(gl.float32)
    first = thread % LANES * NUMBERS
    queries = ()
    peak = zero
    for i in gl.static_range(NUMBERS):
        queries += (ptx.load_shared(area + (first + i) * 4) * plan.SCALE,)
        peak += queries[i] * ptx.load_shared(area + (H + first + i) * 4)
    peak = ptx.sum_lanes(peak, _powers(1, LANES))
    mine = (thread < LANES) & own
    peak = gl.where(mine, peak, float("-inf"))
    total = gl.where(mine, 1.0, zero)
    sums = ()
    for i in gl.static_range(NUMBERS):
        sums += (gl.where(mine, ptx.load_shared(area + (2 * H + first + i) * 4), 0.0),)
    for start in range(begin, end, SLOTS):
        following = _load_block(keys, values, start + SLOTS, end, thread, plan)
        scores = ()
        higher = peak
        for i in gl.static_range(DEEP):
            score = zero
            for j in gl.static_range(4):
                numbers = _numbers(block[i * 8 + j], plan.PER_WORD)
                for m in gl.static_range(plan.PER_WORD):
                    score += numbers[m] * queries[j * plan.PER_WORD + m]
            score = ptx.sum_lanes(score, _powers(1, LANES))
            slot = start + thread // LANES + i * (THREADS // LANES)
            score = gl.where(slot < end, score, float("-inf"))
            higher = gl.maximum(higher, score)
            scores += (score,)
        shift = _finite(higher)
        fade = gl.exp2(peak - shift)
        peak = higher
        total *= fade
        faded = ()
        for i in gl.static_range(NUMBERS):
            faded += (sums[i] * fade,)
        sums = faded
        for i in gl.static_range(DEEP):
            weight = gl.exp2(scores[i] - shift)
            total += weight
            new = ()
            for j in gl.static_range(4):
                numbers = _numbers(block[i * 8 + 4 + j], plan.PER_WORD)
                for m in gl.static_range(plan.PER_WORD):
                    new += (sums[j * plan.PER_WORD + m] + numbers[m] * weight,)
            sums = new
        block = following
    # of the warp
    highest = peak
    for distance in gl.static_range(5):
        if (1 << distance) >= LANES:
            highest = gl.maximum(highest, ptx.other_lane(highest, 1 << distance))
    fade = gl.exp2(peak - _finite(highest))
    total = ptx.sum_lanes(total * fade, _powers(LANES, 32))
    part = parts + thread // 32 * ((H + 4) * 4)
    for i in gl.static_range(NUMBERS):
        ptx.store_shared(part + (first + i) * 4, ptx.sum_lanes(sums[i] * fade, _powers(LANES, 32)), thread % 32 < LANES)
    ptx.store_shared(part + H * 4, highest, thread % 32 == 0)
    ptx.store_shared(part + (H + 1) * 4, total, thread % 32 == 0)


@gluon.constexpr_function
def _powers(begin, end):
    """The powers of two from begin to end, without that."""
    return tuple(1 << i for i in range(5) if begin <= 1 << i < end)


@gluon.jit
def _finite(peak):
    """A maximum to subtract from what it is the maximum of: -inf - -inf would be NaN."""
    return gl.where(peak == float("-inf"), 0.0, peak)


@gluon.jit
def _combine_warps(parts, thread, plan: gl.constexpr):
    """Maximum, total, and the numbers of a thread's word of the sums, over all warps."""
    STRIDE: gl.constexpr = (plan.H + 4) * 4
    peaks = parts + plan.H * 4 + thread * 0
    first = parts + gl.minimum(thread, plan.H // plan.PER_WORD - 1) * (plan.PER_WORD * 4)
    highest = ptx.load_shared(peaks)
    for warp in gl.static_range(1, CONSUMER_WARPS):
        highest = gl.maximum(highest, ptx.load_shared(peaks + warp * STRIDE))
    total = gl.zeros_like(thread).to(gl.float32)
    low = total
    high = total
    for warp in gl.static_range(CONSUMER_WARPS):
        weight = gl.exp2(ptx.load_shared(peaks + warp * STRIDE) - _finite(highest))
        total += weight * ptx.load_shared(peaks + (warp * STRIDE + 4))
        low += weight * ptx.load_shared(first + warp * STRIDE)
        if plan.PER_WORD == 2:
            high += weight * ptx.load_shared(first + (warp * STRIDE + 4))
    return highest, total, (low, high)


@gluon.jit
def _send_part(address, highest, total, sums, thread, plan: gl.constexpr):
    """A part of a query head to who adds them up: sums [H], maximum, total, as float32."""
    for i in gl.static_range(plan.PER_WORD):
        offset = ((thread * plan.PER_WORD + i) * 4).to(gl.int64)
        ptx.store_word(address + offset, _float_word(sums[i]), thread < plan.H // plan.PER_WORD)
    address += plan.H * 4 + (thread * 0).to(gl.int64)
    ptx.store_word(address, _float_word(highest), thread == 0)
    ptx.store_word(address + 4, _float_word(total), thread == 0)


@gluon.jit
def _float_word(value):
    return _not_zero(value.to(gl.int32, bitcast=True), 1)


@gluon.jit
def _add_parts(address, n, highest, total, sums, base, thread, plan: gl.constexpr):
    """total and sums with those of the other n parts of a query head; the maximum of the own ones is highest."""
    PER_WORD: gl.constexpr = plan.PER_WORD
    OTHERS: gl.constexpr = plan.MOST_SPLITS - 1
    STRIDE: gl.constexpr = (plan.H + 2) * 4
    n += thread * 0
    offset = (gl.minimum(thread, plan.H // PER_WORD - 1) * (4 * PER_WORD)).to(gl.int64)
    tops = ptx.load_words(address + plan.H * 4 + offset * 0, n, OTHERS, 2, STRIDE, True)
    theirs = ptx.load_words(address + offset, n, OTHERS, PER_WORD, STRIDE, True)
    higher = highest
    peaks = ()
    for i in gl.static_range(OTHERS):
        peaks += (gl.where(i < n, tops[2 * i].to(gl.float32, bitcast=True), float("-inf")),)
        higher = gl.maximum(higher, peaks[i])
    fade = gl.exp2(highest - _finite(higher))
    total *= fade
    low = sums[0] * fade
    high = sums[1] * fade
    for i in gl.static_range(OTHERS):
        weight = gl.exp2(peaks[i] - _finite(higher))
        total += weight * tops[2 * i + 1].to(gl.float32, bitcast=True)
        low += weight * theirs[PER_WORD * i].to(gl.float32, bitcast=True)
        high += weight * theirs[PER_WORD * i + PER_WORD - 1].to(gl.float32, bitcast=True)
    return total, (low, high)
