"""What the pages say is so: links lead somewhere, and the command lines are understood by the very programs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from manifests.rules.commands import parse

PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
FENCED = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
ENDS = re.compile(r"\s+(?:&|\||>|#|&&|;)(?:\s|$).*")  # of a command, within its line


def blocks(page: Path, kind: str = "") -> list[str]:
    """The fenced blocks of a page; `kind` is what stands behind the backquotes."""
    return [body for word, rest, body in FENCED.findall(page.read_text()) if kind in ("", (word + rest).strip())]


def lines(body: str) -> list[str]:
    """Those of a block, continued ones as one."""
    return body.replace("\\\n", " ").splitlines()


def commands(page: Path) -> Iterator[str]:
    """Every line that calls one of our programs."""
    for body in blocks(page):
        for line in lines(body):
            if re.match(r"(ftconvert|evaluate) [\w-]", line):
                yield re.sub(r"\[(--[\w-]+)\]", r"\1", ENDS.sub("", line))  # [--json]: a synopsis


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to the headings."""
    text = FENCED.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    for link in LINK.findall(text):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=lambda page: page.name)
def test_commands_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.cli import main as ftconvert
    from evaluator.cli import main as evaluate

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tls.crt").touch()  # an option that takes a file wants to see it
    for line in commands(page):
        program, *words = shlex.split(line)
        told = parse({"ftconvert": ftconvert, "evaluate": evaluate}[program], words)
        assert told is None, f"{line}: {told}"


def test_a_command_that_does_not_exist_is_told() -> None:
    from converter.cli import main as ftconvert

    assert parse(ftconvert, ["repository", "publish", "--gat=x", "a", "b"])
    assert parse(ftconvert, ["repository", "publish", "a"])
