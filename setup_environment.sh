#!/usr/bin/env bash
# From a fresh machine to a ready one: .venv, packages, corpus. Everything stays inside this folder.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
STARTED="$VENV/.setup-started"      # there while packages are being installed: an interrupted set-up is seen by it
STAMP="$VENV/.setup-stamp"          # what the packages were installed from
EXTRAS_TRIED="$VENV/.extras-tried"  # optional GPU packages are tried once
CPU_INDEX="https://download.pytorch.org/whl/cpu"
TORCH="$(sed -n 's/^torch==//p' "$ROOT/requirements.txt")"

# Python versions that all pinned packages have wheels for.
OLDEST_PYTHON=11
NEWEST_PYTHON=14
# torch 2.13.0 on the package index requires cuda-toolkit 13.0.3. Any CUDA 13.x program runs from driver 580 on and
# any CUDA 12.x one from 525 on: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DEFAULT_CUDA="13.0"
# GB, with downloads: measured 1.3 installed for the CPU; the CUDA libraries add about 5, and 3 while they download.
DISK_CPU=3
DISK_CUDA=10

say()  { printf '%s\n' "$*"; }
die()  { local line; for line in "$@"; do printf '%s\n' "$line" >&2; done; exit 1; }

usage() {
    cat <<TEXT
Usage: bash setup_environment.sh [options]

Makes .venv, installs the pinned packages and builds the corpus; then train_all_models.py and the tests can run.
Needs Python 3.$OLDEST_PYTHON to 3.$NEWEST_PYTHON and no root.
Run again, it repairs what is missing and changes nothing else.

  --python PATH       use this Python
  --torch_index URL   take torch from this wheel index, for example for an older NVIDIA driver:
                      https://download.pytorch.org/whl/cu126
  --no_corpus         do not build the corpus
  --help              this text
TEXT
}

parse_arguments() {
    ASKED_PYTHON="" ASKED_INDEX="" WITH_CORPUS=1
    while [ $# -gt 0 ]; do
        case "$1" in
            --help|-h) usage; exit 0 ;;
            --no_corpus) WITH_CORPUS=0; shift ;;
            --python|--torch_index)
                if [ $# -lt 2 ] || [ -z "$2" ]; then say "error: $1 needs a value" >&2; exit 2; fi
                if [ "$1" = --python ]; then ASKED_PYTHON="$2"; else ASKED_INDEX="${2%/}"; fi
                shift 2 ;;
            *) say "error: unknown option: $1 (see --help)" >&2; exit 2 ;;
        esac
    done
}

keep_to_this_folder() {
    # The download cache lies in the checkout, not in the home folder, and is removed once all is in: an interrupted
    # set-up does not download gigabytes twice, and a finished one does not keep them.
    export PIP_CACHE_DIR="$ROOT/.cache/pip"
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
    # pip asks rustc for its version, and rustup's rustc would then make a ~/.rustup.
    export RUSTUP_HOME="$PIP_CACHE_DIR/rustup"
    # Somebody's own module path would hide what is missing here.
    unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX
    # Two set-ups in one folder: the second waits. The lock is on the folder itself, so nothing is left behind.
    if command -v flock >/dev/null; then
        exec 9<"$ROOT"
        flock -n 9 || { say "Another set-up is at work in this folder: waiting for it."; flock 9; }
    fi
}

# --- NVIDIA -------------------------------------------------------------------------------------------------

find_gpu() {
    GPU="" DRIVER=""
    case "${CUDA_VISIBLE_DEVICES-unset}" in
        ""|-1) say "CUDA_VISIBLE_DEVICES hides every GPU: setting up for the CPU."; return ;;
    esac
    command -v nvidia-smi >/dev/null || return 0
    local answer
    if ! answer="$(limited 60 nvidia-smi --query-gpu=driver_version,name --format=csv,noheader 2>&1)"; then
        say "nvidia-smi is there but does not answer (is the driver loaded?): setting up for the CPU. It said:"
        say "  $(printf '%s' "$answer" | head -n 1)"
        return
    fi
    answer="$(printf '%s\n' "$answer" | head -n 1)"
    DRIVER="${answer%%,*}"
    GPU="${answer#*, }"
    case "$DRIVER" in
        [0-9]*) say "NVIDIA GPU: $GPU, driver $DRIVER" ;;
        *) say "nvidia-smi lists no GPU: setting up for the CPU."; GPU="" ;;
    esac
}

limited() {  # limited SECONDS COMMAND...: macOS has no timeout
    if command -v timeout >/dev/null; then timeout "$@"; else shift; "$@"; fi
}

choose_torch_source() {
    # "default" is the package index as pip is configured, which serves the CUDA build on Linux; "cpu" is the
    # small build, taken where there is no GPU; else an index given by --torch_index, now or at an earlier set-up.
    local before=""
    if [ -f "$STAMP" ]; then before="$(sed -n 's/^torch_source=//p' "$STAMP")"; fi
    if [ -n "$ASKED_INDEX" ]; then
        TORCH_SOURCE="$ASKED_INDEX"
    elif [ -n "$before" ] && [ -z "$GPU" ]; then
        TORCH_SOURCE="$before"
    elif [ -n "$before" ] && [ "$before" != cpu ]; then
        TORCH_SOURCE="$before"
    elif [ -n "$GPU" ] || [ "$(uname -s)" != Linux ]; then
        TORCH_SOURCE=default
    else
        TORCH_SOURCE=cpu
    fi
}

wants_cuda() {
    [ -n "$GPU" ] && case "$TORCH_SOURCE" in cpu|*/cpu) false ;; *) true ;; esac
}

check_driver() {
    wants_cuda || return 0
    local cuda wanted
    case "$TORCH_SOURCE" in
        default)  cuda=$DEFAULT_CUDA wanted=580 ;;
        */cu13*)  cuda=13 wanted=580 ;;
        */cu12*)  cuda=12 wanted=525 ;;
        *) say "Cannot tell the CUDA version of $TORCH_SOURCE: the driver is checked after installation."; return ;;
    esac
    if [ "${DRIVER%%.*}" -ge "$wanted" ]; then return; fi
    local lines=(
        "error: the NVIDIA driver is $DRIVER, but this torch $TORCH is built with CUDA $cuda:"
        "  it needs driver $wanted or newer."
        "  Update the driver, on Ubuntu for example:  sudo apt-get install nvidia-driver-580-server  (and reboot)"
    )
    if [ "$wanted" = 580 ] && [ "${DRIVER%%.*}" -ge 525 ]; then
        lines+=("  or take torch with CUDA 12.6, which runs from driver 525 on:"
                "    bash setup_environment.sh --torch_index https://download.pytorch.org/whl/cu126")
    fi
    die "${lines[@]}" "  or go on without the GPU:" "    bash setup_environment.sh --torch_index $CPU_INDEX"
}

check_cuda() {
    wants_cuda || return 0
    local answer
    answer="$(in_venv -c '
import torch
if torch.version.cuda is None:
    print(f"error: torch {torch.__version__} is a build without CUDA (is pip configured with another index?)")
elif not torch.cuda.is_available():
    print(f"error: torch {torch.__version__}, built with CUDA {torch.version.cuda}, cannot use the GPU")
else:
    print(f"torch {torch.__version__} uses {torch.cuda.get_device_name(0)} with CUDA {torch.version.cuda}")
' 2>&1)" || answer="error: torch cannot be imported: $(printf '%s' "$answer" | tail -n 1)"
    case "$answer" in
        *error:*) die "$answer" \
            "  Compare with nvidia-smi, and name the index of a build that fits the driver, for example:" \
            "    bash setup_environment.sh --torch_index https://download.pytorch.org/whl/cu130" \
            "  or go on without the GPU:  bash setup_environment.sh --torch_index $CPU_INDEX" ;;
    esac
    say "$answer"
    answer="$(in_venv -c 'from mvlm_core.hardware import compiler_problem; print(compiler_problem() or "")')"
    if [ -n "$answer" ]; then say "Note: $answer. Without it training runs uncompiled, and slower."; fi
}

try_extras() {
    wants_cuda || return 0
    [ ! -f "$EXTRAS_TRIED" ] || return 0
    local package module
    # Ready-made wheels only: a source build of flash-attn takes an hour or more, and nothing here needs it.
    while read -r package; do
        case "$package" in ""|\#*) continue ;; esac
        module="${package//-/_}"
        # The constraint keeps a package from bringing another torch along.
        if limited 900 "$VENV_PYTHON" -m pip install --quiet --only-binary=:all: \
                --constraint "$ROOT/requirements.txt" "$package" </dev/null >/dev/null 2>&1 \
                && in_venv -c "import $module" </dev/null >/dev/null 2>&1; then
            say "Optional $package: installed."
        else
            "$VENV_PYTHON" -m pip uninstall --quiet --yes "$package" </dev/null >/dev/null 2>&1 || true
            say "Optional $package: no wheel that fits this torch; attention runs on PyTorch's own kernels."
        fi
    done < "$ROOT/requirements-gpu.txt"
    : > "$EXTRAS_TRIED"
}

# --- Python and packages ------------------------------------------------------------------------------------

find_python() {
    # Every candidate is really run: version managers leave launchers on the PATH that only print an error.
    local candidate state candidates=() refused=() without_venv="" minor
    if [ -n "$ASKED_PYTHON" ]; then
        candidates=("$ASKED_PYTHON")
    else
        local name
        for name in python3 python3.13 python3.12 python3.11 python3.14 python; do
            while read -r candidate; do
                # In an activated .venv, "python3" is the very environment that may have to be rebuilt.
                if [ "$(dirname "$candidate")" -ef "$VENV/bin" ]; then continue; fi
                candidates+=("$candidate")
            done < <(type -aP "$name" || true)
        done
    fi
    for candidate in ${candidates[@]+"${candidates[@]}"}; do
        state="$(limited 30 "$candidate" -c '
import sys
print(sys.version_info.major, sys.version_info.minor, end=" ")
try:
    import ensurepip, venv
    print("venv")
except ImportError:
    print("bare")' 2>/dev/null)" || { refused+=("  $candidate does not run"); continue; }
        minor="${state#* }" minor="${minor%% *}"
        if [ "${state%% *}" != 3 ] || [ "$minor" -lt "$OLDEST_PYTHON" ] || [ "$minor" -gt "$NEWEST_PYTHON" ]; then
            refused+=("  $candidate is Python ${state%% *}.$minor")
        elif [ "${state##* }" != venv ]; then
            refused+=("  $candidate is Python 3.$minor, but cannot make virtual environments")
            without_venv="${without_venv:-$minor}"
        else
            PYTHON="$candidate"
            return
        fi
    done
    local advice
    advice="$(where_to_get_python)"
    if [ -n "$without_venv" ]; then
        advice="  On Ubuntu or Debian:  sudo apt-get install python3.$without_venv-venv"
    fi
    die "error: no Python 3.$OLDEST_PYTHON to 3.$NEWEST_PYTHON that can make a virtual environment." \
        ${refused[@]+"${refused[@]}"} "$advice" \
        "  or name another one:  bash setup_environment.sh --python /path/to/python3"
}

where_to_get_python() {
    local release=""
    if [ -r /etc/os-release ]; then
        release="$(. /etc/os-release && printf '%s %s' "${ID-}" "${VERSION_ID-}")"
    fi
    case "$release" in
        "ubuntu 22."*) say "  On Ubuntu 22:  sudo apt-get install python3.11 python3.11-venv" ;;
        "ubuntu 20."*|"ubuntu 18."*|"debian 11"*|"debian 10"*)
            say "  $release packages none: take one from python.org, or with:  uv python install 3.12" ;;
        *) say "  On Ubuntu or Debian:  sudo apt-get install python3 python3-venv" ;;
    esac
}

check_disk() {
    local wanted=$DISK_CPU free
    case "$TORCH_SOURCE" in cpu|*/cpu) ;; *) if [ "$(uname -s)" = Linux ]; then wanted=$DISK_CUDA; fi ;; esac
    free="$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1000000) }')"
    if [ "$free" -lt "$wanted" ]; then
        die "error: $free GB free in $ROOT, but packages and downloads need about $wanted GB."
    fi
}

in_venv() {  # from another folder, so that only what is installed is found
    (cd / && "$VENV_PYTHON" "$@")
}

# Compares the environment with what is asked for, or records it. Prints one word, or the first difference.
read -r -d '' STATE_PROGRAM <<'PYTHON' || true
import hashlib, importlib.metadata, importlib.util, pathlib, re, sys
action, root, torch_source = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
stamp = root / ".venv" / ".setup-stamp"
files = ["requirements.txt", "requirements-dev.txt", "pyproject.toml"]
digest = hashlib.sha256(b"\0".join((root / name).read_bytes() for name in files)).hexdigest()
python = "%d.%d" % sys.version_info[:2]
wanted = {"root": str(root), "python": python, "torch_source": torch_source, "requirements": digest}
if action == "record":
    stamp.write_text("".join(f"{key}={value}\n" for key, value in wanted.items()), encoding="utf-8")
    sys.exit()
if stamp.exists():
    found = dict(line.split("=", 1) for line in stamp.read_text(encoding="utf-8").splitlines() if "=" in line)
    # Paths and compiled packages belong to one folder, one Python and one torch: another one starts anew.
    for key in ("root", "python", "torch_source"):
        if found.get(key) != wanted[key]:
            sys.exit(print(f"rebuild: {key} was {found.get(key)}, now {wanted[key]}"))
    if found.get("requirements") != digest:
        sys.exit(print("install: the requirements have changed"))
else:
    sys.exit(print("install: not yet set up by this script"))
for name in files[:2]:
    for package, version in re.findall(r"^([\w.-]+)==(\S+)", (root / name).read_text(encoding="utf-8"), re.M):
        try:
            installed = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            sys.exit(print(f"install: {package} is missing"))
        if installed != version:
            sys.exit(print(f"install: {package} is {installed}, not {version}"))
for package in ("mvlm_core", "bible_corpus", "prioritary_mvlm", "simone_transformer"):
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin or not pathlib.Path(spec.origin).is_relative_to(root):
        sys.exit(print(f"install: {package} is not installed from this folder"))
print("ready")
PYTHON

environment_state() {  # ready | install: why | rebuild: why
    local state
    if [ ! -e "$VENV" ]; then say "rebuild: there is none yet"; return; fi
    if [ -e "$STARTED" ]; then say "rebuild: an earlier set-up was interrupted"; return; fi
    if [ -n "$ASKED_PYTHON" ] && ! same_python; then say "rebuild: made with another Python"; return; fi
    if ! in_venv -c "import sys, pip; assert sys.version_info >= (3, $OLDEST_PYTHON)" >/dev/null 2>&1; then
        say "rebuild: its Python or pip does not run"
        return
    fi
    state="$(in_venv -c "$STATE_PROGRAM" check "$ROOT" "$TORCH_SOURCE")" || state="rebuild: it does not answer"
    say "$state"
}

same_python() {
    local program='import os, sys; print(os.path.realpath(sys._base_executable), *sys.version_info[:2])'
    [ "$("$ASKED_PYTHON" -c "$program" 2>&1)" = "$(in_venv -c "$program" 2>/dev/null)" ]
}

install_packages() {
    local state="$1"
    if [ -L "$VENV" ] && [ "${state%%:*}" = rebuild ]; then
        die "error: .venv is a symbolic link and needs to be rebuilt (${state#*: }). Remove the link and run again."
    fi
    check_disk
    say "Virtual environment: ${state#*: }."
    if [ "${state%%:*}" = rebuild ]; then
        find_python
        say "Making .venv with $PYTHON"
        if [ ! -d "$VENV" ]; then rm -f "$VENV"; fi  # a file of that name
        "$PYTHON" -m venv --clear "$VENV" || die "error: $PYTHON could not make $VENV (its message stands above)."
    fi
    : > "$STARTED"
    rm -f "$STAMP" "$EXTRAS_TRIED"
    install_torch
    say "Installing the packages of requirements-dev.txt"
    pip_install -r "$ROOT/requirements-dev.txt"
    pip_install --no-deps -e "$ROOT"
    in_venv -c "$STATE_PROGRAM" record "$ROOT" "$TORCH_SOURCE"
    rm -f "$STARTED"
    state="$(environment_state)"
    if [ "$state" != ready ]; then die "error: after installation the environment is not whole: ${state#*: }"; fi
}

install_torch() {
    case "$TORCH_SOURCE" in
        default)
            say "Installing torch $TORCH" ;;
        cpu)
            # The index's default on Linux is the CUDA build, some 3 GB of it useless without a GPU.
            if answers "$CPU_INDEX/torch/"; then
                say "Installing torch $TORCH for the CPU (no NVIDIA GPU found)"
                pip_install --no-deps --extra-index-url "$CPU_INDEX" "torch==$TORCH"
            else
                say "Installing torch $TORCH (the index of CPU builds, $CPU_INDEX, does not answer)"
            fi ;;
        *)
            say "Installing torch $TORCH from $TORCH_SOURCE"
            pip_install --no-deps --force-reinstall --index-url "$TORCH_SOURCE" "torch==$TORCH"
            # Its CUDA libraries may stand on that index only.
            pip_install --extra-index-url "$TORCH_SOURCE" "torch==$TORCH" ;;
    esac
}

answers() {  # whether a web address can be read; pip itself would retry for minutes
    "$VENV_PYTHON" -c "import sys, urllib.request as web; web.urlopen(sys.argv[1], timeout=10)" "$1" 2>/dev/null
}

pip_install() {
    local quiet=()
    if [ ! -t 1 ]; then quiet=(--quiet); fi
    "$VENV_PYTHON" -m pip install ${quiet[@]+"${quiet[@]}"} "$@" || die \
        "error: pip could not install: $* (its message stands above)." \
        "  Is the network there? Run the same command again: what was downloaded is kept."
}

# --- corpus and end -----------------------------------------------------------------------------------------

build_corpus() {
    if [ "$WITH_CORPUS" = 0 ]; then return; fi
    if "$VENV_PYTHON" "$ROOT/prepare_dataset.py" --check >/dev/null 2>&1; then
        say "Corpus: whole."
    else
        say "Building the corpus"
        "$VENV_PYTHON" "$ROOT/prepare_dataset.py"
    fi
}

say_what_next() {
    local to_root=""
    if [ "$(pwd -P)" != "$ROOT" ]; then to_root="  cd $(printf '%q' "$ROOT")"$'\n'; fi
    cat <<TEXT

Ready. Next:
$to_root  .venv/bin/python train_all_models.py     train, compare, check and pack both models
  .venv/bin/python -m pytest               run the tests
TEXT
}

main() {
    parse_arguments "$@"
    keep_to_this_folder
    find_gpu
    choose_torch_source
    check_driver
    local state
    state="$(environment_state)"
    if [ "$state" = ready ]; then say "Packages: all there."; else install_packages "$state"; fi
    check_cuda
    try_extras
    build_corpus
    rm -rf "$PIP_CACHE_DIR"
    say_what_next
}

main "$@"
