// What every kernel includes, before `#pragma nv_hdrstop`: CuTe's layouts and swizzles, the bare instruction atoms and the tiled objects,
// and nothing of CuTe's partitioning machinery. This part is the same for all kernels, so it can be precompiled.
#pragma once
#include <cute/tensor_impl.hpp>
#include <cute/swizzle_layout.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cutlass/numeric_types.h>
#include <vidrial/tiled.cuh>
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include <vidrial/wgmma.cuh>
#endif
