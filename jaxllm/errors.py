"""What goes wrong through the caller's input, and how a command tells it; whatever else is raised is a bug of ours."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence


class InputError(ValueError):
    """A prompt, a setting or a flag is not usable.  The message is a line: what was got, what is allowed, a remedy."""


class ModelError(InputError):
    """A checkpoint, a model folder or a tokenizer is not usable.  The message names the file."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are an InputError of one line instead of a page of usage."""

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def run_command(main: Callable[[Sequence[str]], None]) -> int:
    """Run a command on sys.argv: its exit status is 0 for done, 2 for an InputError (told in a line), 130 on Ctrl-C."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: standard output cannot be written: {error.strerror}; free some space", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again when it ends
        return 2
    return 0
