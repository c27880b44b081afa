#!/usr/bin/env bash
# torch 2.13.0, CPU: a compiled function gives other bits for the same input once it has seen an input of another shape.
#
# By default the first shape gets code of its own, the second one code for any shape ("automatic dynamic"), and from then
# on that newer code also serves the first shape, although its own code is still there. Where the two add up in another
# order, results change in the last bits, in the middle of a run, because somewhere a batch of another size passed (the
# last one of an epoch, an evaluation). What must come out the same after a resume, or in another process, then depends
# on what that process has seen before. `dynamic=False` keeps one code per shape, and the bits.
#
# Output seen:
#   dynamic=None: the same before another shape True, after it False
#   dynamic=False: the same before another shape True, after it True
# Exit code 1 when this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
cd "$folder"
TORCHINDUCTOR_CACHE_DIR=$folder/cache "$folder/env/bin/python" - <<'PYTHON'
import torch


def variances(x):
    return torch.var(x, 0)


torch.manual_seed(0)
one, other = torch.randn(777, 65), torch.randn(911, 65)
seen = {}
for dynamic in (None, False):
    torch.compiler.reset()
    compiled = torch.compile(variances, dynamic=dynamic)
    first = compiled(one)
    before = torch.equal(compiled(one), first)
    compiled(other)
    seen[dynamic] = before, torch.equal(compiled(one), first)
    print(f"dynamic={dynamic}: the same before another shape {before}, after it {seen[dynamic][1]}")
raise SystemExit(seen != {None: (True, False), False: (True, True)})
PYTHON
