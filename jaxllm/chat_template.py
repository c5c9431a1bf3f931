"""Render a chat template in a process of its own: JSON on stdin, JSON on stdout.

A template comes with a checkpoint, and may be anything.  jinja2's sandbox keeps it from Python's insides and from
files, and limits on this process keep what it takes of time and memory from the one that asked.  Nothing else is
imported here, so that it starts quickly.
"""

import json
import sys
from datetime import datetime

SECONDS = 3  # of computing, for templates that take milliseconds
MEMORY = 1 << 29  # bytes


class Refusal(Exception):
    """What the template itself says is wrong with a conversation."""


def refuse(message):
    raise Refusal(str(message))


def render(template, messages, variables):
    """The text of messages, a list of {"role", "content"}, in Jinja as Hugging Face's tokenizers run it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, **{"ensure_ascii": False, **more})
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **variables)


def main():
    try:
        import resource
    except ImportError:  # on Windows; the caller's patience is limited all the same
        pass
    else:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    asked = json.load(sys.stdin)
    try:
        answer = {"text": render(asked["template"], asked["messages"], asked["variables"])}
    except ImportError:
        answer = {"missing": "jinja2"}
    except Refusal as refusal:
        answer = {"refused": str(refusal)}
    except BaseException as error:  # whatever a template can bring about
        answer = {"failed": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
