# Everything here also works without make: README.md shows the plain commands.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAGES := 01_extract_features 02_vocab 03_train_dual_t4 04_evaluate 05_deploy
export NLTK_DATA := $(abspath $(VENV))/nltk_data
export GRADIO_ANALYTICS_ENABLED := False

.DELETE_ON_ERROR:
.PHONY: help run test demo notebooks clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1|/' | column -t -s '|'

$(VENV)/run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -c 'import storyteller_utils as st; st.find_wordnet() or st.install_wordnet("$(NLTK_DATA)")' || \
		echo "WordNet could not be had: METEOR will run without synonyms, and say so."
	touch $@

$(VENV)/test: $(VENV)/run tests/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r tests/requirements.txt
	touch $@

run: $(VENV)/run  ## the five notebooks on the drawn sample (or PARAMS="-p dataset_dir ..."), then the score table
	@mkdir -p outputs/notebooks
	@set -e; for stage in $(STAGES); do \
		$(BIN)/papermill notebooks/$$stage.ipynb outputs/notebooks/$$stage.ipynb --log-output --no-progress-bar \
			--execution-timeout 86400; \
	done
	@echo; cat outputs/04_evaluate/scores.md
	@echo; echo "The Space is in outputs/05_deploy/space. See it: make demo MODEL=outputs/03_train_dual_t4/model"

test: $(VENV)/test  ## all tests
	$(BIN)/python -m pytest tests -q

demo: $(VENV)/run  ## the web app in a browser (MODEL=folder picks the captioner)
	$(if $(MODEL),MODEL="$(MODEL)") $(BIN)/python space/app.py

notebooks: $(VENV)/run  ## run the notebooks on the sample and store them with their outputs
	$(BIN)/python tests/store_notebooks.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) outputs
