"""An OpenAI-compatible chat endpoint as a generator: one call per request, for the whole answer.

A chat endpoint cannot continue an answer that we began, so the template's format text asks for the shape, the
template parses what comes back, and `finish_reason` `length` means that the whole answer is cut: it may end
before its label.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from queue import SimpleQueue
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import httpx

from whyrank.errors import GenerationError, InputError
from whyrank.generators import ApproximateTokens, Completion, Request, TextTokens
from whyrank.generators.chat_wire import chat_payload, read_chat_answer

__all__ = ["Endpoint", "EndpointConfig", "seconds_to_wait"]

KEY_VARIABLES = ("WHYRANK_API_KEY", "OPENAI_API_KEY")
REFUSALS = {  # every further call would fail too
    301: "it has moved; give the address it moved to",
    302: "it redirects; give the final address",
    307: "it redirects; give the final address",
    308: "it has moved; give the address it moved to",
    401: "check the API key (WHYRANK_API_KEY or OPENAI_API_KEY)",
    403: "the API key may not use this model",
    404: "check the address (it usually ends in /v1) and the model's name",
}
WORTH_RETRYING = frozenset({408, 409, 425, 429})  # and 5xx
ASKS_ALL_TO_WAIT = frozenset({429, 503})
MAX_BODY_BYTES = 16 << 20
EXCERPT = 200  # characters of a body that an error quotes


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """How an endpoint is called.

    Raises:
        InputError: a value is out of range.
    """

    concurrency: int = 8
    """Requests under way at once, and so the read-ahead of the request stream."""
    timeout: float = 120.0
    """Seconds for one attempt, from connecting to the last byte."""
    deadline: float = 600.0
    """Seconds for one request, with all its attempts and pauses."""
    max_retries: int = 5
    """Further attempts after 408, 409, 425, 429, 5xx and broken connections."""
    first_pause: float = 0.5
    """Seconds before the first retry; doubled for each further one, with jitter. Retry-After is never undercut."""
    longest_pause: float = 30.0
    """Cap of the doubled pause in seconds; a longer Retry-After is still honoured."""
    num_label_tokens: int = 32
    """Room for the label line, on top of the explanation's cap."""
    has_logprobs: bool = False
    """Ask for log-probabilities and read the label distribution from them where they give it."""
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the service names the cap."""

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("max_retries", 0), ("num_label_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"endpoint: expected {name} to be at least {least}, found {getattr(self, name)}")
        for name in ("timeout", "deadline", "first_pause", "longest_pause"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"endpoint: expected {name} to be a positive number of seconds, found {value}")


class Endpoint:
    """Calls `URL/chat/completions`.

    Every request ends in a completion: an answer, or `Completion.failed` with a `GenerationError` that tells the
    status and the beginning of the body. The API key is sent as a bearer token and stands in no name, error or log.

    Args:
        url: base address, such as `http://127.0.0.1:8000/v1`.
        model: the name by which the service knows the model.
        api_key: defaults to the environment's WHYRANK_API_KEY, then OPENAI_API_KEY; none is fine.
        config: how it is called.

    Raises:
        InputError: the address is not a plain http(s) address, or the key cannot stand in a header.
    """

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, config: EndpointConfig = EndpointConfig()
    ) -> None:
        self._url = _checked_url(url)
        if not model:
            raise InputError("endpoint: expected the model's name, found nothing")
        self._model = model
        self._config = config
        self._api_key = _checked_key(api_key)

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def name(self) -> str:
        """`endpoint:URL#MODEL`, with `+logprobs` where labels are read from those: such judgments differ in kind."""
        return f"endpoint:{self._url}#{self._model}" + ("+logprobs" if self._config.has_logprobs else "")

    @property
    def tokens(self) -> TextTokens:
        """Four characters per token: the model's own tokenizer is out of reach."""
        return ApproximateTokens()

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield completions as they come; at most `concurrency` requests are read ahead of them.

        `requests` is read in the caller's thread; the calls go on in a thread of their own while the caller works.

        Raises:
            GenerationError: the endpoint refuses (401, 403, 404) or redirects, so that every call would fail.
        """
        done: SimpleQueue[tuple[int, Future[Completion]]] = SimpleQueue()
        under_way: set[Future[Completion]] = set()
        numbered = enumerate(requests)
        has_more = True
        with self._calls(under_way) as (loop, calls):
            while True:
                while has_more and len(under_way) < self._config.concurrency and done.empty():
                    item = next(numbered, None)
                    if item is None:
                        has_more = False
                        break
                    future = asyncio.run_coroutine_threadsafe(calls.complete(item[1]), loop)
                    under_way.add(future)
                    future.add_done_callback(partial(_put, done, item[0]))
                if not under_way:
                    return
                index, future = done.get()
                under_way.remove(future)
                if future.exception() is not None:
                    yield from _what_came_back(done)
                yield index, future.result()

    @contextmanager
    def _calls(self, under_way: set[Future[Completion]]) -> Iterator[tuple[asyncio.AbstractEventLoop, _Calls]]:
        headers = {"Content-Type": "application/json", "User-Agent": "whyrank"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        client = httpx.AsyncClient(
            headers=headers,
            timeout=self._config.timeout,
            limits=httpx.Limits(max_connections=self._config.concurrency),
            follow_redirects=False,
            verify=self._url.startswith("https:"),  # reading the certificates takes time that plain http can save
            trust_env=not _is_loopback(self._url),  # a proxy of the environment cannot see this machine
        )
        calls = _Calls(client, self._url, self._model, self._api_key, self._config)
        with _loop_in_thread() as loop:
            try:
                yield loop, calls
            finally:
                for future in under_way:
                    future.cancel()
                asyncio.run_coroutine_threadsafe(_close(client), loop).result()


def _put(done: SimpleQueue[tuple[int, Future[Completion]]], index: int, future: Future[Completion]) -> None:
    done.put((index, future))


def _what_came_back(done: SimpleQueue[tuple[int, Future[Completion]]]) -> Iterator[tuple[int, Completion]]:
    """The answers that are already here when the job must stop: they are paid for."""
    while not done.empty():
        index, future = done.get()
        if future.exception() is None:
            yield index, future.result()


@contextmanager
def _loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="whyrank-endpoint", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _close(client: httpx.AsyncClient) -> None:
    # The calls are cancelled by now. What they have started themselves they end themselves: it is only waited for.
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
    await client.aclose()


class _Response(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class _Calls:
    """The calls of one job. `not_before` is the time of the loop before which the service asked for silence."""

    client: httpx.AsyncClient
    url: str
    model: str
    api_key: str = field(repr=False)
    config: EndpointConfig
    not_before: float = 0.0

    async def complete(self, request: Request) -> Completion:
        """Try until there is an answer, an error that will not pass, or no time."""
        payload = self._payload(request)
        clock = asyncio.get_running_loop().time
        ends, pause, attempt = clock() + self.config.deadline, 0.0, 0
        problem = GenerationError("the service asked for silence beyond the deadline")
        while await self._waited(pause, ends):
            attempt += 1
            asked = 0.0
            try:
                async with asyncio.timeout(min(self.config.timeout, ends - clock())):
                    response = await self._post(payload)
            except (TimeoutError, httpx.RequestError) as cause:
                problem = _because(f"no answer: {type(cause).__name__} {self._clean(str(cause))}".rstrip(), cause)
            except GenerationError as error:
                return self._failed(error, attempt)
            else:
                if response.status == 200:
                    return self._read(response, request, attempt)
                problem = GenerationError(f"status {response.status}: {self._clean(_text(response.body))}")
                if response.status in REFUSALS:
                    raise GenerationError(f"endpoint {self.url}: {REFUSALS[response.status]}; {problem}")
                if response.status not in WORTH_RETRYING and response.status < 500:
                    return self._failed(problem, attempt)
                asked = seconds_to_wait(response.headers, time.time())
                if response.status in ASKS_ALL_TO_WAIT:
                    self.not_before = max(self.not_before, clock() + asked)
            if attempt > self.config.max_retries:
                break
            grown = min(self.config.longest_pause, self.config.first_pause * 2.0 ** (attempt - 1))
            pause = max(asked, grown * random.uniform(0.5, 1.0))
        return self._failed(problem, attempt)

    def _payload(self, request: Request) -> bytes:
        payload = chat_payload(
            request,
            self.model,
            num_label_tokens=self.config.num_label_tokens,
            token_limit_field=self.config.token_limit_field,
            has_logprobs=self.config.has_logprobs,
        )
        return json.dumps(payload).encode()  # ASCII: a lone surrogate is the service's to refuse

    async def _waited(self, pause: float, ends: float) -> bool:
        """Wait for our own pause and for the silence that any call was asked for; false if there is no time."""
        clock = asyncio.get_running_loop().time
        starts = clock() + pause
        while (until := max(starts, self.not_before)) > clock():
            if until >= ends:
                return False
            await asyncio.sleep(until - clock())
        return clock() < ends

    async def _post(self, payload: bytes) -> _Response:
        async with self.client.stream("POST", f"{self.url}/chat/completions", content=payload) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise GenerationError(f"status {response.status_code}: a body of more than {MAX_BODY_BYTES} bytes")
            return _Response(response.status_code, response.headers, bytes(body))

    def _read(self, response: _Response, request: Request, attempt: int) -> Completion:
        try:
            return read_chat_answer(response.body, request)
        except GenerationError as error:
            return self._failed(GenerationError(f"status 200: {error}; {self._clean(_text(response.body))}"), attempt)

    def _failed(self, problem: GenerationError, attempt: int) -> Completion:
        message = f"endpoint {self.url}: {self._clean(str(problem), 1000)} (attempts: {attempt})"
        return Completion.failed(_because(message, problem.__cause__))

    def _clean(self, text: str, length: int = EXCERPT) -> str:
        """One line of printable text without the key, at most `length` characters."""
        if self.api_key:
            text = text.replace(self.api_key, "[key]")
        return "".join(c if c.isprintable() else " " for c in text)[:length]


def _because(message: str, cause: BaseException | None) -> GenerationError:
    error = GenerationError(message)
    error.__cause__ = cause
    return error


def _text(body: bytes) -> str:
    return body[: 1 << 16].decode("utf-8", errors="replace")


def seconds_to_wait(headers: Mapping[str, str], now: float) -> float:
    """What `Retry-After` asks for (RFC 9110, 10.2.3): seconds, or a date, which is compared with the service's
    own `Date` where there is one and else with `now` (seconds since the epoch). 0 if it says nothing readable."""
    value = headers.get("retry-after", "").strip()
    if value.replace(".", "", 1).isdecimal() and value.isascii():
        return float(value)
    date = _timestamp(value)
    if date is None:
        return 0.0
    said = _timestamp(headers.get("date", ""))
    return max(0.0, date - (now if said is None else said))


def _timestamp(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError as cause:
        raise InputError(
            "endpoint: expected an address such as http://127.0.0.1:8000/v1, found another form"
        ) from cause
    if "@" in parts.netloc:
        raise InputError("endpoint: the address holds a user or password; give the key as WHYRANK_API_KEY instead")
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise InputError("endpoint: the address holds a query or fragment; give scheme, host and path alone")
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not has_port
        or not url.isprintable()
        or " " in url
    ):
        raise InputError(f"endpoint: expected an address such as http://127.0.0.1:8000/v1, found {url!r}")
    return url.rstrip("/").removesuffix("/chat/completions")


def _checked_key(given: str | None) -> str:
    found = (os.environ.get(variable, "") for variable in KEY_VARIABLES)
    key = given if given is not None else next((value for value in found if value), "")
    key = key.strip()
    if not all("!" <= character <= "~" for character in key):
        raise InputError("endpoint: the API key holds a character that cannot stand in a header; copy it again")
    return key


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
