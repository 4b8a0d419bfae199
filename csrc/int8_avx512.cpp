// The int8 operators with AVX512-VNNI.
#include "int8_cpu.hpp"

#if VITRAIL_AVX512_VNNI
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
// GCC 12 warns of its own headers: _mm512_undefined_ps and the like.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace vitrail::int8 {
namespace {

constexpr int kLanes = 16, kRows = 6, kVectors = 4;
using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));

inline Ints dot(Ints sums, Ints bytes, Ints codes) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)bytes, (__m512i)codes);
}
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Ints to_ints(Floats value) { return (Ints)_mm512_cvtps_epi32(value); }
inline Floats half(Floats value) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
// Writes codes, and clamps them.
inline void codes(int8_t* to, Ints value) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtsepi32_epi8((__m512i)value));
}

}  // namespace
}  // namespace vitrail::int8

#include "int8_kernels.hpp"

namespace vitrail::int8 {
const Kernels kAvx512{"AVX512-VNNI", norm_quant_rows, pack_panel, linear_rows, grouped_rows};
}
#endif
