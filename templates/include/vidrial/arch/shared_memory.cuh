// The CTA's dynamic shared memory: `VIDRIAL_SHARED_MEMORY(raw);` declares `raw`, aligned to 1024 bytes, on the device and on the host.
#pragma once
#ifdef __CUDACC_RTC__
#define VIDRIAL_SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[];
#else
#define VIDRIAL_SHARED_MEMORY(name) char* const name = ::vidrial::host::dynamic_shared_memory();
#endif
