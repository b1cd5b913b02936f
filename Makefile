# Everything from a bare machine with Python 3.12: uv, the locked environment, what headless rendering needs.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .tools/bin/uv)
PYTHON ?= $(shell for p in python3.12 python3.13 python3; do $$p -c 'import sys; assert sys.version_info >= (3, 12)' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin
# Bytecode is kept: a dozen processes would each compile torch anew where this is set.
unexport PYTHONDONTWRITEBYTECODE
NEWEST := .venv-newest
TRANSFORMERS := 5.24.0
CORE := $(addprefix tests/, core decode test_policy.py test_backbones.py checkpoint/test_io.py bench/test_gpu.py)
APART := $(addprefix tests/, serve/test_server.py bench/test_bench.py)
CHECK := $(RUN)/python -c "from vla0.doctor import draw; draw()"
GL_PACKAGES := libegl1 libegl-mesa0 libgl1-mesa-dri

.PHONY: install rendering browser newest demo test test-all soak docs licences lint clean

install: .venv/installed rendering

.tools/bin/uv:
	@test -n "$(PYTHON)" || { echo "vla0: Python 3.12 or later is needed; got none on the PATH; install it first"; exit 2; }
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet uv

.venv/installed: pyproject.toml uv.lock $(filter .tools/bin/uv,$(UV))
	$(UV) sync --frozen --all-extras
	@touch .venv/installed

# The demo needs neither LIBERO nor its 340 MB of meshes. What is installed already stays.
.venv/demo: pyproject.toml uv.lock $(filter .tools/bin/uv,$(UV))
	$(UV) sync --frozen --inexact --no-default-groups --extra lerobot --extra metaworld
	@touch .venv/demo

# The simulator draws its pictures without a screen through EGL.
INSTALLED ?= .venv/installed
rendering: $(INSTALLED)
	@$(CHECK) || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends $(GL_PACKAGES) && $(CHECK); \
	  else \
	    echo "vla0: headless rendering needs Mesa's EGL; install it: sudo apt-get install $(GL_PACKAGES)"; exit 2; \
	  fi; }

# One test opens the report in a real browser; without one it is skipped and says so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1 || true; \
	  fi; }

# Of another family: make demo BACKBONE=qwen3_vl, or internvl, smolvlm, gemma3.
demo:
	@started=$$(date +%s) && $(MAKE) --no-print-directory rendering INSTALLED=.venv/demo && \
	  $(RUN)/python examples/demo.py --install-s $$(( $$(date +%s) - started )) \
	    $(if $(BACKBONE),--backbone $(BACKBONE) --out runs/demo-$(BACKBONE) --dataset runs/demo/dataset)

lint: .venv/installed
	$(RUN)/ruff format --check . && $(RUN)/ruff check . && $(RUN)/pyright

test: install browser newest lint
	$(RUN)/pytest -n 2 --dist worksteal
	$(NEWEST)/bin/pytest $(CORE)

test-all: install browser newest lint
	$(RUN)/pytest -n 2 --dist worksteal -m ''
	$(NEWEST)/bin/pytest -m '' $(CORE) $(APART)

# All attacks, for so many minutes: make soak MINUTES=10. What goes wrong is in runs/soak, with the seed that finds it again.
soak: install
	PYTHONPATH=tests $(RUN)/python -m soak --minutes $(or $(MINUTES),60)

# The site, in docs/_build/index.html; the pages of keys and errors are written from the source first.
docs: install
	$(RUN)/python docs/reference.py
	$(RUN)/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo docs/_build/index.html

licences: install
	$(RUN)/python docs/licences.py

# LeRobot holds transformers at 5.5. The rest is tested with the newest one too, in an environment of the base package alone.
newest: $(NEWEST)/installed

$(NEWEST)/installed: pyproject.toml uv.lock Makefile .venv/installed
	UV_PROJECT_ENVIRONMENT=$(NEWEST) $(UV) sync --quiet --frozen --no-default-groups
	$(UV) pip install --quiet --python $(NEWEST)/bin/python transformers==$(TRANSFORMERS) pytest pytest-timeout hypothesis
	@touch $(NEWEST)/installed

clean:
	rm -rf .venv $(NEWEST) .tools runs
