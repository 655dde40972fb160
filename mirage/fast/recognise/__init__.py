"""What a module has to be for an operator to stand in for it: described once, asked everywhere.

A block is described as data, by its children: norm, projections, depthwise convolution, gate or attention. The same
description answers three questions:

- `accelerate` and `summary`: can a module of whatever class become one of `mirage.fast`, and if not, why
  (`kinds.problem`)? By attributes and shapes, and by comparing what the two compute.
- Every forward: do all children still compute what the operator computes in their place, and where are its weights
  (`stage.Stage.match`, `stage.BlockMatcher`)? Users change children, settings and hooks at any time, so it is asked
  each time, and of exact classes. The C++ library answers for a whole level in one call; in Python the same is asked
  while compiling and where there is no C++ library.
- `summary` again: why does a block call its modules one by one (`stage.Stage.problem`)?

To add a kind of block:

1. Describe it beside `mirage_block.py` and `restormer_block.py`: one `Pattern` for each class that becomes a fast one,
   made of the parts in `parts.py`, and a `Stage` for each operator, whose fields name what the operator takes of the
   children (`FirstOf` of several where children may be of several kinds, such as norms).
2. Give it a fast class (as in `mirage.fast.block`) that runs its `halves`, each a `Half`: names of its children, the
   stage, and what runs the operator. `stages` are read by `summary`, and a `matcher`, where one operator runs all of
   them, lets `BlockSequence` run blocks together.
3. List the classes in `kinds.KINDS`.

Nothing else names a kind of block: neither the C++ library nor `accelerate` and `summary`.

The files, each on top of those before it: `pattern` (what can be said of a module), `parts` (convolutions, activations
and other modules of PyTorch), `stage` (patterns as the forward asks them), `mirage_block`, `restormer_block` and
`moce_ir_block` (their blocks), `kinds` (which modules of a model are of which kind).
"""
