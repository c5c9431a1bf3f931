"""Weights as they are held on a device: plain arrays, or int8 with scales."""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """A weight as int8: `values * scale[..., None]` approximates the original.

    values int8 [*out, in], scale float32 [*out]: one scale an output channel.  `out` may be several axes (a fused
    weight keeps its parts apart); seen as a matrix it is always [out, in].  A pytree: transformations see two arrays.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self):
        """[*out, in]."""
        return self.values.shape


Array = jax.Array | QTensor
