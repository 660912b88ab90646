#!/usr/bin/env bash
# Trains one model of OpenMoji's names and of scenes made of OpenMoji at 128×128 pixels, from nothing:
# vocabulary, image tokenizer and its second phase, image tokens, generator, ranker, super-resolution. It
# exports them to one folder and evaluates it on both data sets. The first run creates a virtual
# environment and installs the package in it. If it is interrupted, run it again with the same flags:
# finished steps are skipped, and the others resume where they stopped.
#
#   launch/scenes_demo.sh [FLAGS]
#
#   --output_dir=DIR            folder of everything it writes (default: runs/scenes)
#   --minutes=N                 approximate training time, divided among the parts after timing the steps of
#                               each (default: the steps of the gin files)
#   --tokenizer_steps=N, --second_phase_steps=N, --generator_steps=N, --ranker_steps=N,
#   --super_resolution_steps=N  training steps of a part, instead of --minutes
#   --tokenizer=KIND            vit_vqgan (default) or vqgan
#   --second_phase=KIND         decoder (default), adversarial or none
#   --smoke                     tiny networks and pictures, a few steps each: tests that all steps run
#   --gin.NAME=VALUE            a gin value of all training runs, or of the data (openmoji, openmoji_scenes)
#
# PARTI_JAX_VENV and PYTHON choose the environment's folder and its Python: see environment.sh.
# EXTRAS  additional extras to install, such as gpu or tpu
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

data=gin_configs/tasks/openmoji_names_and_scenes.gin
# Shares of the training time in percent; without a second phase the generator has more.
declare -A shares=(
  [tokenizer]=25 [second_phase]=10 [generator]=45 [ranker]=12 [super_resolution]=8
)
timed_steps=30
least_free_kilobytes=3000000

output_dir=runs/scenes minutes='' tokenizer=vit_vqgan second_phase=decoder smoke=''
declare -A steps=()
data_flags=() train_flags=() settings=()
for argument in "$@"; do
  value=${argument#*=}
  case $argument in
    --output_dir=?*) output_dir=$value ;;
    --minutes=*) minutes=$value ;;
    --tokenizer_steps=* | --second_phase_steps=* | --generator_steps=* | --ranker_steps=* | \
      --super_resolution_steps=*)
      [[ $value =~ ^[1-9][0-9]{0,7}$ ]] || fail "$argument: not a number of steps, such as 2000"
      part=${argument%%_steps=*}
      steps[${part#--}]=$value ;;
    --tokenizer=vit_vqgan | --tokenizer=vqgan) tokenizer=$value ;;
    --tokenizer=*) fail "$argument: choose vit_vqgan or vqgan" ;;
    --second_phase=decoder | --second_phase=adversarial | --second_phase=none) second_phase=$value ;;
    --second_phase=*) fail "$argument: choose decoder, adversarial or none" ;;
    --smoke) smoke=yes ;;
    --gin.openmoji*=* | --gin.NAMES_RATE=* | --gin.SCENES_RATE=*) data_flags+=("$argument") ;;
    --gin.?*=?*) train_flags+=("$argument") ;;
    *) fail "$argument: unknown flag; those that exist are described at the top of $0" ;;
  esac
  [[ $argument == --output_dir=* ]] || settings+=("$argument")
done
if [[ -n $minutes ]]; then
  [[ $minutes =~ ^[1-9][0-9]{0,5}$ ]] || fail "--minutes=$minutes: not a whole number from 1"
  ((${#steps[@]} == 0)) || fail 'give either --minutes or numbers of steps, not both'
fi

# What the pictures are drawn from, and the pictures at 128 and 512 pixels, need their place too.
mkdir -p "$output_dir/done" "$output_dir/steps" \
  || fail "--output_dir=$output_dir: the folder can't be made; choose another one"
[[ -w $output_dir ]] || fail "--output_dir=$output_dir: no permission to write; choose another one"
free=$(df -Pk "$output_dir" | awk 'NR == 2 { print $4 }')
((free > least_free_kilobytes)) \
  || fail "--output_dir=$output_dir: 3 GB are needed on its disk; make room or choose another folder"
wanted=$(printf '%s\n' "${settings[@]+"${settings[@]}"}")
if [[ -f $output_dir/settings && $(<"$output_dir/settings") != "$wanted" ]]; then
  begun=$(tr '\n' ' ' <"$output_dir/settings")
  fail "$output_dir was begun with the flags '${begun% }'; give the same ones, or another --output_dir"
fi

install ".[data${EXTRAS:+,$EXTRAS}]"
printf '%s\n' "$wanted" >"$output_dir/settings"
output_dir=$(cd "$output_dir" && pwd)
cd "$repository"

if [[ -n $smoke ]]; then
  minutes=''
  for part in "${!shares[@]}"; do
    steps[$part]=${steps[$part]:-4}
  done
  data_flags=(
    --gin.openmoji.size=32 --gin.openmoji.captions=4
    --gin.openmoji_scenes.size=32 --gin.openmoji_scenes.train_size=16
    "${data_flags[@]+"${data_flags[@]}"}"
  )
  train_flags=(
    --gin.train.batch_size=4 --gin.train.evaluate_every=0 --gin.train.pictures_every=0
    --gin.train.log_every=2 "${train_flags[@]+"${train_flags[@]}"}"
  )
fi

# shellcheck source=child.sh
source "$repository/launch/child.sh"

parts=(
  vocabulary tokenizer second_phase tokens_names tokens_scenes generator ranker super_resolution
  export evaluation_names evaluation_scenes
)

# is_done NAME: whether a step has finished before.
is_done() {
  [[ -e $output_dir/done/$1 ]]
}

# step NAME COMMAND ...: runs the command of a step unless it has finished before.
step() {
  local name=$1 status=0 number
  shift
  is_done "$name" && return
  for number in "${!parts[@]}"; do
    [[ ${parts[$number]} != "$name" ]] || break
  done
  printf '[%d/%d] %s, %s\n$' "$((number + 1))" "${#parts[@]}" "$name" "$(date '+%Y-%m-%d %H:%M')"
  printf ' %q' "$@"
  echo
  run "$@" || status=$?
  stop_if_asked "$name" "$status"
  touch "$output_dir/done/$name"
}

# stop_if_asked NAME STATUS: ends the script if a command failed or was interrupted.
stop_if_asked() {
  local status=$2
  [[ -z $stopping || $status -ne 0 ]] || status=75
  ((status == 0)) && return
  printf 'scenes_demo.sh: %s ended with status %d; the same command resumes it\n' "$1" "$status" >&2
  exit "$status"
}

# flags_of PART: sets `flags` to the flags of a training run, except for its steps.
flags_of() {
  local last_tokenizer=$output_dir/tokenizer run=$1
  [[ $second_phase == none || $1 == second_phase ]] || last_tokenizer=$output_dir/second_phase
  case $1 in
    second_phase) run=tokenizer_$second_phase ;;
  esac
  flags=("--gin_file=gin_configs/runs/scenes_$run.gin")
  [[ -z $smoke ]] || flags+=('--gin_file=gin_configs/recipes/scenes_smoke.gin')
  case $1 in
    tokenizer | second_phase)
      [[ $tokenizer == vit_vqgan ]] || flags+=('--gin.TokenizerObjective.model=@VQGANConfig()') ;;&
    second_phase) flags+=("--gin.TokenizerObjective.first_phase='$output_dir/tokenizer'") ;;
    generator)
      flags+=(
        "--gin.vocabulary.path='$output_dir/vocabulary.model'"
        "--gin.token_cache_names/token_cache.path='$output_dir/tokens_names'"
        "--gin.token_cache_scenes/token_cache.path='$output_dir/tokens_scenes'"
        "--gin.GeneratorObjective.tokenizer='$last_tokenizer'"
      ) ;;
    ranker)
      flags+=(
        "--gin.vocabulary.path='$output_dir/vocabulary.model'"
        "--gin.RankerObjective.tokenizer='$last_tokenizer'"
      ) ;;
    super_resolution)
      flags+=("--gin.SuperResolutionObjective.tokenizer='$last_tokenizer'")
      [[ -z $smoke ]] || flags+=(
        --gin.SuperResolutionObjective.image_size=128 --gin.SuperResolutionObjective.crop=16
      ) ;;
  esac
  flags+=("${data_flags[@]+"${data_flags[@]}"}" "${train_flags[@]+"${train_flags[@]}"}")
}

# schedule PART STEPS: adds the flags of a run of so many steps to `flags`.
schedule() {
  local count=$2
  flags+=(
    "--gin.train.steps=$count"
    "--gin.warmup_cosine.warmup_steps=$((count < 2000 ? count / 10 : 200))"
    "--gin.train.checkpoint_every=$((count < 250 ? count : 250))"
  )
  if [[ $1 == tokenizer ]]; then
    flags+=(
      "--gin.TokenizerObjective.quantize_from=$((count < 2400 ? count / 8 : 300))"
      "--gin.TokenizerObjective.revive_until=$((3 * count / 4))"
    )
  fi
}

# measure PART: times the steps of a run and writes how many fit in its share of --minutes.
measure() {
  local part=$1 folder=$output_dir/timing status=0 rate batch
  rm -rf "$folder"
  flags_of "$part"
  schedule "$part" "$timed_steps"
  echo "timing $timed_steps steps: $part"
  run "$venv/bin/parti-jax" train "${flags[@]}" --gin.train.log_every=10 \
    --gin.train.evaluate_every=0 --gin.train.pictures_every=0 --gin.train.checkpoint_every=0 \
    "--model_dir=$folder" 2>"$output_dir/timing.log" || status=$?
  ((status == 0)) || tail -n 3 "$output_dir/timing.log" >&2
  stop_if_asked "$part" "$status"
  rate=$(grep -o 'examples_per_second [0-9.e+-]*' "$output_dir/timing.log" | tail -n 1 | cut -d ' ' -f 2)
  batch=$(sed -n 's/^train\.batch_size = //p' "$folder/config.gin")
  awk -v rate="$rate" -v batch="$batch" -v minutes="$minutes" -v share="${shares[$part]}" \
    'BEGIN { count = int(0.6 * minutes * share * rate / batch); print (count < 40 ? 40 : count) }' \
    >"$output_dir/steps/$part"
  rm -rf "$folder"
}

# train PART: trains a part unless it has finished before.
train() {
  local part=$1 count=${steps[$1]:-}
  is_done "$part" && return
  if [[ -n $minutes ]]; then
    [[ -s $output_dir/steps/$part ]] || measure "$part"
    count=$(<"$output_dir/steps/$part")
  fi
  flags_of "$part"
  [[ -z $count ]] || schedule "$part" "$count"
  step "$part" launch/keep_running.sh "$venv/bin/parti-jax" train "${flags[@]}" \
    "--model_dir=$output_dir/$part"
}

# tokenize NAME SOURCE: writes the token cache of one of the data sets.
tokenize() {
  step "tokens_$1" "$venv/bin/parti-jax" tokenize "--gin_file=$data" "--gin.data.source='$2'" \
    "${data_flags[@]+"${data_flags[@]}"}" "--tokenizer=$output_dir/tokenizer" \
    --splits train validation "--output_dir=$output_dir/tokens_$1"
}

# evaluate NAME DATASET [FLAG]: judges the model's pictures of one of the data sets.
evaluate() {
  local few=()
  [[ -z $smoke ]] || few=(--max_prompts=2 --num_images=2 --splits validation)
  step "evaluation_$1" "$venv/bin/parti-jax" evaluate "--dataset=$2" "${@:3}" \
    "--model=$output_dir/model" --rank "${few[@]+"${few[@]}"}" "--output_dir=$output_dir/evaluation_$1"
}

drawing=tokenizer
[[ $second_phase == none ]] || drawing=second_phase

step vocabulary "$venv/bin/parti-jax" vocabulary "--gin_file=$data" --task=mixture_texts \
  "${data_flags[@]+"${data_flags[@]}"}" --size=4000 --at_most --model_type=bpe \
  --character_coverage=1 "--output=$output_dir/vocabulary.model"
train tokenizer
[[ $second_phase == none ]] || train second_phase
tokenize names openmoji
tokenize scenes openmoji_scenes
train generator
train ranker
train super_resolution
step export "$venv/bin/parti-jax" export "--tokenizer=$output_dir/$drawing" \
  "--generator=$output_dir/generator" "--ranker=$output_dir/ranker" \
  "--super_resolution=$output_dir/super_resolution" "--vocabulary=$output_dir/vocabulary.model" \
  --guidance_scale=1.5 "--output_dir=$output_dir/model" --overwrite
evaluate names openmoji
evaluate scenes openmoji_scenes --of_seen_names
cat <<END
The model is in $output_dir/model, its evaluation in $output_dir/evaluation_names and
$output_dir/evaluation_scenes. To draw with it:
  $venv/bin/parti-jax generate "a small red heart to the left of two books" --model=$output_dir/model
END
