"""`whyrank mine`: a Q&A dump and page texts in; corpus, queries and pairs out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from whyrank.datasets import read_queries
from whyrank.mining.config import MiningConfig
from whyrank.mining.output import write
from whyrank.mining.pages import PageStore
from whyrank.mining.pairs import mine
from whyrank.mining.stackexchange import Post, read_posts
from whyrank.progress import Progress
from whyrank.store import BadLines, Manifest

__all__ = ["mine_files"]


def mine_files(
    posts: Path,
    out: Path,
    config: MiningConfig,
    *,
    pages: Sequence[Path] = (),
    exclude: Sequence[Path] = (),
    limit: int | None = None,
    skip_bad: bool = False,
) -> Manifest:
    """Mine one site's dump into `out`; returns the manifest with every count.

    Args:
        pages: page stores, JSONL.
        exclude: query files of benchmarks; questions like theirs are dropped.
        limit: only the first so many posts.
        skip_bad: count malformed rows and pass over them.

    Raises:
        InputError: a file cannot be read.
    """
    start = time.perf_counter()
    manifest = Manifest("mine", {**asdict(config), "limit": limit, "skip_bad": skip_bad}, seed=config.seed)
    manifest = manifest.with_inputs(posts, *pages, *exclude)
    counts: Counter[str] = Counter()
    bad = BadLines() if skip_bad else None
    texts = [query.text for path in exclude for query in read_queries(path, bad=bad)]
    with Progress(f"reading {posts}") as progress:

        def counted() -> Iterator[Post]:
            for post in islice(read_posts(posts, counts=counts, bad=bad), limit):
                progress.advance()
                yield post

        mined = mine(counted(), PageStore.read(*pages, bad=bad), config, exclude_texts=texts, counts=counts)
    written = write(mined, out, config)
    counted_bad = {"lines.bad": bad.count} if bad is not None else {}
    manifest = manifest.finished(start, counts={**written, **counted_bad})
    manifest.write(out)
    return manifest
