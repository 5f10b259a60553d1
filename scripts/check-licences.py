#!/usr/bin/env python3
"""Every crate that we build on has a licence that we may ship.

Reads `cargo metadata` and needs no network. (Advisories live in a database on the network: `cargo audit`
where there is one.)
"""

import json
import re
import subprocess
import sys

ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "OpenSSL",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
}


def allowed(expression: str) -> bool:
    """Evaluates an SPDX expression of AND, OR and parentheses."""
    tokens = re.findall(r"\(|\)|[^\s()]+(?:\s+WITH\s+[^\s()]+)?", expression.replace("/", " OR "))
    words = {"AND": "and", "OR": "or", "(": "(", ")": ")"}
    rule = " ".join(words.get(token, str(token in ALLOWED)) for token in tokens)
    return bool(eval(rule, {"__builtins__": {}}))  # only True, False, and, or and parentheses


def main() -> int:
    command = ["cargo", "metadata", "--format-version=1", "--locked"]
    packages = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["packages"]
    foreign = [package for package in packages if package["source"] is not None]
    refused = [
        f'{package["name"]} {package["version"]}: {package["license"] or "no licence named"}'
        for package in foreign
        if not (package["license"] and allowed(package["license"]))
    ]
    for line in refused:
        print(f"not among the licences that we may ship: {line}", file=sys.stderr)
    print(f"{len(foreign) - len(refused)} of {len(foreign)} crates have a licence that we may ship")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
