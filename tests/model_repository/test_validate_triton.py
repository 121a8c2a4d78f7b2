"""Why `ftconvert repository validate` has its rules, shown with the real Triton.

It takes the fault without a word, says so little that it does not lead to it, or waits for ever.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from asking import http, loaded
from broken import CASES
from broken.changes import Change
from broken.ensembles import BESIDE, CHAIN
from broken.every_model import POST

from model_repository.server import TritonServer
from model_repository.validate import validate

QUIET = ("output-twice", "unfilled-string", "parameter-twice", "policy-misses", "no-integer")  # nothing is said
POLL = "failed to poll from model repository"  # all that is said
TOLD = {  # case -> what Triton says to who asks it for that model
    "unknown-field": POLL,
    "unfilled-number": POLL,
    "another-name": POLL,
    "not-fed": POLL,
    "nobody-gives": POLL,
    "given-twice": POLL,
    "mapped-twice": "",  # the last of the two counts
    "not-used": POLL,
    "output-not-made": POLL,
    "ensemble-with-instances": POLL,
    "ensemble-without-platform": POLL,
    "cycle": POLL,
    "larger-batches": "only allows maximum batch size to be 1024",
    "empty-ensemble": "",  # on a disk; in a bucket the version is not there
    "half-uploaded": "",
}


def states(server: TritonServer, name: str) -> dict[str, str]:
    """Version -> state, of those that Triton knows."""
    index = json.loads(http(server, "repository/index", {}))
    return {one["version"]: one["state"] for one in index if one["name"] == name and "version" in one}


def renamed(models: Path, repository: Path, base: str, name: str, *changes: Change) -> None:
    """A model of the good repository, changed, under a name of its own."""
    model = repository / name
    shutil.copytree(models / base, model)
    for change in changes:
        change(model)
    file = model / "config.pbtxt"
    file.write_text(file.read_text().replace(f'name: "{base}"', f'name: "{name}"', 1))


def test_why_the_rules_exist(models: Path, tmp_path: Path) -> None:
    """One real server, and a model for each fault: it takes it, or says too little, or waits for ever."""
    for name in BESIDE:
        shutil.copytree(models / name, tmp_path / name)
    renamed(models, tmp_path, POST, "quiet", *(CASES[case].change for case in QUIET))
    for case in TOLD:
        renamed(models, tmp_path, CHAIN if CASES[case].model == CHAIN else POST, case, CASES[case].change)
    renamed(models, tmp_path, POST, "no-script", CASES["no-script"].change)
    found = [finding.model for finding in validate(str(tmp_path))]
    assert sorted(found) == sorted([*TOLD, "no-script", *["quiet"] * len(QUIET)])
    with TritonServer(tmp_path, mode="explicit") as server:
        assert loaded(server, "quiet") == ""
        assert states(server, "quiet") == {"1": "READY"}  # version 3 was asked for, too
        served = json.loads(http(server, "models/quiet/config"))
        assert [output["name"] for output in served["output"]] == ["OUTPUT", "OUTPUT"]
        assert served["parameters"]["a"]["string_value"] == "/x/${dir}"
        assert served["parameters"]["end_id"]["string_value"] == "7"
        told = {case: loaded(server, case) for case in TOLD}
        assert {case: TOLD[case] if TOLD[case] in text else text for case, text in told.items() if text} == {
            case: words for case, words in TOLD.items() if words
        }
        assert states(server, "half-uploaded") == {"2": "READY"}
        with pytest.raises(TimeoutError):
            loaded(server, "no-script", timeout=5)
        assert states(server, "no-script") == {"1": "LOADING"}
        os.kill(server.pid, signal.SIGKILL)  # it would wait for that model for a minute
