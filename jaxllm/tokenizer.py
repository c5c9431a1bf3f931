"""Text to token ids and back: SentencePiece (LLaMA 1 and 2), tiktoken (LLaMA 3), Hugging Face's tokenizer.json."""

import base64
import codecs
import json
import re
import threading
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from os import PathLike
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from jaxllm.errors import InputError, ModelError

MAX_FILE_BYTES = 64 << 20  # real ones have up to 35 MB, and a checkpoint given by mistake should not be read whole
MAX_TOKEN_BYTES = 256  # of a tiktoken vocabulary, whose longest token is 128 spaces: each has as many ways to be split
REMEDY = "give a tokenizer.model (SentencePiece, or LLaMA 3's tiktoken vocabulary) or a tokenizer.json"
BYTES_AS_REPLACEMENT = dict.fromkeys(range(0xDC80, 0xDD00), "\N{REPLACEMENT CHARACTER}")

# Source: Meta's llama_models, llama3/tokenizer.py.  LLaMA 3.0 calls those reserved that 3.1 gave a meaning.
LLAMA3_DIGITS = r"\p{N}{1,3}"
LLAMA3_SPLIT = (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{LLAMA3_DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
]  # fmt: skip
# Of a tokenizer.json that comes alone.
BOS_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
EOS_TOKENS = (
    "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "</s>", "<eos>", "<end_of_turn>", "<|endoftext|>", "<|im_end|>",
)  # fmt: skip


def load_tokenizer(path: str | PathLike) -> "Tokenizer":
    """Read a tokenizer, whose kind its content tells; ModelError, naming the file, for what is none or is damaged.

    Two files of Hugging Face's may lie beside it.  eos_token_id of generation_config.json adds ids that end a text to
    those of a tokenizer.model; for a tokenizer.json it is all of them, before eos_token of tokenizer_config.json and
    well-known names.  add_bos_token of tokenizer_config.json decides whether `encode` puts BOS in front, before what
    the tokenizer says.  Such a file's damage is a ModelError that names it.
    """
    data = _read(path)
    generation = Path(path).parent / "generation_config.json"
    config = Path(path).parent / "tokenizer_config.json"
    generation_values, config_values = _read_beside(generation), _read_beside(config)
    ends = _ids(generation, generation_values, "eos_token_id")

    if re.match(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s", data):  # a SentencePiece model begins with a newline
        engine = _load_tiktoken(path, data)
        bos_id, adds_bos = engine.id("<|begin_of_text|>"), True
        eos_ids = tuple(engine.id(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")) + ends
    elif re.match(rb'\s*\{\s*["}]', data):
        engine, bos_id = _load_json(path, data)  # what the model saw, while bos_token_id may be no more than a default
        adds_bos = bos_id is not None
        candidates = (
            *_ids(generation, generation_values, "bos_token_id"),
            *_named(config, config_values, "bos_token", engine),
            *engine.known(BOS_TOKENS),
        )
        if bos_id is None and candidates:
            bos_id = candidates[0]
        eos_ids = ends or _named(config, config_values, "eos_token", engine) or engine.known(EOS_TOKENS)
    else:
        engine = _load_sentencepiece(path, data)
        bos_id, eos_id = (id if id >= 0 else None for id in (engine.sp.bos_id(), engine.sp.eos_id()))
        adds_bos = True
        eos_ids = ends if eos_id is None else (eos_id, *ends)

    if config_values.get("add_bos_token") is not None:
        adds_bos = config_values["add_bos_token"]
        if not isinstance(adds_bos, bool):
            raise ModelError(f"{config}: has add_bos_token={str(adds_bos)[:40]!r}; it must be true or false")
    return Tokenizer(engine.vocab_size, bos_id, tuple(dict.fromkeys(eos_ids)), adds_bos, engine)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids 0 .. vocab_size-1 and back.  `bos_id` is None and `eos_ids` is () where the model has none.

    An eos id may lie behind vocab_size: a model may have ids that its tokenizer.model does not know.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    _adds_bos: bool = field(repr=False)
    _engine: "_SentencePiece | _HuggingFace" = field(repr=False)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The names of special tokens: what `encode` with special takes for a token in a text."""
        return self._engine.special_tokens

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """The ids of `text`, after the BOS id if `bos` and the model was trained with one there.

        The names of special tokens in the text, as `<s>` or `<|eot_id|>`, are plain text unless `special`.  Text with
        a lone surrogate, or that the tokenizer cannot express, is an InputError.
        """
        try:
            text.encode()  # the libraries would raise an error about C++ types, or replace it
        except UnicodeEncodeError as e:
            raise InputError(
                f"the text has U+{ord(text[e.start]):04X} at character {e.start}, which UTF-8 cannot express: "
                "a byte that was not UTF-8 where the text came from? give text in UTF-8"
            ) from e
        ids = self._engine.encode(text, special)
        return [self.bos_id, *ids] if bos and self._adds_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, as the library of the tokenizer's kind decodes what lies between special ids.

        Special ids have no text, and nor do ids from vocab_size up: a model's embedding may be padded.  Bytes that
        make no character are U+FFFD each, those of byte-level BPE as Unicode recommends.  A negative id is an
        InputError.
        """
        decoder = self.decoder()
        return "".join(map(decoder.put, ids)) + decoder.flush()

    def decoder(self, context_ids: Iterable[int] = ()) -> "Decoder":
        """A Decoder of the ids that follow `context_ids`."""
        return Decoder(self, context_ids)


class Decoder:
    """Decodes ids one at a time: the context's text, every `put` and `flush`, joined, are the text of all the ids.

    What `put` gives is final, and whole characters: one that begins in the context and ends after it comes from `put`.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Iterable[int]):
        self._engine = tokenizer._engine
        self._utf8 = codecs.getincrementaldecoder("utf-8")(self._engine.bad_bytes)
        # The text of an id depends on the ids before it in one way only: a space at the start of all text is dropped.
        # So an id is decoded behind the textless ids of the start and, once there is text, behind any one id.
        self._before: list[int] = []
        self._skip = 0  # characters of `_before`
        for id in context_ids:
            self.put(id)

    def put(self, id: int) -> str:
        """The text that can be printed now that `id` has come; '' inside a character and for an id without text."""
        id, engine = index(id), self._engine
        if id < 0:
            raise InputError(f"token id {id} is negative; this tokenizer has 0 to {engine.vocab_size - 1}")
        if id >= engine.vocab_size or engine.is_special(id):
            return self.flush()
        raw = engine.raw(id)
        if raw is not None:
            return self._started(self._utf8.decode(raw))
        rest = self.flush()  # an id with a text of its own ends a run of bytes, and what is left of it is no character
        text = engine.decode([*self._before, id])[self._skip :]
        if not text and id not in self._before:  # the word boundary alone, at the start
            self._before.append(id)
        return rest + self._started(text)

    def flush(self) -> str:
        """The rest, at the end: U+FFFD for the bytes of a character that was cut off."""
        return self._started(self._utf8.decode(b"", final=True))

    def _started(self, text: str) -> str:
        if text and not self._skip:
            self._before = [self._engine.printing_id]
            self._skip = len(self._engine.decode(self._before))
        # one U+FFFD for each bad byte, as sentencepiece has it: Python's "replace" makes one of several bytes
        return text.translate(BYTES_AS_REPLACEMENT)


class _SentencePiece:
    """What Tokenizer and Decoder need of sentencepiece."""

    bad_bytes = "surrogateescape"

    def __init__(self, sp: SentencePieceProcessor):
        self.sp = sp
        self.vocab_size = sp.vocab_size()
        self.is_special = sp.is_control
        self.decode = sp.decode
        self.printing_id = next(id for id in range(self.vocab_size) if sp.decode([id]))
        # sentencepiece takes pieces that are not UTF-8, and raises only when one is asked for
        pieces = sp.id_to_piece(list(range(self.vocab_size)))
        self._controls = {piece: id for id, piece in enumerate(pieces) if sp.is_control(id)}
        self.special_tokens = tuple(self._controls)
        self._split = re.compile(f"({'|'.join(map(re.escape, sorted(self._controls, key=len, reverse=True)))})")

    def encode(self, text, special):
        if not special or not self._controls:
            return self.sp.encode(text)
        ids = []
        for part in self._split.split(text):
            ids += [self._controls[part]] if part in self._controls else self.sp.encode(part)
        return ids

    def raw(self, id):
        """The byte that an id stands for, None for one with a text."""
        return bytes.fromhex(self.sp.id_to_piece(id)[3:5]) if self.sp.is_byte(id) else None  # <0xE2>


class _HuggingFace:
    """What Tokenizer and Decoder need of the tokenizers package.

    byte_level: every token stands for bytes, one a character of its name; byte_fallback: those named <0xNN> do.
    reserved: ids that plain text must not become; BPE joins no special token, but other models look words up.
    """

    def __init__(self, tokenizer, byte_level, byte_fallback=False, reserved=frozenset()):
        tokenizer.no_truncation()  # settings of the training run, which tokenizer.json also keeps
        tokenizer.no_padding()
        self._tokenizer, self._byte_level, self._byte_fallback = tokenizer, byte_level, byte_fallback
        self._reserved = reserved
        self._lock = threading.Lock()
        self.vocab_size = tokenizer.get_vocab_size()
        # the package decodes a run of bytes all or nothing, which a stream cannot
        self.bad_bytes = "replace" if byte_level else "surrogateescape"
        added = tokenizer.get_added_tokens_decoder()
        self.is_special = {id for id, token in added.items() if token.special}.__contains__
        self.special_tokens = tuple(token.content for token in added.values() if token.special)
        self.printing_id = next(id for id in range(self.vocab_size) if self.decode([id]))

    def id(self, token):
        """The id of a token by its name, None where there is none."""
        try:
            return self._tokenizer.token_to_id(token)
        except UnicodeEncodeError:
            return None

    def known(self, tokens):
        """The ids of those tokens that there are."""
        return tuple(id for id in map(self.id, tokens) if id is not None)

    def encode(self, text, special):
        # the package keeps it as a setting of the tokenizer, which threads share
        with self._lock, _failing_as(InputError("the text cannot be expressed in this tokenizer's tokens; change it")):
            self._tokenizer.encode_special_tokens = not special
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not special and not self._reserved.isdisjoint(ids):
            token = self._tokenizer.id_to_token(next(id for id in ids if id in self._reserved))
            raise InputError(f"the text holds {token!r}, which this tokenizer cannot write as plain text; remove it")
        return ids

    def decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def raw(self, id):
        """The bytes that an id stands for, None for one with a text."""
        if self._byte_level:
            token = self._tokenizer.id_to_token(id)
            try:
                return bytes(map(_BYTE_OF.__getitem__, token))
            except KeyError:  # an added token, which is kept as it is
                return token.encode()
        if self._byte_fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", self._tokenizer.id_to_token(id))):
            return bytes.fromhex(byte[1])
        return None


def _byte_characters():
    """The printable character by which byte-level BPE names each byte.  Source: bytes_to_unicode in GPT-2's encoder."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


_CHARACTER_OF = _byte_characters()
_BYTE_OF = {character: byte for byte, character in _CHARACTER_OF.items()}


def _read(path):
    """A file's bytes, of a size that a tokenizer may have."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ModelError(f"{path}: cannot be read ({e.strerror}); {REMEDY}") from e
    if not data:
        raise ModelError(f"{path}: is empty; is the download complete?")
    if len(data) > MAX_FILE_BYTES:
        raise ModelError(f"{path}: is larger than {MAX_FILE_BYTES >> 20} MiB, so it is no tokenizer; {REMEDY}")
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: is a Git LFS pointer, not the file it points to; fetch that with `git lfs pull`")
    return data


def _parse(path, data):
    try:
        values = json.loads(data.decode())
    except (ValueError, RecursionError) as e:
        reason = str(e) if isinstance(e, json.JSONDecodeError) else "not UTF-8, or too deep or too large a value"
        raise ModelError(f"{path}: cannot be read as JSON ({reason}); download it again") from e
    if not isinstance(values, dict):
        raise ModelError(f"{path}: is not a JSON object; download it again")
    return values


def _read_beside(path):
    """The values of a file that may be there."""
    return _parse(path, _read(path)) if path.exists() else {}


def _ids(path, values, key):
    """The ids that a key of generation_config.json gives: it may be one, a list, null or missing."""
    found = values.get(key)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for id in ids:
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 1 << 31:
            raise ModelError(f"{path}: has {key}={str(found)[:40]!r}; it must be a token id or a list of them")
    return tuple(ids)


def _named(path, values, key, engine):
    """The id, if any, of the token that a key of tokenizer_config.json names, as a string or an object of settings."""
    token = values.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return ()
    id = engine.id(token) if isinstance(token, str) else None
    if id is None:
        raise ModelError(f"{path}: has {key}={str(token)[:40]!r}, which the tokenizer lacks; are both of one model?")
    return (id,)


@contextmanager
def _failing_as(error):
    """Turn whatever the tokenizers package raises into an error."""
    try:
        yield
    except BaseException as e:
        # it has no type of its own for errors; a Rust panic derives from BaseException, and can be told by name only
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise error from e


def _load_sentencepiece(path, data):
    sp = SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(data)
        sp.decode([sp.unk_id()])  # its text may be no UTF-8
        return _SentencePiece(sp)
    except Exception as e:  # sentencepiece has one Python type per status code
        raise ModelError(f"{path}: is not a SentencePiece model, or is damaged; is the file complete? {REMEDY}") from e


def _load_json(path, data):
    """A tokenizer.json, and the id that it puts before a text, if any."""
    values = _parse(path, data)
    model = values.get("model")
    if not isinstance(model, dict):
        raise ModelError(f"{path}: is JSON, but no tokenizer.json; {REMEDY}")
    bpe = model.get("type", "BPE") == "BPE"
    if bpe and model.get("continuing_subword_prefix"):  # a merge of tokens without it can abort the process
        raise ModelError(f"{path}: has a continuing_subword_prefix, which no LLaMA has; choose another model")
    with _failing_as(ModelError(f"{path}: the tokenizers package makes no tokenizer of it; is the file complete?")):
        tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        named = tokenizer.get_vocab(with_added_tokens=True)
        added = values.get("added_tokens") or []
        in_order = all(named.get(token["content"]) == token["id"] for token in added)  # else the package renumbers them
        steps = _decoder_steps(values.get("decoder"))
        types = [step["type"] for step in steps]
        front = _token_in_front(values.get("post_processor"))
        id_in_front = None if front is None else named[front]
        tokenizer.post_processor = None
    if not in_order or sorted(named.values()) != list(range(len(named))):
        raise ModelError(f"{path}: its token ids are not 0 to {len(named) - 1}, each once; is the file complete?")
    for type, step in zip(types, steps, strict=True):
        # what these make of an id depends on those behind it, or they are no characters yet when the next step comes
        if type in ("BPEDecoder", "CTC") or step.get("stop") or (type == "ByteLevel" and len(steps) > 1):
            raise ModelError(f"{path}: its decoder has a step {type} that cannot be streamed; choose another model")
    with _failing_as(ModelError(f"{path}: the tokenizers package makes no text of its tokens; is the file complete?")):
        unknown = (named.get(model.get("unk_token")), model.get("unk_id"))
        reserved = () if bpe else [token["id"] for token in added if token["special"] and token["id"] not in unknown]
        return _HuggingFace(tokenizer, "ByteLevel" in types, "ByteFallback" in types, frozenset(reserved)), id_in_front


def _decoder_steps(decoder):
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _decoder_steps(part)]
    return [decoder]


def _token_in_front(processor):
    """The token that a post-processor puts before a text, if any."""
    match processor:
        case {"type": "Sequence", "processors": steps}:
            return next((token for token in map(_token_in_front, steps) if token is not None), None)
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": token}}, *_]}:
            return token
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [token, _]}:
            return token
    return None


def _load_tiktoken(path, data):
    """LLaMA 3's tokenizer from its ranks: a line for each token, in base64, and its rank."""
    ranks, longest = {}, 0
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            ranks[token] = int(rank)
        except ValueError as e:
            raise ModelError(f"{path}: line {number} is not a token in base64 and its rank; is it complete?") from e
        longest = max(longest, len(token))
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(number)):
        raise ModelError(f"{path}: its ranks are not 0 to {number - 1}, each of one token; is the file complete?")
    if not all(bytes([byte]) in ranks for byte in range(256)) or b"" in ranks or longest > MAX_TOKEN_BYTES:
        raise ModelError(
            f"{path}: is a tiktoken vocabulary, but lacks single bytes or has a token that is empty or of more than "
            f"{MAX_TOKEN_BYTES} bytes, which LLaMA 3's has not; is the file complete?"
        )
    names = {"".join(map(_CHARACTER_OF.__getitem__, token)): rank for rank, token in enumerate(tokens)}
    # tiktoken joins any neighbours that make a token, the lowest rank first, and takes a piece that is a token whole
    merges = [
        (name[:at], name[at:])
        for name in names
        for at in range(1, len(name))
        if name[:at] in names and name[at:] in names
    ]
    tokenizer = tokenizers.Tokenizer(BPE(names, merges, ignore_merges=True))
    split = Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in LLAMA3_SPECIAL])
    return _HuggingFace(tokenizer, byte_level=True)
