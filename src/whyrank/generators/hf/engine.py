"""Continuous batching for reranking: many short answers about documents that share a query.

Every pass of the model takes whatever tokens are pending, packed side by side without padding: one for each answer that
is being written, a few for each that has come to its label, all of the prompt for each that has just been let in. An
answer that is done leaves at once, and the next takes its place. Instruction and query are read once for all documents
of a query, and a whole prompt once for all samples of a pair (`attention.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from whyrank.generators import Completion, FinishReason, Request
from whyrank.generators.explanations import Explanation, reason_to_stop, settle_explanation
from whyrank.generators.hf.attention import packed_attention
from whyrank.generators.hf.chat import ChatTokens, Endings
from whyrank.generators.hf.kernels import best_tokens
from whyrank.generators.hf.labels import children, inner_nodes, label_log_probs
from whyrank.generators.hf.last_layer import LastLayer
from whyrank.generators.hf.linears import is_narrow
from whyrank.generators.hf.memory import LABEL_ROWS, Footprint
from whyrank.generators.hf.packing import Packing, Pool, Span, Store

__all__ = ["Answer", "Engine", "rounded_up"]

BATCHES_READ_AHEAD, MOST_READ_AHEAD = 8, 512
# Of prompts in one pass: on a CPU activations should stay in the caches, elsewhere passes should be worth starting.
MAX_PASS_TOKENS, MAX_PASS_TOKENS_ON_CPU = 2048, 512
CAPACITY_STEP = 64  # pools are made a little larger than needed, so that a slightly longer document fits, too
Tokens = tuple[int, ...]


@dataclass(slots=True)
class Answer:
    """One request on its way. The first `num_shared` tokens of `prompt` come before the document.

    `written` is what the model wrote without the end of text, `logprobs` the natural-log probability of each; the
    keys and values of prompt and answer lie in `context` and then in `store`. `after` collects, for every node of the
    label trie, the log-probability of each token that may follow it.
    """

    index: int
    request: Request
    prompt: list[int]
    num_shared: int
    endings: Endings
    written: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_written: int = 0
    finish: FinishReason | None = None
    explanation: Explanation = field(default_factory=lambda: Explanation(0))
    after: dict[Tokens, dict[int, float]] = field(default_factory=dict)
    context: tuple[Store, ...] = ()
    store: Store = field(default_factory=lambda: Store(0))
    num_prompt_stored: int = 0
    random: torch.Generator | None = None
    before_document: Tokens = field(init=False)
    whole: Tokens = field(init=False)

    def __post_init__(self) -> None:
        """Note what may be shared: what comes before the document, and all of the prompt but its last token, which has
        to be asked anew."""
        self.before_document, self.whole = tuple(self.prompt[: self.num_shared]), tuple(self.prompt[:-1])

    @property
    def num_needed(self) -> int:
        """Most tokens that its own store will hold."""
        longest = 0 if self.request.is_direct else self.request.sampling.max_tokens
        return len(self.prompt) - self.num_shared + longest + len(self.endings.prompt) + 1

    @property
    def nodes(self) -> tuple[Tokens, ...]:
        """Of the label trie, those that are read at once when its root has been."""
        return inner_nodes(self.endings.labels)[1:]

    @property
    def is_ready(self) -> bool:
        """Whether it is written and, where a label is to be chosen, all of the label trie has been read."""
        return self.finish is not None and len(self.after) == len(inner_nodes(self.endings.labels))

    def completion(self, tokens: ChatTokens) -> Completion:
        """What comes back, once it is ready."""
        kept = (*self.written[: self.explanation.num_kept], *self.explanation.tail)
        return Completion(
            text=tokens.decode(kept),
            finish_reason=self.finish or "stop",
            label_probs=tuple(math.exp(p) for p in label_log_probs(self.endings.labels, self.after)),
            token_ids=kept,
            logprobs=None if self.explanation.tail else tuple(self.logprobs[: self.explanation.num_kept]),
            num_prompt_tokens=len(self.prompt),
            num_completion_tokens=self.num_written,
        )


@dataclass(frozen=True, slots=True)
class _Task:
    """Tokens for the next pass: they go to the end of `store`, behind `context`; logits are wanted after the last
    `num_logits` of them. If they are `nodes` of the label trie, below its root, each follows its ancestors alone."""

    tokens: Sequence[int]
    store: Store
    context: tuple[Store, ...]
    num_logits: int
    answer: Answer | None = None
    nodes: tuple[Tokens, ...] = ()


class Engine:
    """Runs answers through a model whose attention is `attention.attend`.

    Args:
        model: a causal language model in evaluation mode.
        tokens: its tokenizer.
        eos_ids: tokens that end an answer.
        num_slots: how many answers are written at once at most.
        memory: bytes that may be taken on top of the weights; fewer answers are written at once to keep to it.
        turn: held during every pass; engines that run one model in several threads have to share it, because a pass
            changes the model for its time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: ChatTokens,
        eos_ids: frozenset[int],
        num_slots: int,
        memory: int | None,
        turn: Lock,
    ) -> None:
        self._model = model
        self._kept_dtype = torch.bfloat16 if is_narrow(model) else None  # of keys and values
        self._tokens = tokens
        self._eos_ids = eos_ids
        self._num_slots = num_slots
        self._memory = memory
        self._turn = turn
        with turn:
            self._last_layer = LastLayer.of(model)
        self._max_pass_tokens = MAX_PASS_TOKENS_ON_CPU if model.device.type == "cpu" else MAX_PASS_TOKENS
        self._pool = Pool(0, 0)
        self._num_shareable = 0
        self._num_label_rows = 0
        self._shared: dict[Tokens, Store] = {}  # by all tokens up to and including theirs
        self._num_users: Counter[Tokens] = Counter()
        self._pending: dict[int, list[int]] = {}  # by index of the answer

    @torch.inference_mode()
    def run(self, answers: Iterable[Answer | tuple[int, Completion]]) -> Iterator[tuple[int, Completion]]:
        """Yield `(index, completion)` of every answer as soon as it is ready; what comes complete is passed on.

        Reads a few batches of answers ahead, so that neighbours can be put together.
        """
        source = iter(answers)
        waiting: list[Answer] = []
        active: list[Answer] = []
        while True:
            yield from self._read_ahead(source, waiting)
            fills = self._admit(waiting, active)
            if not active:
                return
            self._pass([*fills, *self._next(active)])
            for answer in [found for found in active if found.is_ready]:
                active.remove(answer)
                self._leave(answer)
                yield answer.index, answer.completion(self._tokens)

    # ---- coming and going ------------------------------------------------------------------------------------

    def _read_ahead(
        self, source: Iterator[Answer | tuple[int, Completion]], waiting: list[Answer]
    ) -> Iterator[tuple[int, Completion]]:
        """Fill the waiting room when it is half empty. Answers that share most stand together, longest first: those
        after it then fit where it was."""
        most = max(self._num_slots, min(self._num_slots * BATCHES_READ_AHEAD, MOST_READ_AHEAD))
        if len(waiting) > most // 2:
            return
        for item in islice(source, most - len(waiting)):
            if isinstance(item, Answer):
                waiting.append(item)
                self._num_users.update((item.before_document, item.whole))
            else:
                yield item
        arrival: dict[Tokens, int] = {}
        for answer in waiting:
            arrival.setdefault(answer.before_document, answer.index)
        waiting.sort(key=lambda answer: (arrival[answer.before_document], -answer.num_needed, answer.prompt))

    def _admit(self, waiting: list[Answer], active: list[Answer]) -> list[_Task]:
        """Let in as many as there are slots for and a pass has room for; returns what fills new shared stores."""
        fills: list[_Task] = []
        room = self._max_pass_tokens
        while waiting and room > 0:
            answer = waiting[0]
            if not self._was_planned_for(answer):
                if active:
                    break  # a larger pool can only be made when this one is empty
                self._pool = Pool(0, 0)  # gives its memory back before more is taken
                self._pool = self._make_pool(waiting)
            if len(active) == self._pool.num_slots or not self._has_room_to_share(answer, is_first=not active):
                break
            active.append(waiting.pop(0))
            before = len(fills)
            fills += self._enter(answer)
            room -= sum(len(task.tokens) for task in fills[before:]) + len(self._pending[answer.index])
        return fills

    def _make_pool(self, waiting: Sequence[Answer]) -> Pool:
        """One that holds every answer that waits, with as many slots as there are answers and memory for."""
        capacity = math.ceil(max(found.num_needed for found in waiting) / CAPACITY_STEP) * CAPACITY_STEP
        most = min(self._num_slots, len(waiting))
        if self._memory is None:
            return Pool(most, capacity, self._kept_dtype)
        self._num_shareable = 2 * max(self._num_shared(found) for found in waiting)
        self._num_label_rows = max(len(found.nodes) for found in waiting)
        num_slots = Footprint.of(self._model, self._kept_dtype).num_slots(
            self._memory,
            capacity=capacity,
            num_shared=self._num_shareable // 2,
            num_pass_tokens=self._max_pass_tokens + capacity + self._num_shareable // 2,
            num_label_rows=self._num_label_rows,
            most=most,
        )
        return Pool(num_slots, capacity, self._kept_dtype)

    def _was_planned_for(self, answer: Answer) -> bool:
        """Whether the answer fits into a slot, and what it shares and its labels into what the memory was divided
        for."""
        fits = answer.num_needed <= self._pool.capacity
        if self._memory is not None:
            fits = fits and len(answer.nodes) <= self._num_label_rows
            fits = fits and 2 * self._num_shared(answer) <= self._num_shareable
        return fits

    def _num_shared(self, answer: Answer) -> int:
        """Tokens that an answer's shared stores hold."""
        return max((len(prefix) for prefix in self._worth_sharing(answer)), default=0)

    def _has_room_to_share(self, answer: Answer, *, is_first: bool) -> bool:
        """Whether the stores that an answer shares with others are there, or fit beside those that are."""
        if self._memory is None or is_first:
            return True
        new = [prefix for prefix in self._worth_sharing(answer) if prefix not in self._shared]
        held = sum(store.capacity for store in self._shared.values())
        return not new or held + self._num_shared(answer) <= self._num_shareable

    def _enter(self, answer: Answer) -> list[_Task]:
        """Give an answer its stores; returns tasks for those that nobody has filled yet."""
        fills: list[_Task] = []
        start = 0
        for prefix in self._worth_sharing(answer):
            if prefix not in self._shared:
                self._shared[prefix] = Store(len(prefix) - start)
                fills.append(_Task(prefix[start:], self._shared[prefix], answer.context, num_logits=0))
            answer.context = (*answer.context, self._shared[prefix])
            start = len(prefix)
        answer.store = self._pool.take()
        own = answer.prompt[start:]
        answer.num_prompt_stored = len(own)
        if answer.request.is_direct or answer.request.sampling.max_tokens == 0:
            answer.finish = "stop" if answer.request.is_direct else "length"
            own = [*own, *answer.endings.prompt]
        self._pending[answer.index] = own
        return fills

    def _worth_sharing(self, answer: Answer) -> list[Tokens]:
        """What stands before the document, and the rest of the prompt where several samples of the pair are asked."""
        shared = [answer.before_document] if answer.before_document else []
        is_whole = self._num_users[answer.whole] > 1 and len(answer.whole) > answer.num_shared
        return [*shared, answer.whole] if is_whole else shared

    def _leave(self, answer: Answer) -> None:
        self._pool.give_back(answer.store)
        del self._pending[answer.index]
        for prefix in (answer.before_document, answer.whole):
            self._num_users[prefix] -= 1
            if not self._num_users[prefix]:
                del self._num_users[prefix]
                self._shared.pop(prefix, None)

    # ---- one pass --------------------------------------------------------------------------------------------

    def _next(self, active: Sequence[Answer]) -> list[_Task]:
        """What all want from the next pass, but of label tries only as many rows as memory was counted for."""
        tasks, room, is_first = [], LABEL_ROWS * self._pool.num_slots - len(active), True
        for answer in active:
            if () in answer.after:
                if len(answer.nodes) > room and not is_first:
                    continue
                room, is_first = room - len(answer.nodes), False
            tasks.append(self._task(answer))
        return tasks

    def _task(self, answer: Answer) -> _Task:
        """What an answer wants from the next pass: its pending tokens, or all of its label trie at once."""
        if () not in answer.after:
            return _Task(self._pending[answer.index], answer.store, answer.context, 1, answer)
        tokens, context = [node[-1] for node in answer.nodes], (*answer.context, answer.store)
        return _Task(tokens, Store(len(tokens)), context, len(tokens), answer, answer.nodes)

    def _pass(self, tasks: list[_Task]) -> None:
        """Run the model once over the tokens of all tasks, and hand every answer its logits."""
        in_pool = {id(store) for store in self._pool.stores}

        def is_single(task: _Task) -> bool:
            return len(task.tokens) == 1 and id(task.store) in in_pool

        tasks = sorted(tasks, key=is_single, reverse=True)
        spans, num_tokens = [], 0
        for task in tasks:
            at = task.store.length
            spans.append(Span(num_tokens, len(task.tokens), task.store, at, task.context, task.num_logits, task.nodes))
            num_tokens += len(task.tokens)
        for task in tasks:
            task.store.length += len(task.tokens)
        places = [
            place
            for task, span in zip(tasks, spans, strict=True)
            for place in range(span.start + span.num_tokens - task.num_logits, span.start + span.num_tokens)
        ]
        positions = [position for span in spans for position in span.positions]
        ids = [token for task in tasks for token in task.tokens]
        unused = [0] * (rounded_up(len(ids)) - len(ids))
        device = self._model.device
        wanted = torch.tensor(places, device=device)
        num_single = sum(map(is_single, tasks))
        packing = Packing(self._pool, spans[:num_single], spans[num_single:], device, self._last_layer.index)
        with self._turn, packed_attention(self._model), self._last_layer.only_at(wanted):
            output = self._model(
                input_ids=torch.tensor([ids + unused], device=device),
                position_ids=torch.tensor([positions + unused], device=device),
                use_cache=False,
                logits_to_keep=wanted,
                packing=packing,
            )
        logits = cast(Tensor, output.logits)[0].float().split([task.num_logits for task in tasks])
        for_answers = [
            (task.answer, task.nodes, found) for task, found in zip(tasks, logits, strict=True) if task.answer
        ]
        writing = [(answer, found[0]) for answer, _, found in for_answers if answer.finish is None]
        for answer, nodes, found in for_answers:
            if answer.finish is not None:
                _note(answer, nodes or ((),), found)
        self._choose(writing)

    # ---- writing ---------------------------------------------------------------------------------------------

    def _choose(self, rows: Sequence[tuple[Answer, Tensor]]) -> None:
        """Append one token to every answer that is being written, and settle those that end with it."""
        if not rows:
            return
        tokens, best = best_tokens(torch.stack([found for _, found in rows]))
        greedy, log_probs = tokens.tolist(), best.tolist()
        for number, (answer, found) in enumerate(rows):
            token, log_prob = greedy[number], log_probs[number]
            if answer.request.sampling.temperature > 0:
                token, log_prob = _sample(found, answer)
            answer.num_written += 1
            if token in self._eos_ids:
                answer.finish = "stop"
            else:
                answer.written.append(token)
                answer.logprobs.append(log_prob)
                answer.finish = reason_to_stop(answer.written, self._tokens, answer.request)
            self._pending[answer.index] = [token] if answer.finish is None else self._to_the_label(answer)

    def _to_the_label(self, answer: Answer) -> list[int]:
        """Cut the answer's store back to prompt and explanation; what must follow before the label can be read."""
        answer.explanation = settle_explanation(answer.written, self._tokens, answer.request)
        num_stored = min(answer.store.length - answer.num_prompt_stored, answer.explanation.num_kept)
        answer.store.length = answer.num_prompt_stored + num_stored
        rest = answer.written[num_stored : answer.explanation.num_kept]
        return [*rest, *answer.explanation.tail, *answer.endings.prompt]


def rounded_up(num_tokens: int) -> int:
    """How long a pass is made: few different lengths, since oneDNN keeps code of its own for each of them."""
    step = 1 if num_tokens <= 32 else 16 if num_tokens <= 128 else 32
    return math.ceil(num_tokens / step) * step


def _note(answer: Answer, nodes: Sequence[Tokens], logits: Tensor) -> None:
    """Keep what may follow each of these nodes of the label trie; `logits` are theirs, in order."""
    for node, row in zip(nodes, logits, strict=True):
        following = children(answer.endings.labels, node)
        log_probs = torch.log_softmax(_precise(row), dim=-1)[following]
        answer.after[node] = dict(zip(following, log_probs.tolist(), strict=True))


def _sample(logits: Tensor, answer: Answer) -> tuple[int, float]:
    """Draw with the answer's own random numbers, so that the draw does not depend on its neighbours."""
    if answer.random is None:
        answer.random = torch.Generator().manual_seed(answer.request.sampling.seed)
    log_probs = torch.log_softmax(logits.cpu().double() / answer.request.sampling.temperature, dim=-1)
    token = int(torch.multinomial(log_probs.exp(), 1, generator=answer.random))
    return token, float(log_probs[token])


def _precise(logits: Tensor) -> Tensor:
    """In float64, so that label probabilities do not depend on their company; Apple's MPS has float32 only."""
    return logits if logits.device.type == "mps" else logits.double()
