"""Streams of records on disk: read with line numbers, append without loss, publish atomically.

A growing artefact is JSON lines, one record per line, appended and flushed; after a kill the torn last line is
cut away before the next append, so that no record is lost, doubled or glued to another. A finished artefact is
written beside its place and renamed into it. A `manifest.json` tells how a directory came to be.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import platform
import re
import shlex
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, Self, TextIO, TypeVar, cast

from pydantic import JsonValue, TypeAdapter, ValidationError

from whyrank.errors import InputError
from whyrank.records import to_plain

__all__ = [
    "BadLines",
    "JsonlAppender",
    "Manifest",
    "atomic_path",
    "content_key",
    "open_binary",
    "read_json",
    "read_jsonl",
    "read_lines",
    "read_numbered_jsonl",
    "sha256_file",
    "to_json",
    "write_jsonl",
]

R = TypeVar("R")
GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
DAMAGED_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot hold it
MAYBE_NOT_FINITE = re.compile(r"NaN|Infinity|[eE]\+?\d{3}")  # a quick look before the exact one
BYTES_PER_LINE = 1 << 13  # read at once when one record is looked up; most fit
MEND_OR_SKIP = "Mend the line, or pass --skip-bad to count and skip such lines"


@dataclass(slots=True)
class BadLines:
    """Counts the malformed lines that `--skip-bad` passed over, and keeps the first few messages."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    max_examples: int = 5

    def add(self, message: str) -> None:
        """Count one line."""
        self.count += 1
        if len(self.examples) < self.max_examples:
            self.examples.append(message)


@contextmanager
def open_binary(path: Path | str) -> Iterator[BinaryIO]:
    """Open for reading; gzip is recognised by its first two bytes, `-` is standard input.

    Raises:
        InputError: the file does not exist or is a directory.
    """
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    _require_file(path)
    with Path(path).open("rb") as raw:
        magic = raw.read(2)
        raw.seek(0)
        if magic == GZIP_MAGIC:
            with gzip.open(raw, "rb") as unzipped:
                yield cast(BinaryIO, unzipped)
        else:
            yield raw


def _require_file(path: Path | str) -> None:
    if not Path(path).is_file():
        raise InputError(f"expected a file at {path}, found {'a directory' if Path(path).is_dir() else 'nothing'}")


def _name_of(path: Path | str) -> str:
    return "standard input" if str(path) == "-" else str(path)


def read_lines(
    path: Path | str, *, bad: BadLines | None = None, advice: str = MEND_OR_SKIP
) -> Iterator[tuple[int, str]]:
    """Yield `(line number, text)` of every line that is not blank; a UTF-8 BOM and CRLF are accepted.

    `advice` ends the message about a bad line; it must not name `--skip-bad` where no `bad` can be given.

    Raises:
        InputError: a line is not UTF-8 (counted instead where `bad` is given), or the gzip stream is damaged.
    """
    try:
        with open_binary(path) as stream:
            for number, raw in enumerate(stream, start=1):
                if number == 1:
                    raw = raw.removeprefix(UTF8_BOM)
                try:
                    line = raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as cause:
                    message = f"{_name_of(path)}:{number}: expected UTF-8 text, found {cause.reason}"
                    _complain(message, cause, bad, advice)
                    continue
                if line.strip():
                    yield number, line
    except DAMAGED_GZIP as cause:
        raise InputError(f"{_name_of(path)}: expected a complete gzip file, found: {cause}") from cause


def read_json(path: Path | str) -> Any:
    """The whole file as one JSON value.

    Raises:
        InputError: the file is not UTF-8 JSON; the message names line and column.
    """
    try:
        with open_binary(path) as stream:
            return json.loads(stream.read().removeprefix(UTF8_BOM))
    except (json.JSONDecodeError, UnicodeDecodeError, *DAMAGED_GZIP) as cause:
        raise InputError(f"{_name_of(path)}: expected one JSON value, found: {cause}") from cause


def read_jsonl(
    path: Path | str, record: type[R], *, bad: BadLines | None = None, advice: str = MEND_OR_SKIP
) -> Iterator[R]:
    """Yield the records of a JSON-lines file; `advice` as for `read_lines`.

    Raises:
        InputError: a line is not such a record, or holds a number that is not finite. With `bad`, the line is
            counted there and passed over.
    """
    return (found for _, found in read_numbered_jsonl(path, record, bad=bad, advice=advice))


def read_numbered_jsonl(
    path: Path | str, record: type[R], *, bad: BadLines | None = None, advice: str = MEND_OR_SKIP
) -> Iterator[tuple[int, R]]:
    """Like `read_jsonl`, each record with its line number, for checks that look at several lines."""
    adapter = TypeAdapter(record)
    for number, line in read_lines(path, bad=bad, advice=advice):
        try:
            found = adapter.validate_json(line, strict=True)
            if MAYBE_NOT_FINITE.search(line):
                json.dumps(json.loads(line), allow_nan=False)
        except ValueError as cause:
            message = f"expected a {record.__name__} as JSON, found a line with {_what_is_wrong(cause)}"
            _complain(f"{_name_of(path)}:{number}: {message}", cause, bad, advice)
        else:
            yield number, found


def _what_is_wrong(cause: ValueError) -> str:
    if not isinstance(cause, ValidationError):
        return "a number that is not finite"
    problem = cause.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def _complain(message: str, cause: Exception, bad: BadLines | None, advice: str) -> None:
    if bad is None:
        raise InputError(f"{message}. {advice}.") from cause
    bad.add(message)


def to_json(record: Any) -> str:
    """One record as one line of JSON, without the newline.

    Raises:
        ValueError: a number is NaN or infinite, or a text holds a lone surrogate.
    """
    (line := _json_line(record)).encode()  # refuses a lone surrogate now, not when half of an artefact is written
    return line


def _json_line(record: Any) -> str:
    return json.dumps(to_plain(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path in the same folder; when the block ends well, it becomes `path`, synced to disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_jsonl(path: Path | str, records: Iterable[Any]) -> int:
    """Write a finished artefact atomically; gzip if the name ends in `.gz`. Returns the number of records."""
    with atomic_path(path) as temporary:
        opener = gzip.open if str(path).endswith(".gz") else open
        with cast(TextIO, opener(temporary, "wt", encoding="utf-8", newline="\n")) as stream:
            return _write_records(stream, records)


def _write_records(stream: TextIO, records: Iterable[Any]) -> int:
    num_written = 0
    for record in records:
        stream.write(to_json(record) + "\n")
        num_written += 1
    return num_written


class JsonlAppender(Generic[R]):
    """Appends records to a growing file that survives `kill -9`.

    Opening cuts a torn last line away (`num_torn_bytes` says how much), so the file always consists of whole
    lines. Each record is with the operating system before `append` returns. A second writer of the same file is
    refused.

    Raises:
        InputError: somebody else is writing the file.
    """

    def __init__(self, path: Path | str, record: type[R]) -> None:
        self.path = Path(path)
        self.num_torn_bytes = 0
        self._record = record
        self._adapter = TypeAdapter(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: after a failed write nothing may linger in memory and reach the file later.
        self._stream = self.path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_same_file = os.path.samestat(os.fstat(self._stream.fileno()), self.path.stat())
        except (BlockingIOError, FileNotFoundError) as cause:
            self._stream.close()
            raise self._already_written() from cause
        if not is_same_file:  # replaced by a rewrite between opening and locking
            self._stream.close()
            raise self._already_written()
        self._cut_torn_tail()

    def _already_written(self) -> InputError:
        return InputError(f"{self.path} is being written by another process; wait for it or stop it")

    def _cut_torn_tail(self) -> None:
        size = self._stream.seek(0, os.SEEK_END)
        end, block = size, 1 << 16
        while end > 0:
            start = max(0, end - block)
            self._stream.seek(start)
            newline = self._stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        self.num_torn_bytes = size - end
        if self.num_torn_bytes:
            self._stream.truncate(end)
            os.fsync(self._stream.fileno())
        self._stream.seek(0, os.SEEK_END)

    def existing(self) -> Iterator[R]:
        """The records that are already in the file.

        Raises:
            InputError: a line is damaged; whoever appends makes missing records again.
        """
        return (record for _, record in self.existing_places())

    def existing_places(self) -> Iterator[tuple[int, R]]:
        """The same records, each with its place for `record_at`; read as a stream.

        Raises:
            InputError: as `existing`.
        """
        again = f"Remove the line: the same command then makes its {self._record.__name__} again"
        numbered = read_numbered_jsonl(self.path, self._record, advice=again)
        with self.path.open("rb") as lines:
            place, num_passed = 0, 0
            for number, record in numbered:
                for line in islice(lines, number - 1 - num_passed):
                    place += len(line)
                yield place, record
                place, num_passed = place + len(next(lines)), number

    def record_at(self, place: int) -> R:
        """The record whose line begins at byte `place`, as told by `existing_places` or `append` since the last
        `rewrite`."""
        line = b""
        while b"\n" not in line:
            line += os.pread(self._stream.fileno(), BYTES_PER_LINE, place + len(line))
        return self._adapter.validate_json(line[: line.index(b"\n")], strict=True)

    def rewrite(self, records: Iterable[R]) -> None:
        """Replace what is in the file, atomically; used to drop failed records before they are tried again."""
        renewed = None
        try:
            with atomic_path(self.path) as temporary:
                with temporary.open("w", encoding="utf-8", newline="\n") as stream:
                    _write_records(stream, records)
                renewed = temporary.open("a+b", buffering=0)
                fcntl.flock(renewed, fcntl.LOCK_EX)  # before the new file takes the name, so that nobody slips in
        except BaseException:
            if renewed is not None:
                renewed.close()
            raise
        self._stream.close()
        self._stream = renewed

    def append(self, record: R) -> int:
        """Hand one record to the operating system, whole or not at all; returns its place for `record_at`.

        A lone surrogate is written as U+FFFD: readers refuse it, so that here it can only be a model's or a service's,
        and one odd character in an answer must not end a job of hours.

        Raises:
            OSError: the disk is full or failing; the file then ends where it ended before.
            ValueError: a number is NaN or infinite.
        """
        line = memoryview(LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", _json_line(record)).encode() + b"\n")
        end = self._stream.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._stream.write(line) :]
        except BaseException:
            self._stream.truncate(end)
            raise
        return end

    def close(self) -> None:
        """Sync to disk and release the lock."""
        if not self._stream.closed:
            try:
                os.fsync(self._stream.fileno())
            finally:
                self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def content_key(*parts: str) -> str:
    """A 32-digit hexadecimal address of the parts; `("ab", "c")` and `("a", "bc")` differ."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()[:32]


def sha256_file(path: Path | str) -> str:
    """SHA-256 of the bytes on disk, as hexadecimal digits.

    Raises:
        InputError: the file does not exist or is a directory.
    """
    _require_file(path)
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("whyrank", "torch", "transformers", "tokenizers", "bm25s", "ir_measures"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {
        "machine": platform.machine(),
        "system": platform.platform(),
        "num_cpus": os.cpu_count(),
    }
    torch: Any = sys.modules.get("torch")  # a job that has not imported it has not used a GPU
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


@dataclass(frozen=True, slots=True)
class Manifest:
    """How a directory of artefacts came to be; written as `manifest.json` beside them.

    `inputs` maps each input file to its SHA-256; `counts` holds numbers of records read, written and failed;
    `seconds` is wall time of the last invocation; `started` is when the manifest was made, so that a stage makes it
    first.
    """

    stage: str
    config: dict[str, JsonValue]
    inputs: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, JsonValue] = field(default_factory=dict)
    seed: int | None = None
    command: str = field(default_factory=lambda: shlex.join(sys.argv))
    versions: dict[str, str] = field(default_factory=_versions)
    hardware: dict[str, JsonValue] = field(default_factory=_hardware)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    is_finished: bool = False

    def with_inputs(self, *paths: Path | str | None) -> Manifest:
        """A copy that also names these files with their hashes; `None` and `-` are passed over."""
        hashes = {str(path): sha256_file(path) for path in paths if path is not None and str(path) != "-"}
        return replace(self, inputs={**self.inputs, **hashes})

    def finished(self, clock_start: float, *, counts: dict[str, int], **figures: JsonValue) -> Manifest:
        """A copy with the outcome; `clock_start` is a reading of `time.perf_counter()`."""
        elapsed = round(time.perf_counter() - clock_start, 3)
        # By now the job's backend is loaded, and with it the GPU is known.
        outcome = replace(self, counts=counts, figures=figures, hardware=_hardware())
        return replace(outcome, seconds=elapsed, is_finished=True)

    def write(self, directory: Path | str, name: str = "manifest.json") -> None:
        """Write the manifest atomically."""
        with atomic_path(Path(directory) / name) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
