"""convert/hub.py against a server on this machine that answers as the Hub does: what is downloaded, kept, and said."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, DATA, tree

from jaxllm.convert import __main__ as convert
from jaxllm.convert import hub
from jaxllm.errors import InputError, ModelError

FIXTURE = DATA / "hf" / "llama-gqa"
# several commands in one process: starting one takes a second or two
COMMANDS = """
import json, sys
from jaxllm.convert.__main__ import main
from jaxllm.errors import run_command
for argv in json.loads(sys.argv.pop()):
    sys.argv[1:] = argv
    print("->", argv, file=sys.stderr, flush=True)
    print("exit status", run_command(main), file=sys.stderr, flush=True)
"""


class Server:
    """Models by id: {file: bytes}; requests are the files that were asked for; gated and cut: ids."""

    def __init__(self, models):
        self.models = models
        self.requests, self.gated, self.cut = [], {"org/gated"}, set()

    def commit(self, id):
        return hashlib.sha1(id.encode()).hexdigest()

    def answer(self, path):
        """Status, headers and body of a request."""
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        id, rest = "/".join(parts[:2]), parts[2:]
        files = self.models.get(id)
        if files is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit, wanted = self.commit(id), rest[1] if len(rest) > 1 else "main"
        if wanted not in ("main", "v1", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        oids = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        if api and rest[:1] == ["tree"]:
            found = [{"type": "file", "path": n, "size": len(c), "oid": oids[n]} for n, c in files.items()]
            return 200, {}, json.dumps(found).encode()
        if api:
            siblings = [{"rfilename": n, "size": len(c), "blobId": oids[n]} for n, c in files.items()]
            return 200, {}, json.dumps({"id": id, "modelId": id, "sha": commit, "siblings": siblings}).encode()
        name = "/".join(rest[2:])
        if id in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": commit}, b"{}"
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"{}"
        self.requests.append(f"{id}/{name}")
        return 200, {"ETag": f'"{oids[name]}"', "X-Repo-Commit": commit}, files[name]

    @contextmanager
    def running(self):
        """The address, while it is served."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, body = hub.answer(self.path.partition("?")[0])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    cut = any(self.path.startswith(f"/{id}/") for id in hub.cut)
                    self.wfile.write(body[: len(body) // 2] if cut else body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


def run(home, endpoint, *commands, **environment):
    """(exit status, last line but for progress bars) of each command."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([[str(arg) for arg in argv] for argv in commands])],
        env=kept | settings | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    found = []
    for part in done.stderr.split("-> ")[1:]:
        said, _, status = part.strip().rpartition("exit status ")
        lines = [line for line in said.splitlines()[1:] if line.strip()]
        found.append((int(status), lines[-1].rpartition("\r")[2] if lines else ""))
    return found, done.stdout


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("huggingface_hub", reason="downloads with huggingface_hub: pip install 'jaxllm[hub]'")
    model = {file.name: file.read_bytes() for file in FIXTURE.iterdir() if file.name != "oracle.npz"}
    others = {
        "README.md": b"# A model",
        "consolidated.safetensors": b"the same in another layout",
        "pytorch_model.bin": b"the same again",
        "original/consolidated.00.pth": b"and again",
        "model.Q8_0.gguf": b"and again",
    }
    meta = {f"original/{file.name}": file.read_bytes() for file in CHECKPOINTS["llama1-fp16-1shard"].iterdir()}
    return Server(
        {
            "org/model": model | others,
            "org/gated": model,
            "org/broken": model,
            "org/meta": meta,
            "org/ggufs": {"a.Q4_0.gguf": b"GGUF\3\0\0\0", "b.Q8_0.gguf": b""},
            "org/nothing": {"README.md": b""},
            "org/mixtral": model | {"config.json": b'{"model_type": "mixtral"}'},
        }
    )


def test_downloaded_once_and_then_from_the_cache(server, tmp_path):
    home = tmp_path / "home"
    with server.running() as endpoint:
        found, printed = run(
            home,
            endpoint,
            ["--inspect", "org/model"],
            ["org/model", tmp_path / "one"],
            ["org/model@v1", tmp_path / "two"],
            ["org/meta", tmp_path / "meta"],
        )
    assert [status for status, _ in found] == [0] * 4, found
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]
    assert all(name in printed for name in names) and "consolidated" not in printed and "5 files" in printed
    assert {name for name in server.requests if name.startswith("org/model/")} == {f"org/model/{n}" for n in names}
    convert.main([str(FIXTURE), str(tmp_path / "expected")])
    convert.main([str(CHECKPOINTS["llama1-fp16-1shard"]), str(tmp_path / "expected-meta")])
    expected = tree(tmp_path / "expected")
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == expected
    assert tree(tmp_path / "meta") == tree(tmp_path / "expected-meta")

    # the server is gone: once the user says so, once it is found out
    offline, _ = run(
        home, endpoint, ["org/model", tmp_path / "off"], ["org/gated", tmp_path / "no"], HF_HUB_OFFLINE="1"
    )
    gone, _ = run(home, endpoint, ["org/model@v1", tmp_path / "gone"], ["org/gated", tmp_path / "no"])
    assert tree(tmp_path / "off") == tree(tmp_path / "gone") == expected
    assert [offline[1][0], gone[1][0]] == [2, 2] and not (tmp_path / "no").exists()
    assert "HF_HUB_OFFLINE is set" in offline[1][1] and "cannot be reached, and its cache" in gone[1][1]


def test_what_the_hub_refuses_is_one_line(server, tmp_path):
    cases = {
        "org/absent": "no org/absent on the Hub for you to see; check the name",
        "org/gated": "org/gated is gated: ask for access at ",
        "org/model@other": "org/model has no revision other; name a branch",
        "org/model/x.gguf": "org/model has no file x.gguf; its GGUF files are model.Q8_0.gguf",
        "org/ggufs": "several GGUF files: a.Q4_0.gguf, b.Q8_0.gguf; name one, as org/ggufs/a.Q4_0.gguf",
        "org/ggufs/a.Q4_0.gguf": "a.Q4_0.gguf: its header ends at byte",
        "org/nothing": "but README.md; choose another model",
        "org--x/y": "no Hub id (",
        "org/mixtral": "config.json has model_type='mixtral', which is not supported; the known families are llama",
    }
    with server.running() as endpoint:
        found, _ = run(tmp_path / "home", endpoint, *([id, tmp_path / "out"] for id in cases))
    for (status, line), (id, said) in zip(found, cases.items(), strict=True):
        assert status == 2 and line.startswith("error: ") and said in line and len(line) < 400, (id, line)
    assert not (tmp_path / "out").exists()
    assert {name for name in server.requests if name.startswith("org/mixtral/")} == {"org/mixtral/config.json"}


@pytest.mark.slow  # huggingface_hub waits before it tries again
def test_a_connection_that_breaks_off(server, tmp_path):
    home, server.cut = tmp_path / "home", {"org/broken"}
    with server.running() as endpoint:
        [(status, line)], _ = run(home, endpoint, ["org/broken", tmp_path / "out"])
        assert status == 2 and line.startswith("error: org/broken: the download failed ("), line
        assert not (tmp_path / "out").exists()
        server.cut = set()
        found, _ = run(home, endpoint, ["org/broken", tmp_path / "out"])
    assert found[0][0] == 0, found


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"org/name: no such file or folder; .* pip install 'jaxllm\[hub\]'"):
        convert.main(["org/name", str(tmp_path / "out")])


def test_a_path_comes_first_and_an_out_that_exists_is_told_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda id, _: pytest.fail(f"downloads {id}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(ModelError, match="org/name is no checkpoint of a known kind"):
        convert.main(["org/name", "out"])
    with pytest.raises(InputError, match="^org exists; choose another folder"):
        convert.main(["org/other", "org"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/na.me_1@refs/pr/1", ("org/na.me_1", None, "refs/pr/1")),
        ("org/name/file.gguf", ("org/name", "file.gguf", None)),
        ("org/name/sub/file.gguf@v2", ("org/name", "sub/file.gguf", "v2")),
    ],
)
def test_ids(text, expected):
    assert hub.parse(text) == hub.HubId(*expected)
    assert str(hub.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["name", "/org/name", "./name", "../name", "~/name", "org/name/", "a/b/c", "a/b/c.bin", "org/name@", "a b/c", ""],
)
def test_paths_are_no_ids(text, tmp_path):
    assert hub.parse(text) is None


def test_a_missing_path_is_told_what_a_source_is(tmp_path):
    with pytest.raises(ModelError, match="no such file or folder; SOURCE is .* org/name@revision"):
        convert.main([str(tmp_path / "absent"), str(tmp_path / "out")])


WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
BINS = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize(
    ("names", "taken", "inside"),
    [
        (["config.json", *WEIGHTS, *BINS, "consolidated.safetensors"], ["config.json", *WEIGHTS], ""),
        (["config.json", "consolidated.safetensors", *BINS], ["config.json", *BINS], ""),
        (["config.json", "model.safetensors", *WEIGHTS], ["config.json", "model.safetensors"], ""),
        (["config.json", "other.safetensors", "t.txt"], ["config.json", "other.safetensors"], ""),
        (["consolidated.00.pth", "params.json", "config.json"], ["consolidated.00.pth", "params.json"], ""),
        (["original/consolidated.00.pth", "x/params.json"], ["original/consolidated.00.pth"], "original/"),
        (["config.json", "sub/m.gguf"], ["sub/m.gguf"], "sub/m.gguf"),
    ],
)
def test_which_files_are_taken(names, taken, inside):
    assert hub._choose(hub.HubId("org/name"), names) == (taken, inside)


def test_a_split_gguf_is_not_downloaded():
    id = hub.HubId("org/name", "m-00001-of-00002.gguf")
    with pytest.raises(InputError, match="one of several files of a model"):
        hub._choose(id, [id.file, Path("m-00002-of-00002.gguf").name])
