"""Streams of records survive kills, damage and second writers."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whyrank.errors import InputError
from whyrank.records import Qrel, Query, ScoredDocument
from whyrank.store import (
    BadLines,
    JsonlAppender,
    Manifest,
    atomic_path,
    content_key,
    read_json,
    read_jsonl,
    read_lines,
    read_numbered_jsonl,
    sha256_file,
    to_json,
    write_jsonl,
)

QRELS = [Qrel("q1", "d1", 2), Qrel("q1", "ď2", 0), Qrel("q2", "d 3", 1)]
LINES = [
    '{"query_id":"q1","doc_id":"d1","relevance":2}',
    '{"query_id":"q1","doc_id":"ď2","relevance":0}',
    '{"query_id":"q2","doc_id":"d 3","relevance":1}',
]
PLAIN = ("\n".join(LINES) + "\n").encode()

# ---- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        b"\n \n" + PLAIN.replace(b"\n", b"\n\n\t\n"),
        PLAIN.removesuffix(b"\n"),
        gzip.compress(PLAIN),
        gzip.compress(b"\xef\xbb\xbf" + PLAIN[:50]) + gzip.compress(PLAIN[50:]),
    ],
    ids=["plain", "bom", "crlf", "blank lines", "no last newline", "gzip", "gzip of two members"],
)
def test_every_disguise_reads_the_same(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "qrels"  # the name says nothing: gzip is recognised by its bytes
    path.write_bytes(content)
    assert list(read_jsonl(path, Qrel)) == QRELS


def test_written_records_are_read_back(tmp_path: Path) -> None:
    for name in ("qrels.jsonl", "qrels.jsonl.gz"):
        assert write_jsonl(tmp_path / "new" / name, iter(QRELS)) == 3
        assert list(read_jsonl(tmp_path / "new" / name, Qrel)) == QRELS
    assert (tmp_path / "new" / "qrels.jsonl").read_bytes() == PLAIN
    assert (tmp_path / "new" / "qrels.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "qrels.jsonl"
    path.write_text(f"\n{LINES[0]}\n\n{LINES[1]}\n")
    assert list(read_numbered_jsonl(path, Qrel)) == [(2, QRELS[0]), (4, QRELS[1])]


BAD = {
    "not JSON": b"{oops",
    "another type": b'{"query_id":"q","doc_id":"d","relevance":"2"}',
    "a fraction": b'{"query_id":"q","doc_id":"d","relevance":1.5}',
    "unknown key": b'{"query_id":"q","doc_id":"d","relevance":2,"note":""}',
    "missing key": b'{"query_id":"q","relevance":2}',
    "a list": b'["q","d",2]',
    "not UTF-8": b'{"query_id":"q\xff","doc_id":"d","relevance":2}',
    "lone surrogate": b'{"query_id":"\\ud800","doc_id":"d","relevance":2}',
}


@pytest.mark.parametrize("name", BAD)
def test_bad_line_names_file_and_line_or_is_counted(tmp_path: Path, name: str) -> None:
    path = tmp_path / "qrels.jsonl"
    path.write_bytes(PLAIN + BAD[name] + b"\n" + PLAIN)
    with pytest.raises(InputError, match=rf"{path}:4: expected .*--skip-bad") as caught:
        list(read_jsonl(path, Qrel))
    assert caught.value.__cause__ is not None
    bad = BadLines()
    assert list(read_jsonl(path, Qrel, bad=bad)) == QRELS * 2
    assert bad.count == 1
    assert bad.examples[0].startswith(f"{path}:4: expected")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1E+999"])
def test_numbers_that_are_not_finite_are_refused_when_read(tmp_path: Path, number: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f'{{"query_id":"NaN","doc_id":"Infinity","rank":1,"score":{number}}}\n')
    with pytest.raises(InputError, match=r"run\.jsonl:1: .*not finite"):
        list(read_jsonl(path, ScoredDocument))
    path.write_text('{"query_id":"NaN","doc_id":"Infinity","rank":1,"score":1e100}\n')
    assert list(read_jsonl(path, ScoredDocument)) == [ScoredDocument("NaN", "Infinity", 1, 1e100)]


def test_bad_lines_keep_few_examples(tmp_path: Path) -> None:
    path = tmp_path / "qrels.jsonl"
    path.write_text("?\n" * 1000)
    bad = BadLines()
    assert list(read_jsonl(path, Qrel, bad=bad)) == []
    assert (bad.count, len(bad.examples)) == (1000, 5)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a file at .*absent, found nothing"):
        list(read_lines(tmp_path / "absent"))
    with pytest.raises(InputError, match="found a directory"):
        list(read_lines(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "flipped", "trailing"])
def test_damaged_gzip_is_an_input_error(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(random.Random(0).randbytes(4000).hex().encode())
    content = {
        "cut": whole[:-20],
        "flipped": whole[:500] + bytes([whole[500] ^ 0xFF] * 40) + whole[540:],
        "trailing": whole + b"garbage",
    }[damage]
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    for read in (lambda: list(read_lines(path)), lambda: read_json(path)):
        with pytest.raises(InputError, match=r"x\.gz"):
            read()


def test_json_error_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a":\n 1,}')
    with pytest.raises(InputError, match=r"x\.json: expected one JSON value, found: .*line 2 column"):
        read_json(path)


# ---- writing ------------------------------------------------------------------------------------------------


def test_what_json_cannot_hold_is_refused_when_written(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json(ScoredDocument("q", "d", 1, value))
    with pytest.raises(ValueError, match="surrogates not allowed"):
        to_json(Query("q", "\ud800"))
    path = tmp_path / "run.jsonl"
    with JsonlAppender(path, ScoredDocument) as appender:
        appender.append(ScoredDocument("q", "d", 1, 0.5))
        with pytest.raises(ValueError, match="not JSON compliant"):
            appender.append(ScoredDocument("q", "e", 2, float("nan")))
    assert path.read_text() == '{"query_id":"q","doc_id":"d","rank":1,"score":0.5}\n'


def test_an_odd_character_in_an_answer_does_not_end_a_job(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    with JsonlAppender(path, Query) as appender:
        for text in ("a \ud800 b", "\udfff", "\U0001f600"):
            appender.append(Query("q", text))
        assert [query.text for query in appender.existing()] == ["a \ufffd b", "\ufffd", "\U0001f600"]


@given(text=st.text(st.characters(codec="utf-8")))
def test_a_record_is_one_line_whatever_it_holds(text: str) -> None:
    line = to_json(Query("q", text))
    assert b"\n" not in line.encode()
    assert json.loads(line)["text"] == text


def test_failed_artefact_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "qrels.jsonl"
    write_jsonl(path, QRELS)

    def broken() -> Iterator[Qrel]:
        yield QRELS[0]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_jsonl(path, broken())
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text(f"half {1 // 0}")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass  # nothing was written: the old file is not replaced by nothing
    assert path.read_bytes() == PLAIN
    assert os.listdir(tmp_path) == ["qrels.jsonl"]


# ---- appending ----------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_reopening_keeps_exactly_the_whole_lines(tmp_path: Path, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(PLAIN)))
    path = tmp_path / "qrels.jsonl"
    path.write_bytes(PLAIN[:cut])
    num_whole = PLAIN[:cut].count(b"\n")
    whole = sum(len(line.encode()) + 1 for line in LINES[:num_whole])
    with JsonlAppender(path, Qrel) as appender:
        assert appender.num_torn_bytes == cut - whole
        assert list(appender.existing()) == QRELS[:num_whole]
        for qrel in QRELS[num_whole:]:
            appender.append(qrel)
    assert path.read_bytes() == PLAIN


def test_long_torn_tail_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "qrels.jsonl"
    path.write_bytes(PLAIN + b"x" * 200_000)  # longer than the block that is searched at once
    with JsonlAppender(path, Qrel) as appender:
        assert appender.num_torn_bytes == 200_000
    assert path.read_bytes() == PLAIN


def test_damage_before_the_tail_is_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "qrels.jsonl"
    path.write_bytes(b"{oops\n" + PLAIN)
    with JsonlAppender(path, Qrel) as appender, pytest.raises(InputError, match=r"qrels\.jsonl:1") as caught:
        list(appender.existing())
    # Nothing skips lines here; a record that is missing is made again.
    assert str(caught.value).endswith("Remove the line: the same command then makes its Qrel again.")


def test_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "qrels.jsonl"
    with JsonlAppender(path, Qrel) as first:
        first.append(QRELS[0])
        with pytest.raises(InputError, match="being written by another process"):
            JsonlAppender(path, Qrel)
        other = subprocess.run(
            [sys.executable, "-c", OTHER_WRITER, str(path)], capture_output=True, text=True, check=False, timeout=60
        )
        assert "being written by another process" in other.stderr
    with JsonlAppender(path, Qrel) as second:
        assert list(second.existing()) == QRELS[:1]


OTHER_WRITER = """
import sys
from whyrank.records import Qrel
from whyrank.store import JsonlAppender
JsonlAppender(sys.argv[1], Qrel)
"""


def test_rewrite_keeps_the_lock_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "qrels.jsonl"
    with JsonlAppender(path, Qrel) as appender:
        for qrel in QRELS:
            appender.append(qrel)
        appender.rewrite(qrel for qrel in appender.existing() if qrel.relevance)
        with pytest.raises(InputError, match="being written"):
            JsonlAppender(path, Qrel)
        appender.append(QRELS[1])
        assert list(appender.existing()) == [QRELS[0], QRELS[2], QRELS[1]]
        with pytest.raises(ZeroDivisionError):
            appender.rewrite(Qrel("q", "d", 1 // 0) for _ in range(1))
        appender.append(QRELS[1])
    assert list(read_jsonl(path, Qrel)) == [QRELS[0], QRELS[2], QRELS[1], QRELS[1]]
    assert os.listdir(tmp_path) == ["qrels.jsonl"]


def test_write_that_does_not_fit_leaves_whole_lines(tmp_path: Path) -> None:
    # The limit of the file size stands for a full disk: the kernel writes a part and then refuses.
    path = tmp_path / "queries.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    small, large = Query("q1", "short"), Query("q2", "x" * 5000)
    with JsonlAppender(path, Query) as appender:
        appender.append(small)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            with pytest.raises(OSError, match="too large"):
                appender.append(large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, old_action)
        assert list(appender.existing()) == [small]
        appender.append(large)
    assert list(read_jsonl(path, Query)) == [small, large]


APPENDING = """
import os, sys
from whyrank.records import Query
from whyrank.store import JsonlAppender
path, total, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with JsonlAppender(path, Query) as appender:
    done = {query.query_id for query in appender.existing()}
    os.write(1, b"ready %d\\n" % appender.num_torn_bytes)
    for number in range(total):
        if str(number) not in done:
            appender.append(Query(str(number), "x" * size))
            os.write(1, b"%d\\n" % number)
"""


def test_random_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    path, total, size = tmp_path / "queries.jsonl", 60, 1_000_000
    command = [sys.executable, "-c", APPENDING, str(path), str(total), str(size)]
    draw = random.Random(7)
    acknowledged: set[str] = set()
    num_killed_at_work = 0
    for is_last in [False] * 10 + [True]:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline().startswith(b"ready")
            if not is_last:
                time.sleep(draw.uniform(0.0, 0.02))
                child.kill()
            acknowledged |= {line.strip().decode() for line in child.stdout if line.endswith(b"\n")}
        with path.open("rb") as stream:
            written = {json.loads(line)["query_id"] for line in stream if line.endswith(b"\n")}
        assert acknowledged <= written
        num_killed_at_work += child.returncode == -signal.SIGKILL and len(written) < total
    assert child.returncode == 0
    assert num_killed_at_work >= 3  # otherwise this has tested nothing
    found = [query.query_id for query in read_jsonl(path, Query)]
    assert sorted(found, key=int) == [str(number) for number in range(total)]


# ---- identity and manifests ---------------------------------------------------------------------------------


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_content_key_separates_parts(one: list[str], two: list[str]) -> None:
    assert (content_key(*one) == content_key(*two)) == (one == two)


def test_content_key_is_stable() -> None:
    # echo -n '' has SHA-256 e3b0c44298fc1c149afbf4c8996fb924...: no part, no bytes
    assert content_key() == "e3b0c44298fc1c149afbf4c8996fb924"
    assert content_key("ab", "c") != content_key("a", "bc")
    assert content_key("") != content_key()
    assert len(content_key("\ud800")) == 32


def test_manifest_names_inputs_counts_and_time(tmp_path: Path) -> None:
    path = tmp_path / "qrels.jsonl"
    write_jsonl(path, QRELS)
    start = time.perf_counter()
    manifest = Manifest(stage="label", config={"cap": 3}, seed=7).with_inputs(path, None, "-")
    assert not manifest.is_finished
    manifest.finished(start, counts={"read": 3}, rate=0.5).write(tmp_path)
    found = read_json(tmp_path / "manifest.json")
    assert found["inputs"] == {str(path): sha256_file(path)}
    assert (found["stage"], found["config"], found["seed"]) == ("label", {"cap": 3}, 7)
    assert (found["counts"], found["figures"]) == ({"read": 3}, {"rate": 0.5})
    assert found["is_finished"] is True
    assert 0 <= found["seconds"] < 60
