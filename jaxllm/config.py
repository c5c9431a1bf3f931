"""What a LLaMA is: a frozen record of sizes and constants, of which every variant is a value; some have names."""

import math
from dataclasses import asdict, dataclass, fields

from jaxllm.errors import InputError, ModelError

DTYPES = ("float32", "bfloat16", "float16")
KV_CACHES = (None, "int8")


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's stretching of RoPE's wavelengths (lengths in tokens).

    Wavelengths above `original_max_len / low_freq_factor` grow by `factor`, those below
    `original_max_len / high_freq_factor` stay, and those between are interpolated.
    Source: `apply_scaling` in Meta's llama_models; `rope_type: llama3` in Hugging Face's config.json.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192

    def __post_init__(self):
        for field in fields(self):
            _require_positive("rope_scaling", field.name, getattr(self, field.name), whole=field.type is int)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ModelError(
                f"rope_scaling has low_freq_factor={self.low_freq_factor}, which must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model; hashable, so that it can be a static argument of `jax.jit`.

    vocab_size V, dim D, n_layers L, n_heads N, n_kv_heads K (it divides N: N is MHA, 1 is MQA, between is GQA),
    head_dim H (even), ffn_dim F; max_len is the context that the model was trained for, in tokens.
    attention_bias: q, k and v have biases; qk_norm: each head of q and k is normed before it is rotated; with a
    sliding_window a token sees itself and sliding_window - 1 before it, and else all before it.
    dtype is the type of activations and cache, and of the float weights that are made or stored for this model;
    kv_cache="int8" makes the cache int8, with a scale for each row, kv head and slot.  impl names the implementations
    of the ops that run the model (`ops.check_implementations`); it is a setting of a run, and not stored.
    Raises ModelError when a value is out of range or two of them contradict each other.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    dtype: str = "bfloat16"
    kv_cache: str | None = None
    impl: str = "auto"

    def __post_init__(self):
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_len"):
            _require_positive("config", name, getattr(self, name), whole=True)
        for name in ("norm_eps", "rope_theta"):
            _require_positive("config", name, getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"config has n_kv_heads={self.n_kv_heads}, which does not divide n_heads={self.n_heads}")
        if self.head_dim % 2:
            raise ModelError(f"config has head_dim={self.head_dim}; RoPE rotates pairs, so it must be even")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ModelError(f"config has rope_scaling={self.rope_scaling!r}; it must be a RopeScaling or None")
        for name in ("tied", "attention_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ModelError(f"config has {name}={getattr(self, name)!r}; it must be true or false")
        if self.sliding_window is not None:
            _require_positive("config", "sliding_window", self.sliding_window, whole=True)
        if self.dtype not in DTYPES:
            raise ModelError(f"config has dtype={self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.kv_cache not in KV_CACHES:
            raise ModelError(f"config has kv_cache={self.kv_cache!r}; it must be None (as dtype) or int8")
        if not isinstance(self.impl, str):
            raise ModelError(f"config has impl={self.impl!r}; it must be the name of an implementation, or auto")

    @property
    def group(self) -> int:
        """G: how many query heads share one kv head."""
        return self.n_heads // self.n_kv_heads

    def to_json(self) -> dict:
        """The values that a model is stored with, as a dict that `json` can write."""
        values = asdict(self)
        del values["impl"]
        return values

    @staticmethod
    def from_json(values: dict) -> "ModelConfig":
        """The inverse of `to_json`.  Raises ModelError for a missing, unknown or impossible value."""
        if not isinstance(values, dict):
            raise ModelError(f"config must be a JSON object, got {type(values).__name__}")
        scaling = values.get("rope_scaling")
        try:
            if scaling is not None:
                values = values | {"rope_scaling": RopeScaling(**scaling)}
            return ModelConfig(**values)
        except TypeError as error:  # a name that is missing or that we do not know; Python's message names it
            what = str(error).split("__init__() ")[-1]
            raise ModelError(f"config does not fit this version of jaxllm: {what}") from None


def _require_positive(where, name, value, whole=False):
    kind, allowed = (int, "a whole number") if whole else ((int, float), "a number")
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
        raise ModelError(f"{where} has {name}={value!r}; it must be {allowed} above 0")


def _llama(vocab_size, dim, n_layers, n_heads, ffn_dim, max_len, n_kv_heads=None, **more):
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        head_dim=dim // n_heads,
        ffn_dim=ffn_dim,
        max_len=max_len,
        **more,
    )


_LLAMA3 = dict(vocab_size=128256, n_kv_heads=8, rope_theta=500000.0)
_LLAMA32 = _LLAMA3 | dict(max_len=131072, rope_scaling=RopeScaling(factor=32.0), tied=True)

# Sizes as in each release's params.json or config.json; LLaMA 1's 33B is the one whose folder Meta named 30B.
PRESETS: dict[str, ModelConfig] = {
    "llama-7b": _llama(32000, 4096, 32, 32, 11008, 2048, norm_eps=1e-6),
    "llama-13b": _llama(32000, 5120, 40, 40, 13824, 2048, norm_eps=1e-6),
    "llama-33b": _llama(32000, 6656, 60, 52, 17920, 2048, norm_eps=1e-6),
    "llama-65b": _llama(32000, 8192, 80, 64, 22016, 2048),
    "llama2-7b": _llama(32000, 4096, 32, 32, 11008, 4096),
    "llama2-13b": _llama(32000, 5120, 40, 40, 13824, 4096),
    "llama2-70b": _llama(32000, 8192, 80, 64, 28672, 4096, n_kv_heads=8),
    "tinyllama-1.1b": _llama(32000, 2048, 22, 32, 5632, 2048, n_kv_heads=4),
    "llama3-8b": _llama(dim=4096, n_layers=32, n_heads=32, ffn_dim=14336, max_len=8192, **_LLAMA3),
    "llama3-70b": _llama(dim=8192, n_layers=80, n_heads=64, ffn_dim=28672, max_len=8192, **_LLAMA3),
    "llama3.2-1b": _llama(dim=2048, n_layers=16, n_heads=32, ffn_dim=8192, **_LLAMA32),
    "llama3.2-3b": _llama(dim=3072, n_layers=28, n_heads=24, ffn_dim=8192, **_LLAMA32),
}


def preset(name: str) -> ModelConfig:
    """The config of a released model, by name.  Raises InputError listing the names when there is none such."""
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
