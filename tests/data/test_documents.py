import json
import sysconfig

import datasets
import pytest

from qat.data.documents import SPLITS, Document, digest, installed_packages, python_stdlib, text, text_files


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Reading a table leaves no copy in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def test_splits_partition_documents_in_about_their_shares():
    documents = [Document(f"name{i}", "") for i in range(20_000)]
    counts = {split: sum(d.split == split for d in documents) for split in SPLITS}
    assert sum(counts.values()) == len(documents)
    for split, share in {"train": 0.76, "calibration": 0.04, "validation": 0.08, "test": 0.12}.items():
        # Binomial: five standard deviations.
        assert counts[split] / 20_000 == pytest.approx(share, abs=5 * (share * (1 - share) / 20_000) ** 0.5)


def test_a_split_depends_on_the_name_alone():
    assert {Document("os.py", content).split for content in ("", "a", "b" * 1000)} == {Document("os.py", "x").split}


def test_splits_of_known_names_never_change():
    """A change would move documents between training and test under a model that was trained before."""
    names = ["os.py", "json/decoder.py", "a", "b", "c", "collections/__init__.py"]
    assert [Document(n, "").split for n in names] == ["test", "test", "train", "train", "train", "train"]


DOCUMENTS = [Document("a", "one"), Document("b", "two"), Document("c", "three")]


def test_a_digest_does_not_depend_on_the_order():
    assert digest(DOCUMENTS) == digest(DOCUMENTS[::-1])
    assert len(digest(DOCUMENTS)) == 16


@pytest.mark.parametrize(
    "changed",
    [
        [Document("a", "onf"), *DOCUMENTS[1:]],
        [Document("a", "one "), *DOCUMENTS[1:]],
        [Document("A", "one"), *DOCUMENTS[1:]],
        DOCUMENTS[1:],
        [*DOCUMENTS, Document("d", "")],
        [Document("ao", "ne"), *DOCUMENTS[1:]],
        [Document("a", "two"), Document("b", "one"), DOCUMENTS[2]],
    ],
    ids=["byte", "space", "name", "removed", "added", "moved border", "swapped"],
)
def test_a_digest_notices_every_byte(changed):
    assert digest(changed) != digest(DOCUMENTS)


def test_the_standard_library_is_read_without_its_tests():
    documents = python_stdlib()
    names = {d.name for d in documents}
    assert {"os.py", "json/decoder.py"} <= names
    assert not any({"test", "tests", "site-packages", "encodings", "idlelib"} & set(n.split("/")) for n in names)
    assert {d.split for d in documents} == set(SPLITS)
    assert all(d.text for d in documents)


def test_installed_packages_stop_at_the_bytes_asked_for(tmp_path, monkeypatch):
    for i in range(50):
        (tmp_path / f"package{i}").mkdir()
        (tmp_path / f"package{i}" / "module.py").write_text("x" * 100)
    (tmp_path / "package0" / "tests").mkdir()
    (tmp_path / "package0" / "tests" / "test_module.py").write_text("y" * 100)
    (tmp_path / "package1" / "table.py").write_text("z" * 200_000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    documents = installed_packages(1_950)
    assert len(documents) == 20
    assert [d.name for d in documents] != sorted(d.name for d in documents), "a fair sample, not the alphabet's first"
    assert installed_packages(1_950) == documents
    assert {d.text for d in installed_packages(10**9)} == {"x" * 100}
    assert all(d.name.startswith("site-packages/package") for d in documents)


def texts(*args, **kwargs):
    return [d.text for d in text(*args, **kwargs)]


def test_a_text_file_is_one_document_or_many_by_its_separator(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one<|end|>\n two \n<|end|><|end|>  <|end|>one")
    assert texts(str(file), separator="<|end|>") == ["one", "two"]
    assert len(texts(str(file))) == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_table_is_one_document_a_row(tmp_path, name):
    rows = [
        {"text": "one", "id": 1},
        {"text": "two\u2028lines", "id": 2},
        {"text": None, "id": 3},
        {"text": " ", "id": 4},
    ]
    if name.endswith("parquet"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    assert texts(str(tmp_path / name)) == ["one", "two\u2028lines"]


def test_a_folder_is_read_whole_and_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "deep" / "b.md").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.py").write_text("c")
    (tmp_path / "d.jsonl").write_text('{"text": "d"}\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert texts(str(tmp_path)) == ["a", "c", "d", "b"]
    assert [f.name for f in text_files(tmp_path)] == ["a.txt", "c.py", "d.jsonl", "b.md"]


def test_equal_texts_are_one_document_wherever_they_lie(tmp_path):
    (tmp_path / "a.txt").write_text("same\n")
    (tmp_path / "b.txt").write_text("  same")
    (document,) = text(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    assert text(str(tmp_path)) == [document]


def test_bytes_that_are_no_utf8_do_not_stop_a_run(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert texts(str(tmp_path)) == ["caf\ufffd au lait"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"content": "x"}\n', r"has columns \['content'\], none of them 'text'"),
        ("a.jsonl", "", "is not readable as json"),
        ("a.jsonl", '{"text": "x"}\n{"text"\n', "is not readable as json"),
        ("a.jsonl", '{"text": 1}\n', "the column 'text' holds int, not text"),
        ("a.parquet", "nonsense", "is not readable as parquet"),
    ],
    ids=["missing column", "empty", "malformed", "numbers", "not parquet"],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} {message}|{name}: {message}"):
        text(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [("absent", "absent: no such file or folder"), ("empty", r"empty: no file ending in \.txt, .*\.parquet")],
)
def test_a_place_with_nothing_to_read_is_named(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        text(str(tmp_path / path))


def test_files_of_nothing_but_space_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="every document is empty"):
        text(str(tmp_path))


@pytest.mark.parametrize("arguments", [{}, {"path": "a", "dataset": "b"}], ids=["neither", "both"])
def test_exactly_one_place_must_be_given(arguments):
    with pytest.raises(ValueError, match=r"exactly one of data.source.path"):
        text(**arguments)
