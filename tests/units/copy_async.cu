// cp.async of two groups, one vector a thread each; a thread of every third copies nothing where the atom fills with zeros.
struct Args { Vector const* source; Vector* target; };

CUTE_DEVICE void copy(Vector const& source, Vector& target, bool wanted) {
#if ZERO_FILL
  Atom::copy(source, target, wanted);
#else
  Atom::copy(source, target);
#endif
}

extern "C" __global__ void __launch_bounds__(96) unit(__grid_constant__ Args const args) {
  VIDRIAL_SHARED_MEMORY(raw);
  Vector* const shared = reinterpret_cast<Vector*>(raw);
  int const thread = threadIdx.x, other = 95 - thread;
  copy(args.source[thread], shared[thread], thread % 3 != 1);
  cute::cp_async_fence();
  copy(args.source[96 + thread], shared[96 + thread], thread % 3 != 2);
  cute::cp_async_fence();
  cute::cp_async_wait<1>();
  __syncthreads();
  args.target[thread] = shared[other];
  cute::cp_async_wait<0>();
  __syncthreads();
  args.target[96 + thread] = shared[96 + other];
}
