"""Server-sent events and lines, whatever the pieces they come in."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator.protocols import sse
from evaluator.protocols.base import RequestError

STREAM = (
    b": a comment\r\n\r\n"
    b"data: one\n\n"
    b"event: message\rdata:two\rid: 7\r\r"
    b"data:  three\r\ndata: lines\r\ndata\r\n\r\n"
    b"retry: 10\n\n"
    b"data: \xc3\xa4: b\n\n"
    b"dat: no\n\n"
    b"data: never ended\n"
)
EVENTS = [b"one", b"two", b" three\nlines\n", b"\xc3\xa4: b"]


async def pieces(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def events(parts: list[bytes], most: int = 1000) -> list[bytes]:
    async def collect() -> list[bytes]:
        return [event async for event in sse.events(pieces(parts), most)]

    return asyncio.run(collect())


def lines(parts: list[bytes], most: int = 1000) -> list[bytes]:
    async def collect() -> list[bytes]:
        return [line async for line in sse.lines(pieces(parts), most, ends=b"\n\0")]

    return asyncio.run(collect())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_events_do_not_depend_on_the_chunks(size: int) -> None:
    assert events([STREAM[at : at + size] for at in range(0, len(STREAM), size)]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_chunks_may_be_cut_anywhere(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert events([STREAM[start:end] for start, end in pairwise(edges)]) == EVENTS


def test_lines_end_in_a_line_feed_or_a_zero_byte() -> None:
    assert lines([b'{"a', b'": 1}\n{"b": 2}\0', b'{"c": 3}']) == [b'{"a": 1}', b'{"b": 2}', b'{"c": 3}']
    assert lines([]) == []
    assert lines([b"", b"\n", b""]) == [b""]


@pytest.mark.parametrize("stream", [b"data: " + b"x" * 200, b"data: xxxxxxxxxx\n" * 20])
def test_what_never_ends_is_given_up(stream: bytes) -> None:
    with pytest.raises(RequestError, match=r"MALFORMED_RESPONSE: .* at most 100 bytes"):
        events([stream[at : at + 10] for at in range(0, len(stream), 10)], most=100)


def test_a_line_that_never_ends_is_given_up_before_it_does() -> None:
    with pytest.raises(RequestError, match="at most 100 bytes"):
        lines([b"x" * 60, b"x" * 60, b"\n"], most=100)
