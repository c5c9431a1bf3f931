"""Attention by cuDNN, for what its interface can say: causal, over keys and values of the same tokens."""

import jax


def attention(q, k, v, positions):
    """As `reference.attention`, of q [B, T, K, G, H] at positions 0 to T-1 over k and v [B, K, T, H]."""
    batch, tokens, heads, group, dim = q.shape
    q = q.reshape(batch, tokens, heads * group, dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return out.reshape(batch, tokens, heads, group, dim)
