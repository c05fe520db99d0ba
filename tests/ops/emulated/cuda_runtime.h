// Enough of CUDA's language to run the kernels of csrc/masks_cuda.cu on the CPU, where CI has no GPU.
//
// The threads of a block are fibres that take turns: each runs up to its next barrier. With DESCENDING they run in
// the opposite order, so that a missing barrier shows as a difference.
#pragma once

#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define FASTALIGN_LAUNCH(kernel, blocks, threads, stream, ...) \
  emulation::launch(blocks, threads, [&] { kernel(__VA_ARGS__); })

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace emulation {

constexpr size_t STACK = 1 << 16;
inline bool descending = false;
inline std::function<void()> body;
inline ucontext_t scheduler;
inline std::vector<ucontext_t> fibres;
inline std::vector<char> done;
inline std::vector<int> votes;

inline void barrier() { swapcontext(&fibres[threadIdx.x], &scheduler); }

inline void run_thread() {
  body();
  done[threadIdx.x] = true;
}

inline void run_block(unsigned threads, std::vector<char>& stacks) {
  done.assign(threads, false);
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&fibres[i]);
    fibres[i].uc_stack.ss_sp = stacks.data() + i * STACK;
    fibres[i].uc_stack.ss_size = STACK;
    fibres[i].uc_link = &scheduler;
    makecontext(&fibres[i], run_thread, 0);
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = descending ? threads - 1 - i : i;
      if (done[threadIdx.x]) continue;
      busy = true;
      swapcontext(&scheduler, &fibres[threadIdx.x]);
    }
  }
}

inline void launch(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim.x = blocks;
  fibres.resize(threads);
  votes.resize(threads);
  std::vector<char> stacks(threads * STACK);
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = descending ? blocks - 1 - b : b;
    run_block(threads, stacks);
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }

inline int __syncthreads_count(bool predicate) {
  emulation::votes[threadIdx.x] = predicate;
  emulation::barrier();
  int count = 0;
  for (const int vote : emulation::votes) count += vote;
  emulation::barrier();
  return count;
}

// All threads of the block must call it together, which is more than the GPU asks for.
inline unsigned __ballot_sync(unsigned, bool predicate) {
  emulation::votes[threadIdx.x] = predicate;
  emulation::barrier();
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= unsigned(emulation::votes[threadIdx.x / 32 * 32 + lane]) << lane;
  emulation::barrier();
  return ballot;
}

inline int __popc(unsigned word) { return __builtin_popcount(word); }

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
