#!/usr/bin/env bash
# Trains a vocabulary, an image tokenizer and a generator on a folder of captioned pictures, and draws a
# prompt. The first run creates a virtual environment and installs the package in it. If it is
# interrupted, run it again and it resumes where it stopped.
#
#   launch/own_pictures.sh FOLDER "PROMPT" [--minutes=N] [ARGUMENTS OF parti-jax own_pictures]
#
# With --from=MODEL, the folder of a model, its generator is trained further instead, as a whole or as
# --finetune=decoder or lora says; its vocabulary and image tokenizer stay.
#
# FOLDER has pictures and captions.jsonl with lines {"file": "a/1.jpg", "caption": "..."}, or pictures
# each with a .txt file of the same name, or tar shards of such files.
#
# PARTI_JAX_VENV and PYTHON choose the environment's folder and its Python: see environment.sh.
# EXTRAS  additional extras to install, such as gpu or tpu
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

(($# >= 2)) || fail 'give the folder of your pictures and a prompt: own_pictures.sh FOLDER "PROMPT"'

install ".[data${EXTRAS:+,$EXTRAS}]"
exec "$venv/bin/parti-jax" own_pictures "$@"
