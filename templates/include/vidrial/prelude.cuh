// What every kernel includes, before `#pragma nv_hdrstop`: CuTe's layouts and swizzles and the bare instruction atoms, and
// nothing of CuTe's partitioning machinery. This part is the same for all kernels, so it can be precompiled.
#pragma once
#include <cute/tensor_impl.hpp>
#include <cute/swizzle_layout.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cutlass/numeric_types.h>
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include <cute/arch/mma_sm90_gmma.hpp>
#endif
