// The vocabulary of the kernels: threads, barriers, conversions, shuffles and tensor-core MMAs. A CUDA compiler sees
// the GPU's instructions, any other compiler an emulation on the host (emulation.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MIRAGE_DEVICE __device__ __forceinline__
#define MIRAGE_ANYWHERE __host__ __device__ __forceinline__
#define MIRAGE_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)  // threads, blocks of a multiprocessor
#else
#include "emulation.h"
#define MIRAGE_DEVICE inline
#define MIRAGE_ANYWHERE inline
#define MIRAGE_KERNEL(...) void
#endif

namespace mirage::cuda {

constexpr int kLanes = 32;

// Storage types of 16-bit elements. Kernels convert to float and compute there.
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

template <class T> constexpr bool kIsHalf = sizeof(T) == 2;

// ---- threads -------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)

MIRAGE_DEVICE int thread_index() { return int(threadIdx.x); }
MIRAGE_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
MIRAGE_DEVICE void sync_block() { __syncthreads(); }
MIRAGE_DEVICE void sync_warp() { __syncwarp(); }

MIRAGE_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

#else

inline int thread_index() { return emulation::current_thread; }
inline int64_t block_index() { return emulation::current_block; }
inline void sync_block() { emulation::wait_for_block(); }
inline void sync_warp() {
  const uint32_t nothing = 0;
  emulation::exchange(&nothing, 1);
}
inline unsigned char* shared_memory() { return emulation::shared; }

#endif

template <class To, class From>
MIRAGE_DEVICE To bit_cast(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// Returns x, but hides its value from the optimiser. What depends on it is recomputed in each iteration of a loop and
// not hoisted, which would keep a register alive for the whole loop.
MIRAGE_DEVICE int opaque(int x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Returns p, but hides its origin from the optimiser and asserts that it is a global address. The compiler then derives
// neighbouring addresses from p by one addition each; otherwise it recomputes each of them from everything that went
// into p.
template <class T>
MIRAGE_DEVICE T* opaque_global(T* p) {
#if defined(__CUDACC__)
  size_t address = __cvta_generic_to_global(p);
  asm("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
#else
  return p;
#endif
}

// Loads through the read-only cache. The memory must not be written while the kernel runs; the load may then move above
// earlier stores.
template <class T>
MIRAGE_DEVICE T load_constant(const T* p) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2) return bit_cast<T>(__ldg(reinterpret_cast<const uint16_t*>(p)));
  else if constexpr (sizeof(T) == 8) return bit_cast<T>(__ldg(reinterpret_cast<const float2*>(p)));
  else return __ldg(p);
#else
  return *p;
#endif
}

MIRAGE_DEVICE int lane_index() { return thread_index() % kLanes; }
MIRAGE_DEVICE int warp_index() { return thread_index() / kLanes; }

// ---- numbers -------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)

MIRAGE_DEVICE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T> MIRAGE_DEVICE uint32_t pack(float low, float high);
template <> MIRAGE_DEVICE uint32_t pack<f16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <> MIRAGE_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// NaN if either argument is NaN.
MIRAGE_DEVICE float at_most(float bound, float x) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(bound), "f"(x));
  return result;
}
MIRAGE_DEVICE float at_least(float bound, float x) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(bound), "f"(x));
  return result;
}

MIRAGE_DEVICE float exp2_of(float x) {  // error up to 2 ulp; subnormal results become 0
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

MIRAGE_DEVICE float reciprocal(float x) {  // error up to 1 ulp; subnormal results become 0
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

MIRAGE_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

#else

inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
  return std::copysign(float(rest) * 5.9604644775390625e-8f, bit_cast<float>(sign));
}

template <class T> uint16_t rounded(float x);
template <> inline uint16_t rounded<f16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7fffu);
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 rounds to infinity
  if (rest < 0x38800000u) return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(x) * 16777216.0f)));
  return uint16_t(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13));
}
template <> inline uint16_t rounded<bf16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <class T> uint32_t pack(float low, float high) { return rounded<T>(low) | uint32_t(rounded<T>(high)) << 16; }

inline float at_most(float bound, float x) { return x != x ? x : x < bound ? x : bound; }
inline float at_least(float bound, float x) { return x != x ? x : x > bound ? x : bound; }
inline float exp2_of(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

#endif

MIRAGE_DEVICE float to_float(float x) { return x; }
MIRAGE_DEVICE float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

template <class T> MIRAGE_DEVICE T from_float(float x) { return T{uint16_t(pack<T>(x, 0.0f))}; }
template <> MIRAGE_DEVICE float from_float<float>(float x) { return x; }

// Unpacks the low and the high one of two packed elements.
template <class T> MIRAGE_DEVICE float low_of(uint32_t both) { return to_float(T{uint16_t(both)}); }
template <class T> MIRAGE_DEVICE float high_of(uint32_t both) { return to_float(T{uint16_t(both >> 16)}); }
template <> MIRAGE_DEVICE float high_of<bf16>(uint32_t both) { return bit_cast<float>(both & 0xffff0000u); }

// N neighbouring elements that one instruction loads or stores.
template <class T, int N> struct alignas(sizeof(T) * N) Packed { T value[N]; };

// Loads N neighbours with one instruction; the address is a multiple of their total size.
template <int N, class T>
MIRAGE_DEVICE void load_packed(const T* p, float* out) {
  const auto packed = *reinterpret_cast<const Packed<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(packed.value[i]);
}

template <class T>
MIRAGE_DEVICE void store_pair(T* p, float first, float second) {
  if constexpr (kIsHalf<T>) *reinterpret_cast<uint32_t*>(p) = pack<T>(first, second);
  else *reinterpret_cast<Packed<float, 2>*>(p) = {first, second};
}

// Stores four neighbours with one instruction; the address is a multiple of four elements.
template <class T>
MIRAGE_DEVICE void store_four(T* p, const float (&value)[4]) {
  if constexpr (kIsHalf<T>) {
    *reinterpret_cast<Packed<uint32_t, 2>*>(p) = {pack<T>(value[0], value[1]), pack<T>(value[2], value[3])};
  } else {
    *reinterpret_cast<Packed<float, 4>*>(p) = {value[0], value[1], value[2], value[3]};
  }
}

// ---- warps ---------------------------------------------------------------------------------------------------------

// Butterfly shuffle: returns the value of lane `lane ^ mask`.
MIRAGE_DEVICE float shfl_xor(float x, int mask) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xffffffffu, x, mask);
#else
  const uint32_t mine = bit_cast<uint32_t>(x);
  return bit_cast<float>(emulation::exchange(&mine, 1)[lane_index() ^ mask]);
#endif
}

// Warp all-reduce: every lane gets the total, added up in an order that never changes.
MIRAGE_DEVICE float warp_all_reduce_sum(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shfl_xor(x, mask);
  return x;
}

MIRAGE_DEVICE float warp_all_reduce_max(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = at_least(shfl_xor(x, mask), x);
  return x;
}

// The accumulator fragment of a 16 x 8 MMA: with (g, t) = (lane / 4, lane % 4), c[0] and c[1] of a lane are columns 2t
// and 2t + 1 of row g, c[2] and c[3] those of row g + 8.

#if defined(__CUDACC__)

// ldmatrix, for 8 x 8 matrices of 16-bit elements: lane l passes the address of row l % 8 of matrix l / 8, and receives
// in r[i] columns 2t and 2t + 1 of row g of matrix i. `load_transposed` returns rows 2t and 2t + 1 of column g.
#define MIRAGE_LOAD_MATRICES(name, how)                                                                \
  MIRAGE_DEVICE void name(uint32_t (&r)[4], const void* row) {                                         \
    const uint32_t address = uint32_t(__cvta_generic_to_shared(row));                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" how ".shared.b16 {%0, %1, %2, %3}, [%4];"             \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");          \
  }                                                                                                    \
  MIRAGE_DEVICE void name(uint32_t (&r)[2], const void* row) {                                         \
    const uint32_t address = uint32_t(__cvta_generic_to_shared(row));                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" how ".shared.b16 {%0, %1}, [%2];"                     \
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");                                  \
  }
MIRAGE_LOAD_MATRICES(load_rows, "")
MIRAGE_LOAD_MATRICES(load_transposed, ".trans")
#undef MIRAGE_LOAD_MATRICES

#define MIRAGE_MMA(shape_and_types)                                                                       \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// Warp MMA: c += a b, 16 x 16 times 16 x 8 (TF32: 16 x 8 times 8 x 8), with float accumulators.
template <class T> MIRAGE_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <> MIRAGE_DEVICE void multiply_add<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MIRAGE_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <> MIRAGE_DEVICE void multiply_add<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MIRAGE_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <> MIRAGE_DEVICE void multiply_add<float>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MIRAGE_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef MIRAGE_MMA

#else

template <bool kTransposed, int N>
void load_matrices(uint32_t (&r)[N], const void* row) {
  const uint64_t address = reinterpret_cast<uintptr_t>(row);
  const uint32_t mine[2] = {uint32_t(address), uint32_t(address >> 32)};
  const uint32_t* all = emulation::exchange(mine, 2);
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto element = [&](int matrix, int i, int j) {
    const uint32_t* words = all + 2 * (8 * matrix + i);
    return uint32_t(reinterpret_cast<const uint16_t*>(uintptr_t(uint64_t(words[0]) | uint64_t(words[1]) << 32))[j]);
  };
  for (int i = 0; i < N; ++i) {
    r[i] = kTransposed ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                       : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
  }
}
template <int N> void load_rows(uint32_t (&r)[N], const void* row) { load_matrices<false>(r, row); }
template <int N> void load_transposed(uint32_t (&r)[N], const void* row) { load_matrices<true>(r, row); }

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t* all = emulation::exchange(mine, 6);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * t + i % 2;  // row: 0 for the upper half of the fragment, 1 for the lower
    float sum = 0;
    for (int k = 0; k < 4; ++k) {  // the lane that holds these elements of both operands
      const uint32_t* left = all + 6 * (4 * g + k);
      const uint32_t* right = all + 6 * (4 * column + k) + 4;
      for (int half = 0; half < 2; ++half) {
        const uint32_t x = left[row + 2 * half], y = right[half];
        if constexpr (kIsHalf<T>) sum += low_of<T>(x) * low_of<T>(y) + high_of<T>(x) * high_of<T>(y);
        else sum += bit_cast<float>(x) * bit_cast<float>(y);
      }
    }
    c[i] += sum;
  }
}

#endif

}  // namespace mirage::cuda
