"""Attention for prefill on Hopper GPUs, as a Pallas kernel for Mosaic GPU.

FlashAttention-3 (Shah et al. 2024): one warp group of a program has k and v copied to shared memory, and two others
take turns at the tensor cores, so that one multiplies while the other computes its exponentials.  Each of these has its
next product of q and k made together with the one of weights and v, and computes the next weights meanwhile.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

GROUPS = 2  # warp groups that multiply
ROWS = 64  # queries of each: Hopper's tensor cores multiply so many rows
TILE = GROUPS * ROWS
SLOTS = 128  # that are visited at a time
STAGES = 2  # blocks of slots in shared memory
PROGRAMS = 264  # that are begun with the longest: enough to keep an H100's 132 multiprocessors at work to the end


class Shared(NamedTuple):
    """A program's shared memory: tiles, and barriers for what is there, what may be replaced, and whose turn it is."""

    q: Any
    k: Any
    v: Any
    q_there: Any
    k_there: Any
    v_there: Any
    tail_there: Any
    k_free: Any
    v_free: Any
    turns: Any


def _attend(q, k, v, positions, lowest, highest, out, shared, *, heads, scale):
    """A tile of queries of one head: heads are those of q for one of k and v, scale is that of scores before exp2."""
    row = lax.axis_index("row")
    tile = lax.axis_size("tile") - 1 - lax.axis_index("tile")  # the last queries see the most slots: they go first
    head = lax.axis_index("section") * lax.axis_size("head") + lax.axis_index("head")
    group = lax.axis_index("group")

    def slots_up_to(position):
        return jnp.clip(position[row, tile], 0, k.shape[2] - 1) + 1

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(224, action="increase")
        first = tile * TILE + group * ROWS
        rows = (row, pl.ds(first, ROWS), head)
        plgpu.copy_gmem_to_smem(q.at[rows], shared.q.at[group], shared.q_there.at[group])
        position = plgpu.load(
            positions.at[row, pl.ds(first, ROWS)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
        )
        position = jnp.clip(position, 0, k.shape[2] - 1)
        plgpu.barrier_wait(shared.q_there.at[group])
        result = _multiply(shared, group, position, slots_up_to(lowest), slots_up_to(highest), scale)
        shared.q[group] = result.astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.q.at[group], out.at[rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(56, action="decrease")
        _load(shared, k.at[row, lax.div(head, heads)], v.at[row, lax.div(head, heads)], partial(slots_up_to, highest))


def _load(shared, k, v, count_slots):
    """Copy blocks of k and v [S, H] to shared memory, as far as any query of the tile sees them."""

    def copy(source, step, tiles, there):
        plgpu.copy_gmem_to_smem(source.at[pl.ds(step * SLOTS, SLOTS)], tiles.at[lax.rem(step, STAGES)], there)

    copy(k, 0, shared.k, shared.k_there.at[0])  # there always is one
    count = count_slots()

    def load(step, _):
        stage = lax.rem(step, STAGES)
        filled = count - step * SLOTS

        @pl.when(step >= STAGES)
        def _():
            plgpu.barrier_wait(shared.k_free.at[stage])

        @pl.when(step > 0)
        def _():
            copy(k, step, shared.k, shared.k_there.at[stage])

        @pl.when(step >= STAGES)
        def _():
            plgpu.barrier_wait(shared.v_free.at[stage])

        @pl.when(filled >= SLOTS)
        def _():
            copy(v, step, shared.v, shared.v_there.at[stage])

        # free slots hold anything: a v there would count even with weight 0, if it is NaN
        @pl.when(filled < SLOTS)
        def _():
            copy(v, step, shared.v, shared.tail_there)
            plgpu.barrier_wait(shared.tail_there)
            for begin in range(0, SLOTS, 64):
                slots = begin + plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=plgpu.Layout.WGMMA)
                for column in range(0, v.shape[-1], 64):
                    part = shared.v.at[stage, pl.ds(begin, 64), pl.ds(column, 64)]
                    numbers = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                    part[...] = jnp.where(slots < filled, numbers, jnp.zeros((), v.dtype))
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.v_there.at[stage])

    lax.fori_loop(0, pl.cdiv(count, SLOTS), load, None)


def _multiply(shared, group, position, shortest, longest, scale):
    """Attention float32 [ROWS, H] of queries at position [ROWS]; those of the tile see shortest to longest slots."""
    width = shared.q.shape[-1]
    dtype = shared.q.dtype
    score_type = plgpu.ACC((ROWS, SLOTS), jnp.float32)
    result_type = plgpu.ACC((ROWS, width), jnp.float32)

    def multiply_keys(scores, step):
        stage = lax.rem(step, STAGES)
        plgpu.barrier_wait(shared.k_there.at[stage])
        plgpu.barrier_wait(shared.turns.at[group])
        plgpu.wgmma(scores, shared.q.at[group], shared.k.at[stage].transpose((1, 0)))

    def multiply_values(result, weights, step):
        stage = lax.rem(step, STAGES)
        plgpu.barrier_wait(shared.v_there.at[stage])
        plgpu.wgmma(result, weights, shared.v.at[stage])

    def end_turn():
        plgpu.barrier_arrive(shared.turns.at[1 - group])

    def softmax(scores, step, masked, peak, total):
        if masked:
            slots = plgpu.broadcasted_iota(jnp.int32, (ROWS, SLOTS), 1, layout=plgpu.Layout.WGMMA)
            visible = slots <= lax.broadcast_in_dim(position - step * SLOTS, (ROWS, SLOTS), [0])
            scores = jnp.where(visible, scores, -jnp.inf)
        higher = jnp.maximum(peak, scores.max(axis=1) * scale)  # not -inf: each row sees slot 0
        fade = jnp.exp2(peak - higher)
        weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(higher, scores.shape, [0]))
        return weights, fade, higher, total * fade + weights.sum(axis=1)

    def visit(step, carry, masked):
        """Multiply the weights of the block before this one by its v, and compute those of this one."""
        result, weights, peak, total = carry

        def products(scores_ref, result_ref):
            result_ref[...] = result
            multiply_keys(scores_ref, step)
            multiply_values(result_ref, weights, step - 1)
            end_turn()
            scores = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
            plgpu.barrier_arrive(shared.k_free.at[lax.rem(step, STAGES)])
            return *softmax(scores, step, masked, peak, total), result_ref[...]

        next_weights, fade, higher, more, sums = pl.run_scoped(products, score_type, result_type)
        # registers of the weights are the tensor cores' until here
        next_weights, sums = lax.optimization_barrier((next_weights, sums))
        plgpu.barrier_arrive(shared.v_free.at[lax.rem(step - 1, STAGES)])
        return sums * lax.broadcast_in_dim(fade, sums.shape, [0]), next_weights.astype(dtype), higher, more

    def first_scores(scores):
        multiply_keys(scores, 0)
        end_turn()
        return scores[...]

    def last_product(result_ref):
        result_ref[...] = result
        multiply_values(result_ref, weights, steps - 1)
        return result_ref[...]

    @pl.when(group == 1)
    def _():
        plgpu.barrier_arrive(shared.turns.at[0])

    by_row = plgpu.Layout.WGMMA.reduce(1)
    nothing = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), by_row)
    zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
    scores = pl.run_scoped(first_scores, score_type)
    plgpu.barrier_arrive(shared.k_free.at[0])
    weights, _, peak, total = softmax(scores, 0, True, nothing, zero)
    result = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
    carry = result, weights.astype(dtype), peak, total
    steps = pl.cdiv(longest, SLOTS)
    unmasked = jnp.maximum(lax.div(shortest, SLOTS), 1)
    carry = lax.fori_loop(1, unmasked, partial(visit, masked=False), carry)
    result, weights, peak, total = lax.fori_loop(unmasked, steps, partial(visit, masked=True), carry)
    result = pl.run_scoped(last_product, result_type)
    return result * lax.broadcast_in_dim(1 / total, result.shape, [0])


@jax.jit
def attention(q, k, v, positions):
    """Attention of q [B, T, K, G, H], at positions int32 [B, T], over k and v [B, K, S, H], in their type.

    As `reference.attention`, of bfloat16 or float16; T and S are multiples of 8, H is 64 or 128.  What lies in slots
    behind the largest position of a row of the batch has no influence, even if it is not finite.
    """
    B, T, K, G, H = q.shape
    tiles = pl.cdiv(T, TILE)
    positions = jnp.pad(positions, ((0, 0), (0, tiles * TILE - T)), mode="edge")
    by_tile = positions.reshape(B, tiles, TILE)
    # the fewer heads of k and v are under way, the more of them is in L2 when other queries read it
    together = next(n for n in range(1, K + 1) if K % n == 0 and (n == K or n * G * B * tiles >= PROGRAMS))
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

    def tile(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=transforms)

    out = plgpu.kernel(
        partial(_attend, heads=G, scale=H**-0.5 * math.log2(math.e)),
        out_type=jax.ShapeDtypeStruct((B, T, K * G, H), q.dtype),
        grid=(K // together, tiles, B, together * G),
        grid_names=("section", "tile", "row", "head"),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=[
            Shared(
                q=tile(GROUPS, ROWS, H),
                k=tile(STAGES, SLOTS, H),
                v=tile(STAGES, SLOTS, H),
                q_there=plgpu.Barrier(num_barriers=GROUPS),
                k_there=plgpu.Barrier(num_barriers=STAGES),
                v_there=plgpu.Barrier(num_barriers=STAGES),
                tail_there=plgpu.Barrier(),
                k_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
                v_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
                turns=plgpu.Barrier(num_barriers=GROUPS),
            )
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q.reshape(B, T, K * G, H), k, v, positions, by_tile.min(-1), by_tile.max(-1))
    return out.reshape(q.shape)
