"""Which protocol an endpoint speaks, and what may be given as one."""

import pytest
import servers
from servers.asking import TEXT, ask, without, words

from evaluator.errors import OptionsError, UsageError
from evaluator.protocols.choose import MODULES, choose, protocol_of

PROTOCOLS = tuple(servers.PROTOCOLS)


@pytest.mark.parametrize(
    ("endpoint", "protocol"),
    [
        ("host:8001", "grpc"),
        ("http://h/v2/", "http"),
        ("http://h/route/v2/models/m/infer", "http"),
        ("https://h/route/v1", "openai"),
        ("http://h/v1/completions/", "openai"),
        ("https://h/v1/projects/p/locations/l/endpoints/4", "vertex"),
        ("https://h/v1/projects/p/locations/l/endpoints/4:predict", "vertex"),
        ("http://h:8080/predict", "vertex"),
        ("http://h/predictions/m", "torchserve"),
        ("http://h/generate_stream", "tgi"),
        ("http://h/generate", "auto"),
        ("http://h/route", "auto"),
        ("http://v2/", "auto"),
    ],
)
def test_what_an_address_shows(endpoint: str, protocol: str) -> None:
    assert protocol_of(endpoint) == protocol


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_url_is_asked_what_it_is(protocol: str) -> None:
    with servers.serve(protocol, words) as server:
        assert without("the prompt", ask(server.url, "auto").text) == TEXT


def test_what_tells_nothing_is_refused_with_the_protocols_there_are() -> None:
    with servers.serve("vllm", words, routes=()) as server, pytest.raises(OptionsError) as raised:
        ask(server.url, "auto")
    assert "/v2: HTTP 404, /info: HTTP 404" in str(raised.value)
    assert "grpc http openai vllm tgi torchserve vertex" in str(raised.value)


@pytest.mark.parametrize(
    ("protocol", "ends"),
    [
        ("openai", ["/", "/v1", "/v1/", "/v1/completions"]),
        ("vllm", ["/generate"]),
        ("tgi", ["/generate", "/generate_stream"]),
        ("torchserve", ["/predictions/demo", "/predictions"]),
        ("vertex", [":predict"]),
    ],
)
def test_a_url_may_be_the_base_or_the_whole_path(protocol: str, ends: list[str]) -> None:
    with servers.serve(protocol, words) as server:
        for end in ends:
            assert without("the prompt", ask(server.url + end, protocol).text) == TEXT


@pytest.mark.parametrize("protocol", [protocol for protocol in MODULES if protocol != "grpc"])
@pytest.mark.parametrize(
    "endpoint", ["host:8000", "ftp://host/", "http://", "http://h/?key=s3cret", "http://a:s3cret@h/"]
)
def test_what_is_no_url_is_wrong_usage(protocol: str, endpoint: str) -> None:
    with pytest.raises(UsageError, match=r"--endpoint: expected .*found") as raised:
        ask(endpoint, protocol)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("endpoint", ["host", "http://host:8001", "host:0", "host:70000", "host:1/path", ":8001"])
def test_what_is_no_host_and_port_is_wrong_usage(endpoint: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        choose("grpc", endpoint)


@pytest.mark.parametrize("endpoint", ["host:8001", "10.0.0.1:8001", "[::1]:8001"])
def test_host_and_port_is_grpc(endpoint: str) -> None:
    assert choose("auto", endpoint).__module__.endswith("triton_grpc")
