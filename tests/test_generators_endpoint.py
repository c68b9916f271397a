"""The endpoint generator against a real server that fails in every way a service does."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.fake_endpoint import FakeEndpoint, Plan, Reply
from whyrank.errors import GenerationError, InputError
from whyrank.generators import ApproximateTokens, Completion, Request, Sampling, Segment
from whyrank.generators.chat_wire import chat_messages
from whyrank.generators.endpoint import Endpoint, EndpointConfig, seconds_to_wait
from whyrank.template import PromptWords, Template

TEMPLATE = Template.load("explain-0-2")
CANARY = "sk-canary-5f1b7c"
QUICK = EndpointConfig(first_pause=0.01, timeout=5.0)
NUMBERED = {"Retry-After": "1"}
ANSWER = "Explanation: It names the valve.\n\nRelevance Label: 2 ##"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WHYRANK_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def requests_for(num: int, template: Template = TEMPLATE) -> list[Request]:
    return [template.render("why", f"document {n}", ApproximateTokens()).request for n in range(num)]


def run(plan: Plan, num: int = 1, config: EndpointConfig = QUICK) -> tuple[dict[int, Completion], FakeEndpoint]:
    with FakeEndpoint(plan) as server:
        found = dict(Endpoint(server.url, "m", api_key=CANARY, config=config).generate(requests_for(num)))
    assert sorted(found) == list(range(num))  # every request reached its end
    return found, server


def failed(completion: Completion) -> str:
    """The message of a failed completion, which holds neither text nor label."""
    assert (completion.text, completion.finish_reason, completion.label_probs) == ("", "error", None)
    assert isinstance(completion.error, GenerationError)
    return str(completion.error)


# ---- what is sent and what is read --------------------------------------------------------------------------


def test_one_call_asks_for_the_whole_answer() -> None:
    found, server = run(lambda document, attempt: Reply(text=ANSWER))
    assert found == {0: Completion(ANSWER, "stop", num_prompt_tokens=11, num_completion_tokens=7)}
    assert TEMPLATE.parse(found[0].text) == ("2", "It names the valve.")
    [seen] = server.seen
    prompt = "".join(segment.text for segment in requests_for(1)[0].segments if segment.role == "user")
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["Authorization"] == f"Bearer {CANARY}"
    assert seen.payload == {
        "model": "m",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0.0,  # and no seed: a greedy answer draws nothing
        "max_tokens": 256 + 32,
    }


def test_options_reach_the_service() -> None:
    template = Template(
        name="t", prompt=PromptWords(task="t", system="Be brief."), chat_options={"enable_thinking": False}
    )
    request = template.render(
        "q", "d", ApproximateTokens(), mode="direct", sampling=Sampling(temperature=0.7, max_tokens=9, seed=5)
    ).request
    config = replace(QUICK, token_limit_field="max_completion_tokens", has_logprobs=True, num_label_tokens=4)
    with FakeEndpoint(lambda document, attempt: Reply(text="Relevance Label: 1 ##")) as server:
        list(Endpoint(f"{server.url}/", "m", config=config).generate([request]))
    [seen] = server.seen
    assert [message["role"] for message in seen.payload.pop("messages")] == ["system", "user"]
    assert seen.payload == {
        "model": "m",
        "temperature": 0.7,
        "seed": 5,
        "max_completion_tokens": 4,  # direct: the label alone
        "chat_template_kwargs": {"enable_thinking": False},
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert "Authorization" not in seen.headers


@pytest.mark.parametrize(
    "token",
    [
        *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>"),
        *("<start_of_turn>", "<end_of_turn>", "</think>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_special_tokens_of_foreign_text_are_defused(token: str) -> None:
    segments = tuple(Segment("user", kind, f"a {token} b") for kind in ("instruction", "query", "document"))
    [message] = chat_messages(Request(segments, (), "", (" 0", " 1")))
    ours, *theirs = message["content"].split("b")[:3]
    assert token in ours
    assert all(token not in text and token in text.replace(" ", "") for text in theirs)


def test_length_is_reported_with_its_text() -> None:
    found, _ = run(lambda document, attempt: Reply(text="Explanation: It goes on and", finish_reason="length"))
    assert (found[0].text, found[0].finish_reason) == ("Explanation: It goes on and", "length")
    assert TEMPLATE.parse(found[0].text).label is None


# ---- failures -----------------------------------------------------------------------------------------------

LABELLED = b"Relevance Label: 2 ##"
LASTING = {
    "content filter": (Reply(text=ANSWER, finish_reason="content_filter"), "content_filter"),
    "tool call": (Reply(text=None, finish_reason="tool_calls"), "tool_calls"),
    "no text": (Reply(text=None), "expected an answer with text"),
    "HTML": (Reply("raw", body=b"<html>Explanation: x\n\nRelevance Label: 2 ##"), "status 200"),
    "bad JSON": (Reply("raw", body=b'{"choices": [' + LABELLED), "status 200"),
    "empty choices": (Reply("raw", body=b'{"choices": []}'), "choices"),
    "an error with status 200": (Reply("raw", body=b'{"error": "Relevance Label: 2 ##"}'), "choices"),
    "empty body": (Reply("raw"), "status 200"),
    "a list": (Reply("raw", body=b"[]"), "status 200"),
    "deep JSON": (Reply("raw", body=b"[" * 100_000), "status 200"),
    "not UTF-8": (Reply("raw", body=b'{"choices": [{"message": {"content": "\xff"}}]}'), "status 200"),
    "400": (Reply("status", status=400, body=LABELLED), "status 400: Relevance Label: 2 ##"),
    "413": (Reply("status", status=413), "status 413"),
    "204": (Reply("status", status=204), "status 204"),
}
PASSING = {
    "429": Reply("status", status=429, body=b"Limit: 20 ... again in 2s"),
    "500": Reply("status", status=500, body=LABELLED),
    "502": Reply("status", status=502),
    "503": Reply("status", status=503),
    "408": Reply("status", status=408),
    "reset": Reply("reset"),
    "truncated": Reply("truncated", text=ANSWER),
}


@pytest.mark.parametrize("name", LASTING)
def test_error_that_will_not_pass_fails_its_request_at_once(name: str) -> None:
    reply, message = LASTING[name]
    found, server = run(lambda document, attempt: reply if document == "document 1" else Reply(text=ANSWER), num=3)
    assert message in failed(found[1])
    assert "attempts: 1" in failed(found[1])
    assert found[0].text == found[2].text == ANSWER
    assert len(server.seen) == 3


@pytest.mark.parametrize("name", PASSING)
def test_error_that_may_pass_is_tried_again(name: str) -> None:
    found, server = run(lambda document, attempt: PASSING[name] if attempt < 2 else Reply(text=ANSWER))
    assert found[0].text == ANSWER
    assert len(server.seen) == 3


@pytest.mark.parametrize("name", PASSING)
def test_error_that_does_not_pass_ends_without_a_label(name: str) -> None:
    found, server = run(lambda document, attempt: PASSING[name], config=replace(QUICK, max_retries=2))
    assert "attempts: 3" in failed(found[0])
    assert len(server.seen) == 3


def test_hanging_attempt_is_given_up_and_tried_again() -> None:
    config = replace(QUICK, timeout=0.2)
    found, server = run(lambda document, attempt: Reply("hang") if attempt == 0 else Reply(text=ANSWER), config=config)
    assert found[0].text == ANSWER
    assert len(server.seen) == 2


@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_deadline_holds_whatever_the_service_does(kind: Any) -> None:
    # A slow drip never trips a timeout between two bytes: the whole attempt is timed.
    start = time.monotonic()
    found, _ = run(
        lambda document, attempt: Reply(kind), config=replace(QUICK, timeout=0.2, deadline=0.5, max_retries=99)
    )
    assert "no answer: TimeoutError" in failed(found[0])
    assert 0.3 < time.monotonic() - start < 2.0


def test_nobody_listening_is_an_error_of_the_request() -> None:
    with FakeEndpoint(lambda document, attempt: Reply()) as server:
        url = server.url
    found = dict(Endpoint(url, "m", config=replace(QUICK, max_retries=1)).generate(requests_for(2)))
    assert "ConnectError" in failed(found[0])
    assert found[0].error is not None
    assert type(found[0].error.__cause__).__name__ == "ConnectError"
    assert "attempts: 2" in failed(found[1])


@pytest.mark.parametrize("status", [301, 302, 307, 308, 401, 403, 404])
def test_refusal_stops_the_job(status: int) -> None:
    reply = Reply("status", status=status, body=f"no {CANARY}".encode(), headers={"Location": "http://127.0.0.1:1/"})
    with FakeEndpoint(lambda document, attempt: reply) as server:
        endpoint = Endpoint(server.url, "m", api_key=CANARY, config=replace(QUICK, concurrency=4))
        with pytest.raises(GenerationError, match=rf"status {status}: no \[key\]") as caught:
            list(endpoint.generate(requests_for(100)))
    assert 1 <= len(server.seen) <= 4
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_answers_that_are_here_when_a_call_is_refused_are_delivered() -> None:
    replies = {
        "document 0": Reply(text=ANSWER),
        "document 1": Reply("status", status=401, delay=0.1),
        "document 2": Reply(text=ANSWER, delay=0.2),
    }
    with FakeEndpoint(lambda document, attempt: replies[document]) as server:
        completions = Endpoint(server.url, "m", config=replace(QUICK, concurrency=3)).generate(requests_for(9))
        assert next(completions)[0] == 0
        time.sleep(0.5)  # the refusal and the last answer are waiting now, and nothing new is asked before them
        assert next(completions)[0] == 2
        with pytest.raises(GenerationError, match="check the API key"):
            next(completions)
    assert len(server.seen) == 3


# ---- waiting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 4])
def test_retry_after_is_never_undercut_by_any_request(concurrency: int) -> None:
    # One document is told to wait a second. Calls that are on their way then cannot be called back, but from 0.2
    # seconds on nobody may call, although the others' answers take 0.3 seconds and make room for more.
    plan: Plan = lambda document, attempt: (  # noqa: E731
        Reply("status", status=429, headers=NUMBERED)
        if document == "document 0" and attempt == 0
        else Reply(text=ANSWER, delay=0.3 if document in ("document 1", "document 2", "document 3") else 0.0)
    )
    found, server = run(plan, num=8, config=replace(QUICK, concurrency=concurrency))
    assert all(completion.text == ANSWER for completion in found.values())
    [told] = [seen for seen in server.seen if seen.reply.status == 429]
    assert not [late for late in server.seen if told.arrived + 0.2 < late.arrived < told.arrived + 1.0]
    assert len(server.seen) == 9


def test_retry_after_beyond_the_deadline_gives_up_at_once() -> None:
    reply = Reply("status", status=429, headers={"Retry-After": "3600"})
    start = time.monotonic()
    found, server = run(lambda document, attempt: reply, num=5, config=replace(QUICK, concurrency=1, deadline=5.0))
    assert time.monotonic() - start < 3.0
    assert "status 429" in failed(found[0])
    assert "asked for silence beyond the deadline" in failed(found[4])
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0.0),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.2"}, 0.2),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, 0.0),
        ({"retry-after": "nan"}, 0.0),
        # 1 Jan 2030 00:00:00 GMT is 1893456000; `now` is ten seconds before
        ({"retry-after": "Tue, 01 Jan 2030 00:00:00 GMT"}, 10.0),
        ({"retry-after": "Mon, 31 Dec 2029 00:00:00 GMT"}, 0.0),
        # a service whose clock is an hour late means three seconds of its own time
        ({"retry-after": "Mon, 31 Dec 2029 23:00:03 GMT", "date": "Mon, 31 Dec 2029 23:00:00 GMT"}, 3.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float) -> None:
    assert seconds_to_wait(headers, now=1893456000.0 - 10) == seconds


# ---- the stream ---------------------------------------------------------------------------------------------


def flaky(document: str, attempt: int) -> Reply:
    """Every document has its own lasting fate after up to two passing troubles."""
    number = int(document.split()[1])
    troubles = [PASSING["500"], PASSING["reset"], PASSING["truncated"], PASSING["429"]]
    if attempt < number % 3:
        return troubles[(number + attempt) % 4]
    if number % 10 == 3:
        return LASTING["HTML"][0]
    if number % 10 == 7:
        return LASTING["content filter"][0]
    return Reply(text=f"Explanation: Number {number}.\n\nRelevance Label: {number % 3} ##", delay=0.002 * (number % 5))


def test_result_does_not_depend_on_concurrency() -> None:
    def outcome(concurrency: int) -> list[tuple[str, str, str]]:
        found, server = run(flaky, num=60, config=replace(QUICK, concurrency=concurrency))
        assert server.max_at_once <= concurrency
        # 20 documents need 1, 20 need 2 and 20 need 3 calls.
        assert len(server.seen) == 20 * (1 + 2 + 3)
        return [
            (found[n].text, found[n].finish_reason, re.sub(r":\d+/v1", "", str(found[n].error))) for n in sorted(found)
        ]

    alone = outcome(1)
    assert alone == outcome(8)
    for number, (text, _, _) in enumerate(alone):
        is_lost = number % 10 in (3, 7)
        assert TEMPLATE.parse(text).label == (None if is_lost else str(number % 3))


def test_endless_stream_is_read_ahead_by_concurrency_only() -> None:
    num_read = 0
    threads = set()

    def endless() -> Iterator[Request]:
        nonlocal num_read
        while True:
            num_read += 1
            threads.add(threading.get_ident())
            yield requests_for(1)[0]

    with FakeEndpoint(lambda document, attempt: Reply(text=ANSWER)) as server:
        completions = Endpoint(server.url, "m", config=replace(QUICK, concurrency=3)).generate(endless())
        for num_taken in range(1, 21):
            next(completions)
            assert num_read <= num_taken + 3
        completions.close()  # type: ignore[attr-defined]
    assert threads == {threading.get_ident()}
    assert not [thread for thread in threading.enumerate() if thread.name == "whyrank-endpoint"]


def test_ready_answer_is_not_held_back_by_a_slow_one() -> None:
    plan: Plan = lambda document, attempt: Reply(text=ANSWER, delay=0.5 if document == "document 0" else 0.0)  # noqa: E731
    with FakeEndpoint(plan) as server:
        order = [index for index, _ in Endpoint(server.url, "m", config=QUICK).generate(requests_for(3))]
    assert order[-1] == 0


def test_error_of_the_request_stream_reaches_the_caller() -> None:
    def broken() -> Iterator[Request]:
        yield requests_for(1)[0]
        raise RuntimeError("the source broke")

    with (
        FakeEndpoint(lambda document, attempt: Reply(text=ANSWER)) as server,
        pytest.raises(RuntimeError, match="the source broke"),
    ):
        list(Endpoint(server.url, "m", config=QUICK).generate(broken()))


# ---- secrets and settings -----------------------------------------------------------------------------------


def test_key_appears_nowhere(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("WHYRANK_API_KEY", f" {CANARY}\n")
    echo = b"Incorrect API key provided: " + b"." * 165 + CANARY.encode() + b"."  # the cut at 200 falls into the key
    plan: Plan = lambda document, attempt: {  # noqa: E731
        "document 0": Reply("status", status=400, body=echo),
        "document 1": Reply("raw", body=echo),
        "document 2": Reply("status", status=500, body=echo),
        "document 3": Reply("reset"),
        "document 4": Reply(text=ANSWER, finish_reason=CANARY),
    }[document]
    with FakeEndpoint(plan) as server:
        endpoint = Endpoint(server.url, "m", config=replace(QUICK, max_retries=1))
        found = dict(endpoint.generate(requests_for(5)))
    assert server.seen[0].headers["Authorization"] == f"Bearer {CANARY}"
    errors = [completion.error for completion in found.values() if completion.error is not None]
    assert len(errors) == 5
    shown = [repr(endpoint), str(endpoint), endpoint.name, repr(found), caplog.text]
    shown += ["".join(traceback.format_exception(error)) for error in errors]
    assert not [text for text in shown if "canary" in text]
    assert "[key" in failed(found[0])
    assert all(len(str(error)) < 400 and "\n" not in str(error) for error in errors)


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8000/v1", "ftp://127.0.0.1/v1", "file:///etc/passwd", "", "http://", "http:///v1", "//host/v1"),
        *(f"http://user:{CANARY}@host/v1", f"http://{CANARY}@host", f"http://host/v1?key={CANARY}"),
        *(f"http://host/v1#{CANARY}", "http://host:port/v1", "http://ho st/v1", "http://host/v1\n", "http://[::1/v1"),
    ],
)
def test_address_must_be_plain(url: str) -> None:
    with pytest.raises(InputError, match="endpoint: ") as caught:
        Endpoint(url, "m")
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_key_that_cannot_stand_in_a_header_is_not_shown() -> None:
    with pytest.raises(InputError, match="API key") as caught:
        Endpoint("http://127.0.0.1/v1", "m", api_key=f"{CANARY}\r\nX: y")
    assert CANARY not in str(caught.value)


def test_https_is_not_turned_into_http() -> None:
    with FakeEndpoint(lambda document, attempt: Reply(text=ANSWER)) as server:
        url = server.url.replace("http:", "https:")
        [(_, completion)] = Endpoint(url, "m", config=replace(QUICK, max_retries=0)).generate(requests_for(1))
    assert "ConnectError" in failed(completion)
    assert server.seen == []


def test_name_is_the_configuration() -> None:
    assert Endpoint("http://127.0.0.1:8000/v1/", "a/b").name == "endpoint:http://127.0.0.1:8000/v1#a/b"
    assert Endpoint("https://host/v1/chat/completions", "m").name == "endpoint:https://host/v1#m"


@pytest.mark.parametrize(
    "values",
    [
        *({"concurrency": 0}, {"max_retries": -1}, {"num_label_tokens": 0}, {"timeout": 0.0}),
        *({"deadline": math.inf}, {"first_pause": -1.0}, {"longest_pause": math.nan}),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"endpoint: expected {next(iter(values))} to be"):
        EndpointConfig(**values)


# ---- log-probabilities --------------------------------------------------------------------------------------


def tokens_of(parts: list[str], label: int, top: dict[str, float]) -> dict[str, Any]:
    """Log-probabilities in the wire form; `top` are the probabilities listed for part number `label`."""
    listed = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
    content: list[dict[str, Any]] = [{"token": part, "logprob": 0.0, "top_logprobs": []} for part in parts]
    content[label] |= {"logprob": math.log(top.get(parts[label], 0.5)), "top_logprobs": listed}
    return {"content": content}


PARTS = ["Explanation:", " It names", " the valve.", "\n\n", "Relevance", " Label:", " 2", " ##"]


def distribution(
    parts: list[str], top: dict[str, float], *, label: int = -2, template: Template = TEMPLATE, logprobs: Any = None
) -> Completion:
    reply = Reply(text="".join(parts), logprobs=logprobs or tokens_of(parts, label, top))
    with FakeEndpoint(lambda document, attempt: reply) as server:
        endpoint = Endpoint(server.url, "m", config=replace(QUICK, has_logprobs=True))
        [(_, completion)] = endpoint.generate(requests_for(1, template))
    return completion


def test_distribution_is_read_where_the_label_stands() -> None:
    found = distribution(PARTS, {" 2": 0.5, "2": 0.1, " 1": 0.25, " 0": 0.05, " high": 0.1})
    assert found.text == "It names the valve."
    assert found.label_probs == pytest.approx((0.05, 0.25, 0.6))  # " 2" and "2" are the same label


def test_label_that_is_not_listed_has_no_probability_only_if_nearly_all_is_listed() -> None:
    found = distribution(PARTS, {" 2": 0.9, " 1": 0.095})
    assert found.label_probs == pytest.approx((0.0, 0.095, 0.9))
    found = distribution(PARTS, {" 2": 0.9, " 1": 0.05})
    assert (found.text, found.label_probs) == ("".join(PARTS), None)


def test_beginning_of_an_unlisted_label_leaves_the_distribution_unknown() -> None:
    eleven = Template.load("explain-0-10")
    listed = {f" {n}": 0.05 for n in range(10)} | {" 1": 0.545}  # together 0.995
    parts = [*PARTS[:-2], " 1", " ##"]
    assert distribution(parts, listed, template=eleven).label_probs is None  # " 1" may go on to " 10"
    known = distribution(parts, listed | {" 10": 0.01}, template=eleven).label_probs
    assert known == pytest.approx((0.05, 0.545, *[0.05] * 8, 0.01))
    split = [*PARTS[:-2], " 1", "0", " ##"]
    assert distribution(split, listed | {" 10": 0.01}, label=-3, template=eleven).label_probs is None


@pytest.mark.parametrize(
    "parts",
    [
        [*PARTS[:-1], " or", " 1", " ##"],  # not one label
        ["Relevance Label: 0 ##\n", *PARTS],  # a different label line before
        ["<think>x</think>", *PARTS],  # only the template knows what a thought is
        [*PARTS[:3], " Relevance", " Label:", " 2", " ##"],  # not on a line of its own
        [*PARTS, "\nSo it helps."],
        [*PARTS[:-3], " Label: 2", " ##"],  # the label has no token of its own
    ],
)
def test_unclear_answer_is_left_to_the_template(parts: list[str]) -> None:
    position = parts.index(" 2") if " 2" in parts else -2
    found = distribution(parts, {" 2": 0.9, " 1": 0.05, " 0": 0.05}, label=position)
    assert (found.text, found.label_probs) == ("".join(parts), None)


@pytest.mark.parametrize(
    "logprobs", [{"content": None}, {"tokens": ["2"]}, "none", {"content": [{"token": "2", "logprob": 0.0}]}]
)
def test_other_forms_of_logprobs_are_no_error(logprobs: Any) -> None:
    found = distribution(PARTS, {}, logprobs=logprobs)
    assert (found.text, found.label_probs, found.error) == ("".join(PARTS), None, None)
