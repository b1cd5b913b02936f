"""Writes docs/configuration.md and docs/errors.md from the source.

`make docs` runs it; tests/test_docs.py fails where a page is not what it would write.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "vla0"
SECTIONS = (  # heading, file, class, what the keys begin with
    ("model", "train/config.py", "ModelConfig", "model."),
    ("model.lora", "train/config.py", "Lora", "model.lora."),
    ("data", "data/config.py", "DataConfig", "data."),
    ("action", "train/config.py", "ActionConfig", "action."),
    ("augmentation", "data/config.py", "Augmentation", "augmentation."),
    ("training", "train/config.py", "TrainingConfig", "training."),
    ("logging", "train/config.py", "LoggingConfig", "logging."),
    ("simulator", "sim/evaluate.py", "EvalConfig", "simulator."),
    ("Reinforcement learning: `vla0 rl`", "rl/config.py", "RLConfig", ""),
    ("rollouts", "rl/config.py", "RolloutsConfig", "rollouts."),
    ("update", "rl/config.py", "UpdateConfig", "update."),
    ("logging, of `vla0 rl`", "rl/config.py", "RunConfig", "logging."),
    ("`vla0 rl --offline`", "rl/config.py", "OfflineConfig", ""),
    ("A checkpoint: `vla0.json`", "core/spec.py", "Spec", ""),
)
ROOMS = {
    "core": "Specs, text, images, prompts, ensembling",
    "checkpoint": "Checkpoint folders, conversion, the Hub",
    "data": "Datasets",
    "decode": "Decoding, and engines elsewhere",
    "policy.py": "VLA0",
    "train": "Training",
    "sim": "Simulators and evaluation",
    "rl": "Reinforcement learning",
    "serve": "Serving and its clients",
    "robot": "Robots",
    "inspect": "`vla0 inspect`",
    "bench": "`vla0 bench`",
    "doctor.py": "`vla0 doctor`",
    "files.py": "Files and folders",
    "backbones.py": "Models and their processors",
    "errors.py": "Unknown keys, and settings that would do nothing",
    "cli": "The command line",
}


def comments(text: str) -> dict[int, str]:
    """{line: comment}."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def fields(file: str, name: str) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of a dataclass's fields; meaning: the comments at each.

    Those of what it inherits from, in the same file, come first.
    """
    text = (SOURCE / file).read_text(encoding="utf-8")
    notes, lines = comments(text), text.splitlines()
    tree = next(
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef) and n.name == name
    )
    for base in tree.bases:
        yield from fields(file, ast.unparse(base)) if f"class {ast.unparse(base)}" in text else ()
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above, line = [], node.lineno - 1
        while line in notes and lines[line - 1].strip().startswith("#"):
            above.insert(0, notes[line])
            line -= 1
        said = above + [
            notes[n] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in notes
        ]
        default = "" if node.value is None else ast.unparse(node.value)
        if default.startswith("field("):
            made = default.removeprefix("field(default_factory=")[:-1]
            own = made.removeprefix("lambda: ")
            default = "{}" if "dict" in made else made + "()" if own == made else own
        yield ast.unparse(node.target), ast.unparse(node.annotation), default, " ".join(said)


def cell(text: str) -> str:
    """A text that stands in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def configuration() -> str:
    """The page of all keys."""
    parts = [
        "# Configuration reference\n\nWhat a YAML file for `vla0 train` or `vla0 rl` may "
        "say, and `key=value` "
        "behind it: "
        "`vla0 train --config mine.yaml training.batch_size=4`. A key that is not here is refused "
        "with the nearest "
        "that is. Generated from the dataclasses by `python docs/reference.py`.\n"
    ]
    for heading, file, name, prefix in SECTIONS:
        rows = [
            f"| `{prefix}{key}` | `{cell(kind)}` | "
            f"{f'`{cell(default)}`' if default else 'required'} | {cell(said)} |"
            for key, kind, default, said in fields(file, name)
        ]
        table = "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])
        parts.append(f"## {heading}\n\n`{name}` in `{file}`.\n\n{table}\n")
    return "\n".join(parts)


def told(node: ast.expr, names: dict[str, str]) -> str:
    """What a message says, with … where a value stands."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            told(part, names) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return told(node.left, names) + told(node.right, names)
    if isinstance(node, ast.IfExp):
        return f"{told(node.body, names)} / {told(node.orelse, names)}"
    if isinstance(node, ast.Name):
        return names.get(node.id, "…")
    return "…"


def messages(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(expected, remedy) of each InputError, names resolved where they were last assigned."""
    scopes = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]
    inner = {id(n): scope for scope in scopes for n in ast.walk(scope)}  # the innermost comes last
    assigned: dict[int, list[tuple[int, str, str]]] = {id(scope): [] for scope in scopes}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = told(node.value, {})
            assigned[id(inner[id(node)])].append((node.lineno, node.targets[0].id, text))
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and len(node.args) >= 3):
            continue
        if (called := ast.unparse(node.func)) in ("InputError", "_check"):
            own = [entry for entry in assigned[id(inner[id(node)])] if entry[0] <= node.lineno]
            names = {name: text for _, name, text in sorted(assigned[id(tree)])}
            names |= {name: text for _, name, text in sorted(own)}
            yield told(node.args[called == "_check"], names), told(node.args[-1], names)


def errors() -> str:
    """The page of all errors: what is expected, and what to do."""
    found: dict[str, list[tuple[str, str]]] = {room: [] for room in ROOMS}
    for file in sorted(SOURCE.rglob("*.py")):
        room, tree = file.relative_to(SOURCE).parts[0], ast.parse(file.read_text(encoding="utf-8"))
        for row in messages(tree):
            if re.search(r"[a-z]{3}", row[0]) and row not in found[room]:
                found[room].append(row)
    parts = [
        "# Every error, by its text\n\nAn error reads `vla0: expected A; got B; C`: what was "
        "expected, what came, and what to "
        "do. Search for words of A. `…` stands for a value. With `VLA0_DEBUG=1` it also shows "
        "where it arose. "
        "Generated from the source by `python docs/reference.py`.\n"
    ]
    for room, heading in ROOMS.items():
        if found[room]:
            rows = [f"| {cell(expected)} | {cell(remedy)} |" for expected, remedy in found[room]]
            parts.append(
                f"## {heading}\n\n"
                + "\n".join(["| expected | what to do |", "|---|---|", *rows])
                + "\n"
            )
    return "\n".join(parts)


PAGES = {"configuration.md": configuration, "errors.md": errors}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
