"""Checkpoints on the Hugging Face Hub, by id: huggingface_hub downloads them, with its own cache and settings."""

import glob
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxllm.convert.checkpoint import CARRIED
from jaxllm.errors import InputError, ModelError

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:/([^@]+\.gguf))?(?:@(.+))?", re.ASCII)
_META = r"(original/)?(params\.json|consolidated\.\d+\.pth|tokenizer\.(model|json))"
CONFIG = "config.json"
_MOST_NAMES = 12  # in a message
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class HubId:
    """A model on the Hub: repo is `org/name`, file one of its GGUF files, revision a branch, tag or commit."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self):
        return self.repo + (f"/{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


def parse(text: str) -> HubId | None:
    """`org/name`, `org/name/file.gguf` and each with `@revision` behind it as a HubId, and what is none as None."""
    match = _ID.fullmatch(text)
    return HubId(*match.groups()) if match else None


def file_sizes(id: HubId) -> dict[str, int]:
    """The files that `download` takes, and their bytes; asks the Hub, or offline looks into the cache.

    Raises InputError as `download` does.
    """
    sizes = _find_files(id)
    names, _ = _choose(id, sizes)
    return {name: sizes[name] for name in names}


def download(id: HubId, check: Callable[[Path], object]) -> Path:
    """Download what conversion needs of a model, unless it is in huggingface_hub's cache: the folder or file there.

    Of weights in several formats it takes safetensors, else PyTorch's, else Meta's, else the one GGUF file.  Where
    there is a config.json, check(folder) is called with that alone in the folder, and what it raises is raised before
    any weights are downloaded.
    Raises InputError when huggingface_hub is not installed, the Hub cannot be reached, or does not give the model.
    """
    names, inside = _choose(id, _find_files(id))
    if CONFIG in names:
        check(_snapshot(id, [CONFIG]))
    return _snapshot(id, names) / inside


def _snapshot(id, names):
    with _telling(id) as hub:
        patterns = [glob.escape(name) for name in names]
        return Path(hub.snapshot_download(id.repo, revision=id.revision, allow_patterns=patterns))


def _find_files(id):
    """The files of a model and their bytes: all that the Hub has, or where it cannot be reached those in the cache."""
    with _telling(id) as hub:
        try:
            info = hub.HfApi().model_info(id.repo, revision=id.revision, files_metadata=True)
            return {file.rfilename: file.size or 0 for file in info.siblings or ()}
        except (hub.errors.HfHubHTTPError, ValueError):  # the Hub's answer
            raise
        except Exception:  # of requests, httpx or httpx2, as the version of huggingface_hub has it
            # no pattern: whatever is there
            cached = hub.snapshot_download(id.repo, revision=id.revision, allow_patterns=[], local_files_only=True)
    files = [file for file in Path(cached).rglob("*") if file.is_file()]
    return {file.relative_to(cached).as_posix(): file.stat().st_size for file in files}


def _choose(id: HubId, names: Collection[str]) -> tuple[list[str], str]:
    """The files to take, and where among them the checkpoint is that they make."""
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if id.file:
        if id.file not in names:
            raise InputError(f"{id.repo} has no file {id.file}; its GGUF files are {_listed(ggufs)}")
        return [_whole(id, id.file)], id.file
    top = sorted(name for name in names if "/" not in name)
    weights = _weights(top)
    if CONFIG in top and weights:
        return [CONFIG, *(name for name in top if name in CARRIED), *weights], ""
    for prefix in ("", "original/"):
        found = [name for name in names if (match := re.fullmatch(_META, name)) and (match[1] or "") == prefix]
        if any(name.endswith(".pth") for name in found):
            return sorted(found), prefix
    if len(ggufs) == 1:
        return [_whole(id, ggufs[0])], ggufs[0]
    if ggufs:
        raise InputError(f"{id.repo} has several GGUF files: {_listed(ggufs)}; name one, as {id.repo}/{ggufs[0]}")
    raise ModelError(
        f"{id} has no config.json with *.safetensors or pytorch_model*.bin, no consolidated.NN.pth and no GGUF file, "
        f"but {_listed(top)}; choose another model"
    )


def _weights(names):
    """The files of weights that `hf.open_checkpoint` would read, their index included."""
    if "model.safetensors" in names:
        return ["model.safetensors"]
    # consolidated: Mistral's own layout of the same weights
    found = [name for name in names if re.fullmatch(r"(?!consolidated).*\.safetensors(\.index\.json)?", name)]
    if any(name.endswith(".safetensors") for name in found):
        return found
    if "pytorch_model.bin" in names:
        return ["pytorch_model.bin"]
    return [name for name in names if re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", name)]


def _whole(id, name):
    """The name of a GGUF file that is not split, which only is known to be useless when it is downloaded."""
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", name):
        raise InputError(
            f"{name} of {id.repo} is one of several files of a model; download all, merge them with `llama-gguf-split "
            f"--merge`, and convert the file that this makes"
        )
    return name


def _listed(names):
    if not names:
        return "none"
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"


@contextmanager
def _telling(id: HubId) -> Iterator:
    """huggingface_hub, whose errors become an InputError of one line."""
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors as errors
    except ImportError:
        raise InputError(
            f"{id}: no such file or folder; if it is meant as a model on the Hugging Face Hub, downloading it needs "
            f"huggingface_hub: pip install 'jaxllm[hub]'"
        ) from None
    try:
        yield hub
    except InputError:
        raise
    except errors.GatedRepoError:
        page = f"{hub.constants.ENDPOINT}/{id.repo}"
        raise InputError(f"{id.repo} is gated: ask for access at {page}, then {_LOG_IN}") from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{id.repo} has no revision {id.revision or 'main'}; name a branch, a tag or a whole commit hash behind @"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{id}: no such file or folder here, and no {id.repo} on the Hub for you to see; check the name, or if it "
            f"is private {_LOG_IN}"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"{id}: no such file or folder here, the Hub cannot be reached{_offline(hub)}, and its cache "
            f"{hub.constants.HF_HUB_CACHE} does not have all of the model; go online once, or give a path"
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"{id}: no such file or folder, and no Hub id ({_line(error)}); check the path") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = _LOG_IN if status in (401, 403) else "try again later"
        raise InputError(f"{id.repo}: the Hub answered {status} ({_line(error)}); {remedy}") from None
    except Exception as error:  # of requests, httpx or httpx2, as the version has it, or of the disk
        raise InputError(
            f"{id}: the download failed ({type(error).__name__}: {_line(error)}); what is complete is kept, so try "
            f"again"
        ) from None


def _offline(hub):
    return " (HF_HUB_OFFLINE is set)" if hub.constants.HF_HUB_OFFLINE else ""


def _line(error):
    """The first line of an error's text, cut short."""
    lines = str(error).split("\n")
    return next((line.strip() for line in lines if line.strip()), "no reason given")[:200]
