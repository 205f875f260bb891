"""`odqa index` over a multistream dump: any number of processes, real kills, bad index files, and other languages."""

import bz2
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from odqa.artifacts import load_artifact
from odqa.retrieve.index import load_index
from odqa.text import has_answer
from odqa.types import Query
from tests.command_line import ok, refused
from tests.small_world import write_yaml
from tests.tiny_models import tiny_multilingual
from tests.unit.test_mediawiki import END, HEADER, page

ROOT = Path(__file__).parents[2]


def write_dump(folder: Path, streams: int = 30, words: int = 1500) -> Path:
    """A dump with its index: streams of two articles of random words, which hardly pack."""
    chance = random.Random(3)
    numbers = iter(range(1, 2 * streams + 1))
    texts = [
        "".join(page(n, f"T{n}", " ".join(f"{chance.getrandbits(40):x}." for _ in range(words))) for n in pair)
        for pair in zip(numbers, numbers, strict=True)
    ]
    path, lines, packed = folder / "wiki-multistream.xml.bz2", [], bz2.compress(HEADER.encode())
    for number, text in enumerate(texts):
        lines += [f"{len(packed)}:{2 * number + 1}:T{2 * number + 1}", f"{len(packed)}:{2 * number + 2}:T"]
        packed += bz2.compress(text.encode())
    path.write_bytes(packed + bz2.compress(END.encode()))
    (folder / "wiki-multistream-index.txt.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    return path


def recipe(folder: Path, dump: Path, **settings: object) -> Path:
    source = {"kind": "dump", "file": str(dump), **settings}
    return write_yaml(folder / "wiki.yaml", {"kind": "index", "passages": source, "bm25": {}})


def hashes(index: Path) -> dict[str, object]:
    files = load_artifact(index, verify=True).manifest["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def test_processes_and_index_change_neither_recipe_hash_nor_bytes(tmp_path: Path) -> None:
    dump = write_dump(tmp_path)
    manifests = []
    for number, settings in enumerate([{"processes": 1, "index": "none"}, {}, {"processes": 2}]):
        out = tmp_path / f"index-{number}"
        told = ok("index", recipe(tmp_path, dump, **settings), "--out", out)
        assert "60 articles" in told.err
        manifest = dict(load_artifact(out, verify=True).manifest)
        manifests.append({key: value for key, value in manifest.items() if key != "measured"})
    assert manifests[0] == manifests[1] == manifests[2]
    by_option = ok("index", recipe(tmp_path, dump), "--processes", "1", "--out", tmp_path / "index-0", "--json")
    assert by_option.json["passages"] == manifests[0]["counts"]["passages"] == 900
    assert "built already" in by_option.err


def test_a_build_by_two_processes_that_is_killed_goes_on_and_leaves_the_same_bytes(tmp_path: Path) -> None:
    dump = write_dump(tmp_path)
    source = recipe(tmp_path, dump)
    ok("index", source, "--out", tmp_path / "whole", "--processes", "1")
    code = (
        "import functools, odqa.corpus.streams as s, odqa.retrieve.index as i; from odqa.cli import main;"
        "s.PART_BYTES = 10_000; i.build_index = functools.partial(i.build_index, part_rows=200); main()"
    )
    command = [sys.executable, "-c", code, "index", str(source), "--processes", "2", "--out", str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    marks = tmp_path / ".killed.partial/passages.marks"
    # Killed when two parts of the store are done; the workers end with it.
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (marks / "part-00001.arrow.json").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    if process.returncode == -signal.SIGKILL:
        mark = json.loads((marks / "part-00001.arrow.json").read_text())["mark"]
        assert mark["passages"] >= 200  # it goes on behind the first part
    subprocess.run(command, env=environment, check=True, capture_output=True)
    texts = [[p.text for p in load_index(tmp_path / name).store] for name in ("whole", "killed")]
    assert texts[0] == texts[1]
    # The store has other parts here; the postings over it are the same.
    first, second = (
        {k: v for k, v in hashes(tmp_path / name).items() if k.startswith("bm25")} for name in ("whole", "killed")
    )
    assert first == second
    assert not list((tmp_path / "killed").glob("passages.marks"))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("999999999:1:T1", "a stream begins at byte 999999999, but"),
        ("600:1:T1", "no bz2 stream begins at byte 600 of"),
        ("a page", "expected BYTE:PAGE ID:TITLE, found 'a page'"),
    ],
)
def test_an_index_file_of_another_dump(tmp_path: Path, lines: str, told: str) -> None:
    dump = write_dump(tmp_path, streams=2, words=50)
    (tmp_path / "wiki-multistream-index.txt.bz2").write_bytes(bz2.compress(lines.encode()))
    source = recipe(tmp_path, dump)
    line = refused("index", source, "--out", tmp_path / "index")
    assert told in line
    assert not (tmp_path / "index").exists()
    ok("index", source, "--set", "passages.index=none", "--out", tmp_path / "index")
    assert "no such file" in refused(
        "index", source, "--set", "passages.index=nowhere.txt", "--set", "bm25.k1=1", "--out", tmp_path / "other"
    )


def test_a_dump_that_ends_in_a_stream_keeps_what_is_sound_and_says_so(tmp_path: Path) -> None:
    dump = write_dump(tmp_path, streams=6)
    whole = dump.read_bytes()
    dump.write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "wiki-multistream-index.txt.bz2").unlink()
    told = ok("index", recipe(tmp_path, dump), "--out", tmp_path / "index").err
    assert "warning: The bz2 data ends at byte" in told
    assert "6 articles" in told
    assert "in the middle of a stream" in refused(
        "index", recipe(tmp_path, dump), "--strict", "--out", tmp_path / "strict"
    )


def test_windows_titles_and_infoboxes_are_settings(tmp_path: Path) -> None:
    text = "{{Infobox x|founded=1201}}\nOne. Two. Three.\n== History ==\nFour. Five. Six. Seven."
    dump = tmp_path / "d.xml"
    dump.write_text(HEADER + page(1, "T", text) + END, encoding="utf-8")
    settings = {"window": {"sentences": 6, "stride": 3}, "headings": True, "infoboxes": True}
    ok("index", recipe(tmp_path, dump, **settings), "--out", tmp_path / "index")
    assert [passage.text for passage in load_index(tmp_path / "index").store] == [
        "Founded: 1201. One. Two. Three. History. Four.",
        "Three. History. Four. Five. Six. Seven.",
    ]
    wrong = recipe(tmp_path, dump, window={"sentences": 3, "stride": 4})
    assert "stride 4 leaves out sentences" in refused("check", wrong)
    assert "cut by words or by window" in refused("check", recipe(tmp_path, dump, words=50, window={}))


# ---------------------------------------------------------------- other languages

CITIES = {
    "東京": "東京都は日本の首都である。人口は約1400万人で、世界最大の都市圏を形成している。",
    "北京": "北京市是中华人民共和国的首都。故宫位于北京市中心，明清两代的皇帝住在这里。",
    "กรุงเทพ": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย ตั้งอยู่บนสามเหลี่ยมปากแม่น้ำเจ้าพระยา",
    "Reiga": "Reiga ir Latvejis golvyspiļsāta.",
}


def test_the_multilingual_recipe_indexes_and_finds_any_script(tmp_path: Path) -> None:
    dump = tmp_path / "d.xml"
    pages = "".join(page(number, title, text) for number, (title, text) in enumerate(CITIES.items(), 1))
    dump.write_text(HEADER + pages + END, encoding="utf-8")
    model = tiny_multilingual(tmp_path / "model")
    source = ROOT / "indexes/wiki-multilingual.yaml"
    ok("index", source, "--dump", dump, "--set", f"dense.question_model={model}", "--out", tmp_path / "index")
    index = load_index(tmp_path / "index")
    asked = yaml.safe_load(source.read_text(encoding="utf-8"))["dense"]
    settings = json.loads((tmp_path / "index/dense/encoder.json").read_text())["settings"]
    assert {key: settings[key] for key in ("query_prefix", "passage_prefix", "pooling", "normalize", "titles")} == {
        key: asked[key] for key in ("query_prefix", "passage_prefix", "pooling", "normalize", "titles")
    }
    for question, answer in [("日本の首都はどこ", "東京"), ("故宫在哪里", "北京"), ("เมืองหลวงของไทย", "กรุงเทพ")]:
        (row,) = index.bm25.search([question], 1).rows[0]
        found = index.store[int(row)]
        assert has_answer(found.text, [answer], "characters")
        assert not has_answer(found.text, [answer])
    assert index.dense.search([Query("1", "日本の首都").text], 4).rows.shape == (1, 4)
