// Activations for a kernel: in float32 or as integer codes, in the order in which it meets the codes of weights.
// Reference: quantized_input in qat/kernels/reference.py, dynamic_scale and quantize in qat/functional.py.
// Included once for each instruction set (see vector.h).

inline void load_floats(const void* data, Type type, int64_t at, int64_t count, float* to) {
  int64_t i = 0;
  if (type == kFloat32) {
    std::memcpy(to, static_cast<const float*>(data) + at, size_t(count) * 4);
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(data) + at;
  if (type == kBFloat16) {
    for (; i < count; i++) to[i] = from_bfloat16(halves[i]);
    return;
  }
#if QAT_ISA > 0
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
#endif
  for (; i < count; i++) to[i] = from_float16(halves[i]);
}

template <class S>
struct Prepare {
  const Job& job;
  int16_t order[S::block];

  explicit Prepare(const Job& j) : job(j) {
    for (int i = 0; i < S::block; i++) order[i] = int16_t(S::position(i));
  }

  void run(int64_t first, int64_t last) const {
    for (int64_t m = first; m < last; m++) row(m);
  }

  int load(int64_t m, int64_t block, float* values) const {
    const int64_t begin = block * S::block, left = job.k - begin;
    const int count = left < S::block ? int(left) : S::block;
    load_floats(job.x, job.x_type, m * job.k + begin, count, values);
    for (int i = count; i < S::block; i++) values[i] = 0.0f;
    return count;
  }

  void row(int64_t m) const {
    typename S::In* to = static_cast<typename S::In*>(job.prepared) + m * job.blocks * S::block;
    float values[S::block];
    if constexpr (S::offset == 0) {
      for (int64_t b = 0; b < job.blocks; b++, to += S::block) {
        load(m, b, values);
        for (int i = 0; i < S::block; i++) to[order[i]] = values[i];
      }
    } else {
      const float scale = job.input == kStatic ? job.input_scale : dynamic_scale(m);
      const bool whole = quantize(m, scale, to);
      job.token_scale[m] = whole ? scale : float_of(0x7fc00000);  // a NaN makes the token's outputs NaN
      for (int64_t s = 0; s < job.spans; s++) start(m, s, to);
    }
  }

  // Magnitudes of floats order as their bits do, infinity above every number and NaN above infinity: an integer
  // maximum keeps a NaN, as torch's does.  2^-64 is functional.SCALE_FLOOR.
  float dynamic_scale(int64_t m) const {
    float values[S::block];
    int32_t largest = 0;
    for (int64_t b = 0; b < job.blocks; b++) {
      load(m, b, values);
      for (int i = 0; i < S::block; i++) {
        const int32_t magnitude = int32_t(bits_of(values[i]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
      }
    }
    const float scale = float_of(uint32_t(largest)) / job.divisor;
    return scale < 0x1p-64f ? 0x1p-64f : scale;
  }

  // clamp(round(x / scale)), half to even: between 2^23 and 2^24 floats are whole numbers, so that adding 1.5 * 2^23
  // rounds, and subtracting it is exact.  Returns whether no ratio was NaN.
  bool quantize(int64_t m, float scale, typename S::In* to) const {
    const float low = -float(1 << (job.input_bits - 1)), high = float((1 << (job.input_bits - 1)) - 1);
    int bad = 0;
    for (int64_t b = 0; b < job.blocks; b++, to += S::block) {
      float values[S::block];
      const int count = load(m, b, values);
      for (int i = 0; i < S::block; i++) {
        float ratio = values[i] / scale;
        bad |= (ratio != ratio) & (i < count);
        ratio = ratio > low ? ratio : low;  // a NaN too
        ratio = ratio < high ? ratio : high;
        values[i] = i < count ? (ratio + 12582912.0f) - 12582912.0f : 0.0f;
      }
      for (int i = 0; i < S::block; i++) to[order[i]] = typename S::In(int32_t(values[i]));
    }
    return !bad;
  }

  void start(int64_t m, int64_t span, const typename S::In* x) const {
    uint8_t middle[S::bytes];
    std::memset(middle, S::offset, sizeof middle);
    const int32_t none[kLanes] = {};
    int32_t* to = job.start + (m * job.spans + span) * kLanes;
    typename S::Sum total[1] = {S::start(none)};
    for (int64_t b = span * job.span_blocks; b < (span + 1) * job.span_blocks; b++)
      S::step(total, middle, x + b * S::block, 0);
    S::store(to, total[0]);
    for (int i = 0; i < kLanes; i++) to[i] = -to[i];
  }
};
