"""Documents: every kind of source gives the ids that were put in, from any document on."""

import json
import sys

import numpy as np
import pytest
import torch
import zoo

from lorsa_lens.data import Documents, open_documents, special_token_ids

CORPUS = [[5, 6, 7], [], [8], [9, 10, 11, 12]]
WORDS = [" ".join(f"w{i - 4}" for i in ids) for ids in CORPUS]


def letters(text):
    """A tokenizer that anyone can follow: a is 10, b is 11."""
    return [ord(c) - ord("a") + 10 for c in text if c.isalpha()]


def read(documents, start=0, epoch=0):
    """Numbers and ids, as plain lists."""
    return [(d.number, d.ids.tolist()) for d in documents.read(start, epoch)]


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


# ------------------------------------------------------------------------------ what they hold


def flat_with_separator():
    return np.array([5, 6, 7, 3, 3, 8, 3, 9, 10, 11, 12], dtype=np.uint16)


@pytest.fixture(params=["lists", "npy", "bin", "jsonl ids", "jsonl text", "txt", "txt files",
                        "dataset", "text dataset", "streamed", "saved", "folder"])  # fmt: skip
def corpus(request, tmp_path):
    """`CORPUS`, from a source of each kind."""
    kind, words = request.param, dict(tokenizer=zoo.tokenizer())
    if kind == "lists":
        return open_documents(CORPUS)
    if kind == "npy":
        np.save(tmp_path / "a.npy", flat_with_separator())
        return open_documents(tmp_path / "a.npy", separator_token_id=3)
    if kind == "bin":
        flat_with_separator().astype(np.uint32).tofile(tmp_path / "a.bin")
        return open_documents(str(tmp_path / "a.bin"), separator_token_id=3, dtype="uint32")
    if kind == "jsonl ids":
        return open_documents(jsonl(tmp_path / "a.jsonl", [{"tokens": ids} for ids in CORPUS]))
    if kind == "jsonl text":
        rows = [{"id": 0, "story": text} for text in WORDS]
        return open_documents(jsonl(tmp_path / "a.jsonl", rows), column="story", **words)
    if kind == "txt":
        (tmp_path / "a.txt").write_text("<|end|>".join(WORDS))
        return open_documents(tmp_path / "a.txt", separator="<|end|>", **words)
    if kind == "txt files":
        for i, text in enumerate(WORDS):
            (tmp_path / f"{i}.txt").write_text(text)
        return open_documents([tmp_path / f"{i}.txt" for i in range(4)], **words)
    datasets = pytest.importorskip("datasets")
    if kind == "text dataset":
        return open_documents(datasets.Dataset.from_dict({"text": WORDS, "n": range(4)}), **words)
    if kind == "folder":
        jsonl(tmp_path / "train.jsonl", [{"tokens": ids} for ids in CORPUS])
        return open_documents(str(tmp_path), streaming=True)
    dataset = datasets.Dataset.from_dict({"input_ids": CORPUS, "text": WORDS})
    if kind == "streamed":
        return open_documents(dataset.to_iterable_dataset())
    if kind == "saved":
        datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "saved"))
        return open_documents(str(tmp_path / "saved"), split="train")
    return open_documents(dataset)


def test_every_source_gives_the_same_documents_from_any_one_on(corpus):
    assert isinstance(corpus, Documents)
    expected = list(enumerate(CORPUS))
    for start in range(6):
        assert read(corpus, start) == expected[start:]
    assert read(corpus) == expected
    assert read(corpus, epoch=3) == expected  # not shuffled
    assert all(document.ids.dtype.kind in "iu" for document in corpus.read())


def test_rows_of_arrays_and_tensors_are_documents(tmp_path):
    rows = torch.tensor([[4, 5], [6, 7], [8, 9]])
    expected = [(0, [4, 5]), (1, [6, 7]), (2, [8, 9])]
    np.save(tmp_path / "a.npy", rows.numpy().astype(np.uint16))
    parts = list(rows)
    for source in (rows, rows.numpy(), rows.tolist(), parts, tuple(parts), tmp_path / "a.npy"):
        assert read(open_documents(source)) == expected
    memory_mapped = open_documents(tmp_path / "a.npy")
    assert isinstance(memory_mapped.array, np.memmap)
    assert memory_mapped.description == f"{tmp_path / 'a.npy'}, [3, 2] uint16"


def test_a_flat_array_is_one_document_unless_it_is_split():
    flat = [4, 5, 3, 6, 3]
    assert read(open_documents(flat)) == [(0, flat)]
    assert read(open_documents(torch.tensor(flat))) == [(0, flat)]
    assert read(open_documents(flat, separator_token_id=3)) == [(0, [4, 5]), (1, [6]), (2, [])]
    assert read(open_documents(flat, separator_token_id=60)) == [(0, flat)]
    assert len(open_documents(flat, separator_token_id=3)) == 3


def test_a_separator_across_the_boundary_of_what_is_read_at_once(tmp_path, monkeypatch):
    from lorsa_lens.data import arrays, text

    (tmp_path / "a.txt").write_text("ab<|end|>cd<|end|><|end|>e")
    np.save(tmp_path / "a.npy", flat_with_separator())
    for chunk in range(1, 12):
        monkeypatch.setattr(text, "_CHUNK", chunk)
        monkeypatch.setattr(arrays, "_SCANNED", chunk)
        documents = open_documents(tmp_path / "a.txt", tokenizer=letters, separator="<|end|>")
        assert read(documents) == [(0, [10, 11]), (1, [12, 13]), (2, []), (3, [14])]
        documents = open_documents(tmp_path / "a.npy", separator_token_id=3)
        assert read(documents) == list(enumerate(CORPUS))


def test_text_keeps_its_line_ends_and_gets_no_special_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2\n\nw3\n")
    assert read(open_documents(tmp_path / "a.txt", tokenizer=zoo.tokenizer())) == [(0, [5, 6, 7])]
    texts = []
    documents = open_documents(tmp_path / "a.txt", tokenizer=lambda t: texts.append(t) or [4])
    assert read(documents) == [(0, [4])]
    assert texts == ["w1 w2\n\nw3\n"]


def test_blank_lines_of_jsonl_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": [4]}\n\n  \n{"tokens": [5]}')
    assert read(open_documents(path)) == [(0, [4]), (1, [5])]
    assert read(open_documents(path), 1) == [(1, [5])]


def test_special_tokens_of_a_tokenizer():
    assert special_token_ids(zoo.tokenizer()) == [zoo.BOS, zoo.EOS, zoo.PAD]  # <unk>, 3, is text


# ----------------------------------------------------------------------------------- shuffling


def test_a_shuffled_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    rows = torch.arange(600)[:, None]  # more than are taken at once
    plain = open_documents(rows)
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            documents = open_documents(rows, shuffle_seed=seed)
            got = read(documents, epoch=epoch)
            assert sorted(got) == read(plain)
            assert got == read(open_documents(plain, shuffle_seed=seed), epoch=epoch)
            for start in (1, 255, 256, 599, 600):
                assert read(documents, start, epoch) == got[start:]
            orders[seed, epoch] = tuple(number for number, _ in got)
    assert len(set(orders.values())) == 4


def test_a_source_with_one_order_is_not_shuffled(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"tokens": [4]}])
    with pytest.raises(ValueError, match=r"can be read in one order only: shuffle contexts inst"):
        open_documents(path, shuffle_seed=0)
    with pytest.raises(ValueError, match="seed = -1 must not be negative"):
        open_documents([[4]], shuffle_seed=-1)


# ------------------------------------------------------------------------------------ refusals


def test_options_that_mean_nothing_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4))
    (tmp_path / "a.txt").write_text("a")
    cases = [
        (tmp_path / "a.npy", {"column": "text"}, "column = 'text' means nothing for a .npy file"),
        (tmp_path / "a.npy", {"dtype": "uint16"}, "dtype = 'uint16' means nothing"),
        (tmp_path / "a.txt", {"column": "text"}, "for a .txt file, which understands separator, t"),
        ([[4]], {"tokenizer": letters}, "tokenizer = ... means nothing for what is in memory"),
        ([[4]], {"separator_token_id": 3}, "separator_token_id = 3 means nothing for a list of do"),
        (np.ones((2, 2), int), {"separator_token_id": 3}, "every row is a document"),
        (tmp_path / "a.txt", {}, r"a\.txt is text: give the tokenizer, as tokenizer=model"),
        (tmp_path / "a.txt", {"tokenizer": letters, "separator": ""}, "separator = '' is empty"),
    ]
    for source, options, message in cases:
        with pytest.raises(ValueError, match=message):
            open_documents(source, **options)
    with pytest.raises(TypeError, match=r"tokenizer is a int: give model\.tokenizer, or a fun"):
        open_documents(tmp_path / "a.txt", tokenizer=3)


def test_what_is_not_there_is_named(tmp_path):
    for name in ("a.txt", "a.npy"):
        with pytest.raises(ValueError, match=f"there is no file .*{name}"):
            open_documents(tmp_path / name)
    with pytest.raises(ValueError, match="there is no folder"):
        open_documents(tmp_path / "nothing")
    (tmp_path / "a.pt").write_bytes(b"")
    for source in (tmp_path / "a.pt", [tmp_path / "a.pt"]):
        with pytest.raises(ValueError, match=r"is of no known kind: give"):
            open_documents(source)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"of several kinds, \.pt, \.txt: give one kind"):
        open_documents([tmp_path / "a.txt", tmp_path / "a.pt"])
    with pytest.raises(TypeError, match="documents cannot be read from a int"):
        open_documents(3)


def test_arrays_of_anything_but_ids_are_refused(tmp_path):
    cases = [
        (torch.zeros(2, 3), r"a tensor holds float32: token ids are integers"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"a tensor has shape \[2, 3, 4\]: give ids"),
        ([[4, 5], [6.5]], "document 1 holds float64: token ids are integers"),
        ([[4, 5], [[6]]], r"document 1 has shape \[1, 1\]: a document is a flat list of ids"),
        ([[4, 5], [[6], [7, 8]]], "document 1 is no flat list of token ids"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            open_documents(source)
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"a\.bin has 3 bytes: no whole number of uint16 ids"):
        open_documents(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="dtype = 'token' is none that numpy knows"):
        open_documents(tmp_path / "a.bin", dtype="token")


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as an array of token ids"):
        open_documents(tmp_path / "a.npy")
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "b.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.npy cannot be read as an array of token ids"):
        open_documents(tmp_path / "b.npy")


def test_bad_lines_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    cases = [
        ('{"tokens": [4', r"a\.jsonl, line 2 is no JSON"),
        ("[4, 5]", r"a\.jsonl, line 2 is a list: give one object per line"),
        ('{"words": "a"}', r"line 2 has no 'tokens' or 'input_ids' or 'text', but 'words'"),
        ('{"text": "a"}', r"line 2, 'text' is text: give the tokenizer"),
        ('{"text": 3.5}', r"line 2, 'text' holds 3\.5: documents are text or lists of token ids"),
        ('{"tokens": ["a"]}', r"line 2, 'tokens' holds <U1: token ids are integers"),
    ]
    for line, message in cases:
        path.write_text('{"tokens": [4]}\n' + line)
        with pytest.raises(ValueError, match=message):
            read(open_documents(path))
    with pytest.raises(ValueError, match="line 1 has no 'story', but 'tokens'"):
        read(open_documents(path, column="story"))
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
        options = {"tokenizer": letters}
        with pytest.raises(ValueError, match="is no UTF-8 text"):
            read(open_documents(tmp_path / name, **options))


def test_datasets_are_asked_for_what_they_have(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"story": ["a"]})
    with pytest.raises(ValueError, match="has no 'tokens' or 'input_ids' or 'text', but 'story'"):
        open_documents(dataset)
    with pytest.raises(ValueError, match="document 0 is text: give the tokenizer"):
        read(open_documents(dataset, column="story"))
    with pytest.raises(ValueError, match=r"has the splits 'train', 'test': give one"):
        open_documents(datasets.DatasetDict({"train": dataset, "test": dataset}))
    with pytest.raises(ValueError, match="split = 'train' means nothing for a dataset object"):
        open_documents(dataset, split="train")
    with pytest.raises(ValueError, match=r"the dataset \./nowhere train cannot|no folder nowhere"):
        open_documents("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the dataset .*empty train cannot be loaded"):
        open_documents(str(tmp_path / "empty"))


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lorsa-lens\[datasets\]'"):
        open_documents("somebody/stories")
