"""Writes docs/licences.md: what is installed with vla0, under which licence, for which extra, and
how lately it was released.

`make licences`, with PyPI in reach.
"""

import json
import sysconfig
import tomllib
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = "base"
TEXTS = {  # of a licence's text → which it is
    "Permission is hereby granted, free of charge": "MIT, by its text",
    "Redistribution and use in source and binary forms": "BSD, by its text",
}
HEAD = """# Licences

What `pip install vla0` and its extras bring on Linux, from `uv.lock` and what the packages say of themselves (`make licences`).
vla0 is Apache-2.0. What it asks for by name is in **bold**, with the month of its newest release.

Of note: CUDA's libraries (`nvidia-*`), which torch brings, are NVIDIA's own. `easydict` (LGPL-3.0) comes with the extra
`libero` alone, is imported and not changed.

| package | version | licence | for | newest release |
|---|---|---|---|---|
"""  # noqa: E501


def wanted() -> dict[str, list[str]]:
    """{package: ["base"] or the extras that bring it}, of uv.lock."""
    packages = {
        own["name"]: own for own in tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    }
    own = packages["vla0"]
    groups = {BASE: own["dependencies"], **own["optional-dependencies"]}
    found: dict[str, list[str]] = {}
    for group, dependencies in groups.items():
        seen, left = (
            set(),
            [(entry["name"], tuple(entry.get("extra", ()))) for entry in dependencies],
        )
        while left:
            name, extras = left.pop()
            if (name, extras) in seen or name == "vla0":
                continue
            seen.add((name, extras))
            entry = packages[name]
            more = [
                part
                for extra in extras
                for part in entry.get("optional-dependencies", {}).get(extra, [])
            ]
            left += [
                (part["name"], tuple(part.get("extra", ())))
                for part in [*entry.get("dependencies", []), *more]
            ]
        for name in {name for name, _ in seen}:
            if BASE not in found.get(name, []):
                found.setdefault(name, []).append(group)
    return found


def direct() -> set[str]:
    """Packages that pyproject.toml names."""
    own = next(
        own
        for own in tomllib.loads((ROOT / "uv.lock").read_text())["package"]
        if own["name"] == "vla0"
    )
    return {
        entry["name"]
        for part in [own["dependencies"], *own["optional-dependencies"].values()]
        for entry in part
    }


def licence(package: metadata.Distribution) -> str:
    """By the best source there is: SPDX, a short word, the classifiers, or the text of its
    licence.
    """
    told = package.metadata
    lines = [
        own.strip()
        for own in (told.get("License") or "").splitlines()
        if own.strip() not in ("", "UNKNOWN")
    ]
    classes = [
        own.rpartition(":: ")[2]
        for own in told.get_all("Classifier") or []
        if own.startswith("License ::")
    ]
    files = [
        own for own in package.files or [] if own.name.upper().startswith(("LICEN", "COPYING"))
    ]
    texts = [
        words
        for file in files[:1]
        for own, words in TEXTS.items()
        if own in " ".join((file.read_text() or "").split())
    ]
    short = [lines[0]] if len(lines) == 1 and len(lines[0]) < 60 else []
    plain = [own for own in classes if own not in ("OSI Approved", "Other/Proprietary License")]
    found = [told.get("License-Expression"), *short, *plain[:1], *classes[:1], *texts]
    return next((own for own in found if own), "not said")


def released(name: str) -> str:
    """The month of a package's newest release on PyPI."""
    with urllib.request.urlopen(f"https://pypi.org/pypi/{name}/json", timeout=30) as answer:
        files = json.load(answer)["urls"]
    return max(own["upload_time"] for own in files)[:7] if files else "?"


def installed() -> dict[str, metadata.Distribution]:
    """What is here, by its name in uv.lock."""
    # not what Ray brings in a folder of its own
    own = metadata.distributions(path=[sysconfig.get_path("purelib")])
    return {package.name.lower().replace("_", "-").replace(".", "-"): package for package in own}


def rows() -> Iterator[str]:
    """Lines of the table; those that are for other platforms are not installed, and left out."""
    own, told, here = wanted(), direct(), installed()
    for name in sorted(own):
        if (package := here.get(name)) is not None:
            when = released(name) if name in told else ""
            shown = f"**{name}**" if name in told else name
            extras = ", ".join(own[name])
            yield f"| {shown} | {package.version} | {licence(package)} | {extras} | {when} |\n"


if __name__ == "__main__":
    (ROOT / "docs" / "licences.md").write_text(HEAD + "".join(rows()), encoding="utf-8")
