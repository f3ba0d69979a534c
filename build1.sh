#!/bin/bash
# compile new files of /work/lab/sp with main's flags (derived from similar files)
set -e
cd /work/main/build/cp311-cp311-linux_x86_64
N=/work/main/.venv/bin/ninja
mkdir -p /work/lab/objsp
comp() { # new like
  cmd=$($N -t commands _cpu.cpython-311-x86_64-linux-gnu.so | grep -E "/csrc/$2\.cpp$" | head -1)
  cmd=${cmd//\/work\/main\/src/\/work\/lab\/sp\/src}
  cmd=$(echo "$cmd" | sed -E "s#-MD -MT [^ ]+ -MF [^ ]+ -o [^ ]+#-o /work/lab/objsp/$1.cpp.o#; s#/csrc/$2\.cpp\$#/csrc/$1.cpp#")
  eval "$cmd"
}
for pair in "$@"; do comp ${pair%%:*} ${pair##*:}; done
