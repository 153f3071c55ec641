# Every target is a thin call of `python -m minianyflow`, which is what to type where there is no make.
PYTHON ?= python3
RUN := .venv/bin/python -m minianyflow

.PHONY: demo video weights wan-tiny faults lab live live-html site bench-live docs test test-all check setup

demo: setup   ## race flow maps and consistency maps against the exact answer (DATASET=spiral|ring8|checkerboard, or DATA=points.csv)
	@$(RUN) demo $(if $(DATASET),--dataset $(DATASET)) $(if $(DATA),--data $(DATA))

video: setup  ## measure the committed video students at 1 to 128 steps (about 45 minutes)
	@$(RUN) video

weights: setup  ## train the video codec, teacher and students anew (an hour)
	@$(RUN) weights

wan-tiny: setup  ## distil a tiny Wan2.1: every stage, both architectures (under five minutes)
	@.venv/bin/python scripts/wan_tiny.py

faults: setup ## kill, fill, cut and poison tiny runs; every one must lose nothing (about ten minutes)
	@.venv/bin/python scripts/faults.py

lab: setup    ## the course, in JupyterLab
	@$(RUN) lab

live: setup   ## the scenes in one window of the browser, for a class, without a server (SCENE=race|triangle|backward_simulation|exposure|draw|video|stream)
	@$(RUN) live $(if $(SCENE),--scene $(SCENE))

live-html: setup  ## each scene as one page that needs no server
	@$(RUN) live-html

site: setup   ## the course as a site, offline: one folder for any static host or a USB stick
	@$(RUN) site

bench-live: setup  ## how quickly the scenes answer, in a headless browser
	@.venv/bin/python -m benchmarks.scene_speed

docs: setup   ## write the tables of README.md and docs/ anew from the committed results
	@$(RUN) docs

test: setup   ## every test but the long ones, notebooks and browser (Debian's, fetched where there is none): a quarter of an hour on two cores
	@$(RUN) setup --browser || true
	@$(RUN) test

test-all: setup  ## every test, then the fast ones with the lowest versions, then an audit of packages: half an hour or more
	@$(RUN) setup --browser || true
	@$(RUN) test-all

check: setup  ## lint, the floors of the house, docs, the fast tests: under a minute
	@$(RUN) check

setup:        ## .venv with the pinned packages; done once
	@$(PYTHON) -m minianyflow setup
