"""Weights as they are held on a device: plain arrays, or int8 with scales."""

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """A tensor as int8: values times scale approximates the original.

    values int8 [*out, in]; scale float32, either [*out] (one an output channel) or [*out, ceil(in / 128)] (one for
    each group of 128 inputs, of which the last may be short).  `out` may be several axes (a fused weight keeps its
    parts apart); seen as a matrix it is always [out, in].  A pytree: transformations see two arrays.
    int8_inputs marks a weight that was rotated (`quantize.rotate`) and multiplies rotated int8 activations: "w8a8".
    """

    values: jax.Array
    scale: jax.Array
    int8_inputs: bool = field(default=False, metadata=dict(static=True))

    @property
    def shape(self):
        """[*out, in]."""
        return self.values.shape


Array = jax.Array | QTensor
