"""How the next token is chosen from the logits; settings are arrays, so that none of them recompiles anything."""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import ops
from jaxllm.errors import InputError

_RANGES = {  # field -> (type, test, what is allowed)
    "temperature": (np.float32, lambda v: (v == 0) | (v >= 1e-3) & (v <= 1e3), "0 (greedy), or from 0.001 to 1000"),
    "top_k": (np.int32, lambda v: v >= 0, "0 (off) or above"),
    "top_p": (np.float32, lambda v: (v >= 1e-6) & (v <= 1), "from 0.000001 to 1 (off)"),
    "min_p": (np.float32, lambda v: (v >= 0) & (v <= 1), "from 0 (off) to 1"),
    "repetition_penalty": (np.float32, lambda v: (v >= 1e-3) & (v <= 1e3), "from 0.001 to 1000 (1 is off)"),
    "seed": (np.uint32, lambda v: v >= 0, "from 0 to 4294967295"),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Settings of `sample`: each a number for all rows, or one number a row.

    temperature divides the logits, and 0 takes the most likely token.  top_k keeps the k most likely tokens, top_p the
    fewest most likely ones whose probabilities reach p (Holtzman et al. 2020), min_p those at least p times as likely
    as the most likely one (Nguyen et al. 2024); they apply in this order, after the temperature.  Tokens that tie with
    the last one kept are kept.  repetition_penalty p makes tokens that occurred in the row less likely: positive
    logits are divided by p, negative ones multiplied (Keskar et al. 2019).  seed fixes the draws of a row, whatever
    batch it is in.
    """

    temperature: float | jax.Array = 0.8
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0
    min_p: float | jax.Array = 0.0
    repetition_penalty: float | jax.Array = 1.0
    seed: int | jax.Array = 0

    def rows(self, batch: int) -> "Sampling":
        """The same settings as arrays [batch].  Raises InputError for values out of range or for other rows."""
        values = {}
        for field in fields(self):
            dtype, allowed, text = _RANGES[field.name]
            given = np.asarray(getattr(self, field.name))
            if given.shape not in ((), (batch,)):
                raise InputError(
                    f"{field.name} has shape {given.shape}; it must be one number, or one for each of the {batch} rows"
                )
            whole = np.issubdtype(dtype, np.integer)
            with np.errstate(invalid="ignore"):
                fits = (
                    np.issubdtype(given.dtype, np.integer if whole else np.number)
                    and allowed(given).all()
                    and (not whole or (given <= np.iinfo(dtype).max).all())
                )
            if not fits:
                raise InputError(f"{field.name} is {getattr(self, field.name)}; it must be {text}")
            values[field.name] = np.broadcast_to(given.astype(dtype), (batch,))
        return Sampling(**values)


def sample(logits, sampling: Sampling, step, seen, impl="auto"):
    """Choose a token for each row of logits float32 [B, V]: int32 [B].

    sampling holds arrays [B]; step int32 [B] numbers a row's draws, so that a draw depends on the row's seed and step
    and on nothing else; seen bool [B, V] marks the tokens that occurred in the row, for the repetition penalty.
    impl is as in `ops.check_implementations`.
    """
    penalty = sampling.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    def perturbed():
        """Logits whose largest is the draw (Gumbel 1954), and of greedy rows those as they are."""
        scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
        restricts = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
        kept = _where(restricts, lambda: ops.restrict(scaled, sampling.top_k, sampling.top_p, impl), lambda: scaled)
        floor = jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(sampling.min_p)[:, None]  # log(0) = -inf keeps all
        kept = jnp.where(kept >= floor, kept, -jnp.inf)
        keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(sampling.seed, step)
        keys = jax.lax.optimization_barrier(keys)  # both words of a key in one kernel
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        return jnp.where(sampling.temperature[:, None] > 0, kept + noise, logits)

    return jnp.argmax(_where(jnp.any(sampling.temperature > 0), perturbed, lambda: logits), axis=-1).astype(jnp.int32)


def _where(condition, then, otherwise):
    """then() or otherwise(), by a scalar: a CPU computes only the one that is asked for.

    On a GPU a branch makes the host wait for the condition and breaks up the CUDA graph at every token: 0.2 to 0.6 ms
    on an H100, where to draw for nothing takes less than 0.03.
    """
    return jax.lax.platform_dependent(
        condition,
        cpu=lambda condition: jax.lax.cond(condition, then, otherwise),
        default=lambda condition: jnp.where(condition, then(), otherwise()),
    )
