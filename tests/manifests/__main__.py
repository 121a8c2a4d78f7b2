"""`make lint-manifests [OVERLAYS="folder ..."]`: every overlay of the project, or those that are named."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from manifests import built as builds
from manifests.rules import RULES, references, schemas, secrets


def findings(folders: list[Path]) -> list[str]:
    """One line for each fault of these folders."""
    found, done = [], []
    for folder in folders:
        try:
            done.append(builds.build(folder))
        except builds.BuildError as error:
            found.append(str(error))
    for built in done:
        found += [f"{built.name}: {told}" for rule in RULES for told in rule(built)]
    cluster = builds.Built("cluster", builds.cluster())
    for rule in (*schemas.RULES, references.named_objects):
        found += [f"cluster: {told}" for told in rule(cluster)]
    return [*found, *references.apart(done), *secrets.in_files(builds.ROOT)]


def main() -> int:
    """Exit code 1 where there are findings."""
    folders = [Path(word) for word in sys.argv[1:]] or builds.overlays()
    found = findings(folders)
    if not schemas.cel:
        print("not checked: CEL rules of custom resources, which need Python 3.11 or later", file=sys.stderr)
    print("\n".join(found) or f"{len(folders)} overlays: nothing found")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
