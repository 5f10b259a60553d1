#!/usr/bin/env python3
"""Writes into a folder the licence of Baton and of every crate that the program `baton` is made of.

    scripts/collect-licences.py FOLDER

Needs the crates' sources, as a build leaves them; what only tests need cargo fetches beside them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("license", "licence", "copying", "notice", "unlicense", "copyright")


def metadata() -> dict:
    command = ["cargo", "metadata", "--format-version=1", "--locked"]
    target = subprocess.run(["rustc", "--print=host-tuple"], stdout=subprocess.PIPE, text=True, check=True)
    command.append(f"--filter-platform={target.stdout.strip()}")
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)


def linked(everything: dict) -> set[str]:
    """Ids of the packages that `baton` links, not of those that only its build or its tests need."""
    nodes = {node["id"]: node for node in everything["resolve"]["nodes"]}
    members = set(everything["workspace_members"])
    open_ids = [package["id"] for package in everything["packages"] if package["name"] == "baton" and package["id"] in members]
    found: set[str] = set()
    while open_ids:
        package = open_ids.pop()
        if package in found:
            continue
        found.add(package)
        for dependency in nodes[package]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                open_ids.append(dependency["pkg"])
    return found


def main(folder: Path) -> int:
    everything = metadata()
    wanted = linked(everything)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    lines = []
    for package in sorted(everything["packages"], key=lambda package: (package["name"], package["version"])):
        if package["id"] not in wanted or package["source"] is None:
            continue
        name = f'{package["name"]}-{package["version"]}'
        source = Path(package["manifest_path"]).parent
        files = sorted(file for file in source.iterdir() if file.is_file() and file.name.lower().startswith(NAMES))
        for file in files:
            (folder / "crates" / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / "crates" / name / file.name)
        lines.append(f'{name}\t{package["license"]}\t{package["repository"] or ""}\n')
    (folder / "CRATES.tsv").write_text("".join(lines))
    print(f"licences of Baton and of {len(lines)} crates in {folder}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: collect-licences.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
