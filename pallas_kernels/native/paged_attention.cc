// Ragged paged attention for CPUs, called from XLA programs through its FFI.
//
// The op is the one of paged_attention/api.py: write the step's keys and values into their pages,
// then attend. Work is a list of (sequence, block of queries, kv head) items shared by XLA's own
// threads. Each item walks its sequence's keys in chunks with an online softmax (Milakov &
// Gimelshein, "Online normalizer calculation for softmax", 2018), so it reads each page once and
// needs no memory that grows with the context.
//
// Compiled for one head size, JAXINFER_HEAD_DIM, a multiple of 32, and for pages of one width,
// JAXINFER_PAGE_BITS: 32 (float32) or 16 (bfloat16).
//
// Layout: pages [P, K, B, 2H], a token's key then its value; q and out [T, K, G, H]; k, v [T, K, H].

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vec.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxinfer {
namespace {

constexpr int kHeadDim = JAXINFER_HEAD_DIM;
static_assert(JAXINFER_PAGE_BITS == 32 || JAXINFER_PAGE_BITS == 16);
using Storage = std::conditional_t<JAXINFER_PAGE_BITS == 32, float, uint16_t>;  // of a value
constexpr auto kStorageType = JAXINFER_PAGE_BITS == 32 ? ffi::F32 : ffi::U16;

constexpr int kChunk = 64;         // keys looked at together
constexpr int kItemRows = 96;      // of a prefill item, about: queries times heads of a group
constexpr int kFewRows = 8;        // up to here rows are multiplied key by key
constexpr int kTile = 6;           // rows of a tile; with two vectors each they fill the registers
constexpr int kRowStep = 2 * kLanes;
// Stands for minus infinity: inf - inf would be NaN. What is masked weighs e^-87 at most. Where a row
// has seen nothing yet it weighs one, until the first key that is seen scales it down to that.
constexpr float kMasked = -1e30f;

struct Step {
  const float *q, *k, *v;
  const int32_t *token_pages, *token_offsets, *slots, *starts, *query_starts, *page_table;
  float* out;
  int64_t num_tokens, num_kv, group, num_pages, page_size, table_width, num_seqs;
  float scale;
  int64_t window;  // 0: none
};

struct Item {
  int32_t seq, first_query, num_queries, kv_head;
};

template <int H>
class Kernel {
 public:
  Kernel(const Step& step, Storage* pages) : s_(step), pages_(pages) {}

  void WriteTokens() {
    for (int64_t t = 0; t < s_.num_tokens; ++t) {
      const int64_t page = s_.token_pages[t];
      if (page >= s_.num_pages) continue;  // padding
      for (int64_t head = 0; head < s_.num_kv; ++head) {
        Storage* row = Row(page, head, s_.token_offsets[t]);
        const int64_t source = (t * s_.num_kv + head) * H;
        if constexpr (sizeof(Storage) == 4) {
          std::memcpy(row, s_.k + source, H * 4);
          std::memcpy(row + H, s_.v + source, H * 4);
        } else {
          for (int h = 0; h < H; ++h) row[h] = ToBits16(s_.k[source + h]);
          for (int h = 0; h < H; ++h) row[H + h] = ToBits16(s_.v[source + h]);
        }
      }
    }
  }

  std::vector<Item> MakeItems() const {
    std::vector<Item> items;
    const int32_t most = std::max<int32_t>(1, kItemRows / static_cast<int32_t>(s_.group));
    for (int32_t seq = 0; seq < s_.num_seqs; ++seq) {
      const int32_t begin = s_.query_starts[seq], end = s_.query_starts[seq + 1];
      for (int32_t q = begin; q < end; q += most) {
        for (int32_t head = 0; head < s_.num_kv; ++head) {
          items.push_back({seq, q, std::min(most, end - q), head});
        }
      }
    }
    return items;
  }

  // Buffers of one thread, reused from item to item. Scores become weights in place.
  struct Scratch {
    std::vector<float> q, acc, scores, max, sum, decay, rows;
    std::vector<int32_t> positions;
    void Resize(int64_t num_rows) {
      q.assign(num_rows * H, 0.0f);
      acc.assign(num_rows * H, 0.0f);
      scores.resize(num_rows * kChunk);
      max.assign(num_rows, kMasked);
      sum.assign(num_rows, 0.0f);
      decay.resize(num_rows);
      positions.resize(num_rows);
      if (sizeof(Storage) == 2) rows.resize(kChunk * 2 * H);
    }
  };

  // The keys of one chunk: where they are, and the position of the first.
  struct Keys {
    const float* rows[kChunk];  // key then value
    int64_t first;
    int count;
  };

  void Attend(const Item& item, Scratch& b) const {
    // Many rows lie side by side in vectors, and are padded to whole ones; what the spare ones
    // compute is not read. Few would leave the vectors empty: they are taken one by one.
    const int64_t num_rows = item.num_queries * s_.group;
    const bool few = num_rows <= kFewRows;
    const int64_t padded = few ? num_rows : (num_rows + kRowStep - 1) / kRowStep * kRowStep;
    const int64_t position = s_.starts[item.seq] + item.first_query - s_.query_starts[item.seq];
    const int64_t last = position + item.num_queries - 1;
    b.Resize(padded);
    for (int64_t row = 0; row < num_rows; ++row) {
      const float* source = s_.q + RowOffset(item, row);
      float* q = &b.q[few ? row * H : row];
      const int64_t stride = few ? 1 : padded;
      for (int h = 0; h < H; ++h) q[h * stride] = source[h] * s_.scale;
    }
    for (int64_t row = 0; row < padded; ++row) {
      b.positions[row] = static_cast<int32_t>(std::min(position + row / s_.group, last));
    }
    const int64_t first = s_.window ? std::max<int64_t>(0, position - s_.window + 1) : 0;
    for (int64_t key = first; key <= last; key += kChunk) {
      const Keys keys = Find(item, key, last, b);
      if (few) {
        FewRows(b, keys, padded);
      } else {
        ManyRows(b, keys, padded);
      }
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      float* out = s_.out + RowOffset(item, row);
      const float inverse = 1.0f / b.sum[row];
      for (int h = 0; h < H; h += kLanes) Store(out + h, Load(&b.acc[row * H + h]) * inverse);
    }
  }

 private:
  Storage* Row(int64_t page, int64_t head, int64_t offset) const {
    return pages_ + ((page * s_.num_kv + head) * s_.page_size + offset) * 2 * H;
  }

  // Rows of an item: query token by query token, the group's heads within each.
  int64_t RowOffset(const Item& item, int64_t row) const {
    const int64_t token = item.first_query + row / s_.group;
    return ((token * s_.num_kv + item.kv_head) * s_.group + row % s_.group) * H;
  }

  Keys Find(const Item& item, int64_t first, int64_t last, Scratch& b) const {
    Keys keys;
    keys.first = first;
    keys.count = static_cast<int>(std::min<int64_t>(kChunk, last + 1 - first));
    const int32_t* table = s_.page_table + int64_t{s_.slots[item.seq]} * s_.table_width;
    for (int j = 0; j < keys.count; ++j) {
      const int64_t place = first + j;
      const Storage* row = Row(table[place / s_.page_size], item.kv_head, place % s_.page_size);
      if constexpr (sizeof(Storage) == 4) {
        keys.rows[j] = row;
      } else {
        float* copy = &b.rows[j * 2 * H];
        for (int c = 0; c < 2 * H; ++c) copy[c] = FromBits16(row[c]);
        keys.rows[j] = copy;
      }
    }
    return keys;
  }

  // Few rows: scores are [row, key].
  void FewRows(Scratch& b, const Keys& keys, int64_t num_rows) const {
    for (int j = 0; j < keys.count; ++j) {
      for (int64_t row = 0; row < num_rows; ++row) {
        const bool seen = Sees(b.positions[row], keys.first + j);
        Vec sum = Vec{};
        for (int h = 0; h < H; h += kLanes) sum += Load(&b.q[row * H + h]) * Load(keys.rows[j] + h);
        b.scores[row * kChunk + j] = seen ? Sum(sum) : kMasked;
      }
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      float* scores = &b.scores[row * kChunk];
      std::fill(scores + keys.count, scores + kChunk, kMasked);
      Vec bests = Splat(b.max[row]), total = Vec{};
      for (int j = 0; j < kChunk; j += kLanes) {
        const Vec score = Load(scores + j);
        bests = score > bests ? score : bests;
      }
      float best = bests[0];
      for (int i = 1; i < kLanes; ++i) best = std::max(best, bests[i]);
      for (int j = 0; j < kChunk; j += kLanes) {
        const Vec score = Load(scores + j);
        const Vec weight = Exp(score - best);
        Store(scores + j, weight);
        total += weight;
      }
      b.decay[row] = Exp(Splat(b.max[row] - best))[0];
      b.max[row] = best;
      b.sum[row] = b.sum[row] * b.decay[row] + Sum(total);
    }
    AddValues(b, keys, num_rows, {kChunk, 1});
  }

  bool Sees(int64_t position, int64_t key) const {
    return key <= position && (!s_.window || key > position - s_.window);
  }

  // Scores are [key, row]: neither keys nor weights need to be transposed, and the softmax of
  // kLanes rows is one vector's.
  void ManyRows(Scratch& b, const Keys& keys, int64_t num_rows) const {
    for (int64_t row = 0; row < num_rows; row += kRowStep) {
      int j = 0;
      for (; j + kTile <= keys.count; j += kTile) Score<kTile>(b, keys, j, row, num_rows);
      for (; j < keys.count; ++j) Score<1>(b, keys, j, row, num_rows);
    }
    const bool all_seen = Sees(b.positions[0], keys.first + keys.count - 1) &&
                          Sees(b.positions[num_rows - 1], keys.first);
    for (int64_t row = 0; row < num_rows; row += kLanes) {
      if (!all_seen) Mask(b, keys, row, num_rows);
      Softmax(b, keys, row, num_rows);
    }
    AddValues(b, keys, num_rows, {1, num_rows});
  }

  template <int kKeys>
  void Score(Scratch& b, const Keys& keys, int j, int64_t row, int64_t num_rows) const {
    Vec sums[kKeys][2] = {};
    const float* q = &b.q[row];
    for (int h = 0; h < H; ++h, q += num_rows) {
      const Vec left = Load(q), right = Load(q + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec key = Splat(keys.rows[j + i][h]);
        sums[i][0] += key * left;
        sums[i][1] += key * right;
      }
    }
    for (int i = 0; i < kKeys; ++i) {
      float* scores = &b.scores[(j + i) * num_rows + row];
      Store(scores, sums[i][0]);
      Store(scores + kLanes, sums[i][1]);
    }
  }

  void Mask(Scratch& b, const Keys& keys, int64_t row, int64_t num_rows) const {
    const IntVec position = LoadInts(&b.positions[row]);
    const int32_t window = s_.window ? static_cast<int32_t>(s_.window) : INT32_MAX;
    for (int j = 0; j < keys.count; ++j) {
      float* scores = &b.scores[j * num_rows + row];
      const IntVec age = position - static_cast<int32_t>(keys.first + j);
      const IntVec seen = (age >= 0) & (age < window);
      Store(scores, seen ? Load(scores) : Splat(kMasked));
    }
  }

  void Softmax(Scratch& b, const Keys& keys, int64_t row, int64_t num_rows) const {
    float* scores = &b.scores[row];
    const Vec old = Load(&b.max[row]);
    Vec best = old, total = Vec{};
    for (int j = 0; j < keys.count; ++j) {
      const Vec score = Load(scores + j * num_rows);
      best = score > best ? score : best;
    }
    for (int j = 0; j < keys.count; ++j) {
      const Vec score = Load(scores + j * num_rows);
      const Vec weight = Exp(score - best);
      Store(scores + j * num_rows, weight);
      total += weight;
    }
    const Vec decay = Exp(old - best);
    Store(&b.max[row], best);
    Store(&b.decay[row], decay);
    Store(&b.sum[row], Load(&b.sum[row]) * decay + total);
  }

  struct Strides {
    int64_t row, key;  // of the weights
  };

  void AddValues(Scratch& b, const Keys& keys, int64_t num_rows, Strides strides) const {
    int64_t row = 0;
    for (; row + kTile <= num_rows; row += kTile) AddTile<kTile>(b, keys, row, strides);
    LastRows<kTile - 1>(b, keys, row, num_rows - row, strides);
  }

  template <int kMost>
  void LastRows(Scratch& b, const Keys& keys, int64_t row, int64_t count, Strides strides) const {
    if constexpr (kMost > 0) {
      if (count == kMost) return AddTile<kMost>(b, keys, row, strides);
      LastRows<kMost - 1>(b, keys, row, count, strides);
    }
  }

  template <int kRows>
  void AddTile(Scratch& b, const Keys& keys, int64_t row, Strides strides) const {
    // Enough sums to hide the latency of an addition.
    constexpr int kVecs = kRows <= kTile / 2 && H % (4 * kLanes) == 0 ? 4 : 2;
    for (int h = 0; h < H; h += kVecs * kLanes) {
      Vec acc[kRows][kVecs];
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVecs; ++v) {
          acc[i][v] = Load(&b.acc[(row + i) * H + h + v * kLanes]) * b.decay[row + i];
        }
      }
      const float* weights = &b.scores[row * strides.row];
      for (int j = 0; j < keys.count; ++j, weights += strides.key) {
        Vec values[kVecs];
        for (int v = 0; v < kVecs; ++v) values[v] = Load(keys.rows[j] + H + h + v * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const Vec weight = Splat(weights[i * strides.row]);
          for (int v = 0; v < kVecs; ++v) acc[i][v] += weight * values[v];
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVecs; ++v) Store(&b.acc[(row + i) * H + h + v * kLanes], acc[i][v]);
      }
    }
  }

  const Step& s_;
  Storage* pages_;
};

void Run(ffi::ThreadPool& pool, const Step& step, Storage* pages) {
  Kernel<kHeadDim> kernel(step, pages);
  kernel.WriteTokens();
  const std::vector<Item> items = kernel.MakeItems();
  ParallelFor(pool, items.size(), [&] {
    return [&, scratch = decltype(kernel)::Scratch()](int64_t i) mutable {
      kernel.Attend(items[i], scratch);
    };
  });
  const int64_t row = step.num_kv * step.group * kHeadDim;
  const int64_t num_used = step.query_starts[step.num_seqs];
  std::fill(step.out + num_used * row, step.out + step.num_tokens * row, 0.0f);
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Pages = ffi::Buffer<kStorageType>;

ffi::Error PagedAttention(ffi::ThreadPool pool, F32 q, F32 k, F32 v, Pages pages_in,
                          S32 token_pages, S32 token_offsets, S32 slots, S32 starts,
                          S32 query_starts, S32 num_seqs, S32 page_table,
                          ffi::Result<F32> out, ffi::Result<Pages> pages, float scale,
                          int64_t window) {
  const auto q_dims = q.dimensions();          // [T, K, G, H]
  const auto page_dims = pages->dimensions();  // [P, K, B, 2H]
  if (pages_in.untyped_data() != pages->untyped_data()) {
    return ffi::Error::Internal("the pages were copied: input and output must be one buffer");
  }
  Step step{
      q.typed_data(), k.typed_data(), v.typed_data(), token_pages.typed_data(),
      token_offsets.typed_data(), slots.typed_data(), starts.typed_data(),
      query_starts.typed_data(), page_table.typed_data(), out->typed_data(),
      q_dims[0], q_dims[1], q_dims[2], page_dims[0], page_dims[2],
      page_table.dimensions()[1], num_seqs.typed_data()[0], scale, window,
  };
  if (q_dims[3] != kHeadDim) {
    return ffi::Error::InvalidArgument("these kernels were compiled for another head size");
  }
  Run(pool, step, pages->typed_data());
  return ffi::Error::Success();
}

// Leaves the memory as the allocator gave it: what no token has written is never read, and memory
// that is never touched is never mapped.
ffi::Error EmptyPages(ffi::Result<Pages>) { return ffi::Error::Success(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxinferPagedAttention, PagedAttention,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<F32>().Arg<F32>().Arg<F32>().Arg<Pages>()
        .Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>()
        .Ret<F32>().Ret<Pages>()
        .Attr<float>("scale").Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferEmptyPages, EmptyPages,
                              ffi::Ffi::Bind().Ret<Pages>());

}  // namespace jaxinfer
