"""docs/gke.md: its edits are made, its overlays built, and what its commands name is looked for in them."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from manifests import built as builds
from manifests.rules import RULES, schemas
from test_docs import blocks, lines

PAGE = ROOT / "docs" / "gke.md"
TEXT = PAGE.read_text()
OVERLAYS = ("t5-small-dev", "ul2-20b-1xa100", "ul2-next")  # whose every command the page has
OTHERS = ("gemma-2-9b-lora",)  # named by commands, but not followed to the end
HEREDOC = re.compile(r"^kubectl apply -f - <<EOF\n(.*?)^EOF$", re.MULTILINE | re.DOTALL)
VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)")
# What commands would have told, and what is not an example any more
ASKED = {"NUMBER": "123456789", "ADDRESS": "192.0.2.1"}
OURS = {
    "PROJECT": "ours",
    "BUCKET": "ours-models",
    "DOMAIN": "ul2.ours.test",
    "TEAM": "team@ours.test",
}
EXAMPLES = ("my-project", "my-team", "example.com")  # of configs.env and accounts.yaml
WORDS = {"NET_ADMIN", "UNAVAILABLE"}  # no keys, though they look it
GCLOUD_WIDE = {"--project", "--format", "--filter", "--flatten", "--quiet"}


def shell() -> Iterator[str]:
    """The lines of every block, continued ones as one, without what a quoted heredoc holds."""
    for body in (*blocks(PAGE, "bash"), *blocks(PAGE, "bash edit")):
        yield from lines(re.sub(r"<<'EOF'\n.*?^EOF$", "", body, flags=re.MULTILINE | re.DOTALL))


def exported() -> dict[str, str]:
    """Every variable that the page sets, as bash does; ours instead of the examples."""
    values: dict[str, str] = {}
    for name, value in re.findall(r"^export (\w+)=(\S+)", TEXT, re.MULTILINE):
        value = VARIABLE.sub(lambda found: values[found[1]], value) if "$(" not in value else ASKED[name]
        values[name] = OURS.get(name, value)
    return values


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kustomize/ after the page's own edits."""
    folder = tmp_path_factory.mktemp("edited")
    shutil.copytree(builds.TREE, folder / "kustomize")
    script = "\n".join(blocks(PAGE, "bash edit"))
    subprocess.run(["bash", "-euc", script], cwd=folder, env={"PATH": "/usr/bin:/bin", **exported()}, check=True)
    return folder / "kustomize"


@pytest.fixture(scope="module")
def overlays(tree: Path) -> dict[str, builds.Built]:
    return {name: builds.build(tree / "overlays" / name) for name in (*OVERLAYS, *OTHERS)}


@pytest.fixture(scope="module")
def applied() -> list[builds.Object]:
    """The objects that the page has in itself."""
    text = VARIABLE.sub(lambda found: exported()[found[1]], "".join(HEREDOC.findall(TEXT)))
    return [yaml.safe_load(part) for part in text.split("apiVersion:") for part in [f"apiVersion:{part}"] if part[11:]]


def test_every_block_is_a_script() -> None:
    for body in (*blocks(PAGE, "bash"), *blocks(PAGE, "bash edit")):
        done = subprocess.run(["bash", "-n"], input=body, capture_output=True, text=True)
        assert not done.returncode, f"{body}\n{done.stderr}"
    assert not [body for body in blocks(PAGE) if body not in (*blocks(PAGE, "bash"), *blocks(PAGE, "bash edit"))]


def test_every_variable_is_set_before_it_is_used() -> None:
    known = set()
    order = re.findall(r"^export (\w+)=|^for (\w+) in|\$\{?([A-Za-z_]\w*)", "\n".join(shell_in_order()), re.MULTILINE)
    for set_here, looped, used in order:
        known |= {set_here, looped}
        assert not used or used in known, used
    assert len(known) > 10


def shell_in_order() -> list[str]:
    """As `shell`, but in the page's order; the value of an `export` stands before its name."""
    found = re.findall(r"^```bash[^\n]*\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    bare = [re.sub(r"<<'EOF'\n.*?^EOF$", "", body, flags=re.MULTILINE | re.DOTALL) for body in found]
    return [re.sub(r"^export (\w+)=(.*)$", r"\2\nexport \1=", line) for body in bare for line in lines(body)]


def test_the_edits_leave_no_example(tree: Path, overlays: dict[str, builds.Built]) -> None:
    texts = [(tree / "overlays" / name / "configs.env").read_text() for name in OVERLAYS]
    texts += [yaml.safe_dump_all(overlays[name].objects) for name in OVERLAYS]
    texts.append((tree / "cluster" / "accounts.yaml").read_text())
    assert [word for word in EXAMPLES for text in texts if word in text] == []
    assert all("ours-models" in text for text in texts[:-1])


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_overlays_are_right(overlays: dict[str, builds.Built], name: str) -> None:
    assert [told for rule in RULES for told in rule(overlays[name])] == []


def test_the_candidate_is_another_model(overlays: dict[str, builds.Built]) -> None:
    live, candidate = overlays["ul2-20b-1xa100"], overlays["ul2-next"]
    names = [{builds.name(found) for found in built.objects} for built in (live, candidate)]
    assert not names[0] & names[1]
    first, second = (built.one("ConfigMap")["data"] for built in (live, candidate))
    differ = {key for key in first if first[key] != second[key]}
    assert differ == {"SOURCE", "REPOSITORY", "HOST", "EVALUATION", "MAX_REPLICAS"}
    assert second["LIVE"] == first["REPOSITORY"]
    words = candidate.one("Job", "evaluate")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert words[-1] == f"--baseline=$(ROOT)/{first['EVALUATION']}"


def test_what_the_page_applies_itself_is_right(applied: list[builds.Object]) -> None:
    assert [found["kind"] for found in applied] == ["PodMonitoring"]
    assert list(schemas.objects_are_valid(builds.Built("page", applied))) == []


def test_kubectl_names_what_is_there(
    tree: Path, overlays: dict[str, builds.Built], applied: list[builds.Object]
) -> None:
    objects = [*applied, *(found for built in overlays.values() for found in built.objects)]
    there = {builds.name(found).lower() for found in objects}
    names, folders = 0, 0
    for line in (line for line in shell() if line.startswith(("kubectl", "finished"))):
        words = shlex.split(line, comments=True)
        if words[0] == "finished":
            assert {f"job/{word}" for word in words[1:]} <= there, line
            names += len(words) - 1
            continue
        if "-k" in words or words[1] == "kustomize":
            folder = tree.parent / words[words.index("-k") + 1 if "-k" in words else 2]
            assert (folder / "kustomization.yaml").exists(), line
            folders += 1
            if "-l" in words:
                key, values = re.fullmatch(r"(\S+) in \((.*)\)", words[words.index("-l") + 1]).groups()  # type: ignore[union-attr]
                labels = {found["metadata"].get("labels", {}).get(key) for found in overlays[folder.name].objects}
                assert set(values.split(", ")) <= labels, line
        elif line.startswith("kubectl -n models"):
            named = [word.lower() for word in words if re.fullmatch(r"(job|deployment|service)/[\w-]+", word)]
            assert set(named) <= there, line
            names += len(named)
            if "-l" in words:
                key, _, value = words[words.index("-l") + 1].partition("=")
                assert overlays[value].selected({key: value}), line
    assert names > 15
    assert folders > 12


def test_a_stage_holds_what_it_needs(overlays: dict[str, builds.Built]) -> None:
    """Three stages, or four, and what belongs to all of them: nothing of an overlay is in none."""
    for name in OVERLAYS:
        built = overlays[name]
        stages = {found["metadata"]["labels"].get("app.kubernetes.io/component") for found in built.objects}
        more = {"publish"} if name == "ul2-next" else set()
        assert stages == {"config", "convert", "server", "evaluate", *more}, name


def test_the_table_has_what_every_overlay_needs() -> None:
    """GPUs of all servers and of one more, within what nodes may be made for; secrets; and what ends when it serves."""
    limits = {kind: int(most) for kind, most in re.findall(r"resourceType: (nvidia-[\w-]+), maximum: (\d+)", TEXT)}
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (\S+) \|.*\| (.*) \| (.*) \| (.*) \|$", TEXT, re.MULTILINE)}
    for folder in (builds.TREE / "overlays").iterdir():
        built = builds.build(folder)
        values = built.one("ConfigMap", "config")["data"]
        gpus, also, waits = rows[folder.name]
        if accelerator := values.get("ACCELERATOR"):
            servers = [*(found["spec"].get("replicas") for found in built.of("Deployment")), None][0]
            pods = int(values.get("MAX_REPLICAS", servers or 1)) + 1
            asked = int(values["GPUS"]) * int(values.get("PIPELINE", 1)) * pods / int(values.get("GPU_CLIENTS", 1))
            assert gpus == f"{math.ceil(asked)} {accelerator}", folder.name
            assert math.ceil(asked) <= limits[accelerator], folder.name
        assert [value for key, value in values.items() if key.endswith("_SECRET") and value not in also] == []
        (served,) = re.findall(r"(\w+/[\w-]+)`$", waits)
        assert served in {builds.name(found).lower() for found in built.objects}, folder.name


def test_finished_waits_for_the_last_and_sees_a_failure(tmp_path: Path) -> None:
    """With a kubectl that knows three Jobs; the third look finds what is told last."""
    (tmp_path / "kubectl").write_text(
        """#!/bin/bash
echo x >> looks
case "$*" in
  *wait*job/done) exit 0 ;;
  *wait*job/later) [ $(wc -l < looks) -gt 4 ] ;;
  *wait*) exit 1 ;;
  *missing*) exit 1 ;;
  *bad*) echo "Pod exited with 65" ;;
esac
"""
    )
    (tmp_path / "kubectl").chmod(0o755)

    def finished(*jobs: str) -> tuple[int, str]:
        script = f"source {builds.TREE / 'finished.sh'}; finished {' '.join(jobs)}"
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert finished("done") == (0, "")
    assert finished("running", "later") == (0, "")
    assert finished("bad", "running") == (1, "bad running: Pod exited with 65\n")
    assert finished("missing", "running")[0] == 1


def test_every_key_is_one_of_configs_env(tree: Path) -> None:
    keys = {key for name in OVERLAYS for key in builds.build(tree / "overlays" / name).one("ConfigMap")["data"]}
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", TEXT)) - WORDS
    assert named - keys == set()
    assert keys - named == set()  # each is explained
    assert set(re.findall(r"\^(\w+)=", TEXT)) <= keys  # those that sed looks for


def test_paths_are_there() -> None:
    paths = set(re.findall(r"`((?:kustomize|components|tests|docs)/[\w./-]+)`", TEXT))
    assert len(paths) > 8
    missing = [path for path in paths if not any((base / path).exists() for base in (ROOT, builds.TREE))]
    assert missing == []


def test_exit_codes_are_those_of_the_readme() -> None:
    """137 and 143 are a shell's own: 128 and the signal."""
    promised = set(re.findall(r"^\| ([\d, ]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    codes = {code for row in promised for code in row.split(", ")}
    told = {code for row in re.findall(r"^\| ([\d, ]+) \| (?:`|any)", TEXT, re.MULTILINE) for code in row.split(", ")}
    assert told - codes == {"3", "137"} - codes
    assert {"2", "65", "66", "73", "74", "78", "143"} <= told


def test_costs_are_products() -> None:
    checked = 0
    for table in re.findall(r"^\|[^\n]*USD \|\n\|[-:|]+\|\n((?:\|[^\n]*\n)+)", TEXT, re.MULTILINE):
        total = 0.0
        for row in table.splitlines():
            what, *cells = [cell.strip() for cell in row.strip("|").split("|")]
            *factors, product = [float(cell) for cell in cells if cell]
            if what == "**sum**":
                assert product == pytest.approx(total, abs=0.0051)
                continue
            expected = 1.0
            for factor in factors:
                expected *= factor
            assert product == pytest.approx(expected, abs=0.0051), row
            total += product
            checked += 1
    assert checked == 22


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="needs gcloud, whose own help is asked")
def test_gcloud_has_every_flag() -> None:
    """Each is in the command's own help; nothing is run and nobody is asked."""
    seen = set()
    for line in shell():
        for call in re.findall(r"(?:^\s*|(?<=\$\())gcloud .*", line):
            call = call[:-1] if "$(gcloud" in line else call
            words = shlex.split(call, comments=True)
            command = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-")]
            flags = {word.partition("=")[0] for word in words if word.startswith("--")} - GCLOUD_WIDE
            text = ""
            while command and not text:  # the last words may be arguments
                done = subprocess.run(["gcloud", *command, "--help"], capture_output=True, text=True)
                text = done.stdout if not done.returncode else ""
                command = command if text else command[:-1]
            known = set(re.findall(r"--[a-z][a-z0-9-]*", text.replace("[no-]", "")))
            assert command, call
            assert flags <= known, f"{call}: {flags - known}"
            seen |= flags
    assert len(seen) > 30
