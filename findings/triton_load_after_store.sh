#!/usr/bin/env bash
# Triton 3.6.0 (torch 2.11.0, one H100): what a program stores and then loads again from the same addresses may be old.
#
# The order of operations in a kernel's source is that of each thread. The compiler gives every load and store a layout
# of its own, so the thread that loads an element is often another than the one that stored it, and nothing makes it
# wait: `tl.debug_barrier()` in between does. Triton's interpreter runs elements in order and hides the fault, tests with
# tolerances pass now and then, and the numbers differ from run to run, here those of an optimiser that writes rows and
# then rescales them to norm 1.
#
# Output seen (H100 80GB HBM3):
#   without a barrier: 200 of 200 runs differ from the right result   (0 of 200 with rows of 576 instead of 64)
#   with tl.debug_barrier(): 0 of 200 runs differ from the right result
# Needs an NVIDIA GPU. FINDING_PYTHON names an interpreter that has torch and triton; without it they are installed.
# Exit code 1 when no run differs without a barrier, or one does with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDING_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install -q "torch==2.11.0" "triton==3.6.0" numpy
fi
cat >"$folder/kernel.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def unit_rows(g_ptr, w_ptr, low_ptr, H, D, BARRIER: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """w − g, then divided by its norm, and a copy in bfloat16; rows in pieces of C columns."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    base = r[:, None] * D
    squares = tl.zeros([R], tl.float32)
    for c0 in range(0, D, C):
        c = c0 + tl.arange(0, C)
        mask = (r < H)[:, None] & (c < D)[None, :]
        g = tl.load(g_ptr + base + c[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + base + c[None, :], mask=mask, other=0.0) - g
        tl.store(w_ptr + base + c[None, :], w, mask=mask)
        squares += tl.sum(w * w, 1)
    if BARRIER:
        tl.debug_barrier()
    inverse = 1.0 / tl.sqrt(squares)
    for c0 in range(0, D, C):
        c = c0 + tl.arange(0, C)
        mask = (r < H)[:, None] & (c < D)[None, :]
        w = tl.load(w_ptr + base + c[None, :], mask=mask, other=0.0) * inverse[:, None]
        tl.store(w_ptr + base + c[None, :], w, mask=mask)
        tl.store(low_ptr + base + c[None, :], w, mask=mask)


torch.manual_seed(0)
h, d = 2**15, 64
start = torch.nn.functional.normalize(torch.randn(h, d, device="cuda"), dim=-1)
g = torch.randn(h, d, device="cuda").bfloat16()
want = torch.nn.functional.normalize(start.double() - g.double(), dim=-1)
wrong = {}
for barrier in (False, True):
    wrong[barrier] = 0
    for _ in range(200):
        w, low = start.clone(), torch.empty(h, d, dtype=torch.bfloat16, device="cuda")
        unit_rows[(triton.cdiv(h, 32),)](g, w, low, h, d, barrier, 32, 64)
        wrong[barrier] += not torch.allclose(w.double(), want, rtol=1e-4, atol=1e-5)
    name = "with tl.debug_barrier()" if barrier else "without a barrier"
    print(f"{name}: {wrong[barrier]} of 200 runs differ from the right result")
print(torch.__version__, triton.__version__, torch.cuda.get_device_name())
raise SystemExit(not (wrong[False] > 0 and wrong[True] == 0))
PYTHON
"$python" "$folder/kernel.py"
