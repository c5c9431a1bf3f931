"""Conversations as the text that a model was trained on: by the checkpoint's own Jinja template, or LLaMA 2's."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxllm import chat_template
from jaxllm.errors import InputError, ModelError
from jaxllm.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
MAX_TEMPLATE = 1 << 20  # characters
CUT = "\N{INVISIBLE SEPARATOR}\ufdd0\N{INVISIBLE SEPARATOR}"  # holds a noncharacter, which no text should have

# Touvron et al. 2023b, appendix A; `chat_completion` in Meta's llama repository
LLAMA2 = """
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- for message in messages if message.role != 'system' -%}
    {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
        {{- raise_exception('user and assistant must take turns, and the user begins') -}}
    {%- elif message.role == 'user' -%}
        {{- bos_token ~ '[INST] ' -}}
        {%- if loop.first and system %}{{ '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' }}{% endif -%}
        {{- message.content | trim ~ ' [/INST]' -}}
    {%- else -%}
        {{- ' ' ~ message.content | trim ~ ' ' ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, where it came from, and the texts of special tokens that it may use by name."""

    name: str
    source: str
    variables: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of messages, each with role (of ROLES) and content, up to where the next answer begins.

        Raises InputError for messages that are none, and for what the template refuses; ModelError when the template
        cannot be run, or takes too long.
        """
        for message in messages:
            if message.keys() != {"role", "content"} or message["role"] not in ROLES:
                raise InputError(
                    f"a message has {dict(message)!r}; it must have content, and a role: {', '.join(ROLES)}"
                )
        asked = {"template": self.source, "messages": [*map(dict, messages)], "variables": dict(self.variables)}
        # -P: modules beside that file must not be taken for others of their names
        command = [sys.executable, "-P", chat_template.__file__]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                timeout=2 * chat_template.SECONDS,
                process_group=0,  # a terminal sends Ctrl-C to all of ours
            )
            answer = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError):  # no answer: the system ended it
            raise ModelError(
                f"{self.name}: the chat template took more than {chat_template.SECONDS} s, or too much memory; give "
                f"another one with --chat-template"
            ) from None
        if "missing" in answer:
            raise InputError(f"chat templates need the package {answer['missing']}; pip install {answer['missing']}")
        if "refused" in answer:
            raise InputError(f"{self.name}: the chat template refuses these messages: {answer['refused'][:300]}")
        if "failed" in answer:
            raise ModelError(
                f"{self.name}: the chat template cannot be run ({answer['failed'][:300]}); give another one with "
                f"--chat-template"
            )
        return answer["text"]

    def encode(self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
        """The ids of messages: the template's special tokens are tokens, and those in a content are plain text."""
        special = re.compile(
            "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))) or "(?!)"
        )
        # a special token's text that is cut in two is plain text; the halves come out of the template as they went in
        cut = [
            {**message, "content": special.sub(lambda m: f"{m[0][0]}{CUT}{m[0][1:]}", message["content"])}
            for message in messages
        ]
        return [id for part in self.render(cut).split(CUT) for id in tokenizer.encode(part, bos=False, special=True)]


def load_template(folder: str | Path, given: str | Path | None = None) -> ChatTemplate:
    """The chat template of a model folder, or the one that is given: a file, or "llama2".

    Raises InputError when there is none, and ModelError naming the file when it cannot be used.
    """
    folder = Path(folder)
    settings = _read_config(folder / CONFIG)
    # a model without them in its settings has LLaMA's, which its tokenizer may know or not
    variables = {name: _text(settings.get(name)) or default for name, default in _TOKENS.items()}
    if given == "llama2":
        return ChatTemplate("llama2", LLAMA2, variables)
    if given is not None or (folder / FILE).is_file():
        file = Path(given) if given is not None else folder / FILE
        try:
            source = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ModelError(f"{file}: cannot be read ({why}); give a Jinja template in UTF-8") from None
    else:
        file, source = folder / CONFIG, settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
            source = named.get("default")
        if source is None:
            raise InputError(
                f"{folder} has no chat template ({FILE}, or one in {CONFIG}), which models that were trained to chat "
                f"have; give one with --chat-template (a file, or llama2)"
            )
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
        raise ModelError(f"{file}: the chat template is no text of at most {MAX_TEMPLATE >> 20} MiB")
    return ChatTemplate(str(file), source, variables)


_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def _text(token):
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _read_config(file):
    try:
        settings = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error}); copy it anew") from None
    return settings if isinstance(settings, dict) else {}
