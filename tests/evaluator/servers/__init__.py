"""Small real servers of the foreign protocols, on loopback, built from the published shapes (see evaluator/protocols/).

    with serve("openai", demo_answers()) as server:
        server.url        what to give to --endpoint
        server.requests   what came: (path, JSON body, headers) of each call for a prediction
    server.most_open  the most calls that were "slow" at the same time

What they answer is a function of the prompt: the demo model's own predictions need no model here. `faults` says what
goes wrong, one entry for each call in order ("" for nothing); the last one holds for all that follow if `always`.

    503, 429, 422, 401, ...   this status, with the error body of the protocol
    garbage                   200, and no JSON
    truncated                 200, and the beginning of the JSON
    page                      200, and an HTML page
    fields                    200, and JSON without what is expected
    types                     200, and JSON with numbers for texts
    huge                      200, and JSON of 17 MiB
    slow                      a second before the answer
    half-open                 a stream, or a body, begins, and nothing more comes for a long time
    cut                       a stream, or a body, begins, and the connection is closed
    endless                   a stream ends in order, but without its mark
    error                     a stream has an event that says it failed
"""

import asyncio
import json
import re
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

ROOT = Path(__file__).parents[3]
MODEL = "demo"
TOKEN = r"\s*\S+|\s+$"  # what a "token" of these servers is: a word with the space before it

FAULT = web.RequestKey("fault", str)

Answers = Callable[[str], str]


@dataclass
class Call:
    """One call for a prediction."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass
class Server:
    """A running server."""

    url: str
    requests: list[Call] = field(default_factory=list)
    open: int = 0  # of the slow calls
    most_open: int = 0


def demo_answers(prompt: str = "summarize: {document}") -> Answers:
    """The reference predictions of the demo model, by prompt; of a prompt that was cut, the one that it begins."""
    folder = ROOT / "examples" / "ul2-tiny"
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text("utf-8").splitlines()]
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    known = {
        prompt.replace("{document}", row["document"]): prediction["prediction"]
        for row, prediction in zip(rows, predictions, strict=True)
    }

    def answer(text: str) -> str:
        return known.get(text) or next(known[whole] for whole in known if whole.startswith(text))

    return answer


@contextmanager
def serve(
    protocol: str,
    answers: Answers,
    faults: Sequence[str] = (),
    always: bool = False,
    tls: ssl.SSLContext | None = None,
    repeats: bool = True,
    models: Sequence[str] = (MODEL,),
    routes: Sequence[str] | None = None,
) -> Iterator[Server]:
    """Run a server of `protocol` until the block is left.

    Args:
        repeats: TorchServe and Vertex AI give the prompt back before the answer (vLLM's always does, others never).
        models: it has; the only one, where the protocol has one only, is the first.
        routes: only these paths are served, others are 404.
    """
    if not models:
        raise ValueError("a server has a model")
    server = Server("")
    spoken = PROTOCOLS[protocol](answers, repeats, list(models))
    application = web.Application(middlewares=[_faulty(server, spoken, list(faults), always, routes)])
    application.add_routes(spoken.routes())
    loop = asyncio.new_event_loop()
    started: list[int] = []
    ready = threading.Event()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(application, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        started.append(runner.addresses[0][1])
        return runner

    runners: list[web.AppRunner] = []

    def work() -> None:
        asyncio.set_event_loop(loop)
        runners.append(loop.run_until_complete(start()))
        ready.set()
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(10)
    server.url = f"{'https' if tls else 'http'}://127.0.0.1:{started[0]}{spoken.path}"
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runners[0].cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _faulty(
    server: Server, spoken: "Protocol", faults: list[str], always: bool, routes: Sequence[str] | None
) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if routes is not None and request.path not in routes:
            return web.Response(status=404)
        if request.method != "POST" or request.path.endswith("/index"):
            return await handler(request)
        body = await request.json()
        server.requests.append(Call(request.path, body, dict(request.headers)))
        fault = faults[0] if faults else ""
        if len(faults) > 1 or not always:
            faults[:1] = []
        request[FAULT] = fault
        if fault.isdecimal():
            return web.json_response(spoken.error(int(fault)), status=int(fault))
        if fault == "slow":
            server.open += 1
            server.most_open = max(server.most_open, server.open)
            try:
                await asyncio.sleep(1)
            finally:
                server.open -= 1
        if fault in BODIES:
            return web.Response(body=BODIES[fault], content_type="text/html" if fault == "page" else "application/json")
        return await handler(request)

    return middleware


BODIES = {
    "garbage": b"\x00\xff not JSON",
    "truncated": b'{"text": ["The answ',
    "page": b"<html><head><title>Welcome</title></head><body><p>Nothing to see</p></body></html>",
    "fields": b'{"id": "1", "choices": [], "text": [], "predictions": [], "outputs": []}',
    "types": b'{"choices": [{"text": 1}], "text": [1], "generated_text": 1, "predictions": [1], "outputs": [1]}',
    "huge": b'{"text": ["' + b"x" * (17 << 20) + b'"]}',
}


class Protocol:
    """What the servers share."""

    path = ""  # of the URL

    def __init__(self, answers: Answers, repeats: bool, models: list[str]) -> None:
        self.answers = answers
        self.repeats = repeats
        self.models = models

    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

    def error(self, status: int) -> Any:
        """The body of an error."""
        return {"error": {"message": f"the server says {status}", "type": "Error", "code": status}}

    async def whole(self, request: web.Request, answer: Any) -> web.StreamResponse:
        """The JSON of an answer, or what the fault leaves of it."""
        fault = request[FAULT]
        text = json.dumps(answer).encode()
        if fault not in ("half-open", "cut"):
            return web.Response(body=text, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(text))})
        await response.prepare(request)
        await response.write(text[: len(text) // 2])
        return await self._broken(request, response)

    async def stream(
        self, request: web.Request, events: Sequence[bytes], mark: bytes = b"", kind: str = "text/event-stream"
    ) -> web.StreamResponse:
        """The events, then the mark; each is cut in two on the wire, so that chunks are no events."""
        fault = request[FAULT]
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        if fault == "error":
            events = [*events[:1], self.error_event(500)]
        if fault in ("half-open", "cut", "endless"):
            events, mark = events[: max(1, len(events) // 2)], b""
        for event in [*events, mark]:
            middle = len(event) // 2
            for part in (event[:middle], event[middle:]):
                if part:
                    await response.write(part)
                    await asyncio.sleep(0)
        if fault in ("half-open", "cut"):
            return await self._broken(request, response)
        await response.write_eof()
        return response

    def error_event(self, status: int) -> bytes:
        """An event that says the request failed."""
        return b"data: " + json.dumps(self.error(status)).encode() + b"\n\n"

    async def _broken(self, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        if request[FAULT] == "half-open":
            await asyncio.sleep(60)  # ended by the client, or by cleanup
        if request.transport is not None:
            request.transport.close()
        return response

    def tokens(self, text: str) -> list[str]:
        return re.findall(TOKEN, text)


class OpenAI(Protocol):
    """vLLM's, as its benchmark's client reads it."""

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/models", self.list), web.post("/v1/completions", self.complete)]

    async def list(self, _: web.Request) -> web.Response:
        entries = [{"id": name, "object": "model", "created": 1, "owned_by": "vllm"} for name in self.models]
        return web.json_response({"object": "list", "data": entries})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text = self.answers(body["prompt"])
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
        tokens = self.tokens(text)
        usage = {"prompt_tokens": 7, "completion_tokens": len(tokens), "total_tokens": 7 + len(tokens)}
        if not body.get("stream"):
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
            return await self.whole(request, {**head, "choices": [choice], "usage": usage})
        choices = [{"index": 0, "text": token, "logprobs": None, "finish_reason": None} for token in tokens]
        choices.append({"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"})
        events: list[dict[str, Any]] = [{**head, "choices": [choice]} for choice in choices]
        if body.get("stream_options", {}).get("include_usage"):
            events.append({**head, "choices": [], "usage": usage})
        told = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
        return await self.stream(request, told, b"data: [DONE]\n\n")


class Vllm(Protocol):
    """vllm.entrypoints.api_server."""

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/health", self.health), web.post("/generate", self.generate)]

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    def error(self, status: int) -> Any:
        return {"detail": f"the server says {status}"}

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt, tokens = body["prompt"], self.tokens(self.answers(body["prompt"]))
        if not body.get("stream"):
            return await self.whole(request, {"text": [prompt + "".join(tokens)]})
        texts = [prompt + "".join(tokens[: number + 1]) for number in range(len(tokens))] or [prompt]
        lines = [json.dumps({"text": [text]}).encode() + b"\n" for text in texts]
        return await self.stream(request, lines, kind="text/plain; charset=utf-8")


class Tgi(Protocol):
    """Text Generation Inference; its end token is an event with a text of its own."""

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/info", self.info),
            web.get("/health", self.health),
            web.post("/generate", self.generate),
            web.post("/generate_stream", self.generate_stream),
        ]

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_id": self.models[0], "model_sha": "c0ffee", "version": "3.0.0"})

    def error(self, status: int) -> Any:
        return {"error": f"the server says {status}", "error_type": "validation"}

    async def generate(self, request: web.Request) -> web.StreamResponse:
        text = self.answers((await request.json())["inputs"])
        details = {"finish_reason": "eos_token", "generated_tokens": len(self.tokens(text)), "seed": None}
        return await self.whole(request, {"generated_text": text, "details": details})

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        text = self.answers((await request.json())["inputs"])
        tokens = [*self.tokens(text), "</s>"]
        events = []
        for number, token in enumerate(tokens, start=1):
            last = number == len(tokens)
            event = {
                "index": number,
                "token": {"id": 5, "text": token, "logprob": -0.5, "special": last},
                "generated_text": text if last else None,
                "details": {"finish_reason": "eos_token", "generated_tokens": number, "seed": None} if last else None,
            }
            events.append(b"data:" + json.dumps(event).encode() + b"\n\n")
        return await self.stream(request, [b": keep-alive\n\n", *events])


class TorchServe(Protocol):
    """TorchServe, with a handler that gives the prompt back as GPT-2's does."""

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/ping", self.ping), web.post("/predictions/{model}", self.predict)]

    async def ping(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "Healthy"})

    def error(self, status: int) -> Any:
        return {"code": status, "type": "InternalServerException", "message": f"the server says {status}"}

    async def predict(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        if name not in self.models:
            error = {"code": 404, "type": "ModelNotFoundException", "message": f"Model not found: {name}"}
            return web.json_response(error, status=404)
        prompts = (await request.json())["instances"]
        texts = [(prompt if self.repeats else "") + self.answers(prompt) for prompt in prompts]
        return await self.whole(request, {"predictions": texts})


class Vertex(Protocol):
    """An endpoint of Vertex AI; wants a token."""

    path = "/v1/projects/p/locations/europe-west4/endpoints/42"

    def routes(self) -> list[web.RouteDef]:
        return [web.post(self.path + ":predict", self.predict)]

    def error(self, status: int) -> Any:
        return {"error": {"code": status, "message": f"the server says {status}", "status": "INVALID_ARGUMENT"}}

    async def predict(self, request: web.Request) -> web.StreamResponse:
        if not request.headers.get("Authorization", "").startswith("Bearer "):
            error = {"code": 401, "message": "Request is missing required authentication", "status": "UNAUTHENTICATED"}
            return web.json_response({"error": error}, status=401)
        prompts = [
            instance["prompt"] if isinstance(instance, dict) else instance
            for instance in (await request.json())["instances"]
        ]
        texts = [(prompt if self.repeats else "") + self.answers(prompt) for prompt in prompts]
        answer = {"predictions": texts, "deployedModelId": "7", "model": "projects/1/models/m", "modelVersionId": "3"}
        return await self.whole(request, answer)


PROTOCOLS: dict[str, type[Protocol]] = {
    "openai": OpenAI,
    "vllm": Vllm,
    "tgi": Tgi,
    "torchserve": TorchServe,
    "vertex": Vertex,
}
