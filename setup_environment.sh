#!/usr/bin/env bash
# Usage: bash setup_environment.sh [options]
#
# Creates .venv, installs the pinned packages and builds the corpus, as needed by train_all_models.py and the tests.
# Writes only to this folder. Requires Python 3.11 to 3.14, no root.
# Idempotent: a second run only repairs what is missing.
#
#   --python PATH       use this Python
#   --torch_index URL   install torch from this wheel index, for example for an older NVIDIA driver:
#                       https://download.pytorch.org/whl/cu126
#   --no_corpus         do not build the corpus
#   --no_compiler       with a GPU, accept that the C compiler or the Python headers are missing, which torch.compile
#                       needs: training is slower without it
#   --help              show this text

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
STARTED="$VENV/.setup-started"      # exists during installation, to detect an interrupted set-up
STAMP="$VENV/.setup-stamp"          # the requirements that were installed
EXTRAS_TRIED="$VENV/.extras-tried"  # optional GPU packages are tried only once
PYTHONS="3.11 3.12 3.13 3.14"       # versions for which all pinned packages have wheels
AGAIN="bash setup_environment.sh --torch_index"
TORCH="$(sed -n 's/^torch==//p' "$ROOT/requirements.txt")"
WHEELS="https://download.pytorch.org/whl"
WITHOUT_GPU="  or continue without the GPU: $AGAIN $WHEELS/cpu  (and train with --device cpu)"
NVIDIA_DEVICE=/dev/nvidiactl                # there if this system was given a GPU
NVIDIA_DRIVER=/proc/driver/nvidia/version   # also there in a container without a GPU if its host has one
# torch 2.13.0 on the package index requires cuda-toolkit 13.0.3. CUDA 13.x needs driver 580 or newer, CUDA 12.x needs
# 525 or newer: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html

say() { printf '%s\n' "$@"; }
die() { say "$@" >&2; exit 1; }
misuse() { say "error: $1" >&2; exit 2; }
limited() {  # limited SECONDS COMMAND: in the foreground, where the command receives Ctrl-C
    timeout --foreground "$@"
}
python_of() {  # python_of PYTHON: its version and base installation
    limited 30 "$1" -c 'import os, sys; print("%d.%d" % sys.version_info[:2], os.path.realpath(sys._base_executable))'
}
in_venv() { (cd / && "$VENV_PYTHON" "$@"); }  # from another folder, so that only installed packages are importable

parse_arguments() {
    ASKED_PYTHON="" ASKED_INDEX="" WITH_CORPUS=1 WITH_COMPILER=1
    while [ $# -gt 0 ]; do
        case "$1" in
            --help|-h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
            --no_corpus) WITH_CORPUS=0; shift; continue ;;
            --no_compiler) WITH_COMPILER=0; shift; continue ;;
            --python|--torch_index) [ -n "${2-}" ] || misuse "$1 needs a value" ;;
            *) misuse "unknown option: $1 (see --help)" ;;
        esac
        if [ "$1" = --python ]; then ASKED_PYTHON="$2"; else ASKED_INDEX="${2%/}"; fi
        shift 2
    done
    if [ -n "$ASKED_PYTHON" ] && ! command -v "$ASKED_PYTHON" >/dev/null; then
        misuse "--python $ASKED_PYTHON: no such program"
    fi
}

warn_about_ssh() {  # unless it runs in tmux or screen, or with nohup, which ignores SIGHUP
    if [ -n "${SSH_CONNECTION-}" ] && [ -z "${TMUX-}${STY-}$(trap -p HUP)" ]; then
        say "Note: set-up and what follows end with this SSH connection; start tmux first: tmux new -s training"
    fi
}

stay_in_this_folder() {
    # Keep the download cache in the checkout and remove it at the end, so that an interrupted set-up does not download
    # gigabytes twice.
    export PIP_CACHE_DIR="$ROOT/.cache/pip" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
    if [ ! -t 1 ]; then export PIP_QUIET=1; fi
    export RUSTUP_HOME="$PIP_CACHE_DIR/rustup"  # pip calls rustc --version, and rustup would create ~/.rustup
    unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX  # the user's module path would hide missing packages
    # Serialize set-ups in the same folder. The lock is on the folder itself, so no lock file is left behind.
    exec 9<"$ROOT"
    flock -n 9 || { say "Another set-up is running in this folder; waiting for it to finish."; flock 9; }
}

find_gpu() {  # sets GPU and DRIVER, or GPU and, if it is there but cannot be queried, UNSEEN: why not
    GPU="" DRIVER="" UNSEEN=""
    case "${CUDA_VISIBLE_DEVICES-unset}" in
        ""|-1) say "CUDA_VISIBLE_DEVICES hides every GPU: setting up for the CPU."; return ;;
    esac
    local answer="nvidia-smi is not installed"
    if command -v nvidia-smi >/dev/null; then
        answer="$(limited 60 nvidia-smi --query-gpu=driver_version,name --format=csv,noheader 2>&1)" \
            || answer="! $answer"
        answer="${answer%%$'\n'*}"
        case "$answer" in
            [0-9]*) DRIVER="${answer%%,*}" GPU="${answer#*, }"; say "NVIDIA GPU: $GPU, driver $DRIVER"; return ;;
        esac
        answer="nvidia-smi finds no GPU; its output: ${answer#! }"
    fi
    if [ -e "$NVIDIA_DEVICE" ]; then
        GPU="NVIDIA GPU" UNSEEN="$answer"
    elif command -v nvidia-smi >/dev/null; then
        say "Setting up for the CPU (is the NVIDIA driver loaded?): $answer"
    elif [ -e "$NVIDIA_DRIVER" ]; then
        say "Setting up for the CPU: the machine has an NVIDIA driver, but this system was given no GPU" \
            "  ($NVIDIA_DEVICE is missing; start a container with --gpus all)."
    fi
}

choose_torch_source() {
    # "default": pip's configured index, which serves the CUDA build; "cpu": the smaller CPU build, used without a GPU;
    # otherwise the index given by --torch_index in this or an earlier set-up.
    local fitting=default
    CPU_BUILD=""
    if [ -z "$GPU" ]; then fitting=cpu; fi
    TORCH_SOURCE="${ASKED_INDEX:-$(sed -n 's/.*torch_source=//p' "$STAMP" 2>/dev/null || true)}"
    case "$TORCH_SOURCE" in ""|cpu) TORCH_SOURCE=$fitting ;; esac
    case "$TORCH_SOURCE" in cpu|*/cpu) CPU_BUILD=1 ;; esac
}

wants_cuda() { [ -n "$GPU" ] && [ -z "$CPU_BUILD" ]; }

check_driver() {
    if [ -n "$UNSEEN" ]; then check_unseen_gpu; return; fi
    local cuda wanted other="" major="${DRIVER%%.*}"
    case "$TORCH_SOURCE" in
        default|*/cu13*) cuda=13 wanted=580 ;;
        */cu12*)         cuda=12 wanted=525 ;;
        *) say "Cannot tell the CUDA version of $TORCH_SOURCE: the driver will be checked after installation."; return ;;
    esac
    if [ "$major" -ge "$wanted" ]; then return; fi
    if [ "$major" -ge 525 ]; then other="with CUDA 12.6, which runs on driver 525 or newer: $AGAIN $WHEELS/cu126"; fi
    die "error: the NVIDIA driver is $DRIVER, but this torch $TORCH is built with CUDA $cuda:" \
        "  it needs driver $wanted or newer." \
        "  Update the driver, on Ubuntu for example:  sudo apt-get install nvidia-driver-580-server  (and reboot)" \
        ${other:+"  or use torch $other"} "$WITHOUT_GPU"
}

check_unseen_gpu() {
    if [ "$TORCH_SOURCE" != default ]; then  # chosen by the user
        say "Cannot tell the version of the NVIDIA driver, which will be checked after installation: $UNSEEN"; return
    fi
    die "error: there is an NVIDIA GPU ($NVIDIA_DEVICE exists), but its driver cannot be checked: $UNSEEN" \
        "  Make nvidia-smi work: install the nvidia-utils package for the driver's version, or run the container with" \
        "    --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility" \
        "  or choose the build of torch, for a driver from 580 on: $AGAIN $WHEELS/cu130" \
        "    or for a driver from 525 on: $AGAIN $WHEELS/cu126" "$WITHOUT_GPU"
}

check_compiler() {  # works before the packages are installed, so that nothing is downloaded in vain
    local problem
    problem="$("$VENV_PYTHON" -c '
import sys
sys.path.insert(0, sys.argv[1])
from machine import compiler_problem
print(compiler_problem() or "")
' "$ROOT/mvlm_core" 2>&1)" || die "error: $VENV_PYTHON cannot look for a compiler: ${problem##*$'\n'}"
    if [ -z "$problem" ]; then return; fi
    if [ "$WITH_COMPILER" = 0 ]; then say "Note: $problem. Without it training runs uncompiled and slower."; return; fi
    die "error: $problem" "  Then run the same command again. To train without torch.compile, slower, add --no_compiler."
}

check_cuda() {
    local answer
    answer="$(in_venv -c '
from mvlm_core.hardware import resolve_preset
preset, why = resolve_preset("auto")
if preset == "cpu":
    raise SystemExit(why)
print("torch uses", why)
' 2>&1)" || die "error: torch cannot use the GPU: ${answer##*$'\n'}" \
        "  Check the driver with nvidia-smi; if it is too old for this build, use the index of another, for example:" \
        "    $AGAIN $WHEELS/cu130" "$WITHOUT_GPU"
    say "$answer"
}

try_extras() {
    if [ -f "$EXTRAS_TRIED" ]; then return; fi
    local package packages
    packages="$(sed '/^#/d; /^$/d' "$ROOT/requirements-gpu.txt")"
    say "Trying to install the optional ${packages//$'\n'/ and } (at most 2 minutes each)"
    for package in $packages; do
        # Wheels only: building flash-attn from source takes an hour or more, and it is optional.
        # The constraints prevent packages from replacing torch.
        if limited 120 "$VENV_PYTHON" -m pip install --only-binary=:all: \
                --constraint "$ROOT/constraints.txt" "$package" >/dev/null 2>&1 \
                && in_venv -c "import ${package//-/_}" >/dev/null 2>&1; then
            say "Optional $package: installed."
        else
            "$VENV_PYTHON" -m pip uninstall --yes "$package" >/dev/null 2>&1 || true
            say "Optional $package: no wheel for this torch, or none within 2 minutes; attention uses PyTorch's own kernels."
        fi
    done
    : > "$EXTRAS_TRIED"
}

find_python() {
    # Run every candidate: version managers put shims on the PATH that only print an error.
    local candidate version refused=() candidates=("$ASKED_PYTHON")
    local advice="  On Ubuntu or Debian:  sudo apt-get install python3 python3-venv python3-dev build-essential"
    advice+="  (Ubuntu 22.04: python3.11-venv python3.11-dev build-essential; older ones: from python.org, or"
    advice+="  uv python install 3.12)"
    if [ -z "$ASKED_PYTHON" ]; then
        IFS=$'\n' read -r -d '' -a candidates < <(
            type -aP python3 python3.13 python3.12 python3.11 python3.14 python || true
        ) || true
    fi
    for candidate in ${candidates[@]+"${candidates[@]}"}; do
        # In an activated .venv, "python3" is the environment that may need to be rebuilt.
        if [ -z "$ASKED_PYTHON" ] && [ "$(dirname "$candidate")" -ef "$VENV/bin" ]; then continue; fi
        version="$(python_of "$candidate" 2>/dev/null)" || { refused+=("  $candidate does not run"); continue; }
        version="${version%% *}"
        case " $PYTHONS " in *" $version "*) ;; *) refused+=("  $candidate is Python $version"); continue ;; esac
        if limited 30 "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then PYTHON="$candidate"; return; fi
        refused+=("  $candidate is Python $version, but cannot create virtual environments")
        advice="  On Ubuntu or Debian:  sudo apt-get install python$version-venv python$version-dev build-essential"
    done
    die "error: found no Python 3.11 to 3.14 that can create a virtual environment." ${refused[@]+"${refused[@]}"} \
        "$advice" "  or choose one:  bash setup_environment.sh --python /path/to/python3"
}

facts() {  # a change in the first line (paths, compiled packages) requires a rebuild
    say "root=$ROOT python=$(python_of "${ASKED_PYTHON:-$VENV_PYTHON}") torch_source=$TORCH_SOURCE"
    (cd "$ROOT" && cat requirements.txt requirements-dev.txt constraints.txt pyproject.toml)
}

environment_state() {  # ready | install: why | rebuild: why
    if [ ! -e "$VENV" ]; then say "rebuild: it does not exist yet"; return; fi
    if [ -e "$STARTED" ]; then say "rebuild: an earlier set-up was interrupted"; return; fi
    if ! in_venv -c "import sys, pip; assert sys.version_info >= (3, 11)" 2>/dev/null; then
        say "rebuild: its Python or pip does not work"; return
    fi
    if [ ! -f "$STAMP" ]; then say "install: not yet set up by this script"; return; fi
    local wanted found
    wanted="$(facts 2>&1)" found="$(cat "$STAMP")"
    if [ "${found%%$'\n'*}" != "${wanted%%$'\n'*}" ]; then
        say "rebuild: it was made for ${found%%$'\n'*}, now ${wanted%%$'\n'*}"
    elif [ "$found" != "$wanted" ]; then
        say "install: the requirements have changed"
    elif ! PIP_CONFIG_FILE=/dev/null in_venv -m pip --isolated install --dry-run --no-index --no-deps --no-cache-dir \
            -r "$ROOT/requirements-dev.txt" >/dev/null 2>&1; then
        say "install: a package is missing or has the wrong version"
    elif [ "$(in_venv -c 'import mvlm_core.settings as s; print(s.REPOSITORY_ROOT)' 2>/dev/null)" != "$ROOT" ]; then
        say "install: mvlm_core is not installed from this folder"
    else
        say "ready"
    fi
}

prepare_environment() {  # prepare_environment "install: why" | "rebuild: why"
    local state="$1"
    if [ -L "$VENV" ] && [ "${state%%:*}" = rebuild ]; then
        die "error: .venv is a symbolic link and needs to be rebuilt (${state#*: }). Remove the link and run again."
    fi
    # GB, including downloads: 1.3 measured for the CPU build; CUDA libraries add about 5, plus 3 while downloading.
    local needed=10 free
    if [ -n "$CPU_BUILD" ]; then needed=3; fi
    free="$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1000000) }')"
    if [ "$free" -lt "$needed" ]; then
        die "error: $free GB free in $ROOT, but packages and downloads need about $needed GB."
    fi
    if [ -z "$CPU_BUILD" ] && [ "$free" -lt 25 ]; then
        say "Note: $free GB free in $ROOT; packages and a run of the h200 preset need about 25 GB."
    fi
    say "Virtual environment: ${state#*: }."
    if [ "${state%%:*}" = rebuild ]; then
        find_python
        say "Making .venv with $PYTHON"
        if [ ! -d "$VENV" ]; then rm -f "$VENV"; fi  # a file with that name
        "$PYTHON" -m venv --clear "$VENV" || die "error: $PYTHON could not create $VENV (see its message above)."
    fi
    if wants_cuda; then check_compiler; fi
    : > "$STARTED"
    rm -f "$STAMP" "$EXTRAS_TRIED"
    install_packages
    facts > "$STAMP"
    rm -f "$STARTED"
    state="$(environment_state)"
    if [ "$state" != ready ]; then die "error: the environment is incomplete after installation: ${state#*: }"; fi
}

install_packages() {
    local index=()
    say "Installing the packages of requirements-dev.txt; torch $TORCH source: $TORCH_SOURCE"
    if [ "$TORCH_SOURCE" = cpu ]; then
        # The default index serves the CUDA build, which needs 3 GB more. Check the CPU index first, because pip
        # retries for minutes if it is unreachable.
        if "$VENV_PYTHON" -c "import sys, urllib.request as web; web.urlopen(sys.argv[1], timeout=5)" \
                "$WHEELS/cpu/torch/" 2>/dev/null; then
            index=(--extra-index-url "$WHEELS/cpu")
        else
            say "The index of CPU builds, $WHEELS/cpu, is unreachable: installing torch from the default index."
        fi
    elif [ "$TORCH_SOURCE" != default ]; then
        # Install exactly the requested build. Its CUDA libraries may only be on that index.
        pip_install --no-deps --force-reinstall --index-url "$TORCH_SOURCE" "torch==$TORCH"
        index=(--extra-index-url "$TORCH_SOURCE")
    fi
    pip_install ${index[@]+"${index[@]}"} -r "$ROOT/requirements-dev.txt" -e "$ROOT"
}

pip_install() {  # modules are compiled when first imported: most never are
    "$VENV_PYTHON" -m pip install --no-compile -c "$ROOT/constraints.txt" "$@" || die \
        "error: pip could not install: $* (see its message above)." \
        "  Check the network connection. Run the same command again: downloads are kept."
}

main() {
    parse_arguments "$@"
    [ "$(uname -s)" = Linux ] || die "error: this project runs on Linux only (on Windows: in WSL), not on $(uname -s)."
    warn_about_ssh
    trap 'exit 130' INT  # pip exits with 1 on Ctrl-C, and this script would continue
    stay_in_this_folder
    find_gpu
    choose_torch_source
    if wants_cuda; then check_driver; fi
    local state
    state="$(environment_state)"
    if [ "$state" != ready ]; then
        prepare_environment "$state"
    else
        say "Packages: complete."
        if wants_cuda; then check_compiler; fi
    fi
    if wants_cuda; then check_cuda; try_extras; fi
    if [ "$WITH_CORPUS" = 1 ]; then
        if "$VENV_PYTHON" "$ROOT/prepare_dataset.py" --check >/dev/null 2>&1; then
            say "Corpus: complete."
        else
            say "Building the corpus"
            "$VENV_PYTHON" "$ROOT/prepare_dataset.py"
        fi
    fi
    rm -rf "$PIP_CACHE_DIR"
    say "" "Ready. Next:"
    if [ "$(pwd -P)" != "$ROOT" ]; then say "  cd $(printf '%q' "$ROOT")"; fi
    local device=""  # training does not fall back to the CPU by itself if there seems to be a GPU
    if [ -n "$CPU_BUILD" ] && { [ -n "$GPU" ] || command -v nvidia-smi >/dev/null; }; then device=" --device cpu"; fi
    say "  .venv/bin/python train_all_models.py$device     train, compare, validate and package both models" \
        "  .venv/bin/python -m pytest               run the tests"
}

main "$@"
