"""What a request costs the client: CPU time of `evaluate` against a bare loop over grpc.aio with the same bytes.

    python -m benchmarks.client [--requests 5000] [--concurrency 8] [--rounds 5]

A server of its own process speaks Triton's protocol and answers every request with the same 24 ids. Both clients send
the same requests, `concurrency` at a time; the bare one neither reads nor keeps what comes. Rounds alternate; the table
has the median and the range of CPU microseconds for each request, and of their ratio.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent import futures
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "ul2-tiny"
OUTPUT_TOKENS = 24


def serve(ports: Any) -> None:
    """Answer as a FasterTransformer T5 would, at once."""
    import grpc
    import numpy as np
    from google.protobuf import text_format
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    metadata = service_pb2.ModelMetadataResponse(name="echo", versions=["1"])
    for name in ("input_ids", "sequence_length", "max_output_len"):
        metadata.inputs.add(name=name, datatype="UINT32", shape=[-1, -1])
    for name in ("output_ids", "sequence_length"):
        metadata.outputs.add(name=name, datatype="INT32", shape=[-1, -1])
    answer = service_pb2.ModelInferResponse(model_name="echo", model_version="1")
    for name, ids in (("output_ids", range(10, 10 + OUTPUT_TOKENS)), ("sequence_length", [OUTPUT_TOKENS])):
        content = np.asarray(ids, "<i4")
        answer.outputs.add(name=name, datatype="INT32", shape=[1, 1, len(content)])
        answer.raw_output_contents.append(content.tobytes())
    answers = {
        "ServerLive": service_pb2.ServerLiveResponse(live=True),
        "ModelReady": service_pb2.ModelReadyResponse(ready=True),
        "ModelMetadata": metadata,
        "ModelConfig": text_format.Parse('config { name: "echo" }', service_pb2.ModelConfigResponse()),
        "ModelStatistics": service_pb2.ModelStatisticsResponse(),
        "ModelInfer": answer,
    }
    servicer = service_pb2_grpc.GRPCInferenceServiceServicer()
    for name, message in answers.items():
        setattr(servicer, name, lambda request, context, message=message: message)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    ports.put(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


async def bare(address: str, contents: list[bytes], concurrency: int) -> float:
    """CPU seconds of sending them all."""
    import grpc

    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        await call(contents[0])
        waiting = iter(contents)

        async def worker() -> None:
            for content in waiting:
                await call(content, timeout=60)

        began = time.process_time()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return time.process_time() - began


async def ours(address: str, rows: Any, concurrency: int, folder: Path) -> tuple[float, list[bytes]]:
    """CPU seconds of `evaluate` from the first request to the last answer on disk, and what it sent."""
    from datetime import datetime, timezone

    from evaluator import measure, report, tokenizers
    from evaluator.options import Load
    from evaluator.protocols import triton_grpc
    from evaluator.protocols.base import Connection

    options: Any = argparse.Namespace(
        **{"model": "echo", "prompt": "summarize: {document}", "max_input_tokens": 512, "max_output_tokens": 64},
        **{"loads": (Load("closed", concurrency),), "warmup": 1, "retries": 5, "resume": False},
    )
    tokenizer = tokenizers.load(str(EXAMPLE / "spiece.model"))
    connection = Connection(address, "echo", 60.0)
    async with triton_grpc.connect(connection) as endpoint:
        plan = measure.Plan(options, rows, tokenizer, folder, datetime.now(timezone.utc))
        requests = measure.prepare(plan, endpoint)
        [run] = await measure.run_all(plan, requests, endpoint, report.no_progress_bar)
        return run.cpu_s, [request.content for request in requests]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    from evaluator.datasets import Row

    lines = [json.loads(line) for line in (EXAMPLE / "test.jsonl").read_text("utf-8").splitlines()]
    rows = [
        Row(str(number), (line := lines[number % len(lines)])["document"], line["summary"])
        for number in range(asked.requests)
    ]
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    server = context.Process(target=serve, args=(ports,), daemon=True)
    server.start()
    try:
        address = f"127.0.0.1:{ports.get(timeout=60)}"
        found: list[tuple[float, float]] = []
        for _ in range(asked.rounds):
            with tempfile.TemporaryDirectory() as folder:
                mine, contents = asyncio.run(ours(address, rows, asked.concurrency, Path(folder)))
            theirs = asyncio.run(bare(address, contents, asked.concurrency))
            found.append((1e6 * mine / len(rows), 1e6 * theirs / len(rows)))
    finally:
        server.terminate()
        server.join()
    table = {
        "evaluate, CPU us a request": [mine for mine, _ in found],
        "bare loop": [theirs for _, theirs in found],
        "ratio": [mine / theirs for mine, theirs in found],
    }
    for name, values in table.items():
        print(f"{name:28} {statistics.median(values):8.2f}  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
