"""Each foreign protocol against a small real server of it (servers/): answers, streams, what goes wrong."""

import asyncio
import json
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import servers
from servers import MODEL, raw, tls
from servers.asking import TEXT, TOKEN, TOKENS, ask, connected, without, words

from evaluator.errors import EvaluateError, NotFoundError, OptionsError, TransientError
from evaluator.protocols import http
from evaluator.protocols.base import Answer, Connection, Endpoint, RequestError, ServedModel
from evaluator.protocols.openai import OpenAI
from evaluator.protocols.torchserve import prediction_of
from evaluator.protocols.vllm import Vllm
from evaluator.tokenizers import Prompt

PROTOCOLS = tuple(servers.PROTOCOLS)
STREAMS = ("openai", "vllm", "tgi")
REPEATS = ("vllm", "torchserve", "vertex")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_whole_data_set_comes_back_as_the_reference(protocol: str, example: Path) -> None:
    """500 prompts, eight at a time: the demo model's own predictions, each for its prompt."""
    lines = (example / "predictions.jsonl").read_text("utf-8").splitlines()
    documents = [json.loads(line)["document"] for line in (example / "test.jsonl").read_text("utf-8").splitlines()]
    prompts = [f"summarize: {document}" for document in documents]

    async def everything(endpoint: Endpoint) -> list[str]:
        assert not endpoint.takes_ids
        assert endpoint.repeats == (protocol in REPEATS)
        gate = asyncio.Semaphore(8)

        async def one(prompt: str) -> str:
            async with gate:
                answer = await endpoint.send(endpoint.serialize(Prompt(prompt, None, False), 24))
            return without(prompt, answer.text) if endpoint.repeats else answer.text or ""

        return await asyncio.gather(*map(one, prompts))

    with servers.serve(protocol, servers.demo_answers()) as server:
        found = connected(server.url, protocol, everything, stream=protocol in STREAMS)
    assert found == [json.loads(line)["prediction"] for line in lines]
    assert len(server.requests) == 500


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_sent(protocol: str) -> None:
    """Greedy, the length asked for, the model's name, and what --parameter adds or overrides."""
    parameters = {"top_k": "5", "stop": "a text", "seed": "null"}
    expected = {
        "openai": {"model": MODEL, "prompt": "the prompt", "max_tokens": 24, "temperature": 0, "stream": False},
        "vllm": {"prompt": "the prompt", "max_tokens": 24, "temperature": 0, "stream": False},
        "tgi": {"inputs": "the prompt", "parameters": {"max_new_tokens": 24, "do_sample": False, "details": True}},
        "torchserve": {"instances": ["the prompt"]},
        "vertex": {"instances": ["the prompt"], "parameters": {"maxOutputTokens": 24, "temperature": 0}},
    }[protocol]
    added = {"top_k": 5, "stop": "a text", "seed": None}
    into = expected.get("parameters", expected)
    assert isinstance(into, dict)
    into |= added
    with servers.serve(protocol, words) as server:
        ask(server.url, protocol, parameters=parameters)
    (call,) = server.requests
    assert call.body == expected
    assert call.headers["Content-Type"] == "application/json"
    assert call.headers["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_whole_answer(protocol: str) -> None:
    with servers.serve(protocol, words) as server:
        answer = ask(server.url, protocol)
    expected = "the prompt" + TEXT if protocol in REPEATS else TEXT
    assert answer == Answer(text=expected, tokens=TOKENS if protocol in ("openai", "tgi") else None)


@pytest.mark.parametrize("protocol", STREAMS)
def test_a_stream_gives_the_same_text_and_when_each_part_came(protocol: str) -> None:
    with servers.serve(protocol, words) as server:
        before = time.perf_counter()
        answer = ask(server.url, protocol, stream=True)
    assert answer.text == ("the prompt" + TEXT if protocol == "vllm" else TEXT)
    # The end token of TGI is one of the tokens, but brings nothing to read.
    assert answer.tokens == {"openai": TOKENS, "vllm": None, "tgi": TOKENS + 1}[protocol]
    assert len(answer.arrivals) == TOKENS
    assert before < answer.arrivals[0]
    assert list(answer.arrivals) == sorted(answer.arrivals)


@pytest.mark.parametrize("protocol", STREAMS)
def test_an_empty_stream_is_an_empty_answer_without_arrivals(protocol: str) -> None:
    with servers.serve(protocol, lambda _: "") as server:
        answer = ask(server.url, protocol, stream=True)
    assert without("the prompt", answer.text) == ""
    assert answer.arrivals == ()


def failed(protocol: str, fault: str, **options: Any) -> RequestError:
    with servers.serve(protocol, words, [fault]) as server, pytest.raises(RequestError) as raised:
        ask(server.url, protocol, **options)
    return raised.value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("503", "UNAVAILABLE", "HTTP 503: the server says 503"),
        ("429", "UNAVAILABLE", "HTTP 429: the server says 429"),
        ("422", "HTTP 422", "the server says 422"),
        ("500", "HTTP 500", "the server says 500"),
        ("garbage", "MALFORMED_RESPONSE", "expected JSON, found '\\x00� not JSON'"),
        ("truncated", "MALFORMED_RESPONSE", 'expected JSON, found \'{"text": ["The answ\''),
        ("page", "MALFORMED_RESPONSE", "expected JSON, found '<html>"),
        ("fields", "MALFORMED_RESPONSE", "expected the field "),
        ("types", "MALFORMED_RESPONSE", "expected another type in the field "),
        ("huge", "MALFORMED_RESPONSE", "expected an answer of at most 16777216 bytes"),
        ("cut", "UNAVAILABLE", "the connection was lost in the middle of the answer"),
        ("half-open", "DEADLINE_EXCEEDED", "no complete answer within 0.3 s"),
        ("slow", "DEADLINE_EXCEEDED", "no complete answer within 0.3 s"),
    ],
)
def test_a_failed_request_says_what_went_wrong(protocol: str, fault: str, status: str, message: str) -> None:
    error = failed(protocol, fault, timeout_s=0.3 if fault in ("slow", "half-open") else 10.0)
    assert error.status == status
    assert message in str(error)
    assert len(str(error)) < 450


LOST = "the connection was lost in the middle of the answer"


@pytest.mark.parametrize(
    ("protocols", "fault", "status", "message"),
    [
        (STREAMS, "503", "UNAVAILABLE", "HTTP 503: the server says 503"),
        (STREAMS, "cut", "UNAVAILABLE", LOST),
        (STREAMS, "half-open", "DEADLINE_EXCEEDED", "no complete answer within 0.3 s"),
        (("openai",), "garbage", "MALFORMED_RESPONSE", "expected data: [DONE] at the end of the stream, found none"),
        (("tgi",), "page", "MALFORMED_RESPONSE", "expected generated_text in the last event of the stream, found none"),
        (("vllm",), "page", "MALFORMED_RESPONSE", "expected JSON, found '<html>"),
        (("openai",), "endless", "MALFORMED_RESPONSE", "expected data: [DONE]"),
        (("tgi",), "endless", "MALFORMED_RESPONSE", "expected generated_text"),
        (("openai", "tgi"), "error", "STREAM_ERROR", "the server says 500"),
    ],
)
def test_a_failed_stream_says_what_went_wrong(
    protocols: tuple[str, ...], fault: str, status: str, message: str
) -> None:
    for protocol in protocols:
        error = failed(protocol, fault, stream=True, timeout_s=0.3 if fault == "half-open" else 10.0)
        assert error.status == status
        assert message in str(error)


def test_the_request_after_a_failed_one_is_answered() -> None:
    """A stream that was given up must not leave its connection to the next request."""

    async def both(endpoint: Endpoint) -> list[str | None]:
        request = endpoint.serialize(Prompt("the prompt", None, False), 24)
        found: list[str | None] = []
        for _ in range(4):
            try:
                found.append((await endpoint.send(request)).text)
            except RequestError as error:
                found.append(error.status)
        return found

    with servers.serve("openai", words, ["error", "cut", "503"]) as server:
        found = connected(server.url, "openai", both, stream=True)
    assert found == ["STREAM_ERROR", "UNAVAILABLE", "UNAVAILABLE", TEXT]


def test_nothing_is_sent_twice_by_the_client_itself() -> None:
    with servers.serve("openai", words, ["503", "302", "cut"], always=True) as server:
        for _ in range(3):
            with pytest.raises(RequestError):
                ask(server.url, "openai")
    assert len(server.requests) == 3


def test_a_server_that_goes_away_is_unavailable() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(servers.serve("openai", words))

        async def later(endpoint: Endpoint) -> None:
            stack.close()  # the connection that was kept may be seen to be closed now or when it is used
            await endpoint.send(endpoint.serialize(Prompt("the prompt", None, False), 24))

        with pytest.raises(RequestError, match=r"^UNAVAILABLE: (127.0.0.1:\d+: Connection refused|Server disconn\w+)$"):
            connected(server.url, "openai", later)


def test_requests_do_not_wait_for_each_other() -> None:
    """A limit of the client's own, such as aiohttp's 100 connections, would be measured as the server's."""

    async def many(endpoint: Endpoint) -> None:
        request = endpoint.serialize(Prompt("the prompt", None, False), 24)
        await asyncio.gather(*(endpoint.send(request) for _ in range(120)))

    with servers.serve("openai", words, ["slow"], always=True) as server:
        connected(server.url, "openai", many)
    assert server.most_open > 100


def streamed(answer: bytes, protocol: str) -> Answer:
    """The answer that is made of these bytes of a stream, by an endpoint without a preflight."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    with raw.listening(raw.saying(head + answer)) as port:
        connection = Connection(f"http://127.0.0.1:{port}", MODEL, 10.0, stream=True)

        async def run() -> Answer:
            async with http.opened(connection) as client:
                kind = {"openai": OpenAI, "vllm": Vllm}[protocol]
                endpoint = kind(client, connection.endpoint, ServedModel(MODEL, "", None), connection)
                return await endpoint.send(endpoint.serialize(Prompt("p: ", None, False), 24))

        return asyncio.run(run())


def test_a_line_of_vllm_without_anything_new_is_no_arrival() -> None:
    texts = ["p: ", "p: a", "p: a", "p: a b"]
    answer = streamed(b"".join(json.dumps({"text": [text]}).encode() + b"\0" for text in texts), "vllm")
    assert (answer.text, len(answer.arrivals)) == ("p: a b", 2)


def test_servers_that_repeat_the_usage_or_leave_it_out_later() -> None:
    events = [
        {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}},
        {"choices": [{"text": ""}], "usage": {"completion_tokens": 2}},
        {"choices": [{"text": "b"}], "usage": None},
    ]
    told = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    answer = streamed(told, "openai")
    assert (answer.text, answer.tokens, len(answer.arrivals)) == ("ab", 2, 2)


@pytest.mark.parametrize("prediction", ["text", ["text"], {"generated_text": "text"}, [{"summary_text": "text"}]])
def test_a_handler_may_wrap_its_text(prediction: Any) -> None:
    assert prediction_of({"predictions": [prediction]}) == "text"


@pytest.mark.parametrize("prediction", [[], {}, ["a", "b"], [1], None])
def test_a_prediction_without_one_text_is_malformed(prediction: Any) -> None:
    with pytest.raises(RequestError, match=r"^MALFORMED_RESPONSE"):
        prediction_of({"predictions": [prediction]})


# preflight


@pytest.mark.parametrize(
    ("protocol", "found"),
    [("openai", "models there: a-model demo"), ("tgi", "found a server of a-model\n  mend: --model a-model")],
)
def test_a_model_that_is_not_there_is_named_with_those_that_are(protocol: str, found: str) -> None:
    with servers.serve(protocol, words, models=["a-model", MODEL]) as server, pytest.raises(NotFoundError) as raised:
        ask(server.url, protocol, model="nope")
    assert "expected nope" in str(raised.value)
    assert found in str(raised.value)


def test_torchserve_tells_with_the_first_request_which_model_it_has_not() -> None:
    with servers.serve("torchserve", words) as server, pytest.raises(RequestError) as raised:
        ask(server.url, "torchserve", model="nope")
    assert str(raised.value) == "HTTP 404: Model not found: nope"


def test_a_model_of_tgi_may_be_named_without_its_owner() -> None:
    async def model(endpoint: Endpoint) -> Any:
        return endpoint.model

    with servers.serve("tgi", words, models=["team/summaries"]) as server:
        for name in ("summaries", "team/summaries"):
            served = connected(server.url, "tgi", model, model=name)
            assert (served.name, served.version, served.manifest_sha256) == ("team/summaries", "c0ffee", None)


def test_vertex_says_which_version_answered() -> None:
    async def version(endpoint: Endpoint) -> str:
        await endpoint.send(endpoint.serialize(Prompt("p", None, False), 24))
        return endpoint.model.version

    with servers.serve("vertex", words) as server:
        assert connected(server.url, "vertex", version) == "3"


def test_parameters_of_a_vertex_instance() -> None:
    with servers.serve("vertex", words) as server:
        ask(server.url, "vertex", parameters={"instance.max_tokens": "24", "maxOutputTokens": "9"})
    assert server.requests[0].body == {
        "instances": [{"prompt": "the prompt", "max_tokens": 24}],
        "parameters": {"maxOutputTokens": 9, "temperature": 0},
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("protocol", [*PROTOCOLS[:-1], "auto"])
def test_nothing_there_is_not_reachable(protocol: str) -> None:
    with pytest.raises(TransientError, match=r"found UNAVAILABLE: 127.0.0.1:\d+: .*\n  mend: nothing listens there"):
        ask(f"http://127.0.0.1:{free_port()}", protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS[:-1])
@pytest.mark.parametrize(
    ("answer", "error", "found"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 19\r\n\r\nno healthy upstream", TransientError, "pods"),
        (
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 19\r\n\r\nRBAC: access denied",
            OptionsError,
            "AuthorizationPolicy",
        ),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", OptionsError, "--authority"),
        (b"HTTP/1.1 301 Moved\r\nLocation: https://x/\r\nContent-Length: 0\r\n\r\n", OptionsError, "https:// in --end"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", OptionsError, "check the endpoint and --protocol"),
        (b"", TransientError, "the server ended the connection"),
    ],
)
def test_a_preflight_that_fails_is_explained(
    protocol: str, answer: bytes, error: type[EvaluateError], found: str
) -> None:
    with raw.listening(raw.saying(answer)) as port, pytest.raises(error) as raised:
        ask(f"http://127.0.0.1:{port}", protocol)
    assert found in str(raised.value)


def test_google_is_not_called_without_a_token() -> None:
    url = "https://europe-west4-aiplatform.googleapis.com/v1/projects/p/locations/l/endpoints/4"
    with pytest.raises(OptionsError, match="EVALUATE_TOKEN"):
        ask(url, "vertex", headers={})


@pytest.mark.parametrize("protocol", ["torchserve", "vertex"])
def test_a_stream_is_refused_where_there_is_none(protocol: str) -> None:
    with pytest.raises(OptionsError, match="--stream"):
        ask("http://127.0.0.1:1/v1/endpoints/1", protocol, stream=True)


# the connection


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tls.Authority:
    return tls.Authority(tmp_path_factory.mktemp("tls"))


def test_tls_with_an_own_authority(authority: tls.Authority) -> None:
    certificate = authority.certificate("127.0.0.1")
    with servers.serve("openai", words, tls=certificate.context) as server:
        assert ask(server.url, "openai", ca_certificate=authority.file).text == TEXT
        with pytest.raises(OptionsError, match=r"TLS: .*certificate verify failed.*\n  mend: --ca-certificate"):
            ask(server.url, "openai")


def test_the_virtual_host_is_the_host_header_and_the_name_of_the_certificate(authority: tls.Authority) -> None:
    certificate = authority.certificate("models.example.com")
    with servers.serve("openai", words, tls=certificate.context) as server:
        options = {"ca_certificate": authority.file}
        ask(server.url, "openai", authority="models.example.com:8443", **options)
        with pytest.raises(OptionsError, match=r"TLS: .*mismatch.*\n  mend: .*--authority"):
            ask(server.url, "openai", **options)
    assert server.requests[0].headers["Host"] == "models.example.com:8443"


def test_an_authority_that_cannot_be_read_is_an_error_of_the_options(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(OptionsError, match="--ca-certificate: expected a PEM file"):
        ask("https://127.0.0.1:1", "openai", ca_certificate=str(tmp_path / "empty.pem"))
    with pytest.raises(NotFoundError, match=r"--ca-certificate: .*nothing at"):
        ask("https://127.0.0.1:1", "openai", ca_certificate=str(tmp_path / "missing.pem"))


def test_a_proxy_of_the_environment_is_used_but_for_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 4\r\n\r\nwho?"
    with raw.listening(raw.saying(refusal)) as port, servers.serve("openai", words) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(OptionsError, match=r"HTTP 407: who\?"):
            ask(server.url, "openai")
        with pytest.raises(OptionsError, match=r"HTTP 407: the proxy of https_proxy refuses"):
            ask(server.url.replace("http:", "https:"), "openai")
        monkeypatch.setenv("no_proxy", server.url.removeprefix("http://"))
        assert ask(server.url, "openai").text == TEXT


def test_silent_connections_are_probed() -> None:
    made = http._kept_alive(7.4)((socket.AF_INET, socket.SOCK_STREAM, 0, "", ()))
    with made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
    with servers.serve("openai", words) as server:
        assert ask(server.url, "openai", keepalive_s=7.4).text == TEXT


def test_a_secret_is_in_no_representation() -> None:
    connection = Connection("http://h", MODEL, 1.0, headers=TOKEN)
    assert "s3cret" not in repr(replace(connection, stream=True))
