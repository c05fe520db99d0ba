// Drawing and packing on the GPU: one block an image, no atomics but on integers in shared memory, no waiting.
#include <cuda_runtime.h>

#include "masks.h"

#ifndef FASTALIGN_LAUNCH  // tests/emulated/cuda_runtime.h has its own, which runs the kernels on the CPU
#define FASTALIGN_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace fastalign::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// Writes one patch's entry in every copy. mask: [M, N] of this image.
__device__ void write_patch(const Draw& draw, bool* mask, int32_t n, bool sample) {
  const int32_t patches = draw.patches();
  mask[n] = sample;
  if (draw.complement) mask[patches + n] = !sample;
  if (draw.full) mask[(1 + draw.complement) * patches + n] = true;
}

// Uniform and Bernoulli: each thread takes whole counters, that is four patches.
__device__ void draw_patches(const Draw& draw, int64_t id, bool* mask) {
  const int32_t patches = draw.patches(), skip = draw.kind == UNIFORM;  // word 0 is the image's own u
  const uint32_t u = draw_words<1>(draw, id, {0u}).w[0][0];
  for (int32_t block = threadIdx.x; 4 * block < patches + skip; block += THREADS) {
    const Words<1> words = draw_words<1>(draw, id, {uint32_t(block)});
    for (int j = 0; j < 4; ++j) {
      const int32_t n = 4 * block + j - skip;
      const uint32_t word = words.w[j][0];
      if (n >= 0 && n < patches) write_patch(draw, mask, n, skip ? word > u : word < draw.threshold);
    }
  }
}

// Each thread owns the patches n = threadIdx.x, + THREADS, ...: it alone reads and writes their sample.
__device__ void draw_blocks(const Draw& draw, int64_t id, bool* mask) {
  __shared__ Rectangle boxes[MAX_BLOCKS];
  if (threadIdx.x < MAX_BLOCKS) {
    uint32_t word[4];
    for (uint32_t j = 0; j < 4; ++j) {
      const Words<1> words = draw_words<1>(draw, id, {16 * j + threadIdx.x / 4});
      word[j] = words.w[threadIdx.x % 4][0];
    }
    boxes[threadIdx.x] = rectangle(draw, word[0], word[1], word[2], word[3]);
  }
  const int32_t patches = draw.patches();
  for (int32_t n = threadIdx.x; n < patches; n += THREADS) mask[n] = false;
  __syncthreads();
  int32_t covered = 0;
  for (int i = 0; i < MAX_BLOCKS; ++i) {
    for (int32_t first = 0; first < patches; first += THREADS) {
      const int32_t n = first + threadIdx.x;
      const bool fresh = n < patches && !mask[n] && boxes[i].covers(n / draw.columns, n % draw.columns);
      if (fresh) mask[n] = true;
      covered += __syncthreads_count(fresh);
    }
    if (covered >= draw.target) break;  // the same in every thread
  }
  for (int32_t n = threadIdx.x; n < patches; n += THREADS) write_patch(draw, mask, n, mask[n]);
}

// The caller's next read of another thread's patch is safe: all threads have written when this returns.
__device__ void draw_image(const Draw& draw, int64_t id, bool* mask) {
  if (draw.kind == BLOCKWISE)
    draw_blocks(draw, id, mask);
  else
    draw_patches(draw, id, mask);
  __syncthreads();
}

__device__ void count_image(const Pack& pack, int32_t image, const bool* mask) {
  for (int32_t m = 0; m < pack.copies; ++m) {
    int32_t total = pack.prefix;
    for (int32_t first = 0; first < pack.patches; first += THREADS) {
      const int32_t n = first + threadIdx.x;
      total += __syncthreads_count(n < pack.patches && mask[int64_t{m} * pack.patches + n]);
    }
    if (threadIdx.x == 0) pack.counts[image * pack.copies + m] = total;
  }
}

// Packs one sequence from row `row` on and returns the row after its last. mask: [N].
__device__ int32_t pack_sequence(const Pack& pack, int32_t sequence, const bool* mask, int32_t row) {
  __shared__ int32_t kept[WARPS];
  const int32_t tokens = pack.tokens(), token = sequence / pack.copies * tokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int32_t first = 0; first < tokens; first += THREADS) {
    const int32_t t = first + threadIdx.x;
    const bool keep = t < pack.prefix || (t < tokens && mask[t - pack.prefix]);
    const unsigned votes = __ballot_sync(0xFFFFFFFFu, keep);
    if (lane == 0) kept[warp] = __popc(votes);
    __syncthreads();
    int32_t slot = row + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) slot += kept[w];
      row += kept[w];
    }
    __syncthreads();  // all have read `kept` before the next round writes it
    const bool fits = keep && slot < pack.length;
    if (fits) pack.indices[slot] = token + t;
    if (t < tokens) pack.slots[int64_t{sequence} * tokens + t] = fits ? slot : -1;
  }
  return row;
}

// Packs an image's sequences from row `row` on, and this block's share of the padding behind row `total`.
__device__ void pack_image(const Pack& pack, int32_t image, const bool* mask, int32_t row, int32_t total,
                           bool counted) {
  for (int32_t m = 0; m < pack.copies; ++m) {
    const int32_t sequence = image * pack.copies + m;
    const int32_t next = pack_sequence(pack, sequence, mask + int64_t{m} * pack.patches, row);
    if (threadIdx.x == 0) {
      if (sequence == 0) pack.starts[0] = 0;
      pack.starts[sequence + 1] = next;
      if (!counted) pack.counts[sequence] = next - row;
    }
    row = next;
  }
  const int64_t step = int64_t{gridDim.x} * THREADS;
  for (int64_t r = total + int64_t{image} * THREADS + threadIdx.x; r < pack.length; r += step) pack.indices[r] = -1;
}

__global__ void draw_kernel(Draw draw, const int64_t* ids, bool* visible) {
  const int64_t image = blockIdx.x;
  draw_image(draw, ids[image], visible + image * draw.copies * draw.patches());
}

// Counts what it drew, for pack_kernel; with ids == nullptr the masks are given.
__global__ void count_kernel(Draw draw, Pack pack, const int64_t* ids, bool* visible) {
  const int64_t image = blockIdx.x;
  bool* mask = visible + image * pack.copies * pack.patches;
  if (ids != nullptr) draw_image(draw, ids[image], mask);
  count_image(pack, int32_t(image), mask);
}

// Each block adds up the counts before its image itself: cheaper than one more launch for a scan.
__global__ void pack_kernel(Pack pack, const bool* visible) {
  __shared__ int32_t before, total;
  if (threadIdx.x == 0) before = total = 0;
  __syncthreads();
  const int32_t image = blockIdx.x, own = image * pack.copies;
  int32_t mine = 0, all = 0;
  for (int32_t s = threadIdx.x; s < pack.sequences(); s += THREADS) {
    all += pack.counts[s];
    if (s < own) mine += pack.counts[s];
  }
  atomicAdd(&before, mine);
  atomicAdd(&total, all);
  __syncthreads();
  pack_image(pack, image, visible + int64_t{own} * pack.patches, before, total, true);
}

// A mask and its complement show N patches together, so that every image's first row is known without counting.
__global__ void draw_pack_kernel(Draw draw, Pack pack, const int64_t* ids, bool* visible) {
  const int32_t image = blockIdx.x;
  const int32_t rows = pack.copies * pack.prefix + (1 + draw.full) * pack.patches;
  bool* mask = visible + int64_t{image} * pack.copies * pack.patches;
  draw_image(draw, ids[image], mask);
  pack_image(pack, image, mask, image * rows, pack.images * rows, false);
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* draw(const Draw& draw, int64_t images, const int64_t* ids, bool* visible, void* stream) {
  FASTALIGN_LAUNCH(draw_kernel, unsigned(images), THREADS, stream, draw, ids, visible);
  return launch_error();
}

const char* pack(const Pack& pack, const bool* visible, void* stream) {
  // count_kernel writes masks only where it draws them.
  auto* masks = const_cast<bool*>(visible);
  FASTALIGN_LAUNCH(count_kernel, unsigned(pack.images), THREADS, stream, Draw{}, pack, nullptr, masks);
  FASTALIGN_LAUNCH(pack_kernel, unsigned(pack.images), THREADS, stream, pack, visible);
  return launch_error();
}

const char* draw_packed(const Draw& draw, const Pack& pack, const int64_t* ids, bool* visible, void* stream) {
  if (draw.complement) {
    FASTALIGN_LAUNCH(draw_pack_kernel, unsigned(pack.images), THREADS, stream, draw, pack, ids, visible);
  } else {
    FASTALIGN_LAUNCH(count_kernel, unsigned(pack.images), THREADS, stream, draw, pack, ids, visible);
    FASTALIGN_LAUNCH(pack_kernel, unsigned(pack.images), THREADS, stream, pack, visible);
  }
  return launch_error();
}

}  // namespace fastalign::cuda
