"""Writes launch/gke/requirements.lock, the files that the image installs, with their hashes.

    python launch/gke/lock.py

Resolves the requirements in pyproject.toml and of its extra `tpu` for Python 3.12 on x86-64 Linux. pip
then refuses any file with other content. Run it in the repository root after changing the requirements.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

GLIBC = 40  # Newest minor version of glibc 2 that wheels may ask for; python:3.12-slim has 2.41.
LOCK = Path("launch/gke/requirements.lock")


def main() -> None:
    print(f"{LOCK}: {lock()} packages")


def requirements() -> list[str]:
    """Returns what the image needs: dependencies, the extra `tpu`, and an editable install's build."""
    settings = tomllib.loads(Path("pyproject.toml").read_text())
    project = settings["project"]
    build = [*settings["build-system"]["requires"], "editables"]
    return [*project["dependencies"], *project["optional-dependencies"]["tpu"], *build]


def lock() -> int:
    """Writes the file; returns the number of packages."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        options = [f"--target={scratch}/target", f"--report={report}", "--python-version=3.12"]
        options += ["--dry-run", "--ignore-installed", "--quiet", "--only-binary=:all:", *platforms]
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            *options,
            "--platform=manylinux2014_x86_64",
        ]
        subprocess.run([*command, *requirements()], check=True)
        packages = json.loads(report.read_text())["install"]
    lines = [
        f"{package['metadata']['name'].lower()}=={package['metadata']['version']} "
        f"--hash=sha256:{package['download_info']['archive_info']['hashes']['sha256']}"
        for package in packages
    ]
    LOCK.write_text("\n".join(["# Written by launch/gke/lock.py.", *sorted(lines)]) + "\n")
    return len(lines)


if __name__ == "__main__":
    main()
