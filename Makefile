# Every target sets up .venv by itself and goes on where it was stopped.
#   make demo    the study with one seed, cards in words     make test    the tests
#   make study   learning-rate grid, then three seeds        make bench   speed and memory, a table (three minutes)
#   make base    the shipped tiny base, from nothing         make sheets   the pictures of the README
# and demo-vl, study-vl, base-vl for cards in pictures, -virl for walks in words, -virl-vl for walks through street views.
PY := .venv/bin/python
PYTHON ?= python3

# Settings of the demo; .ci/run makes them small.
TASK ?= gp-l
STUDY ?= runs/demo
GRID ?= runs/grid
GRID_EVALS ?= 3
STUDIES ?= runs/study
K ?= --k 8
SFT_BATCH ?= 256
WARMUP_STEPS ?= 6
WARMUP_BATCH ?= 256
PROBLEMS ?= 32
ATTEMPTS ?= 1
FLOPS ?= 4e12
EVALS ?= 7
N ?= 500
SFT_LR ?= 3e-4
RL_LR ?= 3e-5
SEED ?= 0
S ?=

.PHONY: demo demo-vl demo-virl demo-virl-vl arms test bench study study-vl study-virl study-virl-vl grid grid-sft grid-rl \
	base base-vl base-virl base-virl-vl sheets smoke clean

demo: arms
	$(PY) evaluate.py --report "$(STUDY)"

# In pictures. A step costs three times as much, so there are fewer, and fewer rates in the grid.
VL = TASK=gp-vl K= SFT_BATCH=128 FLOPS=$(FLOPS_VL) EVALS=$(EVALS_VL) N=$(N)
FLOPS_VL ?= 5e12
EVALS_VL ?= 5
STUDY_VL ?= runs/demo-vl
demo-vl:
	$(MAKE) demo $(VL) STUDY="$(STUDY_VL)"
study-vl:
	$(MAKE) study $(VL) GRID=runs/grid-vl STUDIES=runs/study-vl GRID_SFT="3e-5 1e-4 3e-4" GRID_RL="1e-5 3e-5 1e-4"

# Walks: two answers at each position, as in the paper.
VIRL = TASK=virl-l K= ATTEMPTS=2 PROBLEMS=16 SFT_BATCH=128 FLOPS=$(FLOPS_VIRL) EVALS=$(EVALS_VIRL) N=$(N)
FLOPS_VIRL ?= 4e12
EVALS_VIRL ?= 3
STUDY_VIRL ?= runs/demo-virl
demo-virl:
	$(MAKE) demo $(VIRL) STUDY="$(STUDY_VIRL)"
study-virl:
	$(MAKE) study $(VIRL) EVALS=2 GRID=runs/grid-virl STUDIES=runs/study-virl GRID_SFT="1e-5 3e-5 1e-4 3e-4 1e-3" GRID_RL="1e-5 3e-5 1e-4 3e-4"
VIRL_VL = TASK=virl-vl K= ATTEMPTS=2 PROBLEMS=16 SFT_BATCH=32 WARMUP_BATCH=32 GRID_EVALS=1 FLOPS=$(FLOPS_VIRL_VL) EVALS=$(EVALS_VIRL_VL) N=$(N_VIRL_VL)
FLOPS_VIRL_VL ?= 4e12
EVALS_VIRL_VL ?= 3
N_VIRL_VL ?= 150
STUDY_VIRL_VL ?= runs/demo-virl-vl
demo-virl-vl:
	$(MAKE) demo $(VIRL_VL) STUDY="$(STUDY_VIRL_VL)" SFT_LR=1e-4
study-virl-vl:
	$(MAKE) study $(VIRL_VL) EVALS=2 GRID=runs/grid-virl-vl STUDIES=runs/study-virl-vl GRID_SFT="1e-4 3e-4" GRID_RL="3e-5 1e-4"

arms: .venv/ready
	@$(PY) evaluate.py tiny --suite $(TASK) --n $(N) --attempts $(ATTEMPTS) $(K) --out "$(STUDY)/base" --or-resume
	$(call run,warmup$(S),train_sft.py --task $(TASK) --model tiny --evals 1 $(WARMUP),$(STUDY),test)
	$(call run,sft$(S),train_sft.py --task $(TASK) --init "$(STUDY)/warmup$(S)" --batch $(SFT_BATCH) --evals $(EVALS) --flops $(FLOPS) --lr $(SFT_LR),$(STUDY),test)
	$(call run,rl$(S),train_rl.py --task $(TASK) --problems $(PROBLEMS) --init "$(STUDY)/warmup$(S)" --evals $(EVALS) --flops $(FLOPS) --lr $(RL_LR),$(STUDY),test)

# Short on purpose, at a rate that rises from 1e-5 to 6e-5: the base already answers in the right form.
WARMUP = --steps $(WARMUP_STEPS) --batch $(WARMUP_BATCH) --lr 1e-4 --lr-warmup 10 --schedule constant

# $(call run,NAME,SCRIPT AND FLAGS,STUDY,SPLIT): start the run, or continue it where it was begun with these very flags.
run = @$(PY) $(2) --attempts $(ATTEMPTS) --eval-n $(N) --eval-split $(4) --seed $(SEED) --out "$(3)/$(1)" --or-resume

# The grid and the rule of choice were written down before any run of it: the smallest rate within one standard error of
# the best ID score on validation problems. Then three seeds with the chosen rates, on the test problems.
GRID_SFT = 3e-5 1e-4 3e-4 1e-3
GRID_RL = 3e-6 1e-5 3e-5 1e-4

study: .venv/ready
	for lr in $(GRID_SFT); do $(MAKE) grid ARM=sft LR=$$lr || exit 1; done
	for lr in $(GRID_RL); do $(MAKE) grid ARM=rl LR=$$lr || exit 1; done
	$(PY) evaluate.py --choose "$(GRID)"
	for s in 0 1 2; do $(MAKE) arms STUDY="$(STUDIES)" SEED=$$s S=-s$$s $$(cat "$(GRID)/chosen") || exit 1; done
	$(PY) evaluate.py --report "$(STUDIES)"

grid: .venv/ready
	$(call run,warmup,train_sft.py --task $(TASK) --model tiny --evals 0 $(WARMUP),$(GRID),val)
	@$(MAKE) grid-$(ARM)
grid-sft:
	$(call run,sft-lr$(LR),train_sft.py --task $(TASK) --init "$(GRID)/warmup" --batch $(SFT_BATCH) --evals $(GRID_EVALS) --eval-rows id rule fake --flops $(FLOPS) --lr $(LR),$(GRID),val)
grid-rl:
	$(call run,rl-lr$(LR),train_rl.py --task $(TASK) --problems $(PROBLEMS) --init "$(GRID)/warmup" --evals $(GRID_EVALS) --eval-rows id rule fake --flops $(FLOPS) --lr $(LR),$(GRID),val)

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

# Cards in pictures: that base gets eyes and learns to read cards of every look, then the same bad habits again.
LOOKS = 'black|red|both/layout=*/glyphs=*:4' '*/layout=*/style=*/glyphs=*/table=*/light=50|75|100|125/noise=0|8|15:3' \
	'*/layout=*/scheme=*/style=*/glyphs=*/table=*:4' text:1
EYES = --task gp-vl --batch 64 --eval-n 200 $(RULES) --visuals $(LOOKS)
base-vl: .venv/ready
	$(call make_base,see,--init assets/tiny-gp-l --fresh-eyes --steps 1800 --lr 3e-3 $(MUON) $(EYES) $(LEARN))
	$(call make_base,habits-vl,--init runs/base/see --train decoder --steps 200 --lr 1e-3 $(EYES) $(HABITS))
	$(PY) evaluate.py runs/base/habits-vl --suite gp-vl --export assets/tiny-gp-vl

# Walks: the words of both rules, then to pass by what is on the left; and the base with eyes.
WALKS = --eval-n 200 --rules absolute/told=rule:2 relative/told=rule:3 absolute relative
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

# For those who have weights: a picture, a question, an answer; then one step of SFT and one of RL.
#   make smoke MODEL=directory-as-the-hub-has-it IMAGE=picture ASK="What does it show?"
MODEL ?= assets/tiny-gp-l
IMAGE ?= runs/smoke/picture.png
ASK ?= What does the picture show?
SMOKE = --model $(MODEL) --lora-rank 16 --recompute --steps 1 --evals 0 --max-new-tokens 64
smoke: .venv/ready
	rm -rf runs/smoke && mkdir -p runs/smoke
	$(PY) -c "from PIL import Image; Image.radial_gradient('L').save('runs/smoke/picture.png')"
	$(PY) evaluate.py $(MODEL) --image "$(IMAGE)" --ask "$(ASK)"
	$(PY) train_sft.py $(SMOKE) --batch 8 --micro-batch 4 --out runs/smoke/sft
	$(PY) train_rl.py $(SMOKE) --problems 2 --group 4 --micro-batch 4 --out runs/smoke/rl

# Two halves of about the same length, side by side, since a test uses one core.
HALF = tests/test_robustness.py tests/test_training.py tests/test_report.py
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
