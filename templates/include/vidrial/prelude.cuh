// What every kernel includes, before `#pragma nv_hdrstop`: the names of CuTe, the bare instruction atoms and the tiled objects. This part is
// the same for all kernels, so it can be precompiled.
#pragma once
#include <vidrial/arch/cute.cuh>
#include <vidrial/tile/mma.cuh>
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include <vidrial/tile/wgmma.cuh>
#endif
