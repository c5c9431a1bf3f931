"""Fine-tune a model on a text, and give it back: JAX training code, Orbax, and text from the result.

    python examples/finetune.py OUT
    python -m jaxllm.convert OUT folder
    python -m jaxllm.generate --model folder --greedy --prompt "To be, or not to be"

The first command trains the small model inside the package for some steps on the text below, or on --text FILE, and
saves its `Params` with Orbax into OUT/params, and config.json and the tokenizer beside.  Without --model the third one
goes on as a play of Shakespeare's, and with it as a lighthouse keeper.

optax (`pip install optax`) and Orbax (`pip install 'jaxllm[orbax]'`) are needed by this example.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jaxllm
from jaxllm.convert.checkpoint import carried_files
from jaxllm.errors import ArgumentParser, InputError, run_command
from jaxllm.loader import config_text, open_folder, write_files
from jaxllm.model import Params
from jaxllm.quantize import dequantize
from jaxllm.tensor import QTensor

TEXT = """\
To be, or not to be, is nothing that I ask myself. I keep the lighthouse on the northern rock.
Every evening I climb the stairs, two hundred and twelve of them, and I light the lamp.
Every morning I climb them again, and I put it out, and I wipe the salt off the glass.
The boat comes on the first of the month, with flour, oil, and letters for nobody.
The king has never been here. The gulls have, and they were not impressed by the rock.
When the fog comes in I ring the bell, and some captain that I shall never meet turns his ship.
That is the whole of my trade: somebody does not drown, and does not know whom to thank.
"""
LENGTH = 64  # tokens in a window
BATCH = 16


def float_params(params: Params) -> Params:
    """The params as float32 masters: what is int8 cannot be trained."""
    return jax.tree.map(
        lambda w: dequantize(w) if isinstance(w, QTensor) else w.astype(jnp.float32),
        params,
        is_leaf=lambda node: isinstance(node, QTensor),
    )


def train(model: jaxllm.Model, text: str, steps: int, lr: float) -> Params:
    """Params float32 after `steps` of AdamW on random windows of the text."""
    tokens = np.array(model.tokenizer.encode(text, bos=False), np.int32)
    length = min(LENGTH, len(tokens) - 1)
    if length < 1:
        raise InputError(f"the text has {len(tokens)} tokens; give one of at least 2 with --text")
    # every window begins as a prompt does
    start = model.tokenizer.encode("", bos=True)
    config = replace(model.config, kv_cache=None)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr))

    def loss_of(params, batch):
        logits, _ = jaxllm.forward(params, config, batch[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        return losses.mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = float_params(model.params)
    state = optimizer.init(params)
    random = np.random.default_rng(0)
    for i in range(1, steps + 1):
        starts = random.integers(0, len(tokens) - length, (BATCH, 1))
        windows = tokens[starts + np.arange(length + 1)]
        windows = np.concatenate([np.tile(np.array(start, np.int32), (BATCH, 1)), windows], axis=1)
        params, state, loss = step(params, state, windows)
        if i % 5 == 0 or i in (1, steps):
            print(f"step {i}/{steps}  loss {float(loss):.3f}", flush=True)
    return params


def main(argv) -> None:
    """Train and save."""
    parser = ArgumentParser(prog="python examples/finetune.py", description="Fine-tune a model, and save it by Orbax.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; convert makes a model folder of it")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what to train on (default: a lighthouse keeper)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder (default: the one in the package)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.lr <= 0:
        raise InputError(f"got --steps {args.steps} and --lr {args.lr}; both must be above 0")
    try:
        text = args.text.read_text() if args.text else TEXT
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {args.text} cannot be read: {error}") from None

    folder = open_folder(args.model)
    try:  # before the time is spent
        args.out.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{args.out} cannot be made: {error.strerror}; choose another folder") from None
    params = train(jaxllm.load(folder), text, args.steps, args.lr)

    with ocp.StandardCheckpointer() as checkpointer:
        params = jax.tree.map(lambda w: w.astype(folder.config.dtype), params)
        checkpointer.save((args.out / "params").absolute(), params)
    write_files(args.out, carried_files(folder.path))
    (args.out / "config.json").write_text(config_text(folder.config))
    print(f"{args.out}: make a model folder of it with python -m jaxllm.convert {args.out} FOLDER")


if __name__ == "__main__":
    sys.exit(run_command(main))
