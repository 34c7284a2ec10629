// Ragged paged attention for CPUs, called from XLA programs through its FFI.
//
// The op is the one of paged_attention/api.py: write the step's keys and values into their pages,
// then attend. Work is a list of (sequence, block of queries, kv head) items shared by XLA's own
// threads. Each item walks its sequence's keys in chunks with an online softmax (Milakov &
// Gimelshein, "Online normalizer calculation for softmax", 2018), so it reads each page once and
// needs no memory that grows with the context.
//
// Compiled for one head size, JAXINFER_HEAD_DIM, a multiple of 32.
//
// Layout: pages [P, K, B, 2H], a token's key then its value; q and out [T, K, G, H]; k, v [T, K, H].

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "vec.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxinfer {
namespace {

constexpr int kChunk = 64;         // keys looked at together
constexpr int kQueryTokens = 32;   // queries of a prefill item
constexpr int kFewRows = 8;        // up to here rows are multiplied key by key
constexpr float kMasked = -1e30f;  // stands for minus infinity: inf - inf would be NaN

// e^x for x <= 0, within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2.
inline Vec Exp(Vec x) {
  const Vec lowest = Splat(-87.0f);
  x = x < lowest ? lowest : x;
  const IntVec n = __builtin_convertvector(x * 1.44269504f - 0.5f, IntVec);
  const Vec nf = __builtin_convertvector(n, Vec);
  const Vec r = (x - nf * 0.693359375f) + nf * 2.12194440e-4f;
  Vec poly = Splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f}) {
    poly = poly * r + c;
  }
  poly = poly * r * r + r + 1.0f;
  return poly * reinterpret_cast<Vec>((n + 127) << 23);
}

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

template <int H, typename Storage>
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
    for (int32_t seq = 0; seq < s_.num_seqs; ++seq) {
      const int32_t begin = s_.query_starts[seq], end = s_.query_starts[seq + 1];
      for (int32_t q = begin; q < end; q += kQueryTokens) {
        for (int32_t head = 0; head < s_.num_kv; ++head) {
          items.push_back({seq, q, std::min<int32_t>(kQueryTokens, end - q), head});
        }
      }
    }
    return items;
  }

  // Buffers of one thread, reused from item to item.
  struct Scratch {
    std::vector<float> q, acc, scores, max, sum, keys_transposed, rows;
    void Resize(int64_t num_rows) {
      q.resize(num_rows * H);
      acc.resize(num_rows * H);
      scores.resize(num_rows * kChunk);
      max.resize(num_rows);
      sum.resize(num_rows);
      keys_transposed.resize(H * kChunk);
      if (sizeof(Storage) == 2) rows.resize(kChunk * 2 * H);
    }
  };

  void Attend(const Item& item, Scratch& b) const {
    // Rows are padded to whole blocks of 4; the spare ones compute nothing that is read.
    const int64_t num_rows = item.num_queries * s_.group, padded = (num_rows + 3) / 4 * 4;
    b.Resize(padded);
    for (int64_t row = 0; row < num_rows; ++row) {
      const float* source = s_.q + RowOffset(item, row);
      for (int h = 0; h < H; h += kLanes) Store(&b.q[row * H + h], Load(source + h) * s_.scale);
    }
    std::fill(b.q.begin() + num_rows * H, b.q.end(), 0.0f);
    std::fill(b.acc.begin(), b.acc.end(), 0.0f);
    std::fill(b.max.begin(), b.max.end(), kMasked);
    std::fill(b.sum.begin(), b.sum.end(), 0.0f);

    const int64_t position = s_.starts[item.seq] + item.first_query - s_.query_starts[item.seq];
    const int64_t last = position + item.num_queries - 1;
    int64_t key = s_.window ? std::max<int64_t>(0, position - s_.window + 1) : 0;
    for (; key <= last; key += kChunk) {
      const int num_keys = static_cast<int>(std::min<int64_t>(kChunk, last + 1 - key));
      Chunk(item, b, key, num_keys, position, padded);
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

  void Chunk(const Item& item, Scratch& b, int64_t key, int num_keys, int64_t position,
             int64_t num_rows) const {
    const float* rows[kChunk];
    const int32_t* table = s_.page_table + int64_t{s_.slots[item.seq]} * s_.table_width;
    for (int j = 0; j < num_keys; ++j) {
      const int64_t place = key + j;
      const Storage* row = Row(table[place / s_.page_size], item.kv_head, place % s_.page_size);
      if constexpr (sizeof(Storage) == 4) {
        rows[j] = row;
      } else {
        float* copy = &b.rows[j * 2 * H];
        for (int c = 0; c < 2 * H; ++c) copy[c] = FromBits16(row[c]);
        rows[j] = copy;
      }
    }
    if (num_rows <= kFewRows) {
      ScoreKeyByKey(b, rows, num_keys, num_rows);
    } else {
      ScoreTransposed(b, rows, num_keys, num_rows);
    }
    const int64_t num_true_rows = item.num_queries * s_.group;
    for (int64_t row = 0; row < num_true_rows; ++row) {
      const int64_t query = position + row / s_.group;
      Softmax(b, row, key, num_keys, query);
    }
    for (int64_t row = 0; row < num_rows; row += 4) AddValues(b, rows, num_keys, row);
  }

  void ScoreKeyByKey(Scratch& b, const float* const* rows, int num_keys, int64_t num_rows) const {
    for (int j = 0; j < num_keys; ++j) {
      for (int64_t row = 0; row < num_rows; ++row) {
        Vec sum = Vec{};
        for (int h = 0; h < H; h += kLanes) sum += Load(&b.q[row * H + h]) * Load(rows[j] + h);
        b.scores[row * kChunk + j] = Sum(sum);
      }
    }
  }

  void ScoreTransposed(Scratch& b, const float* const* rows, int num_keys,
                       int64_t num_rows) const {
    float* keys = b.keys_transposed.data();
    for (int j = 0; j < kChunk; ++j) {
      for (int h = 0; h < H; ++h) keys[h * kChunk + j] = j < num_keys ? rows[j][h] : 0.0f;
    }
    for (int64_t row = 0; row < num_rows; row += 4) {
      const float* q = &b.q[row * H];
      for (int j = 0; j < kChunk; j += 2 * kLanes) {
        Vec s[4][2] = {};
        for (int h = 0; h < H; ++h) {
          const Vec left = Load(keys + h * kChunk + j);
          const Vec right = Load(keys + h * kChunk + j + kLanes);
          for (int i = 0; i < 4; ++i) {
            s[i][0] += q[i * H + h] * left;
            s[i][1] += q[i * H + h] * right;
          }
        }
        for (int i = 0; i < 4; ++i) {
          Store(&b.scores[(row + i) * kChunk + j], s[i][0]);
          Store(&b.scores[(row + i) * kChunk + j + kLanes], s[i][1]);
        }
      }
    }
  }

  // Turns a row's scores into weights, and rescales what the row has gathered so far.
  void Softmax(Scratch& b, int64_t row, int64_t key, int num_keys, int64_t query) const {
    float* scores = &b.scores[row * kChunk];
    int begin = 0, end = static_cast<int>(std::min<int64_t>(num_keys, query + 1 - key));
    if (s_.window) begin = static_cast<int>(std::max<int64_t>(0, query - s_.window + 1 - key));
    end = std::max(end, 0);
    for (int j = 0; j < std::min(begin, kChunk); ++j) scores[j] = kMasked;
    for (int j = end; j < kChunk; ++j) scores[j] = kMasked;
    Vec best = Splat(kMasked);
    for (int j = 0; j < kChunk; j += kLanes) {
      const Vec s = Load(scores + j);
      best = s > best ? s : best;
    }
    float new_max = b.max[row];
    for (int i = 0; i < kLanes; ++i) new_max = std::max(new_max, best[i]);
    if (new_max == kMasked) {  // no key of this chunk is visible, nor was one before
      std::fill(scores, scores + kChunk, 0.0f);
      return;
    }
    Vec total = Vec{};
    for (int j = 0; j < kChunk; j += kLanes) {
      const Vec weight = Exp(Load(scores + j) - new_max);
      Store(scores + j, weight);
      total += weight;
    }
    // Exp does not reach zero; what is masked must count for nothing.
    for (int j = 0; j < std::min(begin, kChunk); ++j) total[0] -= scores[j], scores[j] = 0.0f;
    for (int j = end; j < kChunk; ++j) total[0] -= scores[j], scores[j] = 0.0f;
    const float decay = b.max[row] == kMasked ? 0.0f : Exp(Splat(b.max[row] - new_max))[0];
    b.max[row] = new_max;
    b.sum[row] = b.sum[row] * decay + Sum(total);
    if (decay != 1.0f) {
      for (int h = 0; h < H; h += kLanes) {
        Store(&b.acc[row * H + h], Load(&b.acc[row * H + h]) * decay);
      }
    }
  }

  void AddValues(Scratch& b, const float* const* rows, int num_keys, int64_t row) const {
    const float* weights = &b.scores[row * kChunk];
    for (int h = 0; h < H; h += 2 * kLanes) {
      Vec acc[4][2];
      for (int i = 0; i < 4; ++i) {
        acc[i][0] = Load(&b.acc[(row + i) * H + h]);
        acc[i][1] = Load(&b.acc[(row + i) * H + h + kLanes]);
      }
      for (int j = 0; j < num_keys; ++j) {
        const Vec left = Load(rows[j] + H + h), right = Load(rows[j] + H + h + kLanes);
        for (int i = 0; i < 4; ++i) {
          acc[i][0] += weights[i * kChunk + j] * left;
          acc[i][1] += weights[i * kChunk + j] * right;
        }
      }
      for (int i = 0; i < 4; ++i) {
        Store(&b.acc[(row + i) * H + h], acc[i][0]);
        Store(&b.acc[(row + i) * H + h + kLanes], acc[i][1]);
      }
    }
  }

  const Step& s_;
  Storage* pages_;
};

template <typename Storage>
void Run(ffi::ThreadPool& pool, const Step& step, void* pages) {
  constexpr int kHeadDim = JAXINFER_HEAD_DIM;
  Kernel<kHeadDim, Storage> kernel(step, static_cast<Storage*>(pages));
  kernel.WriteTokens();
  const std::vector<Item> items = kernel.MakeItems();
  ParallelFor(pool, items.size(), [&] {
    return [&, scratch = typename decltype(kernel)::Scratch()](int64_t i) mutable {
      kernel.Attend(items[i], scratch);
    };
  });
  const int64_t row = step.num_kv * step.group * kHeadDim;
  const int64_t num_used = step.query_starts[step.num_seqs];
  std::fill(step.out + num_used * row, step.out + step.num_tokens * row, 0.0f);
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

ffi::Error PagedAttention(ffi::ThreadPool pool, F32 q, F32 k, F32 v, ffi::AnyBuffer pages_in,
                          S32 token_pages, S32 token_offsets, S32 slots, S32 starts,
                          S32 query_starts, S32 num_seqs, S32 page_table,
                          ffi::Result<F32> out, ffi::Result<ffi::AnyBuffer> pages, float scale,
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
  if (q_dims[3] != JAXINFER_HEAD_DIM) {
    return ffi::Error::InvalidArgument("these kernels were compiled for another head size");
  }
  if (pages->element_type() == ffi::F32) {
    Run<float>(pool, step, pages->untyped_data());
  } else {
    Run<uint16_t>(pool, step, pages->untyped_data());
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxinferPagedAttention, PagedAttention,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<F32>().Arg<F32>().Arg<F32>().Arg<ffi::AnyBuffer>()
        .Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>()
        .Ret<F32>().Ret<ffi::AnyBuffer>()
        .Attr<float>("scale").Attr<int64_t>("window"));

}  // namespace jaxinfer
