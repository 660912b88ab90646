#!/usr/bin/env bash
# Fetches a public model from the Hugging Face Hub, makes a model folder of it, and draws a prompt. What is
# there already is not fetched again. Read the model's licence first: docs/public_models.md.
#
#   launch/public_model.sh dalle_mini|dalle_mega "PROMPT" [ARGUMENTS OF parti-jax generate]
#
# MODELS  folder of the downloads and of the model (default: runs/public at the top of the repository)
# EXTRAS  additional extras to install, such as gpu or tpu
# PARTI_JAX_VENV and PYTHON choose the environment's folder and its Python: see environment.sh.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

(($# >= 2)) || fail 'give a model and a prompt: public_model.sh dalle_mini "an avocado armchair"'
name=$1
models=${MODELS:-$repository/runs/public}
case $name in
  dalle_mini | dalle_mega) hub=dalle-mini/${name/_/-} ;;
  *) fail "$name is not one of dalle_mini, dalle_mega" ;;
esac
shift

install ".[hub,tokenizers${EXTRAS:+,$EXTRAS}]"
model=$models/$name
if [[ ! -f $model/config.json ]]; then
  fetch=("$venv/bin/python" "$repository/launch/fetch_from_hub.py")
  vqgan=dalle-mini/vqgan_imagenet_f16_16384
  "${fetch[@]}" "$hub" "$models/files/$name" \
    flax_model.msgpack config.json vocab.json merges.txt || exit 2
  "${fetch[@]}" "$vqgan" "$models/files/vqgan" flax_model.msgpack || exit 2
  "$venv/bin/parti-jax" import generator "$models/files/$name/flax_model.msgpack" \
    --format=dalle-mini --tokenizer="$models/files/vqgan/flax_model.msgpack" --dtype=float16 \
    --source="https://huggingface.co/$hub" --licence=Apache-2.0 --output_dir="$model"
fi
exec "$venv/bin/parti-jax" generate "$@" --model="$model"
