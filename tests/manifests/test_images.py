"""No Docker engine runs here: what the Dockerfiles copy, install and start exists, and makes a whole package."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from manifests.built import ROOT, TREE

IMAGES = TREE / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
# what an image has to be small for: nothing of these extras, whose packages bring torch and CUDA
EXTRAS = {"converter": {"gcs", "hub"}, "evaluator": {"eval", "gcs", "hub"}, "triton-cpu": {"serve", "gcs"}}


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def faults(text: str, root: Path = ROOT) -> list[str]:
    """What is wrong with a Dockerfile."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip() and line.strip()[0] != "#"]
    steps = [line.partition(" ")[::2] for line in lines]
    bases = [rest.split()[0] for word, rest in steps if word == "FROM"]
    found = [f"a version down to the patch: {base}" for base in bases if not re.search(r":\d+\.\d+\.\d+[\w.-]*$", base)]
    if len(bases) < 2:
        found.append("two stages: pip and its caches stay in the first")
    for word, rest in steps:
        sources = [] if word not in ("COPY", "ADD") or "--from=" in rest else rest.split()[:-1]
        found += [f"no such file: {source}" for source in sources if not (root / source).exists()]
        if word == "RUN" and "pip install" in rest and "-c constraints.txt" not in rest:
            found.append(f"without constraints.txt: {rest}")
    users = [
        rest
        for word, rest in steps[len(steps) - 1 - [word for word, _ in steps][::-1].index("FROM") :]
        if word == "USER"
    ]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        found.append(f"a USER by number, not root, in the last stage: {users}")
    known = set(setup()["options.extras_require"])
    for extras in re.findall(r"'\.\[([\w,]+)\]'", text):
        found += [f"no such extra: {extra}" for extra in set(extras.split(",")) - known]
    scripts = setup()["options.entry_points"]["console_scripts"]
    programs = re.findall(r'^ENTRYPOINT \["([\w-]+)"', text, re.MULTILINE)
    if len(programs) != 1 or f"{programs[0]} =" not in scripts:
        found.append(f"a console script as ENTRYPOINT: {programs}")
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfiles(path: Path) -> None:
    text = path.read_text()
    assert faults(text) == []
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert set(extras.split(",")) == EXTRAS[path.stem]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("python:3.11.13-slim-bookworm", "python:latest", "a version down to the patch"),
        ("python:3.11.13-slim-bookworm", "python:3.11-slim", "a version down to the patch"),
        ("COPY converter converter", "COPY convertor converter", "no such file: convertor"),
        ("-c constraints.txt ", "", "without constraints.txt"),
        ("USER 10001:10001", "USER root", "not root"),
        ("USER 10001:10001", "", "not root"),
        ("[gcs,hub]", "[gcs,hbu]", "no such extra: hbu"),
        ('ENTRYPOINT ["ftconvert"]', 'ENTRYPOINT ["ftconv"]', "a console script"),
    ],
)
def test_broken_dockerfiles(before: str, after: str, told: str) -> None:
    text = (IMAGES / "converter.Dockerfile").read_text()
    assert before in text
    assert any(told in found for found in faults(text.replace(before, after)))


def test_what_is_copied_makes_the_whole_package(tmp_path: Path) -> None:
    """A wheel of what the images copy, alone, has every file of the packages. All of them copy the same."""
    copied = {tuple(re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE)) for path in DOCKERFILES}
    assert len(copied) == 1
    source = tmp_path / "source"
    source.mkdir()
    for line in copied.pop():
        *names, there = line.split()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / there)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(file.relative_to(ROOT))
        for package in ("converter", "model_repository", "evaluator")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert wanted - packed == set()


def test_python_is_the_one_that_constraints_are_proven_on() -> None:
    version = re.search(r"Proven together on Python ([\d.]+)\.\n?", (ROOT / "constraints.txt").read_text())
    assert version
    for path in DOCKERFILES:
        assert set(re.findall(r"FROM python:(\d+\.\d+)\.", path.read_text())) == {version[1]}


def test_cloud_build_builds_every_image() -> None:
    config = yaml.safe_load((IMAGES / "cloudbuild.yaml").read_text())
    files = [next(arg for arg in step["args"] if arg.startswith("--file=")) for step in config["steps"]]
    assert files == [f"--file={path.relative_to(ROOT)}" for path in DOCKERFILES]
    tags = [next(arg for arg in step["args"] if arg.startswith("--tag=")) for step in config["steps"]]
    assert [f"--tag={image}" for image in config["images"]] == tags
    assert [re.search(r"/([\w-]+):", image)[1] for image in config["images"]] == [path.stem for path in DOCKERFILES]  # type: ignore[index]
    used = set(re.findall(r"\$\{(_\w+)\}", (IMAGES / "cloudbuild.yaml").read_text()))
    assert used == set(config["substitutions"])
    assert all(":latest" not in step["name"] and ":" in step["name"] for step in config["steps"])
