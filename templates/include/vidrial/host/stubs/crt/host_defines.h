// Stands in for the header of the CUDA toolkit, which the wheels lack: the qualifiers, as g++ has to see them.
#pragma once
#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __inline_hint__
#define __no_return__ __attribute__((noreturn))
#define __specialization_static static
