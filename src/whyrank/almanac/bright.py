"""The almanac in the layout of BRIGHT's data set, for tools that were written for that one.

BRIGHT (Su et al., 2024) has two configurations: `examples` (queries with the ids of their gold documents) and
`documents` (the pool that a query is ranked against), each with one split per domain. Its lists of ids hold `N/A`
where there is nothing to say, and so does `gold_answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whyrank.almanac.collection import Collection
from whyrank.records import Document, Query
from whyrank.store import atomic_path, content_key, write_jsonl

__all__ = ["BrightDocument", "BrightExample", "write_bright"]

NOTHING = "N/A"

CARD = """\
---
language:
- en
license: apache-2.0
configs:
{configs}
---

# The almanac, split {split}

{num_queries} queries and {num_documents} documents of whyrank's almanac, a small hand-written collection in which
two observations have to be combined, in the layout of BRIGHT's data set. It is a model organism, never a measure of
quality on real text.

```python
from datasets import load_dataset

examples = load_dataset("path/to/this/folder", "examples")["{domain}"]
documents = load_dataset("path/to/this/folder", "documents")["{domain}"]
```

- `examples`: `query`; `reasoning`, the gold explanation that the query shares with all its gold documents; `id`;
  `excluded_ids`, `gold_ids_long` and `gold_answer`, which the almanac does not have (`N/A`); `gold_ids`, all documents
  of the domain's file that have label 2 for the query (right mechanism and right setting).
- `documents`: `id` and `content` of all candidates of the domain's queries. Some may belong to other domains.

BRIGHT has no grades and no candidates. Both are one folder above: `candidates.trec` has the 24 documents of each query,
`qrels.trec` their labels (2; 1 for the right mechanism in another setting, which is not gold here; 0).
"""


@dataclass(frozen=True, slots=True)
class BrightExample:
    """One line of `examples/<domain>.jsonl`, with BRIGHT's names."""

    query: str
    reasoning: str
    id: str
    excluded_ids: tuple[str, ...]
    gold_ids_long: tuple[str, ...]
    gold_ids: tuple[str, ...]
    gold_answer: str


@dataclass(frozen=True, slots=True)
class BrightDocument:
    """One line of `documents/<domain>.jsonl`, with BRIGHT's names."""

    id: str
    content: str


def write_bright(collection: Collection, directory: Path | str) -> None:
    """Write `examples/<domain>.jsonl`, `documents/<domain>.jsonl` and a `README.md` that tells Hugging Face's
    `datasets` about them, each atomically.

    A domain's documents are the candidates of its queries. BRIGHT ranks a query against all of them, so `gold_ids`
    holds every one of label 2, whether or not it is a candidate of this query. Hyphens of a domain's name become
    underscores, because the names of splits hold none.
    """
    folder = Path(directory)
    asked: dict[str, list[Query]] = {}
    for query in collection.queries:
        asked.setdefault(collection.query_facts[query.query_id].domain, []).append(query)
    names = {domain: domain.replace("-", "_") for domain in sorted(asked)}
    for domain, name in names.items():
        doc_ids = {doc_id for query in asked[domain] for doc_id in collection.candidates[query.query_id]}
        pool = [document for document in collection.documents if document.doc_id in doc_ids]
        write_jsonl(
            folder / "examples" / f"{name}.jsonl", (_example(collection, query, pool) for query in asked[domain])
        )
        write_jsonl(folder / "documents" / f"{name}.jsonl", (BrightDocument(d.doc_id, d.full_text) for d in pool))
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(_card(collection, list(names.values())), encoding="utf-8", newline="\n")


def _example(collection: Collection, query: Query, pool: Sequence[Document]) -> BrightExample:
    labels, candidates = collection.labels, collection.candidates[query.query_id]
    right = next(doc_id for doc_id in candidates if labels[query.query_id, doc_id] == 2)
    return BrightExample(
        query=query.text,
        reasoning=collection.explanations[query.query_id, right],
        id=query.query_id,
        excluded_ids=(NOTHING,),
        gold_ids_long=(NOTHING,),
        gold_ids=tuple(document.doc_id for document in pool if _is_right(collection, query, document)),
        gold_answer=NOTHING,
    )


def _is_right(collection: Collection, query: Query, document: Document) -> bool:
    """Whether any document, candidate or not, would have label 2 for the query."""
    asked, told = collection.query_facts[query.query_id], collection.document_facts[document.doc_id]
    return (asked.domain, asked.mechanism, asked.setting) == (told.domain, told.mechanism, told.setting)


def _card(collection: Collection, names: list[str]) -> str:
    texts = [query.text for query in collection.queries] + [document.text for document in collection.documents]
    # `datasets` keeps what it loaded by folder name and by this header, never by content: without the key, a second
    # export of the same domains would be given the first one's texts.
    description = f"The almanac, split {collection.split}, content {content_key(*texts)[:12]}"
    return CARD.format(
        configs="\n".join(_config(kind, description, names) for kind in ("examples", "documents")),
        split=collection.split,
        num_queries=len(collection.queries),
        num_documents=len(collection.documents),
        domain=names[0],
    )


def _config(kind: str, description: str, names: list[str]) -> str:
    files = [f"  - split: {name}\n    path: {kind}/{name}.jsonl" for name in names]
    return "\n".join([f"- config_name: {kind}", f"  description: {description}", "  data_files:", *files])
