#!/usr/bin/env bash
# torch 2.13.0: `torch.compile(f, dynamic=False)` makes code for any size all the same, where an input is marked.
#
# `dynamic=False` reads as "one code per shape, never for any shape". It only turns off what torch would do by itself:
# `torch._dynamo.mark_dynamic` and `maybe_mark_dynamic` on an argument still win, axis by axis, and every later size is
# served by the first code. That is handy (one axis may vary while all others stay static) and a trap: a mark stays on
# the tensor, so that whoever marks an axis for one compiled function changes what another one, compiled with
# `dynamic=False` for its speed or its bits, does with the same tensor. No guard, log line or error tells it.
#
# Output seen:
#   compilations for 4 sizes: plain 4, maybe_mark_dynamic 1, mark_dynamic 1
#   a tensor that was marked for another function: 1
# Needs no compiler: the backend only counts. Exit code 1 when this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==${FINDING_TORCH:-2.13.0}" numpy
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import torch

SIZES = (8, 12, 20, 32)


def doubled(x):
    return (2 * x).relu()


def compilations(mark):
    """How many graphs `doubled` needs for inputs of four sizes."""
    torch.compiler.reset()
    made = []
    compiled = torch.compile(doubled, dynamic=False, backend=lambda graph, _: made.append(1) or graph.forward)
    for size in SIZES:
        x = torch.randn(3, size)
        mark(x)
        compiled(x)
    return len(made)


def marked_elsewhere(x):
    torch._dynamo.mark_dynamic(x, 1)
    torch.compile(torch.sin, backend="eager")(x)


weak = compilations(lambda x: torch._dynamo.maybe_mark_dynamic(x, 1))
strong = compilations(lambda x: torch._dynamo.mark_dynamic(x, 1))
plain, elsewhere = compilations(lambda x: None), compilations(marked_elsewhere)
print(f"compilations for 4 sizes: plain {plain}, maybe_mark_dynamic {weak}, mark_dynamic {strong}")
print(f"a tensor that was marked for another function: {elsewhere}")
raise SystemExit((plain, weak, strong, elsewhere) != (4, 1, 1, 1))
PYTHON
