// The kernels of gated_depthwise_ffn. A block has a tile of 32 x 32 pixels of one pair of channels: it holds gelu(h) of
// both with a halo in shared memory, as float, and each thread convolves runs of four neighbours in a line. Backward
// recomputes gelu(h) and d, and keeps the gradient of d in shared memory, so that h and grad_y are read once.
#pragma once

#include "common/cuda/elementary.h"

namespace mirage::cuda {

struct GateArguments {
  const void *h, *weight, *grad_y;
  int64_t h_stride[4], grad_stride[4];
  void* out;       // y, or grad_h
  float* partial;  // [2 * pairs, 9, parts]
  bool packed_in, packed_out;  // runs of h and of `out` are aligned
  int pairs, height, width;
  int64_t batch;
  int parts;  // of the tiles of a pair, in backward
};

constexpr int kGateThreads = 256, kGateSide = 32, kGateRun = 4, kGateRuns = kGateSide / kGateRun;
// Floats per line in shared memory: lines of gelu(h) begin two columns left of the tile, those of the gradient of d
// one.
constexpr int kGatePitch = 36;
static_assert(kGateThreads * kGateRun == kGateSide * kGateSide);

// gelu(h) with a halo of kHalo lines above and below.
template <int kHalo>
struct GateTile {
  static constexpr int kLines = kGateSide + 2 * kHalo;
  alignas(16) float activated[2][kLines * kGatePitch];
  alignas(16) float taps[2][12];  // nine, padded to twelve
};

struct GateBackwardTile : GateTile<2> {
  static constexpr int kGradLines = kGateSide + 2, kGradRuns = kGatePitch / kGateRun;
  alignas(16) float slope[2][kGateSide * kGateSide];       // gelu'(h) of the tile
  alignas(16) float grad[2][kGradLines * kGatePitch];      // gradient of d, with a halo of one
};

// A tile of a pair of channels.
struct GateWork {
  int64_t sample;
  int pair, row, column;
};

MIRAGE_ANYWHERE int64_t gate_tiles(const GateArguments& p) {  // of all samples, per pair
  return p.batch * ((p.height + kGateSide - 1) / kGateSide) * ((p.width + kGateSide - 1) / kGateSide);
}

MIRAGE_DEVICE GateWork gate_work(const GateArguments& p, int pair, int64_t tile) {
  const int across = (p.width + kGateSide - 1) / kGateSide, down = (p.height + kGateSide - 1) / kGateSide;
  const int i = int(tile % (int64_t(across) * down));
  return {tile / (int64_t(across) * down), pair, i / across * kGateSide, i % across * kGateSide};
}

template <class T>
MIRAGE_DEVICE void load_gate_taps(const GateArguments& p, int pair, float (&taps)[2][12]) {
  for (int t = thread_index(); t < 18; t += kGateThreads) {
    const int64_t channel = pair + int64_t(t / 9) * p.pairs;
    taps[t / 9][t % 9] = to_float(static_cast<const T*>(p.weight)[channel * 9 + t % 9]);
  }
}

MIRAGE_DEVICE void read_gate_taps(const float* from, float (&taps)[9]) {
  load_packed<4>(from, taps);
  load_packed<4>(from + 4, taps + 4);
  taps[8] = from[8];
}

// Loads N neighbours of a line of h, for both channels of the pair; zero out of bounds.
template <class T, int N>
MIRAGE_DEVICE void load_gate_run(const GateArguments& p, const GateWork& work, int row, int column,
                                 float (&value)[2][N]) {
  row += work.row, column += work.column;
  const bool row_in_bounds = row >= 0 && row < p.height;
  const int64_t half = p.pairs * p.h_stride[1], line = row * p.h_stride[2];
  const T* h = static_cast<const T*>(p.h) + work.sample * p.h_stride[0] + work.pair * p.h_stride[1] + line;
  if (p.packed_in) {
#pragma unroll
    for (int j = 0; j < N; ++j) value[0][j] = value[1][j] = 0.0f;
    if (!row_in_bounds || column < 0 || column >= p.width) return;
    load_packed<N>(h + column, value[0]);
    load_packed<N>(h + half + column, value[1]);
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const bool in_bounds = row_in_bounds && column + j >= 0 && column + j < p.width;
    const int64_t offset = (column + j) * p.h_stride[3];
    value[0][j] = in_bounds ? to_float(h[offset]) : 0.0f;
    value[1][j] = in_bounds ? to_float(h[half + offset]) : 0.0f;
  }
}

// Calls visit(row, column, h of both channels) for all runs of the tile, then for two columns of the halo on either
// side.
template <class T, int kHalo, class Visit>
MIRAGE_DEVICE void for_each_gate_run(const GateArguments& p, const GateWork& work, Visit visit) {
  constexpr int kLines = GateTile<kHalo>::kLines, kInner = kLines * kGateRuns;
#pragma unroll 1
  for (int i = thread_index(); i < kInner + 2 * kLines; i += kGateThreads) {
    if (i < kInner) {
      const int row = i / kGateRuns - kHalo, column = i % kGateRuns * kGateRun;
      float value[2][kGateRun];
      load_gate_run<T>(p, work, row, column, value);
      visit(row, column, value);
    } else {
      const int row = (i - kInner) / 2 - kHalo, column = (i - kInner) % 2 ? kGateSide : -2;
      float value[2][2];
      load_gate_run<T>(p, work, row, column, value);
      visit(row, column, value);
    }
  }
}

// Convolves a run. `line` points to the first of its three lines, kOffset floats before the first value that it needs.
template <int kOffset>
MIRAGE_DEVICE void convolve_gate_run(const float* line, const float (&taps)[9], float (&d)[kGateRun]) {
#pragma unroll
  for (int j = 0; j < kGateRun; ++j) d[j] = 0.0f;
#pragma unroll
  for (int y = 0; y < 3; ++y, line += kGatePitch) {
    float value[8];
    load_packed<4>(line, value);
    if constexpr (kOffset == 0) load_packed<2>(line + 4, value + 4);
    else load_packed<4>(line + 4, value + 4);
#pragma unroll
    for (int z = 0; z < 3; ++z) {
#pragma unroll
      for (int j = 0; j < kGateRun; ++j) d[j] = fmaf(taps[3 * y + z], value[kOffset + z + j], d[j]);
    }
  }
}

// Stores the part of a run that is in bounds.
template <class T>
MIRAGE_DEVICE void store_gate_run(const GateArguments& p, T* out, int column, const float (&value)[kGateRun]) {
  if (p.packed_out) return store_four(out, value);
#pragma unroll
  for (int j = 0; j < kGateRun; ++j) {
    if (column + j < p.width) out[j] = from_float<T>(value[j]);
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

// One block per tile and pair.
template <class T>
MIRAGE_KERNEL(256, 4) gate_kernel(const GateArguments p) {
  GateTile<1>& tile = *reinterpret_cast<GateTile<1>*>(shared_memory());
  const int64_t tiles = gate_tiles(p);
  const GateWork work = gate_work(p, int(block_index() / tiles), block_index() % tiles);
  load_gate_taps<T>(p, work.pair, tile.taps);
  for_each_gate_run<T, 1>(p, work, [&](int row, int column, const auto& value) {
    constexpr int kCount = sizeof(value[0]) / sizeof(float);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* to = tile.activated[half] + (row + 1) * kGatePitch + column + 2;
#pragma unroll
      for (int j = 0; j < kCount; j += 2) store_pair(to + j, gelu<T>(value[half][j]), gelu<T>(value[half][j + 1]));
    }
  });
  sync_block();
  const int line = thread_index() / kGateRuns, start = thread_index() % kGateRuns * kGateRun;
  if (work.row + line >= p.height || work.column + start >= p.width) return;
  float d[2][kGateRun];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float taps[9];
    read_gate_taps(tile.taps[half], taps);
    convolve_gate_run<1>(tile.activated[half] + line * kGatePitch + start, taps, d[half]);
  }
#pragma unroll
  for (int j = 0; j < kGateRun; ++j) d[0][j] = gelu<T>(d[0][j]) * d[1][j];
  const int64_t row = (work.sample * p.pairs + work.pair) * p.height + work.row + line;
  store_gate_run(p, static_cast<T*>(p.out) + row * p.width + work.column + start, work.column + start, d[0]);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Computes gelu(h) and its derivative.
template <class T>
MIRAGE_DEVICE void activate_gate(const GateArguments& p, const GateWork& work, GateBackwardTile& tile) {
  for_each_gate_run<T, 2>(p, work, [&](int row, int column, const auto& value) {
    constexpr int kCount = sizeof(value[0]) / sizeof(float);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float activated[kCount], slope[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) activated[j] = gelu_with_slope<T>(value[half][j], slope[j]);
      float* to = tile.activated[half] + (row + 2) * kGatePitch + column + 2;
#pragma unroll
      for (int j = 0; j < kCount; j += 2) store_pair(to + j, activated[j], activated[j + 1]);
      if constexpr (kCount == kGateRun) {
        if (row < 0 || row >= kGateSide) continue;
        auto& run = *reinterpret_cast<Packed<float, 4>*>(tile.slope[half] + row * kGateSide + column);
        run = {slope[0], slope[1], slope[2], slope[3]};
      }
    }
  });
}

// Computes the gradient of d with a halo of one, in runs that begin one column left of the tile; zero out of bounds.
template <class T>
MIRAGE_DEVICE void compute_grad_d(const GateArguments& p, const GateWork& work, GateBackwardTile& tile) {
  const T* grad_y = static_cast<const T*>(p.grad_y) + work.sample * p.grad_stride[0] + work.pair * p.grad_stride[1];
#pragma unroll 1
  for (int i = thread_index(); i < tile.kGradLines * tile.kGradRuns; i += kGateThreads) {
    const int line = i / tile.kGradRuns, start = i % tile.kGradRuns * kGateRun;
    const int row = work.row + line - 1, column = work.column + start - 1;
    float of_y[kGateRun], d[2][kGateRun];
    bool in_bounds[kGateRun], any = false;
#pragma unroll
    for (int j = 0; j < kGateRun; ++j) {
      in_bounds[j] = row >= 0 && row < p.height && column + j >= 0 && column + j < p.width;
      any |= in_bounds[j];
      of_y[j] = in_bounds[j] ? to_float(grad_y[row * p.grad_stride[2] + (column + j) * p.grad_stride[3]]) : 0.0f;
    }
    Packed<float, 4> grad[2] = {};
    if (any) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float taps[9];
        read_gate_taps(tile.taps[half], taps);
        convolve_gate_run<0>(tile.activated[half] + line * kGatePitch + start, taps, d[half]);
      }
#pragma unroll
      for (int j = 0; j < kGateRun; ++j) {
        float slope;
        const float value = gelu_with_slope<T>(d[0][j], slope);
        grad[0].value[j] = in_bounds[j] ? of_y[j] * d[1][j] * slope : 0.0f;
        grad[1].value[j] = in_bounds[j] ? of_y[j] * value : 0.0f;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<Packed<float, 4>*>(tile.grad[half] + line * kGatePitch + start) = grad[half];
    }
  }
}

// Computes the gradient of gelu(h) for a run of one channel that begins in bounds, and adds its contribution to that of
// the weight. Taps that reach out of bounds are skipped there: gelu(h) or the gradient of d may be infinite at the
// border, and infinity times the padding's zero is NaN.
MIRAGE_DEVICE void gate_run_gradients(const GateArguments& p, const GateWork& work, const GateBackwardTile& tile,
                                      int half, int line, int start, float (&grad)[kGateRun], float (&sum)[9]) {
  const float* of_run = tile.activated[half] + (line + 2) * kGatePitch + start + 2;
  float activated[kGateRun], taps[9];
  load_packed<2>(of_run, activated);
  load_packed<2>(of_run + 2, activated + 2);
  read_gate_taps(tile.taps[half], taps);
  const int column = work.column + start;
  bool in_bounds[kGateRun + 2];  // from the column left of the run on
#pragma unroll
  for (int j = 0; j < kGateRun + 2; ++j) in_bounds[j] = column + j - 1 >= 0 && column + j - 1 < p.width;
#pragma unroll
  for (int j = 0; j < kGateRun; ++j) grad[j] = 0.0f;
#pragma unroll
  for (int y = 0; y < 3; ++y) {
    const int row = work.row + line + 1 - y;
    if (row < 0 || row >= p.height) continue;
    float value[6];
    const float* from = tile.grad[half] + (line + 2 - y) * kGatePitch + start;
    load_packed<4>(from, value);
    load_packed<2>(from + 4, value + 4);
#pragma unroll
    for (int z = 0; z < 3; ++z) {
#pragma unroll
      for (int j = 0; j < kGateRun; ++j) {
        grad[j] = fmaf(taps[3 * y + z], value[j + 2 - z], grad[j]);
        if (!in_bounds[j + 1] || !in_bounds[j + 2 - z]) continue;
        sum[3 * y + z] = fmaf(activated[j], value[j + 2 - z], sum[3 * y + z]);
      }
    }
  }
}

// Adds up the sums of all threads, and stores them as those of the block's part.
MIRAGE_DEVICE void store_gate_sums(const GateArguments& p, int pair, int part, const float (&sum)[2][9],
                                   float* memory) {
  constexpr int kWarps = kGateThreads / kLanes;
#pragma unroll
  for (int t = 0; t < 18; ++t) {
    const float total = warp_all_reduce_sum(sum[t / 9][t % 9]);
    if (lane_index() == 0) memory[warp_index() * 18 + t] = total;
  }
  sync_block();
  for (int t = thread_index(); t < 18; t += kGateThreads) {
    float total = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) total += memory[warp * 18 + t];
    p.partial[((pair + int64_t(t / 9) * p.pairs) * 9 + t % 9) * p.parts + part] = total;
  }
}

// One block per pair and part of its tiles, those of all samples.
template <class T>
MIRAGE_KERNEL(256, 3) gate_backward_kernel(const GateArguments p) {
  GateBackwardTile& tile = *reinterpret_cast<GateBackwardTile*>(shared_memory());
  const int64_t tiles = gate_tiles(p);
  const int pair = int(block_index() / p.parts), part = int(block_index() % p.parts);
  const int line = thread_index() / kGateRuns, start = thread_index() % kGateRuns * kGateRun;
  load_gate_taps<T>(p, pair, tile.taps);
  float sum[2][9] = {};
  for (int64_t i = tiles * part / p.parts; i < tiles * (part + 1) / p.parts; ++i) {
    const GateWork work = gate_work(p, pair, i);
    activate_gate<T>(p, work, tile);
    sync_block();
    compute_grad_d<T>(p, work, tile);
    sync_block();
    if (work.row + line < p.height && work.column + start < p.width) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float grad[kGateRun], slope[kGateRun];
        gate_run_gradients(p, work, tile, half, line, start, grad, sum[half]);
        load_packed<4>(tile.slope[half] + line * kGateSide + start, slope);
#pragma unroll
        for (int j = 0; j < kGateRun; ++j) grad[j] *= slope[j];
        const int64_t channel = work.sample * 2 * p.pairs + pair + half * p.pairs;
        const int64_t row = channel * p.height + work.row + line;
        store_gate_run(p, static_cast<T*>(p.out) + row * p.width + work.column + start, work.column + start, grad);
      }
    }
    sync_block();  // the tile has been read
  }
  store_gate_sums(p, pair, part, sum, tile.activated[0]);
}

// Adds up the parts: a warp per element of the gradient, with some of the parts in each lane.
template <class T>
MIRAGE_KERNEL(256) gate_sum_kernel(const GateArguments p, void* const grad_weight) {
  const int64_t i = block_index() * (256 / kLanes) + warp_index();
  if (i >= int64_t(p.pairs) * 18) return;
  float sum = 0.0f;
  for (int part = lane_index(); part < p.parts; part += kLanes) sum += p.partial[i * p.parts + part];
  sum = warp_all_reduce_sum(sum);
  if (lane_index() == 0) static_cast<T*>(grad_weight)[i] = from_float<T>(sum);
}

}  // namespace mirage::cuda
