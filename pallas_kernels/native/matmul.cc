// x[M, K] times a weight [K, N] that was laid out for it, on CPUs, called from XLA through its FFI.
//
// The weight lies in panels of kPanel columns: a panel is read as one stream and stays in the cache
// while all rows of x pass. It may be float32, or bfloat16 in memory with products and sums in
// float32: half the bytes to read, and as exact as a float32 weight of the same values. Two
// bfloat16 values of consecutive k form a 32-bit word, so that one shift or one mask makes each a
// float32 vector, and so that processors with AVX512-BF16 can multiply the pairs as they are (x is
// rounded to bfloat16 too then). A tile of rows x panel is summed in registers, as in Goto & van de
// Geijn, "Anatomy of high-performance matrix multiplication", 2008.
//
// Layout: x float32 [M, K]; weight uint16 [panels, K/2, kPanel, 2] or float32 [panels, K, kPanel];
// out float32 [M, N], of which only the first num_rows are computed, the others are zero. Columns of
// the last panel beyond N are zero and are not written.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "pairs.h"
#include "parallel.h"
#include "vec.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxinfer {
namespace {

constexpr int kVecs = 2;                             // vectors of one row of a panel
constexpr int kPanel = kVecs * kLanes;               // columns of a panel
constexpr int kRows = kNumRegisters == 16 ? 6 : 12;  // rows of a tile: its sums fill the registers
constexpr int64_t kDepth = 2048;           // k of one pass: a panel stays in the second cache
constexpr int64_t kRowsBytes = 192 * 1024; // of x, likewise
constexpr int64_t kItemsPerThread = 8;     // aimed at, so that threads end together

using Sums = Vec[kRows][kVecs];

// Adds the product of a tile's rows with a panel. `x` is the first row, `stride` floats apart.
template <int kTileRows>
inline void Multiply(const float* x, int64_t stride, const float* panel, int64_t depth,
                     Sums& sums) {
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const Vec left = Load(panel), right = Load(panel + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const Vec value = Splat(x[i * stride + k]);
      sums[i][0] += value * left;
      sums[i][1] += value * right;
    }
  }
}

// The same for a panel of pairs; depth is even.
template <int kTileRows>
inline void Multiply(const float* x, int64_t stride, const uint32_t* panel, int64_t depth,
                     Sums& sums) {
  for (int64_t k = 0; k < depth; k += 2, panel += kPanel) {
    const IntVec words[kVecs] = {LoadPairs(panel), LoadPairs(panel + kLanes)};
    Vec left = FirstOf(words[0]), right = FirstOf(words[1]);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const Vec value = Splat(x[i * stride + k]);
      sums[i][0] += value * left;
      sums[i][1] += value * right;
    }
    left = SecondOf(words[0]), right = SecondOf(words[1]);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const Vec value = Splat(x[i * stride + k + 1]);
      sums[i][0] += value * left;
      sums[i][1] += value * right;
    }
  }
}

#if defined(JAXINFER_HAS_PAIR_PRODUCTS)
// Both sides are pairs; depth counts pairs.
template <int kTileRows>
inline void Multiply(const uint32_t* x, int64_t stride, const uint32_t* panel, int64_t depth,
                     Sums& sums) {
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const IntVec left = LoadPairs(panel), right = LoadPairs(panel + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const IntVec value = IntVec{} + static_cast<int32_t>(x[i * stride + k]);
      sums[i][0] = AddPairProducts(sums[i][0], value, left);
      sums[i][1] = AddPairProducts(sums[i][1], value, right);
    }
  }
}
#endif

// Where a tile's sums go.
struct Place {
  float* out;
  int64_t stride;
  int64_t num_columns;  // kPanel, fewer in the last panel
  bool add;             // to what is there, from an earlier pass over k
};

template <int kTileRows, typename X, typename W>
__attribute__((noinline)) void Tile(const X* x, int64_t stride, const W* panel, int64_t depth,
                                    const Place& place) {
  Sums sums = {};
  Multiply<kTileRows>(x, stride, panel, depth, sums);
  float* out = place.out;
  for (int i = 0; i < kTileRows; ++i, out += place.stride) {
    float row[kPanel] = {};
    if (place.add) std::memcpy(row, out, place.num_columns * sizeof(float));
    for (int j = 0; j < kVecs; ++j) Store(row + j * kLanes, Load(row + j * kLanes) + sums[i][j]);
    if (place.num_columns == kPanel) {
      std::memcpy(out, row, sizeof(row));
    } else {
      std::memcpy(out, row, place.num_columns * sizeof(float));
    }
  }
}

// The tile that is left over: fewer rows than a whole one.
template <int kMost, typename X, typename W>
void LastTile(const X* x, int64_t stride, int64_t num_rows, const W* panel, int64_t depth,
              const Place& place) {
  if constexpr (kMost > 0) {
    if (num_rows == kMost) return Tile<kMost>(x, stride, panel, depth, place);
    LastTile<kMost - 1>(x, stride, num_rows, panel, depth, place);
  }
}

// All rows of x with one panel, a tile at a time.
template <typename X, typename W>
void TileRows(const X* x, int64_t stride, int64_t num_rows, const W* panel, int64_t depth,
              Place place) {
  for (; num_rows >= kRows; num_rows -= kRows) {
    Tile<kRows>(x, stride, panel, depth, place);
    x += kRows * stride;
    place.out += kRows * place.stride;
  }
  LastTile<kRows - 1>(x, stride, num_rows, panel, depth, place);
}

// One product. Threads take a block of rows of x, which stays in the second cache, and multiply it
// with a run of panels, each of which is read once.
struct Problem {
  const float* x;
  const void* weight;
  float* out;
  int64_t num_rows, depth, num_columns;

  int64_t num_panels() const { return (num_columns + kPanel - 1) / kPanel; }
  Place PlaceOf(int64_t row, int64_t panel, bool add) const {
    const int64_t column = panel * kPanel;
    return {out + row * num_columns + column, num_columns,
            std::min<int64_t>(kPanel, num_columns - column), add};
  }
};

// What a thread takes at a time.
struct Part {
  int64_t first_row, num_rows, first_panel, last_panel;
};

// Multiplies a part with panels of floats or of pairs, in float32.
template <typename W>
void FloatPanels(const Problem& p, const Part& part) {
  constexpr int64_t kPerWord = std::is_same_v<W, float> ? 1 : 2;  // values of k in one W
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    const int64_t depth = std::min(kDepth, p.depth - k);
    const float* x = p.x + part.first_row * p.depth + k;
    for (int64_t panel = part.first_panel; panel < part.last_panel; ++panel) {
      const W* weight =
          static_cast<const W*>(p.weight) + (panel * p.depth + k) / kPerWord * kPanel;
      TileRows(x, p.depth, part.num_rows, weight, depth, p.PlaceOf(part.first_row, panel, k > 0));
    }
  }
}

// Calls work(part) for parts that make up the product, on all threads. `value_bytes`: of x.
template <typename Work>
void OverParts(ffi::ThreadPool& pool, const Problem& p, int64_t value_bytes, const Work& work) {
  if (p.num_rows == 0) return;
  const auto quotient_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t most_tiles = kRowsBytes / (std::min(p.depth, kDepth) * value_bytes * kRows);
  const int64_t num_tiles = quotient_up(p.num_rows, kRows);
  const int64_t num_equal = quotient_up(num_tiles, std::max<int64_t>(1, most_tiles));
  const int64_t tiles = quotient_up(num_tiles, num_equal);  // of a block
  const int64_t rows = tiles * kRows, num_blocks = quotient_up(num_tiles, tiles);
  const int64_t num_wanted = kItemsPerThread * std::max<int64_t>(1, pool.num_threads());
  const int64_t panels = std::max<int64_t>(1, p.num_panels() * num_blocks / num_wanted);
  const int64_t num_runs = quotient_up(p.num_panels(), panels);
  ParallelFor(pool, num_blocks * num_runs, [&] {
    return [&](int64_t item) {
      const int64_t row = item / num_runs * rows, panel = item % num_runs * panels;
      work(Part{row, std::min(rows, p.num_rows - row), panel,
                std::min(panel + panels, p.num_panels())});
    };
  });
}

#if defined(JAXINFER_HAS_PAIR_PRODUCTS)
// x as pairs of bfloat16. Rows are a line apart from a power of two, or they would all fall into
// the same few places of the first cache.
class PairRows {
 public:
  PairRows(ffi::ThreadPool& pool, const Problem& p) : stride_(p.depth / 2 + 16) {
    thread_local std::vector<uint32_t> buffer;  // kept: fresh memory would be paged in every time
    if (static_cast<int64_t>(buffer.size()) < stride_ * p.num_rows) {
      buffer.resize(stride_ * p.num_rows);
    }
    data_ = buffer.data();
    uint32_t* data = buffer.data();
    const int64_t stride = stride_, block = 16;
    ParallelFor(pool, (p.num_rows + block - 1) / block, [&] {
      return [&](int64_t item) {
        const int64_t end = std::min((item + 1) * block, p.num_rows);
        for (int64_t row = item * block; row < end; ++row) {
          Round(p.x + row * p.depth, p.depth, data + row * stride);
        }
      };
    });
  }
  const uint32_t* row(int64_t index) const { return data_ + index * stride_; }
  int64_t stride() const { return stride_; }

 private:
  static void Round(const float* x, int64_t depth, uint32_t* pairs) {
    int64_t k = 0;
    for (; k + 2 * kLanes <= depth; k += 2 * kLanes) RoundToPairs(x + k, pairs + k / 2);
    for (; k < depth; k += 2) {
      pairs[k / 2] = ToBits16(x[k]) | static_cast<uint32_t>(ToBits16(x[k + 1])) << 16;
    }
  }

  int64_t stride_;
  const uint32_t* data_;
};

void PairPanels(const Problem& p, const PairRows& x, const Part& part) {
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    const int64_t depth = std::min(kDepth, p.depth - k) / 2;
    for (int64_t panel = part.first_panel; panel < part.last_panel; ++panel) {
      const uint32_t* weight =
          static_cast<const uint32_t*>(p.weight) + (panel * p.depth + k) / 2 * kPanel;
      TileRows(x.row(part.first_row) + k / 2, x.stride(), part.num_rows, weight, depth,
               p.PlaceOf(part.first_row, panel, k > 0));
    }
  }
}
#endif

void MultiplyPairs(ffi::ThreadPool& pool, const Problem& p) {
#if defined(JAXINFER_HAS_PAIR_PRODUCTS)
  const PairRows x(pool, p);
  OverParts(pool, p, sizeof(uint16_t), [&](const Part& part) { PairPanels(p, x, part); });
#else
  OverParts(pool, p, sizeof(float), [&](const Part& part) { FloatPanels<uint32_t>(p, part); });
#endif
}

void MultiplyFloats(ffi::ThreadPool& pool, const Problem& p) {
  OverParts(pool, p, sizeof(float), [&](const Part& part) { FloatPanels<float>(p, part); });
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight,
                  ffi::Buffer<ffi::S32> num_rows, ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const auto x_dims = x.dimensions(), out_dims = out->dimensions(), dims = weight.dimensions();
  const int64_t num_used = std::clamp<int64_t>(num_rows.typed_data()[0], 0, x_dims[0]);
  const Problem p{x.typed_data(), weight.untyped_data(), out->typed_data(),
                  num_used,       x_dims[1],             out_dims[1]};
  const bool is_pairs = weight.element_type() == ffi::U16;
  const int64_t depth = is_pairs ? 2 * dims[1] : dims[1];
  if (dims[0] != p.num_panels() || dims[2] != kPanel || depth != p.depth) {
    return ffi::Error::InvalidArgument("the weight is not laid out for this product");
  }
  if (is_pairs) {
    MultiplyPairs(pool, p);
  } else {
    MultiplyFloats(pool, p);
  }
  std::fill(p.out + num_used * p.num_columns, p.out + x_dims[0] * p.num_columns, 0.0f);
  return ffi::Error::Success();
}

}  // namespace

// Columns of a panel, for who lays out the weights.
extern "C" int JaxinferMatmulPanel() { return kPanel; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferMatmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace jaxinfer
