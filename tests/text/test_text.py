from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPTokenizer

from helpers import small_vocabulary
from vitrail.errors import CheckpointError, InputError
from vitrail.spec import BlockSpec, TextSpec
from vitrail.text.tokenizer import CHUNK, MAX_CHARACTERS, pad
from vitrail.text.tokenizer_files import BOS, EOS, load_tokenizer
from vitrail.text.tokens import TokenIds

VOCAB, MERGES = small_vocabulary()
SIZE = len(VOCAB)

TRICKY = [
    "",
    " ",
    "a photo of a cat",
    "  A   PHOTO\tof\n\na \r\n cat  ",
    "don't I'LL we're you've I'm he'd it's 'tis rock'n'roll ''''s",
    "12345 3.14 ½ ² Ⅷ ٣٤",
    "e\u0301 vs \u00e9, \ufb01 and \u212b, \u1e9e ß \u0130 \u0131",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f\U0001f1eb\U0001f1f7",
    "日本語のテキスト、中文字符 한국어",
    "\u3000wide\u00a0no-break\u200bzero\u2028line\x85next",
    "\x00\x01\x1f\x7f\ufffd\ufeff\uffff",
    "<|startoftext|> a <|endoftext|> b",
    "<|STARTOFTEXT|> <|endoftext|",
    "</w> Ġ Ċ a</w>b",
    "mixed123abc!!??...---___ @#$%^&*()[]{}",
    "\U0010ffff\U000e0041",
    "a" * 60,
]


@dataclass
class Folder:
    """What ``load_tokenizer`` needs of a checkpoint."""

    folder: Path

    @property
    def tokenizer_config(self) -> dict[str, Any] | None:
        path = self.file("tokenizer_config.json")
        return json.loads(path.read_text()) if path else None

    def file(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None


def text_spec(context: int = 77, vocab: int = SIZE, eos: int | None = SIZE - 1) -> TextSpec:
    blocks = BlockSpec(8, 1, 2, 16, "quick_gelu", 1e-5, causal=True)
    return TextSpec(blocks=blocks, vocab=vocab, context=context, eos=eos)


def write_vocab(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps(VOCAB), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def oracle() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=VOCAB, merges=MERGES)


@pytest.fixture(scope="module")
def saved(oracle: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    oracle.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocab")
    write_vocab(folder)
    return folder


@pytest.fixture
def edited(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "edited"
    shutil.copytree(saved, folder)
    return folder


def edit(folder: Path, name: str, **fields: Any) -> Folder:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return Folder(folder)


def test_the_vocabulary_of_these_tests_uses_merges_and_has_no_unknown_byte() -> None:
    assert len(MERGES) == SIZE - 514 > 50
    assert {VOCAB[BOS], VOCAB[EOS]} == {SIZE - 2, SIZE - 1}


@pytest.mark.parametrize("files", ["saved", "plain"])
@pytest.mark.parametrize("text", TRICKY)
def test_ids_equal_transformers(
    text: str, files: str, request: pytest.FixtureRequest, oracle: CLIPTokenizer
) -> None:
    tokenizer = load_tokenizer(Folder(request.getfixturevalue(files)), text_spec(context=400))
    assert tokenizer.encode([text]).lists() == [oracle(text).input_ids]


@given(texts=st.lists(st.text(max_size=60), max_size=6))
@settings(max_examples=150, deadline=None)
def test_ids_of_generated_texts_equal_transformers(
    texts: list[str], saved: Path, plain: Path, oracle: CLIPTokenizer
) -> None:
    wanted = [oracle(text).input_ids for text in texts]
    for folder in (saved, plain):
        assert (
            load_tokenizer(Folder(folder), text_spec(context=1000)).encode(texts).lists() == wanted
        )


def test_one_string_is_one_text_and_no_texts_are_no_rows(saved: Path) -> None:
    tokenizer = load_tokenizer(Folder(saved), text_spec())
    assert tokenizer.encode("a cat").lists() == tokenizer.encode(["a cat"]).lists()
    assert tokenizer.encode([]).lists() == []
    assert tokenizer.encode("").lists() == [[VOCAB[BOS], VOCAB[EOS]]]


@pytest.mark.parametrize("context", [2, 3, 5, 8])
def test_truncation_equals_transformers_and_keeps_the_end(
    context: int, saved: Path, oracle: CLIPTokenizer
) -> None:
    texts = ["", "cat", "a photo of a cat and a dog", "xyzzy " * 50]
    wanted = [oracle(t, truncation=True, max_length=context).input_ids for t in texts]
    tokenizer = load_tokenizer(Folder(saved), text_spec(context))
    rows = tokenizer.encode(texts, overflow="truncate").lists()
    assert rows == wanted
    assert all(row[-1] == VOCAB[EOS] for row in rows)


def test_a_long_text_is_an_error_that_names_it_unless_asked_otherwise(saved: Path) -> None:
    tokenizer = load_tokenizer(Folder(saved), text_spec(context=5))
    with pytest.raises(InputError, match=r"text 1: got 22 tokens, wanted at most 5.*truncate"):
        tokenizer.encode(["a cat", "cat " * 20])
    with pytest.raises(InputError, match="overflow: got 'ignore'"):
        tokenizer.encode(["a cat"], overflow="ignore")  # type: ignore[arg-type]


def test_warn_warns_once_a_call_with_the_count(saved: Path) -> None:
    tokenizer = load_tokenizer(Folder(saved), text_spec(context=5))
    texts = ["cat", "cat " * 20, "dog " * 20]
    with pytest.warns(UserWarning, match=r"2 of 3 texts were cut to 5 tokens") as caught:
        rows = tokenizer.encode(texts, overflow="warn").lists()
    assert len(caught) == 1
    assert rows == tokenizer.encode(texts, overflow="truncate").lists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(texts[:1], overflow="warn")


def test_a_text_of_exactly_the_context_length_is_whole(saved: Path) -> None:
    whole = load_tokenizer(Folder(saved), text_spec(context=22)).encode("cat " * 20).lists()
    assert len(whole[0]) == 22


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", 3], "text 1: got int, wanted a string"),
        ([None], "text 0: got NoneType"),
        ([b"a"], "text 0: got bytes"),
        (b"a", "texts: got bytes"),
        (7, "texts: got int"),
        (["a", "b\ud800c"], r"text 1: got the lone surrogate '\\ud800' at 1"),
        (["a" * (MAX_CHARACTERS + 1)], f"text 0: got {MAX_CHARACTERS + 1} characters"),
    ],
)
def test_what_is_not_text_is_refused_by_index(texts: Any, message: str, saved: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_tokenizer(Folder(saved), text_spec()).encode(texts, overflow="truncate")


def test_the_longest_allowed_text_is_tokenised(saved: Path) -> None:
    tokenizer = load_tokenizer(Folder(saved), text_spec(context=5))
    rows = tokenizer.encode("a" * MAX_CHARACTERS, overflow="truncate").lists()
    assert len(rows[0]) == 5
    assert rows[0][-1] == VOCAB[EOS]


def test_padding_and_truncation_stored_in_the_file_are_switched_off(
    edited: Path, oracle: CLIPTokenizer
) -> None:
    backend = Tokenizer.from_file(str(edited / "tokenizer.json"))
    backend.enable_padding(length=32, pad_id=0, pad_token="!")
    backend.enable_truncation(4)
    backend.save(str(edited / "tokenizer.json"))
    text = "a photo of a cat"
    assert load_tokenizer(Folder(edited), text_spec()).encode(text).lists() == [
        oracle(text).input_ids
    ]


def test_bos_and_eos_are_added_where_the_file_does_not(edited: Path, oracle: CLIPTokenizer) -> None:
    folder = edit(edited, "tokenizer.json", post_processor=None)
    assert load_tokenizer(folder, text_spec()).encode("a cat").lists() == [
        oracle("a cat").input_ids
    ]


def test_an_end_token_that_cannot_be_added_is_refused(edited: Path) -> None:
    edit(edited, "tokenizer.json", post_processor=None)
    folder = edit(edited, "tokenizer_config.json", eos_token={"content": "</s>"})
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json: eos_token '</s>' is not in the voc"
    ):
        load_tokenizer(folder, text_spec())


def test_texts_that_do_not_end_where_the_tower_pools_are_refused(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"wanted an end in 7 \(eos_token_id of config.json\)"
    ):
        load_tokenizer(Folder(saved), text_spec(eos=7))


def test_the_highest_id_rule_wants_the_end_token_to_be_highest(edited: Path) -> None:
    processor = {"type": "RobertaProcessing", "sep": [BOS, SIZE - 2], "cls": [EOS, SIZE - 1]}
    processor |= {"trim_offsets": False, "add_prefix_space": False}
    folder = edit(edited, "tokenizer.json", post_processor=processor)
    with pytest.raises(CheckpointError, match="the highest id"):
        load_tokenizer(folder, text_spec(eos=None))


def test_an_added_token_above_the_end_is_refused_only_under_the_highest_id_rule(
    edited: Path,
) -> None:
    backend = Tokenizer.from_file(str(edited / "tokenizer.json"))
    backend.add_tokens([AddedToken("<my-cat>")])
    backend.save(str(edited / "tokenizer.json"))
    texts = ["a cat", "a <my-cat>"]
    by_id = load_tokenizer(Folder(edited), text_spec(vocab=SIZE + 1)).encode(texts).lists()
    assert by_id[1][-2:] == [SIZE, VOCAB[EOS]]
    with pytest.raises(
        InputError, match=rf"text 1: token id {SIZE} \('<my-cat>'\) is above the end"
    ):
        load_tokenizer(Folder(edited), text_spec(vocab=SIZE + 1, eos=None)).encode(texts)
    with pytest.raises(
        InputError, match=rf"text 1: token id {SIZE} \('<my-cat>'\), wanted ids under"
    ):
        load_tokenizer(Folder(edited), text_spec()).encode(texts)


def test_a_tower_smaller_than_the_end_token_is_refused_at_load(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=f"wanted ids under .* {SIZE - 1}"):
        load_tokenizer(Folder(saved), text_spec(vocab=SIZE - 1, eos=None))


def test_added_tokens_of_a_plain_vocabulary_equal_transformers(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "added"
    shutil.copytree(plain, folder)
    added = {str(SIZE): {"content": "<my-cat>", "lstrip": True, "special": False}}
    config = {"tokenizer_class": "CLIPTokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    wanted = CLIPTokenizer.from_pretrained(folder)
    texts = ["a <my-cat> sits", "a   <my-cat>", "<MY-CAT>", EOS]
    spec = text_spec(vocab=SIZE + 1)
    rows = load_tokenizer(Folder(folder), spec).encode(texts).lists()
    assert rows == [wanted(text).input_ids for text in texts]
    (folder / "tokenizer_config.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<my-cat>": SIZE}))
    assert load_tokenizer(Folder(folder), spec).encode("<my-cat>").lists()[0][1] == SIZE
    (folder / "added_tokens.json").write_text(json.dumps({"<my-cat>": SIZE + 5}))
    with pytest.raises(CheckpointError, match=rf"'<my-cat>' gets the id {SIZE}, wanted {SIZE + 5}"):
        load_tokenizer(Folder(folder), spec)


def test_no_tokenizer_says_which_files_were_looked_for(plain: Path, tmp_path: Path) -> None:
    message = (
        rf"{tmp_path}: no tokenizer; looked for tokenizer.json, and for vocab.json with merges"
    )
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(Folder(tmp_path), text_spec())
    shutil.copy(plain / "vocab.json", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(Folder(tmp_path), text_spec())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json: not a usable tokenizer"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vo',
            "tokenizer.json: not a usable tokenizer",
        ),
        ("tokenizer.json", "[" * 10_000, "tokenizer.json: not a usable tokenizer"),
        ("vocab.json", '{"a": -1}', "'a' has id -1"),
        ("vocab.json", '{"a": true}', "'a' has id True"),
        ("vocab.json", '{"a": "0"}', "'a' has id '0'"),
        ("merges.txt", "#version: 0.2\na b c\n", "line 2 is 'a b c'"),
        ("merges.txt", "zz qq\n", "merges do not fit vocab.json"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "GPT2Tokenizer"}',
            "'GPT2Tokenizer' without",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "a"}}}',
            "malformed added tokens",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "malformed added tokens"),
    ],
)
def test_malformed_files_are_named(
    name: str, content: str, message: str, plain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(plain, folder)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(Folder(folder), text_spec())


def test_merges_that_are_not_utf8_are_refused(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(plain, folder)
    (folder / "merges.txt").write_bytes(b"a \xff\n")
    with pytest.raises(CheckpointError, match=r"merges.txt: not UTF-8"):
        load_tokenizer(Folder(folder), text_spec())


def test_dropout_is_refused(edited: Path) -> None:
    model = json.loads((edited / "tokenizer.json").read_text())["model"]
    folder = edit(edited, "tokenizer.json", model=model | {"dropout": 0.5})
    with pytest.raises(CheckpointError, match=r"BPE dropout 0\.5"):
        load_tokenizer(folder, text_spec())


@pytest.mark.parametrize("context", [8, 77])
def test_pad_equals_transformers(context: int, saved: Path, oracle: CLIPTokenizer) -> None:
    texts = ["", "a cat", "a photo of a dog"]
    tokenizer = load_tokenizer(Folder(saved), text_spec(context))
    input_ids, mask = pad(tokenizer.encode(texts), text_spec(context), tokenizer.pad_id)
    wanted = oracle(texts, padding="max_length", max_length=context, return_tensors="np")
    assert input_ids.dtype == "int64"
    assert input_ids.tolist() == wanted.input_ids.tolist()
    assert mask.tolist() == wanted.attention_mask.tolist()


def test_pad_refuses_a_row_longer_than_the_context() -> None:
    with pytest.raises(InputError, match="text 1: got 9 tokens, wanted at most 8"):
        pad(TokenIds.of([[0], [0] * 9]), text_spec(context=8), 0)


def test_pad_of_nothing_keeps_the_context_length() -> None:
    input_ids, mask = pad(TokenIds.of([]), text_spec(context=8), 0)
    assert input_ids.shape == mask.shape == (0, 8)


@pytest.mark.parametrize(
    ("pad_token", "eos", "wanted"),
    [
        ("!", SIZE - 1, VOCAB["!"]),
        ({"content": "!"}, None, VOCAB["!"]),
        (None, SIZE - 1, SIZE - 1),
        ("not in the vocabulary", SIZE - 1, SIZE - 1),
    ],
)
def test_pad_id_is_the_checkpoints_or_eos(
    pad_token: Any, eos: int | None, wanted: int, edited: Path
) -> None:
    folder = edit(edited, "tokenizer_config.json", pad_token=pad_token)
    assert load_tokenizer(folder, text_spec(eos=eos)).pad_id == wanted


def test_a_pad_token_that_would_be_pooled_or_has_no_embedding_is_not_used(edited: Path) -> None:
    backend = Tokenizer.from_file(str(edited / "tokenizer.json"))
    backend.add_tokens(["<pad>"])
    backend.save(str(edited / "tokenizer.json"))
    folder = edit(edited, "tokenizer_config.json", pad_token="<pad>")
    assert load_tokenizer(folder, text_spec(vocab=SIZE + 1)).pad_id == SIZE
    assert load_tokenizer(folder, text_spec(vocab=SIZE)).pad_id == VOCAB[EOS]
    assert load_tokenizer(folder, text_spec(vocab=SIZE + 1, eos=None)).pad_id == VOCAB[EOS]


def test_the_older_special_tokens_map_is_read(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(plain, folder)
    (folder / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    assert load_tokenizer(Folder(folder), text_spec()).pad_id == VOCAB["!"]


def test_texts_of_several_chunks_keep_their_order_and_their_numbers(saved: Path) -> None:
    tokenizer = load_tokenizer(Folder(saved), text_spec(context=5))
    texts = ["cat", "a cat", "", "dogs"] * CHUNK
    four = tokenizer.encode(texts[:4]).lists()
    assert tokenizer.encode(texts).lists() == four * CHUNK
    long = CHUNK + 7
    texts[long] = texts[-1] = "cat " * 20
    with pytest.raises(InputError, match=f"text {long}: got 22 tokens, wanted at most 5"):
        tokenizer.encode(texts)
    with pytest.warns(UserWarning, match=rf"2 of {4 * CHUNK} texts .*\(first: {long}\)"):
        rows = tokenizer.encode(texts, overflow="warn").lists()
    assert rows[long] == rows[-1] == tokenizer.encode("cat " * 20, overflow="truncate").lists()[0]
    texts[-1] = "cat"
    texts[long] = "b\ud800"
    with pytest.raises(InputError, match=f"text {long}: got the lone surrogate"):
        tokenizer.encode(texts)


def test_threads_share_a_tokenizer(saved: Path) -> None:
    tokenizer = load_tokenizer(Folder(saved), text_spec())
    batches = [[f"a photo of {i} cats and {j} dogs" for i in range(50)] for j in range(16)]
    wanted = [tokenizer.encode(batch).lists() for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        assert [tokens.lists() for tokens in pool.map(tokenizer.encode, batches)] == wanted
