"""Tokenizers lose nothing, and say in one line what is wrong with a file."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizers
from data.tokenizers import open_tokenizer

DOCUMENTS = st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode))


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    """Each tokenizer in turn."""
    name = request.param if request.param == "bytes" else request.getfixturevalue("bpe")
    return open_tokenizer(name)


@settings(deadline=None, max_examples=300)
@given(data=DOCUMENTS)
def test_round_trip_is_exact(tokenizer, data):
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert tokenizer.byte_lengths[ids].sum() == len(data)
    assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.separator)


def test_the_separator_is_the_last_id_and_decodes_to_nothing(tokenizer):
    lengths = tokenizer.byte_lengths
    assert lengths.dtype == np.int32 and lengths.shape == (tokenizer.vocabulary,)
    assert tokenizer.separator == tokenizer.vocabulary - 1 and lengths[tokenizer.separator] == 0
    assert (lengths[:-1] >= 1).all()
    separated = [tokenizer.separator, *tokenizer.encode(b"a"), tokenizer.separator]
    assert tokenizer.decode(separated) == "a"


def test_bytes_are_their_own_ids():
    tokenizer = open_tokenizer("bytes")
    assert tokenizer.vocabulary == 257
    assert tokenizer.encode(b"\x00az\xff").tolist() == [0, 97, 122, 255]
    assert tokenizer.decode([0xFF, 0x41]) == "\ufffdA"


def test_training_is_repeatable_and_has_the_size_asked_for(config, bpe, tmp_path):
    again = tokenizers.train(config, 600, tmp_path / "deeper" / "again.json")
    first = open_tokenizer(bpe)
    assert first.vocabulary == again.vocabulary == 600
    assert first.fingerprint == again.fingerprint and first.pieces == again.pieces
    assert max(first.byte_lengths) > 1
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["again.json"]


def test_training_shortens_what_it_was_trained_on(config, bpe):
    data = b"00150015001500150015"
    assert len(open_tokenizer(bpe).encode(data)) < len(data)


def test_added_tokens_and_invalid_bytes_keep_their_bytes(bpe, tmp_path):
    model = library.Tokenizer.from_file(bpe.removeprefix("bpe:"))
    model.add_special_tokens(["<|end|>"])
    model.post_processor = library.processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 599)]
    )
    model.save(str(tmp_path / "added.json"))
    tokenizer = open_tokenizer(f"bpe:{tmp_path / 'added.json'}")
    data = b"\xff\xfea <|end|> b\xc3"
    assert tokenizer.vocabulary == 601
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


# What makes a file lossy: what its JSON says, and what the refusal must name.
LOSSY = {
    "prefix": ({"pre_tokenizer": {"add_prefix_space": True}}, "add_prefix_space"),
    "unicode": ({"normalizer": {"type": "NFC"}}, "normalizer"),
    "replaced": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "zz"}, "content": "z"}},
        "normalizer",
    ),
    "removed": (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"String": "zz"},
                        "behavior": "Removed",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                ],
            }
        },
        "Split drops",
    ),
    "random": ({"model": {"dropout": 0.5}}, "dropout"),
    "ended": ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
}


def changed(bpe: str, changes: dict, file: Path) -> str:
    """The tokenizer `bpe` with `changes` in its JSON, in `file`."""
    described = json.loads(Path(bpe.removeprefix("bpe:")).read_text())
    for name, value in changes.items():
        old = described[name] if isinstance(described[name], dict) and "type" not in value else {}
        described[name] = old | value
    file.write_text(json.dumps(described))
    return f"bpe:{file}"


@pytest.mark.parametrize("fault", LOSSY)
def test_files_that_lose_bytes_are_refused(fault, bpe, tmp_path):
    changes, named = LOSSY[fault]
    with pytest.raises(ValueError, match=f"loses bytes: it must be a byte-level BPE.*{named}"):
        open_tokenizer(changed(bpe, changes, tmp_path / "x.json"))


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_added_tokens_that_take_spaces_are_refused(side, bpe, tmp_path):
    model = library.Tokenizer.from_file(bpe.removeprefix("bpe:"))
    model.add_special_tokens([library.AddedToken("<|user|>", **{side: True})])
    file = tmp_path / "user.json"
    model.save(str(file))
    assert model.encode("<|user|>\n a").ids != open_tokenizer(bpe).encode(b"<|user|>\n a").tolist()
    with pytest.raises(ValueError, match=f"<|user|>.*{side}"):
        open_tokenizer(f"bpe:{file}")


def test_other_models_and_no_json_are_refused(tmp_path):
    words = library.Tokenizer(library.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    (tmp_path / "words").write_text(words.to_str())
    with pytest.raises(ValueError, match="loses bytes: .*its model is WordLevel"):
        open_tokenizer(f"bpe:{tmp_path / 'words'}")
    (tmp_path / "none").write_text("{")
    with pytest.raises(ValueError, match="is no tokenizers JSON file"):
        open_tokenizer(f"bpe:{tmp_path / 'none'}")


def test_a_text_that_does_not_come_back_is_an_error_whatever_lost_it(bpe, tmp_path, monkeypatch):
    replace = {"normalizer": {"type": "Replace", "pattern": {"String": "zz"}, "content": "z"}}
    monkeypatch.setattr(tokenizers, "_fault", lambda described: "")
    tokenizer = open_tokenizer(changed(bpe, replace, tmp_path / "x.json"))
    assert tokenizer.decode_bytes(tokenizer.encode(b"piano")) == b"piano"
    with pytest.raises(ValueError, match="loses bytes: the text about b'pizza' does not come back"):
        tokenizer.encode(b"pizza")


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("byte", "unknown tokenizer 'byte': it must be bytes or bpe:FILE; nearest: bytes$"),
        ("bep:x", "unknown tokenizer 'bep:x': .*; nearest: bpe:FILE$"),
        ("bpe:", "unknown tokenizer 'bpe:': .*; nearest: bpe:FILE$"),
        ("bpe:/no/file", "tokenizer file '/no/file' does not exist; make one with: python -m .*$"),
    ],
)
def test_wrong_tokenizers_are_one_line(spec, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        open_tokenizer(spec)


def test_a_size_below_the_bytes_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="size 256 must hold 256 bytes .* nearest: 257"):
        tokenizers.train(config, 256, tmp_path / "x.json")


def test_a_missing_library_is_one_line(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="^a bpe: tokenizer needs: pip install tokenizers$"):
        open_tokenizer(bpe)


def test_the_command_trains_and_reports(config, tmp_path, monkeypatch, capsys):
    flags = [f"--source={config.source}", "--size=300", f"--out={tmp_path / 'b.json'}"]
    monkeypatch.setattr(sys, "argv", ["tokenizers", *flags])
    tokenizers.main()
    report = json.loads(capsys.readouterr().out)
    assert report["vocabulary"] == 300 and report["validation_bytes_per_token"] > 1


def test_the_command_refuses_a_wrong_source_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tokenizers", "--source=stdlb", f"--out={tmp_path / 'b'}"])
    with pytest.raises(SystemExit) as stopped:
        tokenizers.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: unknown source") and error.count("\n") == 1
