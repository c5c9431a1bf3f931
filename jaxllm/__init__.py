"""jaxllm: LLaMA inference in JAX, fast on GPUs, and a pure function throughout.

>>> import jaxllm
>>> model = jaxllm.load()  # the small model inside the package; or a folder that `python -m jaxllm.convert` wrote
>>> for piece in jaxllm.stream(model, "To be, or not to be"):
...     print(piece, end="", flush=True)
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "load": "loader",
    "Model": "loader",
    "generate": "generate",
    "stream": "generate",
    "Conversation": "generate",
    "Generation": "generate",
    "Result": "generate",
    "forward": "model",
    "init_cache": "model",
    "init_params": "model",
    "KVCache": "model",
    "Params": "model",
    "Sampling": "sampling",
    "quantize_params": "model",
    "plan": "resources",
    "usage": "resources",
    "load_template": "chat",
    "ChatTemplate": "chat",
    "ModelConfig": "config",
    "preset": "config",
    "QTensor": "tensor",
    "InputError": "errors",
    "ModelError": "errors",
}
__all__ = list(_HOMES)


def __getattr__(name):
    # only when asked for: a part of the package need not wait for the others
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    return getattr(import_module(f"jaxllm.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
