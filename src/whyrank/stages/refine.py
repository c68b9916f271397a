"""`whyrank refine`: a distilled checkpoint, pairs and what is known of them in; a better checkpoint out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from whyrank.checkpoint import CARD_NAME, Card, read_card, write_card
from whyrank.datasets import read_corpus, read_qrels, read_queries, read_run
from whyrank.errors import InputError
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.load import load_tokenizer
from whyrank.records import Judgment, Pair, Query
from whyrank.stages.following import followed
from whyrank.store import Manifest, read_jsonl
from whyrank.template import Template
from whyrank.training.alarms import RefineStep
from whyrank.training.evidence import gather_evidence
from whyrank.training.examples import Example, examples_of
from whyrank.training.ranks import ranks
from whyrank.training.refine import Refined, RefineData, refine
from whyrank.training.refine_config import RefineConfig
from whyrank.training.validation import DevSet

__all__ = ["RefineFiles", "refine_files"]

MEND = "Remove the line: refinement on the others does without it"


@dataclass(frozen=True, slots=True)
class RefineFiles:
    """Where everything is.

    All but texts may be empty, as long as something is known of some pair. `judgments` are evidence, `replay` are
    judgments that the student goes on learning from; `dev_run` and `dev_qrels` belong together, and their texts are
    among `queries` and `corpora`.
    """

    queries: tuple[Path, ...]
    corpora: tuple[Path, ...]
    pairs: tuple[Path, ...] = ()
    judgments: tuple[Path, ...] = ()
    qrels: tuple[Path, ...] = ()
    replay: tuple[Path, ...] = ()
    dev_run: Path | None = None
    dev_qrels: Path | None = None

    def __post_init__(self) -> None:
        if (self.dev_run is None) != (self.dev_qrels is None):
            raise InputError("expected a dev run and dev qrels together, found one of them; give both or neither")

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file that is named."""
        dev = tuple(path for path in (self.dev_run, self.dev_qrels) if path is not None)
        return (*self.queries, *self.corpora, *self.pairs, *self.judgments, *self.qrels, *self.replay, *dev)


def refine_files(
    model: str,
    files: RefineFiles,
    template: Template | None,
    out: Path,
    config: RefineConfig,
    manifest: Manifest,
    *,
    has_board: bool = False,
) -> Refined:
    """Refine a student and save the best checkpoint in `out`; `out/metrics.jsonl` holds one line per round.

    Args:
        model: a folder or a hub id; a checkpoint of whyrank brings its own template.
        files: pairs, evidence and texts.
        template: only for a model without a card.
        out: folder of the checkpoint.
        config: how to refine; it is added to the manifest.
        manifest: gets its counts and figures, and is written beside the checkpoint.
        has_board: write the curves for TensorBoard, too, in `out/tensorboard`.

    Raises:
        InputError: a file cannot be read, or see `refine`.
        TemplateMismatch: the model was trained with another template, or not to explain.
    """
    start = time.perf_counter()
    card = _card(model, template)
    data = _read(files, card, model, config)
    resolved = {**asdict(config), "model": model, "template": card.template.version}
    manifest = replace(manifest, config={**manifest.config, **json.loads(json.dumps(resolved))})

    def note(step: RefineStep) -> str:
        dev = "" if step.dev is None else f", dev {step.dev:.3f}"
        return f"reward {step.reward:.3f}, KL {step.kl_k3:.3f}, length {step.length:.0f}{dev}"

    with followed(f"refining into {out}", config.num_steps, out, manifest, note, has_board=has_board) as on_step:
        result = refine(model, data, card.template, out, config, modes=card.modes, on_step=on_step)
    if not ranks().is_main:
        return result
    if card.search_queries:  # what it was taught before, it may go on being asked for
        write_card(out, replace(read_card(out / CARD_NAME), search_queries=card.search_queries))
    counts = {"num_pairs": result.num_pairs, "num_steps": len(result.history)}
    figures = {"first_dev": result.first_dev, "best_dev": result.best_dev, "best_step": result.best_step}
    manifest.finished(start, counts=counts, **figures, alarm=result.alarm).write(out)
    return result


def _card(model: str, template: Template | None) -> Card:
    """How the student was taught to be asked."""
    path = Path(model) / CARD_NAME
    if path.is_file():
        card = read_card(path)
        card.check(mode="explain", template=template, label_tokens=card.label_tokens)
        return card
    if template is None:
        raise InputError(f"{model} has no {CARD_NAME}: say with --template what it was taught to be asked")
    return Card(template)


def _read(files: RefineFiles, card: Card, model: str, config: RefineConfig) -> RefineData:
    pairs = [pair for path in files.pairs for pair in read_jsonl(path, Pair, advice=MEND)]
    judgments, taught = (
        [judgment for path in paths for judgment in read_jsonl(path, Judgment, advice=MEND)]
        for paths in (files.judgments, files.replay)
    )
    qrels = [qrel for path in files.qrels for qrel in read_qrels(path)]
    evidence = gather_evidence(pairs, judgments, qrels, card.template.scale, config.evidence)
    queries = {query.query_id: query for path in files.queries for query in read_queries(path)}
    run = read_run(files.dev_run) if files.dev_run is not None else {}
    wanted = {doc_id for _, doc_id in evidence} | {line.doc_id for lines in run.values() for line in lines}
    wanted |= {judgment.doc_id for judgment in taught}
    documents = {
        document.doc_id: document
        for path in files.corpora
        for document in read_corpus(path)
        if document.doc_id in wanted
    }
    replay: Sequence[Example] = ()
    if taught and config.replay_weight:
        tokens = ChatTokens(load_tokenizer(model))
        replay = list(examples_of(taught, queries, documents, card.template, tokens))
    dev = None
    if files.dev_run is not None and files.dev_qrels is not None:
        _require_texts(files.dev_run, run.keys(), wanted - documents.keys(), queries)
        judged = tuple(qrel for qrel in read_qrels(files.dev_qrels) if qrel.query_id in run)
        texts = {line.doc_id: documents[line.doc_id] for lines in run.values() for line in lines}
        dev = DevSet(tuple(queries[query_id] for query_id in run), texts, run, judged)
    return RefineData(evidence, queries, documents, replay, dev)


def _require_texts(path: Path, query_ids: Iterable[str], missing: set[str], queries: dict[str, Query]) -> None:
    strangers = [query_id for query_id in query_ids if query_id not in queries]
    if strangers or missing:
        what = f"query {strangers[0]!r}" if strangers else f"document {min(missing)!r}"
        raise InputError(f"{path}: {what} is in none of the given files; add its --queries and --corpus")
