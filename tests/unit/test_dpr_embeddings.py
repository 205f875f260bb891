"""DPR's embedding files: read in every protocol, written as DPR reads them, and no way to run anything else."""

import os
import pickle
import random
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odqa.errors import DataError
from odqa.retrieve import dpr_embeddings as module
from odqa.retrieve.dpr_embeddings import iterate_embeddings, read_embeddings, read_ids, save_embeddings

VECTORS = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
PAIRS = [(f"wiki:{number}", vector) for number, vector in enumerate(VECTORS)]


def dump(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8", ">f4"])
def test_reads_every_protocol_and_float_format(tmp_path: Path, protocol: int, dtype: str) -> None:
    file = dump(tmp_path / "e", [(number, vector.astype(dtype)) for number, vector in PAIRS], protocol)
    found = read_embeddings(file)
    assert found.ids == tuple(number for number, _ in PAIRS)
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (5, 8)
    assert np.array_equal(found.vectors, VECTORS.astype(dtype).astype(np.float32))


def test_reads_the_names_that_numpy_1_pickles_with(tmp_path: Path) -> None:
    new = pickle.dumps(PAIRS, protocol=2)
    old = new.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert old != new or b"numpy.core" in new
    (tmp_path / "e").write_bytes(old)
    assert np.array_equal(read_embeddings(tmp_path / "e").vectors, VECTORS)


def test_reads_rows_views_numbers_as_ids_and_what_stands_behind(tmp_path: Path) -> None:
    wide = VECTORS.T.copy().T  # columns in memory
    pairs: list[Any] = [[3, VECTORS[:1]], ("a", wide[1]), ("b", VECTORS[2], "title", True)]
    found = read_embeddings(dump(tmp_path / "e", pairs))
    assert found.ids == ("3", "a", "b") and np.array_equal(found.vectors, VECTORS[:3])


def test_what_is_written_is_what_pickle_and_we_read(tmp_path: Path) -> None:
    assert save_embeddings(tmp_path / "e", iter(PAIRS)) == 5
    with (tmp_path / "e").open("rb") as file:
        theirs = pickle.load(file)  # as DPR does: iterate_encoded_files
    assert [(passage_id, vector.tolist()) for passage_id, vector in theirs] == [
        (passage_id, vector.tolist()) for passage_id, vector in PAIRS
    ]
    assert np.array_equal(read_embeddings(tmp_path / "e").vectors, VECTORS)


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Evil(os.system, "touch pwned"), "posix.system"),
        (Evil(eval, "1"), "eval"),
        (Evil(getattr, "x", "upper"), "getattr"),
        (Evil(np.load, "x"), "load"),
        ([("1", np.float32(1.0))], "scalar"),
        ([("1", Path("x"))], "Path"),
        ([("1", {1, 2}.__class__)], "set"),
    ],
)
def test_another_global_is_refused_by_name(tmp_path: Path, value: object, named: str, protocol: int) -> None:
    file = dump(tmp_path / "e", value, protocol)
    with pytest.raises(DataError, match=r"e: the pickle asks for .*; numpy arrays alone are read") as error:
        read_embeddings(file)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not Path("pwned").exists()


def test_a_pickle_cannot_change_the_stand_ins(tmp_path: Path) -> None:
    """BUILD sets attributes on what a global gave; the next file must not notice."""
    for name in (b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n"):
        for state in (b"}X\x04\x00\x00\x00codeX\x01\x00\x00\x00xs", b"N}X\x04\x00\x00\x00codeX\x01\x00\x00\x00xs\x86"):
            (tmp_path / "e").write_bytes(b"\x80\x02" + name + state + b"b.")
            with pytest.raises(DataError):
                read_embeddings(tmp_path / "e")
    assert np.array_equal(read_embeddings(dump(tmp_path / "good", PAIRS)).vectors, VECTORS)
    assert module._Dtype("f4").order == "<"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected a list of .id, vector. pairs, found an empty list"),
        ({"a": 1}, "expected a list of .id, vector. pairs, found a dict"),
        ([("a", [1.0])], "record 1: expected an id and a numpy array"),
        ([("a",)], "record 1: expected an id and a numpy array"),
        ([(1.5, VECTORS[0])], "record 1: expected a string or a whole number for an id, found 1.5"),
        ([("a", VECTORS[0]), ("b", VECTORS[0][:7])], "record 2: a vector of width 7, the first has 8"),
        ([("a", VECTORS)], "an array of the shape .5, 8. in 160 bytes; expected one vector"),
        ([("a", np.array([1, 2]))], "an array of 'i8'; expected floating-point numbers"),
        ([("a", np.array(["x"], object))], "lacks its numbers|asks for"),
        ([("a", np.array([1.0, np.nan]))], "record 1: the vector of 'a' holds NaN or infinity"),
        ([("a", np.empty(0))], "lacks its numbers|not one vector"),
        ([("a", np.zeros((1, 1, 3)))], "not one vector"),
        ([(1 << 100_000, VECTORS[0])], "record 1: expected a string or a whole number for an id, found a int"),
    ],
)
def test_pairs_that_are_none_are_one_line(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_embeddings(dump(tmp_path / "e", value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"{}", b"\x80\x04", b"\x80\x04."])
def test_a_file_that_is_no_pickle_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "e").write_bytes(content)
    with pytest.raises(DataError, match="no pickle, or a damaged one"):
        read_embeddings(tmp_path / "e")
    with pytest.raises(DataError, match="no such file"):
        read_embeddings(tmp_path / "nothing")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_no_damage_gives_anything_but_vectors_or_one_line(tmp_path: Path, protocol: int) -> None:
    """2,000 files with a few bytes changed, cut or doubled: no other error, no memory bomb, no change that lasts."""
    whole, drawn = pickle.dumps(PAIRS[:2], protocol=protocol), random.Random(protocol)
    file = tmp_path / "e"
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(drawn.randint(1, 4)):
            place = drawn.randrange(len(damaged))
            damaged[place : place + drawn.choice((0, 1, 1, 1, 5))] = bytes([drawn.randrange(256)])
        file.write_bytes(damaged[: drawn.choice((len(damaged), drawn.randrange(len(damaged)) + 1))])
        try:
            read_embeddings(file)
        except DataError as error:
            assert "\n" not in str(error)
    file.write_bytes(whole)
    assert np.array_equal(read_embeddings(file).vectors, VECTORS[:2])


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """The unpickler in C makes room for 2 ** 31 entries of its memo when one is given that place: 16 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nested = b"\x80\x02)" + b"2\x86" * 200 + b"."  # a tuple of itself twice, 200 times: no room for it as text
    big_memo = b"\x80\x02]r\xff\xff\xff\x7f."
    big_array = b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"x."
    for content in (nested, big_memo, big_array, b"\x80\x02]" + nested[2:-1] + b"N\x86a."):
        (tmp_path / "e").write_bytes(content)
        with pytest.raises(DataError) as error:
            read_embeddings(tmp_path / "e")
        assert len(str(error.value)) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_a_length_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"\x80\x04" + b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.")  # BINBYTES8 of a terabyte
    with pytest.raises(DataError, match="a damaged one"):
        read_embeddings(tmp_path / "e")


def test_files_are_read_one_after_the_other_and_agree_in_width(tmp_path: Path) -> None:
    first, second = dump(tmp_path / "0", PAIRS[:2]), dump(tmp_path / "1", PAIRS[2:])
    assert [found.ids for found in iterate_embeddings([first, second])] == [
        ("wiki:0", "wiki:1"),
        ("wiki:2", "wiki:3", "wiki:4"),
    ]
    narrow = dump(tmp_path / "2", [("x", VECTORS[0][:4])])
    with pytest.raises(DataError, match="2: vectors of width 4, the files before have 8"):
        list(iterate_embeddings([first, narrow]))


def test_ids_come_a_line_or_as_dprs_pickled_list(tmp_path: Path) -> None:
    (tmp_path / "docid").write_text("a\nb c\n")
    assert read_ids(tmp_path / "docid") == ["a", "b c"]
    assert read_ids(dump(tmp_path / "index_meta.dpr", ["wiki:1", 2])) == ["wiki:1", "2"]
    with pytest.raises(DataError, match="expected a pickled list of ids"):
        read_ids(dump(tmp_path / "index_meta.dpr", [1.5]))
    with pytest.raises(DataError, match=r"posix\.system"):
        read_ids(dump(tmp_path / "index_meta.dpr", Evil(os.system, "touch pwned")))
