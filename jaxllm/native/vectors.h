// Vectors of float32 as GCC and Clang write them for any processor, 16-bit floats among them, and
// the matrix product of attention and of weights, which asks for memory ahead.
//
// Everything here has internal linkage: it is compiled for the processor it runs on.

#ifndef JAXLLM_NATIVE_VECTORS_H_
#define JAXLLM_NATIVE_VECTORS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace jaxllm {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRows = 6, kVectors = 4;  // 24 of 32 registers are sums
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRows = 6, kVectors = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRows = 6, kVectors = 4;  // 24 of 32
#else
constexpr int kVectorBytes = 16;
constexpr int kRows = 6, kVectors = 2;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// The bits of a number of each type that a cache may hold.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr long RoundUp(long count, long to = kLanes) { return (count + to - 1) / to * to; }

template <class E>
inline void Clear(E* numbers, long count) {
  std::memset(static_cast<void*>(numbers), 0, count * sizeof(E));
}

inline Floats Splat(float x) { return x - Floats{}; }

inline Floats Choose(Ints mask, Floats yes, Floats no) {
  return reinterpret_cast<Floats>((mask & reinterpret_cast<Ints>(yes)) |
                                  (~mask & reinterpret_cast<Ints>(no)));
}

inline Floats Larger(Floats x, Floats y) { return Choose(x > y, x, y); }

// Of a function that asks for memory ahead and does nothing else: GCC would take a call of one for
// a call without effect, and drop it.
#define JAXLLM_PREFETCHES __attribute__((always_inline)) inline

// ------------------------------------------------------------------ numbers in memory

inline Floats Load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void Store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline Bits LoadBits(const void* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, Bits);
}

inline Floats Load(const BFloat16* from) { return reinterpret_cast<Floats>(LoadBits(from) << 16); }

// Of float16, by the processor where it can: it flushes none to zero either.
#if defined(__AVX512F__)
inline Floats FromHalf(Halves x) {
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(x)));
}
#elif defined(__F16C__)
inline Floats FromHalf(Halves x) {
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x)));
}
#else
inline Floats FromHalf(Halves x) {
  const Bits bits = __builtin_convertvector(x, Bits);
  const Bits magnitude = (bits & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
  const Bits normal = magnitude + ((127 - 15) << 23);
  const Bits huge = normal + ((127 - 15) << 23);  // infinity and NaN
  // A subnormal is its fraction beside a one, minus that one: nothing here is flushed to zero.
  const Bits one = Bits{} + 0x38800000;
  const Bits small = reinterpret_cast<Bits>(reinterpret_cast<Floats>(magnitude + one) -
                                            reinterpret_cast<Floats>(one));
  const Floats finite =
      Choose(exponent == 0, reinterpret_cast<Floats>(small), reinterpret_cast<Floats>(normal));
  const Floats all = Choose(exponent == 0x0f800000, reinterpret_cast<Floats>(huge), finite);
  return reinterpret_cast<Floats>(reinterpret_cast<Bits>(all) | (bits & 0x8000) << 16);
}
#endif

inline Floats Load(const Float16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return FromHalf(x);
}

template <class T>
inline float LoadOne(const T* from) {
  T padded[kLanes] = {*from};
  return Load(padded)[0];
}

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline void StoreOne(float* to, float x) { *to = x; }

// Rounded to the nearest, to the even one of two.
inline void StoreOne(BFloat16* to, float x) {
  const uint32_t bits = BitsOf(x);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline void Store(BFloat16* to, Floats x) {
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Ints is_nan = x != x;
  const Bits mask = reinterpret_cast<Bits>(is_nan);
  const Halves halves = __builtin_convertvector((mask & 0x7fc0) | (~mask & rounded), Halves);
  std::memcpy(to, &halves, sizeof halves);
}

inline void StoreOne(Float16* to, float x) {
  const uint32_t sign = BitsOf(x) >> 16 & 0x8000, bits = BitsOf(x) & 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // half of the last step over 65504, or more
    half = 0x7c00;
  } else if (bits >= 0x38800000) {
    half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  } else {  // subnormal: the addition rounds
    float positive;
    std::memcpy(&positive, &bits, sizeof positive);
    half = BitsOf(positive + 0.5f) - BitsOf(0.5f);
  }
  to->bits = sign | half;
}

#if defined(__AVX512F__)
inline Halves ToHalf(Floats x) {
  const __m512 numbers = reinterpret_cast<__m512>(x);
  return reinterpret_cast<Halves>(_mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Halves ToHalf(Floats x) {
  const __m256 numbers = reinterpret_cast<__m256>(x);
  return reinterpret_cast<Halves>(_mm256_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Halves ToHalf(Floats x) {
  Float16 numbers[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) StoreOne(numbers + lane, x[lane]);
  Halves rounded;
  std::memcpy(&rounded, numbers, sizeof rounded);
  return rounded;
}
#endif

inline void Store(Float16* to, Floats x) {
  const Halves rounded = ToHalf(x);
  std::memcpy(static_cast<void*>(to), &rounded, sizeof rounded);
}

// Stores, where a number that is not normal may become 0: matrix units take it for that.
template <class T>
inline void StoreNormal(T* to, Floats x) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    std::memcpy(static_cast<void*>(to), &halves, sizeof halves);
    return;
  }
#endif
  Store(to, x);
}

// The first `count` numbers, and zeros.
template <class T>
inline Floats LoadSome(const T* from, long count) {
  T padded[kLanes] = {};
  std::memcpy(static_cast<void*>(padded), from, count * sizeof(T));
  return Load(padded);
}

template <class T>
inline void StoreSome(T* to, Floats x, long count) {
  T padded[kLanes];
  Store(padded, x);
  std::memcpy(static_cast<void*>(to), padded, count * sizeof(T));
}

// Up to a whole vector.
template <class T>
inline Floats LoadUpTo(const T* from, long count) {
  return count == kLanes ? Load(from) : LoadSome(from, count);
}

template <class T>
inline void StoreUpTo(T* to, Floats x, long count) {
  count == kLanes ? Store(to, x) : StoreSome(to, x, count);
}

// Calls `body(i, count)` for each vector of so many numbers: where it begins, and what it has.
template <class Body>
inline void ForVectors(long size, const Body& body) {
  long i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, static_cast<long>(kLanes));
  if (i < size) body(i, size - i);
}

// ------------------------------------------------------------------ functions

// A polynomial of r, near 0, that is e^r: Cephes' expf.
inline Floats ExpNear(Floats r) {
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  return y * r * r + r + 1.0f;
}

// e^x of x <= 0, relative error under 2e-7; 0 under -87.
#if defined(__AVX512F__)
inline Floats Exp(Floats x) {
  const __m512 any = reinterpret_cast<__m512>(x);
  const __mmask16 some = _mm512_cmp_ps_mask(any, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(any * 1.44269504088896341f, 0);  // to the nearest
  const __m512 r = any - n * 0.693359375f + n * 2.12194440e-4f;
  const __m512 y = reinterpret_cast<__m512>(ExpNear(reinterpret_cast<Floats>(r)));
  // Not of the others: a number that is not normal takes a hundred times as long.
  return reinterpret_cast<Floats>(_mm512_maskz_scalef_ps(some, y, n));
}
#else
inline Floats Exp(Floats x) {
  const Ints none = x < -87.0f;
  const Floats safe = Choose(none, Splat(-87.0f), x);
  const Floats magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats power = safe * 1.44269504088896341f + magic;
  const Floats n = power - magic;
  const Floats r = safe - n * 0.693359375f + n * 2.12194440e-4f;
  const Bits scale = reinterpret_cast<Bits>(__builtin_convertvector(n, Ints) + 127) << 23;
  return Choose(none, Floats{}, ExpNear(r) * reinterpret_cast<Floats>(scale));
}
#endif

// tanh x. Near 0, the polynomial of Cephes' tanhf; else by way of e^(-2|x|).
inline Floats Tanh(Floats x) {
  const Floats size = Choose(x < 0.0f, -x, x);
  const Floats e = Exp(size * -2.0f);
  const Floats far = (1.0f - e) / (1.0f + e);
  const Floats z = x * x;
  Floats y = z * -5.70498872745e-3f + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  const Floats near = y * z * x + x;
  return Choose(size < 0.625f, near, Choose(x < 0.0f, -far, far));
}

#if defined(__GNUC__) && !defined(__clang__)
template <int kHalf>
inline Floats Moved(Floats x) {  // lane i takes that of i + kHalf
  Ints from;
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = (lane + kHalf) % kLanes;
  return __builtin_shuffle(x, from);
}
#else
template <int kHalf>
inline Floats Moved(Floats x) {
  float lanes[2 * kLanes];
  Store(lanes, x);
  Store(lanes + kLanes, x);
  return Load(lanes + kHalf);
}
#endif

// Folds halves onto each other, as often as it takes to one number.
template <class Fold, int kHalf = kLanes / 2>
inline float Folded(Floats x, Fold fold) {
  x = fold(x, Moved<kHalf>(x));
  if constexpr (kHalf > 1)
    return Folded<Fold, kHalf / 2>(x, fold);
  else
    return x[0];
}

inline float Largest(Floats x) {
  return Folded(x, [](Floats a, Floats b) { return Larger(a, b); });
}

inline float Sum(Floats x) {
  return Folded(x, [](Floats a, Floats b) { return a + b; });
}

// ------------------------------------------------------------------ the product

constexpr long kLine = 64 / sizeof(float);  // numbers of a line of the cache

// Memory that is read next is asked for step by step of a product: all at once, the requests would
// wait for each other, and what is computed for them. Here, rows of it that lie apart.
struct Soon {
  const char* at = nullptr;
  long row = 0;   // bytes from one to the next
  long rows = 0;  // that are left
  long lines = 0;

  JAXLLM_PREFETCHES void Ask() {
    if (rows <= 0) return;
    for (long i = 0; i < lines; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += row, --rows;
  }

  JAXLLM_PREFETCHES void AskAll() {
    while (rows > 0) Ask();
  }

  template <int>
  JAXLLM_PREFETCHES void Step(long) {
    Ask();
  }
};

// The same of memory in one piece, which holds numbers of a type.
template <class E>
struct Ahead {
  const char *at = nullptr, *end = nullptr;

  template <int kLines>
  JAXLLM_PREFETCHES void Ask() {
    if (at >= end) return;
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += 64 * kLines;
  }

  // This follows the kR rows of a product's left side, and is asked for as fast as they are read.
  template <int kR>
  JAXLLM_PREFETCHES void Step(long k) {
    if (k % static_cast<long>(64 / sizeof(E)) == 0) Ask<kR>();
  }
};

// The same of rows that are read across: a line of each of so many together, then the line behind
// it of each, then of the next rows. What is asked for first lies kLead lines behind the first.
// Behind the last row, too: to ask for memory that is not there does no harm.
class Across {
 public:
  Across() = default;

  // Of `rows` rows with so many bytes, from one to the next.
  Across(const void* from, long row, long rows, long together)
      : at_(static_cast<const char*>(from)),
        row_(row),
        lines_(RoundUp(row, 64) / 64),
        left_(lines_),
        rows_(rows),
        together_(together) {
    for (long i = 0; i < kLead; ++i) Go();
  }

  template <int kTogether>
  JAXLLM_PREFETCHES void Ask() {
    if (rows_ <= 0) return;
    for (int r = 0; r < kTogether; ++r) __builtin_prefetch(at_ + r * row_, 0, 2);
    Go();
  }

 private:
  static constexpr long kLead = 4;

  void Go() {
    at_ += 64;
    if (--left_ > 0) return;
    at_ += together_ * row_ - lines_ * 64;
    left_ = lines_, rows_ -= together_;
  }

  const char* at_ = nullptr;
  long row_ = 0, lines_ = 0, left_ = 0;
  long rows_ = 0;  // of which nothing, or not all, was asked for
  long together_ = 0;
};

// Whether two vectors of bfloat16 at once are widened by a shift and a mask: then the first has the
// numbers at even places, and the second those at odd ones.
template <class T, int kV>
constexpr bool kSplit = std::is_same_v<T, BFloat16> && kV % 2 == 0;

// A row of the right side, kV vectors of it.
template <int kV, class T>
inline void LoadRow(const T* from, Floats* to) {
  if constexpr (kSplit<T, kV>) {
    for (int v = 0; v < kV; v += 2) {
      Bits pairs;
      std::memcpy(&pairs, from + v * kLanes, sizeof pairs);
      to[v] = reinterpret_cast<Floats>(pairs << 16);
      to[v + 1] = reinterpret_cast<Floats>(pairs & 0xffff0000);
    }
  } else {
    for (int v = 0; v < kV; ++v) to[v] = Load(from + v * kLanes);
  }
}

#if defined(__GNUC__) && !defined(__clang__)
inline Floats Chosen(const Floats* two, Ints which) {
  return __builtin_shuffle(two[0], two[1], which);
}
#else
inline Floats Chosen(const Floats* two, Ints which) {
  float numbers[2 * kLanes];
  Store(numbers, two[0]);
  Store(numbers + kLanes, two[1]);
  Floats chosen;
  for (int lane = 0; lane < kLanes; ++lane) chosen[lane] = numbers[which[lane]];
  return chosen;
}
#endif

// Two vectors side by side become numbers at even and at odd places, and the other way round.
inline void Split(Floats* two) {
  Ints even, odd;
  for (int lane = 0; lane < kLanes; ++lane) even[lane] = 2 * lane, odd[lane] = 2 * lane + 1;
  const Floats first = Chosen(two, even);
  two[1] = Chosen(two, odd);
  two[0] = first;
}

inline void Join(Floats* two) {
  Ints low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane / 2 + lane % 2 * kLanes;
    high[lane] = low[lane] + kLanes / 2;
  }
  const Floats first = Chosen(two, low);
  two[1] = Chosen(two, high);
  two[0] = first;
}

// c [kR, kV vectors] (+)= a [kR, depth] b [depth, kV vectors]. `Next` is `Soon` or `Ahead`.
template <class T, int kR, int kV, class Next>
inline void Tile(const float* a, long a_row, const T* b, long b_row, float* c, long c_row,
                 long depth, bool add, Next& next) {
  Next ahead = next;  // in registers
  Floats sums[kR][kV];
  for (int r = 0; r < kR; ++r) {
    for (int v = 0; v < kV; ++v) sums[r][v] = add ? Load(c + r * c_row + v * kLanes) : Floats{};
    if constexpr (kSplit<T, kV>)
      for (int v = 0; add && v < kV; v += 2) Split(sums[r] + v);
  }
  const auto sum = [&](long k, Floats(&to)[kR][kV]) __attribute__((always_inline)) {
    ahead.template Step<kR>(k);
    Floats right[kV];
    LoadRow<kV>(b + k * b_row, right);
    for (int r = 0; r < kR; ++r) {
      const float left = a[r * a_row + k];
      for (int v = 0; v < kV; ++v) to[r][v] += left * right[v];
    }
  };
  long k = 0;
  if constexpr (kR * kV <= 4) {  // so few that each would wait for itself
    Floats others[kR][kV] = {};
    for (; k + 2 <= depth; k += 2) {
      sum(k, sums);
      sum(k + 1, others);
    }
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) sums[r][v] += others[r][v];
  }
  for (; k < depth; ++k) sum(k, sums);
  for (int r = 0; r < kR; ++r) {
    if constexpr (kSplit<T, kV>)
      for (int v = 0; v < kV; v += 2) Join(sums[r] + v);
    for (int v = 0; v < kV; ++v) Store(c + r * c_row + v * kLanes, sums[r][v]);
  }
  next = ahead;
}

template <class T, int kV>
inline void Rest(const float* a, long a_row, const T* b, long b_row, float* c, long c_row,
                 long rows, long depth, bool add, Soon& soon) {
  switch (rows) {
    case 5:
      return Tile<T, 5, kV>(a, a_row, b, b_row, c, c_row, depth, add, soon);
    case 4:
      return Tile<T, 4, kV>(a, a_row, b, b_row, c, c_row, depth, add, soon);
    case 3:
      return Tile<T, 3, kV>(a, a_row, b, b_row, c, c_row, depth, add, soon);
    case 2:
      return Tile<T, 2, kV>(a, a_row, b, b_row, c, c_row, depth, add, soon);
    case 1:
      return Tile<T, 1, kV>(a, a_row, b, b_row, c, c_row, depth, add, soon);
  }
}

template <class T, int kV>
inline void Rows(const float* a, long a_row, const T* b, long b_row, float* c, long c_row,
                 long rows, long depth, bool add, Soon& soon) {
  long r = 0;
  for (; r + kRows <= rows; r += kRows)
    Tile<T, kRows, kV>(a + r * a_row, a_row, b, b_row, c + r * c_row, c_row, depth, add, soon);
  if constexpr (kV == 1)  // rare: not worth the time to compile more of them
    for (; r < rows; ++r)
      Tile<T, 1, 1>(a + r * a_row, a_row, b, b_row, c + r * c_row, c_row, depth, add, soon);
  else
    Rest<T, kV>(a + r * a_row, a_row, b, b_row, c + r * c_row, c_row, rows - r, depth, add, soon);
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; columns are whole vectors. All of
// `soon` is asked for.
template <class T>
__attribute__((noinline)) void Multiply(const float* a, long a_row, const T* b, long b_row,
                                        float* c, long c_row, long rows, long depth, long columns,
                                        bool add, Soon soon) {
  long n = 0;
  for (; n + kVectors * kLanes <= columns; n += kVectors * kLanes)
    Rows<T, kVectors>(a, a_row, b + n, b_row, c + n, c_row, rows, depth, add, soon);
  if constexpr (kVectors > 2)
    for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
      Rows<T, 2>(a, a_row, b + n, b_row, c + n, c_row, rows, depth, add, soon);
  for (; n < columns; n += kLanes)
    Rows<T, 1>(a, a_row, b + n, b_row, c + n, c_row, rows, depth, add, soon);
  soon.AskAll();
}

}  // namespace
}  // namespace jaxllm

#endif  // JAXLLM_NATIVE_VECTORS_H_
