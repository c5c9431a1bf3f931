"""Text to token ids and back.  One kind so far: SentencePiece, the `tokenizer.model` of LLaMA 1 and 2."""

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import index
from os import PathLike

from sentencepiece import SentencePieceProcessor

from jaxllm.errors import InputError, ModelError

MAX_FILE_BYTES = 64 << 20  # real ones have up to 5 MB, and a checkpoint given by mistake should not be read whole
BYTES_AS_REPLACEMENT = dict.fromkeys(range(0xDC80, 0xDD00), "\N{REPLACEMENT CHARACTER}")


def load_tokenizer(path: str | PathLike) -> "Tokenizer":
    """Read a SentencePiece `tokenizer.model`; anything else is a ModelError that names the file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ModelError(f"{path}: cannot be read ({e.strerror}); give a SentencePiece tokenizer.model") from e
    if not data:
        raise ModelError(f"{path}: is empty; give a SentencePiece tokenizer.model")
    if len(data) > MAX_FILE_BYTES:
        raise ModelError(f"{path}: is larger than {MAX_FILE_BYTES >> 20} MiB; give a SentencePiece tokenizer.model")
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: is a Git LFS pointer, not the file it points to; fetch that with `git lfs pull`")
    if re.match(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s", data):  # a SentencePiece model begins with a newline
        raise ModelError(f"{path}: is a tiktoken vocabulary (LLaMA 3), not supported yet; give a SentencePiece model")

    sp = SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(data)
        # sentencepiece takes pieces that are not UTF-8, and raises only when one is asked for
        sp.id_to_piece(list(range(sp.vocab_size())))
        sp.decode([sp.unk_id()])
        printing_id = next(id for id in range(sp.vocab_size()) if sp.decode([id]))
    except Exception as e:  # sentencepiece has one Python type per status code
        raise ModelError(f"{path}: is not a SentencePiece model, or is damaged; is the file complete?") from e
    return Tokenizer(
        vocab_size=sp.vocab_size(),
        bos_id=sp.bos_id() if sp.bos_id() >= 0 else None,
        eos_ids=(sp.eos_id(),) if sp.eos_id() >= 0 else (),
        _sp=sp,
        _printing_id=printing_id,
    )


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids 0 .. vocab_size-1 and back.  `bos_id` is None and `eos_ids` is () where the model has none."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    _sp: SentencePieceProcessor = field(repr=False)
    _printing_id: int = field(repr=False)  # any id that has a text of its own

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of `text`, after the BOS id if `bos` and there is one; `<s>` in the text is plain text.

        Text with a lone surrogate is an InputError.
        """
        try:
            text.encode()  # sentencepiece would raise a RuntimeError about C++ types
        except UnicodeEncodeError as e:
            raise InputError(
                f"the text has U+{ord(text[e.start]):04X} at character {e.start}, which UTF-8 cannot express: "
                "a byte that was not UTF-8 where the text came from? give text in UTF-8"
            ) from e
        ids = self._sp.encode(text)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, as sentencepiece decodes them.  A negative id is an InputError.

        Control ids have no text, and nor do ids from vocab_size up: a model's embedding may be padded.
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
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        # The text of an id depends on the ids before it in one way only: sentencepiece drops a space at the start of
        # all text. So an id is decoded behind the textless ids of the start and, once there is text, behind any one id.
        self._before: list[int] = []
        self._skip = 0  # characters of `_before`
        for id in context_ids:
            self.put(id)

    def put(self, id: int) -> str:
        """The text that can be printed now that `id` has come; '' inside a character and for an id without text."""
        id, sp, vocab_size = index(id), self._tokenizer._sp, self._tokenizer.vocab_size
        if id < 0:
            raise InputError(f"token id {id} is negative; this tokenizer has 0 to {vocab_size - 1}")
        if id < vocab_size and sp.is_byte(id):
            piece = sp.id_to_piece(id)  # <0xE2>
            return self._started(self._utf8.decode(bytes.fromhex(piece[3:5])))
        rest = self.flush()  # any other id ends a run of bytes, and what is left of it is no character
        if id >= vocab_size or sp.is_control(id):
            return rest
        text = sp.decode([*self._before, id])[self._skip :]
        if not text and id not in self._before:  # the word boundary alone, at the start
            self._before.append(id)
        return rest + self._started(text)

    def flush(self) -> str:
        """The rest, at the end: one U+FFFD for each byte of a character that was cut off."""
        return self._started(self._utf8.decode(b"", final=True))

    def _started(self, text: str) -> str:
        if text and not self._skip:
            self._before = [self._tokenizer._printing_id]
            self._skip = len(self._tokenizer._sp.decode(self._before))
        # one U+FFFD for each bad byte, as sentencepiece has it: Python's "replace" makes one of several bytes
        return text.translate(BYTES_AS_REPLACEMENT)
