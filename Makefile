# make quickstart   install into .venv, get the data, compare four detectors, show a table and a picture
# make seeds        the same comparison over three seeds, for mean and spread
# make speed        what engine, fits and inference cost over the bare work, and whether the bars are held
# make scale        what a second process gains in a fit, and that the same comes of it
# make serve        requests/s of `flowood serve` beside the model alone, and that nothing is lost when it is stopped
# make contest      our detectors, anomalib's and plain baselines on one backbone; TILES=folder laid out as MVTec AD
# make suite        the same detectors on any folders laid out as MVTec AD, with masks or without; FOLDERS="one another",
#                   on another backbone and size with ARGS="--backbone tf_efficientnet_lite1 --image-size 240"
# make paper        the experiments of the paper behind the detectors, small enough for two cores;
#                   PROFILE=full: as published, on a GPU
# make report       the page of the newest benchmark (or RUN=folder), results/report/index.html
# make pages        draw parts, train on them, and photograph the pages: the pictures in docs/pages
# make scores       every anomaly score on one flow of pixels
# make test         install into .venv, run all tests, in two processes; WORKERS=0: in one, for pdb
# make test-fast    the tests of flows, scores and metrics alone
# make faults       kills at random moments, full disks and the like under every command: what was tried and survived;
#                   FAULTS=6 kills of each command
# make gpu          the tests of devices on this machine's GPU, then what it makes of the detectors, couplings and the paper
#                   (benchmarks/gpu.py); with .venv or with PYTHON=…, which has what they import
# make notebooks    runs the notebooks, and stores them with what they show
# make docs         the documentation site, into site/html: a broken link, or an anchor that is not there, is an error
# make lint         ruff and mypy
# make pre-commit   what a commit is checked for, on all files
PYTHON ?= python3
BIN := .venv/bin
BACKBONE := backbones/tf_efficientnet_lite0

# glibc hands the buffers of every operation back to the system and asks for them again, which slows a backbone down
# on the CPU. Keep up to 512 MiB, and buffers of up to 32 MiB, instead.
export MALLOC_TRIM_THRESHOLD_ ?= 536870912
export MALLOC_MMAP_THRESHOLD_ ?= 33554432

# An installation takes much less time if only what is imported is compiled, when it is.
export PYTHONDONTWRITEBYTECODE :=

TILES ?=
FOLDERS ?=
ARGS ?=
SEEDS ?= 0 1 2
PROFILE ?= laptop
WORKERS ?= 2
RUN ?= $(lastword $(sort $(wildcard runs/benchmark/*)))

.PHONY: quickstart seeds speed scale serve contest suite scores paper report pages notebooks test test-fast faults gpu docs lint pre-commit fashion-mnist chromium

quickstart: .venv/offline fashion-mnist $(BACKBONE)/model.safetensors
	$(BIN)/flowood benchmark --config configs/benchmark/quickstart.yaml

seeds: .venv/offline fashion-mnist $(BACKBONE)/model.safetensors
	@mkdir -p runs
	sed 's/^  seed: 0$$/  seed: {grid: [0, 1, 2]}/' configs/benchmark/quickstart.yaml > runs/quickstart_seeds.yaml
	$(BIN)/flowood benchmark --config runs/quickstart_seeds.yaml

speed: .venv/test fashion-mnist
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python -m benchmarks.latency

scale: .venv/offline
	$(BIN)/python -m benchmarks.scale processes $(ARGS)

serve: .venv/test
	$(BIN)/python -m benchmarks.serve $(ARGS)

# Repeat it to go on where it was interrupted.
contest: .venv/offline fashion-mnist
	$(BIN)/python -m benchmarks.contest run --seeds $(SEEDS) $(if $(TILES),--industrial $(TILES),--parts one_class cross)

# Repeat it to go on where it was interrupted.
suite: .venv/offline
	@test -n "$(FOLDERS)" || { echo 'Name folders laid out as MVTec AD: make suite FOLDERS="one another"' >&2; exit 1; }
	$(BIN)/python -m benchmarks.suite run $(FOLDERS) --seeds $(SEEDS) $(ARGS)

# Repeat it to go on where it was interrupted.
scores: .venv/offline fashion-mnist
	$(BIN)/python -m benchmarks.scores run

# Repeat it to go on where it was interrupted.
paper: .venv/offline fashion-mnist
	$(BIN)/python -m benchmarks.paper run --profile $(PROFILE)

report: .venv/offline
	@test -n "$(RUN)" || { echo "No benchmark in runs/benchmark: run one (make quickstart), or give its folder: RUN=folder" >&2; exit 1; }
	$(BIN)/flowood report "$(RUN)" --output results/report

pages: .venv/test chromium
	@command -v pdftoppm >/dev/null || { echo "No pdftoppm here. On Debian, as root: apt-get install poppler-utils" >&2; exit 1; }
	$(BIN)/python -m benchmarks.pages docs/pages

# A worker that is through with its share takes over half of what the other one still has.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
test: .venv/test chromium
	$(PYTEST) $(PYTEST_ARGS)

test-fast: .venv/test
	$(PYTEST) tests/flows tests/scores tests/metrics $(PYTEST_ARGS)

# In one process, so that no more than two commands run at once.
FAULTS ?= 6
faults: .venv/test
	@mkdir -p results
	FAULTS=$(FAULTS) FAULTS_TABLE=$(CURDIR)/results/faults.md $(BIN)/python -m pytest tests/faults $(PYTEST_ARGS); \
		status=$$?; cat results/faults.md; exit $$status

# Installs nothing: a machine with a GPU has a PyTorch of its own. Without a GPU the device is a pretended one alone.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
gpu:
	@$(GPU_PYTHON) -c "import torch; cuda = torch.cuda.is_available(); \
		print('PyTorch', torch.__version__, 'on', torch.cuda.get_device_name() if cuda else 'a machine without a GPU')"
	$(GPU_PYTHON) -m pytest -v tests/test_devices.py $(PYTEST_ARGS)
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# From their beginning, with nothing of an earlier run, and without times, which would differ after each.
notebooks: .venv/test .venv/docs fashion-mnist
	rm -rf notebooks/parts notebooks/results
	$(BIN)/jupyter nbconvert --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

# The pages are the repository's, in their places: links between them work on GitHub and on the site. Notebooks become
# Markdown, by which they look as the other pages do, and links to them follow.
docs: .venv/docs
	@rm -rf site/pages && mkdir -p site/pages
	git ls-files -co --exclude-standard '*.md' '*.ipynb' '*.png' '*.webp' '*.csv' '*.yaml' docs/site.css | grep -v '^tests/' | tar cT - | tar xC site/pages
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown site/pages/notebooks/*.ipynb
	rm site/pages/notebooks/*.ipynb
	grep -rlZ --include='*.md' '\.ipynb' site/pages | xargs -0 sed -i 's/\(\]([^)]*\)\.ipynb/\1.md/g'
	NO_MKDOCS_2_WARNING=1 PYTHONWARNINGS=ignore::FutureWarning $(BIN)/mkdocs build

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pre-commit: .venv/dev
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

.venv/bin/pip:
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -q && apt-get install -qy --no-install-recommends python3-venv && $(PYTHON) -m venv .venv; \
		else echo "Install Python's venv module first; on Debian, as root: apt-get install python3-venv" >&2; exit 1; fi; }

# The stamps: one for each set of extras.
.venv/offline .venv/test .venv/dev .venv/docs: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --disable-pip-version-check --progress-bar on --no-compile -e ".[$(@F)]"
	@touch $@

fashion-mnist:
	@if [ ! -d /usr/share/datasets/fashion-mnist ] && [ ! -d datasets/FashionMNIST/raw ]; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -q && apt-get install -qy --no-install-recommends dataset-fashion-mnist; \
		else \
			echo "FashionMNIST is not on this machine. On Debian, as root: apt-get install dataset-fashion-mnist" >&2; \
			echo "Going on: torchvision downloads it where there is a network." >&2; \
		fi; \
	fi

# What pages are looked at with: without it `make pages` fails, and the tests of pages are skipped.
chromium:
	@missing=; for program in chromium chromedriver pdftotext; do command -v $$program || missing=1; done >/dev/null; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -q && apt-get install -qy --no-install-recommends chromium chromium-driver poppler-utils \
				|| echo "Chromium could not be installed." >&2; \
		else echo "No Chromium here. On Debian, as root: apt-get install chromium chromium-driver poppler-utils" >&2; fi; \
	fi

$(BACKBONE)/model.safetensors: | .venv/offline
	$(BIN)/flowood backbone $(notdir $(BACKBONE)) $(BACKBONE)
