#!/usr/bin/env bash
# Triton 3.6.0 (torch 2.13.0): TRITON_INTERPRET=1 cannot run a loop whose bound a kernel has loaded, with numpy 2.4.
#
# The interpreter keeps scalars as arrays of one element and turns them into a loop's bound by int(array). numpy had
# warned of that since 1.25 and raises from 2.4 on, so that kernels that are right, and run on a GPU, fail in tests on
# a CPU. Triton asks for no numpy, and nothing keeps the two apart.
#
# Output seen:
#   numpy 2.3.5: sum 10
#   numpy 2.4.6: InterpreterError TypeError('only 0-dimensional arrays can be converted to Python scalars')
# Exit code 1 when numpy 2.4.6 runs the loop too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$folder/env/bin/pip" install -q --no-deps --force-reinstall "triton==3.6.0"
"$folder/env/bin/pip" install -q --no-deps --target "$folder/older" "numpy==2.3.5"
cd "$folder"
cat >loop.py <<'PYTHON'
import sys

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def added(n_ptr, out_ptr):
    total = 0
    for i in range(0, tl.load(n_ptr)):
        total += i
    tl.store(out_ptr, total)


n, out = torch.tensor([5], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
try:
    added[(1,)](n, out)
    print(f"numpy {numpy.__version__}: sum {out.item()}")
except Exception as error:
    print(f"numpy {numpy.__version__}: {type(error).__name__} {error}")
    sys.exit(3)
PYTHON
export TRITON_INTERPRET=1
PYTHONPATH=$folder/older "$folder/env/bin/python" -W ignore loop.py
status=0
"$folder/env/bin/python" loop.py || status=$?
[ "$status" = 3 ]
