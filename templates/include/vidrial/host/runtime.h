// What a compiled kernel sees of the runtime. The runtime itself (launch.h and what it includes) is compiled once, apart from the
// kernels and without a sanitizer: what it does in its own memory is no finding, what it does in the kernel's goes through memcpy and
// memset, which sanitizers watch.
#pragma once
#include <initializer_list>
#include <vidrial/host/cuda_shim.h>

#define VIDRIAL_INLINE inline __attribute__((always_inline))

namespace vidrial::host {

// End the launch with a message, the thread that sends it and its place in the kernel.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fatal(char const* format, ...);

// Dynamic shared memory, exactly as many bytes as asked for.
extern char* shared_base;
extern size_t shared_bytes;
// Where the static arrays lie, and the shared-memory address of the first.
extern char *static_begin, *static_end;
inline constexpr uint32_t kStaticAddress = 0x80000000u;
inline char* dynamic_shared_memory() { return shared_base; }

int lane();
void sync_threads(char const* file, int line);
void sync_warp(unsigned mask);
// `source` is a lane of the warp. What a lane outside of the mask would give is undefined: here it is all ones, NaN as a float.
uint64_t shuffle(unsigned mask, uint64_t value, int source);
unsigned vote(unsigned mask, bool mine);

// `valid` bytes are copied, the others up to `bytes` become zero.
void cp_async(void* target, void const* source, int bytes, int valid);
void cp_async_commit();
void cp_async_wait_group(int pending);
void cp_async_wait_all();

// The tile after `tile`, or `tiles` if there is none, that a block draws from the counter of a dynamic schedule, where it found `drawn`.
int draw_tile(int drawn, int const* counter, int tile, int tiles);

struct bf16;
struct fp16;
template <int K> struct MmaArgument { uint32_t a[K / 4], b[K / 8]; float c[4]; };
template <class Element, int K> void mma(MmaArgument<K>& argument);
template <int Matrices, bool Transposed> void ldmatrix(void const* row, uint32_t (&result)[Matrices]);

// One thread's part of wgmma m64nNk16 in float32: the instruction, its descriptors and, unless it lies in shared memory, A.
struct Wgmma {
  uint32_t a[4];
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool half, a_shared, a_mn_major, b_mn_major, negate, accumulate;
};
// `registers`: where the thread's N / 2 accumulators are; `a`: where the four registers of A are, if they must stay as they are until the wait.
void wgmma(Wgmma const& instruction, float* const* registers, uint32_t const* a = nullptr);
void wgmma_arrive();
void wgmma_commit();
void wgmma_wait_group(int pending);
// What the CTA wrote to shared memory so far, wgmma may read after the next barrier.
void fence_async_proxy();

// mbarriers, by their shared-memory addresses. An arrival may announce bytes. `free`: the phase before the first counts as completed.
void barrier_init(uint32_t barrier, uint32_t count, char const* name, int index);
void barrier_arrive(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity, bool free);
enum class Named { Sync, Arrive, Any };
// Whether one of the threads that meet there says so.
bool named_barrier(Named what, int id, int threads, bool mine);
// setmaxnreg: by all threads of a warpgroup; an increase waits until the CTA's pool has so many.
void reallocate_registers(int registers, bool increase);
// What messages call the warp of this thread, in a kernel of which an SM holds `ctas` CTAs at once.
void name_role(char const* name, int ctas);

// What stands in a TensorMap here. NOTE: vidrial.host.tensor_map packs it in the same order. Innermost dimension first; strides in bytes, of
// the dimensions from the second on.
struct TensorMap { char const* base; int64_t offset; uint64_t strides[4]; uint32_t dims[5], box[5]; uint8_t rank, element_bytes, swizzle, magic; char name[28]; };
inline constexpr uint8_t kTensorMapMagic = 0xa7;
static_assert(sizeof(TensorMap) == 120, "a tensor map has 128 bytes");
void tma_load(void const* map, uint32_t barrier, uint32_t target, int rank, int const* coordinates);
void bulk_load(uint32_t barrier, uint32_t target, void const* source, uint32_t bytes);
void bulk_store(void* target, uint32_t source, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending);

// Tells the types of tiled objects apart. What a thread causes counts as that of the object that it entered last and has not left.
template <class Object> inline char identity = 0;
void const* enter_object(void const* identity);  // the one before
struct Counted {
  void const* const before;
  explicit Counted(void const* identity) : before(enter_object(identity)) {}
  ~Counted() { enter_object(before); }
};
// While it lives, what this thread's wgmmas read in registers is watched. Not by default: a variable of one turn of a loop is another register
// in the next turn on the GPU, and the same memory here.
bool hold_operands(bool held);  // whether they were before
bool holds_operands();
struct HeldOperands {
  bool const before = hold_operands(true);
  ~HeldOperands() { hold_operands(before); }
};
// The thread begins its part of a tile's copy.
void count_copy();
// The thread loads 16 bytes at a shared-memory address.
void count_shared_load(uint32_t address);

// main() of the executable: `call` runs the kernel in the current thread, with `bytes` of packed arguments; `objects` are the identities of
// the types that are counted apart, in the order that the reply has them.
int serve(void (*call)(char const* packed), size_t bytes, std::initializer_list<void const*> objects);

}  // namespace vidrial::host
