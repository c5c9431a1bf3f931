"""What the documents print runs as it stands; and the model inside the package is what its card says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import ops
from jaxllm.loader import DEMO
from jaxllm.model import abstract_params

ROOT = Path(__file__).parent.parent
PASSAGE = (
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"
    "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date:\n"
)


@pytest.fixture(scope="module")
def demo():
    return jaxllm.load()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/library.md", "docs/memory.md", "docs/kernels.md"])
def test_python_examples_run(page, capsys, monkeypatch):
    # one of them registers an implementation
    monkeypatch.setattr(ops, "IMPLEMENTATIONS", {op: dict(table) for op, table in ops.IMPLEMENTATIONS.items()})
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})
    assert len(capsys.readouterr().out) > 100


def test_the_readmes_plan_is_what_the_command_prints():
    command, printed = re.search(
        r"^\$ python (-m \S+ --plan .*?)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    ).groups()
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, check=True)
    assert done.stdout == printed


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", DEMO / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_readme_names_exactly_two_set_up_commands():
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [c.split(" && ")[0] for c in commands] == ["pip install -e .", "pip install -e '.[test]'"]


def test_the_demo_is_small_and_as_its_card_says(demo):
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 12e6
    card = (DEMO / "README.md").read_text()
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(demo.config)))
    assert f"{count:,} parameters" in card
    assert json.loads((DEMO / "config.json").read_text())["quantization"] == "int8"


def mean_loss(model, text):
    tokens = np.array([model.tokenizer.encode(text)])
    scores = jax.nn.log_softmax(jaxllm.forward(model.params, model.config, tokens[:, :-1])[0])
    return -float(np.take_along_axis(np.asarray(scores), tokens[:, 1:, None], axis=-1).mean())


def test_the_demo_has_learned_its_corpus(demo):
    words = PASSAGE.split(" ")
    shuffled = " ".join(np.random.default_rng(0).permutation(words))
    assert mean_loss(demo, PASSAGE) < 3.5 < mean_loss(demo, shuffled) - 1  # nats a token; all 4096 alike: 8.3


def test_the_demo_continues_in_whole_words(demo):
    results = jaxllm.generate(demo, ["To be, or not to be", "And God said", "The king"], max_new_tokens=200)
    text = " ".join(result.text for result in results)
    words = re.findall(r"[A-Za-z']+", text)
    assert len(words) > 200 and "\ufffd" not in text
    assert np.mean([len(word) for word in words]) < 6
    # the commonest words of English take up about a quarter of any English text
    common = set("the and of to in that a i my is he you be not it for his".split())
    assert np.mean([word.lower() in common for word in words]) > 0.15


@pytest.mark.slow
def test_the_first_command_of_a_new_user():
    command = [sys.executable, "-m", "jaxllm.generate", "--prompt", "To be, or not to be", "--max-new-tokens", "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300)
    assert done.returncode == 0 and len(done.stdout) > 20
    assert done.stderr == "no --model: using the small demonstration model inside the package\n"
