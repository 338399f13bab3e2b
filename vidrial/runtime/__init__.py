"""A config on a GPU, ready to run.

`arrays` takes arrays of any library in and out, `inputs` holds them against what an op declares; `launch` loads and launches a cubin,
`tensor_map` encodes what TMA reads, `plan` joins an op's launches. `torch_ops` and `torch_schema` put ops into torch's dispatcher, `xla` into
XLA's custom calls.
"""
