// What a decoder does to one token of each row between its linear layers.  Reference: the modules of
// qat/inference/llama.py and transformers, rounded to the type where these round; sums and softmax are float32.
// Included once for each instruction set (see vector.h).  Plain loops over kWide lanes, which compilers vectorize.

constexpr int kWide = 16;

// Sixteen partial sums: float addition is not reordered by the compiler.
inline float dot(const float* a, const float* b, int64_t count) {
  float sums[kWide] = {}, total = 0.0f;
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide)
    for (int l = 0; l < kWide; l++) sums[l] += a[i + l] * b[i + l];
  for (; i < count; i++) total += a[i] * b[i];
  for (int l = 0; l < kWide; l++) total += sums[l];
  return total;
}

inline void store_floats(void* data, Type type, int64_t at, int64_t count, const float* from) {
  if (type == kFloat32) std::memcpy(static_cast<float*>(data) + at, from, size_t(count) * 4);
  else if (type == kBFloat16)
    for (int64_t i = 0; i < count; i++) static_cast<uint16_t*>(data)[at + i] = to_bfloat16(from[i]);
  else
    for (int64_t i = 0; i < count; i++) static_cast<uint16_t*>(data)[at + i] = to_float16(from[i]);
}

inline void round_all(float* values, Type type, int64_t count) {
  if (type == kBFloat16)
    for (int64_t i = 0; i < count; i++) values[i] = from_bfloat16(to_bfloat16(values[i]));
  else if (type == kFloat16)
    for (int64_t i = 0; i < count; i++) values[i] = from_float16(to_float16(values[i]));
}

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2.  ln 2 is split in two so that n times the first part is exact
// for |n| < 2^9.  The series to r^7 / 7! leaves 0.35^8 / 8! = 5e-9 of e^r, a tenth of a unit in the last place.
// Outside of [-87, 88] the nearest end is taken; NaN stays.
inline float exponential(float x) {
  const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  return series * float_of(uint32_t(int32_t(n) + 127) << 23);
}

struct Floats {  // memory that is freed
  float* data;
  explicit Floats(int64_t count) : data(static_cast<float*>(std::malloc(size_t(count) * 4))) {}
  ~Floats() { std::free(data); }
};

inline int run(const Norm& a) {
  const Type type = Type(a.type);
  const Floats memory(2 * a.k);
  if (!memory.data) return 1;
  float *x = memory.data, *weight = x + a.k;
  load_floats(a.weight, type, 0, a.k, weight);
  for (int64_t m = 0; m < a.m; m++) {
    load_floats(a.x, type, m * a.k, a.k, x);
    const float factor = 1.0f / std::sqrt(dot(x, x, a.k) / float(a.k) + a.epsilon);
    for (int64_t i = 0; i < a.k; i++) x[i] *= factor;
    round_all(x, type, a.k);
    for (int64_t i = 0; i < a.k; i++) x[i] *= weight[i];
    store_floats(a.y, type, m * a.k, a.k, x);
  }
  return 0;
}

inline int run(const Rotary& a) {
  const Heads& s = a.shape;
  const Type type = Type(a.type);
  const int64_t d = s.head_dim, half = d / 2, size = type == kFloat32 ? 4 : 2;
  const Floats memory(5 * d);
  if (!memory.data) return 1;
  float *cos = memory.data, *sin = cos + d, *x = sin + d, *y = x + d, *turned = y + d;
  for (int64_t b = 0; b < s.batch; b++) {
    const int64_t position = *s.slot > s.start[b] ? *s.slot - s.start[b] : 0;
    load_floats(a.cos, type, position * d, d, cos);
    load_floats(a.sin, type, position * d, d, sin);
    for (int64_t h = 0; h < s.heads + 2 * s.kv_heads; h++) {
      const int64_t from = (b * (s.heads + 2 * s.kv_heads) + h) * d, kv = h - s.heads;
      const int64_t to = (b * s.kv_heads + kv % s.kv_heads) * s.capacity + *s.slot;
      if (kv >= s.kv_heads) {
        std::memcpy(static_cast<char*>(a.values) + to * d * size, static_cast<const char*>(a.qkv) + from * size,
                    size_t(d * size));
        continue;
      }
      load_floats(a.qkv, type, from, d, x);
      for (int64_t i = 0; i < half; i++) turned[i] = -x[half + i] * sin[i];
      for (int64_t i = 0; i < half; i++) turned[half + i] = x[i] * sin[half + i];
      for (int64_t i = 0; i < d; i++) y[i] = x[i] * cos[i];
      round_all(turned, type, d);
      round_all(y, type, d);
      for (int64_t i = 0; i < d; i++) y[i] += turned[i];
      if (kv < 0) store_floats(a.query, type, (b * s.heads + h) * d, d, y);
      else store_floats(a.keys, type, to * d, d, y);
    }
  }
  return 0;
}

// One key head of one row: its group of query heads reads each key and each value once.
struct AttendHeads {
  const qat::Attend& a;
  std::atomic<int>& failed;

  void run(int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; i++) one(i);
  }

  void one(int64_t row) const {
    const Heads& s = a.shape;
    const Type type = Type(a.type);
    const int64_t group = s.heads / s.kv_heads, d = s.head_dim, begin = s.start[row / s.kv_heads];
    const int64_t count = *s.slot + 1 - begin, base = row * s.capacity + begin;
    const Floats memory(group * (2 * d + count) + d);
    if (!memory.data) return failed.store(1);
    float *query = memory.data, *out = query + group * d, *one = out + group * d, *weights = one + d;
    load_floats(a.query, type, row * group * d, group * d, query);
    for (int64_t t = 0; t < count; t++) {
      load_floats(a.keys, type, (base + t) * d, d, one);
      for (int64_t g = 0; g < group; g++) weights[g * count + t] = a.scale * dot(query + g * d, one, d);
    }
    for (int64_t g = 0; g < group; g++) softmax(weights + g * count, count);
    for (int64_t i = 0; i < group * d; i++) out[i] = 0.0f;
    for (int64_t t = 0; t < count; t++) {
      load_floats(a.values, type, (base + t) * d, d, one);
      for (int64_t g = 0; g < group; g++) {
        const float weight = weights[g * count + t];
        float* to = out + g * d;
        for (int64_t i = 0; i < d; i++) to[i] += weight * one[i];
      }
    }
    store_floats(a.out, type, row * group * d, group * d, out);
  }

  static void softmax(float* x, int64_t count) {
    float largest = x[0], total = 0.0f;
    for (int64_t t = 1; t < count; t++) largest = x[t] > largest ? x[t] : largest;
    for (int64_t t = 0; t < count; t++) x[t] = exponential(x[t] - largest);
    for (int64_t t = 0; t < count; t++) total += x[t];
    for (int64_t t = 0; t < count; t++) x[t] /= total;
  }
};

inline int run(const qat::Attend& a) {
  std::atomic<int> failed{0};
  const double work = double(a.shape.batch * a.shape.heads * a.shape.head_dim) * double(*a.shape.slot + 1);
  parallel(AttendHeads{a, failed}, a.shape.batch * a.shape.kv_heads, 1, work < 1e5 ? 1 : a.threads);
  return failed.load();
}

struct GateRows {
  const qat::Gate& a;
  static constexpr int64_t kPart = 512;  // columns that one thread takes at a time

  void run(int64_t first, int64_t last) const {
    const int64_t parts = (a.n + kPart - 1) / kPart;
    for (int64_t i = first; i < last; i++) part(i / parts, i % parts * kPart);
  }

  void part(int64_t m, int64_t begin) const {
    const Type type = Type(a.type);
    const int64_t count = a.n - begin < kPart ? a.n - begin : kPart;
    float gate[kPart], up[kPart];
    load_floats(a.gate_up, type, 2 * m * a.n + begin, count, gate);
    load_floats(a.gate_up, type, (2 * m + 1) * a.n + begin, count, up);
    for (int64_t i = 0; i < count; i++) gate[i] /= 1.0f + exponential(-gate[i]);
    round_all(gate, type, count);
    for (int64_t i = 0; i < count; i++) gate[i] *= up[i];
    store_floats(a.y, type, m * a.n + begin, count, gate);
  }
};

inline int run(const qat::Gate& a) {
  const int64_t parts = (a.n + GateRows::kPart - 1) / GateRows::kPart;
  parallel(GateRows{a}, a.m * parts, 2, a.m * a.n < 20000 ? 1 : a.threads);
  return 0;
}
