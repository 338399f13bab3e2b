// Included before every kernel, and precompiled: CUDA C++ for g++, and what all kernels include.
#pragma once
#include <vidrial/host/entry.h>
#include <vidrial/host/cuda_functions.h>
#include <cute/config.hpp>
// An atom without an emulation says so and stops the launch.
#undef CUTE_INVALID_CONTROL_PATH
#define CUTE_INVALID_CONTROL_PATH(x) ::vidrial::host::fatal("not emulated on the host: %s", x)
#include <vidrial/prelude.cuh>
// Last: the C++ library has attributes of this name.
#define __noinline__ __attribute__((noinline))
