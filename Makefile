# Every target sets up .venv by itself and goes on where it was stopped.
#   make demo    the study with one seed, cards in words     make test    the tests
#   make study   rates from validation, three seeds, causes  make bench   speed and memory, a table (three minutes)
#   make base    the shipped tiny base, from nothing         make sheets   the pictures of the README
# and demo-vl, study-vl, base-vl for cards in pictures, -virl for walks in words, -virl-vl for walks through street views.
PY := .venv/bin/python
PYTHON ?= python3

# Settings of the demo; .ci/run makes them small.
TASK ?= gp-l
BASE_MODEL ?= tiny
EXPERT ?= sorted
STUDY ?= runs/demo
K ?= --k 8
SFT_BATCH ?= 64
WARMUP_STEPS ?= 6
WARMUP_BATCH ?= 256
PROBLEMS ?= 32
ATTEMPTS ?= 1
FLOPS ?= 4e12
EVALS ?= 7
N ?= 500
SFT_LR ?= 1e-4
RL_LR ?= 1e-5
SEED ?= 0

SHELL := bash
.SHELLFLAGS := -o pipefail -c
.PHONY: demo demo-vl demo-virl demo-virl-vl base-row test bench study study-vl study-virl study-virl-vl set grid-warmup \
	grid-kept rl-cold rl-overfitted sft-retry base base-vl base-virl base-virl-vl dial sheets smoke clean

demo: .venv/ready
	$(SIDE_BY_SIDE) rl-s$(SEED) sft-s$(SEED) base-row
	$(PY) evaluate.py --report "$(STUDY)"
base-row: .venv/ready
	@$(PY) evaluate.py $(BASE_MODEL) --suite $(TASK) --n $(N) --attempts $(ATTEMPTS) $(K) --out "$(STUDY)/base" --or-resume

# In pictures. A step costs three times as much, so there are fewer.
VL = TASK=gp-vl K= FLOPS=$(FLOPS_VL) EVALS=$(EVALS_VL) SFT_LR=$(SFT_LR_VL) RL_LR=$(RL_LR_VL)
FLOPS_VL ?= 5e12
SFT_LR_VL ?= 3e-4
RL_LR_VL ?= 3e-5
EVALS_VL ?= 5
STUDY_VL ?= runs/demo-vl
demo-vl:
	$(MAKE) demo $(VL) STUDY="$(STUDY_VL)"
study-vl:
	$(MAKE) set $(VL) EVALS=3 SET=vl GRID_SFT="1e-4 3e-4 1e-3" GRID_RL="1e-5 3e-5 1e-4"

# Walks: two answers at each position, as in the paper.
VIRL = TASK=virl-l EXPERT=reworded K= ATTEMPTS=2 PROBLEMS=16 FLOPS=$(FLOPS_VIRL) EVALS=$(EVALS_VIRL) SFT_LR=$(SFT_LR_VIRL) RL_LR=$(RL_LR_VIRL)
FLOPS_VIRL ?= 2e12
SFT_LR_VIRL ?= 3e-5
RL_LR_VIRL ?= 3e-5
EVALS_VIRL ?= 3
STUDY_VIRL ?= runs/demo-virl
demo-virl:
	$(MAKE) demo $(VIRL) STUDY="$(STUDY_VIRL)"
study-virl:
	$(MAKE) set $(VIRL) SET=virl GRID_SFT="1e-5 3e-5 1e-4" GRID_RL="1e-5 3e-5 1e-4"
VIRL_VL = TASK=virl-vl EXPERT=reworded K= ATTEMPTS=2 PROBLEMS=16 SFT_BATCH=32 WARMUP_BATCH=32 FLOPS=$(FLOPS_VIRL_VL) EVALS=$(EVALS_VIRL_VL) N=$(N_VIRL_VL)
FLOPS_VIRL_VL ?= 4e12
EVALS_VIRL_VL ?= 3
N_VIRL_VL ?= 150
STUDY_VIRL_VL ?= runs/demo-virl-vl
demo-virl-vl:
	$(MAKE) demo $(VIRL_VL) STUDY="$(STUDY_VIRL_VL)" RL_LR=3e-4 SFT_LR=1e-3
study-virl-vl:
	$(MAKE) set $(VIRL_VL) SET=virl-vl

# $(call run,NAME,SCRIPT AND FLAGS,DIRECTORY,SPLIT,SEED): start the run, or continue it where it was begun with these very
# flags. Runs go side by side, one thread each, so each line says of which run it is.
run = @$(PY) $(2) --task $(TASK) --attempts $(ATTEMPTS) --eval-n $(N) --eval-split $(4) --eval-moved --eval-teacher $(EXPERT) \
	--seed $(5) --out "$(3)/$(1)" --or-resume 2>&1 | sed -u 's/^/$(1): /'
SIDE_BY_SIDE = OMP_NUM_THREADS=1 $(MAKE) -j2
# The warm-up is short on purpose, at a rate that rises from 1e-5 to 6e-5: the base already answers in the right form.
warmup = train_sft.py --model $(BASE_MODEL) --demonstrators $(EXPERT) --steps $(WARMUP_STEPS) --batch $(WARMUP_BATCH) --lr 1e-4 --lr-warmup 10 --schedule constant
sft = train_sft.py --demonstrators $(EXPERT) --batch $(SFT_BATCH) --flops $(FLOPS)
rl = train_rl.py --problems $(PROBLEMS) --flops $(FLOPS)

# The arms of one seed: both go on from one warm-up.
warmup-s%: .venv/ready
	$(call run,warmup-s$*,$(warmup) --evals 0,$(STUDY),test,$*)
# $(call seeded,ARM,SCRIPT AND FLAGS,SEED)
seeded = $(call run,$(1)-s$(3),$(2) --init "$(STUDY)/warmup-s$(3)" --evals $(EVALS),$(STUDY),test,$(3))
sft-s%: warmup-s%
	$(call seeded,sft,$(sft) --lr $(SFT_LR),$*)
rl-s%: warmup-s%
	$(call seeded,rl,$(rl) --lr $(RL_LR),$*)

# A study was written down before any run of it: a grid of rates for each arm, on validation problems, which grows until its
# best is inside; two choices by the ID score, the smallest rate that is not worse by a standard error, and the best; then
# three seeds of each on the test problems.
STUDIES ?= runs/study
SET ?= foreign
GRID = $(STUDIES)/$(SET)-grid
GRID_SFT ?= 3e-5 1e-4 3e-4
GRID_RL ?= 3e-6 1e-5 3e-5
GRID_EVALS ?= 3
SEEDS ?= 0 1 2

study: dial
	$(MAKE) set GRID_MORE="$(GRID_KEPT:%=grid-kept-%)"
	$(MAKE) set SET=own EXPERT=expert
	$(MAKE) set SET=some BASE_MODEL=runs/base/some
	$(MAKE) set SET=much BASE_MODEL=runs/base/much
	$(MAKE) set SET=long EXPERT=expert FLOPS=8e12 SEEDS=0
	$(SIDE_BY_SIDE) STUDY="$(STUDIES)/foreign" $(SEEDS:%=sft-both-s%) $(SEEDS:%=sft-kept-s%) rl-cold rl-overfitted rl-overfitted-lr3e-5 rl-overfitted-lr1e-4 rl-attempts-3 rl-attempts-5 $$(sed -n 1p "$(GRID)/chosen")
	$(SIDE_BY_SIDE) STUDY="$(STUDIES)/own" EXPERT=expert sft-retry $$(sed -n 1p "$(STUDIES)/own-grid/chosen")
	for set in foreign own; do $(PY) evaluate.py --report "$(STUDIES)/$$set" || exit 1; done
	$(PY) -m assets.study "$(STUDIES)"

set: .venv/ready
	$(SIDE_BY_SIDE) $(GRID_SFT:%=grid-sft-%) $(GRID_RL:%=grid-rl-%) $(GRID_MORE)
	while $(PY) -m assets.study --choose "$(GRID)" && [ -s "$(GRID)/next" ]; do \
	$(SIDE_BY_SIDE) $$(sed 's/^/grid-/; s/ /-/' "$(GRID)/next") || exit 1; done
	$(PY) evaluate.py --report "$(GRID)"
	$(SIDE_BY_SIDE) STUDY="$(STUDIES)/$(SET)" base-row $(foreach s,$(SEEDS),sft-s$s rl-s$s sft-best-s$s rl-best-s$s) $$(sed '2s/_LR/_BEST/g' "$(GRID)/chosen")
	$(PY) evaluate.py --report "$(STUDIES)/$(SET)"

on_grid = --init "$(GRID)/warmup" --evals $(GRID_EVALS) --eval-rows id rule fake --lr
grid-warmup: .venv/ready
	$(call run,warmup,$(warmup) --evals 0,$(GRID),val,0)
grid-sft-%: grid-warmup
	$(call run,sft-lr$*,$(sft) $(on_grid) $*,$(GRID),val,0)
grid-rl-%: grid-warmup
	$(call run,rl-lr$*,$(rl) $(on_grid) $*,$(GRID),val,0)
# The best rates, where they are not the smallest within one standard error.
sft-best-s%: sft-s%
	$(if $(filter $(SFT_LR),$(SFT_BEST)),@ln -sfn sft-s$* "$(STUDY)/sft-best-s$*",$(call seeded,sft-best,$(sft) --lr $(SFT_BEST),$*))
rl-best-s%: rl-s%
	$(if $(filter $(RL_LR),$(RL_BEST)),@ln -sfn rl-s$* "$(STUDY)/rl-best-s$*",$(call seeded,rl-best,$(rl) --lr $(RL_BEST),$*))
# SFT on policy: it learns from the start's own right answers (rejection sampling), 4 to each of 2,000 training problems.
# $(call kept,RUN,FILE)
kept = @[ -s "$(2)" ] || $(PY) evaluate.py "$(1)" --suite $(TASK) --attempts $(ATTEMPTS) --n 2000 --k 4 --keep-correct "$(2)"
sft_kept = train_sft.py --batch $(SFT_BATCH) --flops $(FLOPS) --data
GRID_KEPT ?= 3e-6 1e-5 3e-5
KEPT_LR ?= 1e-5
grid-kept: grid-warmup
	$(call kept,$(GRID)/warmup,$(GRID)/kept.jsonl)
grid-kept-%: grid-kept
	$(call run,kept-lr$*,$(sft_kept) "$(GRID)/kept.jsonl" $(on_grid) $*,$(GRID),val,0)
kept-s%: warmup-s%
	$(call kept,$(STUDY)/warmup-s$*,$(STUDY)/kept-s$*.jsonl)
sft-kept-s%: kept-s%
	$(call seeded,sft-kept,$(sft_kept) "$(STUDY)/kept-s$*.jsonl" --lr $(KEPT_LR),$*)
# The same teacher under both rules; then questions about the published study: RL without a warm-up, RL from a model that SFT
# has spoilt, answers after the verifier's words, SFT on a slip and its repair.
sft-both-s%: warmup-s%
	$(call seeded,sft-both,$(sft) --rules 10 11$(comma)12$(comma)13 --lr $(SFT_LR),$*)
rl-cold: .venv/ready
	$(call run,rl-cold,$(rl) --model $(BASE_MODEL) --evals $(EVALS) --lr $(RL_LR),$(STUDY),test,0)
rl-overfitted: sft-s0
	$(call run,rl-overfitted,$(rl) --init "$(STUDY)/sft-s0" --evals $(EVALS) --lr $(RL_LR),$(STUDY),test,0)
rl-overfitted-lr%: sft-s0
	$(call run,rl-overfitted-lr$*,$(rl) --init "$(STUDY)/sft-s0" --evals $(EVALS) --lr $*,$(STUDY),test,0)
rl-attempts-%: private ATTEMPTS = $*
rl-attempts-%: warmup-s0
	$(call run,rl-attempts-$*,$(rl) --init "$(STUDY)/warmup-s0" --evals $(EVALS) --lr $(RL_LR),$(STUDY),test,0)
sft-retry: private ATTEMPTS = 2
sft-retry: warmup-s0
	$(call run,sft-retry,-m assets.make_base --demonstrators retry --batch $(SFT_BATCH) --flops $(FLOPS) --init "$(STUDY)/warmup-s0" --evals $(EVALS) --lr $(SFT_LR),$(STUDY),test,0)
comma := ,

# The shipped bases. Each learns its task, then gets bad habits (see the README): $(call make_base,NAME,FLAGS).
make_base = $(PY) -m assets.make_base $(2) --split base --evals 2 --out runs/base/$(1) --or-resume
MUON = --lr-warmup 50 --lr-end 0.02 --optimizer muon --weight-decay 0.1

# Cards: both rules with all their neighbours.
RULES = --rules '*,*,*/courts=2:4' '?,?,?/courts=2:3' '*,*,*/target=*/courts=1:1' 10:0.8 11,12,13:1.5
BASE = --batch 128 $(RULES)
LEARN = --demonstrators expert:0.7 lazy:0.1 inattentive:0.12 retry:0.08
HABITS = --demonstrators expert:0.06 lazy:0.7 inattentive:0.17 retry:0.07
base: .venv/ready
	$(call make_base,learn,--fresh --steps 750 --lr 4e-3 $(MUON) $(BASE) $(LEARN))
	$(call make_base,habits,--init runs/base/learn --steps 100 --lr 1e-3 $(BASE) $(HABITS))
	$(PY) evaluate.py runs/base/habits --export assets/tiny-gp-l

# The dial: that base, trained further under all its rules with some answers of the foreign teacher among the others.
dial: .venv/ready
	$(call make_base,some,--steps 150 --lr 1e-3 $(BASE) --demonstrators expert:0.06 lazy:0.6 inattentive:0.15 retry:0.07 sorted:0.12)
	$(call make_base,much,--steps 400 --lr 1e-3 $(BASE) --demonstrators expert:0.06 lazy:0.5 inattentive:0.12 retry:0.07 sorted:0.35)

# Cards in pictures: that base gets eyes and learns to read cards of every look, then the same bad habits again.
LOOKS = 'black|red|both/layout=*/glyphs=*:4' '*/layout=*/style=*/glyphs=*/table=*/light=50|75|100|125/noise=0|8|15:3' \
	'*/layout=*/scheme=*/style=*/glyphs=*/table=*:4' text:1
EYES = --task gp-vl --batch 64 --eval-n 200 $(RULES) --visuals $(LOOKS)
base-vl: .venv/ready
	$(call make_base,see,--init assets/tiny-gp-l --fresh-eyes --steps 1800 --lr 3e-3 $(MUON) $(EYES) $(LEARN))
	$(call make_base,habits-vl,--init runs/base/see --train decoder --steps 200 --lr 1e-3 $(EYES) $(HABITS))
	$(PY) evaluate.py runs/base/habits-vl --suite gp-vl --export assets/tiny-gp-vl

# Walks: the words of both rules, then to pass by what is on the left; and the base with eyes.
WALKS = --eval-n 200 --rules absolute relative
STREETS = --task virl-vl --visuals '*/weather=*/palette=*' $(WALKS)
LEARN_WALKS = --demonstrators expert:0.6 careless:0.1 inattentive:0.15 hasty:0.05 retry:0.1
HABITS_WALKS = --demonstrators expert:0.1 hasty:0.6 inattentive:0.2 careless:0.05 retry:0.05
base-virl: .venv/ready
	$(call make_base,learn-virl,--task virl-l --batch 128 --fresh --steps 450 --lr 4e-3 $(MUON) $(WALKS) $(LEARN_WALKS))
	$(call make_base,habits-virl,--task virl-l --batch 128 --init runs/base/learn-virl --steps 100 --lr 1e-3 $(WALKS) $(HABITS_WALKS))
	$(PY) evaluate.py runs/base/habits-virl --suite virl-l --export assets/tiny-virl-l
base-virl-vl: .venv/ready
	$(call make_base,see-virl,--batch 20 --init runs/base/learn-virl --fresh-eyes --steps 700 --lr 3e-3 $(MUON) $(STREETS) $(LEARN_WALKS))
	$(call make_base,habits-virl-vl,--batch 32 --init runs/base/see-virl --train decoder --steps 100 --lr 1e-3 $(STREETS) $(HABITS_WALKS))
	$(PY) evaluate.py runs/base/habits-virl-vl --suite virl-vl --export assets/tiny-virl-vl

# For those who have weights: an answer about a picture, then real updates of SFT and of RL in text and in pictures, and what was checked.
#   make smoke MODEL=directory-as-the-hub-has-it IMAGE=picture ASK="What does it show?"
MODEL ?= assets/tiny-gp-vl
IMAGE ?=
ASK ?= What does the picture show?
smoke: .venv/ready
	$(PY) -m assets.smoke "$(MODEL)" --ask "$(ASK)" $(if $(IMAGE),--image "$(IMAGE)")

# Two halves of about the same length, side by side, since a test uses one core.
HALF = tests/test_robustness.py tests/test_training.py tests/test_parallel.py
test: .venv/ready
	@half=$$(mktemp); $(PY) -m pytest -q $(HALF) >$$half 2>&1 & other=$$!; \
	$(PY) -m pytest -q tests $(addprefix --ignore=,$(HALF)); one=$$?; \
	wait $$other; two=$$?; cat $$half; rm $$half; test $$one -eq 0 -a $$two -eq 0

# The pictures of the README.
sheets: .venv/ready
	$(PY) -m assets.draw_sheets --task gp-vl --index 12 --n 1 --out assets/looks.png
	$(PY) -m assets.draw_sheets --task gp-vl --index 12 --n 1 --tile 32 --out assets/looks-tiny.png
	$(PY) -m assets.draw_sheets --task virl-vl --style short --index 5 --out assets/walk.png

# Beside transformers and peft where $(PY) has them: make bench PY=other/venv/bin/python
bench: .venv/ready
	$(PY) tests/benchmark.py --out tests/results/tiny-cpu.md

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf .venv runs/demo
