"""Source -> cubin.

To compile: `toolchain` finds NVRTC, headers and the host compiler, `nvrtc` compiles one source, `pool` many in processes, each a child as
`processes` has it. To keep: `store` is the cache directory, in the bytes of `formats`, by the file operations of `files`. `cubins` is what
others call: a source's cubin from the cache or new, made `once` for all threads.
"""
