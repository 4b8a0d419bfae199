// The int8 operators with AVX-VNNI: processors with VNNI, but without AVX512.
#include "int8_cpu.hpp"

#if VITRAIL_AVX_VNNI
#pragma GCC target("avx2,avxvnni,fma,f16c")
// GCC 12 warns of its own headers: _mm512_undefined_ps and the like.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace vitrail::int8 {
namespace {

constexpr int kLanes = 8, kRows = 6, kVectors = 2;
using Floats = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));

inline Ints dot(Ints sums, Ints bytes, Ints codes) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)bytes, (__m256i)codes);
}
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Ints to_ints(Floats value) { return (Ints)_mm256_cvtps_epi32(value); }
inline Floats half(Floats value) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
// Writes codes, and clamps them.
inline void codes(int8_t* to, Ints value) {
    const __m256i wide = (__m256i)value;
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(words, words));
}

}  // namespace
}  // namespace vitrail::int8

#include "int8_kernels.hpp"

namespace vitrail::int8 {
const Kernels kAvxVnni{"AVX-VNNI", norm_quant_rows, pack_panel, linear_rows, grouped_rows};
}
#endif
