"""The convert command's --to and --inspect, and the model folder and what is quantized as its SOURCE."""

import json
import math
import re
import time
import tracemalloc

import pytest
from conftest import CHECKPOINTS, DATA, TOKENIZER, by_library, resident_bytes, tree

from jaxllm.convert import __main__ as convert
from jaxllm.errors import InputError
from jaxllm.loader import DEMO

HF = {folder.name: folder for folder in sorted((DATA / "hf").iterdir()) if folder.is_dir()}
META = CHECKPOINTS["llama2-gqa-bf16-2shard"]


def run(source, out, *options):
    convert.main([str(source), str(out), *map(str, options)])
    return out


def inspect(capsys, source, *options):
    """The lines of --inspect, by what they begin with."""
    convert.main(["--inspect", str(source), *map(str, options)])
    printed, said = capsys.readouterr()
    head, *lines = printed.splitlines()
    assert head == f"{source}:" and said == ""
    return {line[:15].rstrip(): line[16:] for line in lines}


def data_bytes(file):
    return sum(len(data) for _, _, data in by_library(file.read_bytes()).values())


def in_units(text):
    """The bytes that a text begins with: `1.61 MB` is 1.61e6."""
    number, unit = text.split()[:2]
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


# --to


@pytest.mark.parametrize("target", ["hf", "meta", "orbax"])
@pytest.mark.parametrize("source", [META, HF["llama-gqa"]], ids=["meta", "hf"])
def test_there_and_back_is_bit_for_bit(tmp_path, source, target):
    if target == "orbax":
        pytest.importorskip("tensorstore", reason="Orbax is written by tensorstore: pip install 'jaxllm[orbax]'")
    direct = run(source, tmp_path / "direct")
    there = run(direct, tmp_path / "there", "--to", target)
    assert (there / "config.json").exists() == (target != "meta")
    back = run(there, tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()


@pytest.mark.parametrize("target", ["hf", "meta"])
def test_what_is_quantized_is_written_as_float_with_a_warning(tmp_path, capsys, target):
    quantized = run(META, tmp_path / "int8", "--quantize", "int8", "--dtype", "float32")
    capsys.readouterr()
    back = run(run(quantized, tmp_path / "there", "--to", target), tmp_path / "back")
    printed, said = capsys.readouterr()
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert printed == "" and warnings == [
        f"warning: int8 is int8, which --to {target} cannot express: its weights are written as float32, with what "
        f"int8 has rounded"
    ]
    # the numbers are those of int8: each row's largest is 127 times its scale, so they quantize to the same again
    again = run(back, tmp_path / "again", "--quantize", "int8")
    expected = by_library((quantized / "model.safetensors").read_bytes())
    found = by_library((again / "model.safetensors").read_bytes())
    assert {n: t for n, t in found.items() if "scale" not in n} == {
        n: t for n, t in expected.items() if "scale" not in n
    }
    assert by_library((back / "model.safetensors").read_bytes())["layers.0.wo"][0] == "F32"


def test_overwrite_replaces_the_same_format_only(tmp_path):
    out = run(META, tmp_path / "out", "--to", "hf")
    before = tree(out)
    for options, said in {("--to", "hf"): "exists", ("--overwrite",): "is not a model folder"}.items():
        with pytest.raises(InputError, match=said):
            run(META, out, *options)
    assert tree(out) == before
    assert tree(run(META, out, "--to", "hf", "--overwrite")) == before


# A model folder as SOURCE


def test_a_model_folder_is_copied_or_quantized(tmp_path):
    float_folder = run(META, tmp_path / "float")
    assert tree(run(float_folder, tmp_path / "copy")) == tree(float_folder)
    options = ("--quantize", "int8-g128", "--keep-float", "embed", "wo")
    direct = run(META, tmp_path / "direct", *options)
    assert tree(run(float_folder, tmp_path / "quantized", *options)) == tree(direct)
    assert tree(run(direct, tmp_path / "same")) == tree(run(direct, tmp_path / "asked", *options)) == tree(direct)


@pytest.mark.parametrize("options", [("w8a8",), ("int8", "--keep-float", "embed")])
def test_what_is_quantized_is_not_quantized_otherwise(tmp_path, options):
    with pytest.raises(InputError, match=r"demo is int8 already and cannot be quantized otherwise"):
        run(DEMO, tmp_path / "out", "--quantize", *options)


# --inspect


@pytest.mark.parametrize("name", HF)
def test_inspect_says_what_config_json_says(capsys, name):
    config = json.loads((HF[name] / "config.json").read_text())
    lines = inspect(capsys, HF[name])
    tensors = by_library((HF[name] / "model.safetensors").read_bytes())
    assert lines["format"] == "Hugging Face's folder"
    assert lines["family"] == config["model_type"]
    assert lines["width"] == str(config["hidden_size"])
    assert lines["layers"] == str(config["num_hidden_layers"])
    assert lines["ffn width"] == str(config["intermediate_size"])
    assert lines["vocabulary"] == str(config["vocab_size"])
    assert lines["context"] == f"{config['max_position_embeddings']} tokens"
    query = tensors["model.layers.0.self_attn.q_proj.weight"][1][0]
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    assert lines["heads"] == f"{heads}, and {kv_heads} of k and v, each {query // heads} wide"
    assert lines["output"].startswith("a matrix" if "lm_head.weight" in tensors else "the embedding")
    biases, norms = (any(part in tensor for tensor in tensors) for part in ("q_proj.bias", "q_norm"))
    assert ("biases" in lines["attention"], "norms" in lines["attention"]) == (biases, norms)
    types = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert lines["stored"].endswith(f"in 1 file: {types[tensors['model.norm.weight'][0]]} ({len(tensors)} tensors)")
    size = (HF[name] / "model.safetensors").stat().st_size
    assert in_units(lines["stored"]) == pytest.approx(size, rel=0.01)
    assert lines["tokenizer"].startswith(
        "tokenizer.json" if (HF[name] / "tokenizer.json").exists() else "tokenizer.model"
    )
    template = (HF[name] / "chat_template.jinja").exists() or "chat_template" in json.loads(
        (HF[name] / "tokenizer_config.json").read_text()
    )
    assert (lines["chat template"] != "none") == template


def test_inspect_of_metas_shards(capsys):
    lines = inspect(capsys, META)
    settings = json.loads((META / "params.json").read_text())
    assert (lines["format"], lines["layers"], lines["width"]) == ("Meta's folder", "3", str(settings["dim"]))
    assert "in 2 files: bfloat16 (" in lines["stored"] and lines["tokenizer"] == "tokenizer.model, 512 tokens"


@pytest.mark.parametrize("options", [(), ("--quantize", "int8"), ("--dtype", "float32"), ("--to", "hf")], ids=str)
def test_inspect_tells_what_is_written_then(tmp_path, capsys, options):
    said = inspect(capsys, META, *options)["would write"]
    out = run(META, tmp_path / "out", *options)
    assert in_units(said) == pytest.approx(data_bytes(out / "model.safetensors"), rel=0.01)
    assert {name.strip() for name in said.partition(":")[2].split(",")} >= {"config.json", "tokenizer.model"}
    capsys.readouterr()
    lines = inspect(capsys, out)
    assert lines["format"] == ("Hugging Face's folder" if "hf" in options else "model folder of jaxllm's")
    assert ("int8" in lines["stored"]) == ("int8" in options)


def test_inspect_reads_headers_only(tmp_path, capsys):
    """A model of 70B's sizes whose numbers were never written."""
    dim, ffn, layers, vocabulary = 8192, 28672, 80, 512
    shapes = {"model.embed_tokens.weight": (vocabulary, dim), "model.norm.weight": (dim,)}
    for i in range(layers):
        parts = {f"self_attn.{name}_proj": (dim, dim) for name in "qkvo"}
        parts |= {f"mlp.{name}_proj": (ffn, dim) for name in ("gate", "up")} | {"mlp.down_proj": (dim, ffn)}
        parts |= {name: (dim,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    settings = {"model_type": "llama", "hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers}
    settings |= {"num_attention_heads": 64, "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())

    tracemalloc.start()
    try:
        start = time.perf_counter()
        lines = inspect(capsys, tmp_path)
        assert time.perf_counter() - start < 5
        # what reads small files asks for 64 MiB at once, and gives back what it did not need
        assert tracemalloc.get_traced_memory()[1] < 80e6
    finally:
        tracemalloc.stop()
    assert resident_bytes(tmp_path) < 2e6
    assert in_units(lines["stored"]) == pytest.approx(end, rel=0.01) and end > 100e9


def test_inspect_of_bad_input_is_an_error(tmp_path, capsys):
    with pytest.raises(InputError, match="no such file or folder"):
        convert.main(["--inspect", str(tmp_path / "absent")])
    with pytest.raises(InputError, match="is no checkpoint of a known kind"):
        convert.main(["--inspect", str(tmp_path)])
    assert capsys.readouterr().out == ""


# Arguments that do not go together


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--inspect", str(META), "out"], "--inspect writes nothing; leave OUT out"),
        ([str(META)], "OUT is missing"),
        ([str(META), "out", "--to", "hf", "--quantize", "int8"], "--to hf has no int8 weights"),
        ([str(META), "out", "--to", "meta", "--quantize", "w8a8"], "--to meta has no int8 weights"),
        ([str(META), "out", "--to", "gguf"], "invalid choice: 'gguf'"),
        ([str(META), str(META), "--to", "hf", "--overwrite"], "is or contains SOURCE"),
        ([str(META), str(META.parent), "--overwrite"], "is or contains SOURCE"),
        ([str(HF["qwen2"]), "out", "--to", "meta"], "this model has biases, .* use --to hf"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        convert.main(argv)
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
