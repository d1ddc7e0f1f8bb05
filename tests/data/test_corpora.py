"""Documents, their splits and their fingerprint."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema import Data
from data import corpora, sources
from data.sources import packages
from tests.data.conftest import write_documents

ROOT = Path(__file__).parents[2]


def names(corpus: corpora.Corpus) -> dict[str, list[str]]:
    return {split: [name for name, _ in corpus.read(split)] for split in corpora.SPLITS}


def test_shares_of_the_splits():
    drawn = [corpora.split_of(f"name {i}") for i in range(20_000)]
    shares = [drawn.count(split) / len(drawn) for split in corpora.SPLITS]
    assert shares == pytest.approx([0.86, 0.05, 0.09], abs=0.01)


def test_the_split_of_a_name_never_changes():
    known = {
        "os.py": "train",
        "idlelib/run.py": "test",
        "http/server.py": "validation",
        "sunau.py": "validation",
    }
    for name, split in known.items():
        share = int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256
        expected = "train" if share < 0.86 else "validation" if share < 0.91 else "test"
        assert corpora.split_of(name) == split == expected


def test_a_folder_is_split_by_name_without_overlap(tmp_path):
    written = write_documents(tmp_path)
    corpus = sources.documents(Data(source=f"text:{tmp_path}"))
    found = names(corpus)
    assert all(found.values())
    flat = [name for split in corpora.SPLITS for name in found[split]]
    assert sorted(flat) == sorted(written) and len(set(flat)) == len(flat)
    for split in corpora.SPLITS:
        assert {corpora.split_of(name) for name in found[split]} == {split}
        assert dict(corpus.read(split)) == {name: written[name] for name in found[split]}


def test_order_and_fingerprint_do_not_depend_on_when_files_were_written(tmp_path):
    for folder, order in (("a", range(30)), ("b", reversed(range(30)))):
        (tmp_path / folder).mkdir()
        for i in order:
            (tmp_path / folder / f"{i}.txt").write_text(f"document {i}")
    first, second = (sources.documents(Data(source=f"text:{tmp_path / f}")) for f in "ab")
    assert names(first) == names(second)
    assert first.key == second.key == corpora.summary(second).fingerprint


@pytest.mark.parametrize("change", ["content", "name", "border", "new", "gone"])
def test_fingerprint_sees_every_change(tmp_path, change):
    write_documents(tmp_path, count=20)
    source = Data(source=f"text:{tmp_path}")
    before = corpora.summary(sources.documents(source)).fingerprint
    file = tmp_path / "part1" / "document1.txt"
    content = file.read_bytes()
    if change == "content":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change == "name":
        file.rename(file.with_name("document1.tx_"))
    elif change == "border":
        other = tmp_path / "part1" / "document4.txt"
        other.write_bytes(content[-1:] + other.read_bytes())
        file.write_bytes(content[:-1])
    elif change == "new":
        (tmp_path / "new.txt").write_text("x")
    else:
        file.unlink()
    assert corpora.summary(sources.documents(source)).fingerprint != before


def test_fingerprint_knows_where_a_name_and_a_document_end():
    def digest(*documents: tuple[str, bytes]) -> str:
        total = hashlib.sha256()
        for name, content in documents:
            corpora.absorb(total, name, content)
        return total.hexdigest()

    lists = [[("ab", b"c")], [("a", b"bc")], [("abc", b"")], [("a", b"b"), ("c", b"")]]
    assert len({digest(*documents) for documents in lists}) == len(lists)


def test_folders_named_as_splits_are_the_splits(tmp_path):
    for split in corpora.SPLITS:
        for i in range(30):
            path = tmp_path / split / f"{i}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{split} {i}")
    found = names(sources.documents(Data(source=f"text:{tmp_path}")))
    assert {s: {n.split("/")[0] for n in found[s]} for s in found} == {s: {s} for s in found}
    assert [len(v) for v in found.values()] == [30, 30, 30]


def test_a_split_that_is_missing_comes_out_of_train(tmp_path):
    for split, count in (("train", 200), ("test", 10)):
        for i in range(count):
            path = tmp_path / split / f"{i}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{split} {i}")
    found = names(sources.documents(Data(source=f"text:{tmp_path}")))
    assert sorted(found["test"]) == sorted(f"test/{i}.txt" for i in range(10))
    assert len(found["train"]) + len(found["validation"]) == 200
    assert 2 <= len(found["validation"]) <= 25


def test_the_standard_library():
    corpus = sources.documents(Data(source="stdlib"))
    found = corpora.summary(corpus)
    assert found.fingerprint == corpus.key
    total = sum(found.bytes.values())
    assert 9e6 < total < 14e6
    assert 0.75 < found.bytes["train"] / total < 0.95
    everything = [name for split in names(corpus).values() for name in split]
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(everything)
    parts = {part for name in everything for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "dist-packages"})
    assert not any("sysconfigdata" in part for part in parts)


def test_the_installed_packages():
    corpus = sources.documents(Data(source="packages"))
    tops = {name.split("/")[0] for split in names(corpus).values() for name in split}
    assert {"numpy", "jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets"} <= tops
    assert sum(corpora.summary(corpus).bytes.values()) > 20e6


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(packages, "PACKAGES", ("no-such-package",))
    with pytest.raises(
        ValueError, match="^source 'packages' needs .*: pip install no-such-package$"
    ):
        sources.documents(Data(source="packages"))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("stdlb", "unknown source 'stdlb': .*; nearest: stdlib$"),
        ("package", "unknown source 'package': .*; nearest: packages$"),
        ("txt:folder", "unknown source 'txt:folder': .*; nearest: text:FOLDER$"),
        ("text:", "unknown source 'text:': .*; nearest: text:FOLDER$"),
        ("tfd:lm1b", "unknown source 'tfd:lm1b': .*; nearest: tfds:NAME$"),
        ("text:{tmp}/gone", "source 'text:.*gone' must name a folder, and there is none$"),
        ("text:{tmp}/empty", "source 'text:.*empty' must hold files, and the folder is empty$"),
        ("text:{tmp}/binary", "source 'text:.*binary' holds no text: .*$"),
        ("tfds:../up", "tfds name '../up' must be NAME or NAME/CONFIG below .*$"),
    ],
)
def test_wrong_sources_are_one_line(tmp_path, source, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "x").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=f"^{line}") as error:
        sources.documents(Data(source=source.format(tmp=tmp_path)))
    assert "\n" not in str(error.value)


def test_importing_data_loads_no_framework():
    files = sorted(path.stem for path in (ROOT / "data").glob("*.py") if path.stem != "__init__")
    assert {"corpora", "packing", "pipeline", "token_cache", "tokenizers"} <= set(files)
    heavy = ["jax", "flax", "tensorflow", "torch", "grain", "tensorflow_datasets", "tokenizers"]
    imports = "; ".join(f"import data.{file}" for file in files)
    check = f"import sys; {imports}; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
