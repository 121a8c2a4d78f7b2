"""Server-sent events, as far as inference servers use them: the `data` of each event.

    chunks of bytes, cut anywhere ─> lines ─> events ─> data

The format is the HTML standard's (9.2, server-sent events): a line ends in CR LF, LF or CR, an empty line ends an
event, a line that begins with a colon is a comment, several `data` lines are one text with line feeds between.
"""

from collections.abc import AsyncIterator

from evaluator.protocols.base import RequestError


async def lines(chunks: AsyncIterator[bytes], most: int, ends: bytes = b"\r\n") -> AsyncIterator[bytes]:
    """The lines of a stream without their ends, which are any of the bytes `ends` and CR LF; empty ones among them.

    What follows the last end is a line, too, but an empty one.

    Raises:
        RequestError: a line has more than `most` bytes.
    """
    table = bytes.maketrans(ends, b"\n" * len(ends))
    rest = b""
    after_cr = False
    async for chunk in chunks:
        if not chunk:
            continue
        if after_cr and chunk[:1] == b"\n":  # the second half of a CR LF that was cut in two
            chunk = chunk[1:]
            after_cr = False
            if not chunk:
                continue
        after_cr = chunk[-1:] == b"\r" and b"\r" in ends
        *whole, rest = (rest + chunk.replace(b"\r\n", b"\n").translate(table)).split(b"\n")
        for line in whole:
            yield line
        if len(rest) > most:
            raise RequestError("MALFORMED_RESPONSE", f"expected lines of at most {most} bytes, found a longer one")
    if rest:
        yield rest


async def events(chunks: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """The data of each event that has some. An event without its empty line, at the end, is none (so the standard).

    Raises:
        RequestError: an event has more than `most` bytes.
    """
    data: list[bytes] = []
    size = 0
    async for line in lines(chunks, most):
        if not line:
            if data:
                yield b"\n".join(data)
            data, size = [], 0
            continue
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
            size += len(value)
            if size > most:
                raise RequestError("MALFORMED_RESPONSE", f"expected events of at most {most} bytes, found a longer one")
