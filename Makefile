# Every target sets up .venv by itself. `make demo` takes about ten minutes on two CPU cores, `make study` about TODO.
PY := .venv/bin/python
PYTHON ?= python3

# The demo's settings; .ci/run makes them small.
STUDY ?= runs/demo
WARMUP_FLOPS ?= 4e11
FLOPS ?= 6e12
EVALS ?= 9
N ?= 500
SFT_LR ?= 3e-4
RL_LR ?= 1e-4

.PHONY: demo test study base clean

demo: .venv/ready
	$(call arm,evaluate.py tiny --n $(N) --out,base,evals)
	$(call arm,train_sft.py --model tiny $(EVAL) --evals 1 --flops $(WARMUP_FLOPS) --lr 1e-4 --out,warmup,args.json)
	$(call arm,train_sft.py --init $(STUDY)/warmup $(EVAL) --evals $(EVALS) --flops $(FLOPS) --lr $(SFT_LR) --out,sft,args.json)
	$(call arm,train_rl.py --init $(STUDY)/warmup $(EVAL) --evals $(EVALS) --flops $(FLOPS) --lr $(RL_LR) --out,rl,args.json)
	$(PY) evaluate.py --report $(STUDY)

EVAL = --eval-n $(N) --eval-split test

# $(call arm,SCRIPT AND FLAGS,NAME,FILE): start the run, or go on with it where it stopped.
arm = @if [ -e $(STUDY)/$(2)/$(3) ]; then $(if $(findstring evaluate,$(1)),true,$(PY) $(firstword $(1)) --resume $(STUDY)/$(2)); \
	else echo "$(PY) $(1) $(STUDY)/$(2)"; $(PY) $(1) $(STUDY)/$(2); fi

test: .venv/ready
	$(PY) -m pytest -q tests

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf .venv runs/demo
