"""Strings to token ids, as the text tower's family wants them.

The recipe is CLIP's: NFC, runs of whitespace to one space, lower case, CLIP's split pattern,
byte-level BPE whose words end in ``</w>``, and BOS and EOS around every text. Source: OpenAI's
``simple_tokenizer.py`` and transformers' ``CLIPTokenizer``, whose ids these are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.strict_json import read_json
from vitrail.errors import CheckpointError, InputError, show_path
from vitrail.spec import TextSpec
from vitrail.text.tokens import TokenIds

Overflow = Literal["error", "warn", "truncate"]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
CLIP_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast")

# About two seconds and 200 MB at worst; a context of 77 tokens uses a few hundred of them.
MAX_CHARACTERS = 1_000_000
MAX_VOCAB_BYTES = 1 << 24  # CLIP's vocab.json has close to 1 MiB
CHUNK = 512
"""Texts that are split into tokens at once: what the library keeps for each, about 1 KiB, then
stays in a core's cache (18 us a caption; 21 with 4,096)."""


class Tokenizer:
    """Token ids of texts, at most ``spec.context`` each. May be called from many threads.

    ``pad_id`` fills what follows EOS in a padded row: the id the checkpoint names, or EOS where
    that id has no embedding, or would itself be pooled by a tower that pools the highest id.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, spec: TextSpec, pad_id: int | None = None
    ) -> None:
        self._backend = backend
        self._spec = spec
        self._eos = _pooled_end(backend, spec)
        highest = self._eos if spec.eos is None else spec.vocab - 1
        self.pad_id: int = self._eos if pad_id is None or pad_id > highest else pad_id

    def encode(self, texts: str | Sequence[str], overflow: Overflow = "error") -> TokenIds:
        """BOS, the text's tokens, EOS, for each text; a single string counts as one text.

        ``overflow`` says what becomes of a text of more than ``spec.context`` ids: "error" raises,
        "warn" truncates and warns once a call, "truncate" truncates; EOS stays the last id.

        A text that spells a special token (``<|endoftext|>``) gets that token, and is pooled at
        its first EOS, as in transformers.

        Raises InputError: not a string, a lone surrogate, over ``MAX_CHARACTERS`` characters, too
        many ids under "error", an id the tower has no embedding for, or an id above EOS where the
        tower pools the highest id.
        """
        if overflow not in get_args(Overflow):
            raise InputError(f"overflow: got {overflow!r}, wanted one of {get_args(Overflow)}")
        batch = _checked([texts] if isinstance(texts, str) else texts)
        context = self._spec.context
        parts, long = [], []
        for first in range(0, len(batch), CHUNK):
            encodings = self._backend.encode_batch_fast(batch[first : first + CHUNK])
            rows = [encoding.ids for encoding in encodings]
            for index, ids in enumerate(rows):
                if len(ids) > context:
                    if overflow == "error":
                        raise InputError(
                            f"text {first + index}: got {len(ids)} tokens, wanted at most {context}"
                            " (overflow='truncate' or 'warn' cuts the text and keeps its end token)"
                        )
                    rows[index] = [*ids[: context - 1], self._eos]
                    long.append(first + index)
            parts.append(TokenIds.of(rows))
        if long and overflow == "warn":
            warnings.warn(
                f"{len(long)} of {len(batch)} texts were cut to {context} tokens "
                f"(first: {long[0]})",
                stacklevel=2,
            )
        tokens = TokenIds.join(parts or [TokenIds.of([])])
        self._check(tokens)
        return tokens

    def _check(self, tokens: TokenIds) -> None:
        most = self._spec.vocab - 1
        if self._spec.eos is None:
            most = min(most, self._eos)
        highest = tokens.highest
        if not (over := highest > most).any():
            return
        text = int(over.argmax())
        token = int(highest[text])
        where = f"text {text}: token id {token} ({self._backend.id_to_token(token)!r})"
        if token >= self._spec.vocab:
            raise InputError(
                f"{where}, wanted ids under the text tower's vocabulary size {self._spec.vocab}"
            )
        raise InputError(
            f"{where} is above the end token {self._eos}; this text tower pools at the highest id, "
            "so the embedding would not be the text's"
        )


def load_tokenizer(checkpoint: Checkpoint, spec: TextSpec) -> Tokenizer:
    """The checkpoint's tokenizer: tokenizer.json, else vocab.json with merges.txt.

    Padding and truncation stored in tokenizer.json are switched off: ``Tokenizer`` has its own.
    BOS and EOS are added around each text where the file itself does not add them.

    Raises CheckpointError: files missing or malformed, BPE dropout (ids would be random), or texts
    that would not end in the token at which ``spec`` pools.
    """
    stored = checkpoint.file("tokenizer.json")
    vocab, merges = checkpoint.file("vocab.json"), checkpoint.file("merges.txt")
    if stored is not None:
        backend, where = _from_json(stored), stored
    elif vocab is not None and merges is not None:
        backend, where = _from_vocab(checkpoint, vocab, merges), vocab
    else:
        raise CheckpointError(
            f"{show_path(checkpoint.folder)}: no tokenizer; "
            "looked for tokenizer.json, and for vocab.json with merges.txt; copy them from where "
            "the checkpoint came from (transformers: tokenizer.save_pretrained), or pass token ids"
        )
    backend.no_padding()
    backend.no_truncation()
    try:
        _surround(backend, checkpoint)
        pad = _special(checkpoint, "pad_token")
        return Tokenizer(backend, spec, None if pad is None else backend.token_to_id(pad))
    except CheckpointError as error:
        raise CheckpointError(f"{show_path(where)}: {error}") from None


def pad(
    tokens: TokenIds, spec: TextSpec, pad_id: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Texts of ids, padded on the right to the context length T.

    Returns ``input_ids`` (N, T) and ``attention_mask`` (N, T), 1 at the ids given. Raises
    InputError where a text has more than T ids.
    """
    lengths = tokens.lengths
    if (long := lengths > spec.context).any():
        text = int(long.argmax())
        raise InputError(f"text {text}: got {lengths[text]} tokens, wanted at most {spec.context}")
    mask = np.arange(spec.context) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = tokens.ids
    return input_ids, mask.astype(np.int64)


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, bytes) or not isinstance(texts, Sequence):
        raise InputError(f"texts: got {type(texts).__name__}, wanted a string or a list of strings")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {index}: got {type(text).__name__}, wanted a string")
        if len(text) > MAX_CHARACTERS:
            raise InputError(
                f"text {index}: got {len(text)} characters, wanted at most {MAX_CHARACTERS}"
            )
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text {index}: got the lone surrogate {text[error.start]!r} at {error.start}, "
                "wanted characters that UTF-8 can hold"
            ) from None
    return list(texts)


def _pooled_end(backend: tokenizers.Tokenizer, spec: TextSpec) -> int:
    """The id every text ends in, once it is sure that the tower pools there."""
    empty = backend.encode("").ids
    end = max(empty) if spec.eos is None else spec.eos
    if empty[-1] != end:
        rule = "the highest id" if spec.eos is None else "eos_token_id of config.json"
        raise CheckpointError(
            f"the empty text gives the ids {empty}, wanted an end in {end} ({rule}), "
            "the token at which the text tower pools"
        )
    if max(empty) >= spec.vocab:
        raise CheckpointError(
            f"the empty text gives the ids {empty}, "
            f"wanted ids under the text tower's vocabulary size {spec.vocab}"
        )
    return end


def _surround(backend: tokenizers.Tokenizer, checkpoint: Checkpoint) -> None:
    """Has BOS and EOS added around each text, where nothing is added yet."""
    if backend.encode("").ids:
        return
    ends: list[tuple[str, int]] = []
    for key, default in (("eos_token", EOS), ("bos_token", BOS)):
        token = _special(checkpoint, key) or default
        number = backend.token_to_id(token)
        if number is None:
            raise CheckpointError(f"{key} {token!r} is not in the vocabulary")
        ends.append((token, number))
    backend.post_processor = processors.RobertaProcessing(ends[0], ends[1], False, False)


def _special(checkpoint: Checkpoint, key: str) -> str | None:
    """A special token's text, from tokenizer_config.json or the older special_tokens_map.json."""
    older = checkpoint.file("special_tokens_map.json")
    for values in (checkpoint.tokenizer_config, read_json(older) if older else None):
        value = (values or {}).get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def _from_json(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{show_path(path)}: not a usable tokenizer: {error}") from error
    if getattr(backend.model, "dropout", None):
        raise CheckpointError(
            f"{show_path(path)}: BPE dropout {backend.model.dropout}, wanted none"
        )
    return backend


def _from_vocab(checkpoint: Checkpoint, vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    kind = (checkpoint.tokenizer_config or {}).get("tokenizer_class")
    if kind not in CLIP_CLASSES:
        raise CheckpointError(
            f"{show_path(vocab)}: tokenizer_class {kind!r} without a tokenizer.json, "
            f"wanted one of {CLIP_CLASSES}"
        )
    unknown = _special(checkpoint, "unk_token") or EOS
    try:
        model = models.BPE(
            vocab=_read_vocab(vocab),
            merges=_read_merges(merges),
            unk_token=unknown,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{show_path(merges)}: merges do not fit {vocab.name}: {error}"
        ) from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    _add_tokens(backend, checkpoint, vocab)
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, checkpoint: Checkpoint, vocab: Path) -> None:
    """Tokens matched whole, before any splitting: those listed as added, then the special ones."""
    for number, token in sorted(_added(checkpoint, vocab).items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise CheckpointError(
                f"{show_path(vocab)}: added token {token.content!r} gets the id "
                f"{backend.token_to_id(token.content)}, wanted {number}"
            )
    keys = ("bos_token", "eos_token", "unk_token", "pad_token")
    names = {BOS, EOS, *filter(None, (_special(checkpoint, key) for key in keys))}
    known = sorted(name for name in names if backend.token_to_id(name) is not None)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in known])


def _added(checkpoint: Checkpoint, vocab: Path) -> dict[int, AddedToken]:
    """Id -> token, from tokenizer_config.json or the older added_tokens.json."""
    older = checkpoint.file("added_tokens.json")
    names = read_json(older) if older else {}
    listed = (checkpoint.tokenizer_config or {}).get("added_tokens_decoder") or {}
    try:
        tokens = {int(n): AddedToken(name) for name, n in names.items()}
        for number, fields in listed.items():
            flags = {key: bool(fields[key]) for key in FLAGS if key in fields}
            tokens[int(number)] = AddedToken(fields["content"], **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{show_path(vocab)}: malformed added tokens: {error!r}") from None
    return tokens


def _read_vocab(path: Path) -> dict[str, int]:
    vocab: dict[str, int] = read_json(path, MAX_VOCAB_BYTES)
    for token, number in vocab.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise CheckpointError(
                f"{show_path(path)}: token {token!r} has id {number!r}, wanted 0 or more"
            )
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{show_path(path)}: not UTF-8: {error}") from None
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise CheckpointError(
                f"{show_path(path)}: line {number} is {line!r}, wanted two tokens"
            )
        merges.append((pair[0], pair[1]))
    return merges
