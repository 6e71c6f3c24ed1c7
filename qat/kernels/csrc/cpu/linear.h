// The walk over rows, tokens, spans and blocks that all schemes S (weight_only.h, int8_input.h) share.
// Included once for each instruction set (see vector.h).
//
//   a row of weights   | block | block | block | block | ...        one unpack each
//   spans              | span          | span          | ...        one sum, scaled by its group's scale
//
// A span is a group, or a block where a block holds several groups: then the vector's lanes belong to groups in turn
// (kLanes * group / block lanes each), and the scales are spread over them.

// Whether S takes a block of several rows at once (steps), and not row by row (step): registers for that has AVX512.
template <class S>
constexpr bool together = QAT_ISA == 2 && S::offset == 0;

template <class S, int R, int T>
inline void step_rows(
    typename S::Sum (&sums)[R][T], const uint8_t* const (&w)[R], const typename S::In* x, int64_t x_row) {
  if constexpr (together<S>) S::steps(sums, w, x, x_row);
  else
    for (int r = 0; r < R; r++) S::step(sums[r], w[r], x, x_row);
}

// R rows of weights times T tokens, to out[R][T].
template <class S, int R, int T>
inline void tile(const Job& job, Lanes index, int64_t row, int64_t token, const float* scales, float* out) {
  // A row that ends inside a block is continued with zeros: reading on could leave the tensor.
  uint8_t tail[R][S::bytes];
  const uint8_t* rows[R];
  const uint8_t* at[R];
  for (int r = 0; r < R; r++) {
    rows[r] = job.packed + (row + r) * job.row_bytes;
    if (job.full_blocks < job.blocks) {
      const int64_t begin = job.full_blocks * S::bytes;
      std::memset(tail[r], 0, S::bytes);
      std::memcpy(tail[r], rows[r] + begin, size_t(job.row_bytes - begin));
    }
  }
  const int64_t x_row = job.blocks * S::block;
  const int64_t ahead = R * job.row_bytes;  // the next call's rows: the hardware loses R streams at each row's end
  const typename S::In* x = static_cast<const typename S::In*>(job.prepared) + token * x_row;
  const int32_t* start = job.start + token * job.spans * kLanes;

  Vec total[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) total[r][t] = zero();
  int64_t b = 0;
  for (int64_t s = 0; s < job.spans; s++) {
    typename S::Sum part[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) part[r][t] = S::start(start + (t * job.spans + s) * kLanes);
    const int64_t end = b + job.span_blocks, whole = end < job.full_blocks ? end : job.full_blocks;
    for (; b < whole; b++) {
      for (int r = 0; r < R; r++) {
        at[r] = rows[r] + b * S::bytes;
        __builtin_prefetch(at[r] + ahead);
      }
      step_rows<S>(part, at, x + b * S::block, x_row);
    }
    for (; b < end; b++) {  // at most one, and never taken by most shapes
      for (int r = 0; r < R; r++) at[r] = tail[r];
      step_rows<S>(part, at, x + b * S::block, x_row);
    }
    for (int r = 0; r < R; r++) {
      const Vec scale = spread(scales + r * job.scale_stride + s * job.span_scales, index);
      for (int t = 0; t < T; t++) total[r][t] = multiply_add(S::to_float(part[r][t]), scale, total[r][t]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) out[r * T + t] = sum(total[r][t]);
}

template <class S>
struct Rows {
  static constexpr int kChunk = 32;  // rows whose weights stay in the cache while all tokens pass
  const Job& job;
  std::atomic<int>& failed;

  void run(int64_t first, int64_t last) const {
    float* scales = static_cast<float*>(std::malloc(size_t(last - first) * size_t(job.scale_stride) * 4));
    if (!scales) return failed.store(1);
    const int64_t groups = job.k / job.group;
    for (int64_t n = first; n < last; n++) {
      float* to = scales + (n - first) * job.scale_stride;
      if (job.scale) load_floats(job.scale, job.scale_type, n * groups, groups, to);
      else to[0] = 1.0f;
      for (int64_t g = groups; g < job.scale_stride; g++) to[g] = 0.0f;
    }
    int32_t index[kLanes];
    for (int i = 0; i < kLanes; i++)
      index[i] = job.span_scales == 1 ? 0 : int32_t(i / (kLanes * job.group / S::block));
    int64_t m = 0;
    if constexpr (kLanes > 1) {  // registers for R * T sums
      for (; m + 4 <= job.m; m += 4) tokens<(together<S> ? 4 : 2), 4>(lanes(index), first, last, m, scales);
      for (; m + 2 <= job.m; m += 2) tokens<(together<S> ? 4 : 2), 2>(lanes(index), first, last, m, scales);
    }
    for (; m < job.m; m++) tokens<(kLanes > 1 ? 4 : 1), 1>(lanes(index), first, last, m, scales);
    std::free(scales);
  }

  template <int R, int T>
  void tokens(Lanes index, int64_t first, int64_t last, int64_t m, const float* scales) const {
    int64_t n = first;
    for (; n + R <= last; n += R) rows<R, T>(index, n, m, scales + (n - first) * job.scale_stride);
    for (; n < last; n++)
      for (int t = 0; t < T; t++) rows<1, 1>(index, n, m + t, scales + (n - first) * job.scale_stride);
  }

  template <int R, int T>
  void rows(Lanes index, int64_t n, int64_t m, const float* scales) const {
    float out[R * T];
    tile<S, R, T>(job, index, n, m, scales, out);
    for (int t = 0; t < T; t++)
      for (int r = 0; r < R; r++) {
        float value = out[r * T + t];
        if constexpr (S::offset != 0) value *= job.token_scale[m + t];
        if (job.bias) value += load_as_float(job.bias, job.x_type, n + r);
        const int64_t at = (m + t) * job.n + n + r;
        if (job.residual) value = load_as_float(job.residual, job.x_type, at) + rounded(value, job.x_type);
        store_float(job.y, job.x_type, at, value);
      }
  }
};

// Returns 0, or 1 where memory ran out.
template <class S>
int linear(Job job) {
  job.blocks = (job.k + S::block - 1) / S::block;
  job.full_blocks = job.row_bytes / S::bytes < job.blocks ? job.row_bytes / S::bytes : job.blocks;
  const bool channel = job.group == job.k;
  job.span_blocks = channel ? job.blocks : job.group > S::block ? job.group / S::block : 1;
  job.span_scales = channel || job.group > S::block ? 1 : S::block / job.group;
  job.spans = job.blocks / job.span_blocks;
  job.scale_stride = job.spans * job.span_scales + kLanes;

  const size_t row = size_t(job.blocks) * S::block * sizeof(typename S::In);  // a multiple of 64 bytes
  const size_t starts = size_t(job.spans) * kLanes * 4;
  char* memory = static_cast<char*>(std::aligned_alloc(64, (size_t(job.m) * (row + starts + 4) + 63) / 64 * 64));
  if (!memory) return 1;
  job.prepared = memory;
  job.start = reinterpret_cast<int32_t*>(memory + size_t(job.m) * row);
  job.token_scale = reinterpret_cast<float*>(memory + size_t(job.m) * (row + starts));

  std::atomic<int> failed{0};
  if (double(job.m) * double(job.n) * double(job.k) < 1e5) job.threads = 1;  // waking them costs more
  parallel(Prepare<S>(job), job.m, 4, job.threads);
  parallel(Rows<S>{job, failed}, job.n, Rows<S>::kChunk, job.threads);
  std::free(memory);
  return failed.load();
}

inline int linear_of(const Job& job) {
  if (job.bits == 16) return linear<BF16>(job);
  if (job.input == kAsIs) return job.bits == 4 ? linear<W4A16>(job) : linear<W8A16>(job);
  return job.bits == 4 ? linear<W4A8>(job) : linear<W8A8>(job);
}
