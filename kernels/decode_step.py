"""One token through all layers of the model as a single kernel, whose programs stay on their multiprocessors.

At batch 1 every weight is read for one product, so that the memory is all that counts, and must never rest.  There is
one program a multiprocessor, and it owns a share of the rows of every matrix.

Ring.  In each program one warp, the producer, copies the program's rows of all matrices of all layers, and its parts of
k and v, one endless sequence of tiles, into a ring of slots in shared memory, and eight warps consume them.  The
sequence does not depend on any activation: while a program waits for the others, bytes of what comes next keep coming.

Words.  Activations travel between programs as words of 32 bits, a float32 or two bfloat16, each in a place of its own
in global memory that is zero before: who needs a word reads it until it is not zero, and a zero is sent as minus zero.
A word that is there is right, so there is no barrier between programs, no fence and no atomic, and no place is written
twice, so none can be reused too early.  All programs run at the same time and go through the stages in the same order,
and a stage needs words of the ones before it only (of attention: of parts that need no others), so it always ends.

Tensor cores.  They multiply the 8 rows of a tile with a left operand that has 16 rows where one is needed.  Others of
these are used for precision: a float32 input is the sum of parts, two or three bfloat16 or, for int8 weights, three
digits in base 256, and each part is a row.  That costs no more than one, and leaves 16 to 24 bits of an input.

Several rows, up to 8, each with a cache of its own, take one pass over the weights: they are rows of the left operand,
which leaves one bfloat16 for an input, or two digits, 16 bits of the largest one near it.  Then the same code does all
products, since instructions have to come from somewhere too, and a vector that does not fit into shared memory for all
rows comes in sections, for each of which tiles of all the program's rows follow each other.  Attention is cut into
parts, more than there are programs, so that all have about as much to do: a part of a query head that adds up the
others has a higher number than these, and as programs take parts in the order of their numbers, it always ends too.

Where what is, is counted in bytes of weights: a row of a matrix is cut into chunks of 2 KB, of which each consumer warp
has 256 bytes in every tile, and so the inputs that belong to these, which no other warp needs.  Consumers wait for each
other only where their sums are added up, once a product.

With B rows, and the sizes of a model as in the docstrings: K kv heads with G query heads each, of H numbers, N = K*G*H
and Q = K*(G+2)*H together; D and F numbers in the stream and between w_gate_up and w_down; S slots, V logits.
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
MOST_ROWS = 8  # of x: as a tile has
# with several rows: words that a thread waits for, while as many more are on their way
WORDS_AT_A_TIME = gl.constexpr(16)
PART_SLOTS = gl.constexpr(80)  # of the cache, with several rows: a part takes as long as it does for so many less
MOST_SPLITS = 8  # of the slots of a query head
SPLIT = gl.constexpr(256)  # slots for each of which there is a split
CACHE_TILE = gl.constexpr(4 * CHUNK.value)  # bytes of k in a tile, before as many of v
SHARED_MEMORY = 226 << 10  # bytes, of 227 KB
# an address in the table for each of a layer's arrays: scales are behind the matrix that they belong to
ATTN_NORM, WQKV, WO, FFN_NORM, W_GATE_UP, W_DOWN, KEYS, VALUES, POINTERS = map(
    gl.constexpr, (0, 1, 3, 5, 6, 8, 10, 11, 12)
)


def decode_step(x, cos, sin, positions, layers, norm, output, output_scale=None, eps=0.0):
    """Logits float32 [B, V] behind one token of each of B rows, and the cache with them: these, L arrays k, L arrays v.

    x [B, 1, D] are the tokens' embeddings, float32 or bfloat16, as is all that is no weight and no scale; cos and sin
    float32 [B, 1, H/2] and positions int32 [B, 1] are as in `reference.rope_store`; output is [V, D].  A layer is
    (attn_norm [D], wqkv [K, G+2, H, D], wo [D, N*H], ffn_norm [D], w_gate_up [2, F, D], w_down [D, F], scales, k, v)
    with k and v [B, K, S, H] and, with int8 weights, scales: the four matrices' float32 scales, one a row, in that
    order; else None.  Weights are float32 (with float32 x), bfloat16, or int8.  Of several rows one with a position
    below 0 costs no attention: nothing of it is stored, and its logits mean nothing.

    Needs compute capability 9.0, H a power of two of which k has at most 512 bytes, rows of all matrices of a multiple
    of 16 bytes, four slots of the ring, and of each layer's matrices no more rows a program than there are words for
    its consumers' threads.  On 114 or more multiprocessors that is D, N and F up to 28672, or, of bfloat16 weights with
    float32 x, 20480.  Several rows are at most 8, of bfloat16, with weights of bfloat16 or int8; D and N are then up to
    8192, and B * D and B * N up to 49152.  ValueError for what does not fit.
    """
    _, wqkv, wo, _, w_gate_up, w_down, scales, k, _ = layers[0]
    K, parts, H, D = wqkv.shape
    plan = make_plan(
        B=x.shape[0], LAYERS=len(layers), D=D, K=K, G=parts - 2, H=H, F=w_gate_up.shape[1], V=output.shape[0],
        S=k.shape[2], WEIGHT_BYTES=wqkv.dtype.itemsize, PER_WORD=4 // x.dtype.itemsize, SCALED=scales is not None,
        EPS=eps, PROGRAMS=jax.extend.backend.get_default_device().core_count,
    )  # fmt: skip
    arrays, aliases = [], {}
    for number, (attn_norm, wqkv, wo, ffn_norm, w_gate_up, w_down, scales, k, v) in enumerate(layers):
        s = scales or (wqkv, wo, w_gate_up, w_down)  # not used
        arrays += [attn_norm, wqkv, s[0], wo, s[1], ffn_norm, w_gate_up, s[2], w_down, s[3], k, v]
        aliases |= {4 + len(arrays) - 2: 2 + number, 4 + len(arrays) - 1: 2 + len(layers) + number}
    arrays += [norm, output, output if output_scale is None else output_scale]
    arrays += [norm] * (-len(arrays) % POINTERS.value)  # the table is written twelve at a time
    words = jnp.zeros((plan.COPIES.value * plan.COPY_BYTES.value // 4,), jnp.int32)
    logits, _, *cache = launch(
        _decode_step,
        x,
        cos,
        sin,
        positions,
        tuple(arrays),
        words,
        out=(
            jax.ShapeDtypeStruct((x.shape[0], output.shape[0]), jnp.float32),
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


def make_plan(*, B, LAYERS, D, K, G, H, F, V, S, WEIGHT_BYTES, PER_WORD, SCALED, EPS, PROGRAMS):
    """The `Plan` for B rows of a model with WEIGHT_BYTES a weight and PER_WORD activations in a word.

    Its names are those of the module, and X ... PARTS, places in shared memory, in bytes.  ValueError if there is too
    little of that, a program has too many rows, these are not of whole 16 bytes, or B is too much.
    """
    N, Q = K * G * H, K * (G + 2) * H
    if any(width * WEIGHT_BYTES % 16 for width in (D, N, F)):
        raise ValueError(f"{D=}, {N=}, {F=}: rows of weights must be a multiple of 16 bytes")
    if B > MOST_ROWS or (B > 1 and (PER_WORD == 1 or WEIGHT_BYTES == 4)):
        raise ValueError(f"{B} rows: more than one must be at most {MOST_ROWS}, of bfloat16, and weights not float32")
    warps, slot_bytes, threads = CONSUMER_WARPS.value, TILE.value, THREADS.value
    if B == 1:
        x_parts = {1: 3, 2: 2 if PER_WORD == 2 else 3, 4: 1}[WEIGHT_BYTES]
        widest = max(D, N, F)
        # of a program's rows of a matrix, in whole tiles; of the output matrix, which has more, so many at a time
        rows = max(256, triton.cdiv(max(Q, D, 2 * F), PROGRAMS) // 16 * 16 + 32)
        kept = threads * PER_WORD  # most rows of a matrix of which threads keep a word
        sums = rows * warps
    else:
        x_parts = {1: 2, 2: 1}[WEIGHT_BYTES]
        widest = max(D, N)  # of F there are sections
        rows = kept = threads * PER_WORD // triton.next_power_of_2(B)
        sums = B * (rows + 8) * warps
    # bytes of rows of weights whose inputs are in shared memory at a time
    section = triton.cdiv(widest * WEIGHT_BYTES, CHUNK.value) * CHUNK.value
    x_part_bytes = section + 64  # parts that lanes read at the same time are in different banks
    sizes = {
        "X": B * x_parts * x_part_bytes,  # inputs of a product
        "SUMS": 2 * sums * 4,  # of each row and warp; a product uses the half that the one before it does not
        "SQUARES": 2 * 64 if B == 1 else B * warps * 4,  # of each warp, in the same way
        "ATTENTION": (3 * H + warps * (H + 4)) * 4,  # a head's q, k and v; of each warp sums, maximum and total
        "TABLE": 8 * POINTERS.value * (LAYERS + 1),  # addresses of all arrays
        "FULL": 8 * SLOTS[-1],  # an mbarrier a slot
        "EMPTY": 8 * SLOTS[-1],
        "WAITING": 16,  # whether the program waits for words
    }
    if B > 1:
        sizes["PARTS"] = 16 * B  # of attention, for each row
    slots = min(SLOTS[-1], (SHARED_MEMORY - sum(sizes.values()) - 128 * len(sizes)) // slot_bytes)
    too_many = triton.cdiv(max(Q, D, F), PROGRAMS) + PER_WORD > threads * PER_WORD
    if slots < SLOTS[0] or too_many or triton.cdiv(D // PER_WORD, PROGRAMS) * PER_WORD > kept:
        raise ValueError(f"{B=}, {D=}, {N=}, {F=}: too much for {PROGRAMS} multiprocessors and their shared memory")
    end, places = slots * slot_bytes, {}
    for name, size in sizes.items():
        places[name] = end
        end += triton.cdiv(size, 128) * 128
    # a query head is split as long as there is a program for each part, which of one row then has no other part
    most_splits = min(MOST_SPLITS, max(1, PROGRAMS // (K * G)))
    most_parts = min(B * K * G * (most_splits - 1), K * G * (most_splits - 1) if B == 1 else 2 * PROGRAMS)  # sent
    exchange = triton.cdiv(most_parts * (H + 2), 32) * 32
    copies = COPIES.value if B == 1 else 1  # of several rows each place has fewer readers at a time
    words = LAYERS * (B * (2 * D + Q + N + F) // PER_WORD + exchange) + B * D // PER_WORD
    return Plan(
        B=B, LAYERS=LAYERS, D=D, K=K, G=G, H=H, F=F, V=V, S=S, N=N, Q=Q, WEIGHT_BYTES=WEIGHT_BYTES, PER_WORD=PER_WORD,
        SCALED=SCALED, EPS=EPS, SCALE=H**-0.5 * math.log2(math.e), PROGRAMS=PROGRAMS, SLOTS=slots, SECTION=section,
        X_PART_BYTES=x_part_bytes, ROWS=rows, SUMS_BYTES=sums * 4, MOST_SPLITS=most_splits, MOST_PARTS=most_parts,
        RAGGED=any(width * WEIGHT_BYTES % CHUNK.value for width in (D, N, F)), COPIES=copies,
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
    if plan.B == 1:
        position = gl.load(positions)
    else:
        position = None
        _share_attention(positions.to(gl.int64), base, plan)
    ptx.mbarrier_fence()
    ptx.barrier(0, 32 * WARPS)
    # from here on warps do not do the same: nothing may make all of them wait for each other
    warp = ptx.warp_index()
    if warp < CONSUMER_WARPS:
        if plan.B == 1:
            _consume(
                x.to(gl.int64), cos.to(gl.int64), sin.to(gl.int64), position, words.to(gl.int64), logits.to(gl.int64),
                program, base, thread, plan,
            )  # fmt: skip
        else:
            _consume_rows(
                x.to(gl.int64), cos.to(gl.int64), sin.to(gl.int64), words.to(gl.int64), logits.to(gl.int64),
                program, base, thread, plan,
            )  # fmt: skip
    elif warp == CONSUMER_WARPS:
        _produce(position, program, base, thread, plan)
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
def _produce(position, program, base, thread, plan: gl.constexpr):
    """Copy the program's tiles of all matrices and of the cache into the ring, in the order in which they are consumed.

    A tile has eight rows, one after the other; of w_gate_up four of the gate and the four of up that go with them.  Of
    several rows of x the tiles of a section of the columns come before those of the next one.
    """
    lane = thread % 32  # eight copy a row each
    policy = ptx.evict_first()
    parts = _parts(position, base, plan)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for number in range(4 * plan.LAYERS + 1):
        address, to_fifth, row_bytes, outputs, left, _ = _matrix(number, program, base, plan)
        source = address + (lane % 4 * row_bytes).to(gl.int64) + (lane // 4).to(gl.int64) * to_fifth
        index = lane % 4 + lane // 4 * (outputs - 4)
        if plan.B == 1:
            slot, phase = _produce_section(
                slot, phase, source, 0, row_bytes, row_bytes, index, outputs, left, lane, base, policy, plan
            )
        else:
            for begin in range(0, row_bytes, plan.SECTION):
                end = gl.minimum(begin + plan.SECTION, row_bytes)
                slot, phase = _produce_section(
                    slot, phase, source, begin, end, row_bytes, index, outputs, left, lane, base, policy, plan
                )
        if (number % 4 == 0) & (number < 4 * plan.LAYERS):
            keys = _address(base, number // 4, KEYS, plan)
            values = _address(base, number // 4, VALUES, plan)
            for part in range(program, parts, plan.PROGRAMS):
                slot, phase = _produce_cache(slot, phase, part, position, keys, values, lane, base, plan)


@gluon.jit
def _produce_section(
    slot, phase, source, begin, end, row_bytes, index, outputs, left, lane, base, policy, plan: gl.constexpr
):  # fmt: skip
    """Copy bytes begin to end of each of the program's rows of a matrix."""
    while left > 0:
        mine = (lane < 8) & (index < left)
        rows = gl.minimum(left, outputs) * gl.where(outputs == 4, 2, 1)
        for start in range(begin, end, CHUNK):
            width = gl.minimum(end - start, CHUNK)
            _wait_for_slot(slot, phase, base, plan)
            ptx.copy_rows(
                base + slot * TILE + lane % 8 * PITCH, source + gl.cast(start, gl.int64), width, mine,
                base + plan.FULL + slot * 8, width * rows, policy,
            )  # fmt: skip
            slot, phase = _next(slot, phase, plan)
        left -= outputs
        source += (outputs * row_bytes).to(gl.int64)
    return slot, phase


@gluon.jit
def _wait_for_slot(slot, phase, base, plan: gl.constexpr):
    """Wait until a slot of the ring is free, and few enough tiles are under way."""
    ptx.mbarrier_wait(base + plan.EMPTY + slot * 8, phase ^ 1)
    waiting = ptx.load_flag(base + plan.WAITING)
    earlier = slot - gl.where(waiting != 0, UNDER_WAY_WAITING, UNDER_WAY)
    wrapped = (earlier < 0).to(gl.int32)
    ptx.mbarrier_wait(base + plan.FULL + (earlier + wrapped * plan.SLOTS) * 8, phase ^ wrapped)


@gluon.jit
def _produce_cache(slot, phase, part, position, keys, values, lane, base, plan: gl.constexpr):
    """Copy k and v of a part of attention: a tile has four rows of k and four of v, of the same slots of the cache."""
    SLOT: gl.constexpr = plan.H * 4 // plan.PER_WORD
    # query heads that share k and v read them at about the same time
    policy = ptx.evict_first() if plan.G == 1 else ptx.evict_normal()
    row, _, query_head, _, _, begin, end, _ = _part(part, position, base, plan)
    head = ((row * plan.K + query_head // plan.G).to(gl.int64) * plan.S + begin) * SLOT
    piece = lane % 4 * CHUNK
    source = gl.where(lane < 4, keys, values) + head + piece.to(gl.int64)
    for start in range(0, (end - begin) * SLOT, CACHE_TILE):
        left = (end - begin) * SLOT - start
        width = gl.minimum(left - piece, CHUNK)
        _wait_for_slot(slot, phase, base, plan)
        ptx.copy_rows(
            base + slot * TILE + lane % 8 * PITCH, source + gl.cast(start, gl.int64), width, (lane < 8) & (width > 0),
            base + plan.FULL + slot * 8, 2 * gl.minimum(left, CACHE_TILE), policy,
        )  # fmt: skip
        slot, phase = _next(slot, phase, plan)
    return slot, phase


@gluon.jit
def _matrix(number, program, base, plan: gl.constexpr):
    """A matrix, numbered in the order of use: the address of the program's rows, and how they make tiles.

    Returns that, bytes from a tile's first row to its fifth one, bytes of a row, how many outputs of the program are in
    a tile (of w_gate_up 4 with two rows each), how many outputs the program has, and which is the first one.
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
    return address, to_fifth, row_bytes, gl.where(stage == 2, 4, 8), rows, begin


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
    copy = program % plan.COPIES * plan.COPY_BYTES  # where the program reads
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
        ring, _ = _product(
            ring, stream + copy, qkv, _address(base, layer, ATTN_NORM, plan), _address(base, layer, WQKV + 1, plan),
            None, q_share, 0, base, thread, plan.D, plan.Q, False, plan,
        )  # fmt: skip
        ring = _attention(
            ring, qkv + copy, attended, exchange, keys, values, cos, sin, position, program, base, thread, plan
        )  # fmt: skip
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


# The same for several rows of x.


@gluon.jit
def _consume_rows(x, cos, sin, words, logits, program, base, thread, plan: gl.constexpr):
    """`_consume` of B rows of x, whose vectors are [B, ...]; products differ by what `_matrix` says of them."""
    copy = program % plan.COPIES * plan.COPY_BYTES  # where the program reads
    begin, rows = _share(program, plan.D, 2, plan)
    row, index = _place(thread, plan)
    own = ((gl.minimum(row, plan.B - 1) * plan.D + begin + gl.minimum(index, rows - 2)) * 2).to(gl.int64)
    word = _not_zero(ptx.load_words(x + own, (index < rows).to(gl.int32), 1, 1, 0)[0], 2)
    residual = _numbers(word, 2)
    _send(words + own, word, (row < plan.B) & (index < rows), plan)
    source = words
    ring = (gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0))
    for number in range(4 * plan.LAYERS + 1):
        layer = number // 4
        target, ring, residual = _product_rows(
            ring, residual, number, source, copy, logits, program, base, thread, plan
        )  # fmt: skip
        source = target
        if (number % 4 == 0) & (number < 4 * plan.LAYERS):
            source += plan.B * plan.Q * 2
            exchange = source + plan.B * (plan.N + plan.D + plan.F) * 2
            keys = _address(base, layer, KEYS, plan)
            values = _address(base, layer, VALUES, plan)
            slot, phase = _attention(
                (ring[0], ring[1]), target + copy, source, exchange, keys, values, cos, sin, None,
                program, base, thread, plan,
            )  # fmt: skip
            ring = (slot, phase, ring[2])


@gluon.jit
def _place(thread, plan: gl.constexpr):
    """The row of x of a thread's two outputs of a product, and the place of the first in the program's."""
    THREADS_OF_ROW: gl.constexpr = plan.ROWS // 2
    return thread // THREADS_OF_ROW, thread % THREADS_OF_ROW * 2


@gluon.jit
def _product_rows(ring, residual, number, source, copy, logits, program, base, thread, plan: gl.constexpr):
    """The program's share of a product, by its number as in `_matrix`, with the vectors at source: to those behind it.

    Of normalized inputs there is one section and any number of outputs, of others as many outputs as sums, to which
    residual, a thread's two numbers, is added, and any number of sections.  ring is the slot of the next tile, the
    parity of its phase, and which half of the sums is next.  Returns where results are, ring, and residual.
    """
    slot, phase, half = ring
    stage = number % 4
    last = number == 4 * plan.LAYERS
    normalized = stage % 2 == 0
    gated = stage == 2
    _, _, row_bytes, step, outputs, begin = _matrix(number, program, base, plan)
    inputs = row_bytes // plan.WEIGHT_BYTES
    width = gl.where(last, plan.V, gl.where(stage == 0, plan.Q, gl.where(gated, plan.F, plan.D)))
    target = source + (inputs * (2 * plan.B)).to(gl.int64) + gl.where(stage == 3, plan.EXCHANGE_BYTES, 0).to(gl.int64)
    gain = _address(base, number // 4, gl.where(gated, FFN_NORM, ATTN_NORM), plan)
    matrix = gl.where(stage == 0, WQKV, gl.where(stage == 1, WO, gl.where(gated, W_GATE_UP, W_DOWN)))
    scales = _address(base, number // 4, matrix + 1, plan)
    row, index = _place(thread, plan)
    own = gl.minimum(row, plan.B - 1)
    x_scale = gl.zeros_like(thread).to(gl.float32)
    piece = gl.where(gated, plan.ROWS // 2, plan.ROWS)
    for first in range(0, outputs, piece):
        count = gl.minimum(outputs - first, piece)
        pair = gl.minimum(index, (count - 1) // 2 * 2)  # of count outputs
        factors = ()
        if plan.SCALED:  # early, so that nobody waits for them
            for i in gl.static_range(2):
                scale = scales + ((begin + first + gl.minimum(pair + i, count - 1)) * 4).to(gl.int64)
                factors += (ptx.load_float(scale), ptx.load_float(scale + gl.where(gated, plan.F * 4, 0).to(gl.int64)))
        sums = base + plan.SUMS + half * plan.SUMS_BYTES
        for start in range(0, row_bytes, plan.SECTION):
            if first == 0:
                x_scale = _receive_rows(source + copy, gain, normalized, start, row_bytes, base, thread, plan)
            slot, phase = _multiply_rows(
                slot, phase, (count + step - 1) // step, x_scale, sums, start, row_bytes, base, thread, plan
            )  # fmt: skip
        ptx.barrier(1, THREADS)
        half = 1 - half
        squares = ptx.sum_shared(base + plan.SQUARES + own * (CONSUMER_WARPS * 4), CONSUMER_WARPS)
        norm = gl.where(normalized, gl.rsqrt(squares / inputs.to(gl.float32) + plan.EPS), 1.0)
        sums += (own * (plan.ROWS + 8) + gl.where(gated, pair // 4 * 8 + pair % 4, pair)) * 4
        STRIDE: gl.constexpr = plan.SUMS_BYTES // CONSUMER_WARPS
        results = ptx.sum_pairs(sums, CONSUMER_WARPS, STRIDE)
        ups = ptx.sum_pairs(sums + 16, CONSUMER_WARPS, STRIDE)
        both = ()
        for i in gl.static_range(2):
            result = results[i] * norm
            up = ups[i] * norm
            if plan.SCALED:
                result *= factors[2 * i]
                up *= factors[2 * i + 1]
            result = gl.where(gated, result / (1.0 + gl.exp(-result)) * up, result)
            both += (gl.where(normalized, result, result + residual[i]),)
        exists = (index < count) & (row < plan.B)
        place = own * width + begin + first + pair
        if last:
            address = logits + place.to(gl.int64) * 4
            ptx.store_word(address, both[0], exists)
            ptx.store_word(address + 4, both[1], exists & (index + 1 < count))
        else:
            word = _not_zero(_word(both[0], both[1], 2), 2)
            _send(target + (place * 2).to(gl.int64), word, exists, plan)
            sent = _numbers(word, 2)
            residual = (gl.where(normalized, residual[0], sent[0]), gl.where(normalized, residual[1], sent[1]))
    return target, (slot, phase, half), residual


@gluon.jit
def _receive_rows(source, gain, normalized, start, row_bytes, base, thread, plan: gl.constexpr):
    """Wait for what a warp needs of a section, from byte start of weights on, of B vectors in bfloat16.

    If normalized they are multiplied by gain, and the sums of their squares are stored too.  To shared memory, for int8
    weights as integers of 16 bits in two digits, whose scale is returned, for the row of x that the lane multiplies.
    """
    CHUNKS: gl.constexpr = plan.SECTION // CHUNK
    WIDTH: gl.constexpr = LANE_BYTES // plan.WEIGHT_BYTES // 2  # words of a lane in a chunk
    STRIDE: gl.constexpr = CHUNK // plan.WEIGHT_BYTES * 2
    WORDS: gl.constexpr = CHUNKS * WIDTH
    ROWS: gl.constexpr = max(1, min(plan.B, WORDS_AT_A_TIME // WORDS))  # at a time
    group = thread % 32 // 4
    warp = thread // 32
    column = start + warp * WARP_BYTES + thread % 32 * LANE_BYTES  # in bytes of weights
    n = gl.maximum((row_bytes - column + CHUNK - 1) // CHUNK, 0)  # chunks that reach as far
    offset = (column // plan.WEIGHT_BYTES * 2).to(gl.int64)
    stride = (row_bytes // plan.WEIGHT_BYTES * 2).to(gl.int64)
    gains = ptx.load_words(gain + offset, gl.where(normalized, n, 0), CHUNKS, WIDTH, STRIDE)
    x_scale = gl.zeros_like(thread).to(gl.float32)
    address = source + offset
    following = ptx.load_rows(address, n, stride, ROWS, CHUNKS, WIDTH, STRIDE)
    for begin in range(0, plan.B, ROWS):
        first = gl.minimum(begin, plan.B - ROWS)
        ptx.store_flag(base + plan.WAITING, 1)
        words = ptx.wait_for_rows(following, address, n, stride, ROWS, CHUNKS, WIDTH, STRIDE)
        ptx.store_flag(base + plan.WAITING, 0)
        if plan.B > ROWS:
            address = source + offset + gl.minimum(begin + ROWS, plan.B - ROWS) * stride
            more = gl.where(begin + ROWS < plan.B, n, 0)
            following = ptx.load_rows(address, more, stride, ROWS, CHUNKS, WIDTH, STRIDE)
        if normalized:
            products = ()
            for i in gl.static_range(ROWS):
                squares = gl.zeros_like(thread).to(gl.float32)
                for j in gl.static_range(WORDS):
                    numbers = _numbers(words[i * WORDS + j], 2)
                    squares += numbers[0] * numbers[0]
                    squares += numbers[1] * numbers[1]
                    products += (ptx.multiply_bfloat16(words[i * WORDS + j], gains[j]),)
                squares = ptx.sum_lanes(squares, (16, 8, 4, 2, 1))
                place = base + plan.SQUARES + ((first + i) * CONSUMER_WARPS + warp) * 4
                ptx.store_shared(place, squares, thread % 32 == 0)
            words = products
        target = base + plan.X + first * plan.X_PART_BYTES + thread * LANE_BYTES
        for i in gl.static_range(ROWS):
            own = words[i * WORDS : (i + 1) * WORDS]
            if plan.WEIGHT_BYTES == 1:
                peak = _peak(own, 2)
                peak = gl.where(peak < 1e-30, 1e-30, peak)
                x_scale = gl.where(group == first + i, peak / 32512.0, x_scale)
                _store_digits(own, 32512.0 / peak, target + i * plan.X_PART_BYTES, CHUNKS, plan)
            else:
                for chunk in gl.static_range(CHUNKS):
                    place = target + (i * plan.X_PART_BYTES + chunk * CHUNK)
                    ptx.store_shared_pair(place, own[2 * chunk], own[2 * chunk + 1])
    ptx.warp_barrier()
    return x_scale


@gluon.jit
def _multiply_rows(slot, phase, tiles, x_scale, sums, start, row_bytes, base, thread, plan: gl.constexpr):
    """Consume so many tiles of each chunk of a section, for a warp's parts of the sums [warps, B, ROWS + 8].

    A lane multiplies row lane % 32 // 4 of x, whose scale, with int8 weights, is x_scale.
    """
    warp = thread // 32
    group = thread % 32 // 4
    column = thread % 4
    row = gl.minimum(group, plan.B - 1)
    has_x = group < plan.B
    w = base + group * PITCH + warp * WARP_BYTES + column * 16
    x = base + plan.X + row * plan.X_PART_BYTES + warp * WARP_BYTES + column * 16
    sums += ((warp * plan.B + row) * (plan.ROWS + 8) + column * 2) * 4  # in different banks
    chunks = (gl.minimum(row_bytes - start, plan.SECTION) + CHUNK - 1) // CHUNK
    for _ in range(tiles):
        if plan.WEIGHT_BYTES == 1:
            zero = gl.zeros_like(thread)
            acc = (zero, zero, zero, zero, zero, zero, zero, zero)
        else:
            zero = gl.zeros_like(thread).to(gl.float32)
            acc = (zero, zero, zero, zero)
        for chunk in range(chunks):
            ptx.mbarrier_wait(base + plan.FULL + slot * 8, phase)
            if plan.WEIGHT_BYTES == 1:
                low = x + chunk * CHUNK + plan.B * plan.X_PART_BYTES
                acc = ptx.multiply_full_tile(acc, w + slot * TILE, x + chunk * CHUNK, low, has_x, WARP_BYTES // 64)
            else:
                acc = ptx.multiply_tile(acc, w + slot * TILE, x + chunk * CHUNK, has_x, 2, WARP_BYTES // 64)
            ptx.mbarrier_arrive(base + plan.EMPTY + slot * 8)
            slot, phase = _next(slot, phase, plan)
        if plan.WEIGHT_BYTES == 1:
            first = ((acc[0] + acc[4]).to(gl.float32) * 256.0 + (acc[2] + acc[6]).to(gl.float32)) * x_scale
            second = ((acc[1] + acc[5]).to(gl.float32) * 256.0 + (acc[3] + acc[7]).to(gl.float32)) * x_scale
        else:
            first = acc[0] + acc[2]
            second = acc[1] + acc[3]
        ptx.add_sums(sums, (first, second), start > 0, has_x)
        sums += 8 * 4
    return slot, phase


@gluon.jit
def _store_digits(words, inverse, target, CHUNKS: gl.constexpr, plan: gl.constexpr):
    """A lane's inputs times inverse, as integers of 16 bits, in two digits for each of CHUNKS chunks."""
    for chunk in gl.static_range(CHUNKS):
        digits = ()
        for first in gl.static_range(chunk * 4, chunk * 4 + 4, 2):
            four = ()
            for i in gl.static_range(2):
                numbers = _numbers(words[first + i], 2)
                for j in gl.static_range(2):
                    # 1.5 * 2^23 leaves the integer in the low bits
                    four += ((numbers[j] * inverse + (12582912.0 + 128.0)).to(gl.int32, bitcast=True),)
            digits += ptx.two_digits(four[0], four[1], four[2], four[3])
        ptx.store_shared_pair(target + chunk * CHUNK, digits[0], digits[2])
        ptx.store_shared_pair(target + (chunk * CHUNK + plan.B * plan.X_PART_BYTES), digits[1], digits[3])


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
    for copy in gl.static_range(plan.COPIES):
        ptx.store_word(address + copy * plan.COPY_BYTES, word, thread * plan.PER_WORD < rows)


@gluon.jit
def _send(address, word, exists, plan: gl.constexpr):
    """A word for all programs, where exists is true."""
    for copy in gl.static_range(plan.COPIES):
        ptx.store_word(address + copy * plan.COPY_BYTES, word, exists)


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
def _share_attention(positions, base, plan: gl.constexpr):
    """Choose how long parts of attention are, and store what `_part` needs, when there are several rows."""
    at = ()
    stored = ()
    longest = gl.to_tensor(1)
    for row in gl.static_range(plan.B):
        at += (ptx.load_words(positions + row * 4, 1, 1, 1, 0)[0],)
        stored += (gl.minimum(gl.maximum(at[row], 0), plan.S),)
        longest = gl.maximum(longest, stored[row])
    best = longest
    least = gl.to_tensor(1 << 30)
    for splits in range(1, plan.MOST_SPLITS + 1):
        share = (longest + splits - 1) // splits
        parts = gl.to_tensor(0)
        for row in gl.static_range(plan.B):
            parts += gl.maximum((stored[row] + share - 1) // share, 1)
        turns = (parts * (plan.K * plan.G) + plan.PROGRAMS - 1) // plan.PROGRAMS
        time = turns * (share + PART_SLOTS)
        better = (time < least) & ((parts - plan.B) * (plan.K * plan.G) <= plan.MOST_PARTS)
        best = gl.where(better, share, best)
        least = gl.where(better, time, least)
    end = gl.to_tensor(0)
    before = gl.to_tensor(0)
    for row in gl.static_range(plan.B):
        splits = gl.maximum((stored[row] + best - 1) // best, 1)
        end += splits * (plan.K * plan.G)
        table = base + plan.PARTS + row * 16
        ptx.store_flag(table, at[row])
        ptx.store_flag(table + 4, splits)
        ptx.store_flag(table + 8, end)
        ptx.store_flag(table + 12, before)
        before += (splits - 1) * (plan.K * plan.G)


@gluon.jit
def _parts(position, base, plan: gl.constexpr):
    """How many parts attention has in all."""
    if plan.B == 1:
        return plan.K * plan.G * _splits(gl.minimum(position, plan.S), plan)
    else:
        return ptx.load_flag(base + plan.PARTS + ((plan.B - 1) * 16 + 8))


@gluon.jit
def _splits(stored, plan: gl.constexpr):
    """Into how many parts the slots of a query head of one row are cut."""
    return gl.maximum(1, gl.minimum(plan.MOST_SPLITS, (stored + SPLIT - 1) // SPLIT))


@gluon.jit
def _part(number, position, base, plan: gl.constexpr):
    """A part of attention: row, its position, query head, split, splits, the slots it begins and ends with.

    And where what it and the other parts of the query head send begins.  Split 0, with the token itself, adds that up:
    of several rows it comes last, so that it waits for parts with lower numbers only.
    """
    if plan.B == 1:
        row = gl.to_tensor(0)
        splits = _splits(gl.minimum(position, plan.S), plan)
        query_head = number // splits
        split = number % splits
        place = query_head * (plan.MOST_SPLITS - 1)
    else:
        row = gl.to_tensor(0)
        for other in gl.static_range(plan.B - 1):
            row += (number >= ptx.load_flag(base + plan.PARTS + (other * 16 + 8))).to(gl.int32)
        table = base + plan.PARTS + row * 16
        position = ptx.load_flag(table)
        splits = ptx.load_flag(table + 4)
        number -= ptx.load_flag(table + 8) - splits * (plan.K * plan.G)
        query_head = number // splits
        split = splits - 1 - number % splits
        place = ptx.load_flag(table + 12) + query_head * (splits - 1)
    stored = gl.minimum(gl.maximum(position, 0), plan.S)
    share = (stored + splits - 1) // splits
    return row, position, query_head, split, splits, split * share, gl.minimum((split + 1) * share, stored), place


@gluon.jit
def _attention(
    ring, qkv, attended, exchange, keys, values, cos, sin, position, program, base, thread, plan: gl.constexpr
):  # fmt: skip
    """Attention of a token of each row over the slots before its position and its own k and v, which are stored there.

    A program takes query heads, or a part of the slots of one (Flash-Decoding, Dao et al. 2023): who has the first
    part, to which the token itself belongs, adds up what the others send.  A token beyond the last slot is not stored,
    and sees only what is; one of several rows with a position below 0 gets zeros.  Returns ring.
    """
    H: gl.constexpr = plan.H
    slot, phase = ring
    for number in range(program, _parts(position, base, plan), plan.PROGRAMS):
        row, at, query_head, split, splits, begin, end, place = _part(number, position, base, plan)
        row_attended = attended + (row * (plan.N * 4 // plan.PER_WORD)).to(gl.int64)
        if (plan.B == 1) | (at >= 0):
            cache = row.to(gl.int64) * (plan.K * plan.S * H * 4 // plan.PER_WORD)
            angles = (row * (H // 2 * 4)).to(gl.int64)
            slot, phase = _attend_part(
                slot, phase, qkv + (row * (plan.Q * 4 // plan.PER_WORD)).to(gl.int64), row_attended, exchange, place,
                keys + cache, values + cache, cos + angles, sin + angles, at, at < plan.S, query_head, split, splits,
                begin, end, base, thread, plan,
            )  # fmt: skip
        else:
            _publish(row_attended, query_head * H, H, _not_zero(thread * 0, 2), thread, plan)
    return slot, phase


@gluon.jit
def _attend_part(
    slot, phase, qkv, attended, exchange, place, keys, values, cos, sin, position, has_slot, query_head, split, splits,
    begin, end, base, thread, plan: gl.constexpr,
):  # fmt: skip
    """A part of a query head, one of splits: its numbers to attended, or to who adds up all parts.

    Of other parts than the first one, those are in exchange, the first one's at place.  Returns ring.
    """
    H: gl.constexpr = plan.H
    WORDS: gl.constexpr = H // plan.PER_WORD
    SLOT: gl.constexpr = H * 4 // plan.PER_WORD  # bytes
    KIND: gl.constexpr = gl.float32 if plan.PER_WORD == 1 else gl.bfloat16
    area = base + plan.ATTENTION
    parts = area + 3 * H * 4
    kv_head = query_head // plan.G
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
        offset = (gl.cast(kv_head, gl.int64) * plan.S + position) * SLOT + pair * 4
        first = area + H * 4 + pair * (4 * plan.PER_WORD)
        _store_pair(keys + offset, first, thread < WORDS, plan.PER_WORD)
        _store_pair(values + offset, first + H * 4, thread < WORDS, plan.PER_WORD)
    own = has_slot & (split == 0)
    slot, phase = _attend(slot, phase, begin, end, own, area, parts, base, thread, plan)
    ptx.barrier(1, THREADS)
    highest, total, sums = _combine_warps(parts, thread, plan)
    address = exchange + gl.cast(place, gl.int64) * ((H + 2) * 4)
    if split > 0:
        _send_part(address + gl.cast((split - 1) * ((H + 2) * 4), gl.int64), highest, total, sums, thread, plan)
    else:
        if plan.MOST_SPLITS > 1:
            if splits > 1:
                total, sums = _add_parts(address, splits - 1, highest, total, sums, base, thread, plan)
        word = _not_zero(_word(sums[0] / total, sums[plan.PER_WORD - 1] / total, plan.PER_WORD), plan.PER_WORD)
        _publish(attended, query_head * H, H, word, thread, plan)
    return slot, phase


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
def _attend(slot, phase, begin, end, own, area, parts, base, thread, plan: gl.constexpr):
    """Of each warp: maximum of scores, total of weights and weighted sums of v over its slots of the cache, to parts.

    Several lanes have one, 16 bytes of k and of v each; the first ones of all, if own is true, the token's own k and v
    besides.  Tiles are as `_produce_cache` makes them.  Returns ring.
    """
    H: gl.constexpr = plan.H
    NUMBERS: gl.constexpr = 4 * plan.PER_WORD  # of a lane
    LANES: gl.constexpr = H // NUMBERS  # of a slot
    SLOTS: gl.constexpr = THREADS // LANES  # that all threads have at a time: half of a tile's
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
    place = base + thread // (CHUNK // 16) * PITCH + thread % (CHUNK // 16) * 16
    left = end - begin - thread // LANES
    for _ in range(begin, end, 2 * SLOTS):
        ptx.mbarrier_wait(base + plan.FULL + slot * 8, phase)
        scores = ()
        block = ()
        higher = peak
        for i in gl.static_range(2):
            score = zero
            words = ptx.load_shared_words(place + slot * TILE + i * (2 * PITCH))
            for j in gl.static_range(4):
                numbers = _numbers(words[j], plan.PER_WORD)
                for m in gl.static_range(plan.PER_WORD):
                    score += numbers[m] * queries[j * plan.PER_WORD + m]
            words = ptx.load_shared_words(place + slot * TILE + (4 + i * 2) * PITCH)
            exists = left > i * SLOTS
            for j in gl.static_range(4):
                block += (gl.where(exists, words[j], 0),)  # what is there else may be NaN
            score = ptx.sum_lanes(score, _powers(1, LANES))
            score = gl.where(exists, score, float("-inf"))
            higher = gl.maximum(higher, score)
            scores += (score,)
        ptx.mbarrier_arrive(base + plan.EMPTY + slot * 8)
        slot, phase = _next(slot, phase, plan)
        left -= 2 * SLOTS
        shift = _finite(higher)
        fade = gl.exp2(peak - shift)
        peak = higher
        total *= fade
        faded = ()
        for i in gl.static_range(NUMBERS):
            faded += (sums[i] * fade,)
        sums = faded
        for i in gl.static_range(2):
            weight = gl.exp2(scores[i] - shift)
            total += weight
            new = ()
            for j in gl.static_range(4):
                numbers = _numbers(block[i * 4 + j], plan.PER_WORD)
                for m in gl.static_range(plan.PER_WORD):
                    new += (sums[j * plan.PER_WORD + m] + numbers[m] * weight,)
            sums = new
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
    return slot, phase


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
