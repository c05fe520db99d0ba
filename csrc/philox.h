// Philox4x32-10 (Salmon et al., SC 2011), the generator of fastalign/utils/random.py, for host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTALIGN_HD __host__ __device__ __forceinline__
#else
#define FASTALIGN_HD inline
#endif

namespace fastalign {

constexpr uint32_t MASKS_STREAM = 1;  // Stream.MASKS of fastalign/utils/random.py

// LANES counters side by side, word by word: a compiler turns the inner loop into vector instructions.
template <int LANES>
struct Words {
  uint32_t w[4][LANES];
};

// Counters in, random words out. k0, k1: the key.
template <int LANES>
FASTALIGN_HD Words<LANES> philox(Words<LANES> c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < LANES; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c.w[0][i];
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.w[2][i];
      c.w[0][i] = uint32_t(p1 >> 32) ^ c.w[1][i] ^ k0;
      c.w[1][i] = uint32_t(p1);
      c.w[2][i] = uint32_t(p0 >> 32) ^ c.w[3][i] ^ k1;
      c.w[3][i] = uint32_t(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace fastalign
