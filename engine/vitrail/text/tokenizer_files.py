"""The tokenizer files of a checkpoint: tokenizer.json, or vocab.json with merges.txt.

The second pair is read by CLIP's recipe: NFC, runs of whitespace to one space, lower case, CLIP's
split pattern, byte-level BPE with words that end in ``</w>``, and BOS and EOS around every text.
Source: OpenAI's ``simple_tokenizer.py`` and transformers' ``CLIPTokenizer``; the ids are equal.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from vitrail.checkpoint.files import Checkpoint
from vitrail.checkpoint.strict_json import read_json
from vitrail.errors import CheckpointError, show_path
from vitrail.spec import TextSpec
from vitrail.text.tokenizer import Tokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
"""CLIP's pattern of the pieces that BPE works on."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""The flags of `tokenizers.AddedToken` that tokenizer_config.json stores."""
CONFIG_FIELDS = (
    "tokenizer_class",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "added_tokens_decoder",
)
"""The fields of tokenizer_config.json that are read here."""
CLIP_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast")
MAX_VOCAB_BYTES = 1 << 24
"""The largest vocab.json that is read; CLIP's has about 1 MiB."""


def config_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of tokenizer_config.json that `load_tokenizer` reads. Others say, for example,
    which version of transformers wrote the file."""
    config = checkpoint.tokenizer_config or {}
    return {name: config[name] for name in CONFIG_FIELDS if name in config}


def load_tokenizer(checkpoint: Checkpoint, spec: TextSpec) -> Tokenizer:
    """The tokenizer of a checkpoint, from tokenizer.json, else from vocab.json with merges.txt.

    Padding and truncation that tokenizer.json asks for are switched off, because `Tokenizer` does
    both. BOS and EOS are added around each text unless the file does so.

    Raises CheckpointError: files are missing or malformed, BPE dropout would make ids random, or
    texts would not end in the token at which ``spec`` pools.
    """
    stored = checkpoint.file("tokenizer.json")
    vocab, merges = checkpoint.file("vocab.json"), checkpoint.file("merges.txt")
    if stored is not None:
        backend, path = _from_json(stored), stored
    elif vocab is not None and merges is not None:
        backend, path = _from_vocab(checkpoint, vocab, merges), vocab
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
        raise _error(path, str(error)) from None


def _error(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{show_path(path)}: {problem}")


def _surround(backend: tokenizers.Tokenizer, checkpoint: Checkpoint) -> None:
    """Let ``backend`` add BOS and EOS around each text, unless it adds anything already."""
    if backend.encode("").ids:
        return
    tokens: list[tuple[str, int]] = []
    for key, default in (("eos_token", EOS), ("bos_token", BOS)):
        token = _special(checkpoint, key) or default
        token_id = backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"{key} {token!r} is not in the vocabulary")
        tokens.append((token, token_id))
    backend.post_processor = processors.RobertaProcessing(tokens[0], tokens[1], False, False)


def _special(checkpoint: Checkpoint, key: str) -> str | None:
    """A special token's text, from tokenizer_config.json or the older special_tokens_map.json."""
    older_file = checkpoint.file("special_tokens_map.json")
    for values in (checkpoint.tokenizer_config, read_json(older_file) if older_file else None):
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
        raise _error(path, f"not a usable tokenizer: {error}") from error
    if getattr(backend.model, "dropout", None):
        raise _error(path, f"BPE dropout {backend.model.dropout}, wanted none")
    return backend


def _from_vocab(checkpoint: Checkpoint, vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    class_name = (checkpoint.tokenizer_config or {}).get("tokenizer_class")
    if class_name not in CLIP_CLASSES:
        problem = f"tokenizer_class {class_name!r} without a tokenizer.json"
        raise _error(vocab, f"{problem}, wanted one of {CLIP_CLASSES}")
    try:
        model = models.BPE(
            vocab=_read_vocab(vocab),
            merges=_read_merges(merges),
            unk_token=_special(checkpoint, "unk_token") or EOS,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise _error(merges, f"merges do not fit {vocab.name}: {error}") from error
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
    """Add the tokens that are matched before splitting: listed tokens, then special tokens."""
    for token_id, token in sorted(_added_tokens(checkpoint, vocab).items()):
        backend.add_tokens([token])
        actual_id = backend.token_to_id(token.content)
        if actual_id != token_id:
            problem = f"added token {token.content!r} gets the id {actual_id}, wanted {token_id}"
            raise _error(vocab, problem)
    keys = ("bos_token", "eos_token", "unk_token", "pad_token")
    names = {BOS, EOS, *filter(None, (_special(checkpoint, key) for key in keys))}
    names = {name for name in names if backend.token_to_id(name) is not None}
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in sorted(names)])


def _added_tokens(checkpoint: Checkpoint, vocab: Path) -> dict[int, AddedToken]:
    """Added tokens by id, from added_tokens.json (older) and tokenizer_config.json."""
    older_file = checkpoint.file("added_tokens.json")
    names = read_json(older_file) if older_file else {}
    decoder = (checkpoint.tokenizer_config or {}).get("added_tokens_decoder") or {}
    try:
        tokens = {int(token_id): AddedToken(name) for name, token_id in names.items()}
        for token_id, fields in decoder.items():
            flags = {key: bool(fields[key]) for key in FLAGS if key in fields}
            tokens[int(token_id)] = AddedToken(fields["content"], **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _error(vocab, f"malformed added tokens: {error!r}") from None
    return tokens


def _read_vocab(path: Path) -> dict[str, int]:
    vocab: dict[str, int] = read_json(path, MAX_VOCAB_BYTES)
    for token, value in vocab.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise _error(path, f"token {token!r} has id {value!r}, wanted 0 or more")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise _error(path, f"not UTF-8: {error}") from None
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise _error(path, f"line {number} is {line!r}, wanted two tokens")
        merges.append((pair[0], pair[1]))
    return merges
