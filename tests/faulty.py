"""A server that speaks Triton's gRPC and breaks in the ways a real one breaks only when nobody wants it to.

It answers as FasterTransformer's T5 does, with the prompt's ids backwards. `behave` says for each inference call,
counted from 0, what becomes of it: `ok`, a gRPC status in capitals, `garbage` (bytes that are no message), `wrong` (a
message without the promised tensor), `slow` (an answer after 0.2 s), `silent` (no answer, ever; of a stream none after
the first).
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import service_pb2

SERVICE = "inference.GRPCInferenceService"


class Faulty:
    """What it was asked: `calls` inference requests; `answered` holds the ids of those that got their answer."""

    def __init__(self, behave: Callable[[int], str], decoupled: bool) -> None:
        self.behave = behave
        self.decoupled = decoupled
        self.calls = 0
        self.answered: list[tuple[int, ...]] = []
        self.address = ""
        self._lock = threading.Lock()
        self._over = threading.Event()

    def infer(self, request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        """The answers to one request, serialised."""
        with self._lock:
            number = self.calls
            self.calls += 1
        what = self.behave(number)
        if what.isupper():
            context.abort(grpc.StatusCode[what], "as told")
        if what == "silent" and not self.decoupled:
            self._over.wait()
        if what == "slow":
            time.sleep(0.2)
        if what == "garbage":
            yield b"\xff\xff no message"
            return
        given = np.frombuffer(request.raw_input_contents[0], "<u4")
        ids = given[:-1][::-1].astype("<i4")
        parts = range(1, len(ids) + 1) if self.decoupled else [len(ids)]
        for part in parts:
            yield self.response(ids[:part], "other" if what == "wrong" else "output_ids")
            if what == "silent":
                self._over.wait()
        with self._lock:
            self.answered.append(tuple(given.tolist()))

    def response(self, ids: np.ndarray, name: str) -> bytes:
        answer = service_pb2.ModelInferResponse(model_name="echo", model_version="1")
        answer.outputs.add(name=name, datatype="INT32", shape=[1, 1, len(ids)])
        answer.raw_output_contents.append(ids.tobytes())
        if self.decoupled:
            return bytes(service_pb2.ModelStreamInferResponse(infer_response=answer).SerializeToString())
        return bytes(answer.SerializeToString())

    def unary(self, request: Any, context: grpc.ServicerContext) -> bytes:
        return next(self.infer(request, context))

    def stream(self, requests: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            yield from self.infer(request, context)

    def handlers(self) -> Any:
        """The real service but for inference, whose answers are bytes."""
        metadata = service_pb2.ModelMetadataResponse(name="echo", versions=["1"])
        for name in ("input_ids", "sequence_length", "max_output_len"):
            metadata.inputs.add(name=name, datatype="UINT32", shape=[-1, -1])
        metadata.outputs.add(name="output_ids", datatype="INT32", shape=[-1, -1])
        config = f'config {{ name: "echo" model_transaction_policy {{ decoupled: {str(self.decoupled).lower()} }} }}'
        answers = {
            "ServerLive": service_pb2.ServerLiveResponse(live=True),
            "ModelReady": service_pb2.ModelReadyResponse(ready=True),
            "ModelMetadata": metadata,
            "ModelConfig": text_format.Parse(config, service_pb2.ModelConfigResponse()),
            "ModelStatistics": service_pb2.ModelStatisticsResponse(),
        }
        found = {
            name: grpc.unary_unary_rpc_method_handler(
                partial(lambda content, request, context: content, answer.SerializeToString())
            )
            for name, answer in answers.items()
        }
        read = service_pb2.ModelInferRequest.FromString
        found["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self.unary, request_deserializer=read)
        found["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self.stream, request_deserializer=read)
        return grpc.method_handlers_generic_handler(SERVICE, found)

    def release(self) -> None:
        """Let those go that were kept waiting."""
        self._over.set()


@contextmanager
def faulty(behave: Callable[[int], str], decoupled: bool = False) -> Iterator[Faulty]:
    """Such a server on a free port of this machine."""
    told = Faulty(behave, decoupled)
    server = grpc.server(futures.ThreadPoolExecutor(64))
    server.add_generic_rpc_handlers((told.handlers(),))
    told.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield told
    finally:
        told.release()
        server.stop(None).wait()
