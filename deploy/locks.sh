#!/bin/sh
# locks.sh: writes deploy/requirements/*.txt, every package of the images with its hashes, from
# pyproject.toml and constraints.txt. Needs a package index; a few minutes (pip reads the metadata
# of torch's CUDA packages).
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pip-tools

lock() { # lock NAME WHAT INPUT OPTION...
  name=$1 what=$2 input=$3
  shift 3
  echo "locking $name ..." >&2
  "$work/venv/bin/pip-compile" --quiet --generate-hashes --allow-unsafe --strip-extras \
    --no-annotate --no-header --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
    "$@" --output-file "$work/$name.txt" "$input"
  { echo "# Written by deploy/locks.sh: what $what."; cat "$work/$name.txt"; } \
    > "deploy/requirements/$name.txt"
}

image() { # image NAME CONSTRAINTS EXTRA...
  name=$1 constraints=$2
  shift 2
  lock "$name" "the $name image installs" pyproject.toml --constraint "$constraints" \
    $(printf -- '--extra %s ' "$@")
}

# The exporter runs on the CPU build of torch, which has a version of its own; the GPU image has the
# usual one, so wheels that lie on this machine do not count there.
sed 's/^torch==\([^+]*\)$/torch==\1+cpu/' constraints.txt > "$work/constraints-cpu.txt"
image cpu constraints.txt cpu fast triton
image export "$work/constraints-cpu.txt" cpu export triton
( unset PIP_FIND_LINKS; export PIP_CONFIG_FILE=/dev/null; image gpu constraints.txt gpu fast triton torch )
lock build "builds our wheel" deploy/requirements/build.in
