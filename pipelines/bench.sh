#!/usr/bin/env bash
# Speed of the quantizers on this machine, beside the limit:  bash pipelines/bench.sh [--layer small|122b] [--result F --tag T]
# Every family at tiny size (docs/CHECKPOINTS.md):              bash pipelines/bench.sh families [--result F --tag T]
# Straight from a hub with a limited rate:                    bash pipelines/bench.sh hub --model models/razor-tiny --work work/hub
# Speed and memory of a GGUF file in llama.cpp:               bash pipelines/bench.sh --gguf F.gguf [--result F --tag T]
# Drafting with a GGUF's block of multi-token prediction, by its types: acceptance, answers, tokens/s:  bash pipelines/bench.sh mtp
# (MODEL, default models/razor-tiny-mtp, is packed with each of HEADS; a record each, $RESULTS/bench/razor_tiny_mtp_HEAD.json)
# Every measurement at the size of the real model, on one or two GPUs, 10 to 15 minutes on two:      bash pipelines/bench.sh h100
# Its parts, each with a time limit and a record under $RESULTS/bench (default results/): disk (data-free quantize of 6 layers beside
# the disk), gptq and ldlq (calibrated layers), gguf (a 48 GiB file in $SHM, decoded on the GPU and with experts on the CPU), eval_tiny
# and eval_35b (hf tokens/s). A part whose record is there is not run again. PARTS="disk gptq" takes some; eval_35b_vllm, which runs
# only when named, is eval_35b through vLLM (VLLM_PYTHON: an interpreter that has it, where it stands apart), and so does packed:
# products with packed matrices by humming-kernels, on one GPU. TINY=1 runs all of it small. DISK_DEVICES=cuda:0,cuda:0 keeps
# two shards at work in part disk (default: four on a GPU).
# Two lanes run side by side where there are two GPUs: what moves the disk (disk, gptq, ldlq) on the first; gguf, eval on the second,
# pinned to cores of their own. Without llama.cpp in $LLAMA_CPP the gguf part is left out, and said. HEADERS=DIR holds what
# `bash pipelines/bench.sh h100 headers DIR` made where llama.cpp's converter is: the head of each GGUF file.
# PYTHON=python3 uses that interpreter as it is, without env.sh. The lines that begin with "bench:" are the summary; ends with 1 where a
# part failed, whose log says why.
# `bash pipelines/bench.sh memory [METHOD] [CARD]`: the calibrated pass, of all its methods or one, under caps on the GPU's memory
# (SHAPES, SECONDS_EACH, HEADERS, TINY=1; CARD begins the records' names, default h100);
# `memory headers DIR` makes the heads of its GGUF files.
# PYTHON may be several words; the lanes run in subshells of their own.
# shellcheck disable=SC2086,SC2015,SC2030,SC2031
set -uo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mode=${1:-}
if [ "$mode" != h100 ] && [ "$mode" != memory ]; then
    OPTIONS_FOLLOW=1 source "$here/env.sh" || exit
    [ "${1:-}" != families ] || exec python "$here/src/distill/speed_families.py" "${@:2}"
    case " $* " in *" --gguf"[\ =]*) exec python "$here/src/eval/speed_gguf.py" "$@" ;; esac
    cd "$here" || exit 2
    [ "${1:-}" != hub ] || exec python src/quant/speed_quant.py "$@"
    [ "${1:-}" = mtp ] || exec python src/quant/speed_quant.py kernels "$@"
    shift
    model=${MODEL:-models/razor-tiny-mtp} work=${SCRATCH}/bench_mtp
    name=$(basename "$model") results=${RESULTS:-results}/bench
    mkdir -p "$work"
    for head in ${HEADS:-bf16 q8_0 iq4_nl q4_K iq3_xxs experts_iq3_xxs experts_iq2_xs}; do
        record=$results/${name//-/_}_${head,,}.json
        if [ -e "$record" ]; then echo "bench: $record is there"; continue; fi
        { # the experts of the block alone, or all its matrices
            case $head in experts_*) printf '^mtp\\.ffn_.*_exps=%s\n^mtp\\.=q8_0\n' "${head#experts_}" ;; *) printf '^mtp\\.=%s\n' "$head" ;; esac
            grep -v '^^mtp' configs/gguf_tensor_types_iq3.txt
        } >"$work/$head.txt"
        python src/quant/gguf_pack.py --config configs/gguf_iq3.env --model "$model" --out "$work/$head" --tensor-types "$work/$head.txt" \
            --token-weights "$work/$name-weights.st" --force || exit
        python src/eval/speed_gguf.py --gguf "$work/$head/"*.gguf --draft "${DRAFT:-1,3}" "$@" --result "$record" \
            --tag "${name//-/_}_${head,,}" || exit
    done
    exit
fi
shift
cd "$here" || exit 2
if [ -n "${PYTHON:-}" ]; then
    export PYTHONPATH=$here/src/quant:$here/src/eval:$here/src/distill${PYTHONPATH:+:$PYTHONPATH} SCRATCH=${SCRATCH:-$here/work}
    export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
else
    source env.sh || exit 2
    PYTHON=python
fi
export HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
if [ "$mode" = memory ]; then # HEADERS: a directory of headers/SHAPE.bin, made beforehand where llama.cpp's converter is
    results=${RESULTS:-results}/bench scratch=${SCRATCH}/bench_memory code=0
    mkdir -p "$results"
    for shape in ${SHAPES:-122b 35b}; do
        record=$results/${2:-${NAME:-h100}}_${shape}_memory${1:+_$1}.json
        [ ! -e "$record" ] || [ "${1:-}" = headers ] || { echo "bench: $record is there"; continue; }
        rm -rf "$scratch"
        # one layer of each kind of attention: on a hybrid model that lacks one of them llama.cpp aborts in its cache
        source=(--shape "$shape" --layers 2 --interval 2) run=(--seconds "${SECONDS_EACH:-3600}") more=()
        [ "$shape" != 122b ] || run+=(--caps "23,80,46,11")
        [ "$shape" != 35b ] || { run+=(--caps "11,80,23,46"); }
        [ -z "${1:-}" ] || run+=(--methods "$1")
        [ -z "${TINY:-}" ] || { source=(--shape tiny --layers 2 --interval 2 --experts 2) && run+=(--sequences 2 --length 32 --caps "1,2"); }
        [ ! -e "${HEADERS:-}/$shape.bin" ] || more=(--header "$HEADERS/$shape.bin")
        if [ "${1:-}" = headers ]; then
            $PYTHON src/quant/synthetic_moe.py "${source[@]}" --out "${2:?a directory}/$shape.bin" --header-only
            continue
        fi
        $PYTHON src/quant/synthetic_moe.py "${source[@]}" --out "$scratch/synthetic-$shape" &&
            $PYTHON src/quant/speed_quant.py memory --model "$scratch/synthetic-$shape" --work "$scratch/work" "${run[@]}" \
                "${more[@]}" --result "$record" --tag "$(basename "$record" .json)" || code=1
        rm -rf "$scratch"
    done
    exit $code
fi
parts=" ${PARTS:-disk gptq ldlq gguf eval_tiny eval_35b} "
results=${RESULTS:-results}/bench scratch=${SCRATCH}/bench_h100 name=${NAME:-h100_122b} tiny=${TINY:-}
log=${LOG:-$scratch/logs}
mkdir -p "$results" "$scratch" "$log"
rm -f "$log/failed"
started=$(date +%s)

if [ -n "$tiny" ]; then # the same commands at sizes of seconds on a CPU
    model=(--shape tiny) packed_model=(--shape tiny --layers 1) disk_model=(--shape tiny) layer_model=(--shape tiny --layers 2 --interval 2 --experts 2)
    eval_model=(--shape tiny --layers 2 --interval 2)
    disk=(--probe-gib 0.01 --shard-gib 0.003) calibration=(--sequences 2 --length 32 --batch 2)
    on_gpu=(--prompt 32 --generate 8 --batches 32 --sequences "1,2" --repetitions 1 --flash-attention on)
    on_cpu=("${on_gpu[@]}") evaluation=(--batches "1,2" --prompt 16 --generate 24) experts=2
else
    model=(--shape 122b) packed_model=(--shape 122b --layers 1 --vocab 1024) disk_model=(--shape 122b --layers "${LAYERS:-6}") layer_model=(--shape 122b --layers 4 --interval 2)
    eval_model=(--shape 35b --layers "${EVAL_LAYERS:-40}")
    disk=(--probe-gib 6) calibration=(--sequences 128 --length 512 --batch 32)
    on_gpu=(--prompt "512,2048" --generate 128 --batches "512,2048" --sequences "1,2,4,8,16,32" --flash-attention "on,off" --repetitions 3)
    on_cpu=(--prompt 2048 --generate 64 --batches 2048 --flash-attention on --repetitions 2)
    evaluation=(--batches "1,16,64" --prompt 256 --generate 48) experts=8
fi

say() { echo "bench: $(printf '%4d' $(($(date +%s) - started))) s  $*"; }

part() { # name limit record command...: run it unless its record is there; its output goes to a log of its own
    local part=$1 limit=$2 record=$3 begun code
    shift 3
    case $parts in *" ${part%%.*} "*) ;; *) return 0 ;; esac
    if [ -e "$record" ]; then say "$part: $record is there"; return 0; fi
    begun=$(date +%s)
    timeout --kill-after 5 "$limit" "$@" >"$log/$part.log" 2>&1
    code=$?
    if [ "$code" -eq 0 ]; then
        say "$part: $(($(date +%s) - begun)) s of at most $limit"
        grep -v -e '^\[' -e '%|' "$log/$part.log" | tail -n "${LINES_SHOWN:-24}" | sed 's/^/    /'
    else
        [ "$code" -eq 124 ] && say "$part: STOPPED at its limit of $limit s" || say "$part: FAILED with $code"
        tr '\r' '\n' <"$log/$part.log" | tail -n 8 | sed 's/^/    /'
        [ "$part" = kernel ] || echo "$part" >>"$log/failed" # without kernels of groups ldlq is measured all the same
    fi
    return "$code"
}

wants() { case $parts in *" $1 "*) [ ! -e "$results/${name}_$1.json" ] ;; *) false ;; esac }

header() { # name: the option that hands over the head of a GGUF file, where it was made beforehand
    [ -n "${HEADERS:-}" ] && [ -e "$HEADERS/$1.bin" ] && printf -- '--header\n%s\n' "$HEADERS/$1.bin"
}

headers() { # directory: make them
    mkdir -p "$1"
    $PYTHON src/quant/synthetic_moe.py "${model[@]}" --out "$1/gguf.bin" --header-only
    $PYTHON src/quant/synthetic_moe.py "${layer_model[@]}" --out "$1/ldlq.bin" --header-only
}

disk_lane() {
    if wants disk; then
        rm -rf "$scratch/disk"
        part disk.source 120 - $PYTHON src/quant/synthetic_moe.py "${disk_model[@]}" --out "$scratch/disk/synthetic-122b" &&
            part disk 240 "$results/${name}_disk.json" $PYTHON src/quant/speed_quant.py disk --model "$scratch/disk/synthetic-122b" \
                --work "$scratch/disk/work" "${disk[@]}" ${DISK_DEVICES:+--devices $DISK_DEVICES} --result "$results/${name}_disk.json" --tag "${name}_disk"
        rm -rf "$scratch/disk"
    fi
    if wants gptq || wants ldlq; then
        rm -rf "$scratch/layers"
        parts="$parts layers " part layers.source 120 - $PYTHON src/quant/synthetic_moe.py "${layer_model[@]}" --out "$scratch/layers/synthetic-122b"
        cp models/razor-tiny/tokenizer*.json models/razor-tiny/chat_template.jinja "$scratch/layers/synthetic-122b"
        local method more
        for method in gptq ldlq; do
            more=()
            if [ "$method" = ldlq ] && wants ldlq; then
                mapfile -t more < <(header ldlq)
                # What the kernels of whole groups get wrong on this machine must not cost the measurement.
                parts="$parts kernel " part kernel 480 - $PYTHON -m pytest -q -s -p no:cacheprovider tests/test_lattice_kernel.py ||
                    more+=(--no-group-kernels)
            fi
            part "$method" 300 "$results/${name}_$method.json" $PYTHON src/quant/speed_quant.py layers --model "$scratch/layers/synthetic-122b" \
                --work "$scratch/layers/work" --method "$method" "${calibration[@]}" "${more[@]}" \
                --result "$results/${name}_$method.json" --tag "${name}_$method"
        done
        rm -rf "$scratch/layers"
    fi
    if wants packed; then
        rm -rf "$scratch/packed"
        part packed.source 60 - $PYTHON src/quant/synthetic_moe.py "${packed_model[@]}" --out "$scratch/packed/synthetic-122b" &&
            LINES_SHOWN=40 part packed 235 "$results/${name}_packed.json" $PYTHON src/quant/speed_quant.py packed \
                --model "$scratch/packed/synthetic-122b" --work "$scratch/packed/work" \
                --result "$results/${name}_packed.json" --tag "${name}_packed"
        rm -rf "$scratch/packed"
    fi
}

gguf_lane() {
    local shm=${SHM:-$scratch/gguf} more
    if [ -z "${SHM:-}" ] && [ -z "$tiny" ] && [ "$(df --output=avail -B1G /dev/shm | tail -1)" -ge 60 ]; then shm=/dev/shm/bench_h100; fi
    part eval_tiny 90 "$results/${name}_eval_tiny.json" $PYTHON src/eval/speed_eval.py --model models/razor-tiny "${evaluation[@]}" \
        --result "$results/${name}_eval_tiny.json" --tag "${name}_eval_tiny"
    if wants gguf || { [ -z "$tiny" ] && [[ $parts == *" gguf "* && ! -e $results/${name}_gguf_offload.json ]]; }; then
        if [ -z "${LLAMA_CPP:-}" ]; then
            say "gguf: left out, LLAMA_CPP names no llama.cpp"
        else
            mkdir -p "$shm"
            mapfile -t more < <(header gguf)
            [ -e "$shm/made" ] || { part gguf.file 150 - $PYTHON src/quant/synthetic_moe.py "${model[@]}" --out "$shm/synthetic-122b.gguf" \
                --encode-experts "$experts" "${more[@]}" && touch "$shm/made"; }
            if [ -e "$shm/made" ]; then
                part gguf 240 "$results/${name}_gguf.json" $PYTHON src/eval/speed_gguf.py --gguf "$shm/synthetic-122b.gguf" --on-gpu \
                    "${on_gpu[@]}" --result "$results/${name}_gguf.json" --tag "${name}_gguf"
                [ -n "$tiny" ] || part gguf.offload 200 "$results/${name}_gguf_offload.json" $PYTHON src/eval/speed_gguf.py \
                    --gguf "$shm/synthetic-122b.gguf" --experts-on-cpu 999,24 --threads "$threads" "${on_cpu[@]}" \
                    --result "$results/${name}_gguf_offload.json" --tag "${name}_gguf_offload"
            fi
            rm -rf "$shm"
        fi
    fi
    part eval_35b 150 "$results/${name}_eval_35b.json" $PYTHON src/eval/speed_eval.py "${eval_model[@]}" "${evaluation[@]}" \
        --result "$results/${name}_eval_35b.json" --tag "${name}_eval_35b"
    if wants eval_35b_vllm; then
        rm -rf "$scratch/eval"
        part eval_35b_vllm.source 120 - $PYTHON src/quant/synthetic_moe.py "${eval_model[@]}" --out "$scratch/eval/35b" &&
            part eval_35b_vllm.form 60 - $PYTHON src/eval/vllm_form.py --model "$scratch/eval/35b" --in-place &&
            part eval_35b_vllm 500 "$results/${name}_eval_35b_vllm.json" ${VLLM_PYTHON:-$PYTHON} src/eval/speed_eval.py \
                --model "$scratch/eval/35b" --backend vllm "${evaluation[@]}" \
                --result "$results/${name}_eval_35b_vllm.json" --tag "${name}_eval_35b_vllm"
        rm -rf "$scratch/eval"
    fi
}

[ "${1:-}" = headers ] && { headers "${2:?a directory}"; exit; }
say "$(nvidia-smi -L 2>/dev/null | wc -l) GPUs, $(nproc) cores, $(df -h --output=avail "$scratch" | tail -1 | tr -d ' ') of disk, parts:$parts"
if [ -n "${LLAMA_CPP:-}" ] && ! "$LLAMA_CPP/llama-bench" --list-devices >"$log/devices.log" 2>&1; then
    # A build that was linked without the driver does not name it: it is loaded beforehand.
    driver=$(ldconfig -p | sed -n 's/.*libcuda\.so\.1 .*=> //p' | head -1)
    [ -n "$driver" ] && LD_PRELOAD=$driver "$LLAMA_CPP/llama-bench" --list-devices >"$log/devices.log" 2>&1 && export LD_PRELOAD=$driver
    say "llama.cpp: $(tail -1 "$log/devices.log")"
fi
cores=$(nproc) gpus=$($PYTHON -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -ge 2 ]; then
    few=$((cores / 4)) # the first lane needs cores to read, write and launch; experts in the CPU's memory want the others
    threads=$(((cores - few) / 4)),$(((cores - few) / 2)),$((cores - few))
    (export CUDA_VISIBLE_DEVICES=0 && taskset -cp 0-$((few - 1)) $BASHPID >/dev/null && disk_lane) &
    (export CUDA_VISIBLE_DEVICES=1 && taskset -cp $few-$((cores - 1)) $BASHPID >/dev/null && gguf_lane) &
    wait
else
    threads=$(((cores + 1) / 2)),$cores
    disk_lane
    gguf_lane
fi
[ ! -e "$log/failed" ] || { say "failed: $(paste -sd ' ' "$log/failed"); logs in $log"; exit 1; }
say "done: $(find "$results" -name "$name*" | wc -l) records in $results, logs in $log"
