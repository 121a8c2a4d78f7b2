"""Triton's HTTP against the real server: models of token ids and of text, whole answers and streams; and its errors."""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from servers import raw

from evaluator.errors import EvaluateError, NotFoundError, OptionsError
from evaluator.explain import explain
from evaluator.measure import COUNTED_S
from evaluator.protocols import http, triton_http
from evaluator.protocols.base import Answer, Connection, Endpoint, RequestError, ServedModel
from evaluator.protocols.choose import choose
from evaluator.protocols.triton_models import FT_T5, Signature, Tensor
from evaluator.tokenizers import Prompt
from model_repository.server import TritonServer

HERE = Path(__file__).parent
SPECIAL = {"end_id": 1, "pad_id": 0}


@pytest.fixture(scope="module")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Triton with the models of text_models/."""
    folder = tmp_path_factory.mktemp("triton-http")
    for config in sorted((HERE / "text_models").glob("*/config.pbtxt")):
        version = folder / "repository" / config.parent.name / "1"
        version.mkdir(parents=True)
        shutil.copy(config, version.parent)
        if config.parent.name != "wrapped":
            shutil.copy(HERE / "text_models" / "words.py", version / "model.py")
    with TritonServer(folder / "repository", log_path=folder / "triton.log") as server:
        yield f"http://127.0.0.1:{server.http_port}"


def connected(url: str, model: str, do: Callable[[Any], Awaitable[Any]], **options: Any) -> Any:
    connection = Connection(url, model, 10.0, special=SPECIAL, **options)

    async def run() -> Any:
        async with choose("auto", url)(connection) as endpoint:
            return await do(endpoint)

    return asyncio.run(run())


def ask(url: str, model: str, prompt: Prompt, most: int = 24, **options: Any) -> Answer:
    async def one(endpoint: Endpoint) -> Answer:
        return await endpoint.send(endpoint.serialize(prompt, most))

    answer = connected(url, model, one, **options)
    assert isinstance(answer, Answer)
    return answer


async def described(endpoint: Endpoint) -> tuple[ServedModel, bool, bool, bool]:
    return endpoint.model, endpoint.takes_ids, endpoint.continues, endpoint.repeats


def text(prompt: str) -> Prompt:
    return Prompt(prompt, None, False)


# token ids


def test_ids_go_there_and_back(triton: Any) -> None:
    """The same model as over gRPC: the first of two beams, up to its length, the end token among it."""
    url = f"http://127.0.0.1:{triton.http_port}"
    assert ask(url, "echo", Prompt("", [5, 70000, 7, 1], False)) == Answer(ids=[7, 70000, 5, 1])
    assert ask(url, "echo", Prompt("", [5, 70000, 7, 1], False), most=2) == Answer(ids=[7, 70000])
    assert ask(url + "/v2/models/echo", "unbatched", Prompt("", [5, 6, 1], False)) == Answer(ids=[6, 5])
    assert connected(url, "echo", described) == (ServedModel("echo", "1", "ab" * 32), True, False, False)
    assert connected(url, "unbatched", described)[0] == ServedModel("unbatched", "10", None)


def test_a_refused_request_has_the_servers_own_message(triton: Any) -> None:
    with pytest.raises(RequestError) as raised:
        ask(f"http://127.0.0.1:{triton.http_port}", "echo", Prompt("", [342, 1], False))
    assert raised.value.status == "HTTP 400"
    assert "token 342 refused" in str(raised.value)


def test_a_decoupled_model_of_ids_is_for_grpc(triton: Any) -> None:
    with pytest.raises(OptionsError, match="mend: --protocol grpc"):
        ask(f"http://127.0.0.1:{triton.http_port}", "decoupled", Prompt("", [5, 1], False))


def test_a_model_that_is_not_there_is_named_with_those_that_are(triton: Any) -> None:
    with pytest.raises(NotFoundError, match=r"found no model of that name\n  models ready there: decoupled echo slow "):
        ask(f"http://127.0.0.1:{triton.http_port}", "nope", Prompt("", [5, 1], False))


def test_the_grpc_port_is_no_place_for_http(triton: Any) -> None:
    with pytest.raises(OptionsError, match=r"mend: this is a gRPC port"):
        ask(f"http://127.0.0.1:{triton.grpc_port}", "echo", Prompt("", [5, 1], False))


def test_the_server_says_how_long_requests_waited(triton: Any) -> None:
    async def measured(endpoint: triton_http.TritonHttp) -> Any:
        await asyncio.sleep(COUNTED_S)
        before = await endpoint.statistics()
        for _ in range(3):
            await endpoint.send(endpoint.serialize(Prompt("", [5, 1], False), 24))
        await asyncio.sleep(COUNTED_S)
        return await endpoint.statistics(before)

    found = connected(f"http://127.0.0.1:{triton.http_port}", "echo", measured)["echo"]
    assert (found["requests"], found["executions"]) == (3, 3)
    assert 0 < found["compute_s"] < 5


# text


@pytest.mark.parametrize("model", ["text", "wrapped", "stream"])
def test_text_goes_there_and_back(model: str, text_server: str) -> None:
    assert ask(text_server, model, text("ein zwei “drei”\tvier")) == Answer(text="vier “drei” zwei ein")
    assert ask(text_server, model, text("one two three"), most=2) == Answer(text="three two")
    with pytest.raises(RequestError, match="no kernels here"):
        ask(text_server, model, text("a kernel"))


def test_what_a_text_model_says_of_itself(text_server: str) -> None:
    """An ensemble has no weights: the digest is that of the model it calls. None gives the prompt back."""
    digest = "cd" * 32
    assert connected(text_server, "text", described) == (ServedModel("text", "1", digest), False, False, False)
    assert connected(text_server, "wrapped", described) == (ServedModel("wrapped", "1", digest), False, False, False)
    assert connected(text_server, "stream", described) == (ServedModel("stream", "1", None), False, False, False)


def test_a_stream_brings_a_part_at_a_time(text_server: str) -> None:
    answer = ask(text_server, "stream", text("one two three"), stream=True)
    assert answer.text == "three two one"
    assert len(answer.arrivals) == 3
    with pytest.raises(RequestError, match="no kernels here"):
        ask(text_server, "stream", text("a kernel"), stream=True)


def test_parameters_are_inputs_of_the_model(text_server: str) -> None:
    assert ask(text_server, "text", text("one two"), parameters={"temperature": "0.5"}).text == "two one"
    with pytest.raises(OptionsError, match=r"--parameter: model text has no input top_k"):
        ask(text_server, "text", text("one two"), parameters={"top_k": "5"})
    assert ask(text_server, "stream", text("one two three"), parameters={"max_tokens": "1"}).text == "three"


# what Triton itself says when it is called wrongly


def test_more_responses_than_one_without_a_stream_are_explained(text_server: str) -> None:
    with pytest.raises(RequestError) as raised:
        ask(text_server, "stream", text("two responses"))
    assert raised.value.status == "STREAM_ERROR"
    assert "--stream" in (explain(raised.value.status, str(raised.value)) or "")


def test_a_decoupled_model_called_unary_is_explained(text_server: str, triton: Any) -> None:
    async def infer() -> None:
        connection = Connection(text_server, "stream", 10.0)
        inputs = [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a"]}]
        async with http.opened(connection) as client:
            await client.post(f"{text_server}/v2/models/stream/infer", json.dumps({"inputs": inputs}).encode())

    with pytest.raises(RequestError) as refusal:
        asyncio.run(infer())
    assert "--stream" in (explain(refusal.value.status, str(refusal.value)) or "")

    status, message = called(f"127.0.0.1:{triton.grpc_port}", "decoupled")
    assert status == "UNIMPLEMENTED"
    assert "--stream" in (explain(status, message) or "")


def test_an_unknown_model_is_explained(triton: Any) -> None:
    status, message = called(f"127.0.0.1:{triton.grpc_port}", "nope")
    assert status == "NOT_FOUND"
    assert "--model" in (explain(status, message) or "")


def called(address: str, model: str) -> tuple[str, str]:
    """Status and message of a unary call that fails."""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        with pytest.raises(grpc.RpcError) as raised:
            infer(service_pb2.ModelInferRequest(model_name=model))
    return raised.value.code().name, raised.value.details()


# bodies, byte by byte


def test_shapes_follow_the_ranks_that_the_server_states() -> None:
    """`unbatched` has 2 ranks everywhere; a model may have 1 or 3."""
    tensors = {
        "input_ids": Tensor("INT64", 3),
        "sequence_length": Tensor("INT32", 1),
        "max_output_len": Tensor("INT32", 2),
    }
    known = Signature(FT_T5, tensors, ("output_ids",), False, {})
    body = triton_http.infer_request(known, Prompt("", [5, 6, 1], False), 24, Connection("http://h", "m", 1.0))
    assert json.loads(body) == {
        "inputs": [
            {"name": "input_ids", "shape": [1, 1, 3], "datatype": "INT64", "data": [5, 6, 1]},
            {"name": "sequence_length", "shape": [1], "datatype": "INT32", "data": [3]},
            {"name": "max_output_len", "shape": [1, 1], "datatype": "INT32", "data": [24]},
        ],
        "outputs": [{"name": "output_ids"}],
    }


# answers that break the promise


def outputs(*tensors: dict[str, Any]) -> dict[str, Any]:
    return {"outputs": list(tensors)}


IDS = {"name": "output_ids", "datatype": "INT32", "shape": [1, 2], "data": [5, 6]}


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {"outputs": None},
        outputs(IDS | {"data": None}),
        outputs(IDS | {"data": [5, 6.5]}),
        outputs(IDS | {"data": [5, "6"]}),
        outputs(IDS | {"data": [5, True]}),
        outputs(IDS | {"data": [5, 1 << 40]}),
        outputs(IDS | {"data": [[5, 6]]}),
        outputs(IDS | {"shape": ["1", 2]}),
        outputs(IDS | {"shape": [1, 1 << 70]}),
        outputs(IDS | {"datatype": "INT33"}),
        outputs(IDS | {"datatype": "BYTES"}),
        outputs({"name": "output_ids"}),
    ],
)
def test_a_response_that_breaks_the_promise_is_a_failed_request(answer: Any) -> None:
    with pytest.raises(RequestError, match=r"^MALFORMED_RESPONSE: "):
        triton_http.response_of(answer)


@pytest.mark.parametrize("answer", [b"[]", b'{"name": 5}', b'{"versions": "x"}', b"null", b'{"versions": ["1.5"]}'])
def test_a_server_that_describes_no_model_is_no_triton(answer: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(answer)}\r\n\r\n".encode()
    with raw.listening(raw.saying(head + answer)) as port, pytest.raises(EvaluateError):
        ask(f"http://127.0.0.1:{port}/v2", "m", text("a"))
