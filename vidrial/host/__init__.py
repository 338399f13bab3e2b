"""The host target: the GPU's kernels on the CPU, from the same source.

`compiler` runs g++, `target` a compiled kernel in a process of its own, whose last words `messages` puts in the kernel's lines; `tensor_map`
is what TMA reads there. `plan` is an op ready to run; `check` runs it in the ways that `cover` names.
"""
