"""How a source tree reads, in numbers: functions, lines, files per folder.

python benchmarks/house.py [FOLDER]    # default src/vla0
"""

import ast
import statistics
import sys
from pathlib import Path


def main(root: Path) -> None:
    """Prints one line for each number."""
    lengths, lines = [], []
    for file in root.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        lines += [line for line in text.splitlines() if line.strip()]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
    lengths.sort()
    wide = sum(len(line) > 100 for line in lines)
    print(
        f"lines that are not blank: {len(lines)}, {statistics.mean(map(len, lines)):.0f} characters"
    )
    print(f"of more than 100 columns: {wide}, {100 * wide / len(lines):.1f} %")
    print(
        f"lines of a function: median {statistics.median(lengths):g}, "
        f"90 % {lengths[int(0.9 * len(lengths))]}, longest {lengths[-1]}"
    )
    for folder in sorted({file.parent for file in root.rglob("*.py")}):
        count = sum(len(f.read_text("utf-8").splitlines()) for f in folder.glob("*.py"))
        print(f"{folder}: {len(list(folder.glob('*.py')))} files, {count} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "src/vla0"))
