"""The documentation says what the code says, and is built without a warning."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = runpy.run_path(str(DOCS / "reference.py"))


@pytest.mark.parametrize("page", REFERENCE["PAGES"])
def test_a_generated_page_is_what_the_source_says(page):
    """`make docs` writes them anew."""
    assert (DOCS / page).read_text() == REFERENCE["PAGES"][page]()


@pytest.mark.parametrize("section", REFERENCE["SECTIONS"], ids=lambda section: section[2])
def test_each_key_of_a_config_says_what_it_is(section):
    for key, _, _, meaning in REFERENCE["fields"](*section[1:3]):
        assert meaning, f"{section[2]}.{key} has no comment"


def test_the_site_is_built_without_a_warning(tmp_path):
    """Strictly: a link that leads nowhere is a warning, and a page that no other names."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*command, DOCS, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text()
    assert "predict_batch" in page
    assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', page)  # offline


def test_every_file_that_the_docs_name_is_there():
    """Within the repository or within src/vla0; results.md names those of its commits."""
    others = {"mine.yaml", "convert_hf_to_gguf.py"}  # the reader's, and llama.cpp's
    path = re.compile(r"`([\w./-]+\.(?:py|md|yaml|sh)|(?:src|docs|tests|benchmarks)/[\w/-]*/)`")
    for page in {*ROOT.glob("*.md"), *DOCS.glob("*.md")} - {DOCS / "results.md"}:
        for name in set(path.findall(page.read_text())) - others:
            found = [(place / name).exists() for place in (ROOT, DOCS, ROOT / "src/vla0")]
            assert any(found), f"{page.name}: {name}"


def test_every_command_of_the_docs_is_one():
    """`vla0 NAME`, and the flags behind it."""
    from typer.main import get_command

    from vla0.cli.screen import app

    commands = get_command(app).commands
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    for page in pages:
        if page.name == "results.md":  # commands of their commits
            continue
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.partition("#")[0].split()
                if words[:1] != ["vla0"]:
                    continue
                assert words[1] in commands, f"{page.name}: {line}"
                command = commands[words[1]]
                if hasattr(command, "commands"):
                    command = command.commands[words[2]]
                known = {name for parameter in command.params for name in parameter.opts}
                for word in words:
                    flag = word.partition("=")[0]
                    if flag.startswith("--") and not flag.startswith("--robot."):
                        assert flag in known, f"{page.name}: {flag} in {line}"
